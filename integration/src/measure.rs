//! One timed container start.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::drover::{all_complete, bytes_fetched};
use crate::network::{Counter, Link, Place};
use crate::process::{Usage, run};
use crate::rivals::Rival;
use crate::scene::{Node, Scene, drop_caches};

/// How a start is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// containerd's own overlayfs snapshotter: everything is fetched and unpacked first.
    Overlayfs,
    /// Drover, with a seeder that never saw the image.
    DroverNew,
    /// Drover, with a seeder that has the image.
    DroverKnown,
    /// Another lazy snapshotter, with the image that it needs.
    Rival(Rival),
}

impl Way {
    /// Those of an image as it is, in the order in which they are shown.
    pub const ALL: [Self; 3] = [Self::Overlayfs, Self::DroverNew, Self::DroverKnown];

    /// Name in tables.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs, full pull",
            Self::DroverNew => "Drover, seeder new to the image",
            Self::DroverKnown => "Drover, seeder knows the image",
            Self::Rival(rival) => rival.label(),
        }
    }

    /// containerd's name of the snapshotter.
    pub const fn snapshotter(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::DroverNew | Self::DroverKnown => "drover",
            Self::Rival(rival) => rival.name(),
        }
    }
}

/// What one start took. Byte counts are `None` where the network has no counters.
#[derive(Clone, Debug, Default)]
pub struct Start {
    /// From the start of the pull until the pull ended.
    pub pull: Duration,
    /// From the start of the pull to the first line of the container's own output.
    pub first_line: Duration,
    /// From the start of the pull until the container ended.
    pub ended: Duration,
    /// From the start of the pull until the whole image was here, where that was waited for.
    pub complete: Option<Duration>,
    /// Bytes that had entered the node when the first line came.
    pub node_bytes_first: Option<u64>,
    /// Bytes that had entered the node when nothing more was fetched.
    pub node_bytes_end: Option<u64>,
    /// Bytes that the seeder had fetched from the registry by then.
    pub seeder_bytes: Option<u64>,
    /// The first line.
    pub line: String,
    /// What the node's daemon had used when the first line came: the snapshotter, or containerd for overlayfs.
    pub node_usage_first: Usage,
    /// The same when nothing more was fetched.
    pub node_usage: Usage,
    /// What the seeder used.
    pub seeder_usage: Usage,
    /// Processor time that the whole machine took until the first line came, without that of the seeder.
    pub machine_cpu_first: Duration,
}

/// An image and what to run in it.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Image reference.
    pub reference: String,
    /// Program and arguments.
    pub program: Vec<String>,
}

/// How long the first line may take before the start counts as failed.
const FIRST_LINE_DEADLINE: Duration = Duration::from_secs(900);

/// How long background fetching may take after the container ended.
const FILL_DEADLINE: Duration = Duration::from_secs(900);

/// How long a container may run after its first line before it is killed.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// Most lines of a container that are kept.
const LINES_MAX: usize = 1000;

const CONTAINER: &str = "subject";

/// Puts the seeder's state right and gives a new node, for one [`start`]. For [`Way::DroverKnown`] the seeder must have ingested
/// the image in an earlier start of this scene. `extra` is added to the snapshotter's configuration.
pub fn node(scene: &mut Scene, way: Way, extra: &str) -> Result<Node> {
    match way {
        Way::Overlayfs | Way::Rival(_) => scene.stop_seeder(),
        Way::DroverNew => scene.start_seeder(true)?,
        Way::DroverKnown => scene.start_seeder(false)?,
    }
    let node = match way {
        Way::Overlayfs => scene.plain_node()?,
        Way::DroverNew | Way::DroverKnown => scene.drover_node(extra)?,
        Way::Rival(rival) => scene.rival_node(rival)?,
    };
    drop_caches();
    Ok(node)
}

/// Starts the subject's container once on a node that has nothing of it, and measures it. With `to_the_end`, waits until the
/// node has everything.
pub fn start(
    scene: &Scene,
    node: &Node,
    way: Way,
    subject: &Subject,
    to_the_end: bool,
    say: &dyn Fn(&str),
) -> Result<Start> {
    let node_before = entered(scene, node)?;
    let seeder_before = ingested(scene)?;
    let since = |now: Option<u64>, before: Option<u64>| now.zip(before).map(|(now, before)| now.saturating_sub(before));

    let seeder_cpu = || scene.seeder.as_ref().map_or(Duration::ZERO, |seeder| seeder.daemon().usage().cpu);
    let busy_before = busy()?.saturating_sub(seeder_cpu());

    say("pulling");
    let clock = Instant::now();
    node.containerd().pull(&scene.network, way.snapshotter(), &subject.reference)?;
    let pull = clock.elapsed();
    say("starting the container");
    let program: Vec<&str> = subject.program.iter().map(String::as_str).collect();
    let mut command =
        node.containerd().container(&scene.network, way.snapshotter(), &subject.reference, CONTAINER, &program);
    let mut child = command.spawn().context("cannot start ctr")?;
    let (stdout, stderr) = child.stdout.take().zip(child.stderr.take()).context("ctr has no output")?;
    let (sender, lines) = channel();
    let readers = [forward(stdout, sender.clone()), forward(stderr, sender)];
    let first = lines.recv_timeout(FIRST_LINE_DEADLINE);
    let node_bytes_first = since(entered(scene, node)?, node_before);
    let node_usage_first = node.daemon().usage();
    let machine_cpu_first = busy()?.saturating_sub(seeder_cpu()).saturating_sub(busy_before);
    let Ok((line, at)) = first else {
        let _ = child.kill();
        let _ = child.wait();
        bail!("the container printed nothing");
    };
    let first_line = at.duration_since(clock);
    // A service runs on: it has shown what was to be measured.
    let limit = Instant::now() + END_DEADLINE;
    let mut killed = false;
    let status = loop {
        if let Some(status) = child.try_wait().context("cannot wait for ctr")? {
            break status;
        }
        if !killed && Instant::now() > limit {
            // It may just have ended by itself; whether ctr ends is what counts.
            let _ =
                run(&mut node.containerd().ctr(&scene.network, &["task", "kill", "--signal", "SIGKILL", CONTAINER]));
            killed = true;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let ended = clock.elapsed();
    readers.into_iter().for_each(|reader| drop(reader.join()));
    if !status.success() && !killed {
        let rest: Vec<_> = lines.try_iter().map(|(line, _)| line).collect();
        bail!("the container failed ({status}): {line}\n{}", rest.join("\n"));
    }
    let complete = match way {
        Way::DroverNew | Way::DroverKnown if to_the_end => {
            say("waiting until everything is here");
            wait_until_complete(node)?;
            Some(clock.elapsed())
        }
        Way::Overlayfs => Some(pull),
        Way::DroverNew | Way::DroverKnown | Way::Rival(_) => None,
    };
    Ok(Start {
        pull,
        first_line,
        ended,
        complete,
        node_bytes_first,
        node_bytes_end: since(entered(scene, node)?, node_before),
        seeder_bytes: since(ingested(scene)?, seeder_before),
        line,
        node_usage_first,
        node_usage: node.daemon().usage(),
        seeder_usage: scene.seeder.as_ref().map(|seeder| seeder.daemon().usage()).unwrap_or_default(),
        machine_cpu_first,
    })
}

/// Processor time that this machine has taken since it was started.
fn busy() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let line = text.lines().next().and_then(|line| line.strip_prefix("cpu ")).context("/proc/stat begins otherwise")?;
    let ticks: Vec<u64> = line.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq; what follows is in user, or not this machine's.
    let busy = ticks.iter().take(7).enumerate().filter(|(at, _)| !matches!(at, 3 | 4)).map(|(_, ticks)| ticks);
    // In hundredths of a second, whatever the kernel's own clock.
    Ok(Duration::from_millis(busy.sum::<u64>() * 10))
}

/// Pulls the subject's image once, whole, on a node that has nothing of it, and measures that: nothing is left to be fetched or
/// unpacked afterwards.
pub fn pull_whole(scene: &Scene, node: &Node, way: Way, subject: &Subject) -> Result<Start> {
    let clock = Instant::now();
    match way {
        Way::DroverNew | Way::DroverKnown => {
            run(node.snapshotter()?.pulling(&scene.network).args(["--complete", &subject.reference]))?;
        }
        Way::Overlayfs | Way::Rival(_) => {
            node.containerd().pull(&scene.network, way.snapshotter(), &subject.reference)?;
        }
    }
    let pull = clock.elapsed();
    let (first_line, complete, node_usage) = (pull, Some(pull), node.daemon().usage());
    Ok(Start { pull, first_line, complete, node_usage, ..Start::default() })
}

/// Bytes that entered the node: by the counter of its link, else as far as the daemons know, that is, what is in containerd's
/// content store and what Drover fetched.
fn entered(scene: &Scene, node: &Node) -> Result<Option<u64>> {
    if let Some(counter) = scene.network.counter(node.place(), Link::Switch) {
        return counter.read().map(Some);
    }
    let content = node.containerd().content_bytes();
    let fetched = node.snapshotter().ok().map(|snapshotter| snapshotter.status()).transpose()?;
    Ok(Some(content + fetched.map_or(0, |status| bytes_fetched(&status))))
}

/// Bytes that came from the registry to the seeder, where its link has a counter.
fn ingested(scene: &Scene) -> Result<Option<u64>> {
    scene.network.counter(Place::Seeder, Link::Direct).map(Counter::read).transpose()
}

/// Sends the lines of one output, with the time at which each came.
fn forward(output: impl Read + Send + 'static, sender: Sender<(String, Instant)>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(Result::ok).take(LINES_MAX);
        // ctr logs to its standard error, where a container's lines come too.
        for line in lines.filter(|line| !line.starts_with("time=\"")) {
            let _ = sender.send((line, Instant::now()));
        }
    })
}

/// Waits until the node's snapshotter says that all its layers are complete.
pub fn wait_until_complete(node: &Node) -> Result<()> {
    let deadline = Instant::now() + FILL_DEADLINE;
    loop {
        let status = node.snapshotter()?.status()?;
        if all_complete(&status) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the image was not complete within {FILL_DEADLINE:?}:\n{}", node.snapshotter()?.status_text()?);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
