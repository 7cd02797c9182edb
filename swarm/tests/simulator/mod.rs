//! A mesh on a modelled network: the real cores and the real tracker, a virtual clock, everything else from a seed.
//!
//! Every machine has a link with so many bytes per second up and down. What it sends stands in line, the urgent first; a run
//! arrives when it was sent, when the receiver's link had room for it, and the latency has passed. Requests, answers and what
//! nodes tell take the latency and no room.

#![allow(dead_code, unreachable_pub)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Range;
use std::time::Duration;

use layer::Geometry;
use swarm::{
    Action, Admission, Answer, ChunkSet, Config, Delegate, FetchId, LayerKey, Message, Newcomer, Outcome, PeerId,
    Priority, SourceId, SourceKind, Swarm, Tracker, TrackerAction, TrackerConfig, UploadConfig, Uploads, Verdict, Zone,
};

pub const LAYER: LayerKey = LayerKey(1);
const REGISTRY: usize = 0;
const SEEDER: usize = 1;
/// Machines from here on are nodes.
const NODES: usize = 2;
const SPAN: u64 = 4 << 20;
/// Background wants that a node keeps open.
const WINDOW: u64 = 64 << 20;
/// What the registry sends before somebody else has a turn.
const SENT_AT_ONCE: u64 = 1 << 20;
/// Bytes that the seeder asks the registry for at once.
const INGEST_RUN: u64 = 256 << 10;

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    pub nodes: usize,
    pub bytes: u64,
    pub chunk_log2: u8,
    pub zones: usize,
    /// Bytes per second of every link in both directions.
    pub link: u64,
    /// Latency of one way.
    pub latency: Duration,
    /// The seeder fetches the layer while it gives it; otherwise it has it.
    pub ingest: bool,
    /// Nodes that claim to have everything and send wrong bytes, in 256.
    pub liars: usize,
    /// Nodes whose link is 20 times slower, in 256.
    pub slow: usize,
    /// Nodes that die at some time, in 256; half of them without a word.
    pub dying: usize,
    /// Nodes that join at some time of the first 5 s, in 256; the others within 100 ms.
    pub late: usize,
    /// Nodes that give nothing, in 256.
    pub leeches: usize,
    /// The seeder dies when nodes have so many percent on average.
    pub seeder_dies_at: Option<u64>,
    /// All want this many bytes at once and nothing else.
    pub demand: Option<u64>,
    /// Each node has a container that reads the layer from its beginning, and wants nothing else.
    pub reads: Option<Reading>,
    /// When to give up.
    pub end: Duration,
    pub config: Config,
    pub uploads: UploadConfig,
    pub tracker: TrackerConfig,
}

impl Scenario {
    /// `nodes` nodes that all begin within 100 ms, on links of 1 Gbit/s with a round trip of 0.5 ms.
    pub fn new(seed: u64, nodes: usize, bytes: u64) -> Self {
        Self {
            seed,
            nodes,
            bytes,
            chunk_log2: 17,
            zones: 1,
            link: 125_000_000,
            latency: Duration::from_micros(250),
            ingest: true,
            liars: 0,
            slow: 0,
            dying: 0,
            late: 0,
            leeches: 0,
            seeder_dies_at: None,
            demand: None,
            reads: None,
            end: Duration::from_secs(600),
            config: Config::default(),
            uploads: UploadConfig::default(),
            tracker: TrackerConfig::default(),
        }
    }

    /// Runs of `log2` bytes stand for chunks: every limit in bytes grows with them.
    pub fn with_runs_of(mut self, log2: u8) -> Self {
        let chunk = 1u64 << log2;
        let grow = |bytes: &mut u64, chunks: u64| *bytes = (*bytes).max(chunk * chunks);
        self.chunk_log2 = log2;
        grow(&mut self.config.peer_run_bytes, 1);
        self.config.in_flight_bytes_max.iter_mut().for_each(|bytes| grow(bytes, 3));
        self.config.mesh_in_flight_bytes_max.iter_mut().for_each(|bytes| grow(bytes, 8));
        self.config.stream_bytes_min = u64::MAX;
        self.config.peer_stall *= 8;
        grow(&mut self.tracker.spread_bytes, 2);
        self
    }

    /// The time in which a link carries the layer once.
    pub fn bound(&self) -> Duration {
        Duration::from_secs_f64(self.demand.unwrap_or(self.bytes) as f64 / self.link as f64)
    }
}

/// How containers read: a chunk after the other, the next one asked for while one is used.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// What a container does with a chunk takes up to so long.
    pub pause: Duration,
    /// The last one begins so long after the first.
    pub spread: Duration,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub seed: u64,
    /// Honest nodes that lived, and how many of them got everything.
    pub nodes: usize,
    pub complete: usize,
    /// When the last one was complete, and half of them.
    pub last: Duration,
    pub median: Duration,
    /// Layers that left the seeder and the registry.
    pub seeder_copies: f64,
    pub registry_copies: f64,
    /// Layers that entered the zone into which most came.
    pub zone_entries: f64,
    /// Most that one node sent, in layers.
    pub node_copies: f64,
    /// Bytes asked again while they were on their way, of those wanted.
    pub hedged: f64,
    pub duplicates: f64,
    pub wrong_got: u64,
    pub wrong_passed_on: u64,
    pub failed: u64,
    /// Of the demanded chunks, or of those that a container needed.
    pub p50: Duration,
    pub p99: Duration,
    pub longest: Duration,
    pub events: u64,
    pub requests: u64,
    pub seeder_requests: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Join(u32),
    Die(u32),
    /// A request arrives at its server.
    Arrive(u32),
    /// The run that a machine sends has left.
    Sent(u32),
    /// A part of a run has arrived.
    Got(u32, u32, u32),
    /// An answer without chunks has arrived.
    Answered(u32, Refusal),
    /// What a node told arrives: at all neighbours, at one, at the seeder.
    Haves(u32),
    Tracked(u32),
    Wake(u32),
    /// A container is done with a chunk.
    Used(u32),
    Tracker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Refusal {
    Busy(u32),
    Missing,
    Broken,
}

#[derive(Clone, Debug)]
struct Request {
    server: usize,
    client: usize,
    fetch: FetchId,
    run: Range<u32>,
    priority: Priority,
    cancelled: bool,
    /// What comes at once, of `run`: the rest follows when it was sent.
    part: Range<u32>,
    /// Who else has it, where the answer is that the server is busy.
    peers: Vec<PeerId>,
}

#[derive(Debug)]
struct Told {
    from: usize,
    to: Option<usize>,
    runs: Vec<Range<u32>>,
    delegates: Vec<Delegate>,
    coming: Vec<Range<u32>>,
}

#[derive(Debug)]
enum Tracked {
    Join(usize),
    Report(usize, Vec<Range<u32>>, bool),
    Ask(usize),
    Alive(usize),
    Accuse(usize, usize),
    Leave(usize),
    Introduce(usize, usize, Zone),
    Assign(usize, Range<u32>, usize),
    Expel(usize),
    Lost,
}

/// A link and who uses it.
#[derive(Debug)]
struct Machine {
    zone: usize,
    alive: bool,
    rate: u64,
    free_at: u64,
    queue: BinaryHeap<Reverse<(Priority, u64, u32)>>,
    sending: Option<u32>,
    sent_bytes: u64,
    uploads: Uploads,
}

impl Machine {
    fn new(zone: usize, rate: u64, uploads: UploadConfig) -> Self {
        let uploads = Uploads::new(uploads);
        Self { zone, alive: true, rate, free_at: 0, queue: BinaryHeap::new(), sending: None, sent_bytes: 0, uploads }
    }
}

struct Node {
    core: Swarm,
    neighbours: Vec<usize>,
    refused: Vec<usize>,
    joined: bool,
    is_liar: bool,
    is_leech: bool,
    /// Requests under way.
    asked: BTreeMap<FetchId, u32>,
    wake_at: u64,
    next_want: u32,
    done_at: Option<u64>,
    wanted_at: u64,
    demanded: u32,
    got_right: ChunkSet,
    reader: Reader,
}

/// A container that reads.
#[derive(Clone, Copy, Debug, Default)]
struct Reader {
    /// The chunk that it needs, since when, and whether it has it and uses it.
    at: u32,
    since: u64,
    uses: bool,
    /// Chunks below this were asked for.
    asked: u32,
    /// Those below this too, ahead of it.
    ahead: u32,
}

/// What is read ahead of a container at most, what more where others read the same, and what comes with a chunk that it waits for:
/// as in `node/src/reader.rs`.
const AHEAD: u64 = 2 << 20;
const STRETCH: u32 = 7;
const BEYOND: u32 = 2;

/// What is on its way, by number.
#[derive(Debug)]
struct Slots<T> {
    slots: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    fn put(&mut self, value: T) -> u32 {
        match self.free.pop() {
            Some(id) => {
                self.slots[id as usize] = Some(value);
                id
            }
            None => {
                self.slots.push(Some(value));
                self.slots.len() as u32 - 1
            }
        }
    }

    fn take(&mut self, id: u32) -> Option<T> {
        let value = self.slots[id as usize].take();
        if value.is_some() {
            self.free.push(id);
        }
        value
    }
}

pub struct Simulation {
    scenario: Scenario,
    geometry: Geometry,
    now: u64,
    next: u64,
    random: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    requests: Vec<Option<Request>>,
    free: Vec<u32>,
    told: Slots<Told>,
    tracked: Slots<Tracked>,
    machines: Vec<Machine>,
    nodes: Vec<Node>,
    tracker: Tracker,
    ingested: u32,
    ingest_asked: u32,
    chunks_here: u64,
    unfinished: usize,
    latencies: Vec<u64>,
    entries: Vec<u64>,
    report: Report,
}

const INGEST: FetchId = FetchId(u64::MAX);

pub fn simulate(scenario: Scenario) -> Report {
    Simulation::new(scenario).run()
}

impl Simulation {
    fn new(scenario: Scenario) -> Self {
        let geometry = Geometry::new(scenario.bytes, scenario.chunk_log2).unwrap();
        let machine = |zone, rate| Machine::new(zone, rate, scenario.uploads.clone());
        let mut simulation = Self {
            geometry,
            now: 0,
            next: 0,
            random: scenario.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            events: BinaryHeap::new(),
            requests: Vec::new(),
            free: Vec::new(),
            told: Slots::default(),
            tracked: Slots::default(),
            machines: vec![machine(usize::MAX, scenario.link), machine(usize::MAX - 1, scenario.link)],
            nodes: Vec::new(),
            tracker: Tracker::new(scenario.tracker.clone(), scenario.seed),
            ingested: 0,
            ingest_asked: 0,
            chunks_here: 0,
            unfinished: 0,
            latencies: Vec::new(),
            entries: vec![0; scenario.zones],
            report: Report { seed: scenario.seed, ..Report::default() },
            scenario,
        };
        for at in 0..simulation.scenario.nodes {
            simulation.add_node(at);
        }
        simulation.at(0, Event::Tracker);
        simulation
    }

    fn add_node(&mut self, at: usize) {
        let scenario = &self.scenario;
        let (liars, slow, dying) = (scenario.liars, scenario.slow, scenario.dying);
        let (late, leeches, zones, link) = (scenario.late, scenario.leeches, scenario.zones, scenario.link);
        let is_liar = self.chance(liars);
        let rate = if self.chance(slow) { link / 20 } else { link };
        let is_leech = self.chance(leeches);
        let dies = !is_liar && self.chance(dying);
        let joins = if self.chance(late) { self.draw(5_000_000_000) } else { self.draw(100_000_000) };
        let joins = if self.scenario.demand.is_some() { self.draw(1_000_000) } else { joins };
        let joins = match self.scenario.reads {
            Some(reading) => self.draw(reading.spread.as_nanos() as u64),
            None => joins,
        };
        let config = Config { leech: is_leech, ..self.scenario.config.clone() };
        let seed = self.draw(u64::MAX);
        let (machine, count) = (at + NODES, self.geometry.chunk_count());
        let uploads = UploadConfig { leech: is_leech, ..self.scenario.uploads.clone() };
        self.machines.push(Machine::new(at % zones, rate, uploads));
        self.nodes.push(Node {
            core: Swarm::new(config, seed),
            neighbours: Vec::new(),
            refused: Vec::new(),
            joined: false,
            is_liar,
            is_leech,
            asked: BTreeMap::new(),
            wake_at: u64::MAX,
            next_want: 0,
            done_at: None,
            wanted_at: 0,
            demanded: 0,
            got_right: ChunkSet::new(count),
            reader: Reader::default(),
        });
        self.at(joins, Event::Join(machine as u32));
        if dies {
            let dies_at = joins + self.draw(3_000_000_000);
            self.at(dies_at, Event::Die(machine as u32));
        } else if !is_liar {
            self.unfinished += 1;
            self.report.nodes += 1;
        }
    }

    fn run(mut self) -> Report {
        while self.unfinished > 0
            && let Some(Reverse((at, _, event))) = self.events.pop()
        {
            if at > self.scenario.end.as_nanos() as u64 {
                break;
            }
            self.now = at;
            self.report.events += 1;
            self.handle(event);
        }
        let layer = self.scenario.demand.unwrap_or(self.scenario.bytes) as f64;
        let mut done: Vec<u64> =
            self.nodes.iter().filter(|node| !node.is_liar).filter_map(|node| node.done_at).collect();
        done.sort_unstable();
        let report = &mut self.report;
        report.complete = report.nodes - self.unfinished;
        report.last = Duration::from_nanos(done.last().copied().unwrap_or(0));
        report.median = Duration::from_nanos(done.get(done.len() / 2).copied().unwrap_or(0));
        report.seeder_copies = self.machines[SEEDER].sent_bytes as f64 / layer;
        report.registry_copies = self.machines[REGISTRY].sent_bytes as f64 / layer;
        report.node_copies = self.machines[NODES..].iter().map(|m| m.sent_bytes).max().unwrap_or(0) as f64 / layer;
        report.zone_entries = self.entries.iter().copied().max().unwrap_or(0) as f64 / layer;
        let wanted = layer * report.nodes.max(1) as f64;
        report.hedged /= wanted;
        report.duplicates /= wanted;
        self.latencies.sort_unstable();
        let quantile = |of_100: usize| self.latencies.get(self.latencies.len() * of_100 / 100).copied().unwrap_or(0);
        report.p50 = Duration::from_nanos(quantile(50));
        report.p99 = Duration::from_nanos(quantile(99));
        report.longest = Duration::from_nanos(self.latencies.last().copied().unwrap_or(0));
        self.report
    }

    fn at(&mut self, time: u64, event: Event) {
        self.next += 1;
        self.events.push(Reverse((time, self.next, event)));
    }

    fn after_latency(&mut self, event: Event) {
        self.at(self.now + self.scenario.latency.as_nanos() as u64, event);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Join(node) => self.join(node as usize),
            Event::Die(machine) => self.die(machine as usize),
            Event::Arrive(request) => self.arrive(request),
            Event::Sent(machine) => self.sent(machine as usize),
            Event::Got(request, start, end) => self.got(request, start..end),
            Event::Answered(request, refusal) => self.answered(request, refusal),
            Event::Haves(told) => self.haves(told),
            Event::Tracked(tracked) => self.tracked(tracked),
            Event::Wake(node) => {
                let wake_at = &mut self.nodes[node as usize - NODES].wake_at;
                if *wake_at == self.now {
                    *wake_at = u64::MAX;
                    let now = self.time();
                    self.core(node as usize).handle_timeout(now);
                    self.drive(node as usize);
                }
            }
            Event::Used(node) => {
                let reader = &mut self.nodes[node as usize - NODES].reader;
                (reader.at, reader.since, reader.uses) = (reader.at + 1, self.now, false);
                self.read(node as usize);
                self.drive(node as usize);
            }
            Event::Tracker => {
                if self.machines[SEEDER].alive {
                    self.ingest();
                    let now = self.time();
                    self.tracker.handle_timeout(now);
                    self.drive_tracker();
                    self.at(self.now + 50_000_000, Event::Tracker);
                }
            }
        }
    }

    fn join(&mut self, at: usize) {
        let (now, geometry) = (self.time(), self.geometry);
        let zone = Zone(self.machines[at].zone as u32);
        let demand = self.scenario.demand;
        let seeder_lives = self.machines[SEEDER].alive;
        let spans = (0..geometry.device_size().div_ceil(SPAN))
            .map(|n| n * SPAN..((n + 1) * SPAN).min(geometry.device_size()))
            .collect();
        let core = self.core(at);
        core.add_layer(LAYER, geometry);
        core.open_mesh(now, LAYER, PeerId(at as u64), zone, 77, []);
        core.add_source(LAYER, SourceId(SEEDER as u64), SourceKind::Seeder, Vec::new());
        core.add_source(LAYER, SourceId(REGISTRY as u64), SourceKind::Registry, spans);
        if !seeder_lives {
            core.on_source_lost(now, SourceId(SEEDER as u64));
        }
        if let Some(bytes) = demand {
            let run = geometry.covering(0..bytes);
            core.want(now, LAYER, run.clone(), Priority::Demand, now + Duration::from_secs(30));
            self.nodes[at - NODES].demanded = run.end;
        }
        self.nodes[at - NODES].wanted_at = self.now;
        self.nodes[at - NODES].reader.since = self.now;
        self.nodes[at - NODES].joined = true;
        self.track(Tracked::Join(at));
        self.read(at);
        self.drive(at);
    }

    fn die(&mut self, at: usize) {
        if !self.machines[at].alive {
            return;
        }
        self.machines[at].alive = false;
        let is_silent = at != SEEDER && self.chance(128);
        if !is_silent {
            let served: Vec<u32> = (0..self.requests.len() as u32)
                .filter(|id| self.requests[*id as usize].as_ref().is_some_and(|request| request.server == at))
                .collect();
            for request in served {
                self.after_latency(Event::Answered(request, Refusal::Broken));
            }
        }
        if at == SEEDER {
            self.track(Tracked::Lost);
        } else {
            self.track(Tracked::Leave(at));
            for peer in self.nodes[at - NODES].neighbours.clone() {
                let now = self.time();
                if !is_silent && self.machines[peer].alive {
                    self.core(peer).remove_source(LAYER, SourceId(at as u64));
                    self.nodes[peer - NODES].neighbours.retain(|other| *other != at);
                    self.core(peer).handle_timeout(now);
                    self.track(Tracked::Join(peer));
                    self.drive(peer);
                }
            }
        }
    }

    /// Does what a node's core says.
    fn drive(&mut self, at: usize) {
        if !self.machines[at].alive {
            return;
        }
        let now = self.time();
        loop {
            self.open_wants(at);
            let Some(action) = self.core(at).poll_action(now) else { break };
            match action {
                Action::Fetch { fetch, source, run, priority, is_hedge, .. } => {
                    self.request(at, source.0 as usize, fetch, run, priority, is_hedge);
                }
                Action::Cancel { fetch } => {
                    let id = self.nodes[at - NODES].asked.remove(&fetch);
                    if let Some(request) = id.and_then(|id| self.requests[id as usize].as_mut()) {
                        request.cancelled = true;
                    }
                }
                Action::Fail { .. } => self.report.failed += 1,
            }
        }
        while let Some(message) = self.core(at).poll_message() {
            match message {
                Message::Haves { runs, delegates, coming, .. } => {
                    if !self.nodes[at - NODES].is_liar {
                        self.tell(Told { from: at, to: None, runs, delegates, coming });
                    }
                }
                Message::Report { runs, fills, .. } => self.track(Tracked::Report(at, runs, fills)),
                Message::Ask { .. } => self.track(Tracked::Ask(at)),
                Message::Cut { source } => {
                    self.nodes[at - NODES].refused.push(source.0 as usize);
                    self.track(Tracked::Accuse(at, source.0 as usize));
                }
            }
        }
        let node = &mut self.nodes[at - NODES];
        if let Some(wake) = node.core.poll_timeout() {
            let wake = u64::try_from(wake.as_nanos()).unwrap_or(u64::MAX - 1).max(self.now + 1);
            if wake < node.wake_at {
                node.wake_at = wake;
                self.at(wake, Event::Wake(at as u32));
            }
        }
    }

    /// Lets a container go on where what it needs is here.
    fn read(&mut self, at: usize) {
        let Some(reading) = self.scenario.reads.filter(|_| self.nodes[at - NODES].joined) else { return };
        let (now, count) = (self.time(), self.geometry.chunk_count());
        let window_max = (AHEAD / self.geometry.chunk_size()) as u32;
        let node = &mut self.nodes[at - NODES];
        let has = |node: &Node, chunk| node.core.have(LAYER).is_some_and(|have| have.contains(chunk));
        // What it needs, and the next.
        while node.reader.asked < (node.reader.at + 2).min(count) {
            let chunk = node.reader.asked;
            node.reader.asked += 1;
            let window = (node.reader.asked / 2).min(window_max);
            let from = node.reader.ahead.max(node.reader.asked);
            let mut ahead = Vec::new();
            let mut stretch = None;
            if window >= 1 && from < node.reader.asked + window / 2 {
                node.reader.ahead = node.reader.asked + window;
                ahead.push(from..node.reader.ahead);
                stretch = Some((from..node.reader.ahead, node.reader.ahead..node.reader.ahead + window * STRETCH));
            }
            if !has(node, chunk) {
                ahead.push(chunk + 1..chunk + 1 + BEYOND);
                let deadline = now + Duration::from_secs(30);
                node.core.want(now, LAYER, chunk..chunk + 1, Priority::Demand, deadline);
            }
            for chunk in ahead.into_iter().flatten().filter(|chunk| *chunk < count) {
                if !has(node, chunk) {
                    node.core.want(now, LAYER, chunk..chunk + 1, Priority::Readahead, Duration::MAX);
                }
            }
            if let Some((window, stretch)) = stretch {
                node.core.read_on(now, LAYER, window, stretch);
            }
        }
        if !node.reader.uses && has(node, node.reader.at) {
            node.reader.uses = true;
            self.latencies.push(self.now - node.reader.since);
            let used_at = self.now + self.draw(reading.pause.as_nanos() as u64);
            self.at(used_at, Event::Used(at as u32));
        }
    }

    /// Keeps background wants open, as a node that fills its layers does.
    fn open_wants(&mut self, at: usize) {
        if self.scenario.demand.is_some() || self.scenario.reads.is_some() {
            return;
        }
        let (now, chunk) = (self.time(), self.geometry.chunk_size());
        let node = &mut self.nodes[at - NODES];
        let mut open = node.core.background_bytes(LAYER);
        let window = WINDOW.max(128 * chunk);
        if !node.joined || open > window - 16 * chunk {
            return;
        }
        while open < window && node.next_want < self.geometry.chunk_count() {
            let want = node.next_want;
            node.next_want += 1;
            if !node.core.have(LAYER).is_some_and(|have| have.contains(want)) {
                node.core.want(now, LAYER, want..want + 1, Priority::Background, Duration::MAX);
                open += chunk;
            }
        }
    }

    fn request(
        &mut self,
        client: usize,
        server: usize,
        fetch: FetchId,
        run: Range<u32>,
        priority: Priority,
        is_hedge: bool,
    ) {
        self.report.requests += 1;
        if server == SEEDER {
            self.report.seeder_requests += 1;
        }
        if is_hedge {
            self.report.hedged += self.bytes(&run) as f64;
        }
        let run = if server == REGISTRY && fetch != INGEST {
            let of = (SPAN / self.geometry.chunk_size()).max(1) as u32;
            run.start / of * of..run.end.next_multiple_of(of).min(self.geometry.chunk_count())
        } else {
            run
        };
        let part = run.start..run.start;
        let request = Some(Request { server, client, fetch, run, priority, cancelled: false, part, peers: Vec::new() });
        let id = match self.free.pop() {
            Some(id) => {
                self.requests[id as usize] = request;
                id
            }
            None => {
                self.requests.push(request);
                self.requests.len() as u32 - 1
            }
        };
        if fetch != INGEST {
            self.nodes[client - NODES].asked.insert(fetch, id);
        }
        self.after_latency(Event::Arrive(id));
    }

    fn arrive(&mut self, id: u32) {
        let Some(request) = self.requests[id as usize].clone() else { return };
        let (server, now, bytes) = (request.server, self.time(), self.bytes(&request.run));
        let peer = PeerId(request.client as u64);
        if !self.machines[server].alive {
            // The machine is gone: nobody answers, or the network says so.
            if server == SEEDER || request.cancelled {
                self.after_latency(Event::Answered(id, Refusal::Broken));
            }
            return;
        }
        let mut refusal = None;
        if server == SEEDER && request.fetch != INGEST {
            match self.tracker.request(now, LAYER, peer, request.run.clone(), request.priority) {
                Answer::Serve => {}
                Answer::Missing => refusal = Some(Refusal::Busy(50)),
                Answer::Busy { retry_after, peers } => {
                    refusal = Some(Refusal::Busy(retry_after.as_millis() as u32));
                    self.requests[id as usize].iter_mut().for_each(|request| request.peers = peers.clone());
                }
            }
        } else if server >= NODES {
            let node = &self.nodes[server - NODES];
            let has = |chunk| node.core.have(LAYER).is_some_and(|have| have.contains(chunk));
            if node.refused.contains(&request.client) {
                refusal = Some(Refusal::Broken);
            } else if !node.is_liar && !request.run.clone().all(has) {
                refusal = Some(Refusal::Missing);
            }
        }
        if refusal.is_none() && server >= NODES {
            match self.machines[server].uploads.request(now, peer, request.priority, bytes) {
                Admission::Serve => {}
                Admission::Busy { retry_after } => refusal = Some(Refusal::Busy(retry_after.as_millis() as u32)),
                Admission::Refused => refusal = Some(Refusal::Broken),
            }
        }
        match refusal {
            Some(refusal) => self.after_latency(Event::Answered(id, refusal)),
            None => {
                self.next += 1;
                let place = Reverse((request.priority, self.next, id));
                self.machines[server].queue.push(place);
                self.send(server);
            }
        }
    }

    /// Begins to send what is next in line.
    fn send(&mut self, at: usize) {
        if self.machines[at].sending.is_some() || !self.machines[at].alive {
            return;
        }
        while let Some(Reverse((_, _, id))) = self.machines[at].queue.pop() {
            let Some(request) = self.requests[id as usize].clone() else { continue };
            if request.cancelled || !self.machines[request.client].alive {
                self.ended(at, &request, false);
                self.drop_request(id);
                continue;
            }
            // A registry's run is long: what comes of it is used at once, and others have their turn.
            let start = request.part.end;
            let part_chunks = (SENT_AT_ONCE / self.geometry.chunk_size()).max(1) as u32;
            let end = if at == REGISTRY { (start + part_chunks).min(request.run.end) } else { request.run.end };
            let bytes = self.bytes(&(start..end));
            self.requests[id as usize].iter_mut().for_each(|request| request.part = start..end);
            let latency = self.scenario.latency.as_nanos() as u64;
            let time = |rate: u64| bytes * 1_000_000_000 / rate;
            let sent_at = self.now + time(self.machines[at].rate);
            let client = &mut self.machines[request.client];
            let got_at = ((self.now + latency).max(client.free_at) + time(client.rate)).max(sent_at + latency);
            client.free_at = got_at;
            if at == REGISTRY || at == SEEDER || self.machines[at].zone != self.machines[request.client].zone {
                let zone = self.machines[request.client].zone;
                if let Some(entries) = self.entries.get_mut(zone) {
                    *entries += bytes;
                }
            }
            self.machines[at].sent_bytes += bytes;
            self.machines[at].sending = Some(id);
            self.at(sent_at, Event::Sent(at as u32));
            self.at(got_at, Event::Got(id, start, end));
            return;
        }
    }

    fn sent(&mut self, at: usize) {
        let Some(id) = self.machines[at].sending.take() else { return };
        if let Some(request) = self.requests[id as usize].clone()
            && self.machines[at].alive
        {
            if request.part.end < request.run.end && !request.cancelled {
                self.next += 1;
                self.machines[at].queue.push(Reverse((request.priority, self.next, id)));
            } else {
                self.ended(at, &request, true);
            }
        }
        self.send(at);
    }

    /// A machine does not send for a request any more.
    fn ended(&mut self, at: usize, request: &Request, is_whole: bool) {
        let peer = PeerId(request.client as u64);
        if at >= NODES {
            self.machines[at].uploads.end(peer);
        } else if at == SEEDER {
            let now = self.time();
            self.tracker.on_end(now, LAYER, peer, request.run.clone(), is_whole);
            self.drive_tracker();
        }
    }

    fn got(&mut self, id: u32, part: Range<u32>) {
        let Some(request) = self.requests[id as usize].clone() else { return };
        // A machine that died in the meantime broke the transfer off.
        let is_broken = !self.machines[request.server].alive;
        let is_last = part.end >= request.run.end || request.cancelled;
        let (at, now) = (request.client, self.time());
        if is_last || is_broken {
            if request.server == REGISTRY {
                // What is left of it may stand in line, so the number is not used again.
                self.requests[id as usize] = None;
            } else {
                self.drop_request(id);
            }
            if at >= NODES {
                self.nodes[at - NODES].asked.remove(&request.fetch);
            }
        }
        if request.fetch == INGEST {
            if self.machines[SEEDER].alive {
                self.ingested = request.run.end;
                self.ingest();
                self.tracker.ingested(now, LAYER, request.run);
                self.drive_tracker();
            }
            return;
        }
        if !self.machines[at].alive {
            return;
        }
        if request.cancelled {
            self.report.duplicates += self.bytes(&part) as f64;
            return;
        }
        if is_broken {
            let outcome = Outcome::Failed { reason: "broken off".into(), retry_after: None };
            self.core(at).on_end(now, request.fetch, outcome);
            return self.drive(at);
        }
        let is_wrong = request.server >= NODES && self.nodes[request.server - NODES].is_liar;
        for chunk in part {
            if is_wrong {
                self.report.wrong_got += 1;
                self.core(at).on_chunk(now, request.fetch, chunk, Verdict::Wrong);
                break;
            }
            if request.server >= NODES && !self.nodes[request.server - NODES].got_right.contains(chunk) {
                self.report.wrong_passed_on += 1;
            }
            let node = &mut self.nodes[at - NODES];
            if node.got_right.insert(chunk) {
                self.chunks_here += 1;
                if chunk < node.demanded {
                    self.latencies.push(self.now - node.wanted_at);
                }
            } else {
                self.report.duplicates += self.geometry.chunk_size() as f64;
            }
            node.core.on_chunk(now, request.fetch, chunk, Verdict::Verified);
        }
        if is_wrong {
            let reason = "wrong".into();
            self.core(at).on_end(now, request.fetch, Outcome::Failed { reason, retry_after: None });
        } else if is_last {
            self.core(at).on_end(now, request.fetch, Outcome::Done);
        }
        self.finish(at);
        self.read(at);
        self.drive(at);
    }

    fn finish(&mut self, at: usize) {
        let node = &mut self.nodes[at - NODES];
        let wanted = if node.demanded > 0 { node.demanded } else { self.geometry.chunk_count() };
        let is_done = || node.got_right.runs().next().is_some_and(|run| run.start == 0 && run.end >= wanted);
        if node.done_at.is_none() && node.got_right.count() >= wanted && is_done() {
            node.done_at = Some(self.now);
            if !node.is_liar && self.machines[at].alive {
                self.unfinished = self.unfinished.saturating_sub(1);
            }
        }
        let percent = self.chunks_here * 100 / (u64::from(self.geometry.chunk_count()) * self.nodes.len() as u64);
        if self.scenario.seeder_dies_at.is_some_and(|at| percent >= at) {
            self.scenario.seeder_dies_at = None;
            self.die(SEEDER);
        }
    }

    fn answered(&mut self, id: u32, refusal: Refusal) {
        // The number is not used again: a dead server's run may still be on its way under it.
        let Some(request) = self.requests[id as usize].take() else { return };
        if request.fetch == INGEST || request.cancelled || !self.machines[request.client].alive {
            return;
        }
        let outcome = match refusal {
            Refusal::Busy(millis) => Outcome::Busy { retry_after: Duration::from_millis(u64::from(millis)) },
            Refusal::Missing => Outcome::Missing { reason: "missing".into() },
            Refusal::Broken => Outcome::Failed { reason: "broken".into(), retry_after: None },
        };
        let now = self.time();
        self.nodes[request.client - NODES].asked.remove(&request.fetch);
        self.core(request.client).on_end(now, request.fetch, outcome);
        for peer in request.peers {
            let other = peer.0 as usize;
            if other != request.client && !self.nodes[request.client - NODES].refused.contains(&other) {
                let zone = Zone(self.machines[other].zone as u32);
                let core = self.core(request.client);
                core.add_peer(now, LAYER, SourceId(peer.0), peer, zone);
                core.on_haves(now, LAYER, SourceId(peer.0), std::slice::from_ref(&request.run), &[]);
            }
        }
        self.drive(request.client);
    }

    fn tell(&mut self, told: Told) {
        let id = self.told.put(told);
        self.after_latency(Event::Haves(id));
    }

    fn haves(&mut self, id: u32) {
        let Some(told) = self.told.take(id) else { return };
        let neighbours = match told.to {
            Some(to) => vec![to],
            None => self.nodes[told.from - NODES].neighbours.clone(),
        };
        let now = self.time();
        for to in neighbours {
            if self.machines[to].alive {
                self.core(to).on_haves(now, LAYER, SourceId(told.from as u64), &told.runs, &told.delegates);
                self.core(to).on_coming(now, LAYER, SourceId(told.from as u64), &told.coming);
                self.drive(to);
            }
        }
    }

    fn track(&mut self, tracked: Tracked) {
        let id = self.tracked.put(tracked);
        self.after_latency(Event::Tracked(id));
    }

    fn tracked(&mut self, id: u32) {
        let Some(tracked) = self.tracked.take(id) else { return };
        let now = self.time();
        let lives = self.machines[SEEDER].alive;
        let peer = |at: usize| PeerId(at as u64);
        match tracked {
            Tracked::Join(at) if lives => {
                let node = &self.nodes[at - NODES];
                let have: Vec<_> = node.core.have(LAYER).map(|have| have.runs().collect()).unwrap_or_default();
                let zone = Zone(self.machines[at].zone as u32);
                let fills = node.core.fills(LAYER);
                let newcomer = Newcomer { peer: peer(at), zone, leech: node.is_leech, fills };
                self.tracker.join(now, LAYER, self.geometry, newcomer, &have);
                if self.ingested > 0 {
                    self.tracker.ingested(now, LAYER, 0..self.ingested);
                }
            }
            Tracked::Report(at, runs, fills) if lives => {
                self.tracker.report(now, LAYER, peer(at), &runs);
                self.tracker.fills(now, LAYER, peer(at), fills);
            }
            Tracked::Ask(at) if lives => self.track(Tracked::Alive(at)),
            Tracked::Alive(at) if self.machines[at].alive => {
                self.core(at).on_alive(now, SourceId(SEEDER as u64));
                self.drive(at);
            }
            Tracked::Accuse(by, whom) if lives => self.tracker.accuse(now, peer(whom), peer(by)),
            Tracked::Leave(at) if lives => self.tracker.leave(now, LAYER, peer(at)),
            Tracked::Introduce(to, of, zone) => self.introduced(to, of, zone),
            Tracked::Assign(to, run, from) if self.machines[to].alive => {
                if from != SEEDER {
                    let zone = Zone(self.machines[from].zone as u32);
                    self.core(to).add_peer(now, LAYER, SourceId(from as u64), PeerId(from as u64), zone);
                    self.core(to).on_haves(now, LAYER, SourceId(from as u64), std::slice::from_ref(&run), &[]);
                }
                self.core(to).assign(now, LAYER, run, SourceId(from as u64));
                self.drive(to);
            }
            Tracked::Expel(whom) => {
                for at in NODES..self.machines.len() {
                    if self.machines[at].alive && at != whom {
                        self.nodes[at - NODES].refused.push(whom);
                        self.core(at).remove_source(LAYER, SourceId(whom as u64));
                        self.nodes[at - NODES].neighbours.retain(|other| *other != whom);
                        self.drive(at);
                    }
                }
            }
            Tracked::Lost => {
                for at in NODES..self.machines.len() {
                    if self.machines[at].alive && self.nodes[at - NODES].joined {
                        self.core(at).on_source_lost(now, SourceId(SEEDER as u64));
                        self.drive(at);
                    }
                }
            }
            _ => {}
        }
        if lives {
            self.drive_tracker();
        }
    }

    fn introduced(&mut self, to: usize, of: usize, zone: Zone) {
        if !self.machines[to].alive || self.nodes[to - NODES].refused.contains(&of) {
            return;
        }
        let (now, all) = (self.time(), 0..self.geometry.chunk_count());
        self.core(to).add_peer(now, LAYER, SourceId(of as u64), PeerId(of as u64), zone);
        let node = &mut self.nodes[to - NODES];
        if !node.neighbours.contains(&of) {
            node.neighbours.push(of);
        }
        let mut runs = Vec::new();
        if node.is_liar {
            runs.push(all);
        } else if !node.is_leech {
            runs.extend(node.core.have(LAYER).into_iter().flat_map(|have| have.runs()));
        }
        self.tell(Told { from: to, to: Some(of), runs, delegates: Vec::new(), coming: Vec::new() });
    }

    fn drive_tracker(&mut self) {
        while let Some(action) = self.tracker.poll_action() {
            let at = |peer: PeerId| peer.0 as usize;
            self.track(match action {
                TrackerAction::Introduce { to, peer, zone, .. } => Tracked::Introduce(at(to), at(peer), zone),
                TrackerAction::Assign { to, run, from, .. } => Tracked::Assign(at(to), run, from.map_or(SEEDER, at)),
                TrackerAction::Expel { peer } => Tracked::Expel(at(peer)),
            });
        }
    }

    /// The seeder reads the layer from the registry, two runs at a time.
    fn ingest(&mut self) {
        let count = self.geometry.chunk_count();
        if !self.scenario.ingest {
            if self.ingested == 0 {
                self.ingested = count;
                let now = self.time();
                self.tracker.ingested(now, LAYER, 0..count);
            }
            return;
        }
        let run = (INGEST_RUN / self.geometry.chunk_size()).max(1) as u32;
        while self.ingest_asked < count && self.ingest_asked < self.ingested + 8 * run {
            let end = (self.ingest_asked + run).min(count);
            self.request(SEEDER, REGISTRY, INGEST, self.ingest_asked..end, Priority::Readahead, false);
            self.ingest_asked = end;
        }
    }

    fn core(&mut self, at: usize) -> &mut Swarm {
        &mut self.nodes[at - NODES].core
    }

    fn drop_request(&mut self, id: u32) {
        if self.requests[id as usize].take().is_some() {
            self.free.push(id);
        }
    }

    fn bytes(&self, run: &Range<u32>) -> u64 {
        u64::from(run.end - run.start) * self.geometry.chunk_size()
    }

    fn time(&self) -> Duration {
        Duration::from_nanos(self.now)
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 1) % below.max(1)
    }

    fn chance(&mut self, of_256: usize) -> bool {
        (self.draw(256) as usize) < of_256
    }
}
