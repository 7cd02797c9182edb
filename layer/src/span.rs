//! Inflating one span of a blob by itself: random access for whoever has the blob.

use crate::index::{Checkpoint, Span};
use crate::inflate::{GzipReader, Stop};

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
}

impl SpanInflater {
    /// An inflater at the start of `span`.
    pub fn new(span: &Span) -> Result<Self, InflateError> {
        let offset = span.blob.start;
        let decoder = match &span.checkpoint {
            Checkpoint::Plain => Decoder::Plain { blob_offset: offset },
            Checkpoint::MemberStart => Decoder::Gzip(Box::new(GzipReader::at_member(offset))),
            Checkpoint::Deflate { bits, window } => {
                let window = window.unpack().map_err(|_| InflateError::Checkpoint { offset })?;
                Decoder::Gzip(Box::new(GzipReader::at_block(offset, *bits, &window)))
            }
        };
        let device_len = span.device.end.saturating_sub(span.device.start);
        let output = match decoder {
            Decoder::Plain { .. } => Vec::new(),
            Decoder::Gzip(_) => vec![0; OUTPUT_LEN],
        };
        Ok(Self { decoder, remaining: device_len, device_len, output })
    }

    /// Takes the next bytes of the span's blob range; those behind the last that is needed are ignored.
    pub fn push(&mut self, blob: &[u8], out: &mut dyn FnMut(&[u8])) -> Result<(), InflateError> {
        match &mut self.decoder {
            Decoder::Plain { blob_offset } => {
                let take = blob.len().min(usize::try_from(self.remaining).unwrap_or(usize::MAX));
                blob.get(..take).unwrap_or_default().chunks(OUTPUT_LEN).for_each(out);
                self.remaining -= take as u64;
                *blob_offset += take as u64;
            }
            Decoder::Gzip(reader) => {
                let mut rest = blob;
                while self.remaining > 0 {
                    let len = self.output.len().min(usize::try_from(self.remaining).unwrap_or(usize::MAX));
                    let room = self.output.get_mut(..len).unwrap_or_default();
                    let read = reader.read(rest, room, false)?;
                    rest = rest.get(read.consumed..).unwrap_or_default();
                    if read.produced > 0 {
                        self.remaining -= read.produced as u64;
                        out(self.output.get(..read.produced).unwrap_or_default());
                    }
                    if read.stop == Stop::Input {
                        break;
                    }
                }
            }
        }
        Ok(())
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
        };
        Err(InflateError::CutOff { offset, device: self.device_read() })
    }
}
