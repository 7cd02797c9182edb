//! A small registry in memory, for tests: token authentication, ranges, redirects, and the ways in which real ones fail.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use http::{StatusCode, header};
use layer::Digest;
use parking_lot::Mutex;

use crate::config::{RegistriesConfig, RegistryConfig};
use crate::source::BlobRef;

/// How the registry behaves; changed with [`FakeRegistry::set`] at any time.
#[derive(Clone, Debug)]
pub struct Behaviour {
    /// Wants a bearer token, which the fake's own token server gives for these credentials (none: to everyone).
    pub token: bool,
    /// User and password that the token server or, without tokens, the registry itself wants.
    pub credentials: Option<(String, String)>,
    /// Tokens given so far become invalid whenever this changes.
    pub token_epoch: u32,
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
    /// Pause between pieces of 64 KiB.
    pub pause: Duration,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            token: false,
            credentials: None,
            token_epoch: 0,
            redirect_epoch: None,
            too_many: (0, None),
            break_after: None,
            stall_after: None,
            ignore_ranges: false,
            pause: Duration::ZERO,
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

#[derive(Default)]
struct Shared {
    behaviour: Mutex<Behaviour>,
    blobs: Mutex<HashMap<String, Bytes>>,
    manifests: Mutex<HashMap<String, (String, Bytes)>>,
    requests: Mutex<Requests>,
}

/// The registry, stopped when dropped.
pub struct FakeRegistry {
    shared: Arc<Shared>,
    address: SocketAddr,
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
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind to loopback");
        let address = listener.local_addr().expect("address of a bound socket");
        let shared = Arc::new(Shared::default());
        let router = axum::Router::new().fallback(answer).with_state((Arc::clone(&shared), address));
        let server = tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        });
        Self { shared, address, server }
    }

    /// Host and port.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// A configuration that reaches it.
    pub fn config(&self) -> RegistriesConfig {
        let config = RegistryConfig { plain_http: true, ..RegistryConfig::default() };
        RegistriesConfig([(self.host(), config)].into())
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
}

async fn answer(
    State((shared, address)): State<(Arc<Shared>, SocketAddr)>,
    request: Request,
) -> Result<Response, Infallible> {
    let behaviour = shared.behaviour.lock().clone();
    let path = request.uri().path().to_owned();
    let authorization = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if path == "/token" {
        return Ok(token(&shared, &behaviour, authorization));
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
    if let Some(refusal) = refuse(&behaviour, address, authorization) {
        return Ok(refusal);
    }
    if !is_blob {
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
    Ok(match behaviour.redirect_epoch {
        Some(epoch) => {
            let mut response = plain(StatusCode::TEMPORARY_REDIRECT, "");
            // Another origin than 127.0.0.1, though the same socket.
            let location = format!("http://localhost:{}{path}?signature={epoch}", address.port());
            response.headers_mut().insert(header::LOCATION, location.parse().expect("header"));
            response
        }
        None => blob(&shared, &behaviour, &path, &request),
    })
}

fn refuse(behaviour: &Behaviour, address: SocketAddr, authorization: Option<&str>) -> Option<Response> {
    let (wanted, challenge) = match (&behaviour.credentials, behaviour.token) {
        (_, true) => (
            format!("Bearer token-{}", behaviour.token_epoch),
            format!("Bearer realm=\"http://{address}/token\",service=\"fake\",scope=\"repository:team/app:pull\""),
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

fn token(shared: &Shared, behaviour: &Behaviour, authorization: Option<&str>) -> Response {
    shared.requests.lock().tokens += 1;
    let wanted = behaviour.credentials.as_ref().map(basic);
    if wanted.is_some() && wanted.as_deref() != authorization {
        return plain(StatusCode::UNAUTHORIZED, "wrong password");
    }
    let token = serde_json::json!({ "token": format!("token-{}", behaviour.token_epoch), "expires_in": 300 });
    Response::new(Body::from(token.to_string()))
}

fn blob(shared: &Arc<Shared>, behaviour: &Behaviour, path: &str, request: &Request) -> Response {
    let Some(bytes) = shared.blobs.lock().get(path).cloned() else {
        return plain(StatusCode::NOT_FOUND, "no such blob");
    };
    let total = bytes.len();
    let range = request.headers().get(header::RANGE).and_then(|value| value.to_str().ok());
    let range =
        range.filter(|_| !behaviour.ignore_ranges).and_then(|text| text.strip_prefix("bytes=")?.split_once('-'));
    let (status, start, end) = match range {
        None => (StatusCode::OK, 0, total),
        Some((first, last)) => {
            let first: usize = first.parse().unwrap_or(usize::MAX);
            let end = last.parse::<usize>().map_or(total, |last| (last + 1).min(total));
            if first >= end {
                return plain(StatusCode::RANGE_NOT_SATISFIABLE, "no such bytes");
            }
            (StatusCode::PARTIAL_CONTENT, first, end)
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
}

impl Pieces {
    async fn next(mut self) -> Option<(Result<Bytes, std::io::Error>, Self)> {
        if self.bytes.is_empty() {
            return None;
        }
        if self.breaks.is_some_and(|at| self.sent >= at) {
            return Some((Err(std::io::Error::other("broken off")), self));
        }
        if self.stalls.is_some_and(|at| self.sent >= at) {
            std::future::pending::<()>().await;
        }
        if !self.pause.is_zero() {
            tokio::time::sleep(self.pause).await;
        }
        let limit = [self.breaks, self.stalls].into_iter().flatten().min().map_or(u64::MAX, |at| at - self.sent);
        let piece = self.bytes.split_to((64usize << 10).min(self.bytes.len()).min(limit as usize));
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
