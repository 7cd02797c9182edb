//! Inflating one span of a blob by itself: random access for whoever has the blob.

use crate::index::{Checkpoint, Span};
use crate::inflate::{GzipReader, Stop, ZstdReader};

pub use crate::inflate::InflateError;

/// Bytes that a sink gets at a time, at most.
const OUTPUT_LEN: usize = 128 << 10;

/// Gives exactly the device bytes of `span` to `out`, in order and in pieces of at most 128 KiB; `blob` holds the bytes of
/// [`Span::blob`]. They are not verified: compare the chunks' digests.
pub fn inflate(span: &Span, blob: &[u8], out: &mut dyn FnMut(&[u8])) -> Result<(), InflateError> {
    let mut inflater = SpanInflater::new(span)?;
    inflater.push(blob, out)?;
    inflater.finish()
}

/// Inflates a span whose blob bytes come in pieces. Gives never more than the span's device bytes, whatever the blob says.
#[derive(Debug)]
pub struct SpanInflater {
    decoder: Decoder,
    /// Device bytes still to give.
    remaining: u64,
    device_len: u64,
    output: Vec<u8>,
}

#[derive(Debug)]
enum Decoder {
    Plain { blob_offset: u64 },
    Gzip(Box<GzipReader>),
    Zstd(Box<ZstdReader>),
}

/// What [`SpanInflater::step`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// How many of the bytes were taken.
    pub taken: usize,
    /// All were taken, and nothing more comes of them.
    pub needs_more: bool,
}

impl SpanInflater {
    /// An inflater at the start of `span`.
    pub fn new(span: &Span) -> Result<Self, InflateError> {
        let offset = span.blob.start;
        let decoder = match &span.checkpoint {
            Checkpoint::Plain => Decoder::Plain { blob_offset: offset },
            Checkpoint::FrameStart => Decoder::Zstd(Box::new(ZstdReader::at_frame(offset))),
            Checkpoint::MemberStart => Decoder::Gzip(Box::new(GzipReader::at_member(offset))),
            Checkpoint::Deflate { bits, window } => {
                let window = window.unpack().map_err(|_| InflateError::Checkpoint { offset })?;
                Decoder::Gzip(Box::new(GzipReader::at_block(offset, *bits, &window)))
            }
        };
        let device_len = span.device.end.saturating_sub(span.device.start);
        let output = match decoder {
            Decoder::Plain { .. } => Vec::new(),
            Decoder::Gzip(_) | Decoder::Zstd(_) => vec![0; OUTPUT_LEN],
        };
        Ok(Self { decoder, remaining: device_len, device_len, output })
    }

    /// Takes the next bytes of the span's blob range; those behind the last that is needed are ignored.
    pub fn push(&mut self, blob: &[u8], out: &mut dyn FnMut(&[u8])) -> Result<(), InflateError> {
        let mut rest = blob;
        loop {
            let step = self.step(rest, out)?;
            rest = rest.get(step.taken..).unwrap_or_default();
            if step.needs_more {
                return Ok(());
            }
        }
    }

    /// The same in small steps, for who must not be held up: a few bytes can inflate to any number. Takes some of the bytes and
    /// gives at most 128 KiB for them.
    pub fn step(&mut self, blob: &[u8], out: &mut dyn FnMut(&[u8])) -> Result<Step, InflateError> {
        let len = OUTPUT_LEN.min(usize::try_from(self.remaining).unwrap_or(OUTPUT_LEN));
        if len == 0 {
            return Ok(Step { taken: blob.len(), needs_more: true });
        }
        let room = self.output.get_mut(..len).unwrap_or_default();
        let read = match &mut self.decoder {
            Decoder::Plain { blob_offset } => {
                let bytes = blob.get(..len).unwrap_or(blob);
                *blob_offset += bytes.len() as u64;
                self.remaining -= bytes.len() as u64;
                if !bytes.is_empty() {
                    out(bytes);
                }
                return Ok(Step { taken: bytes.len(), needs_more: bytes.len() == blob.len() });
            }
            Decoder::Gzip(reader) => reader.read(blob, room, false)?,
            Decoder::Zstd(reader) => reader.read(blob, room)?,
        };
        if read.produced > 0 {
            self.remaining -= read.produced as u64;
            out(self.output.get(..read.produced).unwrap_or_default());
        }
        Ok(Step { taken: read.consumed, needs_more: read.stop == Stop::Input })
    }

    /// Device bytes given so far.
    pub const fn device_read(&self) -> u64 {
        self.device_len - self.remaining
    }

    /// Whether all device bytes were given: no more blob bytes are needed.
    pub const fn is_done(&self) -> bool {
        self.remaining == 0
    }

    /// At the end of the blob range: whether all device bytes were given.
    pub fn finish(self) -> Result<(), InflateError> {
        if self.is_done() {
            return Ok(());
        }
        let offset = match &self.decoder {
            Decoder::Plain { blob_offset } => *blob_offset,
            Decoder::Gzip(reader) => reader.blob_offset(),
            Decoder::Zstd(reader) => reader.blob_offset(),
        };
        Err(InflateError::CutOff { offset, device: self.device_read() })
    }
}
