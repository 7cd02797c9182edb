//! Waiting for whole layers: `drover-snapshotter pull --complete`.

use std::time::Duration;

use bytesize::ByteSize;
use layer::Digest;
use node::Node;
use node::layer::Awaited;
use proto::drover::node::v1::CompleteProgress;
use tokio::time::Instant;
use tonic::Status;

/// How often the layers are looked at.
const LOOK: Duration = Duration::from_millis(50);

/// How often progress is told.
const TELL: Duration = Duration::from_millis(500);

/// Most layers of a call: more than an image can have.
const LAYERS_MAX: usize = 4096;

/// Layers that somebody waits for.
pub(super) struct Completion {
    layers: Vec<Awaited>,
    /// How long nothing may come.
    stall: Duration,
    told: Option<Instant>,
    here: u64,
    came: Instant,
    is_over: bool,
}

impl Completion {
    /// Hurries the layers with these blobs as far as they are lazy here.
    pub(super) fn new(node: &Node, blobs: &[String], stall: Duration) -> Result<Self, Status> {
        if blobs.len() > LAYERS_MAX {
            return Err(Status::invalid_argument(format!("more than {LAYERS_MAX} layers")));
        }
        let mut layers = Vec::with_capacity(blobs.len());
        for text in blobs {
            let blob: Digest =
                text.parse().map_err(|error| Status::invalid_argument(format!("{text:?} is no digest: {error}")))?;
            layers.extend(node.layer_by_blob(blob).map(|layer| layer.awaited()));
        }
        if layers.is_empty() {
            return Err(Status::not_found("none of these layers is lazy on this node"));
        }
        Ok(Self { layers, stall, told: None, here: 0, came: Instant::now(), is_over: false })
    }

    /// Waits until there is something to tell; `None` after the end.
    pub(super) async fn next(&mut self) -> Option<Result<CompleteProgress, Status>> {
        if self.is_over {
            return None;
        }
        loop {
            match self.look() {
                Ok(progress) => {
                    self.is_over = self.layers.iter().all(|layer| layer.layer().is_complete());
                    if self.is_over || self.told.is_none_or(|told| told.elapsed() >= TELL) {
                        self.told = Some(Instant::now());
                        return Some(Ok(progress));
                    }
                }
                Err(status) => {
                    self.is_over = true;
                    return Some(Err(status));
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn look(&mut self) -> Result<CompleteProgress, Status> {
        // A chunk that came wrong may yet come right.
        let hopeless = self.layers.iter().find(|layer| layer.layer().has_wrong_index());
        if let Some(reason) = hopeless.and_then(|layer| layer.layer().quarantine()) {
            return Err(Status::failed_precondition(reason));
        }
        let sum = |bytes: fn(&Awaited) -> u64| self.layers.iter().map(bytes).sum();
        let device_size: u64 = sum(|layer| layer.layer().header().device_size());
        let here: u64 = sum(|layer| layer.layer().bytes_here());
        if here != self.here {
            (self.here, self.came) = (here, Instant::now());
        }
        if self.came.elapsed() >= self.stall {
            let (here, size) = (ByteSize(here), ByteSize(device_size));
            return Err(Status::deadline_exceeded(format!(
                "nothing came for {:?}, {here} of {size} are here: either the cache has no room for them (drover-snapshotter \
                 status), or no source answers (the daemon's log)",
                self.stall
            )));
        }
        Ok(CompleteProgress { device_size, bytes_here: here })
    }
}
