//! From a blob to a layer that can be read: the index from a seeder, and the chunks while the seeder ingests.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use layer::Digest;
use layer::index::{Header, IndexError, Section, Spans, check_section, statement};
use parking_lot::Mutex;
use tokio::sync::{OwnedMutexGuard, Semaphore, SemaphorePermit, watch};

use crate::config::{RegistriesConfig, SeederAddresses};
use crate::following::Following;
use crate::layer::Layer;
use crate::registry::{self, RegistrySource, SpansProvider};
use crate::security::{Security, TrustError, Verifier};
use crate::seeder::{self, Event, Resolution, SeederError, SeederSource};
use crate::source::{BlobRef, BoxFuture};
use crate::store::{LayerParts, StoreError};
use crate::{Incoming, Node};

/// Resolves that run at the same time; the layers of a few images.
const CONCURRENT: usize = 64;
/// Sections that are fetched in the background at the same time.
const BACKGROUND: usize = 2;
/// Tries to get a spans section in the background; the pause before each is twice the last, from a second on.
const SPANS_TRIES: u32 = 6;

/// Seeders that are asked for a layer while others fail in the middle of it.
const SEEDERS_TRIED: usize = 3;

/// How far a resolve is. It only changes when bytes moved somewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that this node received: chunks and index sections.
    pub received: u64,
    /// Bytes of the blob that the seeder read, with those of others while the layer waits for its turn.
    pub ingested: u64,
    /// Size of the blob; 0 while unknown.
    pub blob_size: u64,
}

/// Why a layer cannot be lazy, now or at all.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// No seeder can be asked.
    #[error("no seeder can be asked: {0}")]
    NoSeeder(SeederError),
    /// A seeder was asked and failed.
    #[error(transparent)]
    Seeder(SeederError),
    /// The layer was read and is of a kind that cannot be lazy.
    #[error("the layer cannot be lazy: {0}")]
    Unsupported(String),
    /// Nobody who may has signed the index.
    #[error("the index from seeder {seeder} is not believed: {source}")]
    Untrusted {
        /// Who sent it.
        seeder: String,
        /// Why not.
        source: TrustError,
    },
    /// The index is not what its signature says.
    #[error("the index from seeder {seeder}: {source}")]
    Index {
        /// Who sent it.
        seeder: String,
        /// What is wrong.
        source: IndexError,
    },
    /// The layer is here, and is out of service.
    #[error("the layer is quarantined: {0}")]
    Quarantined(String),
    /// This node's disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<SeederError> for ResolveError {
    fn from(error: SeederError) -> Self {
        match error {
            SeederError::None(_) | SeederError::Unreachable { .. } | SeederError::Untrusted { .. } => {
                Self::NoSeeder(error)
            }
            other => Self::Seeder(other),
        }
    }
}

/// Makes layers known to a node, and gives them their sources.
pub struct Resolver {
    node: Arc<Node>,
    has_seeders: bool,
    seeders: seeder::Client,
    registry: registry::Client,
    verifier: Verifier,
    running: Semaphore,
    background: Arc<Semaphore>,
    /// One resolve per blob at a time.
    blobs: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

/// A layer's index that came and is signed. The layer's other resolves wait until this is inserted or dropped.
pub struct Fetched<'a> {
    resolver: &'a Resolver,
    blob: BlobRef,
    parts: LayerParts,
    following: Option<Following>,
    _one: OwnedMutexGuard<()>,
    _running: Option<SemaphorePermit<'a>>,
}

/// Time limits of a [`Resolver`] and of the sources that it adds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Towards seeders.
    pub seeder: seeder::Options,
    /// Towards registries.
    pub registry: registry::Options,
}

impl std::fmt::Debug for Fetched<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fetched").field("parts", &self.parts).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolver").field("seeders", &self.seeders).finish_non_exhaustive()
    }
}

impl Resolver {
    /// A resolver for `node` with the default time limits; no network is used yet.
    pub fn new(node: Arc<Node>, seeders: &SeederAddresses, security: &Security, registries: &RegistriesConfig) -> Self {
        Self::with_options(node, seeders, security, registries, Options::default())
    }

    /// The same with other time limits.
    pub fn with_options(
        node: Arc<Node>,
        seeders: &SeederAddresses,
        security: &Security,
        registries: &RegistriesConfig,
        options: Options,
    ) -> Self {
        let registry = registry::Client::new(registries.clone(), options.registry);
        let has_seeders = !seeders.is_empty();
        let seeders = seeder::Client::new(seeders, security.clone(), options.seeder);
        seeders.grants().show_credentials_of(registry.clone());
        Self {
            node,
            has_seeders,
            seeders,
            registry,
            verifier: security.verifier(),
            running: Semaphore::new(CONCURRENT),
            background: Arc::new(Semaphore::new(BACKGROUND)),
            blobs: Mutex::default(),
        }
    }

    /// Gives the layer of `blob` with its sources: at once where it is local, after its index came where a seeder knows it,
    /// else when the seeder has ingested it; chunks flow to this node meanwhile. Fails within the seeder's stall limit
    /// once nothing moves. One resolve of a blob runs at a time; others wait for it.
    pub async fn resolve(&self, blob: &BlobRef, progress: watch::Sender<Progress>) -> Result<Arc<Layer>, ResolveError> {
        let one = self.gate(blob.digest).lock_owned().await;
        if let Some(layer) = self.local(blob.digest)? {
            self.add_sources(&layer, blob);
            return Ok(layer);
        }
        self.fetch(blob, progress, one).await?.insert().await
    }

    /// Gets an index of `blob` whether or not there is a layer of it: another one, where that one's was found to be wrong
    /// ([`Layer::has_wrong_index`]), which [`Resolver::resolve`] leaves as it is. What was made of the wrong one can go before
    /// [`Fetched::insert`] puts the right one in its place.
    pub async fn fetch_anew(
        &self,
        blob: &BlobRef,
        progress: watch::Sender<Progress>,
    ) -> Result<Fetched<'_>, ResolveError> {
        let one = self.gate(blob.digest).lock_owned().await;
        self.fetch(blob, progress, one).await
    }

    async fn fetch(
        &self,
        blob: &BlobRef,
        progress: watch::Sender<Progress>,
        one: OwnedMutexGuard<()>,
    ) -> Result<Fetched<'_>, ResolveError> {
        let running = self.running.acquire().await.ok();
        self.seeders.grants().note(blob);
        let mut attempts = 0;
        let (parts, following) = loop {
            attempts += 1;
            let resolution = self.seeders.resolve(blob).await?;
            let may_ask_others = resolution.has_others() && attempts < SEEDERS_TRIED;
            match self.fetch_from(resolution, blob, &progress).await {
                Err(ResolveError::NoSeeder(error) | ResolveError::Seeder(error))
                    if error.is_gone() && may_ask_others =>
                {
                    tracing::debug!(blob = %blob.digest, %error, "a layer is asked of another seeder");
                }
                fetched => break fetched?,
            }
        };
        Ok(Fetched { resolver: self, blob: blob.clone(), parts, following, _one: one, _running: running })
    }

    /// Gets an index from one seeder, and what comes of its layer meanwhile.
    async fn fetch_from(
        &self,
        mut resolution: Resolution,
        blob: &BlobRef,
        progress: &watch::Sender<Progress>,
    ) -> Result<(LayerParts, Option<Following>), ResolveError> {
        let mut following: Option<Following> = None;
        // Of this seeder: another one counts from elsewhere.
        let mut ingested: Option<u64> = None;
        let (header, signed) = loop {
            let event = resolution.next().await?;
            match event.ok_or_else(|| resolution.ended_early())? {
                Event::Ready { header, signed } => break (header, signed),
                Event::Unsupported(reason) => return Err(ResolveError::Unsupported(reason)),
                Event::Progress(seen) => {
                    let now = seen.blob_read.saturating_add(seen.ahead_read);
                    let before = ingested.replace(now);
                    tell(progress, |progress| {
                        progress.ingested = match before {
                            None => progress.ingested.max(now),
                            Some(before) => progress.ingested.saturating_add(now.saturating_sub(before)),
                        };
                        progress.blob_size = seen.blob_size;
                    });
                    let following = following.get_or_insert_with(|| {
                        Following::start(Arc::clone(&self.node), blob.digest, resolution.feed(), progress.clone())
                    });
                    if let Some((first, digests)) = resolution.take_digests() {
                        following.tell(first, &digests);
                    }
                }
            }
        };
        let seeder = || resolution.seeder().to_owned();
        self.verifier
            .verify(&statement(&header), &signed)
            .map_err(|source| ResolveError::Untrusted { seeder: seeder(), source })?;
        let (node, checked) = (Arc::clone(&self.node), header.clone());
        blocking(move || node.check_refused(&checked)).await?;
        let (entries, chunk_digests) = tokio::try_join!(
            self.section(&resolution, &header, Section::Entries, progress),
            self.section(&resolution, &header, Section::ChunkDigests, progress),
        )?;
        let parts = LayerParts { header: *header, signature: signed.encode(), entries, chunk_digests, spans: None };
        Ok((parts, following))
    }

    /// The client of the seeders.
    pub const fn seeders(&self) -> &seeder::Client {
        &self.seeders
    }

    /// Lets `layer`, whose blob is `blob`, fetch from the seeders and the registry. Uses no network itself, but fetches the
    /// spans section in the background if it is not here yet: with it the registry can stand in for the seeders.
    pub fn add_sources(&self, layer: &Arc<Layer>, blob: &BlobRef) {
        let geometry = layer.geometry();
        self.seeders.grants().note(blob);
        if self.has_seeders {
            let source = SeederSource::new(self.seeders.clone(), layer.header().blob(), geometry);
            layer.add_source(Arc::new(source));
        }
        let spans = LayerSpans { layer: Arc::downgrade(layer), seeders: self.seeders.clone(), loaded: Arc::default() };
        let registry = {
            let (client, blob) = (self.registry.clone(), blob.clone());
            move |spans: LayerSpans| RegistrySource::new(client, blob, geometry, spans)
        };
        layer.add_source(Arc::new(registry.clone()(spans.clone())));
        if !layer.is_complete() {
            let background = Arc::clone(&self.background);
            tokio::spawn(async move {
                // Once the spans are known the registry is asked for whole ones.
                if let Some((layer, parsed)) = spans.fetch(&background).await {
                    layer.add_source(Arc::new(registry(spans).with_units(&parsed)));
                }
            });
        }
    }

    /// The layer that is here.
    fn local(&self, blob: Digest) -> Result<Option<Arc<Layer>>, ResolveError> {
        let Some(layer) = self.node.layer_by_blob(blob) else { return Ok(None) };
        if let Some(reason) = layer.quarantine() {
            return Err(ResolveError::Quarantined(reason));
        }
        layer.note_wanted();
        Ok(Some(layer))
    }

    fn gate(&self, blob: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut blobs = self.blobs.lock();
        if let Some(gate) = blobs.get(&blob).and_then(Weak::upgrade) {
            return gate;
        }
        blobs.retain(|_, gate| gate.strong_count() > 0);
        let gate = Arc::default();
        blobs.insert(blob, Arc::downgrade(&gate));
        gate
    }

    async fn section(
        &self,
        resolution: &Resolution,
        header: &Header,
        section: Section,
        progress: &watch::Sender<Progress>,
    ) -> Result<Vec<u8>, ResolveError> {
        let bytes = resolution.section(header, section).await?;
        check_section(header, section, &bytes)
            .map_err(|source| ResolveError::Index { seeder: resolution.seeder().to_owned(), source })?;
        tell(progress, |progress| progress.received += bytes.len() as u64);
        Ok(bytes)
    }

    async fn insert(&self, parts: LayerParts, incoming: Option<Arc<Incoming>>) -> Result<Arc<Layer>, ResolveError> {
        let node = Arc::clone(&self.node);
        let inserted = blocking(move || match incoming {
            Some(incoming) => node.adopt(&incoming, &parts),
            None => node.insert(&parts),
        });
        Ok(inserted.await?)
    }
}

impl Fetched<'_> {
    /// Digest of the layer's device.
    pub fn diff_id(&self) -> Digest {
        self.parts.header.diff_id()
    }

    /// Makes the layer known to the node, in place of one whose index is wrong, and gives it its sources.
    pub async fn insert(mut self) -> Result<Arc<Layer>, ResolveError> {
        let incoming = match &mut self.following {
            Some(following) => following.finish().await,
            None => None,
        };
        let layer = self.resolver.insert(self.parts, incoming).await?;
        if let Some(following) = self.following {
            following.became(&layer);
        }
        self.resolver.add_sources(&layer, &self.blob);
        Ok(layer)
    }
}

/// A layer's spans section: from disk, else from a seeder.
#[derive(Clone)]
struct LayerSpans {
    // The layer holds its sources, so they must not hold the layer.
    layer: Weak<Layer>,
    seeders: seeder::Client,
    loaded: Arc<tokio::sync::Mutex<Option<Arc<Spans>>>>,
}

impl LayerSpans {
    async fn load(&self) -> Result<Arc<Spans>, String> {
        let mut loaded = self.loaded.lock().await;
        if let Some(spans) = &*loaded {
            return Ok(Arc::clone(spans));
        }
        let layer = self.layer.upgrade().ok_or("the layer was removed")?;
        let stored = {
            let layer = Arc::clone(&layer);
            blocking(move || layer.spans()).await
        };
        let spans = match stored {
            Ok(Some(spans)) => spans,
            Ok(None) | Err(_) => self.store(&layer).await.map_err(|reason| {
                format!("its spans section is needed to read the blob, is not here, and no seeder gave it: {reason}")
            })?,
        };
        Ok(Arc::clone(loaded.insert(Arc::new(spans))))
    }

    /// Fetches the section and keeps it.
    async fn store(&self, layer: &Arc<Layer>) -> Result<Spans, String> {
        let header = layer.header().clone();
        let bytes = self.seeders.section(&header, Section::Spans).await.map_err(|error| error.to_string())?;
        let layer = Arc::clone(layer);
        blocking(move || {
            let spans = Spans::parse(&header, &bytes).map_err(|error| error.to_string())?;
            if let Err(error) = layer.put_spans(&bytes) {
                tracing::warn!(blob = %header.blob(), %error, "cannot store the spans of a layer");
            }
            Ok(spans)
        })
        .await
    }

    /// Sees to it in the background that the section is here.
    async fn fetch(&self, background: &Semaphore) -> Option<(Arc<Layer>, Spans)> {
        for attempt in 0..SPANS_TRIES {
            if attempt > 0 {
                tokio::time::sleep(Duration::from_secs(1 << attempt.min(6))).await;
            }
            let _permit = background.acquire().await.ok()?;
            let layer = self.layer.upgrade()?;
            let here = {
                let layer = Arc::clone(&layer);
                blocking(move || layer.spans()).await
            };
            if let Ok(Some(spans)) = here {
                return Some((layer, spans));
            }
            match self.store(&layer).await {
                Ok(spans) => return Some((layer, spans)),
                Err(reason) => tracing::debug!(blob = %layer.header().blob(), reason, "no spans yet"),
            }
        }
        None
    }
}

impl SpansProvider for LayerSpans {
    fn spans(&self) -> BoxFuture<'_, Result<Arc<Spans>, String>> {
        Box::pin(self.load())
    }
}

fn tell(progress: &watch::Sender<Progress>, change: impl FnOnce(&mut Progress)) {
    progress.send_if_modified(|progress| {
        let before = *progress;
        change(progress);
        *progress != before
    });
}

/// Runs `work` on a blocking thread; a panic there goes on here.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime ends, and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests;
