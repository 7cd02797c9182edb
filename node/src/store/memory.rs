//! A disk in memory that loses, tears and flips what was not synced when it crashes.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::backend::{Backend, File, Space};

/// The disk is given out in blocks of this size.
const BLOCK: u64 = 4096;

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
    /// Bytes of blocks that can still be given out.
    room: Option<u64>,
    /// Operations that need a new block before all of them fail.
    operations: Option<u64>,
    /// Syncs fail.
    broken: bool,
    /// Reading damages what is read.
    worn: bool,
    /// Changes and syncs before the power is cut.
    power: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct Content {
    now: Image,
    durable: Image,
    log: Vec<Write>,
}

/// Bytes of a file, and which of its blocks are no holes.
#[derive(Clone, Debug, Default)]
struct Image {
    bytes: Vec<u8>,
    blocks: BTreeSet<u64>,
}

#[derive(Clone, Debug)]
enum Write {
    At(u64, Vec<u8>),
    Len(u64),
    Punch(Range<u64>),
}

#[derive(Debug)]
struct MemoryFile {
    disk: MemoryDisk,
    number: u64,
}

impl MemoryDisk {
    /// Only `bytes` more can be written to holes; new holes add to them.
    pub(crate) fn set_room(&self, bytes: Option<u64>) {
        self.0.lock().room = bytes;
    }

    /// After so many more operations that may need a new block, whatever they are, the disk is full.
    pub(crate) fn set_operations(&self, operations: Option<u64>) {
        self.0.lock().operations = operations;
    }

    /// Whether the operations of [`MemoryDisk::set_operations`] are used up.
    pub(crate) fn is_out_of_operations(&self) -> bool {
        self.0.lock().operations == Some(0)
    }

    /// Bytes that the files below `directory` take.
    pub(crate) fn allocated_below(&self, directory: &Path, name: &str) -> u64 {
        let state = self.0.lock();
        let files = state.names.iter().filter(|(path, _)| path.starts_with(directory) && path.ends_with(name));
        files.filter_map(|(_, number)| Some(state.files[&(*number)?].now.blocks.len() as u64 * BLOCK)).sum()
    }

    /// Damages what is read.
    pub(crate) fn set_worn(&self, worn: bool) {
        self.0.lock().worn = worn;
    }

    /// Lets syncs fail.
    pub(crate) fn set_broken(&self, broken: bool) {
        self.0.lock().broken = broken;
    }

    /// After so many more changes and syncs the power is cut: nothing more changes, and whoever tries is told so.
    pub(crate) fn set_power(&self, changes: Option<u64>) {
        self.0.lock().power = changes;
    }

    /// Whether the power is cut.
    pub(crate) fn is_dark(&self) -> bool {
        self.0.lock().power == Some(0)
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
            let mut image = content.durable.clone();
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
                write.apply(&mut image);
            }
            files.insert(*number, Content { durable: image.clone(), now: image, log: Vec::new() });
        }
        let next = state.next;
        Self(Arc::new(Mutex::new(State { durable_names: names.clone(), names, files, next, ..State::default() })))
    }

    /// Flips a bit of a file at rest.
    pub(crate) fn flip(&self, path: &Path, bit: u64) {
        let mut state = self.0.lock();
        let Some(Some(number)) = state.names.get(path).copied() else { return };
        let content = state.files.get_mut(&number).unwrap();
        let len = content.now.bytes.len() as u64 * 8;
        if len > 0 {
            let bit = bit % len;
            content.now.bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
            content.durable = content.now.clone();
        }
    }
}

impl Write {
    fn apply(&self, image: &mut Image) {
        let Image { bytes, blocks } = image;
        match self {
            Self::At(offset, written) => {
                let end = *offset as usize + written.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[*offset as usize..end].copy_from_slice(written);
                blocks.extend(self.blocks());
            }
            Self::Len(len) => {
                bytes.resize(*len as usize, 0);
                blocks.retain(|block| block * BLOCK < *len);
            }
            Self::Punch(range) => {
                let end = range.end.min(bytes.len() as u64);
                bytes[range.start.min(end) as usize..end as usize].fill(0);
                blocks.retain(|block| block * BLOCK < range.start || (block + 1) * BLOCK > range.end);
            }
        }
    }

    /// The blocks that it writes to.
    fn blocks(&self) -> Range<u64> {
        match self {
            Self::At(offset, written) => *offset / BLOCK..(*offset + written.len() as u64).div_ceil(BLOCK),
            Self::Len(_) | Self::Punch(_) => 0..0,
        }
    }
}

impl State {
    fn changed(&mut self) {
        self.names_log.push(self.names.clone());
    }

    /// Before every change and sync.
    fn draw(&mut self) -> io::Result<()> {
        if let Some(power) = &mut self.power {
            *power = power.checked_sub(1).ok_or_else(|| io::Error::other("the power is cut"))?;
        }
        Ok(())
    }

    /// Before anything that may need a new block.
    fn operate(&mut self) -> io::Result<()> {
        if let Some(operations) = &mut self.operations {
            *operations = operations.checked_sub(1).ok_or(io::ErrorKind::StorageFull)?;
        }
        Ok(())
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
                state.draw()?;
                state.operate()?;
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
        if !state.names.contains_key(path) {
            state.draw()?;
            state.operate()?;
        }
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
        state.draw()?;
        state.operate()?;
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
        state.draw()?;
        state.names.retain(|other, _| !other.starts_with(path));
        state.changed();
        Ok(())
    }

    fn sync_directory(&self, _path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.draw()?;
        state.durable_names = state.names.clone();
        state.names_log.clear();
        Ok(())
    }

    fn space(&self, _path: &Path) -> io::Result<Space> {
        let total = 1 << 50;
        Ok(Space { total, free: self.0.lock().room.unwrap_or(total) })
    }

    fn lock(&self, _directory: &Path) -> io::Result<Box<dyn Debug + Send + Sync>> {
        Ok(Box::new(()))
    }
}

impl MemoryFile {
    fn write(&self, write: Write) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.draw()?;
        let now = &state.files[&self.number].now;
        let new = write.blocks().filter(|block| !now.blocks.contains(block)).count() as u64 * BLOCK;
        if new > 0 || matches!(write, Write::Len(len) if len != now.bytes.len() as u64) {
            state.operate()?;
        }
        let State { files, room, .. } = &mut *state;
        let content = files.get_mut(&self.number).unwrap();
        if let Some(room) = room {
            *room = room.checked_sub(new).ok_or(io::ErrorKind::StorageFull)?;
            let before = content.now.blocks.len();
            write.apply(&mut content.now);
            *room += before.saturating_sub(content.now.blocks.len()) as u64 * BLOCK;
        } else {
            write.apply(&mut content.now);
        }
        content.log.push(write);
        Ok(())
    }
}

impl File for MemoryFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let is_worn = state.worn;
        let bytes = &mut state.files.get_mut(&self.number).unwrap().now.bytes;
        let range = offset as usize..offset as usize + out.len();
        let bytes = bytes.get_mut(range).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        if is_worn && let Some(first) = bytes.first_mut() {
            *first ^= 1;
        }
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write(Write::At(offset, bytes.to_vec()))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.write(Write::Len(len))
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().files[&self.number].now.bytes.len() as u64)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().files[&self.number].now.blocks.len() as u64 * BLOCK)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.write(Write::Punch(range))
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.draw()?;
        if state.broken {
            return Err(io::Error::other("the disk is broken"));
        }
        let content = &state.files[&self.number];
        if content.now.blocks != content.durable.blocks {
            state.operate()?;
        }
        let content = state.files.get_mut(&self.number).unwrap();
        content.durable = content.now.clone();
        content.log.clear();
        Ok(())
    }
}
