//! `make bench-footprint`: what a node's snapshotter holds and does while an image of 30 layers and 80 000 files is mounted,
//! complete, and nothing happens.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use lab::image::wide;
use lab::measure::wait_until_complete;
use lab::process::{Footprint, footprints, run, wait_for};
use lab::report::{machine, publish};
use lab::sandbox::{self, Run};
use lab::scene::Scene;
use lab::tools::{Tools, workspace};

/// Measures an idle node.
#[derive(Parser)]
struct Arguments {
    /// Seconds without anything to do before the measurement
    #[arg(long, default_value_t = 10)]
    settle: u64,
    /// Seconds that are measured
    #[arg(long, default_value_t = 10)]
    idle: u64,
    /// Folder for state
    #[arg(long)]
    folder: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let folder = arguments.folder.clone().unwrap_or_else(|| workspace().join(".drover"));
    sandbox::run_main(&folder, |run| measure(&arguments, run))
}

fn measure(arguments: &Arguments, run_of: &Run) -> Result<()> {
    let clock = Instant::now();
    let say = |text: &str| eprintln!("[{:6.1} s] {text}", clock.elapsed().as_secs_f64());
    let tools = Tools::prepare(&say)?;
    say("making the image");
    let image = wide::build(&run_of.folder().join("image"), &tools.busybox)?;
    let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
    let registry = scene.registry.as_ref().context("the private registry is missing")?;
    let reference = registry.push(&scene.network, &image, "bench/wide", "1")?;
    scene.start_seeder(true)?;
    let node = scene.drover_node("")?;
    say("pulling");
    node.containerd().pull(&scene.network, "drover", &reference)?;
    let program = ["sleep", "3600"];
    let mut container = node.containerd().container(&scene.network, "drover", &reference, "idle", &program).spawn()?;
    let running =
        || run(&mut node.containerd().ctr(&scene.network, &["task", "ls"])).is_ok_and(|text| text.contains("RUNNING"));
    wait_for("the container runs", Duration::from_secs(60), running)?;
    let pid = node.daemon().pid();
    let mut text = format!(
        "Image of {} layers, {:.1} MB compressed; {}.\n\n| state | process | resident | own pages | peak | threads | CPU | wakes |\n\
         | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        image.layers.len(),
        image.compressed_size() as f64 / 1e6,
        machine()
    );
    rows(&mut text, "container runs", &footprints(pid), None)?;
    say("waiting until everything is here");
    wait_until_complete(&node)?;
    std::thread::sleep(Duration::from_secs(arguments.settle));
    let before = footprints(pid);
    std::thread::sleep(Duration::from_secs(arguments.idle));
    let state = format!("idle for {} s", arguments.idle);
    rows(&mut text, &state, &footprints(pid), Some(&before))?;
    let _ = container.kill();
    let _ = container.wait();
    drop(node);
    publish("bench-footprint", &text)
}

/// Rows of all processes; CPU and wakes since `before`.
fn rows(text: &mut String, state: &str, now: &[Footprint], before: Option<&[Footprint]>) -> Result<()> {
    let none = Footprint::default();
    for (at, process) in now.iter().enumerate() {
        let before = before.and_then(|before| before.get(at)).unwrap_or(&none);
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        writeln!(
            text,
            "| {state} | {} | {:.1} MiB | {:.1} MiB | {:.1} MiB | {} | {:.2} s | {} |",
            process.name,
            mib(process.resident),
            mib(process.anonymous),
            mib(process.peak),
            process.threads,
            process.cpu.saturating_sub(before.cpu).as_secs_f64(),
            process.wakes.saturating_sub(before.wakes)
        )?;
    }
    Ok(())
}
