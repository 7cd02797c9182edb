//! The device as it comes out of the decoder: cut into chunks, hashed twice and scanned while it is in the cache.

use sha2::{Digest as _, Sha256};

use super::ChunkFn;
use crate::chunk::{ChunkDigest, ChunkIndex};
use crate::digest::Digest;
use crate::index::WINDOW_MAX;
use crate::tar::{Limits, Scanner, TarError};
use crate::tree::Tree;

/// Least bytes of chunks in the buffer. Chosen: they stay in a second-level cache between inflating and hashing.
const BUFFER_MIN: usize = 256 << 10;

/// Collects output into chunks. The buffer holds the last 32 KiB of earlier output in front of whole chunks.
pub(super) struct Device {
    /// [`WINDOW_MAX`] bytes of history, then room for chunks.
    buffer: Vec<u8>,
    /// Start of the chunk that is being filled.
    chunk_start: usize,
    /// End of the output in the buffer.
    end: usize,
    chunk_size: usize,
    len: u64,
    hash: Sha256,
    chunk_digests: Vec<u8>,
    next_chunk: u32,
    scanner: Scanner,
    tar_error: Option<TarError>,
}

/// What a device turned out to be.
pub(super) struct Parts {
    pub(super) size: u64,
    pub(super) diff_id: Digest,
    pub(super) chunk_digests: Vec<u8>,
    pub(super) tree: Result<Tree, TarError>,
}

impl Device {
    pub(super) fn new(chunk_size: usize, limits: Limits) -> Self {
        let chunks = BUFFER_MIN.div_ceil(chunk_size);
        Self {
            buffer: vec![0; WINDOW_MAX + chunks * chunk_size],
            chunk_start: WINDOW_MAX,
            end: WINDOW_MAX,
            chunk_size,
            len: 0,
            hash: Sha256::new(),
            chunk_digests: Vec::new(),
            next_chunk: 0,
            scanner: Scanner::new(limits),
            tar_error: None,
        }
    }

    /// Bytes so far.
    pub(super) const fn len(&self) -> u64 {
        self.len
    }

    /// What the scanner refused.
    pub(super) const fn tar_error(&self) -> Option<&TarError> {
        self.tar_error.as_ref()
    }

    /// Where to put the next output; never empty.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.end == self.buffer.len() {
            self.buffer.copy_within(self.end - WINDOW_MAX.., 0);
            self.chunk_start = WINDOW_MAX;
            self.end = WINDOW_MAX;
        }
        self.buffer.get_mut(self.end..).unwrap_or_default()
    }

    /// `produced` bytes were put into [`Device::room`].
    pub(super) fn filled(&mut self, produced: usize, sink: &mut ChunkFn<'_>) {
        self.end = (self.end + produced).min(self.buffer.len());
        self.len += produced as u64;
        while self.end - self.chunk_start >= self.chunk_size {
            self.emit(self.chunk_start + self.chunk_size, sink);
        }
    }

    /// The last `len` bytes, at most [`WINDOW_MAX`] and no more than there were.
    pub(super) fn last(&self, len: usize) -> &[u8] {
        self.buffer.get(self.end.saturating_sub(len)..self.end).unwrap_or_default()
    }

    /// No more output comes.
    pub(super) fn finish(mut self, sink: &mut ChunkFn<'_>) -> Parts {
        if self.end > self.chunk_start {
            self.emit(self.end, sink);
        }
        Parts {
            size: self.len,
            diff_id: Digest::from_bytes(self.hash.finalize().into()),
            chunk_digests: self.chunk_digests,
            tree: match self.tar_error {
                Some(error) => Err(error),
                None => self.scanner.finish(),
            },
        }
    }

    fn emit(&mut self, chunk_end: usize, sink: &mut ChunkFn<'_>) {
        let chunk = self.buffer.get(self.chunk_start..chunk_end).unwrap_or_default();
        self.hash.update(chunk);
        let digest = ChunkDigest::of(chunk);
        self.chunk_digests.extend_from_slice(&digest.0);
        if self.tar_error.is_none() {
            self.tar_error = self.scanner.push(chunk).err();
        }
        sink(ChunkIndex(self.next_chunk), chunk, digest);
        self.next_chunk = self.next_chunk.saturating_add(1);
        self.chunk_start = chunk_end;
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("len", &self.len).finish_non_exhaustive()
    }
}
