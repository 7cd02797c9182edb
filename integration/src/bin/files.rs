//! `make bench-files`: what a complete image costs to read, against containerd's own overlayfs on the same disk.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use lab::image::demo;
use lab::measure::wait_until_complete;
use lab::pattern;
use lab::process::run;
use lab::report::{machine, median, publish, spread};
use lab::sandbox::{self, Run};
use lab::scene::{Node, Scene, drop_caches};
use lab::tools::{Tools, workspace};

/// Times work on the files of a complete image.
#[derive(Parser)]
struct Arguments {
    /// Times that each work is done in each way
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Folder for state and the built image
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// How long a complete device may take to be compared with its diffID.
const PROVE_DEADLINE: Duration = Duration::from_secs(120);

/// Random reads of one pass.
const RANDOM_READS: u64 = 2000;

/// Passes of a warm measurement of one file, which by itself takes so little that its time says more about the machine's other
/// work.
const WARM_PASSES: usize = 50;

/// What is compiled.
const SOURCE: &str = "#include <algorithm>\n#include <iostream>\n#include <map>\n#include <string>\n#include <vector>\n\
    int main() { std::map<std::string, int> m{{\"a\", 1}}; std::vector<int> v{3, 1, 2}; std::sort(v.begin(), v.end()); \
    for (auto &[k, n] : m) std::cout << k << n << v[0] << std::endl; }\n";

/// Some work on an image's file tree.
#[derive(Clone, Copy, Debug)]
enum Work {
    Find,
    Tar,
    Import,
    Compile,
    Sequential,
    Random(usize),
}

impl Work {
    const ALL: [Self; 7] = [
        Self::Find,
        Self::Tar,
        Self::Import,
        Self::Compile,
        Self::Sequential,
        Self::Random(4 << 10),
        Self::Random(64 << 10),
    ];

    fn label(self) -> String {
        match self {
            Self::Find => "find -ls".to_owned(),
            Self::Tar => "tar c".to_owned(),
            Self::Import => "Python import".to_owned(),
            Self::Compile => "g++ of a small program".to_owned(),
            Self::Sequential => "sequential read of a large file".to_owned(),
            Self::Random(size) => format!("{RANDOM_READS} random reads of {} KiB", size >> 10),
        }
    }

    /// How often it is done in one measurement.
    fn passes(self, cold: bool) -> usize {
        match self {
            Self::Sequential | Self::Random(_) if !cold => WARM_PASSES,
            _ => 1,
        }
    }

    fn run(self, tree: &Tree) -> Result<()> {
        match self {
            Self::Find => tree.chroot(&["find", "/", "-xdev", "-ls"]),
            // Where its output is /dev/null, tar reads no file.
            Self::Tar => tree.chroot(&["sh", "-c", "tar -c -f - --one-file-system / | cat"]),
            Self::Import => tree.chroot(&demo::PROGRAM),
            Self::Compile => tree.chroot(&["g++", "-o", "/tmp/program", "/tmp/program.cc"]),
            Self::Sequential => {
                let mut buffer = vec![0; 1 << 20];
                let size = tree.large.metadata()?.len();
                for offset in (0..size).step_by(buffer.len()) {
                    let length = buffer.len().min((size - offset) as usize);
                    tree.large.read_exact_at(&mut buffer[..length], offset)?;
                }
                Ok(())
            }
            Self::Random(length) => {
                let mut buffer = vec![0; length];
                let pieces = tree.large.metadata()?.len() / length as u64;
                for at in 0..RANDOM_READS {
                    tree.large.read_exact_at(&mut buffer, pattern::word(1, at) % pieces * length as u64)?;
                }
                Ok(())
            }
        }
    }
}

/// An image, mounted.
struct Tree {
    root: PathBuf,
    large: File,
}

impl Tree {
    fn open(root: &Path) -> Result<Self> {
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(root.join("tmp")))?;
        fs::write(root.join("tmp/program.cc"), SOURCE)?;
        let found = Command::new("find").arg(root).args(["-xdev", "-type", "f", "-printf", "%s %p\\n"]).output()?;
        let found = String::from_utf8_lossy(&found.stdout).into_owned();
        let sizes = found.lines().filter_map(|line| line.split_once(' '));
        let largest = sizes.max_by_key(|(size, _)| size.parse::<u64>().unwrap_or(0)).context("the image is empty")?;
        let large = File::open(largest.1).with_context(|| format!("cannot open {}", largest.1))?;
        Ok(Self { root: root.to_owned(), large })
    }

    fn chroot(&self, command: &[&str]) -> Result<()> {
        let mut chroot = Command::new("chroot");
        chroot.arg(&self.root).args(command).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        chroot.env("PYTHONDONTWRITEBYTECODE", "1").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let output = chroot.output().context("cannot start chroot")?;
        ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let folder = arguments.folder.clone().unwrap_or_else(|| workspace().join(".drover"));
    sandbox::run_main(&folder, |run| measure(&arguments, run))
}

fn measure(arguments: &Arguments, run_of: &Run) -> Result<()> {
    ensure!(arguments.runs > 0, "nothing to measure: want at least one run");
    let clock = Instant::now();
    let say = |text: &str| eprintln!("[{:6.1} s] {text}", clock.elapsed().as_secs_f64());
    let tools = Tools::prepare(&say)?;
    let cache = run_of.folder().parent().context("the run folder has no parent")?.join("image-cache");
    let image = demo::build_with_compiler(&cache, &say)?;
    let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
    let registry = scene.registry.as_ref().context("the private registry is missing")?;
    let reference = registry.push(&scene.network, &image, "bench/files", "1")?;
    scene.start_seeder(true)?;
    let (plain, drover) = (scene.plain_node()?, scene.drover_node("")?);
    say("pulling twice");
    plain.containerd().pull(&scene.network, "overlayfs", &reference)?;
    drover.containerd().pull(&scene.network, "drover", &reference)?;
    say("waiting until everything is here");
    wait_until_complete(&drover)?;
    let (left, right) = (run_of.folder().join("overlayfs"), run_of.folder().join("drover"));
    plain.mount_image(&scene.network, "overlayfs", &reference, &left)?;
    mount_proven(&scene, &drover, &reference, &right)?;
    scene.stop_seeder();
    let trees = [Tree::open(&left)?, Tree::open(&right)?];

    let mut text = format!(
        "Medians of {} interleaved turns on one disk; image of {:.1} MB compressed; {}.\n\n\
         | work | overlayfs, cold | Drover, cold | ratio | (least to most) | overlayfs, warm | Drover, warm | ratio | (least to most) |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        arguments.runs,
        image.compressed_size() as f64 / 1e6,
        machine()
    );
    for work in Work::ALL {
        write!(text, "| {} ", work.label())?;
        for cold in [true, false] {
            let mut times = [Vec::new(), Vec::new()];
            for number in 0..arguments.runs {
                // In turn first, as the second may profit from what the disk or the processor still knows.
                for at in [number % 2, 1 - number % 2] {
                    if cold {
                        drop_caches();
                    } else if number == 0 {
                        work.run(&trees[at])?;
                    }
                    let start = Instant::now();
                    let passes = work.passes(cold);
                    (0..passes).try_for_each(|_| work.run(&trees[at])).with_context(|| work.label())?;
                    times[at].push(start.elapsed().as_secs_f64() / passes as f64);
                }
            }
            let (base, ours) = (median(times[0].iter().copied()), median(times[1].iter().copied()));
            let (least, most) = spread(times[1].iter().zip(&times[0]).map(|(ours, base)| ours / base));
            write!(text, "| {base:.4} s | {ours:.4} s | {:.2} | {least:.2} to {most:.2} ", ours / base)?;
            say(&format!("{}, {}: {:.2}", work.label(), if cold { "cold" } else { "warm" }, ours / base));
        }
        writeln!(text, "|")?;
    }
    drop(trees);
    drop((plain, drover));
    publish("bench-files", &text)
}

/// Mounts the image once its devices are proven, so that new mounts read them without the daemon.
fn mount_proven(scene: &Scene, node: &Node, reference: &str, target: &Path) -> Result<()> {
    let deadline = Instant::now() + PROVE_DEADLINE;
    loop {
        node.mount_image(&scene.network, "drover", reference, target)?;
        let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mount table")?;
        let target_text = target.display().to_string();
        let line = table.lines().find(|line| line.split(' ').nth(4) == Some(&target_text)).unwrap_or_default();
        let lowers = line.split(',').filter_map(|option| option.split_once("lowerdir").map(|(_, value)| value));
        let mut lowers = lowers.flat_map(|value| value.trim_start_matches(['+', '=']).split(':')).peekable();
        if lowers.peek().is_some() && lowers.all(|lower| lower.ends_with('~')) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the image's devices are not proven within {PROVE_DEADLINE:?}: {line}");
        }
        node.unmount_image(&scene.network, "drover", target)?;
        std::thread::sleep(Duration::from_millis(500));
    }
}
