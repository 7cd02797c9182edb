//! What the layers below have at a path, for the directories that a layer's tar leaves out.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use layer::entry::{Mtime, Xattr};
use layer::erofs::{DirectoryAttributes, LowerDirectories};
use rustix::fs::{Mode, OFlags, ResolveFlags};

/// The roots of the layers below, top first: EROFS mounts or the directories of ordinary snapshots. Only metadata is read,
/// which is on the node's disk in both cases. A root is asked for when all above it do not have a path.
pub struct LowerRoots<I, E>(RefCell<Roots<I, E>>);

struct Roots<I, E> {
    known: Vec<PathBuf>,
    rest: I,
    failure: Option<E>,
}

impl<I: Iterator<Item = Result<PathBuf, E>>, E> LowerRoots<I, E> {
    /// Looks into `roots`.
    pub fn new(roots: I) -> Self {
        Self(RefCell::new(Roots { known: Vec::new(), rest: roots, failure: None }))
    }

    /// Whether every root that was asked for could be had. Otherwise what was looked up is not to be believed.
    pub fn finish(self) -> Result<(), E> {
        self.0.into_inner().failure.map_or(Ok(()), Err)
    }

    fn root(&self, number: usize) -> Option<PathBuf> {
        let mut roots = self.0.borrow_mut();
        while roots.known.len() <= number {
            match roots.rest.next()? {
                Ok(root) => roots.known.push(root),
                Err(error) => {
                    roots.failure.get_or_insert(error);
                    return None;
                }
            }
        }
        roots.known.get(number).cloned()
    }
}

impl<I: Iterator<Item = Result<PathBuf, E>>, E> LowerDirectories for LowerRoots<I, E> {
    /// As containerd's `mkparent` (pkg/archive/tar.go) and [`layer::erofs::Stack`]: the uppermost layer that has the path
    /// decides, symbolic links are followed inside that layer, and anything there that is no directory ends the search.
    fn attributes(&self, path: &[u8]) -> Option<DirectoryAttributes> {
        for root in (0..).map_while(|number| self.root(number)) {
            match look(&root, path) {
                Ok(Some(attributes)) => return Some(attributes),
                Ok(None) => {}
                Err(rustix::io::Errno::NOTDIR) => return None,
                Err(errno) => {
                    tracing::warn!(root = %root.display(), path = %String::from_utf8_lossy(path), %errno, "cannot read a parent's directory");
                    return None;
                }
            }
        }
        None
    }
}

fn look(root: &Path, path: &[u8]) -> rustix::io::Result<Option<DirectoryAttributes>> {
    const FLAGS: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC).union(OFlags::RDONLY);
    let root = rustix::fs::open(root, FLAGS, Mode::empty())?;
    let path = if path.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(path) };
    let directory = match rustix::fs::openat2(&root, path, FLAGS, Mode::empty(), ResolveFlags::IN_ROOT) {
        Ok(directory) => directory,
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    let stat = rustix::fs::fstat(&directory)?;
    Ok(Some(DirectoryAttributes {
        mode: (stat.st_mode & 0o7777) as u16,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: Mtime { secs: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 },
        xattrs: xattrs(&directory)?,
    }))
}

/// All extended attributes but overlayfs' own marks, sorted by name.
fn xattrs(directory: &OwnedFd) -> rustix::io::Result<Vec<Xattr>> {
    // Mostly there are none: asked first, as the room for the most that there can be has to be cleared.
    let size = match rustix::fs::flistxattr_query(directory.as_fd()) {
        Err(rustix::io::Errno::NOTSUP) | Ok(0) => return Ok(Vec::new()),
        answer => answer?,
    };
    let mut names = vec![0_u8; size];
    let length = rustix::fs::flistxattr(directory.as_fd(), &mut names[..])?;
    let mut xattrs = Vec::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
            continue;
        }
        let mut value = vec![0_u8; 65536];
        let length = rustix::fs::fgetxattr(directory.as_fd(), OsStr::from_bytes(name), &mut value[..])?;
        value.truncate(length);
        xattrs.push(Xattr { name: name.to_vec(), value });
    }
    xattrs.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(xattrs)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn directory(root: &Path, path: &str, mode: u32) {
        std::fs::create_dir_all(root.join(path)).unwrap();
        std::fs::set_permissions(root.join(path), PermissionsExt::from_mode(mode)).unwrap();
    }

    #[test]
    fn the_topmost_directory_wins_and_files_end_the_search() {
        let folder = tempfile::tempdir().unwrap();
        let (top, bottom) = (folder.path().join("top"), folder.path().join("bottom"));
        directory(&top, "a", 0o711);
        directory(&bottom, "a", 0o755);
        directory(&bottom, "b/c", 0o1777);
        directory(&bottom, "d/e", 0o700);
        std::fs::write(top.join("d"), "").unwrap();
        std::os::unix::fs::symlink("b", top.join("link")).unwrap();
        let roots = LowerRoots::new([Ok(top), Ok(bottom), Err("gone")].into_iter());
        assert_eq!(roots.attributes(b"a").unwrap().mode, 0o711);
        assert_eq!(roots.attributes(b"b/c").unwrap().mode, 0o1777);
        assert!(roots.attributes(b"d/e").is_none());
        assert!(roots.0.borrow().failure.is_none(), "the third was not asked for");
        assert_eq!(roots.attributes(b"link"), roots.attributes(b"x"), "a link is followed in its own layer only");
        assert!(roots.attributes(b"missing").is_none());
        assert_eq!(roots.finish(), Err("gone"));
    }

    #[test]
    fn extended_attributes_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("layer");
        directory(&root, "a", 0o755);
        let set = |name: &str, value: &[u8]| {
            rustix::fs::setxattr(root.join("a"), name, value, rustix::fs::XattrFlags::CREATE)
        };
        if set("user.b", &[7; 300]).is_err() {
            println!("skipped: the file system for temporary files has no extended attributes");
            return;
        }
        set("user.a", b"").unwrap();
        set("user.overlay.opaque", b"y").unwrap();
        let roots = LowerRoots::new([Ok::<_, ()>(root.clone())].into_iter());
        let xattrs = roots.attributes(b"a").unwrap().xattrs;
        let found: Vec<_> = xattrs.iter().map(|xattr| (xattr.name.as_slice(), xattr.value.len())).collect();
        assert_eq!(found, [(&b"user.a"[..], 0), (&b"user.b"[..], 300)]);
    }
}
