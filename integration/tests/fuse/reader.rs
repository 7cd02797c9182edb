//! Processes that read, and small things for all tests.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read as _},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde::Deserialize;

/// Whether the test can run; says why if not.
pub(crate) fn can_mount() -> bool {
    let can = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !can {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    can
}

/// A reading process; killed on drop.
pub(crate) struct Reader {
    pub(crate) child: Child,
    lines: BufReader<ChildStdout>,
}

/// What a reader saw.
#[derive(Debug, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) reads: u64,
    pub(crate) failed: Vec<String>,
    pub(crate) wrong: Vec<u64>,
    /// Microseconds.
    pub(crate) p50: u128,
    /// Microseconds.
    pub(crate) p99: u128,
    /// Milliseconds of the reads that took 10 or more.
    pub(crate) stalls: Vec<u128>,
}

impl Outcome {
    pub(crate) fn is_clean(&self, reads: u64) {
        assert!(self.failed.is_empty() && self.wrong.is_empty() && self.reads == reads, "{self:?}");
    }
}

impl Reader {
    /// Returns when the file is open.
    pub(crate) fn start(path: &Path, number: u64, arguments: &[impl AsRef<OsStr>]) -> Reader {
        let mut child = Command::new(env!("CARGO_BIN_EXE_fuse_fixture"))
            .arg("read")
            .arg(path)
            .args(["--number", &number.to_string(), "--span", &(1u64 << 38).to_string()])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        let reader = Reader { child, lines };
        assert_eq!(line, "started\n");
        reader
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    pub(crate) fn finish(mut self) -> Outcome {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).unwrap();
        serde_json::from_str(&rest).unwrap_or_else(|error| panic!("{error} in {rest:?}"))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // Not waited for without end: a test that fails may leave it in the kernel until the mount is gone.
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Output of a shell script, which gets 60 s.
pub(crate) fn sh(script: &str) -> String {
    let output = Command::new("timeout").args(["60", "sh", "-c", script]).output().unwrap();
    String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap()
}

/// Waits for a condition, a minute at most.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "not within 60 s: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}
