//! Sections and chunks of known layers, and chunks of layers that are being ingested, for other machines.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use layer::index::Section;
use layer::{ChunkIndex, Digest};
use tokio::sync::watch;

use super::frames::Frames;
use super::known::Known;
use super::refill::Made;
use super::{Ingester, Phase};
use crate::mesh::Asker;
use crate::serve::{ByteStream, Frames as FramesBody, LayerServer, SectionBody, ServeError};
use crate::source::BoxFuture;

/// Bytes of frames that are read and handed to the network at a time.
const BATCH_LEN: usize = 512 << 10;

impl LayerServer for Ingester {
    fn header(&self, blob: Digest) -> BoxFuture<'_, Result<Bytes, ServeError>> {
        Box::pin(async move {
            let known = self.served(blob).await?;
            Ok(Bytes::copy_from_slice(&known.header().encode()))
        })
    }

    fn section(&self, blob: Digest, section: Section, _asker: Asker) -> BoxFuture<'_, Result<SectionBody, ServeError>> {
        Box::pin(async move {
            let known = self.served(blob).await?;
            let size = known.header().section(section).size;
            let opened = super::blocking(move || known.open_section(section)).await;
            let file = opened.map_err(|error| ServeError::Failed(format!("{section}: {error}")))?;
            Ok(SectionBody { file: Arc::new(file), size, held: None })
        })
    }

    fn chunks(&self, blob: Digest, run: Range<u32>, _: Asker) -> BoxFuture<'_, Result<FramesBody, ServeError>> {
        Box::pin(async move {
            if let Some(frames) = self.running(blob) {
                let _in_use = frames.in_use(run.clone());
                let len = frames.wire_len(run.clone()).ok_or(ServeError::NotYet)?;
                return Ok(FramesBody { len: Some(len), chunk_log2: None, stream: made(frames, run) });
            }
            let known = self.served(blob).await?;
            if !known.has_run(&run) {
                return Err(ServeError::OutOfRange);
            }
            // The layers of one zstd frame take their time: better no answer yet than a body that seems to stall.
            let first = ChunkIndex(run.start);
            if !known.frames().has(first) {
                match self.refill(&known, first).await {
                    Ok(Made::Now) => {}
                    Ok(Made::Later) => return Err(ServeError::NotYet),
                    Err(error) => return Err(ServeError::Failed(error.to_string())),
                }
            }
            let chunk_log2 = Some(known.header().geometry().chunk_log2());
            // Before the length is told: a frame that is made again may have another one.
            let stream = self.known_frames(Arc::clone(&known), run.clone());
            Ok(FramesBody { len: known.frames().wire_len(run), chunk_log2, stream })
        })
    }

    fn follow(&self, blob: Digest, first: u32, _: Asker) -> BoxFuture<'_, Result<FramesBody, ServeError>> {
        Box::pin(async move {
            if let Some(flight) = self.flight(blob)
                && let Some(frames) = flight.frames()
            {
                let phase = flight.phase();
                let is_over = matches!(*phase.borrow(), Phase::Failed(_) | Phase::Unsupported(_));
                if !is_over {
                    let chunk_log2 = Some(self.shared.options.layer.chunk_log2);
                    let stream = followed(frames, first, phase);
                    return Ok(FramesBody { len: None, chunk_log2, stream });
                }
            }
            let known = self.served(blob).await?;
            let geometry = known.header().geometry();
            let stream = self.known_frames(known, first.min(geometry.chunk_count())..geometry.chunk_count());
            Ok(FramesBody { len: None, chunk_log2: Some(geometry.chunk_log2()), stream })
        })
    }
}

impl Ingester {
    async fn served(&self, blob: Digest) -> Result<Arc<Known>, ServeError> {
        match self.known(blob).await {
            Some(known) => {
                self.note_use(blob);
                Ok(known)
            }
            None if self.running(blob).is_some() => Err(ServeError::NotYet),
            None => Err(ServeError::Unknown),
        }
    }

    fn note_use(&self, blob: Digest) {
        if self.shared.ledger.note_use(blob) {
            let shared = Arc::clone(&self.shared);
            // What cannot be noted only makes the layer look older after a restart.
            tokio::task::spawn_blocking(move || drop(shared.store.note_use(blob)));
        }
    }

    /// The chunks of an ingest under way.
    pub(crate) fn running(&self, blob: Digest) -> Option<Arc<Frames>> {
        let flight = self.flight(blob)?;
        let is_running = matches!(*flight.phase().borrow(), Phase::Running(_));
        is_running.then(|| flight.frames()).flatten()
    }

    /// The frames of a run of a known layer; missing ones are made again on the way.
    fn known_frames(&self, known: Arc<Known>, run: Range<u32>) -> ByteStream {
        let ingester = self.clone();
        let in_use = Arc::new(known.frames().in_use(run.clone()));
        let frames = stream::try_unfold((run, false), move |(run, made_in_vain)| {
            let (ingester, known, in_use) = (ingester.clone(), Arc::clone(&known), Arc::clone(&in_use));
            async move {
                let _in_use = in_use;
                if run.is_empty() {
                    return Ok(None);
                }
                let is_missing = !known.frames().has(ChunkIndex(run.start));
                if is_missing && made_in_vain {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "the disk does not keep the wire forms"));
                }
                if is_missing {
                    while ingester.refill(&known, ChunkIndex(run.start)).await? == Made::Later {}
                }
                let (bytes, next) = read_batch(known.frames(), run.clone()).await?;
                let made_in_vain = is_missing && bytes.is_empty();
                Ok(Some((bytes, (next..run.end, made_in_vain))))
            }
        });
        // A frame that the disk lost gives an empty batch once, and is made again by the next turn; only once, or a disk
        // that keeps nothing would be asked for ever.
        frames.filter(|batch| std::future::ready(!batch.as_ref().is_ok_and(Bytes::is_empty))).boxed()
    }

    async fn refill(&self, known: &Arc<Known>, chunk: ChunkIndex) -> io::Result<Made> {
        let blob = known.header().blob();
        let made = known.refill(chunk, &self.shared).await;
        if let Err(error) = &made {
            tracing::error!(%blob, %chunk, %error, "cannot make a wire form again");
            if matches!(
                error.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof
            ) {
                self.forget(blob).await;
            }
        }
        made
    }
}

/// Frames that are there.
fn made(frames: Arc<Frames>, run: Range<u32>) -> ByteStream {
    let in_use = Arc::new(frames.in_use(run.clone()));
    stream::try_unfold(run, move |run| {
        let (frames, in_use) = (Arc::clone(&frames), Arc::clone(&in_use));
        async move {
            let _in_use = in_use;
            if run.is_empty() {
                return Ok(None);
            }
            let (bytes, next) = read_batch(&frames, run.clone()).await?;
            match next > run.start {
                true => Ok(Some((bytes, next..run.end))),
                false => Err(io::Error::other(format!("the frame of chunk {next} is damaged"))),
            }
        }
    })
    .boxed()
}

/// All frames from `first` on as they come, until the ingest is over.
fn followed(frames: Arc<Frames>, first: u32, phase: watch::Receiver<Phase>) -> ByteStream {
    let front = frames.front();
    let in_use = Arc::new(frames.in_use(0..u32::MAX));
    stream::try_unfold((first, front, phase), move |(next, mut front, mut phase)| {
        let (frames, in_use) = (Arc::clone(&frames), Arc::clone(&in_use));
        async move {
            let _in_use = in_use;
            loop {
                // The phase is looked at first: what was there when the ingest was over is all there is.
                let end = match &*phase.borrow_and_update() {
                    Phase::Running(_) => None,
                    Phase::Ready(known) => Some(known.header().geometry().chunk_count()),
                    Phase::Unsupported(reason) => return Err(io::Error::other(reason.clone())),
                    Phase::Failed(error) => return Err(io::Error::other(error.to_string())),
                };
                let here = *front.borrow_and_update();
                if next < here {
                    let (bytes, reached) = read_batch(&frames, next..here).await?;
                    return match reached > next {
                        true => Ok(Some((bytes, (reached, front, phase)))),
                        false => Err(io::Error::other(format!("the frame of chunk {next} is damaged"))),
                    };
                }
                if let Some(end) = end {
                    return match next >= end {
                        true => Ok(None),
                        false => Err(io::Error::other(format!("only {next} of {end} chunks are there"))),
                    };
                }
                tokio::select! {
                    changed = front.changed() => changed.map_err(io::Error::other)?,
                    changed = phase.changed() => changed.map_err(io::Error::other)?,
                }
            }
        }
    })
    .boxed()
}

async fn read_batch(frames: &Arc<Frames>, run: Range<u32>) -> io::Result<(Bytes, u32)> {
    let frames = Arc::clone(frames);
    super::blocking(move || {
        let mut out = Vec::new();
        let next = frames.read(run, BATCH_LEN, &mut out)?;
        Ok((Bytes::from(out), next))
    })
    .await
}
