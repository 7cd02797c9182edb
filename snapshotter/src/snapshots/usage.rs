//! Disk usage of a directory, as containerd counts it (`continuity/fs/du_unix.go`): allocated blocks, each inode once.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, statat};

use super::record::Usage;

/// Directories nested deeper are not counted: each level holds a file descriptor while it is walked.
const DEPTH_MAX: usize = 512;

/// Adds up `path` and all below it. Symbolic links and other file systems are not followed; what vanishes meanwhile is not
/// counted.
pub fn disk_usage(path: &Path) -> io::Result<Usage> {
    let root = openat(rustix::fs::CWD, path, directory_flags(), Mode::empty())?;
    let stat = rustix::fs::fstat(&root)?;
    let mut count = Count { device: stat.st_dev, seen: HashSet::new(), usage: Usage::default() };
    count.add(&stat);
    let mut walk = vec![Dir::new(root)?];
    loop {
        let depth = walk.len();
        let Some(directory) = walk.last_mut() else { return Ok(count.usage) };
        let Some(entry) = directory.read() else {
            walk.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let parent = directory.fd()?;
        let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(rustix::io::Errno::NOENT) => continue,
            result => result?,
        };
        if stat.st_dev != count.device {
            continue;
        }
        count.add(&stat);
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory && depth < DEPTH_MAX {
            match open_below(parent, name) {
                Ok(below) => walk.push(Dir::new(below)?),
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

struct Count {
    device: u64,
    /// Inodes with more than one link that were counted.
    seen: HashSet<u64>,
    usage: Usage,
}

impl Count {
    fn add(&mut self, stat: &rustix::fs::Stat) {
        let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !directory && stat.st_nlink > 1 && !self.seen.insert(stat.st_ino) {
            return;
        }
        self.usage.inodes += 1;
        self.usage.size_bytes += u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
    }
}

fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

fn open_below(parent: impl std::os::fd::AsFd, name: &std::ffi::CStr) -> rustix::io::Result<OwnedFd> {
    openat(parent, name, directory_flags(), Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::*;

    #[test]
    fn counts_blocks_and_each_inode_once() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let root = directory.path();
        fs::create_dir_all(root.join("a/b")).expect("creates");
        fs::write(root.join("a/b/file"), vec![1; 100_000]).expect("writes");
        fs::hard_link(root.join("a/b/file"), root.join("link")).expect("links");
        symlink("/", root.join("outside")).expect("links");
        let expected: u64 = ["", "a", "a/b", "a/b/file", "outside"]
            .iter()
            .map(|path| fs::symlink_metadata(root.join(path)).expect("stats").blocks() * 512)
            .sum();
        assert_eq!(disk_usage(root).expect("counts"), Usage { size_bytes: expected, inodes: 5 });
        assert!(expected >= 100_000);
    }

    #[test]
    fn counts_as_du_does_and_as_an_unpacked_layer_is_told() {
        use layer::entry::{Entry, Kind, Mtime};
        let directory = tempfile::tempdir().expect("temporary directory");
        let root = directory.path().join("root");
        let mut entries = Vec::new();
        let mut add = |path: &str, kind: Kind| {
            let place = root.join(path);
            match &kind {
                Kind::Directory { .. } => fs::create_dir(&place).expect("creates"),
                Kind::Regular { size, .. } => fs::write(&place, vec![7; *size as usize]).expect("writes"),
                Kind::Symlink { target } => symlink(std::str::from_utf8(target).unwrap(), &place).expect("links"),
                Kind::HardLink { target } => {
                    fs::hard_link(root.join(std::str::from_utf8(target).unwrap()), &place).expect("links");
                }
                _ => panic!(),
            }
            let path = path.as_bytes().to_vec();
            // A hard link has the attributes of its target.
            let mode = if matches!(kind, Kind::HardLink { .. }) { 0 } else { 0o755 };
            entries.push(Entry { path, kind, mode, uid: 0, gid: 0, mtime: Mtime::default(), xattrs: Vec::new() });
        };
        add("", Kind::Directory { opaque: false });
        add("bin", Kind::Directory { opaque: false });
        for number in 0..300 {
            let size = number * 977;
            add(&format!("bin/program-with-a-name-of-some-length-{number:03}"), Kind::Regular { offset: 0, size });
        }
        add("lib", Kind::Directory { opaque: false });
        add("lib/long", Kind::Symlink { target: vec![b'x'; 100] });
        add("lib/other", Kind::HardLink { target: b"bin/program-with-a-name-of-some-length-299".to_vec() });
        add("lib/short", Kind::Symlink { target: b"other".to_vec() });
        let told = layer::tree::Tree::validate(entries, 1 << 20).expect("is a tree").unpacked();

        let counted = disk_usage(&root).expect("counts");
        let du = std::process::Command::new("du").args(["-s", "--block-size=1"]).arg(&root).output().expect("du runs");
        let du: u64 = String::from_utf8_lossy(&du.stdout).split_whitespace().next().unwrap().parse().unwrap();
        assert_eq!(counted.size_bytes, du);
        assert_eq!(told.inodes, counted.inodes);
        assert!(told.bytes.abs_diff(du) * 100 <= du, "{} told, {du} counted", told.bytes);
    }

    #[test]
    fn a_missing_directory_is_an_error() {
        assert!(disk_usage(Path::new("/nonexistent/directory")).is_err());
    }
}
