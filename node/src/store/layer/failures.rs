//! Which chunks of a layer come wrong, or are damaged on the disk, again and again.
//!
//! One wrong answer says something about who gave it, and one damaged chunk something about a crash. The same chunk so often
//! says that the layer cannot be had here as it is, whoever is to blame: the index, all who give the blob, or this disk.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::store::backend::{Backend, read_file};

/// So often the same chunk must fail with no right one in between. Sources are asked again within two seconds, so that something
/// that passes is over before; a chunk that is damaged once was hit by a crash, and twice by two.
pub(crate) const FAILURES_MAX: u32 = 3;

/// Most chunks whose failures are counted: enough to tell that a layer fails.
const CHUNKS_MAX: usize = 256;

/// Holds the cause, where there is one.
pub(super) const FAILING: &str = "failing";

/// Why a layer fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Seeders and registries give something else for this chunk.
    Wrong(u32),
    /// This chunk does not stay on the disk as it was written.
    Damaged(u32),
}

/// What became of a layer's quarantine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// It began.
    Began(Cause),
    /// It ended.
    Ended,
}

/// The failures of one layer.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    counts: Mutex<Counts>,
    /// Whether there are any, which is rare.
    has_any: AtomicBool,
    is_damaged: AtomicBool,
}

#[derive(Debug, Default)]
struct Counts {
    wrong: BTreeMap<u32, u32>,
    damaged: BTreeMap<u32, u32>,
    cause: Option<Cause>,
}

impl Cause {
    /// The chunk.
    pub(crate) const fn chunk(self) -> u32 {
        match self {
            Self::Wrong(chunk) | Self::Damaged(chunk) => chunk,
        }
    }

    /// As the file has it.
    pub(super) fn encode(self) -> String {
        match self {
            Self::Wrong(chunk) => format!("wrong {chunk}\n"),
            Self::Damaged(chunk) => format!("damaged {chunk}\n"),
        }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (kind, chunk) = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?.split_once(' ')?;
        let chunk = chunk.parse().ok()?;
        match kind {
            "wrong" => Some(Self::Wrong(chunk)),
            "damaged" => Some(Self::Damaged(chunk)),
            _ => None,
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wrong(chunk) => write!(
                f,
                "chunk {chunk} came wrong {FAILURES_MAX} times from seeders or the registry; it is asked for until it comes right"
            ),
            Self::Damaged(chunk) => write!(
                f,
                "chunk {chunk} was damaged on this disk {FAILURES_MAX} times after it was fetched; look after the disk"
            ),
        }
    }
}

impl Failures {
    /// Those that an earlier process left in `directory`, of a layer of so many chunks. A file that cannot be right says nothing: what
    /// fails is found again.
    pub(super) fn open(backend: &dyn Backend, directory: &Path, chunk_count: u32) -> Self {
        let cause = read_file(backend, &directory.join(FAILING), 64).ok().and_then(|bytes| Cause::decode(&bytes));
        let cause = cause.filter(|cause| cause.chunk() < chunk_count);
        let mut counts = Counts { cause, ..Counts::default() };
        match cause {
            Some(Cause::Wrong(chunk)) => counts.wrong.insert(chunk, FAILURES_MAX),
            Some(Cause::Damaged(chunk)) => counts.damaged.insert(chunk, FAILURES_MAX),
            None => None,
        };
        let failures = Self::default();
        failures.has_any.store(cause.is_some(), Ordering::Release);
        failures.is_damaged.store(matches!(cause, Some(Cause::Damaged(_))), Ordering::Release);
        *failures.counts.lock() = counts;
        failures
    }

    /// Why the layer fails, if it does.
    pub(crate) fn cause(&self) -> Option<Cause> {
        if self.has_any.load(Ordering::Acquire) { self.counts.lock().cause } else { None }
    }

    /// Whether what was written is to be compared before each use.
    pub(super) fn is_damaged(&self) -> bool {
        self.is_damaged.load(Ordering::Acquire)
    }

    /// Seeder or registry gave something else for `chunk`.
    pub(super) fn note_wrong(&self, chunk: u32) {
        self.change(|counts| count(&mut counts.wrong, chunk));
    }

    /// `chunk` is not on the disk as it was written.
    pub(super) fn note_damaged(&self, chunk: u32) {
        self.change(|counts| count(&mut counts.damaged, chunk));
    }

    /// `chunk` came right.
    pub(super) fn note_right(&self, chunk: u32) {
        if self.has_any.load(Ordering::Acquire) {
            self.change(|counts| counts.wrong.retain(|wrong, _| *wrong != chunk));
        }
    }

    /// `chunk` is on the disk as it was written, for some time.
    pub(super) fn note_sound(&self, chunk: u32) {
        self.change(|counts| {
            if let Some(count) = counts.damaged.get_mut(&chunk) {
                *count -= 1;
            }
            counts.damaged.retain(|_, count| *count > 0);
        });
    }

    /// What follows from all that was noted; `None`: nothing new.
    pub(super) fn judge(&self) -> Option<Change> {
        if !self.has_any.load(Ordering::Acquire) {
            return None;
        }
        let mut counts = self.counts.lock();
        let change = counts.judge()?;
        self.is_damaged.store(matches!(counts.cause, Some(Cause::Damaged(_))), Ordering::Release);
        Some(change)
    }

    fn change(&self, change: impl FnOnce(&mut Counts)) {
        let mut counts = self.counts.lock();
        change(&mut counts);
        let has_any = counts.cause.is_some() || !counts.wrong.is_empty() || !counts.damaged.is_empty();
        self.has_any.store(has_any, Ordering::Release);
    }
}

impl Counts {
    fn judge(&mut self) -> Option<Change> {
        let counts = self;
        let stands = match counts.cause {
            Some(Cause::Wrong(chunk)) => counts.wrong.contains_key(&chunk),
            // It has to be sound as often as it failed.
            Some(Cause::Damaged(chunk)) => counts.damaged.contains_key(&chunk),
            None => false,
        };
        if stands {
            return None;
        }
        let worst = |chunks: &BTreeMap<u32, u32>| {
            chunks.iter().find(|(_, count)| **count >= FAILURES_MAX).map(|(chunk, _)| *chunk)
        };
        let cause = worst(&counts.damaged).map(Cause::Damaged).or_else(|| worst(&counts.wrong).map(Cause::Wrong));
        let before = std::mem::replace(&mut counts.cause, cause);
        match (before, cause) {
            (_, Some(cause)) => Some(Change::Began(cause)),
            (Some(_), None) => Some(Change::Ended),
            (None, None) => None,
        }
    }
}

fn count(chunks: &mut BTreeMap<u32, u32>, chunk: u32) {
    if chunks.len() < CHUNKS_MAX || chunks.contains_key(&chunk) {
        let count = chunks.entry(chunk).or_default();
        *count = FAILURES_MAX.min(*count + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_must_fail_again_and_again() {
        let failures = Failures::default();
        failures.note_wrong(1);
        failures.note_wrong(2);
        failures.note_wrong(1);
        assert_eq!((failures.judge(), failures.cause()), (None, None));
        // A right one in between begins it anew.
        failures.note_right(1);
        failures.note_wrong(1);
        failures.note_wrong(1);
        assert_eq!(failures.judge(), None);
        failures.note_wrong(1);
        assert_eq!(failures.judge(), Some(Change::Began(Cause::Wrong(1))));
        assert_eq!((failures.judge(), failures.cause()), (None, Some(Cause::Wrong(1))));
        failures.note_right(2);
        assert_eq!(failures.judge(), None);
        failures.note_right(1);
        assert_eq!((failures.judge(), failures.cause()), (Some(Change::Ended), None));
    }

    #[test]
    fn one_failing_chunk_after_the_other_is_one_quarantine() {
        let failures = Failures::default();
        (0..FAILURES_MAX).for_each(|_| failures.note_damaged(7));
        (0..FAILURES_MAX + 5).for_each(|_| failures.note_wrong(3));
        assert_eq!(failures.judge(), Some(Change::Began(Cause::Damaged(7))));
        assert!(failures.is_damaged());
        (1..FAILURES_MAX).for_each(|_| failures.note_sound(7));
        assert_eq!(failures.judge(), None, "it has to be sound as often as it failed");
        failures.note_sound(7);
        assert_eq!(failures.judge(), Some(Change::Began(Cause::Wrong(3))));
        assert!(!failures.is_damaged());
        failures.note_right(3);
        assert_eq!(failures.judge(), Some(Change::Ended));
    }

    #[test]
    fn what_is_counted_is_bounded() {
        let failures = Failures::default();
        (0..10_000).for_each(|chunk| failures.note_wrong(chunk));
        assert_eq!(failures.counts.lock().wrong.len(), CHUNKS_MAX);
    }

    #[test]
    fn the_file_is_strict() {
        for cause in [Cause::Wrong(7), Cause::Damaged(0)] {
            assert_eq!(Cause::decode(cause.encode().as_bytes()), Some(cause));
        }
        for odd in ["", "wrong 7", "wrong\n", "wrong x\n", "other 7\n", "wrong 7 8\n"] {
            assert_eq!(Cause::decode(odd.as_bytes()), None, "{odd:?}");
        }
    }
}
