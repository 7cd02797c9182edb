//! Every path of a lazy image is what containerd's own unpack makes of it: type, mode, owner, times, attributes, links, bytes.

use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use lab::compare::{compare, compare_unpacked};
use lab::drover::{all_complete, bytes_fetched, ordinary_layers};
use lab::image::real::Real;
use lab::image::{Image, demo, small};
use lab::measure::wait_until_complete;
use lab::network::{Counter, Link};
use lab::sandbox::{Run, run_test};
use lab::scene::{Node, Scene};
use lab::tools::{Tools, workspace};

use crate::{NO_FILL, push, scene_with_image};

/// containerd's own unpack: the lab itself works, and the comparison finds equal trees equal.
#[test]
fn overlayfs_runs_the_test_image() {
    run_test("equal::overlayfs_runs_the_test_image", |run| {
        let (mut scene, reference, _) = scene_with_image(run)?;
        let node = scene.plain_node()?;
        node.containerd().pull(&scene.network, "overlayfs", &reference)?;
        let printed =
            node.containerd().output_of(&scene.network, "overlayfs", &reference, "c1", &["cat", "/etc/replaced"])?;
        ensure!(printed == "after\n", "the container printed {printed:?}");
        let (left, right) = (run.folder().join("left"), run.folder().join("right"));
        node.mount_image(&scene.network, "overlayfs", &reference, &left)?;
        node.mount_image(&scene.network, "overlayfs", &reference, &right)?;
        let result = compare(&left, &right)?;
        ensure!(result.differences.is_empty(), "{:#?}", result.differences);
        ensure!(result.paths > small::MANY_FILES as u64, "only {} paths were seen", result.paths);
        ensure!(!left.join("etc/removed").exists() && !left.join("srv/opaque/below").exists());
        Ok(())
    });
}

/// The main promise: the pull ends and the container runs while most of the image is elsewhere, and every path is what
/// containerd's own unpack makes of it, lazily and when complete.
#[test]
fn a_lazy_image_equals_an_unpacked_one() {
    run_test("equal::a_lazy_image_equals_an_unpacked_one", |run| {
        let (mut scene, reference, image) = scene_with_image(run)?;
        scene.start_seeder(true)?;
        compare_with_overlayfs(run, &mut scene, &[Subject::small(reference, image)])
    });
}

/// zstd in one frame and in many, plain tar, gzip and an empty layer in one image of Docker's media types, behind an index.
#[test]
fn a_lazy_image_of_mixed_layers_equals_an_unpacked_one() {
    run_test("equal::a_lazy_image_of_mixed_layers_equals_an_unpacked_one", |run| {
        let tools = Tools::prepare(&|_| {})?;
        let image = small::build_mixed(&run.folder().join("image"), &tools.busybox)?;
        let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
        let reference = push(&scene, &image, "test/mixed")?;
        scene.start_seeder(true)?;
        compare_with_overlayfs(run, &mut scene, &[Subject::small(reference, image)])
    });
}

/// A Debian root file system, a static busybox and a static Go program.
#[test]
fn real_images_equal_unpacked_ones() {
    run_test("equal::real_images_equal_unpacked_ones", |run| compare_real_images(run, &Real::SMALL));
}

/// Node and a JDK.
#[test]
#[ignore = "downloads and compares half a gigabyte: make nightly"]
fn large_real_images_equal_unpacked_ones() {
    run_test("equal::large_real_images_equal_unpacked_ones", |run| compare_real_images(run, &Real::LARGE));
}

/// The same on the demonstration image, which takes minutes.
#[test]
#[ignore = "takes minutes: make nightly"]
fn the_lazy_demo_image_equals_an_unpacked_one() {
    run_test("equal::the_lazy_demo_image_equals_an_unpacked_one", |run| {
        let tools = Tools::prepare(&|_| {})?;
        let image = demo::build(&workspace().join(".drover/image-cache"), &|_| {})?;
        let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
        let reference = push(&scene, &image, "test/demo")?;
        scene.start_seeder(true)?;
        let subject =
            Subject { program: &demo::PROGRAM, prints: "numpy", paths: 30_000, ..Subject::small(reference, image) };
        compare_with_overlayfs(run, &mut scene, &[subject])
    });
}

fn compare_real_images(run: &Run, images: &[Real]) -> Result<()> {
    let tools = Tools::prepare(&|_| {})?;
    let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
    let mut subjects = Vec::new();
    for real in images {
        let image = real.build(&workspace().join(".drover/image-cache"), &|what| println!("{}: {what}", real.name()));
        let image = image.with_context(|| format!("the image {}", real.name()))?;
        let reference = push(&scene, &image, &format!("real/{}", real.name()))?;
        // A program may well need most of an image that is made for it.
        let most_is_needed = *real != Real::Debian;
        let (program, prints, paths) = (real.program(), real.prints(), real.paths());
        subjects.push(Subject { reference, image, program, prints, paths, most_is_needed });
    }
    scene.start_seeder(true)?;
    compare_with_overlayfs(run, &mut scene, &subjects)
}

/// Where images are as containerd unpacks them.
const EXPECTED: &str = "expected";

/// An image, and what is expected of it.
struct Subject {
    reference: String,
    image: Image,
    /// What its container runs.
    program: &'static [&'static str],
    /// What that prints, in part.
    prints: &'static str,
    /// It has more paths than this.
    paths: u64,
    /// Whether the program reads more than half of the image.
    most_is_needed: bool,
}

impl Subject {
    fn small(reference: String, image: Image) -> Self {
        let (program, prints) = (&["cat", "/etc/replaced"], "after");
        Self { reference, image, program, prints, paths: small::MANY_FILES as u64, most_is_needed: false }
    }

    /// A folder of its own below `place`: containerd remembers where it mounted what.
    fn folder(&self, run: &Run, place: &str) -> PathBuf {
        run.folder().join(place).join(self.reference.rsplit('/').next().unwrap_or_default())
    }

    fn run(&self, scene: &Scene, node: &Node, id: &str) -> Result<String> {
        let printed = node.containerd().output_of(&scene.network, "drover", &self.reference, id, self.program)?;
        ensure!(printed.contains(self.prints), "{} printed {printed:?}", self.reference);
        Ok(printed)
    }
}

/// Pulls with Drover and with overlayfs on two nodes and compares: before anything was read, after everything was, and in a
/// container.
fn compare_with_overlayfs(run: &Run, scene: &mut Scene, subjects: &[Subject]) -> Result<()> {
    let began = SystemTime::now();
    let plain = scene.plain_node()?;
    for subject in subjects {
        plain.containerd().pull(&scene.network, "overlayfs", &subject.reference)?;
        plain.mount_image(&scene.network, "overlayfs", &subject.reference, &subject.folder(run, EXPECTED))?;
    }

    // Makes the layers known, so that the next node is lazy from the first moment.
    let first = scene.drover_node(NO_FILL)?;
    for subject in subjects {
        first.containerd().pull(&scene.network, "drover", &subject.reference)?;
    }
    drop(first);

    let node = scene.drover_node(NO_FILL)?;
    let counter = scene.network.counter(node.place(), Link::Switch).context("the network has no counter")?;
    let begin = counter.read()?;
    let mut printed = Vec::new();
    for subject in subjects {
        let output = start_lazily(scene, &node, subject, counter);
        let status = node.snapshotter()?.status()?;
        ensure!(bytes_fetched(&status) <= counter.read()? - begin, "the status counts more bytes than the network");
        printed.push(output.with_context(|| subject.reference.clone())?);
    }
    // The walk reads every byte, so that everything comes as it is read.
    for subject in subjects {
        same(run, scene, &node, subject, began, "lazily")?;
    }
    drop(node);

    let filled = scene.drover_node("")?;
    for subject in subjects {
        filled.containerd().pull(&scene.network, "drover", &subject.reference)?;
    }
    wait_until_complete(&filled)?;
    for (subject, lazily) in subjects.iter().zip(printed) {
        same(run, scene, &filled, subject, began, "when complete")?;
        let complete = subject.run(scene, &filled, "c2")?;
        ensure!(complete == lazily, "the complete image prints {complete:?}, the lazy one {lazily:?}");
    }
    Ok(())
}

/// Pulls an image that is known, runs its program, and gives what that printed.
fn start_lazily(scene: &Scene, node: &Node, subject: &Subject, counter: Counter) -> Result<String> {
    let before = counter.read()?;
    node.containerd().pull(&scene.network, "drover", &subject.reference)?;
    let pulled = counter.read()? - before;
    let compressed = subject.image.compressed_size();
    ensure!(pulled < compressed / 10, "the pull alone brought {pulled} bytes of an image of {compressed}");
    let printed = subject.run(scene, node, "c1")?;
    let used = counter.read()? - before;
    let status = node.snapshotter()?.status()?;
    ensure!(ordinary_layers(&status).is_empty(), "not lazy:\n{}", node.snapshotter()?.status_text()?);
    if !subject.most_is_needed {
        ensure!(used < compressed / 2, "the container brought {used} bytes of an image of {compressed}");
        ensure!(!all_complete(&status), "an image that is complete cannot show that it is lazy");
    }
    Ok(printed)
}

fn same(run: &Run, scene: &Scene, node: &Node, subject: &Subject, began: SystemTime, when: &str) -> Result<()> {
    let mounted = subject.folder(run, "mounted");
    let reference = &subject.reference;
    node.mount_image(&scene.network, "drover", reference, &mounted)?;
    let result = compare_unpacked(&subject.folder(run, EXPECTED), &mounted, began)?;
    ensure!(result.differences.is_empty(), "{reference} {when}: {:#?}", result.differences);
    ensure!(result.paths >= subject.paths, "{reference}: only {} paths were compared", result.paths);
    println!("{reference} {when}: {} paths and {} bytes are equal", result.paths, result.bytes);
    node.unmount_image(&scene.network, "drover", &mounted)
}
