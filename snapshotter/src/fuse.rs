//! Drover's own FUSE session on raw `/dev/fuse`.
//!
//! One connection, one file descriptor that outlives the daemon (see [`crate::keeper`]), a few threads that only decode
//! requests and hand them on. Nothing of the protocol state lives in the daemon: nodes are numbered the same in every
//! daemon, opens are not told to it, and what an earlier daemon read but did not answer is sent again by the kernel.
//!
//! - [`session`]: the threads, INIT, INTERRUPT and take-over;
//! - [`reply`]: the one answer to a request, at once or later ("parked"), from any thread;
//! - [`device`]: the device mount, a flat directory of read-only files ([`Devices`] is what it serves);
//! - [`mount`]: opening `/dev/fuse`, mounting, unmounting, readahead;
//! - [`mod@decode`], [`abi`], [`failure`]: the wire.
//!
//! A further file system (the fallback tree) is one more [`Handler`].

pub mod abi;
pub mod decode;
pub mod device;
pub mod failure;
mod interrupt;
pub mod mount;
pub mod reply;
pub mod session;

pub use decode::{Header, NodeId, Operation, Request, decode};
pub use device::{DeviceAttributes, DeviceMount, Devices};
pub use failure::Failure;
pub use reply::{ParkedReply, Reply};
pub use session::{Ended, Handler, ReadAhead, SessionError, SessionHandle, SessionOptions};
