//! Makes layers for tests: devices with all kinds of paths, and blobs of them as different tools compress them.

#![allow(dead_code)]

use std::io::Write as _;

use flate2::write::{DeflateEncoder, GzEncoder};
use flate2::{Compression as Level, GzBuilder};
use layer::index::{Compression, Index};
use layer::ingest::{Ingest, IngestError, Options};
use layer::{ChunkIndex, Digest};

/// Bytes that look the same for the same seed: `noise` of 256 parts are random, the rest is text.
pub(crate) fn bytes(seed: u64, len: usize, noise: u8) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u32
    };
    const WORDS: [&str; 8] = ["import ", "self.", "return ", "\n    ", "def ", "numpy", "(", "value = "];
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        let choice = next();
        if (choice & 255) < u32::from(noise) {
            out.extend_from_slice(&next().to_le_bytes());
        } else {
            out.extend_from_slice(WORDS[(choice >> 8) as usize & 7].as_bytes());
        }
    }
    out.truncate(len);
    out
}

/// A tar with one file of each of these contents, and one path of every other kind.
pub(crate) fn tar(files: &[Vec<u8>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let header = |kind, size: usize| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size as u64);
        header.set_mode(0o640);
        header.set_mtime(1_700_000_000);
        header.set_uid(1000);
        header.set_gid(100);
        header
    };
    let mut add = |mut header: tar::Header, path: &str, content: &[u8]| {
        builder.append_data(&mut header, path, content).unwrap();
    };
    add(header(tar::EntryType::Directory, 0), "etc/", &[]);
    for (number, content) in files.iter().enumerate() {
        add(header(tar::EntryType::Regular, content.len()), &format!("etc/file{number:05}"), content);
    }
    let mut link = header(tar::EntryType::Symlink, 0);
    link.set_link_name("../anywhere").unwrap();
    add(link, "etc/symlink", &[]);
    if !files.is_empty() {
        let mut link = header(tar::EntryType::Link, 0);
        link.set_link_name("etc/file00000").unwrap();
        add(link, "etc/hardlink", &[]);
    }
    add(header(tar::EntryType::Fifo, 0), "implicit/fifo", &[]);
    let mut device = header(tar::EntryType::Char, 0);
    device.set_device_major(5).unwrap();
    device.set_device_minor(1).unwrap();
    add(device, "implicit/console", &[]);
    add(header(tar::EntryType::Regular, 0), "var/.wh.gone", &[]);
    add(header(tar::EntryType::Regular, 0), "opaque/.wh..wh..opq", &[]);
    builder.into_inner().unwrap()
}

/// One member.
pub(crate) fn gzip(device: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Level::new(level));
    encoder.write_all(device).unwrap();
    encoder.finish().unwrap()
}

/// One member with all optional header fields but the checksum.
pub(crate) fn gzip_with_fields(device: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzBuilder::new()
        .filename("layer.tar")
        .comment("made by a test")
        .extra(b"AP\x02\0\0\0".to_vec())
        .mtime(1_700_000_000)
        .write(Vec::new(), Level::new(level));
    encoder.write_all(device).unwrap();
    encoder.finish().unwrap()
}

/// A member for each piece of `piece_len` bytes, and an empty one at the end, as eStargz has.
pub(crate) fn gzip_members(device: &[u8], piece_len: usize, level: u32) -> Vec<u8> {
    let mut blob: Vec<u8> = device.chunks(piece_len).flat_map(|piece| gzip(piece, level)).collect();
    blob.extend(gzip_with_fields(&[], 0));
    blob
}

/// One member whose blocks are flushed every `piece_len` bytes, as pigz does between its threads.
pub(crate) fn gzip_flushed(device: &[u8], piece_len: usize, level: u32) -> Vec<u8> {
    let mut blob = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    let mut encoder = DeflateEncoder::new(&mut blob, Level::new(level));
    for piece in device.chunks(piece_len) {
        encoder.write_all(piece).unwrap();
        encoder.flush().unwrap();
    }
    encoder.finish().unwrap();
    // The checksum is not looked at.
    blob.extend_from_slice(&[0; 4]);
    blob.extend_from_slice(&(device.len() as u32).to_le_bytes());
    blob
}

/// One zstd frame; without `size` as an encoder writes that does not know how much will come.
pub(crate) fn zstd(device: &[u8], level: i32, checksum: bool, size: bool) -> Vec<u8> {
    use zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer};
    let mut packer = CCtx::create();
    packer.set_parameter(CParameter::CompressionLevel(level)).unwrap();
    packer.set_parameter(CParameter::ChecksumFlag(checksum)).unwrap();
    let mut frame = Vec::with_capacity(zstd_safe::compress_bound(device.len()) + 64);
    if size {
        packer.compress2(&mut frame, device).unwrap();
        return frame;
    }
    let mut output = OutBuffer::around(&mut frame);
    let mut input = InBuffer::around(device);
    while input.pos() < device.len() {
        packer.compress_stream(&mut output, &mut input).unwrap();
    }
    while packer.end_stream(&mut output).unwrap() > 0 {}
    frame
}

/// A frame for each piece of `piece_len` bytes, and one empty frame at the end.
pub(crate) fn zstd_frames(device: &[u8], piece_len: usize, level: i32) -> Vec<u8> {
    let mut blob: Vec<u8> = device.chunks(piece_len).flat_map(|piece| zstd(piece, level, false, true)).collect();
    blob.extend(zstd(&[], level, true, true));
    blob
}

/// The same with skippable frames before, between and behind them; zstd:chunked keeps its table of contents in such.
pub(crate) fn zstd_chunked(device: &[u8], piece_len: usize, level: i32) -> Vec<u8> {
    let mut blob = zstd_skippable(0, 3);
    for (number, piece) in device.chunks(piece_len).enumerate() {
        blob.extend(zstd(piece, level, number % 2 == 0, number % 3 == 0));
        if number % 4 == 0 {
            blob.extend(zstd_skippable(number as u8, number * 100));
        }
    }
    blob.extend(zstd_skippable(15, 70_000));
    blob.extend(zstd_skippable(1, 64));
    blob
}

/// A frame without content (RFC 8878, 3.1.2).
pub(crate) fn zstd_skippable(number: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![0x50 | number & 15, 0x2a, 0x4d, 0x18];
    frame.extend_from_slice(&(len as u32).to_le_bytes());
    frame.extend(std::iter::repeat_n(number, len));
    frame
}

/// Ingests `blob` in pushes of `piece_len` bytes; also gives the device that came out, chunk by chunk.
pub(crate) fn ingest_in(
    blob: &[u8],
    piece_len: usize,
    compression: Option<Compression>,
    options: Options,
) -> Result<(Index, Vec<u8>), IngestError> {
    let mut device = Vec::new();
    let mut next = 0;
    let mut sink = |chunk: ChunkIndex, plain: &[u8], digest: layer::ChunkDigest| {
        assert_eq!(chunk, ChunkIndex(next), "chunks come in order");
        assert_eq!(digest, layer::ChunkDigest::of(plain));
        next += 1;
        device.extend_from_slice(plain);
    };
    let mut ingest = Ingest::new(Digest::of(blob), Some(blob.len() as u64), compression, options).unwrap();
    for piece in blob.chunks(piece_len) {
        ingest.push(piece, &mut sink)?;
    }
    assert_eq!(ingest.blob_read(), blob.len() as u64);
    let index = ingest.finish(&mut sink)?;
    Ok((index, device))
}

/// Ingests `blob` in one push with the default options.
pub(crate) fn ingest(blob: &[u8]) -> Result<Index, IngestError> {
    ingest_in(blob, blob.len().max(1), None, Options::default()).map(|(index, _)| index)
}
