//! An image of 128 layers whose indexes are on the node: all of its `Prepare` calls together, over a real socket, with real mounts.
//! Needs root and a kernel with file-backed EROFS; says so where it skips.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use layer::index::Compression;
use layer::ingest::{Ingest, Options};
use layer::{ChainId, Digest};
use node::config::{RegistriesConfig, SecurityConfig, SeederAddresses};
use node::resolve::Resolver;
use node::security::{Role, Security};
use node::store::LayerParts;
use node::{Node, NodeConfig};
use proto::containerd::services::snapshots::v1 as wire;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use snapshotter::containerd::about::About;
use snapshotter::containerd::connection::Connection;
use snapshotter::containerd::content::ContentStore;
use snapshotter::containerd::{Service, Sweeper};
use snapshotter::fuse::{self, DeviceMount, SessionOptions};
use snapshotter::lazy::devices::LayerDevices;
use snapshotter::lazy::hints::Hints;
use snapshotter::lazy::images::Images;
use snapshotter::lazy::labels;
use snapshotter::lazy::prepare::ImageLayers;
use snapshotter::lazy::resolutions::Resolutions;
use snapshotter::mount::layers::LayerMounts;
use snapshotter::mount::table::mounts_below;
use snapshotter::mount::{erofs, probe};
use snapshotter::snapshots::Store;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Endpoint, Server, Uri};
use tonic::{Code, Request};

const LAYERS: usize = 128;

/// One layer with one file, as the node knows it after a seeder told it.
fn parts(number: usize) -> LayerParts {
    let mut header = tar::Header::new_gnu();
    let text = format!("layer {number}\n");
    header.set_path(format!("usr/share/file-{number}")).expect("a path");
    header.set_size(text.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    let mut builder = tar::Builder::new(Vec::new());
    builder.append(&header, text.as_bytes()).expect("appends");
    let blob = builder.into_inner().expect("ends");
    let mut ingest =
        Ingest::new(Digest::of(&blob), Some(blob.len() as u64), Some(Compression::None), Options::default())
            .expect("begins");
    ingest.push(&blob, &mut |_, _, _| {}).expect("takes");
    let index = ingest.finish(&mut |_, _, _| {}).expect("ends");
    LayerParts {
        header: index.header,
        signature: Vec::new(),
        entries: index.entries,
        chunk_digests: index.chunk_digests,
        spans: Some(index.spans),
    }
}

/// Unmounts all below a folder, also when the test fails.
struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let mut mounts = mounts_below(self.0).unwrap_or_default();
        mounts.reverse();
        for mount in mounts {
            let _ = erofs::unmount(&mount.target);
        }
    }
}

#[test]
fn an_image_of_128_known_layers_is_prepared_at_once() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: mounting needs root");
        return;
    }
    let folder = tempfile::tempdir().expect("temporary directory");
    let root = folder.path();
    let _unmount = Unmount(root);
    if let Err(error) = probe::file_backed_erofs(root) {
        println!("skipped: this kernel cannot: {error}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let took = runtime.block_on(prepare_all(root));
    runtime.shutdown_timeout(Duration::from_secs(5));
    // Printed, not asserted: the promise is 300 ms, with optimisation and nothing else running.
    println!("{LAYERS} layers prepared in {took:?}");
}

async fn prepare_all(root: &Path) -> Duration {
    let devices = root.join("devices");
    std::fs::create_dir(&devices).expect("creates");
    let node = Node::open(NodeConfig { cache: node::config::CacheConfig::WHOLE_DISK, ..NodeConfig::new(root) })
        .expect("opens");
    let all: Vec<LayerParts> = (0..LAYERS).map(parts).collect();
    for parts in &all {
        node.insert(parts).expect("inserts");
    }
    let connection = fuse::mount::mount(&devices).expect("mounts");
    let handler = Arc::new(DeviceMount(LayerDevices(node.clone())));
    let session = fuse::session::run(connection, handler, SessionOptions::default()).expect("serves");

    let program = env!("CARGO_BIN_EXE_drover-snapshotter").into();
    let opened = {
        let (node, root, devices) = (node.clone(), root.to_owned(), devices.clone());
        tokio::task::spawn_blocking(move || LayerMounts::open(node, &root, devices, program, false))
    };
    let mounts = Arc::new(opened.await.expect("opens").expect("opens"));
    let store = Arc::new(Store::open(root, mounts.clone()).expect("opens"));
    let security = Security::load(&SecurityConfig::Off, Role::Node, root).expect("is off");
    let resolver = Resolver::new(node.clone(), &SeederAddresses::default(), &security, &RegistriesConfig::default());
    let containerd = Connection::new(&root.join("no-containerd.sock"));
    let layers = Arc::new(ImageLayers {
        node: node.clone(),
        resolutions: Resolutions::new(Arc::new(resolver)),
        store: store.clone(),
        mounts,
        images: Images::new(ContentStore::new(&containerd), []),
        hints: Arc::new(Hints::new(About::new(&containerd))),
        stall: Duration::from_secs(10),
        ability: None,
        drain: snapshotter::drain::Drain::of(root),
    });
    let sweeper = Arc::new(Sweeper::new(store.clone(), layers.clone()));
    let socket = root.join("drover.sock");
    let incoming = UnixListenerStream::new(UnixListener::bind(&socket).expect("listens"));
    let service = Service::new(store, layers, sweeper).into_server();
    let server = tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    let connect = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://drover").connect_with_connector(connect).await.expect("connects");
    let mut client = SnapshotsClient::new(channel);

    // As the daemon does when it starts.
    labels::compile_grammar();
    let blobs: Vec<Digest> = all.iter().map(|parts| parts.header.blob()).collect();
    let begun = Instant::now();
    let mut parent: Option<ChainId> = None;
    for (number, layer) in all.iter().enumerate() {
        let chain = ChainId::on(parent, layer.header.diff_id());
        // Containerd cuts the list where the label would be longer than 4096 bytes.
        let list: Vec<String> = blobs.iter().skip(number).take(55).map(Digest::to_string).collect();
        let labels = HashMap::from([
            ("containerd.io/snapshot.ref".to_owned(), chain.to_string()),
            ("containerd.io/snapshot/cri.image-ref".to_owned(), "registry.example/many:1".to_owned()),
            ("containerd.io/snapshot/cri.layer-digest".to_owned(), layer.header.blob().to_string()),
            ("containerd.io/snapshot/cri.image-layers".to_owned(), list.join(",")),
        ]);
        let request = wire::PrepareSnapshotRequest {
            snapshotter: "drover".to_owned(),
            key: format!("default/{number}/extract-{number} {chain}"),
            parent: parent.map(|parent| parent.to_string()).unwrap_or_default(),
            labels,
        };
        let answer = client.prepare(Request::new(request)).await.expect_err("is lazy");
        assert_eq!(answer.code(), Code::AlreadyExists, "{}", answer.message());
        parent = Some(chain);
    }
    let took = begun.elapsed();

    let container = wire::PrepareSnapshotRequest {
        snapshotter: "drover".to_owned(),
        key: "default/1000/container".to_owned(),
        parent: parent.map(|parent| parent.to_string()).unwrap_or_default(),
        labels: HashMap::new(),
    };
    let mounts = client.prepare(Request::new(container)).await.expect("prepares").into_inner().mounts;
    let lowers = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir=")).expect("an overlay");
    let lowers: Vec<&str> = lowers.split(':').collect();
    assert_eq!(lowers.len(), LAYERS);
    for number in [0, 77, LAYERS - 1] {
        let below = Path::new(lowers[LAYERS - 1 - number]);
        let file = below.join(format!("usr/share/file-{number}"));
        assert!(std::fs::symlink_metadata(&file).is_ok(), "{} is missing", file.display());
    }
    server.abort();
    tokio::task::spawn_blocking({
        let root = root.to_owned();
        move || drop(Unmount(&root))
    })
    .await
    .expect("unmounts");
    session.leave();
    node.shutdown().await;
    took
}
