//! A content store for tests, behind a socket as containerd's is.

use std::collections::HashMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use layer::Digest;
use parking_lot::Mutex;
use proto::containerd::services::content::v1 as wire;
use proto::containerd::services::content::v1::content_server::{Content, ContentServer};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_stream::Stream;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming};

use super::connection::Connection;
use super::content::ContentStore;

/// Serves what tests put in.
#[derive(Debug)]
pub(crate) struct FakeContainerd {
    state: Arc<State>,
    folder: tempfile::TempDir,
    server: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct State {
    blobs: Mutex<HashMap<(String, String), Stored>>,
    lists: AtomicUsize,
    reads: AtomicUsize,
}

#[derive(Debug, Clone)]
struct Stored {
    bytes: Vec<u8>,
    labels: HashMap<String, String>,
    updated: SystemTime,
}

impl FakeContainerd {
    /// Listens on a socket of its own.
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().expect("temporary directory");
        let state = Arc::new(State::default());
        let listener = UnixListener::bind(folder.path().join("containerd.sock")).expect("listens");
        let service = ContentServer::new(Service(state.clone()));
        let server = tokio::spawn(async move {
            let server = tonic::transport::Server::builder().add_service(service);
            server.serve_with_incoming(UnixListenerStream::new(listener)).await.expect("serves");
        });
        Self { state, folder, server }
    }

    /// A client of it.
    pub(crate) fn content(&self) -> ContentStore {
        ContentStore::new(&Connection::new(&self.folder.path().join("containerd.sock")))
    }

    /// A folder that lives as long.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Stores `bytes` with `labels`; what is stored later is newer.
    pub(crate) fn put(&self, namespace: &str, bytes: &[u8], labels: &[(&str, &str)]) -> Digest {
        let digest = Digest::of(bytes);
        self.put_as(namespace, digest, bytes, labels);
        digest
    }

    /// Stores `bytes` under a digest that may be another's.
    pub(crate) fn put_as(&self, namespace: &str, digest: Digest, bytes: &[u8], labels: &[(&str, &str)]) {
        let mut blobs = self.state.blobs.lock();
        let updated = SystemTime::UNIX_EPOCH + Duration::from_secs(1 + blobs.len() as u64);
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        blobs.insert((namespace.to_owned(), digest.to_string()), Stored { bytes: bytes.to_owned(), labels, updated });
    }

    /// Deletes what has this digest.
    pub(crate) fn remove(&self, namespace: &str, digest: Digest) {
        self.state.blobs.lock().remove(&(namespace.to_owned(), digest.to_string()));
    }

    /// How often content was listed.
    pub(crate) fn lists(&self) -> usize {
        self.state.lists.load(Ordering::Relaxed)
    }

    /// How often content was read.
    pub(crate) fn reads(&self) -> usize {
        self.state.reads.load(Ordering::Relaxed)
    }
}

impl Drop for FakeContainerd {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct Service(Arc<State>);

impl Service {
    fn find<T>(&self, request: &Request<T>, digest: &str) -> Result<Stored, Status> {
        let namespace = namespace(request)?;
        let blobs = self.0.blobs.lock();
        blobs
            .get(&(namespace, digest.to_owned()))
            .cloned()
            .ok_or_else(|| Status::not_found(format!("content {digest}: not found")))
    }
}

fn namespace<T>(request: &Request<T>) -> Result<String, Status> {
    let value = request.metadata().get("containerd-namespace").and_then(|value| value.to_str().ok());
    if request.metadata().get("grpc-timeout").is_none() {
        return Err(Status::invalid_argument("a call without deadline"));
    }
    value.map(str::to_owned).ok_or_else(|| Status::failed_precondition("namespace is required"))
}

fn info(digest: &str, stored: &Stored) -> wire::Info {
    wire::Info {
        digest: digest.to_owned(),
        size: stored.bytes.len() as i64,
        labels: stored.labels.clone(),
        updated_at: Some(stored.updated.into()),
        ..Default::default()
    }
}

type Parts<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Content for Service {
    type ListStream = Parts<wire::ListContentResponse>;
    type ReadStream = Parts<wire::ReadContentResponse>;
    type WriteStream = Parts<wire::WriteContentResponse>;

    async fn info(&self, request: Request<wire::InfoRequest>) -> Result<Response<wire::InfoResponse>, Status> {
        let digest = request.get_ref().digest.clone();
        let stored = self.find(&request, &digest)?;
        Ok(Response::new(wire::InfoResponse { info: Some(info(&digest, &stored)) }))
    }

    async fn list(&self, request: Request<wire::ListContentRequest>) -> Result<Response<Self::ListStream>, Status> {
        self.0.lists.fetch_add(1, Ordering::Relaxed);
        let namespace = namespace(&request)?;
        assert_eq!(request.get_ref().filters, ["labels.\"containerd.io/gc.ref.content.config\""]);
        let blobs = self.0.blobs.lock();
        let parts: Vec<_> = blobs
            .iter()
            .filter(|((owner, _), stored)| {
                *owner == namespace && stored.labels.contains_key("containerd.io/gc.ref.content.config")
            })
            .map(|((_, digest), stored)| Ok(wire::ListContentResponse { info: vec![info(digest, stored)] }))
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }

    async fn read(&self, request: Request<wire::ReadContentRequest>) -> Result<Response<Self::ReadStream>, Status> {
        self.0.reads.fetch_add(1, Ordering::Relaxed);
        let wire::ReadContentRequest { digest, offset, size } = request.get_ref().clone();
        let stored = self.find(&request, &digest)?;
        let from = usize::try_from(offset).unwrap_or(0).min(stored.bytes.len());
        let size = if size == 0 { usize::MAX } else { size as usize };
        let bytes = &stored.bytes[from..stored.bytes.len().min(from.saturating_add(size))];
        let parts = bytes.chunks(3000).map(|part| Ok(wire::ReadContentResponse { offset: 0, data: part.into() }));
        Ok(Response::new(Box::pin(tokio_stream::iter(parts.collect::<Vec<_>>()))))
    }

    async fn update(&self, _: Request<wire::UpdateRequest>) -> Result<Response<wire::UpdateResponse>, Status> {
        Err(Status::unimplemented("no test writes"))
    }

    async fn write(
        &self,
        _: Request<Streaming<wire::WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        Err(Status::unimplemented("no test writes"))
    }
}
