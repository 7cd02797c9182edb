//! A layer that was ingested: its index, its blob, and the wire forms of its chunks.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use layer::ChunkIndex;
use layer::index::{Header, Section};
use parking_lot::RwLock;

use super::Shared;
use super::frames::Frames;
use super::refill::{Made, Refills};
use super::store::Store;
use crate::security::Signed;

/// A known layer.
#[derive(Debug)]
pub struct Known {
    header: Header,
    signed: RwLock<Arc<Signed>>,
    frames: Arc<Frames>,
    blob_path: PathBuf,
    section_paths: [PathBuf; 3],
    refills: Refills,
}

impl Known {
    pub(super) fn new(store: &Store, header: Header, signed: Signed, frames: Arc<Frames>) -> Self {
        let blob = header.blob();
        Self {
            blob_path: store.blob_path(blob),
            section_paths: Section::ALL.map(|section| store.section_path(blob, section)),
            header,
            signed: RwLock::new(Arc::new(signed)),
            frames,
            refills: Refills::default(),
        }
    }

    /// The index header.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The header's signature.
    pub fn signed(&self) -> Arc<Signed> {
        Arc::clone(&self.signed.read())
    }

    pub(crate) fn sign_again(&self, signed: Signed) {
        *self.signed.write() = Arc::new(signed);
    }

    /// The wire forms that are there.
    pub fn frames(&self) -> &Arc<Frames> {
        &self.frames
    }

    /// Opens a section; its size is in the header.
    pub(super) fn open_section(&self, section: Section) -> io::Result<File> {
        File::open(self.section_path(section))
    }

    /// How many passes over the blob run, or ended last.
    #[cfg(test)]
    pub(super) fn passes(&self) -> usize {
        self.refills.passes()
    }

    /// `count` pieces of the blob at places that nobody can foresee, and its last bytes. Blocks on the disk.
    pub(crate) fn samples(&self, count: usize, len: u64) -> io::Result<Vec<(u64, Vec<u8>)>> {
        let (file, size) = (File::open(&self.blob_path)?, self.header.blob_size());
        let last = size.saturating_sub(len);
        let mut random = vec![0; count * 8];
        aws_lc_rs::rand::fill(&mut random).map_err(|_| io::Error::other("there is no randomness"))?;
        let anywhere = random.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes) % (last + 1));
        let mut samples = Vec::new();
        for start in anywhere.chain([last]) {
            let mut bytes = vec![0; len.min(size) as usize];
            file.read_exact_at(&mut bytes, start)?;
            samples.push((start, bytes));
        }
        Ok(samples)
    }

    pub(super) fn blob_path(&self) -> &Path {
        &self.blob_path
    }

    pub(super) fn section_path(&self, section: Section) -> &PathBuf {
        let [entries, chunk_digests, spans] = &self.section_paths;
        match section {
            Section::Entries => entries,
            Section::ChunkDigests => chunk_digests,
            Section::Spans => spans,
        }
    }

    /// Makes the wire form of `chunk` again, and those that come before it on the way, unless it is there by now.
    pub(super) async fn refill(self: &Arc<Self>, chunk: ChunkIndex, shared: &Arc<Shared>) -> io::Result<Made> {
        if self.frames.has(chunk) {
            return Ok(Made::Now);
        }
        self.refills.make(self, chunk, shared).await
    }

    /// Whether `run` is one of this layer's, and not empty.
    pub(super) fn has_run(&self, run: &Range<u32>) -> bool {
        run.start < run.end && run.end <= self.header.geometry().chunk_count()
    }
}
