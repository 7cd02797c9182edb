//! A layer's chunks straight from its registry: spans of the blob, inflated here.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

use layer::index::{Span, Spans};
use layer::ingest::SPAN_LEN;
use layer::span::SpanInflater;
use layer::{ChunkIndex, Geometry};

use super::client::{Client, RegistryError};
use crate::cutter::Cutter;
use crate::source::{BlobRef, BoxFuture, ChunkSink, Source, SourceError, SourceKind};

/// Gives the spans section when it is needed.
pub trait SpansProvider: Send + Sync + 'static {
    /// The spans; an error says why they are not here.
    fn spans(&self) -> BoxFuture<'_, Result<std::sync::Arc<Spans>, String>>;
}

impl SpansProvider for std::sync::Arc<Spans> {
    fn spans(&self) -> BoxFuture<'_, Result<std::sync::Arc<Spans>, String>> {
        Box::pin(std::future::ready(Ok(Self::clone(self))))
    }
}

/// The chunks of one layer, out of its blob.
pub struct RegistrySource {
    client: Client,
    blob: BlobRef,
    geometry: Geometry,
    spans: Box<dyn SpansProvider>,
    units: OnceLock<Vec<Range<u64>>>,
}

impl RegistrySource {
    /// A source of the layer of `blob`, whose device is cut by `geometry`.
    pub fn new(client: Client, blob: BlobRef, geometry: Geometry, spans: impl SpansProvider) -> Self {
        Self { client, blob, geometry, spans: Box::new(spans), units: OnceLock::new() }
    }

    /// The same with the device ranges of the spans, so that no span is fetched for two runs.
    pub fn with_units(mut self, spans: &Spans) -> Self {
        self.units = OnceLock::from(units(spans));
        self
    }

    async fn fetch_run(&self, run: Range<u32>, sink: &mut dyn ChunkSink) -> Result<(), SourceError> {
        let spans = self.spans.spans().await;
        let spans = spans.map_err(|reason| SourceError::Missing { source_label: self.label(), reason })?;
        self.units.get_or_init(|| units(&spans));
        let covering = spans.covering(run.clone());
        let (Some(first), Some(last)) = (covering.first(), covering.last()) else {
            return Err(SourceError::Missing { source_label: self.label(), reason: "no such chunks".to_owned() });
        };
        let (start, end) = (first.blob.start, last.blob.end);
        let opened = self.client.blob(&self.blob, start, Some(end)).await;
        let mut body = opened.map_err(|error| self.error(error))?;
        let mut pass = SpanPass::new(covering, self.geometry, start);
        let mut wire_bytes = 0;
        while !pass.is_done() {
            let Some(bytes) = body.next().await.map_err(|error| self.error(error))? else { break };
            wire_bytes += bytes.len();
            // Inflating a piece takes well below a millisecond: not worth another thread.
            let chunks = pass.push(&bytes).map_err(|reason| self.corrupt(reason))?;
            for (chunk, plain) in chunks {
                let wire_bytes = std::mem::take(&mut wire_bytes);
                sink.chunk(chunk, &plain, wire_bytes).map_err(|error| self.corrupt(error.to_string()))?;
            }
        }
        match pass.is_done() {
            true => Ok(()),
            false => Err(self.corrupt("the blob ended inside a span".to_owned())),
        }
    }

    fn corrupt(&self, reason: String) -> SourceError {
        SourceError::Corrupt { source_label: self.label(), reason }
    }

    fn error(&self, error: RegistryError) -> SourceError {
        let (source_label, reason) = (self.label(), error.to_string());
        match error {
            RegistryError::Unreachable { .. } => SourceError::Unreachable { source_label, reason },
            RegistryError::Stalled { after, .. } => SourceError::Stalled { source_label, after },
            RegistryError::Denied { .. } | RegistryError::Credentials { .. } => {
                SourceError::Denied { source_label, reason }
            }
            RegistryError::NotFound { .. } => SourceError::Missing { source_label, reason },
            RegistryError::Busy { retry_after, .. } => SourceError::Busy { source_label, reason, retry_after },
            RegistryError::Protocol { .. } => SourceError::Corrupt { source_label, reason },
        }
    }
}

impl fmt::Debug for RegistrySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistrySource").field("blob", &self.blob).finish_non_exhaustive()
    }
}

impl Source for RegistrySource {
    fn kind(&self) -> SourceKind {
        SourceKind::Registry
    }

    fn label(&self) -> String {
        format!("registry {}", self.blob.registry)
    }

    /// The spans, or what they will be like: until they are known, reads that lie near each other share a fetch.
    fn units(&self) -> Vec<Range<u64>> {
        let size = self.geometry.device_size();
        self.units.get().cloned().unwrap_or_else(|| {
            (0..size.div_ceil(SPAN_LEN)).map(|n| n * SPAN_LEN..((n + 1) * SPAN_LEN).min(size)).collect()
        })
    }

    fn fetch<'a>(&'a self, run: Range<u32>, sink: &'a mut dyn ChunkSink) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(self.fetch_run(run, sink))
    }
}

fn units(spans: &Spans) -> Vec<Range<u64>> {
    spans.all().iter().map(|span| span.device.clone()).collect()
}

/// Inflates spans that stand one behind the other in the blob.
struct SpanPass<'a> {
    spans: std::slice::Iter<'a, Span>,
    current: Option<(&'a Span, SpanInflater)>,
    /// The byte before `at`, which the next span may begin with.
    before: Option<u8>,
    /// Offset in the blob of the next byte.
    at: u64,
    cutter: Cutter,
    is_done: bool,
}

impl<'a> SpanPass<'a> {
    fn new(spans: &'a [Span], geometry: Geometry, start: u64) -> Self {
        let device_start = spans.first().map_or(0, |span| span.device.start);
        Self {
            spans: spans.iter(),
            current: None,
            before: None,
            at: start,
            cutter: Cutter::new(geometry, device_start),
            is_done: spans.is_empty(),
        }
    }

    const fn is_done(&self) -> bool {
        self.is_done
    }

    /// Takes the next bytes of the blob and gives the chunks that became whole.
    fn push(&mut self, mut bytes: &[u8]) -> Result<Vec<(ChunkIndex, Vec<u8>)>, String> {
        let mut chunks = Vec::new();
        let mut sink = |chunk: ChunkIndex, plain: &[u8]| chunks.push((chunk, plain.to_vec()));
        while !self.is_done {
            let (span, inflater) = match &mut self.current {
                Some(current) => current,
                None => {
                    let Some(span) = self.spans.next() else {
                        self.is_done = true;
                        break;
                    };
                    let mut inflater = SpanInflater::new(span).map_err(|error| error.to_string())?;
                    // Neighbours share a byte where one ends and the other begins inside it.
                    if span.blob.start.checked_add(1) == Some(self.at)
                        && let Some(shared) = self.before
                    {
                        let cutter = &mut self.cutter;
                        inflater
                            .push(&[shared], &mut |plain| cutter.push(plain, &mut sink))
                            .map_err(|error| error.to_string())?;
                    } else if span.blob.start != self.at {
                        return Err(format!("a span begins at {}, not at {}", span.blob.start, self.at));
                    }
                    self.current.insert((span, inflater))
                }
            };
            if self.at == span.blob.end {
                if let Some((_, inflater)) = self.current.take() {
                    inflater.finish().map_err(|error| error.to_string())?;
                }
                continue;
            }
            if bytes.is_empty() {
                break;
            }
            let left = usize::try_from(span.blob.end - self.at).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at(bytes.len().min(left));
            let cutter = &mut self.cutter;
            inflater.push(now, &mut |plain| cutter.push(plain, &mut sink)).map_err(|error| error.to_string())?;
            self.at += now.len() as u64;
            self.before = now.last().copied();
            bytes = rest;
        }
        Ok(chunks)
    }
}
