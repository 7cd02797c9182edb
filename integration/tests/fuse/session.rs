//! The session alone, in this process.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use lab::pattern;
use lab::reader::Reader;
use nix::sys::signal::Signal;
use snapshotter::fuse::{
    DeviceAttributes, DeviceMount, Devices, Failure, NodeId, ParkedReply, Reply, SessionHandle, SessionOptions, mount,
    session,
};

use super::conditions::{can_mount, eventually, sh};

const DEVICE_SIZE: u64 = 1 << 40;

#[test]
fn bytes_names_and_attributes_are_served() {
    let Some(mounted) = Mounted::new() else { return };
    let path = mounted.path("7");
    let outcome = Reader::start(&path, 7, &["--count", "50", "--threads", "3", "--length", "300000"]).finish();
    outcome.is_clean(150);
    // The tail, whose last page reaches past the end.
    let tail = sh(&format!("stat -c '%s %a %F' {0}; tail -c 5 {0} | od -An -tx1", path.display()));
    let mut wanted = [0; 5];
    pattern::fill(7, DEVICE_SIZE - 5, &mut wanted);
    let hex: String = wanted.iter().map(|byte| format!(" {byte:02x}")).collect();
    assert_eq!(tail, format!("{DEVICE_SIZE} 400 regular file\n{hex}\n"));
    assert_eq!(sh(&format!("ls {}", mounted.mount_point.display())), "7\n8\n9\n");
    let refused =
        sh(&format!("cat {0}/x 2>&1; touch {0}/y 2>&1; echo > {0}/7 2>&1; true", mounted.mount_point.display()));
    assert_eq!(refused.matches("No such file").count(), 1, "{refused}");
    assert_eq!(refused.matches("Read-only file system").count(), 2, "{refused}");
    let Mounted { session, .. } = &mounted;
    assert_eq!(session.parked(), 0);
    assert_eq!(mount::unmount(&mounted.mount_point).unwrap(), mount::Unmounted::Clean);
    assert_eq!(session.wait(), session::Ended::Unmounted);
}

#[test]
fn a_thousand_stalled_reads_do_not_delay_another_device() {
    let Some(mounted) = Mounted::new() else { return };
    let measure = || {
        let outcome =
            Reader::start(&mounted.path("7"), 7, &["--count", "3000", "--forget", "--length", "4096"]).finish();
        outcome.is_clean(3000);
        outcome
    };
    let before = measure();
    let stalled = Reader::start(&mounted.path("8"), 8, &["--threads", "1000"]);
    eventually("a thousand requests are parked", || mounted.session.parked() >= 1000);
    let during = measure();
    assert!(mounted.session.parked() >= 1000);
    println!(
        "reads of a healthy device, µs: p50 {} and p99 {} alone, p50 {} and p99 {} beside 1000 stalled reads",
        before.p50, before.p99, during.p50, during.p99
    );
    // Generous, as other tests run beside this one on a machine that may be slow: a shared queue would make it many seconds.
    assert!(during.p50 <= before.p50 * 5 + 250_000, "{} against {} µs", during.p50, before.p50);
    assert!(during.p99 <= before.p99 * 10 + 1_000_000, "{} against {} µs", during.p99, before.p99);
    mounted.devices.answer_parked(8);
    mounted.devices.stall(8, false);
    stalled.finish().is_clean(1000);
    eventually("no request is parked", || mounted.session.parked() == 0);
}

#[test]
fn sigkill_ends_a_waiting_reader_at_once() {
    let Some(mounted) = Mounted::new() else { return };
    // Nobody answers the device meanwhile, so that nothing else ends a reader.
    // Directly, through the page cache, and in the read with which the kernel retries after its readahead failed.
    let cases = [("direct", Some("--direct"), 0), ("cached", None, 0), ("retried", None, 1)];
    for (turn, (how, direct, fail_first)) in cases.into_iter().enumerate() {
        let arguments = |first: usize| -> Vec<String> {
            direct.map(String::from).into_iter().chain([format!("--first={first}")]).collect()
        };
        mounted.devices.fail_next(8, fail_first);
        let mut reader = Reader::start(&mounted.path("8"), 8, &arguments(2 * turn));
        eventually("the read is parked", || mounted.session.parked() > 0 && mounted.devices.failures_left(8) == 0);
        // A handled signal first: it must neither fail the read nor hide the SIGKILL that follows.
        reader.signal(Signal::SIGUSR1);
        thread::sleep(Duration::from_millis(50));
        assert!(!reader.has_ended(), "{how}: SIGUSR1 ended the read");
        let began = Instant::now();
        reader.signal(Signal::SIGKILL);
        eventually("the reader is gone", || reader.has_ended());
        println!("{how}: gone {:?} after SIGKILL that followed a harmless signal", began.elapsed());
        mounted.devices.answer_parked(8);

        mounted.devices.fail_next(8, fail_first);
        let mut reader = Reader::start(&mounted.path("8"), 8, &arguments(2 * turn + 1));
        eventually("the read is parked", || mounted.session.parked() > 0 && mounted.devices.failures_left(8) == 0);
        let began = Instant::now();
        reader.signal(Signal::SIGKILL);
        eventually("the reader is gone", || reader.has_ended());
        println!("{how}: gone {:?} after SIGKILL", began.elapsed());
        mounted.devices.answer_parked(8);
    }
    let cancelled = mounted.devices.cancelled(8);
    assert!(cancelled >= 2, "the direct and the retried reads were cancelled, hooks ran {cancelled} times");
}

#[test]
fn a_handled_signal_does_not_fail_a_read() {
    let Some(mounted) = Mounted::new() else { return };
    for arguments in [["--direct", "--first=0"], ["--length=4096", "--first=1"]] {
        mounted.devices.stall(8, true);
        let reader = Reader::start(&mounted.path("8"), 8, &arguments);
        eventually("the read is parked", || mounted.session.parked() > 0);
        for _ in 0..5 {
            reader.signal(Signal::SIGUSR1);
            thread::sleep(Duration::from_millis(20));
        }
        assert!(mounted.session.parked() > 0);
        mounted.devices.stall(8, false);
        mounted.devices.answer_parked(8);
        reader.finish().is_clean(1);
    }
}

#[test]
fn an_unanswered_request_fails_instead_of_hanging() {
    let Some(mounted) = Mounted::new() else { return };
    let reader = Reader::start(&mounted.path("9"), 9, &["--direct"]);
    let outcome = reader.finish();
    assert_eq!(outcome.failed.len(), 1, "{outcome:?}");
}

/// Devices 7 (answers), 8 (can stall or fail) and 9 (drops or panics).
#[derive(Default)]
struct TestDevices {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    answering: bool,
    parked: Vec<(u64, u32, Arc<ParkedReply>)>,
    fail_next: HashMap<u64, u32>,
    cancelled: Arc<Mutex<u32>>,
}

impl TestDevices {
    fn stall(&self, _number: u64, stall: bool) {
        self.state.lock().unwrap().answering = !stall;
    }

    fn fail_next(&self, number: u64, count: u32) {
        self.state.lock().unwrap().fail_next.insert(number, count);
    }

    fn failures_left(&self, number: u64) -> u32 {
        self.state.lock().unwrap().fail_next.get(&number).copied().unwrap_or(0)
    }

    fn cancelled(&self, _number: u64) -> u32 {
        *self.state.lock().unwrap().cancelled.lock().unwrap()
    }

    fn answer_parked(&self, number: u64) {
        let parked = std::mem::take(&mut self.state.lock().unwrap().parked);
        for (offset, size, reply) in parked {
            let mut bytes = vec![0; size as usize];
            pattern::fill(number, offset, &mut bytes);
            Arc::into_inner(reply).unwrap().bytes(&bytes);
        }
    }
}

fn number(node: NodeId) -> Option<u64> {
    node.layer().filter(|number| (7..=9).contains(number))
}

struct Shared(Arc<TestDevices>);

impl Devices for Shared {
    fn lookup(&self, name: &OsStr) -> Option<DeviceAttributes> {
        self.attributes(NodeId::of_layer(name.to_str()?.parse().ok()?)?)
    }

    fn attributes(&self, node: NodeId) -> Option<DeviceAttributes> {
        number(node).map(|_| DeviceAttributes { node, size: DEVICE_SIZE })
    }

    fn list(&self) -> Vec<(OsString, NodeId)> {
        (7..=9).map(|number| (number.to_string().into(), NodeId::of_layer(number).unwrap())).collect()
    }

    fn read(&self, node: NodeId, offset: u64, size: u32, reply: Reply) {
        let number = number(node).unwrap();
        if number == 9 {
            assert!(size != 4096, "a request of 4096 bytes panics here");
            return;
        }
        let mut bytes = vec![0; size as usize];
        pattern::fill(number, offset, &mut bytes);
        let mut state = self.0.state.lock().unwrap();
        if number == 8 && !state.answering {
            if let Some(count) = state.fail_next.get_mut(&8).filter(|count| **count > 0) {
                *count -= 1;
                return reply.failure(Failure::Failed);
            }
            let parked = Arc::new(reply.park());
            let cancelled = state.cancelled.clone();
            parked.on_cancel(move || *cancelled.lock().unwrap() += 1);
            state.parked.push((offset, size, parked));
            return;
        }
        let (left, right) = bytes.split_at(bytes.len() / 3);
        reply.slices(&[left, right]);
    }
}

/// A mount with a session in this process; unmounted on drop.
struct Mounted {
    mount_point: PathBuf,
    devices: Arc<TestDevices>,
    session: SessionHandle,
    _directory: tempfile::TempDir,
}

impl Mounted {
    fn new() -> Option<Mounted> {
        if !can_mount() {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let mount_point = directory.path().join("mnt");
        std::fs::create_dir(&mount_point).unwrap();
        let devices = Arc::new(TestDevices::default());
        let fd = mount::mount(&mount_point).unwrap();
        let handler = Arc::new(DeviceMount(Shared(devices.clone())));
        let session = session::run(fd, handler, SessionOptions::default()).unwrap();
        Some(Mounted { mount_point, devices, session, _directory: directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.mount_point.join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Answers whoever still waits, so that nothing keeps the mount.
        self.devices.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).parked.clear();
        let _ = mount::unmount(&self.mount_point);
    }
}
