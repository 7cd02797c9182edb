//! Brings a blob and its wire forms to the disk while they come, so that what waits for its end does not wait for all of that.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::thread::{self, JoinHandle};

use super::frames::Frames;

/// Bytes that are written before they are brought to the disk: what is left at the end takes a hundredth of a second on a fast disk.
const STEP: u64 = 16 << 20;

/// A thread that does it. Dropping this ends the thread with what it is at.
pub(super) struct Flush {
    wake: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
    next: u64,
}

impl Flush {
    /// `blob` is the file that is being written, if there is one.
    pub(super) fn start(blob: Option<File>, frames: Arc<Frames>) -> io::Result<Self> {
        let (wake, woken) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("flush".to_owned()).spawn(move || {
            while let Ok(()) = woken.recv() {
                blob.as_ref().map_or(Ok(()), File::sync_data)?;
                frames.flush()?;
            }
            Ok(())
        })?;
        Ok(Self { wake, thread, next: STEP })
    }

    /// So many bytes were written in all. Gives whether the disk took those before.
    pub(super) fn wrote(&mut self, bytes: u64) -> bool {
        if bytes < self.next {
            return true;
        }
        match self.wake.try_send(()) {
            Ok(()) => self.next = bytes + STEP,
            // It is busy with what was written before; this is soon told again.
            Err(TrySendError::Full(())) => {}
            Err(TrySendError::Disconnected(())) => return false,
        }
        true
    }

    /// Why the disk did not take what was written.
    pub(super) fn failure(self) -> io::Error {
        self.finish().err().unwrap_or_else(|| io::Error::other("the thread that flushes ended"))
    }

    /// Whether the disk took everything: the kernel tells of a failed write only once, and may have told this thread.
    pub(super) fn finish(self) -> io::Result<()> {
        drop(self.wake);
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that flushes panicked")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_disk_did_not_take_is_told_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let end = |blob: File| {
            let frames = Arc::new(Frames::create(&directory.path().join("wire")).unwrap());
            let mut flush = Flush::start(Some(blob), frames).unwrap();
            assert!(flush.wrote(STEP - 1) && flush.wrote(3 * STEP));
            flush.finish()
        };
        end(File::create(directory.path().join("blob")).unwrap()).unwrap();
        // Nothing can be synced there.
        assert!(end(File::open("/dev/null").unwrap()).is_err());
    }
}
