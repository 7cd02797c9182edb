//! What the store does beside reads: syncing what came, comparing complete devices with their diffID and all chunks with their digests,
//! evicting.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::Mutex;
use swarm::LayerKey;
use tokio_util::sync::CancellationToken;

use crate::driver::{Inbox, Layers};
use crate::evict::Evictor;
use crate::layer::Layer;
use crate::node::Incoming;
use crate::reader::ReadError;
use crate::scrub;
use crate::store::{Proof, Room};

/// How long what came is collected before it is synced: a crash forgets at most so much.
const SYNC_PAUSE: Duration = Duration::from_millis(100);

/// How long a disk that fails to sync is left alone.
const FAILED_PAUSE: Duration = Duration::from_secs(5);

/// Unsynced bytes of an incoming device after which it is synced.
const INCOMING_UNSYNCED_MAX: u64 = 16 << 20;

/// Devices that arrive without an index.
pub(crate) type Arriving = Arc<Mutex<Vec<Weak<Incoming>>>>;

/// The threads of the store.
#[derive(Debug)]
pub(crate) struct Chores {
    sync: Option<JoinHandle<()>>,
    prove: Option<JoinHandle<()>>,
    evict: Option<JoinHandle<()>>,
    scrub: Option<JoinHandle<()>>,
    /// Nothing is sent: its end ends the thread.
    scrubbing: Option<mpsc::Sender<()>>,
    room: Arc<Room>,
    stop: CancellationToken,
}

impl Chores {
    /// Starts them. Sources are probed on the current runtime.
    pub(crate) fn start(
        layers: Layers,
        arriving: Arriving,
        inbox: Arc<Inbox>,
        room: Arc<Room>,
    ) -> std::io::Result<Self> {
        let stop = CancellationToken::new();
        let evictor = Evictor::new(layers.clone(), room.clone(), inbox.clone(), stop.clone());
        let evict = thread::Builder::new().name("evict".into()).spawn(move || evictor.run())?;
        let (proofs, to_prove) = mpsc::channel();
        let prove = {
            let inbox = inbox.clone();
            thread::Builder::new().name("prove".into()).spawn(move || prove_all(&to_prove, &inbox))?
        };
        let (scrubbing, stop_scrubbing) = mpsc::channel();
        let scrub = {
            let layers = layers.clone();
            thread::Builder::new().name("scrub".into()).spawn(move || scrub::run(&layers, &stop_scrubbing))?
        };
        let sync =
            thread::Builder::new().name("sync".into()).spawn(move || sync_all(&layers, &arriving, &inbox, &proofs))?;
        Ok(Self {
            sync: Some(sync),
            prove: Some(prove),
            evict: Some(evict),
            scrub: Some(scrub),
            scrubbing: Some(scrubbing),
            room,
            stop,
        })
    }

    /// Waits for the threads after [`Inbox::stop`].
    pub(crate) fn join(&mut self) {
        self.room.stop();
        self.stop.cancel();
        self.scrubbing = None;
        let threads = [self.sync.take(), self.prove.take(), self.evict.take(), self.scrub.take()];
        for thread in threads.into_iter().flatten() {
            // The last owner of the node may be one of these threads.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

fn sync_all(layers: &Layers, arriving: &Arriving, inbox: &Inbox, proofs: &mpsc::Sender<Arc<Layer>>) {
    let mut failed: BTreeSet<LayerKey> = BTreeSet::new();
    while let Some(keys) = inbox.flushes(if failed.is_empty() { SYNC_PAUSE } else { FAILED_PAUSE }) {
        for key in keys {
            let Some(layer) = layers.lock().get(&key).cloned() else { continue };
            match layer.store().flush() {
                Ok(()) => {
                    failed.remove(&key);
                }
                Err(error) => {
                    if failed.insert(key) {
                        tracing::warn!(layer = %layer.diff_id(), %error, "cannot make durable what came and what was found: a crash forgets it");
                    }
                    layer.note_loss();
                    inbox.needs_flush(key);
                }
            }
            if layer.is_complete() && !layer.is_proven() && layer.quarantine().is_none() {
                let _ = proofs.send(layer);
            }
        }
        failed.retain(|key| layers.lock().contains_key(key));
        arriving.lock().retain(|incoming| {
            let Some(incoming) = incoming.upgrade() else { return false };
            if incoming.unsynced().load(Ordering::Relaxed) >= INCOMING_UNSYNCED_MAX {
                incoming.unsynced().store(0, Ordering::Relaxed);
                incoming.store().sync();
            }
            true
        });
    }
}

fn prove_all(layers: &mpsc::Receiver<Arc<Layer>>, inbox: &Inbox) {
    // On Linux this is the calling thread alone (setpriority(2), BUGS). Proving may take as long as it likes.
    let _ = rustix::process::setpriority_process(None, 19);
    for layer in layers {
        if inbox.is_stopped() {
            return;
        }
        match layer.store().prove(&|| inbox.is_stopped()) {
            Ok(Proof::Proven) => tracing::debug!(layer = %layer.diff_id(), "the device is what its diffID names"),
            Ok(Proof::Incomplete) => {}
            Ok(Proof::Rotten(_)) => layer.note_loss(),
            Ok(Proof::Quarantined) => {
                let reason = layer.quarantine().unwrap_or_default();
                tracing::error!(layer = %layer.diff_id(), reason, "the layer is quarantined: it is not used for new containers");
                layer.close(ReadError::Quarantined(reason));
            }
            Err(error) => tracing::warn!(layer = %layer.diff_id(), %error, "cannot prove the device"),
        }
    }
}
