//! What a seeder keeps on disk, below one root:
//!
//! | path | what |
//! | --- | --- |
//! | `version` | text `drover-seeder 1`; a newer one is refused |
//! | `lock` | locked by the process that uses the store |
//! | `blobs/HEX` | a blob, whole and proven |
//! | `wire/HEX/{frames,offsets}` | wire forms of its chunks, soft |
//! | `indexes/HEX/{header,entries,chunk_digests,spans}` | its index; `docs/index-format.md` |
//! | `indexes/HEX/signature` | signature and certificate chain ([`Signed::encode`]) |
//! | `incoming/HEX/{blob,wire,index}` | an ingest under way |
//! | `unsupported/HEX` | why the layer cannot be lazy, as this version of the program found |
//!
//! HEX is the blob's digest. A layer is known when its directory in `indexes` is there: blob and wire forms are synced and
//! moved into place before it. A crash leaves an `incoming` directory, whose blob the next ingest goes on with.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use layer::Digest;
use layer::index::{HEADER_LEN, Header, Index, Section, check_section};
use rustix::fs::FlockOperation;

use super::frames::Frames;
use crate::security::Signed;
use crate::store::at_once;

const VERSION: u32 = 1;
/// A broken-off ingest that nobody asked to go on with for so long is removed when the store is opened.
const INCOMING_AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The most bytes that `signature` and `certificates` may have.
const SIGNED_BYTES_MAX: u64 = 256 << 10;

/// The most layers that are remembered as not lazy, and characters of a reason.
const UNSUPPORTED_MAX: usize = 10_000;
const UNSUPPORTED_CHARS_MAX: usize = 1000;

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file cannot be read or written.
    #[error("seeder store {path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process uses it.
    #[error("the seeder store {0} is in use by another process")]
    InUse(PathBuf),
    /// It was made by a newer version.
    #[error("the seeder store {root} has version {found:?}; this program reads version {VERSION}: update it")]
    Version {
        /// The store's root.
        root: PathBuf,
        /// What its version file says.
        found: String,
    },
}

/// The store, locked for this process.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    _lock: File,
}

/// A layer's index as it is stored.
#[derive(Clone, Debug)]
pub struct StoredIndex {
    /// The header.
    pub header: Header,
    /// Its signature; empty where it was made without security.
    pub signed: Signed,
}

impl Store {
    /// Opens or makes the store at `root`. Blocks on the disk.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let io_error = |path: &Path, source: io::Error| StoreError::Io { path: path.to_owned(), source };
        fs::create_dir_all(root).map_err(|error| io_error(root, error))?;
        let lock_path = root.join("lock");
        let lock = File::options().write(true).create(true).truncate(false).open(&lock_path);
        let lock = lock.map_err(|error| io_error(&lock_path, error))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StoreError::InUse(root.to_owned())),
            Err(error) => return Err(io_error(&lock_path, error.into())),
        }
        let store = Self { root: root.to_owned(), _lock: lock };
        store.check_version()?;
        for name in ["blobs", "wire", "indexes", "incoming", "unsupported"] {
            let path = root.join(name);
            fs::create_dir_all(&path).map_err(|error| io_error(&path, error))?;
        }
        let incoming = root.join("incoming");
        store.tidy_incoming().map_err(|error| io_error(&incoming, error))?;
        let unsupported = root.join("unsupported");
        store.tidy_unsupported().map_err(|error| io_error(&unsupported, error))?;
        Ok(store)
    }

    /// The root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The blobs of all known layers.
    pub fn layers(&self) -> io::Result<Vec<Digest>> {
        list(&self.root)
    }

    /// The index of a known layer; `None` where it is not known or its files cannot be used, which is logged. Reads all of it:
    /// nodes refuse a damaged section, so a layer with one must not count as known.
    pub fn index(&self, blob: Digest) -> Option<StoredIndex> {
        let directory = self.index_path(blob);
        let checked = read_index(&directory, blob).and_then(|stored| {
            check_sections(&directory, &stored.header)?;
            Ok(stored)
        });
        match checked {
            Ok(stored) => Some(stored),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !directory.exists() => None,
            Err(error) => {
                tracing::error!(%blob, %error, "a stored index cannot be used; the layer is ingested again when asked for");
                None
            }
        }
    }

    /// Replaces the signature of a known layer.
    pub fn write_signed(&self, blob: Digest, signed: &Signed) -> io::Result<()> {
        write_signed(&self.index_path(blob), signed)
    }

    /// The file of a section.
    pub fn section_path(&self, blob: Digest, section: Section) -> PathBuf {
        self.index_path(blob).join(section.name())
    }

    /// The file of a blob.
    pub fn blob_path(&self, blob: Digest) -> PathBuf {
        self.root.join("blobs").join(blob.hex())
    }

    /// The wire forms of a known layer.
    pub fn frames(&self, blob: Digest) -> io::Result<Frames> {
        Frames::open(&self.wire_path(blob))
    }

    /// Where an ingest of `blob` works.
    pub fn begin(&self, blob: Digest) -> io::Result<IncomingBlob> {
        let directory = self.root.join("incoming").join(blob.hex());
        fs::create_dir_all(&directory)?;
        Ok(IncomingBlob { blob, directory })
    }

    /// Makes the layer known: everything of `incoming` is synced and moved into place, the index last. `has_blob` says
    /// that the blob stands in its place already.
    pub fn publish(
        &self,
        incoming: &IncomingBlob,
        has_blob: bool,
        frames: &Frames,
        index: &Index,
        signed: &Signed,
    ) -> io::Result<()> {
        let blob = incoming.blob;
        let directory = incoming.directory.join("index");
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => fs::create_dir(&directory)?,
        }
        let mut written = vec![write(&directory.join("header"), &index.header.encode())?];
        for section in Section::ALL {
            written.push(write(&directory.join(section.name()), index.section(section))?);
        }
        written.push(write(&directory.join("signature"), &signed.encode())?);
        written.push(File::open(&directory)?);
        let path = incoming.blob_path();
        if !has_blob {
            written.push(File::open(&path)?);
        }
        let mut dirty: Vec<_> = written.iter().map(Dirty::File).collect();
        dirty.push(Dirty::Frames(frames));
        at_once(&dirty, |dirty| match dirty {
            Dirty::File(file) => file.sync_all(),
            Dirty::Frames(frames) => frames.save(),
        })?;
        if !has_blob {
            fs::rename(&path, self.blob_path(blob))?;
        }
        let wire = self.wire_path(blob);
        remove_directory(&wire)?;
        frames.rename(&wire)?;
        at_once(&["blobs", "wire"], |name| sync_directory(&self.root.join(name)))?;
        let place = self.index_path(blob);
        remove_directory(&place)?;
        fs::rename(&directory, &place)?;
        sync_directory(&self.root.join("indexes"))?;
        incoming.remove()
    }

    /// Every blob of which something takes disk: the bytes, and when it was used last.
    pub fn found(&self) -> io::Result<Vec<(Digest, u64, SystemTime)>> {
        let mut blobs = BTreeSet::new();
        for name in ["blobs", "wire", "indexes", "incoming"] {
            for entry in fs::read_dir(self.root.join(name))? {
                blobs.extend(entry?.file_name().to_str().and_then(|name| Digest::from_hex(name).ok()));
            }
        }
        let used = |blob: Digest| {
            let noted = fs::metadata(self.index_path(blob)).and_then(|metadata| metadata.modified());
            noted.unwrap_or(SystemTime::UNIX_EPOCH)
        };
        Ok(blobs.into_iter().map(|blob| (blob, self.disk_bytes(blob), used(blob))).collect())
    }

    /// Bytes that the files of `blob` take on the disk.
    pub fn disk_bytes(&self, blob: Digest) -> u64 {
        let incoming = self.root.join("incoming").join(blob.hex());
        [self.blob_path(blob), self.wire_path(blob), self.index_path(blob), incoming]
            .iter()
            .map(|path| allocated(path, 3))
            .sum()
    }

    /// Notes on disk that the layer is used now.
    pub fn note_use(&self, blob: Digest) -> io::Result<()> {
        File::open(self.index_path(blob))?.set_modified(SystemTime::now())
    }

    /// Removes what an ingest left that broke off; gives whether there was something.
    pub fn drop_incoming(&self, blob: Digest) -> io::Result<bool> {
        let path = self.root.join("incoming").join(blob.hex());
        let is_there = path.exists();
        remove_directory(&path)?;
        Ok(is_there)
    }

    /// Removes the wire forms of a layer that nobody has open.
    pub fn drop_wire(&self, blob: Digest) -> io::Result<()> {
        remove_directory(&self.wire_path(blob))
    }

    /// Remembers why a layer cannot be lazy.
    pub fn note_unsupported(&self, blob: Digest, reason: &str) -> io::Result<()> {
        let reason: String = reason.chars().take(UNSUPPORTED_CHARS_MAX).collect();
        fs::write(self.unsupported_path(blob), format!("{}\n{reason}\n", env!("CARGO_PKG_VERSION")))
    }

    /// Why a layer cannot be lazy, if this version of the program found so.
    pub fn unsupported(&self, blob: Digest) -> Option<String> {
        let bytes = read_small(&self.unsupported_path(blob), 4 * UNSUPPORTED_CHARS_MAX as u64 + 100).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        let (version, reason) = text.split_once('\n')?;
        (version == env!("CARGO_PKG_VERSION")).then(|| reason.trim_end().to_owned())
    }

    /// Forgets a layer whose files are not right, so that it is ingested again.
    pub fn forget(&self, blob: Digest) -> io::Result<()> {
        remove_directory(&self.index_path(blob))?;
        sync_directory(&self.root.join("indexes"))?;
        remove_directory(&self.wire_path(blob))?;
        match fs::remove_file(self.blob_path(blob)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn unsupported_path(&self, blob: Digest) -> PathBuf {
        self.root.join("unsupported").join(blob.hex())
    }

    /// Keeps the latest.
    fn tidy_unsupported(&self) -> io::Result<()> {
        let mut notes = Vec::new();
        for entry in fs::read_dir(self.root.join("unsupported"))? {
            let entry = entry?;
            notes.push((entry.metadata()?.modified()?, entry.path()));
        }
        notes.sort();
        let old = notes.len().saturating_sub(UNSUPPORTED_MAX);
        notes.into_iter().take(old).try_for_each(|(_, path)| fs::remove_file(path))
    }

    fn index_path(&self, blob: Digest) -> PathBuf {
        self.root.join("indexes").join(blob.hex())
    }

    fn wire_path(&self, blob: Digest) -> PathBuf {
        self.root.join("wire").join(blob.hex())
    }

    fn check_version(&self) -> Result<(), StoreError> {
        let path = self.root.join("version");
        let io_error = |source| StoreError::Io { path: path.clone(), source };
        let text = format!("drover-seeder {VERSION}\n");
        match fs::read_to_string(&path) {
            Ok(found) if found == text => Ok(()),
            Ok(found) => {
                let found = found.trim().chars().take(80).collect();
                Err(StoreError::Version { root: self.root.clone(), found })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Renamed into place whole: a version file that a crash cut off would lock the store for good.
                let version = write(&self.root.join("version.new"), text.as_bytes()).map_err(io_error)?;
                version.sync_all().map_err(io_error)?;
                fs::rename(self.root.join("version.new"), &path).map_err(io_error)?;
                sync_directory(&self.root).map_err(io_error)
            }
            Err(error) => Err(io_error(error)),
        }
    }

    fn tidy_incoming(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.root.join("incoming"))? {
            let path = entry?.path();
            let written = fs::metadata(path.join("blob")).and_then(|metadata| metadata.modified());
            let age = written.ok().and_then(|at| SystemTime::now().duration_since(at).ok());
            if age.is_some_and(|age| age < INCOMING_AGE_MAX) {
                remove_directory(&path.join("wire"))?;
                remove_directory(&path.join("index"))?;
            } else {
                remove_directory(&path)?;
            }
        }
        Ok(())
    }
}

/// The blobs of all known layers of the store at `root`, which may be in use by another process.
pub fn list(root: &Path) -> io::Result<Vec<Digest>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root.join("indexes"))? {
        found.extend(entry?.file_name().to_str().and_then(|name| Digest::from_hex(name).ok()));
    }
    found.sort_unstable();
    Ok(found)
}

/// The header of a known layer of the store at `root`, which may be in use by another process.
pub fn header(root: &Path, blob: Digest) -> io::Result<Header> {
    read_index(&root.join("indexes").join(blob.hex()), blob).map(|stored| stored.header)
}

/// The place of an ingest under way.
#[derive(Debug)]
pub struct IncomingBlob {
    blob: Digest,
    directory: PathBuf,
}

impl IncomingBlob {
    /// The file that the blob is written to; it may hold the beginning of the blob already.
    pub fn blob_path(&self) -> PathBuf {
        self.directory.join("blob")
    }

    /// New, empty wire forms.
    pub fn frames(&self) -> io::Result<Frames> {
        Frames::create(&self.directory.join("wire"))
    }

    /// Removes everything.
    pub fn remove(&self) -> io::Result<()> {
        remove_directory(&self.directory)
    }
}

/// Bytes that a file, or a directory and `depth` levels below it, takes on the disk.
fn allocated(path: &Path, depth: usize) -> u64 {
    let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
    let below = || -> u64 {
        let Ok(entries) = fs::read_dir(path) else { return 0 };
        entries.flatten().map(|entry| allocated(&entry.path(), depth - 1)).sum()
    };
    metadata.blocks() * 512 + if metadata.is_dir() && depth > 0 { below() } else { 0 }
}

/// Bytes that all files below `root` take on the disk, as `du` counts them.
pub fn disk_use(root: &Path) -> u64 {
    allocated(root, 4)
}

fn read_index(directory: &Path, blob: Digest) -> io::Result<StoredIndex> {
    let broken = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let header = read_small(&directory.join("header"), HEADER_LEN as u64)?;
    let header = Header::parse(&header).map_err(|error| broken(error.to_string()))?;
    if header.blob() != blob {
        return Err(broken(format!("it is the index of {}", header.blob())));
    }
    for section in Section::ALL {
        let size = fs::metadata(directory.join(section.name()))?.len();
        if size != header.section(section).size {
            return Err(broken(format!("the section {section} has {size} bytes")));
        }
    }
    let signed = Signed::parse(&read_small(&directory.join("signature"), SIGNED_BYTES_MAX)?);
    Ok(StoredIndex { header, signed: signed.ok_or_else(|| broken("its signature cannot be read".to_owned()))? })
}

fn check_sections(directory: &Path, header: &Header) -> io::Result<()> {
    for section in Section::ALL {
        let bytes = fs::read(directory.join(section.name()))?;
        check_section(header, section, &bytes)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
    }
    Ok(())
}

/// What is to be on the disk before the layer counts.
enum Dirty<'a> {
    File(&'a File),
    Frames(&'a Frames),
}

fn write_signed(directory: &Path, signed: &Signed) -> io::Result<()> {
    let new = directory.join("signature.new");
    write(&new, &signed.encode())?.sync_all()?;
    fs::rename(&new, directory.join("signature"))
}

fn read_small(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} is too large", path.display())));
    }
    Ok(bytes)
}

/// Writes a file that is to be synced.
fn write(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    Ok(file)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn remove_directory(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_at_a_time_and_no_newer_version() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        assert!(matches!(Store::open(directory.path()), Err(StoreError::InUse(_))));
        drop(store);
        fs::write(directory.path().join("version"), "drover-seeder 2\n").unwrap();
        let error = Store::open(directory.path()).unwrap_err();
        assert!(matches!(&error, StoreError::Version { found, .. } if found == "drover-seeder 2"), "{error}");
    }

    #[test]
    fn broken_off_ingests_are_kept_for_a_while() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let (fresh, empty) = (Digest::of(b"fresh"), Digest::of(b"empty"));
        let incoming = store.begin(fresh).unwrap();
        fs::write(incoming.blob_path(), b"begin").unwrap();
        drop(incoming.frames().unwrap());
        store.begin(empty).unwrap();
        drop(store);
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(fs::read(store.begin(fresh).unwrap().blob_path()).unwrap(), b"begin");
        assert!(!directory.path().join("incoming").join(fresh.hex()).join("wire").exists());
        assert!(!directory.path().join("incoming").join(empty.hex()).exists());
    }
}
