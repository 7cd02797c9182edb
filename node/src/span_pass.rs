//! From a part of a blob to chunks: what every source does that has the blob itself.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

use layer::index::{Checkpoint, Span, Spans};
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

    /// What to fetch for `run` of the `spans`, which are known from here on; an error says why there shall be no fetch.
    pub fn plan<'a>(&self, spans: &'a Spans, geometry: Geometry, run: Range<u32>) -> Result<Plan<'a>, &'static str> {
        let was_known = self.0.get().is_some();
        self.0.get_or_init(|| device_ranges(spans));
        let plan = Plan::new(spans.all(), geometry, run).ok_or("no such chunks")?;
        // Whoever asked went by likely units: a single zstd frame of hundreds of MiB would be fetched for each read.
        let is_surprise = plan.whole().iter().any(|span| span.device.end - span.device.start > 8 * SPAN_LEN);
        match is_surprise && !was_known {
            true => Err("its spans were not known when it was asked"),
            false => Ok(plan),
        }
    }
}

/// What a fetch takes: the spans in which its chunks begin, whole, and of those behind them what the last chunk that begins in
/// these still needs. So a chunk across two spans costs a span only where it begins.
#[derive(Debug)]
pub struct Plan<'a> {
    geometry: Geometry,
    spans: &'a [Span],
    /// How many of the spans are taken whole.
    whole: usize,
    /// Device offset where the last chunk ends.
    stop: u64,
}

impl<'a> Plan<'a> {
    /// For `run` of a device that is cut by `geometry` and that `spans` make up; `None`: it has no such chunks.
    pub fn new(spans: &'a [Span], geometry: Geometry, run: Range<u32>) -> Option<Self> {
        let last = run.end.min(geometry.chunk_count()).checked_sub(1).filter(|last| *last >= run.start)?;
        let (start, last) = (geometry.range(ChunkIndex(run.start)).start, geometry.range(ChunkIndex(last)).start);
        let from = spans.partition_point(|span| span.device.end <= start);
        let whole = spans.partition_point(|span| span.device.start <= last);
        let whole_end = spans.get(whole.checked_sub(1)?)?.device.end;
        let stop = whole_end.checked_next_multiple_of(geometry.chunk_size())?.min(geometry.device_size());
        let to = spans.partition_point(|span| span.device.start < stop);
        let spans = spans.get(from..to).filter(|spans| !spans.is_empty())?;
        Some(Self { geometry, spans, whole: whole.checked_sub(from)?, stop })
    }

    fn whole(&self) -> &'a [Span] {
        self.spans.get(..self.whole).unwrap_or_default()
    }

    /// Where the bytes of the blob probably end that are needed.
    fn likely_end(&self) -> u64 {
        let Some(last) = self.spans.last() else { return 0 };
        if self.spans.len() == self.whole {
            return last.blob.end;
        }
        // No encoder makes data longer by more, except on purpose; a zstd block is inflated whole.
        let slack = match last.checkpoint {
            Checkpoint::Plain => 0,
            Checkpoint::MemberStart | Checkpoint::Deflate { .. } => 4 << 10,
            Checkpoint::FrameStart => 132 << 10,
        };
        let needed = self.stop.saturating_sub(last.device.start).saturating_add(slack);
        last.blob.start.saturating_add(needed).min(last.blob.end)
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
    /// Where the bytes that are needed probably end in the blob, and where they end at the latest.
    likely_end: u64,
    end: u64,
    /// Device offset behind which nothing is needed, where that is inside the last span.
    stop: Option<u64>,
    cutter: Cutter,
    /// Bytes taken that no chunk was counted with.
    untold: usize,
    is_done: bool,
}

impl<'a> SpanPass<'a> {
    /// A pass over what `plan` says. The bytes that are pushed begin where its first span does.
    pub fn new(plan: &Plan<'a>) -> Self {
        let spans = plan.spans;
        let (blob_start, device_start) = spans.first().map_or((0, 0), |span| (span.blob.start, span.device.start));
        Self {
            likely_end: plan.likely_end(),
            end: spans.last().map_or(blob_start, |span| span.blob.end),
            stop: (spans.len() > plan.whole).then_some(plan.stop),
            spans: spans.iter(),
            current: None,
            before: None,
            at: blob_start,
            cutter: Cutter::new(plan.geometry, device_start),
            untold: 0,
            is_done: spans.is_empty(),
        }
    }

    /// Whether all that was planned was given.
    pub const fn is_done(&self) -> bool {
        self.is_done
    }

    /// The bytes of the blob to ask for next. There may be more to ask for when they are taken.
    pub const fn blob(&self) -> Range<u64> {
        self.at..if self.at < self.likely_end { self.likely_end } else { self.end }
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
            if self.stop.is_some_and(|stop| self.cutter.at() >= stop) {
                self.is_done = true;
                break;
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Spans of a blob that is not compressed, with a header of 100 bytes.
    fn spans(ends: &[u64]) -> Vec<Span> {
        let starts = std::iter::once(0).chain(ends.iter().copied());
        let device = starts.zip(ends).map(|(start, end)| start..*end);
        let span = |device: Range<u64>| Span {
            blob: device.start + 100..device.end + 100,
            device,
            checkpoint: Checkpoint::Plain,
        };
        device.map(span).collect()
    }

    struct Given(Vec<u32>);

    impl ChunkSink for Given {
        fn chunk(&mut self, chunk: ChunkIndex, plain: &[u8], _: usize) -> Result<(), crate::source::WrongChunk> {
            assert!(plain.iter().all(|byte| u32::from(*byte) == chunk.0), "{chunk}");
            self.0.push(chunk.0);
            Ok(())
        }
    }

    /// What a fetch of `run` takes of the blob, and gives.
    async fn fetched(spans: &[Span], geometry: Geometry, run: Range<u32>) -> (Vec<Range<u64>>, Vec<u32>) {
        let (mut asked, mut given) = (Vec::new(), Given(Vec::new()));
        let mut pass = SpanPass::new(&Plan::new(spans, geometry, run).unwrap());
        while !pass.is_done() {
            let blob = pass.blob();
            let bytes: Vec<u8> = blob.clone().map(|at| ((at - 100) / geometry.chunk_size()) as u8).collect();
            asked.push(blob);
            pass.take(&bytes, &mut given).await.unwrap();
        }
        (asked, given.0)
    }

    #[tokio::test]
    async fn a_chunk_across_spans_costs_the_one_where_it_begins() {
        let geometry = Geometry::new(10 * 4096 + 100, 12).unwrap();
        let spans = spans(&[10_000, 30_000, 32_700, 41_060]);
        let whole = fetched(&spans, geometry, geometry.chunks()).await;
        assert_eq!(whole, (vec![100..41_160; 1], geometry.chunks().collect()));
        // Chunk 2 ends at 12288, in the second span.
        assert_eq!(fetched(&spans, geometry, 1..2).await, (vec![100..12_388; 1], vec![0, 1, 2]));
        assert_eq!(fetched(&spans, geometry, 2..3).await, (vec![100..12_388; 1], vec![0, 1, 2]));
        // Chunk 7 ends at 32768, in the last span.
        assert_eq!(fetched(&spans, geometry, 3..4).await, (vec![10_100..32_868; 1], (3..8).collect()));
        // No chunk begins in the third span.
        assert_eq!(fetched(&spans, geometry, 8..9).await, (vec![32_800..41_160; 1], vec![8, 9, 10]));
        assert!(Plan::new(&spans, geometry, 3..3).is_none() && Plan::new(&spans, geometry, 11..12).is_none());
    }

    #[tokio::test]
    async fn what_is_longer_than_likely_is_asked_for_again() {
        let geometry = Geometry::new(8192, 12).unwrap();
        let mut spans = spans(&[4000, 8192]);
        // It is told to hold less than it takes.
        for span in &mut spans {
            span.blob.end += 50;
        }
        spans[1].blob.start += 50;
        let plan = Plan::new(&spans, geometry, 0..1).unwrap();
        assert_eq!(plan.likely_end(), spans[1].blob.start + 96);
        let mut pass = SpanPass::new(&plan);
        pass.at = plan.likely_end();
        assert_eq!(pass.blob(), plan.likely_end()..spans[1].blob.end);
    }
}
