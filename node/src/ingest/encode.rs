//! Encoding of chunks to their wire form beside the ingest, on a few threads of their own.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use layer::ChunkIndex;
use layer::wire::{Encoder, LEVEL};
use parking_lot::{Condvar, Mutex};

use super::frames::Frames;

/// Chunks that wait for a thread, for all ingests together: 3 MiB of plain bytes.
pub(super) const QUEUE_MAX: usize = 24;
/// zstd level of who encodes because the queue is full: every core is at work then, and the ingest's end is what readers wait for.
const HURRIED_LEVEL: i32 = LEVEL - 1;

/// zstd level for a chunk behind which so many others wait: with little to do, twice the time for some 1 to 3 % less is well spent,
/// since this is done once and the chunk travels to every node.
const fn level(waiting: usize) -> i32 {
    if waiting < QUEUE_MAX / 6 { LEVEL + 1 } else { LEVEL }
}

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
    /// Places promised to jobs that are being made.
    promised: usize,
    /// Buffers of jobs that are done: fresh memory costs a page fault for every 4 KiB.
    spare: Vec<Vec<u8>>,
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
    /// full every core encodes already.
    pub fn push(&mut self, chunk: ChunkIndex, plain: &[u8]) {
        if let Some(mut buffer) = self.queue.promise() {
            buffer.clear();
            buffer.extend_from_slice(plain);
            self.state.progress.lock().queued += 1;
            self.queue.keep_promise(Job { batch: Arc::clone(&self.state), chunk, plain: buffer });
            return;
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
    /// A place in the queue, with a buffer for the job; `None` where it is full.
    fn promise(&self) -> Option<Vec<u8>> {
        let mut state = self.state.lock();
        if state.jobs.len() + state.promised >= QUEUE_MAX || state.closed {
            return None;
        }
        state.promised += 1;
        Some(state.spare.pop().unwrap_or_default())
    }

    fn keep_promise(&self, job: Job) {
        let mut state = self.state.lock();
        state.promised -= 1;
        state.jobs.push_back(job);
        if state.closed {
            // All wait for the last promise then.
            self.filled.notify_all();
        } else {
            self.filled.notify_one();
        }
    }

    fn work(&self) {
        let (mut encoder, mut frame) = (Encoder::new(), Vec::new());
        while let Some((job, level)) = self.next() {
            frame.clear();
            encoder.set_level(level);
            encoder.encode(&job.plain, &mut frame);
            let written = job.batch.frames.append(job.chunk, &frame);
            let Job { batch, plain, .. } = job;
            {
                let mut progress = batch.progress.lock();
                if let Err(error) = written {
                    progress.error.get_or_insert(error);
                }
                progress.queued -= 1;
                if progress.queued == 0 {
                    batch.done.notify_all();
                }
            }
            self.reuse(plain);
        }
    }

    /// The next job and the level for it; `None` when no more will come.
    fn next(&self) -> Option<(Job, i32)> {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some((job, level(state.jobs.len())));
            }
            if state.closed && state.promised == 0 {
                return None;
            }
            self.filled.wait(&mut state);
        }
    }

    fn reuse(&self, buffer: Vec<u8>) {
        let mut state = self.state.lock();
        if state.jobs.len() + state.promised + state.spare.len() < QUEUE_MAX {
            state.spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use layer::wire::{Decoder, Frame};

    use super::*;

    #[test]
    fn levels_fall_with_what_waits() {
        let levels: Vec<_> = (0..QUEUE_MAX).map(level).collect();
        assert!(levels.is_sorted_by(|a, b| a >= b));
        assert!(levels.iter().all(|level| *level >= LEVEL) && HURRIED_LEVEL < LEVEL);
    }

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
        let (mut rest, mut decoder) = (&wire[..], Decoder::new());
        for chunk in 0..count {
            let (frame, after) = Frame::split(rest).unwrap();
            assert_eq!(decoder.decode(frame, 4000).unwrap(), chunk.to_le_bytes().repeat(1000));
            rest = after;
        }
    }
}
