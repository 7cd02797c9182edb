//! Comparing two file trees as a container sees them: every attribute that `lstat`, `readlink`, `listxattr` and `read` show.
//!
//! Left out is what belongs to the file system and not to the image: inode numbers (but which names share one is compared),
//! sizes and link counts of directories.

use std::collections::HashMap;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};

/// What a comparison saw.
#[derive(Debug, Default)]
pub struct Comparison {
    /// Paths of the left tree.
    pub paths: u64,
    /// Bytes of contents that were compared; those of a file with several names once.
    pub bytes: u64,
    /// One line per difference, in the order of the walk; at most [`DIFFERENCES_MAX`].
    pub differences: Vec<String>,
}

/// More differences than this are not written down.
pub const DIFFERENCES_MAX: usize = 200;

/// Compares the tree `left` with `right`.
pub fn compare(left: &Path, right: &Path) -> Result<Comparison> {
    Walk::start(left, right, None)
}

/// Compares a tree that containerd unpacked, beginning at `began`, with another. Unpacking a layer changes the directories
/// that it adds to or removes from without naming them (the root of the tree is always one), and their modification time is
/// then that of the unpacking: such times say nothing about the image and are left out.
pub fn compare_unpacked(unpacked: &Path, other: &Path, began: SystemTime) -> Result<Comparison> {
    Walk::start(unpacked, other, Some(began))
}

struct Walk<'a> {
    left: &'a Path,
    right: &'a Path,
    result: Comparison,
    /// Directories on the left that were modified later have no modification time.
    began: Option<i128>,
    /// First path of each file with several names, by device and inode.
    left_links: HashMap<(u64, u64), PathBuf>,
    right_links: HashMap<(u64, u64), PathBuf>,
}

impl<'a> Walk<'a> {
    fn start(left: &'a Path, right: &'a Path, began: Option<SystemTime>) -> Result<Comparison> {
        let since_1970 = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let began = began.map(|time| since_1970(time).as_nanos().cast_signed());
        let (left_links, right_links) = (HashMap::new(), HashMap::new());
        let mut walk = Walk { left, right, result: Comparison::default(), began, left_links, right_links };
        walk.directory(Path::new(""))?;
        Ok(walk.result)
    }

    fn directory(&mut self, relative: &Path) -> Result<()> {
        self.attributes(relative)?;
        let (left, right) = (names(&self.left.join(relative))?, names(&self.right.join(relative))?);
        for name in right.iter().filter(|name| left.binary_search(name).is_err()) {
            self.differ(&relative.join(name), "only on the right".to_owned());
        }
        for name in left {
            let path = relative.join(&name);
            if right.binary_search(&name).is_err() {
                self.differ(&path, "only on the left".to_owned());
                continue;
            }
            let (a, b) = (fs::symlink_metadata(self.left.join(&path))?, fs::symlink_metadata(self.right.join(&path))?);
            if a.is_dir() && b.is_dir() {
                self.directory(&path)?;
            } else {
                self.attributes(&path)?;
            }
        }
        Ok(())
    }

    fn attributes(&mut self, relative: &Path) -> Result<()> {
        let (left, right) = (self.left.join(relative), self.right.join(relative));
        let (a, b) = (fs::symlink_metadata(&left)?, fs::symlink_metadata(&right)?);
        self.result.paths += 1;
        // The type is in the mode.
        let mut fields: Vec<(&str, i128, i128)> = vec![
            ("type and mode", a.mode().into(), b.mode().into()),
            ("owner", a.uid().into(), b.uid().into()),
            ("group", a.gid().into(), b.gid().into()),
        ];
        if !a.is_dir() || self.began.is_none_or(|began| nanoseconds(&a) < began) {
            fields.push(("mtime", nanoseconds(&a), nanoseconds(&b)));
        }
        if !a.is_dir() || !b.is_dir() {
            fields.push(("size", a.size().into(), b.size().into()));
            fields.push(("link count", a.nlink().into(), b.nlink().into()));
            fields.push(("device number", a.rdev().into(), b.rdev().into()));
        }
        for (field, a, b) in fields {
            if a != b {
                self.differ(relative, format!("{field}: {a} and {b}"));
            }
        }
        if a.mode() != b.mode() {
            return Ok(());
        }
        if a.is_symlink() {
            let (a, b) = (fs::read_link(&left)?, fs::read_link(&right)?);
            if a != b {
                self.differ(relative, format!("target: {} and {}", a.display(), b.display()));
            }
        }
        let mut was_read = false;
        if !a.is_dir() && (a.nlink() > 1 || b.nlink() > 1) {
            let first = |links: &mut HashMap<_, PathBuf>, of: &Metadata| {
                links.entry((of.dev(), of.ino())).or_insert_with(|| relative.to_owned()).clone()
            };
            let (a, b) = (first(&mut self.left_links, &a), first(&mut self.right_links, &b));
            if a != b {
                self.differ(relative, format!("is the same file as {} and {}", a.display(), b.display()));
            }
            was_read = a == b && a != relative;
        }
        self.xattrs(relative, &left, &right)?;
        if a.is_file() && b.is_file() && a.size() == b.size() && !was_read {
            self.contents(relative, &left, &right)?;
        }
        Ok(())
    }

    fn xattrs(&mut self, relative: &Path, left: &Path, right: &Path) -> Result<()> {
        let (a, b) = (xattr_names(left)?, xattr_names(right)?);
        if a != b {
            self.differ(relative, format!("extended attributes: {a:?} and {b:?}"));
            return Ok(());
        }
        for name in a {
            let (a, b) = (xattr(left, &name)?, xattr(right, &name)?);
            if a != b {
                self.differ(relative, format!("extended attribute {name:?}: {a:?} and {b:?}"));
            }
        }
        Ok(())
    }

    fn contents(&mut self, relative: &Path, left: &Path, right: &Path) -> Result<()> {
        let open = |path: &Path| File::open(path).with_context(|| format!("cannot open {}", path.display()));
        let (mut a, mut b) = (open(left)?, open(right)?);
        let (mut first, mut second) = (vec![0; 1 << 18], vec![0; 1 << 18]);
        let mut offset = 0_u64;
        loop {
            let read = read_full(&mut a, &mut first).with_context(|| format!("cannot read {}", left.display()))?;
            let other = read_full(&mut b, &mut second).with_context(|| format!("cannot read {}", right.display()))?;
            let (read_left, read_right) = (&first[..read], &second[..other]);
            if read_left != read_right {
                let at = read_left.iter().zip(read_right).take_while(|(a, b)| a == b).count() as u64;
                self.differ(relative, format!("contents differ from byte {}", offset + at));
                return Ok(());
            }
            if read == 0 {
                return Ok(());
            }
            offset += read as u64;
            self.result.bytes += read as u64;
        }
    }

    fn differ(&mut self, relative: &Path, what: String) {
        if self.result.differences.len() < DIFFERENCES_MAX {
            self.result.differences.push(format!("/{}: {what}", relative.display()));
        }
    }
}

/// Names of a file's extended attributes, sorted; the file system's own ones that no container sees are left out.
pub fn xattr_names(path: &Path) -> Result<Vec<OsString>> {
    let mut list = vec![0_u8; 1 << 16];
    let name = c_path(path)?;
    let length = match rustix::fs::llistxattr(name.as_c_str(), list.as_mut_slice()) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error).with_context(|| format!("cannot list attributes of {}", path.display())),
    };
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut names: Vec<_> = names.map(|name| OsString::from_vec(name.to_vec())).collect();
    names.retain(|name| !name.as_bytes().starts_with(b"trusted.overlay."));
    names.sort();
    Ok(names)
}

/// Value of one extended attribute.
pub fn xattr(path: &Path, name: &OsStr) -> Result<Vec<u8>> {
    let mut value = vec![0_u8; 1 << 16];
    let attribute = CString::new(name.as_bytes()).context("an attribute's name has a zero byte")?;
    let length = rustix::fs::lgetxattr(c_path(path)?.as_c_str(), attribute.as_c_str(), value.as_mut_slice())
        .with_context(|| format!("cannot read attribute {name:?} of {}", path.display()))?;
    value.truncate(length);
    Ok(value)
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes()).context("a path has a zero byte")
}

fn names(directory: &Path) -> Result<Vec<OsString>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    let mut names = entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<Vec<_>, _>>()?;
    names.sort();
    Ok(names)
}

fn nanoseconds(metadata: &Metadata) -> i128 {
    i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec())
}

fn read_full(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn tree() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("d/file"), vec![7; 300_000]).unwrap();
        fs::hard_link(root.join("d/file"), root.join("d/second")).unwrap();
        symlink("file", root.join("d/link")).unwrap();
        for name in ["d/file", "d", ""] {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(1_500_000_000_123_456_789);
            File::open(root.join(name)).unwrap().set_modified(time).unwrap();
        }
        let link = rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec { tv_sec: 5, tv_nsec: 0 },
            last_modification: rustix::fs::Timespec { tv_sec: 5, tv_nsec: 0 },
        };
        rustix::fs::utimensat(rustix::fs::CWD, root.join("d/link"), &link, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
            .unwrap();
        folder
    }

    fn differences(change: impl FnOnce(&Path)) -> Vec<String> {
        let (left, right) = (tree(), tree());
        change(right.path());
        compare(left.path(), right.path()).unwrap().differences
    }

    #[test]
    fn equal_trees_have_no_differences() {
        let (left, right) = (tree(), tree());
        let result = compare(left.path(), right.path()).unwrap();
        assert_eq!(result.differences, Vec::<String>::new());
        assert_eq!((result.paths, result.bytes), (5, 300_000));
    }

    #[test]
    fn each_attribute_is_seen() {
        let mode = differences(|root| fs::set_permissions(root.join("d"), fs::Permissions::from_mode(0o700)).unwrap());
        assert!(mode.iter().any(|line| line.starts_with("/d: type and mode")), "{mode:?}");
        let mtime =
            differences(|root| File::open(root.join("d")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap());
        assert!(mtime.iter().any(|line| line.starts_with("/d: mtime")), "{mtime:?}");
        let byte = differences(|root| {
            let mut contents = vec![7; 300_000];
            contents[270_000] = 8;
            fs::write(root.join("d/file"), contents).unwrap();
        });
        assert!(byte.contains(&"/d/file: contents differ from byte 270000".to_owned()), "{byte:?}");
        let copied = differences(|root| {
            fs::remove_file(root.join("d/second")).unwrap();
            fs::write(root.join("d/second"), vec![7; 300_000]).unwrap();
        });
        assert!(copied.contains(&"/d/second: link count: 2 and 1".to_owned()), "{copied:?}");
        let more = differences(|root| fs::write(root.join("d/more"), "").unwrap());
        assert!(more.contains(&"/d/more: only on the right".to_owned()), "{more:?}");
        let target = differences(|root| {
            fs::remove_file(root.join("d/link")).unwrap();
            symlink("else", root.join("d/link")).unwrap();
        });
        assert!(target.contains(&"/d/link: target: file and else".to_owned()), "{target:?}");
    }
}
