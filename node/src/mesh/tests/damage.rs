//! A seeder whose disk lost or damaged some of its store in a crash: it starts, gives nothing wrong, and gives the layer.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use tokio::sync::watch;

use super::cluster::{Cluster, PATIENCE, read_all};
use crate::ingest::tests::Sample;
use crate::resolve::Progress;

/// What became of a file.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Gone,
    Empty,
    Half,
    /// As long as it was, of zeros: its length had reached the disk, its bytes had not.
    Zeros,
    FlippedBit,
}

const DAMAGES: [Damage; 5] = [Damage::Gone, Damage::Empty, Damage::Half, Damage::Zeros, Damage::FlippedBit];

#[tokio::test(flavor = "multi_thread")]
async fn a_seeder_gives_layers_whatever_its_disk_lost() {
    let cluster = Cluster::new().await;
    let sample = Sample::small(700);
    let blob = cluster.registry.put_blob(sample.blob.clone());
    let seeder = cluster.seeder("sound", 0).await;
    cluster.member("first", &[seeder.address]).resolve(&blob).await;
    drop(seeder);
    let sound = cluster.folder().join("sound");
    // Written whole or not at all; another text is that of a newer program, which is refused.
    let files: Vec<_> = files_below(&sound).into_iter().filter(|file| !file.ends_with("version")).collect();
    assert!(files.len() > 5, "{files:?}");
    let mut case = 0;
    for file in &files {
        for damage in DAMAGES {
            case += 1;
            let name = format!("seeder-{case}");
            let store = cluster.folder().join(&name);
            copy(&sound, &store);
            let path = store.join(file.strip_prefix(&sound).unwrap());
            harm(&path, damage);
            let what = format!("{} {damage:?}", path.strip_prefix(&store).unwrap().display());
            let seeder = cluster.seeder(&name, 0).await;
            let member = cluster.member(&format!("node-{case}"), &[seeder.address]);
            let began = Instant::now();
            let layer = loop {
                let (progress, _) = watch::channel(Progress::default());
                let resolved = member.resolver.resolve(&blob, progress);
                match tokio::time::timeout(PATIENCE, resolved).await.expect("it ends") {
                    Ok(layer) => break layer,
                    // It may have found out just now.
                    Err(error) => assert!(began.elapsed() < PATIENCE, "{what}: {error}"),
                }
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            };
            read_all(&layer, &sample).await;
            let from = layer.counters();
            println!(
                "{what}: {} chunks of the seeder, {} of the registry, {} wrong",
                from.seeder.chunks, from.registry.chunks, from.wrong_chunks
            );
            member.node.shutdown().await;
        }
    }
}

fn harm(path: &Path, damage: Damage) {
    let mut bytes = fs::read(path).unwrap();
    let length = bytes.len();
    match damage {
        Damage::Gone => return fs::remove_file(path).unwrap(),
        Damage::Empty => bytes.clear(),
        Damage::Half => bytes.truncate(length / 2),
        Damage::Zeros => bytes.fill(0),
        Damage::FlippedBit => {
            if let Some(byte) = bytes.get_mut(length / 2) {
                *byte ^= 16;
            }
        }
    }
    fs::write(path, bytes).unwrap();
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files_below(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let place = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &place) } else { fs::copy(&path, &place).map(drop).unwrap() }
    }
}
