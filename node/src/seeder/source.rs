//! A layer's chunks from the seeders, in their wire form.

use std::ops::Range;

use layer::{Digest, Geometry};

use super::client::Client;
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
        let opened = self.client.first_of(blob, |seat| {
            let run = run.clone();
            async move {
                let body = seat.chunks(blob, &run, priority).await?;
                Ok((seat, body))
            }
        });
        let (seat, body) = opened.await.map_err(|error| error.into_source_error())?;
        let moved = body.move_chunks(self.geometry, run, sink).await.map_err(|fault| seat.error(fault));
        if let Err(error) = &moved {
            seat.judge(error);
        }
        moved.map_err(|error| error.into_source_error())
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
