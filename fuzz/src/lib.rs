//! What the fuzz targets do with their input: everything here must hold for any bytes.
//!
//! - [`layer`]: blobs, archives, indexes, EROFS images and wire forms.
//! - [`answers`]: what registries, token servers and credential helpers say, and files that an operator wrote.
//! - [`mesh`]: what nodes, seeders and their neighbours say to each other: control messages, requests for chunks.
//! - [`grants`]: what machines show to prove themselves.
//! - [`config`]: the snapshotter's configuration file.
//! - [`requests`]: what the kernel asks through `/dev/fuse`.
//!
//! The corpus is committed: `seed-*` are written by tests of `layer` and `node` (`write_seeds`) and by hand (`config`), `found-*` is the smallest set
//! of other inputs that reaches what a long run reached (`fuzz/run --keep`). The unit tests of each crate replay its part.
//! `make fuzz` runs the targets; `cargo +nightly fuzz run --features libfuzzer gzip` works as well.

pub mod answers;
pub mod config;
pub mod grants;
pub mod layer;
pub mod mesh;
pub mod requests;
