//! A seeder with little room, and registries in trouble.

use super::*;
use crate::config::{CacheConfig, DiskShare};
use crate::registry::blob::DOWNLOAD_TRIES_MAX;
use crate::registry::fake::Behaviour;

/// What the directories of the store may take besides.
const DIRECTORIES: u64 = 64 << 10;

fn sized(root: &std::path::Path, registry: &FakeRegistry, size: u64) -> Ingester {
    let cache = CacheConfig { size: DiskShare::Bytes(size), keep_free: DiskShare::Bytes(0) };
    ingester_with(root, registry, &Security::Off, Options { encode_threads: 2, cache, ..Options::default() })
}

async fn device(ingester: &Ingester, blob: &BlobRef) -> Option<Vec<u8>> {
    let known = ingester.known(blob.digest).await?;
    let geometry = known.header().geometry();
    drop(known);
    let wire = served(ingester, blob.digest, geometry.chunks()).await.unwrap();
    Some(decode(geometry, geometry.chunks(), &wire))
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wire_forms_go_before_blobs_and_nothing_is_served_wrong() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let samples: Vec<Sample> = (20..25).map(Sample::new).collect();
    let blobs: Vec<BlobRef> = samples.iter().map(|sample| registry.put_blob(sample.blob.clone())).collect();
    // Blob and wire forms of two layers and a little, so that one more needs room.
    let size = samples[0].blob.len() as u64 * 5;
    let ingester = sized(directory.path(), &registry, size);
    let within = |what: &str| {
        let taken = store::disk_use(directory.path());
        assert!(taken <= size + size / 100 + DIRECTORIES, "{what}: {taken} of {size}");
    };
    for (blob, sample) in blobs.iter().zip(&samples) {
        known(&ingester, blob).await;
        within("after an ingest");
        assert!(device(&ingester, blob).await.unwrap() == sample.device);
    }
    let first = registry.requests().bodies;
    assert_eq!(first, 5);
    // The first blobs went, the latest are there; the one before it may have lost its wire forms only.
    let ingester_layers = ingester.shared.store.layers().unwrap();
    assert!(ingester_layers.len() >= 2 && ingester_layers.contains(&blobs[4].digest), "{}", ingester_layers.len());
    assert!(!ingester_layers.contains(&blobs[0].digest));
    // All of them, again and again, at once.
    for _ in 0..2 {
        for (blob, sample) in blobs.iter().zip(&samples) {
            known(&ingester, blob).await;
            assert!(device(&ingester, blob).await.is_none_or(|device| device == sample.device));
            within("after a read");
        }
    }
    drop(ingester);
    // A smaller quota is kept after a start.
    let size = samples[0].blob.len() as u64 * 3;
    let ingester = sized(directory.path(), &registry, size);
    until("it shrinks", || ingester.disk_use().taken <= size).await;
    assert!(store::disk_use(directory.path()) <= size + size / 100 + DIRECTORIES);
    for blob in ingester.shared.store.layers().unwrap() {
        let at = blobs.iter().position(|known| known.digest == blob).unwrap();
        // To make its wire forms again may cost another layer.
        assert!(device(&ingester, &blobs[at]).await.is_none_or(|device| device == samples[at].device));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_does_not_fit_is_refused_and_harms_nobody() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let (small, large) = (Sample::new(30), Sample::new(31));
    let small_blob = registry.put_blob(gzip(&small.device[..1 << 20]));
    let (large_blob, size) = (registry.put_blob(large.blob.clone()), large.blob.len() as u64 * 3 / 2);
    let ingester = sized(directory.path(), &registry, size);
    let Phase::Unsupported(_) = finished(ingester.ask(&small_blob).await.unwrap()).await else { panic!("cut off") };
    for unknown_size in [false, true] {
        let blob = BlobRef { size: if unknown_size { 0 } else { large_blob.size }, ..large_blob.clone() };
        if let Some(flight) = ingester.flight(blob.digest) {
            until("the refusal has rested", || flight.may_start_anew()).await;
        }
        let Phase::Failed(error) = finished(ingester.ask(&blob).await.unwrap()).await else { panic!("it fits") };
        let text = error.to_string();
        assert!(matches!(error, IngestFailure::NoRoom { .. }), "{text}");
        assert!(text.contains("cache.size") && text.contains(&blob.digest.to_string()), "{text}");
    }
    assert_eq!(std::fs::read_dir(directory.path().join("incoming")).unwrap().count(), 0);
    assert_eq!(ingester.disk_use().taken, 0);
    drop(ingester);
    // With more room it works.
    let ingester = sized(directory.path(), &registry, size * 2);
    known(&ingester, &large_blob).await;
    assert!(device(&ingester, &large_blob).await.unwrap() == large.device);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_being_served_stays() {
    use crate::serve::LayerServer;
    use futures_util::TryStreamExt;
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let (one, other) = (Sample::new(40), Sample::new(41));
    let (blob, next) = (registry.put_blob(one.blob.clone()), registry.put_blob(other.blob.clone()));
    let ingester = sized(directory.path(), &registry, one.blob.len() as u64 * 5 / 2);
    let geometry = known(&ingester, &blob).await.header().geometry();
    let frames = ingester.chunks(blob.digest, geometry.chunks(), Asker::UNKNOWN).await.unwrap();
    // Somebody is in the midst of it: there is no room for the other.
    let Phase::Failed(IngestFailure::NoRoom { .. }) = finished(ingester.ask(&next).await.unwrap()).await else {
        panic!("it has room")
    };
    let bytes: Vec<Bytes> = frames.stream.try_collect().await.unwrap();
    let bytes = bytes.concat();
    assert_eq!(frames.len, Some(bytes.len() as u64));
    assert!(decode(geometry, geometry.chunks(), &bytes) == one.device);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !matches!(finished(ingester.ask(&next).await.unwrap()).await, Phase::Ready(_)) {
        assert!(Instant::now() < deadline, "it never has room");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_lazy_is_remembered_over_a_restart() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let blob = registry.put_blob(gzip(b"this is no tar, but it is a fine gzip member").repeat(3));
    let mut reasons = Vec::new();
    for _ in 0..2 {
        let ingester = ingester(directory.path(), &registry, &Security::Off);
        let Phase::Unsupported(reason) = finished(ingester.ask(&blob).await.unwrap()).await else { panic!("a layer") };
        reasons.push(reason);
    }
    assert_eq!(registry.requests().bodies, 1);
    assert_eq!(reasons[0], reasons[1]);
    // Another version of the program may know better.
    let note = directory.path().join("unsupported").join(blob.digest.hex());
    std::fs::write(&note, format!("0.0.0-other\n{}\n", reasons[0])).unwrap();
    let ingester = ingester(directory.path(), &registry, &Security::Off);
    assert!(matches!(finished(ingester.ask(&blob).await.unwrap()).await, Phase::Unsupported(_)));
    assert_eq!(registry.requests().bodies, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_in_trouble_harm_no_other_blob_and_are_not_hammered() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let (good, bad) = (Sample::new(50), Sample::new(51));
    let (good_blob, bad_blob) = (registry.put_blob(good.blob.clone()), registry.put_blob(bad.blob.clone()));
    let ingester = ingester(directory.path(), &registry, &Security::Off);
    known(&ingester, &good_blob).await;
    let taken = ingester.disk_use().taken;

    let trouble = [
        ("breaks off", Behaviour { break_after: Some((0, u32::MAX)), ..Behaviour::default() }),
        ("stalls", Behaviour { stall_after: Some(0), ..Behaviour::default() }),
    ];
    for (what, trouble) in trouble {
        registry.set(|behaviour| *behaviour = trouble);
        let before = registry.requests().blobs;
        let asks = (0..1000).map(|_| {
            let (ingester, blob) = (ingester.clone(), bad_blob.clone());
            tokio::spawn(async move { finished(ingester.ask(&blob).await.unwrap()).await })
        });
        for phase in futures_util::future::join_all(asks).await {
            assert!(matches!(phase.unwrap(), Phase::Failed(IngestFailure::Registry(_))), "{what}");
        }
        assert!(registry.requests().blobs - before <= DOWNLOAD_TRIES_MAX, "{what}: {:?}", registry.requests());
        // Nothing is left of it, and the other blob is served.
        assert_eq!(std::fs::read_dir(directory.path().join("incoming")).unwrap().count(), 0, "{what}");
        assert_eq!(ingester.disk_use().taken, taken, "{what}");
        assert!(device(&ingester, &good_blob).await.unwrap() == good.device);
        registry.set(|behaviour| *behaviour = Behaviour::default());
        let flight = ingester.flight(bad_blob.digest).unwrap();
        until("the failure has rested", || flight.may_start_anew()).await;
    }
    known(&ingester, &bad_blob).await;
    assert!(device(&ingester, &bad_blob).await.unwrap() == bad.device);
}
