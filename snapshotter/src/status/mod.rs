//! What the daemon tells its operator.
//!
//! - [`service`]: collecting and serving it.
//! - [`render`]: the text of `drover-snapshotter status`.

pub mod render;
pub mod service;
