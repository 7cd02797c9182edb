//! The node's status over gRPC, on the socket that containerd uses.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};

use futures_util::stream::{self, BoxStream, StreamExt};
use node::counters::CounterValues;
use node::mesh::Standing;
use node::mesh::standing::Watch;
use node::source::SourceKind;
use proto::drover::node::v1 as api;
use proto::drover::node::v1::node_server::Node as NodeService;
use tonic::{Request, Response, Status};

use super::complete::Completion;
use crate::lazy::labels::IMAGE;
use crate::lazy::prepare::ImageLayers;
use crate::snapshots::{Backing, Kind, LazyBacking, Snapshot, StoreError};

/// Answers from the records and the engine; never the network.
#[derive(Debug)]
pub struct StatusService {
    /// Everything about images.
    pub layers: Arc<ImageLayers>,
    /// The node's part in the mesh, where it has one.
    pub mesh: Option<Watch>,
}

#[tonic::async_trait]
impl NodeService for StatusService {
    async fn status(&self, _: Request<api::StatusRequest>) -> Result<Response<api::StatusResponse>, Status> {
        let layers = self.layers.clone();
        let mut status = tokio::task::spawn_blocking(move || collect(&layers))
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| Status::internal(error.to_string()))?;
        status.mesh = self.mesh.as_ref().map(|watch| mesh(watch.standing(), &self.layers.node.counters()));
        Ok(Response::new(status))
    }

    async fn scrub(&self, _: Request<api::ScrubRequest>) -> Result<Response<api::ScrubResponse>, Status> {
        let node = self.layers.node.clone();
        // Dropped with the call: nobody waits for the rest.
        let (call, is_over) = (Arc::new(()), |call: &Weak<()>| call.strong_count() == 0);
        let caller = Arc::downgrade(&call);
        let scrubbed = tokio::task::spawn_blocking(move || node.scrub(&mut || !is_over(&caller)))
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        drop(call);
        Ok(Response::new(api::ScrubResponse { bytes: scrubbed.bytes, rotten_chunks: scrubbed.rotten }))
    }

    type CompleteStream = BoxStream<'static, Result<api::CompleteProgress, Status>>;

    async fn complete(&self, request: Request<api::CompleteRequest>) -> Result<Response<Self::CompleteStream>, Status> {
        let completion = Completion::new(&self.layers.node, &request.get_ref().blobs, self.layers.stall)?;
        let progress = stream::unfold(completion, |mut completion| async {
            let next = completion.next().await?;
            Some((next, completion))
        });
        Ok(Response::new(progress.boxed()))
    }
}

fn mesh(standing: Standing, counters: &CounterValues) -> api::Mesh {
    api::Mesh {
        address: standing.address.map(|address| address.to_string()).unwrap_or_default(),
        seeders: standing.seeders,
        neighbours: u32::try_from(standing.neighbours).unwrap_or(u32::MAX),
        given_bytes: counters.given_bytes,
    }
}

fn collect(layers: &ImageLayers) -> Result<api::StatusResponse, StoreError> {
    let committed = layers.store.list(|snapshot| snapshot.record.kind == Kind::Committed)?;
    let by_name: HashMap<&str, &Snapshot> =
        committed.iter().map(|snapshot| (snapshot.name.as_str(), snapshot)).collect();
    // A snapshot is the top of an image unless a child belongs to the same image.
    let inner: HashSet<&str> = committed
        .iter()
        .filter_map(|snapshot| Some((snapshot, *by_name.get(snapshot.record.parent.as_deref()?)?)))
        .filter(|(child, parent)| child.record.labels.get(IMAGE) == parent.record.labels.get(IMAGE))
        .map(|(_, parent)| parent.name.as_str())
        .collect();
    let mut images: Vec<api::Image> = committed
        .iter()
        .filter(|snapshot| !inner.contains(snapshot.name.as_str()))
        .map(|top| {
            let mut chain = Vec::new();
            let mut next = Some(top);
            while let Some(snapshot) = next {
                chain.push(layer(layers, snapshot));
                next = snapshot.record.parent.as_deref().and_then(|parent| by_name.get(parent).copied());
            }
            chain.reverse();
            let name = top.record.labels.get(IMAGE).cloned().unwrap_or_else(|| name_of(top));
            api::Image { name, layers: chain }
        })
        .collect();
    images.sort_by(|left, right| left.name.cmp(&right.name));
    let used = layers.node.disk_use();
    Ok(api::StatusResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        images,
        bytes_here: used.taken,
        bytes_max: if used.limit == u64::MAX { 0 } else { used.limit },
        disk_bytes: layers.store.disk_bytes()?,
        not_lazy: layers.ability.as_ref().and_then(|ability| ability.refusal()).unwrap_or_default(),
        mesh: None,
        counters: Some(counters(&layers.node.counters())),
    })
}

fn counters(values: &CounterValues) -> api::Counters {
    api::Counters {
        bytes_by_source: bytes_by_source(values),
        wrong_chunks: values.wrong_chunks,
        rotten_chunks: values.rotten_chunks,
        unstored_chunks: values.unstored_chunks,
        expired_chunks: values.expired_chunks,
        failed_reads: values.reads_failed,
        waited_reads: values.reads_waited,
        waited_micros: u64::try_from(values.waited.as_micros()).unwrap_or(u64::MAX),
        evicted_bytes: values.evicted_bytes,
    }
}

fn bytes_by_source(values: &CounterValues) -> HashMap<String, u64> {
    let name = |kind| match kind {
        SourceKind::Local => "containerd",
        SourceKind::Peer => "peers",
        SourceKind::Seeder => "seeder",
        SourceKind::Registry => "registry",
    };
    values.wire_bytes().map(|(kind, bytes)| (name(kind).to_owned(), bytes)).into()
}

/// A name for an image whose pull did not say one.
fn name_of(top: &Snapshot) -> String {
    match &top.record.backing {
        Backing::Lazy(LazyBacking { registry, repository, .. }) if !registry.is_empty() => {
            format!("{registry}/{repository} ({})", top.name)
        }
        _ => top.name.clone(),
    }
}

fn layer(layers: &ImageLayers, snapshot: &Snapshot) -> api::Layer {
    let Backing::Lazy(backing) = &snapshot.record.backing else {
        let reason = snapshot.record.declined.clone().unwrap_or_default();
        return api::Layer { snapshot: snapshot.name.clone(), reason, ..api::Layer::default() };
    };
    let mut shown = api::Layer {
        snapshot: snapshot.name.clone(),
        state: api::LayerState::Broken.into(),
        blob: backing.blob.to_string(),
        ..api::Layer::default()
    };
    let Some(layer) = layers.node.layer(backing.diff_id) else {
        shown.reason = "its files are missing; remove the image and pull it again".to_owned();
        return shown;
    };
    shown.device_size = layer.header().device_size();
    shown.bytes_here = layer.disk_bytes();
    shown.bytes_by_source = bytes_by_source(&layer.counters());
    let state = if let Some(reason) = layer.quarantine() {
        shown.reason = reason;
        api::LayerState::Quarantined
    } else if !layers.mounts.is_attached(backing.chain_id) {
        shown.reason = "it is not mounted; the log says why".to_owned();
        api::LayerState::Broken
    } else if layer.is_complete() {
        api::LayerState::Complete
    } else {
        api::LayerState::Partial
    };
    shown.state = state.into();
    shown
}
