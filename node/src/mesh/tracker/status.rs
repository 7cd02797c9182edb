//! What nodes have and were given, for commands on the seeder's machine.

use std::path::PathBuf;

use proto::drover::seeder::v1::seeder_client::SeederClient;
use proto::drover::seeder::v1::seeder_server::{Seeder, SeederServer};
use proto::drover::seeder::v1::{StatusRequest, StatusResponse};
use tonic::transport::Endpoint;
use tonic::{Request, Response, Status};

use super::Gate;
use crate::connect::Connector;

/// Path of all of the service's methods, for the router.
const ROUTE: &str = "/drover.seeder.v1.Seeder/{method}";
/// Largest answer: some hundred thousand layers.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Adds the service of `gate` to `router`, which is to be that of the local socket.
pub fn route(router: axum::Router, gate: Gate) -> axum::Router {
    router.route_service(ROUTE, SeederServer::new(Service { gate }))
}

/// Asks the daemon that listens on the socket file at `path`.
pub async fn ask(path: PathBuf) -> Result<StatusResponse, Status> {
    // The connector decides where to; tonic only wants a URI.
    let channel = Endpoint::from_static("http://seeder").connect_with_connector_lazy(Connector::local(path));
    let mut client = SeederClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
    client.status(StatusRequest {}).await.map(Response::into_inner)
}

struct Service {
    gate: Gate,
}

#[tonic::async_trait]
impl Seeder for Service {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.gate.status()))
    }
}
