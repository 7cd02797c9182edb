//! Serving of index sections and chunks over HTTP/1.1, and of the control service over HTTP/2, on one port
//! (`docs/wire.md`).
//!
//! [`router`] makes the HTTP routes of anything that has layers; [`listener`] accepts connections, in the clear or with
//! mutual TLS, and keeps the bounds.

pub mod listener;

use std::any::Any;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use layer::Digest;
use layer::index::Section;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::mesh::{Asker, Turned};
use crate::source::BoxFuture;

pub use listener::{Limits, Listener, Remote};

/// Bytes of a body as they come; an error breaks the connection off.
pub type ByteStream = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// Header that says how large the chunks of a run are.
pub const CHUNK_LOG2: &str = "drover-chunk-log2";
/// Header that says with which chunk a body begins that goes on as chunks come.
pub const FIRST: &str = "drover-first";
/// Bytes of a section that are read at a time.
const READ_LEN: u64 = 256 << 10;
/// What a busy server asks for.
const BUSY: Duration = Duration::from_secs(1);

/// Somebody who has layers.
pub trait LayerServer: Send + Sync + 'static {
    /// The index header of a known layer.
    fn header(&self, blob: Digest) -> BoxFuture<'_, Result<Bytes, ServeError>>;

    /// A section of a known layer's index.
    fn section(&self, blob: Digest, section: Section, asker: Asker) -> BoxFuture<'_, Result<SectionBody, ServeError>>;

    /// The frames of a run of chunks, which is not empty.
    fn chunks(&self, blob: Digest, run: Range<u32>, asker: Asker) -> BoxFuture<'_, Result<Frames, ServeError>>;

    /// The frames of all chunks from `first` on, in order, as they come into being. The stream ends after the last chunk of the
    /// layer.
    fn follow(&self, blob: Digest, first: u32, asker: Asker) -> BoxFuture<'_, Result<Frames, ServeError>>;
}

/// A section as a file.
#[derive(Debug)]
pub struct SectionBody {
    /// Its bytes.
    pub file: Arc<File>,
    /// How many.
    pub size: u64,
    /// Is dropped when the answer ended, however.
    pub held: Option<Box<dyn Any + Send>>,
}

/// Frames on their way.
pub struct Frames {
    /// How many bytes come, where that is known.
    pub len: Option<u64>,
    /// log2 of the chunk size, where the asker may not know it.
    pub chunk_log2: Option<u8>,
    /// The frames (`layer::wire`), in pieces of any size.
    pub stream: ByteStream,
}

/// Why something is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServeError {
    /// The layer is not known and not being ingested.
    #[error("this layer is not known here")]
    Unknown,
    /// The layer is being ingested and has not come that far.
    #[error("the blob of the layer is being read and has not come that far")]
    NotYet,
    /// The layer is known here, but not all that was asked for is here.
    #[error("not all of it is here")]
    Absent,
    /// The layer has no such chunks.
    #[error("the layer has no such chunks or bytes")]
    OutOfRange,
    /// This member of the mesh is to come again later, or to ask others.
    #[error("enough is being given: come again later, or ask others")]
    Busy(Turned),
    /// Too much to do.
    #[error("too many transfers at once")]
    Overloaded,
    /// This member of the mesh gets nothing.
    #[error("{0}")]
    Refused(&'static str),
    /// The request cannot be understood.
    #[error("{0}")]
    BadRequest(String),
    /// The disk failed or holds something wrong.
    #[error("{0}")]
    Failed(String),
}

impl IntoResponse for ServeError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Unknown | Self::NotYet | Self::Absent => StatusCode::NOT_FOUND,
            Self::OutOfRange => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::Busy(_) | Self::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
            Self::Refused(_) => StatusCode::FORBIDDEN,
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let mut response = (status, self.to_string()).into_response();
        match self {
            Self::Overloaded => drop(response.headers_mut().insert(header::RETRY_AFTER, BUSY.as_secs().into())),
            Self::Busy(turned) => turned.write(response.headers_mut()),
            _ => {}
        }
        response
    }
}

struct Routes<S> {
    server: Arc<S>,
    transfers: Arc<Semaphore>,
}

impl<S> Clone for Routes<S> {
    fn clone(&self) -> Self {
        Self { server: Arc::clone(&self.server), transfers: Arc::clone(&self.transfers) }
    }
}

/// The HTTP routes of `server`, with at most `transfers` bodies of sections and chunks under way.
pub fn router<S: LayerServer>(server: Arc<S>, transfers: usize) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/v1/layers/{blob}/index/{section}", get(section::<S>))
        .route("/v1/layers/{blob}/chunks/{run}", get(chunks::<S>))
        .route("/v1/layers/{blob}/follow", get(follow::<S>))
        .with_state(Routes { server, transfers: Arc::new(Semaphore::new(transfers)) })
}

async fn section<S: LayerServer>(
    State(routes): State<Routes<S>>,
    Path((blob, name)): Path<(String, String)>,
    remote: Option<Extension<Remote>>,
    headers: HeaderMap,
) -> Result<Response, ServeError> {
    let blob = parse_blob(&blob)?;
    if name == "header" {
        let bytes = routes.server.header(blob).await?;
        return Ok(octets(Body::from(bytes)));
    }
    let Some(section) = Section::from_name(&name) else {
        return Err(ServeError::BadRequest(format!("an index has no section {name:?}")));
    };
    let permit = routes.permit()?;
    let body = routes.server.section(blob, section, asker(remote, &headers)).await?;
    let range = headers.get(header::RANGE).map(|value| parse_range(value, body.size));
    let (status, range) = match range {
        None | Some(ByteRange::Ignored) => (StatusCode::OK, 0..body.size),
        Some(ByteRange::Of(range)) => (StatusCode::PARTIAL_CONTENT, range),
        Some(ByteRange::Unsatisfiable) => {
            let mut response = ServeError::OutOfRange.into_response();
            set(&mut response, header::CONTENT_RANGE, &format!("bytes */{}", body.size));
            return Ok(response);
        }
    };
    let mut response = octets(Body::from_stream(held(read_file(body.file, range.clone()), (permit, body.held))));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_LENGTH, (range.end - range.start).into());
    response.headers_mut().insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    if status == StatusCode::PARTIAL_CONTENT {
        let last = range.end.saturating_sub(1);
        set(&mut response, header::CONTENT_RANGE, &format!("bytes {}-{last}/{}", range.start, body.size));
    }
    Ok(response)
}

async fn chunks<S: LayerServer>(
    State(routes): State<Routes<S>>,
    Path((blob, run)): Path<(String, String)>,
    remote: Option<Extension<Remote>>,
    headers: HeaderMap,
) -> Result<Response, ServeError> {
    let blob = parse_blob(&blob)?;
    let wrong = || ServeError::BadRequest("want chunks/FIRST-END with FIRST < END".to_owned());
    let (first, end) = run.split_once('-').ok_or_else(wrong)?;
    let run = first.parse::<u32>().map_err(|_| wrong())?..end.parse::<u32>().map_err(|_| wrong())?;
    if run.is_empty() {
        return Err(wrong());
    }
    let asker = asker(remote, &headers);
    let permit = routes.permit_for(&asker)?;
    Ok(frames(routes.server.chunks(blob, run, asker).await?, permit))
}

async fn follow<S: LayerServer>(
    State(routes): State<Routes<S>>,
    Path(blob): Path<String>,
    RawQuery(query): RawQuery,
    remote: Option<Extension<Remote>>,
    headers: HeaderMap,
) -> Result<Response, ServeError> {
    let blob = parse_blob(&blob)?;
    let first = query.as_deref().and_then(|query| query.strip_prefix("first="));
    let first = first.map_or(Ok(0), str::parse::<u32>);
    let first = first.map_err(|_| ServeError::BadRequest("want follow?first=CHUNK".to_owned()))?;
    let asker = asker(remote, &headers);
    let permit = routes.permit_for(&asker)?;
    let mut response = frames(routes.server.follow(blob, first, asker).await?, permit);
    response.headers_mut().insert(FIRST, first.into());
    Ok(response)
}

impl<S> Routes<S> {
    fn permit(&self) -> Result<OwnedSemaphorePermit, ServeError> {
        Arc::clone(&self.transfers).try_acquire_owned().map_err(|_| ServeError::Overloaded)
    }

    /// For a member of a mesh it is no fault that all transfers are taken.
    fn permit_for(&self, asker: &Asker) -> Result<OwnedSemaphorePermit, ServeError> {
        self.permit().map_err(|error| match asker.peer {
            Some(_) => ServeError::Busy(Turned { retry_after: BUSY, peers: Vec::new() }),
            None => error,
        })
    }
}

fn asker(remote: Option<Extension<Remote>>, headers: &HeaderMap) -> Asker {
    Asker::read(remote.map(|Extension(Remote(address))| address.ip()), headers)
}

fn frames(frames: Frames, permit: OwnedSemaphorePermit) -> Response {
    let mut response = octets(Body::from_stream(held(frames.stream, permit)));
    if let Some(len) = frames.len {
        response.headers_mut().insert(header::CONTENT_LENGTH, len.into());
    }
    if let Some(log2) = frames.chunk_log2 {
        response.headers_mut().insert(CHUNK_LOG2, u16::from(log2).into());
    }
    response
}

fn octets(body: Body) -> Response {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    response
}

/// The stream with what is to be dropped when the body is sent or dropped: its permit.
fn held<H: Send + 'static>(stream: ByteStream, permit: H) -> ByteStream {
    stream
        .map(move |item| {
            let _held = &permit;
            item
        })
        .boxed()
}

fn read_file(file: Arc<File>, range: Range<u64>) -> ByteStream {
    stream::try_unfold(range, move |range| {
        let file = Arc::clone(&file);
        async move {
            if range.is_empty() {
                return Ok(None);
            }
            let len = READ_LEN.min(range.end - range.start);
            let read = move || {
                let mut bytes = vec![0; len as usize];
                file.read_exact_at(&mut bytes, range.start)?;
                Ok::<_, io::Error>(Bytes::from(bytes))
            };
            let bytes = tokio::task::spawn_blocking(read).await.map_err(io::Error::other)??;
            Ok(Some((bytes, range.start + len..range.end)))
        }
    })
    .boxed()
}

fn parse_blob(text: &str) -> Result<Digest, ServeError> {
    text.parse().map_err(|error: layer::digest::ParseDigestError| ServeError::BadRequest(error.to_string()))
}

fn set(response: &mut Response, name: header::HeaderName, text: &str) {
    if let Ok(value) = HeaderValue::from_str(text) {
        response.headers_mut().insert(name, value);
    }
}

/// A `Range` header against a body.
#[derive(Debug, PartialEq, Eq)]
enum ByteRange {
    Of(Range<u64>),
    /// Several ranges or an unknown unit: the whole body may be sent (RFC 9110, 14.2).
    Ignored,
    Unsatisfiable,
}

fn parse_range(value: &HeaderValue, size: u64) -> ByteRange {
    let parsed = value.to_str().ok().and_then(|text| text.strip_prefix("bytes=")?.split_once('-'));
    let Some((first, last)) = parsed else { return ByteRange::Ignored };
    let range = match (first.trim().parse::<u64>(), last.trim().parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..size.min(last.saturating_add(1)),
        (Ok(first), Err(_)) if last.trim().is_empty() => first..size,
        (Err(_), Ok(suffix)) if first.trim().is_empty() => size.saturating_sub(suffix)..size,
        _ => return ByteRange::Ignored,
    };
    if range.is_empty() { ByteRange::Unsatisfiable } else { ByteRange::Of(range) }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::mesh::Member;
    use crate::security::Security;
    use crate::source::Priority;

    /// Has one layer of four chunks, whose frames never end for the last one.
    struct OneLayer {
        section: Arc<File>,
    }

    const BLOB: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

    impl LayerServer for OneLayer {
        fn header(&self, _blob: Digest) -> BoxFuture<'_, Result<Bytes, ServeError>> {
            Box::pin(async { Err(ServeError::NotYet) })
        }

        fn section(&self, _: Digest, _: Section, _: Asker) -> BoxFuture<'_, Result<SectionBody, ServeError>> {
            Box::pin(async { Ok(SectionBody { file: Arc::clone(&self.section), size: 1000, held: None }) })
        }

        fn chunks(&self, blob: Digest, run: Range<u32>, asker: Asker) -> BoxFuture<'_, Result<Frames, ServeError>> {
            Box::pin(async move {
                if let Asker { ip: Some(ip), peer: Some(address), priority: Priority::Demand } = asker {
                    assert!(ip.is_loopback());
                    let other = Member { address, zone: "other".to_owned() };
                    return Err(ServeError::Busy(Turned {
                        retry_after: Duration::from_millis(20),
                        peers: vec![other],
                    }));
                }
                let stream = match run {
                    _ if blob != Digest::from_bytes([0; 32]) => return Err(ServeError::Unknown),
                    Range { end: 5.., .. } => return Err(ServeError::OutOfRange),
                    Range { start: 3, .. } => stream::repeat_with(|| Ok(Bytes::from(vec![1; 1 << 20]))).boxed(),
                    _ => stream::iter([Ok(Bytes::from_static(b"frames"))]).boxed(),
                };
                Ok(Frames { len: None, chunk_log2: None, stream })
            })
        }

        fn follow(&self, _: Digest, _: u32, _: Asker) -> BoxFuture<'_, Result<Frames, ServeError>> {
            let broken = [Ok(Bytes::from_static(b"begin")), Err(io::Error::other("broken"))];
            let frames = Frames { len: None, chunk_log2: Some(17), stream: stream::iter(broken).boxed() };
            Box::pin(async { Ok(frames) })
        }
    }

    struct Serving {
        base: String,
        address: String,
        _stop: tokio_util::sync::DropGuard,
    }

    async fn serve(transfers: usize, limits: Limits) -> Serving {
        let mut section = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut section, &(0..1000u32).map(|at| at as u8).collect::<Vec<_>>()).unwrap();
        let router = router(Arc::new(OneLayer { section: Arc::new(section) }), transfers);
        let listener = Listener::bind("127.0.0.1:0", &Security::Off, limits).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        tokio::spawn(listener.serve(router, stop.clone()));
        Serving { base: format!("http://{address}/v1/layers/{BLOB}"), address, _stop: stop.drop_guard() }
    }

    #[tokio::test]
    async fn answers_are_those_of_the_protocol() {
        let serving = serve(8, Limits::default()).await;
        let client = reqwest::Client::new();
        let get = async |path: &str, range: Option<&str>| {
            let mut request = client.get(format!("{}{path}", serving.base));
            if let Some(range) = range {
                request = request.header(header::RANGE, range);
            }
            let response = request.send().await.unwrap();
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            (status, headers, response.bytes().await)
        };
        let (status, headers, body) = get("/index/entries", Some("bytes=10-19")).await;
        assert_eq!((status, &headers[header::CONTENT_RANGE]), (206, &HeaderValue::from_static("bytes 10-19/1000")));
        assert_eq!(body.unwrap(), (10..20u8).collect::<Vec<_>>());
        assert_eq!(get("/index/spans", None).await.2.unwrap().len(), 1000);
        for (path, range, want) in [
            ("/index/entries", Some("bytes=1000-"), 416),
            ("/index/header", None, 404),
            ("/index/nonsense", None, 400),
            ("/chunks/0-2", None, 200),
            ("/chunks/0-5", None, 416),
            ("/chunks/2-2", None, 400),
            ("/chunks/2", None, 400),
            ("/chunks/a-b", None, 400),
            ("/chunks/0-4294967296", None, 400),
            ("/elsewhere", None, 404),
        ] {
            assert_eq!(get(path, range).await.0, want, "{path}");
        }
        let mut request = client.get(format!("{}/chunks/0-1", serving.base)).build().unwrap();
        let address = "10.0.0.1:7071".parse().unwrap();
        Asker::write(address, Priority::Demand, request.headers_mut());
        let turned = client.execute(request).await.unwrap();
        let peers = vec![Member { address, zone: "other".to_owned() }];
        assert_eq!(turned.status(), 503);
        assert_eq!(Turned::read(turned.headers()), Some(Turned { retry_after: Duration::from_millis(20), peers }));
        let other = client.get(serving.base.replace(":00", ":10") + "/chunks/0-1").send().await.unwrap();
        assert_eq!(other.status(), 404);
        let odd = client.get(serving.base.replace("sha256", "sha512") + "/chunks/0-1").send().await.unwrap();
        assert_eq!(odd.status(), 400);
        // The head may be lost with the rest.
        let followed = client.get(format!("{}/follow", serving.base)).send().await;
        let is_whole = match followed {
            Ok(response) => response.bytes().await.is_ok(),
            Err(_) => false,
        };
        assert!(!is_whole, "a follow that fails is broken off");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn transfers_are_bounded_and_stalled_clients_are_cut_off() {
        let limits = Limits { stall_timeout: Duration::from_secs(5), ..Limits::default() };
        let serving = serve(1, limits).await;
        let mut stalled = tokio::net::TcpStream::connect(&serving.address).await.unwrap();
        let request = format!("GET /v1/layers/{BLOB}/chunks/3-4 HTTP/1.1\r\nHost: x\r\n\r\n");
        stalled.write_all(request.as_bytes()).await.unwrap();
        stalled.read_exact(&mut [0; 15]).await.unwrap();

        let busy = reqwest::get(format!("{}/chunks/0-1", serving.base)).await.unwrap();
        assert_eq!(
            (busy.status().as_u16(), &busy.headers()[header::RETRY_AFTER]),
            (503, &HeaderValue::from_static("1"))
        );
        // The client that takes nothing loses its place.
        let again = async {
            while reqwest::get(format!("{}/chunks/0-1", serving.base)).await.unwrap().status() != 200 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), again).await.expect("the place becomes free");
    }

    #[tokio::test]
    async fn a_connection_without_a_request_ends() {
        let short = Duration::from_millis(200);
        let limits = Limits { idle_timeout: short, handshake_timeout: short, ..Limits::default() };
        let serving = serve(1, limits).await;
        for begin in ["", "GET /healthz HTTP/1.1\r\nHo"] {
            let mut idle = tokio::net::TcpStream::connect(&serving.address).await.unwrap();
            idle.write_all(begin.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            let ended = tokio::time::timeout(Duration::from_secs(20), idle.read_to_end(&mut answer)).await;
            assert!(ended.is_ok(), "it stays open");
        }
    }

    #[tokio::test]
    async fn one_address_cannot_take_all_connections() {
        let serving = serve(1, Limits { connections: 8, ..Limits::default() }).await;
        let connect = async |from: &str| {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
            socket.connect(serving.address.parse().unwrap()).await.unwrap()
        };
        let mut open = vec![connect("127.0.0.2").await, connect("127.0.0.2").await];
        for _ in 0..20 {
            let ended = connect("127.0.0.2").await.read_to_end(&mut Vec::new()).await;
            // It may also be reset.
            assert!(ended.is_err() || ended.is_ok_and(|bytes| bytes == 0));
        }
        let is_served = async |stream: &mut tokio::net::TcpStream| {
            let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            answer.starts_with(b"HTTP/1.1 200")
        };
        assert!(is_served(&mut connect("127.0.0.3").await).await);
        for stream in &mut open {
            assert!(is_served(stream).await);
        }
        // Those that ended leave room.
        let room = async { while !is_served(&mut connect("127.0.0.2").await).await {} };
        tokio::time::timeout(Duration::from_secs(20), room).await.expect("there is room again");
    }

    #[test]
    fn ranges_are_those_of_http() {
        let parse = |text: &str| parse_range(&HeaderValue::from_str(text).unwrap(), 100);
        assert_eq!(parse("bytes=0-9"), ByteRange::Of(0..10));
        assert_eq!(parse("bytes=90-"), ByteRange::Of(90..100));
        assert_eq!(parse("bytes=90-1000"), ByteRange::Of(90..100));
        assert_eq!(parse("bytes=-10"), ByteRange::Of(90..100));
        assert_eq!(parse("bytes=-1000"), ByteRange::Of(0..100));
        assert_eq!(parse("bytes=100-"), ByteRange::Unsatisfiable);
        assert_eq!(parse("bytes=-0"), ByteRange::Unsatisfiable);
        for ignored in ["bytes=5-4", "bytes=0-1,4-5", "chunks=0-1", "bytes=", "bytes=-", "bytes=a-b"] {
            assert_eq!(parse(ignored), ByteRange::Ignored, "{ignored}");
        }
    }
}
