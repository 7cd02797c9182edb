//! Reads that wait for chunks.
//!
//! [`Waits`] knows who waits for which chunk of one layer; [`Streams`] guesses what will be read next. Both only keep
//! books: reading, fetching and waking is the layer's and the driver's work.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use layer::Geometry;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::store::Held;

/// Called once with the outcome of a read, on any thread; must not block for long.
pub type OnDone = Box<dyn FnOnce(Result<Bytes, ReadError>) + Send>;

/// Why a read failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// A chunk did not come before its deadline.
    #[error("chunk {chunk} did not arrive in time: {}", .reasons.join("; "))]
    Deadline {
        /// The first chunk that did not come.
        chunk: u32,
        /// What happened with each source.
        reasons: Arc<[String]>,
    },
    /// The layer was removed.
    #[error("the layer was removed")]
    Removed,
    /// The layer must not be used.
    #[error("the layer is quarantined: {0}")]
    Quarantined(String),
    /// The disk loses chunks as fast as they come.
    #[error("the store cannot read back what it wrote; see the log for the disk's error")]
    Io,
}

/// Who waits for which chunk of a layer.
#[derive(Debug)]
pub(crate) struct Waits {
    state: Mutex<State>,
    waiting_max: usize,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    reads: BTreeMap<u64, Waiting>,
    /// The reads that wait for a chunk; never empty.
    chunks: BTreeMap<u32, Vec<u64>>,
    /// Reads beyond the bound, the oldest first: they wait for nothing but their turn.
    line: VecDeque<u64>,
    /// Chunks whose first waiter came or whose last one left since the driver looked.
    changed: BTreeSet<u32>,
    closed: Option<ReadError>,
}

/// A read that cannot be answered yet.
pub(crate) struct Waiting {
    pub(crate) range: Range<u64>,
    chunks: Range<u32>,
    missing: usize,
    /// Its number, once it has waited.
    id: Option<u64>,
    pub(crate) since: Instant,
    /// How often its chunks came and were gone again.
    pub(crate) attempts: u32,
    /// Chunks that came for it and were not stored.
    pub(crate) held: Vec<Held>,
    pub(crate) on_done: OnDone,
}

/// What became of a read that was to wait.
pub(crate) enum Enter {
    /// It waits under this number.
    Waits(u64),
    /// All of it is here by now.
    Ready(Waiting),
    /// The layer is closed.
    Closed(Waiting, ReadError),
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waiting").field("range", &self.range).field("missing", &self.missing).finish_non_exhaustive()
    }
}

impl Waiting {
    pub(crate) fn new(range: Range<u64>, chunks: Range<u32>, since: Instant, on_done: OnDone) -> Self {
        Self { range, chunks, missing: 0, id: None, since, attempts: 0, held: Vec::new(), on_done }
    }
}

impl Waits {
    /// At most `waiting_max` reads wait for chunks at the same time; more wait in line.
    pub(crate) fn new(waiting_max: usize) -> Self {
        Self { state: Mutex::default(), waiting_max: waiting_max.max(1) }
    }

    /// Lets a read wait for its chunks that are not here. `is_here` is asked under the lock that also
    /// [`Waits::arrived`] takes, so a chunk that arrives meanwhile is not missed.
    pub(crate) fn enter(&self, mut read: Waiting, is_here: impl Fn(u32) -> bool) -> Enter {
        let mut state = self.state.lock();
        if let Some(error) = &state.closed {
            return Enter::Closed(read, error.clone());
        }
        let id = read.id.unwrap_or(state.next);
        if state.reads.len() - state.line.len() >= self.waiting_max {
            state.next = state.next.max(id + 1);
            read.id = Some(id);
            state.reads.insert(id, read);
            state.line.push_back(id);
            return Enter::Waits(id);
        }
        if !state.wait_for_missing(id, &mut read, is_here) {
            return Enter::Ready(read);
        }
        state.next = state.next.max(id + 1);
        read.id = Some(id);
        state.reads.insert(id, read);
        Enter::Waits(id)
    }

    /// A chunk is here now, or was at least given: gives the reads that waited for nothing else. `held` has its bytes where it
    /// was not stored; those reads keep them.
    pub(crate) fn arrived(&self, chunk: u32, held: Option<&Held>, is_here: impl Fn(u32) -> bool) -> Vec<Waiting> {
        let mut state = self.state.lock();
        let Some(waiting) = state.chunks.remove(&chunk) else { return Vec::new() };
        let mut ready = Vec::new();
        for id in waiting {
            let Some(read) = state.reads.get_mut(&id) else { continue };
            read.missing -= 1;
            read.held.extend(held.cloned());
            if read.missing == 0 {
                ready.extend(state.reads.remove(&id));
            }
        }
        state.promote(self.waiting_max, is_here, &mut ready);
        ready
    }

    /// A chunk will not come: gives the reads that wait for it, and such that can be answered instead.
    pub(crate) fn failed(&self, chunk: u32, is_here: impl Fn(u32) -> bool) -> (Vec<Waiting>, Vec<Waiting>) {
        let mut state = self.state.lock();
        let waiting = state.chunks.get(&chunk).cloned().unwrap_or_default();
        let failed: Vec<Waiting> = waiting.into_iter().filter_map(|id| state.leave(id)).collect();
        let mut ready = Vec::new();
        state.promote(self.waiting_max, is_here, &mut ready);
        (failed, ready)
    }

    /// Takes a read away; `None` where it was answered already. The second part can be answered now.
    pub(crate) fn cancel(&self, id: u64, is_here: impl Fn(u32) -> bool) -> (Option<Waiting>, Vec<Waiting>) {
        let mut state = self.state.lock();
        let read = state.leave(id);
        let mut ready = Vec::new();
        state.promote(self.waiting_max, is_here, &mut ready);
        (read, ready)
    }

    /// Lets nobody in any more and gives those who wait.
    pub(crate) fn close(&self, error: ReadError) -> Vec<Waiting> {
        let mut state = self.state.lock();
        state.closed = Some(error);
        state.line.clear();
        let chunks = std::mem::take(&mut state.chunks);
        state.changed.extend(chunks.into_keys());
        std::mem::take(&mut state.reads).into_values().collect()
    }

    /// Chunks for which somebody began or ceased to wait, with the arrival of the oldest read that waits for it now.
    pub(crate) fn take_changes(&self) -> Vec<(u32, Option<Instant>)> {
        let mut state = self.state.lock();
        let changed = std::mem::take(&mut state.changed);
        changed.into_iter().map(|chunk| (chunk, state.oldest(chunk))).collect()
    }

    /// When the oldest read came that waits for `chunk`, if any does.
    pub(crate) fn waiting_since(&self, chunk: u32) -> Option<Instant> {
        self.state.lock().oldest(chunk)
    }

    /// Reads that wait.
    pub(crate) fn read_count(&self) -> usize {
        self.state.lock().reads.len()
    }
}

impl State {
    fn wait_for_missing(&mut self, id: u64, read: &mut Waiting, is_here: impl Fn(u32) -> bool) -> bool {
        read.missing = 0;
        let is_held = |chunk: u32| read.held.iter().any(|held| held.chunk() == chunk);
        let missing: Vec<u32> = read.chunks.clone().filter(|chunk| !is_held(*chunk) && !is_here(*chunk)).collect();
        for chunk in missing {
            read.missing += 1;
            let waiting = self.chunks.entry(chunk).or_default();
            if waiting.is_empty() {
                self.changed.insert(chunk);
            }
            waiting.push(id);
        }
        read.missing > 0
    }

    fn leave(&mut self, id: u64) -> Option<Waiting> {
        let read = self.reads.remove(&id)?;
        self.line.retain(|waiting| *waiting != id);
        for chunk in read.chunks.clone() {
            let Some(waiting) = self.chunks.get_mut(&chunk) else { continue };
            waiting.retain(|waiting| *waiting != id);
            if waiting.is_empty() {
                self.chunks.remove(&chunk);
                self.changed.insert(chunk);
            }
        }
        Some(read)
    }

    fn promote(&mut self, waiting_max: usize, is_here: impl Fn(u32) -> bool, ready: &mut Vec<Waiting>) {
        while self.reads.len() - self.line.len() < waiting_max
            && let Some(id) = self.line.pop_front()
        {
            let Some(mut read) = self.reads.remove(&id) else { continue };
            if self.wait_for_missing(id, &mut read, &is_here) {
                self.reads.insert(id, read);
            } else {
                ready.push(read);
            }
        }
    }

    fn oldest(&self, chunk: u32) -> Option<Instant> {
        let waiting = self.chunks.get(&chunk)?;
        waiting.iter().filter_map(|id| self.reads.get(id)).map(|read| read.since).min()
    }
}

/// How many sequential readers of one layer are followed at the same time.
const STREAMS_MAX: usize = 8;

/// A read that starts this little before the end of the last one continues it: the kernel sends the parts of a readahead in any
/// order.
const SLACK_BEHIND: u64 = 256 << 10;

/// The same beyond the end: a small file or a tar header between two reads. More would take the faults of a mapped library for
/// a sequential reader.
const SLACK_BEYOND: u64 = 64 << 10;

/// The least that is worth a fetch of its own.
const WINDOW_MIN: u64 = 128 << 10;

/// Recent sequential readers of a layer.
#[derive(Debug)]
pub(crate) struct Streams {
    streams: Mutex<VecDeque<Stream>>,
    window_max: u64,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// Where it has read to.
    end: u64,
    /// Bytes that it has read.
    read: u64,
    /// What was asked to be fetched.
    ahead: u64,
}

/// What a reader who goes through a layer in order will probably read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ahead {
    /// To be fetched now.
    pub(crate) window: Range<u64>,
    /// What follows: where others read the same, each may fetch a part of it for all.
    pub(crate) stretch: Range<u64>,
}

/// How many windows follow the first. What a node of a company fetches for the others is so known to them before they need it: they
/// hear of it after 50 ms, and a window takes 17 ms on a link of 1 Gbit/s.
const STRETCH: u64 = 7;

impl Streams {
    /// Reads at most `window_max` bytes ahead of a reader; 0: not at all.
    pub(crate) fn new(window_max: u64) -> Self {
        Self { streams: Mutex::default(), window_max }
    }

    /// Whether nothing is to be fetched but what is read.
    pub(crate) const fn is_off(&self) -> bool {
        self.window_max == 0
    }

    /// Somebody reads `range`: what should be fetched ahead, if anything.
    pub(crate) fn observe(&self, range: &Range<u64>) -> Option<Ahead> {
        if self.is_off() {
            return None;
        }
        let mut streams = self.streams.lock();
        let continued = streams.iter().position(|stream| {
            (stream.end.saturating_sub(SLACK_BEHIND)..=stream.end + SLACK_BEYOND).contains(&range.start)
        });
        let Some(at) = continued else {
            streams.truncate(STREAMS_MAX - 1);
            streams.push_front(Stream { end: range.end, read: range.end - range.start, ahead: range.end });
            return None;
        };
        let mut stream = streams.remove(at)?;
        if range.end > stream.end {
            stream.read += range.end - stream.end.max(range.start);
            stream.end = range.end;
        }
        // Half of what was read in order: at most a third of what comes to a node alone is in vain, however soon the reader turns away. Starting
        // Python with numpy, scipy and pandas so takes 41 MB over the wire; with a window that starts at 256 KiB and doubles with each
        // read up to 2 MiB it took 51, and was not faster.
        let window = (stream.read / 2).min(self.window_max);
        let from = stream.ahead.max(stream.end);
        // In halves of the window, so that runs are long.
        let ahead = (window >= WINDOW_MIN && from < stream.end + window / 2).then_some(from..stream.end + window);
        if let Some(ahead) = &ahead {
            stream.ahead = ahead.end;
        }
        streams.push_front(stream);
        ahead.map(|ahead| Ahead { stretch: ahead.end..ahead.end + window * STRETCH, window: ahead })
    }
}

/// What is fetched beyond chunks that a reader waits for: the faults of a mapped library are in no order, but close to each other.
const BEYOND: u64 = 256 << 10;

/// Where much of the surroundings is here, all of the unit of this size around the chunks is fetched with them.
const UNIT: u64 = 512 << 10;

/// How far the surroundings of a chunk reach to each side.
const SURROUNDINGS: u64 = 2 << 20;

/// The chunks that should come with `chunks`, for which a reader is about to wait; `here` counts those of a run that are here.
///
/// Each wait is a round trip. Of the reads of a start of PyTorch (of Python with numpy, scipy and pandas) 875 (304) have to wait with this
/// rule, 2104 (699) with none, and 15 % more chunks come; units of 512 KiB for all would be 735 (245) for 24 % (30 %) more.
pub(crate) fn around(chunks: &Range<u32>, geometry: Geometry, here: impl Fn(Range<u32>) -> u32) -> Range<u32> {
    let count = |bytes: u64| u32::try_from(bytes >> geometry.chunk_log2()).unwrap_or(u32::MAX);
    let (first, end) = (chunks.start, chunks.end.max(chunks.start));
    let reach = count(SURROUNDINGS);
    let before = first.saturating_sub(reach)..first;
    let behind = end..end.saturating_add(reach).min(geometry.chunk_count()).max(end);
    let unit = count(UNIT).max(1);
    let wanted = if u64::from(here(before) + here(behind)) * 8 >= u64::from(reach) * 2 * 3 && reach > 0 {
        first / unit * unit..end.div_ceil(unit).saturating_mul(unit)
    } else {
        first..end.saturating_add(count(BEYOND))
    };
    wanted.start..wanted.end.min(geometry.chunk_count()).max(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_comes_with_a_chunk_where_much_is_here() {
        let geometry = Geometry::new(100 << 17, 17).expect("a geometry");
        assert_eq!(around(&(9..10), geometry, |_| 0), 9..12);
        assert_eq!(around(&(9..11), geometry, |_| 5), 9..13);
        assert_eq!(around(&(9..11), geometry, |_| 6), 8..12);
        assert_eq!(around(&(98..99), geometry, |run| run.end - run.start), 96..100);
        assert_eq!(around(&(99..100), geometry, |_| 0), 99..100);
        // Chunks of 16 MiB are more than any of it.
        let large = Geometry::new(100 << 24, 24).expect("a geometry");
        assert_eq!(around(&(9..10), large, |_| 0), 9..10);
    }

    fn read(range: Range<u64>) -> Waiting {
        let chunks = (range.start / 10) as u32..range.end.div_ceil(10) as u32;
        Waiting::new(range, chunks, Instant::now(), Box::new(|_| {}))
    }

    fn changed(waits: &Waits) -> Vec<(u32, bool)> {
        waits.take_changes().into_iter().map(|(chunk, since)| (chunk, since.is_some())).collect()
    }

    #[test]
    fn one_wait_for_each_chunk() {
        let waits = Waits::new(100);
        let Enter::Waits(a) = waits.enter(read(5..25), |chunk| chunk == 1) else { panic!() };
        let Enter::Waits(_) = waits.enter(read(0..10), |_| false) else { panic!() };
        assert_eq!(changed(&waits), [(0, true), (2, true)]);
        assert_eq!(waits.arrived(0, None, |_| false).len(), 1);
        assert_eq!(waits.arrived(1, None, |_| false).len(), 0);
        assert!(waits.cancel(a, |_| false).0.is_some());
        assert!(waits.cancel(a, |_| false).0.is_none());
        assert_eq!(changed(&waits), [(2, false)]);
        assert_eq!((waits.read_count(), waits.waiting_since(2)), (0, None));
    }

    #[test]
    fn beyond_the_bound_reads_wait_in_line() {
        let waits = Waits::new(2);
        for n in 0..5 {
            assert!(matches!(waits.enter(read(n * 10..n * 10 + 10), |_| false), Enter::Waits(_)));
        }
        assert_eq!(changed(&waits), [(0, true), (1, true)]);
        // One leaves, so the next in line enters; the one behind it is here by now.
        assert_eq!(waits.arrived(0, None, |chunk| chunk == 2).len(), 2);
        assert_eq!(changed(&waits), [(3, true)]);
        let (failed, ready) = waits.failed(1, |_| false);
        assert_eq!((failed.len(), ready.len()), (1, 0));
        assert_eq!(waits.close(ReadError::Removed).len(), 2);
        assert!(matches!(waits.enter(read(0..1), |_| true), Enter::Closed(_, ReadError::Removed)));
    }

    #[test]
    fn a_failed_chunk_takes_its_reads_from_other_chunks() {
        let waits = Waits::new(10);
        assert!(matches!(waits.enter(read(0..30), |_| false), Enter::Waits(_)));
        changed(&waits);
        assert_eq!(waits.failed(1, |_| false).0.len(), 1);
        assert_eq!(changed(&waits), [(0, false), (1, false), (2, false)]);
    }

    #[test]
    fn readahead_follows_sequential_readers_only() {
        let streams = Streams::new(1 << 20);
        let k128 = 128 << 10;
        assert_eq!(streams.observe(&(0..k128)), None);
        let first = Ahead { window: 2 * k128..3 * k128, stretch: 3 * k128..10 * k128 };
        assert_eq!(streams.observe(&(k128..2 * k128)), Some(first));
        let mut ahead = 3 * k128;
        for n in 2..40 {
            if let Some(Ahead { window, stretch }) = streams.observe(&(n * k128..(n + 1) * k128)) {
                assert_eq!((window.start, stretch.start), (ahead, window.end));
                ahead = window.end;
            }
            let read = (n + 1) * k128;
            assert!(ahead <= read + (read / 2).min(1 << 20));
            assert!(ahead >= read + (read / 4).min(512 << 10));
        }
        for n in 0..20 {
            assert_eq!(streams.observe(&(n * (9 << 20) + (1 << 30)..n * (9 << 20) + (1 << 30) + 4096)), None);
        }
    }

    #[test]
    fn readahead_stops_with_its_option() {
        let streams = Streams::new(0);
        assert_eq!(streams.observe(&(0..1 << 20)), None);
        assert_eq!(streams.observe(&(1 << 20..2 << 20)), None);
    }
}
