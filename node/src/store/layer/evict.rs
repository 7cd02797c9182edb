//! Taking chunks off the disk again, and keeping whole devices from it.
//!
//! The order, so that neither a crash nor a reader sees a hole as a chunk: the bits are cleared in memory and the count of
//! losses grows, both while nobody writes; the bits are cleared on disk and synced; only then the hole is made. A reader
//! compares the count before it looks at the bits with the count after it has read. Until the hole is made nobody writes to
//! its unit: what comes for it meanwhile is not stored.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use super::{LayerStore, SMALL_FILE_MAX};
use crate::store::StoreError;
use crate::store::backend::{Backend, read_file};

/// log2 of the chunks that are evicted together: 2 MiB of a device with chunks of 128 KiB. A smaller unit would split what was
/// fetched together; a larger one would take what is in use with what is not.
const UNIT_LOG2: u32 = 4;

/// Its lines: the boot id, then who reads the device from disk.
pub(super) const PINNED: &str = "pinned";

/// When the units of a device were used last ([`Room::now`](crate::store::Room::now)); 0: not since the store was opened.
#[derive(Debug)]
pub(super) struct Uses(Vec<AtomicU32>);

/// A unit that takes disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Unit {
    /// When it was used last.
    pub(crate) used: u32,
    /// Which.
    pub(crate) number: u32,
    /// Bytes that its chunks take.
    pub(crate) bytes: u64,
}

impl Uses {
    pub(super) fn new(chunks: u32) -> Self {
        Self((0..units(chunks)).map(|_| AtomicU32::new(0)).collect())
    }

    pub(super) fn note(&self, chunks: &Range<u32>, now: u32) {
        let units = unit_of(chunks.start) as usize..=unit_of(chunks.end.saturating_sub(1)) as usize;
        for used in self.0.get(units).unwrap_or_default() {
            used.store(now, Ordering::Relaxed);
        }
    }

    fn of(&self, unit: u32) -> u32 {
        self.0.get(unit as usize).map_or(0, |used| used.load(Ordering::Relaxed))
    }
}

/// How many units so many chunks make.
pub(super) fn units(chunks: u32) -> u32 {
    chunks.div_ceil(1 << UNIT_LOG2)
}

pub(super) fn unit_of(chunk: u32) -> u32 {
    chunk >> UNIT_LOG2
}

impl LayerStore {
    /// All units that may be evicted; none of a device that is read from disk.
    pub(crate) fn units(&self) -> Vec<Unit> {
        if self.is_pinned() {
            return Vec::new();
        }
        let chunk_size = self.geometry().chunk_size();
        (0..units(self.geometry().chunk_count()))
            .filter_map(|number| {
                let here = self.unit_chunks(number).filter(|chunk| self.here.get(*chunk)).count() as u64;
                (here > 0).then_some(Unit { used: self.uses.of(number), number, bytes: here * chunk_size })
            })
            .collect()
    }

    /// Units whose bytes could not be freed after their chunks were forgotten.
    pub(crate) fn owed(&self) -> Vec<u32> {
        std::iter::successors(self.leaving.next(0, true), |unit| self.leaving.next(unit + 1, true)).collect()
    }

    /// The first chunk of `unit` that is here.
    pub(crate) fn first_here(&self, unit: u32) -> Option<u32> {
        self.unit_chunks(unit).find(|chunk| self.here.get(*chunk))
    }

    /// Takes units off the disk. Nothing happens to a device that is read from disk. After an error the units' chunks are
    /// missing, and their bytes are [owed](Self::owed). Gives the bytes freed.
    pub(crate) fn evict(&self, numbers: &[u32]) -> Result<u64, StoreError> {
        {
            let _alone = self.writes.write();
            if self.is_pinned() {
                return Ok(0);
            }
            let mut unsynced = self.unsynced.lock();
            for number in numbers {
                self.leaving.set(*number);
                for chunk in self.unit_chunks(*number).filter(|chunk| self.here.clear(*chunk)) {
                    self.suspect.clear(chunk);
                    unsynced.dropped.push(chunk);
                }
            }
            self.proven.store(false, Ordering::Release);
            // After the bits: who has seen one set sees the count change before there is a hole.
            self.losses.fetch_add(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
        {
            let mut on_disk = self.on_disk.lock();
            self.flush_locked(&mut on_disk)?;
            self.have.sync().map_err(StoreError::io("sync", &self.directory.join(super::HAVE)))?;
        }
        let before = self.charged.load(Ordering::Relaxed);
        let result = super::runs(numbers.to_vec()).into_iter().try_for_each(|run| {
            self.punch(self.unit_chunks(run.start).start..self.unit_chunks(run.end.saturating_sub(1)).end)?;
            for number in run {
                self.leaving.clear(number);
            }
            Ok(())
        });
        self.settle();
        result.map(|()| before.saturating_sub(self.charged.load(Ordering::Relaxed)))
    }

    /// Keeps the whole device on disk for `holder`, who is about to read the file itself; `false`: not every chunk is here and
    /// proven, or too much of the room is kept whole already. Holds over restarts, until the machine starts anew.
    pub(crate) fn pin(&self, holder: &str) -> Result<bool, StoreError> {
        {
            let _alone = self.writes.write();
            let may = self.is_pinned() || self.site.room.may_pin(self.geometry().device_size());
            if !may || !self.is_proven() {
                return Ok(false);
            }
            if !self.hold_pin(holder) {
                return Ok(true);
            }
        }
        let written = self.write_pins();
        if written.is_err() {
            self.let_pin_go(holder);
        }
        written.map(|()| true)
    }

    /// The same for who reads the file already: whatever state it is in, it must not get worse.
    pub(crate) fn pin_anyway(&self, holder: &str) -> Result<(), StoreError> {
        let is_new = {
            let _alone = self.writes.write();
            self.hold_pin(holder)
        };
        if is_new { self.write_pins() } else { Ok(()) }
    }

    /// `holder` has no open file of the device any more. Gives whether it had.
    pub(crate) fn unpin(&self, holder: &str) -> Result<bool, StoreError> {
        let had = self.let_pin_go(holder);
        if had {
            self.write_pins()?;
        }
        Ok(had)
    }

    fn hold_pin(&self, holder: &str) -> bool {
        let mut pins = self.pins.lock();
        if pins.is_empty() {
            self.site.room.note_pinned(self.geometry().device_size(), true);
        }
        pins.insert(holder.to_owned())
    }

    fn let_pin_go(&self, holder: &str) -> bool {
        let mut pins = self.pins.lock();
        let had = pins.remove(holder);
        if had && pins.is_empty() {
            self.site.room.note_pinned(self.geometry().device_size(), false);
        }
        had
    }

    /// Whether somebody reads the device from disk.
    pub(crate) fn is_pinned(&self) -> bool {
        !self.pins.lock().is_empty()
    }

    /// Frees what chunks take that are not here: a crash between forgetting and freeing leaves them.
    pub(super) fn free_forgotten(&self, is_clean: bool) -> Result<(), StoreError> {
        self.settle();
        let here = self.bytes_here().next_multiple_of(self.geometry().chunk_size());
        if is_clean && self.charged.load(Ordering::Relaxed) <= here || self.is_pinned() {
            return Ok(());
        }
        let mut from = 0;
        while let Some(gap) = self.here.next_gap(from) {
            from = gap.end;
            self.punch(gap)?;
        }
        self.settle();
        Ok(())
    }

    /// Charges what the device takes by now.
    pub(super) fn settle(&self) {
        let _alone = self.writes.write();
        if let Ok(allocated) = self.device.allocated() {
            self.site.room.settle(&self.charged, allocated);
        }
    }

    fn punch(&self, chunks: Range<u32>) -> Result<(), StoreError> {
        let geometry = self.geometry();
        let start = u64::from(chunks.start) << geometry.chunk_log2();
        // To the end of the last chunk's blocks.
        let end = u64::from(chunks.end) << geometry.chunk_log2();
        self.device.punch(start..end).map_err(StoreError::io("free parts of", &self.device_path()))
    }

    fn unit_chunks(&self, unit: u32) -> Range<u32> {
        let end = (unit + 1).saturating_mul(1 << UNIT_LOG2).min(self.geometry().chunk_count());
        (unit << UNIT_LOG2).min(end)..end
    }

    fn write_pins(&self) -> Result<(), StoreError> {
        let pins = self.pins.lock().clone();
        let mut text = format!("{}\n", self.site.boot_id);
        pins.iter().for_each(|holder| text.extend([holder, "\n"]));
        self.replace(PINNED, Some(text.as_bytes()))
    }
}

/// Who reads the device in `directory` from disk since this start of the machine.
pub(super) fn read_pins(backend: &dyn Backend, directory: &std::path::Path, boot_id: &str) -> BTreeSet<String> {
    let Ok(bytes) = read_file(backend, &directory.join(PINNED), SMALL_FILE_MAX << 4) else { return BTreeSet::new() };
    let text = String::from_utf8_lossy(&bytes);
    let mut lines = text.lines();
    if lines.next() != Some(boot_id) {
        return BTreeSet::new();
    }
    lines.map(str::to_owned).collect()
}
