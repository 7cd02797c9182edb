//! Nodes that give each other chunks: `swarm` decides, this moves.
//!
//! - [`member`]: how a machine of the mesh is named; this machine's own name.
//! - [`asking`]: the headers with which members ask each other for chunks, and are turned down.
//! - [`peer`]: another node, seen from this one: connections to it, and its chunks.
//! - [`tracker`]: the seeder's part.
//! - `runs`: runs of chunks in messages.

pub mod asking;
pub mod member;
pub mod peer;
pub(crate) mod runs;
pub mod tracker;

pub use asking::{Asker, Turned};
pub use member::{Member, OwnAddress};
pub use tracker::Tracker;
