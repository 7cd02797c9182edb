//! Nodes that give each other chunks: `swarm` decides, this moves.
//!
//! - [`Mesh`]: a node's part, from the open port to the lines.
//! - [`member`]: how a machine of the mesh is named; this machine's own name.
//! - [`asking`]: the headers with which members ask each other for chunks, and are turned down.
//! - `membership`: what the driver does in it.
//! - `lines`: to seeders and to neighbours.
//! - `neighbours`: their lines to this node.
//! - [`peer`]: another node, seen from this one: connections to it, and its chunks.
//! - [`serving`]: what this node gives to others, and to whom when.
//! - [`standing`]: what all that comes to, for the operator.
//! - [`tracker`]: the seeder's part.
//! - [`runs`]: runs of chunks in messages.

pub mod asking;
mod lines;
pub mod member;
pub(crate) mod membership;
mod neighbours;
pub mod peer;
pub mod runs;
pub mod serving;
pub mod standing;
pub mod tracker;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use proto::drover::mesh::v1 as api;
use swarm::{UploadConfig, Zone};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::lines::Lines;
use self::membership::{Event, Membership};
use self::neighbours::Calls;
use crate::Node;
use crate::grant::Demand;
use crate::security::Security;
use crate::seeder;
use crate::serve::{self, Listener};

pub use asking::{Asker, Turned};
pub use member::{Member, OwnAddress};
pub use serving::{Holders, Sharing};
pub use standing::Standing;
pub use tracker::Tracker;

/// How a node takes part.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen, `IP:PORT`. Port 0: any.
    pub listen: String,
    /// The address that others are told, `IP:PORT`; empty: the one that the seeder sees, with the port of `listen`.
    pub address: String,
    /// Name of the zone; empty without zones.
    pub zone: String,
    /// Take only.
    pub leech: bool,
    /// Most bytes per second that are given; 0: no limit.
    pub upload_rate: u64,
}

/// When a port that is taken is tried again.
const BIND_PAUSE: Duration = Duration::from_secs(2);
/// Bodies that are sent at once; `swarm::Uploads` allows fewer to other nodes.
const TRANSFERS: usize = 64;
const CONNECTIONS: usize = 1024;
/// Of so many who are sent away at once the driver is asked who else has what they want; the others hear only when to come again.
const NAMINGS: usize = 8;
/// Who is sent away hears of it at once, whatever the driver does.
const NAMING: Duration = Duration::from_millis(20);

/// A node's part in the mesh. Dropping it leaves the mesh.
#[derive(Debug)]
pub struct Mesh {
    watch: standing::Watch,
    _stop: DropGuard,
}

impl Mesh {
    /// Takes part, as soon as the port is free and a seeder answers. Uses no network before it returns; where there is none the
    /// node goes on without its neighbours.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn start(node: &Arc<Node>, options: Options, security: Security, seeders: seeder::Client) -> Self {
        let stop = CancellationToken::new();
        seeders.own_address().await_it();
        let node = node.clone();
        let watch = standing::Watch::default();
        let run = run(node, options, security, seeders, watch.clone(), stop.clone());
        let stopped = stop.clone();
        tokio::spawn(async move { stopped.run_until_cancelled(run).await });
        Self { watch, _stop: stop.drop_guard() }
    }

    /// Tells where this node stands.
    pub fn watch(&self) -> standing::Watch {
        self.watch.clone()
    }
}

async fn run(
    node: Arc<Node>,
    options: Options,
    security: Security,
    seeders: seeder::Client,
    watch: standing::Watch,
    stop: CancellationToken,
) {
    let listener = bind(&options.listen, &security).await;
    let Ok(address) = listener.local_addr() else { return };
    let refused = Refused::default();
    let events = node.mesh_events();
    let uploads = UploadConfig { bytes_per_sec: options.upload_rate, leech: options.leech, ..UploadConfig::default() };
    let sharing = Sharing::new(Arc::clone(&node), uploads, refused.clone(), holders(events.clone()));
    let demand = node_demand(&node, &security).await;
    let router = demand.guard(serve::router(Arc::new(sharing), TRANSFERS));
    let router = router.route_service(neighbours::ROUTE, Calls::service(events.clone(), refused.clone()));
    tracing::info!(%address, zone = options.zone, leech = options.leech, "gives chunks to other nodes");
    let served = tokio::spawn(listener.serve(router, stop));
    let told = if options.address.is_empty() { format!(":{}", address.port()) } else { options.address };
    let lines = Lines {
        hello: api::Hello { address: told, zone: options.zone.clone(), leech: options.leech },
        security,
        me: seeders.own_address().clone(),
        grants: seeders.grants().clone(),
        demand,
        events: events.clone(),
    };
    let membership = Membership::new(Zone::named(&options.zone), options.leech, lines.clone(), refused, watch);
    if events.send(Event::Start(Box::new(membership))).await.is_ok() {
        lines.hold_seeders(seeders).await;
    }
    let _ = served.await;
}

/// Who else has what somebody is sent away for, as the driver knows it.
fn holders(events: mpsc::Sender<Event>) -> Holders {
    let namings = Arc::new(Semaphore::new(NAMINGS));
    Box::new(move |blob, chunk, asker: Asker| {
        let (events, namings) = (events.clone(), Arc::clone(&namings));
        Box::pin(async move {
            let Ok(_naming) = namings.try_acquire() else { return Vec::new() };
            let (answer, named) = oneshot::channel();
            if events.try_send(Event::WhoElse { blob, chunk, asker: asker.peer, answer }).is_err() {
                return Vec::new();
            }
            tokio::time::timeout(NAMING, named).await.ok().and_then(Result::ok).unwrap_or_default()
        })
    })
}

/// What other nodes must show here, as the seeders said last.
async fn node_demand(node: &Node, security: &Security) -> Demand {
    let (file, security) = (node.root().join("grants"), security.clone());
    let opened = tokio::task::spawn_blocking(move || Demand::of_node(&security, file)).await;
    match opened {
        Ok(demand) => demand,
        // The runtime ends, and this task with it.
        Err(_) => std::future::pending().await,
    }
}

/// The port, which another process may still have for a moment, or for good.
async fn bind(listen: &str, security: &Security) -> Listener {
    let limits = serve::Limits { connections: CONNECTIONS, ..serve::Limits::default() };
    let mut is_said = false;
    loop {
        match Listener::bind(listen, security, limits).await {
            Ok(listener) => return listener,
            Err(error) => {
                if !std::mem::replace(&mut is_said, true) {
                    tracing::warn!(listen, %error, "cannot listen for other nodes (mesh.listen): this node takes no part in the mesh until it can");
                }
            }
        }
        tokio::time::sleep(BIND_PAUSE).await;
    }
}

/// Machines that this node deals with no more, since they sent wrong chunks.
#[derive(Clone, Debug, Default)]
pub struct Refused(Arc<RwLock<BTreeSet<SocketAddr>>>);

impl Refused {
    /// Most that are kept; the mesh has other troubles where there are more.
    const MAX: usize = 4096;

    pub(crate) fn contains(&self, address: SocketAddr) -> bool {
        self.0.read().contains(&address)
    }

    pub(crate) fn insert(&self, address: SocketAddr) {
        let mut refused = self.0.write();
        if refused.len() < Self::MAX {
            refused.insert(address);
        }
    }
}

#[cfg(test)]
mod tests;
