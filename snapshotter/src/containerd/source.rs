//! A layer's chunks from its blob in containerd's content store: spans of it, inflated here.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock, Weak};

use layer::index::Spans;
use layer::{Digest, Geometry};
use node::layer::Layer;
use node::source::{BoxFuture, ChunkSink, Source, SourceError, SourceKind};
use node::span_pass::{SpanPass, likely_units, surprises, units};

use super::content::{ContentError, ContentStore};

/// The chunks of one layer, out of a blob that is on this machine. Forgotten by its layer once the blob is not there any more.
pub struct ContentSource {
    content: ContentStore,
    namespace: String,
    blob: Digest,
    geometry: Geometry,
    // The layer holds its sources, so they must not hold the layer.
    layer: Weak<Layer>,
    units: OnceLock<Vec<Range<u64>>>,
}

impl ContentSource {
    /// A source of `layer`, whose blob is in `namespace` of the content store.
    pub fn new(content: ContentStore, namespace: &str, layer: &Arc<Layer>) -> Self {
        Self {
            content,
            namespace: namespace.to_owned(),
            blob: layer.header().blob(),
            geometry: layer.geometry(),
            layer: Arc::downgrade(layer),
            units: OnceLock::new(),
        }
    }

    async fn fetch_run(&self, run: Range<u32>, sink: &mut dyn ChunkSink) -> Result<(), SourceError> {
        let was_planned = self.units.get().is_some();
        let spans = self.spans().await?;
        self.units.get_or_init(|| units(&spans));
        let covering = spans.covering(run);
        let (Some(first), Some(last)) = (covering.first(), covering.last()) else {
            return Err(self.missing("no such chunks".to_owned()));
        };
        if !was_planned && surprises(covering) {
            return Err(self.missing("its spans were not known when it was asked".to_owned()));
        }
        let range = first.blob.start..last.blob.end;
        let opened = self.content.open(&self.namespace, self.blob, range.clone()).await;
        let Some(mut body) = opened.map_err(|error| self.error(&error))? else { return Err(self.forget()) };
        let mut pass = SpanPass::new(covering, self.geometry, range.start);
        while !pass.is_done() {
            let Some(bytes) = body.next().await.map_err(|error| self.error(&error))? else { break };
            pass.take(&bytes, sink).await.map_err(|reason| self.corrupt(reason))?;
        }
        match pass.is_done() {
            true => Ok(()),
            false => Err(self.corrupt("the blob ended inside a span".to_owned())),
        }
    }

    /// The layer's spans, read from disk with each call: the kernel keeps them at hand while they are in use, and nobody
    /// else has to.
    async fn spans(&self) -> Result<Spans, SourceError> {
        let layer = self.layer.upgrade().ok_or_else(|| self.missing("the layer was removed".to_owned()))?;
        let spans = tokio::task::spawn_blocking(move || layer.spans()).await;
        match spans {
            Ok(Ok(Some(spans))) => Ok(spans),
            Ok(Ok(None)) => Err(self.missing("its spans section is not here yet".to_owned())),
            Ok(Err(error)) => Err(self.missing(error.to_string())),
            Err(error) => Err(self.missing(error.to_string())),
        }
    }

    /// The blob was deleted: whoever has it is asked from here on.
    fn forget(&self) -> SourceError {
        if let Some(layer) = self.layer.upgrade() {
            layer.remove_source(self);
        }
        self.missing("the blob was deleted there".to_owned())
    }

    fn missing(&self, reason: String) -> SourceError {
        SourceError::Missing { source_label: self.label(), reason }
    }

    fn corrupt(&self, reason: String) -> SourceError {
        SourceError::Corrupt { source_label: self.label(), reason }
    }

    fn error(&self, error: &ContentError) -> SourceError {
        SourceError::Unreachable { source_label: self.label(), reason: super::status::chain(error) }
    }
}

impl fmt::Debug for ContentSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { namespace, blob, .. } = self;
        f.debug_struct("ContentSource").field("namespace", namespace).field("blob", blob).finish_non_exhaustive()
    }
}

impl Source for ContentSource {
    fn kind(&self) -> SourceKind {
        SourceKind::Local
    }

    fn label(&self) -> String {
        "containerd's content store".to_owned()
    }

    fn units(&self) -> Vec<Range<u64>> {
        self.units.get().cloned().unwrap_or_else(|| likely_units(self.geometry))
    }

    fn fetch<'a>(&'a self, run: Range<u32>, sink: &'a mut dyn ChunkSink) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(self.fetch_run(run, sink))
    }
}
