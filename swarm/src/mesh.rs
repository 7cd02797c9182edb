//! A layer that nodes give each other: what this node has and tells, what its neighbours have, and from whom it takes.
//!
//! Chunks come from neighbours that told of them. From the seeder come those that it assigned to this node, to be the first
//! to have them, and those that are wanted now and that no neighbour has. With all seeders gone the registry is asked by the
//! [delegates](crate::delegates), each for its own blocks.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use crate::book::{Block, Book, Fetch, Offer};
use crate::chunk_set::ChunkSet;
use crate::config::Config;
use crate::delegates::{BEAT, DELEGATES, Delegate, Delegates};
use crate::peer::{PeerId, Zone, mix};
use crate::picker::{self, Choice, Nearer};
use crate::source::Source;
use crate::swarm::{FetchId, LayerKey, Priority, SourceId, SourceKind, Swarm};
use crate::timer::Timer;

/// What the owner has to tell other machines. Losing one does no lasting harm only if the connection is lost with it: a new
/// neighbour, and a seeder after each connection, is told all of [`Swarm::have`] first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// To all neighbours of the layer.
    Haves {
        /// Of which layer.
        layer: LayerKey,
        /// What came since the last one; may be empty.
        runs: Vec<Range<u32>>,
        /// Who would ask the registry; may be empty.
        delegates: Vec<Delegate>,
        /// All that this node fetches from the registry now; may be empty.
        coming: Vec<Range<u32>>,
    },
    /// To the seeders that introduce for the layer: [`Tracker::report`](crate::Tracker::report) and
    /// [`Tracker::fills`](crate::Tracker::fills).
    Report {
        /// Of which layer.
        layer: LayerKey,
        /// What came since the last one; may be empty.
        runs: Vec<Range<u32>>,
        /// As [`Swarm::fills`].
        fills: bool,
    },
    /// To a seeder that is late: it is to give a sign of life, [`Swarm::on_alive`].
    Ask {
        /// For which layer it is asked; any other of the same seeder would do.
        layer: LayerKey,
    },
    /// This neighbour sent a wrong chunk: break its connections off, serve it no more, and accuse it at the seeder.
    Cut {
        /// Whom.
        source: SourceId,
    },
}

/// Who knows no neighbour so long after it opened a layer is alone with it: a thousand nodes that start at once do not all ask the
/// seeder meanwhile.
const INTRODUCED: Duration = Duration::from_millis(200);
/// Most assignments that wait: more are not believed.
const ASSIGNED_MAX: usize = 4096;
/// Of so many chunks the rarest is fetched.
const RAREST_OF: u64 = 4;
/// Who has more by less than so much is not ahead: else whoever has least would be asked by all in its place.
const AHEAD_STEP: u64 = 4 << 20;
/// How many queued chunks are looked at one by one.
const HEADS: usize = 16;
/// What a neighbour fetches from the registry is waited for so long after it last said so: three beats.
const COMING: Duration = BEAT.saturating_mul(3);
/// A seeder that said it does not have chunks of a layer, because it had to give up the layer, is the first to be asked again after so
/// long: the layer may be ingested anew meanwhile. Longer than it is waited for.
pub(crate) const MISSING: Duration = Duration::from_secs(10);
/// A fetch that gave no chunk for so long is not spoken of.
const COMING_STALL: Duration = Duration::from_secs(2);
/// Most runs that a neighbour may speak of.
const COMING_MAX: usize = 64;
/// A node that took nothing of what is assigned for so many beats says so.
const IDLE_BEATS: u32 = 3;
/// When what waits is looked at again if nothing happens.
const LOOK: Duration = Duration::from_millis(150);

/// The state of one layer.
#[derive(Debug)]
pub(crate) struct Mesh {
    pub(crate) me: PeerId,
    zone: Zone,
    pub(crate) salt: u64,
    /// What was read ahead for readers who go through the layer in order.
    pub(crate) in_order: ChunkSet,
    draw: u64,
    have: ChunkSet,
    untold: ChunkSet,
    unreported: ChunkSet,
    /// What any neighbour has that may be asked.
    peers_have: ChunkSet,
    /// How many neighbours have each chunk.
    copies: Vec<u16>,
    /// Chunks that this node is to fetch for all, and where.
    assigned: BTreeMap<u32, SourceId>,
    delegates: Delegates,
    opened: Duration,
    /// When last a chunk came, and when a neighbour was last asked.
    last_got: Duration,
    last_start: Duration,
    /// What seeders are told: that assignments are fetched. And for how many beats that was not so.
    fills: bool,
    idle_beats: u32,
    pub(crate) tell_at: Option<Duration>,
    pub(crate) beat_at: Option<Duration>,
    pub(crate) look_at: Option<Duration>,
}

impl Mesh {
    /// A neighbour does not have these chunks any more.
    pub(crate) fn uncount(&mut self, gone: impl Iterator<Item = Range<u32>>) {
        for chunk in gone.flatten() {
            if let Some(copies) = self.copies.get_mut(chunk as usize) {
                *copies = copies.saturating_sub(1);
            }
        }
    }

    /// Whether a chunk is here.
    pub(crate) fn has(&self, chunk: u32) -> bool {
        self.have.contains(chunk)
    }

    /// How many neighbours are known to have a chunk.
    pub(crate) fn copies(&self, chunk: u32) -> u16 {
        self.copies.get(chunk as usize).copied().unwrap_or(0)
    }
}

impl Swarm {
    /// Makes a layer one that nodes give each other. `salt` is the same on all nodes of the layer (from its digest) and `me`
    /// names this one. `have` is what is here already.
    pub fn open_mesh(
        &mut self,
        now: Duration,
        layer: LayerKey,
        me: PeerId,
        zone: Zone,
        salt: u64,
        have: impl IntoIterator<Item = Range<u32>>,
    ) {
        self.now = self.now.max(now);
        let now = self.now;
        let Some(book) = self.books.get_mut(&layer).filter(|book| book.mesh.is_none()) else { return };
        let empty = ChunkSet::new(book.geometry.chunk_count());
        let mut mesh = Mesh {
            me,
            zone,
            salt,
            in_order: empty.clone(),
            draw: mix(me.0 ^ salt),
            have: empty.clone(),
            untold: empty.clone(),
            unreported: empty.clone(),
            peers_have: empty,
            copies: vec![0; book.geometry.chunk_count() as usize],
            assigned: BTreeMap::new(),
            delegates: Delegates::new(me, zone, salt),
            opened: now,
            last_got: now,
            last_start: now,
            fills: false,
            idle_beats: 0,
            tell_at: None,
            beat_at: None,
            look_at: None,
        };
        have.into_iter().for_each(|run| mesh.have.insert_run(run));
        book.set_mesh(mesh);
        self.arm_beat(layer);
    }

    /// What this node has of a layer in a mesh.
    pub fn have(&self, layer: LayerKey) -> Option<&ChunkSet> {
        self.books.get(&layer)?.mesh.as_ref().map(|mesh| &mesh.have)
    }

    /// Whether this node takes what a seeder assigns of a layer, as seeders are told.
    pub fn fills(&self, layer: LayerKey) -> bool {
        self.books.get(&layer).and_then(|book| book.mesh.as_ref()).is_some_and(|mesh| mesh.fills)
    }

    /// Chunks are gone from this machine. Neighbours learn of it when they ask.
    pub fn forget_have(&mut self, layer: LayerKey, run: Range<u32>) {
        let Some(mesh) = self.books.get_mut(&layer).and_then(|book| book.mesh.as_mut()) else { return };
        for chunk in run.start..run.end.min(mesh.have.capacity()) {
            mesh.have.remove(chunk);
            mesh.untold.remove(chunk);
            mesh.unreported.remove(chunk);
        }
    }

    /// Somebody introduced a neighbour of a layer in a mesh, which calls itself `peer` there; what it has it tells with
    /// [`Swarm::on_haves`]. It goes with [`Swarm::remove_source`].
    pub fn add_peer(&mut self, now: Duration, layer: LayerKey, source: SourceId, peer: PeerId, zone: Zone) {
        self.now = self.now.max(now);
        let Some(book) = self.books.get_mut(&layer) else { return };
        let Some(mesh) = &book.mesh else { return };
        if book.sources.contains_key(&source) {
            return;
        }
        let has = Some(ChunkSet::new(book.geometry.chunk_count()));
        let far = (zone != mesh.zone).then_some(zone);
        book.sources.insert(source, Offer { has, peer, far, ..Offer::all(Vec::new()) });
        self.sources.entry(source).or_insert_with(|| Source::new(SourceKind::Peer)).layers += 1;
    }

    /// A neighbour tells what it has.
    pub fn on_haves(
        &mut self,
        now: Duration,
        layer: LayerKey,
        source: SourceId,
        runs: &[Range<u32>],
        delegates: &[Delegate],
    ) {
        self.now = self.now.max(now);
        let Some(book) = self.books.get_mut(&layer) else { return };
        let (Some(mesh), Some(offer)) = (&mut book.mesh, book.sources.get_mut(&source)) else { return };
        let Some(has) = &mut offer.has else { return };
        let Some(source) = self.sources.get(&source).filter(|source| !source.is_cut) else { return };
        let is_reliable = source.is_reliable(&self.config, self.now);
        for run in runs {
            for chunk in run.start..run.end.min(has.capacity()) {
                if has.insert(chunk) {
                    offer.heard = self.now;
                    mesh.copies.get_mut(chunk as usize).into_iter().for_each(|copies| *copies += 1);
                }
            }
            if is_reliable {
                mesh.peers_have.insert_run(run.clone());
            }
        }
        if !delegates.is_empty() {
            mesh.delegates.hear(self.now, delegates);
        }
    }

    /// A neighbour tells all that it fetches from the registry now: others need not ask for that.
    pub fn on_coming(&mut self, now: Duration, layer: LayerKey, source: SourceId, runs: &[Range<u32>]) {
        self.now = self.now.max(now);
        let offer = self.books.get_mut(&layer).and_then(|book| book.sources.get_mut(&source));
        if let Some(offer) = offer.filter(|offer| offer.has.is_some()) {
            offer.coming = (self.now, runs.iter().take(COMING_MAX).cloned().collect());
        }
    }

    /// Up to `max` neighbours that told of a chunk, for a machine in the zone `near` that this node sends away and that is not
    /// `except`: those in its zone first, and not always the same ones.
    pub fn holders(
        &mut self,
        layer: LayerKey,
        chunk: u32,
        near: Zone,
        except: Option<SourceId>,
        max: usize,
    ) -> Vec<SourceId> {
        let draw = self.next_random();
        let Some(book) = self.books.get(&layer) else { return Vec::new() };
        let Some(mesh) = &book.mesh else { return Vec::new() };
        let is_well = |id: &SourceId| {
            let source = self.sources.get(id);
            source.is_some_and(|source| source.is_reliable(&self.config, self.now))
        };
        let told = book.sources.iter().filter(|(id, offer)| {
            Some(**id) != except && offer.has.as_ref().is_some_and(|has| has.contains(chunk)) && is_well(id)
        });
        let is_far = |offer: &Offer| offer.far.unwrap_or(mesh.zone) != near;
        let mut found: Vec<_> = told.map(|(id, offer)| (is_far(offer), mix(offer.peer.0 ^ draw), *id)).collect();
        found.sort_unstable();
        found.into_iter().take(max).map(|(_, _, id)| id).collect()
    }

    /// The seeder wants this node to fetch a run for all, from `from`: itself or a neighbour in another zone. Nothing is fetched that
    /// this node neither wants nor will want since it [fills](Swarm::fills), and while its containers read, nothing sooner for it:
    /// whoever only looks at an image takes little of it.
    pub fn assign(&mut self, now: Duration, layer: LayerKey, run: Range<u32>, from: SourceId) {
        self.now = self.now.max(now);
        let is_quiet = self.is_quiet(self.now);
        let Some(book) = self.books.get(&layer) else { return };
        let (Some(mesh), true) = (&book.mesh, book.sources.contains_key(&from)) else { return };
        let end = run.end.min(mesh.have.capacity());
        let wants_all = mesh.fills && book.background_bytes() > 0;
        let is_wanted = |chunk: &u32| (wants_all || book.want(*chunk).is_some()) && !mesh.have.contains(*chunk);
        let wanted: Vec<u32> = (run.start..end).filter(is_wanted).collect();
        for chunk in wanted {
            let Some(mesh) = self.books.get_mut(&layer).and_then(|book| book.mesh.as_mut()) else { return };
            if mesh.assigned.len() < ASSIGNED_MAX {
                mesh.assigned.insert(chunk, from);
                if is_quiet {
                    self.want(now, layer, chunk..chunk + 1, Priority::Readahead, Duration::MAX);
                }
            }
        }
        self.on_alive(now, from);
    }

    /// The connection on which a seeder introduces and assigns is lost.
    pub fn on_source_lost(&mut self, now: Duration, source: SourceId) {
        self.now = self.now.max(now);
        self.blame(source, None);
    }

    /// A seeder gave a sign of life that is no chunk.
    pub fn on_alive(&mut self, now: Duration, source: SourceId) {
        self.now = self.now.max(now);
        if let Some(source) = self.sources.get_mut(&source) {
            source.alive(self.now);
        }
    }

    /// More of a fetch came that makes up no chunk yet, and not so little that it would never.
    pub fn on_moved(&mut self, now: Duration, fetch: FetchId) {
        self.now = self.now.max(now);
        let source = self.fetches.get(&fetch).map(|fetch| fetch.source);
        if let Some(source) = source.and_then(|source| self.sources.get_mut(&source)) {
            source.moved(self.now);
        }
    }

    /// Takes the next thing to tell other machines.
    pub fn poll_message(&mut self) -> Option<Message> {
        self.messages.pop_front()
    }

    /// A chunk is here: neighbours will hear of it.
    pub(crate) fn note_have(&mut self, layer: LayerKey, chunk: u32) {
        let leech = self.config.leech;
        let Some(mesh) = self.books.get_mut(&layer).and_then(|book| book.mesh.as_mut()) else { return };
        mesh.assigned.remove(&chunk);
        mesh.last_got = self.now;
        if mesh.have.insert(chunk) {
            mesh.unreported.insert(chunk);
            if !leech {
                mesh.untold.insert(chunk);
                if mesh.tell_at.is_none() {
                    self.timers.set(&mut mesh.tell_at, Some(self.now + self.config.tell_after), Timer::Tell(layer));
                }
            }
            self.arm_beat(layer);
        }
    }

    pub(crate) fn arm_beat(&mut self, layer: LayerKey) {
        let Some(book) = self.books.get_mut(&layer) else { return };
        let is_active = !book.is_idle();
        let Some(mesh) = &mut book.mesh else { return };
        if mesh.beat_at.is_none() && (is_active || mesh.fills || !mesh.unreported.is_empty()) {
            self.timers.set(&mut mesh.beat_at, Some(self.now + BEAT), Timer::Beat(layer));
        }
    }

    pub(crate) fn tell(&mut self, layer: LayerKey, with_delegates: bool) {
        let Some(book) = self.books.get_mut(&layer) else { return };
        let is_coming = |fetch: &&Fetch| {
            self.sources.get(&fetch.source).is_some_and(|source| source.kind == SourceKind::Registry)
                && fetch.last_progress + COMING_STALL > self.now
        };
        let fetches = book.fetches.keys().filter_map(|id| self.fetches.get(id)).filter(is_coming);
        let coming = if self.config.leech { Vec::new() } else { united(fetches.map(|fetch| fetch.cover.clone())) };
        let Some(mesh) = &mut book.mesh else { return };
        self.timers.set(&mut mesh.tell_at, None, Timer::Tell(layer));
        let runs = mesh.untold.runs().collect();
        mesh.untold.clear();
        let delegates = if with_delegates { mesh.delegates.told() } else { Vec::new() };
        self.messages.push_back(Message::Haves { layer, runs, delegates, coming });
    }

    /// Neighbours hear at once that the registry is asked.
    pub(crate) fn tell_of_registry(&mut self, layer: LayerKey) {
        if let Some(mesh) = self.books.get_mut(&layer).and_then(|book| book.mesh.as_mut()) {
            self.timers.set(&mut mesh.tell_at, Some(self.now), Timer::Tell(layer));
        }
    }

    /// Whether the node takes what a seeder assigns: it wants all, and no container reads; or many wait for more than can be asked for
    /// in order.
    fn is_filling(&self, layer: LayerKey) -> bool {
        let fills = |book: &Book| {
            (book.background_bytes() > 0 && self.is_quiet(self.now))
                || book.queued_set(Priority::Demand).count() > self.config.ordered_max
        };
        self.books.get(&layer).is_some_and(fills)
    }

    /// Seeders hear at once that the node begins to fill.
    pub(crate) fn tell_filling(&mut self, layer: LayerKey) {
        let tells = self.books.get(&layer).and_then(|book| book.mesh.as_ref()).is_some_and(|mesh| !mesh.fills);
        if tells && self.is_filling(layer) {
            self.report(layer, true);
        }
    }

    fn report(&mut self, layer: LayerKey, fills: bool) {
        let Some(mesh) = self.books.get_mut(&layer).and_then(|book| book.mesh.as_mut()) else { return };
        if mesh.fills != fills || !mesh.unreported.is_empty() {
            mesh.fills = fills;
            let runs = mesh.unreported.runs().collect();
            mesh.unreported.clear();
            self.messages.push_back(Message::Report { layer, runs, fills });
        }
    }

    pub(crate) fn beat(&mut self, layer: LayerKey) {
        let is_filling = self.is_filling(layer);
        let Some(book) = self.books.get_mut(&layer) else { return };
        let is_active = !book.is_idle();
        let Some(mesh) = &mut book.mesh else { return };
        mesh.beat_at = None;
        mesh.idle_beats = if is_filling { 0 } else { mesh.idle_beats.saturating_add(1) };
        // Between two wants, or two reads, it is not worth telling.
        let fills = is_filling || (mesh.fills && mesh.idle_beats < IDLE_BEATS);
        unite(&self.config, &self.sources, self.now, book);
        self.report(layer, fills);
        let Some(mesh) = self.books.get_mut(&layer).and_then(|book| book.mesh.as_mut()) else { return };
        if is_active {
            mesh.delegates.beat(self.now);
            self.tell(layer, true);
        }
        self.arm_beat(layer);
    }

    /// A neighbour sent a wrong chunk: nothing of it counts any more.
    pub(crate) fn cut(&mut self, source: SourceId) {
        let Some(state) = self.sources.get_mut(&source).filter(|state| !state.is_cut) else { return };
        state.is_cut = true;
        let mut fetches = Vec::new();
        for book in self.books.values_mut() {
            if let Some(has) = book.sources.get_mut(&source).and_then(|offer| offer.has.as_mut()) {
                let gone = std::mem::replace(has, ChunkSet::new(has.capacity()));
                if let Some(mesh) = &mut book.mesh {
                    mesh.uncount(gone.runs());
                }
                fetches.extend(book.fetches.keys().copied());
                unite(&self.config, &self.sources, self.now, book);
            }
        }
        for fetch in fetches {
            if self.fetches.get(&fetch).is_some_and(|fetch| fetch.source == source) {
                self.cancel_fetch(fetch);
            }
        }
        self.messages.push_back(Message::Cut { source });
    }

    /// A neighbour does not have what it told.
    pub(crate) fn forget_offer(&mut self, layer: LayerKey, source: SourceId, run: Range<u32>) {
        let Some(book) = self.books.get_mut(&layer) else { return };
        if let Some(has) = book.sources.get_mut(&source).and_then(|offer| offer.has.as_mut()) {
            let gone: Vec<u32> = run.filter(|chunk| has.remove(*chunk)).collect();
            if let Some(mesh) = &mut book.mesh {
                mesh.uncount(gone.into_iter().map(|chunk| chunk..chunk + 1));
            }
            unite(&self.config, &self.sources, self.now, book);
        }
    }

    /// Starts at most one fetch for chunks that are queued with `priority`.
    pub(crate) fn start_in_mesh(&mut self, layer: LayerKey, priority: Priority) -> bool {
        let Some(book) = self.books.get(&layer).filter(|book| !book.queued_set(priority).is_empty()) else {
            return false;
        };
        let Some(mesh) = &book.mesh else { return false };
        if let Some(choice) = self.choose_local(book, priority) {
            // The end of a fetch will look again where it is busy.
            let Choice::Fetch { source, run } = choice else { return false };
            self.start(layer, source, run, priority, false);
            return true;
        }
        let load: u64 = self.mesh_load.iter().sum();
        let class = self.class(book, priority);
        let room = self.config.mesh_in_flight_bytes_max(class).saturating_sub(load);
        let has_room = room >= book.geometry.chunk_size() || load == 0;
        if !has_room && mesh.assigned.is_empty() {
            // The end of a fetch will look again.
            return false;
        }
        let picked = if self.download.is_ready(self.now) {
            let turns = if priority == Priority::Readahead { self.turns(book, mesh) } else { None };
            let queued = turns.as_ref().unwrap_or(book.queued_set(priority));
            let assigned = self.pick_assigned(book, mesh, priority);
            let peer = || if has_room { self.pick_peer(book, mesh, priority, queued) } else { None };
            let seeder = || if has_room { self.pick_from_seeder(book, mesh, priority, queued) } else { None };
            // The registry is there for nobody while a seeder is; a seeder that is gone is still asked now and then.
            let registry = || self.pick_from_registry(book, mesh, priority);
            let is_reliable =
                |id: &SourceId| self.sources.get(id).is_some_and(|source| source.is_reliable(&self.config, self.now));
            let is_near =
                |id: &SourceId| book.sources.get(id).is_some_and(|offer| offer.far.is_none()) && is_reliable(id);
            let regular = assigned.map(|picked| (picked, true));
            let regular = regular.or_else(|| peer().map(|(id, run)| ((id, run), is_near(&id))));
            regular.or_else(|| registry().or_else(seeder).map(|picked| (picked, false)))
        } else {
            let at = self.download.ready_at();
            self.timers.set(&mut self.rate_at, Some(at), Timer::Rate);
            None
        };
        match picked {
            Some(((source, run), is_regular)) => {
                if is_regular && let Some(mesh) = self.books.get_mut(&layer).and_then(|book| book.mesh.as_mut()) {
                    mesh.last_start = self.now;
                }
                self.start(layer, source, run, priority, false);
                true
            }
            None => {
                if let Some(mesh) = self.books.get_mut(&layer).and_then(|book| book.mesh.as_mut())
                    && mesh.look_at.is_none()
                {
                    self.timers.set(&mut mesh.look_at, Some(self.now + LOOK), Timer::Look(layer));
                }
                false
            }
        }
    }

    /// What neighbours of a layer have changed.
    pub(crate) fn unite(&mut self, layer: LayerKey) {
        if let Some(book) = self.books.get_mut(&layer) {
            unite(&self.config, &self.sources, self.now, book);
        }
    }

    /// Who may be asked for a demanded chunk that `late` is late with: another neighbour, the near ones first; a seeder where
    /// none has it; the registry only where it would have been asked anyway.
    pub(crate) fn choose_hedge_in_mesh(&self, book: &Book, mesh: &Mesh, chunk: u32, late: SourceId) -> Choice {
        let chunk_size = book.geometry.chunk_size();
        let may = |id: SourceId, source: &Source| {
            id != late
                && picker::from(source, book, id, chunk, Priority::Demand) <= self.now
                && source.has_room(&self.config, Priority::Demand, chunk_size)
        };
        let offers = book.sources.iter().filter(|(_, offer)| offer.has(chunk));
        let usable = offers.filter_map(|(id, offer)| {
            let source = self.sources.get(id).filter(|source| may(*id, source))?;
            let is_allowed = match source.kind {
                SourceKind::Local | SourceKind::Peer | SourceKind::Seeder => true,
                SourceKind::Registry => self.seeder_gone_at(book, mesh, Priority::Demand).is_some_and(|gone| {
                    let number = self.block(book, *id, chunk).number;
                    let ranks = self.demand_ranks(mesh, number, gone);
                    self.coming(book, chunk).is_none() && mesh.delegates.is_mine(number, ranks, false)
                }),
            };
            is_allowed.then_some((source.kind, offer.far.is_some(), source.expected_wait(self.now), *id))
        });
        match usable.min() {
            Some((.., source)) => Choice::Fetch { source, run: chunk..chunk + 1 },
            None => Choice::Busy,
        }
    }

    /// What this machine has in another place comes from there, whoever else has it; `None` where there is nothing of the kind.
    fn choose_local(&self, book: &Book, priority: Priority) -> Option<Choice> {
        let chunk = book.queued_set(priority).next(0)?;
        let nearer = picker::nearer(&self.sources, book, self.now, chunk, priority, SourceKind::Peer);
        (nearer == Nearer::Usable)
            .then(|| picker::choose(&self.config, &self.sources, book, self.now, chunk, priority, None))
    }

    fn pick_assigned(&self, book: &Book, mesh: &Mesh, priority: Priority) -> Option<(SourceId, Range<u32>)> {
        let queued = book.queued_set(priority);
        let mut assigned = mesh.assigned.iter().filter(|(chunk, _)| queued.contains(**chunk)).take(HEADS);
        let (chunk, source) = assigned.find(|(chunk, id)| {
            let may = |source: &Source| {
                let from = match source.kind {
                    SourceKind::Seeder => source.fails_until(priority),
                    _ => picker::from(source, book, **id, **chunk, priority),
                };
                from <= self.now && source.has_room(&self.config, priority, book.geometry.chunk_size())
            };
            book.sources.contains_key(id) && self.sources.get(id).is_some_and(may)
        })?;
        let joins = |chunk: u32| queued.contains(chunk) && mesh.assigned.get(&chunk) == Some(source);
        Some((*source, self.run(book, *chunk, self.config.peer_run_bytes, joins)))
    }

    fn pick_peer(
        &self,
        book: &Book,
        mesh: &Mesh,
        priority: Priority,
        queued: &ChunkSet,
    ) -> Option<(SourceId, Range<u32>)> {
        let chunk_size = book.geometry.chunk_size();
        let draw = mix(mesh.draw ^ self.next_fetch);
        let class = self.class(book, priority);
        let in_order = priority == Priority::Demand && class == priority;
        // Most looks find nothing new: what those that can be counted on have together is looked at first.
        let offered = queued.next_in_both(&mesh.peers_have, 0, u32::MAX);
        let (first, last) = match offered {
            Some(first) => (first, queued.last_in_both(&mesh.peers_have, u32::MAX)?),
            None => (queued.next(0)?, queued.last()?),
        };
        let mut peers: Vec<(bool, [u64; 2], Duration, u64, SourceId)> = Vec::new();
        for (id, offer) in &book.sources {
            let (Some(has), Some(source)) = (&offer.has, self.sources.get(id)) else { continue };
            if (offered.is_some() || !source.is_reliable(&self.config, self.now))
                && source.rests_until(priority) <= self.now
                && source.has_room(&self.config, class, chunk_size)
                && queued.next_in_both(has, first, last + 1).is_some()
            {
                let wait = source.expected_wait(self.now);
                // Of about equally busy ones who has least: who is ahead would be asked by all.
                let ahead = if priority == Priority::Readahead || in_order {
                    [wait.as_micros().max(1).ilog2().into(), u64::from(has.count()) * chunk_size / AHEAD_STEP]
                } else {
                    [0, 0]
                };
                peers.push((offer.far.is_some(), ahead, wait, mix(draw ^ id.0), *id));
            }
        }
        peers.sort_unstable();
        let from = |draw: u64| first + (draw % u64::from(last - first + 1)) as u32;
        let start = if in_order { first } else { from(draw) };
        let mut far_allowed = None;
        for (is_far, _, _, _, id) in peers {
            let Some(has) = book.sources.get(&id).and_then(|offer| offer.has.as_ref()) else { continue };
            let found =
                |from| queued.next_in_both(has, from, last + 1).or_else(|| queued.next_in_both(has, first, from));
            let Some(mut chunk) = found(start) else { continue };
            // Of some drawn by lot the one that fewest have: else what came late would stay behind what all have.
            let draws = if in_order { 0 } else { RAREST_OF };
            for step in 0..draws {
                chunk = found(from(mix(draw ^ step)))
                    .map_or(chunk, |other| if mesh.copies(other) < mesh.copies(chunk) { other } else { chunk });
            }
            if is_far && priority != Priority::Demand {
                let gone = *far_allowed.get_or_insert_with(|| self.seeder_gone_at(book, mesh, priority));
                let ranks = |gone: Duration| self.ranks(mesh, gone);
                let is_mine = |gone| mesh.delegates.is_mine(self.block(book, id, chunk).number, ranks(gone), true);
                let is_stuck = mesh.last_start + self.config.orphan_patience * 4 <= self.now;
                if !is_stuck && !gone.is_some_and(is_mine) {
                    continue;
                }
            }
            let joins = |chunk: u32| queued.contains(chunk) && has.contains(chunk);
            return Some((id, self.run(book, chunk, self.config.peer_run_bytes, joins)));
        }
        None
    }

    /// Chunks that no neighbour may be asked for.
    fn pick_from_seeder(
        &self,
        book: &Book,
        mesh: &Mesh,
        priority: Priority,
        queued: &ChunkSet,
    ) -> Option<(SourceId, Range<u32>)> {
        if priority == Priority::Background && mesh.last_start + self.config.orphan_patience > self.now {
            return None;
        }
        let is_crowd = self.is_crowd(book, priority);
        let seeders = self.of_kind(book, SourceKind::Seeder, priority, |source| {
            source.has_room(&self.config, priority, book.geometry.chunk_size())
                && (!is_crowd || source.in_flight_fetches() < self.config.crowd_fetches_max)
        });
        let usable = |chunk: u32| {
            let peers = book.sources.iter().filter(|(_, offer)| offer.has.is_some() && offer.has(chunk));
            peers.filter_map(|(id, _)| self.sources.get(id)).any(|source| source.rests_until(priority) <= self.now)
        };
        // Not all nodes should ask for the same first one.
        let draw = if is_crowd { mix(mesh.draw ^ self.next_fetch) } else { 0 };
        let start = (draw % u64::from(queued.capacity().max(1))) as u32;
        let orphans_in = |range: Range<u32>| queued.in_only(&mesh.peers_have, range);
        let orphans = orphans_in(start..u32::MAX).chain(orphans_in(0..start)).take(HEADS);
        // What is read ahead where others read, too, can wait until who has it is less busy.
        let heads = if queued.count() == book.queued_set(priority).count() { HEADS } else { 0 };
        let deserted = book.queued(priority).map(|(_, chunk)| chunk).take(heads).filter(|chunk| !usable(*chunk));
        let (id, chunk) = orphans.chain(deserted).find_map(|chunk| {
            let may =
                |(id, source): &&(SourceId, &Source)| picker::from(source, book, *id, chunk, priority) <= self.now;
            seeders.iter().find(may).map(|(id, _)| (*id, chunk))
        })?;
        let is_small = is_crowd || priority == Priority::Background;
        let bytes = if is_small { self.config.peer_run_bytes } else { self.config.demand_run_bytes };
        let ahead = book.queued_set(Priority::Readahead);
        // What is read ahead comes with what is demanded before it and saves a request. Where there are neighbours it is left to
        // be shared among them: else who is first would fetch all, and give it to all others.
        let takes_ahead = priority == Priority::Demand && self.is_alone(book);
        let is_next = |chunk: u32| queued.contains(chunk) || (takes_ahead && ahead.contains(chunk));
        let joins = |chunk: u32| is_next(chunk) && !mesh.peers_have.contains(chunk);
        Some((id, self.run(book, chunk, bytes, joins)))
    }

    /// The sources of that kind that may be asked for something, those that are asked least first.
    fn of_kind<'a>(
        &'a self,
        book: &Book,
        kind: SourceKind,
        priority: Priority,
        may: impl Fn(&Source) -> bool,
    ) -> Vec<(SourceId, &'a Source)> {
        let sources = book.sources.keys().filter_map(|id| Some((*id, self.sources.get(id)?)));
        let may = |source: &Source| source.kind == kind && source.rests_until(priority) <= self.now && may(source);
        let mut found: Vec<_> = sources.filter(|(_, source)| may(source)).collect();
        found.sort_by_key(|(id, source)| (source.in_flight_bytes(), *id));
        found
    }

    /// Chunks that no neighbour has and that it is this node's turn to fetch for all.
    fn pick_from_registry(&self, book: &Book, mesh: &Mesh, priority: Priority) -> Option<(SourceId, Range<u32>)> {
        let gone = self.seeder_gone_at(book, mesh, priority)?;
        let registries = self.of_kind(book, SourceKind::Registry, priority, |_| self.registry.is_ready(self.now));
        let (id, source) = *registries.first()?;
        let queued = book.queued_set(priority);
        let mut from = 0;
        for _ in 0..HEADS * 4 {
            let chunk = queued.next_not_in(&mesh.peers_have, from, u32::MAX)?;
            if let Some(coming) = self.coming(book, chunk) {
                from = coming.end.max(chunk.saturating_add(1));
                continue;
            }
            let block = self.block(book, id, chunk);
            let end = block.chunks.end;
            let since = book.want(chunk).map_or(Duration::ZERO, |want| want.since);
            let ranks = match priority {
                Priority::Demand => self.demand_ranks(mesh, block.number, gone.max(since)),
                Priority::Readahead | Priority::Background => self.ranks(mesh, gone),
            };
            let avoided = picker::from(source, book, id, chunk, priority) > self.now;
            if !avoided && mesh.delegates.is_mine(block.number, ranks, false) {
                let joins = |chunk: u32| chunk < end && queued.contains(chunk) && !mesh.peers_have.contains(chunk);
                let run = self.run(book, chunk, self.config.delegate_block_bytes, joins);
                let bytes = book.bytes(&book.cover(id, &run));
                let has_room = source.has_room(&self.config, priority, picker::load(&self.config, bytes));
                return has_room.then_some((id, run));
            }
            from = end.max(chunk.saturating_add(1));
        }
        None
    }

    /// What a neighbour fetches from the registry that brings `chunk`.
    fn coming<'a>(&self, book: &'a Book, chunk: u32) -> Option<&'a Range<u32>> {
        let told = book.sources.values().map(|offer| &offer.coming).filter(|(at, _)| *at + COMING > self.now);
        told.flat_map(|(_, runs)| runs).find(|run| run.contains(&chunk))
    }

    /// How many delegates may fetch a block: one more for each patience in which nothing came.
    fn ranks(&self, mesh: &Mesh, since: Duration) -> usize {
        self.patiences(since.max(mesh.last_got), self.config.delegate_patience).saturating_add(1)
    }

    /// The same where a reader waits: all delegates soon, since a neighbour that asks is heard of at once, and then everybody, since no
    /// delegate may want it; one after the other, by lot, so that most of them hear of another one that asks.
    fn demand_ranks(&self, mesh: &Mesh, block: u32, since: Duration) -> usize {
        let patience = self.config.delegate_patience / 2;
        let lot = mix(mesh.draw ^ u64::from(block)) % 256;
        let turn = patience + patience * lot as u32 / 512;
        if since + turn <= self.now {
            return usize::MAX;
        }
        self.patiences(since, patience / DELEGATES as u32).saturating_add(1).min(DELEGATES)
    }

    fn patiences(&self, since: Duration, patience: Duration) -> usize {
        let waited = self.now.saturating_sub(since).as_nanos() / patience.as_nanos().max(1);
        usize::try_from(waited).unwrap_or(usize::MAX)
    }

    /// Since when all seeders are gone, if they are.
    fn seeder_gone_at(&self, book: &Book, mesh: &Mesh, priority: Priority) -> Option<Duration> {
        let [demand, other] = self.config.seeder_gone_after;
        let patience = if priority == Priority::Demand { demand } else { other };
        let is_seeder = |source: &&Source| source.kind == SourceKind::Seeder;
        let mut gone = mesh.opened + patience;
        let seeders =
            book.sources.iter().filter_map(|(id, offer)| Some((self.sources.get(id).filter(is_seeder)?, offer)));
        for (source, offer) in seeders {
            let missing = offer.missing.filter(|(_, last)| *last + MISSING > self.now);
            let missing_at = missing.map(|(since, _)| since + patience.max(self.stream_patience(book)));
            gone = gone.max(missing_at.into_iter().chain(source.fails_for_at(patience)).min()?);
        }
        (gone <= self.now).then_some(gone)
    }

    /// How long a seeder that does not have a chunk is waited for where the registry gives the layer in one piece: it may be on its way
    /// there, and what would come from the registry costs the whole cluster much.
    fn stream_patience(&self, book: &Book) -> Duration {
        let is_large = |unit: &Range<u64>| unit.end - unit.start > self.config.stream_bytes_min;
        let is_stream = book.sources.values().any(|offer| offer.units.iter().any(is_large));
        if is_stream { self.config.stream_fallback_after } else { Duration::ZERO }
    }

    /// Whose limits hold for what is queued with `priority`.
    fn class(&self, book: &Book, priority: Priority) -> Priority {
        if self.is_crowd(book, priority) { Priority::Background } else { priority }
    }

    /// Whether more is wanted at once than one reader wants, where others may want the same. A node without neighbours shares
    /// the seeder with nobody, and has nobody to get a chunk from that it leaves to others.
    fn is_crowd(&self, book: &Book, priority: Priority) -> bool {
        book.queued_set(priority).count() > self.config.ordered_max && !self.is_alone(book)
    }

    /// Whether there is nobody to share the layer with, and neighbours would have been introduced by now.
    fn is_alone(&self, book: &Book) -> bool {
        let is_settled = book.mesh.as_ref().is_none_or(|mesh| mesh.opened + INTRODUCED <= self.now);
        is_settled && book.sources.values().all(|offer| offer.has.is_none())
    }

    /// The unit in which delegates share a blob.
    fn block(&self, book: &Book, source: SourceId, chunk: u32) -> Block {
        book.block(source, chunk, self.config.delegate_block_bytes)
    }

    fn run(&self, book: &Book, chunk: u32, bytes_max: u64, joins: impl Fn(u32) -> bool) -> Range<u32> {
        let chunks_max = u32::try_from(bytes_max >> book.geometry.chunk_log2()).unwrap_or(u32::MAX).max(1);
        let mut end = chunk.saturating_add(1);
        while end - chunk < chunks_max && joins(end) {
            end += 1;
        }
        chunk..end
    }
}

/// In order, those that touch as one.
fn united(runs: impl Iterator<Item = Range<u32>>) -> Vec<Range<u32>> {
    let mut runs: Vec<_> = runs.collect();
    runs.sort_unstable_by_key(|run| run.start);
    runs.dedup_by(|next, run| {
        let touches = next.start <= run.end;
        if touches {
            run.end = run.end.max(next.end);
        }
        touches
    });
    runs
}

/// Sums up what neighbours have that can be counted on.
fn unite(config: &Config, sources: &BTreeMap<SourceId, Source>, now: Duration, book: &mut Book) {
    let Some(mesh) = &mut book.mesh else { return };
    mesh.peers_have.clear();
    let is_reliable = |id: &SourceId| sources.get(id).is_some_and(|source| source.is_reliable(config, now));
    for has in book.sources.iter().filter(|(id, _)| is_reliable(id)).filter_map(|(_, offer)| offer.has.as_ref()) {
        mesh.peers_have.unite(has);
    }
}
