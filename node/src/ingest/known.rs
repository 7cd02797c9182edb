//! A layer that was ingested: its index, its blob, and the wire forms of its chunks.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use layer::ChunkIndex;
use layer::index::{ChunkDigests, Header, Section, Spans};
use layer::span::SpanInflater;
use layer::wire::Encoder;
use tokio::sync::Semaphore;

use super::frames::Frames;
use super::store::Store;
use crate::cutter::Cutter;
use crate::security::Signed;

/// Bytes of the blob that are inflated at a time.
const READ_LEN: usize = 256 << 10;

/// A known layer.
#[derive(Debug)]
pub struct Known {
    header: Header,
    signed: Signed,
    frames: Arc<Frames>,
    blob_path: PathBuf,
    section_paths: [PathBuf; 3],
    /// Held while chunks are made again, so that two who miss the same span inflate it once.
    refill: tokio::sync::Mutex<Option<Arc<Refill>>>,
}

/// What chunks are made again with; loaded when the first is missing.
#[derive(Debug)]
struct Refill {
    digests: ChunkDigests,
    spans: Spans,
    blob: File,
}

impl Known {
    pub(super) fn new(store: &Store, header: Header, signed: Signed, frames: Arc<Frames>) -> Self {
        let blob = header.blob();
        Self {
            blob_path: store.blob_path(blob),
            section_paths: Section::ALL.map(|section| store.section_path(blob, section)),
            header,
            signed,
            frames,
            refill: tokio::sync::Mutex::default(),
        }
    }

    /// The index header.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The header's signature.
    pub const fn signed(&self) -> &Signed {
        &self.signed
    }

    /// The wire forms that are there.
    pub fn frames(&self) -> &Arc<Frames> {
        &self.frames
    }

    /// Opens a section; its size is in the header.
    pub(super) fn open_section(&self, section: Section) -> io::Result<File> {
        File::open(self.section_path(section))
    }

    fn section_path(&self, section: Section) -> &PathBuf {
        let [entries, chunk_digests, spans] = &self.section_paths;
        match section {
            Section::Entries => entries,
            Section::ChunkDigests => chunk_digests,
            Section::Spans => spans,
        }
    }

    /// Makes the wire forms of the spans that hold `chunk` again, unless it is there by now.
    pub(super) async fn refill(self: &Arc<Self>, chunk: ChunkIndex, permits: &Semaphore) -> io::Result<()> {
        let mut refill = self.refill.lock().await;
        if self.frames.has(chunk) {
            return Ok(());
        }
        let _permit = permits.acquire().await.map_err(io::Error::other)?;
        let (known, loaded) = (Arc::clone(self), refill.clone());
        let work = move || {
            let loaded = match loaded {
                Some(loaded) => loaded,
                None => Arc::new(known.load_refill()?),
            };
            known.refill_from(&loaded, chunk)?;
            Ok::<_, io::Error>(loaded)
        };
        *refill = Some(tokio::task::spawn_blocking(work).await.map_err(io::Error::other)??);
        Ok(())
    }

    fn load_refill(&self) -> io::Result<Refill> {
        let read = |section| std::fs::read(self.section_path(section));
        Ok(Refill {
            digests: ChunkDigests::parse(&self.header, read(Section::ChunkDigests)?).map_err(invalid)?,
            spans: Spans::parse(&self.header, &read(Section::Spans)?).map_err(invalid)?,
            blob: File::open(&self.blob_path)?,
        })
    }

    fn refill_from(&self, refill: &Refill, chunk: ChunkIndex) -> io::Result<()> {
        let spans = refill.spans.covering(chunk.0..chunk.0.saturating_add(1));
        let start = spans.first().map_or(0, |span| span.device.start);
        let mut cutter = Cutter::new(self.header.geometry(), start);
        let (mut encoder, mut frame, mut failed) = (Encoder::new(), Vec::new(), None);
        let mut sink = |chunk: ChunkIndex, plain: &[u8]| {
            if failed.is_some() || self.frames.has(chunk) {
                return;
            }
            if !refill.digests.is_chunk(chunk, plain) {
                failed = Some(invalid(format!("chunk {chunk} of {} is not what was ingested", self.header.blob())));
                return;
            }
            frame.clear();
            encoder.encode(plain, &mut frame);
            failed = self.frames.append(chunk, &frame).err();
        };
        for span in spans {
            let mut inflater = SpanInflater::new(span).map_err(invalid)?;
            let mut buffer = vec![0; READ_LEN];
            let mut at = span.blob.start;
            while at < span.blob.end {
                let len = READ_LEN.min(usize::try_from(span.blob.end - at).unwrap_or(READ_LEN));
                let bytes = buffer.get_mut(..len).unwrap_or_default();
                refill.blob.read_exact_at(bytes, at)?;
                inflater.push(bytes, &mut |plain| cutter.push(plain, &mut sink)).map_err(invalid)?;
                at += len as u64;
            }
            inflater.finish().map_err(invalid)?;
        }
        match failed {
            Some(error) => Err(error),
            None if self.frames.save_is_due() => self.frames.save(),
            None => Ok(()),
        }
    }

    /// Whether `run` is one of this layer's, and not empty.
    pub(super) fn has_run(&self, run: &Range<u32>) -> bool {
        run.start < run.end && run.end <= self.header.geometry().chunk_count()
    }
}

fn invalid(error: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}
