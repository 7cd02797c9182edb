//! `make bench-single`: one node, timed; overlayfs and Drover in turn, so that a busy machine slows both.
//!
//! docs/BENCHMARKS.md says how to read and repeat it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use lab::image::{demo, torch};
use lab::measure::{self, Start, Subject, Way};
use lab::process::Usage;
use lab::report::{machine, median, publish, spread};
use lab::rivals::Rival;
use lab::sandbox::{self, Run};
use lab::scene::Scene;
use lab::tools::{Tools, workspace};

/// Times container starts with overlayfs and with Drover.
#[derive(Parser)]
struct Arguments {
    /// What is started
    #[arg(long, value_enum, default_value_t = Which::Demo)]
    image: Which,
    /// Time stargz-snapshotter and soci-snapshotter too
    #[arg(long)]
    rivals: bool,
    /// Leave containerd's full pull out, which takes longest: nothing to compare with, but enough to look into a start
    #[arg(long)]
    without_overlayfs: bool,
    /// Starts of each sort at each speed
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Speed of the links in Mbit/s; may be given several times
    #[arg(long = "speed", default_values_t = [200, 1000])]
    speeds: Vec<u32>,
    /// Wait after each start until the node has the whole image, to count its bytes and work
    #[arg(long)]
    complete: bool,
    /// Lines for the snapshotter's configuration
    #[arg(long, default_value = "")]
    extra: String,
    /// Folder for state and the built image
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// An image of the lab.
#[derive(Clone, Copy, ValueEnum)]
enum Which {
    /// 280 MB in some 90 000 files; Python with numpy, scipy and pandas
    Demo,
    /// 1.9 GB in few big files; PyTorch with CUDA
    Torch,
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
    let (image, program) = match arguments.image {
        Which::Demo => (demo::build(&cache, &say)?, demo::PROGRAM),
        Which::Torch => (torch::build(&cache, &say)?, torch::PROGRAM),
    };
    let rivals = if arguments.rivals { &Rival::ALL[..] } else { &[] };
    let mut pushed = vec![(None, image.clone())];
    for rival in rivals {
        pushed.push((Some(*rival), rival.image(&image, &say)?));
    }
    let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
    let registry = scene.registry.as_ref().context("the private registry is missing")?;
    let mut subjects = BTreeMap::new();
    for (rival, image) in &pushed {
        let repository = format!("bench/{}", rival.map_or("subject", Rival::name));
        let reference = registry.push(&scene.network, image, &repository, "1")?;
        subjects.insert(*rival, Subject { reference, program: program.map(str::to_owned).to_vec() });
    }

    let own = Way::ALL.into_iter().filter(|way| *way != Way::Overlayfs || !arguments.without_overlayfs);
    let ways: Vec<Way> = own.chain(rivals.iter().copied().map(Way::Rival)).collect();
    let mut starts: Vec<(u32, Way, Start)> = Vec::new();
    for number in 1..=arguments.runs {
        for &speed in &arguments.speeds {
            scene.network.set_speed(speed)?;
            for &way in &ways {
                let subject = match way {
                    Way::Rival(rival) => &subjects[&Some(rival)],
                    Way::Overlayfs | Way::DroverNew | Way::DroverKnown => &subjects[&None],
                };
                let node = measure::node(&mut scene, way, &arguments.extra)?;
                let start = measure::start(&scene, &node, way, subject, arguments.complete, &|_| {})
                    .with_context(|| format!("run {number}, {speed} Mbit/s, {}", way.label()))?;
                drop(node);
                say(&format!(
                    "run {number} of {}, {speed} Mbit/s, {}: {:.2} s, {:.1} MB; daemon {}",
                    arguments.runs,
                    way.label(),
                    start.first_line.as_secs_f64(),
                    start.node_bytes_first.unwrap_or(0) as f64 / 1e6,
                    usage([start.node_usage_first].into_iter()),
                ));
                starts.push((speed, way, start));
            }
        }
    }
    let name = match arguments.image {
        Which::Demo => "bench-single",
        Which::Torch => "bench-single-torch",
    };
    publish(name, &report(arguments, &ways, &starts, image.compressed_size())?)
}

fn report(arguments: &Arguments, ways: &[Way], starts: &[(u32, Way, Start)], compressed: u64) -> Result<String> {
    let mut text = String::new();
    writeln!(
        text,
        "Medians of {} interleaved starts; image of {:.1} MB compressed; {}.\n",
        arguments.runs,
        compressed as f64 / 1e6,
        machine()
    )?;
    let (head, rule) = if arguments.complete {
        ("| in the end | node daemon CPU, peak memory in the end ", "| ---: | ---: ")
    } else {
        ("", "")
    };
    writeln!(
        text,
        "| Mbit/s | start | first output | ratio to overlayfs | (least to most) | into the node by then | registry to seeder | \
         node daemon CPU, peak memory by then {head}| seeder CPU, peak memory |"
    )?;
    writeln!(text, "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: {rule}| ---: |")?;
    for &speed in &arguments.speeds {
        let of = |way: Way| starts.iter().filter(move |(s, w, _)| (*s, *w) == (speed, way)).map(|(_, _, start)| start);
        let first = |start: &Start| start.first_line.as_secs_f64();
        let base = median(of(Way::Overlayfs).map(first));
        for &way in ways {
            let time = median(of(way).map(first));
            let ratio = if ways.contains(&Way::Overlayfs) {
                let (least, most) = spread(of(way).zip(of(Way::Overlayfs)).map(|(a, b)| first(a) / first(b)));
                format!("{:.3} | {least:.3} to {most:.3}", time / base)
            } else {
                " | ".to_owned()
            };
            let share = |bytes: Option<u64>| bytes.map_or(f64::NAN, |bytes| bytes as f64);
            let entered = |bytes: f64| format!("{:.1} MB ({:.0} %)", bytes / 1e6, bytes / compressed as f64 * 100.0);
            let is_drover = matches!(way, Way::DroverNew | Way::DroverKnown);
            let end = match arguments.complete {
                true if is_drover => format!(
                    "| {} | {} ",
                    entered(median(of(way).map(|start| share(start.node_bytes_end)))),
                    usage(of(way).map(|start| start.node_usage))
                ),
                true => "| | ".to_owned(),
                false => String::new(),
            };
            let seeder = median(of(way).map(|start| share(start.seeder_bytes))) / 1e6;
            writeln!(
                text,
                "| {speed} | {} | {time:.2} s | {ratio} | {} | {} | {} {end}| {} |",
                way.label(),
                entered(median(of(way).map(|start| share(start.node_bytes_first)))),
                if is_drover { format!("{seeder:.1} MB") } else { String::new() },
                usage(of(way).map(|start| start.node_usage_first)),
                if is_drover { usage(of(way).map(|start| start.seeder_usage)) } else { String::new() },
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
