//! What a layer is: pure code without clock, socket, thread or entropy.
//!
//! - [`digest`]: OCI digests and chain ids.
//! - [`chunk`]: the fixed-size units of a device.
//! - [`entry`]: one path of a layer, as its tar names it.

pub mod chunk;
pub mod digest;
pub mod entry;

pub use chunk::{ChunkDigest, ChunkIndex, Geometry};
pub use digest::{ChainId, Digest};
