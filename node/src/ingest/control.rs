//! The control service: what is known of a layer, and an ingest of what is not.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use proto::drover::control::v1::control_server::{Control, ControlServer};
use proto::drover::control::v1::{Progress, Ready, ResolveEvent, ResolveRequest, Unsupported, resolve_event};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::{IngestFailure, Ingester, Phase};
use crate::registry::Fault;
use crate::security::Signed;
use crate::source::BlobRef;

/// Path of all of the service's methods, for the router.
const ROUTE: &str = "/drover.control.v1.Control/{method}";
/// Progress is told at most this often, and at least every [`TELL_AGAIN`], so that the asker sees a living seeder.
const TELL_EVERY: Duration = Duration::from_millis(200);
const TELL_AGAIN: Duration = Duration::from_secs(2);
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
        Ok(Response::new(events(phase, self.ingester.clone())))
    }
}

/// Progress until the end, then the end.
fn events(phase: watch::Receiver<Phase>, ingester: Ingester) -> Events {
    stream::unfold((phase, ingester, true, false), |(mut phase, ingester, is_first, is_over)| async move {
        if is_over {
            return None;
        }
        if !is_first {
            let running = |phase: &Phase| matches!(phase, Phase::Running(_));
            let ended = async { phase.wait_for(|phase| !running(phase)).await.map(drop) };
            if tokio::time::timeout(TELL_EVERY, ended).await.is_err() {
                let _ = tokio::time::timeout(TELL_AGAIN - TELL_EVERY, phase.changed()).await;
            }
        }
        let event = match &*phase.borrow_and_update() {
            Phase::Running(progress) => Ok(resolve_event::Event::Progress(Progress {
                blob_read: progress.blob_read,
                blob_size: progress.blob_size,
                device_read: progress.device_read,
                ahead_read: progress.ahead_read,
            })),
            Phase::Ready(known) => {
                let Signed { signature, certificates } = Arc::unwrap_or_clone(ingester.signed(known));
                Ok(resolve_event::Event::Ready(Ready {
                    header: known.header().encode().to_vec(),
                    signature,
                    certificates,
                }))
            }
            Phase::Unsupported(reason) => Ok(resolve_event::Event::Unsupported(Unsupported { reason: reason.clone() })),
            Phase::Failed(error) => Err(status(error)),
        };
        let is_over = !matches!(event, Ok(resolve_event::Event::Progress(_)));
        Some((event.map(|event| ResolveEvent { event: Some(event) }), (phase, ingester, false, is_over)))
    })
    .boxed()
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
