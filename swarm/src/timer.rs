//! What will happen when nothing else does.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::swarm::{FetchId, LayerKey};

/// What an expiry means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// A demanded chunk's deadline: everyone who waits for it fails.
    Deadline(LayerKey, u32),
    /// A parked chunk may find a source again.
    Unpark(LayerKey, u32),
    /// A failed chunk may be wanted again.
    Forgive(LayerKey, u32),
    /// A fetch with demand made no progress for too long.
    Hedge(FetchId),
    /// A readahead is not worth waiting for any longer.
    Expire(LayerKey, u32),
    /// Neighbours are to be told what came.
    Tell(LayerKey),
    /// The beat of the delegates goes up; seeders hear what came.
    Beat(LayerKey),
    /// What waits in a mesh may find somebody.
    Look(LayerKey),
    /// A limit of bytes per second lets the next fetch begin.
    Rate,
}

/// Timers by time. A timer is named by its time and meaning, so whoever sets one keeps its time to clear it.
#[derive(Debug, Default)]
pub(crate) struct Timers(BTreeSet<(Duration, Timer)>);

impl Timers {
    /// Moves a timer from `slot`'s time to `at`; `None` only clears it.
    pub(crate) fn set(&mut self, slot: &mut Option<Duration>, at: Option<Duration>, timer: Timer) {
        if *slot == at {
            return;
        }
        if let Some(before) = slot.take() {
            self.0.remove(&(before, timer));
        }
        if let Some(at) = at {
            self.0.insert((at, timer));
        }
        *slot = at;
    }

    pub(crate) fn next(&self) -> Option<Duration> {
        self.0.first().map(|(at, _)| *at)
    }

    /// Takes the earliest timer that is due.
    pub(crate) fn pop_due(&mut self, now: Duration) -> Option<Timer> {
        let (at, timer) = *self.0.first()?;
        if at > now {
            return None;
        }
        self.0.remove(&(at, timer));
        Some(timer)
    }
}
