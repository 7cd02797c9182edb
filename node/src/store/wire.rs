//! The wire forms that a node received, kept so that others get them as they came (`docs/store.md`).
//!
//! Chunk `i`'s frame lies at `i` chunk sizes of a sparse file beside the device, followed by a check: the first bytes of
//! BLAKE3 over the frame and the digest of the chunk that it is the wire form of. A slot whose check does not hold is empty.
//! So nothing here has to be synced, torn writes are empty slots, and what came for other bytes than the index names is never
//! given.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ::layer::wire::{Frame, PREFIX_LEN};
use ::layer::{ChunkDigest, ChunkIndex};
use parking_lot::{Mutex, RwLock};

use super::Site;
use super::backend::File;

const WIRE: &str = "wire";
const CHECK_LEN: usize = 8;

/// The wire forms of one layer. All that fails here only costs bytes: chunks without one are given plain.
#[derive(Debug)]
pub(crate) struct WireStore {
    site: Arc<Site>,
    /// Where the file is; its directory moves. `None`: the layer is gone, and its directory another's.
    path: Mutex<Option<PathBuf>>,
    chunk_log2: u8,
    /// Alone while the file goes.
    file: RwLock<Option<Arc<dyn File>>>,
    /// What is taken of the room.
    charged: AtomicU64,
    /// When a frame was kept or given last.
    used: AtomicU32,
}

impl Drop for WireStore {
    fn drop(&mut self) {
        self.site.room.settle_spare(&self.charged, 0);
    }
}

impl WireStore {
    /// What lies in `directory`, if anything does.
    pub(super) fn open(site: Arc<Site>, directory: &Path, chunk_log2: u8) -> Arc<Self> {
        let path = directory.join(WIRE);
        let file = site.backend.open(&path, false).ok();
        let store = Self {
            site,
            path: Mutex::new(Some(path)),
            chunk_log2,
            file: RwLock::new(file),
            charged: AtomicU64::new(0),
            used: AtomicU32::new(0),
        };
        store.settle();
        Arc::new(store)
    }

    pub(super) fn moved_to(&self, directory: &Path) {
        *self.path.lock() = Some(directory.join(WIRE));
    }

    pub(super) fn leave(&self) {
        *self.path.lock() = None;
    }

    pub(super) const fn chunk_log2(&self) -> u8 {
        self.chunk_log2
    }

    /// Bytes taken on the disk.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.charged.load(Ordering::Relaxed)
    }

    /// When it was used last ([`Room::now`](super::Room::now)); 0: not since the store was opened.
    pub(crate) fn used(&self) -> u32 {
        self.used.load(Ordering::Relaxed)
    }

    /// Keeps the frame of the chunk with `digest`, if it is worth it and there is room to spare.
    pub(crate) fn keep(&self, chunk: ChunkIndex, digest: &ChunkDigest, frame: Frame<'_>) {
        let len = frame.wire_len() + CHECK_LEN;
        if matches!(frame, Frame::Plain(_)) || len > 1 << self.chunk_log2 {
            return;
        }
        let room = &self.site.room;
        let bytes = (len as u64).next_multiple_of(4096);
        if !room.take_spare(bytes) {
            return;
        }
        let mut slot = Vec::with_capacity(len);
        frame.write(&mut slot);
        slot.extend_from_slice(&check(&slot, digest));
        let kept = self.with_file(|file| {
            file.write_at(&slot, self.place(chunk))?;
            // One that was there already is charged twice until the account is settled.
            self.charged.fetch_add(bytes, Ordering::Relaxed);
            Ok(())
        });
        match kept {
            Ok(()) => self.used.store(room.now(), Ordering::Relaxed),
            Err(error) => {
                room.give_back_spare(bytes);
                room.note_failure(&error);
            }
        }
    }

    /// Appends the frame of the chunk with `digest`; `false`: it is not here, and `out` is as before.
    pub(crate) fn read(&self, chunk: ChunkIndex, digest: &ChunkDigest, out: &mut Vec<u8>) -> bool {
        let file = self.file.read();
        let Some(file) = &*file else { return false };
        let start = out.len();
        let is_here = self.read_slot(&**file, chunk, digest, out).is_some();
        if is_here {
            self.used.store(self.site.room.now(), Ordering::Relaxed);
        } else {
            out.truncate(start);
        }
        is_here
    }

    fn read_slot(&self, file: &dyn File, chunk: ChunkIndex, digest: &ChunkDigest, out: &mut Vec<u8>) -> Option<()> {
        let (start, place) = (out.len(), self.place(chunk));
        let mut prefix = [0; PREFIX_LEN];
        file.read_at(&mut prefix, place).ok()?;
        // Bit 31 is that of plain frames, which are not kept.
        let frame_len = (u32::from_le_bytes(prefix) as usize).checked_add(PREFIX_LEN)?;
        if frame_len == PREFIX_LEN || frame_len > (1 << self.chunk_log2) - CHECK_LEN {
            return None;
        }
        out.resize(start + frame_len + CHECK_LEN, 0);
        file.read_at(out.get_mut(start..)?, place).ok()?;
        let (frame, sum) = out.get(start..)?.split_at_checked(frame_len)?;
        let is_right = sum == check(frame, digest);
        out.truncate(start + frame_len);
        is_right.then_some(())
    }

    /// Takes all off the disk; gives the bytes freed.
    pub(crate) fn clear(&self) -> u64 {
        let mut place = self.file.write();
        if let Some(file) = place.take() {
            // Where one of both fails the file is found, and charged, when the layer is opened next.
            let _ = file.set_len(0);
            if let Some(path) = &*self.path.lock() {
                let _ = self.site.backend.remove(path);
            }
        }
        let before = self.charged.load(Ordering::Relaxed);
        self.site.room.settle_spare(&self.charged, 0);
        before
    }

    /// Charges what the file takes by now.
    pub(super) fn settle(&self) {
        // Alone, so that nothing is charged between the look and the correction.
        let file = self.file.write();
        if let Some(Ok(allocated)) = file.as_ref().map(|file| file.allocated()) {
            self.site.room.settle_spare(&self.charged, allocated);
        }
    }

    /// Works with the file, which is made where there is none.
    fn with_file(&self, work: impl FnOnce(&dyn File) -> std::io::Result<()>) -> std::io::Result<()> {
        {
            let file = self.file.read();
            if let Some(file) = &*file {
                return work(&**file);
            }
        }
        let mut place = self.file.write();
        let file = match place.take() {
            Some(file) => file,
            None => match &*self.path.lock() {
                Some(path) => self.site.backend.open(path, true)?,
                None => return Err(std::io::ErrorKind::NotFound.into()),
            },
        };
        work(&**place.insert(file))
    }

    fn place(&self, chunk: ChunkIndex) -> u64 {
        u64::from(chunk.0) << self.chunk_log2
    }
}

fn check(frame: &[u8], digest: &ChunkDigest) -> [u8; CHECK_LEN] {
    let mut hash = blake3::Hasher::new();
    hash.update(frame).update(&digest.0);
    let mut check = [0; CHECK_LEN];
    hash.finalize_xof().fill(&mut check);
    check
}

#[cfg(test)]
mod tests;
