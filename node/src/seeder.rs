//! Seeders, seen from a node.
//!
//! - [`client`]: the configured seeders: resolving, index sections, chunks.
//! - [`source`]: a layer's chunks from the seeders.

pub mod client;
pub mod source;

pub(crate) use client::share;
pub use client::{Client, Event, Options, Resolution, SeederError};
pub use source::SeederSource;
