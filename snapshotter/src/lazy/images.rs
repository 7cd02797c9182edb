//! From a chain id to the image that it is of: the manifests and configurations in containerd's content store, which are there
//! before the first layer of a pull is prepared.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use layer::{ChainId, Digest};
use node::source::BlobRef;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout_at};

use super::image::{Image, ImageError, Manifest};
use crate::containerd::content::{ContentError, ContentStore, Info};

/// How long a list of manifests answers for the layers that containerd prepares next. A chain id that it does not have
/// is looked for in a new one at once.
const FRESH: Duration = Duration::from_secs(10);
/// Pauses before the content store is asked again for a manifest that is not there. It is there before the first layer is
/// prepared, so this is for clients that do things in another order.
const PAUSES: [Duration; 3] = [Duration::from_millis(100), Duration::from_millis(200), Duration::from_millis(400)];
/// No answer after so long is none.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(8);
/// Images that are remembered; 128 layers take about 20 KiB.
const IMAGES_MAX: usize = 1024;
/// Largest manifest or configuration that is read: what registries must take at least (OCI distribution specification).
const TEXT_BYTES_MAX: u64 = 4 << 20;
/// Most registries that are remembered.
const REGISTRIES_MAX: usize = 256;
/// Most places that one blob is looked for at.
const PLACES_MAX: usize = 16;

/// Containerd writes here where it got a blob from: `containerd.io/distribution.source.HOST` = `REPOSITORY[,REPOSITORY]`.
const SOURCE: &str = "containerd.io/distribution.source.";

/// Why no image was found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Containerd did not answer.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// It took too long.
    #[error("containerd's content store took longer than {LOOKUP_DEADLINE:?}")]
    Late,
    /// No manifest leads there.
    #[error("no image in containerd's content store (namespace {namespace}) has the chain id {chain}")]
    Unknown {
        /// Where was looked.
        namespace: String,
        /// What was looked for.
        chain: ChainId,
    },
}

/// The images of containerd's content store.
#[derive(Debug)]
pub struct Images {
    content: ContentStore,
    /// Held while looking: the second layer of a pull finds what the first one read.
    cache: tokio::sync::Mutex<Cache>,
    /// Names of registries with their ports, which containerd leaves out of its labels.
    registries: Mutex<BTreeSet<String>>,
}

/// An image that has the chain id that was asked for.
#[derive(Debug, Clone)]
pub struct Found {
    /// The image.
    pub image: Arc<Image>,
    /// Number of the layer.
    pub position: usize,
    /// Hosts and repositories that containerd got the manifest from.
    sources: Vec<(String, String)>,
}

#[derive(Debug, Default)]
struct Cache {
    /// By digest of the manifest; `None` for one that leads to no layers.
    images: HashMap<Digest, Option<Arc<Image>>>,
    order: VecDeque<Digest>,
    /// By namespace.
    lists: HashMap<String, List>,
}

#[derive(Debug)]
struct List {
    at: Instant,
    manifests: Arc<Vec<Info>>,
}

impl Images {
    /// The images of `content`. `registries` are names with ports, of the configuration and of earlier pulls.
    pub fn new(content: ContentStore, registries: impl IntoIterator<Item = String>) -> Self {
        let images = Self { content, cache: tokio::sync::Mutex::default(), registries: Mutex::default() };
        registries.into_iter().for_each(|registry| images.learn(registry));
        images
    }

    /// The content store.
    pub fn content(&self) -> &ContentStore {
        &self.content
    }

    /// Remembers a registry's name with its port.
    pub fn learn(&self, registry: String) {
        let mut registries = self.registries.lock();
        if registries.len() < REGISTRIES_MAX {
            registries.insert(registry);
        }
    }

    /// The image with the manifest `digest` in `namespace`; `None` where it is not there or leads to no layers.
    pub async fn with_manifest(&self, namespace: &str, digest: Digest) -> Result<Option<Arc<Image>>, FindError> {
        let deadline = Instant::now() + LOOKUP_DEADLINE;
        let look = async {
            let mut cache = self.cache.lock().await;
            self.read(&mut cache, namespace, digest).await
        };
        timeout_at(deadline, look).await.map_err(|_| FindError::Late)?
    }

    /// The images in `namespace` of which `chain` is a part, the one that was pulled last first; at least one. The content
    /// store is read once for all layers of an image.
    pub async fn with_chain(&self, namespace: &str, chain: ChainId) -> Result<Vec<Found>, FindError> {
        let deadline = Instant::now() + LOOKUP_DEADLINE;
        let found = async {
            if let Some(found) = self.look(namespace, chain, FRESH).await? {
                return Ok(found);
            }
            for pause in PAUSES {
                sleep(pause).await;
                if let Some(found) = self.look(namespace, chain, Duration::ZERO).await? {
                    return Ok(found);
                }
            }
            Err(FindError::Unknown { namespace: namespace.to_owned(), chain })
        };
        timeout_at(deadline, found).await.map_err(|_| FindError::Late)?
    }

    /// Looks in a list that is not older than `age`, then in a new one.
    async fn look(&self, namespace: &str, chain: ChainId, age: Duration) -> Result<Option<Vec<Found>>, FindError> {
        let mut cache = self.cache.lock().await;
        let listed = cache.lists.get(namespace).filter(|list| list.at.elapsed() < age);
        if let Some(manifests) = listed.map(|list| list.manifests.clone()) {
            let found = self.search(&mut cache, namespace, &manifests, chain).await?;
            if !found.is_empty() {
                return Ok(Some(found));
            }
        }
        let manifests = Arc::new(self.content.manifests(namespace).await?);
        cache.lists.retain(|_, list| list.at.elapsed() < FRESH);
        cache.lists.insert(namespace.to_owned(), List { at: Instant::now(), manifests: manifests.clone() });
        let found = self.search(&mut cache, namespace, &manifests, chain).await?;
        Ok(Some(found).filter(|found| !found.is_empty()))
    }

    /// Reads manifests until one has `chain`; of the others, those that were read before.
    async fn search(
        &self,
        cache: &mut Cache,
        namespace: &str,
        manifests: &[Info],
        chain: ChainId,
    ) -> Result<Vec<Found>, FindError> {
        let mut found: Vec<Found> = Vec::new();
        for info in manifests {
            let image = match cache.images.get(&info.digest) {
                Some(image) => image.clone(),
                None if found.is_empty() => self.read(cache, namespace, info.digest).await?,
                None => None,
            };
            let Some(image) = image else { continue };
            if let Some(position) = image.position(chain) {
                found.push(Found { image, position, sources: sources(&info.labels) });
            }
        }
        Ok(found)
    }

    async fn read(&self, cache: &mut Cache, namespace: &str, digest: Digest) -> Result<Option<Arc<Image>>, FindError> {
        if let Some(image) = cache.images.get(&digest) {
            return Ok(image.clone());
        }
        let Some(text) = self.text(namespace, digest).await? else { return Ok(None) };
        let manifest = match Manifest::parse(digest, &text) {
            Ok(manifest) => manifest,
            Err(error) => return Ok(cache.refuse(digest, &error)),
        };
        // Not remembered: it may be on its way.
        let Some(config) = self.text(namespace, manifest.config()).await? else { return Ok(None) };
        match manifest.with_config(&config) {
            Ok(image) => Ok(cache.remember(digest, Some(Arc::new(image)))),
            Err(error) => Ok(cache.refuse(digest, &error)),
        }
    }

    /// A manifest or configuration; `None` where it is not there or cannot be one.
    async fn text(&self, namespace: &str, digest: Digest) -> Result<Option<bytes::Bytes>, FindError> {
        match self.content.read(namespace, digest, TEXT_BYTES_MAX).await {
            Err(error @ (ContentError::TooLarge { .. } | ContentError::Digest { .. })) => {
                tracing::debug!(%digest, %error, "this is left out of the images");
                Ok(None)
            }
            answer => Ok(answer?),
        }
    }

    /// Where the blob of layer `position` in `found` may be, the most probable place first. Never empty.
    pub fn places(&self, found: &[Found]) -> Vec<BlobRef> {
        let mut places: Vec<BlobRef> = Vec::new();
        let registries = self.registries.lock().clone();
        for Found { image, position, sources } in found {
            let Some(layer) = image.layers.get(*position) else { continue };
            for (host, repository) in sources {
                // The label has no port: the names that have one and are known come first.
                let with_port = registries.iter().filter(|name| is_host_of(host, name));
                places.extend(with_port.map(|registry| layer.at(registry, repository)));
                places.push(layer.at(host, repository));
            }
            if sources.is_empty() {
                // Imported, not pulled. A seeder may know the blob by its digest.
                places.push(layer.at("", ""));
            }
        }
        let mut seen = BTreeSet::new();
        places.retain(|place| seen.insert((place.registry.clone(), place.repository.clone(), place.digest)));
        places.truncate(PLACES_MAX);
        places
    }
}

impl Found {
    /// The layer that was asked for.
    pub fn layer(&self) -> Option<&super::image::ImageLayer> {
        self.image.layers.get(self.position)
    }

    /// The same image and sources at another layer.
    pub fn at(&self, position: usize) -> Self {
        Self { position, ..self.clone() }
    }
}

impl Cache {
    fn remember(&mut self, digest: Digest, image: Option<Arc<Image>>) -> Option<Arc<Image>> {
        if self.order.len() == IMAGES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.images.remove(&oldest);
        }
        self.order.push_back(digest);
        self.images.insert(digest, image.clone());
        image
    }

    fn refuse(&mut self, digest: Digest, error: &ImageError) -> Option<Arc<Image>> {
        tracing::debug!(%digest, %error, "a manifest is left out of the images");
        self.remember(digest, None)
    }
}

/// Hosts and repositories of the labels of a manifest.
fn sources(labels: &HashMap<String, String>) -> Vec<(String, String)> {
    let mut sources: Vec<(String, String)> = labels
        .iter()
        .filter_map(|(key, repositories)| Some((key.strip_prefix(SOURCE)?, repositories)))
        .flat_map(|(host, repositories)| {
            repositories.split(',').filter(|name| !name.is_empty()).map(|name| (host.to_owned(), name.to_owned()))
        })
        .collect();
    sources.sort();
    sources
}

/// Whether `registry` is a name of `host` with a port.
fn is_host_of(host: &str, registry: &str) -> bool {
    let Some((name, port)) = registry.rsplit_once(':') else { return false };
    name.trim_start_matches('[').trim_end_matches(']') == host && port.parse::<u16>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::super::image::tests::{chain, texts};
    use super::*;
    use crate::containerd::fake::FakeContainerd;

    const CONFIG: &str = "containerd.io/gc.ref.content.config";

    fn pull(containerd: &FakeContainerd, layers: &[&str], sources: &[(&str, &str)]) -> Digest {
        let (manifest, config) = texts(layers);
        let config = containerd.put("here", &config, &[]).to_string();
        let labels: Vec<(String, &str)> =
            sources.iter().map(|(host, name)| (format!("{SOURCE}{host}"), *name)).collect();
        let mut labels: Vec<(&str, &str)> = labels.iter().map(|(key, value)| (key.as_str(), *value)).collect();
        labels.push((CONFIG, &config));
        containerd.put("here", &manifest, &labels)
    }

    fn shown(places: &[BlobRef]) -> Vec<String> {
        places.iter().map(|place| format!("{}/{}", place.registry, place.repository)).collect()
    }

    #[tokio::test]
    async fn an_image_of_128_layers_is_read_once() {
        let containerd = FakeContainerd::start();
        let names: Vec<String> = (0..128).map(|number| number.to_string()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        for other in ["x", "y", "z"] {
            pull(&containerd, &[other], &[("docker.io", "library/other")]);
        }
        pull(&containerd, &names, &[("docker.io", "library/large")]);
        let images = Images::new(containerd.content(), []);
        for number in 0..128 {
            let found = images.with_chain("here", chain(&names[..=number])).await.unwrap();
            assert_eq!((found.len(), found[0].position), (1, number));
            assert_eq!(found[0].layer().unwrap().blob, Digest::of(names[number].as_bytes()));
            assert_eq!(shown(&images.places(&found)), ["docker.io/library/large"]);
        }
        // The newest manifest is read first, so the others are not read at all.
        assert_eq!((containerd.lists(), containerd.reads()), (1, 2));
    }

    #[tokio::test]
    async fn a_manifest_that_comes_later_is_found() {
        let containerd = Arc::new(FakeContainerd::start());
        let images = Images::new(containerd.content(), []);
        let late = {
            let containerd = containerd.clone();
            async move {
                while containerd.lists() == 0 {
                    tokio::task::yield_now().await;
                }
                pull(&containerd, &["a", "b"], &[("docker.io", "library/late")])
            }
        };
        let (found, manifest) = tokio::join!(images.with_chain("here", chain(&["a", "b"])), late);
        assert_eq!(found.unwrap()[0].image.manifest, manifest);
        let lost = images.with_chain("here", chain(&["c"])).await.unwrap_err();
        assert!(matches!(lost, FindError::Unknown { .. }), "{lost}");
        let elsewhere = images.with_chain("elsewhere", chain(&["a"])).await.unwrap_err();
        assert!(matches!(elsewhere, FindError::Unknown { .. }), "{elsewhere}");
        assert_eq!(images.with_manifest("here", manifest).await.unwrap().unwrap().layers.len(), 2);
        assert!(images.with_manifest("elsewhere", Digest::of(b"x")).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn every_place_is_named_and_the_newest_image_first() {
        let containerd = FakeContainerd::start();
        pull(&containerd, &["a", "old"], &[("docker.io", "library/old")]);
        pull(&containerd, &["a", "new"], &[("10.1.0.2", "team/new,team/other"), ("docker.io", "library/new")]);
        // Not an image, and newer than both.
        containerd.put("here", b"{}", &[(CONFIG, "sha256:")]);
        let images = Images::new(containerd.content(), ["10.1.0.2:5000".to_owned(), "10.1.0.22:1".to_owned()]);
        images.with_chain("here", chain(&["a", "old"])).await.unwrap();
        let found = images.with_chain("here", chain(&["a"])).await.unwrap();
        let places = images.places(&found);
        assert_eq!(
            shown(&places),
            [
                "10.1.0.2:5000/team/new",
                "10.1.0.2/team/new",
                "10.1.0.2:5000/team/other",
                "10.1.0.2/team/other",
                "docker.io/library/new",
                "docker.io/library/old",
            ]
        );
        assert!(places.iter().all(|place| place.digest == Digest::of(b"a") && place.size == 1));
        let above = images.places(&[found[0].at(1)]);
        assert_eq!(above[0].digest, Digest::of(b"new"));
    }

    #[tokio::test]
    async fn an_image_that_was_imported_has_one_place_without_name() {
        let containerd = FakeContainerd::start();
        pull(&containerd, &["a"], &[]);
        let images = Images::new(containerd.content(), []);
        let found = images.with_chain("here", chain(&["a"])).await.unwrap();
        assert_eq!(shown(&images.places(&found)), ["/"]);
    }
}
