//! A layer and sources of it that fail as told.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use layer::index::{HEADER_LEN, Header, Index};
use layer::ingest::{Ingest, Options};
use layer::{ChunkIndex, Digest, index::Compression};
use node::source::{BoxFuture, ChunkSink, Priority, Source, SourceError, SourceKind};
use node::store::LayerParts;
use parking_lot::Mutex;

/// Chunk size of the subjects.
pub(crate) const CHUNK: u64 = 4096;

/// A layer with one file of random bytes, and its index.
#[derive(Clone)]
pub(crate) struct Subject {
    pub(crate) device: Arc<Vec<u8>>,
    index: Arc<Index>,
}

impl Subject {
    pub(crate) fn new(file_len: usize, seed: u64) -> Self {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as u8
        })
        .take(file_len)
        .collect();
        let mut header = tar::Header::new_gnu();
        header.set_path("file").unwrap();
        header.set_size(file_len as u64);
        header.set_mode(0o644);
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append(&header, &bytes[..]).unwrap();
        let device = builder.into_inner().unwrap();
        let options = Options { chunk_log2: 12, ..Options::default() };
        let mut ingest =
            Ingest::new(Digest::of(&device), Some(device.len() as u64), Some(Compression::None), options).unwrap();
        ingest.push(&device, &mut |_, _, _| {}).unwrap();
        let index = ingest.finish(&mut |_, _, _| {}).unwrap();
        Self { device: Arc::new(device), index: Arc::new(index) }
    }

    pub(crate) fn diff_id(&self) -> Digest {
        self.index.header.diff_id()
    }

    pub(crate) fn parts(&self) -> LayerParts {
        LayerParts {
            header: self.index.header.clone(),
            signature: b"signature".to_vec(),
            entries: self.index.entries.clone(),
            chunk_digests: self.index.chunk_digests.clone(),
            spans: Some(self.index.spans.clone()),
        }
    }

    /// The same chunks under the name of another device.
    pub(crate) fn lying_parts(&self, device: Digest) -> LayerParts {
        let encoded: [u8; HEADER_LEN] = self.index.header.encode();
        let right = *self.diff_id().as_bytes();
        let wrong = *device.as_bytes();
        let mut lying = encoded.to_vec();
        // A blob without compression has the same digest as its device; both have to lie.
        while let Some(at) = lying.windows(32).position(|window| window == right) {
            lying[at..at + 32].copy_from_slice(&wrong);
        }
        LayerParts { header: Header::parse(&lying).unwrap(), ..self.parts() }
    }

    pub(crate) fn chunks(&self) -> impl Iterator<Item = (ChunkIndex, &[u8])> {
        self.device.chunks(CHUNK as usize).enumerate().map(|(n, plain)| (ChunkIndex(n as u32), plain))
    }
}

/// When a source gives up on itself.
const STALL: Duration = Duration::from_secs(15);

/// How a source fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    Unreachable,
    Missing,
    /// One bit is wrong in each third chunk.
    Wrong,
    /// Ends before the last chunk and says that all is well.
    Short,
    /// Gives nothing until it times out.
    Silent,
}

/// A source that has all of a subject.
pub(crate) struct FaultySource {
    kind: SourceKind,
    device: Arc<Vec<u8>>,
    state: Mutex<State>,
}

struct State {
    fault: Fault,
    latency: Duration,
    given: BTreeMap<u32, u32>,
}

impl FaultySource {
    pub(crate) fn new(subject: &Subject, kind: SourceKind) -> Arc<Self> {
        let state = State { fault: Fault::None, latency: Duration::ZERO, given: BTreeMap::new() };
        Arc::new(Self { kind, device: subject.device.clone(), state: Mutex::new(state) })
    }

    pub(crate) fn set_fault(&self, fault: Fault) {
        self.state.lock().fault = fault;
    }

    pub(crate) fn fault(&self) -> Fault {
        self.state.lock().fault
    }

    pub(crate) fn set_latency(&self, latency: Duration) {
        self.state.lock().latency = latency;
    }

    /// How often each chunk was given.
    pub(crate) fn given(&self) -> BTreeMap<u32, u32> {
        self.state.lock().given.clone()
    }

    fn give(&self, chunk: u32, fault: Fault, sink: &mut dyn ChunkSink) -> Result<(), SourceError> {
        let start = chunk as usize * CHUNK as usize;
        let mut plain = self.device[start..(start + CHUNK as usize).min(self.device.len())].to_vec();
        if fault == Fault::Wrong && chunk.is_multiple_of(3) {
            plain[17] ^= 1;
        }
        *self.state.lock().given.entry(chunk).or_default() += 1;
        sink.chunk(ChunkIndex(chunk), &plain, plain.len())
            .map_err(|error| SourceError::Corrupt { source_label: self.label(), reason: error.to_string() })
    }
}

impl std::fmt::Debug for FaultySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.label())
    }
}

impl Source for FaultySource {
    fn kind(&self) -> SourceKind {
        self.kind
    }

    fn label(&self) -> String {
        format!("{:?} of the test", self.kind)
    }

    fn fetch<'a>(
        &'a self,
        run: Range<u32>,
        _: Priority,
        sink: &'a mut dyn ChunkSink,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async move {
            let (fault, latency) = {
                let state = self.state.lock();
                (state.fault, state.latency)
            };
            tokio::time::sleep(latency).await;
            let source_label = self.label();
            match fault {
                Fault::Unreachable => {
                    return Err(SourceError::Unreachable { source_label, reason: "unreachable".into() });
                }
                Fault::Missing => return Err(SourceError::Missing { source_label, reason: "not yet".into() }),
                Fault::Silent => {
                    tokio::time::sleep(STALL).await;
                    return Err(SourceError::Stalled { source_label, after: STALL });
                }
                Fault::None | Fault::Wrong | Fault::Short => {}
            }
            let end = if fault == Fault::Short { run.end - 1 } else { run.end };
            for chunk in run.start..end {
                self.give(chunk, fault, sink)?;
                tokio::task::yield_now().await;
            }
            Ok(())
        })
    }
}

/// Waits for a condition, at most half a minute.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let give_up = std::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(std::time::Instant::now() < give_up, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
