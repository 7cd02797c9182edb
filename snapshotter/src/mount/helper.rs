//! Mounting on FUSE files from a process of its own.
//!
//! `mount(2)` of an EROFS image opens its device, and opening a file of the daemon's FUSE mount asks the daemon. Were the
//! daemon itself the caller and killed in that moment, its thread could not die before the request is answered, its
//! successor would not be started before it is dead, and nobody could answer. So another process mounts. It serves one mount
//! after the other, since an image of 128 layers is not the time to start 128 processes, and ends when it is idle or the
//! daemon is gone. It holds a lock file all the while, and who recovers after a crash takes that lock first ([`settle`]): no
//! mount appears behind its back.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, StatxAttributes, StatxFlags};

use super::erofs::{ErofsMount, MountError};

/// The subcommand of the snapshotter binary that runs [`serve`].
pub const SUBCOMMAND: &str = "mount-erofs";

/// How long an idle mount process stays. Chosen: the layers of one pull come within milliseconds of each other.
const IDLE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Answer of the mount process to a request that succeeded; anything else is an error's text.
const DONE: &str = "done";

/// The mount process, started when it is needed.
#[derive(Debug)]
pub struct Helper {
    program: PathBuf,
    lock: PathBuf,
    process: Mutex<Option<Process>>,
}

/// A mount process that is running, or has ended since it was used last.
#[derive(Debug)]
struct Process {
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Helper {
    /// Will start `program`, the snapshotter's binary. `lock` is the lock file of all mount processes of one root.
    pub fn new(program: PathBuf, lock: PathBuf) -> Self {
        Self { program, lock, process: Mutex::new(None) }
    }

    /// Mounts all of `mounts` in order; the first failure ends it. What is mounted already stays as it is. Blocks until it is
    /// done.
    pub fn mount(&self, mounts: &[ErofsMount]) -> Result<(), MountError> {
        let mut slot = self.process.lock();
        // One that was here may have been idle for too long, or killed: a new one does what it has not done.
        if let Some(mut process) = slot.take()
            && let Ok(answer) = process.ask(mounts)
        {
            *slot = Some(process);
            return answer;
        }
        let mut process = self.start()?;
        let answer = process.ask(mounts).map_err(|error| self.failed(&error))?;
        *slot = Some(process);
        answer
    }

    fn start(&self) -> Result<Process, MountError> {
        let lock = open_lock(&self.lock).map_err(MountError::io(&self.lock))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockShared)
            .map_err(|errno| MountError::Io { path: self.lock.clone(), source: errno.into() })?;
        // The child has the lock as its standard error: the lock lives as long as the process that may mount.
        let mut child = Command::new(&self.program)
            .arg(SUBCOMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::from(lock))
            .spawn()
            .map_err(|error| self.failed(&error))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        // It ends by itself; somebody must take note, or a zombie stays.
        std::thread::Builder::new()
            .name("mount process".to_owned())
            .spawn(move || child.wait())
            .map_err(|error| self.failed(&error))?;
        let (input, output) = pipes.ok_or_else(|| MountError::Helper("no pipes".to_owned()))?;
        Ok(Process { input, output: BufReader::new(output) })
    }

    fn failed(&self, error: &io::Error) -> MountError {
        MountError::Helper(format!("{}: {error}", self.program.display()))
    }
}

impl Process {
    /// Sends a request and waits for its answer. The error is of the process itself: it may have done a part.
    fn ask(&mut self, mounts: &[ErofsMount]) -> io::Result<Result<(), MountError>> {
        let mut request: String = mounts
            .iter()
            .flat_map(|mount| [&mount.image, &mount.device, &mount.target])
            .map(|path| format!("{}\n", path.display()))
            .collect();
        request.push('\n');
        self.input.write_all(request.as_bytes())?;
        let mut answer = String::new();
        if self.output.read_line(&mut answer)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended without an answer"));
        }
        match answer.trim_end() {
            DONE => Ok(Ok(())),
            text => Ok(Err(MountError::Helper(text.to_owned()))),
        }
    }
}

/// Waits until no mount process of an earlier daemon is left. The FUSE mount must be served meanwhile.
pub fn settle(lock: &Path) -> Result<(), MountError> {
    let file = open_lock(lock).map_err(MountError::io(lock))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|errno| MountError::Io { path: lock.to_owned(), source: errno.into() })
}

/// The body of the mount process. A request has three lines a mount (image, device, target) and an empty line at its end; the answer
/// is one line. Ends when the daemon is gone, or nothing came for some seconds.
pub fn serve() -> io::Result<()> {
    let (input, mut output) = (io::stdin(), io::stdout());
    let mut lines = BufReader::new(input.as_fd().try_clone_to_owned().map(File::from)?).lines();
    loop {
        // Between two requests nothing is buffered: the daemon waits for the answer.
        let mut waiting = [PollFd::new(&input, PollFlags::IN)];
        if poll(&mut waiting, Some(&IDLE))? == 0 {
            return Ok(());
        }
        let mut request = Vec::new();
        loop {
            match lines.next() {
                Some(line) => match line? {
                    line if line.is_empty() => break,
                    line => request.push(line),
                },
                // A request that was cut off is none.
                None => return Ok(()),
            }
        }
        let answer = match mount_all(&request) {
            Ok(()) => DONE.to_owned(),
            Err(error) => error.to_string().replace('\n', " "),
        };
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
}

fn mount_all(request: &[String]) -> Result<(), MountError> {
    for mount in request.chunks_exact(3) {
        let mount = ErofsMount { image: (&mount[0]).into(), device: (&mount[1]).into(), target: (&mount[2]).into() };
        // Done by a process that was killed before it could say so.
        if !is_mount_point(&mount.target).map_err(MountError::io(&mount.target))? {
            mount.mount()?;
        }
    }
    Ok(())
}

fn is_mount_point(path: &Path) -> io::Result<bool> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(rustix::fs::CWD, path, flags, StatxFlags::empty())?;
    Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn open_lock(path: &Path) -> io::Result<File> {
    File::options().create(true).truncate(false).write(true).open(path)
}
