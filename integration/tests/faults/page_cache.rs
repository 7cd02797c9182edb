//! Whom the kernel charges for the pages of a lazy layer: docs/operations.md says so to who sets memory limits.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::image::noise;
use lab::process::{run, wait_for};
use lab::sandbox::run_test;
use lab::scene::{Node, Scene};
use lab::tools::Tools;

use crate::push;
use crate::source_gone::are_proven;

/// Bytes of the image's file: much more than all else that a container reads.
const SIZE: usize = 24 << 20;

#[test]
fn the_first_reader_pays_for_the_pages_of_a_layer() {
    run_test("page_cache::the_first_reader_pays_for_the_pages_of_a_layer", |run_of| {
        let tools = Tools::prepare(&|_| {})?;
        let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
        let image = noise::build(&run_of.folder().join("images"), &scene.tools.busybox, SIZE)?;
        let reference = push(&scene, &image, "test/image")?;
        // Of what the seeder knows nothing comes before it is read.
        scene.start_seeder(true)?;
        scene.ingest(&reference)?;
        let node = scene.drover_node("[fill]\nenabled = false\n")?;
        node.containerd().pull(&scene.network, "drover", &reference)?;
        let lazy = pay(&scene, &node, &reference, ["lazy-1", "lazy-2"])?;
        run(node.snapshotter()?.pulling(&scene.network).args(["--complete", &reference]))?;
        wait_for("the layers are proven on disk", Duration::from_secs(60), || are_proven(&node).unwrap_or(false))?;
        let complete = pay(&scene, &node, &reference, ["complete-1", "complete-2"])?;
        for (name, [first, second]) in [("through FUSE", lazy), ("from the disk", complete)] {
            println!(
                "{name}: of a file of {SIZE} bytes the first reader is charged for {first}, the second for {second}"
            );
            ensure!(first >= SIZE as u64, "the first reader {name} is charged for {first} bytes");
            ensure!(second < SIZE as u64 / 4, "the second reader {name} is charged for {second} bytes");
        }
        Ok(())
    });
}

/// Two containers read the same file, one after the other, each in a control group of its own; gives what each is charged for.
fn pay(scene: &Scene, node: &Node, reference: &str, ids: [&str; 2]) -> Result<[u64; 2]> {
    let script = format!("echo here; read go; cat {} > /dev/null; echo read; sleep 3600", noise::FILE);
    let mut readers = Vec::new();
    for id in ids {
        let mut command = node.containerd().container(&scene.network, "drover", reference, id, &["sh", "-c", &script]);
        let mut child = command.stdin(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("its output is piped")?).lines();
        let here = lines.next().transpose()?;
        ensure!(here.as_deref() == Some("here"), "{id} printed {here:?}");
        readers.push((child, lines));
    }
    // Both see the same mount: what the first reads may complete the layer, which later containers read from the disk.
    let mut paid = [0; 2];
    for ((id, paid), (child, lines)) in ids.iter().zip(&mut paid).zip(&mut readers) {
        child.stdin.take().context("its input is piped")?.write_all(b"go\n")?;
        let read = lines.next().transpose()?;
        ensure!(read.as_deref() == Some("read"), "{id} printed {read:?}");
        *paid = cached(&format!("{}/{id}", node.containerd().control_group()))?;
    }
    // The first one lives until here: its pages would be charged to the next reader.
    for (id, (mut child, _)) in ids.iter().zip(readers) {
        run(&mut node.containerd().ctr(&scene.network, &["task", "kill", "--signal", "SIGKILL", id]))?;
        child.wait()?;
    }
    Ok(paid)
}

/// Bytes of the page cache that are charged to a control group.
fn cached(group: &str) -> Result<u64> {
    let group = group.trim_start_matches('/');
    let (first, second): (PathBuf, PathBuf) =
        (Path::new("/sys/fs/cgroup/memory").join(group), Path::new("/sys/fs/cgroup").join(group));
    let (folder, key) = if first.exists() { (first, "cache") } else { (second, "file") };
    let stat = folder.join("memory.stat");
    let text = fs::read_to_string(&stat).with_context(|| format!("cannot read {}", stat.display()))?;
    let value = text.lines().find_map(|line| line.split_once(' ').filter(|(name, _)| *name == key));
    Ok(value.with_context(|| format!("{} has no {key}", stat.display()))?.1.parse()?)
}
