//! Accepts connections and keeps their bounds: how many, how many of one address, how long a handshake, a header or a stalled write
//! may take.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::{Extension, Router};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::Semaphore;
use tokio::time::Sleep;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::security::{Security, tls};

/// First byte of a TLS connection: a record of type handshake (RFC 8446, 5.1).
const TLS_HANDSHAKE: u8 = 0x16;
/// Status of the answer to a client without TLS where TLS is demanded; it tells that client what is wrong.
pub(crate) const WANTS_TLS: u16 = 426;
/// Largest head of a request.
const HEAD_BYTES_MAX: usize = 32 << 10;
/// Requests on one HTTP/2 connection at the same time: a node asks for the layers of a few images.
const STREAMS_MAX: u32 = 256;
/// How often an HTTP/2 connection is asked for a sign of life, and how long it may take to give one. The lines of the mesh are
/// such connections: a node that is frozen must not be named to others for long.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// One address has at most this part of all connections: one machine that opens more and more leaves room for the others.
const PART_OF_ONE: usize = 4;
/// Time to finish what is under way after the order to stop.
const DRAIN: Duration = Duration::from_secs(5);

/// Bounds of a [`Listener`].
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at the same time; more wait in the kernel's queue. Where an address has a quarter of them, more of it are closed
    /// at once.
    pub connections: usize,
    /// Time for the first byte, and for a TLS handshake.
    pub handshake_timeout: Duration,
    /// Time for the head of a request, and how long a connection may idle between two.
    pub idle_timeout: Duration,
    /// How long a client may take no byte of what it asked for.
    pub stall_timeout: Duration,
}

impl Default for Limits {
    /// 4096 connections, 10 s for a handshake, 5 min idle, 30 s stalled.
    fn default() -> Self {
        Self {
            connections: 4096,
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            stall_timeout: Duration::from_secs(30),
        }
    }
}

/// Where a request's connection comes from, in its extensions. Absent on a socket file.
#[derive(Clone, Copy, Debug)]
pub struct Remote(pub SocketAddr);

/// A bound socket that serves a router.
pub struct Listener {
    tcp: TcpListener,
    doors: Option<Doors>,
    limits: Limits,
}

/// How connections with TLS come in.
#[derive(Clone)]
struct Doors {
    members: Arc<ServerConfig>,
    /// For machines without a certificate, and all that they get.
    strangers: Option<(Arc<ServerConfig>, Router)>,
}

impl Listener {
    /// Binds `address`, with mutual TLS unless `security` is off.
    pub async fn bind(address: &str, security: &Security, limits: Limits) -> io::Result<Self> {
        let doors = match security {
            Security::Off => None,
            Security::Mutual(identity) => {
                Some(Doors { members: tls::server(identity).map_err(io::Error::other)?, strangers: None })
            }
        };
        Ok(Self { tcp: TcpListener::bind(address).await?, doors, limits })
    }

    /// Lets machines without a certificate reach `router`, and nothing else. Without security everyone reaches everything anyhow.
    pub fn with_enrolment(mut self, security: &Security, router: Router) -> io::Result<Self> {
        if let (Some(doors), Security::Mutual(identity)) = (&mut self.doors, security) {
            doors.strangers = Some((tls::enrolment_server(identity).map_err(io::Error::other)?, router));
        }
        Ok(self)
    }

    /// The bound address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Serves until `stop`, then lets requests under way finish for a few seconds.
    pub async fn serve(self, router: Router, stop: CancellationToken) {
        let (connections, tracker) = (Arc::new(Semaphore::new(self.limits.connections)), TaskTracker::new());
        let callers = Callers { of_one: self.limits.connections.div_ceil(PART_OF_ONE), open: Arc::default() };
        loop {
            let accepted = async {
                let permit = Arc::clone(&connections).acquire_owned().await.map_err(io::Error::other)?;
                Ok::<_, io::Error>((self.tcp.accept().await?, permit))
            };
            let ((stream, peer), permit) = tokio::select! {
                () = stop.cancelled() => break,
                accepted = accepted => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Out of file descriptors, most likely: what is open must end first.
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            let Some(caller) = callers.enter(peer.ip().to_canonical()) else { continue };
            let (doors, limits, router, stop) = (self.doors.clone(), self.limits, router.clone(), stop.clone());
            let router = router.layer(Extension(Remote(peer)));
            tracker.spawn(async move {
                let _held = (permit, caller);
                if let Err(error) = connection(stream, doors, limits, router, stop).await {
                    tracing::debug!(%peer, %error, "connection ends");
                }
            });
        }
        drop(self.tcp);
        tracker.close();
        let _ = tokio::time::timeout(DRAIN, tracker.wait()).await;
    }
}

/// Serves `router` on a socket file that only this user can open, without TLS: for commands on the same machine.
pub async fn serve_local(path: &Path, router: Router, stop: CancellationToken) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let limits = Limits::default();
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted?.0,
        };
        let (router, stop) = (router.clone(), stop.clone());
        tokio::spawn(async move {
            if let Err(error) = http(stream, limits, router, stop).await {
                tracing::debug!(%error, "local connection ends");
            }
        });
    }
    let _ = std::fs::remove_file(path);
    Ok(())
}

async fn connection(
    mut stream: TcpStream,
    doors: Option<Doors>,
    limits: Limits,
    router: Router,
    stop: CancellationToken,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut first = [0; 1];
    let peeked = tokio::time::timeout(limits.handshake_timeout, stream.peek(&mut first));
    if peeked.await.map_err(|_| io::ErrorKind::TimedOut)?? == 0 {
        return Ok(());
    }
    let is_tls = first == [TLS_HANDSHAKE];
    let Some(doors) = doors else {
        if is_tls {
            refuse(&mut stream, "400 Bad Request", "security is off here: use http, not https").await?;
            return Err(io::Error::other("the client speaks TLS, but security is off here"));
        }
        return http(StallLimited::new(stream, limits.stall_timeout), limits, router, stop).await;
    };
    if !is_tls {
        let status = format!("{WANTS_TLS} Upgrade Required\r\nUpgrade: TLS/1.3");
        refuse(&mut stream, &status, "security is on here: mutual TLS with a certificate of this cluster").await?;
        return Err(io::Error::other("the client does not speak TLS, but security is on here"));
    }
    let handshake = doors.enter(StallLimited::new(stream, limits.stall_timeout), router);
    let (stream, router) =
        tokio::time::timeout(limits.handshake_timeout, handshake).await.map_err(|_| io::ErrorKind::TimedOut)??;
    let router = match tls::caller(stream.get_ref().1.peer_certificates()) {
        Some(caller) => router.layer(Extension(caller)),
        None => router,
    };
    http(stream, limits, router, stop).await
}

/// How many connections each address has.
#[derive(Clone)]
struct Callers {
    of_one: usize,
    open: Arc<Mutex<HashMap<IpAddr, Open>>>,
}

#[derive(Default)]
struct Open {
    connections: usize,
    is_said: bool,
}

/// A connection of an address, until this is dropped.
struct Caller {
    callers: Callers,
    address: IpAddr,
}

impl Callers {
    /// `None`: the address has enough.
    fn enter(&self, address: IpAddr) -> Option<Caller> {
        let mut open = self.open.lock();
        let of_address = open.entry(address).or_default();
        if of_address.connections >= self.of_one {
            if !std::mem::replace(&mut of_address.is_said, true) {
                tracing::warn!(%address, connections = self.of_one, "this machine opens more connections than one may: more are closed");
            }
            return None;
        }
        of_address.connections += 1;
        Some(Caller { callers: self.clone(), address })
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let mut open = self.callers.open.lock();
        if let Some(of_address) = open.get_mut(&self.address) {
            of_address.connections -= 1;
            if of_address.connections == 0 {
                open.remove(&self.address);
            }
        }
    }
}

impl Doors {
    /// Shakes hands; gives what the client may reach, which is `router` for machines of the cluster.
    async fn enter(self, stream: StallLimited, router: Router) -> io::Result<(TlsStream<StallLimited>, Router)> {
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let is_stranger = start.client_hello().alpn().is_some_and(|mut names| names.any(|name| name == tls::ENROLMENT));
        let (config, router) = match self.strangers {
            Some(strangers) if is_stranger => strangers,
            _ => (self.members, router),
        };
        Ok((start.into_stream(config).await?, router))
    }
}

async fn http<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    limits: Limits,
    router: Router,
    stop: CancellationToken,
) -> io::Result<()> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle_timeout)
        .max_buf_size(HEAD_BYTES_MAX)
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .max_concurrent_streams(STREAMS_MAX);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    ended.map_err(io::Error::other)
}

/// Answers in plain HTTP/1.1 whatever the client speaks, so that it can say what is wrong.
async fn refuse(stream: &mut TcpStream, status: &str, text: &str) -> io::Result<()> {
    let answer = format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{text}\n",
        text.len() + 1
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await?;
    // What the client still sends is read, or closing would reset the connection and lose the answer.
    let drained = async { while !matches!(stream.read(&mut [0; 1024]).await, Ok(0) | Err(_)) {} };
    let _ = tokio::time::timeout(Duration::from_secs(1), drained).await;
    Ok(())
}

/// A stream whose writes fail when the other end takes no byte for too long.
struct StallLimited {
    stream: TcpStream,
    limit: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl StallLimited {
    fn new(stream: TcpStream, limit: Duration) -> Self {
        Self { stream, limit, stalled: None }
    }

    fn limited<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.stalled = None;
            return polled;
        }
        let limit = self.limit;
        let sleep = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(sleep.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for StallLimited {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for StallLimited {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.limited(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.limited(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
