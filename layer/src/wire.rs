//! The wire form of chunks (docs/wire.md): how a chunk travels between seeder and nodes and how it is kept for sharing.
//!
//! Each chunk is encoded once per cluster and travels unchanged. A *frame* is a little-endian `u32` and that many bytes:
//! bit 31 of the number says that the bytes are the chunk itself, else they are one zstd frame; the low 31 bits are their
//! length. A run of chunks is their frames in order, with nothing between or after them. A packed frame is always shorter
//! than its chunk.

use std::ops::Range;

use crate::chunk::{ChunkIndex, Geometry};

/// zstd level of a chunk that is encoded without hurry and without time to spare: 1.01 to 1.03 times gzip -6 layers, where level 3 is
/// 1.01 to 1.05. docs/BENCHMARKS.md has the size and speed of each level.
pub const LEVEL: i32 = 4;

/// What an [`Encoder`] for chunks of the default size takes in memory, in bytes, with any level up to two above [`LEVEL`].
pub const ENCODER_BYTES_MAX: usize = 7 << 18;

/// Bytes before the bytes of a chunk.
pub const PREFIX_LEN: usize = 4;

const PLAIN: u32 = 1 << 31;

/// A chunk in its wire form.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Frame<'a> {
    /// The chunk's bytes.
    Plain(&'a [u8]),
    /// One zstd frame of them.
    Packed(&'a [u8]),
}

/// Why bytes are not the frames that they should be. The sender is to blame, or the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length is more than the chunk can have, or zero.
    #[error("the frame of chunk {chunk} claims {len} bytes, the chunk has {chunk_len}")]
    Len {
        /// Which chunk.
        chunk: ChunkIndex,
        /// What the frame claims.
        len: usize,
        /// What it is a chunk of.
        chunk_len: usize,
    },
    /// The zstd frame is broken, or does not give the chunk's length.
    #[error("a frame does not unpack to the {expected} bytes of its chunk")]
    Broken {
        /// Bytes of the chunk.
        expected: usize,
    },
    /// The stream ended before the last chunk of the run.
    #[error("the frames end in front of or inside that of chunk {next}")]
    CutOff {
        /// First chunk that did not come whole.
        next: ChunkIndex,
    },
    /// The stream went on after the last chunk of the run.
    #[error("{bytes} bytes came after the last frame")]
    Surplus {
        /// How many of them are buffered.
        bytes: usize,
    },
}

impl<'a> Frame<'a> {
    /// Splits the first frame off `bytes`: the frame and what follows it. `None` where it is not whole.
    pub fn split(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (prefix, rest) = bytes.split_first_chunk::<PREFIX_LEN>()?;
        let (plain, len) = parse_prefix(*prefix);
        let (body, rest) = rest.split_at_checked(len)?;
        Some((if plain { Self::Plain(body) } else { Self::Packed(body) }, rest))
    }

    /// Bytes that the frame claims to decode to; `None` where it does not say. For who does not know the length of the chunk
    /// yet: the claim is untrusted, so bound it before use.
    pub fn claimed_len(&self) -> Option<u64> {
        match self {
            Self::Plain(body) => Some(body.len() as u64),
            Self::Packed(body) => zstd_safe::get_frame_content_size(body).ok().flatten(),
        }
    }

    /// Bytes of the frame with its prefix.
    pub const fn wire_len(&self) -> usize {
        match self {
            Self::Plain(body) | Self::Packed(body) => PREFIX_LEN + body.len(),
        }
    }

    /// Appends the frame with its prefix, byte for byte as it came.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.prefix());
        out.extend_from_slice(self.body());
    }

    /// The bytes in front of [`Frame::body`].
    pub const fn prefix(&self) -> [u8; PREFIX_LEN] {
        let plain = match self {
            Self::Plain(_) => PLAIN,
            Self::Packed(_) => 0,
        };
        (self.body().len() as u32 | plain).to_le_bytes()
    }

    /// The bytes behind the prefix.
    pub const fn body(&self) -> &'a [u8] {
        match self {
            Self::Plain(body) | Self::Packed(body) => body,
        }
    }
}

/// Encodes chunks. Keeps its memory ([`ENCODER_BYTES_MAX`]) from chunk to chunk.
pub struct Encoder {
    packer: zstd_safe::CCtx<'static>,
    level: i32,
    packed: Vec<u8>,
}

impl Encoder {
    /// An encoder of [`LEVEL`].
    pub fn new() -> Self {
        Self::with_level(LEVEL)
    }

    /// An encoder of another zstd level.
    pub fn with_level(level: i32) -> Self {
        Self { packer: zstd_safe::CCtx::create(), level, packed: Vec::new() }
    }

    /// Goes on with another zstd level.
    pub const fn set_level(&mut self, level: i32) {
        self.level = level;
    }

    /// Appends the frame of `plain` to `out`: packed where that is shorter. A chunk is at most 16 MiB
    /// ([`CHUNK_LOG2_RANGE`](crate::chunk::CHUNK_LOG2_RANGE)), so its length fits the prefix.
    pub fn encode(&mut self, plain: &[u8], out: &mut Vec<u8>) {
        self.packed.clear();
        // No room for more than the chunk: packing ends early where it does not pay.
        self.packed.reserve_exact(plain.len());
        let packed = self.packer.compress(&mut self.packed, plain, self.level);
        match packed {
            Ok(len) if len < plain.len() => Frame::Packed(&self.packed).write(out),
            _ => Frame::Plain(plain).write(out),
        }
    }
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("level", &self.level).finish_non_exhaustive()
    }
}

/// Decodes chunks. Keeps its memory (about 200 KiB, taken with the first packed frame, and a chunk) from chunk to chunk.
#[derive(Default)]
pub struct Decoder {
    unpacker: Option<zstd_safe::DCtx<'static>>,
    plain: Vec<u8>,
}

impl Decoder {
    /// A decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// The bytes of the chunk in `frame`, exactly `expected` of them. They are not verified: compare their digest.
    pub fn decode<'a>(&'a mut self, frame: Frame<'a>, expected: usize) -> Result<&'a [u8], FrameError> {
        match frame {
            Frame::Plain(body) if body.len() == expected => Ok(body),
            Frame::Plain(_) => Err(FrameError::Broken { expected }),
            Frame::Packed(body) => {
                let unpacker = self.unpacker.get_or_insert_with(zstd_safe::DCtx::create);
                self.plain.clear();
                // zstd writes at most the capacity, whatever the frame claims.
                self.plain.reserve_exact(expected);
                match unpacker.decompress(&mut self.plain, body) {
                    Ok(len) if len == expected => Ok(&self.plain),
                    _ => Err(FrameError::Broken { expected }),
                }
            }
        }
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decoder")
    }
}

/// Cuts a stream of bytes into the frames of a run. Buffers what was pushed until its frames were taken: at most one
/// frame and one push, if every push is followed by [`FrameReader::next_frame`] until it gives `None`.
#[derive(Debug)]
pub struct FrameReader {
    geometry: Geometry,
    run: Range<u32>,
    buffer: Vec<u8>,
    taken: usize,
}

impl FrameReader {
    /// Expects the frames of `run`, a run of chunks of a device cut by `geometry`.
    pub fn new(geometry: Geometry, run: Range<u32>) -> Self {
        Self { geometry, run: run.start..run.end.max(run.start), buffer: Vec::new(), taken: 0 }
    }

    /// Takes bytes of the stream, in any pieces.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame and its chunk; `None` when more bytes must be pushed or the run is complete. A length that the
    /// chunk cannot have is refused before its bytes are waited for.
    pub fn next_frame(&mut self) -> Result<Option<(ChunkIndex, Frame<'_>)>, FrameError> {
        let rest = self.buffer.get(self.taken..).unwrap_or_default();
        if self.run.is_empty() {
            return if rest.is_empty() { Ok(None) } else { Err(FrameError::Surplus { bytes: rest.len() }) };
        }
        let chunk = ChunkIndex(self.run.start);
        let Some(prefix) = rest.first_chunk::<PREFIX_LEN>() else { return Ok(None) };
        let (plain, len) = parse_prefix(*prefix);
        let chunk_len = self.geometry.chunk_len(chunk);
        if len == 0 || if plain { len != chunk_len } else { len >= chunk_len } {
            return Err(FrameError::Len { chunk, len, chunk_len });
        }
        let Some((frame, _)) = Frame::split(rest) else { return Ok(None) };
        self.taken += frame.wire_len();
        self.run.start += 1;
        Ok(Some((chunk, frame)))
    }

    /// The first chunk whose frame was not taken yet.
    pub fn next_chunk(&self) -> ChunkIndex {
        ChunkIndex(self.run.start)
    }

    /// At the end of the stream: whether exactly the frames of the run came.
    pub fn finish(self) -> Result<(), FrameError> {
        if !self.run.is_empty() {
            return Err(FrameError::CutOff { next: self.next_chunk() });
        }
        match self.buffer.len() - self.taken {
            0 => Ok(()),
            bytes => Err(FrameError::Surplus { bytes }),
        }
    }
}

/// Whether the body is plain, and its length.
const fn parse_prefix(prefix: [u8; PREFIX_LEN]) -> (bool, usize) {
    let number = u32::from_le_bytes(prefix);
    (number & PLAIN != 0, (number & !PLAIN) as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn geometry(device_size: u64) -> Geometry {
        Geometry::new(device_size, 12).unwrap()
    }

    /// Half text, half noise from a linear congruence, so that both forms occur.
    fn device(len: usize) -> Vec<u8> {
        let mut state = 1u32;
        (0..len)
            .map(|at| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if (at >> 12) % 2 == 0 { b"drover "[at % 7] } else { (state >> 24) as u8 }
            })
            .collect()
    }

    fn encode(device: &[u8]) -> Vec<u8> {
        let (mut encoder, mut wire) = (Encoder::new(), Vec::new());
        device.chunks(1 << 12).for_each(|chunk| encoder.encode(chunk, &mut wire));
        wire
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn run_comes_back_over_any_split(len in 1usize..40_000, pieces in prop::collection::vec(1usize..9000, 1..20)) {
            let device = device(len);
            let wire = encode(&device);
            prop_assert!(wire.len() <= device.len() + PREFIX_LEN * len.div_ceil(1 << 12));
            let geometry = geometry(len as u64);
            let (mut reader, mut decoder) = (FrameReader::new(geometry, geometry.chunks()), Decoder::new());
            let (mut got, mut again) = (Vec::new(), Vec::new());
            let mut rest = &wire[..];
            for piece in pieces.iter().cycle() {
                let (head, tail) = rest.split_at((*piece).min(rest.len()));
                rest = tail;
                reader.push(head);
                while let Some((chunk, frame)) = reader.next_frame().unwrap() {
                    got.extend_from_slice(decoder.decode(frame, geometry.chunk_len(chunk)).unwrap());
                    frame.write(&mut again);
                }
                if rest.is_empty() {
                    break;
                }
            }
            reader.finish().unwrap();
            prop_assert_eq!(got, device);
            prop_assert_eq!(again, wire);
        }

        #[test]
        fn any_bytes_are_refused_or_bounded(bytes in prop::collection::vec(any::<u8>(), 0..200), len in 1u64..9000) {
            let geometry = geometry(len);
            let mut reader = FrameReader::new(geometry, geometry.chunks());
            reader.push(&bytes);
            let mut decoder = Decoder::new();
            while let Ok(Some((chunk, frame))) = reader.next_frame() {
                let _ = decoder.decode(frame, geometry.chunk_len(chunk));
                prop_assert!(decoder.plain.capacity() <= 1 << 13);
            }
        }
    }

    #[test]
    fn an_encoder_takes_no_more_memory_than_it_says() {
        let chunk = device(1 << crate::chunk::CHUNK_LOG2);
        let (mut encoder, mut out) = (Encoder::new(), Vec::new());
        for level in [LEVEL - 1, LEVEL + 2, LEVEL, LEVEL + 1] {
            encoder.set_level(level);
            encoder.encode(&chunk, &mut out);
            let taken = encoder.packer.sizeof() + encoder.packed.capacity();
            assert!(taken <= ENCODER_BYTES_MAX, "{taken} at level {level}");
        }
    }

    #[test]
    fn refuses_lengths_that_cannot_be() {
        let geometry = geometry(5000);
        for (prefix, chunk) in [(0, 0), (4096, 0), (PLAIN | 4095, 0), (PLAIN, 1), (904, 1), (u32::MAX, 1)] {
            let mut reader = FrameReader::new(geometry, chunk..2);
            reader.push(&prefix.to_le_bytes());
            assert!(matches!(reader.next_frame(), Err(FrameError::Len { .. })), "{prefix:x} for chunk {chunk}");
        }
    }

    #[test]
    fn refuses_a_frame_of_another_length() {
        let mut wire = Vec::new();
        Encoder::new().encode(&[7; 4096], &mut wire);
        let (frame, _) = Frame::split(&wire).unwrap();
        assert_eq!(frame.claimed_len(), Some(4096));
        for expected in [0, 4095, 4097] {
            assert_eq!(Decoder::new().decode(frame, expected), Err(FrameError::Broken { expected }));
        }
    }

    #[test]
    fn a_stream_that_ends_early_or_late_is_seen() {
        let wire = encode(&device(8192));
        let geometry = geometry(8192);
        for cut in 0..wire.len() {
            let mut reader = FrameReader::new(geometry, 0..2);
            reader.push(&wire[..cut]);
            while reader.next_frame().unwrap().is_some() {}
            assert!(matches!(reader.finish(), Err(FrameError::CutOff { .. })), "at {cut}");
        }
        let mut reader = FrameReader::new(geometry, 0..1);
        reader.push(&wire);
        assert!(reader.next_frame().unwrap().is_some());
        assert!(matches!(reader.next_frame(), Err(FrameError::Surplus { .. })));
        assert!(matches!(reader.finish(), Err(FrameError::Surplus { .. })));
    }
}
