//! A layer's chunks from its blob in containerd's content store: spans of it, inflated here.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Weak};

use layer::index::Spans;
use layer::{Digest, Geometry};
use node::layer::Layer;
use node::source::{BoxFuture, ChunkSink, Priority, Source, SourceError, SourceKind};
use node::span_pass::{SpanPass, Units};

use super::content::{ContentError, ContentStore};

/// The chunks of one layer, out of a blob that is on this machine. Forgotten by its layer once the blob is not there any more.
pub struct ContentSource {
    content: ContentStore,
    namespace: String,
    blob: Digest,
    geometry: Geometry,
    // The layer holds its sources, so they must not hold the layer.
    layer: Weak<Layer>,
    units: Units,
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
            units: Units::default(),
        }
    }

    async fn fetch_run(&self, run: Range<u32>, sink: &mut dyn ChunkSink) -> Result<(), SourceError> {
        let spans = self.spans().await?;
        let plan = self.units.plan(&spans, self.geometry, run).map_err(|reason| self.missing(reason.to_owned()))?;
        let mut pass = SpanPass::new(&plan);
        while !pass.is_done() {
            let blob = pass.blob();
            let opened = self.content.open(&self.namespace, self.blob, blob.clone()).await;
            let Some(mut body) = opened.map_err(|error| self.error(&error))? else { return Err(self.forget()) };
            while !pass.is_done() {
                let Some(bytes) = body.next().await.map_err(|error| self.error(&error))? else { break };
                pass.take(&bytes, sink).await.map_err(|reason| self.corrupt(reason))?;
            }
            if !pass.is_done() && pass.blob().start < blob.end {
                return Err(self.corrupt("the blob ended inside a span".to_owned()));
            }
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use layer::index::Compression;
    use layer::ingest::{Ingest, Options};
    use node::store::LayerParts;
    use node::{Node, NodeConfig};

    use super::super::fake::FakeContainerd;
    use super::*;

    /// A layer with one file, and its blob.
    fn layer(node: &Node, text: &str) -> (Arc<Layer>, Vec<u8>) {
        let mut header = tar::Header::new_gnu();
        header.set_path("file").unwrap();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append(&header, text.as_bytes()).unwrap();
        let blob = builder.into_inner().unwrap();
        let options = Options { chunk_log2: 12, ..Options::default() };
        let size = Some(blob.len() as u64);
        let mut ingest = Ingest::new(Digest::of(&blob), size, Some(Compression::None), options).unwrap();
        ingest.push(&blob, &mut |_, _, _| {}).unwrap();
        let index = ingest.finish(&mut |_, _, _| {}).unwrap();
        let (entries, chunk_digests) = (index.entries, index.chunk_digests);
        let parts = LayerParts {
            header: index.header,
            signature: Vec::new(),
            entries,
            chunk_digests,
            spans: Some(index.spans),
        };
        (node.insert(&parts).unwrap(), blob)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn reads_a_blob_of_this_machine_and_forgets_one_that_was_deleted() {
        let containerd = FakeContainerd::start();
        let folder = tempfile::tempdir().unwrap();
        let node =
            Node::open(NodeConfig { cache: node::config::CacheConfig::WHOLE_DISK, ..NodeConfig::new(folder.path()) })
                .unwrap();
        let (here, blob) = layer(&node, &"here ".repeat(20_000));
        let digest = containerd.put("here", &blob, &[]);
        assert_eq!(digest, here.header().blob());
        here.add_source(Arc::new(ContentSource::new(containerd.content(), "here", &here)));
        let device = here.read(0..blob.len() as u64).await.unwrap();
        assert_eq!(&device[..], &blob[..]);
        // Readers are woken before their chunk is counted.
        let counted = async {
            while here.counters().local.plain_bytes < blob.len() as u64 {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), counted).await.expect("is counted as local");

        let (gone, _) = layer(&node, "gone");
        gone.add_source(Arc::new(ContentSource::new(containerd.content(), "here", &gone)));
        let reading = tokio::spawn(gone.read(0..10));
        let forgotten = async {
            while gone.has_sources() {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), forgotten).await.expect("is forgotten");
        reading.abort();
        node.shutdown().await;
    }
}
