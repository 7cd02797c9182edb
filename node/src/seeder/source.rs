//! A layer's chunks from the seeders, in their wire form.

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use layer::wire::Frame;
use layer::{ChunkIndex, Digest, Geometry};
use tokio::time::Instant;

use super::client::{Client, Seat, SeederError};
use crate::bulk::Body;
use crate::source::{BoxFuture, ChunkSink, Priority, Source, SourceError, SourceKind, WrongChunk};

/// A seeder that gives nothing at all for so long while somebody waits for it loses that to another one that gives it. Sooner than
/// the swarm takes all seeders for gone.
const SILENCE: Duration = Duration::from_millis(200);

/// The chunks of one layer, from whichever seeder has them.
#[derive(Debug)]
pub struct SeederSource {
    client: Client,
    blob: Digest,
    geometry: Geometry,
}

/// What became of what one seeder was asked for.
enum Turn {
    /// It ended.
    Ended(Result<(), SeederError>),
    /// It was silent, and another one gave a body meanwhile.
    Overtaken(Arc<Seat>, Body),
}

/// Sees what a seeder gives.
struct Watched<'a> {
    sink: &'a mut dyn ChunkSink,
    seat: &'a Seat,
    next: &'a AtomicU32,
}

impl SeederSource {
    /// A source of the layer of `blob`, whose device is cut by `geometry`.
    pub const fn new(client: Client, blob: Digest, geometry: Geometry) -> Self {
        Self { client, blob, geometry }
    }

    /// Asks one seeder after the other for what has not come, the one whose share the layer is first.
    async fn fetch_run(
        &self,
        run: Range<u32>,
        priority: Priority,
        sink: &mut dyn ChunkSink,
    ) -> Result<(), SeederError> {
        let mut seats = VecDeque::from(self.client.seats_of(self.blob).await?);
        let next = AtomicU32::new(run.start);
        let mut turn = seats.pop_front().map(|seat| (seat, None));
        let mut last = SeederError::None("none is configured".to_owned());
        while let Some((seat, body)) = turn.take() {
            let rest = next.load(Ordering::Relaxed)..run.end;
            let watched = Watched { sink: &mut *sink, seat: &seat, next: &next };
            let asked = self.ask(&seat, body, rest.clone(), priority, watched);
            match self.watch(&seat, asked, &mut seats, &next, rest, priority).await {
                Turn::Ended(Ok(())) => {
                    seat.praise();
                    return Ok(());
                }
                Turn::Ended(Err(error)) => {
                    seat.judge(&error);
                    let is_over = next.load(Ordering::Relaxed) >= run.end;
                    if is_over || !error.is_elsewhere() {
                        return Err(error);
                    }
                    // That one does not have it says nothing of why the others did not give it.
                    if !matches!(error, SeederError::Missing { .. }) || matches!(last, SeederError::None(_)) {
                        last = error;
                    }
                    turn = seats.pop_front().map(|seat| (seat, None));
                }
                Turn::Overtaken(other, body) => {
                    seat.judge_silent(SILENCE);
                    turn = Some((other, Some(body)));
                }
            }
        }
        Err(last)
    }

    /// Takes `run` from a seeder, which may have begun to give it.
    async fn ask(
        &self,
        seat: &Seat,
        body: Option<Body>,
        run: Range<u32>,
        priority: Priority,
        mut sink: Watched<'_>,
    ) -> Result<(), SeederError> {
        let body = match body {
            Some(body) => body,
            None => {
                let opened = seat.chunks(self.blob, &run, priority).await;
                seat.note_answer();
                opened?
            }
        };
        body.move_chunks(self.geometry, run, &mut sink).await.map_err(|fault| seat.error(fault))
    }

    /// Waits for what `seat` was asked for. While it is silent, one after the other of those that do not rest is asked for what is
    /// missing, and `seat` goes on being waited for: it may be the only one that has the layer.
    async fn watch(
        &self,
        seat: &Seat,
        asked: impl Future<Output = Result<(), SeederError>>,
        others: &mut VecDeque<Arc<Seat>>,
        next: &AtomicU32,
        run: Range<u32>,
        priority: Priority,
    ) -> Turn {
        let mut asked = pin!(asked);
        let mut opening = FuturesUnordered::new();
        let mut asked_too: Vec<Arc<Seat>> = Vec::new();
        let mut look_at = Instant::now() + SILENCE;
        loop {
            let may_ask = others.front().is_some_and(|other| other.resting().is_none());
            tokio::select! {
                biased;
                ended = &mut asked => {
                    asked_too.into_iter().for_each(|other| others.push_front(other));
                    return Turn::Ended(ended);
                }
                Some((other, from, opened)) = opening.next() => {
                    let other: Arc<Seat> = other;
                    other.note_answer();
                    asked_too.retain(|asked| !Arc::ptr_eq(asked, &other));
                    match opened {
                        // It goes on meanwhile, or gave some of that.
                        Ok(_) if next.load(Ordering::Relaxed) != from || !is_silent(seat) => others.push_back(other),
                        Ok(body) => return Turn::Overtaken(other, body),
                        Err(error) => other.judge(&error),
                    }
                }
                () = tokio::time::sleep_until(look_at), if may_ask => {
                    let silent_at = seat.moved_at() + SILENCE;
                    if silent_at > Instant::now() {
                        look_at = silent_at;
                    } else if let Some(other) = others.pop_front() {
                        look_at = Instant::now() + SILENCE;
                        let from = next.load(Ordering::Relaxed);
                        let missing = from..run.end;
                        asked_too.push(Arc::clone(&other));
                        opening.push(async move {
                            let opened = other.chunks(self.blob, &missing, priority).await;
                            (other, from, opened)
                        });
                    }
                }
            }
        }
    }
}

fn is_silent(seat: &Seat) -> bool {
    seat.moved_at() + SILENCE <= Instant::now()
}

impl ChunkSink for Watched<'_> {
    fn chunk(&mut self, chunk: ChunkIndex, plain: &[u8], wire_bytes: usize) -> Result<(), WrongChunk> {
        self.sink.chunk(chunk, plain, wire_bytes)?;
        self.next.store(chunk.0.saturating_add(1), Ordering::Relaxed);
        Ok(())
    }

    fn frame(&mut self, chunk: ChunkIndex, plain: &[u8], frame: Frame<'_>) -> Result<(), WrongChunk> {
        self.sink.frame(chunk, plain, frame)?;
        self.next.store(chunk.0.saturating_add(1), Ordering::Relaxed);
        Ok(())
    }

    fn moved(&mut self, wire_bytes: usize) {
        self.seat.note_moved(wire_bytes);
        self.sink.moved(wire_bytes);
    }
}

impl Source for SeederSource {
    fn kind(&self) -> SourceKind {
        SourceKind::Seeder
    }

    fn label(&self) -> String {
        "seeder".to_owned()
    }

    fn fetch<'a>(
        &'a self,
        run: Range<u32>,
        priority: Priority,
        sink: &'a mut dyn ChunkSink,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async move { self.fetch_run(run, priority, sink).await.map_err(SeederError::into_source_error) })
    }
}
