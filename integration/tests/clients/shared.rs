//! What concerns several images, namespaces or snapshotters of one containerd.

use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::client::{Client, Way};
use lab::process::{run, wait_for};
use lab::tools::Release;

use crate::matrix::Stage;
use crate::pods;

/// Link speed at which a pull takes long enough to be interrupted, in Mbit/s.
const SLOW: u32 = 4;

/// As fast as the machine is.
const FAST: u32 = 10_000;

/// All of it, one after the other.
pub(crate) fn all(stage: &Stage) -> Result<()> {
    two_namespaces(stage).context("two namespaces")?;
    shared_layers(stage).context("two images that share layers")?;
    racing_pulls(stage).context("pulls that race")?;
    half_pulled(stage).context("an image that was half pulled with overlayfs")?;
    only_in_overlayfs(stage).context("an image that is in overlayfs only")?;
    a_build_step(stage).context("a snapshot that is committed")?;
    pods::all(stage).context("pods")
}

/// An image in two namespaces: each has its own, and one keeps working when it goes from the other.
fn two_namespaces(stage: &Stage) -> Result<()> {
    let reference = stage.reference.as_str();
    let one = client(stage, "one")?;
    let two = client(stage, "two")?;
    one.pull(reference)?;
    let first = one.start(reference, "first")?;
    two.pull(reference)?;
    let second = two.start(reference, "second")?;
    prints(&one, &first, "/etc/replaced", "after\n")?;
    prints(&two, &second, "/etc/replaced", "after\n")?;
    one.remove(first)?;
    one.remove_image(reference)?;
    // Bytes that nobody has read yet must still come.
    stage.compare(&two)?;
    prints(&two, &second, "/tmp/new", "/tmp must stay world-writable and sticky\n")?;
    two.remove(second)?;
    two.remove_image(reference)?;
    stage.wait_until_empty()
}

/// Removing one image leaves the layers that the other one needs.
fn shared_layers(stage: &Stage) -> Result<()> {
    let (reference, other) = (stage.reference.as_str(), stage.other.as_str());
    ensure!(stage.variant.layers[1].digest == stage.image.layers[1].digest, "the images share no layer");
    let client = client(stage, "shared")?;
    client.pull(reference)?;
    client.pull(other)?;
    let first = client.start(reference, "first")?;
    let second = client.start(other, "second")?;
    prints(&client, &first, "/etc/replaced", "after\n")?;
    prints(&client, &second, "/etc/replaced", "before\n")?;
    prints(&client, &second, "/version", "two\n")?;
    client.remove(second)?;
    client.remove_image(other)?;
    stage.compare(&client)?;
    client.remove(first)?;
    client.remove_image(reference)?;
    stage.wait_until_empty()
}

/// Four pulls at once of the same lower layers: two images, two namespaces.
fn racing_pulls(stage: &Stage) -> Result<()> {
    let clients = [client(stage, "one")?, client(stage, "two")?];
    let other = stage.other.as_str();
    let references = [stage.reference.as_str(), other];
    let mut pulls = Vec::new();
    for client in &clients {
        for reference in references {
            pulls.push((client.namespace(), reference, spawn(client, reference)?));
        }
    }
    for (namespace, reference, pull) in pulls {
        let output = pull.wait_with_output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{reference} into {namespace}: {errors}");
    }
    for client in &clients {
        stage.compare(client)?;
        let container = client.start(other, "other")?;
        prints(client, &container, "/version", "two\n")?;
        client.remove(container)?;
        for reference in references {
            client.remove_image(reference)?;
        }
    }
    stage.wait_until_empty()
}

/// A pull with overlayfs ends in the middle. The same image is then pulled with Drover.
fn half_pulled(stage: &Stage) -> Result<()> {
    let reference = stage.reference.as_str();
    let client = Client::new(Way::Cri, &stage.scene, &stage.node)?;
    let containerd = stage.node.containerd();
    stage.scene.network.set_speed(SLOW)?;
    let hosts = containerd.hosts().display().to_string();
    let mut pull = client.ctr(&["image", "pull", "--hosts-dir", &hosts, reference]);
    let mut pull = pull.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn()?;
    let some = stage.image.compressed_size() / 16;
    let arrived = wait_for("a part of the image", Duration::from_secs(60), || containerd.content_bytes() > some);
    pull.kill().context("cannot stop the pull")?;
    pull.wait()?;
    stage.scene.network.set_speed(FAST)?;
    arrived?;
    let there = containerd.content_bytes();
    ensure!(there < stage.image.compressed_size(), "the pull was not stopped in the middle");

    client.pull(reference)?;
    let container = client.start(reference, "after-half")?;
    let printed = client.exec(&container, &["cat", "/etc/replaced"])?;
    ensure!(printed == "after\n", "the container printed {printed:?}");
    stage.compare(&client)?;
    client.remove(container)?;
    // The killed client's lease would keep everything for a day.
    for lease in run(&mut client.ctr(&["leases", "list", "--quiet"]))?.lines() {
        run(&mut client.ctr(&["leases", "delete", "--sync", lease]))?;
    }
    clear(&client)?;
    stage.wait_until_empty()
}

/// Pulled with overlayfs alone, then run with Drover: containerd unpacks what it has.
fn only_in_overlayfs(stage: &Stage) -> Result<()> {
    let reference = stage.reference.as_str();
    for way in [Way::Ctr, Way::Cri] {
        let client = Client::new(way, &stage.scene, &stage.node)?;
        let containerd = stage.node.containerd();
        let hosts = containerd.hosts().display().to_string();
        run(&mut client.ctr(&["image", "pull", "--hosts-dir", &hosts, reference]))?;
        if way == Way::Cri {
            // CRI sees images that came by another client when it is told of them, a moment later.
            let known = || run(&mut client.ctr(&["image", "ls"])).is_ok_and(|list| list.contains("io.cri-containerd"));
            wait_for("CRI knows the image", Duration::from_secs(60), known)?;
        }
        let container = client.start(reference, "unpacked-here").with_context(|| way.name())?;
        let printed = client.exec(&container, &["cat", "/etc/replaced"])?;
        ensure!(printed == "after\n", "the container printed {printed:?}");
        stage.compare(&client)?;
        client.remove(container)?;
        clear(&client)?;
        stage.wait_until_empty()?;
    }
    Ok(())
}

/// What BuildKit does: a snapshot on an image is changed, committed and used as a parent.
fn a_build_step(stage: &Stage) -> Result<()> {
    let reference = stage.reference.as_str();
    let client = Client::new(Way::Cri, &stage.scene, &stage.node)?;
    client.pull(reference)?;
    let snapshot = |arguments: &[&str]| {
        let mut command = client.ctr(&["snapshot", "--snapshotter", "drover"]);
        run(command.args(arguments))
    };
    // The one that no other one has as its parent.
    let list = snapshot(&["ls"])?;
    let rows: Vec<Vec<_>> = list.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    let is_parent = |name: &str| rows.iter().any(|row| row.len() == 3 && row[1] == name);
    let top = rows.iter().map(|row| row[0]).find(|name| !is_parent(name)).context("no snapshot")?;
    let folder = stage.node.folder().join("step");
    std::fs::create_dir_all(&folder)?;
    let target = folder.to_str().context("not UTF-8")?;
    let mount = |printed: String| run(std::process::Command::new("sh").args(["-c", &printed]));
    let unmount = || run(std::process::Command::new("umount").arg(&folder));
    mount(snapshot(&["prepare", "--target", target, "step", top])?)?;
    std::fs::write(folder.join("derived"), "derived\n")?;
    std::fs::remove_file(folder.join("etc/replaced"))?;
    unmount()?;
    snapshot(&["commit", "derived", "step"])?;
    mount(snapshot(&["prepare", "--target", target, "look", "derived"])?)?;
    ensure!(std::fs::read_to_string(folder.join("derived"))? == "derived\n");
    ensure!(!folder.join("etc/replaced").exists() && folder.join("srv/large").exists());
    unmount()?;
    snapshot(&["rm", "look"])?;
    snapshot(&["rm", "derived"])?;
    clear(&client)?;
    stage.wait_until_empty()
}

/// The client of namespaces that nobody else uses.
fn client<'a>(stage: &'a Stage, namespace: &str) -> Result<Client<'a>> {
    let way = if stage.scene.tools.release >= Release::V2_1 { Way::Ctr } else { Way::Nerdctl };
    Client::in_namespace(way, namespace, &stage.scene, &stage.node)
}

fn spawn(client: &Client<'_>, reference: &str) -> Result<Child> {
    let mut pull = client.pulling(reference)?;
    pull.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    pull.spawn().context("cannot start a pull")
}

fn prints(client: &Client<'_>, container: &lab::client::Container, path: &str, want: &str) -> Result<()> {
    let printed = client.exec(container, &["cat", path])?;
    ensure!(printed == want, "{path} holds {printed:?} instead of {want:?}");
    Ok(())
}

/// Removes every image of a client's namespace.
pub(crate) fn clear(client: &Client<'_>) -> Result<()> {
    for image in run(&mut client.ctr(&["image", "ls", "--quiet"]))?.lines() {
        run(&mut client.ctr(&["image", "rm", "--sync", image]))?;
    }
    Ok(())
}
