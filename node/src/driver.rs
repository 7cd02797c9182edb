//! The task that owns the [`Swarm`]: tells it what happened, does what it says.
//!
//! Readers and transfers leave notes in the [`Inbox`]; bytes never pass through it. The notes say only *that* something
//! changed where that is enough, so the inbox is bounded by what they are about: layers, and chunks in flight.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use layer::ChunkIndex;
use layer::wire::Frame;
use parking_lot::{Condvar, Mutex};
use swarm::{Action, FetchId, LayerKey, Outcome, Priority, Reason, SourceId, Swarm, Verdict};
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};

use crate::fill::Fill;
use crate::layer::Layer;
use crate::mesh::Member;
use crate::mesh::membership::{Event, Membership};
use crate::source::{ChunkSink, SourceError, SourceKind, WrongChunk};

/// What readers, transfers and the store leave for the driver and the [chores](crate::chores).
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    notes: Mutex<Notes>,
    wake: Notify,
    /// Sources by kind and label: one machine is one source, whatever layers it serves.
    sources: Mutex<Vec<(SourceKind, String)>>,
    flushes: Mutex<BTreeSet<LayerKey>>,
    flush_wake: Condvar,
    stopped: AtomicBool,
}

#[derive(Debug, Default)]
struct Notes {
    touched: BTreeSet<LayerKey>,
    events: Vec<Note>,
}

#[derive(Debug)]
enum Note {
    Chunk { layer: LayerKey, fetch: FetchId, chunk: u32, verdict: Verdict },
    Here { layer: LayerKey, chunk: u32 },
    Moved { fetch: FetchId },
    End { fetch: FetchId, outcome: Outcome, named: Option<Named> },
}

/// Members of the mesh who have a chunk, as one said who gave nothing itself.
#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) layer: LayerKey,
    pub(crate) chunk: u32,
    pub(crate) members: Vec<Member>,
}

/// Most that is taken from the lines of the mesh before all that follows is done.
const EVENTS_AT_ONCE: usize = 64;

/// The layers that the node has, by number.
pub(crate) type Layers = Arc<Mutex<BTreeMap<LayerKey, Arc<Layer>>>>;

impl Inbox {
    /// Something about the layer changed: it came or went, its sources, who waits, what is to be read ahead.
    pub(crate) fn touch(&self, layer: LayerKey) {
        self.notes.lock().touched.insert(layer);
        self.wake.notify_one();
    }

    /// A chunk came in another way than by a fetch.
    pub(crate) fn here(&self, layer: LayerKey, chunk: u32) {
        self.push(Note::Here { layer, chunk });
    }

    /// The number of a source.
    pub(crate) fn source_id(&self, kind: SourceKind, label: String) -> SourceId {
        let mut sources = self.sources.lock();
        let key = (kind, label);
        let at = sources.iter().position(|source| *source == key).unwrap_or_else(|| {
            sources.push(key);
            sources.len() - 1
        });
        SourceId(at as u64)
    }

    /// The layer's store has something to flush, or became complete.
    pub(crate) fn needs_flush(&self, layer: LayerKey) {
        if self.flushes.lock().insert(layer) {
            self.flush_wake.notify_one();
        }
    }

    /// Waits until a layer needs a flush, then `pause` for more to come. `None`: stopped.
    pub(crate) fn flushes(&self, pause: Duration) -> Option<BTreeSet<LayerKey>> {
        let mut flushes = self.flushes.lock();
        while flushes.is_empty() && !self.is_stopped() {
            self.flush_wake.wait(&mut flushes);
        }
        let until = std::time::Instant::now() + pause;
        while !self.is_stopped() && !self.flush_wake.wait_until(&mut flushes, until).timed_out() {}
        if self.is_stopped() { None } else { Some(std::mem::take(&mut *flushes)) }
    }

    /// Ends the driver and the chores.
    pub(crate) fn stop(&self) {
        {
            // Under the lock, so that whoever is about to wait has seen it or is woken.
            let _flushes = self.flushes.lock();
            self.stopped.store(true, Ordering::Release);
        }
        self.flush_wake.notify_all();
        self.wake.notify_one();
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Lets the driver look again.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    fn push(&self, event: Note) {
        self.notes.lock().events.push(event);
        self.wake.notify_one();
    }

    fn label(&self, source: SourceId) -> String {
        self.sources.lock().get(source.0 as usize).map_or_else(String::new, |(_, label)| label.clone())
    }
}

/// Drives the swarm until the inbox is stopped.
pub(crate) struct Driver {
    pub(crate) layers: Layers,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) swarm: Swarm,
    pub(crate) fill: Fill,
    pub(crate) read_deadline: Duration,
    pub(crate) epoch: Instant,
    /// What the swarm was told about each layer's sources.
    pub(crate) known: BTreeMap<LayerKey, BTreeMap<SourceId, Known>>,
    pub(crate) running: BTreeMap<FetchId, Running>,
    /// What the lines of the mesh tell.
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) mesh: Option<Box<Membership>>,
}

/// A source as the swarm knows it.
#[derive(Debug)]
pub(crate) struct Known {
    version: u64,
    /// Its units were asked for after a fetch, when it knows them.
    has_fetched: bool,
}

/// A transfer's task.
#[derive(Debug)]
pub(crate) struct Running {
    task: AbortHandle,
    layer: LayerKey,
    source: SourceId,
}

impl Driver {
    /// Runs as a task of its own. Without it no read ends any more, so a bug in it ends the process, which its keeper
    /// starts again.
    pub(crate) fn start(self) {
        let task = tokio::spawn(self.run());
        tokio::spawn(async move {
            if task.await.is_err_and(|error| error.is_panic()) {
                tracing::error!("the driver panicked: aborting, so that reads do not hang");
                std::process::abort();
            }
        });
    }

    async fn run(mut self) {
        while !self.inbox.is_stopped() {
            let wake = self.step();
            let timeout = async {
                match wake {
                    Some(at) => sleep_until(self.epoch + at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // A sign of life that came counts before it is missed.
                biased;
                Some(event) = self.events.recv() => self.hear(event),
                () = self.inbox.wake.notified() => {}
                () = timeout => {}
            }
        }
        for (_, fetch) in std::mem::take(&mut self.running) {
            fetch.task.abort();
        }
    }

    /// Takes what the lines told so far.
    fn hear(&mut self, first: Event) {
        let now = self.epoch.elapsed();
        let mut next = Some(first);
        let mut taken = 0;
        while let Some(event) = next {
            match (event, &mut self.mesh) {
                (Event::Start(membership), _) => self.mesh = Some(membership),
                (event, Some(mesh)) => {
                    if mesh.on_event(now, &mut self.swarm, &self.inbox, event) {
                        let layers: Vec<LayerKey> = self.layers.lock().keys().copied().collect();
                        self.inbox.notes.lock().touched.extend(layers);
                    }
                }
                (_, None) => {}
            }
            taken += 1;
            next = if taken < EVENTS_AT_ONCE { self.events.try_recv().ok() } else { None };
        }
        if let Some(mesh) = &self.mesh {
            mesh.show();
        }
    }

    /// Takes all notes, does all that follows; gives when to look again if nothing happens.
    fn step(&mut self) -> Option<Duration> {
        let now = self.epoch.elapsed();
        let Notes { touched, events } = std::mem::take(&mut *self.inbox.notes.lock());
        for event in events {
            match event {
                Note::Chunk { layer, fetch, chunk, verdict } => {
                    self.swarm.on_chunk(now, fetch, chunk, verdict);
                    self.want_again(now, layer, chunk);
                }
                Note::Here { layer, chunk } => {
                    self.swarm.on_here(layer, chunk);
                    self.want_again(now, layer, chunk);
                }
                Note::Moved { fetch } => self.swarm.on_moved(now, fetch),
                Note::End { fetch, outcome, named } => {
                    let by = self.running.remove(&fetch).map(|ended| {
                        self.ask_units(ended.layer, ended.source);
                        ended.source
                    });
                    if let (Some(mesh), Some(named)) = (&mut self.mesh, named) {
                        mesh.on_named(now, &mut self.swarm, &self.inbox, &named, by);
                    }
                    self.swarm.on_end(now, fetch, outcome);
                }
            }
        }
        for key in touched {
            let layer = self.layers.lock().get(&key).cloned();
            match layer {
                Some(layer) => self.look_at(now, &layer),
                None => {
                    self.known.remove(&key);
                    if let Some(mesh) = &mut self.mesh {
                        mesh.forget(key);
                    }
                    self.swarm.remove_layer(key);
                    self.fill.remove(key);
                }
            }
        }
        self.swarm.handle_timeout(now);
        let fill_at = self.fill.step(now, &mut self.swarm);
        loop {
            while let Some(action) = self.swarm.poll_action(now) {
                self.act(action);
            }
            // Who is told something may be broken off with, which is something to do again.
            let told = self.mesh.as_mut().is_some_and(|mesh| mesh.tell(&mut self.swarm));
            if !told {
                break;
            }
        }
        let mesh_at = self.mesh.as_mut().and_then(|mesh| mesh.step(now, &self.swarm));
        fill_at.into_iter().chain(mesh_at).chain(self.swarm.poll_timeout()).min()
    }

    fn look_at(&mut self, now: Duration, layer: &Arc<Layer>) {
        let key = layer.key();
        self.swarm.add_layer(key, layer.geometry());
        let known = self.known.entry(key).or_default();
        let sources = layer.sources();
        known.retain(|id, _| {
            let stays = sources.contains_key(id);
            if !stays {
                self.swarm.remove_source(key, *id);
            }
            stays
        });
        for (id, (version, source)) in &sources {
            if known.get(id).is_none_or(|known| known.version != *version) {
                known.insert(*id, Known { version: *version, has_fetched: false });
                self.swarm.add_source(key, *id, source.kind(), source.units());
            }
        }
        if let Some(mesh) = &mut self.mesh {
            mesh.look_at(now, &mut self.swarm, layer);
        }
        for (chunk, since) in layer.waits().take_changes() {
            match since {
                Some(since) => self.demand(now, key, chunk, since),
                None => self.swarm.cancel_want(key, chunk..chunk.saturating_add(1), Priority::Demand),
            }
        }
        for run in layer.take_ahead() {
            self.swarm.want(now, key, run, Priority::Readahead, Duration::MAX);
        }
        for (window, stretch) in layer.take_in_order() {
            self.swarm.read_on(now, key, window, stretch);
        }
        self.fill.look_at(layer);
    }

    /// A chunk that came may be lost again and waited for before the swarm hears that it came.
    fn want_again(&mut self, now: Duration, key: LayerKey, chunk: u32) {
        let since = self.layers.lock().get(&key).and_then(|layer| layer.waits().waiting_since(chunk));
        if let Some(since) = since {
            self.demand(now, key, chunk, since);
        }
    }

    fn ask_units(&mut self, key: LayerKey, id: SourceId) {
        let Some(known) = self.known.get_mut(&key).and_then(|known| known.get_mut(&id)) else { return };
        if !std::mem::replace(&mut known.has_fetched, true) {
            let source = self.layers.lock().get(&key).and_then(|layer| layer.source(id));
            if let Some(source) = source {
                self.swarm.add_source(key, id, source.kind(), source.units());
            }
        }
    }

    fn demand(&mut self, now: Duration, key: LayerKey, chunk: u32, since: Instant) {
        let deadline = since.saturating_duration_since(self.epoch) + self.read_deadline;
        self.swarm.want(now, key, chunk..chunk.saturating_add(1), Priority::Demand, deadline);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Fetch { fetch, layer: key, source: id, run, priority, is_hedge } => {
                tracing::trace!(layer = key.0, source = id.0, ?run, ?priority, is_hedge, "fetch");
                let layer = self.layers.lock().get(&key).cloned();
                let mesh = self.mesh.as_ref();
                let source = layer.as_ref().and_then(|layer| layer.source(id).or_else(|| mesh?.source(layer, id)));
                let end = End { inbox: self.inbox.clone(), fetch, outcome: stopped(), named: None };
                // Where the layer or the source has just gone, dropping `end` says so to the swarm.
                let (Some(layer), Some(source)) = (layer, source) else { return };
                layer.own_counters().fetch(source.kind());
                layer.own_counters().add(|counters| &counters.hedges, u64::from(is_hedge));
                let task = tokio::spawn(async move {
                    let mut end = end;
                    let mut sink = Sink {
                        layer,
                        kind: source.kind(),
                        inbox: end.inbox.clone(),
                        fetch,
                        given: BTreeSet::new(),
                        moved: 0,
                        told_at: Instant::now(),
                    };
                    let chunk = run.start;
                    let mut result = source.fetch(run, priority, &mut sink).await;
                    if let Err(SourceError::Busy { peers, .. }) = &mut result {
                        end.named = Some(Named { layer: key, chunk, members: std::mem::take(peers) });
                    }
                    end.outcome = outcome(result);
                });
                self.running.insert(fetch, Running { task: task.abort_handle(), layer: key, source: id });
            }
            Action::Cancel { fetch } => {
                if let Some(running) = self.running.remove(&fetch) {
                    running.task.abort();
                }
            }
            Action::Fail { layer, chunk, reasons } => {
                let layer = self.layers.lock().get(&layer).cloned();
                if let Some(layer) = layer {
                    let reasons = reasons.iter().map(|reason| self.explain(reason)).collect::<Vec<_>>();
                    let none = || vec!["no source is known".to_owned()];
                    let reasons = if reasons.is_empty() { none() } else { reasons };
                    layer.fail_chunk(chunk, reasons.into());
                }
            }
        }
    }

    fn explain(&self, reason: &Reason) -> String {
        match &reason.failure {
            Some(failure) => failure.to_string(),
            None => format!("{} did not answer", self.inbox.label(reason.source)),
        }
    }
}

/// Tells the swarm the end of a transfer, also when its task is aborted or panics.
struct End {
    inbox: Arc<Inbox>,
    fetch: FetchId,
    outcome: Outcome,
    named: Option<Named>,
}

impl Drop for End {
    fn drop(&mut self) {
        let outcome = std::mem::replace(&mut self.outcome, stopped());
        self.inbox.push(Note::End { fetch: self.fetch, outcome, named: self.named.take() });
    }
}

/// Checks and stores what a source gives.
struct Sink {
    layer: Arc<Layer>,
    kind: SourceKind,
    inbox: Arc<Inbox>,
    fetch: FetchId,
    /// A source that gives chunks again and again must not look busy for ever.
    given: BTreeSet<u32>,
    /// Bytes since the swarm was last told of any, and when that was.
    moved: usize,
    told_at: Instant,
}

/// What a seeder gives in less than this is no sign that it will give a chunk in time.
const MOVED_MIN: usize = 16 << 10;
/// So often is enough.
const MOVED_PAUSE: Duration = Duration::from_millis(50);

impl ChunkSink for Sink {
    fn chunk(&mut self, chunk: ChunkIndex, plain: &[u8], wire_bytes: usize) -> Result<(), WrongChunk> {
        self.take(chunk, plain, wire_bytes, None)
    }

    fn frame(&mut self, chunk: ChunkIndex, plain: &[u8], frame: Frame<'_>) -> Result<(), WrongChunk> {
        self.take(chunk, plain, frame.wire_len(), Some(frame))
    }

    fn moved(&mut self, wire_bytes: usize) {
        self.moved += wire_bytes;
        if self.kind == SourceKind::Seeder && self.moved >= MOVED_MIN && self.told_at.elapsed() >= MOVED_PAUSE {
            self.inbox.push(Note::Moved { fetch: self.fetch });
            (self.moved, self.told_at) = (0, Instant::now());
        }
    }
}

impl Sink {
    fn take(
        &mut self,
        chunk: ChunkIndex,
        plain: &[u8],
        wire_bytes: usize,
        frame: Option<Frame<'_>>,
    ) -> Result<(), WrongChunk> {
        let counters = self.layer.own_counters();
        counters.wire_bytes(self.kind, wire_bytes);
        if !self.given.insert(chunk.0) {
            return Err(WrongChunk(chunk));
        }
        let verdict = if !self.layer.store().digests().is_chunk(chunk, plain) {
            counters.add(|counters| &counters.wrong_chunks, 1);
            tracing::warn!(layer = %self.layer.diff_id(), %chunk, kind = ?self.kind, "a source sent a wrong chunk");
            if matches!(self.kind, SourceKind::Seeder | SourceKind::Registry) {
                self.layer.note_wrong(chunk.0);
            }
            Verdict::Wrong
        } else {
            if matches!(self.kind, SourceKind::Seeder | SourceKind::Registry) {
                self.layer.note_answer();
            }
            if self.layer.take_chunk(chunk.0, plain) {
                counters.chunk(self.kind, plain.len());
                // After the readers are answered, before other nodes are told of the chunk.
                if let Some(frame) = frame {
                    self.layer.store().keep(chunk, frame);
                }
            } else {
                counters.add(|counters| &counters.duplicate_chunks, 1);
            }
            Verdict::Verified
        };
        self.inbox.push(Note::Chunk { layer: self.layer.key(), fetch: self.fetch, chunk: chunk.0, verdict });
        (self.moved, self.told_at) = (0, Instant::now());
        if verdict == Verdict::Wrong { Err(WrongChunk(chunk)) } else { Ok(()) }
    }
}

fn outcome(result: Result<(), SourceError>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(error) => {
            let reason = error.to_string().into();
            match error {
                SourceError::Busy { retry_after, .. } => Outcome::Busy { retry_after },
                SourceError::Overloaded { retry_after, .. } => Outcome::Failed { reason, retry_after },
                error if error.blame() => Outcome::Failed { reason, retry_after: None },
                _ => Outcome::Missing { reason },
            }
        }
    }
}

fn stopped() -> Outcome {
    Outcome::Failed { reason: "the transfer was stopped".into(), retry_after: None }
}
