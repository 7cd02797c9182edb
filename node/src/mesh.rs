//! Nodes that give each other chunks: `swarm` decides, this moves.
//!
//! - [`member`]: how a machine of the mesh is named; this machine's own name.
//! - [`asking`]: the headers with which members ask each other for chunks, and are turned down.
//! - [`peer`]: another node, seen from this one: connections to it, and its chunks.
//! - [`serving`]: what this node gives to others, and to whom when.
//! - [`tracker`]: the seeder's part.
//! - `runs`: runs of chunks in messages.

pub mod asking;
pub mod member;
pub mod peer;
pub(crate) mod runs;
pub mod serving;
pub mod tracker;

pub use asking::{Asker, Turned};
pub use member::{Member, OwnAddress};
pub use serving::{Holders, Sharing};
pub use tracker::Tracker;
