//! The service manager, if there is one: readiness, and the descriptors that it keeps over a restart.

use std::os::fd::{AsFd, OwnedFd};

use sd_notify::NotifyState;

const FUSE: &str = "drover-fuse";
const LISTENER: &str = "drover-listener";

/// Whether a service manager started us. It is then trusted to keep the descriptors, and unmounts are left to the next
/// start.
pub(super) fn is_present() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Tells it something. That it does not listen is no reason to fail.
pub(super) fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "cannot tell the service manager");
    }
}

/// Gives it the descriptors to keep; those it has are not doubled.
pub(super) fn store(fuse: &OwnedFd, listener: &OwnedFd) {
    if !is_present() {
        return;
    }
    for (name, fd) in [(FUSE, fuse), (LISTENER, listener)] {
        let stored = sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &[fd.as_fd()]);
        if let Err(error) = stored {
            tracing::warn!(%error, name, "the service manager does not take a descriptor");
        }
    }
}

/// Makes it forget a FUSE connection that is dead.
pub(super) fn forget_fuse() {
    tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(FUSE)]);
}

/// What it kept: FUSE connection and listening socket.
pub(super) fn kept() -> (Option<OwnedFd>, Option<OwnedFd>) {
    let (mut fuse, mut listener) = (None, None);
    match sd_notify::listen_fds_with_names() {
        Ok(fds) => {
            for (fd, name) in fds {
                match (name.as_str(), crate::sys::take_inherited(fd)) {
                    (FUSE, Ok(fd)) => fuse = Some(fd),
                    (LISTENER, Ok(fd)) => listener = Some(fd),
                    (_, Ok(_)) => tracing::warn!(name, "unknown descriptor from the service manager, closed"),
                    (_, Err(error)) => tracing::warn!(name, %error, "bad descriptor from the service manager"),
                }
            }
        }
        Err(error) => tracing::warn!(%error, "cannot take descriptors from the service manager"),
    }
    (fuse, listener)
}
