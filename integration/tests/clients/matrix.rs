//! One containerd, every way to pull and run an image with it.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use lab::client::{Client, Way, wait_until_empty};
use lab::compare::compare_unpacked;
use lab::containerd::Cri;
use lab::drover::ordinary_layers;
use lab::image::Image;
use lab::image::small::{self, Amount};
use lab::process::wait_for;
use lab::sandbox::Run;
use lab::scene::{Node, NodeSetup, Scene};
use lab::tools::{self, Release, Tools};

use crate::table::{Outcome, Table};
use crate::usage::{self, Sizes};
use crate::{ids, keys, shared};

/// Keeps layers as they were read: what a container did not need stays elsewhere.
pub(crate) const NO_FILL: &str = "[fill]\nenabled = false\n";

/// What an empty store may grow by: records, logs.
pub(crate) const LEFT: u64 = 4 << 20;

/// Everything that the pairs of one release share.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) scene: Scene,
    pub(crate) node: Node,
    pub(crate) reference: String,
    pub(crate) image: Image,
    /// Another image, on the same lower layers; it holds `two` in `/version`.
    pub(crate) other: String,
    pub(crate) variant: Image,
    /// That one with its upper layers in another order.
    pub(crate) reordered: String,
    /// The image as containerd unpacks it, and when that began.
    pub(crate) expected: (PathBuf, SystemTime),
    /// What its layers take unpacked.
    pub(crate) unpacked: Option<Sizes>,
    /// Keeps `expected` mounted.
    _plain: Node,
    /// Kubernetes' interface of the node.
    pub(crate) cri: Cri,
    /// What the empty store of the node takes on the disk.
    pub(crate) empty: u64,
    /// Folder with a runc that shifts the ids of pods, where this containerd can use it.
    pub(crate) shifting_runc: Option<PathBuf>,
}

/// All pairs of `release`, then what concerns several images or namespaces.
pub(crate) fn release(run: &Run, release: Release) -> Result<()> {
    let table = Table::read()?;
    let Some(mut stage) = Stage::set(run, release)? else { return Ok(()) };
    let version = stage.scene.tools.containerd_version()?;
    let said = table.versions.get(&release).context("no row")?;
    ensure!(*said == version, "the page says {said} was tested, this is {version}");
    for way in Way::ALL.into_iter().filter(|way| way.exists(release)) {
        let began = Instant::now();
        let outcome = table.outcome(release, way)?;
        pair(&stage, way, outcome).with_context(|| {
            let status = stage.node.snapshotter().and_then(|snapshotter| snapshotter.status_text());
            format!("containerd {version}, {}:\n{}", way.name(), status.unwrap_or_default())
        })?;
        println!("containerd {version}, {}: {outcome:?}, {:.1} s", way.name(), began.elapsed().as_secs_f64());
    }
    shared::all(&stage).with_context(|| format!("containerd {version}"))?;
    keys::all(&mut stage).with_context(|| format!("containerd {version}, a key that is missing"))?;
    ids::all(&mut stage).with_context(|| format!("containerd {version}, a user namespace"))
}

impl Stage {
    /// Starts everything once. `None` where the machine cannot have this containerd.
    pub(crate) fn set(run: &Run, release: Release) -> Result<Option<Self>> {
        let tools = Tools::prepare(&|_| {})?;
        let Some(tools) = tools.with_containerd(release, &|what| println!("{what}"))? else {
            println!("skipped: this distribution's containerd is not {}", release.name());
            return Ok(None);
        };
        let cni_plugins = Some(tools::cni_plugins(&|what| println!("{what}"))?);
        let shifts = release >= ids::SHIFTS_MOUNTS;
        let shifting_runc = shifts.then(|| tools::runc(&|what| println!("{what}"))).transpose()?;
        let images = run.folder().join("images");
        let image = small::build_amount(&images.join("small"), &tools.busybox, Amount::LITTLE)?;
        let variant = small::build_variant(&images.join("variant"), &tools.busybox, Amount::LITTLE, "two\n")?;
        let folder = images.join("reordered");
        let [base, middle, top] = &variant.link_layers(&folder)?[..] else { bail!("the other image has three layers") };
        let reordered = Image::assemble(&folder, &[base.clone(), top.clone(), middle.clone()], small::PATH)?;
        let pause = small::build_pause(&images.join("pause"), &tools.busybox)?;
        let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
        let registry = scene.registry.as_ref().context("a private scene has a registry")?;
        let reference = registry.push(&scene.network, &image, "test/small", "1")?;
        let other = registry.push(&scene.network, &variant, "test/variant", "1")?;
        let reordered = registry.push(&scene.network, &reordered, "test/reordered", "1")?;
        let pause_image = registry.push(&scene.network, &pause, "test/pause", "1")?;
        scene.start_seeder(true)?;
        scene.ingest(&reference)?;
        scene.ingest(&other)?;

        let began = SystemTime::now();
        let plain = scene.plain_node()?;
        plain.containerd().pull(&scene.network, "overlayfs", &reference)?;
        let expected = run.folder().join("expected");
        plain.mount_image(&scene.network, "overlayfs", &reference, &expected)?;

        let unpacked = usage::unpacked(&scene, plain.containerd(), &image.chain_ids()?, plain.folder())?;

        let cri = Cri { pause_image, cni_plugins };
        let setup = NodeSetup { extra: NO_FILL, cri: Some(&cri), ..NodeSetup::default() };
        let node = scene.drover_node_as(&setup)?;
        let empty = node.snapshotter()?.disk_use()?;
        let expected = (expected, began);
        Ok(Some(Self {
            scene,
            node,
            reference,
            image,
            other,
            variant,
            reordered,
            expected,
            unpacked,
            _plain: plain,
            cri,
            empty,
            shifting_runc,
        }))
    }

    /// Whether what containerd has of the image beside `before` bytes is next to nothing, or all.
    pub(crate) fn outcome(&self, image: &Image, before: u64) -> Result<Outcome> {
        let fetched = self.node.containerd().content_bytes().saturating_sub(before);
        let compressed = image.compressed_size();
        let status = self.node.snapshotter()?.status()?;
        let ordinary = ordinary_layers(&status);
        if fetched >= compressed {
            ensure!(ordinary.len() >= image.layers.len(), "containerd has all layers, but some are lazy: {ordinary:?}");
            return Ok(Outcome::Eager);
        }
        ensure!(fetched < compressed / 10, "containerd fetched {fetched} bytes of {compressed}: not all, not nothing");
        ensure!(ordinary.is_empty(), "containerd fetched {fetched} bytes only, but layers are ordinary: {ordinary:?}");
        Ok(Outcome::Lazy)
    }

    /// Fails where containerd unpacked a layer.
    pub(crate) fn is_lazy(&self) -> Result<()> {
        self.is_lazy_on(&self.node)
    }

    /// The same on another node.
    pub(crate) fn is_lazy_on(&self, node: &Node) -> Result<()> {
        let snapshotter = node.snapshotter()?;
        let status = snapshotter.status()?;
        let is_lazy = !status.images.is_empty() && ordinary_layers(&status).is_empty();
        ensure!(is_lazy, "not lazy:\n{}", snapshotter.status_text()?);
        Ok(())
    }

    /// Compares the image as `client` has it with what containerd's own unpack made of it, path by path.
    pub(crate) fn compare(&self, client: &Client<'_>) -> Result<()> {
        let (expected, began) = &self.expected;
        let target = self.node.folder().join("tree");
        let result =
            client.with_tree(&self.reference, &self.image, &target, |tree| compare_unpacked(expected, tree, *began))?;
        ensure!(result.differences.is_empty(), "{:#?}", result.differences);
        ensure!(result.paths > Amount::LITTLE.files as u64, "only {} paths were compared", result.paths);
        Ok(())
    }

    /// Waits until neither the snapshotter nor containerd keeps anything of any image.
    pub(crate) fn wait_until_empty(&self) -> Result<()> {
        wait_until_empty(&self.node, self.empty + LEFT)?;
        let content = || self.node.containerd().content_bytes();
        wait_for("containerd's content store is empty", Duration::from_secs(60), || content() == 0)
            .with_context(|| format!("{} bytes are left", content()))
    }
}

/// The life of an image with one client.
fn pair(stage: &Stage, way: Way, expected: Outcome) -> Result<()> {
    let client = Client::new(way, &stage.scene, &stage.node)?;
    let reference = stage.reference.as_str();
    let before = stage.node.containerd().content_bytes();
    client.pull(reference)?;
    let first = client.start(reference, "first").context("cannot start a container")?;
    let printed = client.exec(&first, &["cat", "/etc/replaced"])?;
    ensure!(printed == "after\n", "the container printed {printed:?}");
    let outcome = stage.outcome(&stage.image, before)?;
    ensure!(outcome == expected, "the page says {expected:?}, seen was {outcome:?}");
    // The walk reads every byte.
    stage.compare(&client)?;
    if outcome == Outcome::Lazy {
        usage::check(stage, &client).context("what the image takes")?;
    }

    let second = client.start(reference, "second").context("cannot start a second container")?;
    client.exec(&first, &["sh", "-c", "echo changed > /etc/replaced; rm /srv/large; echo new > /srv/new"])?;
    let printed = client.exec(&second, &["sh", "-c", "cat /etc/replaced; ls /srv"])?;
    let apart = printed.starts_with("after\n") && printed.contains("large") && !printed.contains("new");
    ensure!(apart, "a container sees another one's changes: {printed:?}");

    let committed = client.commit(&first, &stage.image).context("cannot commit")?;
    let third = client.start(&committed, "third").context("cannot start a committed image")?;
    let printed = client.exec(&third, &["sh", "-c", "cat /etc/replaced /srv/new; ls /srv; cat /tmp/new"])?;
    let is_whole = printed.starts_with("changed\nnew\n") && !printed.contains("large") && printed.contains("sticky");
    ensure!(is_whole, "the committed image's container printed {printed:?}");
    client.remove(third)?;
    client.remove_image(&committed)?;
    client.remove(first)?;
    client.remove(second)?;
    client.remove_image(reference)?;
    if way == Way::Cri {
        shared::clear(&client)?;
    }
    stage.wait_until_empty()
}
