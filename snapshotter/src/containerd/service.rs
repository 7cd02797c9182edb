//! The Snapshots service: decodes requests, calls the store, encodes answers.
//!
//! No call but `Prepare` of a layer (one with the label `containerd.io/snapshot.ref`) waits for anything but the local disk.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost_types::Timestamp;
use proto::containerd::services::snapshots::v1 as wire;
use proto::containerd::services::snapshots::v1::snapshots_server::{Snapshots, SnapshotsServer};
use proto::containerd::types;
use tokio_stream::Stream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use tracing::{debug, error};

use super::about::{About, Version};
use super::filter::Filter;
use super::lazy::{LazyLayers, LazyOutcome, PrepareLazy};
use super::status::ServiceError;
use super::sweep::Sweeper;
use crate::snapshots::store::SNAPSHOT_REF;
use crate::snapshots::{Creation, IdMaps, Kind, Labels, Mount, Snapshot, Store, StoreError};

/// Snapshots in one message of `List`. Containerd's own service sends as many; its client takes messages of 16 MiB, a
/// snapshot's labels are some KiB.
const LIST_PAGE: usize = 100;

/// Containerd before this shifts the ids of a directory, but not of what is mounted below it: a container on layers that are mounts
/// would see none of them.
const REMAP_SINCE: Version = Version { major: 2, minor: 3 };

/// Containerd's Snapshots service, version 1.
#[derive(Debug)]
pub struct Service<L> {
    store: Arc<Store>,
    lazy: Arc<L>,
    sweeper: Arc<Sweeper<L>>,
    about: Option<About>,
}

impl<L: LazyLayers> Service<L> {
    /// A service over `store`. The caller must also run [`Sweeper::run`] of `sweeper`.
    pub fn new(store: Arc<Store>, lazy: Arc<L>, sweeper: Arc<Sweeper<L>>) -> Self {
        Self { store, lazy, sweeper, about: None }
    }

    /// Lets `about` say whether containerd leaves the ids of containers with a user namespace to its snapshotters. Without it
    /// their labels are believed.
    pub fn with_about(self, about: About) -> Self {
        Self { about: Some(about), ..self }
    }

    /// The service for a tonic router.
    pub fn into_server(self) -> SnapshotsServer<Self> {
        SnapshotsServer::new(self)
    }

    async fn prepare(
        &self,
        metadata: &MetadataMap,
        request: wire::PrepareSnapshotRequest,
    ) -> Result<Vec<Mount>, ServiceError> {
        let wire::PrepareSnapshotRequest { snapshotter, key, parent, labels } = request;
        let labels: Labels = labels.into_iter().collect();
        let parent = named(parent);
        let mut declined = None;
        if let Some(target) = labels.get(SNAPSHOT_REF) {
            let request = PrepareLazy {
                snapshotter: &snapshotter,
                key: &key,
                parent: parent.as_deref(),
                target,
                labels: &labels,
                namespace: namespace(metadata, &key),
                deadline: deadline(metadata),
            };
            declined = self.prepare_lazy(request).await?;
        }
        self.create(Kind::Active, &snapshotter, key, parent, labels, declined).await
    }

    /// Succeeds where containerd shall unpack the layer, and says why.
    async fn prepare_lazy(&self, request: PrepareLazy<'_>) -> Result<Option<String>, ServiceError> {
        let PrepareLazy { key, parent, target, .. } = request;
        if let Some(reason) = self.lazy.refusal() {
            return Ok(Some(reason));
        }
        let exists = || ServiceError::TargetExists { target: target.to_owned() };
        if self.lazy_target(target, parent).await? {
            return Err(exists());
        }
        match self.lazy.prepare(request).await {
            LazyOutcome::Committed => {
                // Containerd looks the target up next, and fails the whole pull if it is not there.
                if self.lazy_target(target, parent).await? {
                    return Err(exists());
                }
                error!(key, target, "a lazy layer was reported as committed, but is not there; unpacking it");
                Ok(Some("it was removed while it was prepared".to_owned()))
            }
            LazyOutcome::NotLazy { reason } => Ok(Some(reason)),
        }
    }

    async fn lazy_target(&self, target: &str, parent: Option<&str>) -> Result<bool, ServiceError> {
        let (target, parent) = (target.to_owned(), parent.map(str::to_owned));
        let found = blocking(&self.store, move |store| store.lazy_target(&target, parent.as_deref())).await?;
        Ok(found.is_some())
    }

    async fn create(
        &self,
        kind: Kind,
        snapshotter: &str,
        key: String,
        parent: Option<String>,
        labels: Labels,
        declined: Option<String>,
    ) -> Result<Vec<Mount>, ServiceError> {
        let id_maps = self.id_maps(snapshotter, &labels).await?;
        blocking(&self.store, move |store| {
            store.create(Creation { kind, key: &key, parent: parent.as_deref(), labels, declined, id_maps })
        })
        .await
    }

    /// How the ids of a container's snapshot are to be shifted, if they are.
    async fn id_maps(&self, snapshotter: &str, labels: &Labels) -> Result<Option<IdMaps>, ServiceError> {
        // A layer that is unpacked has the ids of its archive. These labels would be the image's own annotations.
        if labels.contains_key(SNAPSHOT_REF) {
            return Ok(None);
        }
        let Some(maps) = IdMaps::of(labels)? else { return Ok(None) };
        let Some(about) = &self.about else { return Ok(Some(maps)) };
        let unknown = |status| ServiceError::Containerd(Box::new(status));
        let config = about.snapshotter(snapshotter).await.map_err(unknown)?;
        // Without the capability containerd has changed the owner of every file of the parent, and sends the labels all the same.
        if !config.is_some_and(|config| config.remaps_ids) {
            return Ok(None);
        }
        match about.version().await.map_err(unknown)? {
            Some(version) if version < REMAP_SINCE => Err(ServiceError::RemapVersion { version }),
            _ => Ok(Some(maps)),
        }
    }

    async fn update(&self, request: wire::UpdateSnapshotRequest) -> Result<Snapshot, ServiceError> {
        // Everything but labels is immutable: containerd sends the whole Info and lets the mask decide. An empty mask means
        // all mutable fields.
        let info = request.info.ok_or(ServiceError::Missing { field: "info" })?;
        let paths = request.update_mask.map(|mask| mask.paths).unwrap_or_default();
        let labels = info.labels.into_iter().collect();
        blocking(&self.store, move |store| store.update(&info.name, labels, &paths)).await
    }

    async fn list(&self, filters: Vec<String>) -> Result<Pages, ServiceError> {
        let filter = Filter::parse(&filters)?;
        let snapshots = blocking(&self.store, move |store| store.list(|snapshot| filter.matches(snapshot))).await?;
        Ok(Pages { rest: snapshots.into_iter() })
    }
}

#[tonic::async_trait]
impl<L: LazyLayers> Snapshots for Service<L> {
    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Result<Response<wire::PrepareSnapshotResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let key = request.key.clone();
        let mounts = answer("Prepare", &key, Self::prepare(self, &metadata, request).await)?;
        Ok(Response::new(wire::PrepareSnapshotResponse { mounts: mounts_to_wire(mounts) }))
    }

    async fn view(
        &self,
        request: Request<wire::ViewSnapshotRequest>,
    ) -> Result<Response<wire::ViewSnapshotResponse>, Status> {
        let request = request.into_inner();
        let key = request.key.clone();
        let labels = request.labels.into_iter().collect();
        let mounts =
            self.create(Kind::View, &request.snapshotter, request.key, named(request.parent), labels, None).await;
        Ok(Response::new(wire::ViewSnapshotResponse { mounts: mounts_to_wire(answer("View", &key, mounts)?) }))
    }

    async fn mounts(&self, request: Request<wire::MountsRequest>) -> Result<Response<wire::MountsResponse>, Status> {
        let key = request.into_inner().key;
        let mounts = blocking(&self.store, with(&key, |store, key| store.mounts(key))).await;
        Ok(Response::new(wire::MountsResponse { mounts: mounts_to_wire(answer("Mounts", &key, mounts)?) }))
    }

    async fn commit(&self, request: Request<wire::CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let wire::CommitSnapshotRequest { name, key, labels, parent, .. } = request.into_inner();
        let (labels, parent) = (labels.into_iter().collect(), named(parent));
        let committed =
            blocking(&self.store, with(&key, move |store, key| store.commit(&name, key, parent.as_deref(), labels)));
        Ok(Response::new(answer("Commit", &key, committed.await)?))
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let key = request.into_inner().key;
        let removed = blocking(&self.store, with(&key, |store, key| store.remove(key))).await;
        answer("Remove", &key, removed)?;
        self.sweeper.wake();
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Result<Response<wire::StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let snapshot = blocking(&self.store, with(&key, |store, key| store.stat(key))).await;
        let info = Some(info_to_wire(answer("Stat", &key, snapshot)?));
        Ok(Response::new(wire::StatSnapshotResponse { info }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Result<Response<wire::UpdateSnapshotResponse>, Status> {
        let request = request.into_inner();
        let key = request.info.as_ref().map(|info| info.name.clone()).unwrap_or_default();
        let info = Some(info_to_wire(answer("Update", &key, Self::update(self, request).await)?));
        Ok(Response::new(wire::UpdateSnapshotResponse { info }))
    }

    type ListStream = Pin<Box<Pages>>;

    async fn list(&self, request: Request<wire::ListSnapshotsRequest>) -> Result<Response<Self::ListStream>, Status> {
        let pages = Self::list(self, request.into_inner().filters).await;
        Ok(Response::new(Box::pin(answer("List", "", pages)?)))
    }

    async fn usage(&self, request: Request<wire::UsageRequest>) -> Result<Response<wire::UsageResponse>, Status> {
        let key = request.into_inner().key;
        let usage = blocking(&self.store, with(&key, |store, key| store.usage(key))).await;
        let usage = answer("Usage", &key, usage)?;
        let [size, inodes] = [usage.size_bytes, usage.inodes].map(|count| i64::try_from(count).unwrap_or(i64::MAX));
        Ok(Response::new(wire::UsageResponse { size, inodes }))
    }

    async fn cleanup(&self, _request: Request<wire::CleanupRequest>) -> Result<Response<()>, Status> {
        let swept = self.sweeper.sweep().await;
        if !answer("Cleanup", "", swept)? {
            self.sweeper.wake();
        }
        Ok(Response::new(()))
    }
}

/// The messages of one `List`.
#[derive(Debug)]
pub struct Pages {
    rest: std::vec::IntoIter<Snapshot>,
}

impl Stream for Pages {
    type Item = Result<wire::ListSnapshotsResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut std::task::Context<'_>) -> std::task::Poll<Option<Self::Item>> {
        let info: Vec<_> = self.rest.by_ref().take(LIST_PAGE).map(info_to_wire).collect();
        let page = (!info.is_empty()).then(|| Ok(wire::ListSnapshotsResponse { info }));
        std::task::Poll::Ready(page)
    }
}

/// Does `work` on a thread that may block on the disk. It is finished even if the caller goes away.
pub(super) async fn blocking<T: Send + 'static>(
    store: &Arc<Store>,
    work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, ServiceError> {
    let store = Arc::clone(store);
    match tokio::task::spawn_blocking(move || work(&store)).await {
        Ok(result) => Ok(result?),
        Err(error) if error.is_panic() => Err(ServiceError::Panicked),
        Err(_) => Err(ServiceError::ShuttingDown),
    }
}

fn with<T, F: FnOnce(&Store, &str) -> T>(key: &str, work: F) -> impl FnOnce(&Store) -> T + use<T, F> {
    let key = key.to_owned();
    move |store| work(store, &key)
}

/// The edge: logs a failed call and makes it a status.
fn answer<T>(call: &'static str, key: &str, result: Result<T, ServiceError>) -> Result<T, Status> {
    result.map_err(|error| {
        let ours = error.is_ours();
        let status = Status::from(error);
        if ours {
            error!(call, key, code = ?status.code(), "{}", status.message());
        } else {
            debug!(call, key, code = ?status.code(), "{}", status.message());
        }
        status
    })
}

/// Containerd's namespace. Old versions send no metadata outside of CRI, but all put the namespace in front of the key.
fn namespace<'a>(metadata: &'a MetadataMap, key: &'a str) -> Option<&'a str> {
    let sent = metadata.get("containerd-namespace").and_then(|value| value.to_str().ok());
    sent.or_else(|| key.split_once('/').map(|(namespace, _)| namespace)).filter(|namespace| !namespace.is_empty())
}

/// When the caller gives up, by the header `grpc-timeout` (gRPC over HTTP/2, "Requests": at most 8 digits and a unit).
fn deadline(metadata: &MetadataMap) -> Option<Instant> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    let timeout = match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    };
    Instant::now().checked_add(timeout)
}

/// An empty name on the wire is none.
fn named(name: String) -> Option<String> {
    (!name.is_empty()).then_some(name)
}

fn mounts_to_wire(mounts: Vec<Mount>) -> Vec<types::Mount> {
    mounts
        .into_iter()
        .map(|Mount { kind, source, options }| types::Mount {
            r#type: kind.to_owned(),
            source,
            target: String::new(),
            options,
        })
        .collect()
}

fn info_to_wire(snapshot: Snapshot) -> wire::Info {
    let Snapshot { name, record } = snapshot;
    let kind = match record.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    wire::Info {
        name,
        parent: record.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(Timestamp::from(record.created)),
        updated_at: Some(Timestamp::from(record.updated)),
        labels: record.labels.into_iter().collect::<HashMap<_, _>>(),
    }
}
