use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use layer::ChunkIndex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::config::CacheConfig;
use crate::ingest::tests::{Sample, TestSeeder, finished, ingester, registry_client};
use crate::ingest::{Ingester, Phase};
use crate::registry::fake::FakeRegistry;
use crate::security::Role;
use crate::security::tests::TestCluster;
use crate::source::{ChunkSink, Priority, Source, SourceError, SourceKind, WrongChunk};
use crate::{Node, NodeConfig};

const PATIENCE: Duration = Duration::from_secs(30);

struct Scene {
    registry: FakeRegistry,
    sample: Sample,
    blob: BlobRef,
    folder: tempfile::TempDir,
}

impl Scene {
    async fn new(seed: u32) -> Self {
        Self::of(Sample::new(seed)).await
    }

    async fn of(sample: Sample) -> Self {
        let registry = FakeRegistry::start().await;
        let blob = registry.put_blob(sample.blob.clone());
        Self { registry, sample, blob, folder: tempfile::tempdir().unwrap() }
    }

    fn ingester(&self, security: &Security) -> Ingester {
        ingester(&self.folder.path().join("seeder"), &self.registry, security)
    }

    fn node(&self) -> Arc<Node> {
        Node::open(NodeConfig { cache: CacheConfig::WHOLE_DISK, ..NodeConfig::new(self.folder.path().join("node")) })
            .unwrap()
    }

    fn resolver(&self, node: &Arc<Node>, seeder: &str, security: &Security) -> Resolver {
        let limit = Duration::from_secs(3);
        let options = Options {
            seeder: seeder::Options { connect_timeout: limit, stall_timeout: limit },
            registry: registry::Options { connect_timeout: limit, stall_timeout: limit },
        };
        let addresses = SeederAddresses::new([seeder.to_owned()]).unwrap();
        Resolver::with_options(Arc::clone(node), &addresses, security, &self.registry.config(), options)
    }

    async fn read_all(&self, layer: &Arc<Layer>) {
        // In the order in which no reader ahead helps.
        let chunks: Vec<u32> = layer.geometry().chunks().rev().collect();
        for chunk in chunks {
            let range = layer.geometry().range(ChunkIndex(chunk));
            let bytes = tokio::time::timeout(PATIENCE, layer.read(range.clone())).await.unwrap().unwrap();
            assert!(bytes == self.sample.device[range.start as usize..range.end as usize], "chunk {chunk} differs");
        }
    }
}

async fn resolve(resolver: &Resolver, blob: &BlobRef) -> Result<Arc<Layer>, ResolveError> {
    let (progress, _) = watch::channel(Progress::default());
    tokio::time::timeout(PATIENCE, resolver.resolve(blob, progress)).await.expect("it ends")
}

async fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_layer_is_read_from_the_seeder_and_then_from_the_registry() {
    let (scene, cluster) = (Scene::new(30).await, TestCluster::new());
    let (theirs, ours) = (cluster.security(Role::Seeder, "s"), cluster.security(Role::Node, "n"));
    let seeder = TestSeeder::start(scene.ingester(&theirs), &theirs).await;
    assert!(matches!(finished(seeder.ingester.ask(&scene.blob).await.unwrap()).await, Phase::Ready(_)));
    let node = scene.node();
    let resolver = scene.resolver(&node, &seeder.address, &ours);
    let layer = resolve(&resolver, &scene.blob).await.unwrap();
    assert_eq!(layer.bytes_here(), 0, "nothing was asked for");
    assert_eq!(layer.tree().unwrap().entries().len(), 24 + 2);
    let first = layer.read(0..1000).await.unwrap();
    assert_eq!(first, scene.sample.device[..1000]);
    wait_for("the seeder gave it", || layer.counters().source(SourceKind::Seeder).plain_bytes > 0).await;
    assert_eq!(layer.counters().source(SourceKind::Registry).plain_bytes, 0);

    wait_for("the spans come in the background", || matches!(layer.section(Section::Spans), Ok(Some(_)))).await;
    assert_eq!(scene.registry.requests().bodies, 1);
    drop(seeder);
    scene.read_all(&layer).await;
    assert!(layer.counters().source(SourceKind::Registry).plain_bytes > 0);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_layer_arrives_while_it_is_ingested() {
    let scene = Scene::new(31).await;
    scene.registry.set(|behaviour| behaviour.pause = Duration::from_millis(5));
    let seeder = TestSeeder::start(scene.ingester(&Security::Off), &Security::Off).await;
    let node = scene.node();
    let resolver = scene.resolver(&node, &seeder.address, &Security::Off);
    let (progress, mut seen) = watch::channel(Progress::default());
    let told = tokio::spawn(async move {
        let mut count = 0;
        while seen.changed().await.is_ok() {
            count += 1;
        }
        (count, *seen.borrow())
    });
    let layer = resolver.resolve(&scene.blob, progress).await.unwrap();
    let (count, last) = told.await.unwrap();
    assert!(count > 3, "progress was told {count} times");
    assert_eq!(last.blob_size, scene.blob.size);
    // Most of it came; what was still on its way is read lazily.
    assert!(layer.bytes_here() > scene.sample.device.len() as u64 / 2, "only {} bytes came", layer.bytes_here());
    scene.read_all(&layer).await;
    let requests = scene.registry.requests();
    assert_eq!((requests.bodies, requests.bytes), (1, scene.blob.size));
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_layer_needs_nobody() {
    let scene = Scene::new(32).await;
    let seeder = TestSeeder::start(scene.ingester(&Security::Off), &Security::Off).await;
    let node = scene.node();
    let resolver = scene.resolver(&node, &seeder.address, &Security::Off);
    resolve(&resolver, &scene.blob).await.unwrap();
    let gone = seeder.address.clone();
    drop((seeder, resolver));
    node.shutdown().await;
    drop(node);
    let node = scene.node();
    let resolver = scene.resolver(&node, &gone, &Security::Off);
    resolve(&resolver, &scene.blob).await.unwrap();
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_resolve_share_one() {
    let scene = Scene::new(33).await;
    let seeder = TestSeeder::start(scene.ingester(&Security::Off), &Security::Off).await;
    let node = scene.node();
    let resolver = Arc::new(scene.resolver(&node, &seeder.address, &Security::Off));
    let resolves = (0..20).map(|_| {
        let (resolver, blob) = (Arc::clone(&resolver), scene.blob.clone());
        tokio::spawn(async move { resolve(&resolver, &blob).await.unwrap().number() })
    });
    let numbers = futures_util::future::join_all(resolves).await;
    let first = *numbers[0].as_ref().unwrap();
    assert!(numbers.into_iter().all(|number| number.unwrap() == first));
    assert_eq!(node.layers().len(), 1);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seeder_that_dies_in_the_middle_is_an_error_soon() {
    let scene = Scene::new(34).await;
    scene.registry.set(|behaviour| behaviour.stall_after = Some(2_000_000));
    let seeder = TestSeeder::start(scene.ingester(&Security::Off), &Security::Off).await;
    let node = scene.node();
    let resolver = scene.resolver(&node, &seeder.address, &Security::Off);
    let (progress, mut seen) = watch::channel(Progress::default());
    let blob = scene.blob.clone();
    let resolving = tokio::spawn(async move { resolver.resolve(&blob, progress).await });
    let moved = seen.wait_for(|progress| progress.received > 0);
    tokio::time::timeout(PATIENCE, moved).await.unwrap().unwrap();
    let died = Instant::now();
    drop(seeder);
    let error = tokio::time::timeout(PATIENCE, resolving).await.unwrap().unwrap().unwrap_err();
    // The listener lets requests finish for a few seconds; then the connection is gone.
    assert!(died.elapsed() < Duration::from_secs(12), "{error} after {:?}", died.elapsed());
    assert!(matches!(error, ResolveError::NoSeeder(_) | ResolveError::Seeder(_)), "{error}");
    assert!(node.layers().is_empty());
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsigned_index_is_not_believed() {
    let (scene, cluster) = (Scene::new(35).await, TestCluster::new());
    let seeder = TestSeeder::start(scene.ingester(&Security::Off), &Security::Off).await;
    let node = scene.node();
    let mut resolver = scene.resolver(&node, &seeder.address, &Security::Off);
    resolver.verifier = cluster.security(Role::Node, "n").verifier();
    let error = resolve(&resolver, &scene.blob).await.unwrap_err();
    assert!(matches!(error, ResolveError::Untrusted { source: TrustError::Unsigned, .. }), "{error}");
    assert!(node.layers().is_empty());
    node.shutdown().await;
}

/// A seeder whose certificate is another cluster's.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_a_stranger_signed_is_not_believed() {
    let (scene, cluster) = (Scene::new(41).await, TestCluster::new());
    let (theirs, ours) = (cluster.security(Role::Seeder, "s"), cluster.security(Role::Node, "n"));
    let stranger = TestCluster::new().security(Role::Seeder, "s");
    let seeder = TestSeeder::start(scene.ingester(&stranger), &theirs).await;
    let node = scene.node();
    let error = resolve(&scene.resolver(&node, &seeder.address, &ours), &scene.blob).await.unwrap_err();
    assert!(matches!(error, ResolveError::Untrusted { source: TrustError::Chain(_), .. }), "{error}");
    assert!(node.layers().is_empty());
    node.shutdown().await;
}

/// The right seeder's signature of another layer's index: that layer is read, this one is not, until its own comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_signature_of_another_index_is_not_believed() {
    let (scene, cluster) = (Scene::new(42).await, TestCluster::new());
    let (theirs, ours) = (cluster.security(Role::Seeder, "s"), cluster.security(Role::Node, "n"));
    let seeder = TestSeeder::start(scene.ingester(&theirs), &theirs).await;
    let other = scene.registry.put_blob(Sample::small(43).blob);
    let known = |blob: BlobRef| {
        let ingester = seeder.ingester.clone();
        async move {
            let Phase::Ready(known) = finished(ingester.ask(&blob).await.unwrap()).await else { panic!("no layer") };
            known
        }
    };
    let (mine, others) = (known(scene.blob.clone()).await, known(other.clone()).await);
    let right = mine.signed();
    mine.sign_again(others.signed().as_ref().clone());
    let node = scene.node();
    let resolver = scene.resolver(&node, &seeder.address, &ours);
    let error = resolve(&resolver, &scene.blob).await.unwrap_err();
    assert!(matches!(error, ResolveError::Untrusted { source: TrustError::Signature, .. }), "{error}");
    assert!(error.to_string().contains(&seeder.address), "{error}");
    let layer = resolve(&resolver, &other).await.unwrap();
    layer.read(0..1000).await.unwrap();
    assert_eq!(node.layers().len(), 1);

    mine.sign_again(right.as_ref().clone());
    let layer = resolve(&resolver, &scene.blob).await.unwrap();
    scene.read_all(&layer).await;
    node.shutdown().await;
}

/// What a seeder of a later version might say: the node names both versions, reads on what it knows, and takes the layer once it
/// is told in words that it knows.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_a_newer_version_is_refused_by_name() {
    let scene = Scene::new(44).await;
    let other = scene.registry.put_blob(Sample::small(45).blob);
    let seeder = TestSeeder::start(scene.ingester(&Security::Off), &Security::Off).await;
    let newer = Arc::new(AtomicBool::new(false));
    let address = newer_headers(seeder.address.clone(), Arc::clone(&newer)).await;
    let node = scene.node();
    let resolver = scene.resolver(&node, &address, &Security::Off);
    let known = resolve(&resolver, &other).await.unwrap();

    newer.store(true, Ordering::SeqCst);
    let error = resolve(&resolver, &scene.blob).await.unwrap_err().to_string();
    assert!(error.contains("version 2") && error.contains("up to 1") && error.contains(&address), "{error}");
    assert_eq!(node.layers().len(), 1);
    known.read(0..1000).await.unwrap();

    newer.store(false, Ordering::SeqCst);
    // The seeder rests for a moment after its failure.
    let deadline = Instant::now() + PATIENCE;
    let layer = loop {
        match resolve(&resolver, &scene.blob).await {
            Ok(layer) => break layer,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    scene.read_all(&layer).await;
    node.shutdown().await;
}

/// A way to `seeder` on which every index header is one of the next version, as long as `newer` says so. Gives its address.
async fn newer_headers(seeder: String, newer: Arc<AtomicBool>) -> String {
    let magic: Vec<u8> = b"\x8bDRIDX\r\n".to_vec();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((node, _)) = listener.accept().await {
            let Ok(seeder) = tokio::net::TcpStream::connect(&seeder).await else { continue };
            let (mut from_node, mut to_node) = node.into_split();
            let (mut from_seeder, mut to_seeder) = seeder.into_split();
            tokio::spawn(async move { tokio::io::copy(&mut from_node, &mut to_seeder).await });
            let (newer, magic) = (Arc::clone(&newer), magic.clone());
            tokio::spawn(async move {
                let (mut buffer, mut matched) = (vec![0; 1 << 16], 0);
                while let Ok(len @ 1..) = from_seeder.read(&mut buffer).await {
                    for byte in &mut buffer[..len] {
                        if matched == magic.len() {
                            // The low byte of the version.
                            *byte += u8::from(newer.load(Ordering::SeqCst));
                            matched = 0;
                        } else if *byte == magic[matched] {
                            matched += 1;
                        } else {
                            matched = usize::from(*byte == magic[0]);
                        }
                    }
                    if to_node.write_all(&buffer[..len]).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
    address
}

/// A foreign layer is at none of the registry's own places.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_layer_comes_from_its_urls() {
    let (registry, sample) = (FakeRegistry::start().await, Sample::new(46));
    registry.put_file("/elsewhere/layer", sample.blob.clone());
    let blob = BlobRef {
        registry: registry.host(),
        repository: "team/app".to_owned(),
        digest: Digest::of(&sample.blob),
        size: sample.blob.len() as u64,
        media_type: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip".to_owned(),
        urls: vec![format!("http://{}/elsewhere/layer", registry.host())],
    };
    let scene = Scene { registry, sample, blob, folder: tempfile::tempdir().unwrap() };
    let seeder = TestSeeder::start(scene.ingester(&Security::Off), &Security::Off).await;
    let node = scene.node();
    let resolver = scene.resolver(&node, &seeder.address, &Security::Off);
    let layer = resolve(&resolver, &scene.blob).await.unwrap();
    scene.read_all(&layer).await;
    let paths: Vec<String> = scene.registry.seen().into_iter().map(|seen| seen.path).collect();
    assert!(!paths.is_empty() && paths.iter().all(|path| path == "/elsewhere/layer"), "{paths:?}");

    // Without them it is nowhere.
    let nowhere = BlobRef { digest: Digest::of(b"elsewhere"), urls: Vec::new(), ..scene.blob.clone() };
    let error = resolve(&resolver, &nowhere).await.unwrap_err();
    assert!(error.to_string().contains("does not have"), "{error}");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn declining_says_why() {
    let scene = Scene::new(36).await;
    let node = scene.node();
    let seeder = TestSeeder::start(scene.ingester(&Security::Off), &Security::Off).await;
    let resolver = scene.resolver(&node, &seeder.address, &Security::Off);
    let odd = scene.registry.put_blob(crate::ingest::tests::gzip(&[7; 5000]));
    let error = resolve(&resolver, &odd).await.unwrap_err();
    assert!(matches!(error, ResolveError::Unsupported(_)), "{error}");
    let mut missing = scene.blob.clone();
    missing.digest = Digest::of(b"missing");
    let error = resolve(&resolver, &missing).await.unwrap_err();
    assert!(matches!(error, ResolveError::Seeder(SeederError::Ingest { .. })), "{error}");
    assert!(error.to_string().contains("does not have"), "{error}");
    drop(seeder);
    let gone = scene.resolver(&node, "127.0.0.1:1", &Security::Off);
    let error = resolve(&gone, &scene.blob).await.unwrap_err();
    assert!(matches!(error, ResolveError::NoSeeder(_)), "{error}");
    node.shutdown().await;
}

struct Collected {
    chunks: HashMap<u32, Vec<u8>>,
    wire_bytes: usize,
}

impl ChunkSink for Collected {
    fn chunk(&mut self, chunk: ChunkIndex, plain: &[u8], wire_bytes: usize) -> Result<(), WrongChunk> {
        self.chunks.insert(chunk.0, plain.to_vec());
        self.wire_bytes += wire_bytes;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_gives_any_run_by_its_spans() {
    let scene = Scene::new(37).await;
    let ingester = scene.ingester(&Security::Off);
    let Phase::Ready(known) = finished(ingester.ask(&scene.blob).await.unwrap()).await else { panic!("no layer") };
    let header = known.header().clone();
    let path = scene.folder.path().join("seeder/indexes").join(scene.blob.digest.hex()).join("spans");
    let spans = Arc::new(Spans::parse(&header, &std::fs::read(path).unwrap()).unwrap());
    assert!(spans.all().len() > 2, "the sample is too small");
    let geometry = header.geometry();
    let last = geometry.chunk_count();
    let source = RegistrySource::new(registry_client(&scene.registry), scene.blob.clone(), geometry, spans);
    let runs: [Range<u32>; 6] = [0..1, 31..33, 40..41, last - 1..last, 20..last, 0..last];
    for run in runs {
        let mut sink = Collected { chunks: HashMap::new(), wire_bytes: 0 };
        source.fetch(run.clone(), Priority::Demand, &mut sink).await.unwrap();
        for chunk in run {
            let range = geometry.range(ChunkIndex(chunk));
            let want = &scene.sample.device[range.start as usize..range.end as usize];
            assert!(sink.chunks.get(&chunk).is_some_and(|plain| plain == want), "chunk {chunk} differs");
        }
        assert!(sink.wire_bytes <= scene.sample.blob.len());
    }
    scene.registry.corrupt_blob(&scene.blob, vec![0xff; scene.sample.blob.len()]);
    let mut sink = Collected { chunks: HashMap::new(), wire_bytes: 0 };
    let error = source.fetch(0..1, Priority::Demand, &mut sink).await.unwrap_err();
    assert!(matches!(error, SourceError::Corrupt { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_spans_and_seeder_the_registry_says_what_is_missing() {
    let scene = Scene::new(38).await;
    let seeder = TestSeeder::start(scene.ingester(&Security::Off), &Security::Off).await;
    let node = scene.node();
    let resolver = scene.resolver(&node, &seeder.address, &Security::Off);
    // No background fetch of spans gets its turn.
    let _all = Arc::clone(&resolver.background).acquire_many_owned(BACKGROUND as u32).await.unwrap();
    let layer = resolve(&resolver, &scene.blob).await.unwrap();
    // One that was stopped may go on to serve for a moment.
    let nobody = seeder::Client::new(&SeederAddresses::default(), Security::Off, seeder::Options::default());
    let spans = LayerSpans { layer: Arc::downgrade(&layer), seeders: nobody, loaded: Arc::default() };
    let geometry = layer.geometry();
    let source = RegistrySource::new(resolver.registry.clone(), scene.blob.clone(), geometry, spans);
    let mut sink = Collected { chunks: HashMap::new(), wire_bytes: 0 };
    let error = source.fetch(0..1, Priority::Demand, &mut sink).await.unwrap_err();
    assert!(matches!(error, SourceError::Missing { .. }), "{error}");
    assert!(error.to_string().contains("spans section"), "{error}");
    node.shutdown().await;
}

/// A zstd layer of one frame without a seeder: one stream from the registry serves all reads, in whatever order, over
/// connections that break.
#[tokio::test(flavor = "multi_thread")]
async fn one_frame_is_streamed_once_for_all_reads() {
    let scene = Scene::of(Sample::one_frame(39)).await;
    let seeder = TestSeeder::start(scene.ingester(&Security::Off), &Security::Off).await;
    assert!(matches!(finished(seeder.ingester.ask(&scene.blob).await.unwrap()).await, Phase::Ready(_)));
    let node = scene.node();
    let resolver = scene.resolver(&node, &seeder.address, &Security::Off);
    let layer = resolve(&resolver, &scene.blob).await.unwrap();
    wait_for("the spans", || layer.spans().unwrap().is_some()).await;
    drop(seeder);
    scene.registry.set(|behaviour| behaviour.break_after = Some((3_000_000, 2)));
    let before = scene.registry.requests();
    let geometry = layer.geometry();
    let last = geometry.chunk_count() - 1;
    let read = |chunk: u32| {
        let (layer, range) = (Arc::clone(&layer), geometry.range(ChunkIndex(chunk)));
        tokio::spawn(async move { (range.clone(), layer.read(range).await) })
    };
    let reads: Vec<_> = [last, 3, last / 2, 0, last - 1, last / 3].into_iter().map(read).collect();
    for read in reads {
        let (range, bytes) = tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap();
        assert!(bytes.unwrap() == scene.sample.device[range.start as usize..range.end as usize], "{range:?} differs");
    }
    // All that the stream passed was kept.
    wait_for("the whole layer", || layer.is_complete()).await;
    scene.read_all(&layer).await;
    let after = scene.registry.requests();
    assert_eq!(after.bodies - before.bodies, 3, "the stream and its two resumptions");
    // What was under way when a connection broke may be lost.
    let slack = 2 * 3_000_000;
    assert!(after.bytes - before.bytes < scene.sample.blob.len() as u64 + slack, "{before:?} {after:?}");
    node.shutdown().await;
}

/// Before the spans are known a read looks as if it cost a few MiB; a frame of hundreds must not be fetched for each.
#[tokio::test(flavor = "multi_thread")]
async fn spans_that_surprise_are_planned_with_first() {
    let scene = Scene::of(Sample::one_frame(40)).await;
    let ingester = scene.ingester(&Security::Off);
    let Phase::Ready(known) = finished(ingester.ask(&scene.blob).await.unwrap()).await else { panic!("no layer") };
    let path = scene.folder.path().join("seeder/indexes").join(scene.blob.digest.hex()).join("spans");
    let spans = Arc::new(Spans::parse(known.header(), &std::fs::read(path).unwrap()).unwrap());
    let geometry = known.header().geometry();
    let source = RegistrySource::new(registry_client(&scene.registry), scene.blob.clone(), geometry, spans);
    assert!(source.units().len() > 1);
    let bodies = scene.registry.requests().bodies;
    let mut sink = Collected { chunks: HashMap::new(), wire_bytes: 0 };
    let error = source.fetch(5..6, Priority::Demand, &mut sink).await.unwrap_err();
    assert!(matches!(error, SourceError::Missing { .. }), "{error}");
    let whole = 0..geometry.device_size();
    assert_eq!(source.units(), std::slice::from_ref(&whole));
    assert_eq!(scene.registry.requests().bodies, bodies);
    source.fetch(5..6, Priority::Demand, &mut sink).await.unwrap();
    assert_eq!(sink.chunks.len() as u32, geometry.chunk_count());
}

/// A few bytes of zstd can inflate to any number: they are given as they come, never gathered.
#[tokio::test(flavor = "multi_thread")]
async fn what_inflates_much_is_given_piece_by_piece() {
    use crate::span_pass::{Plan, SpanPass};
    const DEVICE: u64 = 1 << 30;
    let mut blob = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 10 << 3];
    for block in 1..=DEVICE >> 17 {
        let is_last = u32::from(block == DEVICE >> 17);
        blob.extend_from_slice(&(1u32 << 17 << 3 | 1 << 1 | is_last).to_le_bytes()[..3]);
        blob.push(0);
    }
    let span = layer::index::Span {
        blob: 0..blob.len() as u64,
        device: 0..DEVICE,
        checkpoint: layer::index::Checkpoint::FrameStart,
    };
    struct Counted(u64);
    impl ChunkSink for Counted {
        fn chunk(&mut self, chunk: ChunkIndex, plain: &[u8], _: usize) -> Result<(), WrongChunk> {
            self.0 += plain.len() as u64;
            // Nobody takes all of it.
            if self.0 > 64 << 20 { Err(WrongChunk(chunk)) } else { Ok(()) }
        }
    }
    let mut sink = Counted(0);
    let spans = [span];
    let geometry = layer::Geometry::new(DEVICE, 17).unwrap();
    let mut pass = SpanPass::new(&Plan::new(&spans, geometry, geometry.chunks()).unwrap());
    assert!(pass.take(&blob, &mut sink).await.is_err());
    assert!(sink.0 < 66 << 20, "{}", sink.0);
}
