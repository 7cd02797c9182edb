//! The containerd remote snapshotter.

pub mod containerd;
pub mod snapshots;
