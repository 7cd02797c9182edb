//! How long readers wait when neighbours die or fall silent in the middle of what they send.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use layer::Geometry;
use swarm::{
    Action, Config, FetchId, LayerKey, Message, Outcome, PeerId, Priority, SourceId, SourceKind, Swarm, Verdict, Zone,
};

const LAYER: LayerKey = LayerKey(1);
const SEEDER: SourceId = SourceId(1);
const CHUNKS: u32 = 1 << 17;
/// What a link of 1 Gbit/s needs for a chunk, and the round trip.
const CHUNK_TIME: Duration = Duration::from_micros(1050);
const ROUND_TRIP: Duration = Duration::from_micros(500);
const STEP: Duration = Duration::from_micros(250);
const FAULT_AT: Duration = Duration::from_millis(500);
const END: Duration = Duration::from_millis(2600);

/// How a neighbour fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Its connections break.
    Killed,
    /// Nothing comes from it any more, and nobody says so.
    Silent,
}

/// A node with readers that go through the layer from different places, each wanting some chunks behind the one that it waits for.
struct Node {
    swarm: Swarm,
    now: Duration,
    neighbours: Vec<SourceId>,
    dead: Vec<SourceId>,
    free_at: BTreeMap<SourceId, Duration>,
    arrivals: BTreeMap<(Duration, FetchId, u32), SourceId>,
    running: BTreeMap<FetchId, (SourceId, Range<u32>)>,
    /// What each reader waits for, and since when.
    readers: Vec<(u32, Duration)>,
    waits: Vec<(Duration, Duration)>,
}

impl Node {
    fn new(neighbours: u64, readers: u32) -> Self {
        let mut swarm = Swarm::new(Config::default(), 7);
        swarm.add_layer(LAYER, Geometry::new(u64::from(CHUNKS) << 17, 17).unwrap());
        swarm.open_mesh(Duration::ZERO, LAYER, PeerId(1), Zone(0), 5, []);
        swarm.add_source(LAYER, SEEDER, SourceKind::Seeder, Vec::new());
        let neighbours: Vec<SourceId> = (0..neighbours).map(|n| SourceId(10 + n)).collect();
        for id in &neighbours {
            swarm.add_peer(Duration::ZERO, LAYER, *id, PeerId(id.0), Zone(0));
            swarm.on_haves(Duration::ZERO, LAYER, *id, std::slice::from_ref(&(0..CHUNKS)), &[]);
        }
        let readers = (0..readers).map(|n| (n * (CHUNKS / readers), Duration::ZERO)).collect();
        let mut node = Self {
            swarm,
            now: Duration::ZERO,
            neighbours,
            dead: Vec::new(),
            free_at: BTreeMap::new(),
            arrivals: BTreeMap::new(),
            running: BTreeMap::new(),
            readers,
            waits: Vec::new(),
        };
        (0..node.readers.len()).for_each(|reader| node.read(reader));
        node
    }

    /// A reader wants its next chunk that is not here, and what comes behind it.
    fn read(&mut self, reader: usize) {
        let (mut chunk, _) = self.readers[reader];
        while self.has(chunk) {
            chunk = (chunk + 1) % CHUNKS;
        }
        self.readers[reader] = (chunk, self.now);
        self.swarm.want(self.now, LAYER, chunk..chunk + 1, Priority::Demand, self.now + Duration::from_secs(20));
        let ahead = (chunk + 1..(chunk + 3).min(CHUNKS)).filter(|chunk| !self.has(*chunk)).collect::<Vec<_>>();
        for chunk in ahead {
            self.swarm.want(self.now, LAYER, chunk..chunk + 1, Priority::Readahead, Duration::MAX);
        }
    }

    fn has(&self, chunk: u32) -> bool {
        self.swarm.have(LAYER).is_some_and(|have| have.contains(chunk))
    }

    fn fail(&mut self, count: usize, fault: Fault) {
        // Those that are sending something at the moment come first.
        let mut sending: Vec<SourceId> = self.running.values().map(|(source, _)| *source).collect();
        sending.retain(|source| self.neighbours.contains(source));
        sending.extend(&self.neighbours);
        sending.sort_by_key(|source| !self.running.values().any(|(running, _)| running == source));
        sending.dedup();
        self.dead = sending.into_iter().take(count).collect();
        for id in self.dead.clone() {
            if fault == Fault::Killed {
                let broken: Vec<FetchId> =
                    self.running.iter().filter(|(_, (source, _))| *source == id).map(|(fetch, _)| *fetch).collect();
                for fetch in broken {
                    self.running.remove(&fetch);
                    let outcome = Outcome::Failed { reason: "broken off".into(), retry_after: None };
                    self.swarm.on_end(self.now, fetch, outcome);
                }
            }
        }
    }

    fn step(&mut self, fault: Fault) {
        self.now += STEP;
        while let Some(((at, fetch, chunk), source)) = self.arrivals.pop_first() {
            if at > self.now {
                self.arrivals.insert((at, fetch, chunk), source);
                break;
            }
            let Some((_, run)) = self.running.get(&fetch).filter(|_| !self.dead.contains(&source)) else { continue };
            let is_last = chunk + 1 == run.end;
            self.swarm.on_chunk(self.now, fetch, chunk, Verdict::Verified);
            if is_last {
                self.running.remove(&fetch);
                self.swarm.on_end(self.now, fetch, Outcome::Done);
            }
        }
        self.swarm.handle_timeout(self.now);
        for reader in 0..self.readers.len() {
            let (chunk, since) = self.readers[reader];
            if self.has(chunk) {
                self.waits.push((since, self.now - since));
                self.read(reader);
            }
        }
        while let Some(action) = self.swarm.poll_action(self.now) {
            match action {
                Action::Fetch { fetch, source, run, .. } => self.begin(fetch, source, run, fault),
                Action::Cancel { fetch } => drop(self.running.remove(&fetch)),
                Action::Fail { chunk, .. } => panic!("{chunk} failed"),
            }
        }
        while let Some(message) = self.swarm.poll_message() {
            if matches!(message, Message::Ask { .. }) {
                self.swarm.on_alive(self.now, SEEDER);
            }
        }
    }

    fn begin(&mut self, fetch: FetchId, source: SourceId, run: Range<u32>, fault: Fault) {
        if self.dead.contains(&source) && fault == Fault::Killed {
            let outcome = Outcome::Failed { reason: "refused".into(), retry_after: None };
            return self.swarm.on_end(self.now, fetch, outcome);
        }
        let free_at = self.free_at.entry(source).or_default();
        let mut at = (*free_at).max(self.now) + ROUND_TRIP;
        for chunk in run.clone() {
            at += CHUNK_TIME;
            self.arrivals.insert((at, fetch, chunk), source);
        }
        *free_at = at;
        self.running.insert(fetch, (source, run));
    }
}

/// The 99th of 100 waits for chunks that were wanted when `count` of the neighbours failed or in the 2 s after it, and the longest.
fn waits(neighbours: u64, readers: u32, count: usize, fault: Fault) -> (Duration, Duration) {
    let mut node = Node::new(neighbours, readers);
    while node.now < END {
        let before = node.now;
        node.step(fault);
        if before < FAULT_AT && node.now >= FAULT_AT {
            node.fail(count, fault);
        }
    }
    let is_of_it =
        |since: Duration, wait: Duration| since + wait >= FAULT_AT && since <= FAULT_AT + Duration::from_secs(2);
    let waits = node.waits.iter().filter(|(since, wait)| is_of_it(*since, *wait)).map(|(_, wait)| *wait);
    let mut waits: Vec<Duration> = waits.collect();
    assert!(waits.len() > 200, "{}", waits.len());
    // Who still waits has waited so long.
    waits.extend(node.readers.iter().map(|(_, since)| node.now - *since));
    waits.sort_unstable();
    (waits[waits.len() * 99 / 100], waits[waits.len() - 1])
}

#[test]
fn readers_hardly_notice_that_neighbours_die() {
    for fault in [Fault::Killed, Fault::Silent] {
        for (neighbours, readers, count) in [(7, 1, 1), (7, 4, 1), (24, 8, 1), (24, 8, 6), (7, 4, 3)] {
            let (p99, longest) = waits(neighbours, readers, count, fault);
            println!("{count} of {neighbours} {fault:?}, {readers} readers: p99 {p99:?}, longest {longest:?}");
            let case = format!("{count} of {neighbours} neighbours {fault:?}, {readers} readers");
            assert!(p99 <= Duration::from_millis(100), "{case}: p99 {p99:?}, longest {longest:?}");
            assert!(longest <= Duration::from_millis(300), "{case}: p99 {p99:?}, longest {longest:?}");
        }
    }
}
