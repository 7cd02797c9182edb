//! The containerd remote snapshotter.

pub mod containerd;
pub mod fuse;
pub mod snapshots;
