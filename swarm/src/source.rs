//! What the swarm knows of one source: whether it rests, how much it is asked at once, how fast it answers.

use std::time::Duration;

use crate::config::{Config, doubled};
use crate::swarm::{Priority, SourceKind};

/// One source, over all layers that it serves.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) kind: SourceKind,
    /// Layers that have it.
    pub(crate) layers: usize,
    in_flight: [Load; 3],
    /// Failures with blame since the last good chunk.
    failures: u32,
    failing_since: Option<Duration>,
    rest_until: Duration,
    demand_rest_until: Duration,
    pub(crate) last_progress: Option<Duration>,
    /// When it last moved anything, gave a sign of life, and was asked for one.
    moved_at: Duration,
    alive_at: Duration,
    pub(crate) asked_at: Duration,
    /// It lives, and gave nothing for so long that this does not count.
    is_stuck: bool,
    /// It said that it has enough to do, for demand and for all else; no fault.
    busy_until: [Duration; 2],
    /// Since when it says nothing else.
    busy_since: Option<Duration>,
    /// It sent a wrong chunk: it is never asked again.
    pub(crate) is_cut: bool,
    pace: Option<Pace>,
    /// Smoothed time from a request to its first chunk, and when it was learned.
    answer: (Duration, Duration),
}

/// What was learned of a line counts half after so long.
const ANSWER_HALF_LIFE: Duration = Duration::from_millis(100);
/// No wait is less.
const ANSWER_MIN: Duration = Duration::from_millis(2);

/// After so many failures in a row what a source says is not believed.
const FAILURES_MAX: u32 = 3;

#[derive(Clone, Copy, Debug, Default)]
struct Load {
    bytes: u64,
    fetches: usize,
}

/// Smoothed time between two signs of life of a fetch, and its deviation (as RFC 6298 does for round trips).
#[derive(Clone, Copy, Debug)]
struct Pace {
    mean: Duration,
    deviation: Duration,
}

impl Source {
    pub(crate) fn new(kind: SourceKind) -> Self {
        Self {
            kind,
            layers: 0,
            in_flight: [Load::default(); 3],
            failures: 0,
            failing_since: None,
            rest_until: Duration::ZERO,
            demand_rest_until: Duration::ZERO,
            last_progress: None,
            moved_at: Duration::ZERO,
            alive_at: Duration::ZERO,
            asked_at: Duration::ZERO,
            is_stuck: false,
            busy_until: [Duration::ZERO; 2],
            busy_since: None,
            is_cut: false,
            pace: None,
            answer: Default::default(),
        }
    }

    /// From when the source may be asked for a chunk of `priority`.
    pub(crate) fn rests_until(&self, priority: Priority) -> Duration {
        let [demand, other] = self.busy_until;
        self.fails_until(priority).max(priority.choose(demand, other, other))
    }

    /// The same for what it asked this node to fetch: for that it is never too busy.
    pub(crate) fn fails_until(&self, priority: Priority) -> Duration {
        match priority {
            _ if self.is_cut => Duration::MAX,
            Priority::Demand => self.demand_rest_until,
            Priority::Readahead | Priority::Background => self.rest_until,
        }
    }

    /// It is not to be asked before `until` for what is as urgent as `priority` or less, without being at fault.
    pub(crate) fn busy(&mut self, now: Duration, priority: Priority, until: Duration) {
        let [demand, other] = &mut self.busy_until;
        *other = until.max(*other);
        if priority == Priority::Demand {
            *demand = until.max(*demand);
        }
        self.busy_since.get_or_insert(now);
    }

    /// Whether what it claims to have can be counted on: it did not fail several times in a row, nor was only ever busy.
    pub(crate) fn is_reliable(&self, config: &Config, now: Duration) -> bool {
        let is_busy_for_long = self.busy_since.is_some_and(|since| since + config.busy_patience <= now);
        !self.is_cut && self.failures < FAILURES_MAX && !is_busy_for_long
    }

    /// It gave a sign of life that is no chunk.
    pub(crate) fn alive(&mut self, now: Duration) {
        self.alive_at = now;
        if !self.is_stuck && self.failing_since.take().is_some() {
            self.failures = 0;
            self.rest_until = Duration::ZERO;
            self.demand_rest_until = Duration::ZERO;
        }
    }

    /// It moves bytes, or answers that it cannot now.
    pub(crate) fn moved(&mut self, now: Duration) {
        self.is_stuck = false;
        self.moved_at = now;
        self.alive(now);
    }

    /// When it last moved bytes or answered.
    pub(crate) fn moved_at(&self) -> Duration {
        self.moved_at
    }

    /// When it last gave any sign of life.
    pub(crate) fn alive_at(&self) -> Duration {
        self.alive_at
    }

    /// It has failed for at least so long.
    pub(crate) fn fails_since(&mut self, since: Duration) {
        self.failing_since = Some(self.failing_since.map_or(since, |before| before.min(since)));
    }

    /// Whatever it says, it gives nothing, and has failed to since it last did or `since`.
    pub(crate) fn stick(&mut self, since: Duration) {
        self.is_stuck = true;
        self.failing_since = Some(since.max(self.moved_at));
    }

    /// When it will have given nothing but failures for `limit`; `None` where it is not failing.
    pub(crate) fn fails_for_at(&self, limit: Duration) -> Option<Duration> {
        self.failing_since.map(|since| since + limit)
    }

    /// Whether `bytes` more of `priority` fit: into the limit of its class and of every more urgent one, each of which
    /// counts itself and what is less urgent. So there is always room for demand that the others cannot take. A fetch
    /// of any size may start where nothing as urgent is in flight.
    pub(crate) fn has_room(&self, config: &Config, priority: Priority, bytes: u64) -> bool {
        let mut urgent = Priority::ALL.into_iter().filter(|class| *class <= priority);
        if urgent.clone().all(|class| self.load(class).fetches == 0) {
            return true;
        }
        urgent.all(|class| {
            let counted = Priority::ALL.into_iter().filter(|other| *other >= class).map(|other| self.load(other));
            let (in_flight_bytes, fetches) =
                counted.fold((0, 0), |(bytes, fetches), load| (bytes + load.bytes, fetches + load.fetches));
            in_flight_bytes + bytes <= config.in_flight_bytes_max(class)
                && fetches < config.in_flight_fetches_max(class)
        })
    }

    /// The first chunk of a request came after `time`.
    pub(crate) fn answered(&mut self, now: Duration, time: Duration) {
        let (mean, _) = self.answer;
        self.answer = (if mean.is_zero() { time } else { (mean * 3 + time) / 4 }, now);
    }

    /// A request waits for its first chunk, or the next one, for `time` by now: longer than it should.
    pub(crate) fn late(&mut self, now: Duration, time: Duration) {
        self.answer = (self.line(now).max(time), now);
    }

    /// How long one more request would probably wait here: its line, as far as it was learned lately, and what this node
    /// added to it.
    pub(crate) fn expected_wait(&self, now: Duration) -> Duration {
        (self.line(now) + ANSWER_MIN) * u32::try_from(self.in_flight_fetches() + 1).unwrap_or(u32::MAX)
    }

    /// How long requests wait here, as far as it was learned lately.
    fn line(&self, now: Duration) -> Duration {
        let (mean, at) = self.answer;
        let age = now.saturating_sub(at).as_micros() / ANSWER_HALF_LIFE.as_micros();
        mean / (1 << age.min(16))
    }

    pub(crate) fn in_flight_fetches(&self) -> usize {
        self.in_flight.iter().map(|load| load.fetches).sum()
    }

    pub(crate) fn in_flight_bytes(&self) -> u64 {
        self.in_flight.iter().map(|load| load.bytes).sum()
    }

    pub(crate) fn start(&mut self, priority: Priority, bytes: u64) {
        let load = self.load_mut(priority);
        load.bytes += bytes;
        load.fetches += 1;
    }

    pub(crate) fn end(&mut self, priority: Priority, bytes: u64) {
        let load = self.load_mut(priority);
        load.bytes = load.bytes.saturating_sub(bytes);
        load.fetches = load.fetches.saturating_sub(1);
    }

    /// A good chunk came `gap` after the fetch's last sign of life.
    pub(crate) fn progress(&mut self, now: Duration, gap: Duration) {
        self.busy_since = None;
        self.failures = 0;
        self.failing_since = None;
        self.rest_until = Duration::ZERO;
        self.demand_rest_until = Duration::ZERO;
        self.last_progress = Some(now);
        self.moved(now);
        self.pace = Some(match self.pace {
            None => Pace { mean: gap, deviation: gap / 2 },
            Some(Pace { mean, deviation }) => {
                Pace { mean: (mean * 7 + gap) / 8, deviation: (deviation * 3 + mean.abs_diff(gap)) / 4 }
            }
        });
    }

    /// The source is to blame: it rests. `jitter` is in 0..=255 and spreads the rest by a quarter in both directions.
    pub(crate) fn blame(&mut self, config: &Config, now: Duration, retry_after: Option<Duration>, jitter: u8) {
        self.failures = self.failures.saturating_add(1);
        self.failing_since.get_or_insert(now);
        let spread = |rest: Duration| rest * (192 + u32::from(jitter) / 2) / 256;
        let rest = doubled(config.rest_min, self.failures);
        // What a neighbour has is elsewhere too: at the seeder, if not at others.
        let demand_rest_max = if self.kind == SourceKind::Peer { config.rest_max } else { config.demand_rest_max };
        let asked = retry_after.unwrap_or_default().min(config.rest_max);
        self.rest_until = now + spread(rest.min(config.rest_max)).max(asked);
        self.demand_rest_until = now + spread(rest.min(demand_rest_max)).max(asked);
    }

    /// How long one of its fetches may make no progress before its chunks are asked elsewhere.
    pub(crate) fn hedge_after(&self, config: &Config, now: Duration) -> Duration {
        let learned = self.pace.map_or(Duration::ZERO, |Pace { mean, deviation }| mean + deviation * 4);
        let limit = learned.max(config.hedge_after).min(config.hedge_after_max);
        let is_alive = self.last_progress.is_some_and(|at| now.saturating_sub(at) < limit);
        if is_alive { config.hedge_after_max } else { limit }
    }

    fn load(&self, priority: Priority) -> Load {
        let [demand, readahead, background] = self.in_flight;
        priority.choose(demand, readahead, background)
    }

    fn load_mut(&mut self, priority: Priority) -> &mut Load {
        let [demand, readahead, background] = &mut self.in_flight;
        priority.choose(demand, readahead, background)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_longer_with_each_failure_and_less_for_demand() {
        let config = Config::default();
        let mut source = Source::new(SourceKind::Seeder);
        let mut last = Duration::ZERO;
        for _ in 0..5 {
            source.blame(&config, Duration::ZERO, None, 128);
            assert!(source.rests_until(Priority::Background) > last);
            last = source.rests_until(Priority::Background);
        }
        assert!(source.rests_until(Priority::Demand) <= config.demand_rest_max);
        source.progress(Duration::from_secs(1), Duration::from_millis(3));
        assert_eq!(source.rests_until(Priority::Background), Duration::ZERO);
    }

    #[test]
    fn background_leaves_room_for_demand() {
        let config = Config::default();
        let mut source = Source::new(SourceKind::Seeder);
        while source.has_room(&config, Priority::Background, 1 << 20) {
            source.start(Priority::Background, 1 << 20);
        }
        assert!(source.in_flight_bytes() <= config.in_flight_bytes_max(Priority::Background));
        assert!(source.has_room(&config, Priority::Readahead, 1 << 20));
        assert!(source.has_room(&config, Priority::Demand, 1 << 20));
    }

    #[test]
    fn hedges_by_what_it_learned() {
        let config = Config::default();
        let mut source = Source::new(SourceKind::Seeder);
        assert_eq!(source.hedge_after(&config, Duration::ZERO), config.hedge_after);
        for _ in 0..50 {
            source.progress(Duration::from_secs(1), Duration::from_millis(60));
        }
        let later = Duration::from_secs(2);
        assert_eq!(source.hedge_after(&config, later), config.hedge_after);
        assert_eq!(source.hedge_after(&config, Duration::from_millis(1100)), config.hedge_after_max);
        for _ in 0..50 {
            source.progress(Duration::from_secs(1), Duration::from_millis(900));
        }
        assert!(source.hedge_after(&config, later) >= Duration::from_millis(900));
    }
}
