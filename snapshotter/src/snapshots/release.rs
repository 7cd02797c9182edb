//! Letting go of lazy layers that no snapshot refers to any more.
//!
//! A layer is *held* while a snapshot is being made of it ([`LayerHold`], from before the engine is asked for the layer until
//! after the commit) and *releasing* while it is being freed ([`Release`]). Both at once is impossible: who wants to hold
//! waits for the release to end and then finds the layer gone, whole; who wants to release leaves a held layer for later.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use layer::Digest;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::record::LazyBacking;

/// Keeps the layer with one diffID from being released, until it is dropped.
#[derive(Debug)]
pub struct LayerHold {
    layers: Arc<LayersInUse>,
    diff_id: Digest,
}

impl LayerHold {
    /// Which layer.
    pub fn diff_id(&self) -> Digest {
        self.diff_id
    }
}

impl Drop for LayerHold {
    fn drop(&mut self) {
        self.layers.leave(self.diff_id);
    }
}

/// A removed lazy snapshot whose layer is to be let go. Until it is dropped, nobody can hold the layer.
#[derive(Debug)]
pub struct Release {
    /// Id of the removed snapshot; its own mount, if it had one, is free.
    pub id: u64,
    /// What it stood on.
    pub backing: LazyBacking,
    /// Another snapshot has the same chain id: what exists once per chain id must stay.
    pub chain_in_use: bool,
    /// Another snapshot has the same diffID: the layer's bytes must stay.
    pub layer_in_use: bool,
    _releasing: Releasing,
}

/// A layer that no snapshot names. Until it is dropped, nobody can hold the layer.
#[derive(Debug)]
pub struct OrphanRelease {
    _releasing: Releasing,
}

impl OrphanRelease {
    pub(super) fn new(releasing: Releasing) -> Self {
        Self { _releasing: releasing }
    }
}

impl Release {
    pub(super) fn new(
        id: u64,
        backing: LazyBacking,
        (chain_in_use, layer_in_use): (bool, bool),
        releasing: Releasing,
    ) -> Self {
        Self { id, backing, chain_in_use, layer_in_use, _releasing: releasing }
    }
}

/// Layers that are held or releasing.
#[derive(Debug, Default)]
pub(super) struct LayersInUse {
    layers: Mutex<HashMap<Digest, Use>>,
    changed: Notify,
}

#[derive(Debug)]
enum Use {
    /// By this many.
    Held(usize),
    Releasing,
}

/// The mark that a layer is releasing.
#[derive(Debug)]
pub(super) struct Releasing {
    layers: Arc<LayersInUse>,
    diff_id: Digest,
}

impl Drop for Releasing {
    fn drop(&mut self) {
        self.layers.leave(self.diff_id);
    }
}

impl LayersInUse {
    /// Holds the layer, after a release of it has ended.
    pub(super) async fn hold(self: &Arc<Self>, diff_id: Digest) -> LayerHold {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match self.layers.lock().entry(diff_id) {
                Entry::Vacant(entry) => {
                    entry.insert(Use::Held(1));
                    return LayerHold { layers: Arc::clone(self), diff_id };
                }
                Entry::Occupied(mut entry) => {
                    if let Use::Held(holders) = entry.get_mut() {
                        *holders += 1;
                        return LayerHold { layers: Arc::clone(self), diff_id };
                    }
                }
            }
            changed.await;
        }
    }

    /// Marks the layer as releasing; `None` where it is held or releasing already.
    pub(super) fn release(self: &Arc<Self>, diff_id: Digest) -> Option<Releasing> {
        match self.layers.lock().entry(diff_id) {
            Entry::Vacant(entry) => {
                entry.insert(Use::Releasing);
                Some(Releasing { layers: Arc::clone(self), diff_id })
            }
            Entry::Occupied(_) => None,
        }
    }

    fn leave(&self, diff_id: Digest) {
        if let Entry::Occupied(mut entry) = self.layers.lock().entry(diff_id) {
            match entry.get_mut() {
                Use::Held(holders) if *holders > 1 => *holders -= 1,
                Use::Held(_) | Use::Releasing => {
                    entry.remove();
                }
            }
        }
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn holding_and_releasing_exclude_each_other() {
        let layers = Arc::new(LayersInUse::default());
        let (one, other) = (Digest::of(b"one"), Digest::of(b"other"));
        let first = layers.hold(one).await;
        let second = layers.hold(one).await;
        assert!(layers.release(one).is_none());
        drop(first);
        assert!(layers.release(one).is_none());
        assert!(layers.release(other).is_some());
        drop(second);
        let releasing = layers.release(one).expect("is free");
        assert!(layers.release(one).is_none());
        let waiting = tokio::spawn({
            let layers = Arc::clone(&layers);
            async move { layers.hold(one).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(releasing);
        let held = tokio::time::timeout(Duration::from_secs(10), waiting).await.expect("in time").expect("holds");
        assert_eq!(held.diff_id(), one);
        drop(held);
        assert!(layers.layers.lock().is_empty());
    }
}
