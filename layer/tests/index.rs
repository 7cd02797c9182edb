//! Hostile and damaged indexes: an error, never a panic, never without bound.

use std::fs;
use std::path::{Path, PathBuf};

mod blobs;

use blobs::{bytes, gzip_flushed, ingest, tar};
use layer::Digest;
use layer::index::{
    self, Checkpoint, ChunkDigests, HEADER_LEN, Header, HeaderError, Index, IndexError, Section, Spans, VERSION,
};
use layer::span;
use proptest::prelude::*;

const SECTIONS_AT: usize = 112;

/// A layer with all kinds of paths and several spans.
fn small() -> (Vec<u8>, Index) {
    let blob = gzip_flushed(&tar(&[bytes(1, 3000, 40), vec![0; 9 << 20], bytes(2, 20_000, 200)]), 100_000, 6);
    let index = ingest(&blob).unwrap();
    assert!(index.header.span_count() > 2);
    (blob, index)
}

fn parse(header: &Header, section: Section, bytes: &[u8]) -> Result<(), IndexError> {
    match section {
        Section::Entries => index::parse_entries(header, bytes).map(drop),
        Section::ChunkDigests => ChunkDigests::parse(header, bytes.to_vec()).map(drop),
        Section::Spans => Spans::parse(header, bytes).map(drop),
    }
}

/// `header` as someone would write it who wants `bytes` to be taken for the section.
fn forge(header: &Header, section: Section, bytes: &[u8]) -> Result<Header, HeaderError> {
    let at = SECTIONS_AT + 48 * section as usize;
    let mut encoded = header.encode();
    let old_size = header.section(section).size;
    encoded[at..at + 8].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    if header.section(section).plain_size == old_size {
        encoded[at + 8..at + 16].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    }
    encoded[at + 16..at + 48].copy_from_slice(Digest::of(bytes).as_bytes());
    Header::parse(&encoded)
}

#[test]
fn header_comes_back_and_names_the_index() {
    let (_, index) = small();
    let encoded = index.header.encode();
    assert_eq!(encoded.len(), HEADER_LEN);
    assert_eq!(Header::parse(&encoded), Ok(index.header.clone()));
    assert_eq!(index.header.digest(), Digest::of(&encoded));
    let statement = index::statement(&index.header);
    assert!(statement.starts_with(b"drover index statement v1\n"));
    assert_eq!(statement.len(), 26 + 3 * 32);
    for section in Section::ALL {
        assert_eq!(index.header.section(section).digest, Digest::of(index.section(section)));
        assert_eq!(Section::from_name(section.name()), Some(section));
    }
}

#[test]
fn a_newer_version_is_refused_by_name() {
    let mut encoded = small().1.header.encode().to_vec();
    encoded[8..10].copy_from_slice(&(VERSION + 1).to_le_bytes());
    // Another version may have another length.
    encoded.extend_from_slice(b"more");
    let error = Header::parse(&encoded).unwrap_err();
    assert_eq!(error, HeaderError::Newer(VERSION + 1));
    assert!(error.to_string().contains("update"), "{error}");
}

#[test]
fn every_flip_in_the_header_is_seen() {
    let (_, index) = small();
    let mut encoded = index.header.encode();
    for at in 0..encoded.len() {
        for bit in 0..8 {
            encoded[at] ^= 1 << bit;
            // What cannot be seen in the header alone is seen by its digest, and so by the signature.
            assert!(Header::parse(&encoded).map_or(true, |header| {
                header.digest() != index.header.digest() && index::statement(&header) != index::statement(&index.header)
            }));
            encoded[at] ^= 1 << bit;
        }
    }
    for len in 0..HEADER_LEN {
        assert!(Header::parse(&encoded[..len]).is_err());
    }
}

#[test]
fn every_flip_and_cut_in_a_section_is_seen() {
    let (_, index) = small();
    for section in Section::ALL {
        let mut bytes = index.section(section).to_vec();
        assert_eq!(parse(&index.header, section, &bytes), Ok(()));
        for at in 0..bytes.len() {
            bytes[at] ^= 0x41;
            assert!(matches!(parse(&index.header, section, &bytes), Err(IndexError::Digest { .. })));
            bytes[at] ^= 0x41;
            assert!(matches!(parse(&index.header, section, &bytes[..at]), Err(IndexError::Size { .. })));
        }
        bytes.push(0);
        assert!(matches!(parse(&index.header, section, &bytes), Err(IndexError::Size { .. })));
    }
}

/// With the digest made right, the parsers are on their own.
#[test]
fn no_forged_section_panics() {
    let (blob, index) = small();
    for section in Section::ALL {
        let bytes = index.section(section);
        let mut forged = 0;
        for at in 0..bytes.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bytes = bytes.to_vec();
                bytes[at] ^= flip;
                let header = forge(&index.header, section, &bytes).unwrap();
                forged += usize::from(parse(&header, section, &bytes).is_ok());
                if section == Section::Spans && at % 16 == 0 {
                    inflate_all(&blob, &header, &bytes);
                }
            }
            if let Ok(header) = forge(&index.header, section, &bytes[..at]) {
                assert!(
                    matches!(parse(&header, section, &bytes[..at]), Err(IndexError::Broken { .. })),
                    "{section} {at}"
                );
            }
        }
        assert!(section != Section::ChunkDigests || forged == bytes.len() * 3);
    }
}

/// Reads all spans, whatever they say: each gives at most what it claims.
fn inflate_all(blob: &[u8], header: &Header, bytes: &[u8]) {
    let Ok(spans) = Spans::parse(header, bytes) else { return };
    for span in spans.all() {
        let blob = &blob[span.blob.start as usize..span.blob.end as usize];
        let mut len = 0;
        let result = span::inflate(span, blob, &mut |plain| len += plain.len() as u64);
        let want = span.device.end - span.device.start;
        assert!(len <= want && (result.is_err() || len == want));
    }
}

/// A frame that claims and holds far more than the header says must not be unpacked.
#[test]
fn an_entries_bomb_is_refused() {
    let (_, index) = small();
    let mut bomb = Vec::with_capacity(1 << 20);
    zstd_safe::compress(&mut bomb, &vec![0; 64 << 20], 3).unwrap();
    let header = forge(&index.header, Section::Entries, &bomb).unwrap();
    assert!(matches!(index::parse_entries(&header, &bomb), Err(IndexError::Broken { .. })));
}

proptest! {
    #[test]
    fn any_bytes_are_no_header(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Header::parse(&bytes).is_err());
    }

    #[test]
    fn any_entries_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 1..300)) {
        let header = PLAIN.with(|header| header.clone());
        // Unpacked garbage, in a frame of its own that is right.
        let mut packed = Vec::with_capacity(zstd_safe::compress_bound(bytes.len()));
        zstd_safe::compress(&mut packed, &bytes, 1).unwrap();
        let mut encoded = forge(&header, Section::Entries, &packed).unwrap().encode();
        let at = SECTIONS_AT + 8;
        encoded[at..at + 8].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        let header = Header::parse(&encoded).unwrap();
        prop_assert!(index::parse_entries(&header, &packed).is_err());
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/index-v1").join(name)
}

/// The index of a blob is the same on every machine, and one that an earlier program made can be read.
#[test]
fn index_of_version_1() {
    let read = |name: &str| fs::read(fixture(name)).unwrap();
    let blob = read("blob.tar.gz");
    let header = Header::parse(&read("header")).unwrap();
    assert_eq!(header.span_count(), 2);
    let spans = Spans::parse(&header, &read("spans")).unwrap();
    assert!(matches!(&spans.all()[1].checkpoint, Checkpoint::Deflate { window, .. } if window.packed_len() > 1000));
    inflate_all(&blob, &header, &read("spans"));
    ChunkDigests::parse(&header, read("chunk_digests")).unwrap();
    index::parse_entries(&header, &read("entries")).unwrap();

    let index = ingest(&blob).unwrap();
    assert_eq!(index.header, header);
    for section in Section::ALL {
        assert!(index.section(section) == read(section.name()), "{section}");
    }
}

/// Writes the fixture. Only for a new version of the format: this one's must stay readable as it is.
#[test]
#[ignore = "writes into the source tree"]
fn write_fixture() {
    let blob = gzip_flushed(&tar(&[bytes(1, 3000, 120).repeat(1700), bytes(2, 700, 40)]), 1 << 20, 6);
    let index = ingest(&blob).unwrap();
    fs::create_dir_all(fixture("")).unwrap();
    fs::write(fixture("blob.tar.gz"), &blob).unwrap();
    fs::write(fixture("header"), index.header.encode()).unwrap();
    for section in Section::ALL {
        fs::write(fixture(section.name()), index.section(section)).unwrap();
    }
}

thread_local! {
    static PLAIN: Header = ingest(&tar(&[])).unwrap().header;
}
