//! The header: fixed size, names the layer and the sections.

use super::Section;
use super::cursor::{Cursor, CutOff};
use crate::chunk::{Geometry, GeometryError};
use crate::digest::Digest;
use crate::tree::{DEVICE_SIZE_MAX, ENTRIES_MAX};

/// Version of the index format that this code writes; a newer one is refused.
pub const VERSION: u16 = 1;

/// Bytes of an encoded header.
pub const HEADER_LEN: usize = 256;

/// First byte outside ASCII and a line end, so that a transfer as text shows at once (as PNG does).
const MAGIC: [u8; 8] = *b"\x8bDRIDX\r\n";

/// Algorithm of the chunk digests: BLAKE3 with 32 bytes.
const CHUNK_DIGEST_BLAKE3: u8 = 1;
/// Bytes of a chunk digest.
pub(super) const CHUNK_DIGEST_LEN: u64 = 32;

const FLAG_IMPLICIT_DIRECTORIES: u32 = 1 << 0;
const FLAG_WHITEOUTS: u32 = 1 << 1;
const FLAGS: u32 = FLAG_IMPLICIT_DIRECTORIES | FLAG_WHITEOUTS;

/// Most bytes of an encoded section, and of the entries once unpacked. Chosen: a thousandfold of what layers with tens
/// of thousands of files need; who parses holds both in memory.
pub(super) const SECTION_MAX: u64 = 1 << 30;

const SECTION_FACTS_LEN: usize = 8 + 8 + 32;
const _: () = assert!(HEADER_LEN == 8 + 2 + 3 + 3 + 4 + 2 * 4 + 4 + 2 * 8 + 2 * 32 + 3 * SECTION_FACTS_LEN);

/// Names a layer, its geometry and the sections of its index. Only valid ones exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    facts: HeaderFacts,
    geometry: Geometry,
}

/// What a header says, before it is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeaderFacts {
    pub(crate) blob: Digest,
    pub(crate) diff_id: Digest,
    pub(crate) blob_size: u64,
    pub(crate) device_size: u64,
    pub(crate) chunk_log2: u8,
    pub(crate) compression: Compression,
    pub(crate) has_implicit_directories: bool,
    pub(crate) has_whiteouts: bool,
    pub(crate) entry_count: u32,
    pub(crate) span_count: u32,
    /// In the order of [`Section::ALL`].
    pub(crate) sections: [SectionFacts; 3],
}

/// What the header says of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionFacts {
    /// Encoded bytes: what is stored and sent.
    pub size: u64,
    /// Bytes once unpacked; equal to `size` for a section that is not packed.
    pub plain_size: u64,
    /// SHA-256 of the encoded bytes.
    pub digest: Digest,
}

/// How a blob is compressed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Compression {
    /// The blob is the tar itself.
    None,
    /// RFC 1952, one or more members.
    Gzip,
    /// RFC 8878, one or more frames.
    Zstd,
}

/// Why bytes are not the header of an index that this code can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not an index at all.
    #[error("these bytes are not the header of a Drover index")]
    NotAnIndex,
    /// Made by a newer Drover.
    #[error("the index has format version {0}, this program reads up to {VERSION}: update it")]
    Newer(u16),
    /// Shorter or longer than [`HEADER_LEN`].
    #[error("the header of an index has {HEADER_LEN} bytes, not {0}")]
    Len(usize),
    /// The chunk size or the number of chunks cannot be.
    #[error("index header: {0}")]
    Geometry(#[from] GeometryError),
    /// A field has a value that it must not have.
    #[error("index header: {0}")]
    Field(&'static str),
}

impl Header {
    /// Parses exactly [`HEADER_LEN`] bytes. Any header that parses encodes to the same bytes again.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        // Magic and version first: a header of another version may have another length.
        let mut cursor = Cursor::new(bytes);
        if cursor.array::<8>().ok() != Some(MAGIC) {
            return Err(HeaderError::NotAnIndex);
        }
        match cursor.u16() {
            Ok(VERSION) => {}
            Ok(0) | Err(CutOff) => return Err(HeaderError::NotAnIndex),
            Ok(newer) => return Err(HeaderError::Newer(newer)),
        }
        if bytes.len() != HEADER_LEN {
            return Err(HeaderError::Len(bytes.len()));
        }
        Self::checked(parse_facts(cursor).map_err(|error| match error {
            FactsError::CutOff => HeaderError::Len(bytes.len()),
            FactsError::Field(reason) => HeaderError::Field(reason),
        })?)
    }

    /// The [`HEADER_LEN`] bytes that are stored, sent and digested.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let facts = &self.facts;
        let flags = u32::from(facts.has_implicit_directories) * FLAG_IMPLICIT_DIRECTORIES
            + u32::from(facts.has_whiteouts) * FLAG_WHITEOUTS;
        let mut out = Vec::with_capacity(HEADER_LEN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.push(facts.compression.id());
        out.push(CHUNK_DIGEST_BLAKE3);
        out.push(facts.chunk_log2);
        out.extend_from_slice(&[0; 3]);
        out.extend_from_slice(&flags.to_le_bytes());
        out.extend_from_slice(&facts.entry_count.to_le_bytes());
        out.extend_from_slice(&facts.span_count.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&facts.blob_size.to_le_bytes());
        out.extend_from_slice(&facts.device_size.to_le_bytes());
        out.extend_from_slice(facts.blob.as_bytes());
        out.extend_from_slice(facts.diff_id.as_bytes());
        for section in &facts.sections {
            out.extend_from_slice(&section.size.to_le_bytes());
            out.extend_from_slice(&section.plain_size.to_le_bytes());
            out.extend_from_slice(section.digest.as_bytes());
        }
        debug_assert_eq!(out.len(), HEADER_LEN);
        let mut bytes = [0; HEADER_LEN];
        bytes.iter_mut().zip(out).for_each(|(to, from)| *to = from);
        bytes
    }

    /// SHA-256 of the encoded header: the name of the index, since the header holds the digests of the sections.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.encode())
    }

    /// Digest of the blob as the registry stores it.
    pub const fn blob(&self) -> Digest {
        self.facts.blob
    }

    /// Digest of the device.
    pub const fn diff_id(&self) -> Digest {
        self.facts.diff_id
    }

    /// Bytes of the blob.
    pub const fn blob_size(&self) -> u64 {
        self.facts.blob_size
    }

    /// Bytes of the device.
    pub const fn device_size(&self) -> u64 {
        self.facts.device_size
    }

    /// How the blob is compressed.
    pub const fn compression(&self) -> Compression {
        self.facts.compression
    }

    /// How the device is cut into chunks.
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Size and digest of a section.
    pub const fn section(&self, section: Section) -> &SectionFacts {
        &self.facts.sections[section as usize]
    }

    /// The tar leaves parent directories out, so that the layer's image depends on the layers below.
    pub const fn has_implicit_directories(&self) -> bool {
        self.facts.has_implicit_directories
    }

    /// The layer hides paths of the layers below (whiteouts or opaque directories).
    pub const fn has_whiteouts(&self) -> bool {
        self.facts.has_whiteouts
    }

    /// Paths in the entries section.
    pub const fn entry_count(&self) -> u32 {
        self.facts.entry_count
    }

    /// Spans in the spans section.
    pub const fn span_count(&self) -> u32 {
        self.facts.span_count
    }

    /// The only constructor: checks every relation between the fields that later code relies on.
    pub(crate) fn checked(facts: HeaderFacts) -> Result<Self, HeaderError> {
        let geometry = Geometry::new(facts.device_size, facts.chunk_log2)?;
        let [entries, chunk_digests, spans] = &facts.sections;
        if facts.device_size > DEVICE_SIZE_MAX {
            return Err(HeaderError::Field("the device is larger than can be mounted"));
        }
        if usize::try_from(facts.entry_count).map_or(true, |count| count > ENTRIES_MAX) {
            return Err(HeaderError::Field("too many entries"));
        }
        if facts.sections.iter().any(|section| section.size > SECTION_MAX) || entries.plain_size > SECTION_MAX {
            return Err(HeaderError::Field("a section is larger than 1 GiB"));
        }
        // No chunk count overflows here: it is a u32.
        if chunk_digests.size != u64::from(geometry.chunk_count()) * CHUNK_DIGEST_LEN {
            return Err(HeaderError::Field("the chunk digests do not fit the device size"));
        }
        if chunk_digests.plain_size != chunk_digests.size || spans.plain_size != spans.size {
            return Err(HeaderError::Field("a section that is not packed has two sizes"));
        }
        if (facts.span_count == 0) != (facts.device_size == 0) || u64::from(facts.span_count) > facts.device_size {
            return Err(HeaderError::Field("the span count does not fit the device size"));
        }
        if facts.compression == Compression::None
            && (facts.blob_size != facts.device_size || facts.blob != facts.diff_id)
        {
            return Err(HeaderError::Field("a blob without compression differs from its device"));
        }
        Ok(Self { facts, geometry })
    }
}

/// What a seeder signs for an index (DESIGN, decision 8): a domain name that no other signature of Drover has, then blob
/// digest, diffID and index digest, 32 raw bytes each.
pub fn statement(header: &Header) -> Vec<u8> {
    let mut bytes = b"drover index statement v1\n".to_vec();
    bytes.extend_from_slice(header.blob().as_bytes());
    bytes.extend_from_slice(header.diff_id().as_bytes());
    bytes.extend_from_slice(header.digest().as_bytes());
    bytes
}

impl Compression {
    /// What containerd would take a blob for that begins with `first` (at least 4 bytes, unless the blob is shorter): it
    /// goes by the magic bytes and takes whatever it does not know for a plain tar (`DetectCompression` in
    /// pkg/archive/compression).
    pub fn detect(first: &[u8]) -> Self {
        match first {
            [0x1f, 0x8b, 0x08, ..] => Self::Gzip,
            // A zstd frame, or a skippable frame before the first one.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// The compression that `media_type` settles. `None` where containerd goes by the magic bytes, which is everything but a
    /// media type that says "plain tar".
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        matches!(
            media_type,
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.oci.image.layer.nondistributable.v1.tar"
        )
        .then_some(Self::None)
    }

    /// Name in messages: `none`, `gzip`, `zstd`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    const fn id(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Gzip => 1,
            Self::Zstd => 2,
        }
    }
}

enum FactsError {
    CutOff,
    Field(&'static str),
}

impl From<CutOff> for FactsError {
    fn from(_: CutOff) -> Self {
        Self::CutOff
    }
}

/// Everything after magic and version.
fn parse_facts(mut cursor: Cursor<'_>) -> Result<HeaderFacts, FactsError> {
    let compression = match cursor.u8()? {
        0 => Compression::None,
        1 => Compression::Gzip,
        2 => Compression::Zstd,
        _ => return Err(FactsError::Field("unknown compression")),
    };
    if cursor.u8()? != CHUNK_DIGEST_BLAKE3 {
        return Err(FactsError::Field("unknown algorithm of the chunk digests"));
    }
    let chunk_log2 = cursor.u8()?;
    let reserved: [u8; 3] = cursor.array()?;
    let flags = cursor.u32()?;
    if flags & !FLAGS != 0 {
        return Err(FactsError::Field("unknown flag"));
    }
    let entry_count = cursor.u32()?;
    let span_count = cursor.u32()?;
    let reserved_too: [u8; 4] = cursor.array()?;
    let blob_size = cursor.u64()?;
    let device_size = cursor.u64()?;
    let blob = Digest::from_bytes(cursor.array()?);
    let diff_id = Digest::from_bytes(cursor.array()?);
    let mut section = || -> Result<SectionFacts, CutOff> {
        Ok(SectionFacts { size: cursor.u64()?, plain_size: cursor.u64()?, digest: Digest::from_bytes(cursor.array()?) })
    };
    let sections = [section()?, section()?, section()?];
    // Zero, so that a later version 1 program cannot mean something by them that this one overlooks.
    if reserved != [0; 3] || reserved_too != [0; 4] || !cursor.is_empty() {
        return Err(FactsError::Field("a reserved byte is not zero"));
    }
    Ok(HeaderFacts {
        blob,
        diff_id,
        blob_size,
        device_size,
        chunk_log2,
        compression,
        has_implicit_directories: flags & FLAG_IMPLICIT_DIRECTORIES != 0,
        has_whiteouts: flags & FLAG_WHITEOUTS != 0,
        entry_count,
        span_count,
        sections,
    })
}
