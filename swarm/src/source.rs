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
    last_progress: Option<Duration>,
    pace: Option<Pace>,
}

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
            pace: None,
        }
    }

    /// From when the source may be asked for a chunk of `priority`.
    pub(crate) fn rests_until(&self, priority: Priority) -> Duration {
        if priority == Priority::Demand { self.demand_rest_until } else { self.rest_until }
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
        self.failures = 0;
        self.failing_since = None;
        self.rest_until = Duration::ZERO;
        self.demand_rest_until = Duration::ZERO;
        self.last_progress = Some(now);
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
        let asked = retry_after.unwrap_or_default().min(config.rest_max);
        self.rest_until = now + spread(rest.min(config.rest_max)).max(asked);
        self.demand_rest_until = now + spread(rest.min(config.demand_rest_max)).max(asked);
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
