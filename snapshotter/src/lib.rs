//! The containerd remote snapshotter.
//!
//! - [`config`]: the configuration file.
//! - [`daemon`]: all parts of the daemon, put together.
//! - [`containerd`]: what containerd sees and what is asked of it.
//! - [`snapshots`]: records, and the directories of ordinary snapshots.
//! - [`lazy`]: layers whose bytes come later.
//! - [`mount`]: EROFS mounts of those layers.
//! - [`fuse`]: the session that serves their devices to the kernel.
//! - [`keeper`]: the process that shares the FUSE connection, so that either may die.
//! - [`status`]: what the daemon tells its operator.
//! - [`pull`]: the lazy pull for clients that leave no room for one.
//! - [`drain`] and [`uninstall`]: taking a node back.

pub mod config;
pub mod containerd;
pub mod daemon;
pub mod drain;
pub mod fuse;
pub mod keeper;
pub mod lazy;
pub mod mount;
pub mod pull;
pub mod snapshots;
pub mod status;
#[allow(unsafe_code)]
mod sys;
pub mod uninstall;
