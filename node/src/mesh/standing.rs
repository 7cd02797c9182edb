//! What a node's part in the mesh comes to, for its operator.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::RwLock;

/// Where a node stands in the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Where it serves others, as a seeder told it; none before any did.
    pub address: Option<SocketAddr>,
    /// Seeders that it has a line to.
    pub seeders: Vec<String>,
    /// How many neighbours it has a line to, or have one to it.
    pub neighbours: usize,
}

/// Tells where a node stands. Clones tell the same.
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<RwLock<Standing>>);

impl Watch {
    /// As it is now.
    pub fn standing(&self) -> Standing {
        self.0.read().clone()
    }

    pub(crate) fn set(&self, standing: Standing) {
        *self.0.write() = standing;
    }
}
