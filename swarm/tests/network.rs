//! The swarm on a virtual network: sources with latency, bandwidth and faults, all from a seed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use layer::Geometry;
use proptest::prelude::*;
use swarm::{Action, Config, FetchId, LayerKey, Outcome, Priority, SourceId, SourceKind, Swarm, Verdict};

const LOG2: u8 = 17;
const CHUNK: u64 = 1 << LOG2;
const DEADLINE: Duration = Duration::from_secs(20);
/// Chunks of a unit that is a stream.
const STREAM: u32 = 1000;

/// How a source behaves. Chances are of 256.
#[derive(Clone, Debug)]
struct Behaviour {
    kind: SourceKind,
    latency: Duration,
    bytes_per_sec: u64,
    /// Chunks of a unit; 0: no units.
    unit: u32,
    fail: u8,
    wrong: u8,
    missing: u8,
    stall: u8,
    short: u8,
    /// Answers nothing but errors before this time.
    down_until: Duration,
}

impl Behaviour {
    fn good(kind: SourceKind) -> Self {
        Self {
            kind,
            latency: Duration::from_millis(2),
            bytes_per_sec: 25_000_000,
            unit: 0,
            fail: 0,
            wrong: 0,
            missing: 0,
            stall: 0,
            short: 0,
            down_until: Duration::ZERO,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Chunk(FetchId, u32, bool),
    End(FetchId, u8),
    Want(u64, u32, u32, Priority),
}

/// One swarm, its sources and everything it said.
struct Net {
    swarm: Swarm,
    now: Duration,
    behaviours: Vec<Behaviour>,
    free_at: Vec<Duration>,
    events: BTreeSet<(Duration, u64, Event)>,
    next: u64,
    random: u64,
    config: Config,
    chunks: u32,
    running: BTreeMap<FetchId, (u64, usize, Range<u32>, Priority, bool)>,
    here: BTreeSet<(u64, u32)>,
    wanted_at: BTreeMap<(u64, u32), Duration>,
    delivered_after: Vec<Duration>,
    failed: Vec<(Duration, u64, u32)>,
    bytes: Vec<u64>,
    hedges: usize,
    trace: Vec<(Duration, Action)>,
}

impl Net {
    fn new(seed: u64, layers: u64, chunks: u32, behaviours: Vec<Behaviour>) -> Self {
        let config = Config::default();
        let mut swarm = Swarm::new(config.clone(), seed);
        let geometry = Geometry::new(u64::from(chunks) * CHUNK, LOG2).unwrap();
        for layer in 0..layers {
            swarm.add_layer(LayerKey(layer), geometry);
            for (id, behaviour) in behaviours.iter().enumerate() {
                swarm.add_source(
                    LayerKey(layer),
                    SourceId(id as u64),
                    behaviour.kind,
                    units(behaviour.unit, geometry.device_size()),
                );
            }
        }
        Self {
            swarm,
            now: Duration::ZERO,
            free_at: vec![Duration::ZERO; behaviours.len()],
            bytes: vec![0; behaviours.len()],
            behaviours,
            events: BTreeSet::new(),
            next: 0,
            random: seed | 1,
            config,
            chunks,
            running: BTreeMap::new(),
            here: BTreeSet::new(),
            wanted_at: BTreeMap::new(),
            delivered_after: Vec::new(),
            failed: Vec::new(),
            hedges: 0,
            trace: Vec::new(),
        }
    }

    /// How long a chunk may be waited for.
    fn patience(&self) -> Duration {
        let has_streams = self.behaviours.iter().any(|behaviour| behaviour.unit == STREAM);
        if has_streams { DEADLINE + self.config.stream_patience } else { DEADLINE }
    }

    fn at(&mut self, time: Duration, event: Event) {
        self.next += 1;
        self.events.insert((time, self.next, event));
    }

    fn want_at(&mut self, millis: u64, layer: u64, run: Range<u32>, priority: Priority) {
        self.at(Duration::from_millis(millis), Event::Want(layer, run.start, run.end, priority));
    }

    fn chance(&mut self, of_256: u8) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        ((self.random >> 24) & 0xff) < u64::from(of_256)
    }

    /// Runs until nothing happens any more before `end`.
    fn run(&mut self, end: Duration) {
        loop {
            self.drain();
            let event = self.events.first().map(|(at, ..)| *at);
            let Some(at) = event.into_iter().chain(self.swarm.poll_timeout()).min().filter(|at| *at <= end) else {
                self.now = end;
                return;
            };
            self.now = self.now.max(at);
            if self.swarm.poll_timeout().is_some_and(|timeout| timeout <= self.now) {
                self.swarm.handle_timeout(self.now);
            }
            while let Some((_, _, event)) = self.events.first().filter(|(at, ..)| *at <= self.now).cloned() {
                self.events.pop_first();
                self.handle(event);
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Want(layer, start, end, priority) => {
                for chunk in start..end {
                    if self.here.contains(&(layer, chunk)) {
                        continue;
                    }
                    if priority == Priority::Demand {
                        self.wanted_at.entry((layer, chunk)).or_insert(self.now);
                    }
                    self.swarm.want(self.now, LayerKey(layer), chunk..chunk + 1, priority, self.now + DEADLINE);
                }
            }
            Event::Chunk(fetch, chunk, right) => {
                let Some((layer, ..)) = self.running.get(&fetch).cloned() else { return };
                let verdict = if right { Verdict::Verified } else { Verdict::Wrong };
                if right {
                    self.here.insert((layer, chunk));
                    if let Some(since) = self.wanted_at.remove(&(layer, chunk)) {
                        self.delivered_after.push(self.now - since);
                    }
                }
                self.swarm.on_chunk(self.now, fetch, chunk, verdict);
            }
            Event::End(fetch, how) => {
                if self.running.remove(&fetch).is_some() {
                    let outcome = match how {
                        0 => Outcome::Done,
                        1 => Outcome::Missing { reason: "missing".into() },
                        _ => Outcome::Failed { reason: "failed".into(), retry_after: None },
                    };
                    self.swarm.on_end(self.now, fetch, outcome);
                }
            }
        }
    }

    fn drain(&mut self) {
        while let Some(action) = self.swarm.poll_action(self.now) {
            self.trace.push((self.now, action.clone()));
            match action {
                Action::Fetch { fetch, layer, source, run, priority, is_hedge } => {
                    self.fetch(fetch, layer.0, source.0 as usize, run, priority, is_hedge);
                }
                Action::Cancel { fetch } => {
                    assert!(self.running.remove(&fetch).is_some(), "cancelled {fetch:?}, which does not run");
                }
                Action::Fail { layer, chunk, .. } => {
                    if let Some(since) = self.wanted_at.remove(&(layer.0, chunk)) {
                        assert!(self.now - since <= self.patience(), "failed late");
                    }
                    self.failed.push((self.now, layer.0, chunk));
                }
            }
        }
        // The contract: nobody waits beyond the deadline.
        for ((layer, chunk), since) in &self.wanted_at {
            assert!(self.now - *since < self.patience(), "chunk {chunk} of {layer} waits for {:?}", self.now - *since);
        }
    }

    fn fetch(&mut self, id: FetchId, layer: u64, source: usize, run: Range<u32>, priority: Priority, is_hedge: bool) {
        assert!(!run.is_empty() && run.end <= self.chunks);
        self.hedges += usize::from(is_hedge);
        let others: Vec<_> = self
            .running
            .values()
            .filter(|(other, _, run, ..)| *other == layer && run.len() < STREAM as usize)
            .collect();
        if !is_hedge {
            for (_, _, other, ..) in &others {
                assert!(
                    run.end <= other.start || other.end <= run.start,
                    "{run:?} asked twice without hedging: {other:?}"
                );
            }
        }
        let unit = self.behaviours[source].unit;
        let cover = match unit {
            0 => run.clone(),
            _ => run.start - run.start % unit..run.end.next_multiple_of(unit).min(self.chunks),
        };
        self.running.insert(id, (layer, source, cover.clone(), priority, is_hedge));
        let at_source: Vec<_> = self.running.values().filter(|(_, at, ..)| *at == source).collect();
        assert!(at_source.len() <= self.config.in_flight_fetches_max[0].max(1));
        let counted =
            |run: &Range<u32>| if run.len() < STREAM as usize { u64::from(run.end - run.start) * CHUNK } else { 0 };
        let bytes: u64 = at_source.iter().map(|(_, _, run, ..)| counted(run)).sum();
        assert!(
            at_source.len() == 1 || bytes <= self.config.in_flight_bytes_max[0] + 20 * CHUNK * u64::from(unit.max(1))
        );

        let behaviour = self.behaviours[source].clone();
        let start = self.now + behaviour.latency;
        if self.now < behaviour.down_until || self.chance(behaviour.fail) {
            return self.at(start, Event::End(id, 2));
        }
        if self.chance(behaviour.missing) {
            return self.at(start, Event::End(id, 1));
        }
        if self.chance(behaviour.stall) {
            return self.at(start + Duration::from_secs(5), Event::End(id, 2));
        }
        let short = self.chance(behaviour.short);
        let mut time = start.max(self.free_at[source]);
        for chunk in cover.clone() {
            if short && chunk > cover.start && chunk + 1 == cover.end {
                break;
            }
            time += Duration::from_nanos(CHUNK * 1_000_000_000 / behaviour.bytes_per_sec);
            self.bytes[source] += CHUNK;
            if self.chance(behaviour.wrong) {
                self.at(time, Event::Chunk(id, chunk, false));
                self.free_at[source] = time;
                return self.at(time, Event::End(id, 2));
            }
            self.at(time, Event::Chunk(id, chunk, true));
        }
        self.free_at[source] = time;
        self.at(time, Event::End(id, 0));
    }
}

fn units(unit: u32, device_size: u64) -> Vec<Range<u64>> {
    if unit == 0 {
        return Vec::new();
    }
    let size = u64::from(unit) * CHUNK;
    (0..device_size.div_ceil(size)).map(|n| n * size..((n + 1) * size).min(device_size)).collect()
}

fn fetches(net: &Net) -> Vec<(u64, Range<u32>, Priority)> {
    net.trace
        .iter()
        .filter_map(|(_, action)| match action {
            Action::Fetch { source, run, priority, .. } => Some((source.0, run.clone(), *priority)),
            _ => None,
        })
        .collect()
}

#[test]
fn readahead_rides_behind_demand() {
    let mut net = Net::new(1, 1, 100, vec![Behaviour::good(SourceKind::Seeder)]);
    net.want_at(0, 0, 10..11, Priority::Demand);
    net.want_at(0, 0, 11..30, Priority::Readahead);
    net.run(Duration::from_secs(5));
    // What fits the run goes with the demanded chunk, the rest by itself.
    assert_eq!(
        fetches(&net),
        [10..14, 14..18, 18..22, 22..26, 26..30].map(|run| {
            let priority = if run.start == 10 { Priority::Demand } else { Priority::Readahead };
            (0, run, priority)
        })
    );
    assert_eq!(net.here.len(), 20);
}

#[test]
fn background_waits_for_quiet() {
    let mut net = Net::new(1, 2, 400, vec![Behaviour::good(SourceKind::Seeder)]);
    net.want_at(0, 0, 0..400, Priority::Background);
    net.want_at(0, 1, 0..1, Priority::Demand);
    net.want_at(700, 1, 5..6, Priority::Demand);
    net.run(Duration::from_secs(10));
    let first = net
        .trace
        .iter()
        .find_map(|(at, action)| matches!(action, Action::Fetch { priority: Priority::Background, .. }).then_some(*at));
    assert!(first.unwrap() >= Duration::from_millis(1700), "{first:?}");
    assert_eq!(net.here.len(), 402);
}

#[test]
fn demand_overtakes_background() {
    let mut net = Net::new(1, 2, 400, vec![Behaviour::good(SourceKind::Seeder)]);
    net.want_at(0, 0, 0..400, Priority::Background);
    for n in 0..20 {
        net.want_at(100 + n * 50, 1, n as u32 * 3..n as u32 * 3 + 1, Priority::Demand);
    }
    net.run(Duration::from_secs(30));
    // What was in flight when demand came is at most 2 MiB: 84 ms at 25 MB/s.
    assert!(net.delivered_after.iter().all(|after| *after < Duration::from_millis(100)), "{:?}", net.delivered_after);
    assert_eq!(net.here.len(), 420);
}

#[test]
fn registry_only_when_the_seeder_rests() {
    let mut seeder = Behaviour::good(SourceKind::Seeder);
    seeder.down_until = Duration::from_secs(3);
    let mut registry = Behaviour::good(SourceKind::Registry);
    registry.unit = 32;
    let mut net = Net::new(7, 1, 320, vec![seeder, registry]);
    for n in 0..8u32 {
        net.want_at(1000 * u64::from(n), 0, n * 40..n * 40 + 1, Priority::Demand);
    }
    net.run(Duration::from_secs(30));
    assert!(net.failed.is_empty());
    // The span of the first chunk came whole from the registry; later ones from the seeder that was back.
    assert!(net.here.contains(&(0, 31)));
    assert!(net.bytes[1] >= 32 * CHUNK && net.bytes[1] <= 4 * 32 * CHUNK, "{:?}", net.bytes);
    assert!(net.bytes[0] >= 4 * CHUNK);
}

#[test]
fn one_span_is_fetched_once() {
    let mut registry = Behaviour::good(SourceKind::Registry);
    registry.unit = 32;
    let mut net = Net::new(7, 1, 64, vec![registry]);
    for chunk in [3, 20, 31, 9] {
        net.want_at(u64::from(chunk), 0, chunk..chunk + 1, Priority::Demand);
    }
    net.run(Duration::from_secs(5));
    assert_eq!(fetches(&net), [(0, 3..4, Priority::Demand)]);
    assert_eq!(net.bytes[0], 32 * CHUNK);
}

/// A zstd frame that is the whole layer, at a registry alone.
fn stream(bytes_per_sec: u64) -> Behaviour {
    Behaviour { unit: STREAM, bytes_per_sec, ..Behaviour::good(SourceKind::Registry) }
}

#[test]
fn a_stream_serves_all_reads_and_is_fetched_once() {
    // It takes 26 s, which is longer than the deadline of who waits for its end.
    let mut net = Net::new(1, 1, STREAM, vec![stream(5_000_000)]);
    for (millis, chunk) in [(0, 990), (10, 3), (700, 500), (9000, 2), (9000, 800)] {
        net.want_at(millis, 0, chunk..chunk + 1, Priority::Demand);
    }
    net.want_at(100, 0, 0..STREAM, Priority::Background);
    net.run(Duration::from_secs(60));
    assert_eq!((fetches(&net).len(), net.hedges, net.failed.len()), (1, 0, 0));
    assert_eq!(net.here.len(), STREAM as usize);
}

#[test]
fn a_stream_that_stops_does_not_put_deadlines_off() {
    let mut net = Net::new(1, 1, STREAM, vec![Behaviour { stall: 255, ..stream(5_000_000) }]);
    net.want_at(0, 0, 990..991, Priority::Demand);
    net.run(DEADLINE + Duration::from_secs(1));
    assert_eq!(net.failed.first().map(|(at, ..)| *at), Some(DEADLINE));
}

#[test]
fn a_stream_holds_up_no_other_layer() {
    let mut net = Net::new(1, 2, STREAM, vec![stream(5_000_000)]);
    net.want_at(0, 0, 990..991, Priority::Demand);
    net.want_at(100, 1, 0..1, Priority::Demand);
    net.run(Duration::from_secs(1));
    assert_eq!(fetches(&net).len(), 2);
}

#[test]
fn a_seeder_that_pauses_does_not_start_streams() {
    let seeder = Behaviour { down_until: Duration::from_secs(2), ..Behaviour::good(SourceKind::Seeder) };
    let mut net = Net::new(1, 1, STREAM, vec![seeder, stream(25_000_000)]);
    net.want_at(0, 0, 990..991, Priority::Demand);
    net.run(Duration::from_secs(5));
    assert_eq!((net.delivered_after.len(), net.bytes[1]), (1, 0));
}

#[test]
fn a_seeder_that_is_back_is_asked_beside_a_stream() {
    let seeder = Behaviour { down_until: Duration::from_secs(10), ..Behaviour::good(SourceKind::Seeder) };
    let mut net = Net::new(1, 1, STREAM, vec![seeder, stream(5_000_000)]);
    net.want_at(0, 0, 990..991, Priority::Demand);
    net.want_at(13_000, 0, 900..901, Priority::Demand);
    net.run(Duration::from_secs(16));
    assert!(net.bytes[1] > 0, "the stream began when the seeder seemed gone");
    let [first, second] = net.delivered_after[..] else { panic!("{:?}", net.delivered_after) };
    assert!(first < Duration::from_secs(13), "{first:?}");
    assert!(second < Duration::from_millis(100), "{second:?}");
    // What is wanted comes from the seeder, so the stream was stopped.
    assert!(net.trace.iter().any(|(_, action)| matches!(action, Action::Cancel { .. })));
}

#[test]
fn stalled_demand_is_hedged_and_the_loser_cancelled() {
    let mut stalled = Behaviour::good(SourceKind::Seeder);
    stalled.stall = 255;
    stalled.latency = Duration::from_secs(30);
    let mut net = Net::new(3, 1, 64, vec![stalled, Behaviour::good(SourceKind::Registry)]);
    net.want_at(0, 0, 3..5, Priority::Demand);
    net.run(Duration::from_secs(4));
    assert_eq!(net.hedges, 1);
    assert_eq!(net.here.len(), 2);
    assert!(net.delivered_after.iter().all(|after| *after < Duration::from_millis(600)), "{:?}", net.delivered_after);
    assert!(net.running.is_empty(), "the stalled fetch was not cancelled");
}

#[test]
fn a_lost_connection_to_the_only_source_is_replaced() {
    let mut seeder = Behaviour::good(SourceKind::Seeder);
    seeder.stall = 255;
    seeder.latency = Duration::from_secs(15);
    let mut net = Net::new(3, 1, 64, vec![seeder]);
    net.want_at(0, 0, 3..4, Priority::Demand);
    net.run(Duration::from_millis(400));
    net.behaviours[0] = Behaviour::good(SourceKind::Seeder);
    net.run(Duration::from_secs(3));
    assert_eq!(net.hedges, 1);
    assert!(net.delivered_after.iter().all(|after| *after < Duration::from_millis(600)), "{:?}", net.delivered_after);
    assert!(net.here.contains(&(0, 3)) && net.running.is_empty());
}

#[test]
fn a_failed_chunk_fails_at_once_for_a_while() {
    let mut dead = Behaviour::good(SourceKind::Seeder);
    dead.down_until = Duration::from_secs(26);
    let mut net = Net::new(3, 1, 64, vec![dead]);
    net.want_at(0, 0, 3..4, Priority::Demand);
    net.want_at(15_000, 0, 3..4, Priority::Demand);
    net.want_at(22_000, 0, 3..4, Priority::Demand);
    net.want_at(25_500, 0, 3..4, Priority::Demand);
    net.run(Duration::from_secs(60));
    let at: Vec<_> = net.failed.iter().map(|(at, ..)| at.as_millis()).collect();
    assert_eq!(at, [20_000, 22_000]);
    assert!(net.here.contains(&(0, 3)), "a new deadline starts after the hold");
    let reasons = net.trace.iter().find_map(|(_, action)| match action {
        Action::Fail { reasons, .. } => Some(reasons.clone()),
        _ => None,
    });
    assert_eq!(reasons.unwrap()[0].failure.as_deref(), Some("failed"));
}

#[test]
fn cancelled_and_removed_wants_leave_nothing_behind() {
    let mut net = Net::new(3, 1, 64, vec![Behaviour::good(SourceKind::Seeder)]);
    let layer = LayerKey(0);
    net.swarm.want(net.now, layer, 0..10, Priority::Demand, DEADLINE);
    net.swarm.want(net.now, layer, 20..30, Priority::Background, DEADLINE);
    net.drain();
    net.swarm.cancel_want(layer, 0..64, Priority::Demand);
    net.swarm.remove_layer(layer);
    net.drain();
    assert!(net.running.is_empty());
    assert_eq!(net.swarm.poll_timeout(), None);
    assert_eq!(net.swarm.background_bytes(layer), 0);
}

fn behaviour() -> impl Strategy<Value = Behaviour> {
    let kind = prop_oneof![Just(SourceKind::Peer), Just(SourceKind::Seeder), Just(SourceKind::Registry)];
    let chances = (0..100u8, 0..60u8, 0..100u8, 0..60u8, 0..60u8);
    (kind, 1..200u64, 1..200u64, prop_oneof![Just(0u32), 1..40u32], chances, 0..40u64).prop_map(
        |(kind, latency, rate, unit, (fail, wrong, missing, stall, short), down)| Behaviour {
            kind,
            latency: Duration::from_millis(latency),
            bytes_per_sec: rate * 500_000,
            unit,
            fail,
            wrong,
            missing,
            stall,
            short,
            down_until: Duration::from_secs(if down > 25 { down } else { 0 }),
        },
    )
}

fn wants() -> impl Strategy<Value = Vec<(u64, u64, u32, u32, u8)>> {
    prop::collection::vec((0..40_000u64, 0..3u64, 0..200u32, 1..12u32, 0..6u8), 1..60)
}

fn play(seed: u64, behaviours: &[Behaviour], wants: &[(u64, u64, u32, u32, u8)]) -> Net {
    let mut net = Net::new(seed, 3, 212, behaviours.to_vec());
    for (at, layer, chunk, len, priority) in wants {
        let priority = match priority {
            0..=3 => Priority::Demand,
            4 => Priority::Readahead,
            _ => Priority::Background,
        };
        net.want_at(*at, *layer, *chunk..chunk + len, priority);
    }
    net.run(Duration::from_secs(120));
    net
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// `Net` checks single flight, limits and deadlines while it runs.
    #[test]
    fn every_want_ends(seed: u64, behaviours in prop::collection::vec(behaviour(), 0..4), wants in wants()) {
        let net = play(seed, &behaviours, &wants);
        prop_assert!(net.wanted_at.is_empty());
        let again = play(seed, &behaviours, &wants);
        prop_assert!(net.trace == again.trace, "the same inputs gave other actions");
    }

    /// One good source is enough, whatever the others do.
    #[test]
    fn one_good_source_is_enough(seed: u64, behaviours in prop::collection::vec(behaviour(), 0..3), wants in wants()) {
        let mut behaviours = behaviours;
        behaviours.push(Behaviour::good(SourceKind::Registry));
        let net = play(seed, &behaviours, &wants);
        // A slow source is not a bad one: chunks queued behind 100 KB/s for longer than the deadline may fail.
        prop_assume!(behaviours.iter().all(|b| b.bytes_per_sec > 10_000_000));
        prop_assert!(net.failed.is_empty(), "{:?}", net.failed);
    }
}
