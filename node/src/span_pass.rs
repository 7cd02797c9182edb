//! From a part of a blob to chunks: what every source does that has the blob itself.

use std::fmt;
use std::ops::Range;

use layer::index::{Span, Spans};
use layer::ingest::SPAN_LEN;
use layer::span::SpanInflater;
use layer::{ChunkIndex, Geometry};

use crate::cutter::Cutter;

/// The device ranges of `spans`, for [`Source::units`](crate::source::Source::units).
pub fn units(spans: &Spans) -> Vec<Range<u64>> {
    spans.all().iter().map(|span| span.device.clone()).collect()
}

/// What the units will be like while the spans are not known: so reads that lie near each other share a fetch.
pub fn likely_units(geometry: Geometry) -> Vec<Range<u64>> {
    let size = geometry.device_size();
    (0..size.div_ceil(SPAN_LEN)).map(|n| n * SPAN_LEN..((n + 1) * SPAN_LEN).min(size)).collect()
}

/// Inflates spans that stand one behind the other in the blob, and cuts what comes out into chunks.
pub struct SpanPass<'a> {
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
    /// A pass over `spans`, which are neighbours, of a device that is cut by `geometry`. The bytes that are pushed begin at offset
    /// `start` of the blob, where the first span does.
    pub fn new(spans: &'a [Span], geometry: Geometry, start: u64) -> Self {
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

    /// Whether the last span came to its end.
    pub const fn is_done(&self) -> bool {
        self.is_done
    }

    /// Takes the next bytes of the blob and gives the chunks that became whole. They are not verified.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<Vec<(ChunkIndex, Vec<u8>)>, String> {
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

impl fmt::Debug for SpanPass<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpanPass").field("at", &self.at).field("is_done", &self.is_done).finish_non_exhaustive()
    }
}
