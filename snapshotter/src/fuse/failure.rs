//! What the kernel is told when a request cannot be served: the one table of error numbers.

/// Why a request is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No file of that name, or no such node.
    NoEntry,
    /// The node was known once and is gone.
    Stale,
    /// The bytes could not be had.
    Failed,
    /// The caller is being killed; it never sees this.
    Cancelled,
    /// Too many requests are parked.
    Overloaded,
    /// The request makes no sense.
    Malformed,
    /// The kernel's protocol is too old.
    Protocol,
    /// The node is not a directory.
    NotADirectory,
    /// The node is a directory.
    IsADirectory,
    /// The mount is read-only.
    ReadOnly,
    /// The caller may not do this.
    Denied,
    /// Not implemented; for several operations the kernel then never asks again.
    Unsupported,
    /// The request cannot be handled yet, ask again (only ever sent for INTERRUPT).
    NotYet,
}

impl Failure {
    /// The error number, positive.
    pub const fn errno(self) -> i32 {
        use nix::libc;
        match self {
            Failure::NoEntry => libc::ENOENT,
            Failure::Stale => libc::ESTALE,
            Failure::Failed => libc::EIO,
            Failure::Cancelled => libc::EINTR,
            Failure::Overloaded => libc::ENOMEM,
            Failure::Malformed => libc::EINVAL,
            Failure::Protocol => libc::EPROTO,
            Failure::NotADirectory => libc::ENOTDIR,
            Failure::IsADirectory => libc::EISDIR,
            Failure::ReadOnly => libc::EROFS,
            Failure::Denied => libc::EACCES,
            Failure::Unsupported => libc::ENOSYS,
            Failure::NotYet => libc::EAGAIN,
        }
    }
}
