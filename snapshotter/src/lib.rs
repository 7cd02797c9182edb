//! The containerd remote snapshotter.
