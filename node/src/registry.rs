//! Registries: a thin client for blobs and manifests.
//!
//! - [`client`]: requests with authentication, redirects, back-off and time limits.
//! - [`auth`]: challenges, tokens and Docker credentials.
//! - [`image`]: from an image reference to the layers of its manifest.
//! - [`source`]: a layer's chunks straight from its registry.

pub mod auth;
pub mod client;
#[cfg(any(test, feature = "test-support"))]
pub mod fake;
pub mod image;
pub mod source;

pub use client::{BlobBody, Client, Options, RegistryError};
pub use source::{RegistrySource, SpansProvider};
