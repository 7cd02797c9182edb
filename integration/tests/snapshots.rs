//! Containerd's own snapshotter suite (`core/snapshots/testsuite`) against our Snapshots service, through containerd's proxy
//! client. Needs root. The service is the fixture's, or with `DROVER_SNAPSHOTTER=PATH` that of the real daemon.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use lab::tools::{target, workspace};

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
        let fixture = env!("CARGO_BIN_EXE_snapshots_fixture");
        return Ok([fixture, "--root", "{root}", "--socket", "{socket}"].map(str::to_owned).into());
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
