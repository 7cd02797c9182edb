//! The spans section: from where, and with what window, each piece of the blob can be inflated by itself.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::cursor::{Cursor, CutOff};
use super::{Compression, Header, IndexError, Section, check_section};
use crate::chunk::Geometry;

/// Bytes of deflate's window (RFC 1951, 2: distances up to 32 768).
pub const WINDOW_MAX: usize = 1 << 15;

/// Most device bytes of one span, but of a zstd blob's: most of them are one frame, and so one span, however large. Chosen:
/// deflate encoders end a block after at most a few MiB; a blob with longer ones has no use as a lazy layer.
pub const SPAN_DEVICE_MAX: u64 = 1 << 30;

/// Most blob bytes of one span, with the same exception. Chosen as above; only blobs made of empty blocks come near.
pub const SPAN_BLOB_MAX: u64 = 1 << 30;

/// Level of the zstd frames of windows. Chosen: there is one in 4 MiB, so that its time does not show.
const WINDOW_LEVEL: i32 = 9;

const KIND_PLAIN: u8 = 0;
const KIND_MEMBER: u8 = 1;
const KIND_DEFLATE: u8 = 2;
const KIND_FRAME: u8 = 3;

/// Bytes of one record of the table.
const RECORD_LEN: usize = 8 + 8 + 4 + 2 + 1 + 1;

/// The spans of a layer. They cover the device in order, without gap or overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spans {
    geometry: Geometry,
    spans: Vec<Span>,
}

/// A piece of the blob that can be inflated by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The bytes of the blob to fetch. Neighbours may share a byte, where one ends and the other begins inside it.
    pub blob: Range<u64>,
    /// The bytes of the device that they inflate to; never empty, and not aligned with chunks.
    pub device: Range<u64>,
    /// What inflating starts with.
    pub checkpoint: Checkpoint,
}

/// The state that a decoder must be in at the start of a [`Span`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checkpoint {
    /// The blob is not compressed.
    Plain,
    /// A gzip member starts here.
    MemberStart,
    /// A zstd frame starts here, maybe a skippable one.
    FrameStart,
    /// A deflate block starts here, inside a gzip member.
    Deflate {
        /// How many high bits of the span's first byte belong to the block, 1 to 7; 0: the block starts with that byte.
        bits: u8,
        /// The output before the block, as far back as the block may refer to.
        window: PackedWindow,
    },
}

/// Up to [`WINDOW_MAX`] bytes of output, packed. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct PackedWindow {
    packed: Arc<[u8]>,
    plain_len: u16,
}

/// A packed window does not unpack to its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the window of a checkpoint does not unpack")]
pub(crate) struct BrokenWindow;

impl Spans {
    /// Checks and parses the section. Windows stay packed until they are used.
    pub fn parse(header: &Header, bytes: &[u8]) -> Result<Self, IndexError> {
        check_section(header, Section::Spans, bytes)?;
        let spans = parse_spans(header, bytes).map_err(|reason| IndexError::broken(header, Section::Spans, reason))?;
        Ok(Self { geometry: header.geometry(), spans })
    }

    /// All spans that hold a byte of `chunks`, in order; empty where `chunks` is empty or behind the end.
    pub fn covering(&self, chunks: Range<u32>) -> &[Span] {
        let start = u64::from(chunks.start) << self.geometry.chunk_log2();
        let end = u64::from(chunks.end) << self.geometry.chunk_log2();
        if start >= end {
            return &[];
        }
        let first = self.spans.partition_point(|span| span.device.end <= start);
        let last = self.spans.partition_point(|span| span.device.start < end);
        self.spans.get(first..last).unwrap_or_default()
    }

    /// All spans, in order.
    pub fn all(&self) -> &[Span] {
        &self.spans
    }
}

impl PackedWindow {
    pub(crate) fn unpack(&self) -> Result<Vec<u8>, BrokenWindow> {
        let mut plain = Vec::with_capacity(usize::from(self.plain_len));
        if self.plain_len > 0 {
            zstd_safe::decompress(&mut plain, &self.packed).map_err(|_| BrokenWindow)?;
        }
        if plain.len() != usize::from(self.plain_len) {
            return Err(BrokenWindow);
        }
        Ok(plain)
    }

    /// Bytes in the index.
    pub fn packed_len(&self) -> usize {
        self.packed.len()
    }
}

impl fmt::Debug for PackedWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedWindow({} of {})", self.packed.len(), self.plain_len)
    }
}

#[derive(Debug, thiserror::Error)]
enum SpansError {
    #[error("it ends inside a record or window")]
    CutOff(#[from] CutOff),
    #[error("bytes after the last window")]
    Surplus,
    #[error("span {0}: {1}")]
    Span(u32, &'static str),
}

struct Record {
    blob_start: u64,
    device_start: u64,
    packed_len: u32,
    plain_len: u16,
    kind: u8,
    bits: u8,
}

fn parse_spans(header: &Header, bytes: &[u8]) -> Result<Vec<Span>, SpansError> {
    let mut cursor = Cursor::new(bytes);
    // A table that is not there fails here, before anything is allocated for it.
    let mut table = Cursor::new(cursor.take(u64::from(header.span_count()) * RECORD_LEN as u64)?);
    let mut records = Vec::new();
    while !table.is_empty() {
        records.push(Record {
            blob_start: table.u64()?,
            device_start: table.u64()?,
            packed_len: table.u32()?,
            plain_len: table.u16()?,
            kind: table.u8()?,
            bits: table.u8()?,
        });
    }
    let mut spans = Vec::with_capacity(records.len());
    let [blob_max, device_max] = match header.compression() {
        Compression::None | Compression::Gzip => [SPAN_BLOB_MAX, SPAN_DEVICE_MAX],
        Compression::Zstd => [u64::MAX; 2],
    };
    for (number, record) in (0u32..).zip(&records) {
        let error = |reason| SpansError::Span(number, reason);
        let next = records.get(number as usize + 1);
        let device = record.device_start..next.map_or(header.device_size(), |next| next.device_start);
        // Where the next block starts inside a byte, this span needs that byte too.
        let blob = record.blob_start
            ..next
                .map_or(Some(header.blob_size()), |next| next.blob_start.checked_add(u64::from(next.bits > 0)))
                .ok_or(error("the blob range overflows"))?;
        if number == 0 && (device.start != 0 || blob.start != 0) {
            return Err(error("the first span does not start at 0"));
        }
        if device.is_empty() || device.end > header.device_size() || device.end - device.start > device_max {
            return Err(error("the device range cannot be"));
        }
        if blob.is_empty() || blob.end > header.blob_size() || blob.end - blob.start > blob_max {
            return Err(error("the blob range cannot be"));
        }
        let packed = cursor.take(u64::from(record.packed_len))?;
        let checkpoint = match (header.compression(), record.kind, record.bits, record.plain_len, packed.len()) {
            (Compression::None, KIND_PLAIN, 0, 0, 0) if blob == device => Checkpoint::Plain,
            (Compression::Gzip, KIND_MEMBER, 0, 0, 0) => Checkpoint::MemberStart,
            (Compression::Zstd, KIND_FRAME, 0, 0, 0) => Checkpoint::FrameStart,
            (Compression::Gzip, KIND_DEFLATE, bits @ 0..=7, plain_len, packed_len)
                if number > 0 && usize::from(plain_len) <= WINDOW_MAX && (plain_len == 0) == (packed_len == 0) =>
            {
                Checkpoint::Deflate { bits, window: PackedWindow { packed: packed.into(), plain_len } }
            }
            _ => return Err(error("the checkpoint cannot be")),
        };
        spans.push(Span { blob, device, checkpoint });
    }
    if !cursor.is_empty() {
        return Err(SpansError::Surplus);
    }
    Ok(spans)
}

/// Collects the section while a blob is ingested. Only starts are recorded: a span ends where the next one starts.
pub(crate) struct SpansEncoder {
    table: Vec<u8>,
    windows: Vec<u8>,
    count: u32,
    packer: zstd_safe::CCtx<'static>,
    packed: Vec<u8>,
}

/// The start of a span.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Start<'a> {
    Plain,
    Member,
    Frame,
    Deflate { bits: u8, window: &'a [u8] },
}

impl SpansEncoder {
    pub(crate) fn new() -> Self {
        Self {
            table: Vec::new(),
            windows: Vec::new(),
            count: 0,
            packer: zstd_safe::CCtx::create(),
            packed: Vec::with_capacity(zstd_safe::compress_bound(WINDOW_MAX)),
        }
    }

    pub(crate) fn push(&mut self, blob_start: u64, device_start: u64, start: Start<'_>) {
        let (kind, bits, window) = match start {
            Start::Plain => (KIND_PLAIN, 0, &[][..]),
            Start::Member => (KIND_MEMBER, 0, &[][..]),
            Start::Frame => (KIND_FRAME, 0, &[][..]),
            Start::Deflate { bits, window } => (KIND_DEFLATE, bits, &window[window.len().saturating_sub(WINDOW_MAX)..]),
        };
        self.packed.clear();
        if !window.is_empty() {
            // Cannot fail: the output has room for any frame of a window.
            let packed = self.packer.compress(&mut self.packed, window, WINDOW_LEVEL);
            debug_assert!(packed.is_ok());
        }
        self.table.extend_from_slice(&blob_start.to_le_bytes());
        self.table.extend_from_slice(&device_start.to_le_bytes());
        self.table.extend_from_slice(&(self.packed.len() as u32).to_le_bytes());
        self.table.extend_from_slice(&(window.len() as u16).to_le_bytes());
        self.table.push(kind);
        self.table.push(bits);
        self.windows.extend_from_slice(&self.packed);
        self.count += 1;
    }

    /// The encoded section and its number of spans.
    pub(crate) fn finish(mut self) -> (Vec<u8>, u32) {
        self.table.append(&mut self.windows);
        (self.table, self.count)
    }
}
