//! The FUSE session and the keeper against the real kernel. Needs root and `/dev/fuse`; says so where they are missing.
//!
//! Who reads the mount is always another process: a process that sleeps in a read of a file system which it serves
//! itself cannot even be killed.

mod conditions;
mod keeper;
mod session;
