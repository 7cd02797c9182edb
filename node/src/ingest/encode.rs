//! Encoding of chunks to their wire form beside the ingest, on a few threads of their own.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use layer::ChunkIndex;
use layer::wire::Encoder;
use parking_lot::{Condvar, Mutex};

use super::frames::Frames;

/// Chunks that wait for a thread, for all ingests together: 8 MiB of plain bytes.
const QUEUE_MAX: usize = 64;
/// zstd level of who encodes because the queue is full: the machine, not the network, is then what readers wait for, so
/// speed counts more than size (424 against 246 MB/s, 1.10 against 1.04 of the gzip layer).
const HURRIED_LEVEL: i32 = 1;

/// The threads. Dropping the last handle ends them.
#[derive(Debug)]
pub struct EncodePool {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<QueueState>,
    filled: Condvar,
}

#[derive(Debug, Default)]
struct QueueState {
    jobs: VecDeque<Job>,
    closed: bool,
}

#[derive(Debug)]
struct Job {
    batch: Arc<BatchState>,
    chunk: ChunkIndex,
    plain: Vec<u8>,
}

/// The chunks of one ingest on their way to its frames.
pub struct Batch {
    state: Arc<BatchState>,
    queue: Arc<Queue>,
    encoder: Encoder,
    frame: Vec<u8>,
}

#[derive(Debug)]
struct BatchState {
    frames: Arc<Frames>,
    progress: Mutex<Progress>,
    done: Condvar,
}

#[derive(Debug, Default)]
struct Progress {
    queued: usize,
    error: Option<io::Error>,
}

impl EncodePool {
    /// Starts `threads` threads, at least one.
    pub fn new(threads: usize) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let thread = |number| {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new().name(format!("encode-{number}")).spawn(move || queue.work())
        };
        let threads = (0..threads.max(1)).map(thread).collect::<io::Result<Vec<_>>>()?;
        Ok(Self { queue, threads })
    }

    /// A way to encode chunks into `frames`.
    pub fn batch(&self, frames: Arc<Frames>) -> Batch {
        let state = BatchState { frames, progress: Mutex::default(), done: Condvar::new() };
        Batch {
            state: Arc::new(state),
            queue: Arc::clone(&self.queue),
            encoder: Encoder::with_level(HURRIED_LEVEL),
            frame: Vec::new(),
        }
    }
}

impl Drop for EncodePool {
    fn drop(&mut self) {
        self.queue.state.lock().closed = true;
        self.queue.filled.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Batch {
    /// Encodes `chunk` soon; at once and on this thread where the queue is full. So an ingest is never slower than one
    /// core that reads and encodes, and what is queued stays bounded. Waiting instead would not be faster: when the queue is
    /// full every core encodes already, and the quick level is the shortest way to the end that readers wait for.
    pub fn push(&mut self, chunk: ChunkIndex, plain: &[u8]) {
        {
            let mut queue = self.queue.state.lock();
            if queue.jobs.len() < QUEUE_MAX && !queue.closed {
                self.state.progress.lock().queued += 1;
                queue.jobs.push_back(Job { batch: Arc::clone(&self.state), chunk, plain: plain.to_vec() });
                drop(queue);
                self.queue.filled.notify_one();
                return;
            }
        }
        self.frame.clear();
        self.encoder.encode(plain, &mut self.frame);
        if let Err(error) = self.state.frames.append(chunk, &self.frame) {
            self.state.progress.lock().error.get_or_insert(error);
        }
    }

    /// Waits until all chunks are in the frames; gives the first error in writing one.
    pub fn finish(self) -> io::Result<()> {
        let mut progress = self.state.progress.lock();
        while progress.queued > 0 {
            self.state.done.wait(&mut progress);
        }
        progress.error.take().map_or(Ok(()), Err)
    }

    /// Whether a chunk could not be written, so that going on is useless.
    pub fn has_failed(&self) -> bool {
        self.state.progress.lock().error.is_some()
    }
}

impl Queue {
    fn work(&self) {
        let (mut encoder, mut frame) = (Encoder::new(), Vec::new());
        while let Some(job) = self.next() {
            frame.clear();
            encoder.encode(&job.plain, &mut frame);
            let written = job.batch.frames.append(job.chunk, &frame);
            let mut progress = job.batch.progress.lock();
            if let Err(error) = written {
                progress.error.get_or_insert(error);
            }
            progress.queued -= 1;
            if progress.queued == 0 {
                job.batch.done.notify_all();
            }
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            self.filled.wait(&mut state);
        }
    }
}

#[cfg(test)]
mod tests {
    use layer::wire::{Decoder, Frame};

    use super::*;

    #[test]
    fn more_chunks_than_the_queue_holds_all_arrive() {
        let directory = tempfile::tempdir().unwrap();
        let frames = Arc::new(Frames::create(&directory.path().join("f")).unwrap());
        let pool = EncodePool::new(1).unwrap();
        let mut batch = pool.batch(Arc::clone(&frames));
        let count = QUEUE_MAX as u32 * 3;
        for chunk in 0..count {
            batch.push(ChunkIndex(chunk), &chunk.to_le_bytes().repeat(1000));
        }
        batch.finish().unwrap();
        let mut wire = Vec::new();
        assert_eq!(frames.read(0..count, usize::MAX, &mut wire).unwrap(), count);
        let (mut rest, mut decoder, mut plain) = (&wire[..], Decoder::new(), Vec::new());
        for chunk in 0..count {
            let (frame, after) = Frame::split(rest).unwrap();
            decoder.decode(frame, 4000, &mut plain).unwrap();
            assert_eq!(plain, chunk.to_le_bytes().repeat(1000));
            rest = after;
        }
    }
}
