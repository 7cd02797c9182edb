//! Takes the chunks of an ingest under way, from the seeder or from nodes that follow it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use layer::wire::{Decoder, Frame};
use layer::{ChunkIndex, Digest};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::bulk::Fault;
use crate::bulk::follow::Follow;
use crate::layer::Layer;
use crate::relay::Relay;
use crate::resolve::Progress;
use crate::seeder::client::Feed;
use crate::source::SourceKind;
use crate::{Incoming, Node};

/// Time for the last chunks to come once the seeder has finished. The rest is read lazily, so a node on a slow line does
/// not wait for bytes that nobody asked for.
const GRACE: Duration = Duration::from_millis(250);
/// Frames between the network and the disk.
const FRAMES_MAX: usize = 32;
/// Pause before it is asked again from whom to follow: doubled each time.
const PAUSE: Duration = Duration::from_millis(25);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long the first line to the mesh is waited for: a seeder lets everybody follow who is in no mesh.
const LINE: Duration = Duration::from_secs(2);

/// A layer on its way while its index is being made. Dropping it ends that.
pub(crate) struct Following {
    task: JoinHandle<()>,
    relay: Arc<Relay>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    disk: Mutex<Option<JoinHandle<()>>>,
    /// A body is being read.
    streams: watch::Sender<bool>,
}

struct Received {
    chunk: ChunkIndex,
    /// [`Relay::faults`] when it came.
    faults: u32,
    kind: SourceKind,
    is_plain: bool,
    body: Vec<u8>,
}

impl Following {
    /// Begins to take the chunks of `blob`, for `node` and for those that follow it.
    pub(crate) fn start(node: Arc<Node>, blob: Digest, feed: Feed, progress: watch::Sender<Progress>) -> Self {
        let (relay, shared) = (node.relay_anew(blob), Arc::new(Shared::default()));
        let task =
            Task { node, blob, feed, progress, relay: Arc::clone(&relay), shared: Arc::clone(&shared), disk: None };
        Self { task: tokio::spawn(task.run()), relay, shared }
    }

    /// The seeder tells digests.
    pub(crate) fn tell(&self, first: u32, digests: &[u8]) {
        self.relay.tell(first, digests);
    }

    /// Waits a little for the last chunks, then gives what came. Chunks that did not come are fetched when they are read.
    pub(crate) async fn finish(&mut self) -> Option<Arc<Incoming>> {
        let mut streams = self.shared.streams.subscribe();
        let idle = async {
            let _ = streams.wait_for(|streams| !streams).await;
        };
        let _ = tokio::time::timeout(GRACE, idle).await;
        self.task.abort();
        // Ends once the network's half is gone.
        let _ = (&mut self.task).await;
        let disk = self.shared.disk.lock().take();
        if let Some(disk) = disk {
            disk.await.ok()?;
        }
        self.relay.incoming()
    }

    /// What came is part of `layer` from here on.
    pub(crate) fn became(self, layer: &Arc<Layer>) {
        self.relay.end(Some(Arc::clone(layer)));
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
        if self.relay.incoming().is_some() {
            self.relay.end(None);
        }
    }
}

/// The network's half.
struct Task {
    node: Arc<Node>,
    blob: Digest,
    feed: Feed,
    progress: watch::Sender<Progress>,
    relay: Arc<Relay>,
    shared: Arc<Shared>,
    /// To the disk's half.
    disk: Option<mpsc::Sender<Received>>,
}

impl Task {
    async fn run(mut self) {
        let began = Instant::now();
        while self.feed.is_line_awaited() && began.elapsed() < LINE {
            tokio::time::sleep(PAUSE).await;
        }
        let mut pause = PAUSE;
        loop {
            match self.feed.follow(self.relay.next()).await {
                Ok((follow, kind)) => {
                    let (blob, from) = (self.blob, self.relay.next());
                    tracing::debug!(%blob, ?kind, from, "follows an ingest");
                    let ended = self.take(follow, kind).await;
                    match ended {
                        Ok(()) => return,
                        Err(fault) => tracing::debug!(%blob, ?kind, ?fault, "an ingest is followed no more"),
                    }
                    if self.relay.next() > from {
                        pause = PAUSE;
                    }
                }
                Err(fault) => tracing::trace!(blob = %self.blob, ?fault, "an ingest is not followed yet"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Takes a body to its end.
    async fn take(&mut self, mut follow: Follow, kind: SourceKind) -> Result<(), Fault> {
        let disk = self.disk(follow.chunk_log2()).await?;
        let _streams = Streams::new(&self.shared.streams);
        let faults = self.relay.faults();
        loop {
            let next = tokio::select! {
                next = follow.next() => next?,
                () = self.relay.faulty(faults) => return Err(Fault::wrong("chunks that the seeder did not make")),
            };
            let Some((chunk, frame)) = next else { break };
            let (is_plain, body) = match frame {
                Frame::Plain(body) => (true, body.to_vec()),
                Frame::Packed(body) => (false, body.to_vec()),
            };
            self.progress.send_modify(|progress| progress.received += body.len() as u64);
            let received = Received { chunk, faults, kind, is_plain, body };
            if disk.send(received).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    async fn disk(&mut self, chunk_log2: u8) -> Result<mpsc::Sender<Received>, Fault> {
        if let Some(disk) = &self.disk {
            return Ok(disk.clone());
        }
        let (node, blob) = (Arc::clone(&self.node), self.blob);
        let incoming = tokio::task::spawn_blocking(move || node.incoming(blob, chunk_log2)).await;
        let incoming = incoming.map_err(Fault::wrong)?.map_err(Fault::wrong)?;
        let (sender, frames) = mpsc::channel(FRAMES_MAX);
        let (place, relay) = (Arc::clone(&incoming), Arc::clone(&self.relay));
        self.relay.open(incoming);
        let disk = tokio::task::spawn_blocking(move || write_frames(frames, &place, 1 << chunk_log2, &relay));
        *self.shared.disk.lock() = Some(disk);
        Ok(self.disk.insert(sender).clone())
    }
}

/// Says that a body is being read, until it is dropped.
struct Streams<'a>(&'a watch::Sender<bool>);

impl<'a> Streams<'a> {
    fn new(streams: &'a watch::Sender<bool>) -> Self {
        streams.send_replace(true);
        Self(streams)
    }
}

impl Drop for Streams<'_> {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

/// Decodes and stores frames until there are no more. What cannot be stored is fetched again later.
fn write_frames(mut frames: mpsc::Receiver<Received>, incoming: &Incoming, chunk_len: u64, relay: &Relay) {
    let mut decoder = Decoder::new();
    while let Some(received) = frames.blocking_recv() {
        let frame = if received.is_plain { Frame::Plain(&received.body) } else { Frame::Packed(&received.body) };
        incoming.count(received.kind, frame.wire_len());
        if received.faults != relay.faults() {
            // Behind a wrong one.
            continue;
        }
        // What unpacks to less or more is no chunk.
        let len = frame.claimed_len().filter(|len| *len <= chunk_len).and_then(|len| usize::try_from(len).ok());
        let Some(plain) = len.and_then(|len| decoder.decode(frame, len).ok()) else {
            tracing::warn!(chunk = %received.chunk, "a followed chunk cannot be decoded: it is fetched again");
            relay.note_fault();
            continue;
        };
        if let Err(error) = incoming.write_frame(received.chunk, plain, frame, received.kind) {
            tracing::warn!(chunk = %received.chunk, %error, "a followed chunk cannot be stored");
            return;
        }
        relay.advance();
    }
}
