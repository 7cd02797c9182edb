//! Seeders, seen from a node.
//!
//! - [`client`]: the configured seeders: resolving, index sections, chunks.
//! - [`source`]: a layer's chunks from the seeders.

pub mod client;
pub mod source;

pub use client::{Client, Event, Options, Resolution, SeederError, share};
pub use source::SeederSource;
