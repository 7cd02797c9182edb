//! Wants the rest of mounted layers in the background, within a rate. When it is their turn is the swarm's policy.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use swarm::{LayerKey, Priority, Swarm};

use crate::layer::Layer;
use crate::store::Room;

/// Bytes of background wants that a layer may have open: enough for the runs in flight, little enough that a new layer
/// gets its turn soon.
const WINDOW: u64 = 32 << 20;

/// The same for a layer in a mesh: there is more to choose from, and chunks are told of long before they are asked for.
const MESH_WINDOW: u64 = 64 << 20;

/// Most bytes that are wanted at once where there is a rate, and how much of it may be saved up.
const BURST: u64 = 4 << 20;

/// How long a layer that begins to fill is left alone: it was just mounted, and the container that it was mounted for is about
/// to read. On a link of 200 Mbit/s each second of filling too early would cost that container 25 MB.
const SETTLE: Duration = Duration::from_secs(3);

/// When there was no room it is looked at again after so long: others may have freed some.
const NO_ROOM_PAUSE: Duration = Duration::from_secs(30);

/// Keeps background wants open for the layers that are filling.
#[derive(Debug)]
pub(crate) struct Fill {
    layers: BTreeMap<LayerKey, Filling>,
    paused: Arc<AtomicBool>,
    rate: Option<Rate>,
    room: Arc<Room>,
}

#[derive(Debug)]
struct Filling {
    layer: Arc<Layer>,
    next: u32,
    /// When it was first looked at.
    since: Option<Duration>,
}

/// A bucket of bytes.
#[derive(Debug)]
struct Rate {
    bytes_per_sec: u64,
    saved: u64,
    at: Duration,
}

impl Fill {
    /// `bytes_per_sec` counts plain bytes; `None`: as fast as sources give while nobody else needs them. Ends where
    /// `room` has no slack, so that nothing has to go for it.
    pub(crate) fn new(paused: Arc<AtomicBool>, bytes_per_sec: Option<u64>, room: Arc<Room>) -> Self {
        let rate = bytes_per_sec.map(|bytes_per_sec| Rate {
            bytes_per_sec: bytes_per_sec.max(1),
            saved: BURST,
            at: Duration::ZERO,
        });
        Self { layers: BTreeMap::new(), paused, rate, room }
    }

    /// The layer may have begun or ceased to fill.
    pub(crate) fn look_at(&mut self, layer: &Arc<Layer>) {
        if layer.is_filling() && layer.has_sources() {
            self.layers.entry(layer.key()).or_insert_with(|| Filling { layer: layer.clone(), next: 0, since: None });
        } else {
            self.layers.remove(&layer.key());
        }
    }

    pub(crate) fn remove(&mut self, layer: LayerKey) {
        self.layers.remove(&layer);
    }

    /// Opens wants; gives when there may be more to open.
    pub(crate) fn step(&mut self, now: Duration, swarm: &mut Swarm) -> Option<Duration> {
        self.layers.retain(|_, filling| filling.layer.is_filling());
        if self.layers.is_empty() {
            return None;
        }
        let paused = self.paused.load(Ordering::Acquire);
        if let Some(rate) = &mut self.rate {
            rate.fill_up(now);
        }
        let mut settled = None;
        let open: u64 = self.layers.keys().map(|key| swarm.background_bytes(*key)).sum();
        let mut slack = self.room.slack().saturating_sub(open);
        for (key, filling) in &mut self.layers {
            let is_awaited = filling.layer.is_awaited();
            if paused && !is_awaited {
                continue;
            }
            let settles = *filling.since.get_or_insert(now) + SETTLE;
            if now < settles && !is_awaited {
                settled = Some(settled.map_or(settles, |other: Duration| other.min(settles)));
                continue;
            }
            let geometry = filling.layer.geometry();
            let mut open = swarm.background_bytes(*key);
            let window = if swarm.have(*key).is_some() { MESH_WINDOW } else { WINDOW };
            while open < window {
                let Some(gap) = filling.layer.store().next_missing(filling.next) else {
                    // What is wanted already is wanted no better by saying it again.
                    if open == 0 && filling.next > 0 {
                        filling.next = 0;
                        continue;
                    }
                    break;
                };
                if slack < geometry.chunk_size() {
                    self.room.look_again();
                    return Some(now + NO_ROOM_PAUSE);
                }
                let mut bytes = (window - open).min(slack);
                if let Some(rate) = &mut self.rate {
                    if rate.saved < geometry.chunk_size() {
                        return Some(now + rate.until(geometry.chunk_size()));
                    }
                    bytes = bytes.min(rate.saved);
                }
                let chunks = u32::try_from(bytes >> geometry.chunk_log2()).unwrap_or(u32::MAX).max(1);
                let run = gap.start..gap.end.min(gap.start.saturating_add(chunks));
                let bytes = u64::from(run.end - run.start) * geometry.chunk_size();
                if let Some(rate) = &mut self.rate {
                    rate.saved = rate.saved.saturating_sub(bytes);
                }
                open += bytes;
                slack = slack.saturating_sub(bytes);
                filling.next = run.end;
                swarm.want(now, *key, run, Priority::Background, Duration::MAX);
            }
        }
        settled
    }
}

impl Rate {
    fn fill_up(&mut self, now: Duration) {
        let earned = (now.saturating_sub(self.at)).as_micros() * u128::from(self.bytes_per_sec) / 1_000_000;
        if earned > 0 {
            self.saved = self.saved.saturating_add(u64::try_from(earned).unwrap_or(u64::MAX)).min(BURST);
            self.at = now;
        }
    }

    fn until(&self, bytes: u64) -> Duration {
        let missing = bytes.saturating_sub(self.saved);
        Duration::from_micros((missing * 1_000_000).div_ceil(self.bytes_per_sec).max(1000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_saves_at_most_a_burst() {
        let mut rate = Rate { bytes_per_sec: 1 << 20, saved: 0, at: Duration::ZERO };
        rate.fill_up(Duration::from_millis(500));
        assert_eq!(rate.saved, 512 << 10);
        assert_eq!(rate.until(1 << 20), Duration::from_millis(500));
        rate.fill_up(Duration::from_secs(100));
        assert_eq!(rate.saved, BURST);
    }
}
