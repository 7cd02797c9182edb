//! The image registry: Debian's docker-registry, plain HTTP, on a folder.

use std::fs;
use std::net::SocketAddrV4;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

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
        daemon.wait_until("answers", Duration::from_secs(20), || {
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
        let base = format!("http://{}/v2/{repository}", self.address);
        for blob in image.blobs() {
            let digest = &blob.digest;
            if curl(network, &["-I", &format!("{base}/blobs/{digest}")]).is_ok() {
                continue;
            }
            let started =
                curl(network, &["-X", "POST", "-D", "-", "-o", "/dev/null", &format!("{base}/blobs/uploads/")])?;
            let location = started.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("location").then(|| value.trim().to_owned())
            });
            let Some(location) = location else { bail!("the registry gave no place to upload {digest} to: {started}") };
            let join = if location.contains('?') { '&' } else { '?' };
            let target = format!("{location}{join}digest={digest}");
            let file = blob.path.to_string_lossy();
            let kind = "Content-Type: application/octet-stream";
            curl(network, &["-T", &file, "-H", kind, &target]).with_context(|| format!("cannot push {digest}"))?;
        }
        let kind = format!("Content-Type: {}", image.manifest.media_type);
        let file = format!("@{}", image.manifest.path.display());
        curl(network, &["-X", "PUT", "-H", &kind, "--data-binary", &file, &format!("{base}/manifests/{tag}")])
            .context("cannot push the manifest")?;
        Ok(format!("{}/{repository}:{tag}", self.address))
    }
}

fn curl(network: &Network, arguments: &[&str]) -> Result<String> {
    run(network.command(Place::Registry, "curl").args(["-sS", "-f", "--noproxy", "*"]).args(arguments))
}
