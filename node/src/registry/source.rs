//! A layer's chunks straight from its registry: spans of the blob, inflated here.

use std::fmt;
use std::ops::Range;

use layer::Geometry;
use layer::index::Spans;

use super::client::Client;
use super::error::{Fault, RegistryError};
use crate::source::{BlobRef, BoxFuture, ChunkSink, Priority, Source, SourceError, SourceKind};
use crate::span_pass::{SpanPass, Units};

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
    units: Units,
}

impl RegistrySource {
    /// A source of the layer of `blob`, whose device is cut by `geometry`.
    pub fn new(client: Client, blob: BlobRef, geometry: Geometry, spans: impl SpansProvider) -> Self {
        Self { client, blob, geometry, spans: Box::new(spans), units: Units::default() }
    }

    /// The same with the device ranges of the spans, so that no span is fetched for two runs.
    pub fn with_units(mut self, spans: &Spans) -> Self {
        self.units = Units::of(spans);
        self
    }

    async fn fetch_run(&self, run: Range<u32>, sink: &mut dyn ChunkSink) -> Result<(), SourceError> {
        let missing = |reason| SourceError::Missing { source_label: self.label(), reason };
        let spans = self.spans.spans().await.map_err(missing)?;
        let plan = self.units.plan(&spans, self.geometry, run).map_err(|reason| missing(reason.to_owned()))?;
        let mut pass = SpanPass::new(&plan);
        while !pass.is_done() {
            let blob = pass.blob();
            let opened = self.client.blob(&self.blob, blob.start, Some(blob.end)).await;
            let mut body = opened.map_err(|error| self.error(error))?;
            while !pass.is_done() {
                let Some(bytes) = body.next().await.map_err(|error| self.error(error))? else { break };
                pass.take(&bytes, sink).await.map_err(|reason| self.corrupt(reason))?;
            }
            if !pass.is_done() && pass.blob().start < blob.end {
                return Err(self.corrupt("the blob ended inside a span".to_owned()));
            }
        }
        Ok(())
    }

    fn corrupt(&self, reason: String) -> SourceError {
        SourceError::Corrupt { source_label: self.label(), reason }
    }

    fn error(&self, error: RegistryError) -> SourceError {
        let (source_label, reason) = (self.label(), error.to_string());
        match error.fault {
            Fault::Name { .. } | Fault::Unreachable { .. } | Fault::Tls { .. } | Fault::Proxy { .. } => {
                SourceError::Unreachable { source_label, reason }
            }
            Fault::Stalled { after } => SourceError::Stalled { source_label, after },
            Fault::Denied { .. } | Fault::Credentials { .. } | Fault::Configuration { .. } => {
                SourceError::Denied { source_label, reason }
            }
            Fault::NotFound { .. } => SourceError::Missing { source_label, reason },
            Fault::Busy { retry_after, .. } => SourceError::Overloaded { source_label, reason, retry_after },
            Fault::Protocol { .. } => SourceError::Corrupt { source_label, reason },
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

    fn units(&self) -> Vec<Range<u64>> {
        self.units.get(self.geometry)
    }

    fn fetch<'a>(
        &'a self,
        run: Range<u32>,
        _: Priority,
        sink: &'a mut dyn ChunkSink,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(self.fetch_run(run, sink))
    }
}
