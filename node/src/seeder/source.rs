//! A layer's chunks from the seeders, in their wire form.

use std::ops::Range;

use layer::wire::{Decoder, FrameReader};
use layer::{Digest, Geometry};

use super::client::{Body, Client, Seat};
use crate::source::{BoxFuture, ChunkSink, Priority, Source, SourceError, SourceKind};

/// The chunks of one layer, from whichever seeder has them.
#[derive(Debug)]
pub struct SeederSource {
    client: Client,
    blob: Digest,
    geometry: Geometry,
}

impl SeederSource {
    /// A source of the layer of `blob`, whose device is cut by `geometry`.
    pub const fn new(client: Client, blob: Digest, geometry: Geometry) -> Self {
        Self { client, blob, geometry }
    }

    async fn fetch_run(
        &self,
        run: Range<u32>,
        priority: Priority,
        sink: &mut dyn ChunkSink,
    ) -> Result<(), SourceError> {
        let blob = self.blob;
        let opened = self.client.first(|seat| {
            let run = run.clone();
            async move {
                let body = seat.chunks(blob, &run, priority).await?;
                Ok((seat, body))
            }
        });
        let (seat, body) = opened.await.map_err(|error| error.into_source_error())?;
        let moved = self.move_run(&seat, body, run, sink).await;
        if let Err(error) = &moved {
            seat.judge(error);
        }
        moved.map_err(|error| error.into_source_error())
    }

    async fn move_run(
        &self,
        seat: &Seat,
        mut body: Body,
        run: Range<u32>,
        sink: &mut dyn ChunkSink,
    ) -> Result<(), super::SeederError> {
        let mut frames = FrameReader::new(self.geometry, run);
        let (mut decoder, mut plain) = (Decoder::new(), Vec::new());
        while let Some(bytes) = body.next().await? {
            frames.push(&bytes);
            while let Some((chunk, frame)) = frames.next_frame().map_err(|error| seat.wrong(error))? {
                let len = self.geometry.chunk_len(chunk);
                decoder.decode(frame, len, &mut plain).map_err(|error| seat.wrong(error))?;
                sink.chunk(chunk, &plain, frame.wire_len()).map_err(|error| seat.wrong(error))?;
            }
        }
        frames.finish().map_err(|error| seat.wrong(error))
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
        Box::pin(self.fetch_run(run, priority, sink))
    }
}
