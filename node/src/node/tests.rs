//! The engine on a disk that is full for a while.

use std::ops::Range;

use layer::ChunkIndex;
use layer::wire::{Encoder, Frame};

use super::*;
use crate::config::DiskShare;
use crate::source::{BoxFuture, ChunkSink, Priority, Source, SourceError, SourceKind};
use crate::store::memory::MemoryDisk;
use crate::store::tests::Subject;

/// Has all of a subject.
#[derive(Debug)]
struct Whole(Arc<Subject>);

impl Source for Whole {
    fn kind(&self) -> SourceKind {
        SourceKind::Seeder
    }

    fn label(&self) -> String {
        "seeder of the test".into()
    }

    fn fetch<'a>(
        &'a self,
        run: Range<u32>,
        _: Priority,
        sink: &'a mut dyn ChunkSink,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async move {
            for chunk in run {
                let plain = self.0.chunk(chunk);
                let corrupt = |error: crate::source::WrongChunk| SourceError::Corrupt {
                    source_label: self.label(),
                    reason: error.to_string(),
                };
                sink.chunk(ChunkIndex(chunk), plain, plain.len()).map_err(corrupt)?;
            }
            Ok(())
        })
    }
}

async fn read_all(layer: &Arc<Layer>, subject: &Subject) {
    let device = subject.device();
    for start in (0..device.len() as u64).step_by(30_000) {
        let end = (start + 30_000).min(device.len() as u64);
        assert!(layer.read(start..end).await.unwrap() == device[start as usize..end as usize], "wrong at {start}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_reads_go_on_and_pulls_are_declined_until_there_is_space() {
    let disk = MemoryDisk::default();
    let config = || NodeConfig { read_deadline: Duration::from_secs(10), ..NodeConfig::new("/store") };
    let node = Node::open_on(Arc::new(disk.clone()), config(), "a").unwrap();
    let (running, new) = (Arc::new(Subject::new(400_000, 1)), Subject::new(300_000, 2));
    let layer = node.insert(&running.parts()).unwrap();
    layer.set_mounted(true);
    layer.add_source(Arc::new(Whole(running.clone())));
    assert!(layer.read(0..50_000).await.unwrap() == running.device()[..50_000]);

    // Others have taken the rest of the disk; what the cache frees, they take too.
    disk.set_operations(Some(0));
    for _ in 0..2 {
        read_all(&layer, &running).await;
    }
    let many = (0..20u64).map(|n| layer.read(n * 10_000..n * 10_000 + 200_000));
    for (n, bytes) in futures_util::future::join_all(many).await.into_iter().enumerate() {
        assert!(bytes.unwrap() == running.device()[n * 10_000..n * 10_000 + 200_000]);
    }
    assert!(node.counters().unstored_chunks > 0 && node.counters().reads_failed == 0);
    let error = node.insert(&new.parts()).unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }) && error.to_string().contains("free space"), "{error}");
    assert!(node.incoming(Digest::of(b"blob"), 12).is_err());
    assert_eq!(node.layers().len(), 1);

    disk.set_operations(None);
    let new_layer = node.insert(&new.parts()).unwrap();
    let new = Arc::new(new);
    new_layer.add_source(Arc::new(Whole(new.clone())));
    read_all(&new_layer, &new).await;
    // Chunks that are still in memory are not missed by readers: the background stores them.
    layer.set_filling(true);
    let give_up = Instant::now() + Duration::from_secs(30);
    while !layer.is_complete() {
        assert!(Instant::now() < give_up, "nothing is stored again");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    read_all(&layer, &running).await;
    node.shutdown().await;
    drop((layer, new_layer, node));
    let node = Node::open_on(Arc::new(disk.clone()), config(), "a").unwrap();
    assert!(node.broken_layers().is_empty());
    let layer = node.layer(running.diff_id()).unwrap();
    let mut bytes = Vec::new();
    assert!(layer.read_now(0..running.device().len() as u64, &mut bytes).is_some() && bytes == running.device());
}

/// The same with each chunk in its wire form.
#[derive(Debug)]
struct Framed(Arc<Subject>);

impl Source for Framed {
    fn kind(&self) -> SourceKind {
        SourceKind::Seeder
    }

    fn label(&self) -> String {
        "seeder of the test".into()
    }

    fn fetch<'a>(
        &'a self,
        run: Range<u32>,
        _: Priority,
        sink: &'a mut dyn ChunkSink,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async move {
            let (mut encoder, mut wire) = (Encoder::new(), Vec::new());
            for chunk in run {
                let plain = self.0.chunk(chunk);
                wire.clear();
                encoder.encode(plain, &mut wire);
                let corrupt = |error: crate::source::WrongChunk| SourceError::Corrupt {
                    source_label: self.label(),
                    reason: error.to_string(),
                };
                let (frame, _) = Frame::split(&wire).unwrap();
                sink.frame(ChunkIndex(chunk), plain, frame).map_err(corrupt)?;
            }
            Ok(())
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wire_forms_go_before_any_chunk_does() {
    let disk = MemoryDisk::default();
    // Room for the devices, and for a part of their wire forms.
    let cache = CacheConfig { size: DiskShare::Bytes(1_200_000), keep_free: DiskShare::Bytes(0) };
    let config = NodeConfig { share: true, cache, ..NodeConfig::new("/store") };
    let node = Node::open_on(Arc::new(disk.clone()), config.clone(), "a").unwrap();
    let subjects = [3, 4].map(|seed| Arc::new(Subject::new(500_000, seed)));
    let mut layers = Vec::new();
    for subject in &subjects {
        let layer = node.insert(&subject.parts()).unwrap();
        layer.add_source(Arc::new(Framed(subject.clone())));
        read_all(&layer, subject).await;
        layers.push(layer);
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    let room = node.store.room();
    while !layers.iter().all(|layer| layer.is_complete()) || room.spare_excess() > 0 {
        assert!(Instant::now() < deadline, "not in time");
        for (layer, subject) in layers.iter().zip(&subjects) {
            read_all(layer, subject).await;
        }
    }
    assert_eq!(node.counters().evicted_bytes, 0);
    layers.iter().for_each(|layer| layer.store().flush().unwrap());
    let devices = layers.iter().map(|layer| layer.disk_bytes()).sum::<u64>();
    // The wire form of a chunk may come a moment after the chunk.
    let wire_forms = || disk.allocated_below(std::path::Path::new("/store"), "wire");
    while node.disk_use().taken != devices || wire_forms() != room.spare() {
        assert!(Instant::now() < deadline, "the account is wrong");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    node.shutdown().await;
    drop((layers, node));

    // Who does not share any more has no use for them.
    let node = Node::open_on(Arc::new(disk.clone()), NodeConfig { share: false, ..config }, "a").unwrap();
    assert_eq!(wire_forms(), 0);
    assert_eq!(node.disk_use().taken, devices);
    node.shutdown().await;
}
