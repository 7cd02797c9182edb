//! A sandbox made of namespaces: processes, mounts and networks that end with it.
//!
//! The program that wants one starts itself again inside, under `unshare`. The first process inside is the root of a process
//! namespace and is killed by the kernel when the program outside ends, however it ends; with it go all processes inside,
//! then their mounts and network namespaces. So there is no cleaning up that could be skipped by a crash or by `kill -9`.
//! What remains on the disk is the run folder, which the program outside removes (or its next run, if it was killed).

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal, kill};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::process;
use crate::tools::Tools;

/// Set inside, to the run folder.
const RUN_FOLDER: &str = "DROVER_LAB_RUN";

/// File of the run folder that says that the test was entered.
const ENTERED: &str = "entered";

/// How long an interrupted sandbox may take to be gone: the kernel tears down its mounts.
const END_DEADLINE: Duration = Duration::from_secs(30);

/// What is private to one run: a folder for state, and the name of its control groups.
#[derive(Clone, Debug)]
pub struct Run {
    folder: PathBuf,
}

impl Run {
    /// Folder for all state of this run; removed with it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Control group for the containers of this run, as `ctr run --cgroup` wants it.
    pub fn control_group(&self) -> String {
        format!("/drover-lab-{}", self.number())
    }

    fn number(&self) -> &str {
        self.folder.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix("run-")).unwrap_or("0")
    }
}

/// Runs `inside` in a new sandbox and gives the exit code for `main`. The process that calls this starts its own command
/// again; in that second process the call runs `inside`, after the first made the sandbox.
///
/// `base` is where run folders go. Errors of `inside` are printed.
pub fn run_main(base: &Path, inside: impl FnOnce(&Run) -> Result<()>) -> ExitCode {
    let outcome = match entered() {
        Some(run) => prepare(&run).and_then(|()| inside(&run)).map(|()| 0),
        None => std::env::current_exe().context("cannot find my own program").and_then(|program| {
            let mut again = Command::new(program);
            again.args(std::env::args_os().skip(1));
            outside(base, again, Output::Inherit)
        }),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the body of the test `name` in a new sandbox: the test program is started again for this one test. Prints
/// `skipped: ...` where the machine cannot.
///
/// # Panics
/// When the test failed inside.
pub fn run_test(name: &str, body: impl FnOnce(&Run) -> Result<()>) {
    if let Some(run) = entered() {
        let noted = fs::write(run.folder.join(ENTERED), "").context("cannot write to the run folder");
        noted.and_then(|()| prepare(&run)).and_then(|()| body(&run)).unwrap_or_else(|error| panic!("{error:#}"));
        return;
    }
    if let Err(reason) = machine_can() {
        println!("skipped: {name}: {reason:#}");
        return;
    }
    let tools = Tools::prepare(&|what| println!("{what}"));
    tools.unwrap_or_else(|error| panic!("cannot prepare the programs for {name}: {error:#}"));
    let program = std::env::current_exe().expect("a test program has a path");
    let mut again = Command::new(program);
    again.args([name, "--exact", "--nocapture", "--include-ignored", "--test-threads=1"]);
    again.env(crate::tools::BUILT, "1");
    let code = outside(&crate::tools::workspace().join(".drover"), again, Output::Prefixed);
    match code {
        Ok(0) => {}
        Ok(code) => panic!("{name} failed inside its sandbox with exit code {code}"),
        Err(error) => panic!("{name}: {error:#}"),
    }
}

/// Whether this machine can run the lab; the error says in one sentence why not.
pub fn machine_can() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("this needs root, for mounts and namespaces: run it as root or with sudo");
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the kernel's version")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (6, 12) {
        bail!("this needs Linux 6.12 or newer (EROFS from a file); this kernel is {}", release.trim());
    }
    for (filesystem, module) in [("overlay", "overlay"), ("erofs", "erofs"), ("fuse", "fuse")] {
        let known =
            || fs::read_to_string("/proc/filesystems").unwrap_or_default().lines().any(|l| l.ends_with(filesystem));
        // Loading is only tried: a kernel with everything built in has no modprobe.
        let load = || Command::new("modprobe").arg(module).output().is_ok_and(|out| out.status.success());
        if !(known() || load() && known()) {
            bail!("this kernel has no {filesystem} file system");
        }
    }
    if !Path::new("/dev/fuse").exists() {
        bail!("there is no /dev/fuse on this machine");
    }
    let probe = Command::new("unshare").args(["--mount", "--pid", "--net", "--fork", "true"]).output();
    match probe {
        Ok(out) if out.status.success() => Ok(()),
        Ok(out) => bail!("this machine does not allow namespaces: {}", String::from_utf8_lossy(&out.stderr).trim()),
        Err(error) => bail!("cannot start `unshare` (package util-linux): {error}"),
    }
}

enum Output {
    Inherit,
    /// Standard output line by line behind a mark, so that a test harness's closing lines are not taken for the outer one's.
    Prefixed,
}

fn entered() -> Option<Run> {
    std::env::var_os(RUN_FOLDER).map(|folder| Run { folder: folder.into() })
}

/// Makes the sandbox and waits for `command` in it.
fn outside(base: &Path, mut command: Command, output: Output) -> Result<u8> {
    machine_can()?;
    fs::create_dir_all(base).with_context(|| format!("cannot create {}", base.display()))?;
    remove_stale(base);
    let run = new_run(base)?;

    let mut wrapped = Command::new("setpriv");
    wrapped.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    // A shell as first process collects orphans; the exit keeps it from replacing itself with the command.
    wrapped.args(["--propagation", "private", "sh", "-c", "\"$@\"; exit $?", "sh"]);
    wrapped.arg(command.get_program()).args(command.get_args());
    wrapped.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
    wrapped.env(RUN_FOLDER, &run.folder).stdin(Stdio::null());
    command = wrapped;

    // Only the thread below takes these; children start with nothing blocked (std clears the mask).
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    let watched = matches!(output, Output::Inherit);
    if watched {
        signals.thread_block().context("cannot block signals")?;
    }
    if matches!(output, Output::Prefixed) {
        command.stdout(Stdio::piped());
    }
    let mut child = command.spawn().context("cannot start `setpriv` (package util-linux)")?;
    let (interrupted, all_ended) = std::sync::mpsc::channel();
    if watched {
        let unshare = child.id();
        std::thread::spawn(move || {
            if signals.wait().is_ok() {
                eprintln!("\ninterrupted: stopping everything");
                end(unshare);
                let _ = interrupted.send(());
            }
        });
    }
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            println!("  | {line}");
        }
    }
    let status = child.wait().context("cannot wait for the sandbox")?;
    if watched && status.signal().is_some() {
        // Killed from above, or by the thread above, which knows when nothing is left.
        let _ = all_ended.recv_timeout(END_DEADLINE);
    }
    // Without a test of the name that it was given the program ends well, too.
    let is_entered = run.folder.join(ENTERED).exists();
    clear(&run);
    if matches!(output, Output::Prefixed) && status.success() && !is_entered {
        bail!("nothing was run inside: this program has no test of that name");
    }
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(130).max(status.signal().map_or(0, |_| 130)))
}

/// Kills the sandbox below the process `unshare` and waits until its last process is gone.
fn end(unshare: u32) {
    let firsts = process::children(unshare).into_iter().filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    let firsts: Vec<_> = firsts.filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()).collect();
    // The first process inside dies with it, and everything else with the first process.
    let _ = kill(nix::unistd::Pid::from_raw(unshare.cast_signed()), Signal::SIGKILL);
    for first in &firsts {
        let _ = poll(&mut [PollFd::new(first, PollFlags::IN)], None);
    }
}

/// First steps inside: nothing that is mounted, or put into `/run` or `/var/lib` (where CNI keeps its leases), is seen by the
/// machine.
fn prepare(run: &Run) -> Result<()> {
    let scratch = run.folder.join("private");
    fs::create_dir_all(&scratch)?;
    process::run(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&scratch))?;
    // The run's own folder must stay what it is.
    for path in ["/run", "/var/lib"].into_iter().filter(|path| !run.folder.starts_with(path)) {
        let name = path.trim_start_matches('/').replace('/', "-");
        let (upper, work) = (scratch.join(format!("{name}-upper")), scratch.join(format!("{name}-work")));
        fs::create_dir_all(&upper)?;
        fs::create_dir_all(&work)?;
        let options = format!("lowerdir={path},upperdir={},workdir={}", upper.display(), work.display());
        process::run(Command::new("mount").args(["-t", "overlay", "-o", &options, "overlay", path]))?;
    }
    Ok(())
}

fn new_run(base: &Path) -> Result<Run> {
    let base = base.canonicalize().with_context(|| format!("cannot find {}", base.display()))?;
    for attempt in 0..1000 {
        let folder = base.join(format!("run-{}-{attempt}", std::process::id()));
        match fs::create_dir(&folder) {
            Ok(()) => {
                fs::write(folder.join("owner"), std::process::id().to_string())?;
                return Ok(Run { folder });
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("cannot create {}", folder.display())),
        }
    }
    bail!("too many run folders in {}", base.display())
}

/// Removes run folders whose program was killed before it could.
fn remove_stale(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let folder = entry.path();
        let owner = fs::read_to_string(folder.join("owner")).ok().and_then(|pid| pid.parse::<i32>().ok());
        if let Some(owner) = owner
            && entry.file_name().to_string_lossy().starts_with("run-")
            && kill(nix::unistd::Pid::from_raw(owner), None).is_err()
        {
            clear(&Run { folder });
        }
    }
}

fn clear(run: &Run) {
    let group = run.control_group();
    let mut hierarchies = vec![PathBuf::from("/sys/fs/cgroup")];
    hierarchies.extend(fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path()));
    for hierarchy in hierarchies {
        remove_control_group(&hierarchy.join(group.trim_start_matches('/')));
    }
    let keep = std::env::var_os("DROVER_LAB_KEEP").is_some();
    if !keep && let Err(error) = fs::remove_dir_all(&run.folder) {
        eprintln!("cannot remove {}: {error}", run.folder.display());
    }
}

fn remove_control_group(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_control_group(&entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}
