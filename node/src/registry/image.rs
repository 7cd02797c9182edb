//! From an image reference to its layers: index, manifest, platform.

use std::fmt;
use std::str::FromStr;

use bytes::{Bytes, BytesMut};
use layer::Digest;
use oci_spec::distribution::Reference;
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde::Deserialize;

use super::client::{Client, MANIFEST_BYTES_MAX, Manifest};
use super::error::RegistryError;
use crate::source::BlobRef;

/// How many indexes may stand between a reference and its manifest: one is usual, an index of indexes is legal.
const INDEX_DEPTH_MAX: usize = 3;
/// The most layers of an image: overlayfs itself takes 500.
const LAYERS_MAX: usize = 1024;

/// A reference as users write it: `debian:13`, `registry.local:5000/team/app@sha256:…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRef(Reference);

/// A text is no image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no image reference: {reason}")]
pub struct ImageRefError {
    text: String,
    reason: String,
}

/// Why an image's layers cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The registry did not give a manifest.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A manifest or index cannot be read.
    #[error("the manifest {digest} of {image} is wrong: {reason}")]
    Manifest {
        /// The image.
        image: String,
        /// Digest of the manifest or index.
        digest: Digest,
        /// What is wrong.
        reason: String,
    },
    /// The index has nothing for this machine.
    #[error("{image} has no manifest for {platform}; it has {offered}")]
    Platform {
        /// The image.
        image: String,
        /// `linux/ARCH`.
        platform: String,
        /// What there is.
        offered: String,
    },
}

/// An image of one platform.
#[derive(Clone, Debug)]
pub struct Image {
    /// Digest of the platform's manifest.
    pub manifest: Digest,
    /// The configuration.
    pub config: BlobRef,
    /// The layers, bottom first.
    pub layers: Vec<BlobRef>,
    /// What was read on the way: indexes, then the manifest. Not empty.
    pub documents: Vec<Manifest>,
}

/// A platform that an image may be of. Always Linux.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// OCI's name, like `amd64`.
    pub architecture: String,
    /// Like `v7`; empty where none is asked for.
    pub variant: String,
}

/// A text is no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no platform: want linux/ARCHITECTURE or linux/ARCHITECTURE/VARIANT, like linux/arm64")]
pub struct PlatformError(String);

impl Platform {
    /// This machine's.
    pub fn host() -> Self {
        host_architecture().into()
    }

    /// The variants that run on it, best first (containerd/platforms, `normalizeArch` and `platformVector`).
    fn variants(&self) -> Vec<&str> {
        let (all, default): (&[&str], &str) = match self.architecture.as_str() {
            "amd64" => (&["v4", "v3", "v2", "v1"], "v1"),
            "arm64" => (&["v9", "v8"], "v8"),
            "arm" => (&["v8", "v7", "v6", "v5"], "v7"),
            _ => (&[], ""),
        };
        let wanted = if self.variant.is_empty() { default } else { self.variant.as_str() };
        let mut variants: Vec<&str> = all.iter().copied().skip_while(|variant| *variant != wanted).collect();
        if variants.is_empty() && !wanted.is_empty() {
            variants.push(wanted);
        }
        // An image without variant is of the baseline.
        let baseline = variants.iter().position(|variant| ["v1", "v8"].contains(variant) && self.architecture != "arm");
        match baseline {
            Some(at) => variants.insert(at, ""),
            None if self.variant.is_empty() => variants.insert(0, ""),
            None => variants.push(""),
        }
        variants
    }
}

impl From<&str> for Platform {
    /// The platform of an architecture without variant.
    fn from(architecture: &str) -> Self {
        Self { architecture: architecture.to_owned(), variant: String::new() }
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let mut parts = text.split('/');
        let (os, architecture, variant) = (parts.next(), parts.next(), parts.next().unwrap_or_default());
        match (os, architecture, parts.next()) {
            (Some("linux"), Some(architecture), None) if !architecture.is_empty() => {
                Ok(Self { architecture: architecture.to_owned(), variant: variant.to_owned() })
            }
            _ => Err(PlatformError(text.chars().take(100).collect())),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "linux/{}", self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

impl Image {
    /// The manifest's text.
    pub fn document(&self) -> Option<&Manifest> {
        self.documents.last()
    }
}

impl ImageRef {
    /// Registry host with port.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// Repository in it.
    pub fn repository(&self) -> &str {
        self.0.repository()
    }
}

impl FromStr for ImageRef {
    type Err = ImageRefError;

    fn from_str(text: &str) -> Result<Self, ImageRefError> {
        let error = |reason: String| ImageRefError { text: text.chars().take(300).collect(), reason };
        Reference::from_str(text).map(Self).map_err(|reason| error(reason.to_string()))
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.whole())
    }
}

impl Client {
    /// Resolves `image` to the manifest of `platform` and its layers.
    pub async fn image(&self, image: &ImageRef, platform: &Platform) -> Result<Image, ImageError> {
        let reference = &image.0;
        let (registry, repository) = (reference.registry(), reference.repository());
        let wanted = reference.digest().or(reference.tag()).unwrap_or("latest");
        let mut found = self.manifest(registry, repository, wanted).await?;
        let mut documents = Vec::new();
        for _ in 0..INDEX_DEPTH_MAX {
            let step = read(image, &mut found, platform)?;
            documents.push(found);
            match step {
                Step::Image(image) => return Ok(Image { documents, ..image }),
                Step::Manifest(digest) => {
                    found = self.manifest(registry, repository, &digest.to_string()).await?;
                }
            }
        }
        Err(wrong(image, &found, format!("more than {INDEX_DEPTH_MAX} indexes in a row")))
    }

    /// The text of the image's configuration, checked.
    pub async fn config(&self, image: &Image) -> Result<Bytes, ImageError> {
        let mut body = self.blob(&image.config, 0, None).await?;
        let wrong = |reason: &str| ImageError::Manifest {
            image: image.config.to_string(),
            digest: image.manifest,
            reason: format!("its configuration {reason}"),
        };
        let mut text = BytesMut::new();
        while let Some(bytes) = body.next().await? {
            text.extend_from_slice(&bytes);
            if text.len() > MANIFEST_BYTES_MAX {
                return Err(wrong(&format!("is larger than {MANIFEST_BYTES_MAX} bytes")));
            }
        }
        match Digest::of(&text) == image.config.digest {
            true => Ok(text.freeze()),
            false => Err(wrong("came with another digest")),
        }
    }
}

/// What a manifest or index says.
#[derive(Clone, Debug)]
pub enum Step {
    /// It is the manifest.
    Image(Image),
    /// It is an index, and this the manifest in it for the machine.
    Manifest(Digest),
}

/// Reads `found`, which came for `image`, for `platform`, and gives it the media type of its own text. The image's documents
/// are the caller's to add.
pub fn read(image: &ImageRef, found: &mut Manifest, platform: &Platform) -> Result<Step, ImageError> {
    if !complete_media_type(found) {
        return layers(image, found, Vec::new()).map(Step::Image);
    }
    let wrong = |reason: String| wrong(image, found, reason);
    let index = ImageIndex::from_reader(&found.bytes[..]).map_err(|error| wrong(error.to_string()))?;
    let chosen = choose(index.manifests(), platform).ok_or_else(|| ImageError::Platform {
        image: image.to_string(),
        platform: platform.to_string(),
        offered: offered(index.manifests()),
    })?;
    digest(chosen).map_err(wrong).map(Step::Manifest)
}

/// OCI's name of this machine's architecture (the values of Go's `GOARCH`).
pub const fn host_architecture() -> &'static str {
    match std::env::consts::ARCH.as_bytes() {
        b"x86_64" => "amd64",
        b"aarch64" => "arm64",
        b"x86" => "386",
        b"powerpc64" => "ppc64le",
        b"loongarch64" => "loong64",
        _ => std::env::consts::ARCH,
    }
}

fn wrong(image: &ImageRef, found: &Manifest, reason: String) -> ImageError {
    ImageError::Manifest { image: image.to_string(), digest: found.digest, reason }
}

/// Gives `found` the media type of its own text, which counts more than what the registry says. Whether it is an index.
fn complete_media_type(found: &mut Manifest) -> bool {
    const INDEXES: [&str; 2] =
        ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
    const MANIFESTS: [&str; 2] =
        ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        media_type: Option<String>,
        manifests: Option<serde::de::IgnoredAny>,
    }
    let typed: Typed = serde_json::from_slice(&found.bytes).unwrap_or(Typed { media_type: None, manifests: None });
    let claimed = typed.media_type.as_deref().unwrap_or(&found.media_type);
    let claimed = claimed.split(';').next().unwrap_or_default().trim().to_owned();
    let is_index = match claimed.as_str() {
        claimed if INDEXES.contains(&claimed) => true,
        claimed if MANIFESTS.contains(&claimed) => false,
        _ => typed.manifests.is_some(),
    };
    let known = INDEXES.contains(&claimed.as_str()) || MANIFESTS.contains(&claimed.as_str());
    found.media_type = match (known, is_index) {
        (true, _) => claimed,
        (false, true) => INDEXES[0].to_owned(),
        (false, false) => MANIFESTS[0].to_owned(),
    };
    is_index
}

fn layers(image: &ImageRef, found: &Manifest, documents: Vec<Manifest>) -> Result<Image, ImageError> {
    let wrong = |reason: String| wrong(image, found, reason);
    let manifest = ImageManifest::from_reader(&found.bytes[..]).map_err(|error| wrong(error.to_string()))?;
    if manifest.layers().len() > LAYERS_MAX {
        return Err(wrong(format!("it has more than {LAYERS_MAX} layers")));
    }
    let blob = |descriptor: &Descriptor| -> Result<BlobRef, String> {
        Ok(BlobRef {
            registry: image.0.registry().to_owned(),
            repository: image.0.repository().to_owned(),
            digest: digest(descriptor)?,
            size: descriptor.size(),
            media_type: descriptor.media_type().to_string(),
            urls: descriptor.urls().clone().unwrap_or_default(),
        })
    };
    let layers = manifest.layers().iter().map(blob).collect::<Result<Vec<_>, _>>().map_err(wrong)?;
    let config = blob(manifest.config()).map_err(wrong)?;
    Ok(Image { manifest: found.digest, config, layers, documents })
}

fn digest(descriptor: &Descriptor) -> Result<Digest, String> {
    descriptor.digest().to_string().parse().map_err(|error: layer::digest::ParseDigestError| error.to_string())
}

/// The first manifest that containerd would choose for `wanted`.
fn choose<'a>(manifests: &'a [Descriptor], wanted: &Platform) -> Option<&'a Descriptor> {
    let fits = |platform: &oci_spec::image::Platform, variant: &str| {
        platform.os().to_string() == "linux"
            && platform.architecture().to_string() == wanted.architecture
            && platform.variant().as_deref().unwrap_or_default() == variant
    };
    wanted.variants().into_iter().find_map(|variant| {
        manifests
            .iter()
            .find(|descriptor| descriptor.platform().as_ref().is_some_and(|platform| fits(platform, variant)))
    })
}

fn offered(manifests: &[Descriptor]) -> String {
    let name = |platform: &oci_spec::image::Platform| {
        let variant = platform.variant().as_ref().map(|variant| format!("/{variant}")).unwrap_or_default();
        format!("{}/{}{variant}", platform.os(), platform.architecture())
    };
    let names: Vec<String> =
        manifests.iter().filter_map(|descriptor| descriptor.platform().as_ref().map(name)).take(32).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::fake::FakeRegistry;
    use super::super::{Client, Fault, Options};
    use super::*;

    #[test]
    fn references_are_docker_s() {
        let parsed = |text: &str| -> ImageRef { text.parse().unwrap() };
        assert_eq!(parsed("debian").to_string(), "docker.io/library/debian:latest");
        assert_eq!(parsed("r.local:5000/a/b:1").0.registry(), "r.local:5000");
        assert!("UPPER:case".parse::<ImageRef>().is_err());
    }

    fn descriptor(os: &str, architecture: &str, variant: Option<&str>) -> Descriptor {
        let mut platform = json!({ "os": os, "architecture": architecture });
        if let Some(variant) = variant {
            platform["variant"] = json!(variant);
        }
        serde_json::from_value(json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": Digest::of(format!("{os}{architecture}{variant:?}").as_bytes()).to_string(),
            "size": 1,
            "platform": platform,
        }))
        .unwrap()
    }

    #[test]
    fn chooses_what_containerd_would() {
        let manifests = [
            descriptor("windows", "amd64", None),
            descriptor("unknown", "unknown", None),
            descriptor("linux", "amd64", Some("v3")),
            descriptor("linux", "arm", Some("v6")),
            descriptor("linux", "arm", Some("v7")),
            descriptor("linux", "arm64", Some("v8")),
            descriptor("linux", "amd64", None),
        ];
        let at = |architecture: &str| {
            choose(&manifests, &architecture.parse().unwrap())
                .and_then(|found| manifests.iter().position(|one| one == found))
        };
        assert_eq!(at("linux/amd64"), Some(6));
        assert_eq!(at("linux/amd64/v3"), Some(2));
        assert_eq!(at("linux/amd64/v2"), Some(6));
        assert_eq!(at("linux/arm64"), Some(5));
        assert_eq!(at("linux/arm"), Some(4));
        assert_eq!(at("linux/arm/v6"), Some(3));
        assert_eq!(at("linux/s390x"), None);
        for odd in ["", "amd64", "windows/amd64", "linux/", "linux/arm/v7/x"] {
            assert!(odd.parse::<Platform>().is_err(), "{odd}");
        }
    }

    #[tokio::test]
    async fn resolves_an_index_of_docker_s_types() {
        let registry = FakeRegistry::start().await;
        let blob = Digest::of(b"layer");
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": { "mediaType": "application/vnd.docker.container.image.v1+json", "size": 2,
                "digest": Digest::of(b"{}").to_string() },
            "layers": [{ "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "size": 5,
                "digest": blob.to_string() }],
        });
        let inner =
            registry.put_manifest("team/app", None, "application/vnd.docker.distribution.manifest.v2+json", &manifest);
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.list.v2+json",
            "manifests": [{ "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "size": 1,
                "digest": inner.to_string(), "platform": { "os": "linux", "architecture": "amd64" } }],
        });
        let list = "application/vnd.docker.distribution.manifest.list.v2+json";
        registry.put_manifest("team/app", Some("1"), list, &index);
        let client = Client::new(registry.config(), Options::default());
        let image: ImageRef = format!("{}/team/app:1", registry.host()).parse().unwrap();
        let resolved = client.image(&image, &"amd64".into()).await.unwrap();
        assert_eq!(resolved.manifest, inner);
        let types: Vec<&str> = resolved.documents.iter().map(|document| document.media_type.as_str()).collect();
        assert_eq!(types, [list, "application/vnd.docker.distribution.manifest.v2+json"]);
        assert_eq!(resolved.config.digest, Digest::of(b"{}"));
        let error = client.config(&resolved).await.unwrap_err();
        assert!(
            matches!(&error, ImageError::Registry(error) if matches!(error.fault, Fault::NotFound { .. })),
            "{error}"
        );
        let layer = &resolved.layers[0];
        assert_eq!((layer.digest, layer.size, layer.repository.as_str()), (blob, 5, "team/app"));
        assert_eq!(layer.media_type, "application/vnd.docker.image.rootfs.diff.tar.gzip");
        let error = client.image(&image, &"s390x".into()).await.unwrap_err().to_string();
        assert!(error.contains("linux/s390x") && error.contains("linux/amd64"), "{error}");
    }
}
