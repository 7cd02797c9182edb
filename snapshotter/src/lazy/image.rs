//! What an image's manifest and configuration say of its layers.

use layer::{ChainId, Digest};
use node::source::BlobRef;
use serde::Deserialize;

/// The most layers of an image: overlayfs itself takes 500.
const LAYERS_MAX: usize = 1024;

/// The layers of one image of one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Digest of its manifest.
    pub manifest: Digest,
    /// Bottom first.
    pub layers: Vec<ImageLayer>,
}

/// One layer, as manifest and configuration describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLayer {
    /// Digest of the blob.
    pub blob: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its media type, OCI's or Docker's.
    pub media_type: String,
    /// Where else the blob may be had, as foreign layers say.
    pub urls: Vec<String>,
    /// Digest of the uncompressed layer.
    pub diff_id: Digest,
    /// The layer on those below it.
    pub chain_id: ChainId,
}

/// Why a manifest does not lead to layers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// It is no manifest of an image.
    #[error("manifest {digest}: {reason}")]
    Manifest {
        /// Its digest.
        digest: Digest,
        /// What is wrong.
        reason: String,
    },
    /// Its configuration cannot be read.
    #[error("configuration {digest}: {reason}")]
    Config {
        /// Its digest.
        digest: Digest,
        /// What is wrong.
        reason: String,
    },
    /// Manifest and configuration are not of the same image.
    #[error("manifest {manifest} has {layers} layers, its configuration {diff_ids} diffIDs")]
    Counts {
        /// Digest of the manifest.
        manifest: Digest,
        /// Layers of the manifest.
        layers: usize,
        /// diffIDs of the configuration.
        diff_ids: usize,
    },
}

/// A manifest that was read; its configuration comes next.
#[derive(Debug, Clone)]
pub struct Manifest {
    digest: Digest,
    config: Digest,
    layers: Vec<Descriptor>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    urls: Option<Vec<String>>,
}

impl Manifest {
    /// Reads the manifest `text`, whose digest is `digest`: OCI's, or Docker's of schema 2.
    pub fn parse(digest: Digest, text: &[u8]) -> Result<Self, ImageError> {
        #[derive(Deserialize)]
        struct Wire {
            config: Descriptor,
            #[serde(default)]
            layers: Vec<Descriptor>,
        }
        let wrong = |reason: String| ImageError::Manifest { digest, reason };
        let wire: Wire = serde_json::from_slice(text).map_err(|error| wrong(error.to_string()))?;
        if wire.layers.len() > LAYERS_MAX {
            return Err(wrong(format!("it has more than {LAYERS_MAX} layers")));
        }
        let config = wire.config.digest.parse().map_err(|_| wrong("the configuration's digest is none".to_owned()))?;
        // What else a manifest may list, containerd does not unpack (`images.IsLayerType`).
        let layers = wire.layers.into_iter().filter(|layer| is_layer(&layer.media_type)).collect();
        Ok(Self { digest, config, layers })
    }

    /// Digest of the configuration.
    pub fn config(&self) -> Digest {
        self.config
    }

    /// The image, with `config` the text of its configuration.
    pub fn with_config(self, config: &[u8]) -> Result<Image, ImageError> {
        #[derive(Deserialize)]
        struct Wire {
            rootfs: RootFs,
        }
        #[derive(Deserialize)]
        struct RootFs {
            #[serde(default)]
            diff_ids: Vec<String>,
        }
        let wrong = |reason: String| ImageError::Config { digest: self.config, reason };
        let wire: Wire = serde_json::from_slice(config).map_err(|error| wrong(error.to_string()))?;
        let diff_ids = wire.rootfs.diff_ids;
        if diff_ids.len() != self.layers.len() {
            let (layers, diff_ids) = (self.layers.len(), diff_ids.len());
            return Err(ImageError::Counts { manifest: self.digest, layers, diff_ids });
        }
        let mut below = None;
        let mut layers = Vec::with_capacity(diff_ids.len());
        for (descriptor, diff_id) in self.layers.iter().zip(diff_ids) {
            let diff_id: Digest = diff_id.parse().map_err(|_| wrong(format!("{diff_id:?} is no diffID")))?;
            let blob = descriptor.digest.parse();
            let blob = blob.map_err(|_| ImageError::Manifest {
                digest: self.digest,
                reason: format!("{:?} is no digest of a layer", descriptor.digest),
            })?;
            let chain_id = ChainId::on(below, diff_id);
            below = Some(chain_id);
            let (size, media_type) = (descriptor.size, descriptor.media_type.clone());
            let urls = descriptor.urls.clone().unwrap_or_default();
            layers.push(ImageLayer { blob, size, media_type, urls, diff_id, chain_id });
        }
        Ok(Image { manifest: self.digest, layers })
    }
}

impl ImageLayer {
    /// The blob in `repository` of `registry`.
    pub fn at(&self, registry: &str, repository: &str) -> BlobRef {
        BlobRef {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            digest: self.blob,
            size: self.size,
            media_type: self.media_type.clone(),
            urls: self.urls.clone(),
        }
    }
}

impl Image {
    /// Number of the layer that is `chain` with those below it.
    pub fn position(&self, chain: ChainId) -> Option<usize> {
        self.layers.iter().position(|layer| layer.chain_id == chain)
    }
}

fn is_layer(media_type: &str) -> bool {
    media_type.starts_with("application/vnd.oci.image.layer.")
        || media_type.starts_with("application/vnd.docker.image.rootfs.")
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// The texts of a manifest and its configuration with one layer a name.
    pub(crate) fn texts(layers: &[&str]) -> (Vec<u8>, Vec<u8>) {
        let diff_ids: Vec<String> = layers.iter().map(|name| diff_id(name).to_string()).collect();
        let config =
            json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": diff_ids } });
        let config = serde_json::to_vec(&config).unwrap();
        let layers: Vec<_> = layers
            .iter()
            .map(|name| {
                json!({
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": Digest::of(name.as_bytes()).to_string(),
                    "size": name.len(),
                })
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": Digest::of(&config).to_string(), "size": config.len() },
            "layers": layers,
        });
        (serde_json::to_vec(&manifest).unwrap(), config)
    }

    /// The diffID of the layer `name` in [`texts`].
    pub(crate) fn diff_id(name: &str) -> Digest {
        Digest::of(format!("plain {name}").as_bytes())
    }

    /// The chain id of `layers`.
    pub(crate) fn chain(layers: &[&str]) -> ChainId {
        let chain = layers.iter().fold(None, |below, name| Some(ChainId::on(below, diff_id(name))));
        chain.expect("no layers have no chain")
    }

    #[test]
    fn chains_are_containerds() {
        let (manifest, config) = texts(&["a", "b", "a"]);
        let digest = Digest::of(&manifest);
        let image = Manifest::parse(digest, &manifest).unwrap().with_config(&config).unwrap();
        assert_eq!(image.layers.len(), 3);
        assert_eq!(image.position(chain(&["a"])), Some(0));
        assert_eq!(image.position(chain(&["a", "b"])), Some(1));
        assert_eq!(image.position(chain(&["a", "b", "a"])), Some(2));
        assert_eq!(image.position(chain(&["b"])), None);
        assert_eq!((image.layers[1].blob, image.layers[1].size), (Digest::of(b"b"), 1));
        assert_eq!(image.layers[2].diff_id, diff_id("a"));
    }

    #[test]
    fn a_foreign_layer_keeps_its_urls() {
        let (manifest, config) = texts(&["a", "b"]);
        let mut manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        manifest["layers"][1]["mediaType"] = json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip");
        manifest["layers"][1]["urls"] = json!(["https://elsewhere.test/b"]);
        let manifest = serde_json::to_vec(&manifest).unwrap();
        let image = Manifest::parse(Digest::of(&manifest), &manifest).unwrap().with_config(&config).unwrap();
        let places: Vec<BlobRef> = image.layers.iter().map(|layer| layer.at("r.test", "team/app")).collect();
        assert!(places[0].urls.is_empty());
        assert_eq!(places[1].urls, ["https://elsewhere.test/b"]);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let (manifest, config) = texts(&["a", "b"]);
        let (_, other) = texts(&["a"]);
        let digest = Digest::of(&manifest);
        let parsed = Manifest::parse(digest, &manifest).unwrap();
        assert_eq!(parsed.config(), Digest::of(&config));
        let error = parsed.clone().with_config(&other).unwrap_err();
        assert!(matches!(error, ImageError::Counts { layers: 2, diff_ids: 1, .. }), "{error}");
        assert!(matches!(parsed.clone().with_config(b"{}"), Err(ImageError::Config { .. })));
        let odd = br#"{"rootfs":{"diff_ids":["md5:1","sha256:2"]}}"#;
        assert!(matches!(parsed.with_config(odd), Err(ImageError::Config { .. })));
        for odd in ["", "[]", "{}", r#"{"config":{"digest":"x"},"layers":[]}"#, r#"{"manifests":[]}"#] {
            assert!(matches!(Manifest::parse(digest, odd.as_bytes()), Err(ImageError::Manifest { .. })), "{odd}");
        }
    }

    #[test]
    fn only_layers_count() {
        let (manifest, config) = texts(&["a"]);
        let mut value: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let more =
            json!({ "mediaType": "application/vnd.in-toto+json", "digest": Digest::of(b"x").to_string(), "size": 1 });
        value["layers"].as_array_mut().unwrap().push(more);
        let text = serde_json::to_vec(&value).unwrap();
        let image = Manifest::parse(Digest::of(&text), &text).unwrap().with_config(&config).unwrap();
        assert_eq!(image.layers.len(), 1);
        let docker = String::from_utf8(manifest).unwrap();
        let docker = docker.replace("vnd.oci.image.layer.v1.tar+gzip", "vnd.docker.image.rootfs.diff.tar.gzip");
        let parsed = Manifest::parse(Digest::of(docker.as_bytes()), docker.as_bytes()).unwrap();
        assert_eq!(parsed.with_config(&config).unwrap().layers.len(), 1);
    }
}
