//! `kill -9` at any moment: no failed read, no wrong byte, nothing lost and nothing left over. Real programs; needs root; every test
//! runs in a sandbox of its own (see `lab::sandbox`).
//!
//! `DROVER_FAULTS=N` does everything N times as often. The moments follow from a seed, which is printed; `DROVER_SEED` repeats it, as
//! far as the machine does the same again.

mod deeds;
mod kills;
mod overload;
mod page_cache;
mod rot;
mod soak;
mod source_gone;

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use lab::image::layer::Attributes;
use lab::image::{Image, LayerWriter};
use lab::pattern;
use lab::process::run;
use lab::scene::{Node, Scene};
use sha2::{Digest as _, Sha256};

/// How often something is to be done that is done `once` times in CI.
fn times(once: u64) -> u64 {
    let factor = std::env::var("DROVER_FAULTS").ok().and_then(|factor| factor.parse().ok());
    once * factor.unwrap_or(1)
}

/// Numbers that follow from a seed.
struct Chance {
    seed: u64,
    drawn: u64,
}

impl Chance {
    /// The seed is printed.
    fn new() -> Self {
        let seed = std::env::var("DROVER_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::from(now.subsec_nanos()) % 1_000_000
        });
        println!("seed {seed}");
        Self { seed, drawn: 0 }
    }

    /// Evenly from 0 to `end`, which is not reached.
    fn below(&mut self, end: u64) -> u64 {
        self.drawn += 1;
        pattern::word(self.seed, self.drawn) % end.max(1)
    }
}

/// Files that follow from a seed: all that a folder of an image holds.
struct Files {
    folder: &'static str,
    seed: u64,
    count: u64,
    /// The largest has so many bytes.
    size: usize,
}

impl Files {
    fn append(&self, layer: &mut LayerWriter) -> Result<()> {
        layer.directory(&self.folder[1..], Attributes::root(0o755))?;
        for number in 0..self.count {
            let path = format!("{}/{number:06}", &self.folder[1..]);
            layer.file(&path, Attributes::root(0o644), &self.contents(number))?;
        }
        Ok(())
    }

    /// For a shell: prints what [`Files::line`] gives.
    fn reading(&self) -> String {
        format!("find {} -type f | sort | xargs cat | sha256sum", self.folder)
    }

    fn line(&self) -> String {
        let mut sum = Sha256::new();
        (0..self.count).for_each(|number| sum.update(self.contents(number)));
        let hex: String = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{hex}  -\n")
    }

    fn contents(&self, number: u64) -> Vec<u8> {
        let mut contents = vec![0; self.size / self.count as usize * (number as usize + 1)];
        pattern::fill(self.seed, number << 32, &mut contents);
        contents
    }
}

fn push(scene: &Scene, image: &Image, repository: &str) -> Result<String> {
    let registry = scene.registry.as_ref().context("a private scene has a registry")?;
    registry.push(&scene.network, image, repository, "1")
}

/// The first process of a container that runs.
fn process_of(scene: &Scene, node: &Node, id: &str) -> Option<u32> {
    let list = run(&mut node.containerd().ctr(&scene.network, &["task", "ls"])).ok()?;
    let tasks = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    tasks.into_iter().find_map(|task| match task[..] {
        [task, pid, "RUNNING"] if task == id => pid.parse().ok(),
        _ => None,
    })
}

/// SIGKILL for this one process.
fn kill_9(process: u32) -> Result<()> {
    let process = nix::unistd::Pid::from_raw(i32::try_from(process)?);
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL).with_context(|| format!("kill -9 {process}"))
}
