//! Answering a `Prepare` with a layer that is not there yet.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use layer::{ChainId, Digest};
use node::Node;
use node::layer::Layer;
use node::source::BlobRef;
use tokio::time::Instant;

use super::hints::Hints;
use super::images::{FindError, Images};
use super::labels::{LabelError, PullLabels, chain_of, diff_id};
use super::resolutions::{Resolutions, WaitError};
use crate::containerd::lazy::{LazyLayers, LazyOutcome, PrepareLazy};
use crate::containerd::source::ContentSource;
use crate::drain::{self, Drain};
use crate::mount::layers::{AttachError, LayerMounts};
use crate::mount::probe::Ability;
use crate::snapshots::{LazyBacking, LazyCommit, Release, Store, Usage};

/// Share of the caller's time that a pull may wait: what is left is containerd's for unpacking.
const DEADLINE_SHARE: f64 = 0.9;

/// Why a layer is left to containerd.
#[derive(Debug, thiserror::Error)]
pub enum Decline {
    /// The kernel cannot do it.
    #[error("{0}")]
    Node(String),
    /// Neither the pull nor the content store says which image it is.
    #[error("{labels}, and {source}")]
    Image {
        /// What is wrong with the pull's labels.
        labels: LabelError,
        /// Why the content store does not help.
        source: FindError,
    },
    /// The caller named no namespace, so there is no content store to look into.
    #[error("{0}, and no namespace to look for the image in")]
    Namespace(LabelError),
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
    #[error("layer {place}: {source}")]
    Wait {
        /// Where its blob was to come from.
        place: Box<BlobRef>,
        /// What failed.
        source: WaitError,
    },
    /// The same where only the registry's host is known.
    #[error(
        "layer {place}: {source}; the pull does not say the registry's port: if {host} has one, configure it as [registry.\"{host}:PORT\"]"
    )]
    Port {
        /// Where its blob was to come from.
        place: Box<BlobRef>,
        /// The registry without port.
        host: String,
        /// What failed.
        source: WaitError,
    },
    /// The signed index belongs to another layer than the image's configuration names.
    #[error("blob {blob} has the diffID {diff_id} by its index, but {expected} by the image's configuration")]
    DiffId {
        /// Its digest.
        blob: Digest,
        /// What its index says.
        diff_id: Digest,
        /// What the configuration says.
        expected: Digest,
    },
    /// The same, found by the chain id.
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

impl Decline {
    /// Whether somebody lies or is broken, so that it must be looked into.
    fn is_alarming(&self) -> bool {
        matches!(self, Self::DiffId { .. } | Self::Chain { .. })
    }
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
    /// Images of containerd's content store.
    pub images: Images,
    /// What to configure in containerd.
    pub hints: Arc<Hints>,
    /// How long a pull waits for a layer that makes no progress.
    pub stall: Duration,
    /// Whether anything can be lazy on this node; believed where it is `None`.
    pub ability: Option<Arc<Ability>>,
    /// Whether nothing is to be lazy any more.
    pub drain: Drain,
}

/// What a `Prepare` asks for.
struct Wanted {
    /// Where the blob may be, the most probable place first. Not empty.
    places: Vec<BlobRef>,
    /// What the image's configuration says that it unpacks to, where that is known.
    diff_id: Option<Digest>,
    /// The same places for each layer above it.
    above: Vec<Vec<BlobRef>>,
    /// The registry's host, where its port may be missing.
    host: Option<String>,
}

/// A layer of the node, and what is known of its blob.
struct Known {
    layer: Arc<Layer>,
    /// Where the blob can be had.
    place: BlobRef,
    /// Namespace in whose content store the blob is, if it is there.
    content_namespace: Option<String>,
}

impl LazyLayers for ImageLayers {
    fn refusal(&self) -> Option<String> {
        self.drain.is_on().then(|| drain::REASON.to_owned())
    }

    async fn prepare(&self, request: PrepareLazy<'_>) -> LazyOutcome {
        match self.try_prepare(&request).await {
            Ok(()) => LazyOutcome::Committed,
            Err(decline) => {
                let reason = decline.to_string();
                let (chain, key) = (request.target, request.key);
                match decline.is_alarming() {
                    true => {
                        tracing::error!(chain, key, reason, "a layer is not what the image says; containerd unpacks it")
                    }
                    false => tracing::warn!(chain, key, reason, "containerd unpacks a layer"),
                }
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
        if let Some(ability) = self.ability.clone() {
            let refusal = tokio::task::spawn_blocking(move || ability.refusal()).await;
            if let Some(reason) = refusal.map_err(|error| Decline::Node(error.to_string()))? {
                return Err(Decline::Node(reason));
            }
        }
        let target: ChainId = request.target.parse().map_err(|_| Decline::Target(request.target.to_owned()))?;
        let parent = self.parent_chain(request.parent)?;
        let wanted = self.wanted(request, target).await?;
        let expected = wanted.diff_id;
        let Known { layer, place, content_namespace } = self.make_known(request, wanted).await?;
        let (blob, diff_id) = (layer.header().blob(), layer.header().diff_id());
        if let Some(expected) = expected.filter(|expected| *expected != diff_id) {
            return Err(Decline::DiffId { blob, diff_id, expected });
        }
        if ChainId::on(parent, diff_id) != target {
            return Err(Decline::Chain { blob, diff_id, target });
        }
        let backing = LazyBacking { content_namespace, ..LazyBacking::new(&place, diff_id, target) };
        self.commit(request, backing).await
    }

    /// Finds out where the blob is best had from, and waits until its layer is known.
    async fn make_known(&self, request: &PrepareLazy<'_>, wanted: Wanted) -> Result<Known, Decline> {
        let Wanted { mut places, above, host, .. } = wanted;
        let known: HashSet<Digest> = self.node.layers().iter().map(|layer| layer.header().blob()).collect();
        let is_known = |place: &BlobRef| known.contains(&place.digest);
        // A blob that the node knows is had from there at once, whatever place comes first.
        places.sort_by_key(|place| !is_known(place));
        let Some(place) = places.first().cloned() else { return Err(Decline::Target(request.target.to_owned())) };
        let mut content_namespace = None;
        if let Some(namespace) = request.namespace
            && !self.is_complete(place.digest)
            && self.is_local(namespace, place.digest).await
        {
            if !is_known(&place) {
                return Err(Decline::BlobIsLocal(place.digest));
            }
            content_namespace = Some(namespace.to_owned());
        }
        let Some(resolution) = self.resolutions.start(places) else { return Err(Decline::Removed(place.digest)) };
        // The whole image is resolved at its first Prepare: containerd asks for one layer after the other. Not what is on this
        // machine, whose chunks would begin to come.
        let above = above.into_iter().filter(|places| !places.iter().any(is_known)).map(async |places| {
            let is_local = match (request.namespace, places.first()) {
                (Some(namespace), Some(place)) => self.is_local(namespace, place.digest).await,
                _ => false,
            };
            if !is_local {
                self.resolutions.start(places);
            }
        });
        join_all(above).await;
        let deadline = request.deadline.map(|deadline| {
            let now = Instant::now();
            now + Instant::from_std(deadline).saturating_duration_since(now).mul_f64(DEADLINE_SHARE)
        });
        let waited = resolution.wait(self.stall, deadline).await;
        let (layer, place) = waited.map_err(|source| {
            let place = Box::new(place);
            match host {
                Some(host) => Decline::Port { place, host, source },
                None => Decline::Wait { place, source },
            }
        })?;
        Ok(Known { layer, place, content_namespace })
    }

    /// Mounts the layer of `backing` and commits the snapshot that `request` asks for.
    async fn commit(&self, request: &PrepareLazy<'_>, backing: LazyBacking) -> Result<(), Decline> {
        let diff_id = backing.diff_id;
        let hold = self.store.hold(diff_id).await;
        // Between the answer and the hold another image's removal may have let the layer go.
        let layer = self.node.layer(diff_id).filter(|layer| !layer.has_wrong_index());
        let layer = layer.ok_or(Decline::Removed(diff_id))?;
        self.add_content_source(&layer, &backing);
        let (store, mounts) = (self.store.clone(), self.mounts.clone());
        let (name, parent) = (request.target.to_owned(), request.parent.map(str::to_owned));
        let labels = request.labels.clone();
        let commit = move || -> Result<(), Decline> {
            mounts.attach(backing.chain_id, &layer, store.lowers(parent.as_deref()))?;
            // Containerd reads it once and keeps it: what the layer takes unpacked, not what is here of it now.
            let unpacked = layer.unpacked().map_err(|error| Decline::Record(error.to_string()))?;
            let usage = Usage { size_bytes: unpacked.bytes, inodes: unpacked.inodes };
            let commit = LazyCommit { target: &name, parent: parent.as_deref(), labels, backing, usage };
            store.commit_lazy(&hold, commit).map_err(|error| Decline::Record(error.to_string()))?;
            Ok(())
        };
        tokio::task::spawn_blocking(commit).await.map_err(|error| Decline::Record(error.to_string()))?
    }

    /// Lets `layer` read its blob in containerd's content store, where `backing` says that it was there.
    pub(super) fn add_content_source(&self, layer: &Arc<Layer>, backing: &LazyBacking) {
        if let Some(namespace) = &backing.content_namespace
            && !layer.is_complete()
        {
            let source = ContentSource::new(self.images.content().clone(), namespace, layer);
            layer.add_source(Arc::new(source));
        }
    }

    /// Which layer of which image is asked for: by the labels of the pull, else by the images of the content store.
    async fn wanted(&self, request: &PrepareLazy<'_>, target: ChainId) -> Result<Wanted, Decline> {
        let mut wanted = match PullLabels::parse(request.labels) {
            Ok(pull) => self.wanted_by_labels(&pull, request.namespace, target).await,
            Err(labels) => self.wanted_by_chain(labels, request, target).await?,
        };
        wanted.diff_id = wanted.diff_id.or_else(|| diff_id(request.labels));
        Ok(wanted)
    }

    async fn wanted_by_labels(&self, pull: &PullLabels, namespace: Option<&str>, target: ChainId) -> Wanted {
        self.images.learn(pull.registry.clone());
        // The labels leave the layers of a long image out, and the diffIDs of all: the manifest has them.
        let image = match (namespace, pull.manifest) {
            (Some(namespace), Some(manifest)) => self.images.with_manifest(namespace, manifest).await,
            _ => Ok(None),
        };
        let image = image.unwrap_or_else(|error| {
            tracing::debug!(%error, "containerd's content store does not answer");
            None
        });
        let from_image = image.and_then(|image| {
            let position = image.position(target)?;
            let layers = image.layers.get(position..)?;
            Some(Wanted {
                places: layers.iter().take(1).map(|layer| pull.place_of(layer)).collect(),
                diff_id: layers.first().map(|layer| layer.diff_id),
                above: layers.iter().skip(1).map(|layer| vec![pull.place_of(layer)]).collect(),
                host: None,
            })
        });
        from_image.unwrap_or_else(|| Wanted {
            places: vec![pull.place(pull.blob)],
            diff_id: None,
            above: pull.blobs.iter().skip(1).map(|blob| vec![pull.place(*blob)]).collect(),
            host: None,
        })
    }

    async fn wanted_by_chain(
        &self,
        labels: LabelError,
        request: &PrepareLazy<'_>,
        target: ChainId,
    ) -> Result<Wanted, Decline> {
        let Some(namespace) = request.namespace else { return Err(Decline::Namespace(labels)) };
        if labels == LabelError::Missing {
            let (hints, snapshotter) = (self.hints.clone(), request.snapshotter.to_owned());
            let namespace = namespace.to_owned();
            tokio::spawn(async move { hints.on_missing_labels(&snapshotter, &namespace).await });
        }
        let found = self.images.with_chain(namespace, target).await;
        let found = found.map_err(|source| Decline::Image { labels, source })?;
        let diff_id = found.first().and_then(|found| found.layer()).map(|layer| layer.diff_id);
        // Above it the images differ: the one that was pulled last is the one that is pulled now.
        let above = found.first().map_or_else(Vec::new, |newest| {
            let positions = newest.position + 1..newest.image.layers.len();
            positions.map(|position| self.images.places(&[newest.at(position)])).collect()
        });
        let places = self.images.places(&found);
        let has_port = places.iter().any(|place| place.registry.contains(':') || place.registry == "docker.io");
        let host = places.first().map(|place| place.registry.clone()).filter(|host| !has_port && !host.is_empty());
        Ok(Wanted { places, diff_id, above, host })
    }

    fn is_complete(&self, blob: Digest) -> bool {
        self.node.layer_by_blob(blob).is_some_and(|layer| layer.is_complete())
    }

    /// Whether the blob is in containerd's content store. A content store that does not answer is no reason to decline: then the
    /// blob is fetched a second time at worst.
    async fn is_local(&self, namespace: &str, blob: Digest) -> bool {
        match self.images.content().info(namespace, blob).await {
            Ok(info) => info.is_some(),
            Err(error) => {
                tracing::debug!(%blob, %error, "containerd's content store does not answer");
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
