//! Making room on a seeder: wire forms go first, then whole layers, each what was used longest ago; nothing that is in use.

use std::io;
use std::sync::Arc;

use bytesize::ByteSize;
use layer::Digest;

use super::frames::{Frames, FramesUnit};
use super::ledger::Reservation;
use super::{Phase, Shared};

/// By how much a reservation grows at a time.
const GROW_STEP: u64 = 4 << 20;

/// Units that are freed with one write of the table.
const UNITS_AT_ONCE: usize = 4;

impl Shared {
    /// Sees to it that `reservation` has at least `bytes`, making room if need be. Blocks on the disk.
    pub(super) fn cover(&self, reservation: &mut Reservation, bytes: u64) -> io::Result<()> {
        if bytes <= reservation.bytes() {
            return Ok(());
        }
        let more = bytes - reservation.bytes();
        // A little ahead where there is room, so that this is rare.
        if reservation.grow(more + GROW_STEP) || reservation.grow(more) {
            return Ok(());
        }
        self.make_room(more);
        if reservation.grow(more) {
            return Ok(());
        }
        let room = self.ledger.room();
        let size = |bytes: u64| ByteSize::b(bytes).display().iec().to_string();
        let place = if room.is_short_of_disk() {
            "its file system has no more above cache.keep_free: free space there".to_owned()
        } else {
            format!("cache.size is {}: allow this seeder more", size(room.limit()))
        };
        let (wanted, taken) = (size(bytes), size(room.taken()));
        let reason = format!(
            "there is no room for {wanted}: of the {taken} that the seeder has nothing more can go, and {place}"
        );
        Err(io::Error::new(io::ErrorKind::QuotaExceeded, reason))
    }

    /// Frees until `bytes` more can be taken; gives whether they can. Blocks on the disk.
    pub(super) fn make_room(&self, bytes: u64) -> bool {
        let room = self.ledger.room();
        room.look();
        let is_enough = || room.taken().saturating_add(bytes) <= room.limit();
        if is_enough() {
            return true;
        }
        // One at a time: two would free for each other.
        let _one = self.evicting.lock();
        if bytes > room.limit() {
            return false;
        }
        let layers = self.ledger.oldest_first();
        self.drop_broken_off(&layers, &is_enough);
        self.drop_wire(&layers, &is_enough);
        for blob in &layers {
            if is_enough() {
                return true;
            }
            self.drop_layer(*blob);
        }
        is_enough()
    }

    /// What the files of `blob` take is charged.
    pub(super) fn settle(&self, blob: Digest) {
        self.ledger.settle(blob, self.store.disk_bytes(blob));
    }

    /// Beginnings of blobs that nobody goes on with.
    fn drop_broken_off(&self, layers: &[Digest], is_enough: &dyn Fn() -> bool) {
        for blob in layers {
            if is_enough() {
                return;
            }
            // No ingest begins while the lock is held.
            let _layers = self.layers.blocking_lock();
            if !self.is_running(*blob) && self.store.drop_incoming(*blob).unwrap_or(false) {
                self.settle(*blob);
            }
        }
    }

    fn drop_wire(&self, layers: &[Digest], is_enough: &dyn Fn() -> bool) {
        // What was not loaded was not used since the start.
        let mut units: Vec<(FramesUnit, Digest, Arc<Frames>)> = Vec::new();
        for blob in layers {
            let known = self.layers.blocking_lock().get(blob).map(Arc::clone);
            match known {
                Some(known) => {
                    let frames = known.frames();
                    units.extend(frames.units().into_iter().map(|unit| (unit, *blob, Arc::clone(frames))));
                }
                None if is_enough() => return,
                None => {
                    let layers = self.layers.blocking_lock();
                    if !layers.contains_key(blob) && !self.is_running(*blob) {
                        if let Err(error) = self.store.drop_wire(*blob) {
                            tracing::warn!(%blob, %error, "cannot remove wire forms");
                        }
                        drop(layers);
                        self.settle(*blob);
                    }
                }
            }
        }
        units.sort_by_key(|(unit, ..)| *unit);
        let mut rest = &units[..];
        while let Some(((_, blob, frames), _)) = rest.split_first()
            && !is_enough()
        {
            // Those of one layer together: each call writes the table once.
            let len = rest.iter().take_while(|(_, other, _)| other == blob).count().min(UNITS_AT_ONCE);
            let (now, after) = rest.split_at(len);
            rest = after;
            let numbers: Vec<u32> = now.iter().map(|(unit, ..)| unit.number).collect();
            if let Err(error) = frames.evict(&numbers) {
                tracing::warn!(%blob, %error, "cannot free wire forms");
            }
            self.settle(*blob);
        }
    }

    /// Everything of a layer, unless somebody uses it.
    fn drop_layer(&self, blob: Digest) {
        let mut layers = self.layers.blocking_lock();
        // Who serves or refills it has a handle; nobody can get another while the lock is held.
        if self.is_running(blob) || layers.get(&blob).is_some_and(|known| Arc::strong_count(known) > 1) {
            return;
        }
        layers.remove(&blob);
        match self.store.forget(blob) {
            Ok(()) => tracing::info!(%blob, "a layer was removed to make room"),
            Err(error) => tracing::warn!(%blob, %error, "cannot remove a layer to make room"),
        }
        drop(layers);
        self.settle(blob);
    }

    /// Whether an ingest of it waits or runs.
    fn is_running(&self, blob: Digest) -> bool {
        let flight = self.flights.lock().get(&blob).map(Arc::clone);
        flight.is_some_and(|flight| matches!(*flight.phase.borrow(), Phase::Running(_)))
    }
}
