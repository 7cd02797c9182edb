//! Where a chunk can come from.
//!
//! A [`Source`] only moves bytes: it knows neither deadlines nor other sources (that is `swarm`), and its chunks are not
//! trusted (the driver checks each against the layer's index).

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;

use layer::wire::Frame;
use layer::{ChunkIndex, Digest};

use crate::mesh::Member;

pub use swarm::{Priority, SourceKind};

/// A boxed future, for traits that are used as objects.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A layer's blob and where a registry has it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlobRef {
    /// Registry host with port, as the image reference names it (`docker.io` stands for Docker's registry).
    pub registry: String,
    /// Repository in that registry, without tag.
    pub repository: String,
    /// Digest of the blob.
    pub digest: Digest,
    /// Bytes of the blob; 0 where it is not known.
    pub size: u64,
    /// OCI or Docker media type; empty where it is not known.
    pub media_type: String,
    /// Where else the blob may be had (`urls` of its descriptor, as foreign layers have); tried before the registry.
    pub urls: Vec<String>,
}

impl fmt::Display for BlobRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.registry, self.repository, self.digest)
    }
}

/// One place that may give chunks of one layer.
pub trait Source: fmt::Debug + Send + Sync + 'static {
    /// Kind, for choice and for counters.
    fn kind(&self) -> SourceKind;

    /// Name for logs and errors, like `seeder 10.0.0.5:7070`.
    fn label(&self) -> String;

    /// The device ranges that the source moves whole, in order and without gaps, when it is asked for a part of one (the
    /// spans of a registry's blob). Empty: any run costs just its own bytes. A hint, asked when the source is added and again
    /// after its first fetch.
    fn units(&self) -> Vec<Range<u64>> {
        Vec::new()
    }

    /// Fetches the chunks of `run` and gives each to `sink` as soon as it is whole, in any order, each at
    /// most once. More chunks than were asked for may come (a span of a blob holds many); a sink takes or drops them. Dropping the future cancels
    /// the transfer. Ends with `Ok` only when every chunk of `run` was given. The source times out by itself when no byte
    /// moves for a while ([`SourceError::Stalled`]), but sets no deadline for the whole. `priority` is passed on to sources
    /// that choose whom to serve first.
    fn fetch<'a>(
        &'a self,
        run: Range<u32>,
        priority: Priority,
        sink: &'a mut dyn ChunkSink,
    ) -> BoxFuture<'a, Result<(), SourceError>>;
}

/// Takes chunks from a [`Source`].
pub trait ChunkSink: Send {
    /// Takes the plain, unverified bytes of `chunk`. `wire_bytes` says how many bytes of the network brought it, for counters.
    /// An error ends the fetch with [`SourceError::Corrupt`].
    fn chunk(&mut self, chunk: ChunkIndex, plain: &[u8], wire_bytes: usize) -> Result<(), WrongChunk>;

    /// The same for a chunk that came in its wire form, of which `plain` was made.
    fn frame(&mut self, chunk: ChunkIndex, plain: &[u8], frame: Frame<'_>) -> Result<(), WrongChunk> {
        self.chunk(chunk, plain, frame.wire_len())
    }

    /// So many bytes came, which may be part of a chunk that is not whole yet.
    fn moved(&mut self, _wire_bytes: usize) {}
}

/// The bytes that came are not the chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("chunk {0} has a wrong digest")]
pub struct WrongChunk(pub ChunkIndex);

/// Why a source did not give what was asked. Retrying elsewhere is always right; [`SourceError::blame`] says whether
/// to come back to this source soon.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SourceError {
    /// No connection could be made, or it broke.
    #[error("{source_label}: {reason}")]
    Unreachable {
        /// [`Source::label`].
        source_label: String,
        /// Error text of the transport.
        reason: String,
    },
    /// The source answered that it does not have it (yet).
    #[error("{source_label} does not have it: {reason}")]
    Missing {
        /// [`Source::label`].
        source_label: String,
        /// What it answered.
        reason: String,
    },
    /// The source refused the caller (401, 403, no client certificate).
    #[error("{source_label} refused: {reason}")]
    Denied {
        /// [`Source::label`].
        source_label: String,
        /// What it answered.
        reason: String,
    },
    /// The source gives this node nothing for a while, as is usual among members of a mesh.
    #[error("{source_label} has enough to do")]
    Busy {
        /// [`Source::label`].
        source_label: String,
        /// When it may be asked again.
        retry_after: std::time::Duration,
        /// Who has the first chunk of the run, or is about to.
        peers: Vec<Member>,
    },
    /// The source is overloaded or broken and said so (429, 5xx).
    #[error("{source_label} is overloaded: {reason}")]
    Overloaded {
        /// [`Source::label`].
        source_label: String,
        /// What it answered.
        reason: String,
        /// When it asked to be called again.
        retry_after: Option<std::time::Duration>,
    },
    /// No byte moved for longer than the source's stall limit.
    #[error("{source_label} stalled for {after:?}")]
    Stalled {
        /// [`Source::label`].
        source_label: String,
        /// The limit that expired.
        after: std::time::Duration,
    },
    /// What came cannot be right: wrong digest, bad frame, inflate error, short body.
    #[error("{source_label} sent wrong bytes: {reason}")]
    Corrupt {
        /// [`Source::label`].
        source_label: String,
        /// What was wrong.
        reason: String,
    },
}

impl SourceError {
    /// Whether the source itself is at fault, so that it should rest before it is asked again.
    pub const fn blame(&self) -> bool {
        match self {
            Self::Missing { .. } | Self::Busy { .. } => false,
            Self::Unreachable { .. }
            | Self::Denied { .. }
            | Self::Overloaded { .. }
            | Self::Stalled { .. }
            | Self::Corrupt { .. } => true,
        }
    }
}
