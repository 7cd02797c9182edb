//! What ingests take in memory, by what the kernel counts for this process: so this is a process of its own, with one test.

use std::fs;
use std::path::Path;
use std::time::Duration;

use layer::Digest;
use node::config::{CacheConfig, RegistriesConfig};
use node::ingest::store::Store;
use node::ingest::{Ingester, Options, Phase};
use node::registry::{self, Client};
use node::source::BlobRef;

/// What ingests may take with the default options.
const MEMORY_MAX: u64 = 64 << 20;
/// The largest window of a zstd frame that is supported, twice: all of it is used.
const FILE_LEN: u64 = 64 << 20;
const BLOCK_LEN: u64 = 128 << 10;

/// A tar of one file of zeros, in a zstd frame (RFC 8878) of the largest window that is supported.
fn blob(name: &str) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name).unwrap();
    header.set_size(FILE_LEN);
    header.set_mode(0o644);
    header.set_cksum();
    // Magic number; no flags; a window of 2^(10 + 15) bytes.
    let mut blob = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 15 << 3];
    let mut block = |kind: u32, len: u64, is_last: bool, content: &[u8]| {
        blob.extend_from_slice(&(u32::from(is_last) | kind << 1 | (len as u32) << 3).to_le_bytes()[..3]);
        blob.extend_from_slice(content);
    };
    let (raw, repeated) = (0, 1);
    block(raw, 512, false, header.as_bytes());
    for _ in 0..FILE_LEN / BLOCK_LEN {
        block(repeated, BLOCK_LEN, false, &[0]);
    }
    block(repeated, 1024, true, &[0]);
    blob
}

/// A line of `/proc/self/status`, in bytes.
fn status(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn memory_is_bounded_however_large_the_windows() {
    node::bound_malloc();
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    // Whole blobs stand in the store already (`node/src/ingest/store.rs`), so that no registry is in this process.
    let blobs: Vec<BlobRef> = (0..5).map(|number| put(root.path(), &blob(&format!("file-{number}")))).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let client = Client::new(RegistriesConfig::default(), registry::Options::default());
        let ingester =
            Ingester::new(store, client, None, Options { cache: CacheConfig::WHOLE_DISK, ..Options::default() })
                .unwrap();
        let before = status("VmRSS");
        // Forgets the peak so far, where the kernel can.
        let _ = fs::write("/proc/self/clear_refs", "5");
        let mut phases = Vec::new();
        for blob in &blobs {
            phases.push(ingester.ask(blob).await.unwrap());
        }
        for mut phase in phases {
            let ended = phase.wait_for(|phase| !matches!(phase, Phase::Running(_)));
            let ended = tokio::time::timeout(Duration::from_secs(300), ended).await.expect("the ingest ends").unwrap();
            assert!(matches!(&*ended, Phase::Ready(_)), "{:?}", *ended);
        }
        let taken = status("VmHWM").saturating_sub(before);
        assert!(taken > 32 << 20, "{taken} bytes: the windows were not used");
        assert!(taken <= MEMORY_MAX, "{taken} bytes");
    });
}

fn put(root: &Path, bytes: &[u8]) -> BlobRef {
    let digest = Digest::of(bytes);
    fs::write(root.join("blobs").join(digest.hex()), bytes).unwrap();
    BlobRef {
        registry: "registry.test".to_owned(),
        repository: "app".to_owned(),
        digest,
        size: bytes.len() as u64,
        media_type: "application/vnd.oci.image.layer.v1.tar+zstd".to_owned(),
        urls: Vec::new(),
    }
}
