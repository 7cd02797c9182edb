//! The keeper itself: one thread that waits.

use std::{
    ffi::{CString, OsString},
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{DirBuilderExt, FileTypeExt, PermissionsExt},
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::{
    signal::{SigSet, Signal as NixSignal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, OFlags},
    io::Errno,
    process::{DumpableBehavior, Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
};
use sd_notify::NotifyState;

use super::{
    KeeperError, KeeperOptions, Status,
    control::{self, ControlSocket, Question},
    estate::{Estate, Process, pair, receive},
    manager,
};
use crate::{
    fuse::mount::{self, Unmounted},
    sys,
};

/// What the daemon says when it serves.
pub(super) const READY: &str = "ready";

/// Pauses before the daemon is started again, where many in a row failed: each twice the last, from the shortest to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// A daemon that served this long did not fail at its start.
const SERVED_LONG: Duration = Duration::from_millis(250);
/// After so many in a row that failed the next one is still started at once: what kills one daemon may kill a few, and all wait
/// for the next.
const AT_ONCE: u32 = 4;
/// How long `serve` waits for the keeper of a living daemon, which may be just being started.
const KEEPER_PATIENCE: Duration = Duration::from_secs(5);

/// Runs the keeper: the command `serve`. Returns after an orderly stop.
///
/// Where a daemon lives whose keeper is an orphan, everything is taken over from it.
pub fn serve(options: &KeeperOptions) -> Result<(), KeeperError> {
    let signals = block_signals()?;
    let estate = match lock(options)? {
        Some(lock) => set_up(options, lock)?,
        None => take_over(options)?,
    };
    Keeper::new(options, Estate { attended: true, ..estate }, signals)?.run()
}

/// Runs a keeper for a daemon that lives: the internal command with which a daemon starts its keeper.
pub fn adopt(options: &KeeperOptions) -> Result<(), KeeperError> {
    let signals = block_signals()?;
    let estate = Estate::inherit().map_err(KeeperError::NotHandedOver)?;
    Keeper::new(options, estate, signals)?.run()
}

/// How this process is called in lists of processes.
pub(super) fn program_name() -> OsString {
    std::env::args_os().next().unwrap_or_else(|| "drover-snapshotter".into())
}

struct Keeper<'a> {
    options: &'a KeeperOptions,
    /// Without link and daemon, which are in `daemon`.
    estate: Estate,
    daemon: Option<Daemon>,
    /// When there shall be a daemon, if there is none.
    start_at: Instant,
    /// How many failed in a row.
    failures: u32,
    signals: SignalFd,
    control: ControlSocket,
}

struct Daemon {
    process: Process,
    /// `None` once the daemon closed it.
    link: Option<OwnedFd>,
    ready_since: Option<Instant>,
    /// It was told to end.
    dismissed: bool,
}

impl Daemon {
    fn new(process: Process, link: Option<OwnedFd>) -> Daemon {
        if let Some(link) = &link {
            // A child that the daemon was just starting may hold its end open: never wait for the end of the link.
            let _ = rustix::fs::fcntl_setfl(link, OFlags::NONBLOCK);
        }
        Daemon { process, link, ready_since: None, dismissed: false }
    }
}

#[derive(Default)]
struct Events {
    signal: bool,
    control: bool,
    link: bool,
    death: bool,
}

enum Next {
    GoOn,
    Stop,
    HandedOver,
}

impl<'a> Keeper<'a> {
    fn new(options: &'a KeeperOptions, mut estate: Estate, signals: SignalFd) -> Result<Self, KeeperError> {
        let _ = rustix::thread::set_name(c"drover-keeper");
        let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
        let control = ControlSocket::bind(&options.control()).map_err(KeeperError::set_up(&options.control()))?;
        let link = estate.link.take();
        let ready_since = std::mem::take(&mut estate.ready).then(Instant::now);
        let daemon = estate.daemon.take().map(|process| Daemon { ready_since, ..Daemon::new(process, link) });
        if ready_since.is_some() {
            manager::tell(&[NotifyState::Ready]);
        }
        manager::tell(&[NotifyState::MainPid(std::process::id())]);
        manager::store(&estate.fuse, &estate.listener);
        let mut keeper = Keeper { options, estate, daemon, start_at: Instant::now(), failures: 0, signals, control };
        if std::mem::take(&mut keeper.estate.reload) {
            keeper.dismiss();
        }
        Ok(keeper)
    }

    fn run(mut self) -> Result<(), KeeperError> {
        loop {
            if self.daemon.is_none() && Instant::now() >= self.start_at {
                self.start();
            }
            if self.is_settled() {
                // Starting touched a program of many megabytes, and waiting needs next to none of it.
                sys::release_program();
            }
            let events = self.wait()?;
            if events.link {
                self.hear();
            }
            if events.death {
                self.bury()?;
            }
            if events.control
                && let Next::HandedOver = self.answer()
            {
                return Ok(());
            }
            if events.signal
                && let Next::Stop = self.signalled()
            {
                return self.stop();
            }
        }
    }

    /// Whether there is a daemon that serves: probably nothing happens for days.
    fn is_settled(&self) -> bool {
        self.daemon.as_ref().is_some_and(|daemon| daemon.ready_since.is_some())
    }

    /// Starts a daemon; a failure is logged and tried again.
    fn start(&mut self) {
        if !mount::is_connected(&self.estate.fuse)
            && let Err(error) = self.mount_again()
        {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot mount");
            return self.start_after_failure();
        }
        self.estate.generation += 1;
        match self.try_start() {
            Ok(daemon) => self.daemon = Some(daemon),
            Err(error) => {
                tracing::error!(%error, "cannot start the daemon");
                self.start_after_failure();
            }
        }
    }

    fn try_start(&self) -> io::Result<Daemon> {
        let (ours, theirs) = pair()?;
        let estate = Estate { link: Some(theirs), ..self.estate.try_clone()? };
        let mut command = Command::new("/proc/self/exe");
        command.arg0(program_name()).args(&self.options.daemon_arguments);
        let child = estate.start(&mut command)?;
        Ok(Daemon::new(Process::open(child.id())?, Some(ours)))
    }

    /// The connection was aborted or unmounted: it cannot come back.
    fn mount_again(&mut self) -> Result<(), KeeperError> {
        tracing::error!(
            "the FUSE connection was aborted or unmounted: containers that use it must be restarted; mounting anew"
        );
        manager::forget_fuse();
        clear_mount(&self.options.mount_point)?;
        self.estate.fuse = mount::mount(&self.options.mount_point)?;
        self.estate.generation = 0;
        manager::store(&self.estate.fuse, &self.estate.listener);
        Ok(())
    }

    fn start_after_failure(&mut self) {
        let pause = match self.failures.checked_sub(AT_ONCE) {
            None => Duration::ZERO,
            Some(more) => (PAUSE_MIN * (1 << more.min(5))).min(PAUSE_MAX),
        };
        self.failures += 1;
        self.start_at = Instant::now() + pause;
    }

    fn wait(&self) -> Result<Events, KeeperError> {
        let link = self.daemon.as_ref().and_then(|daemon| daemon.link.as_ref());
        let mut polled = vec![
            PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.control.as_fd(), PollFlags::IN),
        ];
        if let Some(daemon) = &self.daemon {
            polled.push(PollFd::from_borrowed_fd(daemon.process.pidfd.as_fd(), PollFlags::IN));
        }
        polled.extend(link.map(|link| PollFd::from_borrowed_fd(link.as_fd(), PollFlags::IN)));
        let timeout = match self.daemon {
            Some(_) => None,
            None => Some(
                Timespec::try_from(self.start_at.saturating_duration_since(Instant::now()))
                    .map_err(|error| KeeperError::system("wait")(io::Error::other(error)))?,
            ),
        };
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Events::default()),
            Err(errno) => return Err(KeeperError::system("wait for events")(errno.into())),
        }
        let happened = |index: usize| polled.get(index).is_some_and(|polled| !polled.revents().is_empty());
        Ok(Events { signal: happened(0), control: happened(1), death: happened(2), link: happened(3) })
    }

    fn hear(&mut self) {
        let Some(daemon) = &mut self.daemon else { return };
        let Some(link) = &daemon.link else { return };
        match receive(link) {
            Ok((line, _)) if line == READY => {
                daemon.ready_since.get_or_insert_with(Instant::now);
                self.estate.served = true;
                tracing::info!(daemon = daemon.process.pid, generation = self.estate.generation, "the daemon serves");
                manager::tell(&[NotifyState::Ready, NotifyState::MainPid(std::process::id())]);
            }
            Ok((line, _)) if line.is_empty() => daemon.link = None,
            Ok((line, _)) => tracing::debug!(line, "the daemon says something unknown"),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => daemon.link = None,
        }
    }

    /// The daemon ended: the next one is due.
    fn bury(&mut self) -> Result<(), KeeperError> {
        // It may have said that it was ready just before.
        self.hear();
        let Some(daemon) = self.daemon.take() else { return Ok(()) };
        let status = waitid(WaitId::PidFd(daemon.process.pidfd.as_fd()), WaitIdOptions::EXITED);
        let (exit_code, signal) = match status {
            Ok(Some(status)) => (status.exit_status(), status.terminating_signal()),
            // Not our child: its parent is told how it ended.
            _ => (None, None),
        };
        if let Some(code) = exit_code.filter(|code| *code != 0 && !self.estate.served) {
            manager::forget_fuse();
            self.unmount();
            return Err(KeeperError::Daemon(code));
        }
        if daemon.dismissed {
            tracing::info!(daemon = daemon.process.pid, "the daemon ended as it was told to");
        } else {
            tracing::error!(daemon = daemon.process.pid, ?exit_code, ?signal, "the daemon died: starting another one");
        }
        if daemon.dismissed || daemon.ready_since.is_some_and(|since| since.elapsed() >= SERVED_LONG) {
            (self.start_at, self.failures) = (Instant::now(), 0);
        } else {
            self.start_after_failure();
        }
        Ok(())
    }

    fn answer(&mut self) -> Next {
        match self.control.question() {
            None => Next::GoOn,
            Some(Question::Status(asker)) => {
                asker.answer(&self.status());
                Next::GoOn
            }
            Some(Question::TakeOver(asker)) if self.estate.attended => {
                asker.refuse(&format!("its keeper, process {}, is well", std::process::id()));
                Next::GoOn
            }
            Some(Question::TakeOver(asker)) => match self.whole().and_then(|estate| asker.hand_over(&estate)) {
                Ok(()) => {
                    tracing::info!("handed everything to the keeper that was started");
                    Next::HandedOver
                }
                Err(error) => {
                    tracing::warn!(%error, "a keeper that was started did not take over");
                    Next::GoOn
                }
            },
        }
    }

    fn status(&self) -> Status {
        Status {
            keeper: std::process::id(),
            daemon: self.daemon.as_ref().and_then(|daemon| u32::try_from(daemon.process.pid).ok()),
            generation: self.estate.generation,
            ready: self.daemon.as_ref().is_some_and(|daemon| daemon.ready_since.is_some()),
            attended: self.estate.attended,
        }
    }

    /// The estate with link and daemon.
    fn whole(&self) -> io::Result<Estate> {
        let mut estate = self.estate.try_clone()?;
        if let Some(Daemon { process, link, ready_since, .. }) = &self.daemon {
            estate.ready = ready_since.is_some();
            estate.daemon = Some(Process { pid: process.pid, pidfd: process.pidfd.try_clone()? });
            estate.link = link.as_ref().map(OwnedFd::try_clone).transpose()?;
        }
        Ok(estate)
    }

    fn signalled(&mut self) -> Next {
        match self.signals.read_signal() {
            Ok(Some(signal)) if signal.ssi_signo == NixSignal::SIGHUP as u32 => {
                self.reload();
                Next::GoOn
            }
            Ok(Some(_)) => Next::Stop,
            Ok(None) | Err(_) => Next::GoOn,
        }
    }

    /// Executes the current binary in this process, which then restarts the daemon. Comes back if that fails.
    fn reload(&mut self) {
        manager::tell(&[NotifyState::Status("loading the binary again")]);
        let Err(error) = self.execute();
        tracing::error!(%error, "cannot load the binary again: everything stays as it is");
        if let Ok(null) = fs::File::open("/dev/null") {
            let _ = rustix::stdio::dup2_stdin(&null);
        }
    }

    fn execute(&self) -> io::Result<std::convert::Infallible> {
        let binary = CString::new(binary()?.into_os_string().into_vec())?;
        let mut arguments = vec![CString::new(program_name().into_vec())?];
        for argument in &self.options.keeper_arguments {
            arguments.push(CString::new(argument.as_bytes())?);
        }
        let (ours, theirs) = pair()?;
        Estate { reload: true, ..self.whole()? }.send(&ours)?;
        rustix::stdio::dup2_stdin(&theirs)?;
        // Keeps the signal mask, so that a signal that comes meanwhile is handled by the new binary.
        Ok(nix::unistd::execv(&binary, &arguments)?)
    }

    /// Tells the daemon to end. It leaves unanswered what it cannot answer, for the next one.
    fn dismiss(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            daemon.dismissed = true;
            let _ = pidfd_send_signal(&daemon.process.pidfd, Signal::TERM);
        }
    }

    /// The orderly stop.
    fn stop(mut self) -> Result<(), KeeperError> {
        manager::tell(&[NotifyState::Stopping]);
        self.dismiss();
        if let Some(daemon) = &self.daemon
            && !ended_within(&daemon.process, self.options.stop_timeout)
        {
            tracing::warn!(daemon = daemon.process.pid, "the daemon does not end: killing it");
            let _ = pidfd_send_signal(&daemon.process.pidfd, Signal::KILL);
            ended_within(&daemon.process, self.options.stop_timeout);
        }
        self.clear();
        Ok(())
    }

    /// Leaves nothing behind, except what a service manager keeps for the next start.
    fn clear(&self) {
        if manager::is_present() {
            let _ = fs::remove_file(self.options.control());
            tracing::info!("stopped; the mount stays for the next start, readers of lazy layers wait for it");
        } else {
            self.unmount();
        }
    }

    fn unmount(&self) {
        let _ = fs::remove_file(self.options.control());
        let _ = fs::remove_file(&self.options.socket);
        match mount::unmount(&self.options.mount_point) {
            Ok(Unmounted::InUse) => tracing::warn!(
                "stopped; containers that use lazy layers have lost them and must be restarted (a service manager that \
                 keeps file descriptors would have spared them)"
            ),
            Ok(_) => tracing::info!("stopped"),
            Err(error) => {
                tracing::warn!(%error, mount_point = %self.options.mount_point.display(), "stopped; cannot unmount");
            }
        }
    }
}

fn ended_within(process: &Process, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        let Ok(rest) = Timespec::try_from(rest) else { return false };
        match poll(&mut [PollFd::from_borrowed_fd(process.pidfd.as_fd(), PollFlags::IN)], Some(&rest)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// What the keeper handles.
pub(super) fn keeper_signals() -> SigSet {
    SigSet::from_iter([NixSignal::SIGTERM, NixSignal::SIGINT, NixSignal::SIGHUP])
}

/// Signals come through a descriptor, in their turn.
fn block_signals() -> Result<SignalFd, KeeperError> {
    let set = keeper_signals();
    set.thread_block().map_err(|errno| KeeperError::system("block signals")(errno.into()))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|errno| KeeperError::system("receive signals")(errno.into()))
}

/// Takes the lock; `None` if a keeper or a daemon lives.
fn lock(options: &KeeperOptions) -> Result<Option<OwnedFd>, KeeperError> {
    make_directory(&options.runtime_directory, 0o755)?;
    let path = options.lock();
    let file =
        fs::File::options().create(true).truncate(false).write(true).open(&path).map_err(KeeperError::set_up(&path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file.into())),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(KeeperError::set_up(&path)(errno.into())),
    }
}

fn take_over(options: &KeeperOptions) -> Result<Estate, KeeperError> {
    let deadline = Instant::now() + KEEPER_PATIENCE;
    loop {
        match control::take_over(&options.control()) {
            Ok(estate) => {
                tracing::info!("took over a daemon that lives");
                return Ok(estate);
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(KeeperError::Served {
                    runtime_directory: options.runtime_directory.clone(),
                    reason: error.to_string(),
                });
            }
            // The daemon is about to start a keeper.
            Err(error) if Instant::now() < deadline => tracing::debug!(%error, "no keeper answers yet"),
            Err(_) => return Err(KeeperError::Silent(options.lock())),
        }
        // Both may have died meanwhile.
        if let Some(lock) = lock(options)? {
            return set_up(options, lock);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A new estate, made of what a service manager kept or of a new mount and socket.
fn set_up(options: &KeeperOptions, lock: OwnedFd) -> Result<Estate, KeeperError> {
    let (fuse, listener) = manager::kept();
    // First: a mount must not be left behind where the socket cannot be had.
    let listener = match listener {
        Some(listener) => listener,
        None => bind(&options.socket)?.into(),
    };
    let (fuse, generation) = match fuse.filter(|fuse| mount::is_connected(fuse)) {
        Some(fuse) => (fuse, 1),
        None => (mount_anew(&options.mount_point).inspect_err(|_| drop(fs::remove_file(&options.socket)))?, 0),
    };
    Ok(Estate {
        fuse,
        listener,
        lock,
        link: None,
        daemon: None,
        generation,
        served: generation > 0,
        ready: false,
        reload: false,
        attended: true,
    })
}

fn mount_anew(mount_point: &Path) -> Result<OwnedFd, KeeperError> {
    clear_mount(mount_point)?;
    make_directory(mount_point, 0o700)?;
    Ok(mount::mount(mount_point)?)
}

/// Removes a mount that an earlier instance left.
fn clear_mount(mount_point: &Path) -> Result<(), KeeperError> {
    match mount::unmount(mount_point).map_err(KeeperError::set_up(mount_point))? {
        Unmounted::NotMounted => {}
        Unmounted::Clean | Unmounted::InUse => tracing::warn!(
            mount_point = %mount_point.display(),
            "removed the mount of an instance that died as a whole: containers that use it must be restarted"
        ),
    }
    Ok(())
}

fn bind(socket: &Path) -> Result<UnixListener, KeeperError> {
    if let Some(directory) = socket.parent() {
        make_directory(directory, 0o755)?;
    }
    clear_socket(socket)?;
    let listener = UnixListener::bind(socket).map_err(KeeperError::set_up(socket))?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600)).map_err(KeeperError::set_up(socket))?;
    Ok(listener)
}

/// Removes a socket that nobody serves any more. Everything else at its path is somebody's: containerd's own socket, if the
/// configuration is wrong.
fn clear_socket(socket: &Path) -> Result<(), KeeperError> {
    let kind = match fs::symlink_metadata(socket) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(KeeperError::set_up(socket)(error)),
    };
    let refused = |reason| KeeperError::Socket { path: socket.into(), reason };
    if !kind.is_socket() {
        return Err(refused("there is a file that is no socket"));
    }
    match UnixStream::connect(socket) {
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {}
        _ => return Err(refused("another process listens there")),
    }
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(KeeperError::set_up(socket)(error)),
        _ => Ok(()),
    }
}

fn make_directory(path: &Path, mode: u32) -> Result<(), KeeperError> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(KeeperError::set_up(path))
}

/// Where this program's binary is, or its successor if it was replaced.
fn binary() -> io::Result<PathBuf> {
    let path = fs::read_link("/proc/self/exe")?.into_os_string().into_vec();
    let path = path.strip_suffix(b" (deleted)").unwrap_or(&path).to_vec();
    Ok(PathBuf::from(OsString::from_vec(path)))
}
