//! All parts of the daemon, put together.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use node::config::SecurityConfig;
use node::mesh::Mesh;
use node::resolve::Resolver;
use node::security::{Role, Security};
use node::{Node, NodeConfig, enrol, seeder};
use proto::drover::node::v1::node_server::NodeServer;
use tokio::runtime::{Builder, Runtime};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::config::Config;
use crate::containerd::about::About;
use crate::containerd::connection::Connection;
use crate::containerd::content::ContentStore;
use crate::containerd::{Service, Sweeper};
use crate::drain::Drain;
use crate::fuse::{self, DeviceMount, ReadAhead, SessionOptions};
use crate::lazy::devices::LayerDevices;
use crate::lazy::hints::Hints;
use crate::lazy::images::Images;
use crate::lazy::labels;
use crate::lazy::prepare::ImageLayers;
use crate::lazy::resolutions::Resolutions;
use crate::mount::layers::LayerMounts;
use crate::mount::probe::Ability;
use crate::snapshots::Store;
use crate::status::service::StatusService;

/// How long an orderly stop waits for calls that are under way. A `Prepare` that takes longer is repeated by containerd.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// After a daemon died, its readers wait: what only the next pull needs takes no processor from them for so long.
const READERS_FIRST: Duration = Duration::from_secs(2);

/// What the keeper hands to each daemon.
#[derive(Debug)]
pub struct Handed {
    /// The FUSE connection, mounted at [`Config::devices`].
    pub fuse: OwnedFd,
    /// The socket that containerd connects to, listening.
    pub listener: UnixListener,
    /// An earlier daemon served the connection.
    pub adopted: bool,
    /// This program, to start mount processes.
    pub program: PathBuf,
}

/// The runtime that [`serve`] runs on, in a process that keeps little of the memory that it needed for a moment. To be called before
/// there are other threads.
pub fn runtime() -> io::Result<Runtime> {
    node::bound_malloc();
    Builder::new_multi_thread().enable_all().build()
}

/// Serves until `stop` resolves. Calls `ready` when containerd may call. Start-up needs no network.
pub async fn serve(
    config: &Config,
    handed: Handed,
    ready: impl FnOnce() -> anyhow::Result<()>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let node = Node::open(NodeConfig {
        cache: config.cache,
        read_deadline: config.read.deadline,
        fill: config.fill.enabled,
        fill_rate: config.fill.rate.as_u64(),
        download_rate: config.limits.download.as_u64(),
        registry_rate: config.limits.registry.as_u64(),
        leech: config.mesh.leech,
        share: config.mesh().is_some() && !config.mesh.leech,
        ..NodeConfig::new(&config.root)
    })
    .with_context(|| format!("cannot open the layers below {}", config.root.display()))?;
    // Before anything is mounted: a mount process of an earlier daemon may be waiting for this connection.
    let session = fuse::session::run(
        handed.fuse,
        Arc::new(DeviceMount(LayerDevices(node.clone()))),
        SessionOptions {
            adopted: handed.adopted,
            read_ahead: Some(ReadAhead { mount_point: config.devices(), bytes: READ_AHEAD }),
            ..SessionOptions::default()
        },
    )
    .context("cannot serve the FUSE mount")?;
    let security = Security::load(&config.security, Role::Node, &config.root).context("cannot set up security")?;
    enrol(config, &security);
    let layers = {
        let (node, config, program, security) = (node.clone(), config.clone(), handed.program, security.clone());
        tokio::task::spawn_blocking(move || open(node, &config, &security, program, handed.adopted))
            .await
            .context("opening panicked")??
    };
    let layers = Arc::new(layers);
    tokio::task::spawn_blocking({
        let layers = layers.clone();
        move || layers.restore()
    })
    .await
    .context("restoring panicked")??;

    let mesh = config.mesh().map(|options| {
        let seeders = layers.resolutions.resolver().seeders().clone();
        Mesh::start(&node, options, security, seeders)
    });

    let sweeper = Arc::new(Sweeper::new(layers.store.clone(), layers.clone()));
    tokio::spawn({
        let sweeper = sweeper.clone();
        async move { sweeper.run().await }
    });
    tokio::spawn(layers.clone().sweep_orphans());
    tokio::spawn(layers.clone().renew_for_ever());
    handed.listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(handed.listener)?;
    let (stopping, stopped) = tokio::sync::oneshot::channel::<()>();
    let about = About::new(&Connection::new(&config.containerd.socket));
    let service = Service::new(layers.store.clone(), layers.clone(), sweeper).with_about(about);
    let mut server = std::pin::pin!(
        Server::builder()
            .add_service(service.into_server())
            .add_service(NodeServer::new(StatusService {
                layers: layers.clone(),
                mesh: mesh.as_ref().map(Mesh::watch),
            }))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
                let _ = stopped.await;
            })
    );
    ready()?;
    tokio::spawn(async move {
        if handed.adopted {
            tokio::time::sleep(READERS_FIRST).await;
        }
        let _ = tokio::task::spawn_blocking(labels::compile_grammar).await;
    });
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        socket = %config.socket().display(),
        layers = node.layers().len(),
        adopted = handed.adopted,
        "serving"
    );
    tokio::select! {
        ended = &mut server => ended.context("the gRPC server ended")?,
        () = stop => {
            let _ = stopping.send(());
            if tokio::time::timeout(STOP_PATIENCE, server).await.is_err() {
                tracing::warn!("calls were still under way at the stop");
            }
        }
    }
    // From here on the next daemon answers what this one has not.
    session.leave();
    drop(mesh);
    node.shutdown().await;
    Ok(())
}

/// Readahead of the device mount: what EROFS asks for and no more. The kernel takes requests that follow each other in a device for a
/// sequential reader, but they are neighbouring files. With 1 MiB the first output of the demonstration took a quarter more bytes.
const READ_AHEAD: u64 = 128 << 10;

/// Sees to this node's certificate, where the configuration says so.
fn enrol(config: &Config, security: &Security) {
    if let (SecurityConfig::Enrol(enrol), Security::Mutual(identity)) = (&config.security, security) {
        let seeders = seeder::Client::new(&config.seeder.addresses, security.clone(), seeder::Options::default());
        tokio::spawn(enrol::client::run(identity.clone(), seeders, enrol.token.clone()));
    }
}

fn open(
    node: Arc<Node>,
    config: &Config,
    security: &Security,
    program: PathBuf,
    adopted: bool,
) -> anyhow::Result<ImageLayers> {
    let ability = Ability::probe(&config.root);
    let mounts = Arc::new(LayerMounts::open(node.clone(), &config.root, config.devices(), program, adopted)?);
    let store = Arc::new(
        Store::open(&config.root, mounts.clone())
            .with_context(|| format!("cannot open the snapshots below {}", config.root.display()))?,
    );
    let resolver = Resolver::new(node.clone(), &config.seeder.addresses, security, &config.registry);
    let containerd = Connection::new(&config.containerd.socket);
    let registries = config.registry.hosts.keys().cloned();
    Ok(ImageLayers {
        node,
        resolutions: Resolutions::new(Arc::new(resolver)),
        store,
        mounts,
        images: Images::new(ContentStore::new(&containerd), registries),
        hints: Arc::new(Hints::new(About::new(&containerd))),
        stall: config.prepare.stall,
        ability: Some(Arc::new(ability)),
        drain: Drain::of(&config.root),
    })
}
