//! How many bytes what is kept may take on the disk, and how many it takes.
//!
//! Whoever writes takes room before and gives it back when the bytes are gone, so the limit holds at every moment. The
//! limit is the configured size or what the file system has left above its floor, whichever is less. Below the limit lie
//! two lower marks, both told by shares of the limit: where eviction begins (and down to where it goes), and where
//! background work ends. The second is lower, so what eviction freed is not filled again.
//!
//! Wire forms are *spare*: they are kept only while there is plenty of room, go before all else, and to the background they
//! are as good as free.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::StoreError;
use super::backend::{Backend, is_full};
use crate::config::CacheConfig;

/// The part of the limit that eviction keeps free for what readers wait for: 1/32, at most this.
const RESERVE_MAX: u64 = 512 << 20;

/// The file system is looked at again after so many bytes.
const LOOK_EACH: u64 = 8 << 20;

/// How much is freed when the disk is full although the limit is not reached.
const FULL_STEP: u64 = 64 << 20;

/// Bytes of chunks that are kept in memory for readers because the disk does not take them, for all layers.
const MEMORY_MAX: u64 = 64 << 20;

/// How long who can wait waits for room.
const PATIENCE: Duration = Duration::from_secs(1);

/// Resolution of [`Room::now`].
const TICKS_PER_SEC: u32 = 64;

/// The account.
#[derive(Debug)]
pub(crate) struct Room {
    backend: Arc<dyn Backend>,
    root: PathBuf,
    /// `u64::MAX`: no size of its own.
    size: u64,
    keep_free: u64,
    limit: AtomicU64,
    taken: AtomicU64,
    /// What of it is spare.
    spare: AtomicU64,
    /// Whether anything spare is kept at all.
    keeps_spare: AtomicBool,
    /// A write found the disk full; none is tried again before the file system says that there is space.
    is_full: AtomicBool,
    /// Bytes of devices that are read from disk, so that all of them must stay.
    pinned: AtomicU64,
    in_memory: AtomicU64,
    since: Instant,
    /// Somebody found too little room since the evictor looked.
    asked: AtomicBool,
    stopped: Mutex<bool>,
    wake: Condvar,
}

/// A place in memory for bytes that the disk does not take; given back when dropped.
#[derive(Debug)]
pub(crate) struct MemoryPlace {
    room: Arc<Room>,
    len: u64,
}

impl Drop for MemoryPlace {
    fn drop(&mut self) {
        self.room.in_memory.fetch_sub(self.len, Ordering::Relaxed);
    }
}

impl Room {
    /// An account for what lies below `root`, which must exist. Nothing is taken yet.
    pub(crate) fn open(backend: Arc<dyn Backend>, root: &Path, config: &CacheConfig) -> Result<Arc<Self>, StoreError> {
        let space = backend.space(root).map_err(StoreError::io("look at the file system of", root))?;
        let size = config.size.of(space.total);
        let room = Self {
            backend,
            root: root.to_owned(),
            size: if size == 0 { u64::MAX } else { size },
            keep_free: config.keep_free.of(space.total),
            limit: AtomicU64::new(u64::MAX),
            taken: AtomicU64::new(0),
            spare: AtomicU64::new(0),
            keeps_spare: AtomicBool::new(false),
            is_full: AtomicBool::new(false),
            pinned: AtomicU64::new(0),
            in_memory: AtomicU64::new(0),
            since: Instant::now(),
            asked: AtomicBool::new(false),
            stopped: Mutex::new(false),
            wake: Condvar::new(),
        };
        room.look();
        Ok(Arc::new(room))
    }

    /// Now, in a unit of 1/64 s since the account was opened; never 0.
    pub(crate) fn now(&self) -> u32 {
        let ticks = self.since.elapsed().as_millis() * u128::from(TICKS_PER_SEC) / 1000;
        u32::try_from(ticks).unwrap_or(u32::MAX - 1) + 1
    }

    /// How long ago `then` was, which [`Room::now`] gave.
    pub(crate) fn since(&self, then: u32) -> Duration {
        Duration::from_secs(u64::from(self.now().saturating_sub(then))) / TICKS_PER_SEC
    }

    /// Looks at the file system, of which others use parts too.
    pub(crate) fn look(&self) {
        let Ok(space) = self.backend.space(&self.root) else { return };
        let taken = self.taken.load(Ordering::Relaxed);
        let above_floor = taken.saturating_add(space.free).saturating_sub(self.keep_free);
        let limit = if self.keep_free == 0 { self.size } else { self.size.min(above_floor) };
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// The same for the background, which goes on when a disk that was full has space. Where it is full all the same, the
    /// first write says so.
    pub(crate) fn look_again(&self) {
        self.look();
        if self.is_disk_full() && self.free() >= LOOK_EACH {
            self.note_success();
        }
    }

    /// Takes room for a write; `false`: there is none, and the evictor is asked for some.
    pub(crate) fn take(&self, bytes: u64) -> bool {
        if self.is_full.load(Ordering::Relaxed) && self.backend.space(&self.root).is_ok_and(|space| space.free < bytes)
        {
            self.ask();
            return false;
        }
        let before = self.taken.load(Ordering::Relaxed);
        if before / LOOK_EACH != before.saturating_add(bytes) / LOOK_EACH {
            self.look();
        }
        let limit = self.limit();
        let taken = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
            taken.checked_add(bytes).filter(|taken| *taken <= limit)
        });
        let is_short = |taken: u64| taken + bytes > limit - self.reserve() / 2;
        if taken.map_or(true, |taken| is_short(taken) || self.spare_excess() > 0) {
            self.ask();
        }
        taken.is_ok()
    }

    /// Waits a little for the evictor to make room for `bytes`; gives whether it did. Blocks.
    pub(crate) fn wait_for(&self, bytes: u64) -> bool {
        let until = Instant::now() + PATIENCE;
        self.ask();
        while self.is_disk_full() || self.taken().saturating_add(bytes) > self.limit() {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(PATIENCE / 100);
        }
        true
    }

    /// Takes room for what is on the disk already.
    pub(crate) fn take_anyway(&self, bytes: u64) {
        self.taken.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether wire forms are kept.
    pub(crate) fn set_keeps_spare(&self, keeps: bool) {
        self.keeps_spare.store(keeps, Ordering::Relaxed);
    }

    /// Takes room for what may go at any time; `false`: there is not plenty.
    pub(crate) fn take_spare(&self, bytes: u64) -> bool {
        let keeps = self.keeps_spare.load(Ordering::Relaxed) && !self.is_disk_full();
        let most = self.limit().saturating_sub(3 * self.reserve());
        let takes = keeps && self.taken().saturating_add(bytes) <= most && self.take(bytes);
        if takes {
            self.spare.fetch_add(bytes, Ordering::Relaxed);
        }
        takes
    }

    /// Gives spare room back.
    pub(crate) fn give_back_spare(&self, bytes: u64) {
        self.give_back(bytes);
        let _ =
            self.spare.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |spare| Some(spare.saturating_sub(bytes)));
    }

    /// [`Room::settle`] for spare room.
    pub(crate) fn settle_spare(&self, charged: &AtomicU64, real: u64) {
        let before = charged.load(Ordering::Relaxed);
        if real >= before {
            self.spare.fetch_add(real - before, Ordering::Relaxed);
        } else {
            let less = before - real;
            let _ =
                self.spare.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |spare| Some(spare.saturating_sub(less)));
        }
        self.settle(charged, real);
    }

    /// Bytes that may go at any time.
    pub(crate) fn spare(&self) -> u64 {
        self.spare.load(Ordering::Relaxed)
    }

    /// Spare bytes to free now: other things need the room.
    pub(crate) fn spare_excess(&self) -> u64 {
        let (limit, taken, reserve) = (self.limit(), self.taken(), self.reserve());
        let excess =
            if taken > limit.saturating_sub(2 * reserve) { taken - limit.saturating_sub(3 * reserve) } else { 0 };
        if self.is_disk_full() { self.spare() } else { excess.min(self.spare()) }
    }

    /// Gives room back.
    pub(crate) fn give_back(&self, bytes: u64) {
        let _ =
            self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| Some(taken.saturating_sub(bytes)));
    }

    /// Corrects what was `charged` to what a file takes by now.
    pub(crate) fn settle(&self, charged: &AtomicU64, real: u64) {
        let before = charged.swap(real, Ordering::Relaxed);
        if real >= before {
            self.take_anyway(real - before);
        } else {
            self.give_back(before - real);
        }
    }

    /// Whether a device of `bytes` may be kept whole: a quarter of the limit stays for what is not.
    pub(crate) fn may_pin(&self, bytes: u64) -> bool {
        let limit = self.limit();
        self.pinned.load(Ordering::Relaxed).saturating_add(bytes) <= limit - limit / 4
    }

    /// All of a device of `bytes` must stay from now on, or need not any more.
    pub(crate) fn note_pinned(&self, bytes: u64, is_pinned: bool) {
        let change = |pinned: u64| if is_pinned { pinned.saturating_add(bytes) } else { pinned.saturating_sub(bytes) };
        let _ = self.pinned.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |pinned| Some(change(pinned)));
        if !is_pinned {
            self.ask();
        }
    }

    /// A write failed with `error`: gives whether because the disk is full.
    pub(crate) fn note_failure(&self, error: &std::io::Error) -> bool {
        let is_full = is_full(error);
        if is_full {
            self.is_full.store(true, Ordering::Relaxed);
            self.ask();
        }
        is_full
    }

    /// A write succeeded, or room was made.
    pub(crate) fn note_success(&self) {
        if self.is_full.load(Ordering::Relaxed) {
            self.is_full.store(false, Ordering::Relaxed);
            self.ask();
        }
    }

    /// Whether bytes are refused now.
    pub(crate) fn is_refusing(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
            || self.taken() >= self.limit().saturating_sub(LOOK_EACH.min(self.reserve()))
    }

    /// The disk was full when it was written to last.
    pub(crate) fn is_disk_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    /// Bytes taken.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Most bytes that may be taken, as of the last look; `u64::MAX` for no limit.
    pub(crate) fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Whether the file system leaves less than the configured size, as of the last look.
    pub(crate) fn is_short_of_disk(&self) -> bool {
        self.limit() < self.size
    }

    /// What can still be taken.
    pub(crate) fn free(&self) -> u64 {
        let left = self.limit().saturating_sub(self.taken());
        self.backend.space(&self.root).map_or(left, |space| left.min(space.free))
    }

    /// Bytes that background work may still bring.
    pub(crate) fn slack(&self) -> u64 {
        if self.is_disk_full() {
            return 0;
        }
        let taken = self.taken().saturating_sub(self.spare());
        self.limit().saturating_sub(2 * self.reserve()).saturating_sub(taken)
    }

    /// Bytes to free now.
    pub(crate) fn excess(&self) -> u64 {
        let (limit, taken) = (self.limit(), self.taken());
        let excess = if taken > limit - self.reserve() / 2 { taken - (limit - self.reserve()) } else { 0 };
        if self.is_disk_full() { excess.max(FULL_STEP.min(taken / 4)) } else { excess }
    }

    /// A place in memory for `len` bytes; `None` where others have taken all.
    pub(crate) fn in_memory(self: &Arc<Self>, len: usize) -> Option<MemoryPlace> {
        let len = len as u64;
        let took = self.in_memory.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
            taken.checked_add(len).filter(|taken| *taken <= MEMORY_MAX)
        });
        took.is_ok().then(|| MemoryPlace { room: self.clone(), len })
    }

    /// Waits until somebody finds too little room; `pause` is let pass before. `false`: [`Room::stop`] was called.
    pub(crate) fn wait(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        let mut stopped = self.stopped.lock();
        while !*stopped && !self.wake.wait_until(&mut stopped, until).timed_out() {}
        while !*stopped && !self.asked.swap(false, Ordering::AcqRel) {
            self.wake.wait(&mut stopped);
        }
        !*stopped
    }

    /// Lets the evictor look.
    pub(crate) fn ask(&self) {
        if !self.asked.swap(true, Ordering::AcqRel) {
            // Under the lock, so that who is about to wait has seen it or is woken.
            let _stopped = self.stopped.lock();
            self.wake.notify_all();
        }
    }

    /// Ends [`Room::wait`] for good.
    pub(crate) fn stop(&self) {
        *self.stopped.lock() = true;
        self.wake.notify_all();
    }

    fn reserve(&self) -> u64 {
        (self.limit() / 32).min(RESERVE_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DiskShare;
    use crate::store::memory::MemoryDisk;

    fn room(disk: &MemoryDisk, size: u64, keep_free: u64) -> Arc<Room> {
        let config = CacheConfig { size: DiskShare::Bytes(size), keep_free: DiskShare::Bytes(keep_free) };
        Room::open(Arc::new(disk.clone()), Path::new("/"), &config).unwrap()
    }

    #[test]
    fn nobody_takes_more_than_there_is() {
        let room = room(&MemoryDisk::default(), 3200, 0);
        assert_eq!((room.limit(), room.slack(), room.excess()), (3200, 3000, 0));
        assert!(room.take(3000));
        assert_eq!((room.slack(), room.excess()), (0, 0));
        assert!(!room.take(201) && room.take(150));
        assert_eq!(room.excess(), 0);
        // Above the upper mark; to be freed down to the lower one.
        assert!(room.take(50) && !room.take(1));
        assert_eq!(room.excess(), 100);
        room.give_back(1000);
        assert_eq!((room.taken(), room.excess()), (2200, 0));
        let charged = AtomicU64::new(2200);
        room.settle(&charged, 2000);
        assert_eq!(room.taken(), 2000);
        room.settle(&charged, 2500);
        assert_eq!(room.taken(), 2500);
    }

    #[test]
    fn the_floor_of_the_file_system_is_kept() {
        let disk = MemoryDisk::default();
        disk.set_room(Some(100_000));
        let room = room(&disk, 0, 60_000);
        assert_eq!(room.limit(), 40_000);
        disk.set_room(Some(70_000));
        room.look();
        assert!(!room.take(10_001) && room.take(10_000));
    }

    #[test]
    fn a_full_disk_rests() {
        let disk = MemoryDisk::default();
        let room = room(&disk, 0, 0);
        assert!(room.take(1000));
        disk.set_room(Some(0));
        assert!(!room.note_failure(&std::io::Error::other("broken")));
        assert!(room.note_failure(&std::io::ErrorKind::StorageFull.into()));
        assert!(!room.take(1) && room.slack() == 0 && room.excess() == 250);
        disk.set_room(Some(1));
        assert!(!room.take(2) && room.take(1));
        room.note_success();
        assert!(room.take(1) && room.excess() == 0);
    }

    #[test]
    fn memory_is_bounded() {
        let room = room(&MemoryDisk::default(), 0, 0);
        let first = room.in_memory(MEMORY_MAX as usize);
        assert!(first.is_some() && room.in_memory(1).is_none());
        drop(first);
        assert!(room.in_memory(1).is_some());
    }
}
