//! End to end: containerd 2.3, a registry, a seeder and the snapshotter, each the real program. Needs root; every test runs
//! in a sandbox of its own (see `lab::sandbox`).

mod equal;
mod leaving;
mod many;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::drover::ordinary_layers;
use lab::image::{Image, small};
use lab::process::{run, wait_for};
use lab::sandbox::{Run, run_test};
use lab::scene::Scene;
use lab::tools::Tools;

/// Keeps layers as they were read.
const NO_FILL: &str = "[fill]\nenabled = false\n";

/// Containers, second containers, exec, writes, a derived image; and the disk is given back when all is removed.
#[test]
fn a_lazy_image_is_used_like_any_other() {
    run_test("a_lazy_image_is_used_like_any_other", |run_of| {
        let (mut scene, reference, _) = scene_with_image(run_of)?;
        scene.start_seeder(true)?;
        let node = scene.drover_node("")?;
        let network = &scene.network;
        let containerd = node.containerd();
        containerd.pull(network, "drover", &reference)?;

        let script = "echo ready; while [ ! -e /stop ]; do sleep 0.1; done";
        let mut first = containerd.container(network, "drover", &reference, "first", &["sh", "-c", script]);
        let mut first = first.spawn().context("cannot start ctr")?;
        let running = || run(&mut containerd.ctr(network, &["task", "ls"])).is_ok_and(|text| text.contains("RUNNING"));
        wait_for("the first container runs", Duration::from_secs(60), running)?;

        let exec =
            ["task", "exec", "--exec-id", "e1", "first", "sh", "-c", "echo changed > /etc/replaced; cat /tmp/new"];
        let printed = run(&mut containerd.ctr(network, &exec))?;
        ensure!(printed.contains("sticky"), "exec printed {printed:?}");

        let second = containerd.output_of(network, "drover", &reference, "second", &["cat", "/etc/replaced"])?;
        ensure!(second == "after\n", "a container sees another one's change: {second:?}");

        // A build step: a writable snapshot on the image is changed, committed, and used as a parent itself.
        let tops = run(&mut containerd.ctr(network, &["snapshot", "--snapshotter", "drover", "ls"]))?;
        let parent = tops.lines().find_map(|line| line.starts_with("first ").then(|| line.split_whitespace().nth(1)));
        let parent = parent.flatten().context("the container has no snapshot")?.to_owned();
        let snapshot = |arguments: &[&str]| {
            let mut command = containerd.ctr(network, &["snapshot", "--snapshotter", "drover"]);
            run(command.args(arguments))
        };
        let (built, seen) = (run_of.folder().join("built"), run_of.folder().join("seen"));
        fs::create_dir_all(&built)?;
        fs::create_dir_all(&seen)?;
        mount(&snapshot(&["prepare", "--target", path(&built)?, "step", &parent])?)?;
        fs::write(built.join("derived"), "derived\n")?;
        fs::remove_file(built.join("etc/replaced"))?;
        run(Command::new("umount").arg(&built))?;
        snapshot(&["commit", "derived", "step"])?;
        mount(&snapshot(&["prepare", "--target", path(&seen)?, "look", "derived"])?)?;
        ensure!(fs::read_to_string(seen.join("derived"))? == "derived\n");
        ensure!(!seen.join("etc/replaced").exists() && seen.join("srv/large").exists());
        run(Command::new("umount").arg(&seen))?;

        let difference = run(&mut containerd.ctr(network, &["snapshot", "--snapshotter", "drover", "diff", "first"]));
        ensure!(difference.is_ok(), "the container's change cannot be read: {difference:?}");

        run(&mut containerd.ctr(network, &["task", "exec", "--exec-id", "e2", "first", "touch", "/stop"]))?;
        ensure!(first.wait()?.success(), "the first container failed");

        snapshot(&["rm", "look"])?;
        snapshot(&["rm", "derived"])?;
        run(&mut containerd.ctr(network, &["image", "rm", "--sync", &reference]))?;
        let status = || node.snapshotter()?.status();
        wait_for("the disk is given back", Duration::from_secs(60), || {
            status().is_ok_and(|status| status.images.is_empty() && status.bytes_here == 0)
        })
        .with_context(|| format!("{:?}", status()))?;
        let left = node.snapshotter()?.disk_use()?;
        ensure!(
            left < 4 << 20,
            "{left} bytes are left on the disk of an image of {} MiB",
            small::LARGE_FILE_SIZE >> 20
        );
        Ok(())
    });
}

/// Without a seeder a pull works as before, and the status says why nothing is lazy.
#[test]
fn without_a_seeder_containerd_unpacks() {
    run_test("without_a_seeder_containerd_unpacks", |run| {
        let (mut scene, reference, _) = scene_with_image(run)?;
        let node = scene.drover_node("")?;
        node.containerd().pull(&scene.network, "drover", &reference)?;
        let printed =
            node.containerd().output_of(&scene.network, "drover", &reference, "c1", &["cat", "/etc/replaced"])?;
        ensure!(printed == "after\n", "the container printed {printed:?}");
        let status = node.snapshotter()?.status()?;
        let reasons = ordinary_layers(&status);
        ensure!(reasons.len() == 4, "want four ordinary layers:\n{}", node.snapshotter()?.status_text()?);
        ensure!(reasons.iter().any(|reason| reason.contains("seeder")), "no reason names the seeder: {reasons:?}");
        ensure!(reasons.iter().all(|reason| !reason.is_empty()), "a layer without a reason: {reasons:?}");
        Ok(())
    });
}

/// With the seeder gone, a container reads on from the registry.
#[test]
fn a_container_reads_on_when_the_seeder_is_gone() {
    run_test("a_container_reads_on_when_the_seeder_is_gone", |run_of| {
        let (mut scene, reference, _) = scene_with_image(run_of)?;
        scene.start_seeder(true)?;
        // The chunks of a layer that is ingested go to the node that waits for it; only the next node is lazy.
        let first = scene.drover_node(NO_FILL)?;
        first.containerd().pull(&scene.network, "drover", &reference)?;
        drop(first);
        let node = scene.drover_node(NO_FILL)?;
        node.containerd().pull(&scene.network, "drover", &reference)?;
        scene.seeder.as_mut().context("no seeder")?.daemon_mut().kill();
        let printed = node.containerd().output_of(
            &scene.network,
            "drover",
            &reference,
            "c1",
            &["sh", "-c", &format!("cat {} | sha256sum", small::LARGE_FILE)],
        )?;
        let plain = {
            let other = scene.plain_node()?;
            other.containerd().pull(&scene.network, "overlayfs", &reference)?;
            let script = format!("cat {} | sha256sum", small::LARGE_FILE);
            other.containerd().output_of(&scene.network, "overlayfs", &reference, "c2", &["sh", "-c", &script])?
        };
        ensure!(printed == plain, "the file has digest {printed} instead of {plain}");
        let status = node.snapshotter()?.status()?;
        let layers = status.images.iter().flat_map(|image| &image.layers);
        let registry: u64 = layers.filter_map(|layer| layer.bytes_by_source.get("registry")).sum();
        ensure!(registry > small::LARGE_FILE_SIZE / 2, "only {registry} bytes came from the registry");
        Ok(())
    });
}

/// Kills of a daemon and of a keeper in one run, half of each.
const KILLS: usize = 8;

/// The daemon and its keeper are killed, in turns, while a container reads what is not here yet: it reads on, and gets the
/// right bytes.
#[test]
fn a_container_reads_on_while_daemon_and_keeper_are_killed() {
    run_test("a_container_reads_on_while_daemon_and_keeper_are_killed", |run_of| {
        let (mut scene, reference, _) = scene_with_image(run_of)?;
        scene.start_seeder(true)?;
        let script =
            format!("find /etc /srv -type f | sort | xargs cat | sha256sum; cat {} | sha256sum", small::LARGE_FILE);
        let program = ["sh", "-c", &script];
        let first = scene.drover_node(NO_FILL)?;
        first.containerd().pull(&scene.network, "drover", &reference)?;
        let undisturbed = first.containerd().output_of(&scene.network, "drover", &reference, "c1", &program)?;
        drop(first);

        let node = scene.drover_node(NO_FILL)?;
        let containerd = node.containerd();
        containerd.pull(&scene.network, "drover", &reference)?;
        let mut container = containerd.container(&scene.network, "drover", &reference, "c2", &program);
        let mut container = container.stdout(Stdio::piped()).spawn().context("cannot start ctr")?;
        // A client's own call that is under way when the daemon dies fails, and containerd does not repeat it.
        let mut printed = BufReader::new(container.stdout.take().context("no output")?);
        let mut first_line = String::new();
        printed.read_line(&mut first_line)?;
        // Not for as long as the container runs: killed faster than a daemon can fetch a chunk, none would make progress.
        for kills in 0..KILLS {
            let pair = node.snapshotter()?.pair(|_| true)?;
            let victim = if kills % 2 == 0 { pair.daemon.context("no daemon")? } else { pair.keeper };
            let victim = i32::try_from(victim)?;
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(victim), nix::sys::signal::Signal::SIGKILL)?;
            // The dead one may still answer for a moment: the next victim is of the next pair.
            node.snapshotter()?.pair(|now| *now != pair)?;
        }
        let mut ended = None;
        wait_for("the container ends", Duration::from_secs(180), || {
            ended = container.try_wait().ok().flatten();
            ended.is_some()
        })?;
        ensure!(ended.is_some_and(|status| status.success()), "the container failed after {KILLS} kills");
        let mut rest = String::new();
        printed.read_to_string(&mut rest)?;
        let digests = first_line + &rest;
        ensure!(digests == undisturbed, "after {KILLS} kills it printed {digests} instead of {undisturbed}");
        // Everything else works on as well.
        let again = containerd.output_of(&scene.network, "drover", &reference, "c3", &["cat", "/etc/replaced"])?;
        ensure!(again == "after\n", "the next container printed {again:?}");
        Ok(())
    });
}

fn scene_with_image(run: &Run) -> Result<(Scene, String, Image)> {
    let tools = Tools::prepare(&|_| {})?;
    let image = small::build(&run.folder().join("image"), &tools.busybox)?;
    let scene = Scene::private(run, tools, &run.folder().join("registry"))?;
    let reference = push(&scene, &image, "test/small")?;
    Ok((scene, reference, image))
}

fn push(scene: &Scene, image: &Image, repository: &str) -> Result<String> {
    let registry = scene.registry.as_ref().context("a private scene has a registry")?;
    registry.push(&scene.network, image, repository, "1")
}

/// Runs the mount command that `ctr snapshot` prints for a target.
fn mount(command: &str) -> Result<()> {
    run(Command::new("sh").args(["-c", command]))?;
    Ok(())
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("a path is not UTF-8")
}
