//! One streamed pass over a blob: proves its digest and finds everything that an index holds.
//!
//! Memory is bounded apart from what becomes the index (entries, chunk digests, packed windows): one buffer of a few chunks
//! and the decoder's state. The index depends on the blob alone, never on how it was cut into pushes.

mod device;

use sha2::{Digest as _, Sha256};

use self::device::Device;
use crate::chunk::{CHUNK_LOG2, ChunkDigest, ChunkIndex, Geometry, GeometryError};
use crate::digest::Digest;
use crate::index::{
    Compression, Header, HeaderError, HeaderFacts, Index, SPAN_BLOB_MAX, SPAN_DEVICE_MAX, SectionFacts, SpansEncoder,
    Start as EncodedStart, WINDOW_MAX, encode_entries,
};
pub use crate::inflate::ZSTD_WINDOW_MAX;
use crate::inflate::{GzipReader, InflateError, Stop, WindowProbe, ZstdReader};
use crate::tar::{self, TarError};
use crate::tree::DEVICE_SIZE_MAX;

/// Default of [`Options::span_len`]: read latency against index size. Measured: 4 MiB inflate in 6 to 8 ms.
pub const SPAN_LEN: u64 = 4 << 20;

/// Bytes that decide a blob's compression.
const MAGIC_LEN: usize = 4;

/// Takes the chunks of a device as they come: number, plain bytes, digest.
pub type ChunkFn<'a> = dyn FnMut(ChunkIndex, &[u8], ChunkDigest) + 'a;

/// How to ingest.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// log2 of the chunk size; within [`CHUNK_LOG2_RANGE`](crate::chunk::CHUNK_LOG2_RANGE).
    pub chunk_log2: u8,
    /// Device bytes after which a span ends at the next deflate block. It ends at the next gzip member or zstd frame after half
    /// of it: such a checkpoint costs nothing, but an eStargz or zstd:chunked blob has one for each file. At least 2.
    pub span_len: u64,
    /// Largest device to accept, in bytes: the bound for a blob that inflates without end.
    pub device_size_max: u64,
    /// Bounds of the entries.
    pub limits: tar::Limits,
}

impl Default for Options {
    /// 128 KiB chunks, spans of 4 MiB, and the largest layer that can be mounted. Indexes of one blob are only equal if they
    /// were made with the same options, so everybody uses these; others are for tests.
    fn default() -> Self {
        Self {
            chunk_log2: CHUNK_LOG2,
            span_len: SPAN_LEN,
            device_size_max: DEVICE_SIZE_MAX,
            limits: tar::Limits::default(),
        }
    }
}

/// Why a blob gives no index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IngestError {
    /// The bytes are not the blob: whoever sent them is to blame, another place may have it.
    #[error("the bytes received as blob {want} have the digest {got}")]
    WrongBlob {
        /// What was asked for.
        want: Digest,
        /// What came.
        got: Digest,
    },
    /// As [`IngestError::WrongBlob`], seen by the length.
    #[error("blob {blob} has {want} bytes, {got} or more were received")]
    WrongSize {
        /// What was asked for.
        blob: Digest,
        /// Bytes that it has.
        want: u64,
        /// Bytes that came.
        got: u64,
    },
    /// The blob is proven and does not inflate: no unpacker takes it.
    #[error("blob {blob}: {source}")]
    Inflate {
        /// Which blob.
        blob: Digest,
        /// What is wrong.
        source: InflateError,
    },
    /// The blob is proven and its tar is broken: no unpacker takes it.
    #[error("blob {blob}: {source}")]
    Tar {
        /// Which blob.
        blob: Digest,
        /// What is wrong.
        source: TarError,
    },
    /// The blob is proven, but cannot be mounted lazily: unpack it as an ordinary layer.
    #[error("blob {blob} cannot be mounted lazily: {reason}")]
    Unsupported {
        /// Which blob.
        blob: Digest,
        /// Why.
        reason: String,
    },
}

/// An ingest in progress.
#[derive(Debug)]
pub struct Ingest {
    blob: Digest,
    blob_size: Option<u64>,
    blob_hash: Sha256,
    blob_read: u64,
    options: Options,
    decoder: Decoder,
    device: Device,
    spans: SpanStarts,
    /// The largest window that a zstd frame may have, in bytes, without asking.
    window_allowed: u64,
    held: Option<Held>,
    failure: Option<IngestError>,
}

/// What waits in front of a zstd frame whose window was not allowed yet.
#[derive(Debug)]
struct Held {
    /// Bytes of the window.
    window: u64,
    /// The blob's bytes behind the frame's header that were pushed.
    bytes: Vec<u8>,
}

#[derive(Debug)]
enum Decoder {
    /// Waiting for the first bytes, of which these are some.
    Detecting(Vec<u8>),
    Plain,
    Gzip(Box<GzipReader>),
    Zstd(Box<ZstdReader>),
    /// The content failed: the rest of the blob is only hashed.
    Stopped,
}

impl Ingest {
    /// An ingest of `blob`, whose size is checked too where it is known. `compression` is what the media type settles
    /// ([`Compression::of_media_type`]); `None` goes by the first bytes, as containerd does.
    pub fn new(
        blob: Digest,
        blob_size: Option<u64>,
        compression: Option<Compression>,
        options: Options,
    ) -> Result<Self, GeometryError> {
        let geometry = Geometry::new(0, options.chunk_log2)?;
        let mut ingest = Self {
            blob,
            blob_size,
            blob_hash: Sha256::new(),
            blob_read: 0,
            options,
            decoder: Decoder::Detecting(Vec::new()),
            device: Device::new(geometry.chunk_size() as usize, options.limits),
            spans: SpanStarts::new(options.span_len),
            window_allowed: ZSTD_WINDOW_MAX,
            held: None,
            failure: None,
        };
        if let Some(compression) = compression {
            ingest.start(compression);
        }
        Ok(ingest)
    }

    /// Lets zstd frames have windows of at most `bytes` without asking; all that are supported ([`ZSTD_WINDOW_MAX`]) unless this was
    /// called. The window is most of the memory of an ingest, and who runs several may want to share it out.
    pub fn limit_window(&mut self, bytes: u64) {
        self.window_allowed = bytes;
        if let Decoder::Zstd(reader) = &mut self.decoder {
            reader.allow_window(bytes);
        }
    }

    /// The window that the next zstd frame needs, in bytes, where it is more than was allowed. Until
    /// [`Ingest::allow_window`] is called nothing more comes out of the blob, and what is pushed is held in memory.
    pub fn window_wanted(&self) -> Option<u64> {
        self.held.as_ref().map(|held| held.window)
    }

    /// Lets zstd frames have windows of `bytes` from here on, and goes on with what was held.
    pub fn allow_window(&mut self, bytes: u64, sink: &mut ChunkFn<'_>) {
        self.limit_window(bytes);
        if let Some(held) = self.held.take() {
            self.decode(&held.bytes, sink);
        }
    }

    /// Takes the next bytes of the blob, any number, and gives each chunk that becomes whole to `sink`. The only error is
    /// that more bytes came than the blob has. Broken or unsupported content is told by [`Ingest::finish`], after the blob's
    /// digest, since wrong bytes look like broken content; who does not want to wait asks [`Ingest::failure`].
    pub fn push(&mut self, blob_bytes: &[u8], sink: &mut ChunkFn<'_>) -> Result<(), IngestError> {
        let got = self.blob_read + blob_bytes.len() as u64;
        if let Some(want) = self.blob_size.filter(|want| got > *want) {
            return Err(IngestError::WrongSize { blob: self.blob, want, got });
        }
        self.blob_read = got;
        self.blob_hash.update(blob_bytes);
        if let Decoder::Detecting(first) = &mut self.decoder {
            first.extend_from_slice(blob_bytes);
            if first.len() >= MAGIC_LEN {
                self.detected(sink);
            }
        } else if let Some(held) = &mut self.held {
            held.bytes.extend_from_slice(blob_bytes);
        } else {
            self.decode(blob_bytes, sink);
        }
        Ok(())
    }

    /// The blob has ended: gives the last chunk to `sink`, and the index.
    pub fn finish(mut self, sink: &mut ChunkFn<'_>) -> Result<Index, IngestError> {
        let blob = self.blob;
        if matches!(self.decoder, Decoder::Detecting(_)) {
            self.detected(sink);
        }
        if self.held.is_some() {
            self.allow_window(ZSTD_WINDOW_MAX, sink);
        }
        let got = Digest::from_bytes(std::mem::take(&mut self.blob_hash).finalize().into());
        if let Some(want) = self.blob_size.filter(|want| self.blob_read != *want) {
            return Err(IngestError::WrongSize { blob, want, got: self.blob_read });
        }
        if got != blob {
            return Err(IngestError::WrongBlob { want: blob, got });
        }
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let (compression, may_end) = match &self.decoder {
            Decoder::Gzip(reader) => (Compression::Gzip, reader.may_end()),
            Decoder::Zstd(reader) => (Compression::Zstd, reader.may_end()),
            Decoder::Plain | Decoder::Detecting(_) | Decoder::Stopped => (Compression::None, true),
        };
        if !may_end {
            let source = InflateError::CutOff { offset: self.blob_read, device: self.device.len() };
            return Err(IngestError::Inflate { blob, source });
        }
        let blob_size = self.blob_read;
        let unsupported = |reason: String| IngestError::Unsupported { blob, reason };
        let parts = self.device.finish(sink);
        if compression == Compression::None {
            self.spans.cut_plain(parts.size);
        }
        let (spans, span_count) =
            self.spans.finish(blob_size, parts.size).map_err(|reason| unsupported(reason.into()))?;
        let tree = parts.tree.map_err(|error| match error {
            TarError::Unsupported(reason) => unsupported(reason),
            source @ TarError::Broken { .. } => IngestError::Tar { blob, source },
        })?;
        let entries = encode_entries(&tree).ok_or_else(|| unsupported("its entries are too large".into()))?;
        let section =
            |bytes: &[u8], plain_size| SectionFacts { size: bytes.len() as u64, plain_size, digest: Digest::of(bytes) };
        let facts = HeaderFacts {
            blob,
            diff_id: parts.diff_id,
            blob_size,
            device_size: parts.size,
            chunk_log2: self.options.chunk_log2,
            compression,
            has_implicit_directories: tree.has_implicit_directories(),
            has_whiteouts: tree.has_whiteouts(),
            entry_count: tree.entries().len() as u32,
            span_count,
            sections: [
                section(&entries.packed, entries.plain_size),
                section(&parts.chunk_digests, parts.chunk_digests.len() as u64),
                section(&spans, spans.len() as u64),
            ],
        };
        let header = Header::checked(facts).map_err(|error: HeaderError| unsupported(error.to_string()))?;
        Ok(Index { header, entries: entries.packed, chunk_digests: parts.chunk_digests, spans })
    }

    /// Bytes of the blob taken so far.
    pub const fn blob_read(&self) -> u64 {
        self.blob_read
    }

    /// Bytes of the device that came of them.
    pub const fn device_read(&self) -> u64 {
        self.device.len()
    }

    /// What [`Ingest::finish`] will say if the bytes turn out to be the blob: its content is broken or unsupported. No more
    /// chunks come once this is an inflate error or a size limit.
    pub fn failure(&self) -> Option<IngestError> {
        self.failure.clone().or_else(|| {
            let blob = self.blob;
            self.device.tar_error().map(|error| match error.clone() {
                TarError::Unsupported(reason) => IngestError::Unsupported { blob, reason },
                source @ TarError::Broken { .. } => IngestError::Tar { blob, source },
            })
        })
    }

    fn detected(&mut self, sink: &mut ChunkFn<'_>) {
        if let Decoder::Detecting(first) = &mut self.decoder {
            let first = std::mem::take(first);
            self.start(Compression::detect(&first));
            self.decode(&first, sink);
        }
    }

    fn start(&mut self, compression: Compression) {
        self.decoder = match compression {
            Compression::None => Decoder::Plain,
            Compression::Gzip => {
                self.spans.begin(EncodedStart::Member);
                Decoder::Gzip(Box::new(GzipReader::at_member(0)))
            }
            Compression::Zstd => {
                self.spans.begin(EncodedStart::Frame);
                let mut reader = ZstdReader::at_frame(0);
                reader.allow_window(self.window_allowed);
                Decoder::Zstd(Box::new(reader))
            }
        };
    }

    fn decode(&mut self, input: &[u8], sink: &mut ChunkFn<'_>) {
        match &mut self.decoder {
            Decoder::Plain => {
                let mut rest = input;
                while !rest.is_empty() {
                    let room = self.device.room();
                    let take = room.len().min(rest.len());
                    let (head, tail) = rest.split_at(take);
                    if let Some(room) = room.get_mut(..take) {
                        room.copy_from_slice(head);
                    }
                    rest = tail;
                    self.device.filled(take, sink);
                }
            }
            Decoder::Gzip(reader) => {
                if let Err(source) = inflate(reader, input, &mut self.device, &mut self.spans, sink, &self.options) {
                    self.failure = Some(IngestError::Inflate { blob: self.blob, source });
                }
            }
            Decoder::Zstd(reader) => {
                match decode_frames(reader, input, &mut self.device, &mut self.spans, sink, &self.options) {
                    Ok(held) => self.held = held,
                    Err(error @ InflateError::Window { .. }) => self.fail_unsupported(&error.to_string()),
                    Err(source) => self.failure = Some(IngestError::Inflate { blob: self.blob, source }),
                }
            }
            Decoder::Detecting(_) | Decoder::Stopped => return,
        }
        if self.device.len() > self.options.device_size_max {
            let max = self.options.device_size_max;
            self.fail_unsupported(&format!("uncompressed it has more than {max} bytes"));
        }
        if self.failure.is_some() {
            self.decoder = Decoder::Stopped;
        }
    }

    fn fail_unsupported(&mut self, reason: &str) {
        self.failure = Some(IngestError::Unsupported { blob: self.blob, reason: reason.to_owned() });
    }
}

/// Inflates all of `input` into the device and finds where spans can start.
///
/// Where block boundaries are looked for must not depend on how the input is cut. So the decoder runs without stopping up to
/// one byte in front of the first output that a span may end at, and from there stops at each boundary.
fn inflate(
    reader: &mut GzipReader,
    mut input: &[u8],
    device: &mut Device,
    spans: &mut SpanStarts,
    sink: &mut ChunkFn<'_>,
    options: &Options,
) -> Result<(), InflateError> {
    while device.len() <= options.device_size_max {
        let free_run = spans.free_run(device.len());
        let room = device.room();
        let room_len =
            if free_run == 0 { room.len() } else { room.len().min(usize::try_from(free_run).unwrap_or(usize::MAX)) };
        let room = room.get_mut(..room_len).unwrap_or_default();
        let read = reader.read(input, room, free_run == 0)?;
        let (consumed, rest) = input.split_at_checked(read.consumed).unwrap_or((input, &[]));
        input = rest;
        spans.consumed(consumed);
        device.filled(read.produced, sink);
        spans.reached(device.len());
        match read.stop {
            Stop::Input => return Ok(()),
            Stop::Output | Stop::Window { .. } => {}
            Stop::End => spans.boundary(Place { blob: reader.blob_offset(), device: device.len() }),
            Stop::Block { blob_offset, bits, first } => {
                let window_len = reader.member_len().min(WINDOW_MAX as u64) as usize;
                let place = Place { blob: blob_offset, device: device.len() };
                spans.block(place, bits, first, device.last(window_len));
            }
        }
    }
    Ok(())
}

/// Decodes `input` into the device, all of it unless a frame wants a larger window than was allowed. Spans start at frames only,
/// which the decoder stops at by itself.
fn decode_frames(
    reader: &mut ZstdReader,
    mut input: &[u8],
    device: &mut Device,
    spans: &mut SpanStarts,
    sink: &mut ChunkFn<'_>,
    options: &Options,
) -> Result<Option<Held>, InflateError> {
    while device.len() <= options.device_size_max {
        let read = reader.read(input, device.room())?;
        input = input.get(read.consumed..).unwrap_or_default();
        device.filled(read.produced, sink);
        spans.reached(device.len());
        match read.stop {
            Stop::Input => return Ok(None),
            Stop::Window { bytes: window } => return Ok(Some(Held { window, bytes: input.to_vec() })),
            Stop::End => spans.boundary(Place { blob: reader.blob_offset(), device: device.len() }),
            Stop::Output | Stop::Block { .. } => {}
        }
    }
    Ok(None)
}

/// Chooses among the places where a span can start.
struct SpanStarts {
    encoder: SpansEncoder,
    span_len: u64,
    /// What a span begins with that needs no window: a gzip member or a zstd frame.
    free: EncodedStart<'static>,
    /// Where the newest span starts.
    last: Option<Place>,
    /// A start that counts once output follows it, so that no span is empty.
    candidate: Option<Start>,
    /// The newest span's start, not encoded yet: which part of its window it needs is known at its end.
    newest: Option<Start>,
    /// A probe to use again.
    idle_probe: Option<Box<WindowProbe>>,
    /// A span is beyond what an index may hold.
    oversized: bool,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    blob: u64,
    device: u64,
}

struct Start {
    place: Place,
    /// Bits and window of a block; none at the start of a member or frame.
    block: Option<(u8, Box<WindowProbe>)>,
}

impl SpanStarts {
    fn new(span_len: u64) -> Self {
        Self {
            encoder: SpansEncoder::new(),
            span_len: span_len.max(2),
            free: EncodedStart::Member,
            last: None,
            candidate: None,
            newest: None,
            idle_probe: None,
            oversized: false,
        }
    }

    /// The blob begins with a member or a frame.
    fn begin(&mut self, free: EncodedStart<'static>) {
        self.free = free;
        self.candidate = Some(Start { place: Place { blob: 0, device: 0 }, block: None });
    }

    /// How much output may come in one go before block boundaries matter; 0: they matter now. Members always do.
    fn free_run(&self, device: u64) -> u64 {
        let newest = self.candidate.as_ref().map(|candidate| candidate.place).or(self.last);
        newest.map_or(0, |newest| (newest.device + self.span_len - 1).saturating_sub(device))
    }

    /// A member or frame could start at `place`, and a span with it. The last one in front of the same byte of the device wins,
    /// also against blocks: it needs no window and leaves the fewest blob bytes to the span.
    fn boundary(&mut self, place: Place) {
        // The first span starts at the blob's start, also where empty members or skippable frames come first.
        if self.last.is_some_and(|last| place.device - last.device >= self.span_len / 2) {
            self.replace_candidate(Start { place, block: None });
        }
    }

    /// A block starts at `place`. The first one in front of the same byte of the device wins: following windows through a
    /// million empty blocks would cost too much.
    fn block(&mut self, place: Place, bits: u8, first: u8, window: &[u8]) {
        if self.candidate.is_none() && self.last.is_some_and(|last| place.device - last.device >= self.span_len) {
            let mut probe = self.idle_probe.take().unwrap_or_else(|| Box::new(WindowProbe::new()));
            probe.start(bits, first, window);
            self.replace_candidate(Start { place, block: Some((bits, probe)) });
        }
    }

    /// The decoder has consumed more bytes of the blob.
    fn consumed(&mut self, input: &[u8]) {
        for start in [&mut self.candidate, &mut self.newest] {
            if let Some(Start { block: Some((_, probe)), .. }) = start {
                probe.push(input);
            }
        }
    }

    /// The device has reached a length: a candidate that has output behind it becomes a span.
    fn reached(&mut self, device: u64) {
        if let Some(start) = self.candidate.take_if(|candidate| candidate.place.device < device) {
            self.encode_newest(start.place);
            self.last = Some(start.place);
            self.newest = Some(start);
        }
    }

    /// Records the newest span, now that its end is known. The decoder has given all output up to there, and so has the probe,
    /// whatever more it was given.
    fn encode_newest(&mut self, end: Place) {
        let Some(Start { place, block }) = self.newest.take() else { return };
        let device_len = end.device - place.device;
        // One more for the byte that two spans share.
        let is_large = end.blob - place.blob + 1 > SPAN_BLOB_MAX || device_len > SPAN_DEVICE_MAX;
        self.oversized |= is_large && self.free != EncodedStart::Frame;
        match block {
            None => self.encoder.push(place.blob, place.device, self.free),
            Some((bits, probe)) => {
                let window = probe.sparse_window(device_len);
                self.encoder.push(place.blob, place.device, EncodedStart::Deflate { bits, window: &window });
                self.idle_probe = Some(probe);
            }
        }
    }

    fn replace_candidate(&mut self, start: Start) {
        if let Some(Start { block: Some((_, probe)), .. }) = self.candidate.replace(start) {
            self.idle_probe = Some(probe);
        }
    }

    /// Cuts a blob that is its own device.
    fn cut_plain(&mut self, size: u64) {
        let mut start = 0;
        while start < size {
            self.encoder.push(start, start, EncodedStart::Plain);
            start += self.span_len;
        }
    }

    /// The encoded section and its number of spans.
    fn finish(mut self, blob_size: u64, device_size: u64) -> Result<(Vec<u8>, u32), &'static str> {
        self.encode_newest(Place { blob: blob_size, device: device_size });
        if self.oversized {
            return Err("its compressed blocks are too large for random access");
        }
        Ok(self.encoder.finish())
    }
}

impl std::fmt::Debug for SpanStarts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpanStarts").field("last", &self.last).finish_non_exhaustive()
    }
}
