//! Lazy layers: from containerd's `Prepare` to a mounted, committed snapshot whose bytes come later.
//!
//! - [`labels`]: which layer of which image a `Prepare` wants.
//! - [`resolutions`]: layers that are being made known.
//! - [`prepare`]: the way of one `Prepare`.
//! - [`upkeep`]: after a start.
//! - [`devices`]: layers as files of the FUSE mount.
//! - [`declined`]: why layers are not lazy.

pub mod declined;
pub mod devices;
pub mod labels;
pub mod prepare;
pub mod resolutions;
pub mod upkeep;
