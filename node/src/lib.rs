//! The engine with IO that the snapshotter and the seeder share.

pub mod config;
mod cutter;
pub mod ingest;
pub mod registry;
pub mod security;
pub mod seeder;
pub mod serve;
pub mod source;
