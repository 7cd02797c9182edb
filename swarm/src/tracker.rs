//! The seeder's part: introduces the nodes of a layer to each other, gives each chunk out about once and then points to who
//! got it, and lets each chunk enter a zone about once.
//!
//! All of it is soft: a tracker that begins anew learns from the nodes' reports what it needs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Duration;

use layer::Geometry;

use crate::chunk_set::ChunkSet;
use crate::config::doubled;
use crate::peer::{PeerId, Zone, mix};
use crate::swarm::{LayerKey, Priority};

/// How a tracker behaves.
#[derive(Clone, Debug)]
pub struct TrackerConfig {
    /// Neighbours that a node is introduced to when it joins; with those who join later it comes to about twice as many.
    pub introductions: usize,
    /// Neighbours that a node has at least once those who joined with it have joined: nobody joins later to give the last ones
    /// more. They are introduced to others who have fewer.
    pub neighbours_min: usize,
    /// Most neighbours of a node.
    pub neighbours_max: usize,
    /// How many of four neighbours are zone-mates, where there are enough.
    pub mates_of_four: usize,
    /// Bytes of first copies under way from the seeder at once: enough to keep its link busy, little enough that few are lost
    /// with it.
    pub spread_bytes: u64,
    /// Bytes of one assignment.
    pub assignment_bytes: u64,
    /// Most bytes of assignments that a node may have open.
    pub peer_bytes: u64,
    /// A first copy that was not fetched for so long is assigned to another node.
    pub assignment_expiry: Duration,
    /// The same for a chunk that crosses into a zone: the node tells with its next report.
    pub crossing_expiry: Duration,
    /// A chunk that was just given out is not given again for so long, doubled with each copy: neighbours tell of it meanwhile.
    pub copy_pause: Duration,
    /// The longest such pause. After twice as long the copies are not counted any more.
    pub copy_pause_max: Duration,
    /// Most bytes served at once that were not assigned.
    pub serving_bytes: u64,
    /// Who finds all of them taken comes again after so long: a link of 1 Gbit/s is idle sooner than in twice that.
    pub serving_pause: Duration,
    /// So many askers are sent to the node that was given a chunk and did not yet report it.
    pub pointed_max: u32,
    /// A node that told nothing for so long is gone; [`Duration::MAX`] where the owner knows better.
    pub member_expiry: Duration,
    /// So many different nodes must say that a peer sent wrong chunks before it is expelled: one alone might slander.
    pub accusers: usize,
}

impl Default for TrackerConfig {
    fn default() -> Self {
        Self {
            introductions: 12,
            neighbours_min: 20,
            neighbours_max: 32,
            mates_of_four: 3,
            spread_bytes: 4 << 20,
            assignment_bytes: 256 << 10,
            peer_bytes: 1 << 20,
            assignment_expiry: Duration::from_secs(2),
            crossing_expiry: Duration::from_secs(4),
            copy_pause: Duration::from_millis(250),
            copy_pause_max: Duration::from_secs(4),
            serving_bytes: 4 << 20,
            serving_pause: Duration::from_millis(15),
            pointed_max: 4,
            member_expiry: Duration::from_secs(15),
            accusers: 3,
        }
    }
}

/// What the seeder has to tell nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrackerAction {
    /// Tell `to` that `peer` is a neighbour from now on; the other one is told too.
    Introduce {
        /// Of which layer.
        layer: LayerKey,
        /// Whom to tell.
        to: PeerId,
        /// Of whom.
        peer: PeerId,
        /// Where it is.
        zone: Zone,
    },
    /// Tell `to` to fetch a run for all.
    Assign {
        /// Of which layer.
        layer: LayerKey,
        /// Whom to tell.
        to: PeerId,
        /// Which chunks.
        run: Range<u32>,
        /// From whom; `None`: from the seeder.
        from: Option<PeerId>,
    },
    /// Several nodes got wrong chunks from it: cut it off, and tell all.
    Expel {
        /// Whom.
        peer: PeerId,
    },
}

/// The answer to a request for chunks at the seeder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Serve it; [`Tracker::on_end`] is called when that ended.
    Serve,
    /// Others have it or are about to.
    Busy {
        /// When to come again, if it did not come from others.
        retry_after: Duration,
        /// Who has it.
        peers: Vec<PeerId>,
    },
    /// Not all of it is here yet.
    Missing,
}

/// All layers that nodes of the seeder fetch.
#[derive(Debug)]
pub struct Tracker {
    config: TrackerConfig,
    random: u64,
    now: Duration,
    layers: BTreeMap<LayerKey, Members>,
    accusers: BTreeMap<PeerId, BTreeSet<PeerId>>,
    expelled: BTreeSet<PeerId>,
    actions: VecDeque<TrackerAction>,
    /// When assignments, and silent nodes, are looked after next.
    look_at: Duration,
    silence_at: Duration,
}

/// Who joins a layer.
#[derive(Clone, Copy, Debug)]
pub struct Newcomer {
    /// Who.
    pub peer: PeerId,
    /// Where.
    pub zone: Zone,
    /// It gives nothing: first copies are for others.
    pub leech: bool,
    /// It takes what it is assigned ([`Swarm::fills`](crate::Swarm::fills)).
    pub fills: bool,
}

/// The nodes of one layer.
#[derive(Debug)]
struct Members {
    geometry: Geometry,
    /// What the seeder itself has.
    here: ChunkSet,
    peers: BTreeMap<PeerId, Member>,
    /// How many of them have all of it.
    complete: usize,
    /// For drawing lots.
    list: Vec<PeerId>,
    /// Who joined shortly after each other, and when the last of them did.
    newcomers: Vec<PeerId>,
    joined: Duration,
    /// Members of each zone in turn, and what has entered it.
    zones: BTreeMap<Zone, InZone>,
    /// Chunks that nobody was given by this tracker or told to have.
    unspread: ChunkSet,
    given: Vec<Given>,
    under_way: BTreeMap<(u32, Zone), UnderWay>,
    spreading_bytes: u64,
    /// Bytes that are being sent and were not assigned, by who asked and the first chunk.
    serving: BTreeMap<(PeerId, u32), u64>,
    next_zone: usize,
}

#[derive(Debug)]
struct Member {
    zone: Zone,
    have: ChunkSet,
    neighbours: BTreeSet<PeerId>,
    open_bytes: u64,
    heard: Duration,
    leech: bool,
    fills: bool,
}

#[derive(Debug)]
struct InZone {
    turn: VecDeque<PeerId>,
    /// How many of them fill.
    filling: usize,
    /// In it or on the way into it.
    entered: ChunkSet,
}

#[derive(Clone, Copy, Debug)]
struct Given {
    at: Duration,
    to: PeerId,
    /// How often within a while.
    copies: u32,
    /// It was sent, and so many were told whom to ask.
    sent: bool,
    pointed: u32,
}

#[derive(Clone, Debug)]
struct UnderWay {
    end: u32,
    to: PeerId,
    from: Option<PeerId>,
    until: Duration,
}

const NOBODY: PeerId = PeerId(0);
const NOT_GIVEN: Given = Given { at: Duration::ZERO, to: NOBODY, copies: 0, sent: false, pointed: 0 };
/// Most expelled peers and accusations that are kept.
const EXPELLED_MAX: usize = 4096;
/// Most runs that cross into zones because those came later.
const CROSSINGS_MAX: usize = 512;
/// When nobody joined for so long, those who joined last will not be introduced to later ones.
const SETTLED: Duration = Duration::from_millis(200);
/// How often assignments are looked after.
const STEP: Duration = Duration::from_millis(250);

impl Tracker {
    /// Without layers.
    pub fn new(config: TrackerConfig, seed: u64) -> Self {
        Self {
            config,
            random: seed,
            now: Duration::ZERO,
            layers: BTreeMap::new(),
            accusers: BTreeMap::new(),
            expelled: BTreeSet::new(),
            actions: VecDeque::new(),
            look_at: Duration::ZERO,
            silence_at: Duration::ZERO,
        }
    }

    /// A node joins a layer, or asks for more neighbours. `have` is what it has of it.
    pub fn join(
        &mut self,
        now: Duration,
        layer: LayerKey,
        geometry: Geometry,
        newcomer: Newcomer,
        have: &[Range<u32>],
    ) {
        self.now = self.now.max(now);
        let peer = newcomer.peer;
        if self.expelled.contains(&peer) {
            return;
        }
        let members = self.layers.entry(layer).or_insert_with(|| Members::new(geometry));
        members.add(newcomer, self.now);
        self.report(now, layer, peer, have);
        self.introduce(layer, peer);
        self.spread(layer);
    }

    /// A node begins or ceases to take what it is assigned.
    pub fn fills(&mut self, now: Duration, layer: LayerKey, peer: PeerId, fills: bool) {
        self.now = self.now.max(now);
        let Some(members) = self.layers.get_mut(&layer) else { return };
        if members.set_fills(peer, fills) && fills {
            self.spread(layer);
        }
    }

    /// A node left a layer, or its connection broke.
    pub fn leave(&mut self, now: Duration, layer: LayerKey, peer: PeerId) {
        self.now = self.now.max(now);
        let Some(members) = self.layers.get_mut(&layer) else { return };
        members.remove(peer);
        if members.peers.is_empty() {
            self.layers.remove(&layer);
        } else {
            self.spread(layer);
        }
    }

    /// A node tells what came to it since its last report.
    pub fn report(&mut self, now: Duration, layer: LayerKey, peer: PeerId, runs: &[Range<u32>]) {
        self.now = self.now.max(now);
        let Some(members) = self.layers.get_mut(&layer) else { return };
        let Some(member) = members.peers.get_mut(&peer) else { return };
        member.heard = self.now;
        let Some(zone) = members.zones.get_mut(&member.zone) else { return };
        let was_complete = member.have.is_full();
        for run in runs {
            member.have.insert_run(run.clone());
            zone.entered.insert_run(run.clone());
            for chunk in run.start..run.end.min(members.geometry.chunk_count()) {
                members.unspread.remove(chunk);
            }
        }
        members.complete += usize::from(member.have.is_full() && !was_complete);
    }

    /// The seeder has more of the layer.
    pub fn ingested(&mut self, now: Duration, layer: LayerKey, run: Range<u32>) {
        self.now = self.now.max(now);
        let Some(members) = self.layers.get_mut(&layer) else { return };
        members.here.insert_run(run);
        self.spread(layer);
    }

    /// A node asks the seeder for a run.
    pub fn request(&mut self, now: Duration, layer: LayerKey, peer: PeerId, run: Range<u32>, why: Priority) -> Answer {
        self.now = self.now.max(now);
        let (pause, pause_max) = (self.config.copy_pause, self.config.copy_pause_max);
        let Some(members) = self.layers.get_mut(&layer) else { return Answer::Serve };
        if run.clone().any(|chunk| !members.here.contains(chunk)) {
            return Answer::Missing;
        }
        let is_assigned = |chunk: u32| {
            let before = members.under_way.range(..=(chunk, Zone(u32::MAX))).next_back();
            before.is_some_and(|(_, way)| way.to == peer && way.from.is_none() && chunk < way.end)
        };
        if run.clone().all(is_assigned) {
            return Answer::Serve;
        }
        let free_at = |given: &Given| {
            let pause = doubled(pause, given.copies).min(pause_max);
            given.at + if why == Priority::Demand { pause } else { pause * 4 }
        };
        let free_at = run.clone().filter_map(|chunk| members.given.get(chunk as usize)).map(free_at).max();
        let is_given = run.clone().any(|chunk| !members.unspread.contains(chunk));
        let free_at = free_at.filter(|_| is_given).unwrap_or_default();
        let others_first = is_given && why == Priority::Background && members.next_to_spread(0).is_some();
        let bytes = u64::from(run.end - run.start) * members.geometry.chunk_size();
        let serving: u64 = members.serving.values().sum();
        let is_full = serving > 0 && serving + bytes > self.config.serving_bytes;
        // A node that is alone has nobody else to ask, and takes nothing from anybody.
        let is_alone = members.peers.len() <= 1;
        if !is_alone && (free_at > self.now || others_first || is_full) {
            let retry_after = if free_at > self.now || others_first {
                free_at.saturating_sub(self.now).clamp(pause / 4, pause * 8)
            } else {
                self.config.serving_pause
            };
            let retry_after = if why == Priority::Background { retry_after.max(pause * 4) } else { retry_after };
            return Answer::Busy { retry_after, peers: self.who_has(layer, peer, run.start) };
        }
        *members.serving.entry((peer, run.start)).or_default() += bytes;
        for chunk in run {
            members.give(chunk, peer, self.now, pause_max * 2);
        }
        Answer::Serve
    }

    /// What was served to a node ended; `is_whole`: all of the run was sent.
    pub fn on_end(&mut self, now: Duration, layer: LayerKey, peer: PeerId, run: Range<u32>, is_whole: bool) {
        self.now = self.now.max(now);
        let Some(members) = self.layers.get_mut(&layer) else { return };
        members.serving.remove(&(peer, run.start));
        if !is_whole {
            members.take_back(run, peer);
            return self.spread(layer);
        }
        for chunk in run.clone() {
            let given = members.given.get_mut(chunk as usize).filter(|given| given.to == peer);
            given.into_iter().for_each(|given| given.sent = true);
        }
        let Some(zone) = members.peers.get(&peer).map(|member| member.zone) else { return };
        // A node may have got the other half of what it was assigned elsewhere.
        let ways = members.under_way.range(..(run.end, Zone(0))).rev();
        let ended: Vec<_> = ways
            .take(64)
            .filter(|(_, way)| way.to == peer && way.from.is_none() && run.start < way.end)
            .map(|(key, _)| *key)
            .collect();
        for key in ended {
            members.end_way(key);
        }
        if let Some(zone) = members.zones.get_mut(&zone) {
            zone.entered.insert_run(run.clone());
        }
        self.cross(layer, run, peer);
        self.spread(layer);
    }

    /// `by` got a wrong chunk from `peer`.
    pub fn accuse(&mut self, now: Duration, peer: PeerId, by: PeerId) {
        self.now = self.now.max(now);
        if self.expelled.contains(&peer) || self.expelled.contains(&by) || self.accusers.len() >= EXPELLED_MAX {
            return;
        }
        let accusers = self.accusers.entry(peer).or_default();
        accusers.insert(by);
        if accusers.len() >= self.config.accusers && self.expelled.len() < EXPELLED_MAX {
            self.accusers.remove(&peer);
            self.expelled.insert(peer);
            let layers: Vec<LayerKey> = self.layers.keys().copied().collect();
            for layer in layers {
                self.leave(now, layer, peer);
            }
            self.actions.push_back(TrackerAction::Expel { peer });
        }
    }

    /// Takes the next thing to tell.
    pub fn poll_action(&mut self) -> Option<TrackerAction> {
        self.actions.pop_front()
    }

    /// When [`Tracker::handle_timeout`] has to be called.
    pub fn poll_timeout(&self) -> Option<Duration> {
        (!self.layers.is_empty()).then_some(self.look_at)
    }

    /// Assigns anew what was not fetched, and forgets silent nodes.
    pub fn handle_timeout(&mut self, now: Duration) {
        self.now = self.now.max(now);
        let now = self.now;
        self.look_at = now + STEP;
        let looks_for_silence = self.silence_at <= now;
        if looks_for_silence {
            self.silence_at = now.saturating_add(self.config.member_expiry / 8);
        }
        let layers: Vec<LayerKey> = self.layers.keys().copied().collect();
        for layer in layers {
            if looks_for_silence {
                self.forget_silent(layer);
            }
            self.settle(layer);
            let Some(members) = self.layers.get_mut(&layer) else { continue };
            let due: Vec<_> =
                members.under_way.iter().filter(|(_, way)| way.until <= now).map(|(key, _)| *key).collect();
            let mut crossings = Vec::new();
            for key in due {
                let Some(way) = members.end_way(key) else { continue };
                if way.from.is_none() {
                    members.take_back(key.0..way.end, way.to);
                    continue;
                }
                let missing: Vec<u32> = (key.0..way.end).filter(|chunk| !members.came(*chunk, way.to)).collect();
                if let Some(zone) = members.zones.get_mut(&key.1) {
                    for chunk in &missing {
                        zone.entered.remove(*chunk);
                    }
                }
                crossings.extend(missing);
            }
            if let Some(members) = self.layers.get(&layer) {
                crossings.extend(members.not_entered());
            }
            for chunk in crossings {
                if let Some(peer) = self.who_has(layer, NOBODY, chunk).first() {
                    self.cross(layer, chunk..chunk + 1, *peer);
                }
            }
            self.spread(layer);
        }
    }

    fn forget_silent(&mut self, layer: LayerKey) {
        let Some(members) = self.layers.get(&layer) else { return };
        let is_silent = |member: &Member| member.heard.saturating_add(self.config.member_expiry) <= self.now;
        let silent: Vec<PeerId> =
            members.peers.iter().filter(|(_, member)| is_silent(member)).map(|(peer, _)| *peer).collect();
        for peer in silent {
            self.leave(self.now, layer, peer);
        }
    }

    /// Up to four members that have a chunk.
    fn who_has(&mut self, layer: LayerKey, asker: PeerId, chunk: u32) -> Vec<PeerId> {
        let mut found: Vec<PeerId> = Vec::new();
        let draw = self.next_random();
        let pointed_max = self.config.pointed_max;
        let Some(members) = self.layers.get_mut(&layer) else { return found };
        if let Some(given) = members.given.get_mut(chunk as usize)
            && given.sent
            && given.pointed < pointed_max
            && given.to != asker
            && members.peers.get(&given.to).is_some_and(|member| !member.leech)
        {
            given.pointed += 1;
            found.push(given.to);
        }
        let from = usize::try_from(draw).unwrap_or(0) % members.list.len().max(1);
        for peer in members.list.iter().cycle().skip(from).take(members.list.len().min(32)) {
            let has = members.peers.get(peer).is_some_and(|member| !member.leech && member.have.contains(chunk));
            if has && *peer != asker && !found.contains(peer) && found.len() < 4 {
                found.push(*peer);
            }
        }
        found
    }

    /// Gives a newcomer neighbours, of a few drawn by lot from its zone and from all.
    fn introduce(&mut self, layer: LayerKey, peer: PeerId) {
        let draws = self.config.introductions * 4;
        let draws: Vec<u64> = (0..2 * draws).map(|_| self.next_random()).collect();
        let Some(members) = self.layers.get(&layer) else { return };
        let Some(mates) = members.peers.get(&peer).and_then(|member| members.zones.get(&member.zone)) else { return };
        let at = |draw: &u64, len: usize| usize::try_from(draw % len.max(1) as u64).unwrap_or(0);
        let (near, far) = draws.split_at(draws.len() / 2);
        let near = near.iter().filter_map(|draw| mates.turn.get(at(draw, mates.turn.len())));
        let far = far.iter().filter_map(|draw| members.list.get(at(draw, members.list.len())));
        let drawn = near.chain(far).copied().collect();
        self.acquaint(layer, peer, self.config.introductions, drawn);
    }

    /// Once nobody joins any more, the newcomers who have few neighbours are given more: of each other or, where those are few, of
    /// whoever joined with them last.
    fn settle(&mut self, layer: LayerKey) {
        let (now, neighbours_min) = (self.now, self.config.neighbours_min);
        let Some(members) = self.layers.get_mut(&layer).filter(|members| members.joined + SETTLED <= now) else {
            return;
        };
        let peers = &members.peers;
        let is_sparse = |member: &Member| member.neighbours.len() < neighbours_min && !member.have.is_full();
        let newcomers = std::mem::take(&mut members.newcomers);
        let sparse = newcomers.iter().filter(|peer| peers.get(peer).is_some_and(is_sparse));
        let sparse: Vec<PeerId> = sparse.copied().collect();
        let draws = neighbours_min * 4;
        for peer in &sparse {
            let drawn = if sparse.len() <= draws {
                newcomers.iter().rev().take(draws).copied().collect()
            } else {
                let at = |draw: u64| usize::try_from(draw % sparse.len() as u64).unwrap_or(0);
                (0..draws).filter_map(|_| sparse.get(at(self.next_random())).copied()).collect()
            };
            self.acquaint(layer, *peer, neighbours_min, drawn);
        }
    }

    /// Introduces a node to some of those drawn until it has so many neighbours: zone-mates first, and those with the fewest. Two that
    /// have all of the layer need not know each other: else, with many layers, all nodes would.
    fn acquaint(&mut self, layer: LayerKey, peer: PeerId, neighbours: usize, drawn: BTreeSet<PeerId>) {
        let Some(members) = self.layers.get_mut(&layer) else { return };
        let Some(member) = members.peers.get(&peer) else { return };
        let (zone, is_complete) = (member.zone, member.have.is_full());
        if is_complete && members.complete == members.peers.len() {
            return;
        }
        let wanted = neighbours.saturating_sub(member.neighbours.len());
        let mates_wanted = wanted * self.config.mates_of_four / 4;
        let may = |other: PeerId, candidate: &Member| {
            other != peer
                && candidate.neighbours.len() < self.config.neighbours_max
                && !candidate.neighbours.contains(&peer)
                && !(is_complete && candidate.have.is_full())
        };
        let candidates = drawn.into_iter().filter_map(|other| Some((other, members.peers.get(&other)?)));
        let mut candidates: Vec<_> = candidates
            .filter(|(other, candidate)| may(*other, candidate))
            .map(|(other, candidate)| (candidate.neighbours.len(), mix(other.0 ^ peer.0), other, candidate.zone))
            .collect();
        candidates.sort_unstable();
        let (mates, far): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|(.., of)| *of == zone);
        let far_wanted = wanted - mates_wanted.min(mates.len());
        let far = far.get(..far_wanted.min(far.len())).unwrap_or_default();
        let mates = mates.get(..(wanted - far.len()).min(mates.len())).unwrap_or_default();
        for (.., other, other_zone) in mates.iter().chain(far).copied() {
            for (to, of, zone) in [(peer, other, other_zone), (other, peer, zone)] {
                if let Some(member) = members.peers.get_mut(&to) {
                    member.neighbours.insert(of);
                    self.actions.push_back(TrackerAction::Introduce { layer, to, peer: of, zone });
                }
            }
        }
    }

    /// Assigns first copies while there is room on the seeder's link.
    fn spread(&mut self, layer: LayerKey) {
        let Some(members) = self.layers.get_mut(&layer) else { return };
        let chunk_size = members.geometry.chunk_size();
        let chunks_max = u32::try_from(self.config.assignment_bytes / chunk_size).unwrap_or(u32::MAX).max(1);
        while members.spreading_bytes < self.config.spread_bytes.max(chunk_size)
            && let Some(start) = members.next_to_spread(0)
        {
            let mut end = start + 1;
            while end - start < chunks_max && members.next_to_spread(end) == Some(end) {
                end += 1;
            }
            let bytes = u64::from(end - start) * chunk_size;
            let limit = self.config.peer_bytes.max(bytes);
            let zones: Vec<Zone> = members.zones.keys().copied().collect();
            let mut taker = None;
            for step in 0..zones.len() {
                let zone = zones.get((members.next_zone + step) % zones.len()).copied().unwrap_or_default();
                taker = members.next_taker(zone, start, bytes, limit).map(|to| (zone, to));
                if taker.is_some() {
                    members.next_zone += step + 1;
                    break;
                }
            }
            let Some((zone, to)) = taker else { return };
            for chunk in start..end {
                members.give(chunk, to, self.now, self.config.copy_pause_max * 2);
            }
            let until = self.now + self.config.assignment_expiry;
            members.begin_way((start, zone), UnderWay { end, to, from: None, until });
            self.actions.push_back(TrackerAction::Assign { layer, to, run: start..end, from: None });
        }
    }

    /// Lets a run that `from` has enter every zone that it did not enter.
    fn cross(&mut self, layer: LayerKey, run: Range<u32>, from: PeerId) {
        let Some(members) = self.layers.get_mut(&layer) else { return };
        let zones: Vec<Zone> = members.zones.keys().copied().collect();
        for zone in zones {
            let Some(state) = members.zones.get_mut(&zone) else { continue };
            if run.clone().any(|chunk| state.entered.contains(chunk)) {
                continue;
            }
            let bytes = u64::from(run.end - run.start) * members.geometry.chunk_size();
            let Some(to) = members.next_taker(zone, run.start, bytes, u64::MAX) else { continue };
            if let Some(state) = members.zones.get_mut(&zone) {
                state.entered.insert_run(run.clone());
            }
            let until = self.now + self.config.crossing_expiry;
            members.begin_way((run.start, zone), UnderWay { end: run.end, to, from: Some(from), until });
            self.actions.push_back(TrackerAction::Assign { layer, to, run: run.clone(), from: Some(from) });
        }
    }

    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(1);
        mix(self.random)
    }
}

impl Members {
    fn new(geometry: Geometry) -> Self {
        let count = geometry.chunk_count();
        let mut unspread = ChunkSet::new(count);
        unspread.insert_run(0..count);
        Self {
            geometry,
            here: ChunkSet::new(count),
            peers: BTreeMap::new(),
            complete: 0,
            list: Vec::new(),
            newcomers: Vec::new(),
            joined: Duration::ZERO,
            zones: BTreeMap::new(),
            unspread,
            given: vec![NOT_GIVEN; count as usize],
            under_way: BTreeMap::new(),
            spreading_bytes: 0,
            serving: BTreeMap::new(),
            next_zone: 0,
        }
    }

    fn add(&mut self, newcomer: Newcomer, now: Duration) {
        let Newcomer { peer, zone, leech, fills } = newcomer;
        if self.peers.contains_key(&peer) {
            self.set_fills(peer, fills);
            return;
        }
        let count = self.geometry.chunk_count();
        let have = ChunkSet::new(count);
        self.complete += usize::from(have.is_full());
        let member = Member { zone, have, neighbours: BTreeSet::new(), open_bytes: 0, heard: now, leech, fills: false };
        self.peers.insert(peer, member);
        self.list.push(peer);
        self.newcomers.push(peer);
        self.joined = now;
        let new = || InZone { turn: VecDeque::new(), filling: 0, entered: ChunkSet::new(count) };
        self.zones.entry(zone).or_insert_with(new).turn.push_back(peer);
        self.set_fills(peer, fills);
    }

    /// Gives whether that is new.
    fn set_fills(&mut self, peer: PeerId, fills: bool) -> bool {
        let Some(member) = self.peers.get_mut(&peer).filter(|member| member.fills != fills) else { return false };
        member.fills = fills;
        if let Some(zone) = self.zones.get_mut(&member.zone) {
            zone.filling = if fills { zone.filling + 1 } else { zone.filling - 1 };
        }
        true
    }

    fn remove(&mut self, peer: PeerId) {
        self.set_fills(peer, false);
        let Some(member) = self.peers.remove(&peer) else { return };
        self.complete -= usize::from(member.have.is_full());
        self.list.retain(|id| *id != peer);
        self.newcomers.retain(|id| *id != peer);
        for neighbour in &member.neighbours {
            if let Some(other) = self.peers.get_mut(neighbour) {
                other.neighbours.remove(&peer);
            }
        }
        if let Some(zone) = self.zones.get_mut(&member.zone) {
            zone.turn.retain(|id| *id != peer);
            if zone.turn.is_empty() {
                self.zones.remove(&member.zone);
            }
        }
        for chunk in 0..self.geometry.chunk_count() {
            self.take_back(chunk..chunk + 1, peer);
        }
        self.serving.retain(|(to, _), _| *to != peer);
        let open: Vec<_> = self.under_way.iter().filter(|(_, way)| way.to == peer).map(|(key, _)| *key).collect();
        for key in open {
            let Some(way) = self.end_way(key) else { continue };
            if way.from.is_none() {
                self.take_back(key.0..way.end, peer);
            } else if let Some(zone) = self.zones.get_mut(&key.1) {
                (key.0..way.end).for_each(|chunk| {
                    zone.entered.remove(chunk);
                });
            }
        }
    }

    /// The first chunk from `from` on that is here and was given to nobody.
    fn next_to_spread(&self, from: u32) -> Option<u32> {
        self.unspread.next_in_both(&self.here, from, u32::MAX)
    }

    /// The next member of a zone that may take a run.
    fn next_taker(&mut self, zone: Zone, chunk: u32, bytes: u64, limit: u64) -> Option<PeerId> {
        let turn = &mut self.zones.get_mut(&zone).filter(|zone| zone.filling > 0)?.turn;
        let gives = |peer: &PeerId| self.peers.get(peer).is_some_and(|member| member.fills && !member.leech);
        let all_leech = !turn.iter().any(gives);
        for _ in 0..turn.len() {
            let peer = turn.pop_front()?;
            turn.push_back(peer);
            let fits = |member: &Member| {
                member.fills
                    && member.open_bytes + bytes <= limit
                    && !member.have.contains(chunk)
                    && (all_leech || !member.leech)
            };
            if self.peers.get(&peer).is_some_and(fits) {
                return Some(peer);
            }
        }
        None
    }

    fn give(&mut self, chunk: u32, to: PeerId, now: Duration, remembered: Duration) {
        self.unspread.remove(chunk);
        if let Some(given) = self.given.get_mut(chunk as usize) {
            let copies = if given.to == NOBODY || given.at + remembered <= now { 0 } else { given.copies };
            *given = Given { at: now, to, copies: copies + 1, sent: false, pointed: 0 };
        }
    }

    /// What was given to a node that is gone, or assigned and not fetched: somebody else is to have it, unless somebody does.
    fn take_back(&mut self, run: Range<u32>, from: PeerId) {
        for chunk in run {
            let Some(given) = self.given.get_mut(chunk as usize).filter(|given| given.to == from && from != NOBODY)
            else {
                continue;
            };
            if !self.peers.values().any(|member| member.have.contains(chunk)) {
                // What never left this machine keeps nobody waiting.
                if !given.sent {
                    *given = NOT_GIVEN;
                }
                self.unspread.insert(chunk);
            }
        }
    }

    /// Chunks that somebody has or was sent, and that are in not all zones: those zones came later.
    fn not_entered(&self) -> Vec<u32> {
        let mut found = Vec::new();
        let crossing = self.under_way.values().filter(|way| way.from.is_some()).count();
        for zone in self.zones.values().filter(|zone| !zone.entered.is_full()) {
            let room = CROSSINGS_MAX.saturating_sub(crossing);
            let waits = |chunk: &u32| !self.unspread.contains(*chunk) && !zone.entered.contains(*chunk);
            let is_elsewhere = |chunk: &u32| self.zones.values().any(|other| other.entered.contains(*chunk));
            found.extend((0..self.geometry.chunk_count()).filter(waits).filter(is_elsewhere).take(room));
        }
        found
    }

    fn came(&self, chunk: u32, to: PeerId) -> bool {
        self.peers.get(&to).is_some_and(|member| member.have.contains(chunk))
    }

    fn begin_way(&mut self, key: (u32, Zone), way: UnderWay) {
        let bytes = u64::from(way.end - key.0) * self.geometry.chunk_size();
        if way.from.is_none() {
            self.spreading_bytes += bytes;
            if let Some(member) = self.peers.get_mut(&way.to) {
                member.open_bytes += bytes;
            }
        }
        self.under_way.insert(key, way);
    }

    fn end_way(&mut self, key: (u32, Zone)) -> Option<UnderWay> {
        let way = self.under_way.remove(&key)?;
        let bytes = u64::from(way.end - key.0) * self.geometry.chunk_size();
        if way.from.is_none() {
            self.spreading_bytes = self.spreading_bytes.saturating_sub(bytes);
            if let Some(member) = self.peers.get_mut(&way.to) {
                member.open_bytes = member.open_bytes.saturating_sub(bytes);
            }
        }
        Some(way)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: LayerKey = LayerKey(1);

    fn tracker(peers: u64, zones: u32) -> Tracker {
        let mut tracker = Tracker::new(TrackerConfig::default(), 3);
        for peer in 1..=peers {
            let zone = Zone(peer as u32 % zones);
            tracker.join(Duration::ZERO, LAYER, geometry(), Newcomer { zone, ..newcomer(peer) }, &[]);
        }
        tracker
    }

    fn newcomer(peer: u64) -> Newcomer {
        Newcomer { peer: PeerId(peer), zone: Zone(0), leech: false, fills: true }
    }

    fn geometry() -> Geometry {
        Geometry::new(64 << 17, 17).unwrap()
    }

    /// Who is assigned something.
    fn takers(tracker: &mut Tracker) -> Vec<PeerId> {
        let takers = std::iter::from_fn(|| tracker.poll_action()).filter_map(|action| match action {
            TrackerAction::Assign { to, .. } => Some(to),
            TrackerAction::Introduce { .. } | TrackerAction::Expel { .. } => None,
        });
        takers.collect()
    }

    /// Assignments, each fetched at once.
    fn fetch_all(tracker: &mut Tracker, now: Duration) -> Vec<(PeerId, Range<u32>, Option<PeerId>)> {
        let mut assigned = Vec::new();
        while let Some(action) = tracker.poll_action() {
            if let TrackerAction::Assign { to, run, from, .. } = action {
                assigned.push((to, run.clone(), from));
                match from {
                    None => {
                        assert_eq!(tracker.request(now, LAYER, to, run.clone(), Priority::Readahead), Answer::Serve);
                        tracker.on_end(now, LAYER, to, run, true);
                    }
                    Some(_) => tracker.report(now, LAYER, to, &[run]),
                }
            }
        }
        assigned
    }

    #[test]
    fn gives_each_chunk_once_to_all_in_turn() {
        let mut tracker = tracker(10, 1);
        tracker.ingested(Duration::ZERO, LAYER, 0..64);
        let assigned = fetch_all(&mut tracker, Duration::ZERO);
        let mut chunks: Vec<u32> = assigned.iter().flat_map(|(_, run, _)| run.clone()).collect();
        chunks.sort_unstable();
        assert_eq!(chunks, (0..64).collect::<Vec<_>>());
        for peer in 1..=10 {
            let count = assigned.iter().filter(|(to, ..)| *to == PeerId(peer)).count();
            assert!((3..=4).contains(&count), "{peer} was assigned {count} runs");
        }
    }

    #[test]
    fn lets_each_chunk_enter_each_zone_once() {
        let mut tracker = tracker(12, 3);
        tracker.ingested(Duration::ZERO, LAYER, 0..64);
        let assigned = fetch_all(&mut tracker, Duration::ZERO);
        for zone in 0..3 {
            let mut chunks: Vec<u32> =
                assigned.iter().filter(|(to, ..)| to.0 % 3 == zone).flat_map(|(_, run, _)| run.clone()).collect();
            chunks.sort_unstable();
            assert_eq!(chunks, (0..64).collect::<Vec<_>>(), "zone {zone}");
        }
        let seeder: usize = assigned.iter().filter(|(.., from)| from.is_none()).map(|(_, run, _)| run.len()).sum();
        assert_eq!(seeder, 64);
    }

    #[test]
    fn who_is_alone_waits_for_nobody() {
        let unserved = |peers| {
            let mut tracker = tracker(peers, 1);
            tracker.ingested(Duration::ZERO, LAYER, 0..64);
            let ask = |run: Range<u32>| tracker.request(Duration::ZERO, LAYER, PeerId(1), run, Priority::Demand);
            // All at once, and one of them twice.
            (0..64)
                .step_by(4)
                .map(|from| from..from + 4)
                .chain(std::iter::once(0..4))
                .map(ask)
                .filter(|answer| *answer != Answer::Serve)
                .count()
        };
        assert_eq!(unserved(1), 0);
        assert!(unserved(2) > 0);
    }

    #[test]
    fn points_to_who_got_it() {
        let mut tracker = tracker(10, 1);
        tracker.ingested(Duration::ZERO, LAYER, 0..64);
        let assigned = fetch_all(&mut tracker, Duration::ZERO);
        let (to, run, _) = assigned[0].clone();
        let asker = PeerId(if to == PeerId(1) { 2 } else { 1 });
        let answer = tracker.request(Duration::from_millis(10), LAYER, asker, run.clone(), Priority::Demand);
        assert!(matches!(&answer, Answer::Busy { peers, .. } if peers.contains(&to)), "{answer:?}");
        // Who still needs it later gets it.
        let answer = tracker.request(Duration::from_secs(1), LAYER, asker, run, Priority::Demand);
        assert_eq!(answer, Answer::Serve);
    }

    #[test]
    fn copies_what_was_given_ever_more_slowly() {
        let mut tracker = tracker(40, 1);
        tracker.ingested(Duration::ZERO, LAYER, 0..2);
        fetch_all(&mut tracker, Duration::ZERO);
        let mut served = Vec::new();
        for millis in (0..4000u64).step_by(10) {
            let (now, asker) = (Duration::from_millis(millis), PeerId(millis / 10 % 40 + 1));
            if tracker.request(now, LAYER, asker, 0..1, Priority::Demand) == Answer::Serve {
                tracker.on_end(now, LAYER, asker, 0..1, true);
                served.push(millis);
            }
        }
        assert!((3..=5).contains(&served.len()), "{served:?}");
        assert!(served.is_sorted_by_key(|at| *at), "{served:?}");
    }

    #[test]
    fn serves_little_at_once() {
        let mut tracker = tracker(400, 1);
        let big = Geometry::new(4096 << 17, 17).unwrap();
        let layer = LayerKey(2);
        for peer in 1..=400 {
            tracker.join(Duration::ZERO, layer, big, newcomer(peer), &[]);
        }
        tracker.ingested(Duration::ZERO, layer, 0..4096);
        let ask = |tracker: &mut Tracker, peer: u32| {
            let run = 1000 + 2 * peer..1002 + 2 * peer;
            tracker.request(Duration::ZERO, layer, PeerId(u64::from(peer)), run, Priority::Demand)
        };
        let served: Vec<u32> = (1..=400).filter(|peer| ask(&mut tracker, *peer) == Answer::Serve).collect();
        assert_eq!(served.len(), 16, "4 MiB");
        tracker.on_end(Duration::ZERO, layer, PeerId(1), 1002..1004, true);
        assert_eq!(ask(&mut tracker, 399), Answer::Serve);
    }

    #[test]
    fn assigns_anew_what_was_not_fetched() {
        let mut tracker = tracker(4, 1);
        tracker.ingested(Duration::ZERO, LAYER, 0..2);
        let mut takers = Vec::new();
        for second in 0..8 {
            tracker.handle_timeout(Duration::from_secs(second));
            while let Some(action) = tracker.poll_action() {
                if let TrackerAction::Assign { to, .. } = action {
                    takers.push(to);
                }
            }
        }
        assert!(takers.len() >= 3, "{takers:?}");
        tracker.leave(Duration::from_secs(8), LAYER, takers[takers.len() - 1]);
        assert!(matches!(tracker.poll_action(), Some(TrackerAction::Assign { .. })));
    }

    #[test]
    fn assigns_only_to_who_fills() {
        let mut tracker = Tracker::new(TrackerConfig::default(), 3);
        for peer in 1..=8 {
            tracker.join(Duration::ZERO, LAYER, geometry(), Newcomer { fills: peer == 3, ..newcomer(peer) }, &[]);
        }
        tracker.ingested(Duration::ZERO, LAYER, 0..64);
        let assigned = takers(&mut tracker);
        assert!(!assigned.is_empty() && assigned.iter().all(|to| *to == PeerId(3)), "{assigned:?}");
        tracker.fills(Duration::ZERO, LAYER, PeerId(3), false);
        for second in 1..9 {
            tracker.handle_timeout(Duration::from_secs(second));
            assert_eq!(takers(&mut tracker), []);
        }
        // It begins to fill: it is assigned what it is to have at once.
        tracker.fills(Duration::from_secs(9), LAYER, PeerId(5), true);
        let assigned = takers(&mut tracker);
        assert!(!assigned.is_empty() && assigned.iter().all(|to| *to == PeerId(5)), "{assigned:?}");
    }

    #[test]
    fn what_was_assigned_in_vain_keeps_no_reader_waiting() {
        let mut tracker = tracker(8, 1);
        tracker.ingested(Duration::ZERO, LAYER, 0..64);
        takers(&mut tracker);
        for peer in 1..=8 {
            tracker.fills(Duration::ZERO, LAYER, PeerId(peer), false);
        }
        tracker.handle_timeout(Duration::from_millis(2250));
        let answer = tracker.request(Duration::from_millis(2300), LAYER, PeerId(1), 0..4, Priority::Demand);
        assert_eq!(answer, Answer::Serve);
    }

    #[test]
    fn introduces_both_ways_and_not_too_many() {
        let mut tracker = tracker(300, 1);
        let mut neighbours: BTreeMap<PeerId, BTreeSet<PeerId>> = BTreeMap::new();
        while let Some(action) = tracker.poll_action() {
            if let TrackerAction::Introduce { to, peer, .. } = action {
                neighbours.entry(to).or_default().insert(peer);
            }
        }
        for (peer, others) in &neighbours {
            assert!((8..=32).contains(&others.len()), "{peer:?} has {}", others.len());
            assert!(others.iter().all(|other| neighbours[other].contains(peer)));
        }
    }

    /// How many neighbours each of so many has who joined one `apart` from the other, in the order in which they joined.
    fn neighbours(peers: u64, apart: Duration) -> Vec<usize> {
        let mut tracker = Tracker::new(TrackerConfig { member_expiry: Duration::MAX, ..TrackerConfig::default() }, 3);
        let mut neighbours = vec![0; peers as usize];
        for peer in 1..=peers {
            tracker.handle_timeout(apart * peer as u32);
            tracker.join(apart * peer as u32, LAYER, geometry(), newcomer(peer), &[]);
        }
        tracker.handle_timeout(apart * peers as u32 + STEP);
        while let Some(action) = tracker.poll_action() {
            if let TrackerAction::Introduce { to, .. } = action {
                neighbours[to.0 as usize - 1] += 1;
            }
        }
        neighbours
    }

    #[test]
    fn who_joins_last_knows_about_as_many() {
        for peers in [2, 10, 24, 25, 40, 300, 3000] {
            let neighbours = neighbours(peers, Duration::ZERO);
            let least = TrackerConfig::default().neighbours_min.min(peers as usize - 1);
            let is_right = |count: &usize| (least..=32).contains(count);
            assert!(neighbours.iter().all(is_right), "{peers}: {neighbours:?}");
        }
    }

    /// One after the other, so that nobody joins with them.
    #[test]
    fn who_joins_after_many_is_introduced_to_some() {
        for apart in [10, 100, 1000] {
            let neighbours = neighbours(2000, Duration::from_millis(apart));
            assert!(neighbours[20..].iter().all(|count| (12..=32).contains(count)), "{apart}: {neighbours:?}");
        }
    }

    #[test]
    fn introduces_who_lacks_something_to_who_has_all_and_nobody_else() {
        for at in [1, 150, 300] {
            let mut tracker = Tracker::new(TrackerConfig::default(), 3);
            for peer in 1..=300 {
                let have = if peer == at { 0..60 } else { 0..64 };
                tracker.join(Duration::ZERO, LAYER, geometry(), newcomer(peer), &[have]);
            }
            let mut met = BTreeSet::new();
            while let Some(action) = tracker.poll_action() {
                if let TrackerAction::Introduce { to, peer, .. } = action {
                    assert!(to == PeerId(at) || peer == PeerId(at), "{to:?} and {peer:?} have all");
                    met.insert((to, peer));
                }
            }
            assert!((16..=64).contains(&met.len()), "{} of {at}", met.len());
        }
    }

    #[test]
    fn prefers_zone_mates() {
        let mut tracker = tracker(300, 3);
        let (mut mates, mut far) = (0, 0);
        while let Some(action) = tracker.poll_action() {
            if let TrackerAction::Introduce { to, peer, .. } = action {
                *if to.0 % 3 == peer.0 % 3 { &mut mates } else { &mut far } += 1;
            }
        }
        assert!(mates > 2 * far && far > 0, "{mates} mates, {far} others");
    }

    #[test]
    fn begins_anew_with_what_nodes_report() {
        let mut tracker = Tracker::new(TrackerConfig::default(), 3);
        for peer in 1..=4 {
            let has = 0..16 * peer as u32;
            tracker.join(Duration::ZERO, LAYER, geometry(), newcomer(peer), &[has]);
        }
        tracker.ingested(Duration::ZERO, LAYER, 0..64);
        assert!(fetch_all(&mut tracker, Duration::ZERO).is_empty(), "somebody has each chunk");
    }

    #[test]
    fn one_accuser_is_not_enough() {
        let mut tracker = tracker(10, 1);
        fetch_all(&mut tracker, Duration::ZERO);
        for by in [2, 2, 2, 3] {
            tracker.accuse(Duration::ZERO, PeerId(1), PeerId(by));
            assert!(tracker.poll_action().is_none());
        }
        tracker.accuse(Duration::ZERO, PeerId(1), PeerId(4));
        assert_eq!(tracker.poll_action(), Some(TrackerAction::Expel { peer: PeerId(1) }));
    }
}
