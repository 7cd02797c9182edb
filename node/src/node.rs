//! The engine: all layers of one machine, and what drives them.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use layer::index::{Header, Section};
use layer::wire::Frame;
use layer::{ChunkIndex, Digest};
use parking_lot::Mutex;
use swarm::{LayerKey, Swarm};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::chores::{Arriving, Chores};
use crate::config::CacheConfig;
use crate::counters::{CounterValues, Counters};
use crate::driver::{Driver, Inbox, Layers};
use crate::fill::Fill;
use crate::layer::{Layer, ReadOptions};
use crate::mesh::membership::Event;
use crate::reader::ReadError;
use crate::relay::Relay;
use crate::scrub::{self, Scrubbed};
use crate::source::SourceKind;
use crate::store::{Backend, BrokenLayer, Disk, IncomingStore, LayerParts, Prepared, Store, StoreError};

/// Settings of a [`Node`].
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Directory of the store. Its parent must exist; other files may be in it.
    pub root: PathBuf,
    /// How much of the disk the devices may take.
    pub cache: CacheConfig,
    /// How long a read waits for a chunk before it fails.
    pub read_deadline: Duration,
    /// Whether chunks are also kept in the form in which they came, to be given to other nodes ([`crate::mesh::Sharing`]), as
    /// long as `cache` has room to spare.
    pub share: bool,
    /// Whether layers that are filling ([`Layer::set_filling`]) are fetched whole in the background.
    pub fill: bool,
    /// Most plain bytes per second that the background fetches; 0: no limit.
    pub fill_rate: u64,
    /// Most bytes per second from other nodes and seeders; 0: no limit.
    pub download_rate: u64,
    /// Most bytes per second from registries; 0: no limit.
    pub registry_rate: u64,
    /// Whether other nodes are told nothing of what is here.
    pub leech: bool,
    /// How far ahead of a sequential reader chunks are fetched, in bytes; 0: not at all. Too much and containers start
    /// with bytes that they do not need; too little and a sequential read waits for each round trip.
    pub readahead: u64,
    /// Most reads of one layer that wait for chunks at the same time; more wait in line.
    pub waiting_reads_max: usize,
    /// How sources are chosen.
    pub swarm: swarm::Config,
}

impl NodeConfig {
    /// The defaults for a store at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            cache: CacheConfig::default(),
            read_deadline: Duration::from_secs(30),
            share: false,
            fill: true,
            fill_rate: 0,
            download_rate: 0,
            registry_rate: 0,
            leech: false,
            readahead: 2 << 20,
            waiting_reads_max: 4096,
            swarm: swarm::Config::default(),
        }
    }
}

/// All layers of one machine. Dropping it without [`Node::shutdown`] is like a crash of the process: nothing is lost but
/// the proof that nothing was.
#[derive(Debug)]
pub struct Node {
    store: Store,
    layers: Layers,
    broken: Mutex<Vec<BrokenLayer>>,
    inbox: Arc<Inbox>,
    counters: Arc<Counters>,
    arriving: Arriving,
    chores: Mutex<Chores>,
    fill_paused: Arc<AtomicBool>,
    read_options: ReadOptions,
    /// Held while a layer comes or goes, so that a diffID has one layer.
    placing: Mutex<()>,
    mesh_events: mpsc::Sender<Event>,
    /// Layers that this node follows while they are being ingested, by blob.
    relays: Mutex<HashMap<Digest, Weak<Relay>>>,
}

/// A device that arrives while its index is not known: its chunks are kept, and believed once the index names them.
#[derive(Debug)]
pub struct Incoming {
    store: IncomingStore,
    unsynced: AtomicU64,
    inbox: Arc<Inbox>,
    counters: Counters,
}

/// What devices take on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskUse {
    /// Bytes of all devices, arriving ones included.
    pub taken: u64,
    /// Most that they may take now; `u64::MAX` without a limit.
    pub limit: u64,
    /// What they may still take: what is left of the limit, and no more than the file system has.
    pub free: u64,
}

/// What lines of the mesh may tell before they wait for the driver.
const MESH_EVENTS: usize = 256;

/// A number that no layer has.
const NO_LAYER: LayerKey = LayerKey(0);

impl Node {
    /// Opens the store and starts the engine on the current tokio runtime. Needs no network; a layer that cannot be opened is
    /// reported by [`Node::broken_layers`] and does not stop the others. Blocks for the disk.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn open(config: NodeConfig) -> Result<Arc<Self>, StoreError> {
        let path = PathBuf::from("/proc/sys/kernel/random/boot_id");
        // Without a boot id every unclean end counts as one of the machine.
        let boot_id = std::fs::read_to_string(path).unwrap_or_default();
        Self::open_on(Arc::new(Disk), config, boot_id.trim())
    }

    pub(crate) fn open_on(
        backend: Arc<dyn Backend>,
        config: NodeConfig,
        boot_id: &str,
    ) -> Result<Arc<Self>, StoreError> {
        let (store, found) = Store::open(backend, &config.root, boot_id, &config.cache)?;
        for broken in &found.broken {
            tracing::error!(layer = broken.name, error = %broken.error, "a layer cannot be opened; the others are not affected");
        }
        if found.after_crash {
            tracing::info!(
                layers = found.layers.len(),
                "the machine ended uncleanly: chunks are checked before they are used"
            );
        }
        let read_options = ReadOptions { waiting_max: config.waiting_reads_max, readahead_bytes_max: config.readahead };
        store.room().set_keeps_spare(config.share);
        let inbox = Arc::new(Inbox::default());
        let counters = Arc::new(Counters::default());
        let layers: Layers = Arc::default();
        for store in found.layers {
            if !config.share {
                store.wire().clear();
            }
            let layer = Layer::new(store, read_options, counters.clone(), inbox.clone());
            // Until its owner says otherwise: a snapshot may stand on it.
            layer.set_mounted(true);
            layers.lock().insert(layer.key(), layer);
        }
        let arriving = Arriving::default();
        let chores = Chores::start(layers.clone(), arriving.clone(), inbox.clone(), store.room().clone())
            .map_err(StoreError::io("start the threads of", &config.root))?;
        let fill_paused = Arc::new(AtomicBool::new(!config.fill));
        let rate = Some(config.fill_rate).filter(|rate| *rate > 0);
        let swarm = swarm::Config {
            download_bytes_per_sec: config.download_rate,
            registry_bytes_per_sec: config.registry_rate,
            leech: config.leech,
            ..config.swarm
        };
        let (mesh_events, events) = mpsc::channel(MESH_EVENTS);
        let driver = Driver {
            layers: layers.clone(),
            inbox: inbox.clone(),
            swarm: Swarm::new(swarm, seed()),
            fill: Fill::new(fill_paused.clone(), rate, store.room().clone()),
            read_deadline: config.read_deadline,
            epoch: Instant::now(),
            known: BTreeMap::new(),
            running: BTreeMap::new(),
            events,
            mesh: None,
        };
        driver.start();
        tokio::spawn(mend(layers.clone(), inbox.clone()));
        let node = Self {
            store,
            layers,
            broken: Mutex::new(found.broken),
            inbox,
            counters,
            arriving,
            chores: Mutex::new(chores),
            fill_paused,
            read_options,
            placing: Mutex::default(),
            mesh_events,
            relays: Mutex::default(),
        };
        for layer in node.layers() {
            if let Some(reason) = layer.quarantine() {
                tracing::warn!(layer = %layer.diff_id(), reason, "the layer is quarantined: it is not used for new containers");
            }
            node.inbox.touch(layer.key());
            if layer.is_complete() && !layer.is_proven() {
                node.inbox.needs_flush(layer.key());
            }
        }
        Ok(Arc::new(node))
    }

    /// The layer with that diffID.
    pub fn layer(&self, diff_id: Digest) -> Option<Arc<Layer>> {
        self.layers.lock().values().find(|layer| layer.diff_id() == diff_id).cloned()
    }

    /// The layer with that [`Layer::number`].
    pub fn layer_by_number(&self, number: u64) -> Option<Arc<Layer>> {
        self.layers.lock().get(&LayerKey(number)).cloned()
    }

    /// The layer whose blob has that digest.
    pub fn layer_by_blob(&self, blob: Digest) -> Option<Arc<Layer>> {
        self.layers.lock().values().find(|layer| layer.header().blob() == blob).cloned()
    }

    /// All layers, in the order in which they came.
    pub fn layers(&self) -> Vec<Arc<Layer>> {
        self.layers.lock().values().cloned().collect()
    }

    /// Layer directories that could not be opened, as name and reason.
    pub fn broken_layers(&self) -> Vec<(String, String)> {
        self.broken.lock().iter().map(|broken| (broken.name.clone(), broken.error.to_string())).collect()
    }

    /// The directory of the store.
    pub fn root(&self) -> &Path {
        self.store.root()
    }

    /// What all layers counted together, removed ones included, since the node was opened.
    pub fn counters(&self) -> CounterValues {
        self.counters.values()
    }

    /// Where lines of the mesh tell what they hear.
    pub(crate) fn mesh_events(&self) -> mpsc::Sender<Event> {
        self.mesh_events.clone()
    }

    /// What the devices take and may take, in bytes.
    pub fn disk_use(&self) -> DiskUse {
        let room = self.store.room();
        room.look();
        // Wire forms go for devices.
        let spare = room.spare();
        DiskUse { taken: room.taken().saturating_sub(spare), limit: room.limit(), free: room.free() + spare }
    }

    /// Compares all that is on the disk with its digests without delay, as is done slowly once a day. What is damaged is fetched again.
    /// Ends early when `go_on`, which is asked every few megabytes, says so. Blocks for the disk.
    pub fn scrub(&self, go_on: &mut dyn FnMut() -> bool) -> Scrubbed {
        scrub::pass(&self.layers, go_on)
    }

    /// Stops or continues the background.
    pub fn set_fill_paused(&self, paused: bool) {
        self.fill_paused.store(paused, Ordering::Release);
        self.inbox.wake();
    }

    /// Takes a layer in whose index is known and proven (see [`LayerParts::signature`]). One with the same diffID that
    /// is here stays as it is, apart from spans that it did not have. Blocks for the disk.
    pub fn insert(&self, parts: &LayerParts) -> Result<Arc<Layer>, StoreError> {
        self.check_refused(&parts.header)?;
        if let Some(layer) = self.usable(parts.header.diff_id()) {
            return self.complete_sections(layer, parts);
        }
        let prepared = self.store.prepare(parts)?;
        let directory = prepared.directory.clone();
        let placed = self.place(prepared, parts);
        // Where it was placed, nothing has that name any more.
        self.store.discard(&directory);
        placed
    }

    /// Makes room for a device whose index is not known yet. Dropping it without [`Node::adopt`] removes what came.
    /// Blocks for the disk.
    pub fn incoming(&self, blob: Digest, chunk_log2: u8) -> Result<Arc<Incoming>, StoreError> {
        let store = self.store.incoming(&blob, chunk_log2)?;
        let (inbox, counters) = (self.inbox.clone(), Counters::default());
        let incoming = Arc::new(Incoming { store, unsynced: AtomicU64::new(0), inbox, counters });
        self.arriving.lock().push(Arc::downgrade(&incoming));
        Ok(incoming)
    }

    /// Makes a layer of what came in: the chunks that the index names are here at once. Like [`Node::insert`] otherwise. Nothing
    /// may be written to `incoming` any more. Blocks for the disk.
    pub fn adopt(&self, incoming: &Incoming, parts: &LayerParts) -> Result<Arc<Layer>, StoreError> {
        self.check_refused(&parts.header)?;
        let diff_id = parts.header.diff_id();
        let result = match self.usable(diff_id) {
            Some(layer) => self.complete_sections(layer, parts),
            None => {
                let prepared = self.store.prepare_incoming(&incoming.store, parts)?;
                self.place(prepared, parts)
            }
        };
        if let Ok(layer) = &result {
            // A layer that was here meanwhile has another device.
            let arrived = incoming.store.arrived();
            for (chunk, arrived) in arrived.into_iter().filter(|(chunk, _)| !layer.store().is_here(*chunk)) {
                if let Ok(plain) = incoming.store.read(chunk, arrived) {
                    layer.add_chunk(ChunkIndex(chunk), &plain);
                }
            }
            layer.own_counters().take_over(&incoming.counters);
            self.inbox.needs_flush(layer.key());
        }
        result
    }

    /// This node begins to follow the ingest of `blob`.
    pub(crate) fn relay_anew(&self, blob: Digest) -> Arc<Relay> {
        let (relay, mut relays) = (Relay::new(), self.relays.lock());
        relays.retain(|_, relay| relay.strong_count() > 0);
        relays.insert(blob, Arc::downgrade(&relay));
        relay
    }

    /// What came of a layer whose ingest this node follows.
    pub(crate) fn relay(&self, blob: Digest) -> Option<Arc<Relay>> {
        self.relays.lock().get(&blob).and_then(Weak::upgrade)
    }

    /// Chunks of no layer yet go to another node.
    pub(crate) fn note_given(&self, chunks: u32, bytes: usize) {
        self.counters.given(u64::from(chunks), bytes);
    }

    /// Removes a layer with its bytes. Its reads fail; mounts of it must be gone. Gives whether there was one. Blocks
    /// for the disk.
    pub fn remove(&self, diff_id: Digest) -> Result<bool, StoreError> {
        let _placing = self.placing.lock();
        let Some(layer) = self.layer(diff_id) else { return Ok(false) };
        self.refuse_index(&layer)?;
        self.layers.lock().remove(&layer.key());
        layer.close(ReadError::Removed);
        self.store.remove(layer.store())?;
        Ok(true)
    }

    /// Stops the engine and ends the store cleanly, so that nothing has to be checked at the next start. Reads that wait are not
    /// answered any more: over a takeover the kernel asks the next process.
    pub async fn shutdown(self: &Arc<Self>) {
        let node = self.clone();
        let stopped = tokio::task::spawn_blocking(move || node.close()).await;
        if let Ok(Err(error)) = stopped {
            tracing::warn!(%error, "the store did not end cleanly: its chunks are checked at the next start");
        }
    }

    fn close(&self) -> Result<(), StoreError> {
        self.inbox.stop();
        self.chores.lock().join();
        for layer in self.layers() {
            layer.store().close()?;
        }
        self.store.close()
    }

    /// Fails for an index that was found to be wrong, whatever became of the layer that had it.
    pub fn check_refused(&self, header: &Header) -> Result<(), StoreError> {
        let index = header.digest();
        let of_layer = self.layer(header.diff_id()).filter(|layer| layer.header().digest() == index);
        let reason = of_layer.and_then(|layer| layer.store().quarantined()).or_else(|| self.store.refused(&index));
        reason.map_or(Ok(()), |reason| Err(StoreError::Refused { index, reason }))
    }

    /// Remembers a wrong index whose layer is about to go.
    fn refuse_index(&self, layer: &Layer) -> Result<(), StoreError> {
        let Some(reason) = layer.store().quarantined() else { return Ok(()) };
        let index = layer.header().digest();
        if !self.store.refuse(&index, &reason)? {
            let directory = self.root().join("refused");
            tracing::warn!(%index, directory = %directory.display(), "too many indexes were wrong: this one is not remembered; look after who signs them, then empty that directory");
        }
        Ok(())
    }

    /// The layer, unless its index is wrong.
    fn usable(&self, diff_id: Digest) -> Option<Arc<Layer>> {
        self.layer(diff_id).filter(|layer| !layer.has_wrong_index())
    }

    fn complete_sections(&self, layer: Arc<Layer>, parts: &LayerParts) -> Result<Arc<Layer>, StoreError> {
        if let Some(spans) = &parts.spans
            && layer.header() == &parts.header
            && layer.section(Section::Spans)?.is_none()
        {
            layer.put_spans(spans)?;
        }
        Ok(layer)
    }

    fn place(&self, prepared: Prepared, parts: &LayerParts) -> Result<Arc<Layer>, StoreError> {
        let _placing = self.placing.lock();
        let diff_id = parts.header.diff_id();
        if let Some(layer) = self.usable(diff_id) {
            return self.complete_sections(layer, parts);
        }
        if let Some(quarantined) = self.layer(diff_id) {
            // Another index may be right. Mounts of the old one keep failing.
            self.refuse_index(&quarantined)?;
            self.layers.lock().remove(&quarantined.key());
            quarantined.store().leave();
            quarantined.close(ReadError::Removed);
        }
        let store = self.store.place(prepared)?;
        self.broken.lock().retain(|broken| broken.name != diff_id.hex());
        let layer = Layer::new(store, self.read_options, self.counters.clone(), self.inbox.clone());
        self.layers.lock().insert(layer.key(), layer.clone());
        self.inbox.touch(layer.key());
        Ok(layer)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.inbox.stop();
        self.chores.lock().join();
    }
}

impl Incoming {
    /// Writes a chunk. Nothing is believed of it yet, so it may come from anyone; one that comes again replaces the
    /// first. Blocks for the disk.
    pub fn write(&self, chunk: ChunkIndex, plain: &[u8]) -> io::Result<()> {
        self.store.write(chunk, plain)?;
        if self.unsynced.fetch_add(plain.len() as u64, Ordering::Relaxed) > 16 << 20 {
            self.inbox.needs_flush(NO_LAYER);
        }
        Ok(())
    }

    /// The same for a chunk that came in its wire form from a source of `kind`, of which `plain` was made.
    pub(crate) fn write_frame(
        &self,
        chunk: ChunkIndex,
        plain: &[u8],
        frame: Frame<'_>,
        kind: SourceKind,
    ) -> io::Result<()> {
        self.write(chunk, plain)?;
        self.store.keep(chunk, frame);
        self.counters.chunk(kind, plain.len());
        Ok(())
    }

    /// Bytes of the network came.
    pub(crate) fn count(&self, kind: SourceKind, wire_bytes: usize) {
        self.counters.wire_bytes(kind, wire_bytes);
    }

    /// Bytes that came.
    pub fn bytes_here(&self) -> u64 {
        self.store.arrived().values().map(|arrived| arrived.len as u64).sum()
    }

    pub(crate) fn store(&self) -> &IncomingStore {
        &self.store
    }

    pub(crate) fn unsynced(&self) -> &AtomicU64 {
        &self.unsynced
    }
}

/// How often layers with a chunk that fails again and again are looked at: a source that is right again is noticed soon, and one
/// chunk so often costs nothing.
const MEND_PAUSE: Duration = Duration::from_secs(30);

/// Fetches anew what quarantined layers lack, for the engine's whole life.
async fn mend(layers: Layers, inbox: Arc<Inbox>) {
    loop {
        tokio::time::sleep(MEND_PAUSE).await;
        if inbox.is_stopped() {
            return;
        }
        // One whose disk hangs is looked at with no lock that others need.
        let all: Vec<_> = layers.lock().values().cloned().collect();
        let mended = tokio::task::spawn_blocking(move || all.iter().for_each(|layer| layer.mend()));
        // A panic there was reported by its thread.
        let _ = mended.await;
    }
}

/// Differs between nodes and starts, which is all that the swarm's jitter needs.
fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests;
