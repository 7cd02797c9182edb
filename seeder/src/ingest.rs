//! `drover-seeder ingest`: images made known ahead.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use futures_util::future::join_all;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use node::ingest::store::{Store, StoreError};
use node::ingest::{Ingester, Phase, Progress};
use node::registry::image::{ImageRef, host_architecture};
use node::security::{Role, Security};
use node::seeder::{self, Event};
use node::source::BlobRef;

use crate::ConfigArgs;
use crate::config::Config;

/// What to ingest.
#[derive(Args)]
pub(crate) struct IngestArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Architecture of the image, by OCI's name.
    #[arg(long, default_value = host_architecture())]
    architecture: String,
    /// Images, like debian:13 or registry.local:5000/team/app@sha256:….
    #[arg(required = true)]
    images: Vec<ImageRef>,
}

/// Who ingests.
enum Engine {
    /// The daemon that uses the store.
    Daemon(seeder::Client),
    /// This process, since no daemon runs.
    Own(Ingester),
}

/// How a layer ended.
enum End {
    Known,
    NotLazy(String),
}

/// Ingests all layers of the images; fails if one could not be ingested.
pub(crate) fn run(config: Config, args: &IngestArgs) -> anyhow::Result<()> {
    node::bound_malloc();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(ingest(config, args))
}

async fn ingest(config: Config, args: &IngestArgs) -> anyhow::Result<()> {
    let engine = match Store::open(&config.root) {
        Ok(store) => {
            let signer = Security::load(&config.security, Role::Seeder, &config.root)?.signer()?;
            Engine::Own(Ingester::new(store, config.registry(), signer, config.ingest())?)
        }
        // Waiting for a turn is silent for as long as other ingests take, but the daemon tells that it lives.
        Err(StoreError::InUse(_)) => Engine::Daemon(seeder::Client::local(config.socket(), seeder::Options::default())),
        Err(error) => return Err(error.into()),
    };
    let registry = config.registry();
    let bars = MultiProgress::new();
    let mut failed = 0;
    for image in &args.images {
        let resolved = registry.image(image, &args.architecture.as_str().into()).await?;
        bars.println(format!("{image}: {} layers", resolved.layers.len()))?;
        let layers = resolved.layers.iter().map(|blob| async {
            let bar = bars.add(bar(blob));
            let end = engine.ingest(blob, &bar).await;
            let text = match &end {
                Ok(End::Known) => "known".to_owned(),
                Ok(End::NotLazy(reason)) => format!("cannot be lazy, nodes unpack it: {reason}"),
                Err(error) => format!("FAILED: {error:#}"),
            };
            bar.finish_and_clear();
            // Not through the bars, which are silent where the output is no terminal.
            bars.suspend(|| println!("{}  {text}", blob.digest));
            end.is_ok()
        });
        failed += join_all(layers).await.into_iter().filter(|done| !done).count();
    }
    if failed > 0 {
        bail!("{failed} layers could not be ingested");
    }
    Ok(())
}

impl Engine {
    async fn ingest(&self, blob: &BlobRef, bar: &ProgressBar) -> anyhow::Result<End> {
        match self {
            Self::Own(ingester) => {
                let mut phase = ingester.ask(blob).await?;
                loop {
                    match &*phase.borrow_and_update() {
                        Phase::Running(progress) => show(bar, progress),
                        Phase::Ready(_) => return Ok(End::Known),
                        Phase::Unsupported(reason) => return Ok(End::NotLazy(reason.clone())),
                        Phase::Failed(error) => return Err(error.clone().into()),
                    }
                    phase.changed().await.context("the ingest ended without a word")?;
                }
            }
            Self::Daemon(client) => {
                let mut events = client.resolve(blob).await?;
                while let Some(event) = events.next().await? {
                    match event {
                        Event::Progress(progress) => show(bar, &progress),
                        Event::Ready { .. } => return Ok(End::Known),
                        Event::Unsupported(reason) => return Ok(End::NotLazy(reason)),
                    }
                }
                bail!("the daemon ended the conversation without a result")
            }
        }
    }
}

fn bar(blob: &BlobRef) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} [{bar:30}] {bytes:>10}/{total_bytes:10} {bytes_per_sec}");
    let bar = ProgressBar::new(blob.size).with_prefix(blob.digest.to_string().chars().take(19).collect::<String>());
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn show(bar: &ProgressBar, progress: &Progress) {
    if progress.blob_size > 0 {
        bar.set_length(progress.blob_size);
    }
    bar.set_position(progress.blob_read);
}
