//! The engine with IO that the snapshotter and the seeder share.

pub mod config;
pub mod registry;
pub mod security;
pub mod source;
