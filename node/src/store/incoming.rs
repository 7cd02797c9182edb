//! A device that arrives while its index is not known.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ::layer::chunk::CHUNK_LOG2_RANGE;
use ::layer::wire::Frame;
use ::layer::{ChunkDigest, ChunkIndex};
use parking_lot::Mutex;

use super::backend::{File, is_full};
use super::wire::WireStore;
use super::{Site, StoreError, layer::DEVICE};

/// Chunks and their digests. Nothing is believed of them: only those that turn out to be in the index are used.
#[derive(Debug)]
pub(crate) struct IncomingStore {
    site: Arc<Site>,
    directory: PathBuf,
    device: Arc<dyn File>,
    wire: Arc<WireStore>,
    chunk_log2: u8,
    chunks: Mutex<BTreeMap<u32, Arrived>>,
    /// What is taken of the room for the device.
    charged: AtomicU64,
    standing: Mutex<Standing>,
}

#[derive(Debug, Default)]
struct Standing {
    /// A sync failed. The kernel tells of that once, and what it did not write looks right until memory is short.
    is_lost: bool,
    /// A layer syncs the device from here on.
    is_taken: bool,
}

impl Drop for IncomingStore {
    fn drop(&mut self) {
        // Where it became a layer, nothing has this name any more. What cannot be removed now is removed when the store is
        // opened next.
        let _ = self.site.backend.remove(&self.directory);
        self.hand_over();
    }
}

/// A chunk as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrived {
    pub(crate) digest: ChunkDigest,
    pub(crate) len: usize,
}

impl IncomingStore {
    pub(super) fn create(site: Arc<Site>, directory: &Path, chunk_log2: u8) -> Result<Self, StoreError> {
        let path = directory.join(DEVICE);
        if !CHUNK_LOG2_RANGE.contains(&chunk_log2) {
            let source = io::Error::new(io::ErrorKind::InvalidInput, format!("chunk size 2^{chunk_log2}"));
            return Err(StoreError::Io { action: "cut", path, source });
        }
        let device = site.backend.open(&path, true).map_err(StoreError::io("create", &path))?;
        let wire = WireStore::open(site.clone(), directory, chunk_log2);
        let (chunks, charged) = (Mutex::default(), AtomicU64::new(0));
        let standing = Mutex::default();
        Ok(Self { site, directory: directory.to_owned(), device, wire, chunk_log2, chunks, charged, standing })
    }

    /// Writes a chunk. All but the last chunk of a device have the full size; which is the last shows only later.
    /// Waits a little where there is no room.
    pub(crate) fn write(&self, chunk: ChunkIndex, plain: &[u8]) -> io::Result<()> {
        match self.write_now(chunk, plain) {
            Err(error) if is_full(&error) && self.site.room.wait_for(plain.len() as u64) => {
                self.write_now(chunk, plain)
            }
            written => written,
        }
    }

    /// The same without waiting.
    pub(crate) fn write_now(&self, chunk: ChunkIndex, plain: &[u8]) -> io::Result<()> {
        if plain.is_empty() || plain.len() > 1 << self.chunk_log2 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a chunk of {} bytes", plain.len())));
        }
        let arrived = Arrived { digest: ChunkDigest::of(plain), len: plain.len() };
        // A chunk that comes twice must not be readable as the first one while it is overwritten.
        if self.chunks.lock().get(&chunk.0) == Some(&arrived) {
            return Ok(());
        }
        let room = &self.site.room;
        let is_new = self.chunks.lock().remove(&chunk.0).is_none();
        let bytes = if is_new { (plain.len() as u64).next_multiple_of(4096) } else { 0 };
        if bytes > 0 && !room.take(bytes) {
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "there is no room in the cache"));
        }
        if let Err(error) = self.device.write_at(plain, u64::from(chunk.0) << self.chunk_log2) {
            room.give_back(bytes);
            room.note_failure(&error);
            return Err(error);
        }
        self.charged.fetch_add(bytes, Ordering::Relaxed);
        self.chunks.lock().insert(chunk.0, arrived);
        Ok(())
    }

    /// Keeps the wire form of a chunk that was written, where there is room to spare.
    pub(crate) fn keep(&self, chunk: ChunkIndex, frame: Frame<'_>) {
        let arrived = self.chunks.lock().get(&chunk.0).copied();
        if let Some(arrived) = arrived {
            self.wire.keep(chunk, &arrived.digest, frame);
        }
    }

    /// The device is charged to somebody else from here on, or gone.
    pub(super) fn hand_over(&self) {
        self.site.room.give_back(self.charged.swap(0, Ordering::Relaxed));
    }

    /// Writes back, so that little is left to do once the layer is complete. After a failure nothing that came counts.
    pub(crate) fn sync(&self) {
        let mut standing = self.standing.lock();
        if !standing.is_taken && self.device.sync().is_err() {
            standing.is_lost = true;
        }
    }

    /// A layer takes the device over; gives whether what came is in it.
    pub(super) fn take_over(&self) -> bool {
        self.hand_over();
        let mut standing = self.standing.lock();
        standing.is_taken = true;
        !standing.is_lost
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn device(&self) -> &Arc<dyn File> {
        &self.device
    }

    pub(crate) fn wire(&self) -> &Arc<WireStore> {
        &self.wire
    }

    pub(crate) fn chunk_log2(&self) -> u8 {
        self.chunk_log2
    }

    pub(crate) fn arrived(&self) -> BTreeMap<u32, Arrived> {
        self.chunks.lock().clone()
    }

    /// The digest of a chunk that arrived.
    pub(crate) fn digest(&self, chunk: u32) -> Option<ChunkDigest> {
        self.chunks.lock().get(&chunk).map(|arrived| arrived.digest)
    }

    /// The chunks from `chunk` on did not arrive.
    pub(crate) fn forget_from(&self, chunk: u32) {
        let forgotten = self.chunks.lock().split_off(&chunk);
        let bytes = forgotten.values().map(|arrived| (arrived.len as u64).next_multiple_of(4096)).sum();
        self.charged.fetch_sub(bytes, Ordering::Relaxed);
        self.site.room.give_back(bytes);
    }

    /// The bytes of a chunk, if they are those that arrived.
    pub(crate) fn read_checked(&self, chunk: u32) -> io::Result<Vec<u8>> {
        let arrived = self.chunks.lock().get(&chunk).copied();
        let arrived = arrived.ok_or_else(|| io::Error::other(format!("chunk {chunk} did not arrive")))?;
        let plain = self.read(chunk, arrived)?;
        match ChunkDigest::of(&plain) == arrived.digest {
            true => Ok(plain),
            false => Err(io::Error::new(io::ErrorKind::InvalidData, format!("chunk {chunk} is not what was written"))),
        }
    }

    /// The bytes of a chunk that arrived.
    pub(crate) fn read(&self, chunk: u32, arrived: Arrived) -> io::Result<Vec<u8>> {
        let mut plain = vec![0; arrived.len];
        self.device.read_at(&mut plain, u64::from(chunk) << self.chunk_log2)?;
        Ok(plain)
    }
}
