//! Seeders with trackers, and nodes with all that they need, in this process.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use layer::{ChunkIndex, Digest};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::config::SeederAddresses;
use crate::ingest::tests::{Sample, ingester};
use crate::ingest::{Ingester, control};
use crate::layer::Layer;
use crate::mesh::tracker::{self, Gate, Tracker};
use crate::mesh::{Mesh, Options};
use crate::node::{Node, NodeConfig};
use crate::registry::fake::FakeRegistry;
use crate::resolve::{Progress, Resolver};
use crate::security::Security;
use crate::serve::{self, Limits, Listener};
use crate::source::BlobRef;

pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A registry, and a folder for everything.
pub(super) struct Cluster {
    pub(super) registry: FakeRegistry,
    folder: tempfile::TempDir,
}

/// A seeder; dropping it stops it.
pub(super) struct Seeder {
    pub(super) ingester: Ingester,
    pub(super) tracker: Tracker,
    pub(super) gate: Gate,
    pub(super) address: SocketAddr,
    _stop: DropGuard,
}

/// How a node differs from others.
#[derive(Clone, Debug)]
pub(super) struct MemberSetup {
    /// Where it serves others.
    pub(super) listen: String,
    /// What others are told of that; empty: the truth.
    pub(super) address: String,
    /// Where it reaches the registry, which then has that name.
    pub(super) registry: Option<SocketAddr>,
}

impl Default for MemberSetup {
    fn default() -> Self {
        Self { listen: "127.0.0.1:0".to_owned(), address: String::new(), registry: None }
    }
}

/// A node that takes part.
pub(super) struct Member {
    pub(super) node: Arc<Node>,
    pub(super) resolver: Arc<Resolver>,
    pub(super) mesh: Mesh,
}

impl Cluster {
    pub(super) async fn new() -> Self {
        Self { registry: FakeRegistry::start().await, folder: tempfile::tempdir().unwrap() }
    }

    /// Where the stores are.
    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts a seeder whose store is called `name`, at a port that may still be in use for a moment; port 0: any.
    pub(super) async fn seeder(&self, name: &str, port: u16) -> Seeder {
        let ingester = ingester(&self.folder.path().join(name), &self.registry, &Security::Off);
        let stop = CancellationToken::new();
        let tracker = Tracker::start(ingester.clone(), stop.clone());
        let gate = Gate::new(ingester.clone(), tracker.clone(), 0);
        let router = serve::router(Arc::new(gate.clone()), 64);
        let router = tracker::route(control::route(router, ingester.clone()), tracker.clone());
        let began = Instant::now();
        let listener = loop {
            match Listener::bind(&format!("127.0.0.1:{port}"), &Security::Off, Limits::default()).await {
                Ok(listener) => break listener,
                Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let address = listener.local_addr().unwrap();
        tokio::spawn(listener.serve(router, stop.clone()));
        Seeder { ingester, tracker, gate, address, _stop: stop.drop_guard() }
    }

    /// Starts a node whose store is called `name`.
    pub(super) fn member(&self, name: &str, seeders: &[SocketAddr]) -> Member {
        self.member_as(name, seeders, MemberSetup::default())
    }

    /// The same with everything of choice.
    pub(super) fn member_as(&self, name: &str, seeders: &[SocketAddr], setup: MemberSetup) -> Member {
        let MemberSetup { listen, address, registry } = setup;
        let config = NodeConfig { share: true, ..NodeConfig::new(self.folder.path().join(name)) };
        let node = Node::open(config).unwrap();
        let seeders = SeederAddresses::new(seeders.iter().map(SocketAddr::to_string)).unwrap();
        let mut registries = self.registry.config();
        if let Some(registry) = registry {
            let plain = registries.hosts.values().next().cloned().unwrap();
            registries.hosts.insert(registry.to_string(), plain);
        }
        let resolver = Resolver::new(node.clone(), &seeders, &Security::Off, &registries);
        let options = Options { listen, address, zone: String::new(), leech: false, upload_rate: 0 };
        let mesh = Mesh::start(&node, options, Security::Off, resolver.seeders().clone());
        Member { node, resolver: Arc::new(resolver), mesh }
    }
}

impl Seeder {
    /// Blobs with their numbers of members.
    pub(super) fn members(&self) -> Vec<(Digest, usize)> {
        let mut members = self.tracker.members();
        members.sort_by_key(|(blob, _)| *blob.as_bytes());
        members
    }
}

impl Member {
    pub(super) async fn resolve(&self, blob: &BlobRef) -> Arc<Layer> {
        let (progress, _) = watch::channel(Progress::default());
        tokio::time::timeout(PATIENCE, self.resolver.resolve(blob, progress)).await.expect("it ends").unwrap()
    }
}

/// Reads all of a layer.
pub(super) async fn read_all(layer: &Arc<Layer>, sample: &Sample) {
    for chunk in layer.geometry().chunks() {
        let range = layer.geometry().range(ChunkIndex(chunk));
        let bytes = tokio::time::timeout(PATIENCE, layer.read(range.clone())).await.unwrap().unwrap();
        assert!(bytes == sample.device[range.start as usize..range.end as usize], "chunk {chunk} differs");
    }
}

pub(super) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
