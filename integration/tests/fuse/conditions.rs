//! Small things for all tests.

use std::{
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// Whether the test can run; says why if not.
pub(crate) fn can_mount() -> bool {
    let can = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !can {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    can
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
