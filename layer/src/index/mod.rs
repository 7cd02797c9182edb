//! The index of a layer: all that must be known to mount and read it lazily (docs/index-format.md, byte by byte).
//!
//! A fixed-size [`Header`] names the layer and the three [`Section`]s, which are fetched apart: *entries* before the
//! mount, *chunk digests* before the first read, *spans* only for who inflates the blob. The header holds the sections'
//! digests, so its own digest names the whole index; [`statement`] is what a seeder signs.
//!
//! Every byte here is untrusted: a section is compared with the header's digest before it is parsed, each size is bounded
//! before it is allocated, and no input panics.

mod cursor;
mod digests;
mod entries;

mod header;
mod spans;

pub use digests::ChunkDigests;
pub use entries::parse_entries;
pub use header::{Compression, HEADER_LEN, Header, HeaderError, SectionFacts, VERSION, statement};
pub use spans::{Checkpoint, PackedWindow, SPAN_BLOB_MAX, SPAN_DEVICE_MAX, Span, Spans, WINDOW_MAX};

pub(crate) use entries::encode_entries;
pub(crate) use header::HeaderFacts;
pub(crate) use spans::{SpansEncoder, Start};

use std::fmt;

use crate::digest::Digest;

/// An index as ingest makes it: the header and the encoded bytes of its sections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Names the layer and the sections.
    pub header: Header,
    /// Bytes of [`Section::Entries`].
    pub entries: Vec<u8>,
    /// Bytes of [`Section::ChunkDigests`].
    pub chunk_digests: Vec<u8>,
    /// Bytes of [`Section::Spans`].
    pub spans: Vec<u8>,
}

impl Index {
    /// The encoded bytes of one section.
    pub fn section(&self, section: Section) -> &[u8] {
        match section {
            Section::Entries => &self.entries,
            Section::ChunkDigests => &self.chunk_digests,
            Section::Spans => &self.spans,
        }
    }
}

/// A part of the index that is fetched by itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Section {
    /// The paths of the layer: needed before the mount.
    Entries,
    /// The digest of each chunk: needed before the first read.
    ChunkDigests,
    /// Where to start inflating the blob: needed only by who reads the blob itself.
    Spans,
}

impl Section {
    /// All sections, in the order of the header's table.
    pub const ALL: [Section; 3] = [Section::Entries, Section::ChunkDigests, Section::Spans];

    /// Name in URLs, file names and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Section::Entries => "entries",
            Section::ChunkDigests => "chunk_digests",
            Section::Spans => "spans",
        }
    }

    /// The section of that [`Section::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|section| section.name() == name)
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why the bytes of a section cannot be used. Other bytes from another source may be right in all cases but
/// [`IndexError::Broken`]: there the bytes are the ones that the header names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Cut off, or not this section.
    #[error("section {section} of the index of {blob} has {got} bytes instead of {want}")]
    Size {
        /// The layer.
        blob: Digest,
        /// What was parsed.
        section: Section,
        /// Bytes that the header names.
        want: u64,
        /// Bytes that came.
        got: u64,
    },
    /// Changed on the way or on disk.
    #[error("section {section} of the index of {blob} does not have the digest that the header names")]
    Digest {
        /// The layer.
        blob: Digest,
        /// What was parsed.
        section: Section,
    },
    /// Whoever made the index made it wrong: fetching it again does not help.
    #[error("section {section} of the index of {blob} is broken: {reason}")]
    Broken {
        /// The layer.
        blob: Digest,
        /// What was parsed.
        section: Section,
        /// What is wrong in it.
        reason: String,
    },
}

impl IndexError {
    fn broken(header: &Header, section: Section, reason: impl fmt::Display) -> Self {
        Self::Broken { blob: header.blob(), section, reason: reason.to_string() }
    }
}

/// Compares the bytes of a section with the header's size and digest; every parser starts with it.
pub fn check_section(header: &Header, section: Section, bytes: &[u8]) -> Result<(), IndexError> {
    let facts = header.section(section);
    let got = bytes.len() as u64;
    if got != facts.size {
        return Err(IndexError::Size { blob: header.blob(), section, want: facts.size, got });
    }
    if Digest::of(bytes) != facts.digest {
        return Err(IndexError::Digest { blob: header.blob(), section });
    }
    Ok(())
}
