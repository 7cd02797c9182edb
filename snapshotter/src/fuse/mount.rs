//! Opening `/dev/fuse`, mounting, unmounting. Nothing here touches the mounted file system itself: with no daemon behind
//! it that would hang.

use std::{
    ffi::{CString, OsString},
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};

/// The source that the mount shows.
pub const SOURCE: &str = "drover";

/// Why there is no FUSE mount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// No `/dev/fuse`.
    #[error("cannot open /dev/fuse (is the kernel module fuse loaded, and the device allowed here?)")]
    Device(#[source] io::Error),
    /// mount(2) refused.
    #[error("cannot mount FUSE on {}", mount_point.display())]
    Mount {
        /// Where.
        mount_point: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A path with a zero byte.
    #[error("{} is no path", .0.display())]
    Path(PathBuf),
}

/// Opens a connection and mounts it on the directory `mount_point`. Returns at once; the file system answers when a
/// session serves the connection.
///
/// Only root opens files there (mode 0400, checked by the kernel); all others may read through what root has opened, as
/// the processes of containers do.
pub fn mount(mount_point: &Path) -> Result<OwnedFd, MountError> {
    let fd = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| MountError::Device(errno.into()))?;
    let options =
        format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", fd.as_fd().as_raw_fd());
    let options = CString::new(options).map_err(|_| MountError::Path(mount_point.into()))?;
    rustix::mount::mount(
        SOURCE,
        mount_point,
        "fuse.drover",
        MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME,
        Some(options.as_c_str()),
    )
    .map_err(|errno| MountError::Mount { mount_point: mount_point.into(), source: errno.into() })?;
    Ok(fd)
}

/// How an unmount went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmounted {
    /// Nothing was mounted there.
    NotMounted,
    /// Nothing used it.
    Clean,
    /// Something uses it still (containers on its devices); it is only out of sight.
    InUse,
}

/// Unmounts all FUSE mounts of ours from `mount_point`.
pub fn unmount(mount_point: &Path) -> io::Result<Unmounted> {
    let mut outcome = Unmounted::NotMounted;
    while find(mount_point)?.is_some_and(|mount| mount.is_ours()) {
        match rustix::mount::unmount(mount_point, UnmountFlags::NOFOLLOW) {
            Ok(()) if outcome == Unmounted::NotMounted => outcome = Unmounted::Clean,
            Ok(()) => {}
            Err(Errno::BUSY) => {
                rustix::mount::unmount(mount_point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
                outcome = Unmounted::InUse;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(outcome)
}

/// Whether the connection `fd` is still mounted and was not aborted.
pub fn is_connected(fd: impl AsFd) -> bool {
    let mut polled = [PollFd::new(&fd, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut polled, Some(&now)) {
        Ok(0) => true,
        Ok(_) => !polled[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL),
        Err(_) => true,
    }
}

/// Sets the readahead of whatever is mounted on `mount_point`.
pub fn set_read_ahead(mount_point: &Path, bytes: u64) -> io::Result<()> {
    let mount = find(mount_point)?.ok_or(io::ErrorKind::NotFound)?;
    fs::write(format!("/sys/class/bdi/{}/read_ahead_kb", mount.device), (bytes / 1024).to_string())
}

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountLine {
    /// Device numbers, as `MAJOR:MINOR`.
    pub device: String,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// File system, with its subtype.
    pub file_system: String,
    /// Source.
    pub source: OsString,
}

impl MountLine {
    fn is_ours(&self) -> bool {
        self.file_system == "fuse.drover" && self.source == SOURCE
    }
}

/// What is mounted on top of `mount_point`, which must be absolute and free of links.
pub fn find(mount_point: &Path) -> io::Result<Option<MountLine>> {
    let lines = fs::read("/proc/self/mountinfo")?;
    Ok(lines.split(|byte| *byte == b'\n').filter_map(parse).rfind(|line| line.mount_point == mount_point))
}

fn parse(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
    let mount_point = PathBuf::from(unescape(fields.nth(1)?));
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let file_system = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let source = unescape(fields.next()?);
    Some(MountLine { device, mount_point, file_system, source })
}

/// Undoes the octal escapes of mountinfo (`\040`).
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let escaped = (*first == b'\\').then(|| tail.get(..3)).flatten().and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match escaped {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let line = parse(br"36 35 0:53 / /run/a\040b\134c ro,nosuid - fuse.drover drover rw,user_id=0").unwrap();
        assert_eq!(line.device, "0:53");
        assert_eq!(line.mount_point, Path::new(r"/run/a b\c"));
        assert!(line.is_ours());
        let shared = parse(b"22 1 254:0 / / rw shared:1 master:2 - ext4 /dev/vda rw").unwrap();
        assert_eq!((shared.file_system.as_str(), shared.source.as_bytes()), ("ext4", &b"/dev/vda"[..]));
        assert_eq!(parse(b"garbage"), None);
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(find(Path::new("/proc")).unwrap().is_some());
        assert_eq!(find(Path::new("/proc/nowhere")).unwrap(), None);
    }
}
