//! The chunk digests section: 32 bytes for each chunk, in order.

use super::{Header, IndexError, Section, check_section};
use crate::chunk::{ChunkDigest, ChunkIndex, Geometry};

/// The digest of each chunk of a layer.
#[derive(Clone, PartialEq, Eq)]
pub struct ChunkDigests {
    geometry: Geometry,
    digests: Vec<[u8; 32]>,
}

impl ChunkDigests {
    /// Checks and takes the section's bytes.
    pub fn parse(header: &Header, bytes: Vec<u8>) -> Result<Self, IndexError> {
        check_section(header, Section::ChunkDigests, &bytes)?;
        // The header was checked: its size is a digest for each chunk.
        let (digests, _) = bytes.as_chunks::<32>();
        Ok(Self { geometry: header.geometry(), digests: digests.to_vec() })
    }

    /// The digest of `chunk`; `None` where the device has no such chunk.
    pub fn get(&self, chunk: ChunkIndex) -> Option<ChunkDigest> {
        self.digests.get(usize::try_from(chunk.0).ok()?).map(|digest| ChunkDigest(*digest))
    }

    /// Whether `plain` is exactly `chunk`, in length and digest.
    pub fn is_chunk(&self, chunk: ChunkIndex, plain: &[u8]) -> bool {
        plain.len() == self.geometry.chunk_len(chunk) && self.get(chunk) == Some(ChunkDigest::of(plain))
    }

    /// How the device is cut.
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }
}

impl std::fmt::Debug for ChunkDigests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkDigests").field("chunks", &self.digests.len()).finish_non_exhaustive()
    }
}
