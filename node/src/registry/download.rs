//! A whole blob, in order and as fast as its registry gives it. One connection at first; where the transfer waits for the
//! network and a further connection makes it faster, ranges ahead are fetched beside it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

use super::blob::{BlobBody, Patience};
use super::client::Client;
use super::error::RegistryError;
use crate::source::BlobRef;

/// Bytes of a range that is fetched ahead: large enough that a request's round trip does not count.
const RANGE_LEN: u64 = 2 << 20;
/// The most ranges ahead of all downloads of a client together; they are what its downloads hold in memory.
pub(super) const AHEAD_MAX: usize = 3;
/// What those ranges have together.
pub(crate) const AHEAD_BYTES_MAX: u64 = AHEAD_MAX as u64 * RANGE_LEN;
/// The most connections of a download.
const WIDTH_MAX: usize = 4;
/// How long a rate is measured.
const WINDOW: Duration = Duration::from_millis(500);
/// How long a width is kept after a further connection did not help.
const HOLD: Duration = Duration::from_secs(15);
/// Bytes a second that need no second connection.
const FAST: f64 = 150e6;

/// A download under way.
pub struct Download {
    client: Client,
    blob: BlobRef,
    /// Offset of the next byte to give.
    at: u64,
    head: Head,
    /// The ranges behind the head, in order, without gaps.
    ahead: VecDeque<Ahead>,
    permits: Arc<Semaphore>,
    /// Bytes that came over all connections.
    came: Arc<AtomicU64>,
    pace: Pace,
    total: Option<u64>,
    is_over: bool,
}

/// What gives the next bytes.
enum Head {
    /// A transfer to the blob's end, of which the bytes before `end` are taken.
    Body { body: Box<BlobBody>, end: u64 },
    /// A range that was fetched ahead.
    Ahead(Ahead),
}

/// A range that a task fetches.
struct Ahead {
    range: Range<u64>,
    pieces: mpsc::UnboundedReceiver<Result<Bytes, RegistryError>>,
    task: JoinHandle<()>,
    /// The range's room in memory: the channel has no bound of its own, but its sender cannot send more than the range.
    _permit: OwnedSemaphorePermit,
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Download {
    pub(super) fn new(client: Client, blob: BlobRef, start: u64, permits: Arc<Semaphore>) -> Self {
        let head = Head::open(&client, &blob, start);
        Self {
            client,
            blob,
            at: start,
            head,
            ahead: VecDeque::new(),
            permits,
            came: Arc::default(),
            pace: Pace::new(Instant::now()),
            total: None,
            is_over: false,
        }
    }

    /// Size of the whole blob, where the registry said it; not before the first bytes.
    pub const fn total(&self) -> Option<u64> {
        self.total
    }

    /// Connections that it uses.
    pub fn width(&self) -> usize {
        1 + self.ahead.len()
    }

    /// The next bytes; `None` after the last.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        while !self.is_over {
            let asked = Instant::now();
            let next = match &mut self.head {
                Head::Body { end, .. } if self.at >= *end => Ok(None),
                Head::Body { body, end } => {
                    let next = body.next().await;
                    self.total = self.total.or(body.total());
                    let left = usize::try_from(*end - self.at).unwrap_or(usize::MAX);
                    next.map(|next| {
                        next.map(|mut bytes| {
                            bytes.truncate(left);
                            self.came.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                            bytes
                        })
                    })
                }
                Head::Ahead(ahead) => match ahead.pieces.recv().await {
                    Some(piece) => piece.map(Some),
                    None => Ok(None),
                },
            };
            match next {
                Ok(Some(bytes)) => {
                    self.at += bytes.len() as u64;
                    let now = Instant::now();
                    let width = self.pace.note(now, self.came.load(Ordering::Relaxed), now - asked, self.width());
                    self.widen(width);
                    return Ok(Some(bytes));
                }
                Ok(None) => self.advance(),
                Err(error) => match &self.head {
                    // A range ahead that fails costs only its head start.
                    Head::Ahead(_) => {
                        tracing::debug!(blob = %self.blob, at = self.at, %error, "goes on over one connection");
                        self.narrow();
                    }
                    Head::Body { .. } => {
                        self.is_over = true;
                        return Err(error);
                    }
                },
            }
        }
        Ok(None)
    }

    /// The head is at its end: what is behind it comes next.
    fn advance(&mut self) {
        match self.ahead.pop_front() {
            Some(next) if next.range.start == self.at => self.head = Head::Ahead(next),
            Some(_) => self.narrow(),
            None => match (&self.head, self.total) {
                (Head::Ahead(_), Some(total)) if self.at < total => {
                    self.head = Head::open(&self.client, &self.blob, self.at)
                }
                _ => self.is_over = true,
            },
        }
    }

    /// Gives up what was fetched ahead and goes on over one connection.
    fn narrow(&mut self) {
        self.ahead.clear();
        self.pace.hold(Instant::now());
        self.head = Head::open(&self.client, &self.blob, self.at);
    }

    /// Begins ranges ahead until `width` connections are used.
    fn widen(&mut self, width: usize) {
        let Some(total) = self.total else { return };
        while self.width() < width {
            let start = match (self.ahead.back(), &self.head) {
                (Some(last), _) => last.range.end,
                (None, Head::Ahead(head)) => head.range.end,
                (None, Head::Body { .. }) => self.at + RANGE_LEN,
            };
            let end = (start + RANGE_LEN).min(total);
            if start >= end {
                return;
            }
            let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else { return };
            if let (Head::Body { end, .. }, true) = (&mut self.head, self.ahead.is_empty()) {
                *end = start;
            }
            self.ahead.push_back(self.fetch(start..end, permit));
        }
    }

    fn fetch(&self, range: Range<u64>, permit: OwnedSemaphorePermit) -> Ahead {
        let (sender, pieces) = mpsc::unbounded_channel();
        let mut body = BlobBody::new(self.client.clone(), self.blob.clone(), range.clone(), None, Patience::Download);
        let came = Arc::clone(&self.came);
        let task = tokio::spawn(async move {
            while let Some(piece) = body.next().await.transpose() {
                if let Ok(bytes) = &piece {
                    came.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                }
                if sender.send(piece).is_err() {
                    return;
                }
            }
        });
        Ahead { range, pieces, task, _permit: permit }
    }
}

impl Head {
    fn open(client: &Client, blob: &BlobRef, start: u64) -> Self {
        let body = BlobBody::new(client.clone(), blob.clone(), start..u64::MAX, None, Patience::Download);
        Self::Body { body: Box::new(body), end: u64::MAX }
    }
}

/// Decides how many connections a download uses, from what it measures. No clock of its own.
#[derive(Debug)]
struct Pace {
    width: usize,
    /// Beginning of the window, and what had come by then.
    since: Instant,
    came: u64,
    /// Time of the window that was spent waiting for bytes.
    waited: Duration,
    /// A wider transfer is being tried: the rate before it.
    trying: Option<f64>,
    /// The window measures connections that are just being made.
    is_settling: bool,
    hold_until: Option<Instant>,
}

impl Pace {
    const fn new(now: Instant) -> Self {
        Self {
            width: 1,
            since: now,
            came: 0,
            waited: Duration::ZERO,
            trying: None,
            // The first window has the connection's own beginning.
            is_settling: true,
            hold_until: None,
        }
    }

    /// Takes what happened: by `now` `came` bytes came in all, the last of them after a wait of `waited`, over `used`
    /// connections. Gives how many to use.
    fn note(&mut self, now: Instant, came: u64, waited: Duration, used: usize) -> usize {
        self.waited += waited;
        let window = now - self.since;
        if window < WINDOW {
            return self.width;
        }
        let rate = came.saturating_sub(self.came) as f64 / window.as_secs_f64();
        let is_waiting = self.waited * 2 > window;
        (self.since, self.came, self.waited) = (now, came, Duration::ZERO);
        if std::mem::take(&mut self.is_settling) {
            return self.width;
        }
        if let Some(before) = self.trying.take() {
            // Half of what a further connection brings where each is as fast as the others.
            let worth = 1.0 + 0.5 / (self.width - 1).max(1) as f64;
            if rate < before * worth || used < self.width {
                self.width -= 1;
                self.hold(now);
                return self.width;
            }
        }
        if !is_waiting {
            // Whoever takes the bytes is the slower one: ranges ahead would only fill memory.
            self.width = (self.width - 1).max(1);
        } else if self.width < WIDTH_MAX && rate < FAST && self.hold_until.is_none_or(|until| now >= until) {
            self.width += 1;
            self.trying = Some(rate);
            self.is_settling = true;
        }
        self.width
    }

    fn hold(&mut self, now: Instant) {
        self.hold_until = Some(now + HOLD);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a pace for `seconds`, where `rate` gives the bytes a second of so many connections and `waits` the share of the
    /// time that is spent waiting.
    fn run(seconds: u64, waits: f64, rate: impl Fn(usize) -> f64) -> usize {
        let start = Instant::now();
        let (mut pace, mut came, mut width) = (Pace::new(start), 0.0, 1);
        let step = Duration::from_millis(10);
        for tick in 1..seconds * 100 {
            came += rate(width) * step.as_secs_f64();
            width = pace.note(start + step * tick as u32, came as u64, step.mul_f64(waits), width);
        }
        width
    }

    #[test]
    fn slow_connections_are_joined_by_others() {
        assert_eq!(run(6, 0.95, |width| 10e6 * width as f64), WIDTH_MAX);
    }

    #[test]
    fn a_shared_line_keeps_one_connection() {
        assert_eq!(run(6, 0.95, |_| 10e6), 1);
        assert_eq!(run(14, 0.95, |width| 10e6 * width.min(2) as f64), 2, "two bring more than one, three do not");
    }

    #[test]
    fn a_slow_reader_keeps_one_connection() {
        assert_eq!(run(6, 0.2, |width| 10e6 * width as f64), 1);
        assert_eq!(run(6, 0.95, |width| 400e6 * width as f64), 1, "fast enough");
    }
}
