//! The seeder's layers, given as the tracker says and no faster than the seeder may send.

mod followers;
mod sections;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use layer::Digest;
use layer::index::Section;
use parking_lot::Mutex;
use proto::drover::seeder::v1::{Layer, StatusResponse};
use swarm::{LayerKey, PeerId, Rate};
use tokio::time::Instant;

use self::followers::Followers;
use self::sections::Sections;
use super::Tracker;
use super::book::Decision;
use crate::ingest::Ingester;
use crate::mesh::{Asker, Turned};
use crate::serve::{ByteStream, Frames, LayerServer, SectionBody, ServeError};
use crate::source::BoxFuture;

/// What is handed to a connection at a time. The connection takes the next piece when most of the last one is in the kernel's
/// hands, so that what is under way is known to the tracker.
const PIECE_LEN: usize = 64 << 10;
/// Who would wait longer for its first byte is sent away instead.
const DEBT_MAX: Duration = Duration::from_secs(1);
/// When a node may ask again whether it can follow an ingest: its resolve tells it first if that ends.
const FOLLOW_RETRY: Duration = Duration::from_secs(2);
/// Sending somebody elsewhere costs as much as so many bytes.
const SECTION_SMALL: u64 = 64 << 10;
/// When somebody of those that get a section may have it, and is named to others.
const SECTION_RETRY: Duration = Duration::from_millis(150);

/// Serves the layers of an ingester: members of a layer's mesh get what the tracker says, all others everything.
#[derive(Clone, Debug)]
pub struct Gate {
    ingester: Ingester,
    tracker: Tracker,
    upload: Arc<Upload>,
    followers: Followers,
    sections: Sections,
    /// Sections of no more bytes are given to all.
    pub(super) section_small: u64,
}

/// What leaves this machine as chunks.
#[derive(Debug)]
struct Upload {
    rate: Mutex<Rate>,
    epoch: Instant,
    /// By blob.
    sent_bytes: Mutex<BTreeMap<Digest, u64>>,
}

impl Gate {
    /// Gives at most `bytes_per_sec` of chunks; 0 is no limit.
    pub fn new(ingester: Ingester, tracker: Tracker, bytes_per_sec: u64) -> Self {
        let rate = Mutex::new(Rate::new(bytes_per_sec));
        let upload = Arc::new(Upload { rate, epoch: Instant::now(), sent_bytes: Mutex::default() });
        Self {
            ingester,
            tracker,
            upload,
            followers: Followers::default(),
            sections: Sections::default(),
            section_small: SECTION_SMALL,
        }
    }

    /// Who is in the mesh, and what was given.
    pub fn status(&self) -> StatusResponse {
        let mut layers: BTreeMap<Digest, Layer> = BTreeMap::new();
        let of = |blob: &Digest| Layer { blob: blob.to_string(), ..Layer::default() };
        for (blob, members) in self.tracker.members() {
            layers.entry(blob).or_insert_with(|| of(&blob)).members = u32::try_from(members).unwrap_or(u32::MAX);
        }
        for (blob, sent_bytes) in self.upload.sent_bytes.lock().iter() {
            layers.entry(*blob).or_insert_with(|| of(blob)).sent_bytes = *sent_bytes;
        }
        let nodes = u32::try_from(self.tracker.lines()).unwrap_or(u32::MAX);
        StatusResponse { nodes, layers: layers.into_values().collect() }
    }

    async fn give(&self, blob: Digest, run: Range<u32>, asker: Asker) -> Result<Frames, ServeError> {
        let debt = self.upload.debt();
        if debt > DEBT_MAX {
            return Err(match asker.peer {
                Some(_) => ServeError::Busy(Turned { retry_after: debt, peers: Vec::new() }),
                None => ServeError::Overloaded,
            });
        }
        let grant = match self.tracker.with(|book, now| book.request(now, blob, run.clone(), &asker)) {
            Decision::Stranger => None,
            Decision::Serve(layer, peer) => {
                let (tracker, run) = (self.tracker.clone(), run.clone());
                Some(Grant { tracker, layer, peer, run, is_whole: false })
            }
            Decision::Busy(turned) => return Err(ServeError::Busy(turned)),
            Decision::Missing => return Err(ServeError::NotYet),
        };
        let given = self.ingester.chunks(blob, run, asker).await;
        if matches!(given, Err(ServeError::Unknown)) {
            // Evicted or damaged since its members joined: they resolve it anew.
            self.tracker.with(|book, now| book.forget(now, blob));
        }
        Ok(self.upload.carry(blob, given?, grant, |grant| grant.is_whole = true))
    }

    /// N nodes that want an image must not cost N copies of its indexes either: the first few get a section, all others are sent
    /// to who has it.
    async fn give_section(&self, blob: Digest, section: Section, asker: Asker) -> Result<SectionBody, ServeError> {
        let mut body = self.ingester.section(blob, section, asker).await?;
        let member = self.tracker.with(|book, _| book.on_line(&asker));
        let Some(member) = member.filter(|_| body.size > self.section_small) else { return Ok(body) };
        let has = self.sections.with_it(blob, section);
        let peers = self.tracker.with(|book, _| book.holders(blob, &has, &member, section == Section::Spans));
        let turned = |peers| ServeError::Busy(Turned { retry_after: SECTION_RETRY, peers });
        if !peers.is_empty() {
            return Err(turned(peers));
        }
        let place = self.sections.place(blob, section, member).ok_or_else(|| turned(Vec::new()))?;
        body.held = Some(Box::new(place));
        Ok(body)
    }

    /// N nodes that want an image that nobody knows must not cost N copies: one of them gets its chunks as they come, the
    /// others get them from it, and from each other.
    async fn give_as_it_comes(&self, blob: Digest, first: u32, asker: Asker) -> Result<Frames, ServeError> {
        let mut place = None;
        if let Some(peer) = asker.peer {
            let turned = |peers| ServeError::Busy(Turned { retry_after: FOLLOW_RETRY, peers });
            let is_running = |blob| self.ingester.running(blob).is_some();
            if !is_running(blob) {
                let is_waiting = self.ingester.flight(blob).is_some();
                return Err(if is_waiting { ServeError::NotYet } else { turned(Vec::new()) });
            }
            let member = self.tracker.with(|book, _| book.on_line(&asker));
            // Who was told no digests passes nothing on.
            let gives = self.ingester.tells_digests();
            let giver = |address| self.tracker.with(|book, _| book.giver(address)).filter(|_| gives);
            let placed = self.followers.place(blob, peer, member.is_some(), giver, is_running);
            place = Some(placed.map_err(|behind| turned(behind.into_iter().collect()))?);
            // Its predecessor may have come to the end just now.
            if !is_running(blob) {
                return Err(turned(Vec::new()));
            }
        }
        let frames = self.ingester.follow(blob, first, asker).await?;
        Ok(self.upload.carry(blob, frames, place, |_| {}))
    }
}

impl LayerServer for Gate {
    fn header(&self, blob: Digest) -> BoxFuture<'_, Result<Bytes, ServeError>> {
        self.ingester.header(blob)
    }

    fn section(&self, blob: Digest, section: Section, asker: Asker) -> BoxFuture<'_, Result<SectionBody, ServeError>> {
        Box::pin(self.give_section(blob, section, asker))
    }

    fn chunks(&self, blob: Digest, run: Range<u32>, asker: Asker) -> BoxFuture<'_, Result<Frames, ServeError>> {
        Box::pin(self.give(blob, run, asker))
    }

    fn follow(&self, blob: Digest, first: u32, asker: Asker) -> BoxFuture<'_, Result<Frames, ServeError>> {
        Box::pin(self.give_as_it_comes(blob, first, asker))
    }
}

/// A request that the tracker let in, until the answer ended.
struct Grant {
    tracker: Tracker,
    layer: LayerKey,
    peer: PeerId,
    run: Range<u32>,
    is_whole: bool,
}

impl Drop for Grant {
    fn drop(&mut self) {
        let run = self.run.clone();
        self.tracker.with(|book, now| book.on_end(now, self.layer, self.peer, run, self.is_whole));
    }
}

/// A body under way, and what lasts as long as it.
struct Carried<H> {
    stream: ByteStream,
    piece: Bytes,
    /// Bytes that are to come, where that is known.
    left: Option<u64>,
    held: Option<H>,
}

impl Upload {
    /// How long the next byte would wait.
    fn debt(&self) -> Duration {
        self.rate.lock().ready_at().saturating_sub(self.epoch.elapsed())
    }

    /// Waits until `bytes` may go; who comes first goes first.
    async fn pass(&self, blob: Digest, bytes: u64) {
        let ready_at = {
            let mut rate = self.rate.lock();
            let ready_at = rate.ready_at();
            rate.take(self.epoch.elapsed(), bytes);
            ready_at
        };
        *self.sent_bytes.lock().entry(blob).or_default() += bytes;
        if ready_at > self.epoch.elapsed() {
            tokio::time::sleep_until(self.epoch + ready_at).await;
        }
    }

    /// The frames in pieces, at the rate that is allowed. `on_whole` hears when all are handed over; `held` is dropped with the
    /// body, however it ends.
    fn carry<H: Send + 'static>(
        self: &Arc<Self>,
        blob: Digest,
        frames: Frames,
        held: Option<H>,
        on_whole: impl Fn(&mut H) + Send + Sync + 'static,
    ) -> Frames {
        let Frames { len, chunk_log2, stream } = frames;
        let upload = Arc::clone(self);
        let carried = Carried { stream, piece: Bytes::new(), left: len, held };
        let on_whole = Arc::new(on_whole);
        let stream = stream::try_unfold(carried, move |mut carried| {
            let (upload, on_whole) = (Arc::clone(&upload), Arc::clone(&on_whole));
            async move {
                while carried.piece.is_empty() {
                    match carried.stream.next().await.transpose()? {
                        Some(bytes) => carried.piece = bytes,
                        None => {
                            carried.held.iter_mut().for_each(|held| on_whole(held));
                            return Ok::<_, io::Error>(None);
                        }
                    }
                }
                let len = carried.piece.len().min(PIECE_LEN);
                let piece = carried.piece.split_to(len);
                upload.pass(blob, len as u64).await;
                // A body whose length was told is not asked for its end.
                carried.left = carried.left.map(|left| left.saturating_sub(len as u64));
                if carried.left == Some(0) {
                    carried.held.iter_mut().for_each(|held| on_whole(held));
                }
                Ok(Some((piece, carried)))
            }
        });
        Frames { len, chunk_log2, stream: stream.boxed() }
    }
}
