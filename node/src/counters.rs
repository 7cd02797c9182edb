//! What the engine counts, per layer and in all.

use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::source::SourceKind;

/// Counters that many threads add to. A layer's also count for its node.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    node: Option<Arc<Counters>>,
    local: SourceCounters,
    peer: SourceCounters,
    seeder: SourceCounters,
    registry: SourceCounters,
    pub(crate) wrong_chunks: Counter,
    pub(crate) duplicate_chunks: Counter,
    pub(crate) unstored_chunks: Counter,
    pub(crate) rotten_chunks: Counter,
    pub(crate) expired_chunks: Counter,
    pub(crate) evicted_bytes: Counter,
    pub(crate) hedges: Counter,
    given_chunks: Counter,
    given_bytes: Counter,
    pub(crate) reads_here: Counter,
    pub(crate) reads_waited: Counter,
    pub(crate) reads_failed: Counter,
    pub(crate) wait_nanos: Counter,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

#[derive(Debug, Default)]
struct SourceCounters {
    fetches: Counter,
    chunks: Counter,
    plain_bytes: Counter,
    wire_bytes: Counter,
}

/// The values of the counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CounterValues {
    /// What came from this machine, where containerd's content store has the blob.
    pub local: SourceValues,
    /// What came from other nodes.
    pub peer: SourceValues,
    /// What came from seeders.
    pub seeder: SourceValues,
    /// What came from registries.
    pub registry: SourceValues,
    /// Chunks that were not what the index says.
    pub wrong_chunks: u64,
    /// Chunks that came though they were here.
    pub duplicate_chunks: u64,
    /// Chunks that the disk did not take.
    pub unstored_chunks: u64,
    /// Chunks that were lost or damaged on disk.
    pub rotten_chunks: u64,
    /// Chunks that did not come before their deadline while reads waited for them.
    pub expired_chunks: u64,
    /// Bytes that were evicted.
    pub evicted_bytes: u64,
    /// Fetches that asked a second source.
    pub hedges: u64,
    /// Chunks that went to other nodes.
    pub given_chunks: u64,
    /// Bytes of the network for them.
    pub given_bytes: u64,
    /// Reads that were answered from the store.
    pub reads_here: u64,
    /// Reads that waited for chunks and got them.
    pub reads_waited: u64,
    /// Reads that failed.
    pub reads_failed: u64,
    /// How long reads waited, in all.
    pub waited: Duration,
}

/// What came from one kind of source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceValues {
    /// Requests.
    pub fetches: u64,
    /// Right chunks that were not here.
    pub chunks: u64,
    /// Their plain bytes.
    pub plain_bytes: u64,
    /// Bytes of the network for all that came, also for wrong and known chunks; of this machine's blobs, the bytes that were
    /// read.
    pub wire_bytes: u64,
}

impl Counter {
    fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    /// Counters of a layer.
    pub(crate) fn of_layer(node: Arc<Counters>) -> Self {
        Self { node: Some(node), ..Self::default() }
    }

    /// Adds to a counter, here and in the node.
    pub(crate) fn add(&self, which: impl Fn(&Self) -> &Counter, n: u64) {
        which(self).add(n);
        if let Some(node) = &self.node {
            which(node).add(n);
        }
    }

    pub(crate) fn fetch(&self, kind: SourceKind) {
        self.add(|counters| &counters.source(kind).fetches, 1);
    }

    pub(crate) fn wire_bytes(&self, kind: SourceKind, bytes: usize) {
        self.add(|counters| &counters.source(kind).wire_bytes, bytes as u64);
    }

    pub(crate) fn chunk(&self, kind: SourceKind, plain_bytes: usize) {
        self.add(|counters| &counters.source(kind).chunks, 1);
        self.add(|counters| &counters.source(kind).plain_bytes, plain_bytes as u64);
    }

    /// Chunks go to another node.
    pub(crate) fn given(&self, chunks: u64, wire_bytes: usize) {
        self.add(|counters| &counters.given_chunks, chunks);
        self.add(|counters| &counters.given_bytes, wire_bytes as u64);
    }

    /// Adds what came from sources before there was a layer to count it for.
    pub(crate) fn take_over(&self, other: &Self) {
        for kind in [SourceKind::Local, SourceKind::Peer, SourceKind::Seeder, SourceKind::Registry] {
            let came = other.source(kind).values();
            self.add(|counters| &counters.source(kind).fetches, came.fetches);
            self.add(|counters| &counters.source(kind).chunks, came.chunks);
            self.add(|counters| &counters.source(kind).plain_bytes, came.plain_bytes);
            self.add(|counters| &counters.source(kind).wire_bytes, came.wire_bytes);
        }
    }

    pub(crate) fn waited(&self, time: Duration) {
        self.add(|counters| &counters.reads_waited, 1);
        self.add(|counters| &counters.wait_nanos, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(crate) fn values(&self) -> CounterValues {
        CounterValues {
            local: self.local.values(),
            peer: self.peer.values(),
            seeder: self.seeder.values(),
            registry: self.registry.values(),
            wrong_chunks: self.wrong_chunks.get(),
            duplicate_chunks: self.duplicate_chunks.get(),
            unstored_chunks: self.unstored_chunks.get(),
            rotten_chunks: self.rotten_chunks.get(),
            expired_chunks: self.expired_chunks.get(),
            evicted_bytes: self.evicted_bytes.get(),
            hedges: self.hedges.get(),
            given_chunks: self.given_chunks.get(),
            given_bytes: self.given_bytes.get(),
            reads_here: self.reads_here.get(),
            reads_waited: self.reads_waited.get(),
            reads_failed: self.reads_failed.get(),
            waited: Duration::from_nanos(self.wait_nanos.get()),
        }
    }

    fn source(&self, kind: SourceKind) -> &SourceCounters {
        match kind {
            SourceKind::Local => &self.local,
            SourceKind::Peer => &self.peer,
            SourceKind::Seeder => &self.seeder,
            SourceKind::Registry => &self.registry,
        }
    }
}

impl SourceCounters {
    fn values(&self) -> SourceValues {
        SourceValues {
            fetches: self.fetches.get(),
            chunks: self.chunks.get(),
            plain_bytes: self.plain_bytes.get(),
            wire_bytes: self.wire_bytes.get(),
        }
    }
}

impl CounterValues {
    /// [`SourceValues::wire_bytes`] of each kind of source, nearest first.
    pub fn wire_bytes(&self) -> [(SourceKind, u64); 4] {
        [SourceKind::Local, SourceKind::Peer, SourceKind::Seeder, SourceKind::Registry]
            .map(|kind| (kind, self.source(kind).wire_bytes))
    }

    /// The part of one kind of source.
    pub fn source(&self, kind: SourceKind) -> &SourceValues {
        match kind {
            SourceKind::Local => &self.local,
            SourceKind::Peer => &self.peer,
            SourceKind::Seeder => &self.seeder,
            SourceKind::Registry => &self.registry,
        }
    }
}

impl AddAssign for SourceValues {
    fn add_assign(&mut self, other: Self) {
        self.fetches += other.fetches;
        self.chunks += other.chunks;
        self.plain_bytes += other.plain_bytes;
        self.wire_bytes += other.wire_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_counts_for_its_node() {
        let node = Arc::new(Counters::default());
        let (a, b) = (Counters::of_layer(node.clone()), Counters::of_layer(node.clone()));
        a.chunk(SourceKind::Seeder, 10);
        b.chunk(SourceKind::Seeder, 5);
        b.waited(Duration::from_millis(3));
        assert_eq!(a.values().seeder.plain_bytes, 10);
        assert_eq!(node.values().source(SourceKind::Seeder).plain_bytes, 15);
        assert_eq!((node.values().reads_waited, node.values().waited), (1, Duration::from_millis(3)));
    }
}
