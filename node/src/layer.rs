//! A layer that can be read while most of it is elsewhere.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use layer::index::{Header, Section, Spans, parse_entries};
use layer::tree::{Tree, Unpacked};
use layer::{ChunkIndex, Digest, Geometry};
use parking_lot::Mutex;
use swarm::{LayerKey, SourceId};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::counters::{CounterValues, Counters};
use crate::driver::Inbox;
use crate::reader::{Ahead, Enter, OnDone, ReadError, Streams, Waiting, Waits, around};
use crate::scrub::Scrubbed;
use crate::source::Source;
use crate::store::{Added, Change, Held, LayerStore, StoreError, Unstored};

/// How often a read starts again when its chunks came and were lost before it could read them.
const ATTEMPTS_MAX: u32 = 3;

/// Most runs that wait for the driver to take them; what is beyond is only read less early.
const AHEAD_MAX: usize = 256;

/// How often a layer may log that its disk or its sources fail.
const LOG_PAUSE: Duration = Duration::from_secs(5);

/// What is read ahead for a reader who goes through the layer in order, and what it will probably read after that.
pub(crate) type InOrder = (Range<u32>, Range<u32>);

/// One layer of the node: its index, the chunks that are here, and who waits for others.
#[derive(Debug)]
pub struct Layer {
    store: LayerStore,
    waits: Waits,
    streams: Streams,
    /// Runs to fetch ahead of readers, and which of them are for readers in order, until the driver takes them.
    ahead: Mutex<Vec<Range<u32>>>,
    in_order: Mutex<Vec<InOrder>>,
    sources: Mutex<Sources>,
    filling: AtomicBool,
    /// How many wait for the whole layer.
    awaited: AtomicUsize,
    mounted: AtomicBool,
    complete: AtomicBool,
    /// Chunks went since the driver looked last.
    lost: AtomicBool,
    /// When a seeder or a registry gave a right chunk last, in the room's time; 0: never.
    answered: AtomicU32,
    /// When somebody asked last to mount it, in the room's time.
    wanted: AtomicU32,
    unpacked: OnceLock<Unpacked>,
    counters: Counters,
    inbox: Arc<Inbox>,
    logged_unstored: Mutex<Option<Instant>>,
    /// Chunks that did not arrive in time since that was said; `None`: it was not said lately.
    unsaid: Mutex<Option<Unsaid>>,
}

/// What happened since something like it was said.
#[derive(Debug, Default)]
struct Unsaid {
    chunks: u64,
    reads: usize,
}

/// The sources of a layer. The version grows when a source is replaced, so that the driver notices.
#[derive(Debug, Default)]
struct Sources {
    version: u64,
    by_id: BTreeMap<SourceId, (u64, Arc<dyn Source>)>,
}

/// A read that waits. Dropping it ends the wait; [`OnDone`] is not called any more then.
#[must_use = "dropping it cancels the read"]
#[derive(Debug)]
pub struct WaitHandle {
    wait: Option<(Arc<Layer>, u64)>,
}

/// Somebody waits for a whole layer; dropping it says that nobody does any more.
#[must_use = "dropping it ends the hurry"]
#[derive(Debug)]
pub struct Awaited(Arc<Layer>);

/// Settings of a layer's reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadOptions {
    pub(crate) waiting_max: usize,
    pub(crate) readahead_bytes_max: u64,
}

impl Layer {
    pub(crate) fn new(store: LayerStore, options: ReadOptions, node: Arc<Counters>, inbox: Arc<Inbox>) -> Arc<Self> {
        let waits = Waits::new(options.waiting_max);
        if let Some(reason) = store.quarantined() {
            waits.close(ReadError::Quarantined(reason));
        }
        let now = store.room().now();
        Arc::new(Self {
            complete: AtomicBool::new(store.is_complete()),
            store,
            waits,
            streams: Streams::new(options.readahead_bytes_max),
            ahead: Mutex::default(),
            in_order: Mutex::default(),
            sources: Mutex::default(),
            filling: AtomicBool::new(false),
            awaited: AtomicUsize::new(0),
            mounted: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            answered: AtomicU32::new(0),
            wanted: AtomicU32::new(now),
            unpacked: OnceLock::new(),
            counters: Counters::of_layer(node),
            inbox,
            logged_unstored: Mutex::default(),
            unsaid: Mutex::default(),
        })
    }

    /// The index's header.
    pub fn header(&self) -> &Header {
        self.store.header()
    }

    /// Digest of the device.
    pub fn diff_id(&self) -> Digest {
        self.store.header().diff_id()
    }

    /// How the device is cut into chunks.
    pub fn geometry(&self) -> Geometry {
        self.store.header().geometry()
    }

    /// The layer's number on this node: the same after each restart, and never another layer's.
    pub fn number(&self) -> u64 {
        self.store.number()
    }

    /// The signature of the index, as the layer was inserted with.
    pub fn signature(&self) -> &[u8] {
        self.store.signature()
    }

    /// The layer's paths, read from disk and parsed with each call.
    pub fn tree(&self) -> Result<Tree, StoreError> {
        let bytes = self.store.section(Section::Entries)?.ok_or_else(|| self.missing(Section::Entries))?;
        let tree = parse_entries(self.header(), &bytes)?;
        self.unpacked.get_or_init(|| tree.unpacked());
        Ok(tree)
    }

    /// What the layer would take if it were unpacked. Parses its entries where [`Layer::tree`] has not done so yet.
    pub fn unpacked(&self) -> Result<Unpacked, StoreError> {
        match self.unpacked.get() {
            Some(unpacked) => Ok(*unpacked),
            None => Ok(self.tree()?.unpacked()),
        }
    }

    /// How long nobody has asked for the layer to be mounted.
    pub fn idle(&self) -> Duration {
        self.store.room().since(self.wanted.load(Ordering::Relaxed))
    }

    /// Somebody is about to mount the layer.
    pub(crate) fn note_wanted(&self) {
        self.wanted.store(self.store.room().now(), Ordering::Relaxed);
    }

    /// The encoded bytes of a section, to pass them on; `None` where it is not here.
    pub fn section(&self, section: Section) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.section(section)
    }

    /// How to inflate the blob, where the spans section is here.
    pub fn spans(&self) -> Result<Option<Spans>, StoreError> {
        let Some(bytes) = self.store.section(Section::Spans)? else { return Ok(None) };
        Ok(Some(Spans::parse(self.header(), &bytes)?))
    }

    /// Stores the spans section, which may come later than the others. Blocks for the disk.
    pub fn put_spans(&self, bytes: &[u8]) -> Result<(), StoreError> {
        self.store.put_section(Section::Spans, bytes)
    }

    /// Whether every chunk is here.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire) && !self.store.is_quarantined()
    }

    /// Whether the device is complete and was compared whole with its diffID, so that it may be read without Drover in
    /// between ([`Layer::device_path`]).
    pub fn is_proven(&self) -> bool {
        self.is_complete() && self.store.is_proven()
    }

    /// Why the layer must not be used for new containers, if so: its index is wrong, or one of its chunks fails again and again.
    pub fn quarantine(&self) -> Option<String> {
        self.store.quarantined().or_else(|| self.store.failing().map(|cause| cause.to_string()))
    }

    /// Whether its index is wrong, so that nothing of it can be read. A layer that is quarantined for another reason gives all
    /// chunks that are right.
    pub fn has_wrong_index(&self) -> bool {
        self.store.is_quarantined()
    }

    /// The file with the device's chunks; holes where chunks are missing.
    pub fn device_path(&self) -> PathBuf {
        self.store.device_path()
    }

    /// Bytes of the chunks that are here.
    pub fn bytes_here(&self) -> u64 {
        self.store.bytes_here()
    }

    /// What came from where, and how reads fared, since the node was opened.
    pub fn counters(&self) -> CounterValues {
        self.counters.values()
    }

    /// Reads that wait for chunks now.
    pub fn waiting_reads(&self) -> usize {
        self.waits.read_count()
    }

    /// Lets chunks be fetched from `source` too. One with the same kind and label is replaced.
    pub fn add_source(&self, source: Arc<dyn Source>) {
        let id = self.inbox.source_id(source.kind(), source.label());
        {
            let mut sources = self.sources.lock();
            sources.version += 1;
            let version = sources.version;
            sources.by_id.insert(id, (version, source));
        }
        self.inbox.touch(self.key());
    }

    /// Forgets the source of that kind and label; its transfers for this layer end.
    pub fn remove_source(&self, source: &dyn Source) {
        let id = self.inbox.source_id(source.kind(), source.label());
        self.sources.lock().by_id.remove(&id);
        self.inbox.touch(self.key());
    }

    /// Whether chunks that are missing can be asked for.
    pub fn has_sources(&self) -> bool {
        !self.sources.lock().by_id.is_empty()
    }

    /// Whether the rest of the layer is fetched in the background. Off for a new layer: turn it on once it is mounted.
    pub fn set_filling(&self, filling: bool) {
        self.filling.store(filling, Ordering::Release);
        self.inbox.touch(self.key());
    }

    /// Fetches the whole layer without delay, also where nothing is filled in the background, for as long as what this gives is
    /// kept. What containers of this node read goes first, as always.
    pub fn awaited(self: &Arc<Self>) -> Awaited {
        self.awaited.fetch_add(1, Ordering::AcqRel);
        self.inbox.touch(self.key());
        Awaited(self.clone())
    }

    /// Whether containers may read the layer: then nothing of it is evicted that nobody else gives. On for layers that were on
    /// disk when the node was opened, off for new ones.
    pub fn set_mounted(&self, mounted: bool) {
        self.mounted.store(mounted, Ordering::Release);
    }

    /// Keeps the whole device on disk for `holder`, who is about to read its file without Drover in between; `false`: the
    /// device is not complete and proven, or too much of the cache is kept whole already. Holds over restarts of the process, until [`Layer::unpin`] or the machine's next
    /// start. Blocks for the disk.
    pub fn pin(&self, holder: &str) -> Result<bool, StoreError> {
        if self.is_proven() { self.store.pin(holder) } else { Ok(false) }
    }

    /// The same for who reads the file already, in whatever state it is.
    pub fn pin_anyway(&self, holder: &str) -> Result<(), StoreError> {
        self.store.pin_anyway(holder)
    }

    /// `holder` does not read the file any more. Gives whether it did. Blocks for the disk.
    pub fn unpin(&self, holder: &str) -> Result<bool, StoreError> {
        self.store.unpin(holder)
    }

    /// Bytes that the device takes on the disk.
    pub fn disk_bytes(&self) -> u64 {
        self.store.disk_bytes()
    }

    /// Reads `range`, cut at the end of the device, in place of what `buf` has, if all of it is here. Never waits for the
    /// network; blocks for the disk. `None`: not all is here, or the layer is quarantined. The disk's errors are not seen: what
    /// cannot be read is missing.
    pub fn read_now(&self, range: Range<u64>, buf: &mut Vec<u8>) -> Option<io::Result<()>> {
        let range = self.clamp(range);
        let is_here = self.read_here(&range, &[], buf);
        if is_here {
            self.counters.add(|counters| &counters.reads_here, 1);
            self.observe(&range);
        }
        is_here.then_some(Ok(()))
    }

    /// Reads `range`, cut at the end of the device. Waits for missing chunks, at most until their deadline
    /// ([`crate::NodeConfig::read_deadline`]). Dropping the future ends the wait.
    pub fn read(
        self: &Arc<Self>,
        range: Range<u64>,
    ) -> impl Future<Output = Result<Bytes, ReadError>> + Send + 'static {
        let layer = self.clone();
        async move {
            let (sender, receiver) = oneshot::channel();
            let _wait = layer.read_with(
                range,
                Box::new(move |result| {
                    let _ = sender.send(result);
                }),
            );
            receiver.await.unwrap_or(Err(ReadError::Removed))
        }
    }

    /// The same with a callback, which is called before this returns if nothing has to be waited for. The caller needs no
    /// runtime.
    pub fn read_with(self: &Arc<Self>, range: Range<u64>, on_done: OnDone) -> WaitHandle {
        let range = self.clamp(range);
        self.observe(&range);
        let chunks = self.geometry().covering(range.clone());
        if !self.streams.is_off() && !chunks.is_empty() && !self.complete.load(Ordering::Acquire) {
            // The driver is woken by the wait, so that what is waited for is asked for first.
            self.note_ahead(around(&chunks, self.geometry(), |run| self.store.count_here(run)));
        }
        self.enter(Waiting::new(range, chunks, Instant::now(), on_done))
    }

    /// Wants the missing chunks of `range` soon, without waiting for them.
    pub fn prefetch(&self, range: Range<u64>) {
        let run = self.geometry().covering(self.clamp(range));
        if !run.is_empty() && !self.is_complete() && self.note_ahead(run) {
            self.inbox.touch(self.key());
        }
    }

    /// Leaves a run for the driver; `false`: too many are left already.
    fn note_ahead(&self, run: Range<u32>) -> bool {
        let mut ahead = self.ahead.lock();
        let has_room = ahead.len() < AHEAD_MAX;
        if has_room {
            ahead.push(run);
        }
        has_room
    }

    /// Takes the plain bytes of a chunk that came in another way than from a source. Gives whether they are the chunk.
    pub fn add_chunk(self: &Arc<Self>, chunk: ChunkIndex, plain: &[u8]) -> bool {
        if !self.store.digests().is_chunk(chunk, plain) {
            return false;
        }
        self.take_chunk(chunk.0, plain);
        self.inbox.here(self.key(), chunk.0);
        true
    }

    pub(crate) fn key(&self) -> LayerKey {
        LayerKey(self.store.number())
    }

    pub(crate) fn store(&self) -> &LayerStore {
        &self.store
    }

    pub(crate) fn waits(&self) -> &Waits {
        &self.waits
    }

    pub(crate) fn own_counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn is_filling(&self) -> bool {
        let is_wanted = self.filling.load(Ordering::Acquire) || self.is_awaited();
        is_wanted && !self.is_complete() && !self.store.is_quarantined()
    }

    /// Whether somebody waits for the whole layer.
    pub(crate) fn is_awaited(&self) -> bool {
        self.awaited.load(Ordering::Acquire) > 0
    }

    pub(crate) fn source(&self, id: SourceId) -> Option<Arc<dyn Source>> {
        self.sources.lock().by_id.get(&id).map(|(_, source)| source.clone())
    }

    /// The sources with their versions.
    pub(crate) fn sources(&self) -> BTreeMap<SourceId, (u64, Arc<dyn Source>)> {
        self.sources.lock().by_id.clone()
    }

    /// The runs of missing chunks that readers will probably need.
    pub(crate) fn take_ahead(&self) -> Vec<Range<u32>> {
        let asked = std::mem::take(&mut *self.ahead.lock());
        let mut missing = Vec::new();
        for run in asked {
            let mut from = run.start;
            while let Some(gap) = self.store.next_missing(from).filter(|gap| gap.start < run.end) {
                from = gap.end;
                missing.push(gap.start..gap.end.min(run.end));
            }
        }
        missing
    }

    /// What readers who go through the layer in order will probably read.
    pub(crate) fn take_in_order(&self) -> Vec<InOrder> {
        std::mem::take(&mut *self.in_order.lock())
    }

    /// Stores a chunk whose digest was checked and wakes who waits for it. Gives whether it was missing.
    pub(crate) fn take_chunk(self: &Arc<Self>, chunk: u32, plain: &[u8]) -> bool {
        let (is_new, held) = match self.store.add(chunk, plain) {
            Added::Known => (false, None),
            Added::Written => {
                self.inbox.needs_flush(self.key());
                (true, None)
            }
            Added::Unstored(reason, held) => {
                self.counters.add(|counters| &counters.unstored_chunks, 1);
                // That there is no room is said by the evictor, who knows why.
                if let Unstored::Disk(error) = reason
                    && is_time(&self.logged_unstored)
                {
                    tracing::warn!(layer = %self.diff_id(), %error, "cannot store chunks: reads go on, but each fetches its chunks again");
                }
                (true, held)
            }
        };
        if self.store.is_complete() && !self.complete.swap(true, Ordering::AcqRel) {
            tracing::info!(layer = %self.diff_id(), "complete");
            self.inbox.needs_flush(self.key());
        }
        let ready = self.waits.arrived(chunk, held.as_ref(), |chunk| self.store.is_here(chunk));
        self.answer(ready);
        self.store.note_right(chunk);
        self.judge();
        is_new
    }

    /// A seeder or a registry gave something else for `chunk`. Neighbours do not count: one that lies must not take a layer out of
    /// service.
    pub(crate) fn note_wrong(&self, chunk: u32) {
        self.store.note_wrong(chunk);
        self.judge();
    }

    /// Asks once more for the chunk because of which the layer is quarantined, or looks whether it stays.
    pub(crate) fn mend(&self) {
        let Some(cause) = self.store.failing() else { return };
        if !self.store.look_again(cause) {
            self.note_loss();
            let chunk = cause.chunk();
            if chunk < self.geometry().chunk_count() && self.note_ahead(chunk..chunk + 1) {
                self.inbox.touch(self.key());
            }
        }
        self.judge();
    }

    /// Compares the chunks of `run` that are on the disk with their digests. What is damaged is fetched again, as is what lacks in a
    /// device that somebody reads from the disk. Blocks for the disk.
    pub(crate) fn scrub(&self, run: Range<u32>) -> Scrubbed {
        let mut scrubbed = Scrubbed::default();
        if self.store.is_quarantined() {
            return scrubbed;
        }
        let mut missing = Vec::new();
        for chunk in run {
            match self.store.scrub(chunk) {
                Some(true) => scrubbed.bytes += self.geometry().chunk_len(ChunkIndex(chunk)) as u64,
                Some(false) => {
                    scrubbed.rotten += 1;
                    missing.push(chunk);
                }
                None if self.store.is_pinned() => missing.push(chunk),
                None => {}
            }
        }
        if scrubbed.rotten > 0 {
            self.note_loss();
        }
        if !missing.is_empty() {
            // What is too much for now is missing in the next pass, too.
            let _ = missing.into_iter().all(|chunk| self.note_ahead(chunk..chunk + 1));
            self.inbox.touch(self.key());
        }
        scrubbed
    }

    /// Says once when the layer's quarantine begins and ends.
    fn judge(&self) {
        let Some(change) = self.store.judge() else { return };
        let layer = self.diff_id();
        match change {
            Change::Began(cause) => {
                tracing::error!(%layer, reason = %cause, "the layer is quarantined: it is not used for new containers; those that run go on");
            }
            Change::Ended => {
                tracing::info!(%layer, "the layer is quarantined no more");
            }
        }
        // That makes it durable, and proves what was not proven meanwhile.
        self.inbox.needs_flush(self.key());
    }

    /// Fails everyone who waits for `chunk`. On the node's runtime.
    pub(crate) fn fail_chunk(self: &Arc<Self>, chunk: u32, reasons: Arc<[String]>) {
        let (failed, ready) = self.waits.failed(chunk, |chunk| self.store.is_here(chunk));
        if !failed.is_empty() {
            self.counters.add(|counters| &counters.expired_chunks, 1);
            self.say_failed(chunk, failed.len(), &reasons);
        }
        self.fail(failed, ReadError::Deadline { chunk, reasons });
        self.answer(ready);
    }

    /// Says that a chunk did not arrive, and of those that follow soon only how many.
    fn say_failed(self: &Arc<Self>, chunk: u32, reads: usize, reasons: &[String]) {
        let mut unsaid = self.unsaid.lock();
        if let Some(unsaid) = &mut *unsaid {
            unsaid.chunks += 1;
            unsaid.reads += reads;
            return;
        }
        *unsaid = Some(Unsaid::default());
        drop(unsaid);
        let reasons = reasons.join("; ");
        tracing::warn!(layer = %self.diff_id(), chunk, reads, reasons, "a chunk did not arrive in time: its reads fail");
        let layer = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(LOG_PAUSE).await;
            let Some(layer) = layer.upgrade() else { return };
            let Some(Unsaid { chunks, reads }) = layer.unsaid.lock().take().filter(|unsaid| unsaid.chunks > 0) else {
                return;
            };
            tracing::warn!(layer = %layer.diff_id(), chunks, reads, "more chunks of this layer did not arrive in time: their reads fail");
        });
    }

    /// Fails everyone who waits or ever will.
    pub(crate) fn close(self: &Arc<Self>, error: ReadError) {
        let waiting = self.waits.close(error.clone());
        self.fail(waiting, error);
        self.inbox.touch(self.key());
    }

    /// Whether containers may read the layer.
    pub(crate) fn is_mounted(&self) -> bool {
        self.mounted.load(Ordering::Acquire)
    }

    /// A seeder or a registry gave a right chunk.
    pub(crate) fn note_answer(&self) {
        self.answered.store(self.store.room().now(), Ordering::Relaxed);
    }

    pub(crate) fn was_answered_within(&self, age: Duration) -> bool {
        let answered = self.answered.load(Ordering::Relaxed);
        answered > 0 && self.store.room().since(answered) <= age
    }

    /// Whether chunks went since this was asked last.
    pub(crate) fn take_lost(&self) -> bool {
        self.lost.swap(false, Ordering::AcqRel)
    }

    /// The store took chunks off the disk.
    pub(crate) fn note_evicted(&self, bytes: u64) {
        self.counters.add(|counters| &counters.evicted_bytes, bytes);
        self.complete.store(self.store.is_complete(), Ordering::Release);
        self.lost.store(true, Ordering::Release);
        self.inbox.touch(self.key());
    }

    /// The store lost chunks.
    pub(crate) fn note_loss(&self) {
        self.complete.store(self.store.is_complete(), Ordering::Release);
        self.lost.store(true, Ordering::Release);
        let rotten = self.store.faults().rotten.swap(0, Ordering::Relaxed);
        if rotten > 0 {
            self.counters.add(|counters| &counters.rotten_chunks, rotten);
            tracing::warn!(layer = %self.diff_id(), chunks = rotten, "chunks were lost or damaged on disk and are fetched again");
            self.inbox.needs_flush(self.key());
            self.inbox.touch(self.key());
            self.judge();
        }
    }

    /// Where a section lies, if it is here.
    pub(crate) fn section_path(&self, section: Section) -> PathBuf {
        self.store.device_path().with_file_name(section.name())
    }

    /// Whether all of `run` is on the disk, which may have lost it without anyone having noticed.
    pub(crate) fn has_run(&self, run: &Range<u32>) -> bool {
        !self.store.is_quarantined() && self.store.next_missing(run.start).is_none_or(|gap| gap.start >= run.end)
    }

    /// Reads a chunk in place of what `out` has, to pass it on; `false`: it is not here. Blocks for the disk.
    pub(crate) fn read_chunk(&self, chunk: ChunkIndex, out: &mut Vec<u8>) -> bool {
        self.read_here(&self.geometry().range(chunk), &[], out)
    }

    fn enter(self: &Arc<Self>, mut read: Waiting) -> WaitHandle {
        let mut buf = Vec::new();
        loop {
            if self.read_here(&read.range, &read.held, &mut buf) {
                self.finish(read, Bytes::from(buf));
                return WaitHandle { wait: None };
            }
            // The flag is set before those who wait are failed.
            if let Some(reason) = self.store.quarantined() {
                self.fail(vec![read], ReadError::Quarantined(reason));
                return WaitHandle { wait: None };
            }
            // Chunks that are not stored may be gone any number of times; the chunk's deadline ends that.
            let is_short = self.store.room().is_refusing() || self.store.has_unstored();
            if read.attempts >= ATTEMPTS_MAX && !is_short {
                self.fail(vec![read], ReadError::Io);
                return WaitHandle { wait: None };
            }
            match self.waits.enter(read, |chunk| self.store.is_here(chunk)) {
                Enter::Waits(id) => {
                    self.inbox.touch(self.key());
                    return WaitHandle { wait: Some((self.clone(), id)) };
                }
                Enter::Ready(again) => {
                    read = again;
                    read.attempts += 1;
                }
                Enter::Closed(read, error) => {
                    self.fail(vec![read], error);
                    return WaitHandle { wait: None };
                }
            }
        }
    }

    /// Answers reads whose chunks are all here.
    fn answer(self: &Arc<Self>, ready: Vec<Waiting>) {
        for mut read in ready {
            read.attempts += 1;
            // Where the chunks are gone again it waits on, under the same number.
            self.enter(read).detach();
        }
    }

    fn finish(&self, read: Waiting, bytes: Bytes) {
        if read.attempts == 0 {
            self.counters.add(|counters| &counters.reads_here, 1);
        } else {
            self.counters.waited(read.since.elapsed());
        }
        (read.on_done)(Ok(bytes));
    }

    fn fail(&self, reads: Vec<Waiting>, error: ReadError) {
        for read in reads {
            self.counters.add(|counters| &counters.reads_failed, 1);
            (read.on_done)(Err(error.clone()));
        }
    }

    fn read_here(&self, range: &Range<u64>, held: &[Held], buf: &mut Vec<u8>) -> bool {
        let is_here = !self.store.is_quarantined() && self.store.read(range, held, buf);
        if !is_here && self.store.faults().rotten.load(Ordering::Relaxed) > 0 {
            self.note_loss();
        }
        is_here
    }

    fn observe(&self, range: &Range<u64>) {
        if !self.complete.load(Ordering::Acquire)
            && let Some(Ahead { window, stretch }) = self.streams.observe(range)
        {
            let mut in_order = self.in_order.lock();
            if in_order.len() < AHEAD_MAX {
                let chunks = |range: &Range<u64>| self.geometry().covering(self.clamp(range.clone()));
                in_order.push((chunks(&window), chunks(&stretch)));
            }
            drop(in_order);
            self.prefetch(window);
        }
    }

    fn clamp(&self, range: Range<u64>) -> Range<u64> {
        let end = range.end.min(self.header().device_size());
        range.start.min(end)..end
    }

    fn missing(&self, section: Section) -> StoreError {
        StoreError::Damaged { path: self.section_path(section), reason: "the file is missing".into() }
    }
}

impl WaitHandle {
    /// Ends the wait. `false`: it was over, and [`OnDone`] was or is being called.
    pub fn cancel(mut self) -> bool {
        self.leave()
    }

    /// Lets the read wait on its own.
    pub fn detach(mut self) {
        self.wait = None;
    }

    fn leave(&mut self) -> bool {
        let Some((layer, id)) = self.wait.take() else { return false };
        let (read, ready) = layer.waits.cancel(id, |chunk| layer.store.is_here(chunk));
        layer.answer(ready);
        layer.inbox.touch(layer.key());
        read.is_some()
    }
}

impl Awaited {
    /// The layer.
    pub fn layer(&self) -> &Arc<Layer> {
        &self.0
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        self.0.awaited.fetch_sub(1, Ordering::AcqRel);
        self.0.inbox.touch(self.0.key());
    }
}

impl Drop for WaitHandle {
    fn drop(&mut self) {
        self.leave();
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {}", self.diff_id())
    }
}

/// Whether something that is said rarely may be said now.
fn is_time(last: &Mutex<Option<Instant>>) -> bool {
    let mut last = last.lock();
    let is_time = last.is_none_or(|last| last.elapsed() >= LOG_PAUSE);
    if is_time {
        *last = Some(Instant::now());
    }
    is_time
}
