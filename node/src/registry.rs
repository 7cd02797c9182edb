//! Registries: a thin client for blobs and manifests.
//!
//! - [`client`]: blobs and manifests; which endpoints are asked, in which order.
//! - [`hosts`]: `hosts.toml` and the daemon's own tables: how each endpoint is reached.
//! - [`endpoint`]: one mirror or registry: connections, redirects, rests.
//! - [`auth`], [`credentials`]: challenges and tokens; Docker's configuration and credential helpers.
//! - [`proxy`]: HTTP proxies from the environment.
//! - [`answer`], [`error`]: reading answers, and saying what is wrong with them.
//! - [`blob`], [`download`]: the bytes of a blob; a whole blob, over several connections where that is faster.
//! - [`image`]: from an image reference to the layers of its manifest.
//! - [`source`]: a layer's chunks straight from its registry.
//!
//! docs/registries.md is the operator's page.

pub mod answer;
pub mod auth;
pub mod blob;
pub mod client;
pub mod credentials;
pub mod download;
mod endpoint;
pub mod error;
#[cfg(any(test, feature = "test-support"))]
pub mod fake;
pub mod hosts;
pub mod image;
pub mod proxy;
pub mod source;

pub use blob::BlobBody;
pub use client::{Client, Environment, Options};
pub use credentials::Credential;
pub(crate) use download::AHEAD_BYTES_MAX;
pub use download::Download;
pub use error::{Fault, RegistryError};
pub use source::{RegistrySource, SpansProvider};
