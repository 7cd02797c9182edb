//! A node whose disk has less room than its layers: what goes, what stays, and that reads never notice.

#[allow(dead_code, reason = "each test takes what it needs of it")]
mod support;

use std::sync::Arc;
use std::time::Duration;

use layer::ChunkIndex;
use node::config::{CacheConfig, DiskShare};
use node::layer::Layer;
use node::source::SourceKind;
use node::{Node, NodeConfig};
use support::{CHUNK, Fault, FaultySource, Subject, until};

/// Bytes that are evicted together.
const UNIT: u64 = 16 * CHUNK;

fn open(root: &std::path::Path, size: u64, fill: bool) -> Arc<Node> {
    let cache = CacheConfig { size: DiskShare::Bytes(size), keep_free: DiskShare::Bytes(0) };
    let config =
        NodeConfig { cache, fill, readahead: 0, read_deadline: Duration::from_secs(10), ..NodeConfig::new(root) };
    Node::open(config).unwrap()
}

fn mounted(node: &Node, subject: &Subject) -> (Arc<Layer>, Arc<FaultySource>) {
    let layer = node.insert(&subject.parts()).unwrap();
    let source = FaultySource::new(subject, SourceKind::Seeder);
    layer.add_source(source.clone());
    layer.set_mounted(true);
    (layer, source)
}

/// Bytes that the devices take, as the file system counts.
fn on_disk(node: &Node) -> u64 {
    use std::os::unix::fs::MetadataExt;
    node.layers().iter().map(|layer| std::fs::metadata(layer.device_path()).unwrap().blocks() * 512).sum()
}

async fn read_all(layer: &Arc<Layer>, subject: &Subject) {
    for start in (0..subject.device.len() as u64).step_by(50_000) {
        let end = (start + 50_000).min(subject.device.len() as u64);
        let bytes = layer.read(start..end).await.unwrap();
        assert!(bytes == subject.device[start as usize..end as usize], "wrong bytes at {start}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_larger_than_the_cache_are_read_within_it() {
    let directory = tempfile::tempdir().unwrap();
    let size = 2 << 20;
    let node = open(directory.path(), size, true);
    let subjects = [Subject::new(1_500_000, 1), Subject::new(1_800_000, 2), Subject::new(900_000, 3)];
    let layers: Vec<_> = subjects.iter().map(|subject| mounted(&node, subject)).collect();
    for _ in 0..3 {
        for ((layer, _), subject) in layers.iter().zip(&subjects) {
            read_all(layer, subject).await;
            assert!(on_disk(&node) <= size + size / 100, "{} bytes", on_disk(&node));
        }
    }
    assert!(node.counters().evicted_bytes > 0, "{:?}", node.counters());
    assert_eq!(node.counters().reads_failed, 0);
    // Holes split extents, and the file system charges the blocks of their tree to the device.
    let disk_use = node.disk_use();
    assert!(disk_use.taken <= size + size / 100 && disk_use.limit == size, "{disk_use:?}");
    node.shutdown().await;
    drop((layers, node));
    let node = open(directory.path(), size, true);
    assert!(node.disk_use().taken > size / 2 && node.disk_use().taken.abs_diff(on_disk(&node)) * 100 <= on_disk(&node));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_used_longest_ago_goes_first_and_what_is_not_mounted_before() {
    let directory = tempfile::tempdir().unwrap();
    let node = open(directory.path(), 3 << 20, false);
    let subjects = [1, 2, 3, 4].map(|seed| Subject::new(900_000, seed));
    let [old, unmounted, new, more] = &subjects;
    let (old_layer, _) = mounted(&node, old);
    read_all(&old_layer, old).await;
    let (unmounted_layer, _) = mounted(&node, unmounted);
    read_all(&unmounted_layer, unmounted).await;
    unmounted_layer.set_mounted(false);
    let (new_layer, _) = mounted(&node, new);
    // The clock of uses has 64 ticks a second.
    tokio::time::sleep(Duration::from_millis(40)).await;
    read_all(&new_layer, new).await;
    let here = |layer: &Arc<Layer>| layer.bytes_here();
    let (old_here, new_here) = (here(&old_layer), here(&new_layer));
    let (more_layer, _) = mounted(&node, more);
    read_all(&more_layer, more).await;
    assert!(here(&unmounted_layer) < 900_000);
    assert_eq!((here(&old_layer), here(&new_layer)), (old_here, new_here));
    let fifth = Subject::new(900_000, 5);
    let (fifth_layer, _) = mounted(&node, &fifth);
    read_all(&fifth_layer, &fifth).await;
    assert_eq!(here(&new_layer), new_here);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_else_has_stays_and_the_rest_is_served_from_memory() {
    let directory = tempfile::tempdir().unwrap();
    let size = 1 << 20;
    let node = open(directory.path(), size, true);
    // Its source is gone, and nobody has answered for it since.
    let kept = Subject::new(900_000, 1);
    let layer = node.insert(&kept.parts()).unwrap();
    layer.set_mounted(true);
    for (chunk, plain) in kept.chunks() {
        assert!(layer.add_chunk(chunk, plain));
    }
    let gone = FaultySource::new(&kept, SourceKind::Seeder);
    gone.set_fault(Fault::Unreachable);
    layer.add_source(gone);
    let before = layer.bytes_here();

    let other = Subject::new(1_500_000, 2);
    let (other_layer, source) = mounted(&node, &other);
    for _ in 0..2 {
        read_all(&other_layer, &other).await;
    }
    assert_eq!(layer.bytes_here(), before, "nobody else has it");
    read_all(&layer, &kept).await;
    assert!(on_disk(&node) <= size + size / 100);
    assert!(node.counters().unstored_chunks > 100, "{:?}", node.counters());
    assert_eq!(node.counters().reads_failed, 0);
    // A read over many chunks, of which none is stored, by many at once.
    let reads = (0..8).map(|n| other_layer.read(n * 100_000..n * 100_000 + 400_000));
    for (n, bytes) in futures_util::future::join_all(reads).await.into_iter().enumerate() {
        assert!(bytes.unwrap() == other.device[n * 100_000..n * 100_000 + 400_000]);
    }
    // The background does nothing: what was given was asked for by readers.
    other_layer.set_filling(true);
    // A hedge of theirs may still be under way: a run of chunks, where the background would bring all of them.
    let given = || source.given().values().sum::<u32>();
    let before_pause = given();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(given() - before_pause < other.chunks().count() as u32 / 4);

    // It comes back, so its chunks may go.
    layer.add_source(FaultySource::new(&kept, SourceKind::Seeder));
    until("there is room again", || {
        let _ = other_layer.read_now(0..1, &mut Vec::new());
        other_layer.prefetch(0..200_000);
        layer.bytes_here() < before
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_background_ends_below_the_mark_and_refills_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let size = 4 << 20;
    let node = open(directory.path(), size, true);
    let subjects = [Subject::new(3_000_000, 1), Subject::new(3_000_000, 2)];
    let layers: Vec<_> = subjects.iter().map(|subject| mounted(&node, subject)).collect();
    layers.iter().for_each(|(layer, _)| layer.set_filling(true));
    until("the background has filled what it may", || node.disk_use().taken > size - size / 8).await;
    // Reads push the rest out; the background must not bring it back.
    for ((layer, _), subject) in layers.iter().zip(&subjects) {
        read_all(layer, subject).await;
    }
    let given = || layers.iter().map(|(_, source)| source.given().values().sum::<u32>()).sum::<u32>();
    let before = given();
    tokio::time::sleep(Duration::from_secs(2)).await;
    // A hedge of a reader's may have ended meanwhile.
    assert!(given() - before < 16);
    assert!(on_disk(&node) <= size + size / 100);
    assert!(node.disk_use().taken >= size - size / 8 - 2 * UNIT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_read_from_disk_is_never_touched() {
    let directory = tempfile::tempdir().unwrap();
    let node = open(directory.path(), 2 << 20, true);
    let pinned = Subject::new(700_000, 1);
    let (layer, _) = mounted(&node, &pinned);
    for (chunk, plain) in pinned.chunks() {
        layer.add_chunk(ChunkIndex(chunk.0), plain);
    }
    until("it is proven", || layer.is_proven()).await;
    assert!(layer.pin("mount").unwrap());
    let other = Subject::new(3_000_000, 2);
    let (other_layer, _) = mounted(&node, &other);
    for _ in 0..2 {
        read_all(&other_layer, &other).await;
    }
    assert!(node.counters().evicted_bytes > 0 && layer.is_proven());
    assert!(std::fs::read(layer.device_path()).unwrap() == *pinned.device);
    layer.unpin("mount").unwrap();
    until("it may go", || {
        other_layer.prefetch(0..3_000_000);
        !layer.is_proven()
    })
    .await;
    read_all(&layer, &pinned).await;
}
