//! What the daemon tells its operator.
//!
//! - [`service`]: collecting and serving it.
//! - [`complete`]: waiting for whole layers.
//! - [`client`]: asking for both.
//! - [`render`]: the text of `drover-snapshotter status`.
//! - [`metrics`]: the same figures for Prometheus.

pub mod client;
mod complete;
pub mod metrics;
pub mod render;
pub mod service;
