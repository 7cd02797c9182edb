//! The gRPC service that nodes hold their lines to.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::Duration;

use layer::{Digest, Geometry};
use proto::drover::mesh::v1::tracker_server::{Tracker as TrackerService, TrackerServer};
use proto::drover::mesh::v1::{Haves, Hello, ToSeeder, to_seeder};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Tracker;
use super::book::{self, Book, Entered, LineId, QUEUE_MAX, Told};
use crate::mesh::{Member, member, runs};
use crate::serve::Remote;

/// Path of all of the service's methods, for the router.
const ROUTE: &str = "/drover.mesh.v1.Tracker/{method}";
/// Largest message of a node: what it has of a layer, in more than 100 000 runs.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Time for the first message.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Adds the service of `tracker` to `router`.
pub fn route(router: axum::Router, tracker: Tracker) -> axum::Router {
    let service = TrackerServer::new(tracker).max_decoding_message_size(MESSAGE_BYTES_MAX);
    router.route_service(ROUTE, service)
}

#[tonic::async_trait]
impl TrackerService for Tracker {
    type JoinStream = ReceiverStream<Told>;

    async fn join(&self, request: Request<Streaming<ToSeeder>>) -> Result<Response<Self::JoinStream>, Status> {
        let Some(Remote(remote)) = request.extensions().get::<Remote>().copied() else {
            return Err(Status::failed_precondition("a line comes over the network"));
        };
        let mut messages = request.into_inner();
        let first = tokio::time::timeout(HELLO_TIMEOUT, messages.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no Hello came"))??;
        let Some(to_seeder::Message::Hello(hello)) = first.and_then(|first| first.message) else {
            return Err(Status::invalid_argument("a line begins with Hello"));
        };
        let hello = caller(hello, remote.ip().to_canonical())?;
        let member = hello.member.clone();
        let Entered { line, told, queue, cut } = self.with(|book, now| book.enter(now, hello))?;
        tracing::debug!(node = %member, "a node holds a line");
        let held = Held { tracker: self.clone(), line };
        tokio::spawn(async move {
            if let Some(why) = held.listen(messages, &queue, cut).await {
                tracing::debug!(node = %member, reason = why.message(), "a line ends");
                // A queue that is full says by itself what is wrong.
                let _ = queue.try_send(Err(why));
            }
        });
        Ok(Response::new(ReceiverStream::new(told)))
    }
}

/// A line that is held; its end is that of all its memberships.
struct Held {
    tracker: Tracker,
    line: LineId,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.tracker.with(|book, now| book.hang_up(now, self.line));
    }
}

impl Held {
    /// Does what the node says, until it hangs up (`None`) or is cut off.
    async fn listen(
        &self,
        mut messages: Streaming<ToSeeder>,
        queue: &mpsc::Sender<Told>,
        mut cut: oneshot::Receiver<Status>,
    ) -> Option<Status> {
        loop {
            let next = async {
                // What the node's own joins bring must leave room for what those of others bring.
                drop(queue.reserve_many(QUEUE_MAX / 2).await);
                messages.message().await
            };
            let next = tokio::select! {
                why = &mut cut => return why.ok(),
                () = queue.closed() => return None,
                next = next => next,
            };
            let message = match next {
                Ok(Some(ToSeeder { message: Some(message) })) => message,
                // Of a later version.
                Ok(Some(ToSeeder { message: None })) => continue,
                Ok(None) => return None,
                Err(error) => return Some(error),
            };
            if let Err(why) = self.hear(message).await {
                return Some(why);
            }
        }
    }

    async fn hear(&self, message: to_seeder::Message) -> Result<(), Status> {
        let tracker = &self.tracker;
        let geometry = match &message {
            to_seeder::Message::Join(haves) => tracker.shared.ingester.geometry(parse_blob(&haves.blob)?).await,
            _ => None,
        };
        tracker.with(|book, now| hear(book, now, self.line, message, geometry))?;
        if geometry.is_some() {
            tracker.shared.first.notify_one();
        }
        Ok(())
    }
}

/// Does what a node says after its Hello. `geometry` is that of the layer that it joins, where that is known here.
pub(super) fn hear(
    book: &mut Book,
    now: Duration,
    line: LineId,
    message: to_seeder::Message,
    geometry: Option<Geometry>,
) -> Result<(), Status> {
    match message {
        to_seeder::Message::Hello(_) => return Err(Status::invalid_argument("Hello comes first and only first")),
        to_seeder::Message::Join(haves) => {
            let (blob, runs) = parse(&haves)?;
            match geometry {
                // An older node does not say; it fetches what it wants of what it is assigned.
                Some(geometry) => book.join(now, line, blob, geometry, &runs, haves.fills.unwrap_or(true))?,
                None => book.unknown(now, line, blob),
            }
        }
        to_seeder::Message::Report(haves) => {
            let (blob, runs) = parse(&haves)?;
            book.report(now, line, blob, &runs, haves.fills)?;
        }
        to_seeder::Message::Ping(_) => book.ping(now, line),
        to_seeder::Message::Leave(blob) => book.leave(now, line, parse_blob(&blob)?),
        to_seeder::Message::Accuse(address) => {
            let address = address.parse().map_err(|_| Status::invalid_argument("an accused has an address"))?;
            book.accuse(now, line, address);
        }
    }
    Ok(())
}

/// Who calls from `from`.
pub(super) fn caller(hello: Hello, from: IpAddr) -> Result<book::Hello, Status> {
    let Hello { address, zone, leech } = hello;
    if !member::is_zone(&zone) {
        return Err(Status::invalid_argument("a zone has up to 64 letters, digits, '.', '_' and '-'"));
    }
    let wrong = || Status::invalid_argument("an address is IP:PORT or :PORT, and one that others can reach");
    let address = match address.strip_prefix(':') {
        Some(port) => SocketAddr::new(from, port.parse().map_err(|_| wrong())?),
        None => address.parse().map_err(|_| wrong())?,
    };
    let ip = address.ip().to_canonical();
    let ip = if ip.is_unspecified() { from } else { ip };
    // The others would call themselves, or all at once.
    let is_nobodys = ip.is_multicast() || ip.is_loopback() && !from.is_loopback();
    if address.port() == 0 || is_nobodys || ip == IpAddr::V4(std::net::Ipv4Addr::BROADCAST) {
        return Err(wrong());
    }
    Ok(book::Hello { member: Member { address: SocketAddr::new(ip, address.port()), zone }, leech, from })
}

fn parse(haves: &Haves) -> Result<(Digest, Vec<Range<u32>>), Status> {
    let wrong = || Status::invalid_argument("runs of chunks ascend, and none is empty");
    Ok((parse_blob(&haves.blob)?, runs::decode(&haves.runs).ok_or_else(wrong)?))
}

pub(super) fn parse_blob(blob: &[u8]) -> Result<Digest, Status> {
    let bytes = blob.try_into().map_err(|_| Status::invalid_argument("the digest of a blob has 32 bytes"))?;
    Ok(Digest::from_bytes(bytes))
}
