//! A lazy pull by our own client, for those that leave a snapshotter no room: `ctr` of containerd 1.6 and 1.7 and `ctr --local` fetch
//! every layer before they ask for a snapshot.
//!
//! - [`import`]: manifests and configuration into containerd's content store, the name into its image store.
//! - [`unpack`]: one snapshot after the other, lazy where the snapshotter says so.
//! - [`progress`]: what the user sees of it.

pub mod import;
pub mod progress;
pub mod unpack;

use std::path::PathBuf;

use anyhow::Context;
use layer::Digest;
use node::config::RegistriesConfig;
use node::registry::image::{ImageRef, Platform};
use node::registry::{self, Options};

use crate::containerd::connection::Connection;
use crate::lazy::image::Manifest;
use import::{Importer, Lease};
use progress::Progress;
use unpack::Unpacker;

/// What to pull, and whereto.
#[derive(Debug, Clone)]
pub struct Pull {
    /// Image reference as users write it.
    pub reference: String,
    /// Containerd's namespace.
    pub namespace: String,
    /// Containerd's socket.
    pub socket: PathBuf,
    /// Name of the snapshotter in containerd's configuration.
    pub snapshotter: String,
    /// Which of an index's images; this machine's where it is `None`.
    pub platform: Option<Platform>,
}

/// What came of a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// Name of the image in containerd.
    pub name: String,
    /// Layers in all.
    pub layers: usize,
    /// The blobs of those that containerd did not unpack.
    pub lazy: Vec<Digest>,
}

/// Pulls. What is made on the way is kept from containerd's garbage collection until the image refers to it; after a failure or a
/// cancellation nothing holds it any more.
pub async fn pull(pull: &Pull, registries: &RegistriesConfig, progress: &Progress) -> anyhow::Result<Pulled> {
    let image: ImageRef = pull.reference.parse()?;
    let name = image.to_string();
    let registry = registry::Client::new(registries.clone(), Options::default());
    let connection = Connection::new(&pull.socket);
    let lease = Lease::create(&connection, &pull.namespace)
        .await
        .with_context(|| format!("cannot pull into the containerd at {}: does it run?", pull.socket.display()))?;
    let pulled = pull_under(pull, &image, &registry, &connection, &lease, progress);
    let pulled = tokio::select! {
        pulled = pulled => pulled,
        interrupted = tokio::signal::ctrl_c() => interrupted.map_err(Into::into).and_then(|()| anyhow::bail!("interrupted")),
    };
    if let Err(error) = lease.end().await {
        progress.note(&format!("the lease of this pull stays for a day: {error:#}"));
    }
    pulled.with_context(|| format!("cannot pull {name}"))
}

async fn pull_under(
    pull: &Pull,
    image: &ImageRef,
    registry: &registry::Client,
    connection: &Connection,
    lease: &Lease,
    progress: &Progress,
) -> anyhow::Result<Pulled> {
    let name = image.to_string();
    progress.note(&format!("{name}: resolving"));
    let platform = pull.platform.clone().unwrap_or_else(Platform::host);
    let found = registry.image(image, &platform).await?;
    let config_text = registry.config(&found).await?;
    let manifest = found.document().context("an image without manifest")?;
    let parsed = Manifest::parse(found.manifest, &manifest.bytes)?.with_config(&config_text)?;

    let importer = Importer::new(connection, lease, image);
    let top = parsed.layers.last().map(|layer| layer.chain_id);
    for document in &found.documents {
        importer.document(document).await?;
    }
    importer.config(&found.config, &config_text).await?;

    let mut unpacker = Unpacker::new(connection, lease, &importer, registry, pull, image);
    let mut lazy = Vec::new();
    for position in 0..parsed.layers.len() {
        let place = found.layers.get(position).context("a layer of the manifest is missing")?;
        if !unpacker.layer(&parsed, position, place, progress).await? {
            lazy.push(place.digest);
        }
    }
    if let Some(top) = top {
        // The snapshots live as long as the configuration does.
        importer.refer(found.config.digest, &pull.snapshotter, top).await?;
    }
    importer.name(&name, &found).await?;
    Ok(Pulled { name, layers: parsed.layers.len(), lazy })
}
