//! The control service: what is known of a layer, and an ingest of what is not.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use layer::ChunkDigest;
use proto::drover::control::v1::control_server::{Control, ControlServer};
use proto::drover::control::v1::{Progress, Ready, ResolveEvent, ResolveRequest, Unsupported, resolve_event};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::{Digests, Flight, IngestFailure, Ingester, Phase};
use crate::registry::Fault;
use crate::security::Signed;
use crate::source::BlobRef;

/// Path of all of the service's methods, for the router.
const ROUTE: &str = "/drover.control.v1.Control/{method}";
/// Progress is told at most this often, and at least every [`TELL_AGAIN`], so that the asker sees a living seeder.
const TELL_EVERY: Duration = Duration::from_millis(200);
const TELL_AGAIN: Duration = Duration::from_secs(2);
/// The same where digests are wanted: they are what chunks wait for on their way from node to node.
const TELL_DIGESTS_EVERY: Duration = Duration::from_millis(100);
/// Most digests of one event.
const DIGESTS_MAX: usize = 4096;
/// A request has a few texts; nothing near this.
const REQUEST_BYTES_MAX: usize = 64 << 10;

/// Adds the control service of `ingester` to `router`.
pub fn route(router: axum::Router, ingester: Ingester) -> axum::Router {
    let service = ControlServer::new(ControlService { ingester }).max_decoding_message_size(REQUEST_BYTES_MAX);
    router.route_service(ROUTE, service)
}

struct ControlService {
    ingester: Ingester,
}

type Events = Pin<Box<dyn Stream<Item = Result<ResolveEvent, Status>> + Send>>;

#[tonic::async_trait]
impl Control for ControlService {
    type ResolveStream = Events;

    async fn resolve(&self, request: Request<ResolveRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        let digest = request
            .blob
            .parse()
            .map_err(|error: layer::digest::ParseDigestError| Status::invalid_argument(error.to_string()))?;
        let blob = BlobRef {
            registry: request.registry,
            repository: request.repository,
            digest,
            size: request.blob_size,
            media_type: request.media_type,
            urls: request.urls,
        };
        let phase = self.ingester.ask(&blob).await.map_err(|error| status(&error))?;
        let flight =
            if request.wants_digests && self.ingester.tells_digests() { self.ingester.flight(digest) } else { None };
        let ingester = self.ingester.clone();
        Ok(Response::new(events(Telling {
            phase,
            ingester,
            digests: flight.map(Unsent::new),
            now: true,
            is_over: false,
        })))
    }
}

/// What one asker is told.
struct Telling {
    phase: watch::Receiver<Phase>,
    ingester: Ingester,
    /// Where they are wanted.
    digests: Option<Unsent>,
    /// The next event is due at once.
    now: bool,
    is_over: bool,
}

/// The digests that an asker was not told yet.
struct Unsent {
    flight: Arc<Flight>,
    digests: Arc<Digests>,
    next: usize,
}

/// Progress until the end, then the end.
fn events(telling: Telling) -> Events {
    stream::unfold(telling, |mut telling| async move {
        if telling.is_over {
            return None;
        }
        if !telling.now {
            let every = if telling.digests.is_some() { TELL_DIGESTS_EVERY } else { TELL_EVERY };
            let running = |phase: &Phase| matches!(phase, Phase::Running(_));
            let ended = async { telling.phase.wait_for(|phase| !running(phase)).await.map(drop) };
            if tokio::time::timeout(every, ended).await.is_err() {
                let _ = tokio::time::timeout(TELL_AGAIN - every, telling.phase.changed()).await;
            }
        }
        let event = telling.next();
        telling.is_over = !matches!(event, Ok(resolve_event::Event::Progress(_)));
        Some((event.map(|event| ResolveEvent { event: Some(event) }), telling))
    })
    .boxed()
}

impl Telling {
    fn next(&mut self) -> Result<resolve_event::Event, Status> {
        let phase = self.phase.borrow_and_update().clone();
        // Who passes chunks on while they come must know all digests before the index has them.
        let (first_digest, digests) = match &phase {
            Phase::Running(_) | Phase::Ready(_) => self.digests.as_mut().map(Unsent::take).unwrap_or_default(),
            Phase::Unsupported(_) | Phase::Failed(_) => Default::default(),
        };
        let is_full = digests.len() == DIGESTS_MAX * size_of::<ChunkDigest>();
        self.now = is_full || !digests.is_empty() && matches!(phase, Phase::Ready(_));
        Ok(match phase {
            Phase::Running(progress) => resolve_event::Event::Progress(Progress {
                blob_read: progress.blob_read,
                blob_size: progress.blob_size,
                device_read: progress.device_read,
                ahead_read: progress.ahead_read,
                first_digest,
                digests,
            }),
            Phase::Ready(known) if !digests.is_empty() => {
                let (blob_size, device_read) = (known.header().blob_size(), known.header().device_size());
                let ahead_read = 0;
                resolve_event::Event::Progress(Progress {
                    blob_read: blob_size,
                    blob_size,
                    device_read,
                    ahead_read,
                    first_digest,
                    digests,
                })
            }
            Phase::Ready(known) => {
                let Signed { signature, certificates } = Arc::unwrap_or_clone(self.ingester.signed(&known));
                let header = known.header().encode().to_vec();
                resolve_event::Event::Ready(Ready { header, signature, certificates })
            }
            Phase::Unsupported(reason) => resolve_event::Event::Unsupported(Unsupported { reason }),
            Phase::Failed(error) => return Err(status(&error)),
        })
    }
}

impl Unsent {
    fn new(flight: Arc<Flight>) -> Self {
        let digests = flight.digests();
        Self { flight, digests, next: 0 }
    }

    /// Some of them, and which is the first. A pass that begins anew makes them anew: then there are no more for who heard some.
    fn take(&mut self) -> (u32, Vec<u8>) {
        let digests = self.flight.digests();
        if !Arc::ptr_eq(&digests, &self.digests) {
            if self.next > 0 {
                return Default::default();
            }
            self.digests = digests;
        }
        let made = self.digests.lock();
        let first = self.next;
        let more = made.get(first..).unwrap_or_default();
        let more: Vec<u8> = more.iter().take(DIGESTS_MAX).flat_map(|digest| digest.0).collect();
        self.next += more.len() / size_of::<ChunkDigest>();
        (u32::try_from(first).unwrap_or(u32::MAX), more)
    }
}

fn status(error: &IngestFailure) -> Status {
    let text = error.to_string();
    match error {
        IngestFailure::Registry(error) => match error.fault {
            Fault::NotFound { .. } => Status::not_found(text),
            Fault::Denied { .. } | Fault::Credentials { .. } => Status::permission_denied(text),
            Fault::Protocol { .. } | Fault::Configuration { .. } | Fault::Tls { .. } => {
                Status::failed_precondition(text)
            }
            Fault::Name { .. }
            | Fault::Unreachable { .. }
            | Fault::Proxy { .. }
            | Fault::Stalled { .. }
            | Fault::Busy { .. } => Status::unavailable(text),
        },
        IngestFailure::WrongBlob { .. } => Status::data_loss(text),
        IngestFailure::Content { .. } => Status::failed_precondition(text),
        IngestFailure::Store { .. } => Status::internal(text),
        IngestFailure::NoRoom { .. } | IngestFailure::TooMany => Status::resource_exhausted(text),
    }
}
