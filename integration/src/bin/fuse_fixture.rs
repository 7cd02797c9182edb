//! What the FUSE tests run as processes of their own: readers that check every byte, and a snapshotter that serves
//! computed devices.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::Write,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use clap::Parser;
use lab::pattern;
use serde::Serialize;
use snapshotter::{
    fuse::{DeviceAttributes, DeviceMount, Devices, NodeId, ParkedReply, ReadAhead, Reply, SessionOptions, session},
    keeper::{self, DaemonSide, KeeperOptions},
};

#[derive(Parser)]
enum Arguments {
    /// Reads a device and compares it with its pattern; SIGUSR1 is handled and changes nothing.
    Read(Read),
    /// Serves computed devices under a directory.
    Serve(Serve),
    /// Internal: a keeper for a daemon that lives.
    Keeper(Serve),
    /// Internal: the daemon.
    Daemon(Serve),
}

#[derive(clap::Args)]
struct Serve {
    /// Directory for everything.
    directory: PathBuf,
}

#[derive(clap::Args)]
#[command(args_override_self = true)]
struct Read {
    /// File to read.
    path: PathBuf,
    /// Number of the device whose pattern it has.
    #[arg(long)]
    number: u64,
    /// Where in the pattern the file starts.
    #[arg(long, default_value_t = 0)]
    base: u64,
    /// Bytes of the file that are read from.
    #[arg(long)]
    span: u64,
    /// Bytes of one read.
    #[arg(long, default_value_t = 4096)]
    length: usize,
    /// Reads of each thread; 0 reads until standard input is closed.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// One reads on the main thread, which is the one that gets signals.
    #[arg(long, default_value_t = 1)]
    threads: u64,
    /// Turn of the first read: other turns read elsewhere.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Past the page cache.
    #[arg(long)]
    direct: bool,
    /// One after the other instead of anywhere.
    #[arg(long)]
    sequential: bool,
    /// Drop the pages after each read.
    #[arg(long)]
    forget: bool,
}

/// What a reader saw, printed as JSON on its last line.
#[derive(Default, Serialize)]
struct Outcome {
    reads: u64,
    bytes: u64,
    failed: Vec<String>,
    wrong: Vec<u64>,
    /// Microseconds.
    p50: u128,
    p99: u128,
    max: u128,
    /// Milliseconds of the reads that took 10 or more.
    stalls: Vec<u128>,
    /// When those began, in milliseconds since 1970, and how many they took.
    slow: Vec<(u64, u64)>,
}

/// Reads that took this long or more are told one by one.
const SLOW: Duration = Duration::from_millis(10);

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    match Arguments::parse() {
        Arguments::Read(read) => read.run(),
        Arguments::Serve(serve) => Ok(keeper::serve(&serve.options())?),
        Arguments::Keeper(serve) => Ok(keeper::adopt(&serve.options())?),
        Arguments::Daemon(serve) => serve.daemon(),
    }
}

impl Serve {
    fn options(&self) -> KeeperOptions {
        let arguments = |command: &str| vec![command.into(), self.directory.clone().into()];
        KeeperOptions {
            runtime_directory: self.directory.join("run"),
            mount_point: self.directory.join("devices"),
            socket: self.directory.join("service.sock"),
            keeper_arguments: arguments("keeper"),
            daemon_arguments: arguments("daemon"),
            stop_timeout: Duration::from_secs(5),
        }
    }

    /// Serves until SIGTERM.
    fn daemon(self) -> anyhow::Result<()> {
        let side = DaemonSide::receive(&self.options())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut term = {
            let _entered = runtime.enter();
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?
        };
        let (slow, queue) = std::sync::mpsc::channel();
        thread::spawn(move || answer_slowly(&queue));
        let read_ahead = std::env::var("DROVER_READ_AHEAD")
            .ok()
            .map(|bytes| anyhow::Ok(ReadAhead { mount_point: self.options().mount_point, bytes: bytes.parse()? }))
            .transpose()?;
        let mut options = SessionOptions { adopted: side.adopted(), read_ahead, ..SessionOptions::default() };
        if let Ok(workers) = std::env::var("DROVER_WORKERS") {
            options.workers = workers.parse()?;
        }
        options.resend = std::env::var_os("DROVER_NO_RESEND").is_none();
        let handler = Arc::new(DeviceMount(ComputedDevices { slow: Mutex::new(slow) }));
        let session = session::run(side.fuse()?, handler, options)?;
        let ended = session.clone();
        thread::spawn(move || {
            eprintln!("session ended: {}", ended.wait());
            std::process::exit(3);
        });
        let listener = side.listener()?;
        listener.set_nonblocking(false)?;
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let _ = writeln!(&connection, "{}", std::process::id());
            }
        });
        side.ready();
        runtime.block_on(term.recv());
        session.leave();
        Ok(())
    }
}

/// Devices 0 to 9, of 256 GiB each; 0 has only zeros, which cost nothing to make.
struct ComputedDevices {
    slow: Mutex<std::sync::mpsc::Sender<Parked>>,
}

/// The device whose reads are never answered.
const SILENT: u64 = 9;

struct Parked {
    number: u64,
    offset: u64,
    size: u32,
    reply: ParkedReply,
}

impl Devices for ComputedDevices {
    fn lookup(&self, name: &OsStr) -> Option<DeviceAttributes> {
        self.attributes(NodeId::of_layer(name.to_str()?.parse().ok()?)?)
    }

    fn attributes(&self, node: NodeId) -> Option<DeviceAttributes> {
        node.layer().filter(|number| *number < 10).map(|_| DeviceAttributes { node, size: 1 << 38 })
    }

    fn list(&self) -> Vec<(OsString, NodeId)> {
        (0..10).filter_map(|number| Some((number.to_string().into(), NodeId::of_layer(number)?))).collect()
    }

    /// Every second 64 KiB of a device take a moment.
    fn read(&self, node: NodeId, offset: u64, size: u32, reply: Reply) {
        let number = node.layer().unwrap_or(0);
        if number == 0 {
            static ZEROS: [u8; 1 << 20] = [0; 1 << 20];
            return reply.bytes(&ZEROS[..size as usize]);
        }
        if number == SILENT {
            // Its answer is owed for ever, as when the daemon that has read it dies.
            return std::mem::forget(reply.park());
        }
        if offset >> 16 & 1 == 1 {
            let parked = Parked { number, offset, size, reply: reply.park() };
            let _ = self.slow.lock().unwrap().send(parked);
            return;
        }
        let mut bytes = vec![0; size as usize];
        pattern::fill(number, offset, &mut bytes);
        reply.bytes(&bytes);
    }
}

fn answer_slowly(queue: &std::sync::mpsc::Receiver<Parked>) {
    for Parked { number, offset, size, reply } in queue {
        thread::sleep(Duration::from_millis(1));
        let mut bytes = vec![0; size as usize];
        pattern::fill(number, offset, &mut bytes);
        reply.bytes(&bytes);
    }
}

impl Read {
    fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _handled = {
            let _entered = runtime.enter();
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::user_defined1())?
        };
        let mut options = File::options();
        options.read(true);
        if self.direct {
            options.custom_flags(nix::libc::O_DIRECT);
        }
        let file = options.open(&self.path).with_context(|| format!("open {}", self.path.display()))?;
        say("started")?;
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(self.count != 0));
        if self.count == 0 {
            let stop = stop.clone();
            thread::spawn(move || {
                let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
            });
        }
        let times = Mutex::new(Vec::new());
        let outcome = Mutex::new(Outcome::default());
        let body = |thread: u64| {
            let mut done = 0;
            let mut mine = Vec::new();
            while if self.count == 0 { !stop.load(std::sync::atomic::Ordering::Relaxed) } else { done < self.count } {
                self.read(&file, thread << 32 | (self.first + done), &mut mine, &outcome);
                done += 1;
            }
            times.lock().unwrap().append(&mut mine);
        };
        thread::scope(|scope| {
            let body = &body;
            for thread in 1..self.threads {
                scope.spawn(move || body(thread));
            }
            body(0);
        });
        let mut times = times.into_inner().unwrap();
        let mut outcome = outcome.into_inner().unwrap();
        times.sort_unstable();
        let at =
            |share: f64| times.get(((times.len().max(1) - 1) as f64 * share) as usize).map_or(0, Duration::as_micros);
        (outcome.p50, outcome.p99, outcome.max) = (at(0.5), at(0.99), at(1.0));
        outcome.stalls = times.iter().filter(|time| **time >= SLOW).map(Duration::as_millis).collect();
        outcome.slow.sort_unstable();
        say(&serde_json::to_string(&outcome)?)
    }

    fn read(&self, file: &File, turn: u64, times: &mut Vec<Duration>, outcome: &Mutex<Outcome>) {
        let length = self.length as u64;
        let slots = (self.span / length).max(1);
        let slot = if self.sequential { turn & 0xffff_ffff } else { pattern::word(self.number ^ 0x5eed, turn) } % slots;
        let offset = slot * length;
        // Page-aligned, as direct reads want it.
        let mut memory = vec![0u8; self.length + 4096];
        let start = memory.as_ptr().align_offset(4096);
        let buffer = &mut memory[start..start + self.length];
        let began = Instant::now();
        let result = file.read_exact_at(buffer, offset);
        let took = began.elapsed();
        times.push(took);
        if self.forget {
            let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(length), rustix::fs::Advice::DontNeed);
        }
        let difference = pattern::first_difference(self.number, self.base + offset, buffer);
        let mut outcome = outcome.lock().unwrap();
        outcome.reads += 1;
        if took >= SLOW {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            outcome.slow.push((now.saturating_sub(took).as_millis() as u64, took.as_millis() as u64));
        }
        match result {
            Ok(()) => {
                outcome.bytes += length;
                outcome.wrong.extend(difference);
            }
            Err(error) => outcome.failed.push(format!("{offset}: {error}")),
        }
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
