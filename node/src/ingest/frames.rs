//! The wire forms of one layer's chunks on disk: a file of frames, in whatever order they came, and a table of where
//! each is.
//!
//! They are soft: whatever is lost is made again from the blob. So frames are written without sync, and the table is
//! saved now and then, after the frames that it names ([`Frames::save`]). Each entry has a check over its frame, so that
//! a frame which the disk lost or changed is noticed and made again, instead of being sent and blamed on this machine.
//!
//! The table's file is `DRWIRE01`, then for each chunk 16 bytes, little-endian: offset of the frame (u64), its length with
//! the prefix (u32; 0: not there), first four bytes of its BLAKE3 (u32).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use layer::ChunkIndex;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

const MAGIC: &[u8; 8] = b"DRWIRE01";
const ENTRY_LEN: usize = 16;
/// The largest table that is read: a device of 2 TiB in chunks of 128 KiB has 2^24 chunks.
const TABLE_BYTES_MAX: u64 = (1 << 24) * ENTRY_LEN as u64 + 8;
/// Unsaved frames after which the table is due.
const SAVE_AFTER_BYTES: u64 = 64 << 20;

/// The frames of one layer. Shared by who makes them and who serves them.
#[derive(Debug)]
pub struct Frames {
    directory: RwLock<PathBuf>,
    file: File,
    table: RwLock<Vec<Entry>>,
    end: Mutex<u64>,
    unsaved: Mutex<u64>,
    front: watch::Sender<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Entry {
    offset: u64,
    len: u32,
    check: u32,
}

impl Frames {
    /// Starts anew in `directory`, which is emptied.
    pub fn create(directory: &Path) -> io::Result<Self> {
        match fs::remove_dir_all(directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => fs::create_dir_all(directory)?,
        }
        Self::with_table(directory, Vec::new())
    }

    /// Opens what [`Frames::save`] left in `directory`; without it, or with a table that cannot be read, starts anew.
    pub fn open(directory: &Path) -> io::Result<Self> {
        match read_table(&directory.join("offsets")) {
            Some(table) => Self::with_table(directory, table),
            None => Self::create(directory),
        }
    }

    fn with_table(directory: &Path, table: Vec<Entry>) -> io::Result<Self> {
        let path = directory.join("frames");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let end = file.metadata()?.len();
        let front = contiguous(&table, 0);
        Ok(Self {
            directory: RwLock::new(directory.to_owned()),
            file,
            table: RwLock::new(table),
            end: Mutex::new(end),
            unsaved: Mutex::new(0),
            front: watch::Sender::new(front),
        })
    }

    /// Keeps `frame`, with its prefix, as that of `chunk`.
    pub fn append(&self, chunk: ChunkIndex, frame: &[u8]) -> io::Result<()> {
        let offset = {
            let mut end = self.end.lock();
            let offset = *end;
            *end += frame.len() as u64;
            offset
        };
        self.file.write_all_at(frame, offset)?;
        let entry = Entry { offset, len: frame.len() as u32, check: check(frame) };
        {
            let mut table = self.table.write();
            let at = chunk.0 as usize;
            if table.len() <= at {
                table.resize(at + 1, Entry::default());
            }
            if let Some(slot) = table.get_mut(at) {
                *slot = entry;
            }
        }
        *self.unsaved.lock() += frame.len() as u64;
        self.front.send_if_modified(|front| {
            let reached = contiguous(&self.table.read(), *front);
            std::mem::replace(front, reached) != reached
        });
        Ok(())
    }

    /// Whether the frame of `chunk` is there.
    pub fn has(&self, chunk: ChunkIndex) -> bool {
        self.table.read().get(chunk.0 as usize).is_some_and(|entry| entry.len > 0)
    }

    /// Bytes of the frames of `run`; `None` where one is missing.
    pub fn wire_len(&self, run: Range<u32>) -> Option<u64> {
        let table = self.table.read();
        let entries = table.get(run.start as usize..run.end as usize)?;
        entries.iter().all(|entry| entry.len > 0).then(|| entries.iter().map(|entry| u64::from(entry.len)).sum())
    }

    /// Appends frames of `run` to `out`, from its first chunk until one is missing or `max` bytes are reached. Gives the
    /// first chunk that was not read. Blocks on the disk.
    pub fn read(&self, run: Range<u32>, max: usize, out: &mut Vec<u8>) -> io::Result<u32> {
        let mut next = run.start;
        while next < run.end && (out.len() < max || next == run.start) {
            let entry = self.table.read().get(next as usize).copied().unwrap_or_default();
            if entry.len == 0 {
                break;
            }
            let start = out.len();
            out.resize(start + entry.len as usize, 0);
            let frame = out.get_mut(start..).unwrap_or_default();
            let is_whole = match self.file.read_exact_at(frame, entry.offset) {
                Ok(()) => check(frame) == entry.check,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
                Err(error) => return Err(error),
            };
            if !is_whole {
                tracing::warn!(directory = %self.directory.read().display(), chunk = next,
                    "a stored frame is not what was written; it is made again");
                out.truncate(start);
                self.forget(next, entry);
                break;
            }
            next += 1;
        }
        Ok(next)
    }

    /// How many chunks from 0 on are there without gap. Only ever grows while a layer is ingested.
    pub fn front(&self) -> watch::Receiver<u32> {
        self.front.subscribe()
    }

    /// Writes the table so that a restart finds the frames. Blocks on the disk.
    pub fn save(&self) -> io::Result<()> {
        let unsaved = std::mem::take(&mut *self.unsaved.lock());
        // Entries are taken before the sync: each is of a frame whose write had returned.
        let bytes = encode_table(&self.table.read());
        let saved = self.file.sync_data().and_then(|()| {
            let directory = self.directory.read();
            let (path, new) = (directory.join("offsets"), directory.join("offsets.new"));
            let mut file = File::create(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        });
        if saved.is_err() {
            *self.unsaved.lock() += unsaved;
        }
        saved
    }

    /// Whether enough was appended that [`Frames::save`] is due.
    pub fn save_is_due(&self) -> bool {
        *self.unsaved.lock() >= SAVE_AFTER_BYTES
    }

    /// Whether anything was appended since the last [`Frames::save`].
    pub fn is_unsaved(&self) -> bool {
        *self.unsaved.lock() > 0
    }

    /// Moves the directory.
    pub fn rename(&self, to: &Path) -> io::Result<()> {
        let mut directory = self.directory.write();
        fs::rename(&*directory, to)?;
        *directory = to.to_owned();
        Ok(())
    }

    fn forget(&self, chunk: u32, entry: Entry) {
        let mut table = self.table.write();
        if let Some(slot) = table.get_mut(chunk as usize)
            && *slot == entry
        {
            *slot = Entry::default();
        }
    }
}

fn contiguous(table: &[Entry], from: u32) -> u32 {
    let rest = table.get(from as usize..).unwrap_or_default();
    from + rest.iter().take_while(|entry| entry.len > 0).count() as u32
}

fn check(frame: &[u8]) -> u32 {
    let [a, b, c, d, ..] = *blake3::hash(frame).as_bytes();
    u32::from_le_bytes([a, b, c, d])
}

fn encode_table(table: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MAGIC.len() + table.len() * ENTRY_LEN);
    bytes.extend_from_slice(MAGIC);
    for entry in table {
        bytes.extend_from_slice(&entry.offset.to_le_bytes());
        bytes.extend_from_slice(&entry.len.to_le_bytes());
        bytes.extend_from_slice(&entry.check.to_le_bytes());
    }
    bytes
}

fn read_table(path: &Path) -> Option<Vec<Entry>> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(TABLE_BYTES_MAX + 1).read_to_end(&mut bytes).ok()?;
    if bytes.len() as u64 > TABLE_BYTES_MAX {
        return None;
    }
    let (entries, rest) = bytes.strip_prefix(MAGIC)?.as_chunks::<ENTRY_LEN>();
    let entry = |bytes: &[u8; ENTRY_LEN]| {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *bytes;
        Entry {
            offset: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            len: u32::from_le_bytes([i, j, k, l]),
            check: u32::from_le_bytes([m, n, o, p]),
        }
    };
    rest.is_empty().then(|| entries.iter().map(entry).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(frames: &Frames, run: Range<u32>) -> (Vec<u8>, u32) {
        let mut out = Vec::new();
        let next = frames.read(run, usize::MAX, &mut out).unwrap();
        (out, next)
    }

    #[test]
    fn frames_come_back_in_order_and_survive() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let frames = Frames::create(&path).unwrap();
        for chunk in [1u32, 0, 3] {
            frames.append(ChunkIndex(chunk), &[chunk as u8; 5]).unwrap();
        }
        assert_eq!(*frames.front().borrow(), 2);
        assert_eq!(read_all(&frames, 0..4), ([[0u8; 5], [1; 5]].concat(), 2));
        assert_eq!(frames.wire_len(0..2), Some(10));
        assert_eq!(frames.wire_len(0..3), None);
        assert_eq!(frames.wire_len(0..9), None);
        frames.save().unwrap();
        frames.append(ChunkIndex(2), &[2; 5]).unwrap();
        assert_eq!(*frames.front().borrow(), 4);
        drop(frames);

        let frames = Frames::open(&path).unwrap();
        assert!(frames.has(ChunkIndex(3)) && !frames.has(ChunkIndex(2)), "unsaved frames may be forgotten");
        frames.append(ChunkIndex(2), &[2; 5]).unwrap();
        assert_eq!(read_all(&frames, 0..4), ([[0u8; 5], [1; 5], [2; 5], [3; 5]].concat(), 4));
    }

    #[test]
    fn changed_and_lost_frames_are_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let frames = Frames::create(&path).unwrap();
        for chunk in 0..3 {
            frames.append(ChunkIndex(chunk), &[chunk as u8; 100]).unwrap();
        }
        frames.save().unwrap();
        drop(frames);
        let file = OpenOptions::new().write(true).open(path.join("frames")).unwrap();
        file.write_all_at(b"x", 150).unwrap();
        file.set_len(250).unwrap();
        let frames = Frames::open(&path).unwrap();
        assert_eq!(read_all(&frames, 0..3).1, 1);
        assert!(!frames.has(ChunkIndex(1)));
        assert_eq!(read_all(&frames, 2..3).1, 2);
        assert!(!frames.has(ChunkIndex(2)));
    }

    #[test]
    fn a_broken_table_starts_anew() {
        let directory = tempfile::tempdir().unwrap();
        for bytes in [&b"DRWIRE02"[..], b"DRWIRE01 odd", b""] {
            fs::write(directory.path().join("offsets"), bytes).unwrap();
            assert!(!Frames::open(directory.path()).unwrap().has(ChunkIndex(0)));
        }
    }
}
