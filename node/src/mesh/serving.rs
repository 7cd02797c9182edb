//! What a node gives to others of its layers, and to whom when (`docs/wire.md`, "Bulk").
//!
//! Nothing leaves that was not checked: a frame as it came is compared with the check that it was kept with, and bytes of the
//! device are given only where their digest is known to hold.

use std::fmt;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use layer::index::Section;
use layer::wire::{Frame, PREFIX_LEN};
use layer::{ChunkIndex, Digest};
use parking_lot::Mutex;
use swarm::{Admission, PeerId, UploadConfig, Uploads};
use tokio::sync::watch;

use super::Refused;
use super::asking::{Asker, PEERS_MAX, Turned};
use super::member::Member;
use crate::layer::Layer;
use crate::node::Node;
use crate::relay::State;
use crate::serve::{ByteStream, Frames, LayerServer, SectionBody, ServeError};
use crate::source::BoxFuture;

/// Bytes of frames that are read and handed to the network at a time.
const BATCH_LEN: usize = 512 << 10;

/// How long somebody is waited for who was just told to follow, too.
const OPENING: Duration = Duration::from_secs(2);

/// Who has a chunk of the layer with that blob besides this node, for whom it sends away; nearest first, and soon.
pub type Holders = Box<dyn Fn(Digest, u32, Asker) -> BoxFuture<'static, Vec<Member>> + Send + Sync>;

/// The layers of a node, for others.
pub struct Sharing {
    node: Arc<Node>,
    gate: Arc<Gate>,
    holders: Holders,
}

/// Who is served now.
struct Gate {
    uploads: Mutex<Uploads>,
    refused: Refused,
    epoch: Instant,
}

/// An answer under way; its place is free again when it is dropped.
struct Slot {
    gate: Arc<Gate>,
    peer: PeerId,
}

impl Sharing {
    /// Gives what `node` has within the bounds of `uploads` to all but the `refused`, and names `holders` to whom it turns down.
    pub fn new(node: Arc<Node>, uploads: UploadConfig, refused: Refused, holders: Holders) -> Self {
        let uploads = Mutex::new(Uploads::new(uploads));
        Self { node, gate: Arc::new(Gate { uploads, refused, epoch: Instant::now() }), holders }
    }

    fn layer(&self, blob: Digest) -> Result<Arc<Layer>, ServeError> {
        let layer = self.node.layer_by_blob(blob).filter(|layer| !layer.has_wrong_index());
        layer.ok_or(ServeError::Unknown)
    }

    /// Who is turned down here learns of nobody else.
    fn admit(&self, asker: &Asker) -> Result<Slot, ServeError> {
        if asker.peer.is_some_and(|peer| self.gate.refused.contains(peer)) {
            return Err(ServeError::Refused("this member sent wrong chunks and gets nothing"));
        }
        // By where it comes from, not by what it says: else one machine takes all slots under many names.
        let ip = asker.ip.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let peer = PeerId::at(SocketAddr::new(ip, 0));
        let admission = self.gate.uploads.lock().request(self.gate.epoch.elapsed(), peer, asker.priority, 0);
        match admission {
            Admission::Serve => Ok(Slot { gate: Arc::clone(&self.gate), peer }),
            Admission::Refused => Err(ServeError::Refused("this node takes only")),
            Admission::Busy { retry_after } => Err(ServeError::Busy(Turned { retry_after, peers: Vec::new() })),
        }
    }

    /// Who else has a chunk, for somebody who may have it and is sent away.
    async fn others(&self, blob: Digest, chunk: u32, asker: Asker) -> Vec<Member> {
        let mut peers = (self.holders)(blob, chunk, asker).await;
        peers.retain(|member| Some(member.address) != asker.peer);
        peers.truncate(PEERS_MAX);
        peers
    }
}

impl LayerServer for Sharing {
    fn header(&self, blob: Digest) -> BoxFuture<'_, Result<Bytes, ServeError>> {
        Box::pin(async move { Ok(Bytes::copy_from_slice(&self.layer(blob)?.header().encode())) })
    }

    fn section(&self, blob: Digest, section: Section, _asker: Asker) -> BoxFuture<'_, Result<SectionBody, ServeError>> {
        Box::pin(async move {
            let layer = self.layer(blob)?;
            let (path, size) = (layer.section_path(section), layer.header().section(section).size);
            let opened = tokio::task::spawn_blocking(move || File::open(path)).await;
            match opened.map_err(io::Error::other).flatten() {
                Ok(file) => Ok(SectionBody { file: Arc::new(file), size, held: None }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ServeError::Absent),
                Err(error) => Err(ServeError::Failed(format!("{section}: {error}"))),
            }
        })
    }

    fn chunks(&self, blob: Digest, run: Range<u32>, asker: Asker) -> BoxFuture<'_, Result<Frames, ServeError>> {
        Box::pin(async move {
            let layer = self.layer(blob)?;
            if run.end > layer.geometry().chunk_count() {
                return Err(ServeError::OutOfRange);
            }
            if !layer.has_run(&run) {
                return Err(ServeError::Absent);
            }
            let slot = match self.admit(&asker) {
                Err(ServeError::Busy(Turned { retry_after, .. })) => {
                    let peers = self.others(blob, run.start, asker).await;
                    return Err(ServeError::Busy(Turned { retry_after, peers }));
                }
                admitted => admitted?,
            };
            layer.store().note_shared();
            Ok(Frames { len: None, chunk_log2: None, stream: given(layer, run, slot) })
        })
    }

    /// What this node follows itself.
    fn follow(&self, blob: Digest, first: u32, asker: Asker) -> BoxFuture<'_, Result<Frames, ServeError>> {
        Box::pin(async move {
            let relay = self.node.relay(blob).ok_or(ServeError::Unknown)?;
            let mut state = relay.state();
            drop(relay);
            let opened = tokio::time::timeout(OPENING, state.wait_for(|state| !matches!(state, State::Opening)));
            let chunk_log2 = match opened.await {
                Ok(Ok(state)) => state.chunk_log2().ok_or(ServeError::Absent)?,
                Ok(Err(_)) | Err(_) => return Err(ServeError::NotYet),
            };
            let slot = self.admit(&asker)?;
            let stream = passed_on(Arc::clone(&self.node), state, first, slot);
            Ok(Frames { len: None, chunk_log2: Some(chunk_log2), stream })
        })
    }
}

impl Slot {
    fn sent(&self, bytes: usize) {
        self.gate.uploads.lock().sent(self.gate.epoch.elapsed(), bytes as u64);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.gate.uploads.lock().end(self.peer);
    }
}

impl fmt::Debug for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sharing").field("node", &self.node).finish_non_exhaustive()
    }
}

/// The frames of `run`. A chunk that is lost meanwhile breaks the stream off.
fn given(layer: Arc<Layer>, run: Range<u32>, slot: Slot) -> ByteStream {
    let batches = stream::try_unfold((run, slot), move |(run, slot)| {
        let layer = Arc::clone(&layer);
        async move {
            if run.is_empty() {
                return Ok::<_, io::Error>(None);
            }
            let end = run.end;
            let read = tokio::task::spawn_blocking(move || read_batch(&layer, run));
            let (parts, next) = read.await.map_err(io::Error::other)??;
            slot.sent(parts.iter().map(Bytes::len).sum());
            Ok(Some((stream::iter(parts).map(Ok), (next..end, slot))))
        }
    });
    batches.try_flatten().boxed()
}

/// The frames of a layer that this node follows, from chunk `next` on, as they come.
fn passed_on(node: Arc<Node>, state: watch::Receiver<State>, next: u32, slot: Slot) -> ByteStream {
    let batches = stream::try_unfold((state, next, slot), move |(mut state, next, slot)| {
        let node = Arc::clone(&node);
        async move {
            loop {
                let now = state.borrow_and_update().clone();
                if now.is_end(next) {
                    return Ok::<_, io::Error>(None);
                }
                let is_known = matches!(now, State::Known(_));
                let read = tokio::task::spawn_blocking(move || now.read(next));
                let (parts, reached) = read.await.map_err(io::Error::other)??;
                if reached > next {
                    let len = parts.iter().map(Bytes::len).sum();
                    slot.sent(len);
                    if !is_known {
                        node.note_given(reached - next, len);
                    }
                    return Ok(Some((stream::iter(parts).map(Ok), (state, reached, slot))));
                }
                state.changed().await.map_err(io::Error::other)?;
            }
        }
    });
    batches.try_flatten().boxed()
}

/// The frames of the first chunks of `run`, and where to go on.
pub(crate) fn read_batch(layer: &Layer, run: Range<u32>) -> io::Result<(Vec<Bytes>, u32)> {
    let (mut parts, mut frames, mut len) = (Vec::new(), Vec::new(), 0);
    let mut next = run.start;
    while next < run.end && len < BATCH_LEN {
        let (chunk, before) = (ChunkIndex(next), frames.len());
        if layer.store().read_frame(chunk, &mut frames) {
            len += frames.len() - before;
        } else {
            let mut plain = Vec::new();
            if !layer.read_chunk(chunk, &mut plain) {
                return Err(io::Error::other(format!("chunk {next} is not here any more")));
            }
            frames.extend_from_slice(&Frame::Plain(&plain).prefix());
            len += PREFIX_LEN + plain.len();
            parts.extend([Bytes::from(std::mem::take(&mut frames)), Bytes::from(plain)]);
        }
        next += 1;
    }
    if !frames.is_empty() {
        parts.push(Bytes::from(frames));
    }
    layer.own_counters().given(u64::from(next - run.start), len);
    Ok((parts, next))
}

#[cfg(test)]
mod tests;
