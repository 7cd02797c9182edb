//! A layer's chunks straight from its registry: spans of the blob, inflated here.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::Duration;

use layer::Geometry;
use layer::index::Spans;

use super::client::Client;
use super::error::{Fault, RegistryError};
use crate::source::{BlobRef, BoxFuture, ChunkSink, Source, SourceError, SourceKind};
use crate::span_pass::{SpanPass, likely_units, surprises, units};

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

/// Tries without a new byte before a transfer that was under way fails. Whoever asks again then starts anew.
const TRIES_MAX: u32 = 4;
/// Pause after a failed try; doubled with each further one.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// The longest rest of a registry that a transfer sits out.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Why a transfer stopped.
enum FetchError {
    Registry(RegistryError),
    Corrupt(String),
}

impl From<RegistryError> for FetchError {
    fn from(error: RegistryError) -> Self {
        Self::Registry(error)
    }
}

impl FetchError {
    fn into_source_error(self, source: &RegistrySource) -> SourceError {
        match self {
            Self::Registry(error) => source.error(error),
            Self::Corrupt(reason) => source.corrupt(reason),
        }
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
        let was_planned = self.units.get().is_some();
        let spans = self.spans.spans().await;
        let spans = spans.map_err(|reason| SourceError::Missing { source_label: self.label(), reason })?;
        self.units.get_or_init(|| units(&spans));
        let covering = spans.covering(run.clone());
        let (Some(first), Some(last)) = (covering.first(), covering.last()) else {
            return Err(SourceError::Missing { source_label: self.label(), reason: "no such chunks".to_owned() });
        };
        if !was_planned && surprises(covering) {
            let reason = "its spans were not known when it was asked".to_owned();
            return Err(SourceError::Missing { source_label: self.label(), reason });
        }
        let end = last.blob.end;
        let mut pass = SpanPass::new(covering, self.geometry, first.blob.start);
        let mut tries = 0;
        while !pass.is_done() {
            let at = pass.at();
            let Err(error) = self.continue_pass(&mut pass, end, sink).await else { continue };
            // A frame of zstd can be read from its start only, however large it is, so a pass survives its connections.
            tries = if pass.at() > at { 1 } else { tries + 1 };
            let FetchError::Registry(error) = error else { return Err(error.into_source_error(self)) };
            let pause = error.retry_after().unwrap_or(RETRY_PAUSE * 2u32.pow(tries));
            // Before anything came another source may do as well, and the swarm knows better when to come back.
            if !error.is_transient() || pass.at() == first.blob.start || tries >= TRIES_MAX || pause > PAUSE_MAX {
                return Err(self.error(error));
            }
            tracing::debug!(blob = %self.blob, at = pass.at(), %error, "the transfer is taken up again");
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }

    /// Goes on with a pass over one connection, to the pass's end.
    async fn continue_pass(
        &self,
        pass: &mut SpanPass<'_>,
        end: u64,
        sink: &mut dyn ChunkSink,
    ) -> Result<(), FetchError> {
        let mut body = self.client.blob(&self.blob, pass.at(), Some(end)).await?;
        while !pass.is_done() {
            let Some(bytes) = body.next().await? else {
                return Err(FetchError::Corrupt("the blob ended inside a span".to_owned()));
            };
            pass.take(&bytes, sink).await.map_err(FetchError::Corrupt)?;
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
            Fault::Busy { retry_after, .. } => SourceError::Busy { source_label, reason, retry_after },
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

    /// The spans, or what they will be like: until they are known, reads that lie near each other share a fetch.
    fn units(&self) -> Vec<Range<u64>> {
        self.units.get().cloned().unwrap_or_else(|| likely_units(self.geometry))
    }

    fn fetch<'a>(&'a self, run: Range<u32>, sink: &'a mut dyn ChunkSink) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(self.fetch_run(run, sink))
    }
}
