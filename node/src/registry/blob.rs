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
    /// A container waits: a broken connection is made again, everything else is for whoever chooses among sources.
    Read,
    /// Nobody waits for this byte alone: rests are sat out.
    Download,
}

impl Patience {
    /// Tries without a single new byte.
    const fn tries_max(self) -> u32 {
        match self {
            Self::Read => 2,
            Self::Download => DOWNLOAD_TRIES_MAX,
        }
    }

    /// The pause before another try; `None` where there shall be none.
    fn pause(self, fault: &Fault, tries: u32) -> Option<Duration> {
        let own = |first: u64| back_off(Duration::from_millis(first), tries, Duration::from_secs(10));
        match (self, fault) {
            (_, fault) if !fault.is_transient() || tries >= self.tries_max() => None,
            (Self::Read, Fault::Unreachable { .. }) => Some(own(50)),
            (Self::Read, _) => None,
            (Self::Download, Fault::Busy { retry_after: Some(rest), .. }) => {
                // A little more than it asked for, since it measures too.
                (*rest <= REST_MAX).then(|| *rest + own(100))
            }
            (Self::Download, _) => Some(own(400)),
        }
    }
}

/// Tries of a download without a single new byte.
pub(crate) const DOWNLOAD_TRIES_MAX: u32 = 5;
/// The longest rest of a registry that a download sits out.
const REST_MAX: Duration = Duration::from_secs(30);

/// A part of a blob, in order.
pub struct BlobBody {
    client: Client,
    blob: BlobRef,
    /// What is still wanted.
    left: Range<u64>,
    stream: Option<Stream>,
    total: Option<u64>,
    patience: Patience,
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
        Self { client, blob, left: wanted, stream, total, patience, tries: 0, is_over: false }
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
            let Some(pause) = self.patience.pause(&error.fault, self.tries) else {
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
