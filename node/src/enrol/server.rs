//! Gives certificates to nodes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::drover::enrol::v1::enrolment_server::{Enrolment, EnrolmentServer};
use proto::drover::enrol::v1::{Certificate, EnrolRequest, RenewRequest};
use rustls_pki_types::CertificateDer;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use super::MESSAGE_BYTES_MAX;
use crate::security::Role;
use crate::security::ca::{self, Authority, CaError, CertificateOptions};
use crate::security::tls::Caller;
use crate::security::token::{self, Token, TokenError};

/// Path of all of the service's methods, for the router.
const ROUTE: &str = "/drover.enrol.v1.Enrolment/{method}";
/// Certificates that are made at the same time: each is a millisecond of one processor, and strangers may ask.
const CONCURRENT: usize = 2;

/// Adds the enrolment of the authority in `directory` to `router`.
pub fn route(router: axum::Router, directory: PathBuf) -> axum::Router {
    let service = Service { directory: directory.into(), permits: Arc::new(Semaphore::new(CONCURRENT)) };
    let service = EnrolmentServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX);
    router.route_service(ROUTE, service)
}

struct Service {
    directory: Arc<Path>,
    permits: Arc<Semaphore>,
}

impl Service {
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let directory = Arc::clone(&self.directory);
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work(&directory)
        });
        done.await.map_err(|error| Status::internal(error.to_string()))?
    }
}

#[tonic::async_trait]
impl Enrolment for Service {
    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<Certificate>, Status> {
        let EnrolRequest { token, certificate_request, name } = request.into_inner();
        let certificate = self.work(move |directory| {
            let token: Token = token.parse().map_err(|error: TokenError| refused(&name, None, &error))?;
            let validity = token::check(directory, &token).map_err(|error| refused(&name, Some(&token), &error))?;
            let options = CertificateOptions { role: Role::Node, name, addresses: Vec::new(), validity };
            let certificate = sign(directory, &options, &certificate_request)?;
            tracing::info!(node = options.name, token = token.id(), "a node is enrolled");
            Ok(certificate)
        });
        certificate.await.map(Response::new)
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<Certificate>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let caller = caller.ok_or_else(|| Status::unauthenticated("only who has a certificate can renew it"))?;
        if caller.role != Role::Node {
            let text = format!("a {} does not renew: issue its certificate with `drover-seeder ca issue`", caller.role);
            return Err(Status::permission_denied(text));
        }
        let request = request.into_inner().certificate_request;
        let certificate = self.work(move |directory| {
            let validity = caller.validity.saturating_sub(ca::CLOCK_SKEW);
            let options = CertificateOptions { role: caller.role, name: caller.name, addresses: Vec::new(), validity };
            let certificate = sign(directory, &options, &request)?;
            tracing::info!(node = options.name, "a node's certificate is renewed");
            Ok(certificate)
        });
        certificate.await.map(Response::new)
    }
}

fn sign(directory: &Path, options: &CertificateOptions, request: &[u8]) -> Result<Certificate, Status> {
    let failed = |error: CaError| match error {
        CaError::Name(_) | CaError::Certificate(_) => Status::invalid_argument(error.to_string()),
        _ => {
            tracing::error!(%error, "the authority cannot issue certificates");
            Status::internal("the seeder's authority cannot issue certificates: its log says why")
        }
    };
    let authority = Authority::open(directory).map_err(failed)?;
    let chain = authority.sign_request(options, request).map_err(failed)?;
    let bytes =
        |certificates: &[CertificateDer<'_>]| certificates.iter().map(|certificate| certificate.to_vec()).collect();
    Ok(Certificate { chain: bytes(&chain), authorities: bytes(authority.all()) })
}

fn refused(name: &str, token: Option<&Token>, error: &TokenError) -> Status {
    tracing::warn!(node = ?name, token = token.map_or("", Token::id), %error, "an enrolment is refused");
    Status::permission_denied(error.to_string())
}
