//! Layers that are being made known, one task a blob however many `Prepare` calls wait for it. The resolver lets one
//! resolve of a blob run at a time too; here all who wait see the progress of the one that runs.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use layer::Digest;
use node::layer::Layer;
use node::resolve::{Progress, ResolveError, Resolver};
use node::source::BlobRef;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

/// Why no layer came.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WaitError {
    /// The resolver said why.
    #[error(transparent)]
    Resolve(#[from] Arc<ResolveError>),
    /// No byte moved for the configured time.
    #[error("no progress for {0:?}")]
    Stalled(Duration),
    /// The caller's own deadline is near.
    #[error("the caller's deadline is near")]
    Deadline,
    /// The task ended without an answer, which is a defect.
    #[error("the resolution was dropped")]
    Dropped,
}

/// The running and recently ended resolutions.
#[derive(Debug)]
pub struct Resolutions {
    resolver: Arc<Resolver>,
    running: Arc<Mutex<HashMap<Digest, watch::Receiver<State>>>>,
}

#[derive(Clone, Debug)]
enum State {
    Running,
    Done(Result<(Arc<Layer>, BlobRef), Arc<ResolveError>>),
}

/// One blob's way to a layer. Dropping it stops nothing: the next `Prepare` of the same image profits.
#[derive(Clone, Debug)]
pub struct Resolution(watch::Receiver<State>);

impl Resolutions {
    /// Resolves with `resolver`, which bounds how many run at once.
    pub fn new(resolver: Arc<Resolver>) -> Self {
        Self { resolver, running: Arc::default() }
    }

    /// Who makes layers known.
    pub fn resolver(&self) -> &Arc<Resolver> {
        &self.resolver
    }

    /// Starts to resolve the layer whose blob is at one of `places`, tried in this order, or joins who does already; `None`
    /// where there is no place.
    pub fn start(&self, places: Vec<BlobRef>) -> Option<Resolution> {
        let digest = places.first()?.digest;
        let mut running = self.running.lock();
        if let Some(state) = running.get(&digest) {
            return Some(Resolution(state.clone()));
        }
        let (sender, receiver) = watch::channel(State::Running);
        running.insert(digest, receiver.clone());
        let (resolver, table) = (self.resolver.clone(), self.running.clone());
        tokio::spawn(async move {
            let mut result = Err(None);
            for place in places {
                match resolve(&resolver, &place, &sender).await {
                    Err(error) if is_of_the_place(&error) => {
                        tracing::debug!(%place, %error, "a layer cannot be had from here");
                        // The first place is the most probable one, so its error says most.
                        result = result.map_err(|first: Option<ResolveError>| first.or(Some(error)));
                    }
                    ended => {
                        result = ended.map(|layer| (layer, place)).map_err(Some);
                        break;
                    }
                }
            }
            let result = match result {
                Ok(found) => Ok(found),
                Err(Some(error)) => Err(Arc::new(error)),
                // There was a place, so there is an answer.
                Err(None) => return drop(table.lock().remove(&digest)),
            };
            // Later calls ask the resolver again: a local layer answers at once, and a failure may be over.
            table.lock().remove(&digest);
            sender.send_replace(State::Done(result));
        });
        Some(Resolution(receiver))
    }
}

/// Whether the layer may be had from elsewhere.
fn is_of_the_place(error: &ResolveError) -> bool {
    matches!(error, ResolveError::Seeder(_))
}

async fn resolve(
    resolver: &Resolver,
    place: &BlobRef,
    sender: &watch::Sender<State>,
) -> Result<Arc<Layer>, ResolveError> {
    let (progress, mut seen) = watch::channel(Progress::default());
    let mut resolving = std::pin::pin!(resolver.resolve(place, progress));
    loop {
        tokio::select! {
            result = &mut resolving => return result,
            // Waiters only want to know that something moved.
            Ok(()) = seen.changed() => drop(sender.send_replace(State::Running)),
        }
    }
}

impl Resolution {
    /// Waits for the layer, and the place that it came from, as long as it makes progress: at most `stall` without any, and
    /// never beyond `deadline`.
    pub async fn wait(
        mut self,
        stall: Duration,
        deadline: Option<Instant>,
    ) -> Result<(Arc<Layer>, BlobRef), WaitError> {
        loop {
            if let State::Done(result) = &*self.0.borrow_and_update() {
                return Ok(result.clone()?);
            }
            let stalled_at = Instant::now() + stall;
            let until = deadline.map_or(stalled_at, |deadline| deadline.min(stalled_at));
            match timeout_at(until, self.0.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(WaitError::Dropped),
                Err(_) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    return Err(WaitError::Deadline);
                }
                Err(_) => return Err(WaitError::Stalled(stall)),
            }
        }
    }
}
