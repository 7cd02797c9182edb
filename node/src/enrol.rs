//! How nodes get their certificates (`docs/security.md`): with a token the first, and each later one with the one before.
//!
//! - [`server`]: a seeder that has the authority's directory.
//! - [`client`]: the node.

pub mod client;
pub mod server;

/// Requests and answers have a few certificates; nothing near this.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

#[cfg(test)]
mod tests;
