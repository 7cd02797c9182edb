//! The only room with unsafe code in this crate.

use std::{
    io,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// Takes a descriptor that this process was started with. It must be asked for once only and be closed by nobody else:
/// the descriptors of `LISTEN_FDS` are ours by protocol.
pub(crate) fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 3 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: borrowed for one call that fails with EBADF if there is no such descriptor; fd is not -1.
    rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) })?;
    // SAFETY: it is open, and the caller says that nothing else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
