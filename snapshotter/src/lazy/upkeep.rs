//! What happens to lazy layers after a start.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use layer::Digest;
use node::resolve::Progress;
use tokio::sync::watch;

use super::prepare::ImageLayers;
use crate::snapshots::{LazyBacking, Snapshot, StoreError};

/// How often orphans are looked for, and how long nobody must have asked for a layer: longer than containerd takes to unpack
/// one layer between two that are lazy.
const ORPHAN_PAUSE: Duration = Duration::from_secs(300);
const ORPHAN_AGE: Duration = Duration::from_secs(1800);

/// How often other indexes are asked for where one was found to be wrong.
const RENEW_PAUSE: Duration = Duration::from_secs(60);

/// Why a layer that no snapshot names was not freed.
#[derive(Debug, thiserror::Error)]
enum OrphanError {
    /// Whether one does is not known.
    #[error(transparent)]
    Records(#[from] StoreError),
    /// The disk failed.
    #[error(transparent)]
    Layer(#[from] node::store::StoreError),
}

impl ImageLayers {
    /// After a start: lets go of what no snapshot refers to, mounts what is not mounted (all of it after a reboot), and gives the
    /// layers their sources again. A layer that cannot be mounted is logged and left; the others go on. Blocks; no network.
    pub fn restore(&self) -> Result<(), StoreError> {
        let mut lazy = self.store.lazy()?;
        // A parent was committed before its children were made, so its id is lower.
        lazy.sort_by_key(|(snapshot, _)| snapshot.record.id);
        let chains: HashSet<_> = lazy.iter().map(|(_, backing)| backing.chain_id).collect();
        let layers: HashSet<_> = lazy.iter().map(|(_, backing)| backing.diff_id).collect();
        if let Err(error) = self.mounts.retain(&chains) {
            tracing::warn!(%error, "cannot remove the mount of a removed layer");
        }
        for layer in self.node.layers() {
            let diff_id = layer.header().diff_id();
            if !layers.contains(&diff_id)
                && let Err(error) = self.node.remove(diff_id)
            {
                tracing::warn!(layer = %diff_id, %error, "cannot delete a layer that no snapshot names");
            }
        }
        for (snapshot, backing) in &lazy {
            self.images.learn(backing.registry.clone());
            if let Some(layer) = self.node.layer(backing.diff_id) {
                self.resolutions.resolver().add_sources(&layer, &backing.blob_ref());
                self.add_content_source(&layer, backing);
            }
            self.mount(snapshot, backing);
        }
        Ok(())
    }

    /// Asks seeders for other indexes of layers whose index was found to be wrong, for the daemon's whole life, and mounts what comes.
    /// No network is used where there is no such layer.
    pub async fn renew_for_ever(self: Arc<Self>) {
        loop {
            tokio::time::sleep(RENEW_PAUSE).await;
            self.renew_quarantined().await;
        }
    }

    /// Does so once.
    pub async fn renew_quarantined(self: &Arc<Self>) {
        for layer in self.node.layers().iter().filter(|layer| layer.has_wrong_index()) {
            let diff_id = layer.diff_id();
            if let Err(error) = self.renew(diff_id).await {
                tracing::debug!(layer = %diff_id, error = format!("{error:#}"), "a quarantined layer cannot be had anew yet");
            }
        }
    }

    /// Gets the layer with another index, and mounts it for the snapshots that stand on it.
    async fn renew(self: &Arc<Self>, diff_id: Digest) -> anyhow::Result<()> {
        if self.blocking(move |layers| Ok(layers.free_orphan(diff_id)?)).await? {
            return Ok(());
        }
        let _hold = self.store.hold(diff_id).await;
        let affected = self.blocking(move |layers| Ok(layers.store.lazy_from(diff_id)?)).await?;
        let renewed = || affected.iter().map(|(_, backing)| backing).filter(|backing| backing.diff_id == diff_id);
        let Some(backing) = renewed().next() else { return Ok(()) };
        let (progress, _) = watch::channel(Progress::default());
        let fetched = self.resolutions.resolver().fetch_anew(&backing.blob_ref(), progress).await?;
        anyhow::ensure!(fetched.diff_id() == diff_id, "the blob's index names {} now", fetched.diff_id());
        // Before the new one is there: nothing that was made of the wrong index may be found beside it, also after a crash. Layers
        // above have what the wrong one said of directories that they leave out.
        let chains: Vec<_> = affected.iter().map(|(_, backing)| backing.chain_id).collect();
        let detach = move |layers: &Self| Ok(chains.iter().try_for_each(|chain| layers.mounts.detach(*chain))?);
        let inserted = match self.blocking(detach).await {
            Ok(()) => fetched.insert().await.map_err(anyhow::Error::from),
            Err(error) => Err(error),
        };
        if let Ok(layer) = &inserted {
            renewed().for_each(|backing| self.add_content_source(layer, backing));
        }
        self.blocking(move |layers| {
            affected.iter().for_each(|(snapshot, backing)| layers.mount(snapshot, backing));
            Ok(())
        })
        .await?;
        let layer = inserted?;
        tracing::info!(%layer, "a quarantined layer has another index: new containers use it");
        Ok(())
    }

    /// Mounts the layer of `snapshot` where it is not mounted. Blocks.
    fn mount(&self, snapshot: &Snapshot, backing: &LazyBacking) {
        let Some(layer) = self.node.layer(backing.diff_id) else {
            tracing::error!(snapshot = snapshot.name, layer = %backing.diff_id, "the layer of a snapshot is missing on disk");
            return;
        };
        let lowers = self.store.lowers(snapshot.record.parent.as_deref());
        if let Err(error) = self.mounts.attach(backing.chain_id, &layer, lowers) {
            tracing::error!(snapshot = snapshot.name, %error, "cannot mount a layer");
        }
    }

    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let layers = self.clone();
        tokio::task::spawn_blocking(move || work(&layers)).await?
    }

    /// Frees layers that were made known and never committed, for the daemon's whole life: the pull was given up, or
    /// containerd unpacked the rest of the image.
    pub async fn sweep_orphans(self: Arc<Self>) {
        loop {
            tokio::time::sleep(ORPHAN_PAUSE).await;
            let layers = self.clone();
            let freed = tokio::task::spawn_blocking(move || layers.free_orphans(ORPHAN_AGE)).await;
            match freed {
                Ok(Ok(0)) | Err(_) => {}
                Ok(Ok(freed)) => tracing::info!(freed, "freed layers that no snapshot came to name"),
                Ok(Err(error)) => tracing::warn!(%error, "cannot look for layers that no snapshot names"),
            }
        }
    }

    /// Frees layers that no snapshot names and nobody has asked for during `age`; gives how many. A pull that wants one meanwhile
    /// asks for it again.
    pub fn free_orphans(&self, age: Duration) -> Result<usize, StoreError> {
        let mut freed = 0;
        for layer in self.node.layers().into_iter().filter(|layer| layer.idle() >= age) {
            let diff_id = layer.header().diff_id();
            match self.free_orphan(diff_id) {
                Ok(is_freed) => freed += usize::from(is_freed),
                Err(OrphanError::Records(error)) => return Err(error),
                Err(OrphanError::Layer(error)) => {
                    tracing::warn!(layer = %diff_id, %error, "cannot delete a layer that no snapshot names");
                }
            }
        }
        Ok(freed)
    }

    /// Frees the layer if no snapshot names it; gives whether none did.
    fn free_orphan(&self, diff_id: Digest) -> Result<bool, OrphanError> {
        // Nobody can begin to commit a snapshot of it while this is held.
        let Some(_release) = self.store.begin_orphan(diff_id)? else { return Ok(false) };
        Ok(self.node.remove(diff_id)?)
    }
}
