//! Answering a `Prepare` with a layer that is not there yet.

use std::sync::Arc;
use std::time::Duration;

use layer::{ChainId, Digest};
use node::Node;
use tokio::time::Instant;

use super::declined::Declined;
use super::labels::{LabelError, PullLabels, chain_of};
use super::resolutions::{Resolutions, WaitError};
use crate::containerd::content::ContentStore;
use crate::containerd::lazy::{LazyLayers, LazyOutcome, PrepareLazy};
use crate::mount::layers::{AttachError, LayerMounts};
use crate::snapshots::{LazyBacking, LazyCommit, Release, Store, Usage};

/// Share of the caller's time that a pull may wait: what is left is containerd's for unpacking.
const DEADLINE_SHARE: f64 = 0.9;

/// Why a layer is left to containerd.
#[derive(Debug, thiserror::Error)]
pub enum Decline {
    /// The kernel cannot do it.
    #[error("{0}")]
    Node(String),
    /// The pull does not say enough.
    #[error(transparent)]
    Labels(#[from] LabelError),
    /// A parent is not from an image.
    #[error("the parent snapshot {0} has no chain id")]
    Parent(String),
    /// The target is no chain id.
    #[error("the target {0:?} is no chain id")]
    Target(String),
    /// The blob is on this machine, so that unpacking it needs no network, and no index says how to read it lazily.
    #[error("the blob {0} is in containerd's content store already")]
    BlobIsLocal(Digest),
    /// The layer could not be made known.
    #[error(transparent)]
    Wait(#[from] WaitError),
    /// The signed index belongs to another layer than the image's configuration names.
    #[error("blob {blob} has the diffID {diff_id}, which does not lead to the chain id {target}")]
    Chain {
        /// Its digest.
        blob: Digest,
        /// What its index says.
        diff_id: Digest,
        /// What containerd expects.
        target: ChainId,
    },
    /// It was removed with another image in the same moment.
    #[error("layer {0} was removed while it was prepared")]
    Removed(Digest),
    /// It could not be mounted.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// It could not be recorded.
    #[error("cannot record the snapshot: {0}")]
    Record(String),
}

/// Makes the layers that containerd prepares known, mounts and commits them.
#[derive(Debug)]
pub struct ImageLayers {
    /// The engine.
    pub node: Arc<Node>,
    /// Layers that are being made known.
    pub resolutions: Resolutions,
    /// Snapshot records.
    pub store: Arc<Store>,
    /// Mounts of lazy layers.
    pub mounts: Arc<LayerMounts>,
    /// Containerd's content store.
    pub content: ContentStore,
    /// How long a pull waits for a layer that makes no progress.
    pub stall: Duration,
    /// Why nothing can be lazy on this node, if so.
    pub not_lazy: Option<String>,
    /// Why layers were left to containerd.
    pub declined: Declined,
}

impl LazyLayers for ImageLayers {
    async fn prepare(&self, request: PrepareLazy<'_>) -> LazyOutcome {
        match self.try_prepare(&request).await {
            Ok(()) => LazyOutcome::Committed,
            Err(decline) => {
                let reason = decline.to_string();
                tracing::warn!(chain = request.target, key = request.key, %reason, "containerd unpacks a layer");
                self.declined.note(request.target, &reason);
                LazyOutcome::NotLazy { reason }
            }
        }
    }

    async fn release(&self, release: &Release) -> anyhow::Result<()> {
        let (chain, diff_id) = (release.backing.chain_id, release.backing.diff_id);
        if !release.chain_in_use {
            let mounts = self.mounts.clone();
            tokio::task::spawn_blocking(move || mounts.detach(chain)).await??;
        }
        if !release.layer_in_use {
            let node = self.node.clone();
            tokio::task::spawn_blocking(move || node.remove(diff_id)).await??;
        }
        Ok(())
    }
}

impl ImageLayers {
    async fn try_prepare(&self, request: &PrepareLazy<'_>) -> Result<(), Decline> {
        if let Some(reason) = &self.not_lazy {
            return Err(Decline::Node(reason.clone()));
        }
        let target: ChainId = request.target.parse().map_err(|_| Decline::Target(request.target.to_owned()))?;
        let pull = PullLabels::parse(request.labels)?;
        let parent = self.parent_chain(request.parent)?;
        if self.is_local(&pull, request.namespace).await {
            return Err(Decline::BlobIsLocal(pull.blob));
        }
        // The whole image is resolved at its first Prepare: containerd asks for one layer after the other.
        let mut resolutions = pull.blobs.iter().map(|blob| self.resolutions.start(pull.blob_ref(*blob)));
        let resolution = resolutions.next();
        resolutions.for_each(drop);
        let Some(resolution) = resolution else { return Err(LabelError::Missing.into()) };
        let deadline = request.deadline.map(|deadline| {
            let now = Instant::now();
            now + Instant::from_std(deadline).saturating_duration_since(now).mul_f64(DEADLINE_SHARE)
        });
        let layer = resolution.wait(self.stall, deadline).await?;
        let diff_id = layer.header().diff_id();
        if ChainId::on(parent, diff_id) != target {
            return Err(Decline::Chain { blob: pull.blob, diff_id, target });
        }
        let hold = self.store.hold(diff_id).await;
        // Between the answer and the hold another image's removal may have let the layer go.
        let layer = self.node.layer(diff_id).ok_or(Decline::Removed(diff_id))?;
        let (store, mounts) = (self.store.clone(), self.mounts.clone());
        let (name, parent_name) = (request.target.to_owned(), request.parent.map(str::to_owned));
        let labels = request.labels.clone();
        let backing = LazyBacking::new(&pull.blob_ref(pull.blob), diff_id, target);
        let commit = move || -> Result<(), Decline> {
            let lowers = store.lowers(parent_name.as_deref()).map_err(|error| Decline::Record(error.to_string()))?;
            mounts.attach(target, &layer, lowers)?;
            let usage =
                Usage { size_bytes: layer.header().device_size(), inodes: u64::from(layer.header().entry_count()) };
            let commit = LazyCommit { target: &name, parent: parent_name.as_deref(), labels, backing, usage };
            store.commit_lazy(&hold, commit).map_err(|error| Decline::Record(error.to_string()))?;
            Ok(())
        };
        tokio::task::spawn_blocking(commit).await.map_err(|error| Decline::Record(error.to_string()))?
    }

    /// Whether the blob is in containerd's content store and nothing is known of the layer here. A content store that does not
    /// answer is no reason to decline: then the blob is fetched a second time at worst.
    async fn is_local(&self, pull: &PullLabels, namespace: Option<&str>) -> bool {
        let Some(namespace) = namespace else { return false };
        if self.node.layer_by_blob(pull.blob).is_some() {
            return false;
        }
        match self.content.info(namespace, pull.blob).await {
            Ok(info) => info.is_some(),
            Err(error) => {
                tracing::debug!(blob = %pull.blob, %error, "containerd's content store does not answer");
                false
            }
        }
    }

    /// The chain id of the parent snapshot; `None` for the bottom layer.
    fn parent_chain(&self, parent: Option<&str>) -> Result<Option<ChainId>, Decline> {
        let Some(parent) = parent else { return Ok(None) };
        let snapshot = self.store.stat(parent).map_err(|error| Decline::Record(error.to_string()))?;
        chain_of(parent, &snapshot.record.labels).map(Some).ok_or_else(|| Decline::Parent(parent.to_owned()))
    }
}
