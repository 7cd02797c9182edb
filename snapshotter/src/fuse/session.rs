//! The threads that read requests, and the protocol's own operations.

use std::{
    fmt,
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use rustix::io::Errno;

use super::{
    Failure, Operation, Reply, Request,
    abi::{self, InitOut, init_flag},
    decode::{Header, Init, decode},
    interrupt, mount,
    reply::Connection,
};

/// What a mount serves. Called from several threads at once; a call should only find out what is asked, and park what
/// it cannot answer at once.
pub trait Handler: Send + Sync + 'static {
    /// Serves a request other than INIT, DESTROY, INTERRUPT and FORGET.
    fn handle(&self, request: &Request<'_>, reply: Reply);
}

/// How a session runs.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// Threads that read requests, 1 to 16. Two suffice where nothing is answered slowly from the thread itself.
    pub workers: usize,
    /// Most requests that may be parked at once. A backstop: the kernel has at most 65 535 reads ahead and one read per
    /// waiting thread under way, and the bounds that matter are per layer, in the reader.
    pub parked_max: usize,
    /// Readahead of the mount, which the kernel starts with 128 KiB.
    pub read_ahead: Option<ReadAhead>,
    /// An earlier daemon served this connection.
    pub adopted: bool,
    /// Ask the kernel to send again what an earlier daemon had not answered. Off is as on kernels before 6.9, which cannot.
    pub resend: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions { workers: 2, parked_max: 262_144, read_ahead: None, adopted: false, resend: true }
    }
}

/// Readahead of a mount.
#[derive(Debug, Clone)]
pub struct ReadAhead {
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Bytes; rounded down to KiB.
    pub bytes: u64,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The file system was unmounted everywhere.
    Unmounted,
    /// The connection was aborted: its readers see errors from now on, and it cannot be used again.
    Aborted,
    /// Reading requests failed with this error number.
    Failed(i32),
}

impl fmt::Display for Ended {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ended::Unmounted => formatter.write_str("the FUSE mount was unmounted"),
            Ended::Aborted => formatter.write_str("the FUSE connection was aborted"),
            Ended::Failed(errno) => {
                write!(formatter, "cannot read FUSE requests: {}", std::io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

/// Why a session did not start.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No thread.
    #[error("cannot start a thread for FUSE requests")]
    Thread(#[source] std::io::Error),
    /// A number out of its range.
    #[error("{0} FUSE workers are not between 1 and 16")]
    Workers(usize),
}

/// A running session. Dropping all handles does not end it: it ends with its connection, or with the process.
#[derive(Debug, Clone)]
pub struct SessionHandle {
    connection: Arc<Connection>,
}

impl SessionHandle {
    /// To be called before an orderly end of the daemon: from now on requests are answered with their bytes or not at
    /// all, even where their [`Reply`] is dropped or refused. The next daemon gets what is unanswered.
    pub fn leave(&self) {
        self.connection.leave();
    }

    /// Number of requests that are parked.
    pub fn parked(&self) -> usize {
        self.connection.table.lock().parked.len()
    }

    /// Waits for the end of the session; blocks the thread.
    pub fn wait(&self) -> Ended {
        let mut table = self.connection.table.lock();
        loop {
            if let Some(ended) = table.ended {
                return ended;
            }
            self.connection.changed.wait(&mut table);
        }
    }
}

/// Serves the connection `fd` with `handler`.
///
/// The kernel is first asked to send again what an earlier daemon has read and not answered; that daemon must be dead.
/// INIT is answered whenever it comes, in this daemon or in another one.
pub fn run(fd: OwnedFd, handler: Arc<dyn Handler>, options: SessionOptions) -> Result<SessionHandle, SessionError> {
    if !(1..=16).contains(&options.workers) {
        return Err(SessionError::Workers(options.workers));
    }
    let connection = Arc::new(Connection::new(fd, options.parked_max));
    resend(&connection, &options);
    if options.adopted {
        set_read_ahead(&options);
    }
    let session = Arc::new(Session {
        connection: connection.clone(),
        handler,
        running: AtomicUsize::new(options.workers),
        options,
    });
    let watched = connection.clone();
    spawn("fuse-watch", move || interrupt::watch(&watched))?;
    for _ in 0..session.options.workers {
        let session = session.clone();
        spawn("fuse", move || session.work())?;
    }
    Ok(SessionHandle { connection })
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), SessionError> {
    thread::Builder::new().name(name.into()).spawn(body).map(drop).map_err(SessionError::Thread)
}

fn resend(connection: &Connection, options: &SessionOptions) {
    let sent = if options.resend { connection.try_send(0, abi::NOTIFY_RESEND, &[]) } else { Err(Errno::INVAL) };
    match sent {
        Ok(()) => {}
        Err(Errno::INVAL) if options.adopted => {
            connection.note_orphans();
            tracing::error!(
                "this kernel (older than 6.9) cannot send requests again: reads that the last daemon had not answered hang \
                 until their process gets a signal"
            );
        }
        Err(Errno::INVAL) => {}
        Err(errno) => tracing::warn!(%errno, "cannot ask the kernel to send requests again"),
    }
}

fn set_read_ahead(options: &SessionOptions) {
    if let Some(ReadAhead { mount_point, bytes }) = &options.read_ahead
        && let Err(error) = mount::set_read_ahead(mount_point, *bytes)
    {
        tracing::warn!(mount_point = %mount_point.display(), %error, "cannot set the readahead of the FUSE mount");
    }
}

struct Session {
    connection: Arc<Connection>,
    handler: Arc<dyn Handler>,
    options: SessionOptions,
    /// Threads that still read.
    running: AtomicUsize,
}

impl Session {
    fn work(&self) {
        // Written to once, so that its pages are there: the kernel fails a request whose copy to a dying process needs
        // a page.
        let mut buffer = vec![1u8; abi::READ_BUFFER_MIN];
        let ended = loop {
            match rustix::io::read(&self.connection.fd, &mut buffer[..]) {
                Ok(length) => self.serve(buffer.get(..length).unwrap_or_default()),
                // NOENT: the request was given up while it was being read.
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
                Err(Errno::NODEV) => break Ended::Unmounted,
                Err(Errno::CONNABORTED) => break Ended::Aborted,
                Err(errno) => break Ended::Failed(errno.raw_os_error()),
            }
        };
        if self.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.connection.table.lock().ended = Some(ended);
            self.connection.changed.notify_all();
        }
    }

    fn serve(&self, bytes: &[u8]) {
        let request = match decode(bytes) {
            Ok(request) => request,
            Err(error) => {
                tracing::error!(%error, "cannot understand a FUSE request");
                if let Some(unique) = error.unique() {
                    self.connection.send(unique, -Failure::Malformed.errno(), &[]);
                }
                return;
            }
        };
        let reply = |header: &Header| Reply::new(&self.connection, header);
        match request.operation {
            Operation::Init(init) => self.initialise(&init, reply(&request.header)),
            Operation::Destroy => reply(&request.header).bytes(&[]),
            Operation::Interrupt { unique } => {
                interrupt::interrupted(&self.connection, unique, request.header.unique);
            }
            Operation::Forget => {}
            _ => {
                let reply = reply(&request.header);
                let handled = catch_unwind(AssertUnwindSafe(|| self.handler.handle(&request, reply)));
                if handled.is_err() {
                    tracing::error!(opcode = request.header.opcode, "serving a FUSE request panicked: it failed");
                }
            }
        }
    }

    fn initialise(&self, init: &Init, reply: Reply) {
        if init.major > abi::MAJOR {
            // The kernel asks again with our version.
            return reply.structure(&InitOut { major: abi::MAJOR, minor: abi::MINOR, ..InitOut::default() });
        }
        if init.major < abi::MAJOR || init.minor < abi::MINOR_OLDEST {
            tracing::error!(
                "the kernel's FUSE protocol {}.{} is older than 7.{} (Linux 5.4): it cannot be served",
                init.major,
                init.minor,
                abi::MINOR_OLDEST
            );
            return reply.failure(Failure::Protocol);
        }
        reply.structure(&agreement(init));
        tracing::info!(
            minor = init.minor,
            resend = init.flags & init_flag::HAS_RESEND != 0,
            read_ahead = init.max_readahead,
            "FUSE connection initialised"
        );
        // The kernel has by now applied the answer, which would lower what was set before.
        set_read_ahead(&self.options);
    }
}

fn agreement(init: &Init) -> InitOut {
    const WANTED: u64 = init_flag::ASYNC_READ
        | init_flag::PARALLEL_DIROPS
        | init_flag::ABORT_ERROR
        | init_flag::MAX_PAGES
        | init_flag::INIT_EXT
        | init_flag::HAS_RESEND
        | init_flag::ALLOW_IDMAP;
    let flags = init.flags & WANTED;
    InitOut {
        major: abi::MAJOR,
        minor: init.minor.min(abi::MINOR),
        max_readahead: init.max_readahead,
        flags: (flags & u64::from(u32::MAX)) as u32,
        // With few, the stalled reads of one device keep the reads of all others waiting in the kernel.
        max_background: u16::MAX,
        congestion_threshold: u16::MAX,
        max_write: abi::MAX_WRITE,
        time_gran: 1,
        max_pages: abi::MAX_PAGES,
        flags2: (flags >> 32) as u32,
        ..InitOut::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_offered_is_agreed_on() {
        let old = Init { major: 7, minor: 31, max_readahead: 131_072, flags: init_flag::ASYNC_READ | 1 << 5 };
        let out = agreement(&old);
        assert_eq!((out.minor, out.flags, out.flags2), (31, init_flag::ASYNC_READ as u32, 0));
        let new = Init { major: 7, minor: 45, max_readahead: 131_072, flags: u64::MAX };
        let out = agreement(&new);
        assert_eq!((out.minor, out.max_background, out.flags2), (abi::MINOR, 65_535, 1 << 7 | 1 << 8));
        assert_ne!(u64::from(out.flags) & init_flag::INIT_EXT, 0);
    }
}
