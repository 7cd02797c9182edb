//! What happens to lazy layers after a start.

use std::collections::HashSet;

use super::prepare::ImageLayers;
use crate::snapshots::StoreError;

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
            let lowers = || self.store.lowers(snapshot.record.parent.as_deref()).map_err(|error| error.to_string());
            if let Err(error) = self.mounts.attach(backing.chain_id, &layer, lowers) {
                tracing::error!(snapshot = snapshot.name, %error, "cannot mount a layer");
            }
        }
        Ok(())
    }
}
