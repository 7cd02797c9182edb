//! The daemon's side: what it was handed, and the watch over its keeper.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixListener, process::CommandExt},
    },
    process::{Child, Command},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::SendFlags,
    process::DumpableBehavior,
};

use super::{
    KeeperError, KeeperOptions,
    estate::{Estate, Process, pair, receive},
    supervisor::{self, READY},
};

/// Longest pause between attempts to start a keeper.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// What the daemon was handed.
#[derive(Debug)]
pub struct DaemonSide {
    fuse: OwnedFd,
    listener: OwnedFd,
    adopted: bool,
    link: Arc<Mutex<Link>>,
}

#[derive(Debug)]
struct Link {
    keeper: Option<OwnedFd>,
    ready: bool,
}

impl DaemonSide {
    /// Takes what the keeper handed over, and watches the keeper from now on: when it dies, a new one is started.
    ///
    /// To be called first in the daemon, once.
    pub fn receive(options: &KeeperOptions) -> Result<DaemonSide, KeeperError> {
        // A core dump would keep a dead daemon, and all requests that it had read, for as long as it takes to write.
        let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
        // Programs inherit the signal mask of who starts them, and the keeper blocks what it reads from a descriptor.
        supervisor::keeper_signals()
            .thread_unblock()
            .map_err(|errno| KeeperError::system("unblock signals")(errno.into()))?;
        let estate = Estate::inherit().map_err(KeeperError::NotHandedOver)?;
        let estate = Estate { daemon: None, ready: false, reload: false, attended: false, ..estate };
        let side = DaemonSide {
            fuse: estate.fuse.try_clone().map_err(KeeperError::system("duplicate a descriptor"))?,
            listener: estate.listener.try_clone().map_err(KeeperError::system("duplicate a descriptor"))?,
            adopted: estate.generation > 1,
            link: Arc::new(Mutex::new(Link { keeper: None, ready: false })),
        };
        let watch = Watch { estate, link: side.link.clone(), options: options.clone() };
        thread::Builder::new()
            .name("keeper-watch".into())
            .spawn(move || watch.run())
            .map_err(KeeperError::system("start a thread"))?;
        Ok(side)
    }

    /// The FUSE connection.
    pub fn fuse(&self) -> io::Result<OwnedFd> {
        self.fuse.try_clone()
    }

    /// The listening socket of the gRPC service, non-blocking. Connections that came while no daemon lived wait in it.
    pub fn listener(&self) -> io::Result<UnixListener> {
        let listener = UnixListener::from(self.listener.try_clone()?);
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    /// Whether an earlier daemon served this connection.
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// Tells the keeper, which tells the service manager, that the daemon serves.
    pub fn ready(&self) {
        self.link.lock().unwrap_or_else(PoisonError::into_inner).ready();
    }
}

impl Link {
    fn ready(&mut self) {
        self.ready = true;
        self.tell();
    }

    fn tell(&self) {
        if let (Some(keeper), true) = (&self.keeper, self.ready) {
            // A dead keeper is noticed by the watch, which tells the next one.
            let _ = rustix::net::send(keeper, READY.as_bytes(), SendFlags::NOSIGNAL);
        }
    }
}

struct Watch {
    /// Without a link: that of the living keeper is the loop's.
    estate: Estate,
    link: Arc<Mutex<Link>>,
    options: KeeperOptions,
}

impl Watch {
    fn run(mut self) {
        let mut keeper: Option<Child> = None;
        let mut link = self.estate.link.take();
        let mut pause = Duration::ZERO;
        loop {
            if let Some(link) = link.take() {
                self.connect(&link);
                wait_for_end(&link, &mut keeper);
                tracing::warn!("the keeper is gone: starting another one");
            }
            if let Some(mut keeper) = keeper.take() {
                let _ = keeper.wait();
            }
            thread::sleep(pause);
            match self.start() {
                Ok((started, new)) => {
                    (keeper, link) = (Some(started), Some(new));
                    pause = Duration::ZERO;
                }
                Err(error) => {
                    pause = (pause * 2).clamp(Duration::from_millis(50), PAUSE_MAX);
                    tracing::error!(%error, "cannot start a keeper: if the daemon dies now, containers lose their files");
                }
            }
        }
    }

    fn connect(&self, keeper: &OwnedFd) {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        link.keeper = keeper.try_clone().ok();
        link.tell();
    }

    fn start(&self) -> io::Result<(Child, OwnedFd)> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner).keeper = None;
        let (ours, theirs) = pair()?;
        let estate = Estate {
            link: Some(theirs),
            daemon: Some(Process::open(std::process::id())?),
            served: self.estate.served || self.link.lock().unwrap_or_else(PoisonError::into_inner).ready,
            ..self.estate.try_clone()?
        };
        // What runs, not what the path has now: only SIGHUP changes versions, of both.
        let mut command = Command::new("/proc/self/exe");
        command.arg0(supervisor::program_name()).args(&self.options.keeper_arguments);
        Ok((estate.start(&mut command)?, ours))
    }
}

/// Waits until nobody holds the other end of the link. A keeper that hands over to another one ends without that.
fn wait_for_end(link: &OwnedFd, keeper: &mut Option<Child>) {
    loop {
        let pidfd = keeper.as_ref().and_then(|keeper| Process::open(keeper.id()).ok());
        let mut polled = vec![PollFd::from_borrowed_fd(link.as_fd(), PollFlags::IN)];
        polled.extend(pidfd.as_ref().map(|process| PollFd::from_borrowed_fd(process.pidfd.as_fd(), PollFlags::IN)));
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => {
                tracing::error!(%errno, "cannot watch the keeper");
                thread::sleep(PAUSE_MAX);
                continue;
            }
        }
        let ended = polled.get(1).is_some_and(|polled| !polled.revents().is_empty());
        let readable = polled.first().is_some_and(|polled| !polled.revents().is_empty());
        drop(polled);
        if ended && let Some(mut keeper) = keeper.take() {
            let _ = keeper.wait();
        }
        // The keeper says nothing, so this is its end; a message from a newer version is skipped.
        if readable && receive(link).map_or(true, |(line, _)| line.is_empty()) {
            return;
        }
    }
}
