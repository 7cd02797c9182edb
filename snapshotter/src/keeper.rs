//! Crash survival: a tiny process, the *keeper*, that holds what must not die.
//!
//! A FUSE connection lives as long as somebody holds its file descriptor; when the last one is closed, all containers on
//! it have lost their files for good. So two processes hold it, with the listening socket of the gRPC service: the
//! keeper, which does nothing but wait, and the daemon, which does all the work. Each starts the other again when it
//! dies. Requests wait meanwhile; the next daemon asks the kernel to send again what the last one had read
//! ([`crate::fuse::session`]). Both killed in the same instant is the limit, unless the service manager holds the
//! descriptors as well.
//!
//! ```text
//!   serve ──► keeper ──starts──► daemon
//!               ▲                  │ the keeper's end of the link closes
//!               └─────starts───────┘
//! ```
//!
//! - The lock `RUNTIME/lock` is shared by both: it is held as long as either lives.
//! - `RUNTIME/keeper.sock` answers [`status`] and hands everything to a newly started `serve` if the keeper is an orphan,
//!   started by its daemon. A keeper with somebody who looks after it refuses.
//! - SIGTERM or SIGINT to the keeper is an orderly stop. Under a service manager that keeps descriptors the mount stays and
//!   its readers wait for the next start; without one it is unmounted, and running containers lose their lazy layers.
//! - SIGHUP to the keeper loads a new binary: the keeper executes it in its place and then restarts the daemon.
//! - The daemon's end, for whatever reason, is followed by the next daemon; only one that fails before any daemon was
//!   ever ready ends the keeper, as its configuration is wrong.
//!
//! Neither process may touch files on its own mount: with the other one dead nobody would answer.
//!
//! [`estate`]: what is handed from process to process. [`supervisor`]: the keeper. [`daemon`]: the daemon's side.
//! [`control`]: the control socket. [`manager`]: the service manager.

mod control;
mod daemon;
mod estate;
mod manager;
mod supervisor;

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

pub use control::{Status, status};
pub use daemon::DaemonSide;
pub use supervisor::{adopt, serve};

use crate::fuse::mount::MountError;

/// What keeper and daemon must agree on.
#[derive(Debug, Clone)]
pub struct KeeperOptions {
    /// Directory for the lock and the control socket; made if missing. Absolute and free of links, on a file system
    /// that is emptied at boot.
    pub runtime_directory: PathBuf,
    /// Where the FUSE mount goes; made if missing. Absolute and free of links.
    pub mount_point: PathBuf,
    /// Socket of the gRPC service.
    pub socket: PathBuf,
    /// Arguments with which this binary becomes a keeper that calls [`adopt`].
    pub keeper_arguments: Vec<OsString>,
    /// Arguments with which this binary becomes the daemon, which calls [`DaemonSide::receive`].
    pub daemon_arguments: Vec<OsString>,
    /// How long an orderly stop waits for the daemon before it is killed.
    pub stop_timeout: Duration,
}

impl KeeperOptions {
    fn lock(&self) -> PathBuf {
        self.runtime_directory.join("lock")
    }

    fn control(&self) -> PathBuf {
        control::path(&self.runtime_directory)
    }
}

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// A file or directory cannot be made.
    #[error("cannot set up {}", path.display())]
    SetUp {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another one serves here.
    #[error(
        "a drover-snapshotter already serves {}: {reason}. Stop it first, or send its keeper SIGHUP to load a new binary",
        runtime_directory.display()
    )]
    Served {
        /// Its runtime directory.
        runtime_directory: PathBuf,
        /// What its keeper said.
        reason: String,
    },
    /// Another one has the lock and does not answer.
    #[error(
        "a drover-snapshotter holds {} but its keeper does not answer; find its processes with fuser on that file",
        .0.display()
    )]
    Silent(PathBuf),
    /// The path of the socket is taken.
    #[error("cannot listen on {}: {reason}. Choose another path for the key socket, the same as in containerd's drop-in", path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// By what.
        reason: &'static str,
    },
    /// No FUSE mount.
    #[error("there is no FUSE mount")]
    Mount(#[from] MountError),
    /// The daemon failed at its first start.
    #[error("the daemon ended with exit code {0} before it was ready")]
    Daemon(i32),
    /// Started by hand.
    #[error("this command is started by drover-snapshotter itself, which hands it an open connection; use `serve`")]
    NotHandedOver(#[source] io::Error),
    /// The operating system refuses something that cannot fail.
    #[error("cannot {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl KeeperError {
    fn set_up(path: &Path) -> impl FnOnce(io::Error) -> KeeperError {
        let path = path.to_owned();
        move |source| KeeperError::SetUp { path, source }
    }

    fn system(what: &'static str) -> impl FnOnce(io::Error) -> KeeperError {
        move |source| KeeperError::System { what, source }
    }
}
