//! The control socket of the keeper.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
};

use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::estate::{self, Estate, PATIENCE};

const STATUS: &str = "status";
const TAKE_OVER: &str = "take-over";
const TAKEN: &str = "taken";

/// What a keeper says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Process id of the keeper.
    pub keeper: u32,
    /// Process id of the daemon; `None` while it is being restarted.
    pub daemon: Option<u32>,
    /// Daemons that were started on this connection.
    pub generation: u64,
    /// Whether the daemon serves.
    pub ready: bool,
    /// Whether somebody looks after the keeper; else the daemon started it.
    pub attended: bool,
}

/// Asks the keeper of a runtime directory.
pub fn status(runtime_directory: &Path) -> io::Result<Status> {
    let socket = connect(&path(runtime_directory))?;
    send(&socket, STATUS)?;
    let (line, _) = estate::receive(&socket)?;
    let number =
        |key: &str| estate::value::<u64>(&line, key).ok_or_else(|| io::Error::other(format!("{line:?} lacks {key}")));
    let pid = |key: &str| number(key).and_then(|pid| u32::try_from(pid).map_err(io::Error::other));
    Ok(Status {
        keeper: pid("keeper")?,
        daemon: Some(pid("daemon")?).filter(|pid| *pid != 0),
        generation: number("generation")?,
        ready: number("ready")? != 0,
        attended: number("attended")? != 0,
    })
}

pub(super) fn path(runtime_directory: &Path) -> PathBuf {
    runtime_directory.join("keeper.sock")
}

/// Asks the keeper at `path` for all it has. A refusal is [`io::ErrorKind::PermissionDenied`].
pub(super) fn take_over(path: &Path) -> io::Result<Estate> {
    let socket = connect(path)?;
    send(&socket, TAKE_OVER)?;
    let estate = Estate::receive(&socket)?;
    send(&socket, TAKEN)?;
    Ok(estate)
}

/// What somebody asks of the keeper.
pub(super) enum Question {
    /// For a [`Status`].
    Status(Asker),
    /// For everything.
    TakeOver(Asker),
}

/// Who asks.
pub(super) struct Asker(OwnedFd);

impl Asker {
    pub(super) fn answer(&self, status: &Status) {
        let line = format!(
            "keeper={} daemon={} generation={} ready={} attended={}",
            status.keeper,
            status.daemon.unwrap_or(0),
            status.generation,
            u8::from(status.ready),
            u8::from(status.attended)
        );
        let _ = send(&self.0, &line);
    }

    pub(super) fn refuse(&self, reason: &str) {
        let _ = send(&self.0, &format!("refused {reason}"));
    }

    /// Hands everything over; done when the other side says that it has it.
    pub(super) fn hand_over(&self, estate: &Estate) -> io::Result<()> {
        estate.send(&self.0)?;
        match estate::receive(&self.0)?.0.as_str() {
            TAKEN => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// The socket on which a keeper is asked.
pub(super) struct ControlSocket(OwnedFd);

impl ControlSocket {
    /// Takes the place of the socket of an earlier keeper.
    pub(super) fn bind(path: &Path) -> io::Result<ControlSocket> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        let new = path.with_extension("new");
        let _ = std::fs::remove_file(&new);
        rustix::net::bind(&socket, &SocketAddrUnix::new(&new)?)?;
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
        rustix::net::listen(&socket, 16)?;
        std::fs::rename(&new, path)?;
        Ok(ControlSocket(socket))
    }

    /// The next question, if somebody asks one. Who connects and does not ask is let go soon, as the keeper has one
    /// thread.
    pub(super) fn question(&self) -> Option<Question> {
        let socket = rustix::net::accept_with(&self.0, SocketFlags::CLOEXEC).ok()?;
        let patience = std::time::Duration::from_secs(1);
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(patience)).ok()?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(patience)).ok()?;
        let (line, _) = estate::receive(&socket).ok()?;
        match line.as_str() {
            STATUS => Some(Question::Status(Asker(socket))),
            TAKE_OVER => Some(Question::TakeOver(Asker(socket))),
            "" => None,
            _ => {
                Asker(socket).refuse("the question is not known to this version");
                None
            }
        }
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(PATIENCE))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn send(socket: &OwnedFd, line: &str) -> io::Result<()> {
    rustix::net::send(socket, line.as_bytes(), SendFlags::NOSIGNAL)?;
    Ok(())
}
