//! Connections to one machine, in the clear or with mutual TLS, for hyper and tonic.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use rustls::{AlertDescription, CertificateError, ClientConfig};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

/// Why a seeder takes no enrolments.
pub(crate) const NO_ENROLMENT: &str = "its configuration names no authority (enrol.authority)";

/// Bytes that are taken from a connection with TLS at a time. rustls by itself asks for 4 KiB, a quarter of a record.
const TLS_READ: usize = 64 << 10;

/// Connects to one place, whatever the request's URI says.
#[derive(Clone)]
pub(crate) struct Connector {
    place: Place,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    timeout: Duration,
}

#[derive(Clone, Debug)]
enum Place {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// It took too long.
    #[error("no connection within {0:?}")]
    Timeout(Duration),
    /// The network said no.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The other end does not speak TLS.
    #[error(
        "it does not speak TLS: this machine's configuration has security on, so its must have it on too \
         (security.mode = \"mtls\")"
    )]
    NotTls,
    /// The handshake failed: a certificate of another cluster, name or role.
    #[error("TLS: {0}")]
    Tls(String),
}

impl Connector {
    /// Connects to `address`; with `tls`, the certificate must be for the given name.
    pub(crate) fn new(
        address: SocketAddr,
        tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
        timeout: Duration,
    ) -> Self {
        Self { place: Place::Tcp(address), tls, timeout }
    }

    /// Connects to a socket file of this machine.
    pub(crate) fn local(path: PathBuf) -> Self {
        Self { place: Place::Unix(path), tls: None, timeout: Duration::from_secs(5) }
    }

    async fn connect(self) -> Result<TokioIo<Stream>, ConnectError> {
        let timeout = self.timeout;
        let connected = async {
            let tcp = match self.place {
                Place::Unix(path) => return Ok(Stream::Unix(UnixStream::connect(path).await?)),
                Place::Tcp(address) => TcpStream::connect(address).await?,
            };
            tcp.set_nodelay(true)?;
            let Some((config, name)) = self.tls else { return Ok(Stream::Tcp(tcp)) };
            let tcp = BufReader::with_capacity(TLS_READ, tcp);
            let tls = TlsConnector::from(config).connect(name, tcp).await.map_err(tls_error)?;
            Ok(Stream::Tls(Box::new(tls)))
        };
        let stream = tokio::time::timeout(timeout, connected).await.map_err(|_| ConnectError::Timeout(timeout))?;
        stream.map(TokioIo::new)
    }
}

fn tls_error(error: io::Error) -> ConnectError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidMessage(_)) => ConnectError::NotTls,
        // The text that rustls gives for a verifier's own error is its Debug form.
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(reason))) => {
            ConnectError::Tls(reason.0.to_string())
        }
        Some(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)) => {
            ConnectError::Tls(NO_ENROLMENT.to_owned())
        }
        Some(other) => ConnectError::Tls(other.to_string()),
        None => ConnectError::Io(error),
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("place", &self.place).field("tls", &self.tls.is_some()).finish()
    }
}

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ConnectError>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        Box::pin(self.clone().connect())
    }
}

/// A connection.
#[derive(Debug)]
pub(crate) enum Stream {
    /// In the clear.
    Tcp(TcpStream),
    /// With mutual TLS.
    Tls(Box<tokio_rustls::client::TlsStream<BufReader<TcpStream>>>),
    /// Inside this machine.
    Unix(UnixStream),
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
