//! Keeps the devices within their room: takes what was used longest ago off the disk.
//!
//! Wire forms go before all else. Layers that are not mounted go first. Of a mounted layer nothing goes unless a seeder or a registry has lately given a
//! right chunk of it, if need be because it was asked for one just to see.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use layer::ChunkIndex;
use swarm::LayerKey;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::driver::{Inbox, Layers};
use crate::layer::Layer;
use crate::source::{ChunkSink, Priority, Source, SourceKind, WrongChunk};
use crate::store::{Room, Unit};

/// How long a right chunk proves that its source has the layer.
const PROOF_AGE: Duration = Duration::from_secs(600);

/// How long a source has to give the chunk that it is asked for to see whether it has the layer.
const PROBE_PATIENCE: Duration = Duration::from_secs(5);

/// How long a layer whose sources did not answer is left alone.
const REFUSED_REST: Duration = Duration::from_secs(30);

/// Pause after a look that found nothing to evict.
const STUCK_PAUSE: Duration = Duration::from_secs(1);

/// The thread's state.
pub(crate) struct Evictor {
    layers: Layers,
    room: Arc<Room>,
    inbox: Arc<Inbox>,
    runtime: Handle,
    stop: CancellationToken,
    /// Layers whose sources did not answer, and when they were asked.
    refused: BTreeMap<LayerKey, Instant>,
    /// It was said that there is no room.
    told: bool,
}

/// Something that may be evicted.
struct Candidate {
    layer: Arc<Layer>,
    unit: Unit,
}

impl Evictor {
    /// Probes sources on the current runtime.
    pub(crate) fn new(layers: Layers, room: Arc<Room>, inbox: Arc<Inbox>, stop: CancellationToken) -> Self {
        Self { layers, room, inbox, runtime: Handle::current(), stop, refused: BTreeMap::new(), told: false }
    }

    /// Evicts whenever there is too little room, until [`Room::stop`].
    pub(crate) fn run(mut self) {
        let mut pause = Duration::ZERO;
        while self.room.wait(pause) {
            self.room.look();
            let is_enough = self.free_owed() & self.drop_spare() & self.make_room(self.room.excess());
            pause = if is_enough { Duration::ZERO } else { STUCK_PAUSE };
            self.tell(is_enough);
            // The background may go on, or has to end.
            self.inbox.wake();
        }
    }

    /// Frees what could not be freed before; gives whether nothing is left of that.
    fn free_owed(&self) -> bool {
        let layers: Vec<_> = self.layers.lock().values().cloned().collect();
        layers.into_iter().all(|layer| {
            let owed = layer.store().owed();
            owed.is_empty() || layer.store().evict(&owed).is_ok()
        })
    }

    /// Drops wire forms while they are in the way, a layer's at a time, those used longest ago first; gives whether they are not
    /// any more.
    fn drop_spare(&self) -> bool {
        let need = self.room.spare_excess();
        if need == 0 {
            return true;
        }
        let mut layers: Vec<_> = self.layers.lock().values().cloned().collect();
        layers.retain(|layer| layer.store().wire().disk_bytes() > 0);
        layers.sort_by_key(|layer| layer.store().wire().used());
        let mut freed = 0;
        for layer in layers {
            if freed >= need {
                break;
            }
            freed += layer.store().wire().clear();
        }
        if freed > 0 {
            self.room.note_success();
            tracing::debug!(bytes = freed, "dropped wire forms");
        }
        self.room.spare_excess() == 0
    }

    /// Frees `need` bytes; gives whether that could be done.
    fn make_room(&mut self, need: u64) -> bool {
        if need == 0 {
            return !self.room.is_disk_full();
        }
        let mut wanted: BTreeMap<LayerKey, (Arc<Layer>, Vec<u32>)> = BTreeMap::new();
        let (mut planned, mut allowed) = (0, BTreeMap::new());
        for Candidate { layer, unit } in self.candidates() {
            if planned >= need || self.stop.is_cancelled() {
                break;
            }
            let may = *allowed.entry(layer.key()).or_insert_with(|| self.may_lose(&layer, unit));
            if may {
                planned += unit.bytes;
                wanted.entry(layer.key()).or_insert_with(|| (layer, Vec::new())).1.push(unit.number);
            }
        }
        let before = self.room.taken();
        for (layer, units) in wanted.into_values() {
            match layer.store().evict(&units) {
                Ok(bytes) => {
                    layer.note_evicted(bytes);
                    tracing::debug!(layer = %layer.diff_id(), units = units.len(), bytes, "evicted");
                }
                Err(error) => {
                    layer.note_evicted(0);
                    tracing::warn!(layer = %layer.diff_id(), %error, "cannot free parts of a device");
                }
            }
        }
        let freed = before.saturating_sub(self.room.taken());
        if freed > 0 {
            self.room.note_success();
        }
        self.room.excess() == 0 || freed >= need
    }

    /// All that may go, what should go first first.
    fn candidates(&self) -> Vec<Candidate> {
        let layers: Vec<_> = self.layers.lock().values().cloned().collect();
        let mut candidates: Vec<_> = layers
            .into_iter()
            .flat_map(|layer| {
                layer.store().units().into_iter().map(move |unit| Candidate { layer: layer.clone(), unit })
            })
            .collect();
        candidates.sort_by_key(|Candidate { layer, unit }| (layer.is_mounted(), unit.used, layer.key(), unit.number));
        candidates
    }

    /// Whether a part of the layer can be fetched again when somebody needs it.
    fn may_lose(&mut self, layer: &Arc<Layer>, unit: Unit) -> bool {
        if !layer.is_mounted() || layer.was_answered_within(PROOF_AGE) {
            return true;
        }
        if self.refused.get(&layer.key()).is_some_and(|at| at.elapsed() < REFUSED_REST) {
            return false;
        }
        let Some(chunk) = layer.store().first_here(unit.number) else { return true };
        let sources = layer.sources().into_values().map(|(_, source)| source);
        let is_there = sources
            .filter(|source| matches!(source.kind(), SourceKind::Seeder | SourceKind::Registry))
            .any(|source| self.runtime.block_on(probe(layer, &*source, chunk, &self.stop)));
        if is_there {
            self.refused.remove(&layer.key());
            layer.note_answer();
        } else {
            self.refused.retain(|_, at| at.elapsed() < REFUSED_REST);
            self.refused.insert(layer.key(), Instant::now());
            tracing::debug!(layer = %layer.diff_id(), "nobody gives the layer: all of it stays");
        }
        is_there
    }

    /// Says once that chunks are not stored, and once that they are again.
    fn tell(&mut self, is_enough: bool) {
        let is_bad = !is_enough && self.room.is_refusing();
        if is_bad == std::mem::replace(&mut self.told, is_bad) {
            return;
        }
        let size = |bytes: u64| ByteSize::b(bytes).display().iec().to_string();
        let (taken, limit) = (size(self.room.taken()), size(self.room.limit()));
        if !is_bad {
            tracing::info!(taken, "the cache stores chunks again");
        } else if self.room.is_disk_full() {
            tracing::error!(
                taken,
                "the disk is full: containers go on with chunks that are fetched for each read and not stored, and nothing is \
                 fetched ahead; free space on the file system of `root`"
            );
        } else {
            tracing::warn!(
                taken,
                limit,
                "the cache is full and nothing in it may go: it is read from disk, or nobody else has it. Containers go on with \
                 chunks that are fetched for each read and not stored, and nothing is fetched ahead; allow more with cache.size, \
                 or remove images"
            );
        }
    }
}

/// Asks `source` for a chunk that is here.
async fn probe(layer: &Arc<Layer>, source: &dyn Source, chunk: u32, stop: &CancellationToken) -> bool {
    let mut sink = ProbeSink { layer: layer.clone(), kind: source.kind(), chunk: ChunkIndex(chunk), is_right: false };
    let fetch = tokio::time::timeout(PROBE_PATIENCE, source.fetch(chunk..chunk + 1, Priority::Background, &mut sink));
    tokio::select! {
        () = stop.cancelled() => {}
        _ = fetch => {}
    }
    sink.is_right
}

struct ProbeSink {
    layer: Arc<Layer>,
    kind: SourceKind,
    chunk: ChunkIndex,
    is_right: bool,
}

impl ChunkSink for ProbeSink {
    fn chunk(&mut self, chunk: ChunkIndex, plain: &[u8], wire_bytes: usize) -> Result<(), WrongChunk> {
        self.layer.own_counters().wire_bytes(self.kind, wire_bytes);
        if !self.layer.store().digests().is_chunk(chunk, plain) {
            return Err(WrongChunk(chunk));
        }
        self.is_right |= chunk == self.chunk;
        Ok(())
    }
}
