//! Eviction, room and full disks: never a wrong byte, never more than there is room for, nothing lost that was kept.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::config::DiskShare;
use crate::store::{Disk, Unstored};

/// Bytes of a unit of the subjects.
const UNIT: u64 = 16 * CHUNK as u64;

fn sized(disk: &MemoryDisk, boot: &str, size: u64) -> (Store, Found) {
    let cache = CacheConfig { size: DiskShare::Bytes(size), keep_free: DiskShare::Bytes(0) };
    Store::open(Arc::new(disk.clone()), root(), boot, &cache).unwrap()
}

fn fill(layer: &LayerStore, subject: &Subject) {
    for chunk in 0..subject.chunks() {
        layer.add(chunk, subject.chunk(chunk));
    }
}

#[test]
fn an_evicted_unit_takes_no_disk_and_comes_back() {
    let subject = Subject::new(300_000, 1);
    let disk = MemoryDisk::default();
    let (store, _) = open(&disk, "a");
    let layer = create(&store, &subject);
    fill(&layer, &subject);
    assert_eq!(layer.prove(&|| false).unwrap(), Proof::Proven);
    let before = store.room().taken();
    assert_eq!(before, disk.allocated_below(root(), "device"));
    assert_eq!(layer.evict(&[1, 3]).unwrap(), 2 * UNIT);
    assert_eq!(store.room().taken(), before - 2 * UNIT);
    assert_eq!(disk.allocated_below(root(), "device"), before - 2 * UNIT);
    assert!(!layer.is_complete() && !layer.is_proven());
    assert_eq!(subject.check(&layer), subject.chunks() as usize - 32);
    assert_eq!(layer.prove(&|| false).unwrap(), Proof::Incomplete);
    drop((layer, store));
    let (_, mut found) = open(&disk, "a");
    let layer = found.layers.remove(0);
    assert_eq!(subject.check(&layer), subject.chunks() as usize - 32);
    fill(&layer, &subject);
    assert_eq!(layer.prove(&|| false).unwrap(), Proof::Proven);
}

#[test]
fn units_are_known_by_their_last_use() {
    let subject = Subject::new(300_000, 1);
    let disk = MemoryDisk::default();
    let (store, _) = open(&disk, "a");
    let layer = create(&store, &subject);
    fill(&layer, &subject);
    layer.close().unwrap();
    drop((layer, store));
    let (_, found) = open(&disk, "a");
    let layer = &found.layers[0];
    assert!(layer.units().iter().all(|unit| unit.used == 0));
    let mut out = Vec::new();
    assert!(layer.read(&(UNIT * 2 - 1..UNIT * 2 + 1), &[], &mut out));
    let used: Vec<u32> = layer.units().iter().filter(|unit| unit.used > 0).map(|unit| unit.number).collect();
    assert_eq!(used, [1, 2]);
}

#[test]
fn what_is_read_from_disk_stays_whole_until_the_machine_starts_anew() {
    let subject = Subject::new(300_000, 1);
    let disk = MemoryDisk::default();
    let (store, _) = open(&disk, "a");
    let layer = create(&store, &subject);
    fill(&layer, &subject);
    assert!(!layer.pin("x").unwrap(), "it is not proven");
    layer.prove(&|| false).unwrap();
    assert!(layer.pin("x").unwrap() && layer.pin("x").unwrap() && layer.pin("y").unwrap());
    assert!(layer.units().is_empty());
    assert_eq!(layer.evict(&[0, 1]).unwrap(), 0);
    assert!(layer.is_proven());
    assert!(layer.unpin("y").unwrap() && !layer.unpin("z").unwrap());
    drop((layer, store));
    let (store, found) = open(&disk, "a");
    assert_eq!(found.layers[0].evict(&[0]).unwrap(), 0);
    drop((found, store));
    let (_, found) = open(&disk, "b");
    assert_eq!(found.layers[0].evict(&[0]).unwrap(), UNIT);
}

#[test]
fn only_three_quarters_are_kept_whole() {
    let (a, b) = (Subject::new(300_000, 1), Subject::new(300_000, 2));
    let (store, _) = sized(&MemoryDisk::default(), "a", 700_000);
    let layers = [create(&store, &a), create(&store, &b)];
    for (layer, subject) in layers.iter().zip([&a, &b]) {
        fill(layer, subject);
        assert_eq!(layer.prove(&|| false).unwrap(), Proof::Proven);
    }
    assert!(layers[0].pin("x").unwrap() && !layers[1].pin("y").unwrap());
    layers[0].unpin("x").unwrap();
    assert!(layers[1].pin("y").unwrap());
}

/// Whatever step of an eviction fails, a process that opens the store next gives no hole for a chunk, and the bytes are
/// freed in the end.
#[test]
fn an_eviction_that_breaks_off_forgets_and_never_invents() {
    for operations in 0..20 {
        for is_killed in [false, true] {
            let subject = Subject::new(300_000, 1);
            let disk = MemoryDisk::default();
            let (store, _) = open(&disk, "a");
            let layer = create(&store, &subject);
            fill(&layer, &subject);
            layer.close().unwrap();
            disk.set_operations(Some(operations));
            let evicted = layer.evict(&[0, 1]);
            assert!(evicted.is_ok() || disk.is_out_of_operations());
            assert_eq!(subject.check(&layer), subject.chunks() as usize - 32);
            // Nothing is written to what is still to be freed.
            if evicted.is_err() {
                assert!(matches!(layer.add(3, subject.chunk(3)), Added::Unstored(Unstored::NoRoom, Some(_))));
            }
            disk.set_operations(None);
            let all = disk.allocated_below(root(), "device");
            let (store, layer) = if is_killed {
                drop((layer, store));
                let (store, mut found) = open(&disk, "a");
                (store, found.layers.remove(0))
            } else {
                (store, layer)
            };
            let here = subject.check(&layer);
            if is_killed && here == subject.chunks() as usize {
                assert!(evicted.is_err());
                continue;
            }
            layer.evict(&layer.owed()).unwrap();
            let left = disk.allocated_below(root(), "device");
            assert_eq!(left, store.room().taken());
            assert!(evicted.is_ok() || left == all - 2 * UNIT, "{operations}: {left} of {all}");
            fill(&layer, &subject);
            layer.flush().unwrap();
            assert_eq!(subject.check(&layer), subject.chunks() as usize);
        }
    }
}

/// Readers on a real file while its parts are evicted and come again. Without the count of losses they read holes.
#[test]
fn readers_never_see_a_hole() {
    let subject = Arc::new(Subject::new(1 << 20, 1));
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(Arc::new(Disk), directory.path(), "a", &CacheConfig::default()).unwrap();
    let layer = Arc::new(create(&store, &subject));
    fill(&layer, &subject);
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for seed in 1..4u64 {
            let (layer, subject, stop, reads) = (&layer, &subject, &stop, &reads);
            scope.spawn(move || {
                let (mut random, mut out) = (seed, Vec::new());
                while !stop.load(Ordering::Relaxed) {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let start = (random >> 33) % (subject.device.len() as u64 - 20_000);
                    let range = start..start + 1 + (random >> 20) % 20_000;
                    if layer.read(&range, &[], &mut out) {
                        assert!(out == subject.device[range.start as usize..range.end as usize], "a hole is read");
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        let units: Vec<u32> = (0..subject.chunks().div_ceil(16)).collect();
        for round in 0..300 {
            layer.evict(&units[round % 3..]).unwrap();
            fill(&layer, &subject);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reads.load(Ordering::Relaxed) > 300);
    assert_eq!(subject.check(&layer), subject.chunks() as usize);
}

/// The disk is full at one operation after the other, whatever it is: what was kept before stays, each error says that the
/// disk is full, and all goes on when it is not any more.
#[test]
fn a_disk_that_is_full_at_any_moment_loses_nothing() {
    let (kept, new, came) = (Subject::new(100_000, 1), Subject::new(80_000, 2), Subject::new(70_000, 3));
    let mut reached_the_end = false;
    for operations in 0..200 {
        let disk = MemoryDisk::default();
        let (store, _) = open(&disk, "a");
        let layer = create(&store, &kept);
        for chunk in 0..20 {
            layer.add(chunk, kept.chunk(chunk));
        }
        layer.flush().unwrap();
        disk.set_operations(Some(operations));
        let is_full = |error: &StoreError| {
            let text = error.to_string();
            assert!(matches!(error, StoreError::Full { .. }) && text.contains("free space"), "{text}");
        };
        // Everything that writes.
        for chunk in 20..kept.chunks() {
            if let Added::Unstored(reason, held) = layer.add(chunk, kept.chunk(chunk)) {
                assert!(matches!(reason, Unstored::NoRoom) && held.is_some());
                let range = layer.header().geometry().range(ChunkIndex(chunk));
                let mut out = Vec::new();
                assert!(layer.read(&range, &[held.unwrap()], &mut out) && out == kept.chunk(chunk));
            }
        }
        let _ = layer.flush().map_err(|error| is_full(&error));
        let placed = store.prepare(&new.parts()).and_then(|prepared| store.place(prepared));
        let _ = placed.map(drop).map_err(|error| is_full(&error));
        match store.incoming(&came.index.header.blob(), 12) {
            Ok(incoming) => {
                for chunk in 0..came.chunks() {
                    let _ = incoming.write_now(ChunkIndex(chunk), came.chunk(chunk));
                }
                let adopted = store.prepare_incoming(&incoming, &came.parts()).and_then(|made| store.place(made));
                match adopted {
                    Ok(layer) => drop(came.check(&layer)),
                    Err(error) => is_full(&error),
                }
            }
            Err(error) => is_full(&error),
        }
        let _ = layer.prove(&|| false).map_err(|error| is_full(&error));
        let _ = layer.evict(&[1]).map_err(|error| is_full(&error));
        let _ = layer.close().map_err(|error| is_full(&error));
        let here = kept.check(&layer);
        assert!(here >= 16, "{operations}: {here}");
        reached_the_end |= !disk.is_out_of_operations();
        drop((layer, store));

        // A full disk does not keep the store from being opened.
        let again = Store::open(Arc::new(disk.clone()), root(), "a", &CacheConfig::default());
        let (store, found) = again.unwrap_or_else(|error| panic!("{operations}: {error}"));
        assert!(found.broken.is_empty(), "{operations}: {:?}", found.broken);
        drop((store, found));

        disk.set_operations(None);
        let (store, mut found) = open(&disk, "a");
        for subject in [&kept, &new, &came] {
            let at = found.layers.iter().position(|layer| layer.header() == &subject.index.header);
            let layer = at.map_or_else(|| create(&store, subject), |at| found.layers.remove(at));
            subject.check(&layer);
            fill(&layer, subject);
            assert_eq!(layer.prove(&|| false).unwrap(), Proof::Proven, "{operations}");
        }
    }
    assert!(reached_the_end);
}

#[derive(Clone, Debug)]
enum Step {
    Add { subject: usize, chunk: u32, len: u32 },
    Read { subject: usize, chunk: u32 },
    Flush { subject: usize },
    Prove { subject: usize },
    Pin { subject: usize },
    Unpin { subject: usize },
    Evict,
    Incoming { len: u32 },
    Kill,
    End,
    Crash { seed: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let subject = 0..2usize;
    prop_oneof![
        12 => (subject.clone(), 0..70u32, 1..40u32).prop_map(|(subject, chunk, len)| Step::Add { subject, chunk, len }),
        6 => (subject.clone(), 0..70u32).prop_map(|(subject, chunk)| Step::Read { subject, chunk }),
        4 => subject.clone().prop_map(|subject| Step::Flush { subject }),
        1 => subject.clone().prop_map(|subject| Step::Prove { subject }),
        1 => subject.clone().prop_map(|subject| Step::Pin { subject }),
        1 => subject.prop_map(|subject| Step::Unpin { subject }),
        6 => Just(Step::Evict),
        2 => (1..30u32).prop_map(|len| Step::Incoming { len }),
        1 => Just(Step::Kill),
        1 => Just(Step::End),
        2 => any::<u64>().prop_map(|seed| Step::Crash { seed }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever is written, read, evicted and lost: no wrong byte, never more on the disk than there is room for, and the
    /// account is what the disk says.
    #[test]
    fn the_room_is_never_exceeded(size in 8..120u64, steps in prop::collection::vec(step(), 1..50)) {
        let size = size * CHUNK as u64;
        let subjects = [Subject::new(280_000, 1), Subject::new(250_000, 2)];
        let mut disk = MemoryDisk::default();
        let mut boot = 0u32;
        let (mut store, mut found) = sized(&disk, "0", size);
        for subject in &subjects {
            found.layers.push(create(&store, subject));
        }
        for step in steps {
            match step {
                Step::Add { subject: at, chunk, len } => {
                    let Some(layer) = found.layers.iter().find(|layer| layer.header() == &subjects[at].index.header) else { continue };
                    for chunk in chunk..(chunk + len).min(subjects[at].chunks()) {
                        if let Added::Unstored(_, held) = layer.add(chunk, subjects[at].chunk(chunk)) {
                            let range = layer.header().geometry().range(ChunkIndex(chunk));
                            let mut out = Vec::new();
                            prop_assert!(layer.read(&range, held.as_slice(), &mut out));
                            prop_assert!(out == subjects[at].chunk(chunk));
                        }
                    }
                }
                Step::Read { subject, chunk } => {
                    let Some(layer) = found.layers.iter().find(|layer| layer.header() == &subjects[subject].index.header) else { continue };
                    let (start, device) = (u64::from(chunk) * CHUNK as u64 + 7, &subjects[subject].device);
                    let range = start.min(device.len() as u64)..(start + 9000).min(device.len() as u64);
                    let mut out = Vec::new();
                    if layer.read(&range, &[], &mut out) {
                        prop_assert!(out == device[range.start as usize..range.end as usize]);
                    }
                }
                Step::Flush { subject } => if let Some(layer) = found.layers.get(subject) { layer.flush().unwrap() },
                Step::Prove { subject } => if let Some(layer) = found.layers.get(subject) {
                    prop_assert_ne!(layer.prove(&|| false).unwrap(), Proof::Quarantined);
                },
                Step::Pin { subject } => if let Some(layer) = found.layers.get(subject) { layer.pin("p").unwrap(); },
                Step::Unpin { subject } => if let Some(layer) = found.layers.get(subject) { layer.unpin("p").unwrap(); },
                Step::Evict => {
                    let mut units: Vec<_> = (0..).zip(&found.layers).flat_map(|(at, layer)| layer.units().into_iter().map(move |unit| (unit, at))).collect();
                    units.sort();
                    for (unit, at) in units {
                        if store.room().excess() == 0 {
                            break;
                        }
                        found.layers[at].evict(&[unit.number]).unwrap();
                    }
                    prop_assert!(store.room().excess() == 0 || found.layers.iter().any(LayerStore::is_pinned));
                }
                Step::Incoming { len } => {
                    let incoming = store.incoming(&subjects[0].index.header.blob(), 12).unwrap();
                    for chunk in 0..len {
                        if incoming.write_now(ChunkIndex(chunk), subjects[0].chunk(chunk)).is_err() {
                            break;
                        }
                    }
                    prop_assert!(disk.allocated_below(root(), "device") <= size);
                }
                Step::Kill => {
                    drop((found, store));
                    (store, found) = sized(&disk, &boot.to_string(), size);
                    prop_assert!(found.broken.is_empty(), "{:?}", found.broken);
                }
                Step::End => {
                    found.layers.iter().for_each(|layer| layer.close().unwrap());
                    store.close().unwrap();
                    drop((found, store));
                    boot += 1;
                    (store, found) = sized(&disk, &boot.to_string(), size);
                    prop_assert!(!found.after_crash);
                }
                Step::Crash { seed } => {
                    disk = disk.crash(seed);
                    boot += 1;
                    drop((found, store));
                    (store, found) = sized(&disk, &boot.to_string(), size);
                    prop_assert!(found.broken.is_empty(), "{:?}", found.broken);
                }
            }
            let allocated = disk.allocated_below(root(), "device");
            prop_assert!(allocated <= size, "{} of {}", allocated, size);
            prop_assert!(allocated <= store.room().taken());
        }
        for subject in &subjects {
            for layer in found.layers.iter().filter(|layer| layer.header() == &subject.index.header) {
                subject.check(layer);
                layer.flush().unwrap();
            }
        }
        prop_assert_eq!(store.room().taken(), disk.allocated_below(root(), "device"));
    }
}
