//! The calls of the core. See the crate's documentation for their contract.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use layer::Geometry;

use crate::book::{Avoid, Book, Failed, Fetch, Offer, Place};
use crate::config::Config;
use crate::hedging::Hedging;
use crate::mesh::{MISSING, Message};
use crate::picker::{self, Choice, Nearer};
use crate::rate::Rate;
use crate::source::Source;
use crate::timer::{Timer, Timers};

/// A layer, as the owner numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerKey(pub u64);

/// A source, as the owner numbers them: one machine is one source for all its layers, so that its limits and rests are
/// the machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(pub u64);

/// A fetch, numbered by the swarm and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FetchId(pub u64);

/// What sort of place a source is, nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceKind {
    /// This machine: no network is used.
    Local,
    /// Another node.
    Peer,
    /// A seeder.
    Seeder,
    /// The image's registry, which only gives whole spans of the blob.
    Registry,
}

/// Why a chunk is wanted, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody waits for it.
    Demand,
    /// Somebody will probably wait for it soon.
    Readahead,
    /// The layer is to become complete.
    Background,
}

/// What the owner has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask `source` for the chunks of `run`.
    Fetch {
        /// Names the transfer in later calls.
        fetch: FetchId,
        /// Of which layer.
        layer: LayerKey,
        /// Whom.
        source: SourceId,
        /// What; never empty.
        run: Range<u32>,
        /// Why, for counters.
        priority: Priority,
        /// The chunks are on their way from another source that is late.
        is_hedge: bool,
    },
    /// Stop a transfer; nobody needs it any more.
    Cancel {
        /// Which.
        fetch: FetchId,
    },
    /// Fail everyone who waits for the chunk now: its deadline expired, or did so a moment ago.
    Fail {
        /// Of which layer.
        layer: LayerKey,
        /// Which.
        chunk: u32,
        /// What happened with each source; empty where there was none.
        reasons: Arc<[Reason]>,
    },
}

/// Why a source did not give a chunk in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// Whom was asked.
    pub source: SourceId,
    /// Its last failure; `None`: it was asked and did not answer in time.
    pub failure: Option<Arc<str>>,
}

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The chunk; it is here now.
    Verified,
    /// Something else.
    Wrong,
}

/// How a fetch ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every chunk of the run was given.
    Done,
    /// The source does not have it, or not yet; it is not at fault. A seeder that goes on saying so of a layer counts as gone for it.
    Missing {
        /// For [`Reason::failure`].
        reason: Arc<str>,
    },
    /// The source has enough to do, and will not be asked before a time; it is not at fault.
    Busy {
        /// When to come again.
        retry_after: Duration,
    },
    /// The source is at fault and rests.
    Failed {
        /// For [`Reason::failure`].
        reason: Arc<str>,
        /// When the source asked to be called again.
        retry_after: Option<Duration>,
    },
}

/// All layers' wants, and who is asked for them.
#[derive(Debug)]
pub struct Swarm {
    pub(crate) config: Config,
    random: u64,
    pub(crate) now: Duration,
    pub(crate) books: BTreeMap<LayerKey, Book>,
    pub(crate) sources: BTreeMap<SourceId, Source>,
    pub(crate) fetches: BTreeMap<FetchId, Fetch>,
    pub(crate) timers: Timers,
    actions: VecDeque<Action>,
    pub(crate) next_fetch: u64,
    next_order: u64,
    hedges: usize,
    last_demand: Option<Duration>,
    pub(crate) hedging: Hedging,
    pub(crate) messages: VecDeque<Message>,
    /// Bytes in flight from neighbours and seeders of meshes, by priority.
    pub(crate) mesh_load: [u64; 3],
    pub(crate) download: Rate,
    pub(crate) registry: Rate,
    pub(crate) rate_at: Option<Duration>,
}

impl Priority {
    /// All, most urgent first.
    pub const ALL: [Self; 3] = [Self::Demand, Self::Readahead, Self::Background];

    pub(crate) fn choose<T>(self, demand: T, readahead: T, background: T) -> T {
        match self {
            Self::Demand => demand,
            Self::Readahead => readahead,
            Self::Background => background,
        }
    }
}

impl Swarm {
    /// Without layers. `seed` spreads the rests of sources: nodes with the same trouble should not return together.
    pub fn new(config: Config, seed: u64) -> Self {
        let download = Rate::new(config.download_bytes_per_sec);
        let registry = Rate::new(config.registry_bytes_per_sec);
        Self {
            config,
            random: seed,
            now: Duration::ZERO,
            books: BTreeMap::new(),
            sources: BTreeMap::new(),
            fetches: BTreeMap::new(),
            timers: Timers::default(),
            actions: VecDeque::new(),
            next_fetch: 0,
            next_order: 0,
            hedges: 0,
            last_demand: None,
            hedging: Hedging::new(),
            messages: VecDeque::new(),
            mesh_load: [0; 3],
            download,
            registry,
            rate_at: None,
        }
    }

    /// Takes a layer in; one that is known stays as it is.
    pub fn add_layer(&mut self, layer: LayerKey, geometry: Geometry) {
        self.books.entry(layer).or_insert_with(|| Book::new(geometry));
    }

    /// Forgets a layer with its wants, which do not fail: the owner tells who waits.
    pub fn remove_layer(&mut self, layer: LayerKey) {
        let Some(book) = self.books.get(&layer) else { return };
        for fetch in book.fetches.keys().copied().collect::<Vec<_>>() {
            self.cancel_fetch(fetch);
        }
        let Some(book) = self.books.get(&layer) else { return };
        let wanted: Vec<u32> = book.wants(0..u32::MAX).map(|(chunk, _)| chunk).collect();
        let failed: Vec<u32> = book.failed.keys().copied().collect();
        let sources: Vec<SourceId> = book.sources.keys().copied().collect();
        for chunk in wanted {
            self.forget_want(layer, chunk);
        }
        for chunk in failed {
            self.forgive(layer, chunk);
        }
        for source in sources {
            self.remove_source(layer, source);
        }
        if let Some(mut mesh) = self.books.remove(&layer).and_then(|book| book.mesh) {
            self.timers.set(&mut mesh.tell_at, None, Timer::Tell(layer));
            self.timers.set(&mut mesh.beat_at, None, Timer::Beat(layer));
            self.timers.set(&mut mesh.look_at, None, Timer::Look(layer));
        }
    }

    /// Says that `source` has the layer. `units` are the device ranges that it moves whole, in order and without gaps;
    /// empty where any run costs just its own bytes.
    pub fn add_source(&mut self, layer: LayerKey, source: SourceId, kind: SourceKind, units: Vec<Range<u64>>) {
        let Some(book) = self.books.get_mut(&layer) else { return };
        if book.sources.insert(source, Offer::all(units)).is_none() {
            self.sources.entry(source).or_insert_with(|| Source::new(kind)).layers += 1;
        }
        let parked: Vec<u32> =
            book.wants(0..u32::MAX).filter(|(_, want)| want.place == Place::Parked).map(|(chunk, _)| chunk).collect();
        for chunk in parked {
            self.enqueue(layer, chunk);
        }
    }

    /// Says that `source` does not have the layer any more; its fetches are cancelled.
    pub fn remove_source(&mut self, layer: LayerKey, source: SourceId) {
        let Some(book) = self.books.get_mut(&layer) else { return };
        let Some(offer) = book.sources.remove(&source) else { return };
        if let (Some(has), Some(mesh)) = (&offer.has, &mut book.mesh) {
            mesh.uncount(has.runs());
            self.unite(layer);
        }
        let Some(book) = self.books.get(&layer) else { return };
        for fetch in book.fetches.keys().copied().collect::<Vec<_>>() {
            if self.fetches.get(&fetch).is_some_and(|fetch| fetch.source == source) {
                self.cancel_fetch(fetch);
            }
        }
        if let Some(state) = self.sources.get_mut(&source) {
            state.layers -= 1;
            if state.layers == 0 {
                self.sources.remove(&source);
            }
        }
    }

    /// Wants the chunks of `run`, which must be missing. Demand fails at `deadline` if nothing else happens (the earliest
    /// one that a chunk was ever wanted with counts for all who wait), and at once for a chunk that failed within
    /// [`Config::failed_hold`]. Other priorities have no deadline.
    pub fn want(&mut self, now: Duration, layer: LayerKey, run: Range<u32>, priority: Priority, deadline: Duration) {
        self.now = self.now.max(now);
        let Some(book) = self.books.get(&layer) else { return };
        for chunk in run.start..run.end.min(book.geometry.chunk_count()) {
            self.want_chunk(layer, chunk, priority, deadline);
        }
        self.tell_filling(layer);
        self.arm_beat(layer);
    }

    /// Nobody wants the chunks of `run` with this priority any more.
    pub fn cancel_want(&mut self, layer: LayerKey, run: Range<u32>, priority: Priority) {
        let Some(book) = self.books.get(&layer) else { return };
        let chunks: Vec<u32> = book.wants(run).map(|(chunk, _)| chunk).collect();
        for chunk in chunks {
            self.unwant(layer, chunk, priority);
        }
    }

    /// A fetch gave a chunk, asked for or not.
    pub fn on_chunk(&mut self, now: Duration, fetch: FetchId, chunk: u32, verdict: Verdict) {
        self.now = self.now.max(now);
        let Some(transfer) = self.fetches.get_mut(&fetch) else { return };
        let (layer, source) = (transfer.layer, transfer.source);
        let is_neighbour = is_neighbour(&self.books, layer, source);
        match verdict {
            Verdict::Verified => {
                let gap = self.now.saturating_sub(transfer.last_progress);
                transfer.last_progress = self.now;
                let is_first = transfer.got.is_empty();
                transfer.got.insert(chunk);
                let waited = self.now.saturating_sub(transfer.started);
                if let Some(source) = self.sources.get_mut(&transfer.source) {
                    source.progress(self.now, gap);
                    if is_first {
                        source.answered(self.now, waited);
                    }
                }
                if is_neighbour {
                    let bytes = self.books.get(&layer).map_or(0, |book| book.geometry.chunk_size());
                    self.hedging.observe(gap);
                    self.hedging.delivered(bytes);
                }
                if let Some(offer) = self.books.get_mut(&layer).and_then(|book| book.sources.get_mut(&source)) {
                    offer.missing = None;
                }
                self.arm_hedge(fetch);
                self.on_here(layer, chunk);
            }
            Verdict::Wrong => {
                self.note_failure(layer, chunk, source, "sent a wrong chunk".into(), true);
                if is_neighbour {
                    self.cut(source);
                }
            }
        }
    }

    /// A chunk came in another way than by a fetch.
    pub fn on_here(&mut self, layer: LayerKey, chunk: u32) {
        self.forgive(layer, chunk);
        self.note_have(layer, chunk);
        let Some(want) = self.forget_want(layer, chunk) else { return };
        if want.wants(Priority::Demand) {
            self.last_demand = Some(self.now);
        }
        // What else was to bring it may be of no use any more.
        let Some(book) = self.books.get(&layer) else { return };
        for id in book.fetches_over(chunk).collect::<Vec<_>>() {
            let Some(fetch) = self.fetches.get(&id) else { continue };
            let is_useless = |book: &Book| {
                !book.wants(fetch.cover.clone()).any(|(_, want)| !fetch.is_stream || want.place == Place::Carried)
            };
            if fetch.carries(chunk) && self.books.get(&layer).is_some_and(is_useless) {
                self.cancel_fetch(id);
            }
        }
    }

    /// A fetch ended, by itself or cancelled.
    pub fn on_end(&mut self, now: Duration, fetch: FetchId, outcome: Outcome) {
        self.now = self.now.max(now);
        let Some(ended) = self.remove_fetch(fetch) else { return };
        let (layer, source) = (ended.layer, ended.source);
        let (reason, is_missing) = match outcome {
            Outcome::Done if ended.run.clone().all(|chunk| !ended.carries(chunk)) => (None, false),
            Outcome::Done => {
                self.blame(source, None);
                (Some("ended before everything was sent".into()), false)
            }
            Outcome::Missing { reason } => (Some(reason), true),
            Outcome::Busy { retry_after } => {
                self.leave_busy(&ended, self.now + retry_after.min(self.config.rest_max));
                (None, false)
            }
            Outcome::Failed { reason, retry_after } => {
                self.blame(source, retry_after);
                (Some(reason), false)
            }
        };
        if is_missing {
            self.forget_offer(layer, source, ended.run.clone());
            if let Some(offer) = self.books.get_mut(&layer).and_then(|book| book.sources.get_mut(&source)) {
                let lately = offer.missing.filter(|(_, last)| *last + MISSING > self.now);
                let (since, _) = lately.unwrap_or((self.now, self.now));
                offer.missing = Some((since, self.now));
            }
        }
        let Some(book) = self.books.get(&layer) else { return };
        let undelivered: Vec<u32> =
            book.wants(ended.cover.clone()).map(|(chunk, _)| chunk).filter(|chunk| ended.carries(*chunk)).collect();
        for chunk in undelivered {
            if let Some(reason) = &reason
                && ended.run.contains(&chunk)
            {
                self.note_failure(layer, chunk, source, reason.clone(), is_missing);
            }
            self.enqueue(layer, chunk);
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Duration) {
        self.now = self.now.max(now);
        while let Some(timer) = self.timers.pop_due(self.now) {
            match timer {
                Timer::Deadline(layer, chunk) => self.expire_demand(layer, chunk),
                Timer::Unpark(layer, chunk) => {
                    if let Some(want) = self.books.get_mut(&layer).and_then(|book| book.want_mut(chunk)) {
                        want.unpark_at = None;
                    }
                    self.enqueue(layer, chunk);
                }
                Timer::Forgive(layer, chunk) => {
                    if let Some(book) = self.books.get_mut(&layer) {
                        book.failed.remove(&chunk);
                    }
                }
                Timer::Hedge(fetch) => {
                    if let Some(fetch) = self.fetches.get_mut(&fetch) {
                        fetch.hedge_at = None;
                    }
                    self.hedge(fetch);
                }
                Timer::Tell(layer) => self.tell(layer, false),
                Timer::Beat(layer) => self.beat(layer),
                Timer::Look(layer) => {
                    if let Some(mesh) = self.books.get_mut(&layer).and_then(|book| book.mesh.as_mut()) {
                        mesh.look_at = None;
                    }
                }
                Timer::Rate => self.rate_at = None,
                Timer::Expire(layer, chunk) => {
                    if let Some(want) = self.books.get_mut(&layer).and_then(|book| book.want_mut(chunk)) {
                        want.expire_at = None;
                        let carried = want.place == Place::Carried;
                        if !carried {
                            self.unwant(layer, chunk, Priority::Readahead);
                        }
                    }
                }
            }
        }
    }

    /// The next thing to do at `now`, if there is any.
    pub fn poll_action(&mut self, now: Duration) -> Option<Action> {
        self.now = self.now.max(now);
        if self.actions.is_empty() {
            self.start_one();
        }
        self.actions.pop_front()
    }

    /// When [`Swarm::handle_timeout`] has to be called if nothing happens before.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let quiet_at = self.last_demand.map(|last| last + self.config.quiet).filter(|at| {
            *at > self.now && self.books.values().any(|book| book.queued(Priority::Background).next().is_some())
        });
        self.timers.next().into_iter().chain(quiet_at).min()
    }

    /// Bytes of a layer's wanted background chunks, which the owner keeps bounded.
    pub fn background_bytes(&self, layer: LayerKey) -> u64 {
        self.books.get(&layer).map_or(0, Book::background_bytes)
    }

    /// Whether demand is wanted, or was within [`Config::quiet`].
    pub fn is_quiet(&self, now: Duration) -> bool {
        let Some(last) = self.last_demand else { return true };
        now.saturating_sub(last) >= self.config.quiet
            && !self.fetches.values().any(|fetch| fetch.priority == Priority::Demand && self.is_waited_for(fetch))
    }

    /// Whether demand waits for a fetch. A stream goes on for long after what was demanded of it came.
    fn is_waited_for(&self, fetch: &Fetch) -> bool {
        let demanded = |book: &Book| book.wants(fetch.cover.clone()).any(|(_, want)| want.wants(Priority::Demand));
        !fetch.is_stream || self.books.get(&fetch.layer).is_some_and(demanded)
    }

    fn want_chunk(&mut self, layer: LayerKey, chunk: u32, priority: Priority, deadline: Duration) {
        let order = self.next_order;
        self.next_order += 1;
        let Some(book) = self.books.get_mut(&layer) else { return };
        if priority == Priority::Demand {
            self.last_demand = Some(self.now);
            if let Some(failed) = book.failed.get(&chunk) {
                self.actions.push_back(Action::Fail { layer, chunk, reasons: failed.reasons.clone() });
                return;
            }
        }
        book.want_or_new(chunk, order, self.now);
        book.set_wanted(chunk, priority, true);
        let Some(want) = book.want_mut(chunk) else { return };
        match priority {
            Priority::Demand => {
                let at = want.deadline.map_or(deadline, |before| before.min(deadline));
                self.timers.set(&mut want.deadline, Some(at), Timer::Deadline(layer, chunk));
            }
            Priority::Readahead => {
                let at = self.now + self.config.readahead_expiry;
                self.timers.set(&mut want.expire_at, Some(at), Timer::Expire(layer, chunk));
            }
            Priority::Background => {}
        }
        // A parked chunk stays parked unless it became urgent: demand may ask a resting source sooner.
        if want.place != Place::Parked || priority == Priority::Demand {
            self.enqueue(layer, chunk);
        }
    }

    fn unwant(&mut self, layer: LayerKey, chunk: u32, priority: Priority) {
        let Some(book) = self.books.get_mut(&layer) else { return };
        book.set_wanted(chunk, priority, false);
        let Some(want) = book.want_mut(chunk) else { return };
        match priority {
            Priority::Demand => {
                want.deadline_before = None;
                self.timers.set(&mut want.deadline, None, Timer::Deadline(layer, chunk));
            }
            Priority::Readahead => self.timers.set(&mut want.expire_at, None, Timer::Expire(layer, chunk)),
            Priority::Background => {}
        }
        if want.priority().is_none() {
            self.forget_want(layer, chunk);
        } else if matches!(want.place, Place::Queued(_)) {
            self.enqueue(layer, chunk);
        }
    }

    /// Puts a wanted chunk where it belongs: to a fetch that carries it, else into the queue of its priority.
    fn enqueue(&mut self, layer: LayerKey, chunk: u32) {
        let Some(book) = self.books.get_mut(&layer) else { return };
        let Some(priority) = book.want(chunk).and_then(|want| want.priority()) else { return };
        let nearer = |fetch: &Fetch| match self.sources.get(&fetch.source) {
            Some(source) if fetch.is_stream => {
                picker::nearer(&self.sources, book, self.now, chunk, priority, source.kind)
            }
            _ => Nearer::None,
        };
        let is_carrier = |fetch: &Fetch| fetch.carries(chunk) && nearer(fetch) != Nearer::Usable;
        let carriers: Vec<FetchId> =
            book.fetches_over(chunk).filter(|id| self.fetches.get(id).is_some_and(is_carrier)).collect();
        let rests = carriers.iter().filter_map(|id| self.fetches.get(id)).filter_map(|fetch| match nearer(fetch) {
            Nearer::Rests { until } => Some(until),
            Nearer::Usable | Nearer::None => None,
        });
        let look_again = rests.min();
        if let Some(want) = book.want_mut(chunk) {
            self.timers.set(&mut want.unpark_at, look_again, Timer::Unpark(layer, chunk));
        }
        book.place(chunk, if carriers.is_empty() { Place::Queued(priority) } else { Place::Carried });
        for id in carriers {
            self.raise(id, priority);
        }
    }

    /// A fetch counts for the most urgent of what it carries.
    fn raise(&mut self, id: FetchId, priority: Priority) {
        let Some(fetch) = self.fetches.get_mut(&id) else { return };
        if priority < fetch.priority {
            if let Some(source) = self.sources.get_mut(&fetch.source) {
                source.end(fetch.priority, fetch.bytes);
                source.start(priority, fetch.bytes);
            }
            if fetch.in_mesh {
                *load(&mut self.mesh_load, fetch.priority) -= fetch.bytes;
                *load(&mut self.mesh_load, priority) += fetch.bytes;
            }
            fetch.priority = priority;
            self.arm_hedge(id);
        }
    }

    fn park(&mut self, layer: LayerKey, chunk: u32, until: Option<Duration>) {
        let Some(book) = self.books.get_mut(&layer) else { return };
        book.place(chunk, Place::Parked);
        if let Some(want) = book.want_mut(chunk) {
            self.timers.set(&mut want.unpark_at, until, Timer::Unpark(layer, chunk));
        }
    }

    /// Starts at most one fetch: the most urgent queued chunk that can be asked for, the oldest among equals.
    fn start_one(&mut self) {
        for priority in Priority::ALL {
            if priority == Priority::Background && !self.is_quiet(self.now) {
                return;
            }
            let mut heads: Vec<(u64, LayerKey)> =
                self.books.iter().filter_map(|(layer, book)| Some((book.queued(priority).next()?.0, *layer))).collect();
            heads.sort_unstable();
            for (_, layer) in heads {
                if self.start_for(layer, priority) {
                    return;
                }
            }
        }
    }

    fn start_for(&mut self, layer: LayerKey, priority: Priority) -> bool {
        if self.books.get(&layer).is_some_and(|book| book.mesh.is_some()) {
            return self.start_in_mesh(layer, priority);
        }
        // All sources of a layer have all of it, so the first busy answer holds for the rest of the queue.
        while let Some(book) = self.books.get(&layer)
            && let Some((_, chunk)) = book.queued(priority).next()
        {
            match picker::choose(&self.config, &self.sources, book, self.now, chunk, priority, None) {
                // It was queued for a nearer source, which is gone.
                Choice::Fetch { source, .. } if self.streams(layer, source, chunk) => {
                    if let Some(book) = self.books.get_mut(&layer) {
                        book.place(chunk, Place::Carried);
                    }
                }
                Choice::Fetch { source, run } => {
                    self.start(layer, source, run, priority, false);
                    return true;
                }
                Choice::Busy => return false,
                Choice::Park(until) => self.park(layer, chunk, until),
            }
        }
        false
    }

    /// Whether a stream from `source` will bring the chunk.
    fn streams(&self, layer: LayerKey, source: SourceId, chunk: u32) -> bool {
        let Some(book) = self.books.get(&layer) else { return false };
        let mut fetches = book.fetches_over(chunk).filter_map(|id| self.fetches.get(&id));
        fetches.any(|fetch| fetch.is_stream && fetch.source == source && fetch.carries(chunk))
    }

    pub(crate) fn start(
        &mut self,
        layer: LayerKey,
        source: SourceId,
        run: Range<u32>,
        priority: Priority,
        is_hedge: bool,
    ) {
        let Some(book) = self.books.get_mut(&layer) else { return };
        let cover = book.cover(source, &run);
        let whole = book.bytes(&cover);
        let bytes = picker::load(&self.config, whole);
        let carried: Vec<u32> = book.wants(cover.clone()).map(|(chunk, _)| chunk).collect();
        let urgent = carried.iter().filter_map(|chunk| book.want(*chunk)?.priority()).min();
        let kind = self.sources.get(&source).map(|source| source.kind);
        let id = FetchId(self.next_fetch);
        self.next_fetch += 1;
        book.fetches.insert(id, cover.clone());
        let priority = priority.min(urgent.unwrap_or(priority));
        let fetch = Fetch {
            layer,
            source,
            run: run.clone(),
            cover,
            got: Default::default(),
            priority,
            asked_as: priority,
            bytes,
            started: self.now,
            last_progress: self.now,
            hedge_at: None,
            asked_at: None,
            is_stream: whole > self.config.stream_bytes_min,
            in_mesh: book.mesh.is_some() && kind.is_some_and(|kind| kind <= SourceKind::Seeder),
            is_hedge,
        };
        if fetch.in_mesh {
            *load(&mut self.mesh_load, priority) += bytes;
            self.download.take(self.now, bytes);
        } else if kind == Some(SourceKind::Registry) {
            self.registry.take(self.now, bytes);
        }
        self.fetches.insert(id, fetch);
        self.hedges += usize::from(is_hedge);
        if let Some(source) = self.sources.get_mut(&source) {
            source.start(priority, bytes);
        }
        for chunk in carried {
            self.enqueue(layer, chunk);
        }
        self.arm_hedge(id);
        self.actions.push_back(Action::Fetch { fetch: id, layer, source, run, priority, is_hedge });
        if kind == Some(SourceKind::Registry) {
            self.tell_of_registry(layer);
        }
    }

    fn remove_fetch(&mut self, id: FetchId) -> Option<Fetch> {
        let mut fetch = self.fetches.remove(&id)?;
        self.timers.set(&mut fetch.hedge_at, None, Timer::Hedge(id));
        self.hedges -= usize::from(fetch.is_hedge);
        if let Some(book) = self.books.get_mut(&fetch.layer) {
            book.fetches.remove(&id);
        }
        if let Some(source) = self.sources.get_mut(&fetch.source) {
            source.end(fetch.priority, fetch.bytes);
        }
        if fetch.in_mesh {
            *load(&mut self.mesh_load, fetch.priority) -= fetch.bytes;
        }
        Some(fetch)
    }

    pub(crate) fn cancel_fetch(&mut self, id: FetchId) {
        let Some(fetch) = self.remove_fetch(id) else { return };
        self.actions.push_back(Action::Cancel { fetch: id });
        let Some(book) = self.books.get(&fetch.layer) else { return };
        let wanted: Vec<u32> = book.wants(fetch.cover.clone()).map(|(chunk, _)| chunk).collect();
        for chunk in wanted {
            self.enqueue(fetch.layer, chunk);
        }
    }

    fn arm_hedge(&mut self, id: FetchId) {
        let Some(fetch) = self.fetches.get_mut(&id) else { return };
        let is_demand = fetch.priority == Priority::Demand;
        let after = if is_neighbour(&self.books, fetch.layer, fetch.source) {
            let [min, max] = [self.config.peer_hedge_after_min, self.config.peer_hedge_after_max];
            let learned = self.hedging.limit().map_or(max, |learned| (learned * 3 / 2).clamp(min, max));
            Some(if is_demand { learned } else { self.config.peer_stall })
        } else if fetch.in_mesh && is_demand {
            fetch.asked_at = None;
            Some(self.config.seeder_ask_after)
        } else if fetch.in_mesh {
            Some(self.config.peer_stall * 2)
        } else {
            let source = self.sources.get(&fetch.source).filter(|_| is_demand);
            source.map(|source| source.hedge_after(&self.config, self.now))
        };
        // Whatever is asked in its place is not asked in that of a second one.
        let after = after.filter(|_| fetch.in_mesh || !fetch.is_hedge);
        let at = after.map(|after| self.now + after);
        self.timers.set(&mut fetch.hedge_at, at, Timer::Hedge(id));
    }

    /// Asks another source for the demanded chunks that a fetch is late with; where there is none, the same one on another
    /// connection.
    fn hedge(&mut self, id: FetchId) {
        self.note_late(id);
        let Some(fetch) = self.fetches.get(&id) else { return };
        let (layer, late) = (fetch.layer, fetch.source);
        let seeder = self.sources.get(&late).filter(|source| fetch.in_mesh && source.kind == SourceKind::Seeder);
        if fetch.priority != Priority::Demand {
            let stall = self.config.peer_stall * 2;
            if seeder.is_some_and(|seeder| seeder.moved_at() + stall > self.now) {
                // It is slow, or serves what is more urgent.
                self.arm_hedge(id);
                return;
            }
            // Nobody waits for it, so it is not asked twice but elsewhere.
            self.blame(late, None);
            self.cancel_fetch(id);
            return;
        }
        let (mut next, mut is_over) = (None, self.is_mute(fetch));
        if let Some(seeder) = seeder {
            let Some(asked_at) = fetch.asked_at else { return self.ask_seeder(id) };
            let silent_since = seeder.moved_at().max(fetch.last_progress);
            if silent_since + self.config.mute_after <= self.now {
                self.sources.get_mut(&late).into_iter().for_each(|seeder| seeder.stick(silent_since));
                is_over = true;
            } else if seeder.alive_at() < asked_at {
                let gone_at = asked_at + self.config.seeder_gone_after[0];
                is_over = gone_at <= self.now;
                next = Some(gone_at);
            } else {
                is_over = false;
            }
        }
        if is_over {
            self.leave(late);
            return;
        }
        let Some(fetch) = self.fetches.get(&id) else { return };
        let Some(book) = self.books.get(&layer) else { return };
        // Two at a time, and a third one only where the others are given up or silent.
        let is_alone = |chunk: u32| {
            let mut others =
                book.fetches_over(chunk).filter(|other| *other != id).filter_map(|id| self.fetches.get(&id));
            book.want(chunk).is_some_and(|want| want.wants(Priority::Demand))
                && !others.any(|other| other.carries(chunk) && !self.is_silent(other))
        };
        let is_silent = self.is_silent(fetch);
        let first = fetch.cover.clone().find(|chunk| fetch.carries(*chunk) && is_alone(*chunk));
        if let Some(first) = first
            && self.hedges < self.config.hedges_max
            && let Choice::Fetch { source, .. } = self.choose_hedge(book, first, late)
        {
            let end = (first..fetch.cover.end).take_while(|chunk| fetch.carries(*chunk) && is_alone(*chunk)).count();
            let has = |chunk: &u32| book.sources.get(&source).is_some_and(|offer| offer.has(*chunk));
            let end = (first..first + end as u32).take_while(has).count();
            let run = first..first + end as u32;
            let bytes = book.bytes(&book.cover(source, &run));
            let [percent, floor] = [self.config.hedge_percent, self.config.hedge_floor_bytes];
            if self.hedging.spend(bytes, percent, floor) || is_silent || book.mesh.is_none() {
                self.start(layer, source, run, Priority::Demand, true);
            }
        }
        self.wait_on(id, next);
    }

    /// Whoever is late with demand is asked less.
    fn note_late(&mut self, id: FetchId) {
        let Some(fetch) = self.fetches.get(&id).filter(|fetch| fetch.priority == Priority::Demand) else { return };
        if is_neighbour(&self.books, fetch.layer, fetch.source)
            && let Some(source) = self.sources.get_mut(&fetch.source)
        {
            source.late(self.now, self.now.saturating_sub(fetch.last_progress));
        }
    }

    /// Waits longer for a fetch that is late. `gone_at`: its seeder gives no sign of life, and is gone then unless it gives one.
    fn wait_on(&mut self, id: FetchId, gone_at: Option<Duration>) {
        let Some(gone_at) = gone_at else { return self.arm_hedge(id) };
        let Some(fetch) = self.fetches.get_mut(&id) else { return };
        self.timers.set(&mut fetch.hedge_at, Some(gone_at), Timer::Hedge(id));
        let (seeder, asked_at) = (fetch.source, fetch.asked_at);
        self.blame(seeder, None);
        if let (Some(seeder), Some(asked_at)) = (self.sources.get_mut(&seeder), asked_at) {
            seeder.fails_since(asked_at);
        }
    }

    /// Asks a seeder that is late for a sign of life: one that gives it is slow, another one gone.
    fn ask_seeder(&mut self, id: FetchId) {
        let Some(fetch) = self.fetches.get_mut(&id) else { return };
        fetch.asked_at = Some(self.now);
        let [asks, hedges] = [self.config.seeder_ask_after, self.config.seeder_hedge_after];
        let at = self.now + hedges.saturating_sub(asks);
        self.timers.set(&mut fetch.hedge_at, Some(at), Timer::Hedge(id));
        let (layer, seeder) = (fetch.layer, fetch.source);
        if let Some(seeder) = self.sources.get_mut(&seeder)
            && seeder.asked_at + asks / 2 <= self.now
        {
            seeder.asked_at = self.now;
            self.messages.push_back(Message::Ask { layer });
        }
    }

    /// Whether a neighbour gives nothing at all for the time being, although others would have on this link.
    fn is_silent(&self, fetch: &Fetch) -> bool {
        let after = self.config.silent_after.max(self.hedging.limit().unwrap_or_default() * 3);
        is_neighbour(&self.books, fetch.layer, fetch.source) && self.quiet_since(fetch) + after <= self.now
    }

    /// When a fetch's source gave something last, or the fetch began.
    fn quiet_since(&self, fetch: &Fetch) -> Duration {
        let source = self.sources.get(&fetch.source).and_then(|source| source.last_progress);
        source.unwrap_or_default().max(fetch.last_progress)
    }

    /// Whether a machine of the mesh has given nothing at all for so long that all that it was asked for is better asked elsewhere,
    /// whatever that costs. Bytes that make up no chunk count for nothing.
    fn is_mute(&self, fetch: &Fetch) -> bool {
        fetch.in_mesh && self.quiet_since(fetch) + self.config.mute_after <= self.now
    }

    /// Asks elsewhere for all that a machine of the mesh was asked for.
    fn leave(&mut self, source: SourceId) {
        self.blame(source, None);
        let is_left = |fetch: &Fetch| fetch.source == source && fetch.in_mesh;
        let left: Vec<FetchId> = self.fetches.iter().filter(|(_, fetch)| is_left(fetch)).map(|(id, _)| *id).collect();
        left.into_iter().for_each(|id| self.cancel_fetch(id));
    }

    fn choose_hedge(&self, book: &Book, chunk: u32, late: SourceId) -> Choice {
        if let Some(mesh) = &book.mesh {
            return self.choose_hedge_in_mesh(book, mesh, chunk, late);
        }
        let choose =
            |except| picker::choose(&self.config, &self.sources, book, self.now, chunk, Priority::Demand, except);
        let is_stream = |choice: &Choice| match choice {
            Choice::Fetch { source, run } => book.bytes(&book.cover(*source, run)) > self.config.stream_bytes_min,
            Choice::Busy | Choice::Park(_) => false,
        };
        let choice = match choose(Some(late)) {
            Choice::Park(_) => choose(None),
            choice => choice,
        };
        if is_stream(&choice) { Choice::Park(None) } else { choice }
    }

    fn expire_demand(&mut self, layer: LayerKey, chunk: u32) {
        let now = self.now;
        let Some(book) = self.books.get_mut(&layer) else { return };
        let silent: Vec<SourceId> = book
            .fetches_over(chunk)
            .filter_map(|id| self.fetches.get(&id))
            .filter(|fetch| fetch.carries(chunk) && fetch.started < now)
            .map(|fetch| fetch.source)
            .collect();
        let moving_since = now.saturating_sub(self.config.hedge_after_max);
        let is_coming = book
            .fetches_over(chunk)
            .filter_map(|id| self.fetches.get(&id))
            .filter(|fetch| fetch.is_stream && fetch.carries(chunk))
            .any(|fetch| !fetch.got.is_empty() && fetch.last_progress >= moving_since);
        let Some(want) = book.want_mut(chunk) else { return };
        want.deadline = None;
        let last = *want.deadline_before.get_or_insert(now) + self.config.stream_patience;
        if is_coming && now < last {
            let at = (now + self.config.hedge_after_max).min(last);
            self.timers.set(&mut want.deadline, Some(at), Timer::Deadline(layer, chunk));
            return;
        }
        let mut reasons: BTreeMap<SourceId, Option<Arc<str>>> =
            std::mem::take(&mut want.reasons).into_iter().map(|(source, failure)| (source, Some(failure))).collect();
        for source in silent {
            reasons.entry(source).or_insert(None);
        }
        let reasons: Arc<[Reason]> = reasons.into_iter().map(|(source, failure)| Reason { source, failure }).collect();
        let mut failed = Failed { until: None, reasons: reasons.clone() };
        self.timers.set(&mut failed.until, Some(now + self.config.failed_hold), Timer::Forgive(layer, chunk));
        book.failed.insert(chunk, failed);
        self.unwant(layer, chunk, Priority::Demand);
        self.actions.push_back(Action::Fail { layer, chunk, reasons });
    }

    fn forgive(&mut self, layer: LayerKey, chunk: u32) {
        let Some(book) = self.books.get_mut(&layer) else { return };
        if let Some(mut failed) = book.failed.remove(&chunk) {
            self.timers.set(&mut failed.until, None, Timer::Forgive(layer, chunk));
        }
    }

    fn forget_want(&mut self, layer: LayerKey, chunk: u32) -> Option<crate::book::Want> {
        let mut want = self.books.get_mut(&layer)?.remove_want(chunk)?;
        self.timers.set(&mut want.deadline, None, Timer::Deadline(layer, chunk));
        self.timers.set(&mut want.unpark_at, None, Timer::Unpark(layer, chunk));
        self.timers.set(&mut want.expire_at, None, Timer::Expire(layer, chunk));
        Some(want)
    }

    /// What was asked of a source is not asked there before `until`. Nor is anything else, except at a seeder that serves few readers: who
    /// has enough to do to give a neighbour one chunk has so for the next, but a seeder says that others have this one.
    fn leave_busy(&mut self, ended: &Fetch, until: Duration) {
        let Some(source) = self.sources.get_mut(&ended.source) else { return };
        source.moved(self.now);
        let Some(book) = self.books.get_mut(&ended.layer) else { return };
        let is_of_chunks = source.kind == SourceKind::Seeder
            && book.mesh.is_some()
            && book.queued_set(Priority::Demand).count() <= self.config.ordered_max;
        if !is_of_chunks {
            return source.busy(self.now, Priority::Demand, until);
        }
        source.busy(self.now, Priority::Readahead, until);
        // What a reader comes to wait for meanwhile may be asked for: it is given sooner than what is read ahead.
        let waited_for = if ended.asked_as == Priority::Demand { ended.run.clone() } else { 0..0 };
        for chunk in waited_for {
            if let Some(want) = book.want_mut(chunk) {
                let attempts = want.avoid.get(&ended.source).map_or(0, |avoid| avoid.attempts);
                want.avoid.insert(ended.source, Avoid { until, attempts });
            }
        }
    }

    fn note_failure(&mut self, layer: LayerKey, chunk: u32, source: SourceId, reason: Arc<str>, avoid: bool) {
        let now = self.now;
        let Some(want) = self.books.get_mut(&layer).and_then(|book| book.want_mut(chunk)) else { return };
        want.reasons.insert(source, reason);
        if avoid {
            let attempts = want.avoid.get(&source).map_or(0, |avoid| avoid.attempts) + 1;
            let until = now + self.config.missing_pause(attempts);
            want.avoid.insert(source, Avoid { until, attempts });
        }
    }

    pub(crate) fn blame(&mut self, source: SourceId, retry_after: Option<Duration>) {
        let jitter = self.next_random() as u8;
        if let Some(source) = self.sources.get_mut(&source) {
            source.blame(&self.config, self.now, retry_after, jitter);
        }
    }

    /// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators).
    pub(crate) fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Whether `source` is one that tells what it has.
fn is_neighbour(books: &BTreeMap<LayerKey, Book>, layer: LayerKey, source: SourceId) -> bool {
    books.get(&layer).and_then(|book| book.sources.get(&source)).is_some_and(|offer| offer.has.is_some())
}

fn load(loads: &mut [u64; 3], priority: Priority) -> &mut u64 {
    let [demand, readahead, background] = loads;
    priority.choose(demand, readahead, background)
}
