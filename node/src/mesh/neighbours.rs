//! Lines of neighbours to this node.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use proto::drover::mesh::v1 as api;
use proto::drover::mesh::v1::neighbour_server::{Neighbour, NeighbourServer};
use proto::drover::mesh::v1::to_neighbour;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Refused;
use super::member::{Member, is_zone};
use super::membership::Event;
use crate::serve::listener::Remote;

/// Path of all of the service's methods, for the router.
pub(super) const ROUTE: &str = "/drover.mesh.v1.Neighbour/{method}";
/// Most lines at once: more than a node has neighbours, since those that broke may still seem to stand.
const CALLS_MAX: usize = 512;
/// Most of them from one address of the network: more than one only where nodes share a machine, or where those that broke still
/// seem to stand.
const CALLS_PER_IP_MAX: usize = 64;
/// Time for the first message.
const HELLO: Duration = Duration::from_secs(5);
/// Largest message: what is here of a layer of 10 GB, every second chunk.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Passes on what neighbours tell.
pub(crate) struct Calls {
    events: mpsc::Sender<Event>,
    refused: Refused,
    room: Room,
    next: AtomicU64,
}

/// The lines that stand, by where they come from. Clones are the same.
#[derive(Clone, Default)]
struct Room(Arc<Mutex<BTreeMap<Option<IpAddr>, usize>>>);

/// A line's place in the room.
struct Place {
    room: Room,
    from: Option<IpAddr>,
}

impl Calls {
    pub(crate) fn service(events: mpsc::Sender<Event>, refused: Refused) -> NeighbourServer<Self> {
        let calls = Self { events, refused, room: Room::default(), next: AtomicU64::new(0) };
        NeighbourServer::new(calls).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }
}

#[tonic::async_trait]
impl Neighbour for Calls {
    type TellStream = ReceiverStream<Result<api::Told, Status>>;

    async fn tell(&self, request: Request<Streaming<api::ToNeighbour>>) -> Result<Response<Self::TellStream>, Status> {
        let remote = request.extensions().get::<Remote>().map(|remote| remote.0.ip().to_canonical());
        let place = self.room.take(remote)?;
        let mut incoming = request.into_inner();
        let hello = tokio::time::timeout(HELLO, incoming.message());
        let hello = hello.await.map_err(|_| Status::deadline_exceeded("no hello"))??;
        let Some(api::ToNeighbour { message: Some(to_neighbour::Message::Hello(hello)) }) = hello else {
            return Err(Status::invalid_argument("a line begins with a hello"));
        };
        let address: SocketAddr =
            hello.address.parse().map_err(|_| Status::invalid_argument("the hello names no address"))?;
        if !is_zone(&hello.zone) {
            return Err(Status::invalid_argument("the hello names no zone that could be one"));
        }
        let line = Line {
            events: self.events.clone(),
            refused: self.refused.clone(),
            address,
            call: self.next.fetch_add(1, Ordering::Relaxed),
        };
        line.check()?;
        let is_own = remote == Some(address.ip().to_canonical());
        let (taken, is_taken) = oneshot::channel();
        let caller = Member { address, zone: hello.zone };
        let up = Event::CallerUp { caller, call: line.call, is_own, taken };
        self.events.send(up).await.map_err(|_| Status::unavailable("this node stops"))?;
        // A seeder tells both of each other, one a little later. Who calls again then tells all that it has.
        if !is_taken.await.unwrap_or(false) {
            return Err(Status::failed_precondition(
                "no seeder has told of you yet, and this is not the address that you come from: call again later",
            ));
        }
        let (end, ended) = mpsc::channel(1);
        tokio::spawn(async move {
            let result = line.hear(incoming).await;
            drop((line, place));
            if let Err(status) = result {
                let _ = end.try_send(Err(status));
            }
        });
        Ok(Response::new(ReceiverStream::new(ended)))
    }
}

impl Room {
    fn take(&self, from: Option<IpAddr>) -> Result<Place, Status> {
        let mut lines = self.0.lock();
        let (all, of_ip) = (lines.values().sum::<usize>(), lines.get(&from).copied().unwrap_or(0));
        if all >= CALLS_MAX || of_ip >= CALLS_PER_IP_MAX {
            return Err(Status::resource_exhausted(format!(
                "{of_ip} of {all} lines here come from you: no more are taken"
            )));
        }
        lines.insert(from, of_ip + 1);
        Ok(Place { room: self.clone(), from })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lines = self.room.0.lock();
        if let Some(of_ip) = lines.get_mut(&self.from) {
            *of_ip -= 1;
            if *of_ip == 0 {
                lines.remove(&self.from);
            }
        }
    }
}

/// One line; that it ended is told when it is dropped.
struct Line {
    events: mpsc::Sender<Event>,
    refused: Refused,
    address: SocketAddr,
    call: u64,
}

impl Line {
    async fn hear(&self, mut incoming: Streaming<api::ToNeighbour>) -> Result<(), Status> {
        while let Some(message) = incoming.message().await? {
            self.check()?;
            if let Some(to_neighbour::Message::Haves(haves)) = message.message {
                let haves = Event::Haves { address: self.address, haves };
                self.events.send(haves).await.map_err(|_| Status::unavailable("this node stops"))?;
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Status> {
        match self.refused.contains(self.address) {
            true => Err(Status::permission_denied("this node does not deal with you")),
            false => Ok(()),
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let (events, down) = (self.events.clone(), Event::CallerDown { address: self.address, call: self.call });
        tokio::spawn(async move { drop(events.send(down).await) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(host: usize) -> Option<IpAddr> {
        Some(IpAddr::from([10, 0, (host >> 8) as u8, host as u8]))
    }

    #[test]
    fn one_address_does_not_take_the_room_of_all() {
        let room = Room::default();
        let mut greedy: Vec<Place> = (0..CALLS_PER_IP_MAX).map(|_| room.take(ip(1)).unwrap()).collect();
        assert!(room.take(ip(1)).is_err());
        let others: Vec<Place> = (CALLS_PER_IP_MAX..CALLS_MAX).map(|host| room.take(ip(host)).unwrap()).collect();
        assert!(room.take(ip(CALLS_MAX)).is_err(), "there is no room for more");
        greedy.pop();
        let _last = room.take(ip(1)).unwrap();
        drop((greedy, others));
        assert_eq!(room.0.lock().values().sum::<usize>(), 1);
    }
}
