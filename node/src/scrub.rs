//! Compares what lies on the disk with its digests, again and again: bits flip in files that nobody reads, and a device that is
//! mounted from disk is read with no check.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::AddAssign;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use swarm::LayerKey;

use crate::driver::Layers;

/// Bytes that are compared at once, and the pause after them: 8 MiB a second are a hundredth of a slow SSD's time, and of a
/// processor's.
const BURST: u64 = 8 << 20;
const PAUSE: Duration = Duration::from_secs(1);

/// From the beginning of a pass to that of the next: 700 GB can be compared in it.
const CYCLE: Duration = Duration::from_secs(24 * 3600);

/// What begins with the daemon needs the disk first.
const FIRST: Duration = Duration::from_secs(600);

/// What was found in chunks on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Bytes of chunks that are what their digests say.
    pub bytes: u64,
    /// Chunks that are not, and are fetched again.
    pub rotten: u64,
}

impl AddAssign for Scrubbed {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.rotten += other.rotten;
    }
}

/// Compares all layers once a day, until nobody can send to `stop` any more.
pub(crate) fn run(layers: &Layers, stop: &Receiver<()>) {
    // On Linux this is the calling thread alone (setpriority(2), BUGS).
    let _ = rustix::process::setpriority_process(None, 19);
    let rest = |pause| matches!(stop.recv_timeout(pause), Err(RecvTimeoutError::Timeout));
    let mut pause = FIRST;
    while rest(pause) {
        let began = Instant::now();
        let scrubbed = pass(layers, &mut || rest(PAUSE));
        tracing::debug!(
            bytes = scrubbed.bytes,
            rotten = scrubbed.rotten,
            "compared what is on the disk with its digests"
        );
        pause = CYCLE.saturating_sub(began.elapsed());
    }
}

/// Compares all layers, as long as `go_on`, which is asked every few megabytes, says so.
pub(crate) fn pass(layers: &Layers, go_on: &mut dyn FnMut() -> bool) -> Scrubbed {
    let mut scrubbed = Scrubbed::default();
    let mut keys: Vec<LayerKey> = layers.lock().keys().copied().collect();
    // So that a daemon that never lives for a whole pass comes to all of them.
    let first = RandomState::new().build_hasher().finish();
    let count = keys.len() as u64;
    keys.rotate_left(first.checked_rem(count).unwrap_or_default() as usize);
    for key in keys {
        let mut start = 0;
        loop {
            // Not kept over a pause: it may be removed.
            let Some(layer) = layers.lock().get(&key).cloned() else { break };
            let count = layer.geometry().chunk_count();
            let end = count.min(start + (BURST / layer.geometry().chunk_size()).max(1) as u32);
            scrubbed += layer.scrub(start..end);
            drop(layer);
            if !go_on() {
                return scrubbed;
            }
            if end == count {
                break;
            }
            start = end;
        }
    }
    scrubbed
}
