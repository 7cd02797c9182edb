//! Memory for the windows of zstd frames, shared by all ingests: the largest that is supported is half of what ingests may take
//! together, so they take turns where they need much.

use std::sync::Arc;
use std::time::Duration;

use layer::ingest::ZSTD_WINDOW_MAX;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of windows that need no permission. Chosen: less than the rest of an ingest takes.
pub(super) const WINDOW_FREE: u64 = 512 << 10;
/// Bytes of all others together: four of zstd's and Go's usual 8 MiB, or one of the largest.
pub(super) const WINDOWS_MAX: u64 = 32 << 20;
const _: () = assert!(WINDOWS_MAX >= ZSTD_WINDOW_MAX, "one ingest must get what it needs");

/// What is counted.
const UNIT: u64 = 64 << 10;

/// The windows of all ingests.
#[derive(Debug)]
pub(super) struct Windows(Arc<Semaphore>);

/// The window of one ingest; given back when dropped.
#[derive(Debug)]
pub(super) struct Window {
    windows: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
}

impl Windows {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new((WINDOWS_MAX / UNIT) as usize)))
    }

    /// No bytes yet.
    pub(super) fn none(&self) -> Window {
        Window { windows: Arc::clone(&self.0), held: None }
    }

    /// Bytes that nobody has.
    #[cfg(test)]
    pub(super) fn free(&self) -> u64 {
        self.0.available_permits() as u64 * UNIT
    }
}

impl Window {
    /// Waits until there are `bytes`, at most [`ZSTD_WINDOW_MAX`], in place of those held, and calls `waiting` every `interval`
    /// until then. Who waits holds nothing, so two cannot wait for each other, and who waits longest is first. To be called on a
    /// thread of the runtime that may block.
    pub(super) fn take(&mut self, bytes: u64, interval: Duration, mut waiting: impl FnMut()) {
        self.held = None;
        let units = bytes.min(WINDOWS_MAX).div_ceil(UNIT) as u32;
        let runtime = Handle::current();
        let mut turn = std::pin::pin!(Arc::clone(&self.windows).acquire_many_owned(units));
        // The semaphore is never closed.
        self.held = loop {
            match runtime.block_on(async { tokio::time::timeout(interval, turn.as_mut()).await }) {
                Ok(turn) => break turn.ok(),
                Err(_) => waiting(),
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn large_windows_wait_for_each_other_and_small_ones_do_not() {
        let windows = Windows::new();
        let (mut small, mut large) = (windows.none(), windows.none());
        let take = |mut window: Window, bytes| async move {
            tokio::task::spawn_blocking(move || {
                window.take(bytes, Duration::from_millis(5), || {});
                window
            })
            .await
            .unwrap()
        };
        small = take(small, 8 << 20).await;
        assert_eq!(windows.free(), 24 << 20);
        let (told, mut waits) = tokio::sync::mpsc::unbounded_channel();
        let waiting = tokio::task::spawn_blocking(move || {
            large.take(ZSTD_WINDOW_MAX, Duration::from_millis(5), || told.send(()).unwrap_or_default());
            large
        });
        waits.recv().await.expect("it waits");
        // A larger window for who has one: it must not be waited for by who waits for all.
        let larger = tokio::spawn(take(small, 16 << 20));
        let large = waiting.await.unwrap();
        assert!(!larger.is_finished());
        drop(large);
        let small = larger.await.unwrap();
        assert_eq!(windows.free(), 16 << 20);
        drop(small);
        assert_eq!(windows.free(), WINDOWS_MAX);
    }
}
