//! The seeder's part in the mesh: nodes hold lines to it, are introduced to each other, and are given each chunk about once
//! (`docs/wire.md`).
//!
//! - `book`: who is on a line with which layers, around [`swarm::Tracker`].
//! - `lines`: the gRPC service.
//! - `gate`: the seeder's layers, given as the tracker says.
//! - [`offline`]: the same without a network.
//! - [`status`]: what all that comes to, for the operator.

mod book;
mod gate;
mod lines;
pub mod offline;
pub mod status;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use layer::Digest;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::book::Book;
pub use self::gate::Gate;
pub use self::lines::route;
use crate::ingest::Ingester;
use crate::security::clock::since_boot;

/// How often this machine's clock is looked at.
const CLOCK_PAUSE: Duration = Duration::from_secs(10);

/// Introduces the nodes that have lines here. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tracker {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    ingester: Ingester,
    book: Mutex<Book>,
    epoch: Instant,
    /// A layer has its first member: there is a timeout.
    first: Notify,
}

impl Tracker {
    /// For the layers of `ingester`, until `stop`, which ends all lines. Starts a task.
    pub fn start(ingester: Ingester, stop: CancellationToken) -> Self {
        let seed = RandomState::new().build_hasher().finish();
        let shared =
            Shared { ingester, book: Mutex::new(Book::new(seed)), epoch: Instant::now(), first: Notify::new() };
        let tracker = Self { shared: Arc::new(shared) };
        tokio::spawn(tracker.clone().look_after(stop));
        tracker
    }

    /// Tells nodes from now on that they are to demand grants.
    pub fn demand_grants(&self) {
        self.with(|book, _| book.grants = true);
    }

    /// How many nodes have a line.
    pub fn lines(&self) -> usize {
        self.shared.book.lock().lines()
    }

    /// The members of each layer that has any.
    pub fn members(&self) -> Vec<(Digest, usize)> {
        self.shared.book.lock().members().collect()
    }

    fn with<T>(&self, work: impl FnOnce(&mut Book, Duration) -> T) -> T {
        // The time is read under the lock: it must not go back.
        let mut book = self.shared.book.lock();
        let now = self.shared.epoch.elapsed();
        work(&mut book, now)
    }

    async fn look_after(self, stop: CancellationToken) {
        let mut clock = tokio::time::interval(CLOCK_PAUSE);
        loop {
            let next = self.shared.book.lock().poll_timeout();
            let due = async {
                match next {
                    Some(next) => tokio::time::sleep_until(self.shared.epoch + next).await,
                    None => self.shared.first.notified().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return self.with(Book::close),
                () = due => self.with(Book::handle_timeout),
                _ = clock.tick() => self.with(|book, now| book.note_clock(now, SystemTime::now(), since_boot())),
            }
        }
    }
}

#[cfg(test)]
mod tests;
