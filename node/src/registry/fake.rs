//! A small registry in memory, for tests: authentication, ranges, redirects, TLS, and the ways in which real ones fail.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, StatusCode, header};
use layer::Digest;
use parking_lot::Mutex;
use rustls_pki_types as pki;
use rustls_pki_types::pem::PemObject;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::config::{RegistriesConfig, RegistryConfig};
use crate::source::BlobRef;

/// How long what was sent before a break gets to leave: the server drops what is still in its hands.
const FLUSH: Duration = Duration::from_millis(20);

/// How the registry behaves; changed with [`FakeRegistry::set`] at any time.
#[derive(Clone, Debug)]
pub struct Behaviour {
    /// Wants a bearer token, which the fake's own token server gives for these credentials (none: to everyone).
    pub token: bool,
    /// User and password that the token server or, without tokens, the registry itself wants.
    pub credentials: Option<(String, String)>,
    /// Identity token that the token server wants, in a POST.
    pub identity: Option<String>,
    /// Tokens given so far become invalid whenever this changes.
    pub token_epoch: u32,
    /// Seconds that tokens are said to be good for.
    pub token_validity: Option<u64>,
    /// The token server answers this instead.
    pub token_odd: Option<(u16, String)>,
    /// Blobs are redirected to signed URLs; each change of the number makes older URLs invalid.
    pub redirect_epoch: Option<u32>,
    /// Answers that many blob requests with 429 and this Retry-After.
    pub too_many: (u32, Option<String>),
    /// Breaks bodies of blobs off after this many bytes, that many times.
    pub break_after: Option<(u64, u32)>,
    /// Sends nothing more after this many bytes of a blob, for ever.
    pub stall_after: Option<u64>,
    /// Ignores ranges.
    pub ignore_ranges: bool,
    /// Pause between pieces of 64 KiB of a body.
    pub pause: Duration,
    /// Bytes a second of all bodies together.
    pub rate: Option<u64>,
    /// What it answers to requests for one blob, or for all.
    pub odd: Option<(Odd, Option<Digest>)>,
}

/// An answer that is not what was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Odd {
    /// A status with a media type and a body.
    Status(u16, String, String),
    /// A redirect to this URL; `{path}` in it stands for the request's own path.
    Redirect(String),
    /// A part, but another than was asked for.
    WrongRange,
    /// 206 without Content-Range.
    NoRange,
    /// Half of the bytes that it announces.
    ShortBody,
    /// The connection is closed before the first byte of the body.
    Close,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            token: false,
            credentials: None,
            identity: None,
            token_epoch: 0,
            token_validity: Some(300),
            token_odd: None,
            redirect_epoch: None,
            too_many: (0, None),
            break_after: None,
            stall_after: None,
            ignore_ranges: false,
            pause: Duration::ZERO,
            rate: None,
            odd: None,
        }
    }
}

/// How often what was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// Blob requests at the registry, refused and redirected ones included.
    pub blobs: u32,
    /// Bodies of blobs that were begun, by the registry or the place it redirects to.
    pub bodies: u32,
    /// Tokens.
    pub tokens: u32,
    /// Bytes of blobs that were handed to the network.
    pub bytes: u64,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Path and query.
    pub path: String,
    /// Headers.
    pub headers: HeaderMap,
}

#[derive(Default)]
struct Shared {
    behaviour: Mutex<Behaviour>,
    blobs: Mutex<HashMap<String, Bytes>>,
    manifests: Mutex<HashMap<String, (String, Bytes)>>,
    requests: Mutex<Requests>,
    seen: Mutex<Vec<Seen>>,
    /// When the line is free again, where it has a rate.
    line: Mutex<Option<Instant>>,
}

/// The registry, stopped when dropped.
pub struct FakeRegistry {
    shared: Arc<Shared>,
    address: SocketAddr,
    is_tls: bool,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FakeRegistry {
    /// Starts on a free port of the loopback interface.
    pub async fn start() -> Self {
        Self::start_on("127.0.0.1:0").await.expect("bind to loopback")
    }

    /// Starts on `address`.
    pub async fn start_on(address: &str) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (shared, router) = routed(address, "http");
        let server = tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { shared, address, is_tls: false, server })
    }

    /// Starts with TLS: `certificate` and `key` are PEM files; with `client_ca` clients need a certificate of that authority.
    pub async fn start_tls(certificate: &Path, key: &Path, client_ca: Option<&Path>) -> Self {
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("bind to loopback");
        let address = tcp.local_addr().expect("address of a bound socket");
        let (shared, router) = routed(address, "https");
        let listener = TlsListener { tcp, acceptor: acceptor(certificate, key, client_ca) };
        let server = tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        });
        Self { shared, address, is_tls: true, server }
    }

    /// Host and port.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// A configuration that reaches it; with TLS its authority is still to be named.
    pub fn config(&self) -> RegistriesConfig {
        let config = RegistryConfig { plain_http: !self.is_tls, ..RegistryConfig::default() };
        RegistriesConfig { config_path: Vec::new(), hosts: [(self.host(), config)].into() }
    }

    /// Adds a blob of `team/app`.
    pub fn put_blob(&self, bytes: impl Into<Bytes>) -> BlobRef {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        let size = bytes.len() as u64;
        self.shared.blobs.lock().insert(format!("/v2/team/app/blobs/{digest}"), bytes);
        BlobRef {
            registry: self.host(),
            repository: "team/app".to_owned(),
            digest,
            size,
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            urls: Vec::new(),
        }
    }

    /// Serves `bytes` at `path`, outside of the registry's own paths.
    pub fn put_file(&self, path: &str, bytes: impl Into<Bytes>) {
        self.shared.blobs.lock().insert(path.to_owned(), bytes.into());
    }

    /// Replaces the bytes that stand under `blob`'s digest: a registry that lies.
    pub fn corrupt_blob(&self, blob: &BlobRef, bytes: impl Into<Bytes>) {
        self.shared.blobs.lock().insert(format!("/v2/{}/blobs/{}", blob.repository, blob.digest), bytes.into());
    }

    /// Adds a manifest by digest and, if given, tag.
    pub fn put_manifest(
        &self,
        repository: &str,
        tag: Option<&str>,
        media_type: &str,
        json: &serde_json::Value,
    ) -> Digest {
        let bytes = Bytes::from(json.to_string());
        let digest = Digest::of(&bytes);
        let mut manifests = self.shared.manifests.lock();
        for name in [Some(digest.to_string().as_str()), tag].into_iter().flatten() {
            manifests.insert(format!("/v2/{repository}/manifests/{name}"), (media_type.to_owned(), bytes.clone()));
        }
        digest
    }

    /// Changes how it behaves.
    pub fn set(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.shared.behaviour.lock());
    }

    /// What was asked for so far.
    pub fn requests(&self) -> Requests {
        *self.shared.requests.lock()
    }

    /// The requests themselves, the first thousand.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().clone()
    }
}

/// An HTTP proxy that only makes tunnels (CONNECT), all of them to one address; stopped when dropped.
pub struct FakeTunnel {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for FakeTunnel {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FakeTunnel {
    /// Starts on a free port of the loopback interface; `None` refuses every tunnel.
    pub async fn start(target: Option<SocketAddr>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind to loopback");
        let address = listener.local_addr().expect("address of a bound socket");
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let log = Arc::clone(&asked);
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let log = Arc::clone(&log);
                tokio::spawn(async move {
                    let _ = tunnel(stream, target, &log).await;
                });
            }
        });
        Self { address, asked, server }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The hosts that tunnels were asked for.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().clone()
    }
}

async fn tunnel(mut stream: TcpStream, target: Option<SocketAddr>, log: &Mutex<Vec<String>>) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < 8 << 10 {
        head.push(stream.read_u8().await?);
    }
    let text = String::from_utf8_lossy(&head);
    let mut words = text.split_whitespace();
    let is_connect = words.next() == Some("CONNECT");
    log.lock().push(words.next().unwrap_or_default().to_owned());
    let Some(target) = target.filter(|_| is_connect) else {
        return stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
    };
    let mut other = TcpStream::connect(target).await?;
    stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
    tokio::io::copy_bidirectional(&mut stream, &mut other).await.map(drop)
}

fn routed(address: SocketAddr, scheme: &'static str) -> (Arc<Shared>, axum::Router) {
    let shared = Arc::new(Shared::default());
    let router = axum::Router::new().fallback(answer).with_state((Arc::clone(&shared), address, scheme));
    (shared, router)
}

/// Accepts connections with TLS.
struct TlsListener {
    tcp: TcpListener,
    acceptor: tokio_rustls::TlsAcceptor,
}

impl axum::serve::Listener for TlsListener {
    type Io = tokio_rustls::server::TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            if let Ok((stream, peer)) = self.tcp.accept().await {
                let shaken = tokio::time::timeout(Duration::from_secs(5), self.acceptor.accept(stream)).await;
                if let Ok(Ok(stream)) = shaken {
                    return (stream, peer);
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

fn acceptor(certificate: &Path, key: &Path, client_ca: Option<&Path>) -> tokio_rustls::TlsAcceptor {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let certificates = |path: &Path| -> Vec<pki::CertificateDer<'static>> {
        pki::CertificateDer::pem_file_iter(path).expect("PEM file").map(|one| one.expect("certificate")).collect()
    };
    // With TLS 1.3 a client without a certificate is refused after it sent its request, and may see a reset in place of the
    // reason.
    let versions = if client_ca.is_some() { &[&rustls::version::TLS12][..] } else { rustls::ALL_VERSIONS };
    let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(versions);
    let builder = builder.expect("protocol versions");
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = rustls::RootCertStore::empty();
            roots.add_parsable_certificates(certificates(path));
            let verifier =
                rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.expect("authority"))
        }
    };
    let key = pki::PrivateKeyDer::from_pem_file(key).expect("key");
    let config = builder.with_single_cert(certificates(certificate), key).expect("certificate and key");
    tokio_rustls::TlsAcceptor::from(Arc::new(config))
}

async fn answer(
    State((shared, address, scheme)): State<(Arc<Shared>, SocketAddr, &'static str)>,
    request: Request,
) -> Result<Response, Infallible> {
    let behaviour = shared.behaviour.lock().clone();
    let path = request.uri().path().to_owned();
    {
        let mut seen = shared.seen.lock();
        if seen.len() < 1000 {
            let path = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
            seen.push(Seen { path, headers: request.headers().clone() });
        }
    }
    let authorization = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if path == "/token" {
        let authorization = authorization.map(str::to_owned);
        let form = axum::body::to_bytes(request.into_body(), 64 << 10).await.unwrap_or_default();
        return Ok(token(&shared, &behaviour, authorization.as_deref(), &String::from_utf8_lossy(&form)));
    }
    let signed = request.uri().query().and_then(|query| query.strip_prefix("signature="));
    if let Some(signature) = signed {
        return Ok(match Some(signature.to_owned()) == behaviour.redirect_epoch.map(|epoch| epoch.to_string()) {
            // What object stores do with a second kind of authorization.
            true if authorization.is_some() => plain(StatusCode::BAD_REQUEST, "only one kind of authorization"),
            true => blob(&shared, &behaviour, &path, &request),
            false => plain(StatusCode::FORBIDDEN, "expired"),
        });
    }
    let is_blob = path.contains("/blobs/");
    if is_blob {
        shared.requests.lock().blobs += 1;
    }
    if path.starts_with("/v2/")
        && let Some(refusal) = refuse(&behaviour, scheme, address, authorization)
    {
        return Ok(refusal);
    }
    if let Some((odd, only)) = &behaviour.odd
        && only.is_none_or(|digest| path.ends_with(&digest.to_string()))
        && let Some(response) = odd_answer(&shared, odd, &path, address, &request)
    {
        return Ok(response);
    }
    if path.starts_with("/v2/") && !is_blob {
        let found = shared.manifests.lock().get(&path).cloned();
        return Ok(found.map_or_else(
            || plain(StatusCode::NOT_FOUND, "no such manifest"),
            |(media_type, bytes)| {
                let mut response = Response::new(Body::from(bytes));
                response.headers_mut().insert(header::CONTENT_TYPE, media_type.parse().expect("media type"));
                response
            },
        ));
    }
    if behaviour.too_many.0 > 0 {
        shared.behaviour.lock().too_many.0 -= 1;
        let mut response = plain(StatusCode::TOO_MANY_REQUESTS, "slow down");
        if let Some(after) = &behaviour.too_many.1 {
            response.headers_mut().insert(header::RETRY_AFTER, after.parse().expect("header"));
        }
        return Ok(response);
    }
    Ok(match behaviour.redirect_epoch.filter(|_| is_blob) {
        Some(epoch) => {
            // Another origin than 127.0.0.1, though the same socket.
            redirect(&format!("{scheme}://localhost:{}{path}?signature={epoch}", address.port()))
        }
        None => blob(&shared, &behaviour, &path, &request),
    })
}

fn odd_answer(shared: &Arc<Shared>, odd: &Odd, path: &str, address: SocketAddr, request: &Request) -> Option<Response> {
    Some(match odd {
        Odd::Status(status, media_type, body) => {
            let mut response = Response::new(Body::from(body.clone()));
            *response.status_mut() = StatusCode::from_u16(*status).expect("status");
            response.headers_mut().insert(header::CONTENT_TYPE, media_type.parse().expect("media type"));
            response
        }
        Odd::Redirect(to) => redirect(&to.replace("{path}", path).replace("{address}", &address.to_string())),
        Odd::WrongRange | Odd::NoRange => {
            let mut response = Response::new(Body::from("0123456789"));
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            if *odd == Odd::WrongRange {
                let range = header::HeaderValue::from_static("bytes 7-16/1000000");
                response.headers_mut().insert(header::CONTENT_RANGE, range);
            }
            response
        }
        Odd::ShortBody => {
            let bytes = shared.blobs.lock().get(path).cloned()?;
            let (start, end) = range_of(request, bytes.len()).unwrap_or((0, bytes.len()));
            let half = bytes.slice(start..start + (end - start).div_ceil(2));
            let broken = async {
                tokio::time::sleep(FLUSH).await;
                Err(io::Error::other("broken off"))
            };
            let pieces = stream::iter([Ok(half)]).chain(stream::once(broken));
            let mut response = Response::new(Body::from_stream(pieces));
            if (start, end) != (0, bytes.len()) {
                *response.status_mut() = StatusCode::PARTIAL_CONTENT;
                let range = format!("bytes {start}-{}/{}", end - 1, bytes.len());
                response.headers_mut().insert(header::CONTENT_RANGE, range.parse().expect("header"));
            }
            response.headers_mut().insert(header::CONTENT_LENGTH, (end - start).into());
            response
        }
        Odd::Close => {
            let mut response =
                Response::new(Body::from_stream(stream::iter([Err::<Bytes, _>(io::Error::other("closed"))])));
            if let Some((start, end)) = range_of(request, usize::MAX) {
                *response.status_mut() = StatusCode::PARTIAL_CONTENT;
                let range = format!("bytes {start}-{}/*", end.saturating_sub(1));
                response.headers_mut().insert(header::CONTENT_RANGE, range.parse().expect("header"));
            }
            response
        }
    })
}

fn redirect(to: &str) -> Response {
    let mut response = plain(StatusCode::TEMPORARY_REDIRECT, "");
    response.headers_mut().insert(header::LOCATION, to.parse().expect("header"));
    response
}

fn refuse(behaviour: &Behaviour, scheme: &str, address: SocketAddr, authorization: Option<&str>) -> Option<Response> {
    let (wanted, challenge) = match (&behaviour.credentials, behaviour.token) {
        (_, true) => (
            format!("Bearer token-{}", behaviour.token_epoch),
            format!("Bearer realm=\"{scheme}://{address}/token\",service=\"fake\",scope=\"repository:team/app:pull\""),
        ),
        (Some(credentials), false) => (basic(credentials), "Basic realm=\"fake\"".to_owned()),
        (None, false) => return None,
    };
    if authorization == Some(wanted.as_str()) {
        return None;
    }
    let mut response = plain(StatusCode::UNAUTHORIZED, "who are you?");
    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge.parse().expect("header"));
    Some(response)
}

fn token(shared: &Shared, behaviour: &Behaviour, authorization: Option<&str>, form: &str) -> Response {
    shared.requests.lock().tokens += 1;
    if let Some((status, body)) = &behaviour.token_odd {
        let mut response = Response::new(Body::from(body.clone()));
        *response.status_mut() = StatusCode::from_u16(*status).expect("status");
        return response;
    }
    if let Some(identity) = &behaviour.identity {
        let fields: HashMap<String, String> = url::form_urlencoded::parse(form.as_bytes()).into_owned().collect();
        let has = |name: &str, value: &str| fields.get(name).is_some_and(|field| field == value);
        let fits = has("grant_type", "refresh_token")
            && has("refresh_token", identity)
            && has("service", "fake")
            && has("scope", "repository:team/app:pull")
            && fields.contains_key("client_id");
        if !fits {
            return plain(StatusCode::UNAUTHORIZED, "wrong identity");
        }
    }
    let wanted = behaviour.credentials.as_ref().map(basic);
    if wanted.is_some() && wanted.as_deref() != authorization {
        return plain(StatusCode::UNAUTHORIZED, r#"{"details":"incorrect username or password"}"#);
    }
    let name = if behaviour.identity.is_some() { "access_token" } else { "token" };
    let mut token = serde_json::json!({ name: format!("token-{}", behaviour.token_epoch) });
    if let Some(seconds) = behaviour.token_validity {
        token["expires_in"] = seconds.into();
    }
    Response::new(Body::from(token.to_string()))
}

/// The half-open range of a request; `None` without one, or with one that cannot be served.
fn range_of(request: &Request, total: usize) -> Option<(usize, usize)> {
    let text = request.headers().get(header::RANGE)?.to_str().ok()?;
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let end = last.parse::<usize>().map_or(total, |last| (last + 1).min(total));
    Some((first.parse().ok()?, end))
}

fn blob(shared: &Arc<Shared>, behaviour: &Behaviour, path: &str, request: &Request) -> Response {
    let Some(bytes) = shared.blobs.lock().get(path).cloned() else {
        return plain(StatusCode::NOT_FOUND, "no such blob");
    };
    let total = bytes.len();
    let (status, start, end) = match range_of(request, total).filter(|_| !behaviour.ignore_ranges) {
        None => (StatusCode::OK, 0, total),
        Some((first, end)) if first < end => (StatusCode::PARTIAL_CONTENT, first, end),
        Some(_) => {
            let mut response = plain(StatusCode::RANGE_NOT_SATISFIABLE, "no such bytes");
            response.headers_mut().insert(header::CONTENT_RANGE, format!("bytes */{total}").parse().expect("header"));
            return response;
        }
    };
    shared.requests.lock().bodies += 1;
    let breaks = behaviour.break_after.filter(|(_, times)| *times > 0).map(|(at, _)| at);
    if breaks.is_some()
        && let Some((_, times)) = &mut shared.behaviour.lock().break_after
    {
        *times -= 1;
    }
    let pieces = Pieces {
        shared: Arc::clone(shared),
        bytes: bytes.slice(start..end),
        sent: 0,
        breaks,
        stalls: behaviour.stall_after,
        pause: behaviour.pause,
        rate: behaviour.rate,
    };
    let body = Body::from_stream(stream::unfold(pieces, Pieces::next));
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_LENGTH, (end - start).into());
    if status == StatusCode::PARTIAL_CONTENT {
        let range = format!("bytes {start}-{}/{total}", end - 1);
        response.headers_mut().insert(header::CONTENT_RANGE, range.parse().expect("header"));
    }
    response
}

struct Pieces {
    shared: Arc<Shared>,
    bytes: Bytes,
    sent: u64,
    breaks: Option<u64>,
    stalls: Option<u64>,
    pause: Duration,
    rate: Option<u64>,
}

impl Pieces {
    async fn next(mut self) -> Option<(Result<Bytes, io::Error>, Self)> {
        if self.bytes.is_empty() {
            return None;
        }
        if self.breaks.is_some_and(|at| self.sent >= at) {
            tokio::time::sleep(FLUSH).await;
            return Some((Err(io::Error::other("broken off")), self));
        }
        if self.stalls.is_some_and(|at| self.sent >= at) {
            std::future::pending::<()>().await;
        }
        if !self.pause.is_zero() {
            tokio::time::sleep(self.pause).await;
        }
        let limit = [self.breaks, self.stalls].into_iter().flatten().min().map_or(u64::MAX, |at| at - self.sent);
        let piece = self.bytes.split_to((64usize << 10).min(self.bytes.len()).min(limit as usize));
        if let Some(rate) = self.rate {
            let turn = {
                let mut line = self.shared.line.lock();
                let turn = line.unwrap_or_else(Instant::now).max(Instant::now());
                *line = Some(turn + Duration::from_secs_f64(piece.len() as f64 / rate as f64));
                turn
            };
            tokio::time::sleep_until(turn.into()).await;
        }
        self.sent += piece.len() as u64;
        self.shared.requests.lock().bytes += piece.len() as u64;
        Some((Ok(piece), self))
    }
}

fn basic((user, password): &(String, String)) -> String {
    use base64::Engine as _;
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

fn plain(status: StatusCode, text: &'static str) -> Response {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response
}
