//! The one pass over a blob, on a blocking thread: write it down, prove it, find the index, hand chunks to be encoded.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use layer::index::{Compression, Index};
use layer::ingest::{Ingest, IngestError, Options};
use layer::{ChunkDigest, ChunkIndex};
use tokio::sync::{mpsc, watch};

use super::encode::Batch;
use super::flush::Flush;
use super::frames::Frames;
use super::window::{WINDOW_FREE, Window};
use super::{Digests, Ended, IngestFailure, Phase, Piece, TELL_WAITING, tell_ahead};
use crate::source::BlobRef;

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_millis(50);
/// Bytes that are read from a file at a time.
const READ_LEN: usize = 256 << 10;

/// The index takes less than this part of blob and wire forms.
const INDEX_SHARE: u64 = 64;

/// What the pass works with.
pub(super) struct Pass {
    pub(super) blob: BlobRef,
    /// The file of the blob.
    pub(super) path: PathBuf,
    /// Bytes of the blob that the file holds already.
    pub(super) blob_here: u64,
    /// They are all of it.
    pub(super) is_whole: bool,
    /// The rest, from the network.
    pub(super) pieces: mpsc::UnboundedReceiver<Piece>,
    pub(super) batch: Batch,
    pub(super) frames: Arc<Frames>,
    /// What it says of the chunks before there is an index.
    pub(super) digests: Arc<Digests>,
    /// Sees to it that so many bytes may be on the disk.
    pub(super) cover: Box<dyn FnMut(u64) -> io::Result<()> + Send>,
    /// Memory for the windows of zstd frames.
    pub(super) window: Window,
    /// Bytes of blobs that came, of all ingests.
    pub(super) read: Arc<AtomicU64>,
    pub(super) phase: watch::Sender<Phase>,
    pub(super) options: Options,
}

/// Why a pass stopped before the end of its input.
pub(super) enum PassError {
    /// Going on is useless.
    Stopped(Ended),
    /// The disk failed.
    Disk(io::Error),
}

impl From<io::Error> for PassError {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

/// A pass whose input ended.
pub(super) struct Passed {
    blob: BlobRef,
    result: Result<Index, IngestError>,
}

impl Pass {
    /// Reads everything and waits for the chunks to be encoded. Whether the input was the whole blob is for
    /// [`Passed::finish`] to say.
    pub(super) fn run(mut self) -> Result<Passed, PassError> {
        let blob = self.blob.clone();
        let compression = Compression::of_media_type(&blob.media_type);
        // The size is what somebody asked with; the digest decides what the blob is.
        let ingest = Ingest::new(blob.digest, None, compression, self.options);
        let mut ingest = ingest.map_err(io::Error::other)?;
        ingest.limit_window(WINDOW_FREE);
        let mut told = Instant::now();

        let mut file = match self.is_whole {
            true => None,
            false => Some(OpenOptions::new().append(true).create(true).open(&self.path)?),
        };
        let flushed = file.as_ref().map(File::try_clone).transpose()?;
        let mut flush = Flush::start(flushed, Arc::clone(&self.frames))?;
        if self.blob_here > 0 {
            let mut file = File::open(&self.path)?;
            let mut buffer = vec![0; READ_LEN];
            loop {
                let read = file.read(&mut buffer)?;
                if read == 0 {
                    break;
                }
                self.take(&mut ingest, buffer.get(..read).unwrap_or_default(), &mut told)?;
                if !flush.wrote(ingest.blob_read() + self.frames.len()) {
                    return Err(flush.failure().into());
                }
            }
        }
        if let Some(file) = &mut file {
            while let Some(piece) = self.pieces.blocking_recv() {
                file.write_all(&piece.bytes)?;
                self.take(&mut ingest, &piece.bytes, &mut told)?;
                if !flush.wrote(ingest.blob_read() + self.frames.len()) {
                    return Err(flush.failure().into());
                }
            }
        }
        self.tell(&ingest);
        let result = ingest.finish(&mut |chunk, plain, digest| {
            self.digests.lock().push(digest);
            self.batch.push(chunk, plain);
        });
        self.batch.finish()?;
        flush.finish()?;
        Ok(Passed { blob, result })
    }

    fn take(&mut self, ingest: &mut Ingest, bytes: &[u8], told: &mut Instant) -> Result<(), PassError> {
        let Self { batch, digests, .. } = self;
        let mut made = |chunk: ChunkIndex, plain: &[u8], digest: ChunkDigest| {
            digests.lock().push(digest);
            batch.push(chunk, plain);
        };
        let pushed = ingest.push(bytes, &mut made);
        pushed.map_err(|error| PassError::Stopped(ended(&self.blob, &error)))?;
        while let Some(window) = ingest.window_wanted() {
            let Self { window: memory, batch, digests, phase, read, .. } = self;
            memory.take(window, TELL_WAITING, || tell_ahead(phase, read));
            ingest.allow_window(window, &mut |chunk, plain, digest| {
                digests.lock().push(digest);
                batch.push(chunk, plain);
            });
        }
        if let Some(failure) = ingest.failure() {
            self.tell_failure(&failure);
        }
        let written = ingest.blob_read() + self.frames.len();
        (self.cover)(written + written / INDEX_SHARE)?;
        if self.batch.has_failed() {
            return Err(PassError::Disk(io::Error::other("the wire forms of its chunks cannot be written")));
        }
        if told.elapsed() >= TELL_EVERY {
            *told = Instant::now();
            self.tell(ingest);
        }
        Ok(())
    }

    /// There will be no index, so who waits learns it now. Why is known only when the blob was hashed to its end: wrong bytes
    /// look like broken content, and only the latter may be remembered. A blob that began on the disk is tried anew first.
    fn tell_failure(&self, failure: &IngestError) {
        self.phase.send_if_modified(|phase| {
            let is_first = self.blob_here == 0 && matches!(phase, Phase::Running(_));
            if is_first {
                let (blob, reason) = (self.blob.to_string(), failure.to_string());
                *phase = Phase::Failed(IngestFailure::Content { blob, reason });
            }
            is_first
        });
    }

    fn tell(&self, ingest: &Ingest) {
        self.phase.send_modify(|phase| {
            if let Phase::Running(progress) = phase {
                progress.blob_read = ingest.blob_read();
                progress.device_read = ingest.device_read();
            }
        });
    }
}

impl Passed {
    /// The index, if the input was the blob.
    pub(super) fn finish(self) -> Result<Index, Ended> {
        self.result.map_err(|error| ended(&self.blob, &error))
    }
}

fn ended(blob: &BlobRef, error: &IngestError) -> Ended {
    match error {
        IngestError::WrongBlob { .. } | IngestError::WrongSize { .. } => {
            let reason = format!("the registry sent wrong bytes: {error}");
            Ended::Failed(IngestFailure::WrongBlob { blob: blob.to_string(), reason })
        }
        IngestError::Unsupported { blob, reason } => Ended::Unsupported(format!("blob {blob}: {reason}")),
        IngestError::Inflate { .. } | IngestError::Tar { .. } => Ended::Unsupported(error.to_string()),
    }
}
