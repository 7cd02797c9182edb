//! Reads of layers whose sources lie, stall, die and come back, against the bytes that they must give.

mod support;

use std::sync::Arc;
use std::time::Duration;

use layer::ChunkIndex;
use node::config::CacheConfig;
use node::reader::ReadError;
use node::source::SourceKind;
use node::store::StoreError;
use node::{Node, NodeConfig, Scrubbed};
use proptest::prelude::*;
use support::{CHUNK, Fault, FaultySource, Subject, until};

const MINUTE: Duration = Duration::from_secs(60);

fn config(root: &std::path::Path) -> NodeConfig {
    NodeConfig { read_deadline: Duration::from_secs(10), cache: CacheConfig::WHOLE_DISK, ..NodeConfig::new(root) }
}

#[tokio::test]
async fn reads_come_from_a_source_once_and_then_from_disk() {
    let subject = Subject::new(300_000, 1);
    let directory = tempfile::tempdir().unwrap();
    let node = Node::open(config(directory.path())).unwrap();
    let layer = node.insert(&subject.parts()).unwrap();
    let source = FaultySource::new(&subject, SourceKind::Seeder);
    layer.add_source(source.clone());

    let mut buf = Vec::new();
    assert!(layer.read_now(5000..9000, &mut buf).is_none());
    let bytes = layer.read(5000..9000).await.unwrap();
    assert_eq!(bytes, subject.device[5000..9000]);
    assert!(layer.read_now(5000..9000, &mut buf).unwrap().is_ok());
    assert_eq!(buf, subject.device[5000..9000]);
    let end = subject.device.len() as u64;
    assert_eq!(layer.read(end - 10..end + 100).await.unwrap(), subject.device[subject.device.len() - 10..]);
    assert_eq!(layer.read(end + 5..end + 100).await.unwrap().len(), 0);
    assert_eq!(layer.tree().unwrap().entries().len(), 2);

    let values = layer.counters();
    assert_eq!(values.seeder.chunks, values.seeder.plain_bytes.div_ceil(CHUNK));
    assert_eq!((values.wrong_chunks, values.reads_failed), (0, 0));
    assert_eq!(node.counters(), values);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_is_fetched_once_however_many_wait() {
    let subject = Subject::new(200_000, 2);
    let directory = tempfile::tempdir().unwrap();
    let node = Node::open(NodeConfig { readahead: 0, ..config(directory.path()) }).unwrap();
    let layer = node.insert(&subject.parts()).unwrap();
    let source = FaultySource::new(&subject, SourceKind::Seeder);
    source.set_latency(Duration::from_millis(30));
    layer.add_source(source.clone());

    let threads: Vec<_> = (0..16)
        .map(|thread: usize| {
            let (layer, device) = (layer.clone(), subject.device.clone());
            std::thread::spawn(move || {
                for n in 0..40 {
                    let at = (thread * 7 + n * 5) % 40 * 4096;
                    let (sender, receiver) = std::sync::mpsc::channel();
                    let wait = layer
                        .read_with(at as u64..at as u64 + 6000, Box::new(move |result| sender.send(result).unwrap()));
                    assert_eq!(receiver.recv_timeout(MINUTE).unwrap().unwrap(), device[at..at + 6000]);
                    drop(wait);
                }
            })
        })
        .collect();
    tokio::task::spawn_blocking(move || threads.into_iter().for_each(|thread| thread.join().unwrap())).await.unwrap();
    assert_eq!(layer.counters().duplicate_chunks, 0);
    assert!(source.given().values().all(|times| *times == 1), "{:?}", source.given());
}

#[tokio::test(start_paused = true)]
async fn a_read_fails_at_its_deadline_and_says_why() {
    let subject = Subject::new(100_000, 3);
    let directory = tempfile::tempdir().unwrap();
    let node = Node::open(config(directory.path())).unwrap();
    let layer = node.insert(&subject.parts()).unwrap();
    let source = FaultySource::new(&subject, SourceKind::Seeder);
    source.set_fault(Fault::Unreachable);
    layer.add_source(source.clone());

    let start = tokio::time::Instant::now();
    let first = tokio::spawn(layer.read(0..100));
    tokio::time::sleep(Duration::from_secs(4)).await;
    let second = tokio::spawn(layer.read(10..20));
    let Err(ReadError::Deadline { reasons, .. }) = first.await.unwrap() else { panic!("it gave bytes") };
    assert!(reasons[0].contains("unreachable"), "{reasons:?}");
    assert!(second.await.unwrap().is_err());
    let after = start.elapsed();
    assert!(after >= Duration::from_secs(10) && after < Duration::from_secs(11), "{after:?}");

    // The kernel retries: that fails at once. Another chunk has its own deadline; later this one does, too.
    let start = tokio::time::Instant::now();
    assert!(layer.read(0..100).await.is_err());
    assert!(start.elapsed() < Duration::from_millis(100));
    tokio::time::sleep(Duration::from_secs(6)).await;
    source.set_fault(Fault::None);
    assert_eq!(layer.read(0..100).await.unwrap(), subject.device[..100]);
}

/// Written by a subscriber.
#[derive(Clone, Default)]
struct Lines(Arc<std::sync::Mutex<Vec<u8>>>);

impl Lines {
    fn with(&self, word: &str) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().filter(|line| line.contains(word)).map(str::to_owned).collect()
    }
}

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn one_line_says_which_sources_failed_and_another_how_often() {
    let lines = Lines::default();
    let writer = lines.clone();
    // This thread's alone, and the runtime has no other.
    let _subscriber = tracing::subscriber::set_default(
        tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish(),
    );
    let subject = Subject::new(200_000, 3);
    let directory = tempfile::tempdir().unwrap();
    let node = Node::open(NodeConfig { readahead: 0, ..config(directory.path()) }).unwrap();
    let layer = node.insert(&subject.parts()).unwrap();
    for kind in [SourceKind::Seeder, SourceKind::Registry] {
        let source = FaultySource::new(&subject, kind);
        source.set_fault(Fault::Unreachable);
        layer.add_source(source);
    }
    for round in 1..=2 {
        let chunks = [1, 5, 9, 12, 20].map(|n| n + 20 * (round - 1));
        let reads = chunks.map(|chunk| tokio::spawn(layer.read(chunk * CHUNK..chunk * CHUNK + 10)));
        for read in reads {
            assert!(read.await.unwrap().is_err());
        }
        tokio::time::sleep(Duration::from_secs(6)).await;
        let (said, more) = (lines.with("a chunk did not arrive"), lines.with("more chunks of this layer"));
        assert_eq!((said.len(), more.len()), (round as usize, round as usize), "{said:?} {more:?}");
        let (line, more) = (&said[round as usize - 1], &more[round as usize - 1]);
        for word in ["Seeder of the test", "Registry of the test", &subject.diff_id().to_string()] {
            assert!(line.contains(word), "{word} is not in {line}");
        }
        assert!(more.contains("chunks=4 reads=4") && more.contains(&subject.diff_id().to_string()), "{more}");
    }
    assert_eq!(layer.counters().expired_chunks, 10);
}

#[tokio::test(start_paused = true)]
async fn a_silent_source_does_not_hold_reads_beyond_their_deadline() {
    let subject = Subject::new(100_000, 4);
    let directory = tempfile::tempdir().unwrap();
    let node = Node::open(NodeConfig { waiting_reads_max: 3, ..config(directory.path()) }).unwrap();
    let layer = node.insert(&subject.parts()).unwrap();
    let source = FaultySource::new(&subject, SourceKind::Seeder);
    source.set_fault(Fault::Silent);
    layer.add_source(source.clone());
    // More than may wait, so that some stand in line; their deadline counts from their arrival all the same.
    let start = tokio::time::Instant::now();
    let reads: Vec<_> = (0..20).map(|n| tokio::spawn(layer.read(n * CHUNK..n * CHUNK + 10))).collect();
    for read in reads {
        let Err(ReadError::Deadline { reasons, .. }) = read.await.unwrap() else { panic!("it gave bytes") };
        assert!(reasons.len() == 1, "{reasons:?}");
    }
    assert!(start.elapsed() < Duration::from_secs(11), "{:?}", start.elapsed());
    assert_eq!(layer.waiting_reads(), 0);
}

#[tokio::test]
async fn cancelled_reads_are_not_answered_and_leave_nothing() {
    let subject = Subject::new(100_000, 5);
    let directory = tempfile::tempdir().unwrap();
    let node = Node::open(config(directory.path())).unwrap();
    let layer = node.insert(&subject.parts()).unwrap();
    let wait = layer.read_with(0..10, Box::new(|_| panic!("answered")));
    assert_eq!(layer.waiting_reads(), 1);
    assert!(wait.cancel());
    let future = layer.read(0..10);
    assert!(tokio::time::timeout(Duration::from_millis(50), future).await.is_err());
    assert_eq!(layer.waiting_reads(), 0);

    let wait = layer.read_with(0..10, Box::new(|result| assert_eq!(result, Err(ReadError::Removed))));
    assert!(node.remove(subject.diff_id()).unwrap());
    assert!(!wait.cancel(), "the removal answered it");
    assert!(node.layer(subject.diff_id()).is_none() && !node.remove(subject.diff_id()).unwrap());
}

#[tokio::test]
async fn a_lying_source_is_found_out_and_another_one_asked() {
    let subject = Subject::new(400_000, 6);
    let directory = tempfile::tempdir().unwrap();
    let node = Node::open(config(directory.path())).unwrap();
    let layer = node.insert(&subject.parts()).unwrap();
    let liar = FaultySource::new(&subject, SourceKind::Peer);
    liar.set_fault(Fault::Wrong);
    layer.add_source(liar);
    layer.add_source(FaultySource::new(&subject, SourceKind::Seeder));
    assert_eq!(layer.read(0..400_000).await.unwrap(), subject.device[..400_000]);
    let values = layer.counters();
    assert!(values.wrong_chunks > 0 && values.peer.chunks == 0 && values.peer.wire_bytes > 0, "{values:?}");
}

#[tokio::test]
async fn the_background_completes_and_proves_a_layer() {
    let subject = Subject::new(900_000, 7);
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(directory.path());
    config.swarm.quiet = Duration::from_millis(20);
    let node = Node::open(config).unwrap();
    let layer = node.insert(&subject.parts()).unwrap();
    layer.add_source(FaultySource::new(&subject, SourceKind::Registry));
    node.set_fill_paused(true);
    layer.set_filling(true);
    assert_eq!(layer.read(0..10).await.unwrap(), subject.device[..10]);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!layer.is_complete());
    node.set_fill_paused(false);
    until("it is proven", || layer.is_proven()).await;
    assert_eq!(layer.bytes_here(), subject.device.len() as u64);
    assert_eq!(std::fs::read(layer.device_path()).unwrap(), *subject.device);

    // Over a clean end the proof stays.
    node.shutdown().await;
    drop((layer, node));
    let node = Node::open(self::config(directory.path())).unwrap();
    assert!(node.layer(subject.diff_id()).unwrap().is_proven());
}

/// Whether or not the background fills: who reads the device on disk itself must find it whole.
#[tokio::test]
async fn what_rots_in_a_proven_layer_is_found_and_fetched_again() {
    use std::os::unix::fs::FileExt;
    for fill in [true, false] {
        let subject = Subject::new(400_000, 8);
        let directory = tempfile::tempdir().unwrap();
        let node = Node::open(NodeConfig { fill, ..config(directory.path()) }).unwrap();
        let layer = node.insert(&subject.parts()).unwrap();
        for (chunk, plain) in subject.chunks() {
            assert!(layer.add_chunk(chunk, plain));
        }
        until("it is proven", || layer.is_proven()).await;
        assert!(layer.pin("mount").unwrap());
        layer.set_filling(true);
        let scrub = || {
            let node = node.clone();
            tokio::task::spawn_blocking(move || node.scrub(&mut || true))
        };
        let whole = Scrubbed { bytes: subject.device.len() as u64, rotten: 0 };
        assert_eq!(scrub().await.unwrap(), whole);

        let on_disk = || std::fs::read(layer.device_path()).unwrap();
        let device = std::fs::File::options().write(true).open(layer.device_path()).unwrap();
        let wrong = subject.device[50_000] ^ 4;
        device.write_all_at(&[wrong], 50_000).unwrap();
        // Nobody has noticed.
        assert!(layer.is_proven() && on_disk() != *subject.device);
        // No source yet: the next pass asks again.
        assert_eq!(scrub().await.unwrap(), Scrubbed { bytes: whole.bytes - CHUNK, rotten: 1 });
        assert!(!layer.is_proven());
        layer.add_source(FaultySource::new(&subject, SourceKind::Seeder));
        assert_eq!(scrub().await.unwrap().rotten, 0);
        until("it is proven again", || layer.is_proven()).await;
        assert!(on_disk() == *subject.device);
        assert_eq!(layer.read(49_000..51_000).await.unwrap(), subject.device[49_000..51_000]);
        assert_eq!((node.counters().rotten_chunks, node.counters().wrong_chunks), (1, 0));
        assert_eq!(scrub().await.unwrap(), whole);
    }
}

/// Also where nothing is filled; and no longer than somebody waits for it.
#[tokio::test]
async fn a_layer_that_is_awaited_is_fetched_whole_at_once() {
    let subjects = [Subject::new(900_000, 17), Subject::new(900_000, 18)];
    let directory = tempfile::tempdir().unwrap();
    let node = Node::open(config(directory.path())).unwrap();
    node.set_fill_paused(true);
    let layers = subjects.each_ref().map(|subject| node.insert(&subject.parts()).unwrap());
    for (layer, subject) in layers.iter().zip(&subjects) {
        layer.add_source(FaultySource::new(subject, SourceKind::Registry));
    }
    let [awaited, given_up] = &layers;
    drop(given_up.awaited());
    let waits = awaited.awaited();
    until("it is here", || awaited.is_complete()).await;
    assert_eq!(std::fs::read(waits.layer().device_path()).unwrap(), *subjects[0].device);
    assert!(!given_up.is_complete());
}

#[tokio::test]
async fn an_index_that_lies_is_quarantined_until_there_is_another() {
    let (subject, honest) = (Subject::new(100_000, 8), Subject::new(100_000, 18));
    let directory = tempfile::tempdir().unwrap();
    let node = Node::open(config(directory.path())).unwrap();
    let parts = subject.lying_parts(honest.diff_id());
    let layer = node.insert(&parts).unwrap();
    for (chunk, plain) in subject.chunks() {
        assert!(layer.add_chunk(chunk, plain));
    }
    until("it is quarantined", || layer.quarantine().is_some()).await;
    assert!(matches!(layer.read(0..10).await, Err(ReadError::Quarantined(_))));
    assert!(!layer.is_complete() && layer.read_now(0..10, &mut Vec::new()).is_none() && layer.has_wrong_index());
    node.shutdown().await;
    drop((layer, node));
    let node = Node::open(config(directory.path())).unwrap();
    let layer = node.layer(honest.diff_id()).unwrap();
    assert!(layer.quarantine().unwrap().contains("lies"));
    assert_eq!(layer.bytes_here(), 0);
    assert!(matches!(node.insert(&parts), Err(StoreError::Refused { .. })), "the same index is as wrong as before");
    let other = node.insert(&honest.parts()).unwrap();
    assert!(other.quarantine().is_none() && other.number() != layer.number());
    other.add_source(FaultySource::new(&honest, SourceKind::Seeder));
    assert_eq!(other.read(0..50_000).await.unwrap(), honest.device[..50_000]);

    // The index stays refused when its layer is gone.
    node.remove(honest.diff_id()).unwrap();
    node.shutdown().await;
    drop((layer, other, node));
    let node = Node::open(config(directory.path())).unwrap();
    let refused = node.insert(&parts).unwrap_err().to_string();
    assert!(refused.contains("lies"), "{refused}");
    node.insert(&honest.parts()).unwrap();
}

/// What is right is read all the while, and the next process knows of it.
#[tokio::test(start_paused = true)]
async fn a_chunk_that_always_comes_wrong_is_quarantined_until_it_comes_right() {
    let subject = Subject::new(200_000, 13);
    let directory = tempfile::tempdir().unwrap();
    let source = FaultySource::new(&subject, SourceKind::Registry);
    let mut node = Node::open(config(directory.path())).unwrap();
    let mut layer = node.insert(&subject.parts()).unwrap();
    source.set_fault(Fault::Wrong);
    layer.add_source(source.clone());
    // Of three chunks one is wrong.
    let (right, wrong) = (5000..8000, 3 * CHUNK..3 * CHUNK + 10);
    assert!(matches!(layer.read(wrong.clone()).await, Err(ReadError::Deadline { .. })));
    let reason = layer.quarantine().expect("it is quarantined");
    assert!(reason.contains("came wrong"), "{reason}");
    assert!(!layer.has_wrong_index());
    assert_eq!(layer.read(right.clone()).await.unwrap(), subject.device[5000..8000]);

    node.shutdown().await;
    drop((layer, node));
    node = Node::open(config(directory.path())).unwrap();
    layer = node.layer(subject.diff_id()).unwrap();
    assert_eq!(layer.quarantine(), Some(reason));
    assert!(layer.read_now(right, &mut Vec::new()).is_some());
    // Nobody reads it, and nothing is filled.
    layer.add_source(source.clone());
    tokio::time::sleep(2 * MINUTE).await;
    assert!(layer.quarantine().is_some());
    source.set_fault(Fault::None);
    until("it is as it should be", || layer.quarantine().is_none()).await;
    assert_eq!(layer.read(wrong).await.unwrap(), subject.device[3 * CHUNK as usize..3 * CHUNK as usize + 10]);
    node.shutdown().await;
    drop((layer, node));
    node = Node::open(config(directory.path())).unwrap();
    assert_eq!(node.layer(subject.diff_id()).unwrap().quarantine(), None);
}

#[tokio::test(start_paused = true)]
async fn a_neighbour_that_lies_takes_no_layer_out_of_service() {
    let subject = Subject::new(200_000, 14);
    let directory = tempfile::tempdir().unwrap();
    let node = Node::open(config(directory.path())).unwrap();
    let layer = node.insert(&subject.parts()).unwrap();
    let liar = FaultySource::new(&subject, SourceKind::Peer);
    liar.set_fault(Fault::Wrong);
    layer.add_source(liar);
    assert!(layer.read(0..10).await.is_err());
    assert!(layer.counters().wrong_chunks > 3);
    assert_eq!(layer.quarantine(), None);
}

#[tokio::test]
async fn what_came_in_without_an_index_is_adopted() {
    let subject = Subject::new(300_000, 9);
    let directory = tempfile::tempdir().unwrap();
    let node = Node::open(config(directory.path())).unwrap();
    let incoming = node.incoming(subject.parts().header.blob(), 12).unwrap();
    for (chunk, plain) in subject.chunks().filter(|(chunk, _)| !chunk.0.is_multiple_of(3)) {
        incoming.write(chunk, plain).unwrap();
    }
    incoming.write(ChunkIndex(4), &[1; 4096]).unwrap();
    incoming.write(ChunkIndex(9999), &[1; 4096]).unwrap();
    assert!(incoming.write(ChunkIndex(2), &[1; 4097]).is_err());
    let layer = node.adopt(&incoming, &subject.parts()).unwrap();
    drop(incoming);
    let mut buf = Vec::new();
    for (chunk, plain) in subject.chunks() {
        let range = layer.geometry().range(chunk);
        let is_here = !chunk.0.is_multiple_of(3) && chunk.0 != 4;
        assert_eq!(layer.read_now(range, &mut buf).is_some(), is_here, "{chunk}");
        assert!(!is_here || buf == plain);
    }
    assert_eq!(std::fs::read_dir(directory.path().join("incoming")).unwrap().count(), 0);
    // A second one only adds what is missing.
    let incoming = node.incoming(subject.parts().header.blob(), 12).unwrap();
    for (chunk, plain) in subject.chunks() {
        incoming.write(chunk, plain).unwrap();
    }
    assert!(Arc::ptr_eq(&node.adopt(&incoming, &subject.parts()).unwrap(), &layer));
    assert!(layer.is_complete());
    until("it is proven", || layer.is_proven()).await;
}

#[tokio::test]
async fn one_broken_layer_does_not_stop_the_others() {
    let (good, bad) = (Subject::new(100_000, 10), Subject::new(100_000, 11));
    let directory = tempfile::tempdir().unwrap();
    let node = Node::open(config(directory.path())).unwrap();
    let number = node.insert(&good.parts()).unwrap().number();
    node.insert(&bad.parts()).unwrap();
    node.shutdown().await;
    drop(node);
    let layers = directory.path().join("layers");
    std::fs::write(layers.join(bad.diff_id().hex()).join("header"), b"nothing").unwrap();
    std::fs::create_dir(layers.join("foreign")).unwrap();
    let node = Node::open(config(directory.path())).unwrap();
    assert_eq!(node.layer(good.diff_id()).unwrap().number(), number);
    assert_eq!(node.broken_layers().len(), 2, "{:?}", node.broken_layers());
    // Inserting it again heals it.
    let healed = node.insert(&bad.parts()).unwrap();
    assert!(healed.number() > number + 1);
    assert_eq!(node.broken_layers().len(), 1);
}

#[derive(Clone, Debug)]
enum Step {
    Read { at: u32, len: u32 },
    Fault { source: usize, fault: Fault },
    Restart { clean: bool },
    Rot { at: u32 },
}

fn step() -> impl Strategy<Value = Step> {
    let fault = prop_oneof![
        3 => Just(Fault::None),
        1 => Just(Fault::Unreachable),
        1 => Just(Fault::Wrong),
        1 => Just(Fault::Short),
        1 => Just(Fault::Missing),
        1 => Just(Fault::Silent),
    ];
    prop_oneof![
        10 => (0..210_000u32, 1..20_000u32).prop_map(|(at, len)| Step::Read { at, len }),
        3 => (0..2usize, fault).prop_map(|(source, fault)| Step::Fault { source, fault }),
        1 => any::<bool>().prop_map(|clean| Step::Restart { clean }),
        1 => (0..200_000u32).prop_map(|at| Step::Rot { at }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Whatever happens, a read gives the layer's bytes or fails; with a good source it gives them.
    #[test]
    fn reads_equal_the_model(steps in prop::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(play(steps));
    }
}

async fn play(steps: Vec<Step>) {
    let subject = Subject::new(200_000, 12);
    let directory = tempfile::tempdir().unwrap();
    let mut node = Node::open(config(directory.path())).unwrap();
    let mut layer = node.insert(&subject.parts()).unwrap();
    let sources = [FaultySource::new(&subject, SourceKind::Seeder), FaultySource::new(&subject, SourceKind::Registry)];
    let add = |layer: &Arc<node::layer::Layer>| sources.iter().for_each(|source| layer.add_source(source.clone()));
    add(&layer);
    for step in steps {
        match step {
            Step::Read { at, len } => {
                let end = (at as usize + len as usize).min(subject.device.len());
                let model = &subject.device[(at as usize).min(end)..end];
                match layer.read(u64::from(at)..u64::from(at) + u64::from(len)).await {
                    Ok(bytes) => assert!(bytes == model, "wrong bytes at {at}"),
                    Err(error) => {
                        assert!(matches!(error, ReadError::Deadline { .. }), "{error}");
                        assert!(sources.iter().all(|source| source.fault() != Fault::None), "{error}");
                        // Let the hold end, so that the next read is judged by the sources.
                        tokio::time::sleep(Duration::from_secs(6)).await;
                    }
                }
            }
            Step::Fault { source, fault } => {
                sources[source].set_fault(fault);
                tokio::time::sleep(Duration::from_secs(40)).await;
            }
            Step::Restart { clean } => {
                if clean {
                    node.shutdown().await;
                }
                drop((layer, node));
                node = Node::open(config(directory.path())).unwrap();
                layer = node.layer(subject.diff_id()).unwrap();
                add(&layer);
            }
            Step::Rot { at } => {
                // While the node is down and the machine crashes: everything is to be doubted.
                drop((layer, node));
                let path = directory.path().join("layers").join(subject.diff_id().hex()).join("device");
                let mut bytes = std::fs::read(&path).unwrap();
                bytes[at as usize] ^= 0x10;
                std::fs::write(&path, bytes).unwrap();
                std::fs::write(directory.path().join("running"), "another boot").unwrap();
                node = Node::open(config(directory.path())).unwrap();
                layer = node.layer(subject.diff_id()).unwrap();
                add(&layer);
            }
        }
    }
}
