//! `kill -9` at any moment: no failed read, no wrong byte, nothing lost and nothing left over. Real programs; needs root; every test
//! runs in a sandbox of its own (see `lab::sandbox`).
//!
//! `DROVER_FAULTS=N` does everything N times as often. The moments follow from a seed, which is printed; `DROVER_SEED` repeats it, as
//! far as the machine does the same again.

mod deeds;
mod kills;
mod page_cache;
mod rot;
mod source_gone;

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use lab::image::Image;
use lab::pattern;
use lab::scene::Scene;

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

fn push(scene: &Scene, image: &Image, repository: &str) -> Result<String> {
    let registry = scene.registry.as_ref().context("a private scene has a registry")?;
    registry.push(&scene.network, image, repository, "1")
}

/// SIGKILL for this one process.
fn kill_9(process: u32) -> Result<()> {
    let process = nix::unistd::Pid::from_raw(i32::try_from(process)?);
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL).with_context(|| format!("kill -9 {process}"))
}
