//! From a part of a blob to chunks: what every source does that has the blob itself.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

use layer::index::{Span, Spans};
use layer::ingest::SPAN_LEN;
use layer::span::SpanInflater;
use layer::{ChunkIndex, Geometry};

use crate::cutter::Cutter;
use crate::source::ChunkSink;

/// Device bytes that are given in one go. Chosen: a few milliseconds of a thread that others wait for.
const PUSH_LEN: u64 = 1 << 20;

/// How a source's fetches lie on a device: the device ranges of its spans, once they are known.
#[derive(Debug, Default)]
pub struct Units(OnceLock<Vec<Range<u64>>>);

impl Units {
    /// Those of `spans`.
    pub fn of(spans: &Spans) -> Self {
        Self(OnceLock::from(device_ranges(spans)))
    }

    /// For [`Source::units`](crate::source::Source::units), of a device that is cut by `geometry`: the spans, or what they will be
    /// like, so that reads that lie near each other share a fetch before the spans are known.
    pub fn get(&self, geometry: Geometry) -> Vec<Range<u64>> {
        self.0.get().cloned().unwrap_or_else(|| likely_units(geometry))
    }

    /// The spans to inflate for `run`, at least one, of the `spans` that are known from here on; an error says why there shall be
    /// no fetch.
    pub fn plan<'a>(&self, spans: &'a Spans, run: Range<u32>) -> Result<&'a [Span], &'static str> {
        let was_known = self.0.get().is_some();
        self.0.get_or_init(|| device_ranges(spans));
        let covering = spans.covering(run);
        // Whoever asked went by likely units: a single zstd frame of hundreds of MiB would be fetched for each read.
        let is_surprise = covering.iter().any(|span| span.device.end - span.device.start > 8 * SPAN_LEN);
        match covering {
            [] => Err("no such chunks"),
            _ if is_surprise && !was_known => Err("its spans were not known when it was asked"),
            covering => Ok(covering),
        }
    }
}

fn device_ranges(spans: &Spans) -> Vec<Range<u64>> {
    spans.all().iter().map(|span| span.device.clone()).collect()
}

fn likely_units(geometry: Geometry) -> Vec<Range<u64>> {
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
    /// Where the last span ends in the blob.
    end: u64,
    cutter: Cutter,
    /// Bytes taken that no chunk was counted with.
    untold: usize,
    is_done: bool,
}

impl<'a> SpanPass<'a> {
    /// A pass over `spans`, which are neighbours, of a device that is cut by `geometry`. The bytes that are pushed begin where the
    /// first span does.
    pub fn new(spans: &'a [Span], geometry: Geometry) -> Self {
        let (blob_start, device_start) = spans.first().map_or((0, 0), |span| (span.blob.start, span.device.start));
        Self {
            end: spans.last().map_or(blob_start, |span| span.blob.end),
            spans: spans.iter(),
            current: None,
            before: None,
            at: blob_start,
            cutter: Cutter::new(geometry, device_start),
            untold: 0,
            is_done: spans.is_empty(),
        }
    }

    /// Whether the last span came to its end.
    pub const fn is_done(&self) -> bool {
        self.is_done
    }

    /// The bytes of the blob that are still needed.
    pub const fn blob(&self) -> Range<u64> {
        self.at..self.end
    }

    /// Takes the next bytes of the blob and gives the chunks that become whole to `sink`; an error says why the bytes cannot be
    /// right. A few bytes can inflate to any number, so other tasks get their turn now and then.
    pub async fn take(&mut self, bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<(), String> {
        self.untold += bytes.len();
        let mut rest = bytes;
        loop {
            let mut untold = std::mem::take(&mut self.untold);
            let mut wrong = None;
            let pushed = self.push(rest, &mut |chunk, plain| {
                if wrong.is_none() {
                    wrong = sink.chunk(chunk, plain, std::mem::take(&mut untold)).err();
                }
            })?;
            self.untold = untold;
            if let Some(wrong) = wrong {
                return Err(wrong.to_string());
            }
            rest = rest.get(pushed.taken..).unwrap_or_default();
            if pushed.wants_more || self.is_done {
                return Ok(());
            }
            tokio::task::yield_now().await;
        }
    }

    /// Takes some of the bytes and gives about [`PUSH_LEN`] for them.
    fn push(&mut self, bytes: &[u8], sink: &mut dyn FnMut(ChunkIndex, &[u8])) -> Result<Pushed, String> {
        let (mut taken, mut given) = (0, 0);
        while !self.is_done && given < PUSH_LEN {
            let Some((span, inflater)) = &mut self.current else {
                self.begin_span(sink)?;
                continue;
            };
            let rest = bytes.get(taken..).unwrap_or_default();
            let left = usize::try_from(span.blob.end - self.at).unwrap_or(usize::MAX);
            let now = rest.get(..left).unwrap_or(rest);
            let cutter = &mut self.cutter;
            let step = inflater.step(now, &mut |plain| {
                given += plain.len() as u64;
                cutter.push(plain, sink);
            });
            let step = step.map_err(|error| error.to_string())?;
            taken += step.taken;
            self.at += step.taken as u64;
            if let Some(last) = step.taken.checked_sub(1).and_then(|last| now.get(last)) {
                self.before = Some(*last);
            }
            // What follows the last byte that is needed can be much: the table of contents of a zstd:chunked blob.
            let is_last = inflater.is_done() && self.spans.len() == 0;
            if is_last || (step.needs_more && self.at == span.blob.end) {
                if let Some((_, inflater)) = self.current.take() {
                    inflater.finish().map_err(|error| error.to_string())?;
                }
                self.is_done = self.spans.len() == 0;
            } else if step.needs_more && taken == bytes.len() {
                return Ok(Pushed { taken, wants_more: true });
            }
        }
        Ok(Pushed { taken, wants_more: false })
    }

    fn begin_span(&mut self, sink: &mut dyn FnMut(ChunkIndex, &[u8])) -> Result<(), String> {
        let Some(span) = self.spans.next() else {
            self.is_done = true;
            return Ok(());
        };
        let mut inflater = SpanInflater::new(span).map_err(|error| error.to_string())?;
        // Neighbours share a byte where one ends and the other begins inside it.
        if span.blob.start.checked_add(1) == Some(self.at)
            && let Some(shared) = self.before
        {
            let cutter = &mut self.cutter;
            let pushed = inflater.push(&[shared], &mut |plain| cutter.push(plain, sink));
            pushed.map_err(|error| error.to_string())?;
        } else if span.blob.start != self.at {
            return Err(format!("a span begins at {}, not at {}", span.blob.start, self.at));
        }
        self.current = Some((span, inflater));
        Ok(())
    }
}

/// What [`SpanPass::push`] did.
struct Pushed {
    taken: usize,
    /// All was taken, and nothing more comes of it.
    wants_more: bool,
}

impl fmt::Debug for SpanPass<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpanPass").field("at", &self.at).field("is_done", &self.is_done).finish_non_exhaustive()
    }
}
