//! The daemon is killed while everything reads a layer that does not fit the cache: nobody sees more of it than a pause.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, ensure};
use lab::image::small::{self, Amount};
use lab::image::{Image, noise};
use lab::process::run;
use lab::reader::Reader;
use lab::sandbox::run_test;
use lab::scene::{Node, Scene};
use lab::tools::Tools;
use rustix::fs::{Advice, fadvise};

use crate::{Chance, kill_9, push, times};

/// Kills in CI.
const KILLS: u64 = 30;

/// Bytes of the large file.
const SIZE: usize = 24 << 20;

/// Less than the layers have: what was read is evicted and fetched again, to the end. The lab writes `[cache]` right before.
const LAZY: &str = "size = \"20MiB\"\n[fill]\nenabled = false\n";

/// Files of the image besides the large one; read one after the other, they are its many small ones.
const FILES: &str = "find /bin /etc /srv | wc -l; find /srv -type f ! -name noise | sort | xargs cat | sha256sum; cat /srv/noise | sha256sum";

/// How long after a daemon serves it may be killed, in milliseconds.
const LIFE: u64 = 600;

#[test]
fn nobody_sees_more_of_a_killed_daemon_than_a_pause() {
    run_test("kills::nobody_sees_more_of_a_killed_daemon_than_a_pause", |run_of| {
        let mut chance = Chance::new();
        let tools = Tools::prepare(&|_| {})?;
        let image = image(&run_of.folder().join("image"), &tools)?;
        let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
        let reference = push(&scene, &image, "test/killed")?;
        let script = ["sh", "-c", FILES];
        let expected = {
            let plain = scene.plain_node()?;
            plain.containerd().pull(&scene.network, "overlayfs", &reference)?;
            plain.containerd().output_of(&scene.network, "overlayfs", &reference, "c1", &script)?
        };
        scene.start_seeder(true)?;
        scene.ingest(&reference)?;
        let node = scene.drover_node(LAZY)?;
        node.containerd().pull(&scene.network, "drover", &reference)?;
        let tree = run_of.folder().join("tree");
        node.mount_image(&scene.network, "drover", &reference, &tree)?;

        let forgetter = Forgetter::start(&node, &tree)?;
        let file = tree.join(&noise::FILE[1..]);
        let span = format!("--span={SIZE}");
        let forever = ["--count=0", "--forget", &span];
        let readers = [
            Reader::start(&file, SIZE as u64, &[&forever[..], &["--threads=2", "--first=7"]].concat()),
            Reader::start(&file, SIZE as u64, &[&forever[..], &["--sequential", "--length=131072"]].concat()),
        ];
        let container = Looping::start(&scene, &node, &reference, expected)?;

        let mut pauses = Vec::new();
        for _ in 0..times(KILLS) {
            let pair = node.snapshotter()?.pair(|_| true)?;
            // Also the first moments of its life, when it finds out what is there.
            std::thread::sleep(Duration::from_millis(chance.below(LIFE)));
            let (killed, clock) = (since_1970(), Instant::now());
            kill_9(pair.daemon.context("no daemon")?)?;
            node.snapshotter()?.pair(|now| now.daemon != pair.daemon)?;
            pauses.push((killed, clock.elapsed()));
        }
        forgetter.end()?;
        let rounds = container.end(&scene, &node)?;
        ensure!(rounds > 0, "the container has read nothing");
        let mut slow = Vec::new();
        let mut reads = 0;
        for reader in readers {
            let outcome = reader.finish();
            ensure!(outcome.failed.is_empty() && outcome.wrong.is_empty(), "{outcome:?}");
            reads += outcome.reads;
            slow.extend(outcome.slow);
        }
        ensure!(reads > 10 * KILLS, "only {reads} reads");
        println!(
            "{} kills: {reads} reads of files and {rounds} rounds of the container, none failed, none wrong",
            times(KILLS)
        );
        // Of a kill: the longest of the reads that were under way at that moment.
        let stalls = pauses.iter().map(|(killed, _)| {
            let under_way = slow.iter().filter(|(begun, took)| begun <= killed && begun + took >= *killed);
            Duration::from_millis(under_way.map(|(_, took)| *took).max().unwrap_or(0))
        });
        println!("{}", figures("a read that was under way took", stalls.collect()));
        println!("{}", figures("there was a daemon again after", pauses.iter().map(|(_, pause)| *pause).collect()));
        println!(
            "{}",
            figures(
                "of all reads those of 10 ms or more took",
                slow.iter().map(|(_, t)| Duration::from_millis(*t)).collect()
            )
        );
        let status = node.snapshotter()?.status()?;
        let fetched = lab::drover::bytes_fetched(&status);
        println!("the last daemon fetched {fetched} bytes");
        node.unmount_image(&scene.network, "drover", &tree)
    });
}

/// A root of busybox, small files, and a large file with a pattern.
fn image(folder: &Path, tools: &Tools) -> Result<Image> {
    let many = small::build_amount(&folder.join("many"), &tools.busybox, Amount { large_file: 0, ..Amount::LITTLE })?;
    let large = noise::build(folder, &tools.busybox, SIZE)?;
    let whole = folder.join("whole");
    let mut layers = many.link_layers(&whole)?;
    // Both stand on the same root.
    layers.extend(large.link_layers_above(&whole, 1)?);
    Image::assemble(&whole, &layers, "/bin")
}

/// A container that reads all of its image again and again.
struct Looping {
    child: Child,
    rounds: Receiver<String>,
    expected: String,
}

impl Looping {
    /// Returns when it has begun to read.
    fn start(scene: &Scene, node: &Node, reference: &str, expected: String) -> Result<Self> {
        let script = format!("echo begun; while [ ! -e /stop ]; do {FILES}; echo round; done");
        let program = ["sh", "-c", &script];
        let mut command = node.containerd().container(&scene.network, "drover", reference, "loop", &program);
        let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start ctr")?;
        let lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let (sender, rounds) = channel();
        std::thread::spawn(move || {
            let mut round = String::new();
            for line in lines.map_while(Result::ok) {
                match line.as_str() {
                    "round" | "begun" => drop(sender.send(std::mem::take(&mut round))),
                    line => round = format!("{round}{line}\n"),
                }
            }
        });
        let begun = rounds.recv_timeout(Duration::from_secs(60));
        begun.map_err(|_| anyhow!("the container does not begin:\n{}", node.containerd().daemon().log_tail()))?;
        Ok(Self { child, rounds, expected })
    }

    /// Waits for the end of its round; gives how many there were, all of them right.
    fn end(self, scene: &Scene, node: &Node) -> Result<usize> {
        let touch = ["task", "exec", "--exec-id", "stop", "loop", "touch", "/stop"];
        run(&mut node.containerd().ctr(&scene.network, &touch))?;
        let output = self.child.wait_with_output()?;
        let rounds: Vec<_> = self.rounds.iter().collect();
        ensure!(output.status.success(), "the container failed: {}", String::from_utf8_lossy(&output.stderr));
        let wrong = rounds.iter().find(|round| **round != self.expected);
        ensure!(wrong.is_none(), "the container read {wrong:?} instead of {:?}", self.expected);
        Ok(rounds.len())
    }
}

/// Makes the kernel forget what it has read of an image, so that the daemon is asked again: files of the image as of the devices.
struct Forgetter {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Forgetter {
    fn start(node: &Node, tree: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for folder in [node.snapshotter()?.root().join("devices"), tree.join("srv"), tree.join("bin")] {
            for path in files_below(&folder)? {
                files.push(File::open(&path).with_context(|| format!("cannot open {}", path.display()))?);
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                files.iter().try_for_each(|file| fadvise(file, 0, None, Advice::DontNeed))?;
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        Ok(Self { stop, thread: Some(thread) })
    }

    fn end(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it ended before")?;
        thread.join().map_err(|_| anyhow!("who forgets panicked"))?
    }
}

impl Drop for Forgetter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            found.extend(files_below(&entry.path())?);
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn figures(what: &str, mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |share: f64| {
        let index = (times.len().max(1) - 1) as f64 * share;
        times.get(index.round() as usize).map_or(0, Duration::as_millis)
    };
    format!("{what}: p50 {} ms, p99 {} ms, max {} ms ({} of them)", at(0.5), at(0.99), at(1.0), times.len())
}

fn since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
