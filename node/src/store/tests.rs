//! The store on a disk that crashes and lies: chunks may be forgotten, never invented.

mod evict;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::layer::index::{Compression, Index};
use ::layer::ingest::{Ingest, Options};
use ::layer::{ChunkIndex, Digest};
use proptest::prelude::*;

use super::memory::MemoryDisk;
use super::{Added, Change, Found, LayerParts, LayerStore, Proof, Store, StoreError};
use crate::config::CacheConfig;

const CHUNK: usize = 4096;

#[derive(Debug)]
pub(crate) struct Subject {
    device: Vec<u8>,
    index: Index,
}

impl Subject {
    pub(crate) fn new(file_len: usize, seed: u8) -> Self {
        let bytes: Vec<u8> = (0..file_len).map(|n| (n * 31 + n / 256 * 7) as u8 ^ seed).collect();
        let mut header = tar::Header::new_gnu();
        header.set_path("file").unwrap();
        header.set_size(file_len as u64);
        header.set_mode(0o644);
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append(&header, &bytes[..]).unwrap();
        let device = builder.into_inner().unwrap();
        let options = Options { chunk_log2: 12, ..Options::default() };
        let mut ingest = Ingest::new(Digest::of(&device), None, Some(Compression::None), options).unwrap();
        ingest.push(&device, &mut |_, _, _| {}).unwrap();
        let index = ingest.finish(&mut |_, _, _| {}).unwrap();
        Self { device, index }
    }

    pub(crate) fn parts(&self) -> LayerParts {
        LayerParts {
            header: self.index.header.clone(),
            signature: b"signed".to_vec(),
            entries: self.index.entries.clone(),
            chunk_digests: self.index.chunk_digests.clone(),
            spans: None,
        }
    }

    pub(crate) fn chunk(&self, chunk: u32) -> &[u8] {
        let start = chunk as usize * CHUNK;
        &self.device[start..(start + CHUNK).min(self.device.len())]
    }

    pub(crate) fn device(&self) -> &[u8] {
        &self.device
    }

    pub(crate) fn diff_id(&self) -> Digest {
        self.index.header.diff_id()
    }

    fn chunks(&self) -> u32 {
        self.index.header.geometry().chunk_count()
    }

    fn path(&self, name: &str) -> PathBuf {
        root().join("layers").join(self.index.header.diff_id().hex()).join(name)
    }

    /// Every chunk that the store gives must be right; gives how many it has.
    fn check(&self, layer: &LayerStore) -> usize {
        let mut here = 0;
        let mut out = Vec::new();
        for chunk in 0..self.chunks() {
            let range = layer.header().geometry().range(ChunkIndex(chunk));
            if layer.read(&range, &[], &mut out) {
                assert!(out == self.chunk(chunk), "chunk {chunk} is invented");
                here += 1;
            }
        }
        here
    }
}

fn root() -> &'static Path {
    Path::new("/store")
}

fn open(disk: &MemoryDisk, boot: &str) -> (Store, Found) {
    Store::open(Arc::new(disk.clone()), root(), boot, &CacheConfig::default()).unwrap()
}

fn create(store: &Store, subject: &Subject) -> LayerStore {
    store.place(store.prepare(&subject.parts()).unwrap()).unwrap()
}

#[test]
fn a_killed_process_forgets_only_what_was_not_flushed() {
    let subject = Subject::new(100_000, 1);
    let disk = MemoryDisk::default();
    let (store, _) = open(&disk, "a");
    let layer = create(&store, &subject);
    for chunk in 0..10 {
        assert!(matches!(layer.add(chunk, subject.chunk(chunk)), Added::Written));
    }
    assert!(matches!(layer.add(3, subject.chunk(3)), Added::Known));
    layer.flush().unwrap();
    layer.add(11, subject.chunk(11));
    let number = layer.number();
    drop((layer, store));
    let (_, found) = open(&disk, "a");
    assert!(!found.after_crash);
    assert_eq!(found.layers[0].number(), number);
    assert_eq!(subject.check(&found.layers[0]), 10);
}

#[test]
fn a_clean_end_is_believed_and_a_crash_of_the_machine_is_not() {
    let subject = Subject::new(50_000, 1);
    let disk = MemoryDisk::default();
    let (store, _) = open(&disk, "a");
    let layer = create(&store, &subject);
    for chunk in 0..subject.chunks() {
        layer.add(chunk, subject.chunk(chunk));
    }
    assert_eq!(layer.prove(&|| false).unwrap(), Proof::Proven);
    layer.close().unwrap();
    store.close().unwrap();
    drop((layer, store));

    let (store, found) = open(&disk, "b");
    assert!(found.layers[0].is_proven());
    // Rot that nobody could notice: clean, same bytes on record. A later crash makes it noticed.
    disk.flip(&subject.path("device"), 8 * 5000);
    drop((store, found));
    let (store, found) = open(&disk, "c");
    assert!(found.after_crash && found.layers[0].is_complete() && !found.layers[0].is_proven());
    drop((store, found));
    // The doubt outlives a further kill in the same boot.
    let (_, found) = open(&disk, "c");
    let layer = &found.layers[0];
    assert!(!found.after_crash && !layer.is_proven());
    assert_eq!(layer.prove(&|| false).unwrap(), Proof::Rotten(1));
    assert_eq!(subject.check(layer), subject.chunks() as usize - 1);
    layer.add(1, subject.chunk(1));
    assert_eq!(layer.prove(&|| true).unwrap(), Proof::Incomplete);
    assert_eq!(layer.prove(&|| false).unwrap(), Proof::Proven);
}

#[test]
fn a_disk_that_damages_a_chunk_again_and_again_takes_the_layer_out_of_service() {
    let subject = Subject::new(50_000, 1);
    let disk = MemoryDisk::default();
    let (store, _) = open(&disk, "a");
    let layer = create(&store, &subject);
    for chunk in 0..subject.chunks() {
        layer.add(chunk, subject.chunk(chunk));
    }
    for round in 0..3 {
        assert!(layer.judge().is_none(), "round {round}");
        disk.flip(&subject.path("device"), 8 * 5000);
        assert_eq!(layer.prove(&|| false).unwrap(), Proof::Rotten(1));
        layer.add(1, subject.chunk(1));
    }
    assert!(matches!(layer.judge(), Some(Change::Began(_))));
    let cause = layer.failing().unwrap();
    // Whatever is damaged by then, nothing wrong is read.
    disk.flip(&subject.path("device"), 8 * 9000);
    assert_eq!(subject.check(&layer), subject.chunks() as usize - 1);
    // What was compared is what is given, and not what the disk gives next.
    disk.set_worn(true);
    let mut out = Vec::new();
    assert!(layer.read(&(3 * CHUNK as u64 + 5..5 * CHUNK as u64 - 5), &[], &mut out));
    assert!(out == subject.device[3 * CHUNK + 5..5 * CHUNK - 5]);
    disk.set_worn(false);
    assert!(!layer.read(&(3 * CHUNK as u64 + 5..5 * CHUNK as u64 - 5), &[], &mut out));
    assert_eq!(layer.next_missing(3), Some(3..5), "both are known to be wrong at once");
    for chunk in [2, 3, 4] {
        layer.add(chunk, subject.chunk(chunk));
    }
    layer.close().unwrap();
    store.close().unwrap();
    drop((layer, store));

    let (_, found) = open(&disk, "b");
    let layer = &found.layers[0];
    assert_eq!(layer.failing(), Some(cause));
    for _ in 0..2 {
        assert!(layer.look_again(cause) && layer.judge().is_none());
    }
    assert!(layer.look_again(cause));
    assert!(matches!(layer.judge(), Some(Change::Ended)));
    assert_eq!(layer.failing(), None);
    layer.flush().unwrap();
    drop(found);
    let (_, found) = open(&disk, "b");
    assert_eq!(found.layers[0].failing(), None);
}

#[test]
fn who_still_has_a_replaced_layer_leaves_its_successor_alone() {
    let subject = Subject::new(50_000, 1);
    let disk = MemoryDisk::default();
    let (store, _) = open(&disk, "a");
    let old = create(&store, &subject);
    old.leave();
    let new = create(&store, &subject);
    for chunk in 0..subject.chunks() {
        new.add(chunk, subject.chunk(chunk));
    }
    new.close().unwrap();
    (0..3).for_each(|_| old.note_wrong(1));
    assert!(matches!(old.judge(), Some(Change::Began(_))));
    old.flush().unwrap();
    old.pin_anyway("somebody").unwrap();
    old.quarantine("it is wrong").unwrap();
    drop((old, new, store));
    let (_, found) = open(&disk, "a");
    let layer = &found.layers[0];
    assert_eq!((layer.quarantined(), layer.failing(), layer.is_pinned()), (None, None, false));
    assert_eq!(subject.check(layer), subject.chunks() as usize);
}

#[test]
fn a_full_disk_gives_chunks_from_memory() {
    let subject = Subject::new(300_000, 1);
    let disk = MemoryDisk::default();
    let (store, _) = open(&disk, "a");
    let layer = create(&store, &subject);
    layer.add(0, subject.chunk(0));
    disk.set_room(Some(100));
    assert!(matches!(layer.add(1, subject.chunk(1)), Added::Unstored(..)));
    let mut out = Vec::new();
    // A read over a stored and an unstored chunk.
    assert!(layer.read(&(100..8000), &[], &mut out));
    assert_eq!(out, subject.device[100..8000]);
    for chunk in 2..60 {
        layer.add(chunk, subject.chunk(chunk));
    }
    assert!(!layer.read(&(5000..6000), &[], &mut out), "memory is bounded");
    assert!(!layer.is_complete() && layer.bytes_here() == 4096);
    disk.set_room(None);
    for chunk in 0..subject.chunks() {
        layer.add(chunk, subject.chunk(chunk));
    }
    layer.flush().unwrap();
    assert_eq!(subject.check(&layer), subject.chunks() as usize);
}

#[test]
fn a_failed_sync_makes_chunks_missing() {
    let subject = Subject::new(50_000, 1);
    let disk = MemoryDisk::default();
    let (store, _) = open(&disk, "a");
    let layer = create(&store, &subject);
    layer.add(0, subject.chunk(0));
    disk.set_broken(true);
    assert!(matches!(layer.flush(), Err(StoreError::Io { .. })));
    assert_eq!(subject.check(&layer), 0);
    disk.set_broken(false);
    layer.add(0, subject.chunk(0));
    layer.flush().unwrap();
    assert_eq!(subject.check(&layer), 1);
}

/// Later syncs say that all is well.
#[test]
fn what_a_failed_sync_lost_before_there_was_a_layer_is_missing() {
    let subject = Subject::new(50_000, 1);
    for is_broken in [false, true] {
        let disk = MemoryDisk::default();
        let (store, _) = open(&disk, "a");
        let incoming = store.incoming(&subject.index.header.blob(), 12).unwrap();
        for chunk in 0..subject.chunks() {
            incoming.write(ChunkIndex(chunk), subject.chunk(chunk)).unwrap();
        }
        disk.set_broken(is_broken);
        incoming.sync();
        disk.set_broken(false);
        let layer = store.place(store.prepare_incoming(&incoming, &subject.parts()).unwrap()).unwrap();
        assert_eq!(subject.check(&layer), if is_broken { 0 } else { subject.chunks() as usize });
    }
}

#[test]
fn numbers_are_never_given_twice() {
    let (a, b) = (Subject::new(10_000, 1), Subject::new(10_000, 2));
    let disk = MemoryDisk::default();
    let (store, _) = open(&disk, "a");
    let layer = create(&store, &a);
    let first = layer.number();
    store.remove(&layer).unwrap();
    drop((layer, store));
    let (store, found) = open(&disk, "a");
    assert!(found.layers.is_empty());
    let second = create(&store, &b).number();
    assert!(second > first);
    drop(store);
    // Without the file, what is there decides.
    let (store, _) = {
        use super::Backend;
        disk.remove(&root().join("numbers")).unwrap();
        open(&disk, "a")
    };
    assert!(create(&store, &a).number() > second);
}

#[test]
fn a_newer_store_is_refused_and_says_so() {
    use super::Backend;
    let subject = Subject::new(10_000, 1);
    let disk = MemoryDisk::default();
    let (store, _) = open(&disk, "a");
    create(&store, &subject).close().unwrap();
    let have = disk.open(&subject.path("have"), false).unwrap();
    let mut header = vec![0; 56];
    have.read_at(&mut header, 0).unwrap();
    header[8] = 9;
    let sum = *blake3::hash(&header).as_bytes();
    header.extend_from_slice(&sum);
    have.write_at(&header, 0).unwrap();
    drop(store);
    let (_, found) = open(&disk, "a");
    assert!(found.layers.is_empty());
    let message = found.broken[0].error.to_string();
    assert!(message.contains("version 9") && message.contains("newer"), "{message}");
}

/// All of a pull, as far as the disk takes part: what came while the layer was ingested, the layer, its chunks, the proof, a mount's mark, an
/// eviction of some of it, a clean end.
fn pull(disk: &MemoryDisk, boot: &str, subject: &Subject) -> Result<(), StoreError> {
    let (store, found) = Store::open(Arc::new(disk.clone()), root(), boot, &CacheConfig::default())?;
    let half = subject.chunks() / 2;
    let layer = match found.layers.into_iter().next() {
        Some(layer) => layer,
        None => {
            let incoming = store.incoming(&subject.index.header.blob(), 12)?;
            for chunk in 0..half {
                incoming.write(ChunkIndex(chunk), subject.chunk(chunk)).map_err(StoreError::io("write", root()))?;
            }
            store.place(store.prepare_incoming(&incoming, &subject.parts())?)?
        }
    };
    for chunk in 0..subject.chunks() {
        layer.add(chunk, subject.chunk(chunk));
        if chunk.is_multiple_of(7) {
            layer.flush()?;
        }
    }
    assert!(subject.check(&layer) == subject.chunks() as usize || disk.is_dark(), "boot {boot}");
    if layer.prove(&|| false)? == Proof::Proven {
        layer.pin("mount")?;
        layer.unpin("mount")?;
    }
    layer.evict(&[0])?;
    layer.close()?;
    store.close()
}

/// The power is cut before every write and sync of a pull, and the disk keeps any of what was not synced, torn or not: each state
/// opens, gives nothing wrong, and the pull is repeated to its end.
#[test]
fn every_state_of_a_pull_opens_after_a_power_cut() {
    let subject = Subject::new(100_000, 3);
    let mut cuts = 0;
    loop {
        let disk = MemoryDisk::default();
        disk.set_power(Some(cuts));
        let pulled = pull(&disk, "a", &subject);
        if !disk.is_dark() {
            pulled.unwrap();
            break;
        }
        for seed in 1..=SEEDS {
            let disk = disk.crash(seed << 8 | cuts);
            let (store, found) = open(&disk, "b");
            assert!(found.broken.is_empty(), "cut {cuts}, seed {seed}: {:?}", found.broken);
            for layer in &found.layers {
                subject.check(layer);
            }
            drop((store, found));
            pull(&disk, "b", &subject).unwrap_or_else(|error| panic!("cut {cuts}, seed {seed}: {error}"));
        }
        cuts += 1;
    }
    println!("the power was cut at {cuts} moments, with {SEEDS} outcomes each");
    assert!(cuts > 50, "a pull writes {cuts} times");
}

/// What may be left of the unsynced writes at one moment, so many of the possibilities.
const SEEDS: u64 = 20;

#[derive(Clone, Debug)]
enum Step {
    Create { subject: usize },
    Remove { subject: usize },
    Add { subject: usize, chunk: u32, len: u32 },
    Incoming { subject: usize, chunk: u32, len: u32 },
    Flush { subject: usize },
    Prove { subject: usize },
    Read { subject: usize },
    Kill,
    End,
    Crash { seed: u64, flips: Vec<(usize, u64)> },
}

fn step() -> impl Strategy<Value = Step> {
    let subject = 0..2usize;
    prop_oneof![
        3 => subject.clone().prop_map(|subject| Step::Create { subject }),
        1 => subject.clone().prop_map(|subject| Step::Remove { subject }),
        12 => (subject.clone(), 0..20u32, 1..20u32).prop_map(|(subject, chunk, len)| Step::Add { subject, chunk, len }),
        2 => (subject.clone(), 0..20u32, 1..20u32)
            .prop_map(|(subject, chunk, len)| Step::Incoming { subject, chunk, len }),
        5 => subject.clone().prop_map(|subject| Step::Flush { subject }),
        2 => subject.clone().prop_map(|subject| Step::Prove { subject }),
        3 => subject.prop_map(|subject| Step::Read { subject }),
        1 => Just(Step::Kill),
        1 => Just(Step::End),
        4 => (any::<u64>(), prop::collection::vec((0..9usize, any::<u64>()), 0..2))
            .prop_map(|(seed, flips)| Step::Crash { seed, flips }),
    ]
}

const FILES: [&str; 7] = ["identity", "header", "signature", "entries", "chunk_digests", "device", "have"];

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// After any crash the store opens, and nothing that it gives is wrong.
    #[test]
    fn nothing_is_invented(steps in prop::collection::vec(step(), 1..60)) {
        let subjects = [Subject::new(70_000, 1), Subject::new(60_000, 2)];
        let mut disk = MemoryDisk::default();
        let mut boot = 0u32;
        let (mut store, mut found) = open(&disk, "0");
        let mut flipped = false;
        for step in steps {
            let layer_of = |found: &Found, subject: usize| {
                let diff_id = subjects[subject].index.header.diff_id();
                found.layers.iter().position(|layer| layer.header().diff_id() == diff_id)
            };
            match step {
                Step::Create { subject } => {
                    if layer_of(&found, subject).is_none() {
                        found.layers.push(create(&store, &subjects[subject]));
                    }
                }
                Step::Incoming { subject, chunk, len } => {
                    if layer_of(&found, subject).is_none() {
                        let subject = &subjects[subject];
                        let incoming = store.incoming(&subject.index.header.blob(), 12).unwrap();
                        for chunk in chunk..(chunk + len).min(subject.chunks()) {
                            incoming.write(ChunkIndex(chunk), subject.chunk(chunk)).unwrap();
                        }
                        incoming.write(ChunkIndex(5), &[9; CHUNK]).unwrap();
                        let prepared = store.prepare_incoming(&incoming, &subject.parts()).unwrap();
                        found.layers.push(store.place(prepared).unwrap());
                    }
                }
                Step::Remove { subject } => {
                    if let Some(at) = layer_of(&found, subject) {
                        store.remove(&found.layers.remove(at)).unwrap();
                    }
                }
                Step::Add { subject, chunk, len } => {
                    if let Some(at) = layer_of(&found, subject) {
                        for chunk in chunk..(chunk + len).min(subjects[subject].chunks()) {
                            found.layers[at].add(chunk, subjects[subject].chunk(chunk));
                        }
                    }
                }
                Step::Flush { subject } => {
                    if let Some(at) = layer_of(&found, subject) {
                        found.layers[at].flush().unwrap();
                    }
                }
                Step::Prove { subject } => {
                    if let Some(at) = layer_of(&found, subject) {
                        let proof = found.layers[at].prove(&|| false).unwrap();
                        prop_assert_ne!(&proof, &Proof::Quarantined);
                        if proof == Proof::Proven {
                            prop_assert_eq!(subjects[subject].check(&found.layers[at]), subjects[subject].chunks() as usize);
                        }
                    }
                }
                Step::Read { subject } => {
                    if let Some(at) = layer_of(&found, subject) {
                        subjects[subject].check(&found.layers[at]);
                    }
                }
                Step::Kill => {
                    drop((found, store));
                    (store, found) = open(&disk, &boot.to_string());
                    prop_assert!(flipped || found.broken.is_empty(), "{:?}", found.broken);
                }
                Step::End => {
                    for layer in &found.layers {
                        layer.close().unwrap();
                    }
                    store.close().unwrap();
                    drop((found, store));
                    boot += 1;
                    (store, found) = open(&disk, &boot.to_string());
                    prop_assert!(flipped || found.broken.is_empty(), "{:?}", found.broken);
                    prop_assert!(!found.after_crash);
                }
                Step::Crash { seed, flips } => {
                    disk = disk.crash(seed);
                    for (file, bit) in flips {
                        flipped = true;
                        if let Some(name) = FILES.get(file) {
                            disk.flip(&subjects[0].path(name), bit);
                        }
                    }
                    boot += 1;
                    drop((found, store));
                    (store, found) = open(&disk, &boot.to_string());
                    prop_assert!(flipped || found.broken.is_empty(), "{:?}", found.broken);
                }
            }
        }
        for subject in &subjects {
            for layer in found.layers.iter().filter(|layer| layer.header() == &subject.index.header) {
                subject.check(layer);
            }
        }
    }

    /// What was flushed survives any crash.
    #[test]
    fn nothing_flushed_is_forgotten(seed: u64, flushed in 1..18u32, added in 0..5u32) {
        let subject = Subject::new(70_000, 1);
        let disk = MemoryDisk::default();
        let (store, _) = open(&disk, "a");
        let layer = create(&store, &subject);
        // The bits themselves are synced with a clean end only.
        for chunk in 0..flushed {
            layer.add(chunk, subject.chunk(chunk));
        }
        layer.close().unwrap();
        for chunk in flushed..flushed + added {
            layer.add(chunk.min(subject.chunks() - 1), subject.chunk(chunk.min(subject.chunks() - 1)));
        }
        let disk = disk.crash(seed);
        let (_, found) = open(&disk, "b");
        prop_assert!(subject.check(&found.layers[0]) >= flushed.min(subject.chunks()) as usize);
    }
}
