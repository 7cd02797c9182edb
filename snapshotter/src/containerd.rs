//! What containerd sees and what is asked of it.
//!
//! - [`service`]: the Snapshots service over [`crate::snapshots::Store`].
//! - [`lazy`]: the seam to the lazy layers.
//! - [`filter`]: containerd's filter language.
//! - [`status`]: the one table from errors to gRPC codes.
//! - [`sweep`]: deletion in the background.
//! - [`content`]: client of containerd's content store.

pub mod content;
pub mod filter;
pub mod lazy;
pub mod service;
pub mod status;
pub mod sweep;

pub use lazy::{LazyLayers, LazyOutcome, NoLazyLayers, PrepareLazy};
pub use service::Service;
pub use sweep::Sweeper;
