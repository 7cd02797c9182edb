//! `make bench-single`: one node, timed; overlayfs and Drover in turn, so that a busy machine slows both.
//!
//! docs/BENCHMARKS.md says how to read and repeat it.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use lab::image::demo;
use lab::measure::{self, Start, Subject, Way};
use lab::process::Usage;
use lab::sandbox::{self, Run};
use lab::scene::Scene;
use lab::tools::{Tools, target, workspace};

/// Times container starts with overlayfs and with Drover.
#[derive(Parser)]
struct Arguments {
    /// Starts of each sort at each speed
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Speed of the links in Mbit/s; may be given several times
    #[arg(long = "speed", default_values_t = [200, 1000])]
    speeds: Vec<u32>,
    /// Wait after each start until the node has the whole image, to count its bytes and work
    #[arg(long)]
    complete: bool,
    /// Folder for state and the built image
    #[arg(long)]
    folder: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let folder = arguments.folder.clone().unwrap_or_else(|| workspace().join(".drover"));
    sandbox::run_main(&folder, |run| bench(&arguments, run))
}

fn bench(arguments: &Arguments, run: &Run) -> Result<()> {
    ensure!(
        arguments.runs > 0 && !arguments.speeds.is_empty(),
        "nothing to measure: want at least one run and one speed"
    );
    let clock = Instant::now();
    let say = |text: &str| eprintln!("[{:6.1} s] {text}", clock.elapsed().as_secs_f64());
    let tools = Tools::prepare(&say)?;
    let cache = run.folder().parent().context("the run folder has no parent")?.join("image-cache");
    let image = demo::build(&cache, &say)?;
    let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
    let registry = scene.registry.as_ref().context("the private registry is missing")?;
    let reference = registry.push(&scene.network, &image, "bench/science", "1")?;
    let subject = Subject { reference, program: demo::PROGRAM.map(str::to_owned).to_vec() };

    let mut starts: Vec<(u32, Way, Start)> = Vec::new();
    for number in 1..=arguments.runs {
        for &speed in &arguments.speeds {
            scene.network.set_speed(speed)?;
            for way in Way::ALL {
                let (start, node) = measure::start(&mut scene, way, &subject, arguments.complete, &|_| {})
                    .with_context(|| format!("run {number}, {speed} Mbit/s, {}", way.label()))?;
                drop(node);
                let seconds = start.first_line.as_secs_f64();
                say(&format!("run {number} of {}, {speed} Mbit/s, {}: {seconds:.2} s", arguments.runs, way.label()));
                starts.push((speed, way, start));
            }
        }
    }
    let text = report(arguments, &starts, image.compressed_size())?;
    println!("{text}");
    let path = target()?.join("bench-single.md");
    fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("written to {}", path.display());
    Ok(())
}

fn report(arguments: &Arguments, starts: &[(u32, Way, Start)], compressed: u64) -> Result<String> {
    let mut text = String::new();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    writeln!(
        text,
        "Medians of {} interleaved starts; image of {:.1} MB compressed; Linux {}, {processors} processors.\n",
        arguments.runs,
        compressed as f64 / 1e6,
        kernel.trim()
    )?;
    writeln!(
        text,
        "| Mbit/s | start | first output | ratio to overlayfs | (least to most) | into the node by then | registry to seeder | \
         node daemon CPU, peak memory | seeder CPU, peak memory |"
    )?;
    writeln!(text, "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")?;
    for &speed in &arguments.speeds {
        let of = |way: Way| starts.iter().filter(move |(s, w, _)| (*s, *w) == (speed, way)).map(|(_, _, start)| start);
        let first = |start: &Start| start.first_line.as_secs_f64();
        let base = median(of(Way::Overlayfs).map(first));
        for way in Way::ALL {
            let time = median(of(way).map(first));
            let pairs: Vec<f64> = of(way).zip(of(Way::Overlayfs)).map(|(a, b)| first(a) / first(b)).collect();
            let (least, most) = pairs.iter().fold((f64::MAX, f64::MIN), |(l, m), r| (l.min(*r), m.max(*r)));
            let share = |bytes: Option<u64>| bytes.map_or(f64::NAN, |bytes| bytes as f64);
            let node = median(of(way).map(|start| share(start.node_bytes_first)));
            let seeder = median(of(way).map(|start| share(start.seeder_bytes)));
            writeln!(
                text,
                "| {speed} | {} | {time:.2} s | {:.2} | {least:.2} to {most:.2} | {:.1} MB ({:.0} %) | {:.1} MB | {} | {} |",
                way.label(),
                time / base,
                node / 1e6,
                node / compressed as f64 * 100.0,
                seeder / 1e6,
                usage(of(way).map(|start| start.node_usage)),
                if way == Way::Overlayfs { "-".to_owned() } else { usage(of(way).map(|start| start.seeder_usage)) },
            )?;
        }
    }
    writeln!(text, "\nThe node daemon of overlayfs is containerd; with Drover it is the snapshotter with its keeper.")?;
    Ok(text)
}

fn usage(all: impl Iterator<Item = Usage> + Clone) -> String {
    let cpu = median(all.clone().map(|usage| usage.cpu.as_secs_f64()));
    let memory = median(all.map(|usage| usage.peak_memory as f64));
    format!("{cpu:.2} s, {:.0} MB", memory / 1e6)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match (values.get(values.len() / 2), values.get(values.len().saturating_sub(1) / 2)) {
        (Some(a), Some(b)) => f64::midpoint(*a, *b),
        _ => f64::NAN,
    }
}
