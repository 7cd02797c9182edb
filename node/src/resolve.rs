//! Making a layer known: from its blob's digest to a [`Layer`] that can be mounted.
//!
//! A layer that is on this machine needs no network. One that a seeder knows needs its index. One that nobody knows is
//! ingested by the seeder while its chunks flow here: they are written as they come, and count as *had* only once the
//! signed index, which comes last, names their digests ([`crate::node::Incoming`]).

use std::sync::{Arc, Weak};
use std::time::Duration;

use layer::index::{Header, Section, Spans, statement};
use layer::wire::Decoder;
use layer::{ChunkIndex, Digest};
use tokio::sync::{Mutex, Semaphore, watch};

use crate::config::{RegistriesConfig, SeederAddresses};
pub use crate::ingest::Progress;
use crate::layer::Layer;
use crate::node::{Incoming, Node};
use crate::registry::{self, RegistrySource, SpansProvider};
use crate::security::{Security, Signed, TrustError, Verifier};
use crate::seeder::{self, Event, SeederError, SeederSource};
use crate::source::{BlobRef, BoxFuture};
use crate::store::{LayerParts, StoreError};

/// Layers that are made known at the same time; more wait. Each holds a connection and a few chunks. Chosen: an image's layers
/// go in parallel, and so do those of several images.
const PARALLEL_MAX: usize = 64;

/// How long a follow may last once the seeder has said that the index is complete: what is missing then is fetched as any chunk is.
const LAST_BYTES: Duration = Duration::from_secs(30);

/// Why a layer is not known. It can then not be lazy.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// No seeder gave it.
    #[error(transparent)]
    Seeder(#[from] SeederError),
    /// The layer was read to its end and cannot be lazy.
    #[error("the layer cannot be lazy: {0}")]
    Unsupported(String),
    /// The index is not to be believed.
    #[error("seeder {seeder}: {error}")]
    Untrusted {
        /// Who sent it.
        seeder: String,
        /// What is wrong with it.
        error: TrustError,
    },
    /// The index is of another blob.
    #[error("seeder {seeder} sent the index of {got} for {want}")]
    WrongBlob {
        /// Who sent it.
        seeder: String,
        /// What its header names.
        got: Digest,
        /// What was asked for.
        want: Digest,
    },
    /// The seeder ended without an answer.
    #[error("seeder {0} ended its answer without an index")]
    NoAnswer(String),
    /// The store did not take it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A chunk could not be written.
    #[error("cannot write a chunk: {0}")]
    Write(#[from] std::io::Error),
}

/// Makes layers known and gives them their sources.
#[derive(Clone)]
pub struct Resolver {
    node: Arc<Node>,
    seeders: seeder::Client,
    registries: registry::Client,
    verifier: Verifier,
    has_seeders: bool,
    slots: Arc<Semaphore>,
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolver").finish_non_exhaustive()
    }
}

impl Resolver {
    /// A resolver for `node`; no network is used yet.
    pub fn new(node: Arc<Node>, seeders: &SeederAddresses, security: &Security, registries: &RegistriesConfig) -> Self {
        Self {
            node,
            seeders: seeder::Client::new(seeders, security.clone(), seeder::Options::default()),
            registries: registry::Client::new(registries.clone(), registry::Options::default()),
            verifier: security.verifier(),
            has_seeders: !seeders.is_empty(),
            slots: Arc::new(Semaphore::new(PARALLEL_MAX)),
        }
    }

    /// Makes the layer of `blob` known and says in `progress` how far the seeder is. The caller sees to it that a blob is
    /// resolved once at a time. Every step fails when nothing moves for the seeder client's stall limit.
    pub async fn resolve(&self, blob: &BlobRef, progress: watch::Sender<Progress>) -> Result<Arc<Layer>, ResolveError> {
        if let Some(layer) = self.node.layer_by_blob(blob.digest).filter(|layer| layer.quarantine().is_none()) {
            self.add_sources(&layer, blob);
            return Ok(layer);
        }
        let Ok(_slot) = self.slots.acquire().await else {
            return Err(ResolveError::NoAnswer("(closed)".into()));
        };
        let mut resolution = self.seeders.resolve(blob).await?;
        let mut follow: Option<tokio::task::JoinHandle<Follow>> = None;
        let stop_following = StopOnDrop::default();
        let (header, signed) = loop {
            match resolution.next().await? {
                Some(Event::Progress(seen)) => {
                    progress.send_replace(seen);
                    if follow.is_none() {
                        let stream = resolution.follow().await?;
                        let incoming = self.node.incoming(blob.digest, stream.chunk_log2())?;
                        let task = tokio::spawn(take_chunks(stream, incoming, progress.clone()));
                        stop_following.watch(&task);
                        follow = Some(task);
                    }
                }
                Some(Event::Ready { header, signed }) => break (header, signed),
                Some(Event::Unsupported(reason)) => return Err(ResolveError::Unsupported(reason)),
                None => return Err(ResolveError::NoAnswer(resolution.seeder().to_owned())),
            }
        };
        let seeder = resolution.seeder().to_owned();
        if header.blob() != blob.digest {
            return Err(ResolveError::WrongBlob { seeder, got: header.blob(), want: blob.digest });
        }
        let verified = self.verifier.verify(&statement(&header), &signed);
        verified.map_err(|error| ResolveError::Untrusted { seeder, error })?;
        let (entries, chunk_digests) = tokio::try_join!(
            resolution.section(&header, Section::Entries),
            resolution.section(&header, Section::ChunkDigests)
        )?;
        let parts =
            LayerParts { header: *header, signature: encode_signed(&signed), entries, chunk_digests, spans: None };
        let layer = match follow {
            None => self.insert(parts).await?,
            Some(task) => self.adopt(task, parts).await?,
        };
        self.add_sources(&layer, blob);
        Ok(layer)
    }

    /// Gives a layer its sources. Those that it has already are replaced by equal ones.
    pub fn add_sources(&self, layer: &Arc<Layer>, blob: &BlobRef) {
        let geometry = layer.geometry();
        if self.has_seeders {
            layer.add_source(Arc::new(SeederSource::new(self.seeders.clone(), blob.digest, geometry)));
        }
        let spans = LayerSpans {
            layer: Arc::downgrade(layer),
            seeders: self.has_seeders.then(|| self.seeders.clone()),
            spans: Mutex::default(),
        };
        let spans = Arc::new(spans);
        layer.add_source(Arc::new(RegistrySource::new(
            self.registries.clone(),
            blob.clone(),
            geometry,
            SharedSpans(spans.clone()),
        )));
        if self.has_seeders && !layer.is_complete() {
            // So that the registry can be read without the seeder, the spans must be here before it is gone.
            tokio::spawn(async move {
                if let Err(reason) = spans.store().await {
                    tracing::debug!(reason, "the spans of a layer did not come; they are asked for again when needed");
                }
            });
        }
    }

    async fn insert(&self, parts: LayerParts) -> Result<Arc<Layer>, ResolveError> {
        let node = self.node.clone();
        Ok(blocking(move || node.insert(&parts)).await??)
    }

    async fn adopt(
        &self,
        follow: tokio::task::JoinHandle<Follow>,
        parts: LayerParts,
    ) -> Result<Arc<Layer>, ResolveError> {
        let followed = tokio::time::timeout(LAST_BYTES, follow).await;
        // Without its stream the layer starts empty and is read like any other.
        let Ok(Ok(Follow { incoming, last, ended })) = followed else {
            return self.insert(parts).await;
        };
        if let Err(error) = ended {
            tracing::warn!(blob = %parts.header.blob(), %error, "the chunks of a new layer did not all come; the rest is fetched");
        }
        let node = self.node.clone();
        let adopted = blocking(move || {
            let geometry = parts.header.geometry();
            if let Some((chunk, frame)) = last
                && let Some((frame, _)) = layer::wire::Frame::split(&frame)
            {
                let mut plain = Vec::new();
                if Decoder::new().decode(frame, geometry.chunk_len(chunk), &mut plain).is_ok() {
                    incoming.write(chunk, &plain)?;
                }
            }
            Ok::<_, ResolveError>(node.adopt(&incoming, &parts)?)
        });
        adopted.await?
    }
}

/// What a followed ingest has brought.
struct Follow {
    incoming: Arc<Incoming>,
    /// The frame that does not unpack to a whole chunk. Only the last chunk is short, and how short only the header says.
    last: Option<(ChunkIndex, Vec<u8>)>,
    ended: Result<(), ResolveError>,
}

/// Writes the chunks of a layer that is being ingested as they come.
async fn take_chunks(
    mut stream: seeder::client::Follow,
    incoming: Arc<Incoming>,
    progress: watch::Sender<Progress>,
) -> Follow {
    let mut last = None;
    let ended = async {
        let mut decoder = Decoder::new();
        let mut plain = Vec::new();
        let chunk_size = 1 << stream.chunk_log2();
        while let Some((chunk, frame)) = stream.next().await? {
            if last.is_some() {
                // A short chunk in the middle: the index will not know the rest either.
                break;
            }
            if decoder.decode(frame, chunk_size, &mut plain).is_err() {
                let mut bytes = Vec::new();
                frame.write(&mut bytes);
                last = Some((chunk, bytes));
                continue;
            }
            tokio::task::block_in_place(|| incoming.write(chunk, &plain))?;
            // Chunks are progress too: the seeder may be done reading while they still flow.
            progress.send_modify(|_| {});
        }
        Ok(())
    }
    .await;
    Follow { incoming, last, ended }
}

/// Ends a task when the resolution that wanted it ends.
#[derive(Default)]
struct StopOnDrop(parking_lot::Mutex<Option<tokio::task::AbortHandle>>);

impl StopOnDrop {
    fn watch<T>(&self, task: &tokio::task::JoinHandle<T>) {
        *self.0.lock() = Some(task.abort_handle());
    }
}

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        if let Some(task) = self.0.lock().take() {
            task.abort();
        }
    }
}

/// The spans of a layer: from its store, else from a seeder.
struct LayerSpans {
    layer: Weak<Layer>,
    seeders: Option<seeder::Client>,
    /// Parsed once, when the registry is first read.
    spans: Mutex<Option<Arc<Spans>>>,
}

struct SharedSpans(Arc<LayerSpans>);

impl SpansProvider for SharedSpans {
    fn spans(&self) -> BoxFuture<'_, Result<Arc<Spans>, String>> {
        Box::pin(async move {
            let mut spans = self.0.spans.lock().await;
            if let Some(spans) = &*spans {
                return Ok(spans.clone());
            }
            let layer = self.0.store().await?;
            let parsed = blocking(move || layer.spans()).await.map_err(|error| error.to_string())?;
            let parsed = parsed.map_err(|error| error.to_string())?.ok_or("the spans are gone from the store")?;
            Ok(spans.insert(Arc::new(parsed)).clone())
        })
    }
}

impl LayerSpans {
    /// Brings the spans section into the layer's store if it is not there.
    async fn store(&self) -> Result<Arc<Layer>, String> {
        let layer = self.layer.upgrade().ok_or("the layer was removed")?;
        let reading = layer.clone();
        let here = blocking(move || reading.section(Section::Spans)).await.map_err(|error| error.to_string())?;
        if here.map_err(|error| error.to_string())?.is_some() {
            return Ok(layer);
        }
        let header: Header = layer.header().clone();
        let seeders = self.seeders.as_ref().ok_or("the spans are not here and no seeder is configured")?;
        let bytes = seeders
            .section(&header, Section::Spans)
            .await
            .map_err(|error| format!("the spans are not here and no seeder gave them: {error}"))?;
        let writing = layer.clone();
        let stored = blocking(move || writing.put_spans(&bytes)).await.map_err(|error| error.to_string())?;
        stored.map_err(|error| error.to_string())?;
        Ok(layer)
    }
}

/// Version 1 of a stored signature: `u32 LE` length and bytes of the signature, then of each certificate. It is kept to be
/// passed on with the index.
fn encode_signed(signed: &Signed) -> Vec<u8> {
    let mut bytes = vec![1];
    for part in std::iter::once(&signed.signature).chain(&signed.certificates) {
        bytes.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(part);
    }
    bytes
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)
}
