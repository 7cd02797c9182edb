//! The containerd remote snapshotter.

pub mod containerd;
pub mod fuse;
pub mod keeper;
pub mod snapshots;
#[allow(unsafe_code)]
mod sys;
