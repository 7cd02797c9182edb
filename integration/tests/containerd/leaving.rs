//! A node that is taken back to overlayfs.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::drover::{all_complete, ordinary_layers};
use lab::image::small;
use lab::process::{run, wait_for};
use lab::sandbox::run_test;
use lab::scene::{Scene, drop_caches};
use lab::tools::Tools;

use super::push;

/// Images of both snapshotters, and a container that runs over all of it: drained, pulled again with overlayfs, stopped, removed.
#[test]
fn a_node_is_taken_back_while_a_container_runs() {
    run_test("leaving::a_node_is_taken_back_while_a_container_runs", |run_of| {
        let tools = Tools::prepare(&|_| {})?;
        let image = |name: &str| {
            let folder = run_of.folder().join(name);
            fs::create_dir_all(&folder)?;
            small::build_variant(&folder, &tools.busybox, small::Amount::LITTLE, &format!("{name}\n"))
        };
        let images = [image("lazy")?, image("other")?, image("late")?];
        let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
        let mut references = Vec::new();
        for (image, repository) in images.iter().zip(["test/lazy", "test/other", "test/late"]) {
            references.push(push(&scene, image, repository)?);
        }
        let [lazy, other, late] = &references[..] else { unreachable!("there are three") };
        scene.start_seeder(true)?;
        scene.ingest(lazy)?;
        let mut node = scene.drover_node("[fill]\nenabled = false\n")?;
        let network = &scene.network;
        let snapshotter = |node: &lab::scene::Node, subcommand: &str| -> Result<String> {
            run(&mut node.snapshotter()?.command(network, subcommand))
        };
        node.containerd().pull(network, "drover", lazy)?;
        node.containerd().pull(network, "overlayfs", other)?;
        let sums = format!(
            "cat {} /version | sha256sum; find /etc /srv -type f | sort | xargs cat | sha256sum",
            small::LARGE_FILE
        );
        let script = format!("while [ ! -e /stop ]; do sleep 0.1; done; {sums}");
        let containerd = node.containerd();
        let mut container = containerd.container(network, "drover", lazy, "running", &["sh", "-c", &script]);
        let container = container.stdout(Stdio::piped()).spawn().context("cannot start ctr")?;
        let running = || run(&mut containerd.ctr(network, &["task", "ls"])).is_ok_and(|text| text.contains("RUNNING"));
        wait_for("the container runs", Duration::from_secs(60), running)?;
        ensure!(!all_complete(&node.snapshotter()?.status()?), "nothing is left to fetch");

        let drained = snapshotter(&node, "drain")?;
        ensure!(drained.contains("do not stop Drover yet") && drained.contains("running"), "{drained}");
        ensure!(all_complete(&node.snapshotter()?.status()?), "{}", node.snapshotter()?.status_text()?);
        containerd.pull(network, "drover", late)?;
        let reasons = ordinary_layers(&node.snapshotter()?.status()?);
        ensure!(!reasons.is_empty() && reasons.iter().all(|reason| reason.contains("drained")), "{reasons:?}");
        let printed = containerd.output_of(network, "drover", late, "late", &["cat", "/version"])?;
        ensure!(printed == "late\n", "the container of the late image printed {printed:?}");
        let refused = snapshotter(&node, "uninstall").expect_err("it serves").to_string();
        ensure!(refused.contains("stop it first"), "{refused}");

        // Switched over. The seeder and the registry's mesh are of no use any more.
        for reference in [lazy, late] {
            run(&mut containerd.ctr(network, &["image", "rm", "--sync", reference]))?;
            containerd.pull(network, "overlayfs", reference)?;
        }
        let expected = containerd.output_of(network, "overlayfs", lazy, "again", &["sh", "-c", &sums])?;
        drop_caches();
        run(&mut containerd.ctr(network, &["task", "exec", "--exec-id", "e1", "running", "touch", "/stop"]))?;
        let output = container.wait_with_output()?;
        ensure!(output.status.success(), "the container failed: {}", String::from_utf8_lossy(&output.stderr));
        let printed = String::from_utf8(output.stdout)?;
        ensure!(printed == expected, "the container read {printed:?} instead of {expected:?}");
        wait_for("nothing uses Drover", Duration::from_secs(60), || {
            snapshotter(&node, "drain").is_ok_and(|text| text.contains("nothing uses Drover any more"))
        })
        .with_context(|| snapshotter(&node, "drain").unwrap_or_default())?;

        let (root, socket) = (node.snapshotter()?.root().to_owned(), node.snapshotter()?.socket().to_owned());
        node.snapshotter_mut()?.daemon_mut().stop();
        let removed = snapshotter(&node, "uninstall")?;
        ensure!(removed.contains("proxy_plugins.drover"), "{removed}");
        ensure!(!root.exists() && !socket.exists(), "files are left: {:?}", fs::read_dir(&root).map(Iterator::count));
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let ours: Vec<_> = mounts.lines().filter(|line| line.contains(&root.display().to_string())).collect();
        ensure!(ours.is_empty(), "mounts are left: {ours:#?}");
        let processes = processes_of(node.snapshotter()?.config())?;
        ensure!(processes.is_empty(), "processes are left: {processes:?}");
        let containerd = node.containerd();
        for (reference, wanted) in [(other, "other\n"), (late, "late\n")] {
            let printed = containerd.output_of(network, "overlayfs", reference, "after", &["cat", "/version"])?;
            ensure!(printed == wanted, "a container of {reference} printed {printed:?}");
        }
        Ok(())
    });
}

/// Command lines that name the configuration file.
fn processes_of(config: &Path) -> Result<Vec<String>> {
    let lines = run(Command::new("ps").args(["-eo", "pid,args"]))?;
    let config = config.display().to_string();
    Ok(lines.lines().filter(|line| line.contains(&config)).map(str::to_owned).collect())
}
