//! A disk in memory that loses, tears and flips what was not synced when it crashes.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::backend::{Backend, File};

/// The disk. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryDisk(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// What processes see: a file's number, or `None` for a directory.
    names: BTreeMap<PathBuf, Option<u64>>,
    /// What a crash leaves at least.
    durable_names: BTreeMap<PathBuf, Option<u64>>,
    /// The names after each change since they were durable.
    names_log: Vec<BTreeMap<PathBuf, Option<u64>>>,
    files: BTreeMap<u64, Content>,
    next: u64,
    /// Bytes that may still be written.
    room: Option<u64>,
    /// Syncs fail.
    broken: bool,
}

#[derive(Clone, Debug, Default)]
struct Content {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    log: Vec<Write>,
}

#[derive(Clone, Debug)]
enum Write {
    At(u64, Vec<u8>),
    Len(u64),
}

#[derive(Debug)]
struct MemoryFile {
    disk: MemoryDisk,
    number: u64,
}

impl MemoryDisk {
    /// Only `bytes` more can be written.
    pub(crate) fn set_room(&self, bytes: Option<u64>) {
        self.0.lock().room = bytes;
    }

    /// Lets syncs fail.
    pub(crate) fn set_broken(&self, broken: bool) {
        self.0.lock().broken = broken;
    }

    /// What is on the disk after a crash now: of each file's unsynced writes some are there, some are not, some are torn; what is torn
    /// may have a wrong bit.
    pub(crate) fn crash(&self, seed: u64) -> Self {
        let mut random = seed | 1;
        let mut random = move |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 11) % below.max(1)
        };
        let state = self.0.lock();
        let kept = random(state.names_log.len() as u64 + 1) as usize;
        let names = kept.checked_sub(1).map_or(&state.durable_names, |last| &state.names_log[last]).clone();
        let mut files = BTreeMap::new();
        for (number, content) in &state.files {
            let mut bytes = content.durable.clone();
            for write in &content.log {
                let mut write = write.clone();
                match (random(3), &mut write) {
                    (0, _) => continue,
                    (1, Write::At(_, written)) if !written.is_empty() => {
                        written.truncate(random(written.len() as u64) as usize);
                        if let Some(last) = written.last_mut() {
                            *last ^= 1 << random(8);
                        }
                    }
                    _ => {}
                }
                write.apply(&mut bytes);
            }
            files.insert(*number, Content { durable: bytes.clone(), bytes, log: Vec::new() });
        }
        let next = state.next;
        Self(Arc::new(Mutex::new(State { durable_names: names.clone(), names, files, next, ..State::default() })))
    }

    /// Flips a bit of a file at rest.
    pub(crate) fn flip(&self, path: &Path, bit: u64) {
        let mut state = self.0.lock();
        let Some(Some(number)) = state.names.get(path).copied() else { return };
        let content = state.files.get_mut(&number).unwrap();
        let len = content.bytes.len() as u64 * 8;
        if len > 0 {
            let bit = bit % len;
            content.bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
            content.durable = content.bytes.clone();
        }
    }
}

impl Write {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::At(offset, written) => {
                let end = *offset as usize + written.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[*offset as usize..end].copy_from_slice(written);
            }
            Self::Len(len) => bytes.resize(*len as usize, 0),
        }
    }
}

impl State {
    fn changed(&mut self) {
        self.names_log.push(self.names.clone());
    }
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Backend for MemoryDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn File>> {
        let mut state = self.0.lock();
        let number = match state.names.get(path) {
            Some(Some(number)) => *number,
            Some(None) => return Err(io::ErrorKind::IsADirectory.into()),
            None if create => {
                let number = state.next;
                state.next += 1;
                state.files.insert(number, Content::default());
                state.names.insert(path.to_owned(), Some(number));
                state.changed();
                number
            }
            None => return Err(not_found()),
        };
        Ok(Arc::new(MemoryFile { disk: self.clone(), number }))
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<OsString>> {
        let state = self.0.lock();
        let inside = state.names.keys().filter(|path| path.parent() == Some(directory));
        Ok(inside.filter_map(|path| Some(path.file_name()?.to_owned())).collect())
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        if state.names.insert(path.to_owned(), None).is_none() {
            state.changed();
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        if !state.names.contains_key(from) {
            return Err(not_found());
        }
        let moved: Vec<PathBuf> = state.names.keys().filter(|path| path.starts_with(from)).cloned().collect();
        for path in moved {
            let what = state.names.remove(&path).unwrap();
            let rest = path.strip_prefix(from).unwrap();
            let path = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            state.names.insert(path, what);
        }
        state.changed();
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.names.retain(|other, _| !other.starts_with(path));
        state.changed();
        Ok(())
    }

    fn sync_directory(&self, _path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.durable_names = state.names.clone();
        state.names_log.clear();
        Ok(())
    }

    fn lock(&self, _directory: &Path) -> io::Result<Box<dyn Debug + Send + Sync>> {
        Ok(Box::new(()))
    }
}

impl MemoryFile {
    fn write(&self, write: Write) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        if let (Some(room), Write::At(_, bytes)) = (&mut state.room, &write) {
            *room = room.checked_sub(bytes.len() as u64).ok_or(io::ErrorKind::StorageFull)?;
        }
        let content = state.files.get_mut(&self.number).unwrap();
        write.apply(&mut content.bytes);
        content.log.push(write);
        Ok(())
    }
}

impl File for MemoryFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.disk.0.lock();
        let bytes = &state.files[&self.number].bytes;
        let range = offset as usize..offset as usize + out.len();
        out.copy_from_slice(bytes.get(range).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write(Write::At(offset, bytes.to_vec()))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.write(Write::Len(len))
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().files[&self.number].bytes.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        if state.broken {
            return Err(io::Error::other("the disk is broken"));
        }
        let content = state.files.get_mut(&self.number).unwrap();
        content.durable = content.bytes.clone();
        content.log.clear();
        Ok(())
    }
}
