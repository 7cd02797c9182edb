//! Ingest: one download of a blob becomes a known layer, however many ask for it.
//!
//! - [`store`]: what is kept on disk.
//! - [`frames`]: the wire forms of a layer's chunks.
//! - [`encode`]: the threads that make them.
//! - [`known`]: a layer that was ingested.
//! - [`ledger`], [`room`]: how much of the disk all that takes, and what goes when it is too much.
//! - [`pass`]: the one pass over a blob.
//! - [`window`]: memory that passes over zstd blobs share.
//! - [`refill`]: wire forms made again.
//! - [`serving`]: index sections and chunks for other machines.
//! - [`control`]: the gRPC service that starts an ingest.

pub mod control;
pub mod encode;
mod flush;
pub mod frames;
pub mod known;
mod ledger;
mod pass;
mod refill;
mod room;
mod serving;
pub mod store;
mod window;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use layer::index::statement;
use layer::{ChunkDigest, Digest, Geometry, ingest as layer_ingest};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, mpsc, watch};

use self::encode::EncodePool;
use self::frames::Frames;
use self::known::Known;
use self::ledger::{Ledger, Reservation};
use self::pass::{Pass, PassError};
use self::store::{IncomingBlob, Store};
use self::window::Windows;
use crate::config::CacheConfig;
use crate::registry::{self, Fault, RegistryError};
use crate::security::{Signed, Signer};
use crate::source::BlobRef;
use crate::store::{Disk, Room};

/// Bytes of a blob between the network and the pass over it, so that neither waits for the other's jitter. Bytes and not
/// pieces, of which each may have some hundred KiB.
const AHEAD_BYTES_MAX: usize = 2 << 20;
/// The most threads that encode unless the configuration says otherwise: they and three passes, which encode as well when they
/// are faster, keep up with a fast network.
const ENCODE_THREADS_MAX: usize = 4;

/// What all ingests hold in memory at most with the default options, however large their layers are. Besides, there is what
/// becomes the indexes, about 1 % of the blobs.
const MEMORY_MAX: u64 = 64 << 20;
const _: () = {
    // Buffers for reading and for the device, a decoder without its window, and two more for the windows of checkpoints.
    let pass = window::WINDOW_FREE + (3 << 18);
    let ingests = CONCURRENT as u64 * (AHEAD_BYTES_MAX as u64 + pass);
    // A pass has an encoder too.
    let encoders = (ENCODE_THREADS_MAX + CONCURRENT) as u64 * layer::wire::ENCODER_BYTES_MAX as u64;
    let queue = encode::QUEUE_MAX as u64 * (1 << layer::chunk::CHUNK_LOG2);
    assert!(ingests + encoders + queue + window::WINDOWS_MAX + registry::AHEAD_BYTES_MAX <= MEMORY_MAX);
};
/// How long a failure is the answer to everyone who asks, before it is tried again: so that a thousand nodes that ask
/// again at once do not become a thousand requests to a registry in trouble.
/// Doubled with each failure in a row, up to [`FAILURE_REST_MAX`].
const FAILURE_REST: Duration = Duration::from_secs(2);
const FAILURE_REST_MAX: Duration = Duration::from_secs(30);
/// How often a waiting ingest tells that others move.
const TELL_WAITING: Duration = Duration::from_millis(500);
/// Blobs that are ingested at the same time unless the configuration says otherwise.
const CONCURRENT: usize = 3;
/// The most ingests that wait or run.
const FLIGHTS_MAX: usize = 4096;

/// How to ingest.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Blobs that are ingested at the same time. More of them finish later each, and the node that waits for an image
    /// needs all its layers.
    pub concurrent: usize,
    /// Threads that encode chunks, and chunks that are made again from blobs at the same time.
    pub encode_threads: usize,
    /// Largest blob to take, in bytes.
    pub blob_size_max: u64,
    /// How much of the disk may be taken.
    pub cache: CacheConfig,
    /// What the index is made with.
    pub layer: layer_ingest::Options,
}

impl Default for Options {
    /// 3 at a time, a thread for each core up to 4, 64 GiB, all of the disk but its floor.
    fn default() -> Self {
        Self {
            concurrent: CONCURRENT,
            encode_threads: std::thread::available_parallelism().map_or(1, usize::from).min(ENCODE_THREADS_MAX),
            blob_size_max: 64 << 30,
            cache: CacheConfig::default(),
            layer: layer_ingest::Options::default(),
        }
    }
}

/// How far an ingest is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the blob that were read.
    pub blob_read: u64,
    /// Its size; 0 while unknown.
    pub blob_size: u64,
    /// Bytes of the device that came of them.
    pub device_read: u64,
    /// While it waits for its turn: bytes of blobs that came for others.
    pub ahead_read: u64,
}

/// Where an ingest stands.
#[derive(Clone, Debug)]
pub enum Phase {
    /// Waiting for its turn or reading.
    Running(Progress),
    /// Done.
    Ready(Arc<Known>),
    /// The layer cannot be lazy, and why.
    Unsupported(String),
    /// It failed; the next who asks starts it anew.
    Failed(IngestFailure),
}

/// Why an ingest failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IngestFailure {
    /// The registry did not give the blob.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The registry gave something else.
    #[error("{blob}: {reason}")]
    WrongBlob {
        /// The blob.
        blob: String,
        /// What came.
        reason: String,
    },
    /// What came cannot become a layer. Whether the registry or the image is to blame is not known yet.
    #[error("{blob} gives no layer (the rest of it is still being checked): {reason}")]
    Content {
        /// The blob.
        blob: String,
        /// What is wrong, if it is the blob.
        reason: String,
    },
    /// The disk failed.
    #[error("cannot store {blob}: {reason}")]
    Store {
        /// The blob.
        blob: String,
        /// Why not.
        reason: String,
    },
    /// It does not fit.
    #[error("no room on the seeder for {blob}: {reason}")]
    NoRoom {
        /// The blob.
        blob: String,
        /// What is missing, and what to do.
        reason: String,
    },
    /// Too many ingests wait.
    #[error("{FLIGHTS_MAX} ingests are waiting already")]
    TooMany,
}

/// Ingests blobs and keeps the layers that come of them. Cheap to clone.
#[derive(Clone)]
pub struct Ingester {
    shared: Arc<Shared>,
}

struct Shared {
    store: Store,
    registry: registry::Client,
    signer: Option<Signer>,
    options: Options,
    encode: EncodePool,
    /// Permits to run an ingest.
    turns: Semaphore,
    /// Bytes of blobs that came, of all ingests.
    read: Arc<AtomicU64>,
    windows: Windows,
    /// Permits to make chunks again from a blob.
    refills: Arc<Semaphore>,
    /// The permit to do so from the start of a large zstd frame, which takes much memory.
    long_refill: Arc<Semaphore>,
    ledger: Ledger,
    /// Held while room is made.
    evicting: Mutex<()>,
    flights: Mutex<HashMap<Digest, Arc<Flight>>>,
    /// What chunks are being made is not told to everybody.
    discreet: AtomicBool,
    layers: tokio::sync::Mutex<HashMap<Digest, Arc<Known>>>,
}

/// Digests of the chunks that a pass has made, from the first one on.
pub(crate) type Digests = Mutex<Vec<ChunkDigest>>;

/// One ingest, shared by all who ask for its blob.
#[derive(Debug)]
pub struct Flight {
    /// Where the blob comes from.
    registry: String,
    /// All of it does: nothing was here from an earlier ingest, which may have been another registry's.
    is_from_start: AtomicBool,
    phase: watch::Sender<Phase>,
    frames: watch::Sender<Option<Arc<Frames>>>,
    digests: Mutex<Arc<Digests>>,
    ended: Mutex<Option<Instant>>,
    /// How often the blob failed in a row before.
    failures: u32,
}

impl Flight {
    /// Where it stands, now and whenever that changes.
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Whether it is under way, and all its bytes come from `registry`.
    pub(crate) fn reads_from(&self, registry: &str) -> bool {
        let is_from_start = self.is_from_start.load(Ordering::Acquire);
        is_from_start && self.registry == registry && matches!(*self.phase.borrow(), Phase::Running(_))
    }

    /// The chunks made so far; `None` while it waits for its turn.
    pub fn frames(&self) -> Option<Arc<Frames>> {
        self.frames.borrow().clone()
    }

    /// The digests of the chunks made so far; others once the blob had to be begun anew.
    pub(crate) fn digests(&self) -> Arc<Digests> {
        Arc::clone(&self.digests.lock())
    }
}

impl std::fmt::Debug for Ingester {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ingester").field("store", &self.shared.store.root()).finish_non_exhaustive()
    }
}

impl Ingester {
    /// An ingester on `store`. Without `signer` the indexes are not signed.
    pub fn new(store: Store, registry: registry::Client, signer: Option<Signer>, options: Options) -> io::Result<Self> {
        let room = Room::open(Arc::new(Disk), store.root(), &options.cache).map_err(io::Error::other)?;
        let ledger = Ledger::new(room, store.found()?);
        let shared = Shared {
            store,
            registry,
            signer,
            options,
            encode: EncodePool::new(options.encode_threads)?,
            turns: Semaphore::new(options.concurrent.max(1)),
            read: Arc::default(),
            windows: Windows::new(),
            long_refill: Arc::new(Semaphore::new(1)),
            refills: Arc::new(Semaphore::new(options.encode_threads.max(1))),
            ledger,
            evicting: Mutex::default(),
            flights: Mutex::default(),
            discreet: AtomicBool::new(false),
            layers: tokio::sync::Mutex::default(),
        };
        let shared = Arc::new(shared);
        if shared.ledger.room().taken() > shared.ledger.room().limit() {
            // The limit was lowered, or others took the disk.
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("make-room".into()).spawn(move || shared.make_room(0))?;
        }
        Ok(Self { shared })
    }

    /// Tells nobody the digests of chunks before there is an index, whose digests are given with a grant only. So an ingest is
    /// followed by one node at a time, and others do not follow that one.
    pub fn withhold_digests(&self) {
        self.shared.discreet.store(true, Ordering::Relaxed);
    }

    pub(crate) fn tells_digests(&self) -> bool {
        !self.shared.discreet.load(Ordering::Relaxed)
    }

    /// What is taken of the disk and may be, in bytes.
    pub fn disk_use(&self) -> crate::DiskUse {
        let room = self.shared.ledger.room();
        crate::DiskUse { taken: room.taken(), limit: room.limit(), free: room.free() }
    }

    /// The registries that blobs come from.
    pub fn registry(&self) -> &registry::Client {
        &self.shared.registry
    }

    /// Starts to ingest `blob` unless it is known or under way. The ingest goes on when nobody waits any more: somebody
    /// will ask again.
    pub async fn ask(&self, blob: &BlobRef) -> Result<watch::Receiver<Phase>, IngestFailure> {
        // The first lock is held to the end: an ingest puts its layer among the known ones before it leaves the flights,
        // and nobody else begins one meanwhile. The disk is looked at last, since most who ask do so together.
        let mut layers = self.shared.layers.lock().await;
        if let Some(known) = layers.get(&blob.digest) {
            return Ok(watch::Sender::new(Phase::Ready(Arc::clone(known))).subscribe());
        }
        let before = self.flight(blob.digest);
        if let Some(flight) = &before
            && !flight.may_start_anew()
        {
            return Ok(flight.phase());
        }
        if let Some(known) = self.known_in(&mut layers, blob.digest).await {
            return Ok(watch::Sender::new(Phase::Ready(known)).subscribe());
        }
        let (shared, digest) = (Arc::clone(&self.shared), blob.digest);
        if let Ok(Some(reason)) = tokio::task::spawn_blocking(move || shared.store.unsupported(digest)).await {
            return Ok(watch::Sender::new(Phase::Unsupported(reason)).subscribe());
        }
        let mut flights = self.shared.flights.lock();
        if flights.len() >= FLIGHTS_MAX {
            flights.retain(|_, flight| flight.ended.lock().is_none());
            if flights.len() >= FLIGHTS_MAX {
                return Err(IngestFailure::TooMany);
            }
        }
        let progress = Progress { blob_size: blob.size, ..Progress::default() };
        let flight = Arc::new(Flight {
            registry: blob.registry.clone(),
            is_from_start: AtomicBool::new(false),
            phase: watch::Sender::new(Phase::Running(progress)),
            frames: watch::Sender::new(None),
            digests: Mutex::default(),
            ended: Mutex::new(None),
            failures: before.map_or(0, |flight| match *flight.phase.borrow() {
                Phase::Failed(_) => flight.failures + 1,
                _ => 0,
            }),
        });
        flights.insert(blob.digest, Arc::clone(&flight));
        drop(flights);
        let phase = flight.phase();
        tokio::spawn(self.clone().fly(blob.clone(), flight));
        Ok(phase)
    }

    /// The layer of `blob`, where it is known.
    pub async fn known(&self, blob: Digest) -> Option<Arc<Known>> {
        let mut layers = self.shared.layers.lock().await;
        self.known_in(&mut layers, blob).await
    }

    /// Where the chunks of `blob` are, where it is known. Loads nothing but the header.
    pub(crate) async fn geometry(&self, blob: Digest) -> Option<Geometry> {
        if let Some(known) = self.shared.layers.lock().await.get(&blob) {
            return Some(known.header().geometry());
        }
        let shared = Arc::clone(&self.shared);
        let read = blocking(move || store::header(shared.store.root(), blob));
        read.await.ok().map(|header| header.geometry())
    }

    /// The lock is held over the loading: two copies of one layer would write over each other's frames.
    async fn known_in(&self, layers: &mut HashMap<Digest, Arc<Known>>, blob: Digest) -> Option<Arc<Known>> {
        if let Some(known) = layers.get(&blob) {
            return Some(Arc::clone(known));
        }
        let shared = Arc::clone(&self.shared);
        let known = tokio::task::spawn_blocking(move || shared.load(blob)).await.ok()??;
        layers.insert(blob, Arc::clone(&known));
        Some(known)
    }

    /// Forgets a layer whose blob or index turned out to be damaged; the next who asks starts its ingest anew.
    pub(crate) async fn forget(&self, blob: Digest) {
        let mut layers = self.shared.layers.lock().await;
        layers.remove(&blob);
        let shared = Arc::clone(&self.shared);
        let forgotten = blocking(move || {
            let forgotten = shared.store.forget(blob);
            shared.settle(blob);
            forgotten
        });
        if let Err(error) = forgotten.await {
            tracing::error!(%blob, %error, "cannot remove a damaged layer");
        }
    }

    /// The ingest of `blob` that is under way.
    pub fn flight(&self, blob: Digest) -> Option<Arc<Flight>> {
        self.shared.flights.lock().get(&blob).map(Arc::clone)
    }

    /// Writes down where the frames are that were made again. To be called before an orderly end.
    pub async fn save(&self) {
        let layers: Vec<_> = self.shared.layers.lock().await.values().map(Arc::clone).collect();
        let _ = tokio::task::spawn_blocking(move || {
            for known in layers.iter().filter(|known| known.frames().is_unsaved()) {
                if let Err(error) = known.frames().save() {
                    tracing::warn!(blob = %known.header().blob(), %error, "cannot save the table of wire forms");
                }
            }
        })
        .await;
    }

    /// Runs one ingest to its end and tells it everyone.
    async fn fly(self, blob: BlobRef, flight: Arc<Flight>) {
        let _turn = self.turn(&flight).await;
        let started = Instant::now();
        tracing::info!(%blob, size = blob.size, "ingest starts");
        let end = match self.ingest(&blob, &flight).await {
            Ok(known) => {
                self.shared.layers.lock().await.insert(blob.digest, Arc::clone(&known));
                let seconds = started.elapsed().as_secs_f64();
                let size = known.header().blob_size();
                tracing::info!(
                    %blob, size, device_size = known.header().device_size(), seconds = format!("{seconds:.2}"),
                    "MB/s" = format!("{:.1}", size as f64 / 1e6 / seconds.max(1e-3)), "ingest ends"
                );
                Phase::Ready(known)
            }
            Err(Ended::Unsupported(reason)) => {
                tracing::warn!(%blob, reason, "the layer cannot be lazy");
                let (shared, digest, why) = (Arc::clone(&self.shared), blob.digest, reason.clone());
                if let Err(error) = blocking(move || shared.store.note_unsupported(digest, &why)).await {
                    tracing::warn!(%blob, %error, "cannot remember that a layer cannot be lazy");
                }
                Phase::Unsupported(reason)
            }
            Err(Ended::Failed(error)) => {
                tracing::error!(%blob, error = %error, "ingest fails");
                Phase::Failed(error)
            }
        };
        *flight.ended.lock() = Some(Instant::now());
        let is_known = matches!(end, Phase::Ready(_));
        flight.phase.send_replace(end);
        let mut flights = self.shared.flights.lock();
        if is_known {
            flights.remove(&blob.digest);
        }
        if flights.values().all(|flight| flight.ended.lock().is_some()) {
            // Nothing follows for a while.
            tokio::task::spawn_blocking(crate::trim_malloc);
        }
    }

    /// Waits for a turn. Who waits for this flight sees that others move meanwhile.
    async fn turn(&self, flight: &Flight) -> Option<SemaphorePermit<'_>> {
        let mut turn = std::pin::pin!(self.shared.turns.acquire());
        loop {
            match tokio::time::timeout(TELL_WAITING, turn.as_mut()).await {
                Ok(turn) => return turn.ok(),
                Err(_) => {
                    tell_ahead(&flight.phase, &self.shared.read);
                }
            }
        }
    }

    async fn ingest(&self, blob: &BlobRef, flight: &Flight) -> Result<Arc<Known>, Ended> {
        let ended = self.ingest_within(blob, flight).await;
        let (shared, digest) = (Arc::clone(&self.shared), blob.digest);
        let is_full = matches!(ended, Err(Ended::Failed(IngestFailure::NoRoom { .. })));
        let _ = blocking(move || {
            if ended_in_vain(&shared.store, digest) || is_full {
                shared.store.drop_incoming(digest)?;
            }
            shared.settle(digest);
            Ok(())
        })
        .await;
        ended
    }

    /// The same; what the files take is to be settled by the caller.
    async fn ingest_within(&self, blob: &BlobRef, flight: &Flight) -> Result<Arc<Known>, Ended> {
        let in_store = |error: io::Error| Ended::store(blob, &error);
        let (shared, digest, size) = (Arc::clone(&self.shared), blob.digest, blob.size);
        let reserved = blocking(move || {
            // What is here of it counts for the reservation from now on.
            shared.ledger.settle(digest, 0);
            let mut reservation = shared.ledger.reservation();
            // Blob, wire forms and index.
            shared.cover(&mut reservation, 2 * size + size / 8)?;
            Ok(reservation)
        });
        let reservation = Arc::new(Mutex::new(reserved.await.map_err(in_store)?));
        let mut resume = true;
        loop {
            let shared = Arc::clone(&self.shared);
            let digest = blob.digest;
            let prepared = blocking(move || shared.prepare(digest, resume)).await.map_err(in_store)?;
            let resumed = prepared.blob_here > 0;
            match self.attempt(blob, flight, prepared, Arc::clone(&reservation)).await {
                // The blob's beginning from an earlier ingest may be what is wrong: a power failure can tear it.
                Err(Ended::Failed(IngestFailure::WrongBlob { .. }) | Ended::Unsupported(_)) if resumed && resume => {
                    resume = false;
                }
                other => return other,
            }
        }
    }

    async fn attempt(
        &self,
        blob: &BlobRef,
        flight: &Flight,
        prepared: Prepared,
        reservation: Arc<Mutex<Reservation>>,
    ) -> Result<Arc<Known>, Ended> {
        let Prepared { incoming, frames, has_blob, blob_here } = prepared;
        // Before anyone can follow.
        flight.is_from_start.store(!has_blob && blob_here == 0, Ordering::Release);
        let digests = Arc::<Digests>::default();
        *flight.digests.lock() = Arc::clone(&digests);
        flight.frames.send_replace(Some(Arc::clone(&frames)));
        let (sender, pieces) = pieces();
        let pass = Pass {
            blob: blob.clone(),
            path: if has_blob { self.shared.store.blob_path(blob.digest) } else { incoming.blob_path() },
            blob_here,
            is_whole: has_blob,
            pieces,
            batch: self.shared.encode.batch(Arc::clone(&frames)),
            frames: Arc::clone(&frames),
            digests,
            cover: {
                let shared = Arc::clone(&self.shared);
                Box::new(move |bytes| shared.cover(&mut reservation.lock(), bytes))
            },
            window: self.shared.windows.none(),
            read: Arc::clone(&self.shared.read),
            phase: flight.phase.clone(),
            options: self.shared.options.layer,
        };
        let pass = tokio::task::spawn_blocking(move || pass.run());
        let downloaded = match has_blob {
            true => {
                drop(sender);
                Ok(())
            }
            false => self.download(blob, blob_here, sender, &flight.phase).await,
        };
        let passed = pass.await.map_err(|error| Ended::store(blob, &io::Error::other(error)))?;
        let index = match (downloaded, passed) {
            // A pass that stopped by itself closes the channel, so the download's end says nothing then.
            (_, Err(PassError::Stopped(end))) => {
                let _ = blocking(move || incoming.remove()).await;
                return Err(end);
            }
            // What is read of it again may look right without being on the disk: the kernel told of that, and does not again.
            (_, Err(PassError::Disk(error))) => {
                let _ = blocking(move || incoming.remove()).await;
                return Err(Ended::store(blob, &error));
            }
            // The incoming blob stays: the next try goes on with it.
            (Err(error), _) => return Err(Ended::Failed(error)),
            (Ok(()), Ok(pass)) => match pass.finish() {
                Ok(index) => index,
                Err(end) => {
                    let _ = blocking(move || incoming.remove()).await;
                    return Err(end);
                }
            },
        };
        let shared = Arc::clone(&self.shared);
        let published = blocking(move || {
            let signed = match &shared.signer {
                None => Signed::default(),
                Some(signer) => signer.sign(&statement(&index.header)).map_err(io::Error::other)?,
            };
            let published = shared.store.publish(&incoming, has_blob, &frames, &index, &signed);
            published.inspect_err(|_| drop(incoming.remove()))?;
            Ok(Arc::new(Known::new(&shared.store, index.header, signed, frames)))
        });
        published.await.map_err(|error| Ended::store(blob, &error))
    }

    /// The signature of a known layer, of today's certificate.
    fn signed(&self, known: &Known) -> Arc<Signed> {
        let signed = known.signed();
        match &self.shared.signer {
            Some(signer) if !signer.made(&signed) => match signer.sign(&statement(known.header())) {
                Ok(anew) => {
                    // On disk it is replaced when the layer is loaded the next time.
                    known.sign_again(anew);
                    known.signed()
                }
                Err(error) => {
                    tracing::warn!(%error, blob = %known.header().blob(), "cannot sign an index with the new key");
                    signed
                }
            },
            _ => signed,
        }
    }

    /// Sends the blob's bytes from `start` on.
    async fn download(
        &self,
        blob: &BlobRef,
        start: u64,
        pieces: PieceSender,
        phase: &watch::Sender<Phase>,
    ) -> Result<(), IngestFailure> {
        if blob.size > 0 && start == blob.size {
            return Ok(());
        }
        let max = self.shared.options.blob_size_max;
        let too_large = || {
            let reason = format!("it is larger than {max} bytes, the limit of this seeder (limits.blob_size)");
            RegistryError::of_blob(blob, Fault::Protocol { reason })
        };
        let (mut download, mut at, mut told) = (self.shared.registry.download(blob, start), start, false);
        loop {
            let next = tokio::select! {
                next = download.next() => next?,
                // The pass stopped and says why.
                () = pieces.closed() => return Ok(()),
            };
            let Some(bytes) = next else { return Ok(()) };
            if let (false, Some(total)) = (told, download.total()) {
                if total > max {
                    return Err(too_large().into());
                }
                phase.send_if_modified(|phase| match phase {
                    Phase::Running(progress) if progress.blob_size != total => {
                        progress.blob_size = total;
                        true
                    }
                    _ => false,
                });
                told = true;
            }
            at += bytes.len() as u64;
            self.shared.read.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            if at > max {
                return Err(too_large().into());
            }
            if !pieces.send(bytes).await {
                return Ok(());
            }
        }
    }
}

/// Tells who waits for an ingest that waits how much came for others.
fn tell_ahead(phase: &watch::Sender<Phase>, read: &AtomicU64) {
    let read = read.load(Ordering::Relaxed);
    phase.send_if_modified(|phase| match phase {
        Phase::Running(progress) => std::mem::replace(&mut progress.ahead_read, read) != read,
        _ => false,
    });
}

/// A piece of a blob, counted until it is dropped.
struct Piece {
    bytes: Bytes,
    _counted: OwnedSemaphorePermit,
}

/// Hands pieces to the pass.
struct PieceSender {
    pieces: mpsc::UnboundedSender<Piece>,
    room: Arc<Semaphore>,
}

/// A channel that holds [`AHEAD_BYTES_MAX`], or one larger piece.
fn pieces() -> (PieceSender, mpsc::UnboundedReceiver<Piece>) {
    let (pieces, receiver) = mpsc::unbounded_channel();
    (PieceSender { pieces, room: Arc::new(Semaphore::new(AHEAD_BYTES_MAX)) }, receiver)
}

impl PieceSender {
    /// Waits for room; gives whether the pass still takes pieces.
    async fn send(&self, bytes: Bytes) -> bool {
        let len = bytes.len().clamp(1, AHEAD_BYTES_MAX) as u32;
        let room = tokio::select! {
            room = Arc::clone(&self.room).acquire_many_owned(len) => room,
            () = self.pieces.closed() => return false,
        };
        room.is_ok_and(|_counted| self.pieces.send(Piece { bytes, _counted }).is_ok())
    }

    /// Waits until the pass takes no more.
    async fn closed(&self) {
        self.pieces.closed().await;
    }
}

/// What an attempt starts from.
struct Prepared {
    incoming: IncomingBlob,
    frames: Arc<Frames>,
    /// The whole blob stands in the store: no network is needed.
    has_blob: bool,
    /// Bytes of the blob that are on disk.
    blob_here: u64,
}

impl Shared {
    fn prepare(&self, blob: Digest, resume: bool) -> io::Result<Prepared> {
        let incoming = self.store.begin(blob)?;
        let frames = Arc::new(incoming.frames()?);
        let whole = std::fs::metadata(self.store.blob_path(blob)).ok().filter(|_| resume);
        if let Some(whole) = whole {
            return Ok(Prepared { incoming, frames, has_blob: true, blob_here: whole.len() });
        }
        let path = incoming.blob_path();
        if !resume {
            std::fs::File::create(&path)?;
        }
        let blob_here = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        Ok(Prepared { incoming, frames, has_blob: false, blob_here })
    }

    /// Loads a stored layer and makes sure that its signature is of today's key.
    fn load(&self, blob: Digest) -> Option<Arc<Known>> {
        let stored = self.store.index(blob)?;
        let statement = statement(&stored.header);
        if !stored.signed.signature.is_empty() && !stored.signed.fits(&statement) {
            tracing::error!(%blob, "a stored index does not fit its signature; the layer is ingested again when asked for");
            return None;
        }
        let signed = match &self.signer {
            None => Signed::default(),
            Some(signer) if signer.made(&stored.signed) => stored.signed,
            Some(signer) => {
                let signed = signer.sign(&statement).ok()?;
                if let Err(error) = self.store.write_signed(blob, &signed) {
                    tracing::warn!(%blob, %error, "cannot store the new signature of an index");
                }
                signed
            }
        };
        match self.store.frames(blob) {
            Ok(frames) => Some(Arc::new(Known::new(&self.store, stored.header, signed, Arc::new(frames)))),
            Err(error) => {
                tracing::error!(%blob, %error, "cannot open the wire forms of a layer");
                None
            }
        }
    }
}

impl Flight {
    fn may_start_anew(&self) -> bool {
        let rest = (FAILURE_REST * 2u32.saturating_pow(self.failures.min(8))).min(FAILURE_REST_MAX);
        let rested = self.ended.lock().is_some_and(|at| at.elapsed() >= rest);
        match &*self.phase.borrow() {
            Phase::Running(_) | Phase::Unsupported(_) => false,
            Phase::Failed(_) => rested,
            // Known layers are found before flights; this one was forgotten since.
            Phase::Ready(_) => true,
        }
    }
}

/// How an ingest ends without a layer.
#[derive(Debug)]
enum Ended {
    Unsupported(String),
    Failed(IngestFailure),
}

impl Ended {
    fn store(blob: &BlobRef, error: &io::Error) -> Self {
        let (blob, reason) = (blob.to_string(), error.to_string());
        Self::Failed(match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => IngestFailure::NoRoom { blob, reason },
            _ => IngestFailure::Store { blob, reason },
        })
    }
}

/// Whether an ingest that broke off left nothing to go on with.
fn ended_in_vain(store: &Store, blob: Digest) -> bool {
    store.begin(blob).is_ok_and(|incoming| std::fs::metadata(incoming.blob_path()).map_or(true, |blob| blob.len() == 0))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
pub(crate) mod tests;
