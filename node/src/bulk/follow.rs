//! The chunks of a layer as they come into being, from who ingests it or who follows that itself.

use std::sync::Arc;

use layer::chunk::CHUNK_LOG2_RANGE;
use layer::wire::{Frame, PREFIX_LEN};
use layer::{ChunkIndex, Digest};
use swarm::Priority;

use super::{Body, Bulk, Fault};
use crate::serve::{CHUNK_LOG2, FIRST};

/// A body of frames that goes on until the last chunk.
pub(crate) struct Follow {
    body: Body,
    chunk_log2: u8,
    buffer: Vec<u8>,
    taken: usize,
    next: u32,
    /// Lasts as long as the body is read.
    _machine: Option<Arc<Bulk>>,
}

impl Bulk {
    /// The chunks of a layer that is being ingested, from `first` on. An older seeder begins with the first one of all.
    pub(crate) async fn follow(&self, blob: Digest, first: u32) -> Result<Follow, Fault> {
        let path = match first {
            0 => format!("/v1/layers/{blob}/follow"),
            first => format!("/v1/layers/{blob}/follow?first={first}"),
        };
        let answer = self.ask(blob, &path, Some(Priority::Background)).await?;
        let number = |name: &str| -> Option<u32> { answer.headers().get(name)?.to_str().ok()?.parse().ok() };
        let chunk_log2 = number(CHUNK_LOG2).and_then(|log2| u8::try_from(log2).ok());
        let chunk_log2 = chunk_log2
            .filter(|log2| CHUNK_LOG2_RANGE.contains(log2))
            .ok_or_else(|| Fault::wrong(format!("no usable {CHUNK_LOG2}")))?;
        let next = number(FIRST).unwrap_or(0);
        if next > first {
            return Err(Fault::wrong(format!("chunks from {next} on instead of {first}")));
        }
        let body = self.body(answer);
        Ok(Follow { body, chunk_log2, buffer: Vec::new(), taken: 0, next, _machine: None })
    }
}

impl Follow {
    /// Keeps the connections of `machine` for as long as this is read.
    pub(crate) fn over(self, machine: Arc<Bulk>) -> Self {
        Self { _machine: Some(machine), ..self }
    }

    /// log2 of the chunk size.
    pub(crate) const fn chunk_log2(&self) -> u8 {
        self.chunk_log2
    }

    /// The next chunk, unverified; `None` after the last.
    pub(crate) async fn next(&mut self) -> Result<Option<(ChunkIndex, Frame<'_>)>, Fault> {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        loop {
            let claimed = self.buffer.first_chunk::<PREFIX_LEN>().map(|prefix| u32::from_le_bytes(*prefix) << 1 >> 1);
            if claimed.is_some_and(|len| len == 0 || len > 1 << self.chunk_log2) {
                return Err(Fault::wrong("a frame of an impossible length"));
            }
            if claimed.is_some_and(|len| self.buffer.len() - PREFIX_LEN >= len as usize) {
                break;
            }
            match self.body.next().await? {
                Some(bytes) => self.buffer.extend_from_slice(&bytes),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(Fault::wrong("the chunks end inside a frame")),
            }
        }
        let Some((frame, _)) = Frame::split(&self.buffer) else {
            return Err(Fault::wrong("a frame that cannot be read"));
        };
        let chunk = ChunkIndex(self.next);
        self.next = self.next.checked_add(1).ok_or_else(|| Fault::wrong("too many chunks"))?;
        self.taken = frame.wire_len();
        Ok(Some((chunk, frame)))
    }
}
