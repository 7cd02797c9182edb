//! A tracker without a network: whatever nodes say, it goes on. For the fuzz target of what machines of the mesh say.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use layer::{Digest, Geometry};
use proto::drover::mesh::v1::{FromSeeder, ToSeeder, to_seeder};
use tonic::Status;

use super::book::{Book, Decision, Entered};
use super::lines::{caller, hear, parse_blob};
use crate::mesh::Asker;

/// Lines, by any number that the caller gives them.
#[derive(Debug)]
pub struct Offline {
    book: Book,
    layers: BTreeMap<Digest, Geometry>,
    lines: BTreeMap<u8, Entered>,
}

impl Offline {
    /// A tracker that knows `layers`.
    pub fn new(layers: impl IntoIterator<Item = (Digest, Geometry)>) -> Self {
        Self { book: Book::new(7), layers: layers.into_iter().collect(), lines: BTreeMap::new() }
    }

    /// The node on `line`, which comes from the host `from`, says something. Fails where the line ends for that, or has ended; the
    /// next message begins a new one.
    pub fn hear(&mut self, now: Duration, line: u8, from: IpAddr, message: ToSeeder) -> Result<(), Status> {
        let Some(message) = message.message else { return Ok(()) };
        let Some(entered) = self.lines.get_mut(&line) else {
            let to_seeder::Message::Hello(hello) = message else {
                return Err(Status::invalid_argument("a line begins with Hello"));
            };
            self.lines.insert(line, self.book.enter(now, caller(hello, from)?)?);
            return Ok(());
        };
        let id = entered.line;
        let heard = match entered.cut.try_recv() {
            Ok(why) => Err(why),
            Err(_) => {
                let geometry = match &message {
                    to_seeder::Message::Join(haves) => self.layers.get(&parse_blob(&haves.blob)?).copied(),
                    _ => None,
                };
                hear(&mut self.book, now, id, message, geometry)
            }
        };
        if heard.is_err() {
            self.lines.remove(&line);
            self.book.hang_up(now, id);
        }
        heard
    }

    /// Somebody asks for chunks. Gives whether it is served as a member.
    pub fn request(&mut self, now: Duration, blob: Digest, run: std::ops::Range<u32>, asker: &Asker) -> bool {
        match self.book.request(now, blob, run.clone(), asker) {
            Decision::Serve(key, peer) => {
                self.book.on_end(now, key, peer, run, true);
                true
            }
            Decision::Stranger | Decision::Busy(_) | Decision::Missing => false,
        }
    }

    /// Time has come to `now`.
    pub fn pass(&mut self, now: Duration) {
        if self.book.poll_timeout().is_some_and(|due| due <= now) {
            self.book.handle_timeout(now);
        }
    }

    /// What the nodes were told since.
    pub fn told(&mut self) -> Vec<FromSeeder> {
        let queues = self.lines.values_mut().map(|entered| &mut entered.told);
        queues.flat_map(|queue| std::iter::from_fn(|| queue.try_recv().ok()).flatten().collect::<Vec<_>>()).collect()
    }
}
