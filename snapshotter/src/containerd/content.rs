//! Client of containerd's content store: which blobs are on this machine already, and the small ones' bytes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper_util::rt::TokioIo;
use layer::Digest;
use proto::containerd::services::content::v1 as wire;
use proto::containerd::services::content::v1::content_client::ContentClient;
use tokio::net::UnixStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

/// Deadline of one call. Chosen: containerd answers from its own disk, in milliseconds; it may be starting just now.
const DEADLINE: Duration = Duration::from_secs(5);

/// Largest message that is taken; containerd sends content in pieces of 1 MiB.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Containerd's content store behind its socket. Dialled when first used, and again whenever containerd was restarted.
#[derive(Debug, Clone)]
pub struct ContentStore {
    client: ContentClient<Channel>,
    socket: PathBuf,
}

/// What the content store knows of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its labels, among them `containerd.io/distribution.source.REGISTRY`.
    pub labels: HashMap<String, String>,
}

/// Why the content store gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// Not a namespace that a header can hold.
    #[error("containerd namespace {namespace:?} is invalid")]
    Namespace {
        /// The namespace.
        namespace: String,
    },
    /// The call failed.
    #[error("content store at {socket}: cannot get {digest}")]
    Call {
        /// Containerd's socket.
        socket: PathBuf,
        /// The blob that was asked for.
        digest: Digest,
        /// Containerd's answer, or why there is none.
        #[source]
        source: Box<Status>,
    },
    /// The blob is larger than the caller wants to hold.
    #[error("{digest} in the content store has {size} bytes, more than {limit}")]
    TooLarge {
        /// The blob.
        digest: Digest,
        /// Its size.
        size: u64,
        /// The caller's limit.
        limit: u64,
    },
    /// The bytes are not those of the digest.
    #[error("the content store gave other bytes than those of {digest}")]
    Digest {
        /// The blob that was asked for.
        digest: Digest,
    },
}

impl ContentStore {
    /// A client of the containerd behind `socket`. Does not connect yet. Must be called inside a Tokio runtime.
    pub fn connect(socket: &Path) -> Self {
        let path = socket.to_owned();
        // The address is not used: the connector knows the socket.
        let channel = Endpoint::from_static("http://containerd").connect_timeout(DEADLINE).connect_with_connector_lazy(
            tower::service_fn(move |_: Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }),
        );
        let client = ContentClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        Self { client, socket: socket.to_owned() }
    }

    /// What is known of `digest` in `namespace`; `None` if it is not there.
    pub async fn info(&self, namespace: &str, digest: Digest) -> Result<Option<Info>, ContentError> {
        let request = request(namespace, wire::InfoRequest { digest: digest.to_string() })?;
        let answer = within_deadline(self.client.clone().info(request)).await;
        match answer {
            Ok(answer) => Ok(answer.into_inner().info.map(|info| Info {
                digest,
                size: u64::try_from(info.size).unwrap_or(0),
                labels: info.labels,
            })),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.failed(digest, status)),
        }
    }

    /// The bytes of `digest` in `namespace`, checked; `None` if it is not there. For manifests and configs: more than `limit`
    /// bytes are an error.
    pub async fn read(&self, namespace: &str, digest: Digest, limit: u64) -> Result<Option<Bytes>, ContentError> {
        let Some(info) = self.info(namespace, digest).await? else { return Ok(None) };
        let too_large = |size| ContentError::TooLarge { digest, size, limit };
        if info.size > limit {
            return Err(too_large(info.size));
        }
        let request = request(namespace, wire::ReadContentRequest { digest: digest.to_string(), offset: 0, size: 0 })?;
        let transfer = async {
            let mut answer = self.client.clone().read(request).await?.into_inner();
            let mut bytes = BytesMut::new();
            while let Some(part) = answer.message().await? {
                bytes.extend_from_slice(&part.data);
                if bytes.len() as u64 > limit {
                    break;
                }
            }
            Ok(bytes.freeze())
        };
        let bytes = match within_deadline(transfer).await {
            Ok(bytes) => bytes,
            Err(status) if status.code() == Code::NotFound => return Ok(None),
            Err(status) => return Err(self.failed(digest, status)),
        };
        if bytes.len() as u64 > limit {
            return Err(too_large(bytes.len() as u64));
        }
        if Digest::of(&bytes) != digest {
            return Err(ContentError::Digest { digest });
        }
        Ok(Some(bytes))
    }

    fn failed(&self, digest: Digest, status: Status) -> ContentError {
        ContentError::Call { socket: self.socket.clone(), digest, source: Box::new(status) }
    }
}

fn request<T>(namespace: &str, message: T) -> Result<Request<T>, ContentError> {
    let namespace: MetadataValue<Ascii> =
        namespace.parse().map_err(|_| ContentError::Namespace { namespace: namespace.to_owned() })?;
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", namespace);
    request.set_timeout(DEADLINE);
    Ok(request)
}

/// The server hears of the deadline too, but it may be the one that hangs.
async fn within_deadline<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(DEADLINE, call)
        .await
        .unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("no answer within {DEADLINE:?}"))))
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use proto::containerd::services::content::v1::content_server::{Content, ContentServer};
    use tokio::net::UnixListener;
    use tokio_stream::Stream;
    use tokio_stream::wrappers::UnixListenerStream;
    use tonic::Response;

    use super::*;

    const BLOB: &[u8] = b"{\"a\":1}";

    /// Has [`BLOB`] in the namespace `here`, and other bytes under the digest of "lie".
    struct Fake;

    impl Fake {
        fn find<T>(request: &Request<T>, digest: &str) -> Result<&'static [u8], Status> {
            let namespace = request.metadata().get("containerd-namespace").and_then(|value| value.to_str().ok());
            if namespace != Some("here") || request.metadata().get("grpc-timeout").is_none() {
                return Err(Status::not_found("content: not found"));
            }
            match digest {
                digest if digest == Digest::of(BLOB).to_string() => Ok(BLOB),
                digest if digest == Digest::of(b"lie").to_string() => Ok(b"truth"),
                _ => Err(Status::not_found("content: not found")),
            }
        }
    }

    type Parts<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

    #[tonic::async_trait]
    impl Content for Fake {
        type ListStream = Parts<wire::ListContentResponse>;
        type ReadStream = Parts<wire::ReadContentResponse>;

        async fn info(&self, request: Request<wire::InfoRequest>) -> Result<Response<wire::InfoResponse>, Status> {
            let bytes = Self::find(&request, &request.get_ref().digest)?;
            let labels = HashMap::from([("containerd.io/distribution.source.r".to_owned(), "a".to_owned())]);
            let digest = request.into_inner().digest;
            let info = wire::Info { digest, size: bytes.len() as i64, labels, ..Default::default() };
            Ok(Response::new(wire::InfoResponse { info: Some(info) }))
        }

        async fn list(&self, _: Request<wire::ListContentRequest>) -> Result<Response<Self::ListStream>, Status> {
            Err(Status::unimplemented("not asked for"))
        }

        async fn read(&self, request: Request<wire::ReadContentRequest>) -> Result<Response<Self::ReadStream>, Status> {
            let bytes = Self::find(&request, &request.get_ref().digest)?;
            let parts = bytes.chunks(3).map(|part| Ok(wire::ReadContentResponse { offset: 0, data: part.into() }));
            Ok(Response::new(Box::pin(tokio_stream::iter(parts.collect::<Vec<_>>()))))
        }
    }

    #[tokio::test]
    async fn reads_only_what_is_there_small_and_true() {
        let folder = tempfile::tempdir().expect("temporary directory");
        let socket = folder.path().join("containerd.sock");
        let store = ContentStore::connect(&socket);
        let digest = Digest::of(BLOB);
        assert!(matches!(store.info("here", digest).await, Err(ContentError::Call { .. })), "nobody listens yet");

        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).expect("listens"));
        let server = tonic::transport::Server::builder().add_service(ContentServer::new(Fake));
        let server = tokio::spawn(server.serve_with_incoming(incoming));

        let info = store.info("here", digest).await.expect("asks").expect("is there");
        assert_eq!((info.size, info.labels["containerd.io/distribution.source.r"].as_str()), (7, "a"));
        assert_eq!(store.info("elsewhere", digest).await.expect("asks"), None);
        assert_eq!(store.read("here", digest, 7).await.expect("reads").as_deref(), Some(BLOB));
        assert_eq!(store.read("elsewhere", digest, 7).await.expect("asks"), None);
        assert!(matches!(store.read("here", digest, 6).await, Err(ContentError::TooLarge { size: 7, .. })));
        assert!(matches!(store.read("here", Digest::of(b"lie"), 99).await, Err(ContentError::Digest { .. })));
        assert!(matches!(store.info("line\nbreak", digest).await, Err(ContentError::Namespace { .. })));
        server.abort();
    }
}
