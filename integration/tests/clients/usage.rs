//! What a node says that its images take: of each layer to containerd, of the disk to its operator and to `df`.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::client::Client;
use lab::containerd::Containerd;
use lab::process::{run, wait_for};
use lab::scene::Scene;

use crate::matrix::Stage;

/// By how much a figure may be wrong beside its hundredth: what changes between two looks, and rounding.
const SLACK: u64 = 64 << 10;

/// The same for a layer, which is at rest.
const LAYER_SLACK: u64 = 8 << 10;

/// `EXT4_SUPER_MAGIC` of the kernel: whose way to store directories and attributes `Usage` counts with.
const EXT4: rustix::fs::FsWord = 0xef53;

/// Size by chain id.
pub(crate) type Sizes = BTreeMap<String, u64>;

/// What the layers `chains` take where overlayfs has them; `None` where the disk is not of the sort that Drover counts for.
pub(crate) fn unpacked(
    scene: &Scene,
    containerd: &Containerd,
    chains: &[String],
    folder: &Path,
) -> Result<Option<Sizes>> {
    let kind = rustix::fs::statfs(folder).context("cannot ask for the sort of the disk")?.f_type;
    if kind != EXT4 {
        println!("skipped: usage is compared on ext4 only");
        return Ok(None);
    }
    sizes(chains, || containerd.ctr(&scene.network, &["snapshot", "--snapshotter", "overlayfs"])).map(Some)
}

/// Compares the usage of lazy layers, and what the node says of its disk, with what is there.
pub(crate) fn check(stage: &Stage, client: &Client<'_>) -> Result<()> {
    if let Some(expected) = &stage.unpacked {
        let chains: Vec<_> = expected.keys().cloned().collect();
        let seen = sizes(&chains, || client.ctr(&["snapshot", "--snapshotter", "drover"]))?;
        for (chain, expected) in expected {
            let seen = *seen.get(chain).context("containerd left a layer out")?;
            ensure!(is_near(seen, *expected, LAYER_SLACK), "usage of {chain} is {seen}, overlayfs has {expected}");
        }
    }
    let snapshotter = stage.node.snapshotter()?;
    let root = snapshotter.root();
    same(
        "status",
        || Ok(snapshotter.status()?.disk_bytes),
        || {
            let printed =
                run(Command::new("du").args(["--summarize", "--one-file-system", "--block-size=1"]).arg(root))?;
            Ok(printed.split_whitespace().next().context("du printed nothing")?.parse()?)
        },
    )?;
    same("statfs", || taken(&root.join("devices")), || devices(&root.join("layers")))
}

/// Waits until what Drover says of the disk is what is there: a look takes time, and the account follows the disk's with each sync.
fn same(what: &str, mut said: impl FnMut() -> Result<u64>, mut there: impl FnMut() -> Result<u64>) -> Result<()> {
    let mut last = None;
    let waited = wait_for("the account of the disk is right", Duration::from_secs(30), || {
        let looked = said().and_then(|said| Ok((said, there()?)));
        let is_right = looked.as_ref().is_ok_and(|(said, there)| is_near(*said, *there, SLACK));
        last = Some(looked);
        is_right
    });
    waited.with_context(|| format!("{what} says and there is: {last:?}"))
}

fn is_near(said: u64, there: u64, slack: u64) -> bool {
    said.abs_diff(there) <= there / 100 + slack
}

/// What `df` calls used.
fn taken(mounted: &Path) -> Result<u64> {
    let space = rustix::fs::statvfs(mounted).with_context(|| format!("cannot look at {}", mounted.display()))?;
    Ok((space.f_blocks - space.f_bfree) * space.f_frsize)
}

/// What the devices of all layers take.
fn devices(layers: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(layers).with_context(|| format!("cannot list {}", layers.display()))?;
    let devices = entries.flatten().filter_map(|entry| entry.path().join("device").metadata().ok());
    Ok(devices.map(|device| device.blocks() * 512).sum())
}

fn sizes(chains: &[String], snapshot: impl Fn() -> Command) -> Result<Sizes> {
    let printed = run(snapshot().args(["usage", "-b"]).args(chains))?;
    let rows = printed.lines().skip(1).filter_map(|line| {
        let mut columns = line.split_whitespace();
        Some((columns.next()?.to_owned(), columns.next()?.parse().ok()?))
    });
    let sizes: Sizes = rows.collect();
    ensure!(sizes.len() == chains.len(), "containerd does not say what {} layers take:\n{printed}", chains.len());
    Ok(sizes)
}
