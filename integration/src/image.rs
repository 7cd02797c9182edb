//! Images for the lab, built by ourselves and kept as OCI image layouts.

pub mod demo;
pub mod layer;
pub mod noise;
pub mod real;
mod rootfs;
pub mod small;
pub mod torch;
pub mod wide;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub use layer::{Layer, LayerWriter, Packing};

/// The two families of media types.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    /// OCI's.
    #[default]
    Oci,
    /// Docker's schema 2.
    Docker,
}

impl Family {
    const fn manifest(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.manifest.v1+json",
            Self::Docker => "application/vnd.docker.distribution.manifest.v2+json",
        }
    }

    const fn config(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.config.v1+json",
            Self::Docker => "application/vnd.docker.container.image.v1+json",
        }
    }

    const fn index(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.index.v1+json",
            Self::Docker => "application/vnd.docker.distribution.manifest.list.v2+json",
        }
    }

    const fn layer(self, packing: Packing) -> &'static str {
        match (self, packing) {
            (Self::Oci, Packing::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Self::Oci, Packing::Zstd | Packing::ZstdFrames) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (Self::Oci, Packing::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (Self::Docker, Packing::Gzip) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (Self::Docker, Packing::Zstd | Packing::ZstdFrames) => "application/vnd.docker.image.rootfs.diff.tar.zstd",
            (Self::Docker, Packing::Plain) => "application/vnd.docker.image.rootfs.diff.tar",
        }
    }
}

/// What an image is beside its layers.
#[derive(Clone, Copy, Debug)]
pub struct Form<'a> {
    /// Media types.
    pub family: Family,
    /// `PATH` of its containers.
    pub path_variable: &'a str,
    /// What its containers run where nothing else is asked for.
    pub command: &'a [&'a str],
}

/// A file of an image.
#[derive(Clone, Debug)]
pub struct Blob {
    /// `sha256:...`
    pub digest: String,
    /// Bytes.
    pub size: u64,
    /// Media type.
    pub media_type: String,
    /// Where it is.
    pub path: PathBuf,
}

/// An image in a folder.
#[derive(Clone, Debug)]
pub struct Image {
    /// The manifest, or the index that holds it.
    pub manifest: Blob,
    /// The configuration.
    pub config: Blob,
    /// The layers, the lowest first.
    pub layers: Vec<Blob>,
}

impl Image {
    /// Writes manifest and configuration for `layers`, whose files must be in [`blob_folder`]\(`folder`).
    pub fn assemble(folder: &Path, layers: &[Layer], path_variable: &str) -> Result<Self> {
        Self::assemble_as(folder, layers, Form { family: Family::Oci, path_variable, command: &["sh"] })
    }

    /// The same in a form of choice.
    pub fn assemble_as(folder: &Path, layers: &[Layer], form: Form<'_>) -> Result<Self> {
        let Form { family, path_variable, command } = form;
        let architecture = architecture();
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": { "Env": [format!("PATH={path_variable}"), "LANG=C.UTF-8"], "Cmd": command, "WorkingDir": "/" },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = store(folder, family.config(), &config)?;
        let descriptor =
            |blob: &Blob| json!({ "mediaType": blob.media_type, "digest": blob.digest, "size": blob.size });
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| Blob {
                digest: layer.digest.clone(),
                size: layer.size,
                media_type: family.layer(layer.packing).to_owned(),
                path: layer.path.clone(),
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": family.manifest(),
            "config": descriptor(&config),
            "layers": layers.iter().map(descriptor).collect::<Vec<_>>(),
        });
        let manifest = store(folder, family.manifest(), &manifest)?;
        let index = json!({ "schemaVersion": 2, "manifests": [descriptor(&manifest)] });
        fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#)?;
        // Last, and moved into place: an image without it is not there.
        fs::write(folder.join("index.json.new"), serde_json::to_vec(&index)?)?;
        fs::rename(folder.join("index.json.new"), folder.join("index.json"))?;
        Ok(Self { manifest, config, layers })
    }

    /// Opens an image that [`Image::assemble`] completed before, or one whose manifest is the first of an index.
    pub fn open(folder: &Path) -> Result<Self> {
        let read = |path: &Path| -> Result<Value> {
            let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            serde_json::from_slice(&bytes).with_context(|| format!("{} is not JSON", path.display()))
        };
        let blob = |descriptor: &Value| -> Result<Blob> {
            let text = |key: &str| descriptor[key].as_str().map(str::to_owned).with_context(|| format!("no {key}"));
            let digest = text("digest")?;
            let path = blob_folder(folder).join(digest.trim_start_matches("sha256:"));
            Ok(Blob { size: descriptor["size"].as_u64().unwrap_or(0), media_type: text("mediaType")?, digest, path })
        };
        let index = read(&folder.join("index.json"))?;
        let manifest = blob(&index["manifests"][0])?;
        let mut contents = read(&manifest.path)?;
        if let Some(image) = contents.get("manifests").and_then(|list| list.get(0)) {
            contents = read(&blob(image)?.path)?;
        }
        let layers = contents["layers"].as_array().into_iter().flatten().map(blob).collect::<Result<_>>()?;
        Ok(Self { config: blob(&contents["config"])?, manifest, layers })
    }

    /// Links the layers' blobs into the image that is made in `folder`, to be assembled there with others.
    pub fn link_layers(&self, folder: &Path) -> Result<Vec<Layer>> {
        self.link_layers_above(folder, 0)
    }

    /// The same without the `lowest`, which are there already.
    pub fn link_layers_above(&self, folder: &Path, lowest: usize) -> Result<Vec<Layer>> {
        let config =
            fs::read(&self.config.path).with_context(|| format!("cannot read {}", self.config.path.display()))?;
        let config: Value = serde_json::from_slice(&config).context("the image's configuration is not JSON")?;
        fs::create_dir_all(blob_folder(folder))?;
        let diff_ids = config["rootfs"]["diff_ids"].as_array().into_iter().flatten();
        let linked = self.layers.iter().zip(diff_ids).skip(lowest).map(|(blob, diff_id)| {
            let path = blob_folder(folder).join(blob.digest.trim_start_matches("sha256:"));
            fs::hard_link(&blob.path, &path).with_context(|| format!("cannot link {}", path.display()))?;
            let diff_id = diff_id.as_str().unwrap_or_default().to_owned();
            let packing = Packing::of(&blob.media_type);
            Ok(Layer { digest: blob.digest.clone(), diff_id, size: blob.size, path, packing })
        });
        linked.collect()
    }

    /// This image with `blob` on top, a tar packed with gzip, in `folder`.
    pub fn with_layer(&self, folder: &Path, blob: &[u8], path_variable: &str) -> Result<Self> {
        let mut layers = self.link_layers(folder)?;
        layers.push(Layer::from_gzip(folder, blob)?);
        Self::assemble(folder, &layers, path_variable)
    }

    /// This image behind an index in `folder`, where it comes after `elsewhere` for an architecture that no test machine has.
    pub fn behind_index(&self, folder: &Path, family: Family, elsewhere: &Self) -> Result<Self> {
        let entry = |image: &Self, architecture: &str| {
            let manifest = &image.manifest;
            json!({
                "mediaType": manifest.media_type, "digest": manifest.digest, "size": manifest.size,
                "platform": { "os": "linux", "architecture": architecture },
            })
        };
        let manifests = [entry(elsewhere, "s390x"), entry(self, architecture())];
        let index = json!({ "schemaVersion": 2, "mediaType": family.index(), "manifests": manifests });
        Ok(Self { manifest: store(folder, family.index(), &index)?, ..self.clone() })
    }

    /// containerd's names of its layers, each on all those below; the lowest first.
    pub fn chain_ids(&self) -> Result<Vec<String>> {
        let config =
            fs::read(&self.config.path).with_context(|| format!("cannot read {}", self.config.path.display()))?;
        let config: Value = serde_json::from_slice(&config).context("the image's configuration is not JSON")?;
        let diff_ids = config["rootfs"]["diff_ids"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let mut chains: Vec<String> = Vec::new();
        for diff_id in diff_ids {
            let chain = match chains.last() {
                None => diff_id.to_owned(),
                Some(below) => format!("sha256:{}", hex_of(&Sha256::digest(format!("{below} {diff_id}").as_bytes()))),
            };
            chains.push(chain);
        }
        Ok(chains)
    }

    /// The last of them.
    pub fn chain_id(&self) -> Result<String> {
        self.chain_ids()?.pop().context("the image has no layers")
    }

    /// Bytes of all layers as the registry stores them.
    pub fn compressed_size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).sum()
    }
}

/// This machine's architecture, by OCI's name.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Where an image in `folder` keeps its blobs.
pub fn blob_folder(folder: &Path) -> PathBuf {
    folder.join("blobs/sha256")
}

fn store(folder: &Path, media_type: &str, value: &Value) -> Result<Blob> {
    let bytes = serde_json::to_vec(value)?;
    let hex = hex_of(&Sha256::digest(&bytes));
    let path = blob_folder(folder).join(&hex);
    fs::create_dir_all(blob_folder(folder))?;
    fs::write(&path, &bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Blob { digest: format!("sha256:{hex}"), size: bytes.len() as u64, media_type: media_type.to_owned(), path })
}

fn hex_of(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
