//! The books of one layer: which chunks are wanted, how urgently, and which fetches may bring them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use layer::{ChunkIndex, Geometry};

use crate::chunk_set::ChunkSet;
use crate::mesh::Mesh;
use crate::peer::{PeerId, Zone};
use crate::swarm::{FetchId, Priority, SourceId};

/// The wants of one layer.
#[derive(Debug)]
pub(crate) struct Book {
    pub(crate) geometry: Geometry,
    pub(crate) sources: BTreeMap<SourceId, Offer>,
    pub(crate) mesh: Option<Box<Mesh>>,
    /// Its transfers, with the chunks that come with each.
    pub(crate) fetches: BTreeMap<FetchId, Range<u32>>,
    wants: BTreeMap<u32, Want>,
    /// How many of them are wanted in the background.
    background: u32,
    /// Chunks that wait for a fetch, by priority in the order in which they were wanted.
    queues: [BTreeSet<(u64, u32)>; 3],
    /// The same as sets, in a mesh.
    queued_sets: [ChunkSet; 3],
    /// Chunks that failed at their deadline.
    pub(crate) failed: BTreeMap<u32, Failed>,
}

/// What a source has of the layer.
#[derive(Debug)]
pub(crate) struct Offer {
    /// The device ranges that it moves whole, in order; empty where any run costs just its own bytes.
    pub(crate) units: Vec<Range<u64>>,
    /// A neighbour's chunks, as it told; `None`: everything.
    pub(crate) has: Option<ChunkSet>,
    /// A neighbour's number in the mesh, and when it last told that something came.
    pub(crate) peer: PeerId,
    pub(crate) heard: Duration,
    /// A neighbour's zone, where it is another one.
    pub(crate) far: Option<Zone>,
    /// What a neighbour is about to have from the registry, and when it said so.
    pub(crate) coming: (Duration, Vec<Range<u32>>),
    /// A seeder said so of chunks of this layer, since it gave one last: for the first time, and for the last.
    pub(crate) missing: Option<(Duration, Duration)>,
}

/// A piece of a layer that one node fetches for all.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) number: u32,
    pub(crate) chunks: Range<u32>,
}

/// A wanted chunk.
#[derive(Debug, Default)]
pub(crate) struct Want {
    wanted: [bool; 3],
    /// Place in the queues; kept when a fetch fails.
    order: u64,
    pub(crate) place: Place,
    /// When it was first wanted.
    pub(crate) since: Duration,
    pub(crate) deadline: Option<Duration>,
    /// The deadline that it had before it was put off for a stream.
    pub(crate) deadline_before: Option<Duration>,
    pub(crate) unpark_at: Option<Duration>,
    pub(crate) expire_at: Option<Duration>,
    /// What each source's last failure was.
    pub(crate) reasons: BTreeMap<SourceId, Arc<str>>,
    /// Sources that are not to be asked before a time.
    pub(crate) avoid: BTreeMap<SourceId, Avoid>,
}

/// Where a wanted chunk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Place {
    /// Just made.
    #[default]
    Nowhere,
    /// In the queue of that priority.
    Queued(Priority),
    /// No source can be asked now.
    Parked,
    /// A fetch may bring it.
    Carried,
}

/// A source that did not have a chunk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avoid {
    pub(crate) until: Duration,
    pub(crate) attempts: u32,
}

/// A chunk that failed at its deadline.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) until: Option<Duration>,
    pub(crate) reasons: Arc<[crate::swarm::Reason]>,
}

/// A transfer that runs.
#[derive(Debug)]
pub(crate) struct Fetch {
    pub(crate) layer: crate::swarm::LayerKey,
    pub(crate) source: SourceId,
    pub(crate) run: Range<u32>,
    /// The chunks that will come with it, `run` included.
    pub(crate) cover: Range<u32>,
    pub(crate) got: BTreeSet<u32>,
    pub(crate) priority: Priority,
    /// What its source was told.
    pub(crate) asked_as: Priority,
    /// What it counts for at its source.
    pub(crate) bytes: u64,
    pub(crate) started: Duration,
    pub(crate) last_progress: Duration,
    pub(crate) hedge_at: Option<Duration>,
    /// When its seeder was asked for a sign of life, since it last gave a chunk of it.
    pub(crate) asked_at: Option<Duration>,
    /// It moves a whole unit that is a stream ([`Config::stream_bytes_min`](crate::Config::stream_bytes_min)).
    pub(crate) is_stream: bool,
    /// It counts for what is in flight in meshes.
    pub(crate) in_mesh: bool,
    /// It asks a second time for what another fetch was late with.
    pub(crate) is_hedge: bool,
}

impl Fetch {
    pub(crate) fn carries(&self, chunk: u32) -> bool {
        self.cover.contains(&chunk) && !self.got.contains(&chunk)
    }
}

impl Offer {
    pub(crate) fn all(units: Vec<Range<u64>>) -> Self {
        Self {
            units,
            has: None,
            peer: PeerId(0),
            heard: Duration::ZERO,
            far: None,
            coming: Default::default(),
            missing: None,
        }
    }

    pub(crate) fn has(&self, chunk: u32) -> bool {
        self.has.as_ref().is_none_or(|has| has.contains(chunk))
    }
}

impl Want {
    pub(crate) fn wants(&self, priority: Priority) -> bool {
        let [demand, readahead, background] = self.wanted;
        priority.choose(demand, readahead, background)
    }

    /// The most urgent priority that it is wanted with.
    pub(crate) fn priority(&self) -> Option<Priority> {
        Priority::ALL.into_iter().find(|priority| self.wants(*priority))
    }
}

impl Book {
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            sources: BTreeMap::new(),
            mesh: None,
            fetches: BTreeMap::new(),
            wants: BTreeMap::new(),
            background: 0,
            queues: Default::default(),
            queued_sets: Default::default(),
            failed: BTreeMap::new(),
        }
    }

    /// Transfers with `chunk` among what comes with them; it may have come.
    pub(crate) fn fetches_over(&self, chunk: u32) -> impl Iterator<Item = FetchId> {
        self.fetches.iter().filter(move |(_, cover)| cover.contains(&chunk)).map(|(id, _)| *id)
    }

    /// Nothing is wanted.
    pub(crate) fn is_idle(&self) -> bool {
        self.wants.is_empty()
    }

    pub(crate) fn want(&self, chunk: u32) -> Option<&Want> {
        self.wants.get(&chunk)
    }

    pub(crate) fn want_mut(&mut self, chunk: u32) -> Option<&mut Want> {
        self.wants.get_mut(&chunk)
    }

    pub(crate) fn want_or_new(&mut self, chunk: u32, order: u64, since: Duration) -> &mut Want {
        self.wants.entry(chunk).or_insert_with(|| Want { order, since, ..Want::default() })
    }

    pub(crate) fn wants(&self, chunks: Range<u32>) -> impl Iterator<Item = (u32, &Want)> {
        self.wants.range(chunks).map(|(chunk, want)| (*chunk, want))
    }

    /// A want that is there begins or ceases to be wanted with `priority`.
    pub(crate) fn set_wanted(&mut self, chunk: u32, priority: Priority, wanted: bool) {
        let Some(want) = self.wants.get_mut(&chunk) else { return };
        let [demand, readahead, background] = &mut want.wanted;
        let was = std::mem::replace(priority.choose(demand, readahead, background), wanted);
        if priority == Priority::Background && was != wanted {
            self.background = if wanted { self.background + 1 } else { self.background - 1 };
        }
    }

    /// Bytes of the chunks that are wanted in the background.
    pub(crate) fn background_bytes(&self) -> u64 {
        u64::from(self.background) * self.geometry.chunk_size()
    }

    /// Forgets a want and takes it out of its queue.
    pub(crate) fn remove_want(&mut self, chunk: u32) -> Option<Want> {
        self.place(chunk, Place::Nowhere);
        if self.wants.get(&chunk)?.wants(Priority::Background) {
            self.background -= 1;
        }
        self.wants.remove(&chunk)
    }

    /// Moves a wanted chunk to another place, keeping the queues true.
    pub(crate) fn place(&mut self, chunk: u32, place: Place) {
        let Some(want) = self.wants.get_mut(&chunk) else { return };
        if want.place == place {
            return;
        }
        if let Place::Queued(priority) = want.place {
            queue(&mut self.queues, priority).remove(&(want.order, chunk));
            queued_set(&mut self.queued_sets, priority).remove(chunk);
        }
        if let Place::Queued(priority) = place {
            queue(&mut self.queues, priority).insert((want.order, chunk));
            queued_set(&mut self.queued_sets, priority).insert(chunk);
        }
        want.place = place;
    }

    /// Chunks queued with `priority`, the oldest want first, with the order of their wants.
    pub(crate) fn queued(
        &self,
        priority: Priority,
    ) -> std::iter::Copied<std::collections::btree_set::Iter<'_, (u64, u32)>> {
        let [demand, readahead, background] = &self.queues;
        priority.choose(demand, readahead, background).iter().copied()
    }

    /// Makes the layer one of a mesh.
    pub(crate) fn set_mesh(&mut self, mesh: Mesh) {
        self.mesh = Some(Box::new(mesh));
        self.queued_sets = std::array::from_fn(|_| ChunkSet::new(self.geometry.chunk_count()));
        for (queue, set) in self.queues.iter().zip(&mut self.queued_sets) {
            for (_, chunk) in queue {
                set.insert(*chunk);
            }
        }
    }

    /// Chunks queued with `priority`; only in a mesh.
    pub(crate) fn queued_set(&self, priority: Priority) -> &ChunkSet {
        let [demand, readahead, background] = &self.queued_sets;
        priority.choose(demand, readahead, background)
    }

    /// Whether `chunk` is wanted and waits for a fetch.
    pub(crate) fn is_queued(&self, chunk: u32) -> bool {
        self.wants.get(&chunk).is_some_and(|want| matches!(want.place, Place::Queued(_)))
    }

    /// Bytes of a run.
    pub(crate) fn bytes(&self, run: &Range<u32>) -> u64 {
        let start = self.geometry.range(ChunkIndex(run.start)).start;
        let end = self.geometry.range(ChunkIndex(run.end)).start;
        end.saturating_sub(start)
    }

    /// The chunks that come when `source` is asked for `run`: all that begin in a unit in which a chunk of the run begins.
    pub(crate) fn cover(&self, source: SourceId, run: &Range<u32>) -> Range<u32> {
        let begins = |unit: &Range<u64>| self.begin_in(unit);
        let ends = |chunk: u32| self.unit(source, chunk).map(begins);
        match (ends(run.start), ends(run.end.saturating_sub(1))) {
            (Some(first), Some(last)) => first.start.min(run.start)..last.end.max(run.end),
            _ => run.clone(),
        }
    }

    /// The piece of the layer with `chunk` in it, of those of about `bytes` in which it is shared out: whole units where `source`
    /// has them.
    pub(crate) fn block(&self, source: SourceId, chunk: u32, bytes: u64) -> Block {
        let units = self.sources.get(&source).map(|offer| offer.units.as_slice()).unwrap_or_default();
        let Some(unit) = self.unit_at(units, chunk) else {
            let chunks = u32::try_from(bytes >> self.geometry.chunk_log2()).unwrap_or(u32::MAX).max(1);
            let number = chunk / chunks;
            let (start, end) = (number * chunks, number.saturating_add(1).saturating_mul(chunks));
            return Block { number, chunks: start..end.min(self.geometry.chunk_count()) };
        };
        // By their mean size, so that it is about the same before a node knows the units and afterwards.
        let size = (self.geometry.device_size() / units.len() as u64).max(1);
        let count = usize::try_from(bytes.saturating_add(size / 2) / size).unwrap_or(usize::MAX).max(1);
        let first = unit - unit % count;
        let last = first.saturating_add(count).min(units.len()) - 1;
        let chunks = match (units.get(first), units.get(last)) {
            (Some(first), Some(last)) => self.begin_in(first).start..self.begin_in(last).end,
            _ => chunk..chunk.saturating_add(1),
        };
        Block { number: u32::try_from(first / count).unwrap_or(u32::MAX), chunks }
    }

    fn unit(&self, source: SourceId, chunk: u32) -> Option<&Range<u64>> {
        let units = self.sources.get(&source)?.units.as_slice();
        units.get(self.unit_at(units, chunk)?)
    }

    /// In which unit a chunk begins.
    fn unit_at(&self, units: &[Range<u64>], chunk: u32) -> Option<usize> {
        let start = self.geometry.range(ChunkIndex(chunk)).start;
        let at = units.partition_point(|unit| unit.end <= start);
        (at < units.len()).then_some(at)
    }

    /// The chunks that begin in a unit.
    fn begin_in(&self, unit: &Range<u64>) -> Range<u32> {
        let first_from = |offset: u64| {
            let chunk = offset.div_ceil(self.geometry.chunk_size());
            u32::try_from(chunk).unwrap_or(u32::MAX).min(self.geometry.chunk_count())
        };
        first_from(unit.start)..first_from(unit.end)
    }
}

fn queue(queues: &mut [BTreeSet<(u64, u32)>; 3], priority: Priority) -> &mut BTreeSet<(u64, u32)> {
    let [demand, readahead, background] = queues;
    priority.choose(demand, readahead, background)
}

fn queued_set(sets: &mut [ChunkSet; 3], priority: Priority) -> &mut ChunkSet {
    let [demand, readahead, background] = sets;
    priority.choose(demand, readahead, background)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_widen_a_run() {
        let mut book = Book::new(Geometry::new(10 * 4096 + 100, 12).unwrap());
        let (plain, units) = (SourceId(1), SourceId(2));
        book.sources.insert(plain, Offer::all(Vec::new()));
        book.sources.insert(units, Offer::all(vec![0..10_000, 10_000..30_000, 30_000..41_060]));
        assert_eq!(book.cover(plain, &(3..5)), 3..5);
        // Chunk 2 begins in the first unit and ends in the second.
        assert_eq!(book.cover(units, &(1..2)), 0..3);
        assert_eq!(book.cover(units, &(2..3)), 0..3);
        assert_eq!(book.cover(units, &(2..4)), 0..8);
        assert_eq!(book.cover(units, &(9..10)), 8..11);
        assert_eq!(book.bytes(&(9..11)), 4096 + 100);
    }

    #[test]
    fn blocks_are_whole_units() {
        let mut book = Book::new(Geometry::new(10 * 4096 + 100, 12).unwrap());
        let (plain, units) = (SourceId(1), SourceId(2));
        book.sources.insert(plain, Offer::all(Vec::new()));
        book.sources.insert(units, Offer::all(vec![0..10_000, 10_000..20_000, 20_000..30_000, 30_000..41_060]));
        let block = |source, chunk, bytes| {
            let Block { number, chunks } = book.block(source, chunk, bytes);
            (number, chunks)
        };
        assert_eq!(block(plain, 5, 3 * 4096), (1, 3..6));
        assert_eq!(block(plain, 10, 3 * 4096), (3, 9..11));
        assert_eq!([block(units, 0, 20_000), block(units, 4, 20_000)], [(0, 0..5), (0, 0..5)]);
        assert_eq!([block(units, 5, 20_000), block(units, 10, 20_000)], [(1, 5..11), (1, 5..11)]);
        assert_eq!(block(units, 3, 1), (1, 3..5));
    }

    #[test]
    fn queues_follow_places() {
        let mut book = Book::new(Geometry::new(10 * 4096, 12).unwrap());
        book.want_or_new(4, 1, Duration::ZERO);
        book.want_or_new(2, 2, Duration::ZERO);
        book.place(4, Place::Queued(Priority::Demand));
        book.place(2, Place::Queued(Priority::Demand));
        assert_eq!(book.queued(Priority::Demand).collect::<Vec<_>>(), [(1, 4), (2, 2)]);
        book.place(4, Place::Carried);
        book.remove_want(2);
        assert_eq!(book.queued(Priority::Demand).count(), 0);
        assert!(!book.is_queued(4));
    }
}
