//! What concerns several images, namespaces or snapshotters of one containerd.

use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::client::{Client, Way};
use lab::image::Blob;
use lab::image::small::{self, Amount};
use lab::network::Link;
use lab::process::{run, wait_for};
use lab::tools::Release;
use proto::drover::node::v1::{Layer, LayerState};

use crate::matrix::Stage;
use crate::pods;

/// Link speed at which a pull takes long enough to be interrupted, in Mbit/s.
const SLOW: u32 = 4;

/// As fast as the machine is.
const FAST: u32 = 10_000;

/// What comes beside layers: manifests, indexes, packets' headers.
const OVERHEAD: u64 = 512 << 10;

/// All of it, one after the other.
pub(crate) fn all(stage: &Stage) -> Result<()> {
    two_namespaces(stage).context("two namespaces")?;
    for way in [usual(stage), Way::Drover, Way::Cri] {
        let called = || way.name();
        shared_layers(stage, way).context("two images that share layers").with_context(called)?;
        racing_pulls(stage, way).context("pulls that race").with_context(called)?;
    }
    half_pulled(stage).context("an image that was half pulled with overlayfs")?;
    fetched_before(stage).context("a known layer whose blob was fetched before")?;
    only_in_overlayfs(stage).context("an image that is in overlayfs only")?;
    a_build_step(stage).context("a snapshot that is committed")?;
    pods::all(stage).context("pods")
}

/// An image in two namespaces: each has its own, and one keeps working when it goes from the other.
fn two_namespaces(stage: &Stage) -> Result<()> {
    let reference = stage.reference.as_str();
    let one = client(stage, usual(stage), "one")?;
    let two = client(stage, usual(stage), "two")?;
    one.pull(reference)?;
    stage.is_lazy()?;
    let first = one.start(reference, "first")?;
    two.pull(reference)?;
    let second = two.start(reference, "second")?;
    stage.is_lazy()?;
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
fn shared_layers(stage: &Stage, way: Way) -> Result<()> {
    let (reference, other) = (stage.reference.as_str(), stage.other.as_str());
    ensure!(stage.variant.layers[1].digest == stage.image.layers[1].digest, "the images share no layer");
    let client = client(stage, way, "shared")?;
    client.pull(reference)?;
    client.pull(other)?;
    let first = client.start(reference, "first")?;
    let second = client.start(other, "second")?;
    stage.is_lazy()?;
    prints(&client, &first, "/etc/replaced", "after\n")?;
    prints(&client, &second, "/etc/replaced", "before\n")?;
    prints(&client, &second, "/version", "two\n")?;
    client.remove(second)?;
    client.remove_image(other)?;
    stage.compare(&client)?;
    client.remove(first)?;
    clear(&client)?;
    stage.wait_until_empty()
}

/// Pulls of the same lower layers at once: two images, in two namespaces where there are two.
fn racing_pulls(stage: &Stage, way: Way) -> Result<()> {
    let namespaces = if way == Way::Cri { 1..2 } else { 1..3 };
    let clients: Vec<_> =
        namespaces.map(|number| client(stage, way, &format!("race-{number}"))).collect::<Result<_>>()?;
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
    stage.is_lazy()?;
    for client in &clients {
        stage.compare(client)?;
        let container = client.start(other, "other")?;
        prints(client, &container, "/version", "two\n")?;
        client.remove(container)?;
        clear(client)?;
    }
    stage.wait_until_empty()
}

/// A pull with overlayfs ends in the middle. The same image is then pulled with Drover, which leaves the blobs that are whole to
/// containerd and fetches nothing of them.
fn half_pulled(stage: &Stage) -> Result<()> {
    let reference = stage.reference.as_str();
    let client = Client::new(Way::Cri, &stage.scene, &stage.node)?;
    let (containerd, layers) = (stage.node.containerd(), &stage.image.layers);
    stage.scene.network.set_speed(SLOW)?;
    let mut pull = client.ctr(&["image", "pull", "--hosts-dir", &containerd.hosts().display().to_string(), reference]);
    let mut pull = pull.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn()?;
    let is_local = |layer: &Blob| containerd.has_blob(&layer.digest);
    let arrived = wait_for("one blob of the image", Duration::from_secs(60), || layers.iter().any(is_local));
    pull.kill().context("cannot stop the pull")?;
    pull.wait()?;
    stage.scene.network.set_speed(FAST)?;
    arrived?;
    let local: Vec<bool> = layers.iter().map(is_local).collect();
    ensure!(local.contains(&false), "the pull was not stopped in the middle");

    let counter = stage.scene.network.counter(stage.node.place(), Link::Switch).context("no counter")?;
    let before = counter.read()?;
    client.pull(reference)?;
    let container = client.start(reference, "after-half")?;
    prints(&client, &container, "/etc/replaced", "after\n")?;
    stage.compare(&client)?;
    let came = counter.read()? - before;
    let status = stage.node.snapshotter()?.status()?;
    let shown: Vec<_> = status.images.iter().flat_map(|image| &image.layers).collect();
    let mut missing = 0;
    for ((layer, chain), is_local) in layers.iter().zip(stage.image.chain_ids()?).zip(local) {
        let shown = shown.iter().find(|shown| shown.snapshot.ends_with(&chain)).context("a layer is not shown")?;
        println!(
            "{} is local: {is_local}; {:?} {:?} {}",
            layer.digest,
            shown.state(),
            shown.bytes_by_source,
            shown.reason
        );
        let is_declined = shown.state() == LayerState::Ordinary;
        if is_local && is_declined {
            ensure!(shown.reason.contains("content store already"), "declined for another reason: {}", shown.reason);
        } else if is_local {
            // All layers are resolved at the first one's `Prepare`, so that it may be known by the time it is asked for.
            ensure!(fetched(shown) < layer.size, "fetched although it is here: {shown:?}");
        } else {
            ensure!(!is_declined, "{} is not here and not lazy: {}", layer.digest, shown.reason);
            missing += layer.size;
        }
    }
    ensure!(came < missing + missing / 10 + OVERHEAD, "{came} bytes came although only {missing} were missing");
    client.remove(container)?;
    // The killed client's lease would keep everything for a day.
    for lease in run(&mut client.ctr(&["leases", "list", "--quiet"]))?.lines() {
        run(&mut client.ctr(&["leases", "delete", "--sync", lease]))?;
    }
    clear(&client)?;
    stage.wait_until_empty()
}

/// A lazy image's layers in another order, so that they are prepared again, with all blobs in the content store by then: the node
/// knows how to read them there, so they are lazy, and no byte of them comes over the network.
fn fetched_before(stage: &Stage) -> Result<()> {
    let client = Client::new(Way::Cri, &stage.scene, &stage.node)?;
    let containerd = stage.node.containerd();
    client.pull(&stage.other)?;
    let layers = stage.node.snapshotter()?.root().join("layers");
    let has_spans =
        |entry: std::io::Result<std::fs::DirEntry>| entry.is_ok_and(|entry| entry.path().join("spans").exists());
    let all_spans = || std::fs::read_dir(&layers).is_ok_and(|mut layers| layers.all(has_spans));
    wait_for("the node can read blobs", Duration::from_secs(60), all_spans)?;
    let hosts = containerd.hosts().display().to_string();
    run(&mut client.ctr(&["image", "pull", "--hosts-dir", &hosts, &stage.reordered]))?;
    client.pull(&stage.reordered)?;
    let container = client.start(&stage.reordered, "reordered")?;
    stage.is_lazy()?;

    let counter = stage.scene.network.counter(stage.node.place(), Link::Switch).context("no counter")?;
    let before = counter.read()?;
    let read = client.exec(&container, &["sh", "-c", &format!("cat {} | wc -c", small::LARGE_FILE)])?;
    let size = Amount::LITTLE.large_file;
    ensure!(read.trim() == size.to_string(), "the file has {read} bytes instead of {size}");
    let came = counter.read()? - before;
    ensure!(came < size / 8, "{came} bytes came over the network of a blob that is here");
    let status = stage.node.snapshotter()?.status()?;
    let shown = status.images.iter().flat_map(|image| &image.layers);
    let inside: u64 = shown.filter_map(|layer| layer.bytes_by_source.get("containerd")).sum();
    ensure!(inside > 0, "nothing came from the content store:\n{}", stage.node.snapshotter()?.status_text()?);
    client.remove(container)?;
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

/// The way of this containerd's own clients that is lazy and has namespaces.
fn usual(stage: &Stage) -> Way {
    if stage.scene.tools.release >= Release::V2_1 { Way::Ctr } else { Way::Nerdctl }
}

/// A client in a namespace that nobody else uses; CRI has but one.
fn client<'a>(stage: &'a Stage, way: Way, namespace: &str) -> Result<Client<'a>> {
    let namespace = if way == Way::Cri { way.namespace() } else { namespace };
    Client::in_namespace(way, namespace, &stage.scene, &stage.node)
}

/// Bytes of a layer that came over the network.
fn fetched(layer: &Layer) -> u64 {
    layer.bytes_by_source.iter().filter(|(source, _)| *source != "containerd").map(|(_, bytes)| bytes).sum()
}

fn spawn(client: &Client<'_>, reference: &str) -> Result<Child> {
    let mut pull = client.pulling(reference)?;
    pull.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    pull.spawn().context("cannot start a pull")
}

/// Fails unless a file of the container holds `want`.
pub(crate) fn prints(client: &Client<'_>, container: &lab::client::Container, path: &str, want: &str) -> Result<()> {
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
