//! Starting programs, waiting for what they do, and stopping them.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(10);

/// How long a program may take to end after SIGTERM before it is killed.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Runs `command` to its end and gives its standard output. The error holds what it printed on standard error.
pub fn run(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&run_for_bytes(command)?).into_owned())
}

/// The same for output that is no text.
pub fn run_for_bytes(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {}", line_of(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}: {}", line_of(command), output.status, tail(&stderr, 2000));
    }
    Ok(output.stdout)
}

/// What `command` makes of `input`.
pub fn through(command: &mut Command, input: &[u8]) -> Result<Vec<u8>> {
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = spawned.with_context(|| format!("cannot start {}", line_of(command)))?;
    let mut stdin = child.stdin.take().context("the program has no input")?;
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output()
    })?;
    if !output.status.success() {
        bail!("{}: {}", line_of(command), output.status);
    }
    Ok(output.stdout)
}

/// Waits until `condition` holds.
pub fn wait_for(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > deadline {
            bail!("{what}: not within {deadline:?}");
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// A program that runs until it is stopped; it is stopped when this is dropped.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

/// What a daemon and its child processes used.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Processor time of all its threads, user and system.
    pub cpu: Duration,
    /// Most memory that was resident at one time (sum of the processes' own peaks), in bytes.
    pub peak_memory: u64,
}

impl Daemon {
    /// Starts `command` in a process group of its own (so that Ctrl-C at the terminal does not reach it), its output
    /// appended to `log`.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        if let Some(folder) = log.parent() {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let file = File::options().create(true).append(true).open(log);
        let file = file.with_context(|| format!("cannot write {}", log.display()))?;
        let errors = file.try_clone().context("cannot use the log twice")?;
        command.stdin(Stdio::null()).stdout(file).stderr(errors).process_group(0);
        let child = command.spawn().with_context(|| format!("cannot start {name} ({})", line_of(command)))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// Waits until `condition` holds; fails at once, with the end of its log, when the daemon ends.
    pub fn wait_until(&mut self, what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
        let mut ended = None;
        let waited = wait_for(what, deadline, || {
            ended = self.child.try_wait().ok().flatten();
            ended.is_some() || condition()
        });
        if let Some(status) = ended {
            bail!("{} ended ({status}) instead of: {what}\n{}", self.name, self.log_tail());
        }
        waited.with_context(|| format!("{}\n{}", self.name, self.log_tail()))
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Whether it is still there.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What it and its descendants used so far.
    pub fn usage(&self) -> Usage {
        descendants(self.pid()).into_iter().map(usage_of).fold(Usage::default(), |sum, one| Usage {
            cpu: sum.cpu + one.cpu,
            peak_memory: sum.peak_memory + one.peak_memory,
        })
    }

    /// Sends SIGKILL to the process and its descendants, and waits.
    pub fn kill(&mut self) {
        // Stopped first: two processes that restart each other must both die.
        let all = descendants(self.pid());
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            send(&all, signal);
        }
        let _ = self.child.wait();
    }

    /// Freezes the process and its descendants (SIGSTOP), or lets them go on.
    pub fn freeze(&self, frozen: bool) {
        send(&descendants(self.pid()), if frozen { Signal::SIGSTOP } else { Signal::SIGCONT });
    }

    /// Asks it to end with SIGTERM, waits, and kills it when it does not.
    pub fn stop(&mut self) {
        let all = descendants(self.pid());
        let _ = kill(Pid::from_raw(self.pid() as i32), Signal::SIGTERM);
        let ended = wait_for("end", STOP_DEADLINE, || !matches!(self.child.try_wait(), Ok(None))).is_ok();
        if !ended {
            eprintln!("{} did not end within {STOP_DEADLINE:?} and is killed", self.name);
            self.kill();
        }
        let left = || all.iter().any(|pid| is_alive(*pid));
        if wait_for("end of its children", STOP_DEADLINE, || !left()).is_err() {
            send(&all, Signal::SIGKILL);
        }
    }

    /// The end of the log, for messages.
    pub fn log_tail(&self) -> String {
        let text = fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        tail(&text, 3000).to_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.is_running() {
            self.stop();
        }
    }
}

/// What one process holds and does, read from `/proc`.
#[derive(Clone, Debug, Default)]
pub struct Footprint {
    /// Its name.
    pub name: String,
    /// Resident bytes: all, and those that are its own (not pages of files).
    pub resident: u64,
    /// See [`Footprint::resident`].
    pub anonymous: u64,
    /// Most that was resident, in bytes.
    pub peak: u64,
    /// Processor time so far.
    pub cpu: Duration,
    /// How often its threads were put on a processor after they had waited.
    pub wakes: u64,
    /// Threads.
    pub threads: u64,
    /// Open files and sockets.
    pub files: usize,
}

/// Footprints of a process and all processes below it.
pub fn footprints(pid: u32) -> Vec<Footprint> {
    descendants(pid).into_iter().map(footprint).collect()
}

fn footprint(pid: u32) -> Footprint {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |text: &str, name: &str| -> Option<String> {
        Some(text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?.trim().to_owned())
    };
    let number = |text: &str, name: &str| -> u64 {
        field(text, name).and_then(|value| value.split(' ').next()?.parse().ok()).unwrap_or(0)
    };
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let wakes = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    let Usage { cpu, peak_memory: peak } = usage_of(pid);
    Footprint {
        name: field(&status, "Name").unwrap_or_default(),
        resident: number(&status, "VmRSS") * 1024,
        anonymous: number(&status, "RssAnon") * 1024,
        peak,
        cpu,
        wakes: wakes.map(|status| number(&status, "voluntary_ctxt_switches")).sum(),
        threads: number(&status, "Threads"),
        files: fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().count(),
    }
}

/// Direct children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    let parent_of = |entry: &fs::DirEntry| -> Option<(u32, u32)> {
        let child = entry.file_name().to_str()?.parse().ok()?;
        Some((child, stat_fields(child)?.get(1)?.parse().ok()?))
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| parent_of(&entry)).filter(|(_, parent)| *parent == pid).map(|(child, _)| child).collect()
}

/// A process and all processes below it.
fn descendants(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(pid) = all.get(next) {
        all.extend(children(*pid));
        next += 1;
    }
    all
}

fn send(pids: &[u32], signal: Signal) {
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid as i32), signal);
    }
}

fn is_alive(pid: u32) -> bool {
    stat_fields(pid).is_some_and(|fields| fields.first().is_some_and(|state| state != "Z"))
}

/// Fields of `/proc/PID/stat` from the state on.
fn stat_fields(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

fn usage_of(pid: u32) -> Usage {
    let fields = stat_fields(pid).unwrap_or_default();
    // utime and stime are fields 14 and 15 of proc(5), in ticks of 1/100 s (USER_HZ on every Linux that we run on).
    let ticks: u64 = [11, 12].iter().filter_map(|at| fields.get(*at)?.parse::<u64>().ok()).sum();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = peak.and_then(|text| text.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0);
    Usage { cpu: Duration::from_millis(ticks * 10), peak_memory: kib * 1024 }
}

fn line_of(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

fn tail(text: &str, bytes: usize) -> &str {
    let mut start = text.len().saturating_sub(bytes);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].trim()
}
