//! Deletion in the background: directories and lazy layers of removed snapshots. `Remove` only deletes the record;
//! containerd's `Cleanup`, or [`Sweeper::run`] where that does not come, does the rest.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tracing::{debug, warn};

use super::lazy::LazyLayers;
use super::service::blocking;
use super::status::{ServiceError, chain};
use crate::snapshots::Store;

/// Pause before what could not be deleted is tried again. Chosen: a layer is held for seconds while it is prepared.
const RETRY: Duration = Duration::from_secs(30);

/// Deletes what removed snapshots left.
#[derive(Debug)]
pub struct Sweeper<L> {
    store: Arc<Store>,
    lazy: Arc<L>,
    wanted: Notify,
    one_at_a_time: Mutex<()>,
}

impl<L: LazyLayers> Sweeper<L> {
    /// A sweeper that [`run`](Self::run) will find work for from the start.
    pub fn new(store: Arc<Store>, lazy: Arc<L>) -> Self {
        let wanted = Notify::new();
        wanted.notify_one();
        Self { store, lazy, wanted, one_at_a_time: Mutex::new(()) }
    }

    /// Says that there may be something to delete.
    pub fn wake(&self) {
        self.wanted.notify_one();
    }

    /// Deletes whenever [woken](Self::wake); for the daemon's whole life. Idle, it does nothing.
    pub async fn run(&self) {
        loop {
            self.wanted.notified().await;
            while !self.sweep().await.unwrap_or_else(|error| {
                warn!(error = chain(&error), "cannot delete what removed snapshots left; trying again in {RETRY:?}");
                false
            }) {
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    /// Deletes all that can be deleted now; false if something must wait.
    pub async fn sweep(&self) -> Result<bool, ServiceError> {
        let _one = self.one_at_a_time.lock().await;
        let removed = blocking(&self.store, |store| store.sweep()).await?;
        if removed > 0 {
            debug!(removed, "removed the directories of deleted snapshots");
        }
        let mut done = true;
        for released in blocking(&self.store, |store| store.released()).await? {
            let begin = move |store: &Store| store.begin_release(&released);
            let Some(release) = blocking(&self.store, begin).await? else {
                done = false;
                continue;
            };
            if let Err(error) = self.lazy.release(&release).await {
                let layer = release.backing.diff_id;
                warn!(%layer, "cannot release a layer: {error:#}");
                done = false;
                continue;
            }
            blocking(&self.store, |store| store.end_release(release)).await?;
        }
        Ok(done)
    }
}
