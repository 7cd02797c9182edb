//! `make bench-mesh`: several nodes start an image at the same moment, and each reads all of it.
//!
//! docs/BENCHMARKS.md says how to read and repeat it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use lab::crowd::{Case, Crowd, Outcome};
use lab::image::{demo, noise};
use lab::measure::Subject;
use lab::network::Place;
use lab::report::{machine, median, publish, spread};
use lab::sandbox::{self, Run};
use lab::scene::Scene;
use lab::tools::{Tools, workspace};

/// Times the start of an image on several nodes at once.
#[derive(Parser)]
struct Arguments {
    /// Nodes that start it; may be given several times
    #[arg(long = "nodes", default_values_t = [8])]
    nodes: Vec<usize>,
    /// Starts of each sort
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Speed of the links in Mbit/s
    #[arg(long, default_value_t = 1000)]
    speed: u32,
    /// Speed of the registry's links in Mbit/s
    #[arg(long, default_value_t = 200)]
    registry_speed: u32,
    /// Megabytes of the layer, which no compression makes smaller
    #[arg(long, default_value_t = 300)]
    megabytes: usize,
    /// Only this sort; may be given several times
    #[arg(long = "only", value_enum)]
    only: Vec<Which>,
    /// Pull the image whole with `drover-snapshotter pull --complete`, instead of starting a container that reads it
    #[arg(long)]
    pull: bool,
    /// The demonstration image instead, with `--pull`
    #[arg(long, requires = "pull")]
    demo: bool,
    /// Start a container of the demonstration image instead, and time its first line on each node
    #[arg(long)]
    first_output: bool,
    /// Lines for the snapshotters' configuration
    #[arg(long, default_value = "")]
    extra: String,
    /// Folder for state and the built image
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// A sort of start.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    /// With overlayfs
    Overlayfs,
    /// With Drover, new to the image
    Unknown,
    /// With Drover, whose seeder knows the image
    Known,
    /// The same, and one more node has the image
    OneHasIt,
}

impl Which {
    const fn of(case: Case) -> Self {
        match case {
            Case::Overlayfs => Self::Overlayfs,
            Case::Unknown => Self::Unknown,
            Case::Known => Self::Known,
            Case::OneHasIt => Self::OneHasIt,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let folder = arguments.folder.clone().unwrap_or_else(|| workspace().join(".drover"));
    sandbox::run_main(&folder, |run| bench(&arguments, run))
}

fn bench(arguments: &Arguments, run: &Run) -> Result<()> {
    ensure!(
        arguments.runs > 0 && arguments.nodes.iter().all(|nodes| *nodes > 0),
        "nothing to measure: want at least one run and one node"
    );
    let clock = Instant::now();
    let say = |text: &str| eprintln!("[{:6.1} s] {text}", clock.elapsed().as_secs_f64());
    let tools = Tools::prepare(&say)?;
    let cache = run.folder().parent().context("the run folder has no parent")?.join("image-cache");
    say("preparing the image");
    if arguments.first_output {
        return first_output(arguments, run, tools, &cache, &say);
    }
    let size = arguments.megabytes * 1_000_000;
    let (image, program, again) = if arguments.demo {
        (demo::build(&cache, &say)?, &demo::PROGRAM[..], &demo::PROGRAM[..])
    } else {
        (noise::build(&cache, &tools.busybox, size)?, &noise::READ[..], &noise::PROGRAM[..])
    };
    let mut expected = (!arguments.demo).then(|| noise::line(size));
    let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
    let registry = scene.registry.as_ref().context("the private registry is missing")?;
    let reference = registry.push(&scene.network, &image, "bench/image", "1")?;
    let subject = Subject { reference, program: program.iter().map(|word| (*word).to_owned()).collect() };
    scene.network.set_speed(arguments.speed)?;
    scene.network.set_speed_of(Place::Registry, arguments.registry_speed)?;

    let cases =
        Case::ALL.into_iter().filter(|case| arguments.only.is_empty() || arguments.only.contains(&Which::of(*case)));
    let cases: Vec<_> = cases.collect();
    let mut outcomes: Vec<Outcome> = Vec::new();
    for number in 1..=arguments.runs {
        for &nodes in &arguments.nodes {
            for &case in &cases {
                let crowd = Crowd::gather(&mut scene, case, nodes, &subject, &arguments.extra)?;
                let outcome = if arguments.pull {
                    crowd.pull_whole(&scene, &subject)?
                } else {
                    crowd.start(&scene, &subject, true)?
                };
                for line in crowd.output_of_each(&scene, &subject.reference, again)? {
                    let (line, expected) = (line.trim(), expected.get_or_insert_with(|| line.trim().to_owned()));
                    ensure!(line == expected, "a container printed {line:?} instead of {expected:?}");
                }
                drop(crowd);
                say(&format!(
                    "run {number} of {}, {nodes} nodes, {}: all read after {:.2} s, at the latest {:.2} s",
                    arguments.runs,
                    case.label(),
                    median(outcome.first_lines()),
                    spread(outcome.first_lines()).1
                ));
                outcomes.push(outcome);
            }
        }
    }
    publish("bench-mesh", &report(arguments, &cases, &outcomes, image.compressed_size())?)
}

/// How the start of the demonstration image on many nodes compares with that on one.
fn first_output(
    arguments: &Arguments,
    run: &Run,
    tools: Tools,
    cache: &Path,
    say: &(dyn Fn(&str) + Sync),
) -> Result<()> {
    let image = demo::build(cache, say)?;
    let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
    let registry = scene.registry.as_ref().context("the private registry is missing")?;
    let reference = registry.push(&scene.network, &image, "bench/science", "1")?;
    let subject = Subject { reference, program: demo::PROGRAM.map(str::to_owned).to_vec() };
    scene.network.set_speed(arguments.speed)?;
    scene.network.set_speed_of(Place::Registry, arguments.registry_speed)?;
    let cases: Vec<Case> = Case::ALL
        .into_iter()
        .filter(|case| arguments.only.is_empty() || arguments.only.contains(&Which::of(*case)))
        .collect();
    let crowds: Vec<usize> = std::iter::once(1).chain(arguments.nodes.iter().copied()).collect();
    let mut outcomes: Vec<Outcome> = Vec::new();
    for number in 1..=arguments.runs {
        for &nodes in &crowds {
            for &case in &cases {
                let crowd = Crowd::gather(&mut scene, case, nodes, &subject, &arguments.extra)?;
                let outcome = crowd.start(&scene, &subject, false)?;
                drop(crowd);
                let last = spread(outcome.first_lines()).1;
                say(&format!("run {number} of {}, {nodes} nodes, {}: {last:.2} s", arguments.runs, case.label()));
                outcomes.push(outcome);
            }
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let mut text = format!(
        "Medians of {} interleaved starts of the demonstration image ({:.1} MB compressed); links of {} Mbit/s, the registry's of \
         {} Mbit/s; {}. The bound: one node alone, or as many times its processor time (the whole machine's without the seeder's) \
         on {cores} processors.\n\n",
        arguments.runs,
        image.compressed_size() as f64 / 1e6,
        arguments.speed,
        arguments.registry_speed,
        machine()
    );
    writeln!(text, "| nodes | start | one alone | CPU of one | bound | median node | last node | last ÷ bound |")?;
    writeln!(text, "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")?;
    for &nodes in crowds.iter().skip(1) {
        for &case in &cases {
            let of = |nodes| outcomes.iter().filter(move |of| (of.case, of.starts.len()) == (case, nodes));
            let alone = median(of(1).flat_map(Outcome::first_lines));
            let first = |outcome: &Outcome| outcome.starts.first().map(|start| start.machine_cpu_first.as_secs_f64());
            let cpu = median(of(1).filter_map(first));
            let bound = alone.max(nodes as f64 * cpu / cores);
            let last = median(of(nodes).map(|outcome| spread(outcome.first_lines()).1));
            writeln!(
                text,
                "| {nodes} | {} | {alone:.2} s | {cpu:.2} s | {bound:.2} s | {:.2} s | {last:.2} s | {:.2} |",
                case.label(),
                median(of(nodes).map(|outcome| median(outcome.first_lines()))),
                last / bound
            )?;
        }
    }
    publish("bench-mesh-first", &text)
}

fn report(arguments: &Arguments, cases: &[Case], outcomes: &[Outcome], compressed: u64) -> Result<String> {
    // A link that is always full carries the image once in this time.
    let bound = compressed as f64 * 8.0 / 1e6 / f64::from(arguments.speed);
    let registry_bound = compressed as f64 * 8.0 / 1e6 / f64::from(arguments.registry_speed);
    let mut text = format!(
        "Medians of {} interleaved starts; image of {:.1} MB compressed; links of {} Mbit/s, which carry it in {bound:.2} s, the \
         registry's of {} Mbit/s, {registry_bound:.2} s; {}.\n\n",
        arguments.runs,
        compressed as f64 / 1e6,
        arguments.speed,
        arguments.registry_speed,
        machine()
    );
    writeln!(
        text,
        "| nodes | start | all read, median node | last node | whole image, last node | registry gave | seeder gave | from nodes | \
         most given by a node | CPU per GB | most memory |"
    )?;
    writeln!(text, "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")?;
    let copies = |bytes: f64| bytes / compressed as f64;
    for &nodes in &arguments.nodes {
        for &case in cases {
            let of = || outcomes.iter().filter(move |outcome| (outcome.case, outcome.starts.len()) == (case, nodes));
            let most = |outcome: &Outcome| outcome.flows.nodes.iter().map(|node| node.sent).max().unwrap_or(0) as f64;
            writeln!(
                text,
                "| {nodes} | {} | {:.2} s | {:.2} s | {:.2} s | {:.3} copies | {:.3} copies | {:.1} % | {:.2} copies | \
                 {:.2} s | {:.0} MB |",
                case.label(),
                median(of().map(|outcome| median(outcome.first_lines()))),
                median(of().map(|outcome| spread(outcome.first_lines()).1)),
                median(of().map(|outcome| spread(outcome.completes()).1)),
                copies(median(of().map(|outcome| outcome.flows.registry() as f64))),
                copies(median(of().map(|outcome| outcome.flows.seeder as f64))),
                median(of().map(|outcome| outcome.flows.share_between_nodes())) * 100.0,
                copies(median(of().map(most))),
                median(of().map(|outcome| {
                    // Of plain bytes, which is what containers read. Overlayfs says nothing of them.
                    let device =
                        if outcome.device == 0 { arguments.megabytes as u64 * 1_000_000 } else { outcome.device };
                    outcome.cpu().as_secs_f64() * 1e9 / (device * nodes as u64) as f64
                })),
                median(of().map(|outcome| outcome.peak_memory() as f64)) / 1e6,
            )?;
        }
    }
    Ok(text)
}
