//! A disk that does not keep what was written to it: layers that were proven, and metadata images.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::image::noise;
use lab::measure::wait_until_complete;
use lab::process::{run, wait_for};
use lab::sandbox::run_test;
use lab::scene::{Node, Scene};
use lab::tools::Tools;
use rustix::fs::{Advice, fadvise};

use crate::push;
use crate::source_gone::are_proven;

/// Bytes of the image's file.
const SIZE: usize = 5 << 20;

/// For the daemon to fetch and to prove.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn what_rots_on_the_disk_is_found_and_mended() {
    run_test("rot::what_rots_on_the_disk_is_found_and_mended", |run_of| {
        let tools = Tools::prepare(&|_| {})?;
        let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
        let image = noise::build(&run_of.folder().join("images"), &scene.tools.busybox, SIZE)?;
        let reference = push(&scene, &image, "test/image")?;
        scene.start_seeder(true)?;
        let mut node = scene.drover_node("")?;
        node.containerd().pull(&scene.network, "drover", &reference)?;
        wait_until_complete(&node)?;
        wait_for("the layers are proven on disk", PATIENCE, || are_proven(&node).unwrap_or(false))?;
        let read = |node: &Node, id: &str| {
            let output = node.containerd().output_of(&scene.network, "drover", &reference, id, &noise::PROGRAM)?;
            anyhow::Ok(output.trim_end().to_owned())
        };
        ensure!(read(&node, "c1")? == noise::line(SIZE));

        // A bit of the file's device flips, and no page of it is in memory.
        let (device, whole) = device(&node)?;
        flip(&device, whole.len() as u64 / 2)?;
        forget_pages(&node, &device)?;
        ensure!(read(&node, "c2")? != noise::line(SIZE), "containers do not read the device on disk");

        let told = run(&mut node.snapshotter()?.command(&scene.network, "scrub"))?;
        ensure!(told.contains("1 chunks were damaged"), "{told}");
        let is_mended = || fs::read(&device).is_ok_and(|bytes| bytes == whole) && are_proven(&node).unwrap_or(false);
        wait_for("the device is whole and proven again", PATIENCE, is_mended)?;
        // Pages of the mount are not those of the device.
        forget_pages(&node, &device)?;
        ensure!(read(&node, "c3")? == noise::line(SIZE), "a container reads what is not on the disk");
        let metrics = run(node.snapshotter()?.command(&scene.network, "status").arg("--metrics"))?;
        ensure!(metrics.lines().any(|line| line == "drover_rotten_chunks_total 1"), "{metrics}");
        let told = run(&mut node.snapshotter()?.command(&scene.network, "scrub"))?;
        ensure!(!told.contains("damaged"), "{told}");

        // The metadata images, over a reboot, once they are on the disk for certain.
        let images = node.snapshotter()?.root().join("images");
        let are_synced = || {
            files(&images).is_ok_and(|images| images.iter().all(|image| image.extension() == Some("erofs".as_ref())))
        };
        wait_for("the images are on the disk", PATIENCE, are_synced)?;
        node.reboot(&scene.network, |_| {
            let images = files(&images)?;
            ensure!(!images.is_empty(), "there are no images");
            images.iter().try_for_each(|image| flip(image, fs::metadata(image)?.len() / 2))
        })?;
        ensure!(read(&node, "c4")? == noise::line(SIZE));
        let log = fs::read_to_string(node.snapshotter()?.daemon().log())?;
        ensure!(log.contains("a metadata image is damaged: making it again"), "{log}");
        Ok(())
    });
}

/// The largest device of a node, which is that of the noise, and its bytes.
fn device(node: &Node) -> Result<(PathBuf, Vec<u8>)> {
    let layers = files(&node.snapshotter()?.root().join("layers"))?;
    let devices = layers.into_iter().map(|layer| layer.join("device"));
    let largest = devices.max_by_key(|device| fs::metadata(device).map_or(0, |metadata| metadata.size()));
    let device = largest.context("there is no layer")?;
    let bytes = fs::read(&device)?;
    Ok((device, bytes))
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    Ok(entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?)
}

fn flip(path: &Path, at: u64) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 4], at)?;
    Ok(file.sync_all()?)
}

/// Lets the kernel drop its pages of the noise: those of the device, and those of each mount's file.
fn forget_pages(node: &Node, device: &Path) -> Result<()> {
    let mounts = files(&node.snapshotter()?.root().join("m"))?;
    let mounted = mounts.iter().map(|mount| mount.join(&noise::FILE[1..])).filter(|file| file.exists());
    for path in mounted.chain([device.to_owned()]) {
        fadvise(File::open(&path)?, 0, None, Advice::DontNeed).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
