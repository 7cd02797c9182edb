//! One layer on disk.

mod evict;
mod failures;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

use ::layer::index::{ChunkDigests, HEADER_LEN, Header, Section, check_section};
use ::layer::wire::Frame;
use ::layer::{ChunkIndex, Digest, Geometry};
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use sha2::{Digest as _, Sha256};

pub(crate) use self::evict::Unit;
use self::evict::{Uses, read_pins, unit_of, units};
pub(crate) use self::failures::{Cause, Change};
use self::failures::{FAILING, Failures};
use super::backend::{File, read_file, replace_file, write_file};
use super::have::{BITS_OFFSET, Bitmap, Have, NewerVersion};
use super::room::{MemoryPlace, Room};
use super::wire::WireStore;
use super::{IncomingStore, LayerParts, SMALL_FILE_MAX, Site, StoreError};

pub(super) const DEVICE: &str = "device";
const IDENTITY: &str = "identity";
const HEADER: &str = "header";
const SIGNATURE: &str = "signature";
const HAVE: &str = "have";
const QUARANTINED: &str = "quarantined";

/// Chunks that could not be written are kept in memory for those who wait for them, at most so many.
const UNSTORED_MAX: usize = 32;

/// How much of a device is read at once to prove it.
const PROVE_READ: u64 = 1 << 20;

/// A layer's index, its device and which chunks of it are here.
#[derive(Debug)]
pub(crate) struct LayerStore {
    site: Arc<Site>,
    directory: PathBuf,
    number: u64,
    header: Header,
    signature: Vec<u8>,
    digests: ChunkDigests,
    device: Arc<dyn File>,
    wire: Arc<WireStore>,
    have: Arc<dyn File>,
    /// Chunks that may be read from the device.
    here: Bitmap,
    /// Chunks of `here` that have to be compared with their digest first.
    suspect: Bitmap,
    unsynced: Mutex<Unsynced>,
    /// Locked before `unsynced`.
    on_disk: Mutex<OnDisk>,
    unstored: Mutex<VecDeque<Held>>,
    unstored_len: AtomicUsize,
    /// Held shared by each write of a chunk and its bit, alone by who takes chunks away.
    writes: RwLock<()>,
    /// Grows after bits were cleared and before their chunks are gone.
    losses: AtomicU64,
    /// When units were used.
    uses: Uses,
    /// Units whose bits are cleared and whose bytes are not freed yet; nothing is written there.
    leaving: Bitmap,
    /// Who reads the device from disk.
    pins: Mutex<BTreeSet<String>>,
    /// What is taken of the room for the device.
    charged: AtomicU64,
    proven: AtomicBool,
    /// [`LayerStore::note_shared`].
    is_shared: AtomicBool,
    is_quarantined: AtomicBool,
    quarantined: Mutex<Option<String>>,
    failures: Failures,
    /// What the file says of them.
    noted: Mutex<Option<Cause>>,
    faults: Faults,
    /// The layer was removed or replaced, so that its directory is gone or another's. Held while files are written by their names.
    is_gone: Mutex<bool>,
}

/// What a store begins with.
struct Beginning {
    directory: PathBuf,
    number: u64,
    header: Header,
    signature: Vec<u8>,
    digests: ChunkDigests,
    device: Arc<dyn File>,
    wire: Arc<WireStore>,
    have: Arc<dyn File>,
    state: Have,
    pins: BTreeSet<String>,
    failures: Failures,
    quarantined: Option<String>,
}

impl Drop for LayerStore {
    fn drop(&mut self) {
        self.site.room.give_back(self.charged.load(Ordering::Relaxed));
        if self.is_pinned() {
            self.site.room.note_pinned(self.geometry().device_size(), false);
        }
    }
}

/// A chunk in memory.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    chunk: u32,
    plain: Bytes,
    _place: Arc<MemoryPlace>,
}

impl Held {
    /// Which chunk.
    pub(crate) fn chunk(&self) -> u32 {
        self.chunk
    }
}

/// What went wrong with the disk, for counters.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// Chunks that could not be written.
    pub(crate) unstored: AtomicU64,
    /// Chunks that were here and turned out wrong or unreadable.
    pub(crate) rotten: AtomicU64,
}

/// Changes of `here` that the file does not show yet.
#[derive(Debug, Default)]
struct Unsynced {
    written: Vec<u32>,
    dropped: Vec<u32>,
}

/// The file `have` as it was written last.
#[derive(Debug)]
struct OnDisk {
    bits: Vec<u8>,
    clean: bool,
}

/// What became of a chunk that was given to [`LayerStore::add`].
#[derive(Debug)]
pub(crate) enum Added {
    /// It was here.
    Known,
    /// It is readable now, and had after the next flush.
    Written,
    /// It was not stored. It is readable for a while, and the bytes are here for who waits for them, unless too much is kept
    /// in memory already.
    Unstored(Unstored, Option<Held>),
}

/// Why a chunk was not stored.
#[derive(Debug)]
pub(crate) enum Unstored {
    /// There is no room for it.
    NoRoom,
    /// The disk did not take it.
    Disk(io::Error),
}

/// Outcome of [`LayerStore::prove`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// The device is what its diffID names.
    Proven,
    /// Not every chunk is here.
    Incomplete,
    /// Chunks were damaged on disk and are missing now.
    Rotten(u32),
    /// Every chunk is what the index says and the whole is not what the diffID says: the index is wrong.
    Quarantined,
}

impl LayerStore {
    /// Writes all files of a layer into `directory`, synced, and opens it. With `incoming`, whose directory it must
    /// then be, its device is taken over.
    pub(super) fn create(
        site: Arc<Site>,
        directory: &Path,
        parts: &LayerParts,
        number: u64,
        incoming: Option<&IncomingStore>,
    ) -> Result<Self, StoreError> {
        let backend = &*site.backend;
        let header = parts.header.clone();
        let geometry = header.geometry();
        check_section(&header, Section::Entries, &parts.entries)?;
        let digests = ChunkDigests::parse(&header, parts.chunk_digests.clone())?;
        let identity = format!("number {number}\nindex {}\n", header.digest());
        let mut files: Vec<(&str, &[u8])> = vec![
            (Section::Entries.name(), &parts.entries),
            (Section::ChunkDigests.name(), &parts.chunk_digests),
            (SIGNATURE, &parts.signature),
        ];
        if let Some(spans) = &parts.spans {
            check_section(&header, Section::Spans, spans)?;
            files.push((Section::Spans.name(), spans));
        }
        let encoded = header.encode();
        files.extend([(HEADER, &encoded[..]), (IDENTITY, identity.as_bytes())]);
        let mut written = Vec::with_capacity(files.len() + 1);
        for (name, bytes) in files {
            let path = directory.join(name);
            written.push(write_file(backend, &path, bytes).map_err(StoreError::io("write", &path))?);
        }

        let none = Have::none(geometry);
        let have_path = directory.join(HAVE);
        let have = backend.open(&have_path, true).map_err(StoreError::io("create", &have_path))?;
        have.set_len(0)
            .and_then(|()| have.write_at(&none.bits, BITS_OFFSET))
            .and_then(|()| have.write_at(&Have::clean_header(geometry, &none.bits, false), 0))
            .map_err(StoreError::io("write", &have_path))?;
        written.push(have.clone());
        let device_path = directory.join(DEVICE);
        let device = match incoming {
            Some(incoming) => incoming.device().clone(),
            None => backend.open(&device_path, true).map_err(StoreError::io("create", &device_path))?,
        };
        device.set_len(geometry.device_size()).map_err(StoreError::io("size", &device_path))?;
        backend.sync_all(&written, &[directory]).map_err(StoreError::io("sync", directory))?;

        let kept = incoming.map(IncomingStore::wire).filter(|wire| wire.chunk_log2() == geometry.chunk_log2());
        let wire = match kept {
            Some(wire) => wire.clone(),
            None => WireStore::open(site.clone(), directory, geometry.chunk_log2()),
        };
        let beginning = Beginning {
            directory: directory.to_owned(),
            number,
            header,
            signature: parts.signature.clone(),
            digests,
            device,
            wire,
            have,
            state: none,
            pins: BTreeSet::new(),
            failures: Failures::default(),
            quarantined: None,
        };
        let store = Self::begin(site, beginning);
        let is_in_device = incoming.is_some_and(IncomingStore::take_over);
        if incoming.is_some() {
            store.settle();
        }
        if let Some(incoming) = incoming
            && is_in_device
            && incoming.chunk_log2() == geometry.chunk_log2()
        {
            for (chunk, arrived) in incoming.arrived() {
                let index = ChunkIndex(chunk);
                if store.digests.get(index) == Some(arrived.digest) && geometry.chunk_len(index) == arrived.len {
                    store.note_written(chunk);
                }
            }
        }
        Ok(store)
    }

    /// Opens the layer in `directory`. With `distrust`, what its files say about the device has to be checked.
    pub(super) fn open(site: Arc<Site>, directory: &Path, distrust: bool) -> Result<Self, StoreError> {
        let backend = &*site.backend;
        let read = |name: &str, len_max: u64| {
            let path = directory.join(name);
            read_file(backend, &path, len_max).map_err(StoreError::io("read", &path))
        };
        let damaged = |name: &str, reason: String| StoreError::Damaged { path: directory.join(name), reason };
        let identity = read(IDENTITY, SMALL_FILE_MAX)?;
        let (number, index) = parse_identity(&identity)
            .ok_or_else(|| damaged(IDENTITY, "it does not name a number and an index".into()))?;
        let encoded = read(HEADER, HEADER_LEN as u64)?;
        let header = Header::parse(&encoded).map_err(|error| damaged(HEADER, error.to_string()))?;
        if header.digest() != index {
            return Err(damaged(HEADER, format!("it is not the index {index}")));
        }
        if directory.file_name().is_none_or(|name| name.as_encoded_bytes() != header.diff_id().hex().as_bytes()) {
            return Err(damaged(HEADER, format!("it is the index of {}", header.diff_id())));
        }
        let geometry = header.geometry();
        let signature = read(SIGNATURE, 1 << 20)?;
        let digests = read(Section::ChunkDigests.name(), header.section(Section::ChunkDigests).size)?;
        let digests = ChunkDigests::parse(&header, digests)?;

        let have_path = directory.join(HAVE);
        let have = backend.open(&have_path, true).map_err(StoreError::io("open", &have_path))?;
        let bytes = read_file(backend, &have_path, u64::MAX).map_err(StoreError::io("read", &have_path))?;
        let mut state = Have::parse(geometry, &bytes)
            .map_err(|NewerVersion(version)| StoreError::Newer { path: have_path.clone(), version })?;
        let device_path = directory.join(DEVICE);
        let device = backend.open(&device_path, true).map_err(StoreError::io("open", &device_path))?;
        let len = device.size().map_err(StoreError::io("open", &device_path))?;
        if distrust || len != geometry.device_size() {
            state.clean = false;
            state.proven = false;
            device.set_len(geometry.device_size()).map_err(StoreError::io("size", &device_path))?;
            // The doubt has to survive this process.
            have.write_at(&Have::dirty_header(geometry), 0).map_err(StoreError::io("write", &have_path))?;
        }
        let quarantined = match read(QUARANTINED, 1 << 16) {
            Ok(reason) => Some(String::from_utf8_lossy(&reason).trim_end().to_owned()),
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(error.to_string()),
        };
        let is_clean = state.clean;
        let beginning = Beginning {
            directory: directory.to_owned(),
            number,
            header,
            signature,
            digests,
            device,
            wire: WireStore::open(site.clone(), directory, geometry.chunk_log2()),
            have,
            state,
            pins: read_pins(backend, directory, &site.boot_id),
            failures: Failures::open(backend, directory, geometry.chunk_count()),
            quarantined,
        };
        let store = Self::begin(site.clone(), beginning);
        if store.is_pinned() {
            store.site.room.note_pinned(geometry.device_size(), true);
        }
        store.free_forgotten(is_clean)?;
        Ok(store)
    }

    fn begin(site: Arc<Site>, beginning: Beginning) -> Self {
        let Beginning { directory, number, header, signature, digests, device, .. } = beginning;
        let Beginning { wire, have, state, pins, failures, quarantined, .. } = beginning;
        let chunks = header.geometry().chunk_count();
        let (here, suspect) = (Bitmap::new(chunks), Bitmap::new(chunks));
        for chunk in (0..chunks).filter(|chunk| bit(&state.bits, *chunk)) {
            here.set(chunk);
            if !state.clean {
                suspect.set(chunk);
            }
        }
        Self {
            site,
            directory,
            number,
            header,
            signature,
            digests,
            device,
            wire,
            have,
            here,
            suspect,
            unsynced: Mutex::default(),
            on_disk: Mutex::new(OnDisk { bits: state.bits, clean: state.clean }),
            unstored: Mutex::default(),
            unstored_len: AtomicUsize::new(0),
            writes: RwLock::default(),
            losses: AtomicU64::new(0),
            uses: Uses::new(chunks),
            leaving: Bitmap::new(units(chunks)),
            pins: Mutex::new(pins),
            charged: AtomicU64::new(0),
            proven: AtomicBool::new(state.proven),
            is_shared: AtomicBool::new(false),
            is_quarantined: AtomicBool::new(quarantined.is_some()),
            quarantined: Mutex::new(quarantined),
            noted: Mutex::new(failures.cause()),
            failures,
            faults: Faults::default(),
            is_gone: Mutex::new(false),
        }
    }

    pub(super) fn moved_to(&mut self, directory: &Path) {
        self.wire.moved_to(directory);
        self.directory = directory.to_owned();
    }

    /// The layer is about to be removed or replaced: whoever still has this writes no files by their names any more. Blocks for one
    /// that is being written.
    pub(crate) fn leave(&self) {
        *self.is_gone.lock() = true;
        self.wire.leave();
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    pub(crate) fn signature(&self) -> &[u8] {
        &self.signature
    }

    pub(crate) fn digests(&self) -> &ChunkDigests {
        &self.digests
    }

    pub(crate) fn room(&self) -> &Arc<Room> {
        &self.site.room
    }

    /// The wire forms of chunks.
    pub(crate) fn wire(&self) -> &WireStore {
        &self.wire
    }

    /// Keeps the wire form of a chunk that is here, where there is room to spare.
    pub(crate) fn keep(&self, chunk: ChunkIndex, frame: Frame<'_>) {
        if self.here.get(chunk.0)
            && let Some(digest) = self.digests.get(chunk)
        {
            self.wire.keep(chunk, &digest, frame);
        }
    }

    /// Other nodes ask for chunks: until the layer is proven, what came stays in the page cache, where they find it.
    pub(crate) fn note_shared(&self) {
        self.is_shared.store(true, Ordering::Relaxed);
    }

    /// Appends the wire form of a chunk as it came, where it was kept.
    pub(crate) fn read_frame(&self, chunk: ChunkIndex, out: &mut Vec<u8>) -> bool {
        self.digests.get(chunk).is_some_and(|digest| self.wire.read(chunk, &digest, out))
    }

    pub(crate) fn faults(&self) -> &Faults {
        &self.faults
    }

    pub(crate) fn device_path(&self) -> PathBuf {
        self.directory.join(DEVICE)
    }

    /// The bytes of a section, compared with the header; `None` where it is not here.
    pub(crate) fn section(&self, section: Section) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.directory.join(section.name());
        match read_file(&*self.site.backend, &path, self.header.section(section).size) {
            Ok(bytes) => {
                check_section(&self.header, section, &bytes)?;
                Ok(Some(bytes))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io("read", &path)(error)),
        }
    }

    /// Stores a section that was not here.
    pub(crate) fn put_section(&self, section: Section, bytes: &[u8]) -> Result<(), StoreError> {
        check_section(&self.header, section, bytes)?;
        self.replace(section.name(), Some(bytes))
    }

    /// Whether `chunk` can be read. A suspect one seems so until it is read, and then compared with its digest.
    pub(crate) fn is_here(&self, chunk: u32) -> bool {
        self.here.get(chunk) || self.is_unstored(chunk)
    }

    /// Whether every chunk is on the device, suspect ones included.
    pub(crate) fn is_complete(&self) -> bool {
        self.here.next(0, false).is_none()
    }

    /// Whether the whole device was compared with its diffID and nothing happened to it since.
    pub(crate) fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Acquire)
    }

    /// Why nothing of the layer can be believed, if so.
    pub(crate) fn quarantined(&self) -> Option<String> {
        self.quarantined.lock().clone()
    }

    /// Whether nothing of the layer can be believed.
    pub(crate) fn is_quarantined(&self) -> bool {
        self.is_quarantined.load(Ordering::Acquire)
    }

    /// Why the layer is not as it should be although its right chunks can be read, if so.
    pub(crate) fn failing(&self) -> Option<Cause> {
        self.failures.cause()
    }

    /// A seeder or a registry gave something else for `chunk`.
    pub(crate) fn note_wrong(&self, chunk: u32) {
        self.failures.note_wrong(chunk);
    }

    /// `chunk` came right.
    pub(crate) fn note_right(&self, chunk: u32) {
        self.failures.note_right(chunk);
    }

    /// Compares the chunk because of which the layer fails with its digest, if it is here; gives whether it is.
    pub(crate) fn look_again(&self, cause: Cause) -> bool {
        let chunk = cause.chunk();
        let is_here = self.here.get(chunk) && self.check(chunk);
        if is_here {
            self.failures.note_sound(chunk);
            self.failures.note_right(chunk);
        }
        is_here
    }

    /// What follows from the failures so far; `None`: nothing new. The next flush makes it durable.
    pub(crate) fn judge(&self) -> Option<Change> {
        self.failures.judge()
    }

    /// Bytes of the chunks that are here.
    pub(crate) fn bytes_here(&self) -> u64 {
        let geometry = self.geometry();
        let full = u64::from(self.here.count()) * geometry.chunk_size();
        match geometry.chunk_count().checked_sub(1) {
            Some(last) if self.here.get(last) => {
                full - geometry.chunk_size() + geometry.chunk_len(ChunkIndex(last)) as u64
            }
            _ => full,
        }
    }

    /// The first run of missing chunks from `from` on.
    pub(crate) fn next_missing(&self, from: u32) -> Option<Range<u32>> {
        self.here.next_gap(from)
    }

    /// How many chunks of `run` are on the device, suspect ones included.
    pub(crate) fn count_here(&self, run: Range<u32>) -> u32 {
        run.map(|chunk| u32::from(self.here.get(chunk))).sum()
    }

    /// Bytes that the device takes on the disk, as of the last look.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.charged.load(Ordering::Relaxed)
    }

    /// Reads `range`, which must lie in the device, in place of what `out` has. `held` are chunks that the reader has in memory.
    /// `false`: not all of it is here.
    pub(crate) fn read(&self, range: &Range<u64>, held: &[Held], out: &mut Vec<u8>) -> bool {
        let chunks = self.geometry().covering(range.clone());
        loop {
            // Looked at before the bits and again after the bytes: a chunk that was taken away between is not one.
            let losses = self.losses.load(Ordering::SeqCst);
            let is_believed = chunks.clone().all(|chunk| self.here.get(chunk) && !self.is_doubted(chunk));
            if !is_believed && !chunks.clone().all(|chunk| self.is_here(chunk) || has(held, chunk)) {
                return false;
            }
            out.clear();
            out.resize((range.end - range.start) as usize, 0);
            let read = if is_believed {
                self.read_device(out, range.start)
            } else {
                // Each of them also after one failed, so that all that are wrong are fetched at once.
                let mut plain = Vec::new();
                let parts = chunks.clone().map(|chunk| self.read_chunk_part(chunk, range, held, &mut plain, out));
                parts.fold(Ok(()), io::Result::and)
            };
            fence(Ordering::SeqCst);
            if self.losses.load(Ordering::SeqCst) != losses {
                continue;
            }
            match read {
                Ok(()) => {
                    self.uses.note(&chunks, self.site.room.now());
                    return true;
                }
                // It was in memory, and is not any more; or it was compared, and was wrong.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
                Err(error) => {
                    tracing::warn!(path = %self.device_path().display(), %error, "cannot read chunks {chunks:?}: fetching them again");
                    for chunk in chunks {
                        if self.drop_chunk(chunk) {
                            self.failures.note_damaged(chunk);
                        }
                    }
                    return false;
                }
            }
        }
    }

    /// Takes a chunk whose digest was checked.
    pub(crate) fn add(&self, chunk: u32, plain: &[u8]) -> Added {
        if self.here.get(chunk) && !self.suspect.get(chunk) {
            return Added::Known;
        }
        let range = self.geometry().range(ChunkIndex(chunk));
        let room = &self.site.room;
        let refused = {
            let _writing = self.writes.read();
            // Also for one that is here and suspect: a crash may have made a hole of it. The next flush settles.
            let bytes = on_disk(plain.len());
            if self.leaving.get(unit_of(chunk)) {
                room.ask();
                Unstored::NoRoom
            } else if !room.take(bytes) {
                Unstored::NoRoom
            } else {
                match self.device.write_at(plain, range.start) {
                    Ok(()) => {
                        self.charged.fetch_add(bytes, Ordering::Relaxed);
                        self.uses.note(&(chunk..chunk + 1), room.now());
                        self.note_written(chunk);
                        room.note_success();
                        self.forget_unstored();
                        return Added::Written;
                    }
                    Err(error) => {
                        room.give_back(bytes);
                        if room.note_failure(&error) { Unstored::NoRoom } else { Unstored::Disk(error) }
                    }
                }
            }
        };
        self.faults.unstored.fetch_add(1, Ordering::Relaxed);
        let place = room.in_memory(plain.len());
        let held = place.map(|place| Held { chunk, plain: Bytes::copy_from_slice(plain), _place: Arc::new(place) });
        let mut unstored = self.unstored.lock();
        unstored.retain(|other| other.chunk != chunk);
        unstored.extend(held.clone());
        if unstored.len() > UNSTORED_MAX || held.is_none() {
            unstored.pop_front();
        }
        self.unstored_len.store(unstored.len(), Ordering::Release);
        Added::Unstored(refused, held)
    }

    /// Whether [`LayerStore::flush`] has something to do.
    pub(crate) fn needs_flush(&self) -> bool {
        let unsynced = self.unsynced.lock();
        !unsynced.written.is_empty() || !unsynced.dropped.is_empty()
    }

    /// Makes what is here durable: first the chunks, then the bits.
    pub(crate) fn flush(&self) -> Result<(), StoreError> {
        let flushed = self.flush_locked(&mut self.on_disk.lock());
        self.settle();
        self.wire.settle();
        flushed.and_then(|()| self.note_cause())
    }

    /// Ends cleanly: after this the bits are believed without a check, unless some still wait for one.
    pub(crate) fn close(&self) -> Result<(), StoreError> {
        self.note_cause()?;
        let mut on_disk = self.on_disk.lock();
        self.flush_locked(&mut on_disk)?;
        if on_disk.clean || self.suspect.next(0, true).is_some() {
            return Ok(());
        }
        self.write_clean(&mut on_disk)
    }

    /// Compares a complete device with its diffID, unless that was done already. Takes about a second for a GB; ends
    /// early, as incomplete, when `stop` says so.
    pub(crate) fn prove(&self, stop: &dyn Fn() -> bool) -> Result<Proof, StoreError> {
        if self.is_proven() {
            return Ok(Proof::Proven);
        }
        self.flush()?;
        if !self.is_complete() {
            return Ok(Proof::Incomplete);
        }
        let losses = self.losses.load(Ordering::SeqCst);
        let hashed = self.hash_device(stop);
        let mut on_disk = self.on_disk.lock();
        // A chunk that was taken away and written again meanwhile is not what was hashed.
        if stop() || self.losses.load(Ordering::SeqCst) != losses || self.needs_flush() || !self.is_complete() {
            return Ok(Proof::Incomplete);
        }
        if hashed.is_ok_and(|digest| digest == self.header.diff_id()) {
            {
                // Alone, so that nothing is taken away between the look and the mark.
                let _alone = self.writes.write();
                if self.losses.load(Ordering::SeqCst) != losses {
                    return Ok(Proof::Incomplete);
                }
                for chunk in self.geometry().chunks() {
                    self.suspect.clear(chunk);
                }
                self.proven.store(true, Ordering::Release);
            }
            self.write_clean(&mut on_disk)?;
            if self.is_shared.load(Ordering::Relaxed) {
                self.device.give_pages_back(0..self.header.device_size());
            }
            return Ok(Proof::Proven);
        }
        // Is it the disk or the index?
        let rotten = self.geometry().chunks().filter(|chunk| !self.check(*chunk)).count() as u32;
        self.flush_locked(&mut on_disk)?;
        if rotten == 0 && self.losses.load(Ordering::SeqCst) != losses {
            return Ok(Proof::Incomplete);
        }
        if rotten > 0 {
            return Ok(Proof::Rotten(rotten));
        }
        drop(on_disk);
        let reason = format!("its device is not {}: whoever signed its index is wrong or lies", self.header.diff_id());
        self.quarantine(&reason)?;
        Ok(Proof::Quarantined)
    }

    /// The layer must not be used any more, and nothing of it counts as here.
    pub(crate) fn quarantine(&self, reason: &str) -> Result<(), StoreError> {
        *self.quarantined.lock() = Some(reason.to_owned());
        self.is_quarantined.store(true, Ordering::Release);
        self.proven.store(false, Ordering::Release);
        self.replace(QUARANTINED, Some(reason.as_bytes()))?;
        for chunk in self.geometry().chunks() {
            self.drop_chunk(chunk);
        }
        self.wire.clear();
        self.flush()?;
        self.evict(&(0..units(self.geometry().chunk_count())).collect::<Vec<_>>()).map(drop)
    }

    /// Whether there was no room for a chunk that came lately.
    pub(crate) fn has_unstored(&self) -> bool {
        !self.unstored.lock().is_empty()
    }

    /// Whether a chunk on the device is to be compared with its digest whenever it is read: after a crash once, on a disk that damages
    /// chunks always.
    fn is_doubted(&self, chunk: u32) -> bool {
        self.suspect.get(chunk) || self.failures.is_damaged()
    }

    /// Compares a chunk on the device with its digest and drops it when it is wrong.
    fn check(&self, chunk: u32) -> bool {
        self.scrub(chunk) == Some(true)
    }

    /// The same; `None`: it is not here. Blocks for the disk.
    pub(crate) fn scrub(&self, chunk: u32) -> Option<bool> {
        self.read_compared(chunk, &mut Vec::new())
    }

    /// The same; the chunk is read in place of what `plain` has.
    fn read_compared(&self, chunk: u32, plain: &mut Vec<u8>) -> Option<bool> {
        plain.resize(self.geometry().chunk_len(ChunkIndex(chunk)), 0);
        let start = self.geometry().range(ChunkIndex(chunk)).start;
        loop {
            let losses = self.losses.load(Ordering::SeqCst);
            if !self.here.get(chunk) {
                return None;
            }
            let read = self.device.read_once_at(plain, start);
            fence(Ordering::SeqCst);
            if self.losses.load(Ordering::SeqCst) != losses {
                continue;
            }
            if read.is_ok() && self.digests.is_chunk(ChunkIndex(chunk), plain) {
                self.suspect.clear(chunk);
                return Some(true);
            }
            // Of several who read it at once one notes it.
            if self.drop_chunk(chunk) {
                self.failures.note_damaged(chunk);
            }
            return Some(false);
        }
    }

    /// Gives whether it was here.
    fn drop_chunk(&self, chunk: u32) -> bool {
        // Under the lock, so that a flush cannot miss the bit between the two.
        let mut unsynced = self.unsynced.lock();
        let was_here = self.here.clear(chunk);
        if was_here {
            self.suspect.clear(chunk);
            self.proven.store(false, Ordering::Release);
            self.losses.fetch_add(1, Ordering::SeqCst);
            self.faults.rotten.fetch_add(1, Ordering::Relaxed);
            unsynced.dropped.push(chunk);
        }
        was_here
    }

    fn note_written(&self, chunk: u32) {
        let mut unsynced = self.unsynced.lock();
        self.here.set(chunk);
        self.suspect.clear(chunk);
        unsynced.written.push(chunk);
    }

    fn is_unstored(&self, chunk: u32) -> bool {
        self.unstored_len.load(Ordering::Acquire) > 0 && has(self.unstored.lock().make_contiguous(), chunk)
    }

    /// The disk takes chunks again: the memory is free for others.
    fn forget_unstored(&self) {
        if self.unstored_len.load(Ordering::Acquire) > 0 {
            self.unstored.lock().clear();
            self.unstored_len.store(0, Ordering::Release);
        }
    }

    /// Copies the bytes of `chunk` that lie in `range` to their place in `out`; `room` is for a chunk that has to be compared first.
    /// Not found: it is in memory no more, or was wrong.
    fn read_chunk_part(
        &self,
        chunk: u32,
        range: &Range<u64>,
        held: &[Held],
        room: &mut Vec<u8>,
        out: &mut [u8],
    ) -> io::Result<()> {
        let place = self.geometry().range(ChunkIndex(chunk));
        let part = place.start.max(range.start)..place.end.min(range.end);
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let out = out.get_mut((part.start - range.start) as usize..(part.end - range.start) as usize);
        let out = out.ok_or_else(missing)?;
        let from = (part.start - place.start) as usize..(part.end - place.start) as usize;
        if self.here.get(chunk) {
            if !self.is_doubted(chunk) {
                return self.read_device(out, part.start);
            }
            // What was compared is what is given: the disk may give something else the next time.
            if self.read_compared(chunk, room) == Some(true) {
                out.copy_from_slice(room.get(from).ok_or_else(missing)?);
                return Ok(());
            }
        }
        let kept = |among: &[Held]| among.iter().find(|held| held.chunk == chunk).map(|held| held.plain.clone());
        let plain = kept(held).or_else(|| kept(self.unstored.lock().make_contiguous())).ok_or_else(missing)?;
        out.copy_from_slice(plain.get(from).ok_or_else(missing)?);
        Ok(())
    }

    fn read_device(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        if self.keeps_pages() { self.device.read_at(out, offset) } else { self.device.read_once_at(out, offset) }
    }

    /// Whether what came stays in the page cache.
    fn keeps_pages(&self) -> bool {
        self.is_shared.load(Ordering::Relaxed) && !self.is_proven()
    }

    fn flush_locked(&self, on_disk: &mut OnDisk) -> Result<(), StoreError> {
        let taken = std::mem::take(&mut *self.unsynced.lock());
        if taken.written.is_empty() && taken.dropped.is_empty() {
            return Ok(());
        }
        if !taken.written.is_empty()
            && let Err(error) = self.device.sync()
        {
            // After a failed sync the kernel may have dropped the pages, so the chunks have to come again; also those whose writer had
            // not noted them yet when they were taken. The next sync would say that all is well.
            let _alone = self.writes.write();
            let late = std::mem::take(&mut self.unsynced.lock().written);
            for chunk in taken.written.iter().chain(&late) {
                self.drop_chunk(*chunk);
            }
            self.unsynced.lock().dropped.extend(taken.dropped);
            return Err(StoreError::io("sync", &self.device_path())(error));
        }
        if let Err(error) = self.write_bits(on_disk, &taken) {
            // Only the bits are late. They are tried again with the next flush.
            let mut unsynced = self.unsynced.lock();
            unsynced.written.extend(taken.written);
            unsynced.dropped.extend(taken.dropped);
            return Err(error);
        }
        // Those who just heard of them are about to ask for them; the proof reads them once more, and gives them back.
        let keeps_pages = self.keeps_pages();
        for run in runs(taken.written).into_iter().filter(|_| !keeps_pages) {
            let geometry = self.geometry();
            let start = geometry.range(ChunkIndex(run.start)).start;
            self.device.give_pages_back(start..geometry.range(ChunkIndex(run.end)).start);
        }
        Ok(())
    }

    fn write_bits(&self, on_disk: &mut OnDisk, changes: &Unsynced) -> Result<(), StoreError> {
        let failed = || StoreError::io("write", &self.directory.join(HAVE));
        if on_disk.clean {
            self.have.write_at(&Have::dirty_header(self.geometry()), 0).map_err(failed())?;
            on_disk.clean = false;
        }
        let mut touched: Option<Range<usize>> = None;
        // A chunk may be in both: dropped and written again, or written and dropped again.
        let written = changes.written.iter().map(|chunk| (*chunk, self.here.get(*chunk)));
        for (chunk, is_here) in changes.dropped.iter().map(|chunk| (*chunk, false)).chain(written) {
            let at = chunk as usize / 8;
            let Some(byte) = on_disk.bits.get_mut(at) else { continue };
            let mask = 1 << (chunk % 8);
            *byte = if is_here { *byte | mask } else { *byte & !mask };
            touched = Some(touched.map_or(at..at + 1, |range| range.start.min(at)..range.end.max(at + 1)));
        }
        let Some(touched) = touched else { return Ok(()) };
        let bytes = on_disk.bits.get(touched.clone()).unwrap_or_default();
        self.have.write_at(bytes, BITS_OFFSET + touched.start as u64).map_err(failed())
    }

    fn write_clean(&self, on_disk: &mut OnDisk) -> Result<(), StoreError> {
        let header = Have::clean_header(self.geometry(), &on_disk.bits, self.is_proven());
        self.have
            .write_at(&on_disk.bits, BITS_OFFSET)
            .and_then(|()| self.have.sync())
            .and_then(|()| self.have.write_at(&header, 0))
            .and_then(|()| self.have.sync())
            .map_err(StoreError::io("write", &self.directory.join(HAVE)))?;
        on_disk.clean = true;
        Ok(())
    }

    fn hash_device(&self, stop: &dyn Fn() -> bool) -> io::Result<Digest> {
        let mut hash = Sha256::new();
        let size = self.geometry().device_size();
        let mut buffer = vec![0; PROVE_READ.min(size) as usize];
        let mut at = 0;
        while at < size && !stop() {
            let part = buffer.get_mut(..(size - at).min(PROVE_READ) as usize).unwrap_or_default();
            self.device.read_once_at(part, at)?;
            hash.update(&*part);
            at += part.len() as u64;
        }
        Ok(Digest::from_bytes(hash.finalize().into()))
    }

    /// Makes durable why the layer fails, or that it does not any more.
    fn note_cause(&self) -> Result<(), StoreError> {
        let mut noted = self.noted.lock();
        let cause = self.failures.cause();
        if *noted != cause {
            self.replace(FAILING, cause.map(Cause::encode).as_ref().map(String::as_bytes))?;
            *noted = cause;
        }
        Ok(())
    }

    /// Replaces the file `name`, durably; without bytes it is removed. Nothing happens once the layer is [gone](Self::leave).
    fn replace(&self, name: &str, bytes: Option<&[u8]>) -> Result<(), StoreError> {
        let is_gone = self.is_gone.lock();
        if *is_gone {
            return Ok(());
        }
        let (backend, path) = (&*self.site.backend, self.directory.join(name));
        let replaced = match bytes {
            Some(bytes) => replace_file(backend, &self.directory, name, bytes),
            None => backend.remove(&path).and_then(|()| backend.sync_directory(&self.directory)),
        };
        replaced.map_err(StoreError::io("write", &path))
    }

    fn geometry(&self) -> Geometry {
        self.header.geometry()
    }
}

/// Bytes that a chunk of `len` bytes takes: file systems give out blocks.
fn on_disk(len: usize) -> u64 {
    (len as u64).next_multiple_of(4096)
}

fn has(held: &[Held], chunk: u32) -> bool {
    held.iter().any(|held| held.chunk == chunk)
}

fn bit(bits: &[u8], chunk: u32) -> bool {
    bits.get(chunk as usize / 8).is_some_and(|byte| byte & (1 << (chunk % 8)) != 0)
}

/// The runs that chunks in any order make.
fn runs(mut chunks: Vec<u32>) -> Vec<Range<u32>> {
    chunks.sort_unstable();
    let mut runs: Vec<Range<u32>> = Vec::new();
    for chunk in chunks {
        match runs.last_mut() {
            Some(run) if chunk <= run.end => run.end = run.end.max(chunk + 1),
            _ => runs.push(chunk..chunk + 1),
        }
    }
    runs
}

fn parse_identity(bytes: &[u8]) -> Option<(u64, Digest)> {
    let (number, index) = std::str::from_utf8(bytes).ok()?.strip_prefix("number ")?.split_once("\nindex ")?;
    Some((number.parse().ok()?, index.strip_suffix('\n')?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_runs() {
        assert_eq!(runs(vec![5, 1, 2, 9, 6, 2]), [1..3, 5..7, 9..10]);
        assert_eq!(runs(vec![]), []);
    }

    #[test]
    fn identity_is_strict() {
        let digest = Digest::of(b"x");
        assert_eq!(parse_identity(format!("number 7\nindex {digest}\n").as_bytes()), Some((7, digest)));
        assert_eq!(parse_identity(format!("number 7\nindex {digest}").as_bytes()), None);
        assert_eq!(parse_identity(b""), None);
    }
}
