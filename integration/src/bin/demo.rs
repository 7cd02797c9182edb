//! `make demo`: one image started with overlayfs and with Drover, on private daemons, side by side.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use lab::image::demo;
use lab::measure::{self, Start, Subject, Way};
use lab::network::Link;
use lab::sandbox::{self, Run};
use lab::scene::{Node, Scene};
use lab::tools::{Tools, workspace};

/// Starts an image with overlayfs and with Drover and shows what each took.
#[derive(Parser)]
struct Arguments {
    /// Image of any registry; without it, an image is built and served by a private registry
    #[arg(long, value_name = "REFERENCE")]
    image: Option<String>,
    /// Command to run in that image; without it, the image's own
    #[arg(long, value_name = "COMMAND")]
    cmd: Option<String>,
    /// Speed of the private network's links in Mbit/s
    #[arg(long, default_value_t = 1000)]
    speed: u32,
    /// Folder for state and the built image
    #[arg(long)]
    folder: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let folder = arguments.folder.clone().unwrap_or_else(|| workspace().join(".drover"));
    sandbox::run_main(&folder, |run| demonstrate(&arguments, run))
}

fn demonstrate(arguments: &Arguments, run: &Run) -> Result<()> {
    let clock = Instant::now();
    let say = |text: &str| println!("[{:6.1} s] {text}", clock.elapsed().as_secs_f64());
    let tools = Tools::prepare(&say)?;
    let (mut scene, subject, compressed) = match &arguments.image {
        Some(image) => {
            let program = arguments.cmd.as_deref().map(split_words).transpose()?.unwrap_or_default();
            (Scene::outside(run, tools), Subject { reference: qualified(image), program }, None)
        }
        None => {
            say("preparing the image");
            let cache = run.folder().parent().context("the run folder has no parent")?.join("image-cache");
            let image = demo::build(&cache, &say)?;
            let scene = Scene::private(run, tools, &run.folder().join("registry"))?;
            let registry = scene.registry.as_ref().context("the private registry is missing")?;
            let size = image.compressed_size();
            say(&format!("pushing {} layers, {} compressed", image.layers.len(), megabytes(size)));
            let reference = registry.push(&scene.network, &image, "demo/science", "1")?;
            scene.network.set_speed(arguments.speed)?;
            let program = match &arguments.cmd {
                Some(command) => split_words(command)?,
                None => demo::PROGRAM.map(str::to_owned).to_vec(),
            };
            (scene, Subject { reference, program }, Some(size))
        }
    };

    let mut rows = Vec::new();
    for way in Way::ALL {
        say(way.label());
        let node = measure::node(&mut scene, way, "")?;
        let ticker = Ticker::start(&scene, &node, clock);
        let outcome = measure::start(&scene, &node, way, &subject, true, &say);
        ticker.stop();
        let start = outcome.with_context(|| way.label().to_owned())?;
        say(&format!("first output after {:.2} s: {}", start.first_line.as_secs_f64(), start.line));
        drop(node);
        rows.push((way, start));
    }
    println!();
    print_table(&rows);
    if let Some(size) = compressed {
        println!("\nThe image has {} compressed; links of {} Mbit/s.", megabytes(size), arguments.speed);
    }
    Ok(())
}

fn print_table(rows: &[(Way, Start)]) {
    let bytes = |count: Option<u64>| count.map_or_else(|| "-".to_owned(), megabytes);
    let head = ["", "first output", "into the node by then", "in the end", "registry to seeder"];
    println!("{:32} {:>13} {:>22} {:>12} {:>19}", head[0], head[1], head[2], head[3], head[4]);
    for (way, start) in rows {
        println!(
            "{:32} {:>11.2} s {:>22} {:>12} {:>19}",
            way.label(),
            start.first_line.as_secs_f64(),
            bytes(start.node_bytes_first),
            bytes(start.node_bytes_end),
            if *way == Way::Overlayfs { "-".to_owned() } else { bytes(start.seeder_bytes) },
        );
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// Adds what image references may leave out.
fn qualified(image: &str) -> String {
    let (first, rest) = image.split_once('/').unwrap_or(("", image));
    let host = first.contains(['.', ':']) || first == "localhost";
    let mut name = match (host, first) {
        (true, _) => image.to_owned(),
        (false, "") => format!("docker.io/library/{rest}"),
        (false, _) => format!("docker.io/{image}"),
    };
    if !name.contains('@') && !name.rsplit('/').next().is_some_and(|last| last.contains(':')) {
        name.push_str(":latest");
    }
    name
}

/// Splits a command as a shell would: blanks separate, quotes and backslashes keep.
fn split_words(text: &str) -> Result<Vec<String>> {
    let (mut words, mut word, mut quote, mut characters) = (Vec::new(), None::<String>, None, text.chars());
    while let Some(character) = characters.next() {
        match (quote, character) {
            (Some(open), close) if open == close => quote = None,
            (None, '\'' | '"') => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => word.get_or_insert_default().extend(characters.next()),
            (None, blank) if blank.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(character),
        }
    }
    if let Some(quote) = quote {
        bail!("the command has a {quote} that is not closed");
    }
    words.extend(word);
    Ok(words)
}

/// Shows how much has entered the node, while something runs.
struct Ticker {
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    fn start(scene: &Scene, node: &Node, clock: Instant) -> Self {
        let stopped = Arc::new(AtomicBool::new(false));
        let counter = scene.network.counter(node.place(), Link::Switch);
        let terminal = std::io::stdout().is_terminal();
        let period = if terminal { Duration::from_millis(250) } else { Duration::from_secs(5) };
        let thread = counter.map(|counter| {
            let stopped = Arc::clone(&stopped);
            std::thread::spawn(move || {
                let before = counter.read().unwrap_or(0);
                let (mut last, mut shown) = (before, Instant::now());
                while !stopped.load(Ordering::Relaxed) {
                    std::thread::park_timeout(Duration::from_millis(100));
                    let now = counter.read().unwrap_or(last);
                    if now == last || shown.elapsed() < period {
                        continue;
                    }
                    (last, shown) = (now, Instant::now());
                    let text = format!("{} have entered the node", megabytes(now - before));
                    if terminal {
                        print!("\r             {text} \r");
                        let _ = std::io::stdout().flush();
                    } else {
                        println!("[{:6.1} s]   {text}", clock.elapsed().as_secs_f64());
                    }
                }
            })
        });
        Self { stopped, thread }
    }

    fn stop(self) {
        self.stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_split_as_a_shell_does() {
        assert_eq!(split_words(r#"sh -c 'echo "a  b"' x\ y """#).unwrap(), ["sh", "-c", "echo \"a  b\"", "x y", ""]);
        assert_eq!(split_words("  ").unwrap(), Vec::<String>::new());
        assert!(split_words("echo 'a").is_err());
    }

    #[test]
    fn references_are_completed() {
        assert_eq!(qualified("redis"), "docker.io/library/redis:latest");
        assert_eq!(qualified("bitnami/redis:7"), "docker.io/bitnami/redis:7");
        assert_eq!(qualified("localhost:5000/a"), "localhost:5000/a:latest");
        assert_eq!(qualified("quay.io/a/b@sha256:00"), "quay.io/a/b@sha256:00");
    }
}
