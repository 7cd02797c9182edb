//! The metadata image that the kernel mounts over a device: EROFS with every inode, name and attribute in it and no
//! file bytes. Those stand in the image's one extra device, which is the tar itself.
//!
//! The image is deterministic, built for this node only and never sent anywhere: the kernel parses nothing that came
//! from elsewhere. It mounts with `-t erofs -o device=DEVICE`.

mod directory;
mod format;
mod plan;
mod write;

use std::io;

use self::plan::Plan;
use crate::tree::{DEVICE_SIZE_MAX, Tree};
pub use crate::tree::{DirectoryAttributes, LowerDirectories, Stack};

/// How a tree becomes an image.
#[derive(Clone, Copy, Debug)]
pub struct ImageOptions {
    /// Bytes of the device that the image is mounted with.
    pub device_size: u64,
    /// Nothing lies below the layer: whiteouts make no nodes and nothing is marked opaque.
    pub bottom: bool,
    /// The file system's UUID. Give each image of a stack its own, made from the layer's digest: overlayfs turns its
    /// stable inode numbers (xino) off, with a kernel message, where two lower layers share one or have none.
    pub uuid: [u8; 16],
}

/// What [`write_image`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSummary {
    /// Bytes of the image, a multiple of 512.
    pub size: u64,
    /// Inodes in the image, the root included.
    pub inodes: u64,
}

/// Why an image was not written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The output failed; what it has got so far is useless.
    #[error("cannot write the metadata image")]
    Write(#[from] io::Error),
    /// EROFS cannot hold the tree.
    #[error("the layer does not fit into an EROFS image: {0}")]
    Unsupported(String),
}

/// Writes the image of `tree` to `out` from front to back. Implicit directories are asked for in `lower`; what that
/// does not know is 0755, root's, of the epoch.
///
/// Needs some 60 bytes of memory per entry and the size of the largest directory, besides the tree.
pub fn write_image(
    tree: &Tree,
    options: &ImageOptions,
    lower: &dyn LowerDirectories,
    out: &mut dyn io::Write,
) -> Result<ImageSummary, ImageError> {
    if options.device_size > DEVICE_SIZE_MAX {
        return Err(ImageError::Unsupported("its device is larger than 2 TiB".into()));
    }
    let plan = Plan::new(tree, options, lower)?;
    write::write(&plan, out)?;
    Ok(ImageSummary { size: plan.blocks() * format::BLOCK as u64, inodes: plan.inode_count() })
}

#[cfg(test)]
mod tests;
