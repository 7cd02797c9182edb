//! An image of as many layers as images have.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::containerd::Containerd;
use lab::drover::{Snapshotter, all_complete, ordinary_layers};
use lab::image::layer::Attributes;
use lab::image::{Image, LayerWriter, small};
use lab::network::Network;
use lab::process::{run, wait_for};
use lab::sandbox::run_test;
use lab::scene::Scene;
use lab::tools::Tools;

use crate::{NO_FILL, push};

/// As many as Docker's own storage drivers take.
const LAYERS: usize = 128;

/// One file of every tenth layer, the one that every layer replaces, and how many there are.
const LOOK: &str = "cd /srv; for file in *0 last; do stat -c '%n %a %u:%g %s %Y' $file; cat $file; done; ls | wc -l";

/// All mount options of a container must fit into one page of 4096 bytes, however its layers are mounted: over FUSE, over complete
/// devices, and by a daemon that found them mounted.
#[test]
fn an_image_of_128_layers_runs() {
    run_test("many::an_image_of_128_layers_runs", |run_of| {
        let tools = Tools::prepare(&|_| {})?;
        let folder = run_of.folder().join("image");
        let mut layers = vec![small::base(&folder, &tools.busybox)?];
        for number in 1..LAYERS {
            let mut layer = LayerWriter::create(&folder, "next")?;
            let text = format!("layer {number}\n");
            for name in [&format!("srv/{number:03}"), "srv/last"] {
                layer.file(name, Attributes::root(0o644), text.as_bytes())?;
            }
            layers.push(layer.finish()?);
        }
        let image = Image::assemble(&folder, &layers, small::PATH)?;
        let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
        let reference = push(&scene, &image, "test/many")?;
        scene.start_seeder(true)?;
        scene.ingest(&reference)?;
        let looks = |containerd: &Containerd, network: &Network, snapshotter: &str, id: &str| {
            containerd.output_of(network, snapshotter, &reference, id, &["sh", "-c", LOOK])
        };
        let expected = {
            let plain = scene.plain_node()?;
            plain.containerd().pull(&scene.network, "overlayfs", &reference)?;
            looks(plain.containerd(), &scene.network, "overlayfs", "c1")?
        };
        ensure!(
            expected.contains("layer 120\n") && expected.ends_with(&format!("{LAYERS}\n")),
            "it printed {expected}"
        );

        let node = scene.drover_node(NO_FILL)?;
        let (network, containerd, snapshotter) = (&scene.network, node.containerd(), node.snapshotter()?);
        let same = |id: &str| -> Result<()> {
            let printed = looks(containerd, network, "drover", id).with_context(|| format!("container {id}"))?;
            ensure!(printed == expected, "container {id} printed {printed}, overlayfs' {expected}");
            Ok(())
        };
        containerd.pull(network, "drover", &reference)?;
        same("lazy")?;
        let status = snapshotter.status()?;
        ensure!(ordinary_layers(&status).is_empty(), "not lazy:\n{}", snapshotter.status_text()?);
        ensure!(!all_complete(&status), "an image that is complete cannot show that it is lazy");

        run(snapshotter.pulling(network).args(["--complete", &reference]))?;
        ensure!(all_complete(&snapshotter.status()?), "not complete:\n{}", snapshotter.status_text()?);
        // A device is compared whole before it is mounted, a moment after its last byte came.
        let mut number = 0;
        let mut last = Ok(());
        wait_for("all layers are mounted over their devices", Duration::from_secs(120), || {
            number += 1;
            last = same(&format!("complete-{number}"));
            last.is_err() || over_devices(snapshotter).is_ok_and(|mounts| mounts == LAYERS)
        })?;
        last?;

        snapshotter.restart_daemon()?;
        same("after-restart")?;
        ensure!(over_devices(snapshotter)? == LAYERS, "the daemon lost mounts");
        Ok(())
    });
}

/// How many layers are mounted over their devices.
fn over_devices(snapshotter: &Snapshotter) -> Result<usize> {
    let mounts = snapshotter.root().join("m").display().to_string();
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let targets = table.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(targets.filter(|target| target.starts_with(&mounts) && target.ends_with('~')).count())
}
