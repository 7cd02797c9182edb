//! Speed of ingest, span reads and the wire form, and the sizes that come out.
//!
//! Measures a generated layer, or the blob in the file that `DROVER_BENCH_BLOB` names.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use layer::index::{Index, Spans};
use layer::ingest::{Ingest, Options};
use layer::{Digest, span, wire};

#[path = "../tests/blobs/mod.rs"]
mod blobs;

/// What a push of bytes from a socket or file looks like.
const PUSH_LEN: usize = 256 << 10;

fn ingest(blob: &[u8], digest: Digest) -> Index {
    let mut ingest = Ingest::new(digest, None, None, Options::default()).expect("default options");
    for piece in blob.chunks(PUSH_LEN) {
        ingest.push(piece, &mut |_, plain, _| _ = black_box(plain)).expect("size is not checked");
    }
    ingest.finish(&mut |_, _, _| {}).expect("a good blob")
}

fn benches(criterion: &mut Criterion) {
    let blob = match std::env::var_os("DROVER_BENCH_BLOB") {
        Some(path) => std::fs::read(path).expect("DROVER_BENCH_BLOB"),
        None => {
            let files: Vec<Vec<u8>> = (0..2000)
                .map(|n| blobs::bytes(n, 100 + (n as usize * 7919) % 60_000, [20, 60, 200][n as usize % 3]))
                .collect();
            blobs::gzip(&blobs::tar(&files), 6)
        }
    };
    let digest = Digest::of(&blob);
    let index = ingest(&blob, digest);
    let header = &index.header;
    let percent = |bytes: usize| bytes as f64 * 100.0 / blob.len() as f64;
    eprintln!(
        "blob {} device {} entries {} ({} paths, {:.3} %) chunk digests {} ({:.3} %) spans {} ({}, {:.3} %)",
        blob.len(),
        header.device_size(),
        index.entries.len(),
        header.entry_count(),
        percent(index.entries.len()),
        index.chunk_digests.len(),
        percent(index.chunk_digests.len()),
        index.spans.len(),
        header.span_count(),
        percent(index.spans.len()),
    );

    let mut group = criterion.benchmark_group("layer");
    group.sample_size(10).throughput(Throughput::Bytes(header.device_size()));
    group.bench_function("ingest", |bencher| bencher.iter(|| ingest(&blob, digest)));

    let spans = Spans::parse(header, &index.spans).expect("own spans");
    let mut device = Vec::new();
    group.bench_function("inflate all spans", |bencher| {
        bencher.iter(|| {
            device.clear();
            for span in spans.all() {
                let bytes = &blob[span.blob.start as usize..span.blob.end as usize];
                span::inflate(span, bytes, &mut |plain| device.extend_from_slice(plain)).expect("own span");
            }
        });
    });

    let chunk_size = header.geometry().chunk_size() as usize;
    let mut frames = Vec::new();
    let mut encoder = wire::Encoder::new();
    group.bench_function("encode wire form", |bencher| {
        bencher.iter(|| {
            frames.clear();
            device.chunks(chunk_size).for_each(|chunk| encoder.encode(chunk, &mut frames));
        });
    });
    eprintln!("wire forms {} ({:.3} of the blob)", frames.len(), frames.len() as f64 / blob.len() as f64);
    let mut decoder = wire::Decoder::new();
    group.bench_function("decode wire form", |bencher| {
        bencher.iter(|| {
            let mut rest = &frames[..];
            for chunk in device.chunks(chunk_size) {
                let (frame, tail) = wire::Frame::split(rest).expect("own frame");
                std::hint::black_box(decoder.decode(frame, chunk.len()).expect("own frame"));
                rest = tail;
            }
        });
    });
    group.bench_function("parse entries", |bencher| {
        bencher.iter(|| layer::index::parse_entries(header, &index.entries).expect("own entries"));
    });
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
