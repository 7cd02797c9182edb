//! The bytes of a blob as they come, over as many connections, one after the other, as it takes.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::{Response, Url};

use super::client::{Client, Head, read_head};
use super::endpoint::{Endpoint, back_off};
use super::error::{Fault, RegistryError, what};
use crate::source::BlobRef;

/// How long a reader is patient, and a download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// A container waits. Before anything came a broken connection is made again, and everything else is for whoever chooses
    /// among sources. After that the transfer is taken up again: a frame of zstd can be read from its start only, however large
    /// it is, so what came must not be lost with a connection.
    Read,
    /// Nobody waits for this byte alone: rests are sat out.
    Download,
}

impl Patience {
    /// The pause before another try, after so many `tries` without a single new byte; `None` where there shall be none. `has_begun`:
    /// some bytes came before.
    fn pause(self, fault: &Fault, tries: u32, has_begun: bool) -> Option<Duration> {
        let (tries_max, rest_max, first) = match (self, has_begun) {
            (Self::Read, false) if !matches!(fault, Fault::Unreachable { .. }) => return None,
            (Self::Read, false) => (2, Duration::ZERO, Duration::from_millis(50)),
            (Self::Read, true) => (4, Duration::from_secs(5), Duration::from_millis(100)),
            (Self::Download, _) => (DOWNLOAD_TRIES_MAX, Duration::from_secs(30), Duration::from_millis(400)),
        };
        if !fault.is_transient() || tries >= tries_max {
            return None;
        }
        match fault {
            // A little more than it asked for, since it measures too.
            Fault::Busy { retry_after: Some(rest), .. } => {
                let more = back_off(Duration::from_millis(100), tries, Duration::from_secs(1));
                (*rest <= rest_max).then(|| *rest + more)
            }
            _ => Some(back_off(first, tries, Duration::from_secs(10))),
        }
    }
}

/// Tries of a download without a single new byte.
pub(crate) const DOWNLOAD_TRIES_MAX: u32 = 5;

/// A part of a blob, in order.
pub struct BlobBody {
    client: Client,
    blob: BlobRef,
    /// What is still wanted.
    left: Range<u64>,
    stream: Option<Stream>,
    total: Option<u64>,
    patience: Patience,
    has_begun: bool,
    /// Tries since the last byte.
    tries: u32,
    is_over: bool,
}

impl BlobBody {
    pub(super) fn new(
        client: Client,
        blob: BlobRef,
        wanted: Range<u64>,
        stream: Option<Stream>,
        patience: Patience,
    ) -> Self {
        let total = stream.as_ref().and_then(|stream| stream.total);
        Self { client, blob, left: wanted, stream, total, patience, has_begun: false, tries: 0, is_over: false }
    }

    /// Size of the whole blob, where the registry said it.
    pub const fn total(&self) -> Option<u64> {
        self.total
    }

    /// The next bytes; `None` after the last. A body that ends early and cannot be taken up again is an error.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        while !self.is_over {
            let error = match self.try_next().await {
                Ok(Some(bytes)) => {
                    self.left.start += bytes.len() as u64;
                    self.has_begun = true;
                    self.tries = 0;
                    return Ok(Some(bytes));
                }
                Ok(None) => {
                    self.is_over = true;
                    break;
                }
                Err(error) => error,
            };
            self.stream = None;
            self.tries += 1;
            let Some(pause) = self.patience.pause(&error.fault, self.tries, self.has_begun) else {
                self.is_over = true;
                return Err(error);
            };
            tracing::debug!(blob = %self.blob, at = self.left.start, %error, "the transfer is taken up again");
            tokio::time::sleep(pause).await;
        }
        Ok(None)
    }

    async fn try_next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let end = Some(self.left.end).filter(|end| *end != u64::MAX);
                let stream = self.client.open(&self.blob, self.left.start, end).await?;
                if let (Some(before), Some(total)) = (self.total, stream.total)
                    && before != total
                {
                    let reason = format!("the blob had {before} bytes and then {total}; the registry is broken");
                    return Err(RegistryError::of_blob(&self.blob, Fault::protocol(reason)));
                }
                self.total = self.total.or(stream.total);
                self.stream.insert(stream)
            }
        };
        stream.next().await.map_err(|fault| {
            stream.endpoint.failed(&fault);
            RegistryError { what: what(&self.blob), place: stream.endpoint.place().to_owned(), fault }
        })
    }
}

/// The bytes of one answer.
pub(super) struct Stream {
    endpoint: Arc<Endpoint>,
    url: Url,
    response: Response,
    /// Bytes to drop first, where the range was ignored.
    skip: u64,
    /// Bytes that must still come; `None` where it is not said.
    left: Option<u64>,
    total: Option<u64>,
    stall_timeout: Duration,
}

impl Stream {
    pub(super) fn new(
        endpoint: Arc<Endpoint>,
        response: Response,
        wanted: Range<u64>,
        stall_timeout: Duration,
    ) -> Result<Self, Fault> {
        let head = read_head(response.status(), response.headers(), response.content_length(), &wanted);
        let Head { skip, len, total } = head.map_err(Fault::protocol)?;
        // The body of "not satisfiable" is a text, not the blob.
        let is_empty = response.status() == http::StatusCode::RANGE_NOT_SATISFIABLE;
        let left = if is_empty { Some(0) } else { len };
        let url = response.url().clone();
        Ok(Self { endpoint, url, response, skip, left, total, stall_timeout })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            if self.left == Some(0) {
                return Ok(None);
            }
            let next = tokio::time::timeout(self.stall_timeout, self.response.chunk())
                .await
                .map_err(|_| Fault::Stalled { after: self.stall_timeout })?
                .map_err(|error| self.endpoint.transport(&error, &self.url))?;
            let Some(mut bytes) = next else {
                return match self.left {
                    Some(left) if left > 0 => Err(Fault::Unreachable {
                        reason: format!("the connection broke (the body ended {left} bytes early)"),
                    }),
                    _ => Ok(None),
                };
            };
            if let Some(left) = &mut self.left {
                let came = bytes.len() as u64;
                *left = left
                    .checked_sub(came)
                    .ok_or_else(|| Fault::protocol("more bytes came than it announced; it is broken"))?;
            }
            let skipped = self.skip.min(bytes.len() as u64);
            self.skip -= skipped;
            let _ = bytes.split_to(skipped as usize);
            if !bytes.is_empty() {
                return Ok(Some(bytes));
            }
        }
    }
}
