//! How fast a device is scanned, and how fast its metadata image is written.
//!
//! Two made-up layers: small files as in node_modules (20 000 files of 3 kB), and large ones (16 files of 16 MB).

use std::hint::black_box;
use std::io;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use layer::erofs::{ImageOptions, Stack, write_image};
use layer::tar::{Limits, Scanner};
use layer::tree::Tree;

fn device(files: usize, size: usize) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let contents = vec![b'x'; size];
    for number in 0..files {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_mtime(1_000_000_000);
        let directory = format!("usr/lib/node_modules/package-{:04}/dist", number / 20);
        if number % 20 == 0 {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_size(0);
            builder.append_data(&mut header, &directory, io::empty()).expect("memory takes it");
        }
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(size as u64);
        builder
            .append_data(&mut header, format!("{directory}/file-{number}.js"), &contents[..])
            .expect("memory takes it");
    }
    builder.into_inner().expect("memory takes it")
}

fn scan(device: &[u8]) -> Tree {
    let mut scanner = Scanner::new(Limits::default());
    for piece in device.chunks(128 << 10) {
        scanner.push(piece).expect("the tar is valid");
    }
    scanner.finish().expect("the tar is valid")
}

fn benches(criterion: &mut Criterion) {
    for (name, files, size) in [("small", 20_000, 3_000), ("large", 16, 16 << 20)] {
        let device = device(files, size);
        let mut group = criterion.benchmark_group(name);
        group.sample_size(10);
        group.throughput(Throughput::Bytes(device.len() as u64));
        group.bench_function("scan", |bencher| bencher.iter(|| scan(black_box(&device))));
        let tree = scan(&device);
        let options = ImageOptions { device_size: device.len() as u64, bottom: true, uuid: [1; 16] };
        group.throughput(Throughput::Elements(tree.entries().len() as u64));
        group.bench_function("write image", |bencher| {
            bencher.iter(|| write_image(&tree, &options, &Stack::new(&[]), &mut io::sink()).expect("a sink takes it"));
        });
    }
}

criterion_group!(group, benches);
criterion_main!(group);
