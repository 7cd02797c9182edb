//! Ingest and random reads, over blobs as different tools make them.

mod blobs;

use blobs::{
    bytes, gzip, gzip_flushed, gzip_members, gzip_with_fields, ingest, ingest_in, tar, zstd, zstd_chunked, zstd_frames,
    zstd_skippable,
};
use layer::entry::Kind;
use layer::index::{self, Checkpoint, ChunkDigests, Compression, Header, Index, Spans};
use layer::ingest::{IngestError, Options, SPAN_LEN};
use layer::span::{self, InflateError, SpanInflater};
use layer::{ChunkIndex, Digest};
use proptest::prelude::*;

/// Parses all sections as a node would and reads every span of the blob; all must agree with the device.
fn check(blob: &[u8], device: &[u8], index: &Index) -> Spans {
    let header = Header::parse(&index.header.encode()).unwrap();
    assert_eq!(header, index.header);
    assert_eq!(header.blob(), Digest::of(blob));
    assert_eq!(header.blob_size(), blob.len() as u64);
    assert_eq!(header.diff_id(), Digest::of(device));
    assert_eq!(header.device_size(), device.len() as u64);

    let tree = index::parse_entries(&header, &index.entries).unwrap();
    assert_eq!(tree.entries().len(), header.entry_count() as usize);

    let digests = ChunkDigests::parse(&header, index.chunk_digests.clone()).unwrap();
    for (chunk, plain) in (0..).zip(device.chunks(header.geometry().chunk_size() as usize)) {
        assert!(digests.is_chunk(ChunkIndex(chunk), plain));
        assert!(!digests.is_chunk(ChunkIndex(chunk), &plain[1..]));
    }
    assert_eq!(digests.get(ChunkIndex(header.geometry().chunk_count())), None);

    let spans = Spans::parse(&header, &index.spans).unwrap();
    let mut next = 0;
    for span in spans.all() {
        assert_eq!(span.device.start, next);
        next = span.device.end;
        let mut plain = Vec::new();
        span::inflate(span, slice(blob, &span.blob), &mut |bytes| plain.extend_from_slice(bytes)).unwrap();
        assert!(plain == slice(device, &span.device), "span {:?} differs", span.device);
    }
    assert_eq!(next, device.len() as u64);
    spans
}

fn slice<'a>(bytes: &'a [u8], range: &std::ops::Range<u64>) -> &'a [u8] {
    &bytes[range.start as usize..range.end as usize]
}

/// A device of about `mebibytes` MiB whose compressibility changes.
fn large_device(mebibytes: usize) -> Vec<u8> {
    let files: Vec<Vec<u8>> = (0..mebibytes * 2)
        .map(|number| bytes(number as u64, 510_000 + number * 77, [10, 60, 255, 0][number % 4]))
        .collect();
    tar(&files)
}

#[test]
fn single_member_blobs() {
    let device = large_device(13);
    for blob in [gzip(&device, 6), gzip_with_fields(&device, 9), gzip(&device, 0)] {
        let (index, plain) = ingest_in(&blob, 70_000, None, Options::default()).unwrap();
        assert!(plain == device);
        assert_eq!(index.header.compression(), Compression::Gzip);
        let spans = check(&blob, &device, &index);
        assert!(spans.all().len() >= 3, "{}", spans.all().len());
        for span in &spans.all()[..spans.all().len() - 1] {
            let len = span.device.end - span.device.start;
            assert!((SPAN_LEN..SPAN_LEN + (1 << 20)).contains(&len), "{len}");
        }
        assert!(spans.all()[1..].iter().all(|span| matches!(span.checkpoint, Checkpoint::Deflate { .. })));
    }
}

/// zlib-ng and zlib-rs write one fixed block at level 1, however long: nothing in it can be read by itself.
#[test]
fn one_endless_block_is_one_span() {
    let device = large_device(5);
    let blob = gzip(&device, 1);
    let spans = check(&blob, &device, &ingest(&blob).unwrap());
    assert!(spans.all()[0].device.end > SPAN_LEN + (1 << 18));
}

#[test]
fn member_starts_are_free_checkpoints_of_merged_spans() {
    let device = large_device(7);
    let blob = gzip_members(&device, 3000, 6);
    let index = ingest(&blob).unwrap();
    let spans = check(&blob, &device, &index);
    assert!(spans.all().iter().all(|span| span.checkpoint == Checkpoint::MemberStart));
    for span in &spans.all()[..spans.all().len() - 1] {
        let len = span.device.end - span.device.start;
        assert!((SPAN_LEN / 2..SPAN_LEN / 2 + 3000).contains(&len), "{len}");
    }
}

#[test]
fn flushed_blocks_start_at_bytes() {
    let device = large_device(7);
    let blob = gzip_flushed(&device, 131_072, 6);
    let spans = check(&blob, &device, &ingest(&blob).unwrap());
    assert!(spans.all().len() >= 2);
}

/// However large: nothing inside a frame can be read by itself.
#[test]
fn one_zstd_frame_is_one_span() {
    let device = large_device(9);
    for (checksum, size) in [(false, false), (false, true), (true, false), (true, true)] {
        let blob = zstd(&device, 3, checksum, size);
        for compression in [None, Compression::of_media_type("application/vnd.oci.image.layer.v1.tar+zstd")] {
            let (index, plain) = ingest_in(&blob, 70_000, compression, Options::default()).unwrap();
            assert!(plain == device);
            assert_eq!(index.header.compression(), Compression::Zstd);
            let spans = check(&blob, &device, &index);
            let [span] = spans.all() else { panic!("{} spans", spans.all().len()) };
            assert_eq!((span.blob.clone(), span.checkpoint.clone()), (0..blob.len() as u64, Checkpoint::FrameStart));
        }
    }
}

#[test]
fn zstd_frames_are_free_checkpoints_of_merged_spans() {
    let device = large_device(7);
    for blob in [zstd_frames(&device, 3000, 3), zstd_chunked(&device, 3000, 3)] {
        let index = ingest(&blob).unwrap();
        let spans = check(&blob, &device, &index);
        assert!(spans.all().iter().all(|span| span.checkpoint == Checkpoint::FrameStart));
        for span in &spans.all()[..spans.all().len() - 1] {
            let len = span.device.end - span.device.start;
            assert!((SPAN_LEN / 2..SPAN_LEN / 2 + 3000).contains(&len), "{len}");
        }
    }
    // Frames that are larger than a span stay whole.
    let spans = check(&zstd_frames(&device, 3 << 20, 3), &device, &ingest(&zstd_frames(&device, 3 << 20, 3)).unwrap());
    assert_eq!(spans.all()[1].device, 3 << 20..6 << 20);
}

#[test]
fn a_zstd_blob_without_content_is_an_empty_layer() {
    for blob in
        [zstd(&[], 3, true, true), zstd_skippable(0, 9), [zstd_skippable(7, 0), zstd(&[], 1, false, false)].concat()]
    {
        let index = ingest(&blob).unwrap();
        assert_eq!((index.header.device_size(), index.header.span_count()), (0, 0));
        check(&blob, &[], &index);
    }
}

/// As containerd's decoder has it: nothing but frames, all of them whole, in memory that has a bound.
#[test]
fn broken_zstd_is_refused() {
    let device = tar(&[bytes(1, 300_000, 200)]);
    let good = zstd(&device, 3, true, true);
    let inflate_error = |blob: &[u8]| match ingest(blob) {
        Err(IngestError::Inflate { source, .. }) => source,
        other => panic!("{other:?}"),
    };
    for tail in [&b"junk"[..], &[0; 512], &gzip(b"x", 1)] {
        let offset = good.len() as u64 + 4;
        let error = inflate_error(&[&good, tail].concat());
        assert_eq!(error, InflateError::Frame { offset, reason: "no frame begins here" });
    }
    let cut = |len: usize, blob: &[u8]| match inflate_error(&blob[..len]) {
        InflateError::CutOff { offset, .. } => assert_eq!(offset, len as u64),
        other => panic!("cut at {len}: {other:?}"),
    };
    for len in [5, 9, 17, 1000, good.len() / 2, good.len() - 4, good.len() - 1] {
        cut(len, &good);
    }
    let chunked = zstd_chunked(&device, 3000, 3);
    cut(chunked.len() - 1, &chunked);
    cut(good.len() + 2, &[&good[..], &[0x28, 0xb5]].concat());

    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    assert!(matches!(inflate_error(&flipped), InflateError::Frame { .. }), "the checksum is wrong");
    // A window of 64 MiB: good for whoever has the memory, so the layer is declined and not called broken.
    let large = [&[0x28, 0xb5, 0x2f, 0xfd, 0, 16 << 3, 1, 0, 0][..], &good].concat();
    match ingest(&large) {
        Err(IngestError::Unsupported { reason, .. }) => assert!(reason.contains("67108864"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

/// Blocks of repeated bytes: 128 KiB of output for each 4 bytes.
#[test]
fn a_zstd_bomb_stops_at_the_limit() {
    let mut blob = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 10 << 3];
    for _ in 0..200_000 {
        blob.extend_from_slice(&((1 << 17 << 3 | 1 << 1) as u32).to_le_bytes()[..3]);
        blob.push(0);
    }
    let options = Options { device_size_max: 1 << 20, ..Options::default() };
    let mut given = 0;
    let mut ingest = layer::ingest::Ingest::new(Digest::of(&blob), None, None, options).unwrap();
    ingest.push(&blob, &mut |_, plain, _| given += plain.len()).unwrap();
    assert!(matches!(ingest.failure(), Some(IngestError::Unsupported { .. })), "{:?}", ingest.failure());
    assert!(given < 2 << 20, "{given}");
}

#[test]
fn plain_tar() {
    let device = large_device(7);
    for compression in [None, Some(Compression::None)] {
        let (index, plain) = ingest_in(&device, 99_999, compression, Options::default()).unwrap();
        assert!(plain == device);
        let spans = check(&device, &device, &index);
        assert_eq!(spans.all().len(), device.len().div_ceil(SPAN_LEN as usize));
    }
}

#[test]
fn index_depends_on_the_blob_alone() {
    let device = large_device(5);
    for blob in [
        gzip(&device, 6),
        gzip_members(&device, 100_000, 6),
        gzip_flushed(&device, 65_536, 1),
        zstd(&device, 3, true, false),
        zstd_frames(&device, 100_000, 3),
        zstd_chunked(&device, 100_000, 3),
        device.clone(),
    ] {
        let whole = ingest(&blob).unwrap();
        for piece_len in [4093, 65_536, 1_000_003] {
            let (index, _) = ingest_in(&blob, piece_len, None, Options::default()).unwrap();
            assert!(index == whole, "pushes of {piece_len} bytes give another index");
        }
    }
    // One byte at a time, on a small one with boundaries all over.
    let device = tar(&[bytes(1, 20_000, 40)]);
    let blob = gzip_flushed(&device, 100, 6);
    assert!(ingest_in(&blob, 1, None, Options::default()).unwrap().0 == ingest(&blob).unwrap());
}

/// Positions of boundaries must not depend on pushes that end right at one: every split around the place where spans end.
#[test]
fn checkpoints_do_not_depend_on_where_pushes_end() {
    let mut device = tar(&[bytes(3, (SPAN_LEN as usize) - 40_000, 30)]);
    device.extend(vec![0; 200_000]);
    let blob = gzip_flushed(&device, 512, 6);
    let whole = ingest(&blob).unwrap();
    let spans = check(&blob, &device, &whole);
    let start = spans.all()[1].blob.start as usize;
    for cut in start - 40..start + 40 {
        let (first, last) = blob.split_at(cut);
        let mut ingest = layer::ingest::Ingest::new(Digest::of(&blob), None, None, Options::default()).unwrap();
        ingest.push(first, &mut |_, _, _| {}).unwrap();
        ingest.push(last, &mut |_, _, _| {}).unwrap();
        assert!(ingest.finish(&mut |_, _, _| {}).unwrap() == whole, "cut at {cut}, the span starts at {start}");
    }
}

#[test]
fn covering_finds_the_spans_of_chunks() {
    let device = large_device(13);
    let index = ingest(&gzip(&device, 6)).unwrap();
    let spans = Spans::parse(&index.header, &index.spans).unwrap();
    let geometry = index.header.geometry();
    for chunk in geometry.chunks() {
        let bytes = geometry.range(ChunkIndex(chunk));
        let covering = spans.covering(chunk..chunk + 1);
        assert!(covering.first().unwrap().device.start <= bytes.start);
        assert!(covering.last().unwrap().device.end >= bytes.end);
        assert!(covering.iter().all(|span| span.device.start < bytes.end && span.device.end > bytes.start));
    }
    assert_eq!(spans.covering(geometry.chunks()).len(), spans.all().len());
    assert!(spans.covering(3..3).is_empty());
    assert!(spans.covering(geometry.chunk_count()..u32::MAX).is_empty());
}

#[test]
fn every_kind_of_path_comes_back() {
    let files = [bytes(1, 1000, 9), bytes(2, 600, 9), Vec::new()];
    let device = tar(&files);
    let index = ingest(&gzip(&device, 6)).unwrap();
    assert!(index.header.has_implicit_directories());
    assert!(index.header.has_whiteouts());
    let tree = index::parse_entries(&index.header, &index.entries).unwrap();
    let mut scanner = layer::tar::Scanner::new(layer::tar::Limits::default());
    scanner.push(&device).unwrap();
    assert_eq!(tree, scanner.finish().unwrap());
    for (number, content) in files.iter().enumerate() {
        let entry = tree.get(format!("etc/file{number:05}").as_bytes()).unwrap();
        let Kind::Regular { offset, size } = entry.kind else { panic!("{entry:?}") };
        assert_eq!(slice(&device, &(offset..offset + size)), content);
        assert_eq!((entry.mode, entry.uid, entry.gid, entry.mtime.secs), (0o640, 1000, 100, 1_700_000_000));
    }
}

#[test]
fn device_that_is_no_multiple_of_512() {
    let mut device = tar(&[bytes(1, 5000, 9)]);
    device.extend_from_slice(b"behind the end of the tar");
    let blob = gzip(&device, 6);
    check(&blob, &device, &ingest(&blob).unwrap());
}

/// Go's reader refuses both, unpigz accepts both; the diffID proves the device either way.
#[test]
fn bytes_after_the_last_member_are_ignored() {
    let device = tar(&[bytes(1, 5000, 9)]);
    for tail in [&[0; 512][..], b"junk", &[0x1f], &[0x1f, 0x8c, 1]] {
        let blob = [&gzip(&device, 6), tail].concat();
        check(&blob, &device, &ingest(&blob).unwrap());
        assert!(ingest_in(&blob, 1, None, Options::default()).is_ok());
    }
    let blob = [&gzip(&device, 6), &[0x1f, 0x8b, 8, 0][..]].concat();
    assert!(matches!(ingest(&blob), Err(IngestError::Inflate { source: InflateError::CutOff { .. }, .. })));
}

#[test]
fn wrong_bytes_are_not_the_blob() {
    let blob = gzip(&tar(&[bytes(1, 5000, 9)]), 6);
    let ingest_as = |want: Digest, size: Option<u64>, bytes: &[u8]| {
        let mut ingest = layer::ingest::Ingest::new(want, size, None, Options::default()).unwrap();
        ingest.push(bytes, &mut |_, _, _| {})?;
        ingest.finish(&mut |_, _, _| {})
    };
    let mut flipped = blob.clone();
    for at in 0..blob.len() {
        flipped[at] ^= 0x10;
        // Whatever the flip does to the content, the digest is what is reported.
        assert!(matches!(ingest_as(Digest::of(&blob), None, &flipped), Err(IngestError::WrongBlob { .. })), "{at}");
        flipped[at] ^= 0x10;
    }
    let size = blob.len() as u64;
    for wrong in [size - 1, size + 1] {
        assert!(matches!(ingest_as(Digest::of(&blob), Some(wrong), &blob), Err(IngestError::WrongSize { .. })));
    }
}

#[test]
fn a_cut_blob_tells_where() {
    let device = tar(&[bytes(1, 20_000, 30)]);
    let blob = gzip(&device, 6);
    for len in 4..blob.len() {
        match ingest(&blob[..len]) {
            Err(IngestError::Inflate { source: InflateError::CutOff { offset, .. }, .. }) => {
                assert_eq!(offset, len as u64);
            }
            other => panic!("cut at {len}: {other:?}"),
        }
    }
}

#[test]
fn broken_and_unsupported_content_is_told_at_the_end() {
    let device = tar(&[bytes(1, 20_000, 30)]);
    let mut blob = gzip(&device, 6);
    let size_at = blob.len() - 4;
    blob[size_at] ^= 1;
    assert!(matches!(ingest(&blob), Err(IngestError::Inflate { source: InflateError::Member { .. }, .. })));
    let mut broken = device.clone();
    broken[0] ^= 1;
    let blob = gzip(&broken, 6);
    assert!(matches!(ingest(&blob), Err(IngestError::Tar { .. })));
    let mut early = layer::ingest::Ingest::new(Digest::of(&blob), None, None, Options::default()).unwrap();
    assert_eq!(early.failure(), None);
    // The device is smaller than a chunk: it is scanned at the end.
    early.push(&blob, &mut |_, _, _| {}).unwrap();
    assert!(early.finish(&mut |_, _, _| {}).is_err());
}

#[test]
fn a_bomb_stops_at_the_limit() {
    let device = tar(&[vec![0; 8 << 20]]);
    let blob = gzip(&device, 9);
    let options = Options { device_size_max: 1 << 20, ..Options::default() };
    let mut given = 0;
    let mut ingest = layer::ingest::Ingest::new(Digest::of(&blob), None, None, options).unwrap();
    for piece in blob.chunks(100) {
        ingest.push(piece, &mut |_, plain, _| given += plain.len()).unwrap();
    }
    assert!(matches!(ingest.failure(), Some(IngestError::Unsupported { .. })));
    assert!(matches!(ingest.finish(&mut |_, _, _| {}), Err(IngestError::Unsupported { .. })));
    assert!(given < 2 << 20, "{given}");
}

#[test]
fn a_span_gives_its_bytes_or_an_error() {
    let device = large_device(7);
    let blob = gzip(&device, 6);
    let index = ingest(&blob).unwrap();
    let spans = Spans::parse(&index.header, &index.spans).unwrap();
    let span = &spans.all()[1];
    let bytes = slice(&blob, &span.blob);
    let want = slice(&device, &span.device);

    let mut inflater = SpanInflater::new(span).unwrap();
    let mut plain = Vec::new();
    for piece in bytes.chunks(777) {
        inflater.push(piece, &mut |bytes| plain.extend_from_slice(bytes)).unwrap();
    }
    assert!(inflater.is_done());
    inflater.finish().unwrap();
    assert!(plain == want);

    // Cut short, and of other bytes: an error or wrong bytes, but never more than the span has.
    let error = span::inflate(span, &bytes[..bytes.len() / 2], &mut |_| {}).unwrap_err();
    assert!(matches!(error, InflateError::CutOff { .. }), "{error}");
    for at in (0..bytes.len()).step_by(bytes.len() / 40) {
        let mut flipped = bytes.to_vec();
        flipped[at] ^= 4;
        let mut len = 0;
        let result = span::inflate(span, &flipped, &mut |bytes| len += bytes.len());
        assert!(len <= want.len());
        assert!(result.is_err() || len == want.len());
    }
    // A blob that goes on and on gives no more than the span.
    let mut long = span.clone();
    long.device.end = long.device.start + 1000;
    let mut len = 0;
    span::inflate(&long, bytes, &mut |bytes| len += bytes.len()).unwrap();
    assert_eq!(len, 1000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_blob_in_any_pushes(
        seed in any::<u64>(),
        lens in prop::collection::vec(0usize..100_000, 0..12),
        noise in any::<u8>(),
        level in 0u32..=9,
        style in 0..7,
        member_len in 1usize..200_000,
        piece_len in 1usize..300_000,
        chunk_log2 in 12u8..=20,
        span_len_log2 in 9u32..=22,
    ) {
        let files: Vec<Vec<u8>> = lens.iter().enumerate().map(|(n, len)| bytes(seed ^ n as u64, *len, noise)).collect();
        let device = tar(&files);
        let blob = match style {
            0 => gzip(&device, level),
            1 => gzip_members(&device, member_len.max(2000), level),
            2 => gzip_flushed(&device, member_len, level),
            3 => zstd(&device, level as i32, noise % 2 == 0, noise % 3 == 0),
            4 => zstd_frames(&device, member_len.max(2000), level as i32),
            5 => zstd_chunked(&device, member_len.max(2000), level as i32),
            _ => device.clone(),
        };
        let options = Options { chunk_log2, span_len: 1 << span_len_log2, ..Options::default() };
        let (index, plain) = ingest_in(&blob, piece_len, None, options).unwrap();
        prop_assert!(plain == device);
        check(&blob, &device, &index);
        prop_assert!(ingest_in(&blob, blob.len(), None, options).unwrap().0 == index);
    }
}

/// What the usual programs write.
#[test]
fn blobs_of_pigz_gzip_and_python() {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    let device = large_device(7);
    const PYTHON: &str = "import gzip,sys; f=gzip.GzipFile('layer.tar','wb',6,sys.stdout.buffer,1.5); f.write(sys.stdin.buffer.read()); f.close()";
    for command in [
        &["gzip", "-6", "-c"][..],
        &["gzip", "-1"],
        &["pigz", "-c", "-p", "4"],
        &["pigz", "-i", "-9"],
        &["python3", "-c", PYTHON],
    ] {
        let child = Command::new(command[0]).args(&command[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut child) = child else {
            eprintln!("skipped: {} is not installed", command[0]);
            continue;
        };
        let mut stdin = child.stdin.take().unwrap();
        let output = std::thread::scope(|scope| {
            scope.spawn(|| {
                stdin.write_all(&device).unwrap();
                drop(stdin);
            });
            child.wait_with_output().unwrap()
        });
        assert!(output.status.success());
        let (index, plain) = ingest_in(&output.stdout, 99_991, None, Options::default()).unwrap();
        assert!(plain == device, "{command:?}");
        check(&output.stdout, &device, &index);
    }
}
