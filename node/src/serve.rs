//! Serving of index sections and chunks over HTTP/1.1, and of the control service over HTTP/2, on one port
//! (`docs/wire.md`).
//!
//! [`router`] makes the HTTP routes of anything that has layers; [`listener`] accepts connections, in the clear or with
//! mutual TLS, and keeps the bounds.

pub mod listener;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use layer::Digest;
use layer::index::Section;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::source::BoxFuture;

pub use listener::{Limits, Listener};

/// Bytes of a body as they come; an error breaks the connection off.
pub type ByteStream = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// Header that says how large the chunks of a run are.
pub const CHUNK_LOG2: &str = "drover-chunk-log2";
/// Bytes of a section that are read at a time.
const READ_LEN: u64 = 256 << 10;
/// What a busy server asks for.
const BUSY: Duration = Duration::from_secs(1);

/// Somebody who has layers.
pub trait LayerServer: Send + Sync + 'static {
    /// The index header of a known layer.
    fn header(&self, blob: Digest) -> BoxFuture<'_, Result<Bytes, ServeError>>;

    /// A section of a known layer's index.
    fn section(&self, blob: Digest, section: Section) -> BoxFuture<'_, Result<SectionBody, ServeError>>;

    /// The frames of a run of chunks, which is not empty.
    fn chunks(&self, blob: Digest, run: Range<u32>) -> BoxFuture<'_, Result<Frames, ServeError>>;

    /// The frames of all chunks in order, as they come into being. The stream ends after the last chunk of the layer.
    fn follow(&self, blob: Digest) -> BoxFuture<'_, Result<Frames, ServeError>>;
}

/// A section as a file.
#[derive(Debug)]
pub struct SectionBody {
    /// Its bytes.
    pub file: Arc<File>,
    /// How many.
    pub size: u64,
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
    #[error("the layer is being ingested and has not come that far")]
    NotYet,
    /// The layer has no such chunks.
    #[error("the layer has no such chunks or bytes")]
    OutOfRange,
    /// Too much to do.
    #[error("too many transfers at once")]
    Busy,
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
            Self::Unknown | Self::NotYet => StatusCode::NOT_FOUND,
            Self::OutOfRange => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let mut response = (status, self.to_string()).into_response();
        if self == Self::Busy {
            response.headers_mut().insert(header::RETRY_AFTER, BUSY.as_secs().into());
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
    let body = routes.server.section(blob, section).await?;
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
    let mut response = octets(Body::from_stream(held(read_file(body.file, range.clone()), permit)));
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
) -> Result<Response, ServeError> {
    let blob = parse_blob(&blob)?;
    let wrong = || ServeError::BadRequest("want chunks/FIRST-END with FIRST < END".to_owned());
    let (first, end) = run.split_once('-').ok_or_else(wrong)?;
    let run = first.parse::<u32>().map_err(|_| wrong())?..end.parse::<u32>().map_err(|_| wrong())?;
    if run.is_empty() {
        return Err(wrong());
    }
    let permit = routes.permit()?;
    Ok(frames(routes.server.chunks(blob, run).await?, permit))
}

async fn follow<S: LayerServer>(
    State(routes): State<Routes<S>>,
    Path(blob): Path<String>,
) -> Result<Response, ServeError> {
    let blob = parse_blob(&blob)?;
    let permit = routes.permit()?;
    Ok(frames(routes.server.follow(blob).await?, permit))
}

impl<S> Routes<S> {
    fn permit(&self) -> Result<OwnedSemaphorePermit, ServeError> {
        Arc::clone(&self.transfers).try_acquire_owned().map_err(|_| ServeError::Busy)
    }
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

/// The stream with its permit, which is given back when the body is sent or dropped.
fn held(stream: ByteStream, permit: OwnedSemaphorePermit) -> ByteStream {
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
    use super::*;

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
