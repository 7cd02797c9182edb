//! What containerd sees and what is asked of it.
//!
//! - [`service`]: the Snapshots service over [`crate::snapshots::Store`].
//! - [`lazy`]: the seam to the lazy layers.
//! - [`filter`]: containerd's filter language.
//! - [`status`]: the one table from errors to gRPC codes.
//! - [`sweep`]: deletion in the background.
//! - [`connection`]: the way to containerd's own services.
//! - [`content`]: client of its content store.
//! - [`source`]: chunks out of a blob that is there.
//! - [`about`]: its version, and how our plugin is configured in it.

pub mod about;
pub mod connection;
pub mod content;
#[cfg(test)]
pub(crate) mod fake;
pub mod filter;
pub mod lazy;
pub mod service;
pub mod source;
pub mod status;
pub mod sweep;

pub use lazy::{LazyLayers, LazyOutcome, NoLazyLayers, PrepareLazy};
pub use service::Service;
pub use sweep::Sweeper;
