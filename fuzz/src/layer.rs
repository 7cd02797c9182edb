//! Blobs, archives, indexes, EROFS images and wire forms.

use layer::entry::Kind;
use layer::erofs::{ImageError, ImageOptions, Stack, write_image};
use layer::index::{self, ChunkDigests, Compression, HEADER_LEN, Header, Index, Spans};
use layer::ingest::{Ingest, IngestError, Options, ZSTD_WINDOW_MAX};
use layer::tar::{Limits, Scanner};
use layer::tree::Tree;
use layer::wire::{Decoder, Encoder, FrameReader};
use layer::{ChunkDigest, ChunkIndex, Digest, Geometry, span};

/// Device bytes that a target inflates at most.
const DEVICE_MAX: u64 = 1 << 20;

/// Input: how long the pushes are, then a blob. Its index is the same for every cut, and each span gives the device's bytes.
pub fn gzip(input: &[u8]) {
    blob(input);
}

/// The same; another corpus, so that the frames of zstd get their share of the time.
pub fn zstd(input: &[u8]) {
    blob(input);
}

fn blob(input: &[u8]) {
    let Some((push_len, blob)) = input.split_first() else { return };
    let (whole, device) = ingest(blob, blob.len().max(1), None);
    let (again, _) = ingest_asking(blob, usize::from(*push_len) + 1);
    // Only where the fault was seen may differ.
    assert_eq!(whole.clone().ok(), again.ok());
    let Ok(index) = whole else { return };
    assert_eq!(index.header.diff_id(), Digest::of(&device));
    let header = Header::parse(&index.header.encode()).expect("own header");
    index::parse_entries(&header, &index.entries).expect("own entries");
    let digests = ChunkDigests::parse(&header, index.chunk_digests).expect("own chunk digests");
    for (number, chunk) in (0..).zip(device.chunks(1 << 12)) {
        assert_eq!(digests.get(ChunkIndex(number)), Some(ChunkDigest::of(chunk)));
    }
    let spans = Spans::parse(&header, &index.spans).expect("own spans");
    let mut plain = Vec::new();
    for one in spans.all() {
        let bytes = &blob[one.blob.start as usize..one.blob.end as usize];
        span::inflate(one, bytes, &mut |bytes| plain.extend_from_slice(bytes)).expect("own span");
    }
    assert!(plain == device);
}

/// Input: how long the pushes are, then a device. Its tree is valid, the same for every cut, and survives the index.
pub fn tar(input: &[u8]) {
    let Some((push_len, device)) = input.split_first() else { return };
    let scan = |push_len: usize| {
        let mut scanner = Scanner::new(Limits { entries: 10_000, metadata_bytes: 1 << 22 });
        device.chunks(push_len).try_for_each(|piece| scanner.push(piece))?;
        scanner.finish()
    };
    let whole = scan(device.len().max(1));
    let again = scan(usize::from(*push_len) + 1);
    assert_eq!(whole.is_ok(), again.is_ok());
    let Ok(tree) = whole else { return };
    assert_eq!(Ok(&tree), again.as_ref());
    assert_eq!(Tree::validate(tree.entries().to_vec(), device.len() as u64), Ok(tree.clone()));
    if let (Ok(index), _) = ingest(device, device.len().max(1), Some(Compression::None)) {
        assert_eq!(index::parse_entries(&index.header, &index.entries), Ok(tree));
    }
}

/// Input: one byte of what to do, then a header; or numbers for a header and a section with the right digest.
pub fn index(input: &[u8]) {
    let Some((choice, rest)) = input.split_first() else { return };
    match choice % 4 {
        0 => {
            if let Ok(header) = Header::parse(rest) {
                assert_eq!(&header.encode()[..], rest);
            }
        }
        1 => {
            let Some((count, plain)) = rest.split_first_chunk::<2>() else { return };
            let mut packed = Vec::with_capacity(zstd_safe::compress_bound(plain.len()));
            zstd_safe::compress(&mut packed, plain, 1).expect("there is room");
            let numbers = Numbers { entries: u16::from_le_bytes(*count).into(), ..Numbers::default() };
            parse_entries(numbers, &packed, plain.len() as u64);
        }
        2 => {
            let Some((count, packed)) = rest.split_first_chunk::<2>() else { return };
            let claimed = zstd_safe::get_frame_content_size(packed).ok().flatten().unwrap_or(1);
            let numbers = Numbers { entries: u16::from_le_bytes(*count).into(), ..Numbers::default() };
            parse_entries(numbers, packed, claimed.min(DEVICE_MAX));
        }
        _ => {
            let Some(([kind, spans, size @ ..], section)) = rest.split_first_chunk::<6>() else { return };
            let device_size = u64::from(u32::from_le_bytes(*size)) % DEVICE_MAX;
            let numbers = Numbers { compression: kind % 3, spans: (*spans).into(), device_size, ..Numbers::default() };
            parse_spans(numbers, section);
        }
    }
}

/// Input: flags, a number of entries, then the unpacked entries section. A tree that it holds gives the same image each time,
/// alone and over itself, of a size that the tree bounds.
pub fn erofs(input: &[u8]) {
    let Some(([flags, count @ ..], plain)) = input.split_first_chunk::<3>() else { return };
    let mut packed = Vec::with_capacity(zstd_safe::compress_bound(plain.len()));
    zstd_safe::compress(&mut packed, plain, 1).expect("there is room");
    let entries = u16::from_le_bytes(*count).into();
    let numbers = Numbers { entries, device_size: DEVICE_MAX, spans: 1, compression: 1 };
    let Some(header) = forge(numbers, [(&packed, plain.len() as u64), (&[], 0), (&[], 0)]) else { return };
    let Ok(tree) = index::parse_entries(&header, &packed) else { return };
    // An inode, its names in a directory of half empty blocks, its attributes and target, and what its extents take.
    let bound: usize = tree
        .entries()
        .iter()
        .map(|entry| {
            let xattrs: usize = entry.xattrs.iter().map(|xattr| 16 + xattr.name.len() + xattr.value.len()).sum();
            let target = match &entry.kind {
                Kind::Symlink { target } => target.len(),
                Kind::Regular { size, .. } => *size as usize / 512 * 8,
                _ => 0,
            };
            2048 + 4 * entry.path.len() + 2 * xattrs + 2 * target
        })
        .sum();
    let options = ImageOptions { device_size: DEVICE_MAX, bottom: flags & 1 != 0, uuid: [*flags; 16] };
    let lower = [&tree];
    let image = || {
        let mut image = Vec::new();
        let stack = Stack::new(if flags & 2 != 0 { &lower } else { &[] });
        match write_image(&tree, &options, &stack, &mut image) {
            Ok(summary) => {
                assert_eq!(summary.size, image.len() as u64);
                assert!(image.len() <= 4096 + bound, "{} bytes of at most {bound}", image.len());
                Some(image)
            }
            Err(ImageError::Unsupported(_)) => None,
            Err(ImageError::Write(error)) => panic!("a vector takes everything: {error}"),
        }
    };
    assert!(image() == image());
}

/// Input: a device size, how long the pushes are, then frames. What is decoded has its chunk's length and can be sent again.
pub fn wire(input: &[u8]) {
    let Some(([low, high, push_len], frames)) = input.split_first_chunk::<3>() else { return };
    let geometry = Geometry::new(u16::from_le_bytes([*low, *high]).into(), 12).expect("a small device");
    let mut reader = FrameReader::new(geometry, geometry.chunks());
    let (mut decoder, mut own, mut encoder) = (Decoder::new(), Decoder::new(), Encoder::new());
    let mut again = Vec::new();
    for piece in frames.chunks(usize::from(*push_len) + 1) {
        reader.push(piece);
        loop {
            let (chunk, frame) = match reader.next_frame() {
                Ok(Some(next)) => next,
                Ok(None) => break,
                Err(_) => return,
            };
            assert!(frame.wire_len() <= geometry.chunk_len(chunk) + 4);
            if let Ok(plain) = decoder.decode(frame, geometry.chunk_len(chunk)) {
                assert_eq!(plain.len(), geometry.chunk_len(chunk));
                again.clear();
                encoder.encode(plain, &mut again);
                let (frame, rest) = layer::wire::Frame::split(&again).expect("own frame");
                assert!(rest.is_empty());
                assert!(own.decode(frame, plain.len()).expect("own frame") == plain);
            }
        }
    }
    let _ = reader.finish();
}

fn ingest(blob: &[u8], push_len: usize, compression: Option<Compression>) -> (Result<Index, IngestError>, Vec<u8>) {
    ingest_within(blob, push_len, compression, ZSTD_WINDOW_MAX)
}

/// The same; each window is asked for.
fn ingest_asking(blob: &[u8], push_len: usize) -> (Result<Index, IngestError>, Vec<u8>) {
    ingest_within(blob, push_len, None, 0)
}

fn ingest_within(
    blob: &[u8],
    push_len: usize,
    compression: Option<Compression>,
    window: u64,
) -> (Result<Index, IngestError>, Vec<u8>) {
    // Short spans, so that small inputs have many.
    let options = Options {
        chunk_log2: 12,
        span_len: 1000,
        device_size_max: DEVICE_MAX,
        limits: Limits { entries: 10_000, metadata_bytes: 1 << 22 },
    };
    let mut device = Vec::new();
    let mut sink = |_, plain: &[u8], _| device.extend_from_slice(plain);
    let mut ingest =
        Ingest::new(Digest::of(blob), Some(blob.len() as u64), compression, options).expect("good options");
    ingest.limit_window(window);
    for (number, piece) in blob.chunks(push_len).enumerate() {
        ingest.push(piece, &mut sink).expect("the size is right");
        // Now and then the answer is late.
        while number % 3 != 0
            && let Some(wanted) = ingest.window_wanted()
        {
            assert!(wanted <= ZSTD_WINDOW_MAX);
            ingest.allow_window(wanted, &mut sink);
            ingest.limit_window(window);
        }
    }
    let result = ingest.finish(&mut sink);
    (result, device)
}

/// What a forged header says beside sizes and digests.
#[derive(Default)]
struct Numbers {
    compression: u8,
    entries: u32,
    spans: u32,
    device_size: u64,
}

fn parse_entries(numbers: Numbers, packed: &[u8], plain_size: u64) {
    let device_size = 1 << 20;
    let numbers = Numbers { device_size, spans: 1, compression: 1, ..numbers };
    let Some(header) = forge(numbers, [(packed, plain_size), (&[], 0), (&[], 0)]) else { return };
    if let Ok(tree) = index::parse_entries(&header, packed) {
        assert_eq!(Tree::validate(tree.entries().to_vec(), device_size), Ok(tree));
    }
}

fn parse_spans(numbers: Numbers, section: &[u8]) {
    let device_size = numbers.device_size;
    let Some(header) = forge(numbers, [(&[], 0), (&[], 0), (section, section.len() as u64)]) else { return };
    let Ok(spans) = Spans::parse(&header, section) else { return };
    let mut next = 0;
    for one in spans.all() {
        assert_eq!(one.device.start, next);
        assert!(one.device.end > next && one.blob.end <= header.blob_size());
        next = one.device.end;
        // Any bytes may come as the blob, so take the section's.
        let mut len = 0;
        let result = span::inflate(one, section, &mut |plain| len += plain.len() as u64);
        assert!(len <= one.device.end - one.device.start);
        assert!(result.is_err() || len == one.device.end - one.device.start);
    }
    assert_eq!(next, device_size);
    assert_eq!(spans.covering(header.geometry().chunks()).len(), spans.all().len());
}

/// A header (docs/index-format.md) with sections of the right sizes and digests; `None` where the numbers cannot be.
fn forge(numbers: Numbers, sections: [(&[u8], u64); 3]) -> Option<Header> {
    let chunk_digests = vec![0; numbers.device_size.div_ceil(1 << 17) as usize * 32];
    let mut bytes = b"\x8bDRIDX\r\n\x01\0".to_vec();
    bytes.extend_from_slice(&[numbers.compression, 1, 17, 0, 0, 0]);
    bytes.extend_from_slice(&0u32.to_le_bytes());
    bytes.extend_from_slice(&numbers.entries.to_le_bytes());
    bytes.extend_from_slice(&numbers.spans.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&numbers.device_size.to_le_bytes());
    bytes.extend_from_slice(&numbers.device_size.to_le_bytes());
    bytes.extend_from_slice(&[0; 64]);
    for (number, (section, plain_size)) in sections.into_iter().enumerate() {
        let (section, plain_size) =
            if number == 1 { (&chunk_digests[..], chunk_digests.len() as u64) } else { (section, plain_size) };
        bytes.extend_from_slice(&(section.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&plain_size.to_le_bytes());
        bytes.extend_from_slice(Digest::of(section).as_bytes());
    }
    assert_eq!(bytes.len(), HEADER_LEN);
    Header::parse(&bytes).ok()
}
