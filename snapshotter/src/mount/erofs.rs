//! Mounting and unmounting EROFS images whose bytes are in another file.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// An image, the file that holds its data, and where both are mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErofsMount {
    /// Metadata-only EROFS image.
    pub image: PathBuf,
    /// The device: a file of the FUSE mount, or a complete device on disk.
    pub device: PathBuf,
    /// Directory to mount on.
    pub target: PathBuf,
}

/// Why a layer could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel refused.
    #[error("cannot mount {image} with device {device} on {target}: {errno}{hint}", image = mount.image.display(), device = mount.device.display(), target = mount.target.display())]
    Refused {
        /// What was asked.
        mount: Box<ErofsMount>,
        /// The kernel's answer.
        errno: Errno,
        /// What the user can do about it, or empty.
        hint: &'static str,
    },
    /// The process that mounts on behalf of the daemon failed.
    #[error("the mount process failed: {0}")]
    Helper(String),
    /// The mount point or the image could not be made.
    #[error("{path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Its error.
        source: io::Error,
    },
}

impl MountError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        |source| Self::Io { path: path.to_owned(), source }
    }
}

impl ErofsMount {
    /// Mounts read-only. The caller must not be the process that serves `device` through FUSE: see [`super::helper`].
    pub fn mount(&self) -> Result<(), MountError> {
        let options = format!("device={}", self.device.display());
        mount(Some(&self.image), &self.target, Some("erofs"), MsFlags::MS_RDONLY, Some(options.as_str())).map_err(
            |errno| {
                let hint = match errno {
                    Errno::ENODEV => {
                        " (this kernel has no EROFS: load its module, or use a kernel with CONFIG_EROFS_FS)"
                    }
                    Errno::ENOTBLK => " (this kernel cannot mount EROFS from files: needs 6.12 or newer)",
                    _ => "",
                };
                MountError::Refused { mount: Box::new(self.clone()), errno, hint }
            },
        )
    }
}

/// What became of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// Nobody has it any more.
    Gone,
    /// It lives on for who has it and is gone for everybody else.
    Detached,
}

/// Unmounts what is mounted on `target`; nothing mounted there is success. A mount that is still in use is detached.
pub fn unmount(target: &Path) -> io::Result<Unmounted> {
    match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EBUSY) => ignore_absent(umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW))
            .map(|()| Unmounted::Detached),
        answer => ignore_absent(answer).map(|()| Unmounted::Gone),
    }
}

/// EINVAL: not a mount point.
fn ignore_absent(answer: nix::Result<()>) -> io::Result<()> {
    match answer {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
