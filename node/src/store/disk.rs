//! The real disk.

use std::ffi::OsString;
use std::fmt::Debug;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

use rustix::fs::{Advice, FallocateFlags, FlockOperation, fadvise, fallocate, flock, statvfs};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::backend::{Backend, File, Space, at_once};

/// `RWF_DONTCACHE` (include/uapi/linux/fs.h, since Linux 6.14): what a read brings into the page cache leaves with it.
const RWF_DONTCACHE: u32 = 0x80;

/// A process that was killed a moment ago may still hold its lock.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// Files of the operating system.
#[derive(Debug, Default)]
pub struct Disk;

#[derive(Debug)]
struct DiskFile {
    file: fs::File,
    /// The file system refused `RWF_DONTCACHE`.
    no_dontcache: AtomicBool,
}

impl Backend for Disk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn File>> {
        let file = fs::OpenOptions::new().read(true).write(true).create(create).truncate(false).open(path)?;
        Ok(Arc::new(DiskFile { file, no_dontcache: AtomicBool::new(false) }))
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<OsString>> {
        fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect()
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        match fs::create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let result = match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
            Ok(_) => fs::remove_file(path),
            Err(error) => Err(error),
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        fs::File::open(path)?.sync_all()
    }

    fn sync_all(&self, files: &[Arc<dyn File>], directories: &[&Path]) -> io::Result<()> {
        enum Dirty<'a> {
            File(&'a dyn File),
            Directory(&'a Path),
        }
        let directories = directories.iter().map(|directory| Dirty::Directory(directory));
        let dirty: Vec<_> = files.iter().map(|file| Dirty::File(&**file)).chain(directories).collect();
        at_once(&dirty, |dirty| match dirty {
            Dirty::File(file) => file.sync(),
            Dirty::Directory(directory) => self.sync_directory(directory),
        })
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        let stat = statvfs(path)?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Ok(Space { total: bytes(stat.f_blocks), free: bytes(stat.f_bavail) })
    }

    fn lock(&self, directory: &Path) -> io::Result<Box<dyn Debug + Send + Sync>> {
        let path = directory.join("lock");
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
        let give_up = Instant::now() + LOCK_WAIT;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Box::new(file)),
                Err(Errno::WOULDBLOCK) if Instant::now() < give_up => thread::sleep(Duration::from_millis(20)),
                Err(Errno::WOULDBLOCK) => {
                    let message = format!("{} is in use by another process", directory.display());
                    return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl File for DiskFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    fn read_once_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < out.len() {
            if self.no_dontcache.load(Ordering::Relaxed) {
                let range = offset..offset + out.len() as u64;
                self.file.read_exact_at(&mut out[done..], offset + done as u64)?;
                self.give_pages_back(range);
                return Ok(());
            }
            let mut slices = [IoSliceMut::new(&mut out[done..])];
            let flags = ReadWriteFlags::from_bits_retain(RWF_DONTCACHE);
            match preadv2(&self.file, &mut slices, offset + done as u64, flags) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(Errno::INTR) => {}
                // An older kernel, or a file system without it.
                Err(Errno::OPNOTSUPP | Errno::INVAL) => self.no_dontcache.store(true, Ordering::Relaxed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, flags, range.start, range.end.saturating_sub(range.start))?)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn give_pages_back(&self, range: Range<u64>) {
        // Advice: where it fails, pages stay until the kernel wants them back.
        let _ = fadvise(&self.file, range.start, NonZeroU64::new(range.end - range.start), Advice::DontNeed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_wrote_with_and_without_dontcache() {
        let directory = tempfile::tempdir().unwrap();
        let file = Disk.open(&directory.path().join("f"), true).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_at(&[7; 5000], 3000).unwrap();
        file.sync().unwrap();
        file.give_pages_back(0..1 << 20);
        let mut out = vec![1; 6000];
        file.read_once_at(&mut out, 2500).unwrap();
        assert!(out[..500].iter().all(|byte| *byte == 0));
        assert!(out[500..5500].iter().all(|byte| *byte == 7));
        let mut again = vec![1; 6000];
        file.read_at(&mut again, 2500).unwrap();
        assert_eq!(out, again);
        assert!(file.read_once_at(&mut out, (1 << 20) - 10).is_err());
    }

    #[test]
    fn a_hole_takes_no_disk() {
        let directory = tempfile::tempdir().unwrap();
        let file = Disk.open(&directory.path().join("f"), true).unwrap();
        file.set_len(1 << 20).unwrap();
        assert_eq!(file.allocated().unwrap(), 0);
        file.write_at(&[7; 1 << 16], 1 << 17).unwrap();
        file.sync().unwrap();
        assert_eq!(file.allocated().unwrap(), 1 << 16);
        file.punch((1 << 17)..(1 << 17) + 8192).unwrap();
        assert_eq!(file.allocated().unwrap(), (1 << 16) - 8192);
        let mut out = [1; 3];
        file.read_at(&mut out, (1 << 17) + 8191).unwrap();
        assert_eq!(out, [0, 7, 7]);
        assert_eq!(file.size().unwrap(), 1 << 20);
        let space = Disk.space(directory.path()).unwrap();
        assert!(space.free > 0 && space.free <= space.total);
    }

    #[test]
    fn removing_what_is_not_there_is_fine() {
        let directory = tempfile::tempdir().unwrap();
        Disk.remove(&directory.path().join("nothing")).unwrap();
        Disk.create_directory(&directory.path().join("d")).unwrap();
        Disk.create_directory(&directory.path().join("d")).unwrap();
        Disk.remove(&directory.path().join("d")).unwrap();
    }
}
