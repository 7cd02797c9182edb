//! The image registry: Debian's docker-registry, plain HTTP, on a folder.

use std::fs;
use std::net::SocketAddrV4;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::image::Image;
use crate::network::{Network, Place};
use crate::process::{Daemon, run};
use crate::tools::Tools;

/// Its port.
const PORT: u16 = 5000;

/// A running registry.
#[derive(Debug)]
pub struct Registry {
    daemon: Daemon,
    address: SocketAddrV4,
}

impl Registry {
    /// Starts a registry that keeps its blobs in `folder`.
    pub fn start(tools: &Tools, network: &Network, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder.join("storage")).with_context(|| format!("cannot create {}", folder.display()))?;
        let address = SocketAddrV4::new(network.address(Place::Registry), PORT);
        let config = folder.join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: warn, accesslog: {{disabled: false}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\n\
             http: {{addr: \"{address}\"}}\n",
            folder.join("storage").display()
        );
        fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        let mut command = network.command(Place::Registry, &tools.registry);
        command.arg("serve").arg(&config).env("OTEL_TRACES_EXPORTER", "none");
        let mut daemon = Daemon::start("registry", &mut command, &folder.join("log"))?;
        daemon.wait_until("answers", Duration::from_secs(60), || {
            let url = format!("http://{address}/v2/");
            run(network.command(Place::Registry, "curl").args(["-sf", "--noproxy", "*", &url])).is_ok()
        })?;
        Ok(Self { daemon, address })
    }

    /// `host:port`, the first part of its images' references.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// The process.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// The process, to stop it.
    pub fn daemon_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// Pushes `image` under `repository:tag` and gives its reference.
    pub fn push(&self, network: &Network, image: &Image, repository: &str, tag: &str) -> Result<String> {
        let folder = image.manifest.path.parent().context("the image has no folder")?;
        let base = format!("http://{}/v2/{repository}", self.address);
        push_manifest(network, &base, folder, &image.manifest.digest, &image.manifest.media_type, tag)?;
        Ok(format!("{}/{repository}:{tag}", self.address))
    }
}

/// Pushes a manifest whose blobs are in `folder` with all that it names: for an index, the manifests in it.
fn push_manifest(
    network: &Network,
    base: &str,
    folder: &Path,
    digest: &str,
    media_type: &str,
    tag: &str,
) -> Result<()> {
    let path = folder.join(digest.trim_start_matches("sha256:"));
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let manifest: Value = serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    let list = |key: &str| manifest[key].as_array().cloned().unwrap_or_default();
    let named = |descriptor: &Value, key: &str| descriptor[key].as_str().unwrap_or_default().to_owned();
    for child in list("manifests") {
        let digest = named(&child, "digest");
        push_manifest(network, base, folder, &digest, &named(&child, "mediaType"), &digest)?;
    }
    for blob in list("layers").iter().chain(manifest.get("config")) {
        push_blob(network, base, folder, &named(blob, "digest"))?;
    }
    let (kind, file) = (format!("Content-Type: {media_type}"), format!("@{}", path.display()));
    curl(network, &["-X", "PUT", "-H", &kind, "--data-binary", &file, &format!("{base}/manifests/{tag}")])
        .with_context(|| format!("cannot push the manifest {digest}"))?;
    Ok(())
}

fn push_blob(network: &Network, base: &str, folder: &Path, digest: &str) -> Result<()> {
    if curl(network, &["-I", &format!("{base}/blobs/{digest}")]).is_ok() {
        return Ok(());
    }
    let started = curl(network, &["-X", "POST", "-D", "-", "-o", "/dev/null", &format!("{base}/blobs/uploads/")])?;
    let location = started.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("location").then(|| value.trim().to_owned())
    });
    let Some(location) = location else { bail!("the registry gave no place to upload {digest} to: {started}") };
    let join = if location.contains('?') { '&' } else { '?' };
    let target = format!("{location}{join}digest={digest}");
    let file = folder.join(digest.trim_start_matches("sha256:")).display().to_string();
    let kind = "Content-Type: application/octet-stream";
    curl(network, &["-T", &file, "-H", kind, &target]).with_context(|| format!("cannot push {digest}"))?;
    Ok(())
}

fn curl(network: &Network, arguments: &[&str]) -> Result<String> {
    run(network.command(Place::Registry, "curl").args(["-sS", "-f", "--noproxy", "*"]).args(arguments))
}
