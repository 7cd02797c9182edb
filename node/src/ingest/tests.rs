mod power;
mod quota;

use std::io::Write;
use std::process::{Command, Stdio};

use layer::index::{ChunkDigests, Section};
use layer::wire::{Decoder, FrameReader};
use layer::{ChunkIndex, Geometry};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::mesh::Asker;
use crate::registry::fake::FakeRegistry;
use crate::security::Security;
use crate::serve::{self, Limits, Listener};

/// A layer's tar, larger than two spans, and its gzip.
pub(crate) struct Sample {
    pub(crate) device: Vec<u8>,
    pub(crate) blob: Vec<u8>,
}

impl Sample {
    pub(crate) fn new(seed: u32) -> Self {
        let device = Self::device(seed, 24);
        Self { blob: gzip(&device), device }
    }

    /// Less than a span.
    pub(crate) fn small(seed: u32) -> Self {
        let device = Self::device(seed, 6);
        Self { blob: gzip(&device), device }
    }

    /// A few chunks.
    pub(crate) fn tiny(seed: u32) -> Self {
        let device = Self::device(seed, 2);
        Self { blob: gzip(&device), device }
    }

    /// One zstd frame that is far larger than a span.
    pub(crate) fn one_frame(seed: u32) -> Self {
        let device = Self::device(seed, 90);
        let mut blob = Vec::with_capacity(zstd_safe::compress_bound(device.len()));
        zstd_safe::compress(&mut blob, &device, 1).unwrap();
        Self { blob, device }
    }

    fn device(seed: u32, files: u32) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        let mut builder = tar::Builder::new(Vec::new());
        for number in 0..files {
            let file: Vec<u8> = (0..450_000u32 + number)
                .map(|at| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    if at % 3 == 0 { (state >> 24) as u8 } else { b"drover "[at as usize % 7] }
                })
                .collect();
            let mut header = tar::Header::new_gnu();
            header.set_size(file.len() as u64);
            header.set_mode(0o644);
            header.set_mtime(1_700_000_000);
            builder.append_data(&mut header, format!("usr/file-{number}"), &file[..]).unwrap();
        }
        builder.into_inner().unwrap()
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut child =
        Command::new("gzip").args(["-1", "-n"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    output.stdout
}

/// A seeder in this process.
pub(crate) struct TestSeeder {
    pub(crate) ingester: Ingester,
    pub(crate) address: String,
    _stop: DropGuard,
}

pub(crate) fn registry_client(registry: &FakeRegistry) -> registry::Client {
    let options =
        registry::Options { connect_timeout: Duration::from_secs(2), stall_timeout: Duration::from_millis(500) };
    registry::Client::new(registry.config(), options)
}

pub(crate) fn ingester(root: &std::path::Path, registry: &FakeRegistry, security: &Security) -> Ingester {
    ingester_with(
        root,
        registry,
        security,
        Options { encode_threads: 2, cache: CacheConfig::WHOLE_DISK, ..Options::default() },
    )
}

fn ingester_with(root: &std::path::Path, registry: &FakeRegistry, security: &Security, options: Options) -> Ingester {
    // The tasks of an ingester that was just dropped may hold the store for a moment.
    let deadline = Instant::now() + Duration::from_secs(10);
    let store = loop {
        match Store::open(root) {
            Err(store::StoreError::InUse(_)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            opened => break opened.unwrap(),
        }
    };
    Ingester::new(store, registry_client(registry), security.signer().unwrap(), options).unwrap()
}

impl TestSeeder {
    pub(crate) async fn start(ingester: Ingester, security: &Security) -> Self {
        let limits = Limits { stall_timeout: Duration::from_secs(2), ..Limits::default() };
        let listener = Listener::bind("127.0.0.1:0", security, limits).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let router = serve::router(Arc::new(ingester.clone()), 64);
        let router = control::route(router, ingester.clone());
        let stop = CancellationToken::new();
        tokio::spawn(listener.serve(router, stop.clone()));
        Self { ingester, address, _stop: stop.drop_guard() }
    }
}

pub(crate) async fn finished(mut phase: watch::Receiver<Phase>) -> Phase {
    let wait =
        phase.wait_for(|phase| !matches!(phase, Phase::Running(_) | Phase::Failed(IngestFailure::Content { .. })));
    tokio::time::timeout(Duration::from_secs(30), wait).await.expect("the ingest ends").unwrap().clone()
}

async fn known(ingester: &Ingester, blob: &BlobRef) -> Arc<Known> {
    match finished(ingester.ask(blob).await.unwrap()).await {
        Phase::Ready(known) => known,
        other => panic!("{other:?}"),
    }
}

fn decode(geometry: Geometry, run: std::ops::Range<u32>, wire: &[u8]) -> Vec<u8> {
    let (mut reader, mut decoder) = (FrameReader::new(geometry, run), Decoder::new());
    reader.push(wire);
    let mut device = Vec::new();
    while let Some((chunk, frame)) = reader.next_frame().unwrap() {
        device.extend_from_slice(decoder.decode(frame, geometry.chunk_len(chunk)).unwrap());
    }
    reader.finish().unwrap();
    device
}

async fn served(ingester: &Ingester, blob: Digest, run: std::ops::Range<u32>) -> io::Result<Vec<u8>> {
    use crate::serve::LayerServer;
    use futures_util::TryStreamExt;
    let frames = ingester.chunks(blob, run, Asker::UNKNOWN).await.map_err(io::Error::other)?;
    let parts: Vec<Bytes> = frames.stream.try_collect().await?;
    let bytes = parts.concat();
    assert!(frames.len.is_none_or(|len| len == bytes.len() as u64));
    Ok(bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_ask_and_one_get_is_made() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let sample = Sample::new(1);
    let blob = registry.put_blob(sample.blob.clone());
    let ingester = ingester(directory.path(), &registry, &Security::Off);
    let asks = (0..1000).map(|_| {
        let (ingester, blob) = (ingester.clone(), blob.clone());
        tokio::spawn(async move { known(&ingester, &blob).await.header().digest() })
    });
    let digests = futures_util::future::join_all(asks).await;
    let first = *digests[0].as_ref().unwrap();
    assert!(digests.into_iter().all(|digest| digest.unwrap() == first));
    assert_eq!(registry.requests().bodies, 1);
    assert_eq!(registry.requests().bytes, sample.blob.len() as u64);

    let known = known(&ingester, &blob).await;
    let geometry = known.header().geometry();
    assert_eq!(known.header().diff_id(), Digest::of(&sample.device));
    let wire = served(&ingester, blob.digest, geometry.chunks()).await.unwrap();
    assert_eq!(decode(geometry, geometry.chunks(), &wire), sample.device);
    assert_eq!(registry.requests().bodies, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_layers_and_needs_no_registry() {
    let directory = tempfile::tempdir().unwrap();
    let sample = Sample::new(2);
    let (blob, header) = {
        let registry = FakeRegistry::start().await;
        let blob = registry.put_blob(sample.blob.clone());
        let ingester = ingester(directory.path(), &registry, &Security::Off);
        let header = known(&ingester, &blob).await.header().clone();
        (blob, header)
    };
    let registry = FakeRegistry::start().await;
    let ingester = ingester(directory.path(), &registry, &Security::Off);
    assert_eq!(ingester.shared.store.layers().unwrap(), [blob.digest]);
    let again = known(&ingester, &blob).await;
    assert_eq!(again.header(), &header);
    let geometry = header.geometry();
    let frames = again.frames();
    assert!(geometry.chunks().all(|chunk| frames.has(ChunkIndex(chunk))), "wire forms survive an orderly end");
    let wire = served(&ingester, blob.digest, 3..9).await.unwrap();
    assert_eq!(decode(geometry, 3..9, &wire), sample.device[3 << 17..9 << 17]);
    let digests = std::fs::read(ingester.shared.store.section_path(blob.digest, Section::ChunkDigests)).unwrap();
    assert!(ChunkDigests::parse(&header, digests).is_ok());
    assert_eq!(registry.requests().blobs, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_wire_forms_are_made_again_from_the_blob() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let sample = Sample::new(3);
    let blob = registry.put_blob(sample.blob.clone());
    let wire = directory.path().join("wire").join(blob.digest.hex());
    {
        let ingester = ingester(directory.path(), &registry, &Security::Off);
        known(&ingester, &blob).await;
    }
    std::fs::remove_dir_all(&wire).unwrap();
    let ingester = ingester(directory.path(), &registry, &Security::Off);
    let known = known(&ingester, &blob).await;
    let geometry = known.header().geometry();
    let last = geometry.chunk_count();
    for run in [40..41, 0..3, last - 1..last, 0..last] {
        let wire = served(&ingester, blob.digest, run.clone()).await.unwrap();
        let end = sample.device.len().min((run.end as usize) << 17);
        assert_eq!(decode(geometry, run.clone(), &wire), sample.device[(run.start as usize) << 17..end]);
    }
    assert!(known.frames().is_unsaved());
    ingester.save().await;
    assert!(!known.frames().is_unsaved());
    assert_eq!(registry.requests().bodies, 1);
}

/// Nothing in one zstd frame can be read by itself: one pass over the blob serves everybody.
#[tokio::test(flavor = "multi_thread")]
async fn wire_forms_of_one_frame_are_made_by_one_pass_for_all() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let sample = Sample::one_frame(11);
    let blob = registry.put_blob(sample.blob.clone());
    {
        let ingester = ingester(directory.path(), &registry, &Security::Off);
        assert_eq!(known(&ingester, &blob).await.header().span_count(), 1);
    }
    std::fs::remove_dir_all(directory.path().join("wire").join(blob.digest.hex())).unwrap();
    let ingester = ingester(directory.path(), &registry, &Security::Off);
    let known = known(&ingester, &blob).await;
    let geometry = known.header().geometry();
    let last = geometry.chunk_count();
    assert!(last > 256, "the sample is too small");
    let device = Arc::new(sample.device);
    let read = |run: std::ops::Range<u32>| {
        let (ingester, device) = (ingester.clone(), Arc::clone(&device));
        tokio::spawn(async move {
            let wire = loop {
                match served(&ingester, blob.digest, run.clone()).await {
                    Ok(wire) => break wire,
                    // A pass that takes long on a busy machine; what it has made stays.
                    Err(error) if error.to_string() == serve::ServeError::NotYet.to_string() => {}
                    Err(error) => panic!("{error}"),
                }
            };
            let end = device.len().min((run.end as usize) << 17);
            assert!(decode(geometry, run.clone(), &wire) == device[(run.start as usize) << 17..end], "{run:?}");
        })
    };
    // Who asks for the last chunk first starts the pass that has come to nobody else's yet.
    let first = read(last - 1..last);
    let deadline = Instant::now() + Duration::from_secs(20);
    while known.passes() == 0 {
        assert!(Instant::now() < deadline, "no pass began");
        tokio::task::yield_now().await;
    }
    let mut reads = vec![first];
    reads.extend((0..last - 1).rev().step_by(23).map(|chunk| read(chunk..chunk + 2)));
    for read in reads {
        tokio::time::timeout(Duration::from_secs(60), read).await.unwrap().unwrap();
    }
    assert!(geometry.chunks().all(|chunk| known.frames().has(ChunkIndex(chunk))));
    assert_eq!((known.passes(), registry.requests().bodies), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_blob_is_not_served_but_ingested_again() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let sample = Sample::new(4);
    let blob = registry.put_blob(sample.blob.clone());
    {
        let ingester = ingester(directory.path(), &registry, &Security::Off);
        known(&ingester, &blob).await;
    }
    let root = directory.path();
    std::fs::remove_dir_all(root.join("wire").join(blob.digest.hex())).unwrap();
    let path = root.join("blobs").join(blob.digest.hex());
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&path, &bytes).unwrap();
    let ingester = ingester(root, &registry, &Security::Off);
    let geometry = known(&ingester, &blob).await.header().geometry();
    assert!(served(&ingester, blob.digest, geometry.chunks()).await.is_err());
    assert!(ingester.known(blob.digest).await.is_none());
    known(&ingester, &blob).await;
    assert_eq!(registry.requests().bodies, 2);
    let wire = served(&ingester, blob.digest, geometry.chunks()).await.unwrap();
    assert_eq!(decode(geometry, geometry.chunks(), &wire), sample.device);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_named_and_nothing_is_kept() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let sample = Sample::new(5);
    let blob = registry.put_blob(sample.blob.clone());
    registry.corrupt_blob(&blob, Sample::new(6).blob);
    let ingester = ingester(directory.path(), &registry, &Security::Off);
    let Phase::Failed(error) = finished(ingester.ask(&blob).await.unwrap()).await else { panic!("it is believed") };
    let text = error.to_string();
    assert!(matches!(error, IngestFailure::WrongBlob { .. }), "{text}");
    assert!(text.contains("wrong bytes") && text.contains(&blob.digest.to_string()), "{text}");
    for name in ["blobs", "wire", "indexes", "incoming"] {
        let left = std::fs::read_dir(directory.path().join(name)).unwrap().count();
        assert_eq!(left, 0, "{name} is not empty");
    }
    // The failure is the answer for a moment, then the registry is asked again.
    assert!(matches!(finished(ingester.ask(&blob).await.unwrap()).await, Phase::Failed(_)));
    assert_eq!(registry.requests().bodies, 1);
    registry.put_blob(sample.blob);
    let again = async {
        loop {
            if let Phase::Ready(_) = finished(ingester.ask(&blob).await.unwrap()).await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), again).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_that_look_like_a_broken_layer_are_forgiven() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let sample = Sample::new(12);
    let blob = registry.put_blob(sample.blob.clone());
    let mut wrong = sample.blob.clone();
    wrong[100_000..100_100].fill(0);
    registry.corrupt_blob(&blob, wrong);
    let ingester = ingester(directory.path(), &registry, &Security::Off);
    let Phase::Failed(error) = finished(ingester.ask(&blob).await.unwrap()).await else { panic!("it is believed") };
    assert!(matches!(error, IngestFailure::WrongBlob { .. }), "{error}");
    registry.put_blob(sample.blob);
    let again = async {
        while !matches!(finished(ingester.ask(&blob).await.unwrap()).await, Phase::Ready(_)) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), again).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_download_goes_on_where_it_broke() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let sample = Sample::new(7);
    registry.set(|behaviour| behaviour.break_after = Some((1_000_000, 3)));
    let blob = registry.put_blob(sample.blob.clone());
    let ingester = ingester(directory.path(), &registry, &Security::Off);
    assert_eq!(known(&ingester, &blob).await.header().diff_id(), Digest::of(&sample.device));
    let requests = registry.requests();
    assert_eq!(requests.bodies, 4);
    // What was under way when a connection broke may be lost, but the blob does not come twice.
    assert!(requests.bytes < sample.blob.len() as u64 + 3_000_000, "{requests:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ingest_that_a_restart_broke_off_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let sample = Sample::new(8);
    let registry = FakeRegistry::start().await;
    registry.set(|behaviour| behaviour.break_after = Some((2_000_000, u32::MAX)));
    let blob = registry.put_blob(sample.blob.clone());
    let half = sample.blob.len() / 2;
    {
        let store = Store::open(directory.path()).unwrap();
        std::fs::write(store.begin(blob.digest).unwrap().blob_path(), &sample.blob[..half]).unwrap();
    }
    registry.set(|behaviour| behaviour.break_after = None);
    let ingester = ingester(directory.path(), &registry, &Security::Off);
    assert_eq!(known(&ingester, &blob).await.header().diff_id(), Digest::of(&sample.device));
    assert_eq!(registry.requests().bytes, (sample.blob.len() - half) as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_beginning_is_fetched_anew() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let sample = Sample::new(9);
    let blob = registry.put_blob(sample.blob.clone());
    for torn in [vec![0; sample.blob.len() / 2], [&sample.blob[..1000], &[0; 70_000][..]].concat()] {
        let directory = directory.path().join(torn.len().to_string());
        {
            let store = Store::open(&directory).unwrap();
            std::fs::write(store.begin(blob.digest).unwrap().blob_path(), torn).unwrap();
        }
        let ingester = ingester(&directory, &registry, &Security::Off);
        assert_eq!(known(&ingester, &blob).await.header().diff_id(), Digest::of(&sample.device));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_lazy_says_why() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let ingester = ingester(directory.path(), &registry, &Security::Off);
    let broken = registry.put_blob(gzip(b"this is no tar, but it is a fine gzip member").repeat(3));
    let Phase::Unsupported(reason) = finished(ingester.ask(&broken).await.unwrap()).await else {
        panic!("it is a layer");
    };
    assert!(!reason.is_empty());
    let missing = BlobRef { digest: Digest::of(b"missing"), ..broken };
    let Phase::Failed(error) = finished(ingester.ask(&missing).await.unwrap()).await else { panic!("it is there") };
    assert!(matches!(error, IngestFailure::Registry(RegistryError { fault: Fault::NotFound { .. }, .. })), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_section_is_made_again() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let blob = registry.put_blob(Sample::new(11).blob);
    for section in Section::ALL {
        let path = directory.path().join("indexes").join(blob.digest.hex()).join(section.name());
        let made = {
            let ingester = ingester(directory.path(), &registry, &Security::Off);
            known(&ingester, &blob).await;
            std::fs::read(&path).unwrap()
        };
        let mut damaged = made.clone();
        damaged[made.len() / 2] ^= 1;
        std::fs::write(&path, damaged).unwrap();
        let ingester = ingester(directory.path(), &registry, &Security::Off);
        assert!(ingester.known(blob.digest).await.is_none(), "{section}");
        known(&ingester, &blob).await;
        assert_eq!(std::fs::read(&path).unwrap(), made, "{section}");
    }
    assert_eq!(registry.requests().bodies, 1, "the blob is here: no network is used");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_header_is_noticed_and_a_new_key_signs_again() {
    use crate::security::Role;
    use crate::security::tests::TestCluster;
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let cluster = TestCluster::new();
    let blob = registry.put_blob(Sample::new(10).blob);
    let verifier = cluster.security(Role::Node, "n").verifier();
    let sign = async |security: &Security| {
        let ingester = ingester(directory.path(), &registry, security);
        let known = known(&ingester, &blob).await;
        (statement(known.header()), Signed::clone(&known.signed()))
    };
    let unsigned = sign(&Security::Off).await.1;
    assert_eq!(unsigned, Signed::default());
    let (text, first) = sign(&cluster.security(Role::Seeder, "s1")).await;
    verifier.verify(&text, &first).unwrap();
    let second = sign(&cluster.security(Role::Seeder, "s2")).await.1;
    verifier.verify(&text, &second).unwrap();
    assert_ne!(first.certificates, second.certificates);
    assert_eq!(registry.requests().bodies, 1);

    let path = directory.path().join("indexes").join(blob.digest.hex()).join("header");
    let mut header = std::fs::read(&path).unwrap();
    // A byte of the diffID.
    header[100] ^= 1;
    std::fs::write(&path, header).unwrap();
    let (text, third) = sign(&cluster.security(Role::Seeder, "s3")).await;
    verifier.verify(&text, &third).unwrap();
    assert_eq!(registry.requests().bodies, 1, "the blob is here: no network is used");
}
