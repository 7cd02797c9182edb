//! An image of 128 layers whose indexes are on the node: all of its `Prepare` calls together, over a real socket.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use hyper_util::rt::TokioIo;
use layer::{ChainId, Digest};
use node::config::{RegistriesConfig, SeederAddresses};
use node::store::LayerParts;
use proto::containerd::services::snapshots::v1 as wire;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use snapshotter::containerd::{Service, Sweeper};
use snapshotter::lazy::labels;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Endpoint, Server, Uri};
use tonic::{Code, Request};

use super::rig::{self, Entry, Rig};

const LAYERS: usize = 128;

#[test]
fn an_image_of_128_known_layers_is_prepared_at_once() {
    rig::run(prepare_all);
}

async fn prepare_all(root: PathBuf) {
    let rig = Rig::open(&root, &SeederAddresses::default(), &RegistriesConfig::default()).await;
    let one = |number| rig::tar(&[(&format!("usr/share/file-{number}"), Entry::File(&format!("layer {number}\n")))]);
    let all: Vec<LayerParts> = (0..LAYERS).map(|number| rig::parts(&one(number))).collect();
    for parts in &all {
        rig.node.insert(parts).expect("inserts");
    }
    let sweeper = Arc::new(Sweeper::new(rig.store.clone(), rig.layers.clone()));
    let socket = root.join("drover.sock");
    let incoming = UnixListenerStream::new(UnixListener::bind(&socket).expect("listens"));
    let service = Service::new(rig.store.clone(), rig.layers.clone(), sweeper).into_server();
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
    rig.end().await;
    // Printed, not asserted: the promise is 300 ms, with optimisation and nothing else running.
    println!("{LAYERS} layers prepared in {took:?}");
}
