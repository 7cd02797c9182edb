//! The lines of this node: one to each seeder, one to each neighbour, made again when they break.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proto::drover::mesh::v1 as api;
use proto::drover::mesh::v1::neighbour_client::NeighbourClient;
use proto::drover::mesh::v1::tracker_client::TrackerClient;
use proto::drover::mesh::v1::{from_seeder, to_neighbour, to_seeder};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::member::OwnAddress;
use super::membership::Event;
use super::peer::{self, PeerClient};
use crate::grant::{Demand, Held};
use crate::security::Security;
use crate::security::clock::since_boot;
use crate::seeder;

/// Messages that wait for a line. A line that is slower is broken off and begins anew with all there is.
const QUEUE: usize = 256;
/// Pause before a line is made again: doubled with each failure.
const PAUSE: Duration = Duration::from_millis(250);
/// A seeder that comes back is told all within a few seconds.
const SEEDER_PAUSE_MAX: Duration = Duration::from_secs(2);
const NEIGHBOUR_PAUSE_MAX: Duration = Duration::from_secs(15);
/// A neighbour that was away for so long is forgotten until somebody introduces it again.
const NEIGHBOUR_PATIENCE: Duration = Duration::from_secs(600);
/// Time for a line to be made.
const CONNECT: Duration = Duration::from_secs(5);
/// How often seeders' names are looked up.
const LOOK_UP: Duration = Duration::from_secs(10);
/// The same while a line is missing: the seeder may be somewhere else now.
const LOOK_UP_AGAIN: Duration = Duration::from_secs(2);
/// Largest message from a seeder.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Makes lines.
#[derive(Clone)]
pub(crate) struct Lines {
    /// Who this node says it is.
    pub(crate) hello: api::Hello,
    pub(crate) security: Security,
    pub(crate) me: OwnAddress,
    /// What this node shows to others, and demands of them.
    pub(crate) grants: Held,
    pub(crate) demand: Demand,
    pub(crate) events: mpsc::Sender<Event>,
}

/// A line to a neighbour; dropping it ends it.
pub(crate) struct NeighbourLine(AbortHandle);

/// A line to a seeder; dropping it ends it.
struct SeederLine {
    stands: Arc<AtomicBool>,
    _line: NeighbourLine,
}

impl Drop for NeighbourLine {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Lines {
    /// What asks a machine for chunks. `None`: this node has no certificate yet.
    pub(crate) fn client(&self, address: SocketAddr) -> Option<PeerClient> {
        let (me, grants) = (self.me.clone(), Some(self.grants.clone()));
        PeerClient::new(address, &self.security, me, grants, peer::Options::default()).ok()
    }

    /// Begins a line to a neighbour.
    pub(crate) fn call(&self, address: SocketAddr) -> Option<NeighbourLine> {
        let channel = peer::channel(address, &self.security).ok()?;
        let lines = self.clone();
        Some(NeighbourLine(tokio::spawn(async move { lines.hold_neighbour(address, channel).await }).abort_handle()))
    }

    /// Holds a line to each seeder for as long as this runs.
    pub(crate) async fn hold_seeders(self, seeders: seeder::Client) {
        let mut held: BTreeMap<String, SeederLine> = BTreeMap::new();
        loop {
            match seeders.channels().await {
                Ok(found) => {
                    let gone = |name: &String| !found.iter().any(|(found, _)| found == name);
                    let gone: Vec<String> = held.keys().filter(|name| gone(name)).cloned().collect();
                    for seeder in gone {
                        held.remove(&seeder);
                        self.demand.forget_time(&seeder);
                        self.say(Event::SeederDown { seeder }).await;
                    }
                    for (name, channel) in found {
                        held.entry(name.clone()).or_insert_with(|| self.seeder_line(name, channel, seeders.clone()));
                    }
                }
                Err(error) => tracing::debug!(%error, "no seeder's name can be looked up"),
            }
            if !held.is_empty() && held.values().all(|line| line.stands.load(Ordering::Relaxed)) {
                tokio::time::sleep(LOOK_UP).await;
            } else {
                tokio::time::sleep(LOOK_UP_AGAIN).await;
                seeders.look_up_again();
            }
        }
    }

    fn seeder_line(&self, name: String, channel: Channel, seeders: seeder::Client) -> SeederLine {
        let (lines, stands) = (self.clone(), Arc::new(AtomicBool::new(false)));
        let told = Arc::clone(&stands);
        let line = tokio::spawn(async move { lines.hold_seeder(name, channel, seeders, &told).await });
        SeederLine { stands, _line: NeighbourLine(line.abort_handle()) }
    }

    async fn hold_seeder(self, seeder: String, channel: Channel, seeders: seeder::Client, stands: &AtomicBool) {
        let mut pause = PAUSE;
        let mut is_said = false;
        loop {
            let up = || {
                stands.store(true, Ordering::Relaxed);
                seeders.note_line(&seeder, true);
            };
            let ended = self.line_to_seeder(&seeder, channel.clone(), up).await;
            stands.store(false, Ordering::Relaxed);
            match ended {
                Ok(()) => {
                    pause = PAUSE;
                    seeders.note_line(&seeder, false);
                }
                // An older seeder has no mesh.
                Err(status) if status.code() == tonic::Code::Unimplemented => {
                    tracing::info!(seeder, "this seeder has no mesh: layers come from it alone");
                    stands.store(true, Ordering::Relaxed);
                    tokio::time::sleep(NEIGHBOUR_PATIENCE).await;
                }
                Err(status) => {
                    if !std::mem::replace(&mut is_said, true) {
                        tracing::warn!(seeder, error = status.message(), "no line to the mesh of this seeder yet");
                    }
                    seeders.note_line(&seeder, false);
                    pause = (pause * 2).min(SEEDER_PAUSE_MAX);
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// One line to a seeder, from its welcome to its end. Fails where there was no welcome.
    async fn line_to_seeder(&self, seeder: &str, channel: Channel, up: impl FnOnce()) -> Result<(), tonic::Status> {
        let (outlet, outgoing) = mpsc::channel(QUEUE);
        let hello = api::ToSeeder { message: Some(to_seeder::Message::Hello(self.hello.clone())) };
        let _ = outlet.try_send(hello);
        let mut client = TrackerClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let asked = since_boot();
        let opened = async {
            let mut incoming = client.join(ReceiverStream::new(outgoing)).await?.into_inner();
            match incoming.message().await?.and_then(|message| message.message) {
                Some(from_seeder::Message::Welcome(welcome)) => Ok((incoming, welcome)),
                _ => Err(tonic::Status::internal("the seeder did not begin with a welcome")),
            }
        };
        let late = |_| tonic::Status::deadline_exceeded("no welcome in time");
        let (mut incoming, welcome) = tokio::time::timeout(CONNECT, opened).await.map_err(late)??;
        let me: SocketAddr = welcome
            .address
            .parse()
            .map_err(|_| tonic::Status::internal(format!("a welcome to {:?}", welcome.address)))?;
        self.demand.tell(seeder, welcome.grants).await;
        // One of a version before does not say.
        if welcome.time > 0 {
            self.demand.tell_time(seeder, welcome.time, asked);
        }
        // Neighbours know this machine by the first address that it had, for the life of the process.
        if self.me.get().is_none() {
            self.me.set(Some(me));
        }
        tracing::info!(seeder, %me, "in the mesh");
        up();
        let named = || seeder.to_owned();
        self.say(Event::SeederUp { seeder: named(), me, outlet }).await;
        let ended = loop {
            match incoming.message().await {
                Ok(Some(api::FromSeeder { message: Some(message) })) => {
                    self.say(Event::FromSeeder { seeder: named(), message }).await;
                }
                Ok(Some(_)) => {}
                Ok(None) => break None,
                Err(status) => break Some(status),
            }
        };
        self.demand.forget_time(seeder);
        self.say(Event::SeederDown { seeder: named() }).await;
        let reason = ended.map_or_else(|| "it ended".to_owned(), |status| status.message().to_owned());
        tracing::info!(seeder, reason, "the line to the mesh of this seeder is lost");
        Ok(())
    }

    async fn hold_neighbour(self, address: SocketAddr, channel: Channel) {
        let mut pause = PAUSE;
        let mut failing = Instant::now();
        while failing.elapsed() < NEIGHBOUR_PATIENCE {
            match self.line_to_neighbour(address, channel.clone()).await {
                Ok(()) => (pause, failing) = (PAUSE, Instant::now()),
                Err(error) => {
                    tracing::debug!(%address, error = error.message(), "no line to this neighbour");
                    pause = (pause * 2).min(NEIGHBOUR_PAUSE_MAX);
                }
            }
            tokio::time::sleep(pause).await;
        }
        self.say(Event::NeighbourGone { address }).await;
    }

    /// One line to a neighbour until its end. Fails where none was made.
    async fn line_to_neighbour(&self, address: SocketAddr, channel: Channel) -> Result<(), tonic::Status> {
        let (outlet, outgoing) = mpsc::channel(QUEUE);
        let me = self.me.get().map(|me| me.to_string()).unwrap_or_default();
        let hello = api::Hello { address: me, ..self.hello.clone() };
        let _ = outlet.try_send(api::ToNeighbour { message: Some(to_neighbour::Message::Hello(hello)) });
        let mut client = NeighbourClient::new(channel);
        let late = |_| tonic::Status::deadline_exceeded("no answer in time");
        let opened = tokio::time::timeout(CONNECT, client.tell(ReceiverStream::new(outgoing))).await;
        let mut line = opened.map_err(late)??.into_inner();
        self.say(Event::NeighbourUp { address, outlet }).await;
        let ended = loop {
            match line.message().await {
                Ok(Some(_)) => {}
                ended => break ended.err(),
            }
        };
        self.say(Event::NeighbourDown { address }).await;
        tracing::debug!(%address, ended = ?ended.map(|status| status.message().to_owned()), "the line to this neighbour is lost");
        Ok(())
    }

    async fn say(&self, event: Event) {
        // Without a driver the process ends.
        let _ = self.events.send(event).await;
    }
}
