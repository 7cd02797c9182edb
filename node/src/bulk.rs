//! Asking other machines for bulk bytes over HTTP/1.1 (`docs/wire.md`, "Bulk").

pub(crate) mod follow;

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use layer::index::{Header, Section};
use layer::wire::{Decoder, FrameReader};
use layer::{Digest, Geometry};
use swarm::Priority;

use crate::connect::{ConnectError, Connector};
use crate::grant::{self, Held};
use crate::mesh::{Asker, OwnAddress, Turned};
use crate::serve::listener::WANTS_TLS;
use crate::source::{ChunkSink, SourceError};

/// The longest text of an error answer that is read.
pub(crate) const REASON_BYTES_MAX: usize = 1 << 10;

/// Time limits for another machine.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// For a connection with TLS.
    pub connect_timeout: Duration,
    /// Without a byte or event.
    pub stall_timeout: Duration,
}

impl Default for Options {
    /// 3 s to connect, 10 s without a byte.
    fn default() -> Self {
        Self { connect_timeout: Duration::from_secs(3), stall_timeout: Duration::from_secs(10) }
    }
}

/// Why a machine did not give what was asked.
#[derive(Debug)]
pub(crate) enum Fault {
    /// No connection, or it broke.
    Unreachable(String),
    /// One end has security on, the other off, or the certificates do not fit, or it gives this machine nothing.
    Untrusted(String),
    /// It gives it only to who shows a grant, and this machine has none that it takes.
    Ungranted(String),
    /// It does not have it.
    Missing(String),
    /// It gives this machine nothing for a while, as is usual in a mesh.
    Busy(Turned),
    /// It has too much to do.
    Overloaded {
        /// What it answered.
        reason: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// No byte came for so long.
    Stalled(Duration),
    /// What came cannot be right.
    Wrong(String),
}

/// Connections to one machine.
pub(crate) struct Bulk {
    http: legacy::Client<Connector, Empty<Bytes>>,
    stall: Duration,
    own_address: OwnAddress,
    grants: Option<Held>,
}

/// A body with a stall limit.
pub(crate) struct Body {
    body: Incoming,
    stall: Duration,
}

impl Bulk {
    /// Of the machine that `connector` connects to; `own_address` goes with requests for chunks, and a grant of `grants` where one is
    /// demanded.
    pub(crate) fn new(connector: Connector, stall: Duration, own_address: OwnAddress, grants: Option<Held>) -> Self {
        let http = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .pool_max_idle_per_host(8)
            .build(connector);
        Self { http, stall, own_address, grants }
    }

    /// The answer's head; one that is no success is a fault.
    pub(crate) async fn get(&self, path: &str) -> Result<Response<Incoming>, Fault> {
        self.send(request(path)?).await
    }

    /// The same for something of a layer, with this machine's grant for it. `priority`: says who asks, and how urgently.
    pub(crate) async fn ask(
        &self,
        blob: Digest,
        path: &str,
        priority: Option<Priority>,
    ) -> Result<Response<Incoming>, Fault> {
        let request = |grant: Option<&HeaderValue>| {
            let mut request = request(path)?;
            if let (Some(address), Some(priority)) = (self.own_address.get(), priority) {
                Asker::write(address, priority, request.headers_mut());
            }
            if let Some(grant) = grant {
                request.headers_mut().insert(grant::HEADER, grant.clone());
            }
            Ok(request)
        };
        let shown = self.grants.as_ref().and_then(|grants| grants.current(blob));
        match (self.send(request(shown.as_ref())?).await, &self.grants) {
            (Err(Fault::Ungranted(reason)), Some(grants)) => {
                let fresh = grants.renew(blob, shown.as_ref()).await;
                let fresh = fresh.map_err(|why| Fault::Ungranted(format!("{reason}; no grant is to be had: {why}")))?;
                self.send(request(Some(&fresh))?).await
            }
            (answer, _) => answer,
        }
    }

    /// The frames of a run of chunks.
    pub(crate) async fn chunks(&self, blob: Digest, run: &Range<u32>, priority: Priority) -> Result<Body, Fault> {
        let path = format!("/v1/layers/{blob}/chunks/{}-{}", run.start, run.end);
        Ok(self.body(self.ask(blob, &path, Some(priority)).await?))
    }

    /// A section of the index that `header` names; its digest is not verified. `as_member`: says who asks.
    pub(crate) async fn section(&self, header: &Header, section: Section, as_member: bool) -> Result<Vec<u8>, Fault> {
        let path = format!("/v1/layers/{}/index/{section}", header.blob());
        let answer = self.ask(header.blob(), &path, as_member.then_some(Priority::Demand)).await?;
        let (want, mut body) = (header.section(section).size, self.body(answer));
        let mut bytes = Vec::new();
        while let Some(more) = body.next().await? {
            if bytes.len() as u64 + more.len() as u64 > want {
                return Err(Fault::Wrong(format!("more than the {want} bytes of {section}")));
            }
            bytes.extend_from_slice(&more);
        }
        Ok(bytes)
    }

    /// The bytes behind a head.
    pub(crate) fn body(&self, answer: Response<Incoming>) -> Body {
        Body { body: answer.into_body(), stall: self.stall }
    }

    async fn send(&self, request: Request<Empty<Bytes>>) -> Result<Response<Incoming>, Fault> {
        let response = tokio::time::timeout(self.stall, self.http.request(request)).await;
        let response =
            response.map_err(|_| Fault::Stalled(self.stall))?.map_err(|error| Fault::of_transport(&error))?;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok(response);
        }
        if status.as_u16() == WANTS_TLS {
            return Err(Fault::Untrusted(
                "it demands mutual TLS: its configuration has security on, so this machine's must have it on too \
                 (security.mode = \"mtls\")"
                    .to_owned(),
            ));
        }
        if status == StatusCode::SERVICE_UNAVAILABLE
            && let Some(turned) = Turned::read(response.headers())
        {
            return Err(Fault::Busy(turned));
        }
        let is_grant_wanted = status == StatusCode::FORBIDDEN && response.headers().contains_key(grant::HEADER);
        let retry_after =
            response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let reason = format!("{status}: {}", reason(response.into_body(), self.stall).await);
        Err(match status {
            StatusCode::NOT_FOUND => Fault::Missing(reason),
            _ if is_grant_wanted => Fault::Ungranted(reason),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Fault::Untrusted(reason),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                Fault::Overloaded { reason, retry_after: retry_after.map(Duration::from_secs) }
            }
            status if status.is_server_error() => Fault::Overloaded { reason, retry_after: None },
            _ => Fault::Wrong(reason),
        })
    }
}

impl Body {
    /// The next bytes; `None` after the last.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            let frame = tokio::time::timeout(self.stall, self.body.frame());
            match frame.await.map_err(|_| Fault::Stalled(self.stall))? {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data()
                        && bytes.has_remaining()
                    {
                        return Ok(Some(bytes));
                    }
                }
                Some(Err(error)) => return Err(Fault::of_transport(&error)),
            }
        }
    }

    /// Takes the body for the frames of `run`, and gives each chunk to `sink`.
    pub(crate) async fn move_chunks(
        mut self,
        geometry: Geometry,
        run: Range<u32>,
        sink: &mut dyn ChunkSink,
    ) -> Result<(), Fault> {
        let mut frames = FrameReader::new(geometry, run);
        let mut decoder = Decoder::new();
        while let Some(bytes) = self.next().await? {
            sink.moved(bytes.len());
            frames.push(&bytes);
            while let Some((chunk, frame)) = frames.next_frame().map_err(Fault::wrong)? {
                let plain = decoder.decode(frame, geometry.chunk_len(chunk)).map_err(Fault::wrong)?;
                sink.frame(chunk, plain, frame).map_err(Fault::wrong)?;
            }
        }
        frames.finish().map_err(Fault::wrong)
    }
}

impl Fault {
    /// What came cannot be right.
    pub(crate) fn wrong(reason: impl ToString) -> Self {
        Self::Wrong(reason.to_string())
    }

    /// What an error of hyper or tonic means, whose causes say it.
    pub(crate) fn of_transport(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            if let Some(connect) = error.downcast_ref::<ConnectError>() {
                return match connect {
                    ConnectError::NotTls | ConnectError::Tls(_) => Self::Untrusted(connect.to_string()),
                    ConnectError::Timeout(_) | ConnectError::Io(_) => Self::Unreachable(connect.to_string()),
                };
            }
            // In TLS 1.3 a client learns only after its handshake that the server refused its certificate.
            if let Some(rustls::Error::AlertReceived(alert)) = rustls_error(error) {
                return Self::Untrusted(format!("it refused this machine's certificate ({alert:?})"));
            }
            text = format!("{text}: {error}");
            cause = error.source();
        }
        Self::Unreachable(text)
    }

    /// The fault as that of the source `source_label`.
    pub(crate) fn into_source_error(self, source_label: String) -> SourceError {
        match self {
            Self::Unreachable(reason) => SourceError::Unreachable { source_label, reason },
            Self::Untrusted(reason) | Self::Ungranted(reason) => SourceError::Denied { source_label, reason },
            Self::Missing(reason) => SourceError::Missing { source_label, reason },
            Self::Busy(Turned { retry_after, peers }) => SourceError::Busy { source_label, retry_after, peers },
            Self::Overloaded { reason, retry_after } => SourceError::Overloaded { source_label, reason, retry_after },
            Self::Stalled(after) => SourceError::Stalled { source_label, after },
            Self::Wrong(reason) => SourceError::Corrupt { source_label, reason },
        }
    }
}

impl fmt::Debug for Bulk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bulk").field("stall", &self.stall).finish_non_exhaustive()
    }
}

fn request(path: &str) -> Result<Request<Empty<Bytes>>, Fault> {
    // The connector decides where to.
    Request::get(format!("http://machine{path}")).body(Empty::new()).map_err(Fault::wrong)
}

fn rustls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    error
        .downcast_ref::<rustls::Error>()
        .or_else(|| error.downcast_ref::<std::io::Error>()?.get_ref()?.downcast_ref::<rustls::Error>())
}

/// The text of an error answer, as far as it comes quickly.
async fn reason(mut body: Incoming, within: Duration) -> String {
    let mut text = Vec::new();
    let read = async {
        while let Some(Ok(frame)) = body.frame().await {
            if let Ok(bytes) = frame.into_data() {
                text.extend_from_slice(&bytes);
            }
            if text.len() >= REASON_BYTES_MAX {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(within.min(Duration::from_secs(2)), read).await;
    text.truncate(REASON_BYTES_MAX);
    String::from_utf8_lossy(&text).trim().to_owned()
}
