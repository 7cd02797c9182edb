//! Keeper and daemon survive each other.

use std::{
    ffi::CString,
    fs,
    io::{IoSliceMut, Read as _},
    mem::MaybeUninit,
    os::{
        fd::OwnedFd,
        unix::net::{UnixDatagram, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use lab::reader::Reader;
use layer::{
    entry::{Entry, Kind, Mtime},
    erofs::{ImageOptions, Stack, write_image},
    tree::Tree,
};
use nix::sys::signal::{Signal, kill};
use rustix::{
    mount::{MountFlags, UnmountFlags},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags},
};
use snapshotter::{
    fuse::mount,
    keeper::{Status, status},
};

use super::conditions::{can_mount, eventually};

const FIXTURE: &str = env!("CARGO_BIN_EXE_fuse_fixture");

const DEVICE_SIZE: u64 = 1 << 38;
const FILE_SIZE: u64 = 8 << 30;

/// Kills of each, daemon and keeper; `DROVER_KILLS` says how many.
fn kills() -> u32 {
    std::env::var("DROVER_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(15)
}

#[test]
fn readers_survive_kills_of_daemon_and_keeper() {
    let Some(mut fixture) = Fixture::start() else { return };
    let erofs = fixture.mount_erofs();
    let forever = ["--count=0", "--length=20480"];
    let readers = [
        Reader::start(&fixture.device(1), 1, &[&forever[..], &["--direct", "--threads=2"]].concat()),
        Reader::start(&fixture.device(2), 2, &[&forever[..], &["--forget", "--first=5"]].concat()),
        Reader::start(&erofs.join("directory/big"), 7, &[&forever[..], &["--span=8589934592", "--threads=2"]].concat()),
    ];
    let mut pauses = Vec::new();
    for turn in 0..2 * kills() {
        let before = fixture.settled();
        let began = Instant::now();
        if turn % 2 == 0 {
            fixture.kill(before.daemon.unwrap());
            // Who connects meanwhile is served by the next daemon.
            eventually("the next daemon answers", || fixture.ask_service() != before.daemon.unwrap());
        } else {
            fixture.kill(before.keeper);
            eventually("there is another keeper", || fixture.status().is_some_and(|now| now.keeper != before.keeper));
        }
        pauses.push(began.elapsed());
        if turn % 2 == 1 {
            assert_eq!(fixture.settled().daemon, before.daemon);
        }
    }
    let (mut reads, mut stalls) = (0, Vec::new());
    for reader in readers {
        let outcome = reader.finish();
        assert!(outcome.failed.is_empty() && outcome.wrong.is_empty(), "{outcome:?}");
        assert!(outcome.reads > 100, "{outcome:?}");
        reads += outcome.reads;
        stalls.extend(outcome.stalls);
    }
    pauses.sort_unstable();
    stalls.sort_unstable();
    let at = |share: f64| stalls.get(((stalls.len().max(1) - 1) as f64 * share) as usize).copied().unwrap_or(0);
    println!(
        "{} kills each, {reads} reads, none failed, none wrong; {} reads of 10 ms or more: p50 {} ms, p99 {} ms, max {} \
         ms; restart p50 {:?}, max {:?}",
        kills(),
        stalls.len(),
        at(0.5),
        at(0.99),
        at(1.0),
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1],
    );
    fixture.stop();
}

#[test]
fn the_first_daemon_may_die_before_it_has_answered() {
    if !can_mount() {
        return;
    }
    for _ in 0..5 {
        let mut fixture = Fixture::spawn();
        // As early as it can be seen.
        let deadline = Instant::now() + Duration::from_secs(60);
        let daemon = loop {
            match fixture.status().and_then(|status| status.daemon) {
                Some(daemon) => break daemon,
                None => assert!(Instant::now() < deadline, "no daemon"),
            }
        };
        fixture.kill(daemon);
        fixture.settled();
        Reader::start(&fixture.device(3), 3, &["--count=5"]).finish().is_clean(5);
        fixture.stop();
    }
}

#[test]
fn a_new_binary_is_loaded_without_losing_a_read() {
    let Some(mut fixture) = Fixture::start() else { return };
    let reader = Reader::start(&fixture.device(1), 1, &["--count=0", "--direct", "--threads=4", "--length=20480"]);
    for _ in 0..5 {
        let before = fixture.settled();
        kill(pid(before.keeper), Signal::SIGHUP).unwrap();
        eventually("there is another daemon", || fixture.status().is_some_and(|now| now.daemon != before.daemon));
        let after = fixture.settled();
        assert_eq!(after.keeper, before.keeper);
        assert!(after.attended);
    }
    let outcome = reader.finish();
    assert!(outcome.failed.is_empty() && outcome.wrong.is_empty() && outcome.reads > 100, "{outcome:?}");
    fixture.stop();
}

/// What cannot be executed, and what can and is something else.
#[test]
fn a_binary_that_is_none_changes_nothing() {
    if !can_mount() {
        return;
    }
    let mut fixture = Fixture::of_its_own(&[]);
    fixture.serve();
    let before = fixture.settled();
    let reader = Reader::start(&fixture.device(1), 1, &["--count=0", "--direct", "--threads=4", "--length=20480"]);
    let program = fixture.program.clone();
    let put = |from: &Path| {
        let new = program.with_extension("new");
        copy(from, &new);
        fs::rename(&new, &program).unwrap();
    };
    let garbage = fixture.directory().join("garbage");
    fs::write(&garbage, b"\0no program\n").unwrap();

    put(&garbage);
    kill(pid(before.keeper), Signal::SIGHUP).unwrap();
    eventually("it is said", || fixture.log().contains("cannot load the binary again: everything stays as it is"));
    assert_eq!(fixture.settled(), before);

    // It ends at once: the daemon's own binary keeps it from then on.
    put(Path::new("/bin/false"));
    kill(pid(before.keeper), Signal::SIGHUP).unwrap();
    eventually("there is another keeper", || fixture.status().is_some_and(|now| now.keeper != before.keeper));
    let orphan = fixture.settled();
    assert_eq!((orphan.daemon, orphan.attended), (before.daemon, false));

    put(Path::new(FIXTURE));
    kill(pid(orphan.keeper), Signal::SIGHUP).unwrap();
    eventually("there is another daemon", || fixture.status().is_some_and(|now| now.daemon != before.daemon));
    fixture.settled();
    let outcome = reader.finish();
    assert!(outcome.failed.is_empty() && outcome.wrong.is_empty() && outcome.reads > 100, "{outcome:?}");
    fixture.stop();
}

/// As on kernels before 6.9: what the dead daemon had read is not answered any more, and nothing else suffers.
#[test]
fn without_resend_a_read_under_way_hangs_until_it_is_killed() {
    if !can_mount() {
        return;
    }
    let mut fixture = Fixture::of_its_own(&[("DROVER_NO_RESEND", "1")]);
    fixture.serve();
    let before = fixture.settled();
    let mut hanging = Reader::start(&fixture.device(9), 9, &["--count=1", "--direct", "--length=4096"]);
    // It sleeps in its read, and a later read was answered: the daemon has it.
    let stat = format!("/proc/{}/stat", hanging.pid());
    let sleeps = || fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") S ") || stat.contains(") D "));
    eventually("it reads", || (0..20).all(|_| sleeps()));
    Reader::start(&fixture.device(1), 1, &["--count=20", "--direct", "--length=4096"]).finish().is_clean(20);
    fixture.kill(before.daemon.unwrap());
    fixture.settled();
    eventually("it is said", || fixture.log().contains("cannot send requests again"));
    Reader::start(&fixture.device(1), 1, &["--count=200", "--direct", "--threads=4"]).finish().is_clean(800);
    assert!(!hanging.has_ended());
    hanging.signal(Signal::SIGKILL);
    eventually("it is dead", || hanging.has_ended());
    Reader::start(&fixture.device(2), 2, &["--count=20", "--direct"]).finish().is_clean(20);
    fixture.stop();
}

#[test]
fn serve_refuses_beside_a_keeper_and_takes_over_from_an_orphan() {
    let Some(mut fixture) = Fixture::start() else { return };
    let before = fixture.settled();
    let second = fixture.command("serve").stderr(Stdio::piped()).output().unwrap();
    let message = String::from_utf8(second.stderr).unwrap();
    assert!(!second.status.success() && message.contains("already serves"), "{message}");
    assert_eq!(fixture.settled(), before);

    let reader = Reader::start(&fixture.device(1), 1, &["--count=0", "--direct", "--length=20480"]);
    fixture.kill(before.keeper);
    let mut third = fixture.command("serve").spawn().unwrap();
    eventually("the new keeper has taken over", || {
        fixture.status().is_some_and(|now| now.keeper == third.id() && now.ready)
    });
    let after = fixture.settled();
    assert!(after.attended);
    assert_eq!(after.daemon, before.daemon);
    eventually("the orphan is gone", || fixture.processes().len() == 2);
    fixture.kill(after.daemon.unwrap());
    assert_eq!(fixture.settled().keeper, third.id());
    let outcome = reader.finish();
    assert!(outcome.failed.is_empty() && outcome.wrong.is_empty(), "{outcome:?}");
    fixture.stop();
    assert!(third.wait().unwrap().success());
}

#[test]
fn stop_leaves_no_mount_and_no_process() {
    let Some(mut fixture) = Fixture::start() else { return };
    let erofs = fixture.mount_erofs();
    let mut stalled = Reader::start(&erofs.join("directory/big"), 7, &["--count=0", "--span=8589934592"]);
    fixture.stop();
    // Its layer is lost, and it sees that as errors, not as a hang.
    stalled.stop();
    assert!(!stalled.finish().failed.is_empty());
}

#[test]
fn a_mount_that_was_left_is_replaced() {
    let Some(mut fixture) = Fixture::start() else { return };
    let status = fixture.settled();
    // Both in one instant: nobody is left.
    kill(pid(status.keeper), Signal::SIGSTOP).unwrap();
    fixture.kill(status.daemon.unwrap());
    fixture.kill(status.keeper);
    eventually("both are gone", || fixture.processes().is_empty());
    assert!(mount::find(&fixture.directory().join("devices")).unwrap().is_some());
    fixture.serve();
    fixture.settled();
    Reader::start(&fixture.device(3), 3, &["--count=5"]).finish().is_clean(5);
    fixture.stop();
}

#[test]
fn a_service_manager_carries_readers_over_a_stop_and_over_the_death_of_both() {
    if !can_mount() {
        return;
    }
    let mut fixture = Fixture::new();
    let manager = Manager::new(fixture.directory());
    let mut command = fixture.command("serve");
    fixture.served.push(command.env("NOTIFY_SOCKET", &manager.path).spawn().unwrap());
    fixture.settled();
    let (fuse, listener) = manager.stored();
    let reader = Reader::start(&fixture.device(1), 1, &["--count=0", "--direct", "--threads=3", "--length=20480"]);
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let status = fixture.settled();
        if signal == Signal::SIGKILL {
            kill(pid(status.keeper), Signal::SIGSTOP).unwrap();
            fixture.kill(status.daemon.unwrap());
            fixture.kill(status.keeper);
        } else {
            kill(pid(status.keeper), signal).unwrap();
        }
        eventually("all processes are gone", || fixture.processes().is_empty());
        assert!(mount::find(&fixture.directory().join("devices")).unwrap().is_some());
        // What the manager does: descriptors from 3 on, with names, for this very process.
        let script = "exec 3<&0 4>&1 </dev/null >&2; LISTEN_PID=$$ exec \"$0\" serve \"$1\"";
        let mut command = Command::new("sh");
        command
            .args(["-c", script, env!("CARGO_BIN_EXE_fuse_fixture")])
            .arg(fixture.directory())
            .envs([("LISTEN_FDS", "2"), ("LISTEN_FDNAMES", "drover-fuse:drover-listener")])
            .env("NOTIFY_SOCKET", &manager.path)
            .stdin(fuse.try_clone().unwrap())
            .stdout(listener.try_clone().unwrap());
        fixture.served.push(command.spawn().unwrap());
        fixture.settled();
        assert!(fixture.ask_service() > 0);
    }
    let outcome = reader.finish();
    assert!(outcome.failed.is_empty() && outcome.wrong.is_empty() && outcome.reads > 100, "{outcome:?}");
}

#[test]
fn a_lost_connection_is_mounted_anew() {
    let Some(mut fixture) = Fixture::start() else { return };
    for _ in 0..2 {
        let before = fixture.settled();
        rustix::mount::unmount(fixture.directory().join("devices"), UnmountFlags::empty()).unwrap();
        eventually("there is another daemon", || fixture.status().is_some_and(|now| now.daemon != before.daemon));
        let after = fixture.settled();
        assert_eq!((after.keeper, after.generation), (before.keeper, 1));
        Reader::start(&fixture.device(3), 3, &["--count=5"]).finish().is_clean(5);
    }
    fixture.stop();
}

#[test]
fn the_keeper_is_small() {
    let Some(mut fixture) = Fixture::start() else { return };
    let status = fixture.settled();
    let of = |process: u32, key: &str| {
        let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    println!(
        "keeper: {} KiB resident, of which {} KiB its own; {} thread",
        of(status.keeper, "VmRSS"),
        of(status.keeper, "RssAnon"),
        of(status.keeper, "Threads")
    );
    assert_eq!(of(status.keeper, "Threads"), 1);
    assert!(of(status.keeper, "RssAnon") < 1024);
    fixture.stop();
}

/// Makes a program of a file. Not by this process: programs that other tests start meanwhile would have the file open for writing,
/// and then it cannot be executed.
fn copy(from: &Path, to: &Path) {
    assert!(Command::new("install").args(["-m", "755"]).arg(from).arg(to).status().unwrap().success());
}

/// A snapshotter in miniature under a directory of its own; killed and unmounted on drop.
struct Fixture {
    directory: tempfile::TempDir,
    program: PathBuf,
    environment: Vec<(&'static str, &'static str)>,
    /// Its log goes to a file.
    is_logged: bool,
    served: Vec<Child>,
}

impl Fixture {
    /// One that serves.
    fn start() -> Option<Fixture> {
        if !can_mount() {
            return None;
        }
        let fixture = Fixture::spawn();
        fixture.settled();
        Some(fixture)
    }

    fn spawn() -> Fixture {
        let mut fixture = Fixture::new();
        fixture.serve();
        fixture
    }

    fn new() -> Fixture {
        let directory = tempfile::Builder::new().prefix("drover-fuse").tempdir().unwrap();
        let program = FIXTURE.into();
        Fixture { directory, program, environment: Vec::new(), is_logged: false, served: Vec::new() }
    }

    /// One with a binary of its own, and a log that can be read.
    fn of_its_own(environment: &[(&'static str, &'static str)]) -> Fixture {
        let mut fixture = Fixture::new();
        let program = fixture.directory().join("fixture");
        copy(&fixture.program, &program);
        (fixture.program, fixture.environment, fixture.is_logged) = (program, environment.to_vec(), true);
        fixture
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory().join("log")).unwrap_or_default()
    }

    fn serve(&mut self) {
        let child = self.command("serve").spawn().unwrap();
        self.served.push(child);
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(name).arg(self.directory.path()).env_remove("NOTIFY_SOCKET").stdin(Stdio::null());
        command.envs(self.environment.iter().copied());
        if self.is_logged {
            let log = fs::File::options().create(true).append(true).open(self.directory().join("log")).unwrap();
            command.stderr(log);
        }
        command
    }

    fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn device(&self, number: u64) -> PathBuf {
        self.directory().join("devices").join(number.to_string())
    }

    fn status(&self) -> Option<Status> {
        status(&self.directory().join("run")).ok()
    }

    /// The state when all is well.
    fn settled(&self) -> Status {
        let mut settled = None;
        eventually("keeper and daemon are well", || {
            settled = self.status().filter(|status| status.ready);
            settled.is_some()
        });
        // Longer than a daemon must have served to be started again without a pause.
        thread::sleep(Duration::from_millis(300));
        settled.unwrap()
    }

    fn kill(&mut self, process: u32) {
        kill(pid(process), Signal::SIGKILL).unwrap();
        for child in &mut self.served {
            if child.id() == process {
                child.wait().unwrap();
            }
        }
    }

    /// The process id that answers on the service's socket. A daemon may die between accepting and answering, but nobody
    /// is turned away.
    fn ask_service(&self) -> u32 {
        loop {
            let mut socket = UnixStream::connect(self.directory().join("service.sock")).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let mut answer = String::new();
            if socket.read_to_string(&mut answer).is_ok_and(|length| length > 0) {
                return answer.trim().parse().unwrap();
            }
        }
    }

    /// Mounts an EROFS image with one file, `directory/big`, over device 7.
    fn mount_erofs(&self) -> PathBuf {
        let directory = |path: &str| entry(path, Kind::Directory { opaque: false });
        let big = entry("directory/big", Kind::Regular { offset: 0, size: FILE_SIZE });
        let tree = Tree::validate(vec![directory(""), directory("directory"), big], DEVICE_SIZE).unwrap();
        let mut image = Vec::new();
        let options = ImageOptions { device_size: DEVICE_SIZE, bottom: true, uuid: [7; 16] };
        write_image(&tree, &options, &Stack::new(&[]), &mut image).unwrap();
        let source = self.directory().join("image.erofs");
        fs::write(&source, image).unwrap();
        let target = self.directory().join("erofs");
        fs::create_dir(&target).unwrap();
        let options = CString::new(format!("device={}", self.device(7).display())).unwrap();
        rustix::mount::mount(&source, &target, "erofs", MountFlags::RDONLY, Some(options.as_c_str())).unwrap();
        target
    }

    /// All processes of this fixture but readers.
    fn processes(&mut self) -> Vec<u32> {
        for child in &mut self.served {
            let _ = child.try_wait();
        }
        let mine = self.directory().to_str().unwrap();
        let command_line = |process: &u32| fs::read_to_string(format!("/proc/{process}/cmdline")).unwrap_or_default();
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|process| command_line(process).split('\0').any(|word| word == mine))
            .collect()
    }

    /// An orderly stop, and what must be left of it.
    fn stop(&mut self) {
        let status = self.settled();
        kill(pid(status.keeper), Signal::SIGTERM).unwrap();
        eventually("all processes are gone", || self.processes().is_empty());
        assert_eq!(mount::find(&self.directory().join("devices")).unwrap(), None);
        assert!(!self.directory().join("service.sock").exists());
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        // They start each other again, so until none is left.
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            let processes = self.processes();
            if processes.is_empty() {
                break;
            }
            for process in processes {
                let _ = kill(pid(process), Signal::SIGKILL);
            }
        }
        let _ = rustix::mount::unmount(self.directory().join("erofs"), UnmountFlags::DETACH);
        let _ = mount::unmount(&self.directory().join("devices"));
    }
}

/// As much of a service manager as keeps descriptors.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(directory: &Path) -> Manager {
        let path = directory.join("notify.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Manager { socket, path }
    }

    /// FUSE connection and listening socket, when readiness is told.
    fn stored(&self) -> (OwnedFd, OwnedFd) {
        let (mut fuse, mut listener) = (None, None);
        loop {
            let mut bytes = [0; 512];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let message = rustix::net::recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )
            .unwrap();
            let text = std::str::from_utf8(&bytes[..message.bytes]).unwrap();
            let fd = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            if text.contains("FDNAME=drover-fuse") {
                fuse = fd;
            } else if text.contains("FDNAME=drover-listener") {
                listener = fd;
            } else if text.contains("READY=1") {
                return (fuse.unwrap(), listener.unwrap());
            }
        }
    }
}

fn entry(path: &str, kind: Kind) -> Entry {
    Entry { path: path.into(), kind, mode: 0o755, uid: 0, gid: 0, mtime: Mtime::default(), xattrs: Vec::new() }
}

fn pid(process: u32) -> nix::unistd::Pid {
    nix::unistd::Pid::from_raw(i32::try_from(process).unwrap())
}
