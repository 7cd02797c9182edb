//! Seeders, seen from a node.
//!
//! - [`client`]: the configured seeders: resolving, index sections, chunks.
//! - [`connect`]: connections in the clear or with mutual TLS.
//! - [`source`]: a layer's chunks from the seeders.

pub mod client;
pub mod connect;
pub mod source;

pub use client::{Client, Event, Options, Resolution, SeederError};
pub use source::SeederSource;
