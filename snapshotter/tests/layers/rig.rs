//! All of a daemon but its socket to containerd and its keeper.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use layer::Digest;
use layer::index::Compression;
use layer::ingest::{Ingest, Options};
use node::config::{CacheConfig, RegistriesConfig, SecurityConfig, SeederAddresses};
use node::resolve::Resolver;
use node::security::{Role, Security};
use node::store::LayerParts;
use node::{Node, NodeConfig};
use snapshotter::containerd::about::About;
use snapshotter::containerd::connection::Connection;
use snapshotter::containerd::content::ContentStore;
use snapshotter::fuse::{self, DeviceMount, SessionOptions};
use snapshotter::lazy::devices::LayerDevices;
use snapshotter::lazy::hints::Hints;
use snapshotter::lazy::images::Images;
use snapshotter::lazy::prepare::ImageLayers;
use snapshotter::lazy::resolutions::Resolutions;
use snapshotter::mount::layers::LayerMounts;
use snapshotter::mount::table::mounts_below;
use snapshotter::mount::{erofs, probe};
use snapshotter::snapshots::Store;

/// Runs `test` in a folder of its own, where the machine can; all that it mounts there is unmounted.
pub(crate) fn run<F: Future<Output = ()>>(test: impl FnOnce(PathBuf) -> F) {
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
    runtime.block_on(test(root.to_owned()));
    runtime.shutdown_timeout(Duration::from_secs(5));
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

pub(crate) struct Rig {
    pub(crate) node: Arc<Node>,
    pub(crate) store: Arc<Store>,
    pub(crate) layers: Arc<ImageLayers>,
    session: fuse::SessionHandle,
    root: PathBuf,
}

impl Rig {
    pub(crate) async fn open(root: &Path, seeders: &SeederAddresses, registries: &RegistriesConfig) -> Self {
        let devices = root.join("devices");
        std::fs::create_dir(&devices).expect("creates");
        let node = Node::open(NodeConfig { cache: CacheConfig::WHOLE_DISK, ..NodeConfig::new(root) }).expect("opens");
        let connection = fuse::mount::mount(&devices).expect("mounts");
        let handler = Arc::new(DeviceMount(LayerDevices(node.clone())));
        let session = fuse::session::run(connection, handler, SessionOptions::default()).expect("serves");
        let program = env!("CARGO_BIN_EXE_drover-snapshotter").into();
        let opened = {
            let (node, root) = (node.clone(), root.to_owned());
            tokio::task::spawn_blocking(move || LayerMounts::open(node, &root, devices, program, false))
        };
        let mounts = Arc::new(opened.await.expect("opens").expect("opens"));
        let store = Arc::new(Store::open(root, mounts.clone()).expect("opens"));
        let security = Security::load(&SecurityConfig::Off, Role::Node, root).expect("is off");
        let resolver = Resolver::new(node.clone(), seeders, &security, registries);
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
        Self { node, store, layers, session, root: root.to_owned() }
    }

    pub(crate) async fn end(self) {
        let root = self.root;
        tokio::task::spawn_blocking(move || drop(Unmount(&root))).await.expect("unmounts");
        self.session.leave();
        self.node.shutdown().await;
    }
}

/// What a layer has at a path: a directory with its mode, or a file with its text.
pub(crate) enum Entry<'a> {
    Directory(u32),
    File(&'a str),
}

pub(crate) fn tar(entries: &[(&str, Entry<'_>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, entry) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_path(path).expect("a path");
        let text = match entry {
            Entry::Directory(mode) => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(*mode);
                ""
            }
            Entry::File(text) => {
                header.set_mode(0o644);
                text
            }
        };
        header.set_size(text.len() as u64);
        header.set_cksum();
        builder.append(&header, text.as_bytes()).expect("appends");
    }
    builder.into_inner().expect("ends")
}

/// The layer of a blob without compression, as the node knows it after a seeder told it.
pub(crate) fn parts(blob: &[u8]) -> LayerParts {
    let mut ingest =
        Ingest::new(Digest::of(blob), Some(blob.len() as u64), Some(Compression::None), Options::default())
            .expect("begins");
    ingest.push(blob, &mut |_, _, _| {}).expect("takes");
    let index = ingest.finish(&mut |_, _, _| {}).expect("ends");
    LayerParts {
        header: index.header,
        signature: Vec::new(),
        entries: index.entries,
        chunk_digests: index.chunk_digests,
        spans: Some(index.spans),
    }
}
