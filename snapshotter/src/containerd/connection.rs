//! The way to containerd's own gRPC services.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};

/// Deadline of one call that only reads. Chosen: containerd answers from its own disk, in milliseconds; it may be starting
/// just now.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);

/// Largest message that is taken, as containerd's own clients do.
pub(crate) const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Containerd behind its socket. Dialled when first used, and again whenever containerd was restarted. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Connection {
    channel: Channel,
    socket: PathBuf,
}

/// A text is no namespace that a header can hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("containerd namespace {namespace:?} is invalid")]
pub struct NamespaceError {
    /// The text.
    pub namespace: String,
}

impl Connection {
    /// To the containerd behind `socket`. Does not connect yet. Must be called inside a Tokio runtime.
    pub fn new(socket: &Path) -> Self {
        let path = socket.to_owned();
        // The address is not used: the connector knows the socket.
        let channel = Endpoint::from_static("http://containerd").connect_timeout(DEADLINE).connect_with_connector_lazy(
            tower::service_fn(move |_: Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }),
        );
        Self { channel, socket: socket.to_owned() }
    }

    /// For a generated client.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Containerd's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

/// A call in `namespace` that may take `deadline`.
pub(crate) fn request<T>(namespace: &str, message: T, deadline: Duration) -> Result<Request<T>, NamespaceError> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", namespace_value(namespace)?);
    request.set_timeout(deadline);
    Ok(request)
}

/// `namespace` as the value of a header.
pub(crate) fn namespace_value(namespace: &str) -> Result<MetadataValue<Ascii>, NamespaceError> {
    namespace.parse().map_err(|_| NamespaceError { namespace: namespace.to_owned() })
}

/// Ends a call at `deadline`. The server hears of it too, but it may be the one that hangs.
pub(crate) async fn within<T>(deadline: Duration, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(deadline, call)
        .await
        .unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("no answer within {deadline:?}"))))
}
