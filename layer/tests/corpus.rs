//! Replays the fuzz corpus on stable Rust.

use std::fs;
use std::path::{Path, PathBuf};

mod blobs;
#[allow(dead_code, unreachable_pub)]
#[path = "../../fuzz/src/layer.rs"]
mod targets;

use blobs::{
    bytes, gzip, gzip_flushed, gzip_members, gzip_with_fields, ingest_in, tar, zstd, zstd_chunked, zstd_frames,
    zstd_skippable,
};
use layer::ingest::Options;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

fn replay(target: &str, run: fn(&[u8])) {
    let mut count = 0;
    for file in fs::read_dir(corpus(target)).expect("corpus") {
        let path = file.expect("corpus").path();
        eprintln!("{}", path.display());
        run(&fs::read(path).expect("corpus"));
        count += 1;
    }
    assert!(count > 0, "no inputs for {target}");
}

#[test]
fn gzip_corpus() {
    replay("gzip", targets::gzip);
}

#[test]
fn zstd_corpus() {
    replay("zstd", targets::zstd);
}

#[test]
fn erofs_corpus() {
    replay("erofs", targets::erofs);
}

#[test]
fn tar_corpus() {
    replay("tar", targets::tar);
}

#[test]
fn index_corpus() {
    replay("index", targets::index);
}

#[test]
fn wire_corpus() {
    replay("wire", targets::wire);
}

/// Writes the seeds. Run it after a change of a format.
#[test]
#[ignore = "writes into the source tree"]
fn write_seeds() {
    let write = |target: &str, name: &str, parts: &[&[u8]]| {
        fs::create_dir_all(corpus(target)).expect("corpus");
        fs::write(corpus(target).join(format!("seed-{name}")), parts.concat()).expect("corpus");
    };
    let device = tar(&[bytes(1, 700, 40), Vec::new()]);
    let small = tar(&[]);
    write("gzip", "plain", &[&[99], &small]);
    write("gzip", "gzip", &[&[99], &gzip(&device, 6)]);
    write("gzip", "fields", &[&[0], &gzip_with_fields(&device, 9)]);
    write("gzip", "stored", &[&[99], &gzip(&small, 0)]);
    write("gzip", "members", &[&[9], &gzip_members(&device, 1000, 6)]);
    write("gzip", "flushed", &[&[9], &gzip_flushed(&device, 300, 6)]);
    write("gzip", "spans", &[&[255], &gzip_flushed(&tar(&[bytes(1, 500, 90).repeat(20)]), 700, 9)]);
    write("gzip", "junk", &[&[99], &gzip(&small, 6), &[0; 20]]);
    write("zstd", "one", &[&[99], &zstd(&device, 3, true, true)]);
    write("zstd", "streamed", &[&[5], &zstd(&device, 3, false, false)]);
    write("zstd", "frames", &[&[9], &zstd_frames(&device, 700, 3)]);
    write("zstd", "chunked", &[&[99], &zstd_chunked(&small, 1000, 3)[..]]);
    write("zstd", "skippable", &[&[0], &zstd_skippable(3, 20), &zstd_skippable(4, 0)]);
    write("zstd", "junk", &[&[99], &zstd(&small, 1, true, true), b"junk"]);
    write("tar", "device", &[&[99], &device]);
    write("tar", "small", &[&[255], &small]);

    let options = Options { span_len: 1000, ..Options::default() };
    let blob = gzip_flushed(&tar(&[bytes(1, 500, 90).repeat(20)]), 700, 9);
    let (index, _) = ingest_in(&blob, blob.len(), None, options).expect("good blob");
    write("index", "header", &[&[0], &index.header.encode()]);
    let plain = unpack(&index.entries, index.header.section(layer::index::Section::Entries).plain_size);
    let count = (index.header.entry_count() as u16).to_le_bytes();
    write("index", "entries", &[&[1], &count, &plain]);
    write("index", "packed-entries", &[&[2], &count, &index.entries]);
    write("erofs", "alone", &[&[0], &count, &plain]);
    write("erofs", "bottom", &[&[1], &count, &plain]);
    write("erofs", "over-itself", &[&[2], &count, &plain]);
    let size = (index.header.device_size() as u32).to_le_bytes();
    write("index", "spans", &[&[3, 1, index.header.span_count() as u8], &size, &index.spans]);

    let blob = zstd_frames(&tar(&[bytes(1, 500, 90).repeat(20)]), 700, 3);
    let (index, _) = ingest_in(&blob, blob.len(), None, options).expect("good blob");
    write("index", "frames", &[&[3, 2, index.header.span_count() as u8], &size, &index.spans]);

    let (mut encoder, mut frames) = (layer::wire::Encoder::new(), Vec::new());
    let device = [bytes(1, 4096, 10), bytes(2, 4096, 255), bytes(3, 900, 50)].concat();
    device.chunks(4096).for_each(|chunk| encoder.encode(chunk, &mut frames));
    write("wire", "frames", &[&(device.len() as u16).to_le_bytes(), &[200], &frames]);
}

fn unpack(packed: &[u8], plain_size: u64) -> Vec<u8> {
    let mut plain = Vec::with_capacity(plain_size as usize);
    zstd_safe::decompress(&mut plain, packed).expect("own frame");
    plain
}
