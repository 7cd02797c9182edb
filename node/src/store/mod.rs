//! Layers on disk.
//!
//! ```text
//! <root>/lock                       held by the process that uses the store
//! <root>/running                    boot id of a process that did not end cleanly (yet), else "ended"
//! <root>/numbers                    the first layer number that was never given out
//! <root>/layers/<diffID hex>/       one layer
//!     identity                      number and index digest
//!     header, signature             the index header, and who vouches for it
//!     entries, chunk_digests, spans sections of the index; spans may be missing
//!     device                        the chunks that are here, sparse
//!     wire                          wire forms of some of them, sparse
//!     have                          which those are
//!     quarantined                   why nothing of the layer can be believed, if so
//!     failing                       which chunk fails again and again, if one does
//!     pinned                        who reads the device from disk, so that all of it must stay
//! <root>/refused/<index hex>        why an index is not believed any more
//! <root>/incoming/<blob hex>-<n>/   a device whose index is not known yet; nothing in it outlives the process
//! ```
//!
//! What a crash may do: forget chunks, forget whole layers that were just made. It never invents a chunk: a bit of
//! `have` is written only after the chunk's bytes were synced, and bits that an unclean end left are checked against the chunk
//! digests before the first use.

mod backend;
mod disk;
mod have;
mod incoming;
mod layer;
#[cfg(test)]
pub(crate) mod memory;
mod room;
#[cfg(test)]
pub(crate) mod tests;
mod wire;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::layer::Digest;
use ::layer::index::{Header, IndexError};
use parking_lot::Mutex;

use crate::config::CacheConfig;

pub(crate) use self::layer::{Added, Change, Held, LayerStore, Proof, Unit, Unstored};
pub(crate) use self::room::Room;
pub(crate) use backend::at_once;
pub use backend::{Backend, File, Space};
pub use disk::Disk;
pub(crate) use incoming::IncomingStore;

use backend::{read_file, replace_file};

/// Most indexes that are remembered as wrong; more are not believed until the layers that they are of are removed.
const REFUSED_MAX: usize = 1024;

/// Most bytes of a small file of the store.
const SMALL_FILE_MAX: u64 = 4096;

/// What `running` says after a clean end, and its length.
const ENDED: &str = "ended";
const MARKER_LEN: usize = 64;

/// How many layer numbers are reserved with one write.
const NUMBERS_BATCH: u64 = 256;

/// An index with its signature, as it is stored. The sections are encoded as the header names them.
#[derive(Clone)]
pub struct LayerParts {
    /// Names the layer and its sections.
    pub header: Header,
    /// The signature of `layer::index::statement`; checked by whoever got it, stored to be passed on.
    pub signature: Vec<u8>,
    /// Bytes of the entries section.
    pub entries: Vec<u8>,
    /// Bytes of the chunk digests section.
    pub chunk_digests: Vec<u8>,
    /// Bytes of the spans section, where they are known already.
    pub spans: Option<Vec<u8>>,
}

impl fmt::Debug for LayerParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerParts").field("header", &self.header).finish_non_exhaustive()
    }
}

/// Why the store, or a layer of it, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk failed.
    #[error("cannot {action} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The disk is full.
    #[error("cannot {action} {path}: {source}; free space on that file system or let Drover keep more of it free (cache.keep_free)", path = .path.display())]
    Full {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file has other bytes than were written.
    #[error("{path} is damaged: {reason}", path = .path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How it shows.
        reason: String,
    },
    /// A newer Drover wrote it.
    #[error("{path} has format version {version}, which is newer than this program; use a newer one or remove the directory", path = .path.display())]
    Newer {
        /// Which.
        path: PathBuf,
        /// Its version.
        version: u16,
    },
    /// The index that is to be stored is not one.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The index that is to be stored was found to be wrong.
    #[error("the index {index} is not believed any more: {reason}")]
    Refused {
        /// Its digest.
        index: Digest,
        /// Why.
        reason: String,
    },
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| match backend::is_full(&source) {
            true => Self::Full { action, path, source },
            false => Self::Io { action, path, source },
        }
    }
}

/// A layer directory that could not be opened. It stays as it is until the layer is inserted again.
#[derive(Debug)]
pub struct BrokenLayer {
    /// Name of the directory: the diffID's hex digits, unless somebody put something else there.
    pub name: String,
    /// Why.
    pub error: StoreError,
}

/// What was found when a store was opened.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) layers: Vec<LayerStore>,
    pub(crate) broken: Vec<BrokenLayer>,
    /// The machine ended uncleanly while the store was in use.
    pub(crate) after_crash: bool,
}

/// A layer that is written but has not its name yet.
#[derive(Debug)]
pub(crate) struct Prepared {
    layer: LayerStore,
    pub(crate) directory: PathBuf,
}

/// What all layers of a store share.
#[derive(Debug)]
pub(crate) struct Site {
    backend: Arc<dyn Backend>,
    room: Arc<Room>,
    boot_id: String,
}

/// A directory of layers. At most one process has it open.
#[derive(Debug)]
pub(crate) struct Store {
    site: Arc<Site>,
    root: PathBuf,
    numbers: Mutex<Numbers>,
    _lock: Box<dyn fmt::Debug + Send + Sync>,
}

/// The next number to give out, and the first that is not reserved on disk.
#[derive(Debug)]
struct Numbers {
    next: u64,
    reserved: u64,
}

impl Store {
    /// Its directory.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Opens or makes the store at `root`, whose parent must exist. `boot_id` differs after each start of the machine: the page cache
    /// survives a killed process but no crashed kernel.
    pub(crate) fn open(
        backend: Arc<dyn Backend>,
        root: &Path,
        boot_id: &str,
        cache: &CacheConfig,
    ) -> Result<(Self, Found), StoreError> {
        let layers = root.join("layers");
        let incoming = root.join("incoming");
        for directory in [root, &layers, &incoming] {
            backend.create_directory(directory).map_err(StoreError::io("create", directory))?;
        }
        let lock = backend.lock(root).map_err(StoreError::io("lock", root))?;
        for name in backend.list(&incoming).map_err(StoreError::io("list", &incoming))? {
            let path = incoming.join(name);
            backend.remove(&path).map_err(StoreError::io("remove", &path))?;
        }
        let room = Room::open(backend.clone(), root, cache)?;
        let site = Arc::new(Site { backend: backend.clone(), room, boot_id: boot_id.to_owned() });
        let running = root.join("running");
        let left_by = match read_file(&*backend, &running, SMALL_FILE_MAX) {
            Ok(bytes) => Some(String::from_utf8_lossy(&bytes).trim_end().to_owned()).filter(|left_by| left_by != ENDED),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(_) => Some(String::new()),
        };
        let mut found = Found { after_crash: left_by.is_some_and(|left_by| left_by != boot_id), ..Found::default() };

        let mut numbers = BTreeMap::new();
        for name in backend.list(&layers).map_err(StoreError::io("list", &layers))? {
            let name = name.to_string_lossy().into_owned();
            let path = layers.join(&name);
            if name.starts_with('.') {
                backend.remove(&path).map_err(StoreError::io("remove", &path))?;
                continue;
            }
            match LayerStore::open(site.clone(), &path, found.after_crash) {
                Ok(layer) if numbers.contains_key(&layer.number()) => {
                    let reason = format!("it has the number {} of another layer", layer.number());
                    found.broken.push(BrokenLayer { name, error: StoreError::Damaged { path, reason } });
                }
                Ok(layer) => {
                    numbers.insert(layer.number(), layer.header().diff_id());
                    found.layers.push(layer);
                }
                Err(error) => found.broken.push(BrokenLayer { name, error }),
            }
        }
        // Layers that were distrusted now say so themselves, so the marker may name this boot.
        write_marker(&*backend, root, boot_id).map_err(StoreError::io("write", &running))?;

        let next = numbers.keys().next_back().map_or(1, |last| last + 1).max(read_numbers(&*backend, root));
        let store =
            Self { site, root: root.to_owned(), numbers: Mutex::new(Numbers { next, reserved: 0 }), _lock: lock };
        Ok((store, found))
    }

    /// How much the devices may take, and take.
    pub(crate) fn room(&self) -> &Arc<Room> {
        &self.site.room
    }

    /// Writes a layer of which no chunk is here; [`Store::place`] makes it count.
    pub(crate) fn prepare(&self, parts: &LayerParts) -> Result<Prepared, StoreError> {
        let number = self.number()?;
        let directory = self.root.join("layers").join(format!(".new-{number}"));
        let made = self
            .site
            .backend
            .create_directory(&directory)
            .map_err(StoreError::io("create", &directory))
            .and_then(|()| LayerStore::create(self.site.clone(), &directory, parts, number, None));
        match made {
            Ok(layer) => Ok(Prepared { layer, directory }),
            Err(error) => {
                // What cannot be removed now is removed when the store is opened next.
                let _ = self.site.backend.remove(&directory);
                Err(error)
            }
        }
    }

    /// Gives a prepared layer its name. A broken directory of that name is replaced.
    pub(crate) fn place(&self, prepared: Prepared) -> Result<LayerStore, StoreError> {
        let Prepared { mut layer, directory } = prepared;
        let layers = self.root.join("layers");
        let place = layers.join(layer.header().diff_id().hex());
        self.site.backend.remove(&place).map_err(StoreError::io("remove", &place))?;
        self.site.backend.rename(&directory, &place).map_err(StoreError::io("rename", &directory))?;
        self.site.backend.sync_directory(&layers).map_err(StoreError::io("sync", &layers))?;
        layer.moved_to(&place);
        Ok(layer)
    }

    /// Throws a prepared layer away, or what came in.
    pub(crate) fn discard(&self, directory: &Path) {
        // What cannot be removed now is removed when the store is opened next.
        let _ = self.site.backend.remove(directory);
    }

    /// Makes room for a device whose index is not known yet. Dropping it removes it.
    pub(crate) fn incoming(&self, blob: &Digest, chunk_log2: u8) -> Result<IncomingStore, StoreError> {
        let name = format!("{}-{}", blob.hex(), self.number()?);
        let directory = self.root.join("incoming").join(name);
        self.site.backend.create_directory(&directory).map_err(StoreError::io("create", &directory))?;
        IncomingStore::create(self.site.clone(), &directory, chunk_log2)
    }

    /// Turns what came in into a layer, still in its place; what does not fit the index is left out.
    pub(crate) fn prepare_incoming(
        &self,
        incoming: &IncomingStore,
        parts: &LayerParts,
    ) -> Result<Prepared, StoreError> {
        let directory = incoming.directory().to_owned();
        let layer = LayerStore::create(self.site.clone(), &directory, parts, self.number()?, Some(incoming))?;
        Ok(Prepared { layer, directory })
    }

    /// Removes a layer; open files stay readable.
    pub(crate) fn remove(&self, layer: &LayerStore) -> Result<(), StoreError> {
        layer.leave();
        let layers = self.root.join("layers");
        let trash = layers.join(format!(".removed-{}", layer.number()));
        let directory = self.layer_path(&layer.header().diff_id());
        self.site.backend.rename(&directory, &trash).map_err(StoreError::io("rename", &directory))?;
        self.site.backend.sync_directory(&layers).map_err(StoreError::io("sync", &layers))?;
        self.site.backend.remove(&trash).map_err(StoreError::io("remove", &trash))
    }

    /// Notes that the index is wrong, beyond the layer's life; `false`: there are too many such notes.
    pub(crate) fn refuse(&self, index: &Digest, reason: &str) -> Result<bool, StoreError> {
        let (backend, directory) = (&*self.site.backend, self.root.join("refused"));
        let refuse = || -> io::Result<bool> {
            backend.create_directory(&directory)?;
            backend.sync_directory(&self.root)?;
            if backend.list(&directory)?.len() >= REFUSED_MAX {
                return Ok(false);
            }
            replace_file(backend, &directory, &index.hex(), reason.as_bytes()).map(|()| true)
        };
        refuse().map_err(StoreError::io("write", &directory.join(index.hex())))
    }

    /// Why the index is not believed, if so. A note that cannot be read counts as one.
    pub(crate) fn refused(&self, index: &Digest) -> Option<String> {
        match read_file(&*self.site.backend, &self.root.join("refused").join(index.hex()), SMALL_FILE_MAX) {
            Ok(reason) => Some(String::from_utf8_lossy(&reason).into_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(error.to_string()),
        }
    }

    /// The store ends cleanly. Every layer must have been closed before.
    pub(crate) fn close(&self) -> Result<(), StoreError> {
        write_marker(&*self.site.backend, &self.root, ENDED)
            .map_err(StoreError::io("write", &self.root.join("running")))
    }

    fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.root.join("layers").join(diff_id.hex())
    }

    /// A number that no layer of this store ever had. Reserved on disk before it is used.
    fn number(&self) -> Result<u64, StoreError> {
        let mut numbers = self.numbers.lock();
        if numbers.next >= numbers.reserved {
            let reserved = numbers.next + NUMBERS_BATCH;
            replace_file(&*self.site.backend, &self.root, "numbers", format!("{reserved}\n").as_bytes())
                .map_err(StoreError::io("write", &self.root.join("numbers")))?;
            numbers.reserved = reserved;
        }
        let number = numbers.next;
        numbers.next += 1;
        Ok(number)
    }
}

/// Says in the file `running` who uses the store. Written in place, in one sector: that needs no room on a full disk.
fn write_marker(backend: &dyn Backend, root: &Path, text: &str) -> io::Result<()> {
    let path = root.join("running");
    let is_new = backend.open(&path, false).is_err();
    let file = backend.open(&path, true)?;
    file.write_at(format!("{text:<MARKER_LEN$}").as_bytes(), 0)?;
    file.sync()?;
    if is_new { backend.sync_directory(root) } else { Ok(()) }
}

/// The first number that was never given out; 0 where the file is missing or damaged (then the layers that are there
/// decide).
fn read_numbers(backend: &dyn Backend, root: &Path) -> u64 {
    let Ok(bytes) = read_file(backend, &root.join("numbers"), SMALL_FILE_MAX) else { return 0 };
    std::str::from_utf8(&bytes).ok().and_then(|text| text.trim_end().parse().ok()).unwrap_or(0)
}
