//! The chunks of a layer whose index nobody has yet, passed on while they come.
//!
//! A seeder tells each node that waits for a layer the digests of the chunks that it makes, over that node's own connection to
//! it, and lets one node follow the ingest; others follow that one, and still others those (`docs/wire.md`). A chunk is passed on
//! once its bytes are what the seeder told. What becomes of the layer, the signed index alone decides.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use layer::wire::{Frame, PREFIX_LEN};
use layer::{ChunkDigest, ChunkIndex};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::Incoming;
use crate::layer::Layer;

/// Bytes of frames that are read and handed to the network at a time.
const BATCH_LEN: usize = 512 << 10;
/// Bytes of a digest.
const DIGEST_LEN: usize = size_of::<ChunkDigest>();

/// What came of one layer, for those that follow this node.
#[derive(Debug)]
pub(crate) struct Relay {
    state: watch::Sender<State>,
    told: Mutex<Vec<ChunkDigest>>,
    /// How often what came turned out to be wrong.
    faults: Mutex<u32>,
    fault: Notify,
}

/// How far it is.
#[derive(Clone, Debug)]
pub(crate) enum State {
    /// Nothing came yet.
    Opening,
    /// Chunks come; the first `checked` of them are what the seeder told.
    Open { incoming: Arc<Incoming>, checked: u32 },
    /// The index came too.
    Known(Arc<Layer>),
    /// The layer did not become one.
    Over,
}

impl Relay {
    pub(crate) fn new() -> Arc<Self> {
        let state = watch::Sender::new(State::Opening);
        Arc::new(Self { state, told: Mutex::default(), faults: Mutex::default(), fault: Notify::new() })
    }

    pub(crate) fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Where what comes is put.
    pub(crate) fn open(&self, incoming: Arc<Incoming>) {
        self.state.send_replace(State::Open { incoming, checked: 0 });
        self.advance();
    }

    pub(crate) fn incoming(&self) -> Option<Arc<Incoming>> {
        match &*self.state.borrow() {
            State::Open { incoming, .. } => Some(Arc::clone(incoming)),
            State::Opening | State::Known(_) | State::Over => None,
        }
    }

    /// The first chunk that is not known to be right.
    pub(crate) fn next(&self) -> u32 {
        match &*self.state.borrow() {
            State::Open { checked, .. } => *checked,
            State::Opening | State::Known(_) | State::Over => 0,
        }
    }

    /// The seeder tells the digests of the chunks from `first` on.
    pub(crate) fn tell(&self, first: u32, digests: &[u8]) {
        {
            let mut told = self.told.lock();
            if first as usize != told.len() {
                return;
            }
            let (digests, _) = digests.as_chunks::<DIGEST_LEN>();
            told.extend(digests.iter().map(|digest| ChunkDigest(*digest)));
        }
        self.advance();
    }

    /// Looks at what arrived and was not checked yet. A chunk that is wrong is forgotten with all behind it: they came from who
    /// sent it.
    pub(crate) fn advance(&self) {
        let told = self.told.lock();
        let mut is_wrong = false;
        self.state.send_if_modified(|state| {
            let State::Open { incoming, checked } = state else { return false };
            let before = *checked;
            while let Some(digest) = told.get(*checked as usize)
                && let Some(arrived) = incoming.store().digest(*checked)
            {
                if arrived != *digest {
                    tracing::warn!(
                        chunk = *checked,
                        "what was followed is not what the seeder made: it is fetched again"
                    );
                    incoming.store().forget_from(*checked);
                    is_wrong = true;
                    break;
                }
                *checked += 1;
            }
            *checked > before
        });
        drop(told);
        if is_wrong {
            self.note_fault();
        }
    }

    /// What comes now is wrong.
    pub(crate) fn note_fault(&self) {
        *self.faults.lock() += 1;
        self.fault.notify_waiters();
    }

    /// How often what came was wrong so far.
    pub(crate) fn faults(&self) -> u32 {
        *self.faults.lock()
    }

    /// Waits until something is wrong after so many `faults`.
    pub(crate) async fn faulty(&self, faults: u32) {
        loop {
            let notified = self.fault.notified();
            if self.faults() != faults {
                return;
            }
            notified.await;
        }
    }

    /// It became `layer`, or nothing. Nothing is written to the incoming device any more.
    pub(crate) fn end(&self, layer: Option<Arc<Layer>>) {
        self.state.send_replace(layer.map_or(State::Over, State::Known));
    }
}

impl State {
    /// The frames of the first chunks from `next` on that may be passed on, and where to go on; nothing: none yet. Blocks for
    /// the disk.
    pub(crate) fn read(&self, next: u32) -> io::Result<(Vec<Bytes>, u32)> {
        let gone = || io::Error::other("the ingest is not followed here any more");
        match self {
            Self::Opening => Ok((Vec::new(), next)),
            Self::Over => Err(gone()),
            Self::Known(layer) => crate::mesh::serving::read_batch(layer, next..layer.geometry().chunk_count()),
            Self::Open { incoming, checked } => {
                let (mut batch, mut at) = (Vec::new(), next);
                while at < *checked && batch.len() < BATCH_LEN {
                    let (chunk, store) = (ChunkIndex(at), incoming.store());
                    let digest = store.digest(at).ok_or_else(gone)?;
                    if !store.wire().read(chunk, &digest, &mut batch) {
                        let plain = store.read_checked(at)?;
                        batch.reserve(PREFIX_LEN + plain.len());
                        batch.extend_from_slice(&Frame::Plain(&plain).prefix());
                        batch.extend_from_slice(&plain);
                    }
                    at += 1;
                }
                Ok((vec![Bytes::from(batch)], at))
            }
        }
    }

    /// All chunks before `next` were all.
    pub(crate) fn is_end(&self, next: u32) -> bool {
        matches!(self, Self::Known(layer) if next == layer.geometry().chunk_count())
    }

    /// log2 of the chunk size, once that is known.
    pub(crate) fn chunk_log2(&self) -> Option<u8> {
        match self {
            Self::Open { incoming, .. } => Some(incoming.store().chunk_log2()),
            Self::Known(layer) => Some(layer.geometry().chunk_log2()),
            Self::Opening | Self::Over => None,
        }
    }
}
