//! A disk is full. A node's: containers go on, what was committed stays, a pull says what is wrong. A seeder's: images come without it,
//! and the blob is named. All is well again once there is space.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::client::{Client, Container, Way};
use lab::disk::Disk;
use lab::drover::ordinary_layers;
use lab::image::small::{self, Amount};
use lab::process::{run, wait_for};
use lab::sandbox::{Run, run_test};
use lab::scene::{NodeSetup, Scene};
use lab::tools::Tools;
use proto::drover::node::v1::LayerState;

use crate::{declined, push};

/// Enough for one image of [`Amount::LITTLE`] with all that belongs to it, and for its containers.
const DISK: u64 = 96 << 20;

/// What is free of a full disk: what a file system does not give to its last writer.
const NOTHING: u64 = 64 << 10;

/// Reads every file of the image.
const SUMS: &str = "find /etc /srv -type f | sort | xargs cat | sha256sum";

/// Without one the test is skipped, and says so.
fn small_disk(run: &Run) -> Option<Disk> {
    let mounted = Disk::mount(&run.folder().join("disk"), DISK);
    mounted.inspect_err(|error| println!("skipped: this machine has no small disk: {error:#}")).ok()
}

#[test]
fn a_full_disk_stops_no_container() {
    run_test("disk::a_full_disk_stops_no_container", |run_of| {
        let Some(disk) = small_disk(run_of) else { return Ok(()) };
        let tools = Tools::prepare(&|_| {})?;
        let images = run_of.folder().join("images");
        let one = small::build_amount(&images.join("one"), &tools.busybox, Amount::LITTLE)?;
        // Another large file: nothing but the lowest layer is the same.
        let amount = Amount { large_file: 3 << 20, ..Amount::LITTLE };
        let two = small::build_amount(&images.join("two"), &tools.busybox, amount)?;
        let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
        let (one, two) = (push(&scene, &one, "test/one")?, push(&scene, &two, "test/two")?);
        scene.start_seeder(true)?;
        for reference in [&one, &two] {
            scene.ingest(reference)?;
        }
        let expected = {
            let plain = scene.plain_node()?;
            plain.containerd().pull(&scene.network, "overlayfs", &one)?;
            plain.containerd().output_of(&scene.network, "overlayfs", &one, "c1", &["sh", "-c", SUMS])?
        };

        let extra = "[fill]\nenabled = false\n";
        let node = scene.drover_node_as(&NodeSetup { extra, disk: Some(&disk), ..NodeSetup::default() })?;
        let client = Client::new(Way::Ctr, &scene, &node)?;
        client.pull(&one)?;
        let container = client.start(&one, "first")?;
        let committed = snapshots(&client)?;

        let hog = disk.fill()?;
        wait_for("the disk is full", Duration::from_secs(60), || disk.free().is_ok_and(|free| free < NOTHING))?;
        reads(&client, &container, &expected).context("while the disk is full")?;
        // Somebody else's image: it comes, or the client is told why it does not.
        match client.pull(&two).and_then(|()| client.start(&two, "second")) {
            Ok(second) => {
                println!("the second image came although the disk is full");
                client.remove(second)?;
            }
            Err(error) => {
                let text = format!("{error:#}");
                println!("{text}");
                ensure!(text.to_lowercase().contains("no space left"), "the client is told: {text}");
            }
        }
        node.snapshotter()?.restart_daemon().context("with a full disk")?;
        reads(&client, &container, &expected).context("after a restart with a full disk")?;
        let left = snapshots(&client)?;
        let lost: Vec<_> = committed.iter().filter(|name| !left.contains(name)).collect();
        ensure!(lost.is_empty(), "these snapshots were lost: {lost:?}");

        hog.end()?;
        let lazy = || -> Result<bool> {
            client.pull(&two)?;
            Ok(ordinary_layers(&node.snapshotter()?.status()?).is_empty())
        };
        let mut last = Ok(false);
        wait_for("the second image is lazy", Duration::from_secs(60), || {
            last = lazy();
            let is_lazy = matches!(last, Ok(true));
            if !is_lazy {
                // What was declined stays unpacked until it is removed.
                let _ = client.remove_image(&two);
            }
            is_lazy
        })
        .with_context(|| {
            format!("{last:?}\n{}", node.snapshotter().and_then(|s| s.status_text()).unwrap_or_default())
        })?;
        let second = client.start(&two, "again")?;
        let printed = client.exec(&second, &["cat", "/etc/replaced"])?;
        ensure!(printed == "after\n", "the second image's container printed {printed:?}");
        reads(&client, &container, &expected).context("when there is space again")?;
        client.remove(second)?;
        client.remove(container)
    });
}

#[test]
fn a_full_disk_of_the_seeder_is_named() {
    run_test("disk::a_full_disk_of_the_seeder_is_named", |run_of| {
        let Some(disk) = small_disk(run_of) else { return Ok(()) };
        let tools = Tools::prepare(&|_| {})?;
        let images = run_of.folder().join("images");
        let one = small::build_amount(&images.join("one"), &tools.busybox, Amount::LITTLE)?;
        let two = small::build_variant(&images.join("two"), &tools.busybox, Amount::LITTLE, "two\n")?;
        // The others are in containerd's content store by the time that they are asked for.
        let lowest = one.layers.first().context("no layers")?.digest.clone();
        let variant = two.layers.last().context("no layers")?.digest.clone();
        let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
        let (one, two) = (push(&scene, &one, "test/one")?, push(&scene, &two, "test/two")?);
        scene.seeder_store = Some(disk.path().join("store"));
        scene.start_seeder(true)?;
        let node = scene.drover_node("[fill]\nenabled = false\n")?;
        let (network, containerd) = (&scene.network, node.containerd());
        let seeder = scene.seeder.as_ref().context("no seeder")?;

        let hog = disk.fill()?;
        wait_for("the disk is full", Duration::from_secs(60), || disk.free().is_ok_and(|free| free < NOTHING))?;
        containerd.pull(network, "drover", &one)?;
        let reason = declined(&node, &lowest)?;
        println!("{reason}");
        let is_told = reason.contains("no room on the seeder") && reason.contains("space");
        ensure!(is_told, "the node does not say why: {reason}");
        let printed = containerd.output_of(network, "drover", &one, "full", &["cat", "/etc/replaced"])?;
        ensure!(printed == "after\n", "the container printed {printed:?}");
        let log = fs::read_to_string(seeder.daemon().log())?;
        let is_named = log.lines().any(|line| line.contains("ingest fails") && line.contains(&lowest));
        ensure!(is_named, "the seeder does not name the blob:\n{log}");

        hog.end()?;
        let lazy = || -> Result<bool> {
            // containerd unpacks what is declined while the seeder rests after its failure.
            let _ = run(&mut containerd.ctr(network, &["image", "rm", "--sync", &two]));
            containerd.pull(network, "drover", &two)?;
            let status = node.snapshotter()?.status()?;
            let layers = status.images.iter().flat_map(|image| &image.layers);
            Ok(layers.filter(|layer| layer.blob == variant).any(|layer| layer.state() == LayerState::Partial))
        };
        let mut last = Ok(false);
        wait_for("another image is lazy", Duration::from_secs(60), || {
            last = lazy();
            matches!(last, Ok(true))
        })
        .with_context(|| format!("{last:?}"))?;
        // A layer whose ingest failed rests a while, and containerd fetches all that stands on it.
        let all_lazy = || -> Result<()> {
            for reference in [&one, &two] {
                let _ = run(&mut containerd.ctr(network, &["image", "rm", "--sync", reference]));
            }
            for reference in [&one, &two] {
                containerd.pull(network, "drover", reference)?;
            }
            let status = node.snapshotter()?.status()?;
            ensure!(ordinary_layers(&status).is_empty(), "not lazy:\n{}", node.snapshotter()?.status_text()?);
            Ok(())
        };
        let mut last = Ok(());
        wait_for("both images are lazy", Duration::from_secs(120), || {
            last = all_lazy();
            last.is_ok()
        })
        .with_context(|| format!("{last:?}"))?;
        let printed = containerd.output_of(network, "drover", &two, "again", &["cat", "/version"])?;
        ensure!(printed == "two\n", "the container printed {printed:?}");
        Ok(())
    });
}

fn reads(client: &Client<'_>, container: &Container, expected: &str) -> Result<()> {
    // Else the kernel gives what it has in memory.
    lab::scene::drop_caches();
    let printed = client.exec(container, &["sh", "-c", SUMS])?;
    ensure!(printed == expected, "the container's files have the digest {printed:?} instead of {expected:?}");
    Ok(())
}

fn snapshots(client: &Client<'_>) -> Result<Vec<String>> {
    let list = run(&mut client.ctr(&["snapshot", "--snapshotter", "drover", "ls"]))?;
    let committed = list.lines().filter(|line| line.ends_with("Committed"));
    Ok(committed.filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect())
}
