//! What a layer is: pure code without clock, socket, thread or entropy.
//!
//! - [`digest`]: OCI digests and chain ids.
//! - [`chunk`]: the fixed-size units of a device.
//! - [`entry`]: one path of a layer, as its tar names it.
//! - [`index`]: all that must be known to mount and read a layer lazily.
//! - [`ingest`]: from the bytes of a blob to its index, in one pass.
//! - [`span`]: inflating a piece of a blob by itself.
//! - [`wire`]: how chunks travel.
//! - [`tar`]: from the bytes of a device to its tree.
//! - [`tree`]: all paths of a layer, in order, and what the layers below give it.
//! - [`erofs`]: the metadata image that the kernel mounts over a device.

pub mod chunk;
pub mod digest;
pub mod entry;
pub mod erofs;
pub mod index;
mod inflate;
pub mod ingest;
pub mod span;
pub mod tar;
pub mod tree;
pub mod wire;

pub use chunk::{ChunkDigest, ChunkIndex, Geometry};
pub use digest::{ChainId, Digest};
