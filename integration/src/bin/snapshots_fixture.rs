//! Serves ordinary snapshots alone: the Snapshots service without keeper, FUSE and lazy layers, for containerd's suite.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Parser;
use snapshotter::containerd::{NoLazyLayers, Service, Sweeper};
use snapshotter::snapshots::Store;
use snapshotter::snapshots::mounts::NoLayerMounts;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

#[derive(Debug, Parser)]
struct Arguments {
    /// Where snapshots are kept.
    #[arg(long)]
    root: PathBuf,
    /// Where to serve.
    #[arg(long)]
    socket: PathBuf,
}

#[tokio::main]
async fn main() -> Result<()> {
    let Arguments { root, socket } = Arguments::parse();
    let store = Arc::new(Store::open(&root, Arc::new(NoLayerMounts))?);
    let lazy = Arc::new(NoLazyLayers);
    let sweeper = Arc::new(Sweeper::new(Arc::clone(&store), Arc::clone(&lazy)));
    let service = Service::new(store, lazy, Arc::clone(&sweeper));
    let listener = UnixListener::bind(&socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    let mut terminated = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    let end = async move {
        terminated.recv().await;
    };
    tokio::select! {
        served = Server::builder()
            .add_service(service.into_server())
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), end) => served.context("cannot serve"),
        () = sweeper.run() => Ok(()),
    }
}
