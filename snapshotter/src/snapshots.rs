//! Snapshots in containerd's sense: their records and the directories of the ordinary, writable ones.
//!
//! The words are containerd's (`core/snapshots/snapshotter.go`): a *key* names an active snapshot or a view, a *name* a
//! committed one, both in one key space; a *parent* is always committed. A committed snapshot is *ordinary* (a directory that
//! containerd unpacked into) or *lazy* (a layer of the engine, mounted elsewhere: [`LayerMounts`]).
//!
//! - [`record`]: what is stored of a snapshot.
//! - [`records`]: the records in one redb file; containerd's rules on keys, parents and kinds.
//! - [`directories`] of ordinary snapshots: `fs` and `work` in `<root>/snapshots/<id>`.
//! - [`id_maps`]: ids of containers with a user namespace.
//! - [`mounts`]: what containerd must mount to see a snapshot.
//! - [`release`]: which lazy layers nobody refers to any more, safely against snapshots just being made of them.
//! - [`store`]: all of these together, in crash order.
//! - [`usage`]: disk usage of a directory.

pub mod directories;
mod error;
pub mod id_maps;
pub mod mounts;
pub mod record;
pub mod records;
pub mod release;
pub mod store;
pub mod usage;

pub use error::{OpenError, StoreError};
pub use id_maps::{IdMaps, IdMapsError};
pub use mounts::{LayerMounts, Mount, Quarantine};
pub use record::{Backing, Kind, Labels, LazyBacking, Record, Snapshot, Usage};
pub use release::{LayerHold, Release};
pub use store::{Creation, LazyCommit, Store};
