//! The Snapshots service over a real socket, with a made-up engine behind it.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use layer::{ChainId, Digest};
use node::source::BlobRef;
use parking_lot::Mutex;
use proto::containerd::services::snapshots::v1 as wire;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use snapshotter::containerd::{LazyLayers, LazyOutcome, PrepareLazy, Service, Sweeper};
use snapshotter::snapshots::{LayerMounts, LazyBacking, LazyCommit, Quarantine, Release, Store, Usage};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server, Uri};
use tonic::{Code, Request, Status};

const REF: &str = "containerd.io/snapshot.ref";
const PATIENCE: Duration = Duration::from_secs(20);

/// Layers by diffID; a layer's diffID is that of the target's text.
#[derive(Default)]
struct Engine {
    layers: Mutex<HashSet<Digest>>,
    store: Mutex<Option<Arc<Store>>>,
    prepared: AtomicUsize,
    seen: Mutex<Vec<String>>,
    blocked: Notify,
    refuse_release: Mutex<bool>,
    quarantined: Mutex<HashSet<Digest>>,
    wrong: Mutex<HashSet<Digest>>,
}

impl LayerMounts for Engine {
    fn lower(&self, _: u64, backing: &LazyBacking) -> io::Result<PathBuf> {
        if self.layers.lock().contains(&backing.diff_id) {
            Ok("/".into())
        } else {
            Err(io::Error::other("the engine has no such layer"))
        }
    }

    fn quarantine(&self, backing: &LazyBacking) -> Option<Quarantine> {
        let reason = || "chunk 7 came wrong".to_owned();
        let is_wrong = self.wrong.lock().contains(&backing.diff_id);
        self.quarantined.lock().contains(&backing.diff_id).then(|| Quarantine { reason: reason(), is_wrong })
    }
}

/// Targets choose what happens: `not-lazy…`, `lie…`, `block…`, anything else is committed.
struct Lazy(Arc<Engine>);

impl LazyLayers for Lazy {
    async fn prepare(&self, request: PrepareLazy<'_>) -> LazyOutcome {
        let engine = &self.0;
        engine.prepared.fetch_add(1, Ordering::Relaxed);
        let seconds = request.deadline.map(|deadline| (deadline - Instant::now()).as_secs_f64().round());
        engine.seen.lock().push(format!("{:?} {:?} {seconds:?}", request.namespace, request.parent));
        let target = request.target;
        if target.starts_with("block") {
            engine.blocked.notified().await;
        }
        if target.starts_with("not-lazy") {
            return LazyOutcome::NotLazy { reason: "told so".into() };
        }
        if target.starts_with("lie") {
            return LazyOutcome::Committed;
        }
        let diff_id = Digest::of(target.as_bytes());
        if engine.quarantined.lock().contains(&diff_id) {
            return LazyOutcome::NotLazy { reason: "the layer is quarantined".into() };
        }
        let store = engine.store.lock().clone().expect("is set");
        let hold = store.hold(diff_id).await;
        engine.layers.lock().insert(diff_id);
        tokio::task::yield_now().await;
        let blob = BlobRef {
            registry: "r".into(),
            repository: "a".into(),
            digest: diff_id,
            size: 1,
            media_type: String::new(),
            urls: Vec::new(),
        };
        let (parent, labels) = (request.parent, request.labels.clone());
        let backing = LazyBacking::new(&blob, diff_id, ChainId::bottom(diff_id));
        let usage = Usage { size_bytes: 7, inodes: 1 };
        store.commit_lazy(&hold, LazyCommit { target, parent, labels, backing, usage }).expect("commits");
        LazyOutcome::Committed
    }

    async fn release(&self, release: &Release) -> anyhow::Result<()> {
        if *self.0.refuse_release.lock() {
            anyhow::bail!("told so");
        }
        tokio::task::yield_now().await;
        if !release.layer_in_use {
            self.0.layers.lock().remove(&release.backing.diff_id);
        }
        Ok(())
    }
}

struct Fixture {
    engine: Arc<Engine>,
    store: Arc<Store>,
    client: SnapshotsClient<Channel>,
    server: JoinHandle<()>,
    _root: tempfile::TempDir,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Fixture {
    async fn start() -> Self {
        let root = tempfile::tempdir().expect("temporary directory");
        let engine = Arc::new(Engine::default());
        let mounts: Arc<dyn LayerMounts> = Arc::clone(&engine) as _;
        let store = Arc::new(Store::open(root.path(), mounts).expect("opens"));
        *engine.store.lock() = Some(Arc::clone(&store));
        let lazy = Arc::new(Lazy(Arc::clone(&engine)));
        let sweeper = Arc::new(Sweeper::new(Arc::clone(&store), Arc::clone(&lazy)));
        let service = Service::new(Arc::clone(&store), lazy, Arc::clone(&sweeper)).into_server();
        let socket = root.path().join("drover.sock");
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).expect("listens"));
        let server = tokio::spawn(async move {
            tokio::select! {
                served = Server::builder().add_service(service).serve_with_incoming(incoming) => served.expect("serves"),
                () = sweeper.run() => {}
            }
        });
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://drover").connect_with_connector_lazy(connector);
        Self { engine, store, client: SnapshotsClient::new(channel), server, _root: root }
    }

    async fn prepare(&self, key: &str, parent: &str, labels: &[(&str, &str)]) -> Result<String, Status> {
        let request = wire::PrepareSnapshotRequest {
            snapshotter: "drover".into(),
            key: key.into(),
            parent: parent.into(),
            labels: map(labels),
        };
        let answer = self.client.clone().prepare(request).await?.into_inner();
        Ok(answer.mounts.iter().map(|mount| format!("{} {}", mount.r#type, mount.options.join(","))).collect())
    }

    async fn commit(&self, name: &str, key: &str, parent: &str) -> Result<(), Status> {
        let request = wire::CommitSnapshotRequest {
            snapshotter: String::new(),
            name: name.into(),
            key: key.into(),
            labels: HashMap::new(),
            parent: parent.into(),
        };
        self.client.clone().commit(request).await.map(|_| ())
    }

    async fn remove(&self, key: &str) -> Result<(), Status> {
        let request = wire::RemoveSnapshotRequest { snapshotter: String::new(), key: key.into() };
        self.client.clone().remove(request).await.map(|_| ())
    }

    async fn stat(&self, key: &str) -> Result<wire::Info, Status> {
        let request = wire::StatSnapshotRequest { snapshotter: String::new(), key: key.into() };
        Ok(self.client.clone().stat(request).await?.into_inner().info.expect("has info"))
    }

    async fn list(&self, filters: &[&str]) -> Result<Vec<Vec<String>>, Status> {
        let filters = filters.iter().map(|&filter| filter.to_owned()).collect();
        let request = wire::ListSnapshotsRequest { snapshotter: String::new(), filters };
        let mut stream = self.client.clone().list(request).await?.into_inner();
        let mut pages = Vec::new();
        while let Some(page) = stream.message().await? {
            pages.push(page.info.into_iter().map(|info| info.name).collect());
        }
        Ok(pages)
    }

    async fn cleanup(&self) {
        self.client.clone().cleanup(wire::CleanupRequest::default()).await.expect("cleans up");
    }
}

fn map(labels: &[(&str, &str)]) -> HashMap<String, String> {
    labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
}

fn code<T>(result: Result<T, Status>) -> Code {
    result.map_or_else(|status| status.code(), |_| Code::Ok)
}

/// What containerd's unpacker does with a layer that is there: Prepare, look it up by filter, Stat.
#[tokio::test]
async fn a_lazy_layer_is_claimed_and_found() {
    let fixture = Fixture::start().await;
    let labels = [(REF, "sha256:one"), ("containerd.io/snapshot/cri.image-ref", "r/a:1"), ("urls", "")];
    let status = fixture.prepare("ns/1/extract-1 sha256:one", "", &labels).await.expect_err("is claimed");
    assert_eq!(status.code(), Code::AlreadyExists);
    assert!(status.message().contains("sha256:one"), "{status}");
    let filter = format!(r#"labels."{REF}"==sha256:one,parent=="""#);
    assert_eq!(fixture.list(&[&filter]).await.expect("lists"), [["sha256:one"]]);
    let info = fixture.stat("sha256:one").await.expect("is there");
    assert_eq!((info.kind(), info.labels), (wire::Kind::Committed, map(&labels)));
    assert_eq!(code(fixture.stat("ns/1/extract-1 sha256:one").await), Code::NotFound);

    // A second namespace gets it at once; on another parent it is another snapshot.
    assert_eq!(code(fixture.prepare("other/2/extract-2 sha256:one", "", &labels).await), Code::AlreadyExists);
    assert_eq!(fixture.engine.prepared.load(Ordering::Relaxed), 1);
    fixture.prepare("ns/3/own", "", &[]).await.expect("prepares");
    fixture.commit("ns/4/own", "ns/3/own", "").await.expect("commits");
    assert_eq!(code(fixture.prepare("ns/5/extract", "ns/4/own", &labels).await), Code::AlreadyExists);
    let filter = format!(r#"labels."{REF}"==sha256:one,parent=="ns/4/own""#);
    let found = fixture.list(&[&filter]).await.expect("lists");
    assert_eq!(found.concat().len(), 1);

    // A container on it.
    let mounts = fixture.prepare("ns/6/container", "sha256:one", &[]).await.expect("prepares");
    assert!(mounts.starts_with("overlay workdir=") && mounts.contains("lowerdir=/,"), "{mounts}");
    let usage = wire::UsageRequest { snapshotter: String::new(), key: "sha256:one".into() };
    let usage = fixture.client.clone().usage(usage).await.expect("answers").into_inner();
    assert_eq!((usage.size, usage.inodes), (7, 1));
}

/// No new container gets it, pulls unpack it, and those who have it keep it.
#[tokio::test]
async fn a_quarantined_layer_is_for_those_who_have_it() {
    let fixture = Fixture::start().await;
    let labels = [(REF, "sha256:one")];
    assert_eq!(code(fixture.prepare("ns/1/extract sha256:one", "", &labels).await), Code::AlreadyExists);
    fixture.prepare("ns/2/running", "sha256:one", &[]).await.expect("prepares");
    let one = Digest::of(b"sha256:one");
    fixture.engine.quarantined.lock().insert(one);
    let status = fixture.prepare("ns/3/new", "sha256:one", &[]).await.expect_err("is refused");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("quarantined: chunk 7 came wrong. It comes back by itself"), "{status}");
    assert_eq!(code(fixture.stat("ns/3/new").await), Code::NotFound);
    let mounts = wire::MountsRequest { snapshotter: String::new(), key: "ns/2/running".into() };
    fixture.client.clone().mounts(mounts).await.expect("a container that is there starts again");
    // Another namespace pulls the image: containerd unpacks the layer there.
    let mounts = fixture.prepare("other/4/extract sha256:one", "", &labels).await.expect("is left to containerd");
    assert_eq!(mounts, "bind rw,rbind");
    fixture.commit("other/5/sha256:one", "other/4/extract sha256:one", "").await.expect("commits");
    fixture.prepare("other/6/new", "other/5/sha256:one", &[]).await.expect("prepares");
    // A layer above it that containerd unpacks needs its directories only, which are right unless the index is wrong.
    let above = [(REF, "not-lazy above")];
    fixture.prepare("ns/8/extract above", "sha256:one", &above).await.expect("is left to containerd");
    fixture.engine.wrong.lock().insert(one);
    let status = fixture.prepare("ns/9/extract above", "sha256:one", &above).await.expect_err("is refused");
    assert!(status.message().contains("quarantined: chunk 7 came wrong"), "{status}");

    fixture.engine.quarantined.lock().remove(&one);
    fixture.prepare("ns/3/new", "sha256:one", &[]).await.expect("it is back");
    assert_eq!(code(fixture.prepare("ns/7/extract sha256:one", "", &labels).await), Code::AlreadyExists);
}

#[tokio::test]
async fn what_is_not_lazy_gets_an_ordinary_snapshot() {
    let fixture = Fixture::start().await;
    let mounts = fixture.prepare("k1", "", &[(REF, "not-lazy")]).await.expect("prepares");
    assert_eq!(mounts, "bind rw,rbind");
    // Claimed without being there, containerd would fail the pull.
    fixture.prepare("k2", "", &[(REF, "lie")]).await.expect("prepares");
    fixture.prepare("k3", "", &[]).await.expect("prepares");
    assert_eq!(fixture.engine.prepared.load(Ordering::Relaxed), 2);
    // No network for what cannot work anyway.
    assert_eq!(code(fixture.prepare("k4", "nobody", &[(REF, "x")]).await), Code::NotFound);
    assert_eq!(code(fixture.prepare("k4", "k3", &[(REF, "x")]).await), Code::InvalidArgument);
    assert_eq!(fixture.engine.prepared.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn the_hook_is_told_namespace_parent_and_deadline() {
    let fixture = Fixture::start().await;
    let request = |key: &str| {
        Request::new(wire::PrepareSnapshotRequest { key: key.into(), labels: map(&[(REF, key)]), ..Default::default() })
    };
    let mut with_metadata = request("a/1/x");
    with_metadata.metadata_mut().insert("containerd-namespace", "k8s.io".parse().expect("is a value"));
    with_metadata.set_timeout(Duration::from_secs(600));
    assert_eq!(code(fixture.client.clone().prepare(with_metadata).await), Code::AlreadyExists);
    assert_eq!(code(fixture.client.clone().prepare(request("a/1/y")).await), Code::AlreadyExists);
    assert_eq!(code(fixture.client.clone().prepare(request("plain")).await), Code::AlreadyExists);
    let seen = fixture.engine.seen.lock().clone();
    assert_eq!(seen, [r#"Some("k8s.io") None Some(600.0)"#, r#"Some("a") None None"#, "None None None"]);
}

#[tokio::test]
async fn a_waiting_prepare_stops_nobody_else() {
    let fixture = Arc::new(Fixture::start().await);
    let mut waiting: Vec<JoinHandle<Code>> = Vec::new();
    for number in 0..50 {
        let fixture = Arc::clone(&fixture);
        let task = async move { code(fixture.prepare(&format!("w{number}"), "", &[(REF, "block")]).await) };
        waiting.push(tokio::spawn(task));
    }
    while fixture.engine.prepared.load(Ordering::Relaxed) < 50 {
        tokio::task::yield_now().await;
    }
    let others = async {
        fixture.prepare("k", "", &[]).await.expect("prepares");
        fixture.stat("k").await.expect("is there");
        fixture.remove("k").await.expect("removes");
        fixture.cleanup().await;
    };
    tokio::time::timeout(PATIENCE, others).await.expect("in time");
    fixture.engine.blocked.notify_waiters();
    for task in waiting {
        assert_eq!(task.await.expect("ends"), Code::AlreadyExists);
    }
}

#[tokio::test]
async fn lists_come_in_pages() {
    let fixture = Fixture::start().await;
    for number in 0..250 {
        fixture.prepare(&format!("k{number:03}"), "", &[]).await.expect("prepares");
    }
    let pages = fixture.list(&[]).await.expect("lists");
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [100, 100, 50]);
    assert_eq!(pages.concat()[..2], ["k000", "k001"]);
    assert!(fixture.list(&["kind==view"]).await.expect("lists").is_empty());
    assert_eq!(code(fixture.list(&["kind=="]).await), Code::InvalidArgument);
}

#[tokio::test]
async fn failures_have_containerds_codes() {
    let fixture = Fixture::start().await;
    fixture.prepare("a", "", &[]).await.expect("prepares");
    assert_eq!(code(fixture.prepare("a", "", &[]).await), Code::AlreadyExists);
    assert_eq!(code(fixture.prepare("", "", &[]).await), Code::InvalidArgument);
    fixture.commit("base", "a", "").await.expect("commits");
    fixture.prepare("b", "base", &[]).await.expect("prepares");
    assert_eq!(code(fixture.remove("base").await), Code::FailedPrecondition);
    assert_eq!(code(fixture.remove("nobody").await), Code::NotFound);
    assert_eq!(code(fixture.commit("base", "b", "").await), Code::AlreadyExists);
    assert_eq!(code(fixture.commit("x", "base", "").await), Code::FailedPrecondition);
    assert_eq!(code(fixture.commit("x", "b", "other").await), Code::InvalidArgument);
    fixture.prepare("c", "", &[]).await.expect("prepares");
    assert_eq!(code(fixture.commit("x", "c", "base").await), Code::Unimplemented);
    fixture.commit("x", "b", "base").await.expect("commits");
    let mounts = wire::MountsRequest { snapshotter: String::new(), key: "x".into() };
    assert_eq!(code(fixture.client.clone().mounts(mounts).await), Code::FailedPrecondition);
    let update = wire::UpdateSnapshotRequest::default();
    assert_eq!(code(fixture.client.clone().update(update).await), Code::InvalidArgument);
}

/// A pull right after the image was deleted, many times, with deletion in the background and by Cleanup: a committed layer is
/// always in the engine, and in the end nothing is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleting_and_pulling_the_same_layers_again_never_loses_one() {
    let fixture = Arc::new(Fixture::start().await);
    let mut tasks = Vec::new();
    for task in 0..4 {
        let fixture = Arc::clone(&fixture);
        tasks.push(tokio::spawn(async move {
            // Two targets for four tasks: two pull the same.
            let target = format!("sha256:{}", task % 2);
            for round in 0..40 {
                let key = format!("x/{task}/{round}");
                match fixture.prepare(&key, "", &[(REF, &target)]).await {
                    // The other task deleted it between commit and answer.
                    Ok(_) => fixture.remove(&key).await.expect("removes"),
                    Err(status) => assert_eq!(status.code(), Code::AlreadyExists, "{status}"),
                }
                // The other task may have deleted it since; if not, it must be whole.
                let container = format!("c/{task}/{round}");
                match fixture.prepare(&container, &target, &[]).await {
                    Ok(_) => fixture.remove(&container).await.expect("removes"),
                    Err(status) => assert_eq!(status.code(), Code::NotFound, "{status}"),
                }
                let removed = code(fixture.remove(&target).await);
                assert!(matches!(removed, Code::Ok | Code::NotFound | Code::FailedPrecondition), "{removed:?}");
                if round % 8 == 0 {
                    fixture.cleanup().await;
                }
            }
        }));
    }
    for task in tasks {
        tokio::time::timeout(PATIENCE, task).await.expect("in time").expect("succeeds");
    }
    for target in ["sha256:0", "sha256:1"] {
        let _ = fixture.remove(target).await;
    }
    fixture.cleanup().await;
    assert!(fixture.list(&[]).await.expect("lists").is_empty());
    assert!(fixture.store.released().expect("lists").is_empty());
    assert!(fixture.engine.layers.lock().is_empty());
}

#[tokio::test]
async fn a_layer_that_could_not_be_released_is_released_later() {
    let fixture = Fixture::start().await;
    assert_eq!(code(fixture.prepare("k", "", &[(REF, "t")]).await), Code::AlreadyExists);
    *fixture.engine.refuse_release.lock() = true;
    fixture.remove("t").await.expect("removes");
    fixture.cleanup().await;
    assert_eq!(fixture.store.released().expect("lists").len(), 1);
    *fixture.engine.refuse_release.lock() = false;
    fixture.cleanup().await;
    assert!(fixture.store.released().expect("lists").is_empty());
    assert!(fixture.engine.layers.lock().is_empty());
}
