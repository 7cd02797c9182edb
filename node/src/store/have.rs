//! Which chunks are here: the bitmap in memory and its file.
//!
//! The file `have`, version 1, little endian:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `DROVHAVE` |
//! | 8 | 2 | version |
//! | 10 | 1 | log2 of the chunk size |
//! | 11 | 1 | flags: 1 clean, 2 proven |
//! | 12 | 4 | chunk count |
//! | 16 | 8 | device size |
//! | 24 | 32 | BLAKE3 of the bits, where the file is clean |
//! | 56 | 32 | BLAKE3 of bytes 0 to 56 |
//! | 4096 | count / 8 | the bits, lowest first |
//!
//! Bits are set in place, each only after its chunk's bytes were synced. They say what is on disk without a check when the file is
//! clean: nothing was set since the bits were written whole, with their checksum, and synced. In a file that is not,
//! they are *suspect*: a chunk is compared with its digest before it is used. So a torn or rotten file invents nothing.

use std::sync::atomic::{AtomicU64, Ordering};

use layer::Geometry;

/// Version of the file that this code writes; a newer one is refused.
pub(crate) const VERSION: u16 = 1;

/// Where the bits start: a page of its own for the header, so that it is never torn together with bits.
pub(crate) const BITS_OFFSET: u64 = 4096;

const MAGIC: &[u8; 8] = b"DROVHAVE";
const SUMMED: usize = 56;
const HEADER_LEN: usize = SUMMED + 32;
const FLAG_CLEAN: u8 = 1;
const FLAG_PROVEN: u8 = 2;

/// A set of chunks that many threads share.
#[derive(Debug)]
pub(crate) struct Bitmap {
    words: Vec<AtomicU64>,
    len: u32,
}

impl Bitmap {
    pub(crate) fn new(len: u32) -> Self {
        Self { words: (0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), len }
    }

    pub(crate) fn get(&self, chunk: u32) -> bool {
        self.word(chunk).is_some_and(|word| word.load(Ordering::Acquire) & bit(chunk) != 0)
    }

    /// Gives whether it was new.
    pub(crate) fn set(&self, chunk: u32) -> bool {
        self.word(chunk).is_some_and(|word| word.fetch_or(bit(chunk), Ordering::AcqRel) & bit(chunk) == 0)
    }

    /// Gives whether it was set.
    pub(crate) fn clear(&self, chunk: u32) -> bool {
        self.word(chunk).is_some_and(|word| word.fetch_and(!bit(chunk), Ordering::AcqRel) & bit(chunk) != 0)
    }

    pub(crate) fn count(&self) -> u32 {
        self.words.iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum()
    }

    /// The first chunk from `from` on that is in the set, or not in it.
    pub(crate) fn next(&self, from: u32, set: bool) -> Option<u32> {
        let mut chunk = from;
        while chunk < self.len {
            let word = self.word(chunk)?.load(Ordering::Acquire);
            let word = if set { word } else { !word } >> (chunk % 64);
            if word != 0 {
                return Some(chunk + word.trailing_zeros()).filter(|chunk| *chunk < self.len);
            }
            chunk = (chunk / 64 + 1).checked_mul(64)?;
        }
        None
    }

    /// The first run of chunks from `from` on that are not in the set.
    pub(crate) fn next_gap(&self, from: u32) -> Option<std::ops::Range<u32>> {
        let start = self.next(from, false)?;
        Some(start..self.next(start, true).unwrap_or(self.len))
    }

    fn word(&self, chunk: u32) -> Option<&AtomicU64> {
        if chunk < self.len { self.words.get(chunk as usize / 64) } else { None }
    }
}

const fn bit(chunk: u32) -> u64 {
    1 << (chunk % 64)
}

/// What the file says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Have {
    /// One bit for each chunk.
    pub(crate) bits: Vec<u8>,
    /// Whether the bits can be believed without looking at the device.
    pub(crate) clean: bool,
    /// The whole device was compared with its diffID. Only where `clean`.
    pub(crate) proven: bool,
}

/// The file was written by a newer version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NewerVersion(pub(crate) u16);

impl Have {
    /// Nothing is here, and that is certain.
    pub(crate) fn none(geometry: Geometry) -> Self {
        Self { bits: vec![0; bits_len(geometry)], clean: true, proven: false }
    }

    /// Parses the whole file. One that makes no sense says that nothing is here.
    pub(crate) fn parse(geometry: Geometry, bytes: &[u8]) -> Result<Self, NewerVersion> {
        let none = Self { clean: false, ..Self::none(geometry) };
        let Some((header, _)) = bytes.split_first_chunk::<HEADER_LEN>() else { return Ok(none) };
        let (summed, sum) = header.split_at(SUMMED);
        if !summed.starts_with(MAGIC) {
            return Ok(none);
        }
        let header_is_right = blake3::hash(summed).as_bytes() == sum;
        let version = u16::from_le_bytes([header[8], header[9]]);
        if header_is_right && version > VERSION {
            return Err(NewerVersion(version));
        }
        let expected = encode_header(geometry, header[11], &header[24..56]);
        if header_is_right && expected[..24] != header[..24] {
            return Ok(none);
        }
        let mut bits = bytes.get(BITS_OFFSET as usize..).unwrap_or_default().to_vec();
        bits.resize(bits_len(geometry), 0);
        let clean =
            header_is_right && header[11] & FLAG_CLEAN != 0 && blake3::hash(&bits).as_bytes() == &header[24..56];
        Ok(Self { bits, clean, proven: clean && header[11] & FLAG_PROVEN != 0 })
    }

    /// The header to write before any bit is changed in place: from then on the bits are suspect.
    pub(crate) fn dirty_header(geometry: Geometry) -> [u8; HEADER_LEN] {
        encode_header(geometry, 0, &[0; 32])
    }

    /// The header to write after `bits` were written and synced.
    pub(crate) fn clean_header(geometry: Geometry, bits: &[u8], proven: bool) -> [u8; HEADER_LEN] {
        let flags = FLAG_CLEAN | if proven { FLAG_PROVEN } else { 0 };
        encode_header(geometry, flags, blake3::hash(bits).as_bytes())
    }
}

/// Bytes of the bits.
pub(crate) fn bits_len(geometry: Geometry) -> usize {
    geometry.chunk_count().div_ceil(8) as usize
}

fn encode_header(geometry: Geometry, flags: u8, bits_sum: &[u8]) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..8].copy_from_slice(MAGIC);
    header[8..10].copy_from_slice(&VERSION.to_le_bytes());
    header[10] = geometry.chunk_log2();
    header[11] = flags;
    header[12..16].copy_from_slice(&geometry.chunk_count().to_le_bytes());
    header[16..24].copy_from_slice(&geometry.device_size().to_le_bytes());
    header[24..56].copy_from_slice(bits_sum);
    let sum = *blake3::hash(&header[..SUMMED]).as_bytes();
    header[SUMMED..].copy_from_slice(&sum);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry::new(100 * 4096, 12).unwrap()
    }

    fn file(header: &[u8], bits: &[u8]) -> Vec<u8> {
        let mut file = header.to_vec();
        file.resize(BITS_OFFSET as usize, 0);
        file.extend_from_slice(bits);
        file
    }

    #[test]
    fn a_clean_file_is_believed_and_any_change_is_seen() {
        let mut bits = vec![0; 13];
        bits[3] = 0x21;
        let right = file(&Have::clean_header(geometry(), &bits, true), &bits);
        let have = Have::parse(geometry(), &right).unwrap();
        assert_eq!(have, Have { bits: bits.clone(), clean: true, proven: true });
        for at in (0..HEADER_LEN).chain(4096..right.len()) {
            let mut wrong = right.clone();
            wrong[at] ^= 4;
            assert!(!Have::parse(geometry(), &wrong).unwrap().clean, "a change at {at} was not seen");
        }
        let torn = Have::parse(geometry(), &right[..4098]).unwrap();
        assert!(!torn.clean && !torn.proven);
    }

    #[test]
    fn refuses_newer_and_ignores_foreign() {
        let mut header = Have::clean_header(geometry(), &[], false);
        header[8] = 2;
        let sum = *blake3::hash(&header[..SUMMED]).as_bytes();
        header[SUMMED..].copy_from_slice(&sum);
        assert_eq!(Have::parse(geometry(), &file(&header, &[0; 13])), Err(NewerVersion(2)));
        let other = Geometry::new(50 * 4096, 12).unwrap();
        let have = Have::parse(geometry(), &file(&Have::clean_header(other, &[255; 7], true), &[255; 7])).unwrap();
        assert_eq!((have.bits, have.clean), (vec![0; 13], false));
        assert!(!Have::parse(geometry(), b"").unwrap().clean);
    }

    #[test]
    fn bitmap_finds_gaps() {
        let bitmap = Bitmap::new(200);
        assert_eq!(bitmap.next_gap(0), Some(0..200));
        for chunk in (0..70).chain(130..200) {
            assert!(bitmap.set(chunk));
        }
        assert!(!bitmap.set(3));
        assert_eq!(bitmap.next_gap(0), Some(70..130));
        assert_eq!(bitmap.next_gap(100), Some(100..130));
        assert_eq!(bitmap.next_gap(130), None);
        assert!(bitmap.clear(199) && !bitmap.clear(199));
        assert_eq!(bitmap.next_gap(131), Some(199..200));
        assert_eq!(bitmap.count(), 139);
        assert!(!bitmap.set(200) && !bitmap.get(200));
    }
}
