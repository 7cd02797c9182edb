//! What happens to lazy layers after a start.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::prepare::ImageLayers;
use crate::snapshots::StoreError;

/// How often orphans are looked for, and how long nobody must have asked for a layer: longer than containerd takes to unpack
/// one layer between two that are lazy.
const ORPHAN_PAUSE: Duration = Duration::from_secs(300);
const ORPHAN_AGE: Duration = Duration::from_secs(1800);

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
            let Some(layer) = self.node.layer(backing.diff_id) else {
                tracing::error!(snapshot = snapshot.name, layer = %backing.diff_id, "the layer of a snapshot is missing on disk");
                continue;
            };
            self.images.learn(backing.registry.clone());
            self.resolutions.resolver().add_sources(&layer, &backing.blob_ref());
            self.add_content_source(&layer, backing);
            let lowers = self.store.lowers(snapshot.record.parent.as_deref());
            if let Err(error) = self.mounts.attach(backing.chain_id, &layer, lowers) {
                tracing::error!(snapshot = snapshot.name, %error, "cannot mount a layer");
            }
        }
        Ok(())
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
            // Nobody can begin to commit a snapshot of it while this is held.
            let Some(_release) = self.store.begin_orphan(diff_id)? else { continue };
            match self.node.remove(diff_id) {
                Ok(removed) => freed += usize::from(removed),
                Err(error) => tracing::warn!(layer = %diff_id, %error, "cannot delete a layer that no snapshot names"),
            }
        }
        Ok(freed)
    }
}
