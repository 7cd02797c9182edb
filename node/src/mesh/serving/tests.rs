//! Two nodes over real connections.

use std::collections::BTreeMap;
use std::time::Duration;

use layer::index::check_section;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::bulk::Options;
use crate::config::{CacheConfig, DiskShare};
use crate::mesh::member::OwnAddress;
use crate::mesh::peer::{PeerClient, PeerSource};
use crate::mesh::tests::nobody;
use crate::node::NodeConfig;
use crate::security::tests::TestCluster;
use crate::security::{Role, Security};
use crate::serve::{self, Limits, Listener};
use crate::source::{ChunkSink, Priority, Source, SourceError, WrongChunk};
use crate::store::Disk;
use crate::store::tests::Subject;

/// A node that serves.
struct Scene {
    subject: Subject,
    _folder: tempfile::TempDir,
    node: Arc<Node>,
    layer: Arc<Layer>,
    sharing: Arc<Sharing>,
    refused: Refused,
    address: SocketAddr,
    _stop: DropGuard,
}

fn open(folder: &std::path::Path, boot: &str) -> Arc<Node> {
    // Whatever else is on the disk.
    let cache = CacheConfig { size: DiskShare::Bytes(64 << 20), keep_free: DiskShare::Bytes(0) };
    let config = NodeConfig { fill: false, cache, ..NodeConfig::new(folder.join("store")) };
    Node::open_on(Arc::new(Disk), config, boot).unwrap()
}

fn other() -> Member {
    "10.0.0.9:7071;near".parse().unwrap()
}

impl Scene {
    async fn new(security: &Security, uploads: UploadConfig) -> Self {
        let (subject, folder) = (Subject::new(300_000, 5), tempfile::tempdir().unwrap());
        let node = open(folder.path(), "a");
        let layer = node.insert(&subject.parts()).unwrap();
        let asked = "10.0.0.1:7071".parse().unwrap();
        let holders: Holders = Box::new(move |_, _, _| {
            let members = vec![Member { address: asked, zone: String::new() }, other()];
            Box::pin(async move { members })
        });
        let refused = Refused::default();
        let sharing = Arc::new(Sharing::new(node.clone(), uploads, refused.clone(), holders));
        let limits = Limits { stall_timeout: Duration::from_secs(20), ..Limits::default() };
        let listener = Listener::bind("127.0.0.1:0", security, limits).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        tokio::spawn(listener.serve(serve::router(Arc::clone(&sharing), 64), stop.clone()));
        Self { subject, _folder: folder, node, layer, sharing, refused, address, _stop: stop.drop_guard() }
    }

    fn blob(&self) -> Digest {
        self.layer.header().blob()
    }

    fn have(&self, run: Range<u32>) {
        for chunk in run {
            assert!(self.layer.add_chunk(ChunkIndex(chunk), self.subject.chunk(chunk)));
        }
    }

    fn source(&self, security: &Security) -> PeerSource {
        let own = OwnAddress::default();
        own.set(Some("10.0.0.1:7071".parse().unwrap()));
        let client = PeerClient::new(self.address, security, own, None, Options::default()).unwrap();
        PeerSource::new(client, self.blob(), self.layer.geometry())
    }

    async fn fetch(&self, source: &PeerSource, run: Range<u32>) -> Result<(), SourceError> {
        let mut sink = Collected { scene: self, chunks: BTreeMap::new() };
        let result = source.fetch(run.clone(), Priority::Demand, &mut sink).await;
        if result.is_ok() {
            assert!(sink.chunks.keys().copied().eq(run));
        }
        result
    }
}

struct Collected<'a> {
    scene: &'a Scene,
    chunks: BTreeMap<u32, usize>,
}

impl ChunkSink for Collected<'_> {
    fn chunk(&mut self, chunk: ChunkIndex, plain: &[u8], wire_bytes: usize) -> Result<(), WrongChunk> {
        self.chunks.insert(chunk.0, wire_bytes);
        if plain == self.scene.subject.chunk(chunk.0) { Ok(()) } else { Err(WrongChunk(chunk)) }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gives_what_it_has_with_and_without_tls() {
    let cluster = TestCluster::new();
    for is_mutual in [false, true] {
        let of = |name| if is_mutual { cluster.security(Role::Node, name) } else { Security::Off };
        let scene = Scene::new(&of("a"), UploadConfig::default()).await;
        let (source, count) = (scene.source(&of("b")), scene.layer.geometry().chunk_count());
        scene.have(0..count - 1);
        scene.fetch(&source, 0..count - 1).await.unwrap();
        scene.fetch(&source, 7..8).await.unwrap();
        for run in [count - 2..count, count - 1..count] {
            let error = scene.fetch(&source, run).await.unwrap_err();
            assert!(matches!(error, SourceError::Missing { .. }), "{error}");
        }
        let error = scene.fetch(&source, 0..count + 1).await.unwrap_err();
        assert!(matches!(error, SourceError::Corrupt { .. }), "{error}");
        scene.have(count - 1..count);
        scene.fetch(&source, 0..count).await.unwrap();
        assert_eq!(scene.layer.counters().given_chunks, u64::from(count - 1 + 1 + count));

        scene.node.remove(scene.layer.diff_id()).unwrap();
        let error = scene.fetch(&source, 0..1).await.unwrap_err();
        assert!(matches!(error, SourceError::Missing { .. }), "{error}");
    }
}

/// A request as machines of version 1 send it, and of one that says more.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_of_version_1_is_answered_as_ever() {
    let scene = Scene::new(&Security::Off, UploadConfig::default()).await;
    scene.have(0..2);
    // No frame was kept, so each chunk is plain: its length with the highest bit set, and its bytes.
    let plain = [scene.subject.chunk(0), scene.subject.chunk(1)];
    let frames = plain.map(|plain| [&(plain.len() as u32 | 1 << 31).to_le_bytes(), plain].concat()).concat();
    for more in [None, Some("drover-later")] {
        let url = format!("http://{}/v1/layers/{}/chunks/0-2", scene.address, scene.blob());
        let request = reqwest::Client::new().get(url).header("drover-peer", "10.0.0.1:7071");
        let request = request.header("drover-priority", "demand");
        let request = more.into_iter().fold(request, |request, name| request.header(name, "1"));
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["content-type"], "application/octet-stream");
        assert!(answer.bytes().await.unwrap() == frames);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_index_is_given_too() {
    let scene = Scene::new(&Security::Off, UploadConfig::default()).await;
    let get = async |path: &str| {
        let answer = reqwest::get(format!("http://{}/v1/layers/{}/{path}", scene.address, scene.blob())).await.unwrap();
        (answer.status().as_u16(), answer.bytes().await.unwrap())
    };
    assert_eq!(get("index/header").await.1, &scene.layer.header().encode()[..]);
    for section in [Section::Entries, Section::ChunkDigests] {
        check_section(scene.layer.header(), section, &get(&format!("index/{section}")).await.1).unwrap();
    }
    assert_eq!(get("index/spans").await.0, 404);
    assert_eq!(get("follow").await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_machines_of_the_cluster_are_dealt_with() {
    let (ours, theirs) = (TestCluster::new(), TestCluster::new());
    let scene = Scene::new(&ours.security(Role::Node, "a"), UploadConfig::default()).await;
    scene.have(0..1);
    scene.fetch(&scene.source(&ours.security(Role::Seeder, "s")), 0..1).await.unwrap();
    for security in [theirs.security(Role::Node, "b"), Security::Off] {
        let error = scene.fetch(&scene.source(&security), 0..1).await.unwrap_err();
        assert!(matches!(error, SourceError::Denied { .. }), "{error}");
    }
    let open = Scene::new(&Security::Off, UploadConfig::default()).await;
    let error = open.fetch(&open.source(&ours.security(Role::Node, "b")), 0..1).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_turned_down_learns_who_else_has_it() {
    let uploads = UploadConfig { slots: 2, demand_slots: 0, peer_slots: 1, ..UploadConfig::default() };
    let scene = Scene::new(&Security::Off, uploads).await;
    scene.have(0..2);
    let asker = |ip: &str| Asker { ip: Some(ip.parse().unwrap()), ..Asker::UNKNOWN };
    let (blob, source) = (scene.blob(), scene.source(&Security::Off));
    // That is the machine of `source`, whatever it calls itself.
    let held = scene.sharing.chunks(blob, 0..2, asker("127.0.0.1")).await.ok().unwrap();
    let SourceError::Busy { retry_after, peers, .. } = scene.fetch(&source, 0..2).await.unwrap_err() else {
        panic!("there is room")
    };
    assert!(retry_after > Duration::ZERO && retry_after < Duration::from_secs(1));
    // Without the asker itself.
    assert_eq!(peers, [other()]);
    let elsewhere = scene.sharing.chunks(blob, 0..2, asker("10.0.0.2")).await.ok().unwrap();
    assert!(matches!(scene.sharing.chunks(blob, 0..2, asker("10.0.0.3")).await, Err(ServeError::Busy(_))));
    // Not begun, in the middle and at its end: a place is free again once the body is gone.
    drop(elsewhere);
    let mut body = scene.sharing.chunks(blob, 0..2, asker("10.0.0.3")).await.ok().unwrap();
    body.stream.next().await.unwrap().unwrap();
    drop(body);
    let mut body = scene.sharing.chunks(blob, 0..2, asker("10.0.0.3")).await.ok().unwrap();
    while let Some(part) = body.stream.next().await {
        part.unwrap();
    }
    drop((body, held));
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Err(error) = scene.fetch(&source, 0..2).await {
        assert!(matches!(error, SourceError::Busy { .. }) && Instant::now() < deadline, "{error}");
    }

    scene.refused.insert("10.0.0.1:7071".parse().unwrap());
    let error = scene.fetch(&source, 0..2).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied { .. }), "{error}");
    let leech = Scene::new(&Security::Off, UploadConfig { leech: true, ..UploadConfig::default() }).await;
    leech.have(0..1);
    let error = leech.fetch(&leech.source(&Security::Off), 0..1).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rate_is_kept() {
    let uploads = UploadConfig { bytes_per_sec: 1000, ..UploadConfig::default() };
    let scene = Scene::new(&Security::Off, uploads).await;
    scene.have(0..8);
    let source = scene.source(&Security::Off);
    scene.fetch(&source, 0..8).await.unwrap();
    let error = scene.fetch(&source, 0..8).await.unwrap_err();
    let SourceError::Busy { retry_after, .. } = error else { panic!("{error}") };
    assert!(retry_after > Duration::from_secs(10), "{retry_after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_rotted_on_the_disk_is_not_given() {
    let (subject, folder) = (Subject::new(100_000, 6), tempfile::tempdir().unwrap());
    let node = open(folder.path(), "a");
    let layer = node.insert(&subject.parts()).unwrap();
    (0..4).for_each(|chunk| assert!(layer.add_chunk(ChunkIndex(chunk), subject.chunk(chunk))));
    layer.store().flush().unwrap();
    let path = layer.device_path();
    drop((layer, node));
    let mut device = std::fs::read(&path).unwrap();
    device[2 * 4096 + 5] ^= 1;
    std::fs::write(&path, device).unwrap();

    let node = open(folder.path(), "b");
    let layer = node.layers().pop().unwrap();
    let sharing = Sharing::new(node, UploadConfig::default(), Refused::default(), nobody());
    let give = async |run| {
        let body = sharing.chunks(layer.header().blob(), run, Asker::UNKNOWN).await.map_err(io::Error::other)?;
        body.stream.try_collect::<Vec<_>>().await
    };
    assert_eq!(give(0..2).await.unwrap().concat().len(), 2 * (4096 + 4));
    assert!(give(0..4).await.is_err());
    assert!(matches!(sharing.chunks(layer.header().blob(), 2..3, Asker::UNKNOWN).await, Err(ServeError::Absent)));
    assert!(give(3..4).await.is_ok());
}
