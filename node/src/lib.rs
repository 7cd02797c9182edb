//! The engine with IO that the snapshotter and the seeder share.

pub mod source;
