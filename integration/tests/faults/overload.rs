//! More at once than a node was made for: many containers of many images, thousands of open files, a walk through every layer. All
//! of it is right in the end, and whoever needs nothing of it is not kept waiting.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use lab::image::{Image, LayerWriter, small};
use lab::measure::wait_until_complete;
use lab::process::{footprints, run, wait_for};
use lab::sandbox::{Run, run_test};
use lab::scene::{Node, Scene};
use lab::tools::Tools;
use proto::containerd::services::snapshots::v1 as wire;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use tonic::transport::{Channel, Endpoint};

use crate::source_gone::are_proven;
use crate::{Files, process_of, push, times};

/// Containers that are started at once, and of how many images. In CI.
const CONTAINERS: u64 = 40;
const IMAGES: u64 = 8;

/// The same where everything is done more often.
const CONTAINERS_MAX: u64 = 500;
const IMAGES_MAX: u64 = 50;

/// Open files in one container.
const OPEN: Files = Files { folder: "/srv/many", seed: 1 << 40, count: 10_000, size: 2000 };

/// Of an image that is complete before all begins.
const COMPLETE: Files = Files { folder: "/srv/complete", seed: 1 << 41, count: 10, size: 100 << 10 };

/// Most memory of the daemon, resident. Without anything to do a development build has about 45 MiB; under way are at most 16 MiB from
/// the seeder and as much from the registry, 12 MiB from neighbours (`swarm/src/config.rs`); the rest is for threads, replies and what
/// the allocator keeps. It does not depend on the number of containers.
const MEMORY: u64 = 128 << 20;

/// Nothing comes but what is read. The lab writes `[cache]` right before.
const LAZY: &str = "[fill]\nenabled = false\n";

/// For what must happen at all, on a machine with very much to do.
const PATIENCE: Duration = Duration::from_secs(300);

const OPEN_REPOSITORY: &str = "test/open";

#[test]
fn more_at_once_than_a_node_was_made_for_is_slow_and_right() {
    run_test("overload::more_at_once_than_a_node_was_made_for_is_slow_and_right", |run| {
        let (containers, images) = (times(CONTAINERS).min(CONTAINERS_MAX), times(IMAGES).min(IMAGES_MAX));
        let stage = Stage::set(run, images)?;
        let daemon = stage.node.snapshotter()?.pair(|_| true)?.daemon.context("no daemon")?;
        let probe = Probe::new(&stage.node, &stage.complete)?;
        let unloaded = probe.measure(|number| number >= 200)?;
        // From here on the kernel notes the most.
        fs::write(format!("/proc/{daemon}/clear_refs"), "5").context("cannot reset the peak of memory")?;
        let before = footprints(daemon).into_iter().next().context("no daemon")?;

        let clock = Instant::now();
        stage.open_files()?;
        println!("{} open files after {:?}", OPEN.count, clock.elapsed());
        let is_over = AtomicBool::new(false);
        let (loaded, walks) = std::thread::scope(|scope| {
            let probing = scope.spawn(|| probe.measure(|_| is_over.load(Ordering::Relaxed)));
            let walking = scope.spawn(|| stage.walk(&is_over));
            let watching = scope.spawn(|| most_threads(daemon, &is_over));
            let ran = stage.run_containers(containers);
            is_over.store(true, Ordering::Relaxed);
            let threads = watching.join().map_err(|_| anyhow!("who counts threads panicked"))?;
            println!(
                "{containers} containers of {images} images ran within {:?}; at most {threads} threads",
                clock.elapsed()
            );
            let loaded = probing.join().map_err(|_| anyhow!("who probes panicked"))?;
            let walks = walking.join().map_err(|_| anyhow!("who walks panicked"))?;
            ran?;
            anyhow::Ok((loaded?, walks?))
        })?;
        println!("{walks} walks through all layers");
        stage.close_files()?;

        let after = footprints(daemon).into_iter().next().context("no daemon")?;
        println!(
            "the daemon had {} bytes resident before, {} at most and {} in the end; {} threads",
            before.resident, after.peak, after.resident, after.threads
        );
        ensure!(after.peak <= MEMORY, "the daemon had {} bytes resident", after.peak);
        println!("a complete image, nothing else going on: {unloaded}");
        println!("a complete image, meanwhile: {loaded}");
        let is_same = stage.node.snapshotter()?.pair(|_| true)?.daemon == Some(daemon);
        ensure!(is_same, "the daemon died:\n{}", stage.log());
        Ok(())
    });
}

struct Stage {
    scene: Scene,
    node: Node,
    /// References, by number.
    references: Vec<String>,
    complete: Image,
}

impl Stage {
    /// A node on which one image is complete, and all others are there without their bytes.
    fn set(run: &Run, images: u64) -> Result<Self> {
        let tools = Tools::prepare(&|_| {})?;
        let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
        let folder = run.folder().join("images");
        let complete = image(&folder, &scene.tools.busybox, &COMPLETE)?;
        let complete_reference = push(&scene, &complete, "test/complete")?;
        let mut references = Vec::new();
        for number in 0..images {
            let image = image(&folder, &scene.tools.busybox, &own(number))?;
            references.push(push(&scene, &image, &format!("test/image-{number}"))?);
        }
        let open = push(&scene, &image(&folder, &scene.tools.busybox, &OPEN)?, OPEN_REPOSITORY)?;
        scene.start_seeder(true)?;
        let mut node = scene.drover_node("")?;
        node.containerd().pull(&scene.network, "drover", &complete_reference)?;
        wait_until_complete(&node)?;
        wait_for("the layers are proven on disk", PATIENCE, || are_proven(&node).unwrap_or(false))?;
        let config = node.snapshotter()?.config().to_owned();
        let text = fs::read_to_string(&config)?;
        fs::write(&config, format!("{text}{LAZY}"))?;
        node.reboot(&scene.network, |_| Ok(()))?;
        for reference in references.iter().chain([&open]) {
            node.containerd().pull(&scene.network, "drover", reference)?;
        }
        Ok(Self { scene, node, references, complete })
    }

    /// Runs containers that read all that their images have for themselves, and compares what they print.
    fn run_containers(&self, number: u64) -> Result<()> {
        let mut children = Vec::new();
        for number in 0..number {
            let image = number % self.references.len() as u64;
            let program = ["sh", "-c", &own(image).reading()];
            let (id, reference) = (format!("c-{number}"), &self.references[image as usize]);
            let mut command = self.node.containerd().container(&self.scene.network, "drover", reference, &id, &program);
            children.push((image, command.spawn().context("cannot start ctr")?));
        }
        let ended = wait_for("all containers end", PATIENCE, || {
            children.iter_mut().all(|(_, child)| !matches!(child.try_wait(), Ok(None)))
        });
        let mut wrong = Vec::new();
        for (image, mut child) in children {
            if ended.is_err() {
                child.kill()?;
            }
            let output = child.wait_with_output()?;
            if !output.status.success() || String::from_utf8_lossy(&output.stdout) != own(image).line() {
                wrong.push(format!("image {image}: {output:?}"));
            }
        }
        ensure!(wrong.is_empty(), "{} of {number} containers: {wrong:#?}\n{}", wrong.len(), self.log());
        ended
    }

    /// Starts a container that reads all files of a lazy layer and keeps them open; returns when it has them.
    fn open_files(&self) -> Result<()> {
        let group = format!("{}/open", self.node.containerd().control_group());
        let script = format!("exec busybox tail -q -n +1 -f $(find {} -type f | sort) > /tmp/seen", OPEN.folder);
        let mut command = self.ctr(&["run", "--detach", "--net-host", "--cgroup", &group, "--snapshotter", "drover"]);
        command.args([
            "--rlimit-nofile",
            "20000:20000",
            &self.reference(OPEN_REPOSITORY)?,
            "open",
            "sh",
            "-c",
            &script,
        ]);
        run(&mut command)?;
        let open = || {
            let files = process_of(&self.scene, &self.node, "open").map(|pid| fs::read_dir(format!("/proc/{pid}/fd")));
            files.and_then(Result::ok).map_or(0, Iterator::count)
        };
        wait_for("all files are open", PATIENCE, || open() as u64 >= OPEN.count)
            .with_context(|| format!("{} are open\n{}", open(), self.log()))
    }

    /// All that was read of the open files was right.
    fn close_files(&self) -> Result<()> {
        let sum = ["task", "exec", "--exec-id", "sum", "open", "sh", "-c", "cat /tmp/seen | sha256sum"];
        let mut seen = String::new();
        wait_for("all open files were read", PATIENCE, || {
            seen = run(&mut self.ctr(&sum)).unwrap_or_default();
            seen == OPEN.line()
        })
        .with_context(|| format!("{seen}\n{}", self.log()))?;
        run(&mut self.ctr(&["task", "rm", "--force", "open"]))?;
        run(&mut self.ctr(&["container", "rm", "open"]))?;
        Ok(())
    }

    /// Looks at every file of every layer, again and again, at least once; gives how often.
    fn walk(&self, is_over: &AtomicBool) -> Result<u64> {
        let mounts = self.node.snapshotter()?.root().join("m");
        let mut walks = 0;
        while walks == 0 || !is_over.load(Ordering::Relaxed) {
            let seen = run(Command::new("find").arg(&mounts).arg("-ls"))?;
            ensure!(seen.lines().count() as u64 > OPEN.count, "a walk saw {} files", seen.lines().count());
            walks += 1;
        }
        Ok(walks)
    }

    fn reference(&self, repository: &str) -> Result<String> {
        let registry = self.scene.registry.as_ref().context("a private scene has a registry")?;
        Ok(format!("{}/{repository}:1", registry.host()))
    }

    fn ctr(&self, arguments: &[&str]) -> Command {
        self.node.containerd().ctr(&self.scene.network, arguments)
    }

    fn log(&self) -> String {
        self.node.snapshotter().map(|snapshotter| snapshotter.daemon().log_tail()).unwrap_or_default()
    }
}

/// Makes a container's snapshots of a complete image, without any container: what a client of such an image waits for.
struct Probe {
    runtime: tokio::runtime::Runtime,
    snapshots: SnapshotsClient<Channel>,
    /// The snapshotter's name of the image.
    parent: String,
}

impl Probe {
    fn new(node: &Node, image: &Image) -> Result<Self> {
        let address = format!("unix:{}", node.snapshotter()?.socket().display());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let chain = image.chain_id()?;
        let (snapshots, parent) = runtime.block_on(async {
            let mut snapshots = SnapshotsClient::new(Endpoint::from_shared(address)?.connect().await?);
            let request = wire::ListSnapshotsRequest { snapshotter: "drover".to_owned(), ..Default::default() };
            let mut pages = snapshots.list(request).await?.into_inner();
            let mut parent = None;
            while let Some(page) = pages.message().await? {
                parent = parent.or(page.info.into_iter().find(|info| info.name.ends_with(&chain)));
            }
            anyhow::Ok((snapshots, parent.context("the complete image is not there")?.name))
        })?;
        Ok(Self { runtime, snapshots, parent })
    }

    /// Goes on until `is_over` says so of the number of snapshots that were made.
    fn measure(&self, is_over: impl Fn(usize) -> bool) -> Result<Answers> {
        let (mut prepares, mut mounts) = (Vec::new(), Vec::new());
        while prepares.is_empty() || !is_over(prepares.len()) {
            let key = format!("probe/{}", prepares.len());
            let (prepared, mounted) = self.runtime.block_on(self.once(key))?;
            prepares.push(prepared);
            mounts.extend(mounted);
        }
        Ok(Answers { prepares, mounts })
    }

    async fn once(&self, key: String) -> Result<(Duration, Option<Duration>)> {
        let (snapshotter, mut snapshots) = ("drover".to_owned(), self.snapshots.clone());
        let clock = Instant::now();
        let prepare = wire::PrepareSnapshotRequest {
            snapshotter: snapshotter.clone(),
            key: key.clone(),
            parent: self.parent.clone(),
            ..Default::default()
        };
        let mounts = snapshots.prepare(prepare).await.context("Prepare")?.into_inner().mounts;
        let prepared = clock.elapsed();
        ensure!(!mounts.is_empty(), "no mounts");
        let clock = Instant::now();
        // containerd's garbage collection removes what containerd does not know, which is what this is.
        let gone = |status: &tonic::Status| status.code() == tonic::Code::NotFound;
        let mounted =
            match snapshots.mounts(wire::MountsRequest { snapshotter: snapshotter.clone(), key: key.clone() }).await {
                Ok(_) => Some(clock.elapsed()),
                Err(status) if gone(&status) => None,
                Err(status) => return Err(status).context("Mounts"),
            };
        match snapshots.remove(wire::RemoveSnapshotRequest { snapshotter, key }).await {
            Err(status) if !gone(&status) => Err(status).context("Remove"),
            _ => Ok((prepared, mounted)),
        }
    }
}

/// How long calls took.
struct Answers {
    prepares: Vec<Duration>,
    mounts: Vec<Duration>,
}

impl std::fmt::Display for Answers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}; {}", figures("Prepare took", &self.prepares), figures("Mounts took", &self.mounts))
    }
}

fn figures(what: &str, times: &[Duration]) -> String {
    let mut times = times.to_vec();
    times.sort_unstable();
    let at =
        |share: f64| times.get(((times.len().max(1) - 1) as f64 * share).round() as usize).copied().unwrap_or_default();
    format!("{what} p50 {:?}, p99 {:?}, max {:?} ({} calls)", at(0.5), at(0.99), at(1.0), times.len())
}

/// The most threads that a process had, looked at again and again.
fn most_threads(pid: u32, is_over: &AtomicBool) -> u64 {
    let mut most = 0;
    // No wait for a condition: it goes on as long as the others do.
    while !is_over.load(Ordering::Relaxed) {
        most = most.max(footprints(pid).first().map_or(0, |process| process.threads));
        std::thread::sleep(Duration::from_millis(100));
    }
    most
}

/// A root of busybox, and files in a layer of their own.
fn image(folder: &Path, busybox: &Path, files: &Files) -> Result<Image> {
    let mut layer = LayerWriter::create(folder, "files")?;
    files.append(&mut layer)?;
    Image::assemble(folder, &[small::base(folder, busybox)?, layer.finish()?], small::PATH)
}

/// What an image has for itself: about a megabyte.
const fn own(image: u64) -> Files {
    Files { folder: "/srv/own", seed: image, count: 40, size: 50 << 10 }
}
