//! Wire forms made again from the blob: what was evicted, or what the disk lost.
//!
//! A span is decoded from its start, once for all who miss a chunk of it. Most zstd blobs are one span: who misses its last
//! chunk waits until the one pass over the blob has come to it, and everybody else is served on the way.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use layer::ChunkIndex;
use layer::index::{ChunkDigests, Section, Span, Spans};
use layer::span::SpanInflater;
use layer::wire::Encoder;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::Shared;
use super::frames::Frames;
use super::known::Known;
use crate::cutter::Cutter;

/// Bytes of the blob that are inflated at a time.
const READ_LEN: usize = 256 << 10;
/// How many chunks a pass makes before it tells: who waits is woken by each telling, and there may be a thousand.
const TELL_EVERY: u32 = 32;
/// Chunks of a pass that is long: a seeder's caller should come back later instead of holding a connection open.
const LONG: u32 = 256;
/// How long a caller waits for a long pass.
const PATIENCE: Duration = Duration::from_secs(2);

/// The passes over one layer's blob.
#[derive(Debug, Default)]
pub(super) struct Refills {
    /// What passes work with, as long as one does.
    loaded: tokio::sync::Mutex<Weak<Loaded>>,
    running: Mutex<Vec<Arc<Refill>>>,
}

/// One pass.
#[derive(Debug)]
struct Refill {
    /// The chunks that it makes where they are missing.
    chunks: Range<u32>,
    reached: watch::Sender<Reached>,
}

/// How far a pass is.
#[derive(Clone, Debug)]
struct Reached {
    /// The first chunk that it may not have made yet.
    next: u32,
    /// How it ended.
    end: Option<Result<(), (io::ErrorKind, String)>>,
}

/// What came of waiting for a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Made {
    /// A pass has been there.
    Now,
    /// A long pass is on its way.
    Later,
}

#[derive(Debug)]
struct Loaded {
    digests: ChunkDigests,
    spans: Spans,
    blob: File,
}

impl Refills {
    /// Waits for a pass that comes to `chunk`, which is missing; begins one where none will. It goes on to its end whether or
    /// not somebody waits.
    pub(super) async fn make(&self, known: &Arc<Known>, chunk: ChunkIndex, shared: &Arc<Shared>) -> io::Result<Made> {
        let (known, chunk) = (Arc::clone(known), chunk.0);
        let loaded = self.loaded(&known).await?;
        let refill = self.joined(known, loaded, chunk, shared)?;
        let mut reached = refill.reached.subscribe();
        let arrival = reached.wait_for(|reached| reached.next > chunk || reached.end.is_some());
        let reached = match refill.is_long() {
            true => match tokio::time::timeout(PATIENCE, arrival).await {
                Ok(reached) => reached,
                Err(_) => return Ok(Made::Later),
            },
            false => arrival.await,
        };
        match reached.map_err(io::Error::other)?.end.clone() {
            Some(Err((kind, reason))) => Err(io::Error::new(kind, reason)),
            Some(Ok(())) | None => Ok(Made::Now),
        }
    }

    #[cfg(test)]
    pub(super) fn passes(&self) -> usize {
        self.running.lock().len()
    }

    /// What passes work with, read by the first of those that run at the same time.
    async fn loaded(&self, known: &Arc<Known>) -> io::Result<Arc<Loaded>> {
        let mut loaded = self.loaded.lock().await;
        if let Some(loaded) = loaded.upgrade() {
            return Ok(loaded);
        }
        let known = Arc::clone(known);
        let read = super::blocking(move || Loaded::read(&known).map(Arc::new)).await?;
        *loaded = Arc::downgrade(&read);
        Ok(read)
    }

    /// A pass that will come to `chunk`: one under way, else a new one.
    fn joined(
        &self,
        known: Arc<Known>,
        loaded: Arc<Loaded>,
        chunk: u32,
        shared: &Arc<Shared>,
    ) -> io::Result<Arc<Refill>> {
        let mut running = self.running.lock();
        running.retain(|refill| refill.reached.borrow().end.is_none());
        let comes = |refill: &&Arc<Refill>| refill.chunks.contains(&chunk) && refill.reached.borrow().next <= chunk;
        if let Some(refill) = running.iter().find(comes) {
            return Ok(Arc::clone(refill));
        }
        let chunks = whole_chunks(&known, loaded.covering(chunk));
        if !chunks.contains(&chunk) {
            return Err(invalid(format!("no span holds chunk {chunk}")));
        }
        let reached = watch::Sender::new(Reached { next: chunks.start, end: None });
        let refill = Arc::new(Refill { chunks, reached });
        running.push(Arc::clone(&refill));
        let (shared, pass) = (Arc::clone(shared), Arc::clone(&refill));
        tokio::spawn(async move {
            let alone = match pass.is_long() {
                true => Some(Arc::clone(&shared.long_refill).acquire_owned().await),
                false => None,
            };
            let permit = Arc::clone(&shared.refills).acquire_owned().await;
            let run = Arc::clone(&pass);
            let work = move || {
                let mut reservation = shared.ledger.reservation();
                let covered = shared.cover(&mut reservation, loaded.bytes_for(chunk));
                let end = covered.and_then(|()| run.run(&known, &loaded, chunk));
                drop(reservation);
                shared.settle(known.header().blob());
                end
            };
            let end = super::blocking(work).await;
            drop((permit, alone));
            let end = end.map_err(|error| (error.kind(), error.to_string()));
            pass.reached.send_modify(|reached| reached.end = Some(end));
        });
        Ok(refill)
    }
}

impl Refill {
    const fn is_long(&self) -> bool {
        self.chunks.end - self.chunks.start > LONG
    }

    fn run(&self, known: &Known, loaded: &Loaded, chunk: u32) -> io::Result<()> {
        let spans = loaded.covering(chunk);
        let frames = known.frames();
        let start = spans.first().map_or(0, |span| span.device.start);
        let mut cutter = Cutter::new(known.header().geometry(), start);
        let mut maker = Maker { known, loaded, frames, encoder: Encoder::new(), frame: Vec::new() };
        let mut failed = None;
        let mut sink = |chunk: ChunkIndex, plain: &[u8]| {
            if failed.is_none() {
                failed = maker.make(chunk, plain).err();
            }
            if failed.is_none() && (chunk.0 + 1).is_multiple_of(TELL_EVERY) {
                self.reached.send_modify(|reached| reached.next = chunk.0 + 1);
            }
        };
        let mut buffer = vec![0; READ_LEN];
        for span in spans {
            let mut inflater = SpanInflater::new(span).map_err(invalid)?;
            let mut at = span.blob.start;
            while at < span.blob.end && !inflater.is_done() {
                let len = READ_LEN.min(usize::try_from(span.blob.end - at).unwrap_or(READ_LEN));
                let bytes = buffer.get_mut(..len).unwrap_or_default();
                loaded.blob.read_exact_at(bytes, at)?;
                inflater.push(bytes, &mut |plain| cutter.push(plain, &mut sink)).map_err(invalid)?;
                at += len as u64;
            }
            inflater.finish().map_err(invalid)?;
        }
        match failed {
            Some(error) => Err(error),
            None if frames.save_is_due() => frames.save(),
            None => Ok(()),
        }
    }
}

/// Encodes what is missing.
struct Maker<'a> {
    known: &'a Known,
    loaded: &'a Loaded,
    frames: &'a Frames,
    encoder: Encoder,
    frame: Vec<u8>,
}

impl Maker<'_> {
    fn make(&mut self, chunk: ChunkIndex, plain: &[u8]) -> io::Result<()> {
        if self.frames.has(chunk) {
            return Ok(());
        }
        if !self.loaded.digests.is_chunk(chunk, plain) {
            return Err(invalid(format!("chunk {chunk} of {} is not what was ingested", self.known.header().blob())));
        }
        self.frame.clear();
        self.encoder.encode(plain, &mut self.frame);
        self.frames.append(chunk, &self.frame)
    }
}

impl Loaded {
    fn read(known: &Known) -> io::Result<Self> {
        let (header, read) = (known.header(), |section| std::fs::read(known.section_path(section)));
        Ok(Self {
            digests: ChunkDigests::parse(header, read(Section::ChunkDigests)?).map_err(invalid)?,
            spans: Spans::parse(header, &read(Section::Spans)?).map_err(invalid)?,
            blob: File::open(known.blob_path())?,
        })
    }

    /// About the most bytes that the frames of the spans with `chunk` take.
    fn bytes_for(&self, chunk: u32) -> u64 {
        let blob: u64 = self.covering(chunk).iter().map(|span| span.blob.end - span.blob.start).sum();
        blob + blob / 4 + (1 << 20)
    }

    fn covering(&self, chunk: u32) -> &[Span] {
        self.spans.covering(chunk..chunk.saturating_add(1))
    }
}

/// The chunks that are whole in `spans`, which are neighbours.
fn whole_chunks(known: &Known, spans: &[Span]) -> Range<u32> {
    let (Some(first), Some(last)) = (spans.first(), spans.last()) else { return 0..0 };
    let geometry = known.header().geometry();
    let start = first.device.start.div_ceil(geometry.chunk_size()) as u32;
    let end = match last.device.end < geometry.device_size() {
        true => (last.device.end / geometry.chunk_size()) as u32,
        false => geometry.chunk_count(),
    };
    start..end
}

fn invalid(error: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}
