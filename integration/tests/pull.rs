//! `drover-snapshotter pull`, the lazy pull for clients that fetch everything themselves. Needs root; see `lab::sandbox`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::drover::{all_complete, ordinary_layers};
use lab::image::small;
use lab::process::{run, wait_for};
use lab::sandbox::{Run, run_test};
use lab::scene::{Node, Scene};
use lab::tools::Tools;

/// Keeps layers as they were read.
const NO_FILL: &str = "[fill]\nenabled = false\n";

/// Every layer is lazy, a container runs, nothing of it is garbage, and removing the image gives the disk back.
#[test]
fn our_own_pull_is_lazy() {
    run_test("our_own_pull_is_lazy", |run_of| {
        let (mut scene, reference) = scene(run_of)?;
        scene.start_seeder(true)?;
        let node = scene.drover_node(NO_FILL)?;
        let printed = node.snapshotter()?.pull(&scene.network, &reference)?;
        ensure!(printed.contains("4 of 4 layers lazy"), "{printed}");
        let status = node.snapshotter()?.status()?;
        ensure!(ordinary_layers(&status).is_empty(), "{}", node.snapshotter()?.status_text()?);
        let content = node.containerd().content_bytes();
        ensure!(content < 64 << 10, "{content} bytes are in the content store");
        collect_garbage(&scene, &node)?;
        container_runs(&scene, &node, &reference)?;

        let again = node.snapshotter()?.pull(&scene.network, &reference)?;
        ensure!(again.contains("4 of 4 layers lazy"), "{again}");

        run(&mut node.containerd().ctr(&scene.network, &["image", "rm", "--sync", &reference]))?;
        let status = || node.snapshotter()?.status();
        wait_for("the disk is given back", Duration::from_secs(60), || {
            status().is_ok_and(|status| status.images.is_empty() && status.bytes_here == 0)
        })
        .with_context(|| format!("{:?}", status()))
    });
}

/// A pull that waits for everything leaves nothing to be fetched, also where nothing is filled in the background.
#[test]
fn our_own_pull_waits_for_everything() {
    run_test("our_own_pull_waits_for_everything", |run_of| {
        let (mut scene, reference) = scene(run_of)?;
        scene.start_seeder(true)?;
        let node = scene.drover_node(NO_FILL)?;
        let whole = || run(node.snapshotter()?.pulling(&scene.network).args(["--complete", &reference]));
        for _ in 0..2 {
            let printed = whole()?;
            ensure!(printed.contains("4 of 4 layers lazy"), "{printed}");
            let status = node.snapshotter()?.status()?;
            ensure!(all_complete(&status), "{}", node.snapshotter()?.status_text()?);
        }
        container_runs(&scene, &node, &reference)
    });
}

/// Without a seeder each layer is fetched and unpacked by containerd.
#[test]
fn our_own_pull_unpacks_what_is_not_lazy() {
    run_test("our_own_pull_unpacks_what_is_not_lazy", |run_of| {
        let (mut scene, reference) = scene(run_of)?;
        let node = scene.drover_node("")?;
        let printed = node.snapshotter()?.pull(&scene.network, &reference)?;
        ensure!(printed.contains("0 of 4 layers lazy"), "{printed}");
        collect_garbage(&scene, &node)?;
        container_runs(&scene, &node, &reference)?;
        let reasons = ordinary_layers(&node.snapshotter()?.status()?);
        ensure!(reasons.len() == 4 && reasons.iter().all(|reason| reason.contains("seeder")), "{reasons:?}");
        Ok(())
    });
}

fn container_runs(scene: &Scene, node: &Node, reference: &str) -> Result<()> {
    let printed = node.containerd().output_of(&scene.network, "drover", reference, "c1", &["cat", "/etc/replaced"])?;
    ensure!(printed == "after\n", "the container printed {printed:?}");
    Ok(())
}

/// A synchronous deletion makes containerd collect.
fn collect_garbage(scene: &Scene, node: &Node) -> Result<()> {
    let ctr = |arguments: &[&str]| run(&mut node.containerd().ctr(&scene.network, arguments));
    ctr(&["leases", "create", "--id", "garbage"])?;
    ctr(&["leases", "delete", "--sync", "garbage"])?;
    Ok(())
}

fn scene(run: &Run) -> Result<(Scene, String)> {
    let tools = Tools::prepare(&|_| {})?;
    let image = small::build(&run.folder().join("image"), &tools.busybox)?;
    let scene = Scene::private(run, tools, Path::new(&run.folder().join("registry")))?;
    let registry = scene.registry.as_ref().context("a private scene has a registry")?;
    let reference = registry.push(&scene.network, &image, "test/small", "1")?;
    Ok((scene, reference))
}
