//! A seeder's store on a disk that loses power.
//!
//! A process of its own ingests blobs; every call to the kernel with which it changes its store is written down ([`trace`]). For each
//! moment of that life the calls so far are made on the losing disk that the store of devices is tested with ([`MemoryDisk`]): names
//! are lost from some moment on, back to the last sync of a directory; of each file's writes since its last sync some are there, some
//! are not, some are torn with a wrong bit. What is left is put into a folder, and a seeder is started on it.

mod trace;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use self::trace::Change;
use super::*;
use crate::store::Backend;
use crate::store::memory::MemoryDisk;

/// Set in the process that is watched: the folder in which it works.
const FOLDER: &str = "DROVER_TEST_POWER";

/// Below that folder: the store, and what the process says by making a directory.
const STORE: &str = "store";
const MARKS: &str = "marks";

/// What may be left at one moment, so many of the possibilities.
const SEEDS: u64 = 2;

const BLOBS: u32 = 2;

#[test]
fn every_state_of_an_ingest_opens_after_a_power_cut() {
    let samples: Vec<_> = (0..BLOBS).map(|number| Sample::tiny(80 + number)).collect();
    if let Some(folder) = std::env::var_os(FOLDER) {
        return live(Path::new(&folder), &samples);
    }
    let folder = tempfile::tempdir().unwrap();
    let changes = match watched(folder.path()) {
        Ok(changes) => changes,
        Err(nix::Error::EPERM) => return println!("skipped: this machine does not let a process watch another one"),
        Err(error) => panic!("{error}"),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let whole = folder.path().join(STORE);
    let indexes: Vec<_> = samples.iter().map(|sample| index_files(&whole, Digest::of(&sample.blob))).collect();
    let marks = changes.iter().filter(|change| matches!(change, Change::Mark(_))).count();
    assert_eq!(marks as u32, BLOBS, "the life is whole");
    assert!(changes.len() > 60, "a life changes its store {} times", changes.len());
    let mut fetched = 0;
    for cut in 0..=changes.len() {
        let disk = MemoryDisk::default();
        disk.create_directory(Path::new("/")).unwrap();
        disk.sync_directory(Path::new("/")).unwrap();
        let mut ready = 0;
        for change in &changes[..cut] {
            change.make(&disk, &mut ready);
        }
        for seed in 1..=SEEDS {
            let left = tempfile::tempdir().unwrap();
            put(&disk.crash(seed << 32 | cut as u64), Path::new("/"), left.path());
            let what = format!("cut {cut} of {}, seed {seed}, after {:?}", changes.len(), changes[..cut].last());
            println!("{what}");
            fetched += runtime.block_on(check(left.path(), &samples, &indexes, ready));
        }
    }
    println!(
        "the power was cut at {} moments, with {SEEDS} outcomes each; {fetched} blobs were fetched again",
        changes.len() + 1
    );
}

/// The life that is watched.
fn live(folder: &Path, samples: &[Sample]) {
    println!("ready");
    std::io::stdin().lock().read_line(&mut String::new()).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let registry = FakeRegistry::start().await;
        let ingester = ingester(&folder.join(STORE), &registry, &Security::Off);
        for (number, sample) in samples.iter().enumerate() {
            let blob = registry.put_blob(sample.blob.clone());
            let known = known(&ingester, &blob).await;
            std::fs::create_dir_all(folder.join(MARKS).join(number.to_string())).unwrap();
            if number == 0 {
                // Wire forms go and come again.
                known.frames().evict(&[0]).unwrap();
                served(&ingester, blob.digest, known.header().geometry().chunks()).await.unwrap();
                ingester.save().await;
            }
        }
    });
}

/// The changes of that life, in their order.
fn watched(folder: &Path) -> nix::Result<Vec<Change>> {
    let name = std::thread::current().name().expect("a test has a name").to_owned();
    std::fs::create_dir(folder.join(MARKS)).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([&name, "--exact", "--nocapture", "--test-threads=1"]).env(FOLDER, folder);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.ends_with("ready\n") {
        assert!(output.read_line(&mut line).unwrap() > 0, "it did not begin: {line}");
    }
    let mut stdin = child.stdin.take().unwrap();
    let begin = || stdin.write_all(b"go\n").unwrap();
    match trace::watch(child.id(), &folder.join(STORE), &folder.join(MARKS), begin) {
        Ok((changes, succeeded)) => {
            assert!(succeeded, "the watched life failed");
            Ok(changes)
        }
        Err(error) => {
            child.kill().unwrap();
            child.wait().unwrap();
            Err(error)
        }
    }
}

/// A seeder starts on what a power cut has left, and gives what it is asked for. Gives how many blobs it had to fetch for that: none
/// of the first `ready`.
async fn check(root: &Path, samples: &[Sample], indexes: &[Vec<Vec<u8>>], ready: usize) -> usize {
    let registry = FakeRegistry::start().await;
    let ingester = ingester(root, &registry, &Security::Off);
    for (number, sample) in samples.iter().enumerate() {
        let blob = registry.put_blob(sample.blob.clone());
        let mut tries = 0;
        loop {
            let known = known(&ingester, &blob).await;
            let geometry = known.header().geometry();
            assert!(index_files(root, blob.digest) == indexes[number], "the index of blob {number} is another one");
            match served(&ingester, blob.digest, geometry.chunks()).await {
                Ok(wire) => {
                    break assert!(decode(geometry, geometry.chunks(), &wire) == sample.device, "blob {number}");
                }
                // A damaged blob is noticed when it is used, and had anew.
                Err(error) => assert!(tries < 3, "blob {number}: {error}"),
            }
            tries += 1;
        }
        let bodies = registry.requests().bodies;
        assert!(number >= ready || bodies == 0, "blob {number} was ready and is fetched again");
    }
    registry.requests().bodies as usize
}

/// The sections of an index, and its header.
fn index_files(root: &Path, blob: Digest) -> Vec<Vec<u8>> {
    let folder = root.join("indexes").join(blob.hex());
    let sections = Section::ALL.iter().map(|section| section.name());
    sections.chain(["header"]).map(|name| std::fs::read(folder.join(name)).unwrap()).collect()
}

/// Makes a folder of what is on a disk.
fn put(disk: &MemoryDisk, from: &Path, to: &Path) {
    for name in disk.list(from).unwrap() {
        let (from, to) = (from.join(&name), to.join(&name));
        match disk.open(&from, false) {
            Ok(file) => {
                let mut bytes = vec![0; file.size().unwrap() as usize];
                file.read_at(&mut bytes, 0).unwrap();
                std::fs::write(to, bytes).unwrap();
            }
            Err(_) => {
                std::fs::create_dir(&to).unwrap();
                put(disk, &from, &to);
            }
        }
    }
}
