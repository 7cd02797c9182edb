//! What is handed from process to process: open file descriptors and a line that says what they are.
//!
//! It travels as one message on a `SOCK_SEQPACKET` socket. A process that is started finds the socket as its standard
//! input: so nothing is inherited by accident, and no descriptor must lose its close-on-exec flag while other threads
//! start programs.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, SocketFlags, SocketType, sockopt,
    },
    process::{Pid, PidfdFlags, pidfd_open},
};

/// Says which keys and descriptors there are at least. A newer version only adds: keys at any place, descriptors at the end. So a keeper
/// of either version takes over from the other.
const VERSION: u32 = 1;
/// Descriptors that are sent.
const FDS_SENT: usize = 5;
/// Descriptors that are received, those of newer versions among them.
const FDS_MAX: usize = 16;
/// Longest line that is received.
const LINE_MAX: usize = 4096;
/// For the other side to answer. Chosen: both sides are local and have nothing else to do.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// All that outlives a process.
#[derive(Debug)]
pub(super) struct Estate {
    /// The FUSE connection.
    pub(super) fuse: OwnedFd,
    /// Listening socket of the gRPC service.
    pub(super) listener: OwnedFd,
    /// The locked `RUNTIME/lock`.
    pub(super) lock: OwnedFd,
    /// One end of the link between keeper and daemon: the receiver's.
    pub(super) link: Option<OwnedFd>,
    /// The daemon that lives, for a keeper.
    pub(super) daemon: Option<Process>,
    /// Daemons that have been started on this connection.
    pub(super) generation: u64,
    /// Whether a daemon was ever ready.
    pub(super) served: bool,
    /// Whether the daemon that lives is ready.
    pub(super) ready: bool,
    /// The receiver shall load the current binary into the daemon as well.
    pub(super) reload: bool,
    /// Somebody looks after the receiver: a service manager or a person.
    pub(super) attended: bool,
}

/// A process that can be waited for and signalled without being mistaken for another one.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
}

impl Process {
    /// `pid` must be a child that was not waited for, or this process.
    pub(super) fn open(pid: u32) -> io::Result<Process> {
        let pid = i32::try_from(pid).map_err(io::Error::other)?;
        let raw = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Process { pid, pidfd: pidfd_open(raw, PidfdFlags::empty())? })
    }
}

impl Estate {
    pub(super) fn try_clone(&self) -> io::Result<Estate> {
        let daemon = match &self.daemon {
            Some(daemon) => Some(Process { pid: daemon.pid, pidfd: daemon.pidfd.try_clone()? }),
            None => None,
        };
        Ok(Estate {
            fuse: self.fuse.try_clone()?,
            listener: self.listener.try_clone()?,
            lock: self.lock.try_clone()?,
            link: self.link.as_ref().map(OwnedFd::try_clone).transpose()?,
            daemon,
            ..*self
        })
    }

    pub(super) fn send(&self, socket: impl AsFd) -> io::Result<()> {
        let line = format!(
            "drover-keeper {VERSION} generation={} served={} ready={} reload={} attended={} link={} daemon={}",
            self.generation,
            u8::from(self.served),
            u8::from(self.ready),
            u8::from(self.reload),
            u8::from(self.attended),
            u8::from(self.link.is_some()),
            self.daemon.as_ref().map_or(0, |daemon| daemon.pid),
        );
        let mut fds: Vec<BorrowedFd<'_>> = vec![self.fuse.as_fd(), self.listener.as_fd(), self.lock.as_fd()];
        fds.extend(self.link.as_ref().map(AsFd::as_fd));
        fds.extend(self.daemon.as_ref().map(|daemon| daemon.pidfd.as_fd()));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_SENT))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("too many descriptors"));
        }
        rustix::net::sendmsg(socket, &[IoSlice::new(line.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Waits for an estate. An answer that is a refusal comes as [`io::ErrorKind::PermissionDenied`] with its text.
    pub(super) fn receive(socket: impl AsFd) -> io::Result<Estate> {
        let (line, fds) = receive(socket)?;
        parse(&line, fds)
    }

    /// Starts `command` with this estate.
    ///
    /// The child gets a process group of its own, so that a terminal's Ctrl-C reaches only who shall handle it.
    pub(super) fn start(&self, command: &mut Command) -> io::Result<Child> {
        let (ours, theirs) = pair()?;
        self.send(&ours)?;
        command.stdin(Stdio::from(theirs)).process_group(0).spawn()
    }

    /// The estate of a process that was started with [`Estate::start`]; its standard input becomes `/dev/null`.
    pub(super) fn inherit() -> io::Result<Estate> {
        let socket = io::stdin().as_fd().try_clone_to_owned()?;
        let null = std::fs::File::open("/dev/null")?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
        let estate = Estate::receive(&socket)?;
        rustix::stdio::dup2_stdin(&null)?;
        Ok(estate)
    }
}

/// A connected pair of message sockets.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// One message and its descriptors; empty at the end of the connection.
pub(super) fn receive(socket: impl AsFd) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; LINE_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message =
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    let line = bytes.get(..message.bytes).unwrap_or_default();
    Ok((String::from_utf8(line.to_vec()).map_err(io::Error::other)?, fds))
}

/// The value of `key=` in a line of words.
pub(super) fn value<T: std::str::FromStr>(line: &str, key: &str) -> Option<T> {
    line.split(' ').find_map(|word| word.split_once('=').filter(|(name, _)| *name == key))?.1.parse().ok()
}

fn parse(line: &str, fds: Vec<OwnedFd>) -> io::Result<Estate> {
    if let Some(reason) = line.strip_prefix("refused ") {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason.to_owned()));
    }
    let version = line.strip_prefix("drover-keeper ").and_then(|rest| rest.split(' ').next()?.parse::<u32>().ok());
    if version.is_none_or(|version| version < VERSION) {
        return Err(io::Error::other(format!("{line:?} is not an estate of version {VERSION} or newer")));
    }
    let number =
        |key: &str| value::<u64>(line, key).ok_or_else(|| io::Error::other(format!("the estate {line:?} lacks {key}")));
    let mut fds = fds.into_iter();
    let mut fd = || fds.next().ok_or_else(|| io::Error::other(format!("the estate {line:?} lacks a descriptor")));
    Ok(Estate {
        fuse: fd()?,
        listener: fd()?,
        lock: fd()?,
        link: if number("link")? != 0 { Some(fd()?) } else { None },
        daemon: match i32::try_from(number("daemon")?).map_err(io::Error::other)? {
            0 => None,
            pid => Some(Process { pid, pidfd: fd()? }),
        },
        generation: number("generation")?,
        served: number("served")? != 0,
        ready: number("ready")? != 0,
        reload: number("reload")? != 0,
        attended: number("attended")? != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estate() -> Estate {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        Estate {
            fuse: null(),
            listener: null(),
            lock: null(),
            link: Some(null()),
            daemon: Some(Process::open(std::process::id()).unwrap()),
            generation: 7,
            served: true,
            ready: true,
            reload: false,
            attended: true,
        }
    }

    #[test]
    fn an_estate_arrives_as_it_was_sent() {
        let (here, there) = pair().unwrap();
        estate().send(&here).unwrap();
        let got = Estate::receive(&there).unwrap();
        assert_eq!((got.generation, got.served, got.ready, got.reload, got.attended), (7, true, true, false, true));
        assert_eq!(got.daemon.unwrap().pid, i32::try_from(std::process::id()).unwrap());
        assert!(got.link.is_some());
        Estate { link: None, daemon: None, ..estate() }.send(&here).unwrap();
        let got = Estate::receive(&there).unwrap();
        assert!(got.link.is_none() && got.daemon.is_none());
    }

    /// The line is what processes of other versions send and understand: no key or descriptor of it may change or go.
    #[test]
    fn the_first_version_stays_as_it_is() {
        let (here, there) = pair().unwrap();
        let sent = estate();
        sent.send(&here).unwrap();
        let (line, fds) = receive(&there).unwrap();
        let pid = std::process::id();
        let golden = "drover-keeper 1 generation=7 served=1 ready=1 reload=0 attended=1 link=1";
        assert_eq!(line, format!("{golden} daemon={pid}"));
        assert_eq!(fds.len(), FDS_SENT);
        let got = parse(&format!("{golden} daemon=0"), fds).unwrap();
        assert!(got.link.is_some() && got.daemon.is_none() && got.generation == 7);
    }

    #[test]
    fn what_newer_versions_add_is_left_out() {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let newer =
            "drover-keeper 7 colour=blue generation=3 served=1 ready=0 reload=1 attended=1 link=0 daemon=0 more=x=y";
        let got = parse(newer, (0..9).map(|_| null()).collect()).unwrap();
        assert_eq!((got.generation, got.served, got.reload, got.link.is_none()), (3, true, true, true));
        // What is lacking is lacking in any version.
        let without = newer.replace(" served=1", "");
        assert!(parse(&without, (0..9).map(|_| null()).collect()).unwrap_err().to_string().contains("served"));
        assert!(parse(newer, vec![null(), null()]).unwrap_err().to_string().contains("descriptor"));
    }

    #[test]
    fn what_is_no_estate_is_refused() {
        let (here, there) = pair().unwrap();
        let say = |line: &str| {
            rustix::net::send(&here, line.as_bytes(), SendFlags::empty()).unwrap();
            Estate::receive(&there).unwrap_err()
        };
        assert_eq!(say("refused by me").kind(), io::ErrorKind::PermissionDenied);
        for odd in ["drover-keeper 0 generation=1", "drover-keeper x", "drover-keeper", "keeper 1"] {
            assert!(say(odd).to_string().contains("version"), "{odd}");
        }
        assert!(say("drover-keeper 1 generation=1").to_string().contains("descriptor"));
        drop(here);
        assert!(Estate::receive(&there).is_err());
    }
}
