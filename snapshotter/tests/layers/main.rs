//! Lazy layers with real mounts, over a real FUSE session in this process. Needs root and a kernel with file-backed EROFS; says so
//! where it skips.

mod many;
mod renewal;
mod rig;
