//! The labels of a `Prepare` that say which layer of which image is wanted.

use layer::{ChainId, Digest};
use node::source::BlobRef;
use oci_spec::distribution::Reference;

use super::image::ImageLayer;
use crate::snapshots::Labels;
use crate::snapshots::store::SNAPSHOT_REF;

/// Reference of the image that is pulled.
pub const IMAGE: &str = "containerd.io/snapshot/cri.image-ref";
/// Blob of the layer.
pub const LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
/// Blobs of the layer and of those above it.
pub const LAYERS: &str = "containerd.io/snapshot/cri.image-layers";
/// The image's manifest.
pub const MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// Digest of the uncompressed layer. Since containerd 2.3 every pull has it.
pub const DIFF_ID: &str = "containerd.io/snapshot/diff-id";

/// Compiles the grammar of image references, which else the first pull would wait for: some 20 ms.
pub fn compile_grammar() {
    // What it says does not matter.
    let _ = "a".parse::<Reference>();
}

/// What a pull says of the layer that it prepares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PullLabels {
    /// Image reference as the client wrote it.
    pub image: String,
    /// Registry host and repository of the image.
    pub registry: String,
    /// Repository in that registry.
    pub repository: String,
    /// Blob of this layer.
    pub blob: Digest,
    /// Blobs of this layer and of those above it, bottom first. Cut by containerd where a label would be longer than 4096 bytes.
    pub blobs: Vec<Digest>,
    /// The image's manifest; absent in early versions of 1.6.
    pub manifest: Option<Digest>,
}

/// Why labels do not lead to a layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// The client or the configuration leaves the image labels out.
    #[error("the pull carries no image labels")]
    Missing,
    /// A label has no valid value.
    #[error("label {label} has no valid value: {value:?}")]
    Invalid {
        /// Its key.
        label: &'static str,
        /// What it says.
        value: String,
    },
}

impl PullLabels {
    /// Reads the labels of a `Prepare`.
    pub fn parse(labels: &Labels) -> Result<Self, LabelError> {
        let image = labels.get(IMAGE).ok_or(LabelError::Missing)?;
        let invalid = |label, value: &str| LabelError::Invalid { label, value: value.chars().take(200).collect() };
        let reference: Reference = image.parse().map_err(|_| invalid(IMAGE, image))?;
        let layer = labels.get(LAYER).ok_or(LabelError::Missing)?;
        let blob: Digest = layer.parse().map_err(|_| invalid(LAYER, layer))?;
        let layers = labels.get(LAYERS).map_or("", String::as_str);
        // A label that was cut in the middle of a digest only costs the head start of that layer.
        let mut blobs: Vec<Digest> = layers.split(',').filter_map(|digest| digest.trim().parse().ok()).collect();
        if blobs.first() != Some(&blob) {
            blobs.insert(0, blob);
        }
        Ok(Self {
            image: image.clone(),
            registry: reference.registry().to_owned(),
            repository: reference.repository().to_owned(),
            blob,
            blobs,
            manifest: labels.get(MANIFEST).and_then(|digest| digest.parse().ok()),
        })
    }

    /// Where a blob of the image is of which only the digest is known.
    pub fn place(&self, digest: Digest) -> BlobRef {
        BlobRef {
            registry: self.registry.clone(),
            repository: self.repository.clone(),
            digest,
            size: 0,
            media_type: String::new(),
            urls: Vec::new(),
        }
    }

    /// Where a blob of the image is.
    pub fn place_of(&self, layer: &ImageLayer) -> BlobRef {
        layer.at(&self.registry, &self.repository)
    }
}

/// The diffID of the layer, where containerd says it.
pub fn diff_id(labels: &Labels) -> Option<Digest> {
    labels.get(DIFF_ID)?.parse().ok()
}

/// The chain id that a snapshot stands for: its `snapshot.ref` label, else the last part of its name
/// (`NAMESPACE/N/CHAINID` is how containerd names what it unpacked itself).
pub fn chain_of(name: &str, labels: &Labels) -> Option<ChainId> {
    labels
        .get(SNAPSHOT_REF)
        .and_then(|target| target.parse().ok())
        .or_else(|| name.rsplit('/').next().and_then(|last| last.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn reads_what_containerd_sends() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let parsed = PullLabels::parse(&labels(&[
            (IMAGE, "10.1.0.2:5000/team/demo:v1"),
            (LAYER, &a.to_string()),
            (LAYERS, &format!("{a},{b},sha256:0123")),
        ]))
        .unwrap();
        assert_eq!((parsed.registry.as_str(), parsed.repository.as_str()), ("10.1.0.2:5000", "team/demo"));
        assert_eq!(parsed.blobs, [a, b]);
    }

    #[test]
    fn labels_that_lead_nowhere() {
        let parse = |pairs: &[(&str, &str)]| PullLabels::parse(&labels(pairs)).unwrap_err();
        assert_eq!(parse(&[(SNAPSHOT_REF, "x")]), LabelError::Missing);
        assert_eq!(parse(&[(IMAGE, "docker.io/library/x:1")]), LabelError::Missing);
        assert!(matches!(parse(&[(IMAGE, "A:B:C"), (LAYER, "x")]), LabelError::Invalid { label: IMAGE, .. }));
    }

    #[test]
    fn chain_of_both_kinds_of_names() {
        let chain = ChainId::bottom(Digest::of(b"a"));
        assert_eq!(chain_of(&format!("default/5/{chain}"), &labels(&[])), Some(chain));
        assert_eq!(chain_of("x", &labels(&[(SNAPSHOT_REF, &chain.to_string())])), Some(chain));
        assert_eq!(chain_of("default/5/container", &labels(&[])), None);
    }
}
