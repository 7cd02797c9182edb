//! A node is started while registry, seeder and its own certificate are gone: what is complete works as ever, what is not waits for a
//! source and says so.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::image::layer::Attributes;
use lab::image::{Image, LayerWriter, noise, small};
use lab::measure::wait_until_complete;
use lab::process::{run, wait_for};
use lab::sandbox::run_test;
use lab::scene::{Node, Scene};
use lab::tools::Tools;

use crate::{process_of, push};

/// Bytes of the file of an image that is complete, and of one that is not.
const COMPLETE: usize = 5 << 20;
const LAZY: usize = 6 << 20;

/// Long enough for a source that is there on a busy machine.
const CONFIG: &str = "[read]\ndeadline = \"20s\"\n";
const DEADLINE: Duration = Duration::from_secs(20);
/// In an image of its own.
const PROGRAM: &str = "/srv/program";

const NO_FILL: &str = "[fill]\nenabled = false\n";

#[test]
fn a_node_starts_with_every_source_gone() {
    run_test("source_gone::a_node_starts_with_every_source_gone", |run_of| {
        let tools = Tools::prepare(&|_| {})?;
        let images = run_of.folder().join("images");
        let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
        let mut references = Vec::new();
        for (size, repository) in [(COMPLETE, "test/complete"), (LAZY, "test/lazy")] {
            let image: Image = noise::build(&images, &scene.tools.busybox, size)?;
            references.push(push(&scene, &image, repository)?);
        }
        references.push(push(&scene, &program(&images, &scene.tools.busybox)?, "test/program")?);
        let [complete, lazy, executable] = [0, 1, 2].map(|at: usize| references[at].as_str());
        scene.start_seeder(true)?;
        scene.ingest(lazy)?;
        scene.ingest(executable)?;
        let mut node = scene.drover_node(CONFIG)?;
        node.containerd().pull(&scene.network, "drover", complete)?;
        wait_until_complete(&node)?;
        wait_for("the layers are proven on disk", Duration::from_secs(60), || are_proven(&node).unwrap_or(false))?;
        // From here on nothing is completed.
        let config = node.folder().join("drover/snapshotter.toml");
        let text = fs::read_to_string(&config)?;
        fs::write(&config, format!("{text}{NO_FILL}"))?;
        node.reboot(&scene.network, |_| Ok(()))?;
        node.containerd().pull(&scene.network, "drover", lazy)?;
        node.containerd().pull(&scene.network, "drover", executable)?;

        scene.stop_seeder();
        scene.registry.as_mut().context("no registry")?.daemon_mut().kill();
        node.reboot(&scene.network, |node| {
            let identity = node.snapshotter()?.root().join("identity");
            fs::remove_dir_all(&identity).with_context(|| format!("cannot remove {}", identity.display()))
        })?;

        ensure!(read(&scene, &node, complete, "c1")? == noise::line(COMPLETE));
        // Its index and its image are here, its bytes are not.
        let listed = node.containerd().output_of(&scene.network, "drover", complete, "c2", &["ls", "/srv"])?;
        ensure!(listed == "noise\n", "the container lists {listed:?}");
        // Before a chunk's deadline is over: for a moment after it all fail at once who ask for it.
        for (id, reference, program) in [("k1", lazy, &noise::PROGRAM[..]), ("k2", executable, &[PROGRAM])] {
            killed_in_its_wait(&scene, &node, reference, id, program).with_context(|| {
                format!("{program:?}, {}", node.snapshotter().map(|s| s.daemon().log_tail()).unwrap_or_default())
            })?;
        }
        let failed = read(&scene, &node, lazy, "c3");
        let error = failed.err().context("a file was read that nobody gives")?.to_string();
        println!("{error}");
        let log = fs::read_to_string(node.snapshotter()?.daemon().log())?;
        let told: Vec<_> = log.lines().filter(|line| line.contains("did not arrive in time")).collect();
        ensure!(!told.is_empty(), "no line of the log tells why:\n{log}");
        println!("{} lines tell of it, the first: {}", told.len(), told[0]);

        // All is well again without a restart: with the seeder's address comes a new certificate.
        scene.start_seeder(false)?;
        let mut last = Ok(String::new());
        let mut tries = 3;
        wait_for("the file can be read", Duration::from_secs(120), || {
            tries += 1;
            last = read(&scene, &node, lazy, &format!("c{tries}"));
            last.as_ref().is_ok_and(|line| *line == noise::line(LAZY))
        })
        .with_context(|| {
            format!("{last:?}\n{}", node.snapshotter().map(|s| s.daemon().log_tail()).unwrap_or_default())
        })?;
        Ok(())
    });
}

/// An image with a program that lies in a layer of its own.
fn program(cache: &Path, busybox: &Path) -> Result<Image> {
    let folder = cache.join("program");
    let mut layer = LayerWriter::create(&folder, "program")?;
    layer.directory("srv", Attributes::root(0o755))?;
    // Not the base layer's: the same layer would be here.
    layer.file(&PROGRAM[1..], Attributes::root(0o755), &fs::read(busybox)?)?;
    Image::assemble(&folder, &[small::base(&folder, busybox)?, layer.finish()?], "/bin")
}

/// A container that waits for bytes which nobody gives dies of SIGKILL, long before the deadline of its read.
fn killed_in_its_wait(scene: &Scene, node: &Node, reference: &str, id: &str, program: &[&str]) -> Result<()> {
    let mut child = node.containerd().container(&scene.network, "drover", reference, id, program).spawn()?;
    let mut pid = None;
    wait_for("the container runs", Duration::from_secs(15), || {
        pid = process_of(scene, node, id);
        pid.is_some()
    })?;
    let stat = PathBuf::from(format!("/proc/{}/stat", pid.context("it has no process")?));
    let state = || fs::read_to_string(&stat).ok().and_then(|stat| stat.rsplit_once(") ")?.1.chars().next());
    // Asleep whenever it is looked at.
    let mut asleep = 0;
    wait_for("it waits for its bytes", Duration::from_secs(10), || {
        asleep = if matches!(state(), Some('S' | 'D')) { asleep + 1 } else { 0 };
        asleep >= 10
    })?;
    let killed = Instant::now();
    run(&mut node.containerd().ctr(&scene.network, &["task", "kill", "--signal", "SIGKILL", id]))?;
    let is_dead = || matches!(state(), None | Some('Z' | 'X'));
    let died = wait_for("it is dead", DEADLINE / 2, is_dead);
    println!("{program:?} died {:?} after its SIGKILL", killed.elapsed());
    // Its shim takes it away, whatever the outcome.
    let _ = child.kill();
    child.wait()?;
    died
}

/// Whether all layers were compared with their diffIDs, and say so on the disk: what was not synced would be lost.
pub(crate) fn are_proven(node: &Node) -> Result<bool> {
    for layer in fs::read_dir(node.snapshotter()?.root().join("layers"))? {
        // docs/store.md: the flags, of which 2 is that.
        if fs::read(layer?.path().join("have"))?.get(11).is_none_or(|flags| flags & 2 == 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A container reads the image's file.
fn read(scene: &Scene, node: &Node, reference: &str, id: &str) -> Result<String> {
    let mut command = node.containerd().container(&scene.network, "drover", reference, id, &noise::PROGRAM);
    Ok(run(&mut command)?.trim_end().to_owned())
}
