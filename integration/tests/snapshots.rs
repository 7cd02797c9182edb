//! Containerd's own snapshotter suite (`core/snapshots/testsuite`) against our Snapshots service, through containerd's proxy
//! client, and containerd 2.3 itself on ordinary snapshots. Needs root. The suite's service is the fixture's, or with
//! `DROVER_SNAPSHOTTER=PATH` that of the real daemon.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use lab::compare::compare;
use lab::containerd::{Containerd, Setup};
use lab::image::small;
use lab::process::{self, Daemon, wait_for};
use lab::sandbox::{Run, run_test};
use lab::scene::Scene;
use lab::tools::{Tools, target, workspace};
use snapshotter::containerd::connection::Connection;
use snapshotter::containerd::content::ContentStore;

const FIXTURE: &str = env!("CARGO_BIN_EXE_snapshots_fixture");

/// Tests in the suite of containerd 2.3.
const SUITE_TESTS: usize = 21;

#[test]
fn containerds_suite_passes() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: containerds_suite_passes: this needs root, for mounts");
        return;
    }
    run().unwrap_or_else(|error| panic!("{error:#}"));
}

/// A pull that is never lazy, a container, a commit of it and the image's removal, all by containerd's own programs.
#[test]
fn containerd_works_on_ordinary_snapshots() {
    run_test("containerd_works_on_ordinary_snapshots", ordinary);
}

fn ordinary(run: &Run) -> Result<()> {
    let tools = Tools::prepare(&|_| {})?;
    let image = small::build(&run.folder().join("image"), &tools.busybox)?;
    let scene = Scene::private(run, tools, &run.folder().join("registry"))?;
    let registry = scene.registry.as_ref().context("a private scene has a registry")?;
    let reference = registry.push(&scene.network, &image, "test/small", "1")?;
    let network = &scene.network;

    let (root, socket) = (run.folder().join("snapshots"), Path::new("/run/ordinary.sock"));
    let host = network.add_node(1)?;
    let mut fixture = network.command(host.place(), FIXTURE);
    fixture.arg("--root").arg(&root).arg("--socket").arg(socket);
    let mut fixture = Daemon::start("snapshots_fixture", &mut fixture, &run.folder().join("fixture.log"))?;
    fixture.wait_until("listens", Duration::from_secs(60), || socket.exists())?;
    let drop_in = fs::read_to_string(workspace().join("contrib/containerd/drover-v3.toml"))?
        .replace("/run/drover/drover.sock", "/run/ordinary.sock")
        .replace("/var/lib/drover", &root.display().to_string());
    let containerd_socket = Path::new("/run/ordinary-containerd.sock");
    let containerd = Containerd::start(
        &scene.tools,
        network,
        host.place(),
        &run.folder().join("containerd"),
        containerd_socket,
        &Setup {
            drop_in: Some(&drop_in),
            plain_registry: Some(&registry.host()),
            control_group: &run.control_group(),
            cri: None,
        },
    )?;

    containerd.pull(network, "drover", &reference)?;
    containerd.pull(network, "overlayfs", &reference)?;
    let out = containerd.output_of(network, "drover", &reference, "c1", &["cat", "/etc/replaced"])?;
    ensure!(out == "after\n", "the container printed {out:?}");
    let mounted = |snapshotter: &str, folder: &str| -> Result<PathBuf> {
        let folder = run.folder().join(folder);
        fs::create_dir_all(&folder)?;
        let mount = ["image", "mount", "--snapshotter", snapshotter, &reference];
        process::run(containerd.ctr(network, &mount).arg(&folder))?;
        Ok(folder)
    };
    let (ours, theirs) = (mounted("drover", "ours")?, mounted("overlayfs", "theirs")?);
    let result = compare(&ours, &theirs)?;
    // Two unpacks at two times: directories that the image does not name, or removes from, have the time of the unpack.
    let unpack_time = |difference: &&String| {
        difference.split_once(": mtime: ").is_some_and(|(path, _)| ours.join(path.trim_start_matches('/')).is_dir())
    };
    let differences: Vec<_> = result.differences.iter().filter(|difference| !unpack_time(difference)).collect();
    ensure!(differences.is_empty(), "{differences:#?}");
    ensure!(result.paths > small::MANY_FILES as u64, "only {} paths were seen", result.paths);
    for (snapshotter, folder) in [("drover", &ours), ("overlayfs", &theirs)] {
        let unmount = ["image", "unmount", "--rm", "--snapshotter", snapshotter];
        process::run(containerd.ctr(network, &unmount).arg(folder))?;
    }

    // What containerd's content store says to us.
    let digest = image.manifest.digest.parse()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let store = ContentStore::new(&Connection::new(containerd_socket));
        let info = store.info("default", digest).await?.context("the manifest is there")?;
        ensure!(info.size == image.manifest.size, "{info:?}");
        ensure!(info.labels.keys().any(|label| label.starts_with("containerd.io/distribution.source.")), "{info:?}");
        let bytes = store.read("default", digest, 1 << 20).await?.context("the manifest is there")?;
        ensure!(bytes == fs::read(&image.manifest.path)?, "other bytes");
        ensure!(store.info("elsewhere", digest).await?.is_none(), "namespaces are kept apart");
        Ok(())
    })?;

    // Removed: records by containerd's garbage collection, directories with them.
    process::run(&mut containerd.ctr(network, &["image", "remove", "--sync", &reference]))?;
    let left = || fs::read_dir(root.join("snapshots")).map_or(0, Iterator::count);
    wait_for("the end of all snapshots", Duration::from_secs(60), || left() == 0)
}

fn run() -> Result<()> {
    let suite = build_suite()?;
    let temporary = tempfile::tempdir().context("cannot create a temporary directory")?;
    let mut tests = Command::new("setpriv");
    // Mounts and servers end with the namespaces, also when this test is killed.
    tests.args([
        "--pdeathsig",
        "KILL",
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--kill-child",
    ]);
    tests.arg("--mount-proc").arg(suite).args(["-test.root", "-test.v", "-test.timeout", "10m"]);
    tests.env("SNAPSHOTS_SERVER", server()?.join("\n")).env("TMPDIR", temporary.path());
    tests.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut child = tests.spawn().context("cannot start `setpriv` (package util-linux)")?;
    let stdout = child.stdout.take().context("the suite has no output")?;
    let (mut passed, mut other) = (0, Vec::new());
    for line in BufReader::new(stdout).lines() {
        let line = line.context("cannot read the suite's output")?;
        println!("  | {line}");
        let line = line.trim_start();
        if line.starts_with("--- PASS: TestSnapshotter/") {
            passed += 1;
        } else if line.starts_with("--- ") && !line.starts_with("--- PASS: TestSnapshotter ") {
            other.push(line.to_owned());
        }
    }
    let status = child.wait().context("cannot wait for the suite")?;
    println!("containerd's snapshotter suite: {passed} of {SUITE_TESTS} passed");
    ensure!(other.is_empty(), "not passed: {other:?}");
    ensure!(status.success(), "the suite ended with {status}");
    ensure!(passed == SUITE_TESTS, "{passed} tests passed, there should be {SUITE_TESTS}");
    Ok(())
}

fn build_suite() -> Result<PathBuf> {
    let mut build = Command::new(workspace().join("integration/tools/build.sh"));
    build.arg("snapshotter-suite").env("CARGO_TARGET_DIR", target()?).stderr(Stdio::inherit());
    let output = build.output().context("cannot run integration/tools/build.sh")?;
    ensure!(output.status.success(), "integration/tools/build.sh failed");
    let folder = String::from_utf8(output.stdout).context("integration/tools/build.sh printed no path")?;
    Ok(Path::new(folder.trim()).join("snapshotter-suite.test"))
}

/// The server's command line, with `{root}` and `{socket}` to be filled in by the suite.
fn server() -> Result<Vec<String>> {
    let Some(daemon) = std::env::var_os("DROVER_SNAPSHOTTER") else {
        return Ok([FIXTURE, "--root", "{root}", "--socket", "{socket}"].map(str::to_owned).into());
    };
    let Some(daemon) = daemon.to_str().filter(|daemon| Path::new(daemon).is_file()) else {
        bail!("DROVER_SNAPSHOTTER={} is not a program", daemon.display());
    };
    // $1 root, $2 socket, $3 daemon.
    let script = concat!(
        r#"printf 'root = "%s"\nrun = "%s.run"\nsocket = "%s"\nsecurity = "off"\n' "$1" "$1" "$2" >"$1.toml" && "#,
        r#"exec "$3" serve --config "$1.toml""#
    );
    Ok(["sh", "-c", script, "sh", "{root}", "{socket}", daemon].map(str::to_owned).into())
}
