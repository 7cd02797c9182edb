//! Processes that read a file and compare every byte with its pattern (`fuse_fixture read`).
//!
//! Always a process of its own: one that sleeps in a read of a file system which it serves itself cannot even be killed.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;

use crate::tools::profile_folder;

/// A reading process; killed on drop.
#[derive(Debug)]
pub struct Reader {
    child: Child,
    lines: BufReader<ChildStdout>,
}

/// What a reader saw.
#[derive(Debug, Deserialize)]
pub struct Outcome {
    /// How many reads there were.
    pub reads: u64,
    /// Offset and error of those that failed.
    pub failed: Vec<String>,
    /// Offsets of wrong bytes.
    pub wrong: Vec<u64>,
    /// Microseconds of the median read.
    pub p50: u128,
    /// Microseconds that one read of a hundred took at least.
    pub p99: u128,
    /// Milliseconds of the reads that took 10 or more.
    pub stalls: Vec<u128>,
    /// When those began, in milliseconds since 1970, and how many they took; in the order of their beginnings.
    pub slow: Vec<(u64, u64)>,
}

impl Outcome {
    /// Fails unless there were so many reads and each gave the right bytes.
    ///
    /// # Panics
    /// That is how it fails.
    pub fn is_clean(&self, reads: u64) {
        assert!(self.failed.is_empty() && self.wrong.is_empty() && self.reads == reads, "{self:?}");
    }
}

impl Reader {
    /// Reads `path`, which has the pattern of `number`, as the fixture's `arguments` say. Returns when the file is open.
    ///
    /// # Panics
    /// When there is no such file.
    pub fn start(path: &Path, number: u64, arguments: &[impl AsRef<OsStr>]) -> Self {
        let program = profile_folder().expect("a test program has a folder").join("fuse_fixture");
        let mut child = Command::new(program)
            .arg("read")
            .arg(path)
            .args(["--number", &number.to_string(), "--span", &(1u64 << 38).to_string()])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the fixture starts");
        let mut lines = BufReader::new(child.stdout.take().expect("its output is piped"));
        let mut line = String::new();
        lines.read_line(&mut line).expect("it prints text");
        let reader = Self { child, lines };
        assert_eq!(line, "started\n");
        reader
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("it is there");
    }

    /// Lets it end after its current read.
    pub fn stop(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Stops it and waits for what it saw.
    ///
    /// # Panics
    /// When it ended without saying so.
    pub fn finish(mut self) -> Outcome {
        self.stop();
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).expect("it prints text");
        serde_json::from_str(&rest).unwrap_or_else(|error| panic!("{error} in {rest:?}"))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // Not waited for without end: a test that fails may leave it in the kernel until the mount is gone.
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
