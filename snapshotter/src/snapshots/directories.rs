//! The directories of ordinary snapshots: `<root>/snapshots/<id>/fs` for the files and, of an active one, `work` for
//! overlayfs. The layout and modes are those of containerd's own overlayfs snapshotter.

use std::ffi::CString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, renameat, unlinkat};
use rustix::io::Errno;

use super::record::Kind;

/// Directories nested deeper are moved up before they are removed: a container can nest a hundred thousand, and each level
/// takes a file descriptor.
const REMOVE_DEPTH_MAX: usize = 64;

/// The directory that holds them all.
#[derive(Debug)]
pub struct Directories {
    root: PathBuf,
}

/// Who owns a new snapshot's root directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Owner {
    /// The owner of `path`.
    pub fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self { uid: metadata.uid(), gid: metadata.gid() })
    }
}

impl Directories {
    /// Opens or creates `<root>/snapshots`.
    pub fn open(root: &Path) -> io::Result<Self> {
        let root = root.join("snapshots");
        DirBuilder::new().mode(0o700).recursive(true).create(&root)?;
        sync(root.parent().unwrap_or(&root))?;
        Ok(Self { root })
    }

    /// The directory of snapshot `id`.
    pub fn directory(&self, id: u64) -> PathBuf {
        self.root.join(id.to_string())
    }

    /// The files of snapshot `id`.
    pub fn files(&self, id: u64) -> PathBuf {
        self.directory(id).join("fs")
    }

    /// Overlayfs's work directory of snapshot `id`.
    pub fn work(&self, id: u64) -> PathBuf {
        self.directory(id).join("work")
    }

    /// Creates the directories of snapshot `id`, on disk when this returns. The root of its files has mode 0755 and
    /// `owner`: overlayfs shows the upper directory's attributes as those of the container's root, and containerd takes the
    /// owner, but not the mode, from the parent.
    pub fn create(&self, id: u64, kind: Kind, owner: Option<Owner>) -> io::Result<()> {
        let directory = self.directory(id);
        // What is left of an attempt that has no record.
        self.remove(id)?;
        fs::create_dir(&directory)?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
        create_with_mode(&self.files(id), 0o755)?;
        if let Some(Owner { uid, gid }) = owner {
            std::os::unix::fs::lchown(self.files(id), Some(uid), Some(gid))?;
        }
        if kind == Kind::Active {
            create_with_mode(&self.work(id), 0o711)?;
        }
        sync(&self.files(id))?;
        sync(&directory)?;
        sync(&self.root)
    }

    /// Removes the directory of snapshot `id`; it is no error if there is none.
    pub fn remove(&self, id: u64) -> io::Result<()> {
        remove_all(&self.root, &id.to_string())
    }

    /// The names of all directories that there are: decimal ids, unless somebody else made some.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }
}

fn create_with_mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::create_dir(path)?;
    // Not by the mode of mkdir(2): the umask would take bits away.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

fn sync(directory: &Path) -> io::Result<()> {
    fs::File::open(directory)?.sync_all()
}

/// Removes `name` below `root` and all below it, with a bounded number of open files whatever the depth.
fn remove_all(root: &Path, name: &str) -> io::Result<()> {
    let root = open_directory(rustix::fs::CWD, root)?;
    let name = CString::new(name)?;
    let mut moved_up = 0_u64;
    loop {
        let Some(top) = open_to_remove(&root, &name)? else { return Ok(()) };
        let top_file = top.try_clone()?;
        let mut walk = vec![(Dir::new(top)?, name.clone())];
        loop {
            let depth = walk.len();
            let Some((directory, _)) = walk.last_mut() else { break };
            let Some(entry) = directory.read() else {
                let Some((directory, own_name)) = walk.pop() else { break };
                drop(directory);
                let parent = match walk.last() {
                    Some((parent, _)) => parent.fd()?,
                    None => root.as_fd(),
                };
                match unlinkat(parent, &own_name, AtFlags::REMOVEDIR) {
                    // Directories that were moved up meanwhile: another round.
                    Err(Errno::NOTEMPTY | Errno::EXIST) if walk.is_empty() => {}
                    Err(Errno::NOENT) => {}
                    result => result?,
                }
                continue;
            };
            let entry = entry?;
            let child = entry.file_name().to_owned();
            if child.as_c_str() == c"." || child.as_c_str() == c".." {
                continue;
            }
            let here = directory.fd()?;
            if entry.file_type() != FileType::Directory {
                match unlinkat(here, &child, AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => continue,
                    Err(Errno::ISDIR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if unlinkat(here, &child, AtFlags::REMOVEDIR).is_ok() {
                continue;
            }
            if depth < REMOVE_DEPTH_MAX {
                if let Some(below) = open_to_remove(here, &child)? {
                    walk.push((Dir::new(below)?, child));
                }
            } else {
                loop {
                    moved_up += 1;
                    match renameat(here, &child, &top_file, format!("moved-up-{moved_up}")) {
                        // Left by an earlier attempt that was cut off.
                        Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
                        result => break result?,
                    }
                }
            }
        }
    }
}

fn open_to_remove(parent: impl AsFd, name: &std::ffi::CStr) -> io::Result<Option<OwnedFd>> {
    match open_directory(&parent, name) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::NOTDIR | Errno::LOOP) => {
            unlinkat(parent, name, AtFlags::empty())?;
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn open_directory(parent: impl AsFd, path: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    openat(parent, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn open() -> (tempfile::TempDir, Directories) {
        let root = tempfile::tempdir().expect("temporary directory");
        let directories = Directories::open(root.path()).expect("opens");
        (root, directories)
    }

    #[test]
    fn creates_what_overlayfs_needs() {
        let (_root, directories) = open();
        directories.create(3, Kind::Active, None).expect("creates");
        let mode = |path: PathBuf| fs::metadata(path).expect("is there").mode() & 0o7777;
        assert_eq!(mode(directories.files(3)), 0o755);
        assert_eq!(mode(directories.work(3)), 0o711);
        directories.create(4, Kind::View, None).expect("creates");
        assert!(!directories.work(4).exists());
        let mut names = directories.names().expect("reads");
        names.sort();
        assert_eq!(names, ["3", "4"]);
    }

    #[test]
    fn an_old_attempt_is_replaced() {
        let (_root, directories) = open();
        fs::create_dir_all(directories.files(1).join("left/over")).expect("creates");
        directories.create(1, Kind::Active, None).expect("creates");
        assert_eq!(fs::read_dir(directories.files(1)).expect("reads").count(), 0);
    }

    #[test]
    fn removes_without_following_links() {
        let (root, directories) = open();
        let kept = root.path().join("kept");
        fs::create_dir(&kept).expect("creates");
        fs::write(kept.join("file"), "x").expect("writes");
        directories.create(1, Kind::Active, None).expect("creates");
        symlink(&kept, directories.files(1).join("link")).expect("links");
        fs::create_dir_all(directories.files(1).join("a/b")).expect("creates");
        fs::write(directories.files(1).join("a/b/file"), "x").expect("writes");
        directories.remove(1).expect("removes");
        assert!(!directories.directory(1).exists());
        assert!(kept.join("file").exists());
        directories.remove(1).expect("is no error");
    }

    #[test]
    fn removes_any_depth_with_few_open_files() {
        const DEPTH: usize = 3000;
        let (_root, directories) = open();
        directories.create(1, Kind::Active, None).expect("creates");
        let mut at = open_directory(rustix::fs::CWD, directories.files(1)).expect("opens");
        for _ in 0..DEPTH {
            rustix::fs::mkdirat(&at, "deep", Mode::RWXU).expect("creates");
            rustix::fs::mkdirat(&at, "beside", Mode::RWXU).expect("creates");
            at = open_directory(&at, "deep").expect("opens");
        }
        directories.remove(1).expect("removes");
        assert!(!directories.directory(1).exists());
    }
}
