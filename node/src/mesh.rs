//! Nodes that give each other chunks: `swarm` decides, this moves.
//!
//! - `runs`: runs of chunks in messages.

pub(crate) mod runs;
