//! The seam between the service and the lazy layers.

use std::future::Future;
use std::time::Instant;

use crate::snapshots::{Labels, Release};

/// Makes lazy snapshots when containerd asks for a layer, and lets go of layers that it does not need any more.
pub trait LazyLayers: Send + Sync + 'static {
    /// Why no layer at all is to be lazy now, if so.
    fn refusal(&self) -> Option<String> {
        None
    }

    /// Tries to make the committed snapshot that `request` will unpack. May take long, but must end in time before
    /// `request.deadline`. The future is dropped if the caller goes away.
    fn prepare(&self, request: PrepareLazy<'_>) -> impl Future<Output = LazyOutcome> + Send;

    /// Frees what the removed snapshot of `release` had: its mount, if it had one of its own; what exists once per chain id,
    /// if `!chain_in_use`; the layer in the engine, if `!layer_in_use`. After an error it is asked again later. Nobody makes
    /// a snapshot of this layer meanwhile.
    fn release(&self, release: &Release) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// A `Prepare` that containerd would follow with a download and an unpack.
#[derive(Debug, Clone, Copy)]
pub struct PrepareLazy<'a> {
    /// Containerd's name for this plugin.
    pub snapshotter: &'a str,
    /// Key of the snapshot that containerd would unpack into.
    pub key: &'a str,
    /// Name of its parent, which exists and is committed.
    pub parent: Option<&'a str>,
    /// Value of the label `containerd.io/snapshot.ref`: normally the chain id.
    pub target: &'a str,
    /// All labels of the request.
    pub labels: &'a Labels,
    /// Containerd's namespace: of the metadata, else of the key (`NAMESPACE/…`).
    pub namespace: Option<&'a str>,
    /// When the caller gives up, if it said so.
    pub deadline: Option<Instant>,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LazyOutcome {
    /// [`Store::commit_lazy`](crate::snapshots::Store::commit_lazy) was called for the target and succeeded.
    Committed,
    /// Containerd shall unpack the layer.
    NotLazy {
        /// Why, for people.
        reason: String,
    },
}

/// For a service without lazy layers.
#[derive(Debug, Clone, Copy)]
pub struct NoLazyLayers;

impl LazyLayers for NoLazyLayers {
    async fn prepare(&self, _request: PrepareLazy<'_>) -> LazyOutcome {
        LazyOutcome::NotLazy { reason: "this server makes ordinary snapshots only".into() }
    }

    async fn release(&self, _release: &Release) -> anyhow::Result<()> {
        Ok(())
    }
}
