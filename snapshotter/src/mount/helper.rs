//! Mounting on FUSE files from a process of its own.
//!
//! `mount(2)` of an EROFS image opens its device, and opening a file of the daemon's FUSE mount asks the daemon. Were the
//! daemon itself the caller and killed in that moment, its thread could not die before the request is answered, its
//! successor would not be started before it is dead, and nobody could answer. So a short-lived process mounts. It holds
//! a lock file while it does, and who recovers after a crash takes that lock first ([`settle`]): no mount appears behind its back.

use std::fs::File;
use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::erofs::{ErofsMount, MountError};

/// The subcommand of the snapshotter binary that runs [`serve`].
pub const SUBCOMMAND: &str = "mount-erofs";

/// Starts mount processes.
#[derive(Clone, Debug)]
pub struct Helper {
    /// The snapshotter's binary.
    pub program: PathBuf,
    /// Lock file, shared by all mount processes of one root.
    pub lock: PathBuf,
}

impl Helper {
    /// Mounts all of `mounts` in order with one process; the first failure ends it. Blocks until the process has ended.
    pub fn mount(&self, mounts: &[ErofsMount]) -> Result<(), MountError> {
        let failed = |error: io::Error| MountError::Helper(format!("{}: {error}", self.program.display()));
        let lock = open_lock(&self.lock).map_err(MountError::io(&self.lock))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockShared)
            .map_err(|errno| MountError::Io { path: self.lock.clone(), source: errno.into() })?;
        // The child has the lock as its standard output: the lock lives as long as the process that may mount.
        let mut child = Command::new(&self.program)
            .arg(SUBCOMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::from(lock))
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let text: String = mounts
            .iter()
            .flat_map(|mount| [&mount.image, &mount.device, &mount.target])
            .map(|path| format!("{}\n", path.display()))
            .collect();
        let sent = child.stdin.take().map_or(Ok(()), |mut input| input.write_all(text.as_bytes()));
        let output = child.wait_with_output().map_err(failed)?;
        if output.status.success() {
            return sent.map_err(failed);
        }
        Err(MountError::Helper(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}

/// Waits until no mount process of an earlier daemon is left. The FUSE mount must be served meanwhile.
pub fn settle(lock: &Path) -> Result<(), MountError> {
    let file = open_lock(lock).map_err(MountError::io(lock))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|errno| MountError::Io { path: lock.to_owned(), source: errno.into() })
}

/// The body of the mount process: reads three lines a mount (image, device, target) from standard input and mounts them.
pub fn serve() -> Result<(), MountError> {
    let lines = io::stdin()
        .lock()
        .lines()
        .collect::<io::Result<Vec<String>>>()
        .map_err(|error| MountError::Helper(error.to_string()))?;
    for mount in lines.chunks_exact(3) {
        ErofsMount { image: (&mount[0]).into(), device: (&mount[1]).into(), target: (&mount[2]).into() }.mount()?;
    }
    Ok(())
}

fn open_lock(path: &Path) -> io::Result<File> {
    File::options().create(true).truncate(false).write(true).open(path)
}
