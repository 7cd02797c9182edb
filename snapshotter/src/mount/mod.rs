//! Mounting layers.
//!
//! - [`layers`]: one mount a chain id, its metadata image, what remains of them.
//! - [`erofs`]: mount and unmount.
//! - [`helper`]: the process that mounts on FUSE files.
//! - [`lower`]: attributes of directories that a layer's tar leaves out.
//! - [`probe`]: whether this kernel can do it.
//! - `seal`: the checksum of a metadata image.
//! - [`table`]: what is mounted.

pub mod erofs;
pub mod helper;
pub mod layers;
pub mod lower;
pub mod probe;
mod seal;
pub mod table;
