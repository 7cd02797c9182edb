//! What each layer of a seeder takes on the disk, within the room that there is for all.
//!
//! A layer that stands still is charged what its files take; an ingest or a refill reserves before it writes. So the sum is
//! never above the limit, and who finds too little room makes some first ([`super::room`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use layer::Digest;
use parking_lot::Mutex;

use crate::store::Room;

/// How old the note on disk of a layer's last use may be.
const NOTE_AGE: Duration = Duration::from_secs(600);

/// The account of all layers.
#[derive(Debug)]
pub(super) struct Ledger {
    room: Arc<Room>,
    layers: Mutex<HashMap<Digest, Entry>>,
}

#[derive(Debug)]
struct Entry {
    charged: u64,
    used: SystemTime,
    noted: SystemTime,
}

/// Room that was taken for what is about to be written; given back when dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    room: Arc<Room>,
    bytes: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.room.give_back(self.bytes);
    }
}

impl Reservation {
    /// Bytes reserved.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes so many more; `false`: there is no room.
    pub(super) fn grow(&mut self, bytes: u64) -> bool {
        let took = self.room.take(bytes);
        if took {
            self.bytes += bytes;
        }
        took
    }
}

impl Ledger {
    /// With what was found: bytes and last use of each layer.
    pub(super) fn new(room: Arc<Room>, found: Vec<(Digest, u64, SystemTime)>) -> Self {
        let layers = found.into_iter().map(|(blob, charged, used)| {
            room.take_anyway(charged);
            (blob, Entry { charged, used, noted: used })
        });
        let layers = Mutex::new(layers.collect());
        Self { room, layers }
    }

    pub(super) fn room(&self) -> &Arc<Room> {
        &self.room
    }

    /// Reserves nothing yet.
    pub(super) fn reservation(&self) -> Reservation {
        Reservation { room: Arc::clone(&self.room), bytes: 0 }
    }

    /// The files of `blob` take `bytes` now; 0: they are gone.
    pub(super) fn settle(&self, blob: Digest, bytes: u64) {
        let mut layers = self.layers.lock();
        let now = SystemTime::now();
        let entry = layers.entry(blob).or_insert(Entry { charged: 0, used: now, noted: now });
        let before = std::mem::replace(&mut entry.charged, bytes);
        if bytes == 0 {
            layers.remove(&blob);
        }
        drop(layers);
        self.room.take_anyway(bytes.saturating_sub(before));
        self.room.give_back(before.saturating_sub(bytes));
    }

    /// Somebody uses the layer; gives whether that should be noted on disk.
    pub(super) fn note_use(&self, blob: Digest) -> bool {
        let now = SystemTime::now();
        let mut layers = self.layers.lock();
        let Some(entry) = layers.get_mut(&blob) else { return false };
        entry.used = now;
        let is_due = now.duration_since(entry.noted).is_ok_and(|age| age >= NOTE_AGE);
        if is_due {
            entry.noted = now;
        }
        is_due
    }

    /// All layers that take disk, the one that was used longest ago first.
    pub(super) fn oldest_first(&self) -> Vec<Digest> {
        let mut layers: Vec<_> = self.layers.lock().iter().map(|(blob, entry)| (entry.used, *blob)).collect();
        layers.sort_unstable();
        layers.into_iter().map(|(_, blob)| blob).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CacheConfig, DiskShare};
    use crate::store::Disk;

    #[test]
    fn charges_and_reservations_share_the_room() {
        let directory = tempfile::tempdir().unwrap();
        let cache = CacheConfig { size: DiskShare::Bytes(1000), keep_free: DiskShare::Bytes(0) };
        let room = Room::open(Arc::new(Disk), directory.path(), &cache).unwrap();
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let old = SystemTime::UNIX_EPOCH;
        let ledger = Ledger::new(Arc::clone(&room), vec![(a, 300, old), (b, 200, old + NOTE_AGE)]);
        assert_eq!((room.taken(), ledger.oldest_first()), (500, vec![a, b]));
        let mut reservation = ledger.reservation();
        assert!(reservation.grow(500) && !reservation.grow(1));
        ledger.settle(a, 0);
        assert!(reservation.grow(300));
        drop(reservation);
        ledger.settle(b, 250);
        assert_eq!((room.taken(), ledger.oldest_first()), (250, vec![b]));
        assert!(ledger.note_use(b) && !ledger.note_use(b) && !ledger.note_use(a));
    }
}
