//! Images come, are used and go, again and again: what daemon, keeper and seeder hold for them, they give back.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::client::wait_until_empty;
use lab::image::layer::Attributes;
use lab::image::{Image, Layer, LayerWriter, small};
use lab::process::{footprints, run, wait_for};
use lab::sandbox::{Run, run_test};
use lab::scene::{Node, Scene};
use lab::tools::Tools;

use crate::{Chance, Files, push, times};

/// Cycles in CI, after those in which everything is done for the first time: pools of threads and memory grow to their size, and the
/// seeder's disk becomes full.
const CYCLES: u64 = 12;
const WARM_UP: u64 = 4;

/// Of a layer that all images share.
const SHARED: Files = Files { folder: "/srv/shared", seed: u64::MAX, count: 200, size: 20 << 10 };

/// A seeder keeps what it ingested until its disk is full; with this each further image makes it give up an older one. The lab writes
/// `[cache]` right before.
const SEEDER: &str = "size = \"12MiB\"\n";
const SEEDER_BYTES: u64 = 12 << 20;

const SEEDER_NAME: &str = "seeder";

/// What a process may have open or running more, much less than there are cycles: connections and idle threads come and go.
const OPEN_MORE: usize = 4;
const THREADS_MORE: u64 = 4;

/// The records' database keeps free pages of its file. All else that the daemon has on the disk must be what it was.
const RECORDS: &str = "snapshots.redb";
const RECORDS_BYTES: u64 = 4 << 20;

/// Memory that a process may have more of in the last third of the cycles than in the first: what allocators keep. It does not grow
/// with the number of cycles, as a leak does.
const MEMORY_MORE: u64 = 4 << 20;

/// For what ends by itself: threads after 10 s without work, connections after 90 s at most.
const PATIENCE: Duration = Duration::from_secs(150);

#[test]
fn what_is_held_for_images_is_given_back_with_them() {
    run_test("soak::what_is_held_for_images_is_given_back_with_them", |run| {
        let mut chance = Chance::new();
        let stage = Stage::set(run)?;
        stage.bring(0)?;
        for number in 1..=WARM_UP {
            stage.cycle(number, &mut chance).with_context(|| format!("cycle {number}"))?;
        }
        stage.remove(WARM_UP)?;
        let begin = stage.held()?;
        print("begin", &begin);
        stage.bring(WARM_UP)?;
        let last = WARM_UP + times(CYCLES);
        let mut memory: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
        for number in WARM_UP + 1..=last {
            stage.cycle(number, &mut chance).with_context(|| format!("cycle {number}"))?;
            for (name, held) in stage.held()? {
                memory.entry(name).or_default().push(held.anonymous);
            }
        }
        stage.remove(last)?;
        // What goes by itself does so within its time.
        let (mut end, mut more) = (BTreeMap::new(), Vec::new());
        let waited = wait_for("no more is held than before", PATIENCE, || {
            let Ok(now) = stage.held() else { return false };
            more = now.iter().filter_map(|(name, held)| held.more_than(begin.get(name)?, name)).collect();
            end = now;
            more.is_empty()
        });
        print("end", &end);
        waited.with_context(|| format!("{more:#?}, at the beginning: {begin:#?}\n{}", stage.log()))?;
        for (name, samples) in &memory {
            let third = (samples.len() / 3).max(1);
            let (first, last) = (median(&samples[..third]), median(&samples[samples.len() - third..]));
            println!("{name}: own memory {first} bytes in the first third of the cycles, {last} in the last");
            ensure!(last <= first + MEMORY_MORE, "{name} grew from {first} to {last} bytes: {samples:?}");
        }
        println!("{} cycles", last - WARM_UP);
        Ok(())
    });
}

/// What a process holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Held {
    /// Open files that are no sockets, with how often each.
    open: BTreeMap<String, usize>,
    sockets: usize,
    threads: u64,
    /// Mounts below the snapshotter's root, as this process sees them.
    mounts: usize,
    /// Files and directories below its own root, with the bytes that they take.
    files: BTreeMap<PathBuf, u64>,
    resident: u64,
    /// Of it what is no page of a file: that ever more of a program was executed once is no leak.
    anonymous: u64,
}

impl Held {
    fn of(pid: u32, root: &Path, own_root: Option<&Path>) -> Result<Self> {
        let process = footprints(pid).into_iter().next().context("no such process")?;
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
        let below = format!("{}/", root.display());
        let mut held = Self {
            threads: process.threads,
            mounts: mounts.lines().filter(|line| line.contains(&below)).count(),
            resident: process.resident,
            anonymous: process.anonymous,
            ..Self::default()
        };
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            // What is closed meanwhile is not held.
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let is_kept = own_root.is_some_and(|root| target.starts_with(root)) && target.exists();
            match target.display().to_string() {
                target if target.starts_with("socket:") => held.sockets += 1,
                // The seeder has the wire forms open of all layers that it keeps; of those that are gone it must not.
                _ if is_kept => {}
                target => *held.open.entry(target).or_default() += 1,
            }
        }
        if let Some(own_root) = own_root {
            let device = fs::metadata(own_root)?.dev();
            files_below(own_root, Path::new(""), device, &mut held.files)?;
        }
        Ok(held)
    }

    fn bytes(&self) -> u64 {
        self.files.values().sum()
    }

    /// What it holds more than `before`, if anything.
    fn more_than(&self, before: &Self, name: &str) -> Option<String> {
        if self.open() > before.open() + OPEN_MORE || self.sockets > before.sockets + OPEN_MORE {
            return Some(format!("{name} has {:?} open, and {} sockets", self.open, self.sockets));
        }
        if self.threads > before.threads + THREADS_MORE || self.mounts != before.mounts {
            return Some(format!("{name} has {} threads and {} mounts", self.threads, self.mounts));
        }
        if name == SEEDER_NAME {
            // Which layers it keeps depends on when each was used last.
            let stray = self.stray();
            let is_more = self.bytes() > SEEDER_BYTES || !stray.is_empty();
            return is_more.then(|| format!("{name} has {} bytes on its disk, {stray:?} of no layer", self.bytes()));
        }
        let is_new = |(path, bytes): &(&PathBuf, &u64)| {
            let bound = if path.ends_with(RECORDS) { Some(&RECORDS_BYTES) } else { before.files.get(*path) };
            bound.is_none_or(|bound| *bytes > bound)
        };
        let new: Vec<_> = self.files.iter().filter(is_new).collect();
        (!new.is_empty()).then(|| format!("{name} has more on its disk: {new:?}"))
    }

    /// What a seeder's store has of layers that are not known there (docs/store.md).
    fn stray(&self) -> Vec<&PathBuf> {
        let is_stray = |path: &&PathBuf| {
            let mut parts = path.iter();
            let (Some(folder), Some(blob)) = (parts.next(), parts.next()) else { return false };
            folder != "indexes" && !self.files.contains_key(&Path::new("indexes").join(blob))
        };
        self.files.keys().filter(is_stray).collect()
    }

    fn open(&self) -> usize {
        self.open.values().sum()
    }
}

/// Everything below `root` on the file system `device`, with the bytes that it takes.
fn files_below(root: &Path, folder: &Path, device: u64, found: &mut BTreeMap<PathBuf, u64>) -> Result<()> {
    for entry in fs::read_dir(root.join(folder))?.flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        let path = folder.join(entry.file_name());
        if metadata.dev() != device {
            continue;
        }
        if metadata.is_dir() {
            files_below(root, &path, device, found)?;
        }
        found.insert(path, metadata.blocks() * 512);
    }
    Ok(())
}

fn print(when: &str, held: &BTreeMap<&str, Held>) {
    for (name, held) in held {
        println!(
            "{when}: {name}: {} open files and {} sockets, {} threads, {} mounts, {} files with {} bytes on the disk, {} bytes \
             resident, {} of them its own",
            held.open(),
            held.sockets,
            held.threads,
            held.mounts,
            held.files.len(),
            held.bytes(),
            held.resident,
            held.anonymous
        );
    }
}

fn median(samples: &[u64]) -> u64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

struct Stage {
    scene: Scene,
    node: Node,
    folder: PathBuf,
    /// The layers that all images stand on.
    shared: Vec<Layer>,
}

impl Stage {
    fn set(run: &Run) -> Result<Self> {
        let tools = Tools::prepare(&|_| {})?;
        let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
        scene.seeder_config = SEEDER.to_owned();
        scene.start_seeder(true)?;
        let node = scene.drover_node("")?;
        let folder = run.folder().join("images");
        let mut layer = LayerWriter::create(&folder, "shared")?;
        layer.directory("srv", Attributes::root(0o755))?;
        SHARED.append(&mut layer)?;
        let shared = vec![small::base(&folder, &scene.tools.busybox)?, layer.finish()?];
        Ok(Self { scene, node, folder, shared })
    }

    /// The image of the cycle before is there. This one's comes, and another one on top of it; they are used, built on, and left by
    /// clients that die. In the end only this cycle's image is there.
    fn cycle(&self, number: u64, chance: &mut Chance) -> Result<()> {
        if chance.below(2) == 0 {
            self.abandon(number, Duration::from_millis(chance.below(300)))?;
        }
        let image = self.bring(number)?;
        let above = self.above(number)?;
        let above = push(&self.scene, &above, &format!("test/above-{number}"))?;
        self.pull(&above)?;
        self.use_and_look_in(number)?;
        let program = ["sh", "-c", &format!("cat /version; {}", own(number).reading())];
        let printed = self.node.containerd().output_of(&self.scene.network, "drover", &above, "above", &program)?;
        ensure!(printed == format!("{number}\n{}", own(number).line()), "the container above printed {printed:?}");
        if chance.below(2) == 0 {
            self.build_step(&image)?;
        }
        let mut old = [above, self.reference(number - 1)?];
        if chance.below(2) == 0 {
            old.reverse();
        }
        for old in old {
            run(&mut self.ctr(&["image", "rm", "--sync", &old]))?;
        }
        // Whatever only those had goes.
        let layers = self.node.snapshotter()?.root().join("layers");
        let number = || fs::read_dir(&layers).map_or(usize::MAX, Iterator::count);
        wait_for("only the layers of one image are left", PATIENCE, || number() <= image.layers.len())
            .with_context(|| format!("{} layers\n{}", number(), self.log()))
    }

    fn image(&self, number: u64) -> Result<Image> {
        Image::assemble(&self.folder, &self.layers(number)?, small::PATH)
    }

    /// The image with one more layer.
    fn above(&self, number: u64) -> Result<Image> {
        let mut layers = self.layers(number)?;
        let mut layer = LayerWriter::create(&self.folder, "above")?;
        layer.file("version", Attributes::root(0o644), format!("{number}\n").as_bytes())?;
        layers.push(layer.finish()?);
        Image::assemble(&self.folder, &layers, small::PATH)
    }

    fn layers(&self, number: u64) -> Result<Vec<Layer>> {
        let mut layer = LayerWriter::create(&self.folder, "own")?;
        own(number).append(&mut layer)?;
        Ok([&self.shared[..], &[layer.finish()?]].concat())
    }

    /// Pushes and pulls an image.
    fn bring(&self, number: u64) -> Result<Image> {
        let image = self.image(number)?;
        self.pull(&push(&self.scene, &image, &format!("test/image-{number}"))?)?;
        Ok(image)
    }

    fn pull(&self, reference: &str) -> Result<()> {
        self.node.containerd().pull(&self.scene.network, "drover", reference).with_context(|| self.log())
    }

    fn reference(&self, number: u64) -> Result<String> {
        let registry = self.scene.registry.as_ref().context("a private scene has a registry")?;
        Ok(format!("{}/test/image-{number}:1", registry.host()))
    }

    /// A client dies `after` it began to pull the image of a cycle.
    fn abandon(&self, number: u64, after: Duration) -> Result<()> {
        let reference = push(&self.scene, &self.image(number)?, &format!("test/image-{number}"))?;
        let hosts = self.node.containerd().hosts().display().to_string();
        let pull = ["image", "pull", "--snapshotter", "drover", "--hosts-dir", &hosts, &reference];
        let mut client = self.ctr(&pull).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(after);
        client.kill()?;
        client.wait()?;
        // containerd keeps what it had for a day.
        let leases = run(&mut self.ctr(&["leases", "ls", "-q"]))?;
        for lease in leases.split_whitespace() {
            // It may go by itself meanwhile.
            let _ = run(&mut self.ctr(&["leases", "rm", "--sync", lease]));
        }
        Ok(())
    }

    /// A container of a cycle's image, and a program that comes into it while it runs.
    fn use_and_look_in(&self, number: u64) -> Result<()> {
        let reference = self.reference(number)?;
        let script = format!("echo begun; while [ ! -e /stop ]; do sleep 0.05; done; {}", own(number).reading());
        let program = ["sh", "-c", &script];
        let mut command = self.node.containerd().container(&self.scene.network, "drover", &reference, "used", &program);
        let mut child = command.spawn().context("cannot start ctr")?;
        let mut output = BufReader::new(child.stdout.take().context("its output is piped")?);
        let mut printed = String::new();
        output.read_line(&mut printed)?;
        if printed != "begun\n" {
            let why = child.wait_with_output()?;
            bail!("the container of {reference} does not begin: {printed:?}, {why:?}\n{}", self.log());
        }
        let exec = format!("{}; touch /stop", SHARED.reading());
        let seen = run(&mut self.ctr(&["task", "exec", "--exec-id", "look", "used", "sh", "-c", &exec]))?;
        output.read_to_string(&mut printed)?;
        let status = child.wait()?;
        ensure!(status.success() && printed == format!("begun\n{}", own(number).line()), "{status}, {printed:?}");
        ensure!(seen == SHARED.line(), "the shared files are {seen:?}");
        Ok(())
    }

    /// A writable snapshot of an image is changed, committed, built on and removed.
    fn build_step(&self, image: &Image) -> Result<()> {
        let snapshot = |arguments: &[&str]| run(self.ctr(&["snapshot", "--snapshotter", "drover"]).args(arguments));
        let target = self.folder.join("step");
        fs::create_dir_all(&target)?;
        let text = target.to_str().context("a path is not UTF-8")?;
        for (key, parent, name) in [("key-1", image.chain_id()?.as_str(), "step-1"), ("key-2", "step-1", "step-2")] {
            let mounts = snapshot(&["prepare", "--target", text, key, parent])?;
            run(Command::new("sh").args(["-c", &mounts]))?;
            let written = fs::write(target.join(name), name);
            run(Command::new("umount").arg(&target))?;
            written?;
            snapshot(&["commit", name, key])?;
        }
        snapshot(&["rm", "step-2"])?;
        snapshot(&["rm", "step-1"])?;
        Ok(())
    }

    /// Removes the only image that is left; then there is nothing of any.
    fn remove(&self, number: u64) -> Result<()> {
        run(&mut self.ctr(&["image", "rm", "--sync", &self.reference(number)?]))?;
        let snapshots = || run(&mut self.ctr(&["snapshot", "--snapshotter", "drover", "ls"])).unwrap_or_default();
        wait_for("containerd has no snapshots", PATIENCE, || snapshots().lines().count() <= 1)
            .with_context(snapshots)?;
        wait_until_empty(&self.node, RECORDS_BYTES)
    }

    fn held(&self) -> Result<BTreeMap<&'static str, Held>> {
        let pair = self.node.snapshotter()?.pair(|_| true)?;
        let root = self.node.snapshotter()?.root();
        let store = self.scene.folder().join("seeder/store");
        let seeder = self.scene.seeder.as_ref().context("no seeder")?.daemon().pid();
        Ok(BTreeMap::from([
            ("keeper", Held::of(pair.keeper, root, None)?),
            ("daemon", Held::of(pair.daemon.context("no daemon")?, root, Some(root))?),
            (SEEDER_NAME, Held::of(seeder, root, Some(&store))?),
        ]))
    }

    fn ctr(&self, arguments: &[&str]) -> Command {
        self.node.containerd().ctr(&self.scene.network, arguments)
    }

    fn log(&self) -> String {
        self.node.snapshotter().map(|snapshotter| snapshotter.daemon().log_tail()).unwrap_or_default()
    }
}

/// What the image of a cycle has for itself: about a megabyte.
const fn own(number: u64) -> Files {
    Files { folder: "/srv/own", seed: number, count: 4, size: 400 << 10 }
}
