//! The engine with IO that the snapshotter and the seeder share.

mod bulk;
mod chores;
pub mod config;
mod connect;
pub mod counters;
mod cutter;
mod driver;
pub mod enrol;
mod evict;
mod fill;
mod following;
pub mod grant;
pub mod ingest;
pub mod layer;
pub mod mesh;
pub mod node;
pub mod reader;
pub mod registry;
mod relay;
pub mod resolve;
mod scrub;
pub mod security;
pub mod seeder;
pub mod serve;
pub mod source;
pub mod span_pass;
pub mod store;
#[allow(unsafe_code)]
mod sys;

pub use node::{DiskUse, Incoming, Node, NodeConfig};
pub use scrub::Scrubbed;
pub use sys::{bound_malloc, trim_malloc};
