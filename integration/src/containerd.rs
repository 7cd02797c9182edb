//! containerd with everything that is its own below one folder, and its client `ctr`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::network::{Network, Place};
use crate::process::{Daemon, run};
use crate::tools::Tools;

/// A running containerd at the node.
#[derive(Debug)]
pub struct Containerd {
    daemon: Daemon,
    socket: PathBuf,
    hosts: PathBuf,
    root: PathBuf,
    control_group: String,
    tools: Tools,
}

impl Containerd {
    /// Starts containerd with state in `folder`. `socket` must be short (a Unix socket's path has at most 107 bytes). Where
    /// `drop_in` is given, it is imported as a user's drop-in would be. `plain_registry` is reached by plain HTTP.
    pub fn start(
        tools: &Tools,
        network: &Network,
        folder: &Path,
        socket: &Path,
        drop_in: Option<&str>,
        plain_registry: Option<&str>,
        control_group: &str,
    ) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let hosts = folder.join("certs.d");
        fs::create_dir_all(&hosts)?;
        if let Some(registry) = plain_registry {
            let entry = hosts.join(registry);
            fs::create_dir_all(&entry)?;
            fs::write(entry.join("hosts.toml"), format!("server = \"http://{registry}\"\n"))?;
        }
        let imports = folder.join("conf.d");
        fs::create_dir_all(&imports)?;
        if let Some(drop_in) = drop_in {
            fs::write(imports.join("drover.toml"), drop_in)?;
        }
        let config = folder.join("config.toml");
        fs::write(&config, config_text(folder, socket, &imports)?)?;

        let mut command = network.command(Place::Node, tools.containerd.join("containerd"));
        command.arg("--config").arg(&config);
        with_path(&mut command, tools);
        let mut daemon = Daemon::start("containerd", &mut command, &folder.join("log"))?;
        let this = |command: &str| {
            let mut ctr = network.command(Place::Node, tools.containerd.join("ctr"));
            ctr.arg("--address").arg(socket).arg(command);
            ctr
        };
        daemon.wait_until("answers", Duration::from_secs(30), || run(&mut this("version")).is_ok())?;
        Ok(Self {
            daemon,
            socket: socket.to_owned(),
            hosts,
            root: folder.join("root"),
            control_group: control_group.to_owned(),
            tools: tools.clone(),
        })
    }

    /// The process.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// The process, to stop it.
    pub fn daemon_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Bytes of all blobs in its content store, those that are still being fetched included.
    pub fn content_bytes(&self) -> u64 {
        let store = self.root.join("io.containerd.content.v1.content");
        let files = |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten();
        let sizes = |folder: PathBuf| files(folder).filter_map(|file| Some(file.metadata().ok()?.len())).sum::<u64>();
        let unfinished =
            files(store.join("ingest")).filter_map(|entry| Some(entry.path().join("data").metadata().ok()?.len()));
        sizes(store.join("blobs/sha256")) + unfinished.sum::<u64>()
    }

    /// `ctr` with its address and `arguments`.
    pub fn ctr(&self, network: &Network, arguments: &[&str]) -> Command {
        let mut command = network.command(Place::Node, self.tools.containerd.join("ctr"));
        command.arg("--address").arg(&self.socket).args(arguments);
        with_path(&mut command, &self.tools);
        command
    }

    /// `ctr image pull` of `reference` for `snapshotter`.
    pub fn pull(&self, network: &Network, snapshotter: &str, reference: &str) -> Result<()> {
        let mut command = self.ctr(network, &["image", "pull", "--snapshotter", snapshotter, "--hosts-dir"]);
        run(command.arg(&self.hosts).arg(reference)).with_context(|| format!("cannot pull {reference}"))?;
        Ok(())
    }

    /// `ctr run` of a container `id` from an image that was pulled; not started yet, standard output piped.
    pub fn container(
        &self,
        network: &Network,
        snapshotter: &str,
        reference: &str,
        id: &str,
        program: &[&str],
    ) -> Command {
        let group = format!("{}/{id}", self.control_group);
        let mut command = self.ctr(network, &["run", "--rm", "--net-host", "--cgroup", &group]);
        command.args(["--snapshotter", snapshotter, reference, id]).args(program);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a container to its end and gives what it printed.
    pub fn output_of(
        &self,
        network: &Network,
        snapshotter: &str,
        reference: &str,
        id: &str,
        program: &[&str],
    ) -> Result<String> {
        run(&mut self.container(network, snapshotter, reference, id, program))
    }
}

fn with_path(command: &mut Command, tools: &Tools) {
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    command.env("PATH", format!("{}:{}:{path}", tools.containerd.display(), tools.runc.display()));
}

/// The main configuration, without anything about Drover: that is the drop-in's part.
fn config_text(folder: &Path, socket: &Path, imports: &Path) -> Result<String> {
    let text =
        |path: &Path| path.to_str().map(str::to_owned).with_context(|| format!("{} is not UTF-8", path.display()));
    Ok(format!(
        r#"version = 3
root = "{root}"
state = "{state}"
imports = ["{imports}/*.toml"]
# Not part of the lab: Kubernetes' interface, and snapshotters that only probe the disk.
disabled_plugins = [
  "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri",
  "io.containerd.podsandbox.controller.v1.podsandbox", "io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
"#,
        root = text(&folder.join("root"))?,
        state = text(&folder.join("state"))?,
        imports = text(imports)?,
        socket = text(socket)?,
    ))
}
