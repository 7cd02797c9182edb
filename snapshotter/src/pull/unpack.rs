//! From an image's layers to snapshots, as containerd's own unpacker does it, with the labels that tell which layer is wanted. A
//! layer that the snapshotter does not take is fetched and unpacked by containerd.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use layer::ChainId;
use node::registry;
use node::registry::image::ImageRef;
use node::source::BlobRef;
use proto::containerd::services::diff::v1::ApplyRequest;
use proto::containerd::services::diff::v1::diff_client::DiffClient;
use proto::containerd::services::snapshots::v1 as snapshots;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use proto::containerd::types::{Descriptor, Mount};
use tonic::Code;
use tonic::transport::Channel;

use super::Pull;
use super::import::{Importer, Lease};
use super::progress::{LayerProgress, Progress};
use crate::containerd::connection::Connection;
use crate::lazy::image::{Image, ImageLayer};
use crate::lazy::labels;

/// Longest value of a label: containerd takes 4096 bytes with the key.
const LABEL_BYTES_MAX: usize = 4096 - labels::LAYERS.len();

/// How often a layer is prepared when it vanishes meanwhile, as containerd's own unpacker tries.
const TRIES: u32 = 3;

/// Makes the snapshots of one image.
#[derive(Debug)]
pub struct Unpacker<'a> {
    lease: &'a Lease,
    importer: &'a Importer<'a>,
    registry: &'a registry::Client,
    pull: &'a Pull,
    image: &'a ImageRef,
    snapshots: SnapshotsClient<Channel>,
    diff: DiffClient<Channel>,
}

enum Prepared {
    /// The snapshot is there: lazy.
    There,
    /// Containerd is to unpack into these mounts.
    Unpack { key: String, mounts: Vec<Mount> },
}

impl<'a> Unpacker<'a> {
    /// For the layers of `image`.
    pub fn new(
        connection: &Connection,
        lease: &'a Lease,
        importer: &'a Importer<'a>,
        registry: &'a registry::Client,
        pull: &'a Pull,
        image: &'a ImageRef,
    ) -> Self {
        let snapshots = SnapshotsClient::new(connection.channel());
        let diff = DiffClient::new(connection.channel());
        Self { lease, importer, registry, pull, image, snapshots, diff }
    }

    /// Makes the snapshot of layer `position`, whose blob is at `place`; `true` where containerd unpacked it.
    pub async fn layer(
        &mut self,
        image: &Image,
        position: usize,
        place: &BlobRef,
        progress: &Progress,
    ) -> anyhow::Result<bool> {
        let layer = image.layers.get(position).context("the image has no such layer")?;
        let parent = position.checked_sub(1).and_then(|below| image.layers.get(below)).map(|below| below.chain_id);
        let shown = progress.layer(position + 1, image.layers.len(), &layer.blob.to_string());
        if self.exists(layer.chain_id).await? {
            shown.done("here already");
            return Ok(false);
        }
        let labels = self.labels(image, position, layer, parent);
        let prepared = self.prepare(layer.chain_id, parent, &labels).await;
        match prepared.with_context(|| format!("cannot prepare the snapshot of layer {}", layer.blob))? {
            Prepared::There => {
                shown.done("lazy");
                Ok(false)
            }
            Prepared::Unpack { key, mounts } => {
                let unpacked = self.unpack(layer, place, &key, mounts, labels, &shown).await;
                if let Err(error) = unpacked {
                    let request =
                        snapshots::RemoveSnapshotRequest { snapshotter: self.snapshotter(), key: key.clone() };
                    if let Err(status) = self.snapshots.remove(self.lease.request(request)?).await {
                        progress.note(&format!("cannot remove the snapshot {key}: {}", status.message()));
                    }
                    return Err(error.context(format!("cannot unpack layer {}", layer.blob)));
                }
                shown.done("not lazy, unpacked (drover-snapshotter status says why)");
                Ok(true)
            }
        }
    }

    async fn prepare(
        &mut self,
        chain: ChainId,
        parent: Option<ChainId>,
        labels: &HashMap<String, String>,
    ) -> anyhow::Result<Prepared> {
        for _ in 0..TRIES {
            let key = format!("extract-{} {chain}", unique());
            let request = snapshots::PrepareSnapshotRequest {
                snapshotter: self.snapshotter(),
                key: key.clone(),
                parent: parent.map(|parent| parent.to_string()).unwrap_or_default(),
                labels: labels.clone(),
            };
            // No deadline of ours: the snapshotter has one, and waits while bytes move.
            match self.snapshots.prepare(self.lease.request(request)?).await {
                Ok(answer) => return Ok(Prepared::Unpack { key, mounts: answer.into_inner().mounts }),
                Err(status) if status.code() == Code::AlreadyExists => {
                    if self.exists(chain).await? {
                        return Ok(Prepared::There);
                    }
                }
                Err(status) if status.code() == Code::NotFound => {
                    bail!(
                        "containerd: {} (is a snapshotter of the name {} in its proxy_plugins?)",
                        status.message(),
                        self.pull.snapshotter
                    );
                }
                Err(status) => bail!("containerd: {}", status.message()),
            }
        }
        bail!("the snapshot was made and removed again {TRIES} times: pull again")
    }

    async fn unpack(
        &mut self,
        layer: &ImageLayer,
        place: &BlobRef,
        key: &str,
        mounts: Vec<Mount>,
        labels: HashMap<String, String>,
        shown: &LayerProgress,
    ) -> anyhow::Result<()> {
        shown.fetching(layer.size);
        let body = self.registry.blob(place, 0, None).await?;
        self.importer.blob(place, body, shown).await?;
        let diff = Descriptor {
            media_type: layer.media_type.clone(),
            digest: layer.blob.to_string(),
            size: i64::try_from(layer.size)?,
            annotations: HashMap::new(),
        };
        let apply = self.lease.request(ApplyRequest { diff: Some(diff), mounts })?;
        let applied =
            self.diff.apply(apply).await.map_err(|status| anyhow::anyhow!("containerd: {}", status.message()))?;
        let applied = applied.into_inner().applied.map(|applied| applied.digest).unwrap_or_default();
        ensure!(
            applied == layer.diff_id.to_string(),
            "it unpacks to {applied}, but the image's configuration says {}",
            layer.diff_id
        );
        let commit = snapshots::CommitSnapshotRequest {
            snapshotter: self.snapshotter(),
            name: layer.chain_id.to_string(),
            key: key.to_owned(),
            labels,
            parent: String::new(),
        };
        match self.snapshots.commit(self.lease.request(commit)?).await {
            Err(status) if status.code() != Code::AlreadyExists => bail!("containerd: {}", status.message()),
            _ => {}
        }
        let uncompressed = HashMap::from([("containerd.io/uncompressed".to_owned(), layer.diff_id.to_string())]);
        self.importer.label(layer.blob, uncompressed).await
    }

    async fn exists(&mut self, chain: ChainId) -> anyhow::Result<bool> {
        let request = snapshots::StatSnapshotRequest { snapshotter: self.snapshotter(), key: chain.to_string() };
        match self.snapshots.stat(self.lease.request(request)?).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => bail!("containerd cannot say whether the snapshot {chain} is there: {}", status.message()),
        }
    }

    fn labels(
        &self,
        image: &Image,
        position: usize,
        layer: &ImageLayer,
        parent: Option<ChainId>,
    ) -> HashMap<String, String> {
        let mut blobs = String::new();
        for layer in image.layers.iter().skip(position) {
            let digest = layer.blob.to_string();
            if blobs.len() + digest.len() + 1 > LABEL_BYTES_MAX {
                break;
            }
            if !blobs.is_empty() {
                blobs.push(',');
            }
            blobs.push_str(&digest);
        }
        let mut labels = HashMap::from([
            (crate::snapshots::store::SNAPSHOT_REF.to_owned(), layer.chain_id.to_string()),
            (labels::IMAGE.to_owned(), self.image.to_string()),
            (labels::LAYER.to_owned(), layer.blob.to_string()),
            (labels::LAYERS.to_owned(), blobs),
            (labels::MANIFEST.to_owned(), image.manifest.to_string()),
            (labels::DIFF_ID.to_owned(), layer.diff_id.to_string()),
        ]);
        if let Some(parent) = parent {
            labels.insert("containerd.io/snapshot/parent-chain-id".to_owned(), parent.to_string());
        }
        labels
    }

    fn snapshotter(&self) -> String {
        self.pull.snapshotter.clone()
    }
}

/// Different for each call and process: the time and a number of this process.
fn unique() -> String {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}-drover{}", time.as_nanos(), std::process::id())
}
