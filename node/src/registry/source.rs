//! A layer's chunks straight from its registry: spans of the blob, inflated here.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

use layer::Geometry;
use layer::index::Spans;

use super::client::{Client, RegistryError};
use crate::source::{BlobRef, BoxFuture, ChunkSink, Source, SourceError, SourceKind};
use crate::span_pass::{SpanPass, likely_units, units};

/// Gives the spans section when it is needed.
pub trait SpansProvider: Send + Sync + 'static {
    /// The spans; an error says why they are not here.
    fn spans(&self) -> BoxFuture<'_, Result<std::sync::Arc<Spans>, String>>;
}

impl SpansProvider for std::sync::Arc<Spans> {
    fn spans(&self) -> BoxFuture<'_, Result<std::sync::Arc<Spans>, String>> {
        Box::pin(std::future::ready(Ok(Self::clone(self))))
    }
}

/// The chunks of one layer, out of its blob.
pub struct RegistrySource {
    client: Client,
    blob: BlobRef,
    geometry: Geometry,
    spans: Box<dyn SpansProvider>,
    units: OnceLock<Vec<Range<u64>>>,
}

impl RegistrySource {
    /// A source of the layer of `blob`, whose device is cut by `geometry`.
    pub fn new(client: Client, blob: BlobRef, geometry: Geometry, spans: impl SpansProvider) -> Self {
        Self { client, blob, geometry, spans: Box::new(spans), units: OnceLock::new() }
    }

    /// The same with the device ranges of the spans, so that no span is fetched for two runs.
    pub fn with_units(mut self, spans: &Spans) -> Self {
        self.units = OnceLock::from(units(spans));
        self
    }

    async fn fetch_run(&self, run: Range<u32>, sink: &mut dyn ChunkSink) -> Result<(), SourceError> {
        let spans = self.spans.spans().await;
        let spans = spans.map_err(|reason| SourceError::Missing { source_label: self.label(), reason })?;
        self.units.get_or_init(|| units(&spans));
        let covering = spans.covering(run.clone());
        let (Some(first), Some(last)) = (covering.first(), covering.last()) else {
            return Err(SourceError::Missing { source_label: self.label(), reason: "no such chunks".to_owned() });
        };
        let (start, end) = (first.blob.start, last.blob.end);
        let opened = self.client.blob(&self.blob, start, Some(end)).await;
        let mut body = opened.map_err(|error| self.error(error))?;
        let mut pass = SpanPass::new(covering, self.geometry, start);
        let mut wire_bytes = 0;
        while !pass.is_done() {
            let Some(bytes) = body.next().await.map_err(|error| self.error(error))? else { break };
            wire_bytes += bytes.len();
            // Inflating a piece takes well below a millisecond: not worth another thread.
            let chunks = pass.push(&bytes).map_err(|reason| self.corrupt(reason))?;
            for (chunk, plain) in chunks {
                let wire_bytes = std::mem::take(&mut wire_bytes);
                sink.chunk(chunk, &plain, wire_bytes).map_err(|error| self.corrupt(error.to_string()))?;
            }
        }
        match pass.is_done() {
            true => Ok(()),
            false => Err(self.corrupt("the blob ended inside a span".to_owned())),
        }
    }

    fn corrupt(&self, reason: String) -> SourceError {
        SourceError::Corrupt { source_label: self.label(), reason }
    }

    fn error(&self, error: RegistryError) -> SourceError {
        let (source_label, reason) = (self.label(), error.to_string());
        match error {
            RegistryError::Unreachable { .. } => SourceError::Unreachable { source_label, reason },
            RegistryError::Stalled { after, .. } => SourceError::Stalled { source_label, after },
            RegistryError::Denied { .. } | RegistryError::Credentials { .. } => {
                SourceError::Denied { source_label, reason }
            }
            RegistryError::NotFound { .. } => SourceError::Missing { source_label, reason },
            RegistryError::Busy { retry_after, .. } => SourceError::Busy { source_label, reason, retry_after },
            RegistryError::Protocol { .. } => SourceError::Corrupt { source_label, reason },
        }
    }
}

impl fmt::Debug for RegistrySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistrySource").field("blob", &self.blob).finish_non_exhaustive()
    }
}

impl Source for RegistrySource {
    fn kind(&self) -> SourceKind {
        SourceKind::Registry
    }

    fn label(&self) -> String {
        format!("registry {}", self.blob.registry)
    }

    /// The spans, or what they will be like: until they are known, reads that lie near each other share a fetch.
    fn units(&self) -> Vec<Range<u64>> {
        self.units.get().cloned().unwrap_or_else(|| likely_units(self.geometry))
    }

    fn fetch<'a>(&'a self, run: Range<u32>, sink: &'a mut dyn ChunkSink) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(self.fetch_run(run, sink))
    }
}
