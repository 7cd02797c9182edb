//! Lazy layers: from containerd's `Prepare` to a mounted, committed snapshot whose bytes come later.
//!
//! - [`labels`]: which layer of which image a `Prepare` wants, if it says so.
//! - [`image`]: manifest and configuration of an image.
//! - [`images`]: the image of a chain id, where nothing says so.
//! - [`hints`]: what to configure so that pulls say so.
//! - [`resolutions`]: layers that are being made known.
//! - [`prepare`]: the way of one `Prepare`.
//! - [`upkeep`]: after a start.
//! - [`devices`]: layers as files of the FUSE mount.

pub mod devices;
pub mod hints;
pub mod image;
pub mod images;
pub mod labels;
pub mod prepare;
pub mod resolutions;
pub mod upkeep;
