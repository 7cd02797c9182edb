//! `make demo-mesh`: one image started on several nodes at the same moment, with overlayfs and with Drover.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use lab::crowd::{Case, Crowd, Flows, Outcome, Progress};
use lab::image::demo;
use lab::measure::Subject;
use lab::network::Place;
use lab::report::{median, spread};
use lab::sandbox::{self, Run};
use lab::scene::{Node, Scene};
use lab::tools::{Tools, workspace};

/// Starts an image on several nodes at once and shows what it took, and who gave the bytes.
#[derive(Parser)]
struct Arguments {
    /// Nodes that start it
    #[arg(long, default_value_t = 8)]
    nodes: usize,
    /// Speed of the links in Mbit/s
    #[arg(long, default_value_t = 1000)]
    speed: u32,
    /// Speed of the registry's links in Mbit/s
    #[arg(long, default_value_t = 200)]
    registry_speed: u32,
    /// Leave overlayfs out
    #[arg(long)]
    without_overlayfs: bool,
    /// Folder for state and the built image
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// How long the nodes' table stands before it is made anew, on a terminal and elsewhere.
const PERIODS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let folder = arguments.folder.clone().unwrap_or_else(|| workspace().join(".drover"));
    sandbox::run_main(&folder, |run| demonstrate(&arguments, run))
}

fn demonstrate(arguments: &Arguments, run: &Run) -> Result<()> {
    ensure!(arguments.nodes > 0, "nothing to show: want at least one node");
    let clock = Instant::now();
    let say = |text: &str| println!("[{:6.1} s] {text}", clock.elapsed().as_secs_f64());
    let tools = Tools::prepare(&say)?;
    say("preparing the image");
    let cache = run.folder().parent().context("the run folder has no parent")?.join("image-cache");
    let image = demo::build(&cache, &say)?;
    let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
    let registry = scene.registry.as_ref().context("the private registry is missing")?;
    let compressed = image.compressed_size();
    say(&format!("pushing {} layers, {} compressed", image.layers.len(), megabytes(compressed)));
    let reference = registry.push(&scene.network, &image, "demo/science", "1")?;
    let subject = Subject { reference, program: demo::PROGRAM.map(str::to_owned).to_vec() };
    scene.network.set_speed(arguments.speed)?;
    scene.network.set_speed_of(Place::Registry, arguments.registry_speed)?;

    let mut outcomes = Vec::new();
    let cases = [Case::Overlayfs, Case::Unknown, Case::Known];
    for case in cases.into_iter().filter(|case| *case != Case::Overlayfs || !arguments.without_overlayfs) {
        say(&format!("{}: {} nodes", case.label(), arguments.nodes));
        let crowd = Crowd::gather(&mut scene, case, arguments.nodes, &subject, "")?;
        say("starting it on all of them");
        let outcome = watched(&crowd, &scene, compressed, clock, || crowd.start(&scene, &subject, true))?;
        let slowest = spread(outcome.first_lines()).1;
        say(&format!("first output on every node after {slowest:.2} s: {}", outcome.starts[0].line));
        outcomes.push(outcome);
        // An unpacked image is tens of thousands of files.
        say("removing the nodes' disks");
        drop(crowd);
    }
    println!();
    print_nodes(&outcomes, arguments.nodes);
    println!();
    print_cases(&outcomes, compressed);
    println!(
        "\nThe image has {} compressed, which is one copy; links of {} Mbit/s, the registry's of {} Mbit/s. Bytes are those of \
         the machines' interfaces, with all headers.",
        megabytes(compressed),
        arguments.speed,
        arguments.registry_speed
    );
    Ok(())
}

/// Seconds of each node.
fn print_nodes(outcomes: &[Outcome], nodes: usize) {
    print!("{:9}", "");
    outcomes.iter().for_each(|outcome| print!(" {:>34}", outcome.case.label()));
    print!("\n{:9}", "");
    outcomes.iter().for_each(|_| print!(" {:>16} {:>17}", "first output", "whole image"));
    println!();
    for number in 0..nodes {
        print!("node {:<4}", number + 1);
        for outcome in outcomes {
            let start = &outcome.starts[number];
            let complete = start.complete.map_or_else(|| "-".to_owned(), |time| format!("{:.2} s", time.as_secs_f64()));
            print!(" {:>14.2} s {complete:>17}", start.first_line.as_secs_f64());
        }
        println!();
    }
}

/// What each case took altogether.
fn print_cases(outcomes: &[Outcome], compressed: u64) {
    let head =
        ["", "first output", "last node", "whole image", "last node", "registry gave", "seeder gave", "from nodes"];
    println!(
        "{:32} {:>12} {:>10} {:>12} {:>10} {:>14} {:>14} {:>11}",
        head[0], head[1], head[2], head[3], head[4], head[5], head[6], head[7]
    );
    for outcome in outcomes {
        let (first, last) = (median(outcome.first_lines()), spread(outcome.first_lines()).1);
        let (complete, last_complete) = (median(outcome.completes()), spread(outcome.completes()).1);
        println!(
            "{:32} {first:>10.2} s {last:>8.2} s {complete:>10.2} s {last_complete:>8.2} s {:>7.2} copies {:>7.2} copies {:>9.0} %",
            outcome.case.label(),
            copies(outcome.flows.registry(), compressed),
            copies(outcome.flows.seeder, compressed),
            outcome.flows.share_between_nodes() * 100.0,
        );
    }
}

fn copies(bytes: u64, compressed: u64) -> f64 {
    bytes as f64 / compressed as f64
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// Does `work` and shows meanwhile how far the nodes are: a table that changes in place on a terminal, else one line now and then.
fn watched<T>(
    crowd: &Crowd,
    scene: &Scene,
    compressed: u64,
    clock: Instant,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let terminal = std::io::stdout().is_terminal();
    let period = PERIODS[usize::from(!terminal)];
    let before = crowd.flows(scene)?;
    let done = AtomicBool::new(false);
    let watch = || {
        let mut lines_shown = 0;
        loop {
            std::thread::park_timeout(period);
            if done.load(Ordering::Relaxed) {
                break;
            }
            let links =
                crowd.flows(scene).map(|flows| links_line(&flows.since(&before), compressed)).unwrap_or_default();
            if terminal {
                let mut text = if lines_shown > 0 { format!("\x1b[{lines_shown}A") } else { String::new() };
                let nodes = crowd
                    .nodes
                    .iter()
                    .enumerate()
                    .map(|(at, node)| format!("  node {:<3} {}", at + 1, node_line(node)));
                let lines: Vec<_> = nodes.chain([format!("  {links}")]).collect();
                lines.iter().for_each(|line| text.push_str(&format!("{line}\x1b[K\n")));
                lines_shown = lines.len();
                print!("{text}");
                let _ = std::io::stdout().flush();
            } else {
                println!("[{:6.1} s]   {links}", clock.elapsed().as_secs_f64());
            }
        }
    };
    std::thread::scope(|scope| {
        let watching = scope.spawn(watch);
        let outcome = work();
        done.store(true, Ordering::Relaxed);
        watching.thread().unpark();
        outcome
    })
}

fn links_line(flows: &Flows, compressed: u64) -> String {
    format!(
        "given: {:.2} copies by the registry, {:.2} by the seeder, {:.2} by nodes",
        copies(flows.registry(), compressed),
        copies(flows.seeder, compressed),
        copies(flows.between_nodes(), compressed)
    )
}

/// What a node has and where that came from.
fn node_line(node: &Node) -> String {
    if node.snapshotter().is_err() {
        return format!("{:>9} fetched by containerd", megabytes(node.containerd().content_bytes()));
    }
    let Ok(Progress { device, here, by_source }) = Progress::of(node) else { return "no answer".to_owned() };
    let mut text = format!("{:>9} here", megabytes(here));
    if device > 0 {
        text.push_str(&format!(" of {}", megabytes(device)));
    }
    by_source.iter().for_each(|(source, bytes)| text.push_str(&format!("  {source} {}", megabytes(*bytes))));
    text
}
