//! Chunks: the fixed-size units of a device that are verified, cached, wanted and had.

use std::fmt;
use std::ops::Range;

use crate::digest::hex;

/// log2 of the chunk size that new indexes are made with: 128 KiB, the readahead the kernel offers (DESIGN, Words).
pub const CHUNK_LOG2: u8 = 17;

/// The smallest and largest log2 of a chunk size that an index may name.
pub const CHUNK_LOG2_RANGE: std::ops::RangeInclusive<u8> = 12..=24;

/// The number of a chunk in its device, from 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ChunkIndex(pub u32);

impl fmt::Display for ChunkIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// BLAKE3 of the plain bytes of one chunk.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkDigest(pub [u8; 32]);

impl ChunkDigest {
    /// Hashes the plain bytes of a chunk.
    pub fn of(plain: &[u8]) -> Self {
        Self(*blake3::hash(plain).as_bytes())
    }
}

impl fmt::Debug for ChunkDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blake3:{}", hex(&self.0))
    }
}

/// How a device of some size is cut into chunks. The last chunk may be short; an empty device has none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    device_size: u64,
    chunk_log2: u8,
}

/// Why a [`Geometry`] cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The chunk size is outside [`CHUNK_LOG2_RANGE`].
    #[error("chunk size 2^{0} is outside 2^12 to 2^24")]
    ChunkSize(u8),
    /// The device has more chunks than a [`ChunkIndex`] can number.
    #[error("a device of {0} bytes has too many chunks")]
    DeviceSize(u64),
}

impl Geometry {
    /// A device of `device_size` bytes in chunks of `1 << chunk_log2` bytes.
    pub fn new(device_size: u64, chunk_log2: u8) -> Result<Self, GeometryError> {
        if !CHUNK_LOG2_RANGE.contains(&chunk_log2) {
            return Err(GeometryError::ChunkSize(chunk_log2));
        }
        let geometry = Self { device_size, chunk_log2 };
        if device_size.div_ceil(geometry.chunk_size()) > u64::from(u32::MAX) {
            return Err(GeometryError::DeviceSize(device_size));
        }
        Ok(geometry)
    }

    /// Bytes of the device.
    pub const fn device_size(&self) -> u64 {
        self.device_size
    }

    /// log2 of the chunk size.
    pub const fn chunk_log2(&self) -> u8 {
        self.chunk_log2
    }

    /// Bytes of every chunk but the last.
    pub const fn chunk_size(&self) -> u64 {
        1 << self.chunk_log2
    }

    /// How many chunks the device has.
    pub const fn chunk_count(&self) -> u32 {
        self.device_size.div_ceil(self.chunk_size()) as u32
    }

    /// All chunks.
    pub const fn chunks(&self) -> Range<u32> {
        0..self.chunk_count()
    }

    /// The bytes of `chunk` in the device; empty where the device has no such chunk.
    pub fn range(&self, chunk: ChunkIndex) -> Range<u64> {
        let start = (u64::from(chunk.0) << self.chunk_log2).min(self.device_size);
        start..(start + self.chunk_size()).min(self.device_size)
    }

    /// Bytes of `chunk`; 0 where the device has no such chunk.
    pub fn chunk_len(&self, chunk: ChunkIndex) -> usize {
        let range = self.range(chunk);
        (range.end - range.start) as usize
    }

    /// The run of chunks that covers `bytes`, cut at the end of the device.
    pub fn covering(&self, bytes: Range<u64>) -> Range<u32> {
        let end = bytes.end.min(self.device_size);
        if bytes.start >= end {
            return 0..0;
        }
        (bytes.start >> self.chunk_log2) as u32..end.div_ceil(self.chunk_size()) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_chunk_is_short() {
        let geometry = Geometry::new((3 << 17) + 512, 17).unwrap();
        assert_eq!(geometry.chunk_count(), 4);
        assert_eq!(geometry.chunk_len(ChunkIndex(3)), 512);
        assert_eq!(geometry.chunk_len(ChunkIndex(4)), 0);
        assert_eq!(geometry.covering(0..1), 0..1);
        assert_eq!(geometry.covering((1 << 17) - 1..(1 << 17) + 1), 0..2);
        assert_eq!(geometry.covering(u64::MAX - 1..u64::MAX), 0..0);
        assert_eq!(geometry.covering(0..u64::MAX), 0..4);
    }

    #[test]
    fn empty_device_has_no_chunk() {
        let geometry = Geometry::new(0, 17).unwrap();
        assert_eq!(geometry.chunk_count(), 0);
        assert_eq!(geometry.covering(0..10), 0..0);
    }

    #[test]
    fn refuses_absurd_geometry() {
        assert_eq!(Geometry::new(1, 40), Err(GeometryError::ChunkSize(40)));
        assert_eq!(Geometry::new(u64::MAX, 12), Err(GeometryError::DeviceSize(u64::MAX)));
    }
}
