//! `drover-seeder serve`: the daemon.

use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use node::enrol;
use node::grant::{self, Demand, Issuer};
use node::ingest::store::Store;
use node::ingest::{Ingester, control};
use node::mesh::tracker::{self, Gate, Tracker};
use node::security::ca::Authority;
use node::security::{Role, Security};
use node::serve::{self, Listener};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::Config;

/// Serves until SIGTERM or SIGINT.
pub(crate) fn run(config: Config) -> anyhow::Result<()> {
    node::bound_malloc();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(serve(config));
    // A pass over a blob may stand in a read of its registry; it is not waited for: what it wrote is resumed.
    runtime.shutdown_timeout(std::time::Duration::from_millis(500));
    done
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let security = Security::load(&config.security, Role::Seeder, &config.root)?;
    let store = Store::open(&config.root)?;
    let known = store.layers().context("cannot list the layers of the store")?.len();
    let ingester = Ingester::new(store, config.registry(), security.signer()?, config.ingest())
        .context("cannot start the threads that encode")?;

    let stop = CancellationToken::new();
    let tracker = Tracker::start(ingester.clone(), stop.clone());
    let gate = Gate::new(ingester.clone(), tracker.clone(), config.limits.upload());
    let mut router = serve::router(Arc::new(gate.clone()), config.limits.transfers());
    if let Some(options) = config.grants().map_err(anyhow::Error::msg)? {
        router = Demand::of_seeder(&security, ingester.clone()).guard(router);
        let issuer = Issuer::new(ingester.clone(), &security, options)?.context("grants need security")?;
        router = grant::issuer::route(router, issuer);
        tracker.demand_grants();
        ingester.withhold_digests();
    }
    let router = control::route(router, ingester.clone());
    let router = tracker::route(router, tracker);
    let mut listener = Listener::bind(&config.listen, &security, config.limits.listener())
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    let mut router = router;
    if let Some(directory) = &config.enrol.authority {
        Authority::open(directory).context("cannot enrol nodes (enrol.authority)")?;
        router = enrol::server::route(router, directory.clone());
        listener = listener.with_enrolment(&security, enrol::server::route(Router::new(), directory.clone()))?;
    }
    let address = listener.local_addr()?;
    let served = tokio::spawn(listener.serve(router.clone(), stop.clone()));
    let (socket, stop_local) = (config.socket(), stop.clone());
    let router = tracker::status::route(router, gate);
    let local = tokio::spawn(async move {
        if let Err(error) = serve::listener::serve_local(&socket, router, stop_local).await {
            tracing::warn!(%error, "commands on this machine cannot reach this seeder: no local socket");
        }
    });
    tracing::info!(%address, root = %config.root.display(), layers = known, ?security, "seeder serves");
    // Fails only outside systemd, where nobody waits for it.
    let _ = sd_notify::notify(&[NotifyState::Ready]);

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("seeder stops");
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    stop.cancel();
    let _ = tokio::join!(served, local);
    ingester.save().await;
    Ok(())
}
