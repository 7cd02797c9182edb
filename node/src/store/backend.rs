//! The few file operations that the store needs, so that tests can put a losing, tearing disk below it.

use std::ffi::OsString;
use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A disk.
pub trait Backend: Debug + Send + Sync + 'static {
    /// Opens a file to read and write; `create` makes it, empty, where it does not exist.
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn File>>;

    /// Names in a directory, in any order.
    fn list(&self, directory: &Path) -> io::Result<Vec<OsString>>;

    /// Makes one directory; nothing where it exists.
    fn create_directory(&self, path: &Path) -> io::Result<()>;

    /// Moves a file over another, or a directory where nothing is.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a directory with all that is in it, or a file; nothing where it does not exist.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes what was made, renamed and removed in a directory durable.
    fn sync_directory(&self, path: &Path) -> io::Result<()>;

    /// How large the file system of `path` is, and how much of it can still be written.
    fn space(&self, path: &Path) -> io::Result<Space>;

    /// Keeps other processes from using this directory until the guard is dropped.
    fn lock(&self, directory: &Path) -> io::Result<Box<dyn Debug + Send + Sync>>;
}

/// Bytes of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// All that it has.
    pub total: u64,
    /// What an unprivileged process may still write.
    pub free: u64,
}

/// An open file.
pub trait File: Debug + Send + Sync + 'static {
    /// Fills `out` from `offset` on; an error where the file is shorter.
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()>;

    /// The same, for bytes that are not read again soon: they should not stay in the page cache because of it.
    fn read_once_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_at(out, offset)
    }

    /// Writes all of `bytes`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Sets the length; new bytes are a hole.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Bytes of the file, holes included.
    fn size(&self) -> io::Result<u64>;

    /// Bytes that the file takes on the disk (`st_blocks`); holes take none.
    fn allocated(&self) -> io::Result<u64>;

    /// Makes a hole of the range, which may end behind the file: it takes no disk any more and reads as zeros.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;

    /// Makes what was written durable (`fdatasync`).
    fn sync(&self) -> io::Result<()>;

    /// Gives clean cached pages of the range back.
    fn give_pages_back(&self, _range: Range<u64>) {}
}

/// The whole file.
pub(crate) fn read_file(backend: &dyn Backend, path: &Path, len_max: u64) -> io::Result<Vec<u8>> {
    let file = backend.open(path, false)?;
    let len = file.size()?;
    if len > len_max {
        let message = format!("{} has {len} bytes, more than the {len_max} that it may have", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut bytes = vec![0; len as usize];
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Writes a new file, durable but for its name.
pub(crate) fn write_file(backend: &dyn Backend, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let file = backend.open(path, true)?;
    file.set_len(0)?;
    file.write_at(bytes, 0)?;
    file.sync()
}

/// Replaces a file so that after a crash either all of it is old or all of it is new.
pub(crate) fn replace_file(backend: &dyn Backend, directory: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = directory.join(format!("{name}.new"));
    write_file(backend, &temporary, bytes)?;
    backend.rename(&temporary, &directory.join(name))?;
    backend.sync_directory(directory)
}

/// Whether a write failed because there is no room on the disk for it.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
