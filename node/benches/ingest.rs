//! Speed, memory and sizes of ingest, as tables: `cargo bench -p node --bench ingest -- FILE...` with blobs of layers, else of
//! eight layers that are made of this machine's `/usr` and kept in the temporary directory.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use layer::Digest;
use layer::ingest::Ingest;
use layer::span;
use layer::wire::Encoder;
use node::config::RegistriesConfig;
use node::ingest::store::Store;
use node::ingest::{Ingester, Options, Phase};
use node::registry::{self, Client};
use node::source::BlobRef;

/// Layers that are made, and bytes of files in each.
const LAYERS: u64 = 8;
const LAYER_LEN: u64 = 100 << 20;
/// What a push of bytes from a socket looks like.
const PUSH_LEN: usize = 256 << 10;

fn main() {
    node::bound_malloc();
    let mut paths: Vec<PathBuf> = std::env::args_os()
        .skip(1)
        .map(PathBuf::from)
        .filter(|path| !path.to_string_lossy().starts_with('-'))
        .collect();
    if paths.is_empty() {
        paths = made_layers();
    }
    let blobs: Vec<Blob> = paths.iter().map(|path| Blob::open(path)).collect();

    println!("\n| one thread | MB/s of the device |\n| --- | ---: |");
    let first = fs::read(&blobs[0].path).expect("a blob");
    let (device, seconds) = passed(&first, blobs[0].digest);
    println!("| inflate, scan, all digests | {:.0} |", device.len() as f64 / 1e6 / seconds);
    for level in 1..=7 {
        let (len, seconds) = encoded(&device, level);
        let (speed, ratio) = (device.len() as f64 / 1e6 / seconds, len as f64 / first.len() as f64);
        println!("| encode at level {level}: {ratio:.3} of the blob | {speed:.0} |");
    }
    drop((first, device));

    println!("\n| ingest | device | time | MB/s | CPU | MB/s of a core | wire forms and index of the blobs | memory |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for blob in blobs.iter().take(2) {
        row("a layer", std::slice::from_ref(blob));
    }
    row("all layers at once", &blobs);
}

struct Blob {
    path: PathBuf,
    digest: Digest,
    size: u64,
}

impl Blob {
    fn open(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path: path.to_owned(), digest: Digest::of(&bytes), size: bytes.len() as u64 }
    }
}

/// The device of a blob, and the seconds of a pass over it that makes the index.
fn passed(blob: &[u8], digest: Digest) -> (Vec<u8>, f64) {
    let mut ingest = Ingest::new(digest, None, None, layer::ingest::Options::default()).expect("default options");
    let started = Instant::now();
    for piece in blob.chunks(PUSH_LEN) {
        ingest.push(piece, &mut |_, plain, _| _ = std::hint::black_box(plain)).expect("size is not checked");
    }
    let index = ingest.finish(&mut |_, _, _| {}).expect("a good blob");
    let seconds = started.elapsed().as_secs_f64();
    let spans = layer::index::Spans::parse(&index.header, &index.spans).expect("own spans");
    let mut device = Vec::with_capacity(index.header.device_size() as usize);
    for one in spans.all() {
        let bytes = &blob[one.blob.start as usize..one.blob.end as usize];
        span::inflate(one, bytes, &mut |plain| device.extend_from_slice(plain)).expect("own span");
    }
    (device, seconds)
}

/// Bytes of the wire forms, and the seconds that they take.
fn encoded(device: &[u8], level: i32) -> (usize, f64) {
    let (mut encoder, mut frame, mut len) = (Encoder::with_level(level), Vec::new(), 0);
    let started = Instant::now();
    for chunk in device.chunks(1 << layer::chunk::CHUNK_LOG2) {
        frame.clear();
        encoder.encode(chunk, &mut frame);
        len += frame.len();
    }
    (len, started.elapsed().as_secs_f64())
}

/// Ingests blobs that are at hand, as a seeder does, at the same time.
fn row(name: &str, blobs: &[Blob]) {
    let root = tempfile::tempdir().expect("temporary directory");
    let store = Store::open(root.path()).expect("store");
    let refs: Vec<BlobRef> = blobs.iter().map(|blob| put(root.path(), blob)).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
    let client = {
        let _entered = runtime.enter();
        Client::new(RegistriesConfig::default(), registry::Options::default())
    };
    // The peak so far is forgotten, where the kernel can.
    node::trim_malloc();
    let _ = fs::write("/proc/self/clear_refs", "5");
    let (started, cpu) = (Instant::now(), cpu_seconds());
    let device: u64 = runtime.block_on(async {
        let ingester = Ingester::new(store, client, None, Options::default()).expect("ingester");
        let mut phases = Vec::new();
        for blob in &refs {
            phases.push(ingester.ask(blob).await.expect("accepted"));
        }
        let mut device = 0;
        for mut phase in phases {
            let ended = phase.wait_for(|phase| !matches!(phase, Phase::Running(_))).await.expect("an end");
            let Phase::Ready(known) = &*ended else { panic!("{:?}", *ended) };
            device += known.header().device_size();
        }
        device
    });
    let (seconds, cpu) = (started.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let made: u64 = ["wire", "indexes"].iter().map(|part| tree_len(&root.path().join(part))).sum();
    let size: u64 = blobs.iter().map(|blob| blob.size).sum();
    let mb = device as f64 / 1e6;
    println!(
        "| {name} | {mb:.0} MB | {seconds:.2} s | {:.0} | {cpu:.2} s | {:.0} | {:.3} | {:.0} MiB |",
        mb / seconds,
        mb / cpu,
        made as f64 / size as f64,
        peak() as f64 / f64::from(1 << 20),
    );
    runtime.shutdown_timeout(Duration::from_secs(1));
}

/// Puts a blob into the store, where an ingest finds it.
fn put(root: &Path, blob: &Blob) -> BlobRef {
    fs::copy(&blob.path, root.join("blobs").join(blob.digest.hex())).expect("room for a copy");
    BlobRef {
        registry: "registry.test".to_owned(),
        repository: "bench".to_owned(),
        digest: blob.digest,
        size: blob.size,
        media_type: String::new(),
        urls: Vec::new(),
    }
}

/// Bytes of all files below `path`.
fn tree_len(path: &Path) -> u64 {
    let entries = fs::read_dir(path).expect("a directory").map(|entry| entry.expect("an entry"));
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => tree_len(&entry.path()),
            metadata => metadata.map_or(0, |metadata| metadata.len()),
        })
        .sum()
}

/// User and system time of this process (proc_pid_stat(5), fields 14 and 15, in hundredths of a second).
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").expect("proc");
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    [11, 12].iter().map(|field| fields[*field].parse::<f64>().expect("ticks") / 100.0).sum()
}

/// The most memory that this process had, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Layers of this machine's files, made with `gzip -6` as image builders do.
fn made_layers() -> Vec<PathBuf> {
    let directory = std::env::temp_dir().join("drover-bench-layers");
    fs::create_dir_all(&directory).expect("temporary directory");
    let mut files = Vec::new();
    for part in ["/usr/bin", "/usr/lib", "/usr/share"] {
        collect(Path::new(part), &mut files);
    }
    files.sort();
    let mut files = files.into_iter();
    (0..LAYERS)
        .map(|number| {
            let path = directory.join(format!("layer-{number}.tar.gz"));
            if !path.exists() {
                eprintln!("making {}", path.display());
                make_layer(&path, &mut files);
            }
            path
        })
        .collect()
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => collect(&entry.path(), files),
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
}

fn make_layer(path: &Path, files: &mut dyn Iterator<Item = PathBuf>) {
    let new = path.with_extension("new");
    let mut gzip = Command::new("gzip")
        .args(["-6", "-n"])
        .stdin(Stdio::piped())
        .stdout(File::create(&new).expect("a file"))
        .spawn()
        .expect("gzip");
    let mut builder = tar::Builder::new(gzip.stdin.take().expect("a pipe"));
    let mut len = 0;
    for file in files {
        let (name, size) = (file.strip_prefix("/").expect("absolute"), file.metadata().map_or(0, |file| file.len()));
        if builder.append_path_with_name(&file, name).is_ok() {
            len += size;
        }
        if len >= LAYER_LEN {
            break;
        }
    }
    builder.into_inner().expect("a pipe").flush().expect("a pipe");
    assert!(gzip.wait().expect("gzip").success());
    fs::rename(&new, path).expect("a file");
}
