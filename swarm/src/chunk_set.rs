//! A set of chunks of one layer, one bit each.

use std::ops::Range;

/// Chunks below a length that is fixed at the beginning. What is at or above it is never a member.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkSet {
    words: Vec<u64>,
    len: u32,
    count: u32,
}

impl ChunkSet {
    /// Without members, for chunks `0..len`.
    pub fn new(len: u32) -> Self {
        Self { words: vec![0; len.div_ceil(64) as usize], len, count: 0 }
    }

    /// The chunks that it can hold are below this.
    pub fn capacity(&self) -> u32 {
        self.len
    }

    /// How many chunks are in it.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// No chunk is in it.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Every chunk is in it.
    pub fn is_full(&self) -> bool {
        self.count == self.len
    }

    /// Whether `chunk` is in it.
    pub fn contains(&self, chunk: u32) -> bool {
        self.word(chunk / 64) & (1 << (chunk % 64)) != 0
    }

    /// Puts a chunk in; `false` where it was in or is out of range.
    pub fn insert(&mut self, chunk: u32) -> bool {
        let bit = 1 << (chunk % 64);
        match self.words.get_mut((chunk / 64) as usize) {
            Some(word) if chunk < self.len && *word & bit == 0 => {
                *word |= bit;
                self.count += 1;
                true
            }
            _ => false,
        }
    }

    /// Takes a chunk out; `false` where it was not in.
    pub fn remove(&mut self, chunk: u32) -> bool {
        let bit = 1 << (chunk % 64);
        match self.words.get_mut((chunk / 64) as usize) {
            Some(word) if *word & bit != 0 => {
                *word &= !bit;
                self.count -= 1;
                true
            }
            _ => false,
        }
    }

    /// Puts the chunks of a run in; what is out of range is left out.
    pub fn insert_run(&mut self, run: Range<u32>) {
        let mut chunk = run.start;
        let end = run.end.min(self.len);
        while chunk < end {
            let last = (chunk | 63).min(end - 1);
            let mask = (u64::MAX >> (63 - (last - chunk))) << (chunk % 64);
            if let Some(word) = self.words.get_mut((chunk / 64) as usize) {
                self.count += (mask & !*word).count_ones();
                *word |= mask;
            }
            chunk = last + 1;
        }
    }

    /// Takes all chunks out.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.count = 0;
    }

    /// Puts in what is in `other`.
    pub fn unite(&mut self, other: &Self) {
        self.count = 0;
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
        self.count = self.words.iter().map(|word| word.count_ones()).sum();
    }

    /// The first member at or above `from`.
    pub fn next(&self, from: u32) -> Option<u32> {
        first(self.words_at(from).iter().copied(), from, self.len)
    }

    /// The last member.
    pub(crate) fn last(&self) -> Option<u32> {
        let at = self.words.iter().rposition(|word| *word != 0)?;
        Some(at as u32 * 64 + 63 - self.word(at as u32).leading_zeros())
    }

    /// The members as runs, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u32>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = self.next(from)?;
            let end = first(self.words_at(start).iter().map(|word| !word), start, self.len).unwrap_or(self.len);
            from = end;
            Some(start..end)
        })
    }

    /// The first chunk at or above `from` and below `end` that is in both.
    pub(crate) fn next_in_both(&self, other: &Self, from: u32, end: u32) -> Option<u32> {
        let words = self.words_at(from).iter().zip(other.words_at(from));
        first(words.map(|(word, other)| word & other), from, end.min(self.len))
    }

    /// The last chunk below `end` that is in both.
    pub(crate) fn last_in_both(&self, other: &Self, end: u32) -> Option<u32> {
        let words = end.min(self.len).div_ceil(64) as usize;
        let pairs = self.words.iter().zip(&other.words).take(words);
        let (at, both) = pairs.map(|(word, other)| word & other).enumerate().rev().find(|(_, both)| *both != 0)?;
        Some(at as u32 * 64 + 63 - both.leading_zeros())
    }

    /// The first chunk at or above `from` and below `end` that is in this set and not in `other`.
    pub(crate) fn next_not_in(&self, other: &Self, from: u32, end: u32) -> Option<u32> {
        let words = self.words_at(from).iter().zip(other.words_at(from));
        first(words.map(|(word, other)| word & !other), from, end.min(self.len))
    }

    /// The chunks of `range` that are in this set and not in `other`, in order. Both hold as many.
    pub(crate) fn in_only(&self, other: &Self, range: Range<u32>) -> impl Iterator<Item = u32> {
        let mut from = range.start;
        std::iter::from_fn(move || {
            let chunk = self.next_not_in(other, from, range.end)?;
            from = chunk + 1;
            Some(chunk)
        })
    }

    /// The words from that with `chunk` on.
    fn words_at(&self, chunk: u32) -> &[u64] {
        self.words.get((chunk / 64) as usize..).unwrap_or_default()
    }

    fn word(&self, at: u32) -> u64 {
        self.words.get(at as usize).copied().unwrap_or(0)
    }
}

/// The first chunk at or above `from` and below `end` in a set whose words these are from that with `from` on.
fn first(words: impl Iterator<Item = u64>, from: u32, end: u32) -> Option<u32> {
    if from >= end {
        return None;
    }
    let mut mask = u64::MAX << (from % 64);
    for (at, word) in (from / 64..end.div_ceil(64)).zip(words) {
        let found = word & mask;
        if found != 0 {
            let chunk = at * 64 + found.trailing_zeros();
            return (chunk < end).then_some(chunk);
        }
        mask = u64::MAX;
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_a_set(len in 1..300u32, ops in prop::collection::vec((0..3u8, 0..320u32, 0..200u32), 0..40)) {
            let (mut set, mut model) = (ChunkSet::new(len), BTreeSet::new());
            for (op, chunk, more) in ops {
                match op {
                    0 => prop_assert_eq!(set.insert(chunk), chunk < len && model.insert(chunk)),
                    1 => prop_assert_eq!(set.remove(chunk), model.remove(&chunk)),
                    _ => {
                        set.insert_run(chunk..chunk + more);
                        model.extend(chunk.min(len)..(chunk + more).min(len));
                    }
                }
            }
            prop_assert_eq!(set.count() as usize, model.len());
            prop_assert_eq!(set.runs().flatten().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.last(), model.last().copied());
            let mut odd = ChunkSet::new(len);
            (0..len).filter(|chunk| chunk % 2 == 1).for_each(|chunk| { odd.insert(chunk); });
            for from in 0..len {
                prop_assert_eq!(set.next(from), model.range(from..).next().copied());
                let both = model.range(from..).find(|chunk| *chunk % 2 == 1).copied();
                prop_assert_eq!(set.next_in_both(&odd, from, len), both);
                let last = model.iter().rev().find(|chunk| *chunk % 2 == 1).copied();
                prop_assert_eq!(set.last_in_both(&odd, len), last);
                let not = model.range(from..).find(|chunk| *chunk % 2 == 0).copied();
                prop_assert_eq!(set.next_not_in(&odd, from, len), not);
            }
        }
    }
}
