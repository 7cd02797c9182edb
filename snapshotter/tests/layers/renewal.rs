//! A layer whose index is wrong, as the daemon and those who stand on it see it, until a seeder has a right one.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use layer::index::Header;
use layer::{ChainId, ChunkIndex, Digest};
use node::config::{CacheConfig, RegistriesConfig, RegistryConfig, SeederAddresses};
use node::ingest::{self, Ingester, control};
use node::mesh::tracker::{Gate, Tracker};
use node::registry;
use node::security::Security;
use node::serve::{self, Limits, Listener};
use node::store::LayerParts;
use snapshotter::containerd::{LazyLayers, LazyOutcome, PrepareLazy};
use snapshotter::snapshots::{Creation, Kind, Labels, StoreError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::rig::{self, Entry, Rig};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_layer_with_a_wrong_index_is_had_anew() {
    rig::run(renewed);
}

async fn renewed(root: PathBuf) {
    let honest = rig::tar(&[("etc", Entry::Directory(0o750)), ("etc/honest", Entry::File("honest"))]);
    let lie = rig::tar(&[("etc", Entry::Directory(0o700)), ("etc/lie", Entry::File("a lie"))]);
    // It says nothing of the directory, so that it has what the layer below says of it.
    let above = rig::tar(&[("etc/above", Entry::File("above"))]);
    let registry = serve_blob(honest.clone()).await.to_string();
    let plain = RegistryConfig { plain_http: true, ..RegistryConfig::default() };
    let registries = RegistriesConfig { config_path: Vec::new(), hosts: [(registry.clone(), plain)].into() };
    let (seeder, _stop) = seeder(&root.join("seeder"), &registries).await;
    let seeders = SeederAddresses::new([seeder.to_string()]).expect("an address");
    let rig = Rig::open(&root, &seeders, &registries).await;
    let pull = Pull { rig: &rig, image: format!("{registry}/team/app:1") };

    let wrong = rig.node.insert(&lying(&lie, &honest)).expect("inserts");
    rig.node.insert(&rig::parts(&above)).expect("inserts");
    let lower = ChainId::bottom(Digest::of(&honest));
    let upper = ChainId::on(Some(lower), Digest::of(&above));
    assert_eq!(pull.prepare(&honest, None, lower).await, LazyOutcome::Committed);
    assert_eq!(pull.prepare(&above, Some(lower), upper).await, LazyOutcome::Committed);
    let container = |key, chain: ChainId| {
        let parent = chain.to_string();
        rig.store.create(Creation::new(Kind::Active, key, Some(&parent)))
    };
    container("ns/1/before", upper).expect("creates");
    let [shown_above, shown] = shown(&rig, upper).try_into().expect("two layers");
    assert_eq!(mode(&shown_above.join("etc")), 0o700);
    let used = File::open(&shown).expect("is mounted");

    for (number, plain) in lie.chunks(wrong.geometry().chunk_size() as usize).enumerate() {
        assert!(wrong.add_chunk(ChunkIndex(number as u32), plain));
    }
    let began = Instant::now();
    while !wrong.has_wrong_index() {
        assert!(began.elapsed() < PATIENCE, "nobody finds out");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // A pull leaves it as it is: only who mounts it anew for all that stand on it may replace it.
    let LazyOutcome::NotLazy { reason } = pull.prepare(&honest, None, lower).await else { panic!("it is wrong") };
    assert!(reason.contains("quarantined"), "{reason}");
    let refused = container("ns/2/meanwhile", upper).expect_err("is refused");
    assert!(matches!(refused, StoreError::Quarantined { .. }), "{refused}");

    rig.layers.renew_quarantined().await;
    let right = rig.node.layer(Digest::of(&honest)).expect("is there");
    assert!(right.quarantine().is_none() && right.number() != wrong.number());
    container("ns/3/after", upper).expect("creates");
    let [shown_above, shown] = self::shown(&rig, upper).try_into().expect("two layers");
    assert_eq!(mode(&shown.join("etc")), 0o750);
    assert_eq!(mode(&shown_above.join("etc")), 0o750, "the layer above has what the wrong index said");
    assert!(!shown.join("etc/lie").exists());
    // By another process: this one serves it.
    let file = shown.join("etc/honest");
    let read = tokio::task::spawn_blocking(move || Command::new("cat").arg(file).output()).await;
    let read = read.expect("ends").expect("there is a cat");
    assert_eq!(String::from_utf8_lossy(&read.stdout), "honest", "{}", String::from_utf8_lossy(&read.stderr));
    // Who had the old mount still has it.
    let old = PathBuf::from(format!("/proc/self/fd/{}", used.as_raw_fd()));
    assert_eq!(mode(&old.join("etc")), 0o700);
    drop(used);
    rig.layers.renew_quarantined().await;
    assert_eq!(rig.node.layer(Digest::of(&honest)).map(|layer| layer.number()), Some(right.number()));
    rig.end().await;
}

/// Where nobody stands on it there is nothing to mount: it goes, so that the next pull begins anew.
#[test]
fn a_wrong_index_that_nobody_uses_goes() {
    rig::run(|root| async move {
        let (honest, lie) = (rig::tar(&[("a", Entry::File("a"))]), rig::tar(&[("b", Entry::File("b"))]));
        let rig = Rig::open(&root, &SeederAddresses::default(), &RegistriesConfig::default()).await;
        let parts = lying(&lie, &honest);
        let wrong = rig.node.insert(&parts).expect("inserts");
        for (number, plain) in lie.chunks(wrong.geometry().chunk_size() as usize).enumerate() {
            wrong.add_chunk(ChunkIndex(number as u32), plain);
        }
        let began = Instant::now();
        while !wrong.has_wrong_index() {
            assert!(began.elapsed() < PATIENCE, "nobody finds out");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        rig.layers.renew_quarantined().await;
        assert!(rig.node.layer(Digest::of(&honest)).is_none());
        assert!(rig.node.insert(&parts).is_err(), "it is remembered");
        rig.end().await;
    });
}

/// A client that pulls the image.
struct Pull<'a> {
    rig: &'a Rig,
    image: String,
}

impl Pull<'_> {
    async fn prepare(&self, blob: &[u8], parent: Option<ChainId>, chain: ChainId) -> LazyOutcome {
        let (target, parent) = (chain.to_string(), parent.map(|parent| parent.to_string()));
        let labels: Labels = [
            ("containerd.io/snapshot.ref", target.clone()),
            ("containerd.io/snapshot/cri.image-ref", self.image.clone()),
            ("containerd.io/snapshot/cri.layer-digest", Digest::of(blob).to_string()),
        ]
        .map(|(label, value)| (label.to_owned(), value))
        .into();
        let key = format!("ns/9/extract {target}");
        let request = PrepareLazy {
            snapshotter: "drover",
            key: &key,
            parent: parent.as_deref(),
            target: &target,
            labels: &labels,
            namespace: None,
            deadline: None,
        };
        self.rig.layers.prepare(request).await
    }
}

/// The directories of a chain's layers, top first.
fn shown(rig: &Rig, chain: ChainId) -> Vec<PathBuf> {
    rig.store.lowers(Some(&chain.to_string())).map(|lower| lower.expect("is mounted")).collect()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).mode() & 0o7777
}

/// An index of `lie` that names `blob`.
fn lying(lie: &[u8], blob: &[u8]) -> LayerParts {
    let parts = rig::parts(lie);
    let mut header = parts.header.encode().to_vec();
    // A blob without compression has the same digest as its device; both have to lie.
    while let Some(at) = header.windows(32).position(|window| window == Digest::of(lie).as_bytes()) {
        header[at..at + 32].copy_from_slice(Digest::of(blob).as_bytes());
    }
    LayerParts { header: Header::parse(&header).expect("a header"), ..parts }
}

/// A seeder in this process.
async fn seeder(root: &Path, registries: &RegistriesConfig) -> (SocketAddr, DropGuard) {
    fs::create_dir(root).expect("creates");
    let client = registry::Client::new(registries.clone(), registry::Options::default());
    let options = ingest::Options { cache: CacheConfig::WHOLE_DISK, ..ingest::Options::default() };
    let store = ingest::store::Store::open(root).expect("opens");
    let ingester = Ingester::new(store, client, None, options).expect("begins");
    let stop = CancellationToken::new();
    let tracker = Tracker::start(ingester.clone(), stop.clone());
    let router = serve::router(Arc::new(Gate::new(ingester.clone(), tracker, 0)), 16);
    let listener = Listener::bind("127.0.0.1:0", &Security::Off, Limits::default()).await.expect("listens");
    let address = listener.local_addr().expect("has an address");
    tokio::spawn(listener.serve(control::route(router, ingester), stop.clone()));
    (address, stop.drop_guard())
}

/// A registry that has one blob.
async fn serve_blob(blob: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
    let (address, digest) = (listener.local_addr().expect("has an address"), Digest::of(&blob).to_string());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") && stream.read_buf(&mut request).await.is_ok_and(|read| read > 0) {}
            let is_here = String::from_utf8_lossy(&request).contains(&digest);
            let (status, body) = if is_here { ("200 OK", &blob[..]) } else { ("404 Not Found", &[][..]) };
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            let _ = stream.write_all(&[head.as_bytes(), body].concat()).await;
        }
    });
    address
}
