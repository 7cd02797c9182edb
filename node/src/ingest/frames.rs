//! The wire forms of one layer's chunks on disk: a file of frames, in whatever order they came, and a table of where
//! each is.
//!
//! They are soft: whatever is lost is made again from the blob. So no frame waits for the disk, and the table is
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
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use layer::ChunkIndex;
use parking_lot::{Mutex, RwLock};
use rustix::fs::{FallocateFlags, fallocate};
use tokio::sync::watch;

const MAGIC: &[u8; 8] = b"DRWIRE01";
const ENTRY_LEN: usize = 16;
/// The largest table that is read: a device of 2 TiB in chunks of 128 KiB has 2^24 chunks.
const TABLE_BYTES_MAX: u64 = (1 << 24) * ENTRY_LEN as u64 + 8;
/// Unsaved frames after which the table is due.
const SAVE_AFTER_BYTES: u64 = 64 << 20;

/// log2 of the chunks whose frames are evicted together: about a span.
const UNIT_LOG2: u32 = 5;
/// File systems free whole blocks.
const BLOCK: u64 = 4096;

/// The frames of one layer. Shared by who makes them and who serves them.
#[derive(Debug)]
pub struct Frames {
    /// When the units were used, on the clock of [`ticks`].
    uses: Mutex<Vec<u32>>,
    /// Runs that are being served: who was told their length gets them.
    serving: Mutex<Vec<Range<u32>>>,
    directory: RwLock<PathBuf>,
    file: File,
    table: RwLock<Vec<Entry>>,
    end: Mutex<u64>,
    unsaved: Mutex<u64>,
    /// Held while the table is written: of two at once the later might write what it read before.
    saving: Mutex<()>,
    front: watch::Sender<u32>,
}

/// Frames that may be evicted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FramesUnit {
    /// When it was used last.
    pub(super) used: u32,
    /// Which.
    pub(super) number: u32,
}

/// Keeps the frames of a run from being evicted.
#[derive(Debug)]
pub(super) struct FramesUse {
    frames: Arc<Frames>,
    run: Range<u32>,
}

impl Drop for FramesUse {
    fn drop(&mut self) {
        let mut serving = self.frames.serving.lock();
        if let Some(at) = serving.iter().position(|run| *run == self.run) {
            serving.swap_remove(at);
        }
    }
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
            uses: Mutex::default(),
            serving: Mutex::default(),
            directory: RwLock::new(directory.to_owned()),
            file,
            table: RwLock::new(table),
            end: Mutex::new(end),
            unsaved: Mutex::new(0),
            saving: Mutex::default(),
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
        self.note_use(&(chunk.0..chunk.0 + 1));
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
        self.note_use(&run);
        let mut next = run.start;
        while next < run.end && (out.len() < max || next == run.start) {
            let entry = self.entry(next);
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
            if !is_whole && self.entry(next) != entry {
                // It was evicted meanwhile.
                out.truncate(start);
                break;
            }
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

    /// Keeps the frames of `run` until the guard is dropped.
    pub(super) fn in_use(self: &Arc<Self>, run: Range<u32>) -> FramesUse {
        self.serving.lock().push(run.clone());
        FramesUse { frames: Arc::clone(self), run }
    }

    /// Units of which something is there and nothing is being served.
    pub(super) fn units(&self) -> Vec<FramesUnit> {
        let table = self.table.read();
        let (uses, serving) = (self.uses.lock(), self.serving.lock());
        (0..)
            .zip(table.chunks(1 << UNIT_LOG2))
            .filter(|(number, entries)| {
                let chunks = unit_chunks(*number);
                entries.iter().any(|entry| entry.len > 0)
                    && !serving.iter().any(|run| run.start < chunks.end && chunks.start < run.end)
            })
            .map(|(number, _)| FramesUnit { used: uses.get(number as usize).copied().unwrap_or(0), number })
            .collect()
    }

    /// Takes the frames of units off the disk, unless they are being served. Blocks on the disk.
    pub(super) fn evict(&self, numbers: &[u32]) -> io::Result<()> {
        let mut gone = Vec::new();
        let mut cleared = Vec::new();
        let saving = self.saving.lock();
        let is_empty = {
            let mut table = self.table.write();
            let serving = self.serving.lock();
            for chunks in numbers.iter().map(|number| unit_chunks(*number)) {
                if serving.iter().any(|run| run.start < chunks.end && chunks.start < run.end) {
                    continue;
                }
                let end = (chunks.end as usize).min(table.len());
                let entries = table.get_mut(chunks.start as usize..end).unwrap_or_default();
                for (chunk, entry) in (chunks.start as usize..).zip(entries) {
                    if entry.len > 0 {
                        gone.push(entry.offset..entry.offset + u64::from(entry.len));
                        cleared.push((chunk, std::mem::take(entry)));
                    }
                }
            }
            table.iter().all(|entry| entry.len == 0)
        };
        // The table first, durably: it must not name what is not there, since who asks is told the length of frames by it.
        let saved = self.save_alone().and_then(|()| File::open(&*self.directory.read())?.sync_all());
        if saved.is_err() {
            // They still take the disk, so that the next eviction finds them.
            let mut table = self.table.write();
            for (chunk, entry) in cleared {
                if let Some(slot) = table.get_mut(chunk).filter(|slot| slot.len == 0) {
                    *slot = entry;
                }
            }
            return saved;
        }
        drop(saving);
        let mut end = self.end.lock();
        if is_empty && self.table.read().iter().all(|entry| entry.len == 0) {
            *end = 0;
            return self.file.set_len(0);
        }
        drop(end);
        gone.sort_by_key(|range| range.start);
        let mut holes: Vec<Range<u64>> = Vec::new();
        for range in gone {
            match holes.last_mut() {
                Some(hole) if hole.end == range.start => hole.end = range.end,
                _ => holes.push(range),
            }
        }
        for hole in holes {
            let (start, end) = (hole.start.next_multiple_of(BLOCK), hole.end / BLOCK * BLOCK);
            if start < end {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&self.file, flags, start, end - start)?;
            }
        }
        Ok(())
    }

    /// Bytes that were written.
    pub(crate) fn len(&self) -> u64 {
        *self.end.lock()
    }

    fn entry(&self, chunk: u32) -> Entry {
        self.table.read().get(chunk as usize).copied().unwrap_or_default()
    }

    fn note_use(&self, run: &Range<u32>) {
        let (first, last) = (run.start >> UNIT_LOG2, run.end.saturating_sub(1) >> UNIT_LOG2);
        let mut uses = self.uses.lock();
        if uses.len() <= last as usize {
            uses.resize(last as usize + 1, 0);
        }
        let now = ticks();
        for used in uses.get_mut(first as usize..=last as usize).unwrap_or_default() {
            *used = now;
        }
    }

    /// How many chunks from 0 on are there without gap. Only ever grows while a layer is ingested.
    pub fn front(&self) -> watch::Receiver<u32> {
        self.front.subscribe()
    }

    /// Writes the table so that a restart finds the frames. Blocks on the disk.
    pub fn save(&self) -> io::Result<()> {
        let _saving = self.saving.lock();
        self.save_alone()
    }

    fn save_alone(&self) -> io::Result<()> {
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

    /// Brings what was appended to the disk; without [`Frames::save`] no restart finds it. Blocks on the disk.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
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

/// Tenths of a second since the first use.
fn ticks() -> u32 {
    static SINCE: LazyLock<Instant> = LazyLock::new(Instant::now);
    u32::try_from(SINCE.elapsed().as_millis() / 100).unwrap_or(u32::MAX - 1) + 1
}

fn unit_chunks(number: u32) -> Range<u32> {
    number << UNIT_LOG2..(number + 1) << UNIT_LOG2
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
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn allocated(frames: &Frames) -> u64 {
        frames.file.metadata().unwrap().blocks() * 512
    }

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
    fn evicted_units_free_their_disk_and_what_is_served_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wire");
        let frames = Arc::new(Frames::create(&path).unwrap());
        let frame = |chunk: u32| vec![chunk as u8 ^ 0x5a; 20_000];
        for chunk in 0..100 {
            frames.append(ChunkIndex(chunk), &frame(chunk)).unwrap();
        }
        frames.save().unwrap();
        let before = allocated(&frames);
        let serving = frames.in_use(40..41);
        assert_eq!(frames.units().iter().map(|unit| unit.number).collect::<Vec<_>>(), [0, 2, 3]);
        frames.evict(&[0, 1]).unwrap();
        let freed = before - allocated(&frames);
        assert!((31 * 20_000..=32 * 20_000).contains(&freed), "{freed}");
        assert!(!frames.has(ChunkIndex(31)) && frames.has(ChunkIndex(32)));
        drop(serving);
        frames.evict(&[1]).unwrap();
        frames.append(ChunkIndex(5), &frame(5)).unwrap();
        assert_eq!(read_all(&frames, 5..6).0, frame(5));
        frames.save().unwrap();
        drop(frames);
        let frames = Arc::new(Frames::open(&path).unwrap());
        let here: Vec<u32> = (0..100).filter(|chunk| frames.has(ChunkIndex(*chunk))).collect();
        assert_eq!(here, [5].into_iter().chain(64..100).collect::<Vec<_>>());
        assert_eq!(read_all(&frames, 64..100).0.len(), 36 * 20_000);
        frames.evict(&[0, 2, 3]).unwrap();
        assert_eq!((frames.units(), allocated(&frames)), (vec![], 0));
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
