//! The one answer to a request.
//!
//! A [`Reply`] is made for each request and belongs to the thread that decoded it; it is answered there, or *parked* and
//! answered later from any thread. Dropped unanswered it says EIO, so no caller waits for an answer that never comes.
//!
//! Only parked requests are in a table. Who takes a request out of the table has the right to answer it, so a request
//! whose caller is being killed ([`super::interrupt`]) and whose bytes arrive in the same moment is answered once.

use std::{
    collections::HashMap,
    fmt,
    io::IoSlice,
    marker::PhantomData,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use super::{Failure, Header, abi::OutHeader, session::Ended};

/// The answer to a request, still to be given by this thread.
#[derive(Debug)]
pub struct Reply {
    answer: Answer,
    pid: u32,
    /// Not `Send`: INTERRUPT can only find requests that are in the table, so leaving the thread means parking.
    on_this_thread: PhantomData<*const ()>,
}

impl Reply {
    pub(super) fn new(connection: &Arc<Connection>, header: &Header) -> Reply {
        Reply {
            answer: Answer {
                connection: connection.clone(),
                unique: header.unique,
                length: Length::AtMost(u32::MAX),
                open: true,
            },
            pid: header.pid,
            on_this_thread: PhantomData,
        }
    }

    /// Longer data answers become EIO.
    pub(super) fn at_most(mut self, bytes: u32) -> Reply {
        self.answer.length = Length::AtMost(bytes);
        self
    }

    /// Data answers of any other length become EIO: a short answer would tell the kernel that the file ends there.
    pub(super) fn exactly(mut self, bytes: u32) -> Reply {
        self.answer.length = Length::Exactly(bytes);
        self
    }

    /// Answers with `bytes`.
    ///
    /// They must be in ordinary memory that has been written to, not in a mapped file: the kernel copies them while the
    /// daemon may be dying, and a page that is not there then fails the request.
    pub fn bytes(mut self, bytes: &[u8]) {
        self.answer.data(&[bytes]);
    }

    /// Answers with the concatenation of `parts`; for their memory see [`Reply::bytes`].
    pub fn slices(mut self, parts: &[&[u8]]) {
        self.answer.data(parts);
    }

    /// Answers with a structure of the protocol.
    pub(super) fn structure<T: IntoBytes + Immutable>(mut self, value: &T) {
        self.answer.data(&[value.as_bytes()]);
    }

    /// Refuses the request.
    pub fn failure(mut self, failure: Failure) {
        self.answer.failure(failure);
    }

    /// Keeps the request for later and for any thread.
    ///
    /// Where too many are parked already, it is refused at once and the parked reply has nothing left to answer
    /// ([`ParkedReply::is_answered`]).
    pub fn park(self) -> ParkedReply {
        let Reply { mut answer, pid, .. } = self;
        if !answer.connection.park(answer.unique, pid) {
            answer.failure(Failure::Overloaded);
        }
        ParkedReply { answer }
    }
}

/// The answer to a request, to be given later from any thread.
#[derive(Debug)]
pub struct ParkedReply {
    answer: Answer,
}

impl ParkedReply {
    /// Answers with `bytes`, see [`Reply::bytes`].
    pub fn bytes(mut self, bytes: &[u8]) {
        if self.claim() {
            self.answer.data(&[bytes]);
        }
    }

    /// Answers with the concatenation of `parts`, see [`Reply::bytes`].
    pub fn slices(mut self, parts: &[&[u8]]) {
        if self.claim() {
            self.answer.data(parts);
        }
    }

    /// Refuses the request.
    pub fn failure(mut self, failure: Failure) {
        if self.claim() {
            self.answer.failure(failure);
        }
    }

    /// Calls `hook`, once and from any thread, when the request no longer needs an answer because its caller is being
    /// killed; at once if that is so already.
    pub fn on_cancel(&self, hook: impl FnOnce() + Send + 'static) {
        let mut table = self.answer.connection.table.lock();
        match table.parked.get_mut(&self.answer.unique) {
            Some(parked) => parked.hook = Some(Box::new(hook)),
            None => {
                drop(table);
                hook();
            }
        }
    }

    /// Resolves when the request no longer needs an answer, see [`ParkedReply::on_cancel`].
    pub fn cancelled(&self) -> impl Future<Output = ()> + Send + 'static {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.on_cancel(move || {
            let _ = sender.send(());
        });
        async move {
            // A dropped hook means that the request was answered: then nothing is cancelled.
            if receiver.await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Whether somebody has answered it: it was cancelled, or refused as one too many.
    pub fn is_answered(&self) -> bool {
        !self.answer.open || !self.answer.connection.table.lock().parked.contains_key(&self.answer.unique)
    }

    /// Takes the right to answer.
    fn claim(&mut self) -> bool {
        if !self.answer.open {
            return false;
        }
        let mine = self.answer.connection.table.lock().parked.remove(&self.answer.unique).is_some();
        self.answer.open = mine;
        mine
    }
}

impl Drop for ParkedReply {
    fn drop(&mut self) {
        self.claim();
    }
}

#[derive(Debug)]
struct Answer {
    connection: Arc<Connection>,
    unique: u64,
    length: Length,
    open: bool,
}

#[derive(Debug, Clone, Copy)]
enum Length {
    AtMost(u32),
    Exactly(u32),
}

impl Answer {
    fn data(&mut self, parts: &[&[u8]]) {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let fits = match self.length {
            Length::AtMost(most) => u32::try_from(bytes).is_ok_and(|bytes| bytes <= most),
            Length::Exactly(wanted) => u32::try_from(bytes) == Ok(wanted),
        };
        if !fits {
            tracing::error!(unique = self.unique, bytes, wanted = ?self.length, "an answer has the wrong length");
            return self.failure(Failure::Failed);
        }
        self.open = false;
        self.connection.send(self.unique, 0, parts);
    }

    fn failure(&mut self, failure: Failure) {
        self.open = false;
        // A daemon that leaves does not fail what its successor can serve.
        if !self.connection.is_leaving() {
            self.connection.send(self.unique, -failure.errno(), &[]);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.open {
            self.failure(Failure::Failed);
        }
    }
}

/// What all threads of a session share.
pub(super) struct Connection {
    pub(super) fd: OwnedFd,
    pub(super) table: Mutex<Table>,
    /// Signalled when a request is to be watched and when the session has ended.
    pub(super) changed: Condvar,
    parked_max: usize,
    leaving: AtomicBool,
    orphans: AtomicBool,
}

impl fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Connection").field("fd", &self.fd).finish_non_exhaustive()
    }
}

#[derive(Default)]
pub(super) struct Table {
    pub(super) parked: HashMap<u64, Parked>,
    /// Parked requests whose caller got a signal that did not kill it; may name requests that are gone.
    pub(super) watched: Vec<u64>,
    pub(super) ended: Option<Ended>,
}

impl Table {
    /// Request and caller of all that are watched; forgets those that are gone.
    pub(super) fn watched_callers(&mut self) -> Vec<(u64, u32)> {
        let Table { parked, watched, .. } = self;
        watched.retain(|unique| parked.contains_key(unique));
        watched.iter().filter_map(|unique| parked.get(unique).map(|parked| (*unique, parked.pid))).collect()
    }
}

pub(super) struct Parked {
    pub(super) pid: u32,
    pub(super) watched: bool,
    hook: Option<Box<dyn FnOnce() + Send>>,
}

impl Connection {
    pub(super) fn new(fd: OwnedFd, parked_max: usize) -> Connection {
        Connection {
            fd,
            table: Mutex::default(),
            changed: Condvar::new(),
            parked_max,
            leaving: AtomicBool::new(false),
            orphans: AtomicBool::new(false),
        }
    }

    /// From now on requests are answered with their bytes or not at all.
    pub(super) fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    /// There are requests that an earlier daemon had read and that nobody will answer.
    pub(super) fn note_orphans(&self) {
        self.orphans.store(true, Ordering::Release);
    }

    pub(super) fn has_orphans(&self) -> bool {
        self.orphans.load(Ordering::Acquire)
    }

    /// Ends a parked request whose caller is dying. `false` if it is no longer parked.
    pub(super) fn cancel(&self, unique: u64) -> bool {
        let Some(parked) = self.table.lock().parked.remove(&unique) else { return false };
        self.send(unique, -Failure::Cancelled.errno(), &[]);
        if let Some(hook) = parked.hook {
            hook();
        }
        true
    }

    /// Writes one message. `error` is 0 or a negative error number; for `unique` 0 a notification code.
    pub(super) fn send(&self, unique: u64, error: i32, parts: &[&[u8]]) {
        match self.try_send(unique, error, parts) {
            Ok(()) => {}
            // The kernel gave the request up, or the whole connection: nobody waits for the answer.
            Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED) => {}
            Err(errno) => tracing::error!(unique, error, %errno, "the kernel refused an answer"),
        }
    }

    pub(super) fn try_send(&self, unique: u64, error: i32, parts: &[&[u8]]) -> Result<(), Errno> {
        let body: usize = parts.iter().map(|part| part.len()).sum();
        let len = u32::try_from(body + size_of::<OutHeader>()).map_err(|_| Errno::MSGSIZE)?;
        let header = OutHeader { len, error, unique };
        let written = match parts {
            [] => rustix::io::write(&self.fd, header.as_bytes()),
            [part] => rustix::io::writev(&self.fd, &[IoSlice::new(header.as_bytes()), IoSlice::new(part)]),
            parts => {
                let mut slices = Vec::with_capacity(parts.len() + 1);
                slices.push(IoSlice::new(header.as_bytes()));
                slices.extend(parts.iter().map(|part| IoSlice::new(part)));
                rustix::io::writev(&self.fd, &slices)
            }
        };
        written.map(drop)
    }

    fn park(&self, unique: u64, pid: u32) -> bool {
        let mut table = self.table.lock();
        if table.parked.len() >= self.parked_max {
            return false;
        }
        table.parked.insert(unique, Parked { pid, watched: false, hook: None });
        true
    }
}
