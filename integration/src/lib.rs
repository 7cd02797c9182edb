//! The lab: runs the real programs (containerd, a registry, the seeder, the snapshotter) for the end-to-end tests, the
//! demonstration and the benchmarks, and leaves nothing behind.
//!
//! - [`sandbox`]: everything runs in a process, mount and network namespace of its own that the kernel tears down.
//! - [`tools`]: where the programs come from. [`process`]: starting, watching and stopping them.
//! - [`network`]: registry, seeder and nodes as hosts on a switch, with link speeds and byte counters.
//! - [`image`]: building and pushing images. [`registry`], [`containerd`], [`drover`]: the programs themselves. [`client`]:
//!   the programs that people pull and run images with.
//! - [`scene`]: one registry, one seeder and nodes put together. [`measure`]: one timed container start. [`crowd`]: many at the
//!   same moment.
//! - [`rivals`]: other lazy snapshotters, for the benchmarks. [`report`]: tables of medians.
//! - [`compare`]: two file trees, attribute by attribute. [`pattern`]: computed device content for the FUSE tests.
//! - [`reader`]: processes that compare every byte. [`disk`]: a small disk that can be filled.

pub mod client;
pub mod compare;
pub mod containerd;
pub mod crowd;
pub mod disk;
pub mod drover;
pub mod image;
pub mod measure;
pub mod network;
pub mod pattern;
pub mod process;
pub mod reader;
pub mod registry;
pub mod report;
pub mod rivals;
pub mod sandbox;
pub mod scene;
pub mod tools;
