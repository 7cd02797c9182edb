//! End to end: containerd 2.3, a registry, a seeder and the snapshotter, each the real program. Needs root; every test runs
//! in a sandbox of its own (see `lab::sandbox`).

use std::fs;

use anyhow::{Result, ensure};
use lab::compare::compare;
use lab::image::small;
use lab::sandbox::{Run, run_test};
use lab::scene::Scene;
use lab::tools::Tools;

/// containerd's own unpack, on two nodes: the lab itself works, and the comparison finds equal trees equal.
#[test]
fn overlayfs_runs_the_test_image() {
    run_test("overlayfs_runs_the_test_image", |run| {
        let (mut scene, reference) = scene_with_image(run)?;
        let mut node = scene.plain_node()?;
        node.containerd().pull(&scene.network, "overlayfs", &reference)?;
        let out =
            node.containerd().output_of(&scene.network, "overlayfs", &reference, "c1", &["cat", "/etc/replaced"])?;
        ensure!(out == "after\n", "the container printed {out:?}");
        let (left, right) = (run.folder().join("left"), run.folder().join("right"));
        node.mount_image(&scene.network, "overlayfs", &reference, &left)?;
        node.mount_image(&scene.network, "overlayfs", &reference, &right)?;
        let result = compare(&left, &right)?;
        ensure!(result.differences.is_empty(), "{:#?}", result.differences);
        ensure!(result.paths > small::MANY_FILES as u64, "only {} paths were seen", result.paths);
        ensure!(!left.join("etc/removed").exists() && !left.join("srv/opaque/below").exists());
        fs::write(run.folder().join("changed"), "")?;
        Ok(())
    });
}

fn scene_with_image(run: &Run) -> Result<(Scene, String)> {
    let tools = Tools::prepare(&|_| {})?;
    let image = small::build(&run.folder().join("image"), &tools.busybox)?;
    let scene = Scene::private(run, tools, &run.folder().join("registry"))?;
    let registry = scene.registry.as_ref().expect("a private scene has a registry");
    let reference = registry.push(&scene.network, &image, "test/small", "1")?;
    Ok((scene, reference))
}
