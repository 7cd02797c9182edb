//! containerd with everything that is its own below one folder, and its client `ctr`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::network::{Network, Place};
use crate::process::{Daemon, run};
use crate::tools::{Release, Tools};

/// How a containerd is configured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setup<'a> {
    /// A file that is imported as a user's drop-in would be.
    pub drop_in: Option<&'a str>,
    /// A registry that is reached by plain HTTP.
    pub plain_registry: Option<&'a str>,
    /// Parent of its containers' control groups.
    pub control_group: &'a str,
    /// Kubernetes' interface; off where it is not set.
    pub cri: Option<&'a Cri>,
}

/// Kubernetes' interface.
#[derive(Clone, Debug)]
pub struct Cri {
    /// The image whose container keeps a pod's namespaces.
    pub pause_image: String,
    /// Folder with CNI plugins; only pods on the host's network work without it.
    pub cni_plugins: Option<PathBuf>,
}

/// Network of pods, for [`Cri::cni_plugins`].
const POD_NETWORK: &str = r#"{
  "cniVersion": "0.4.0", "name": "pods",
  "plugins": [{
    "type": "bridge", "bridge": "pods0", "isGateway": true, "ipMasq": false,
    "ipam": { "type": "host-local", "dataDir": "DATA", "ranges": [[{ "subnet": "10.78.0.0/24" }]] }
  }]
}
"#;

/// A running containerd at a node.
#[derive(Debug)]
pub struct Containerd {
    daemon: Daemon,
    place: Place,
    socket: PathBuf,
    hosts: PathBuf,
    root: PathBuf,
    config: PathBuf,
    control_group: String,
    tools: Tools,
}

impl Containerd {
    /// Starts containerd at `place` with state in `folder`. `socket` must be short (a Unix socket's path has at most 107 bytes).
    pub fn start(
        tools: &Tools,
        network: &Network,
        place: Place,
        folder: &Path,
        socket: &Path,
        setup: &Setup<'_>,
    ) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let hosts = folder.join("certs.d");
        fs::create_dir_all(&hosts)?;
        if let Some(registry) = setup.plain_registry {
            let entry = hosts.join(registry);
            fs::create_dir_all(&entry)?;
            // 1.6 refuses a file without a host.
            let text = format!(
                "server = \"http://{registry}\"\n[host.\"http://{registry}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
            );
            fs::write(entry.join("hosts.toml"), text)?;
        }
        let imports = folder.join("conf.d");
        fs::create_dir_all(&imports)?;
        let mut text = config_text(tools.release, folder, socket, setup.cri.is_some());
        if let Some(cri) = setup.cri {
            let networks = folder.join("cni");
            fs::create_dir_all(&networks)?;
            if cri.cni_plugins.is_some() {
                let network = POD_NETWORK.replace("DATA", &folder.join("cni-addresses").display().to_string());
                fs::write(networks.join("10-pods.conflist"), network)?;
            }
            text.push_str(&cri_text(tools.release, &hosts, &networks, cri));
        }
        if let Some(drop_in) = setup.drop_in {
            let mut imported = drop_in.to_owned();
            if setup.cri.is_some() {
                // containerd 1.x replaces a plugin's whole section by an imported one: these keys go into the main file.
                let into = if tools.release.has_version_3() { &mut imported } else { &mut text };
                into.push_str(&kubernetes_keys(drop_in));
            }
            fs::write(imports.join("drover.toml"), imported)?;
        }
        let config = folder.join("config.toml");
        fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;

        let daemon = serve(tools, network, place, &config, socket)?;
        Ok(Self {
            daemon,
            place,
            socket: socket.to_owned(),
            hosts,
            root: folder.join("root"),
            config,
            control_group: setup.control_group.to_owned(),
            tools: tools.clone(),
        })
    }

    /// Starts it again with the same configuration, after it was stopped or killed.
    pub fn restart(&mut self, network: &Network) -> Result<()> {
        self.daemon = serve(&self.tools, network, self.place, &self.config, &self.socket)?;
        Ok(())
    }

    /// The process.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// The process, to stop it.
    pub fn daemon_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// The host that it is at.
    pub const fn place(&self) -> Place {
        self.place
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Folder with a `hosts.toml` for each registry.
    pub fn hosts(&self) -> &Path {
        &self.hosts
    }

    /// Parent of its containers' control groups.
    pub fn control_group(&self) -> &str {
        &self.control_group
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

    /// Whether the whole blob `digest` is in its content store.
    pub fn has_blob(&self, digest: &str) -> bool {
        let blobs = self.root.join("io.containerd.content.v1.content/blobs/sha256");
        blobs.join(digest.trim_start_matches("sha256:")).exists()
    }

    /// `ctr` with its address and `arguments`.
    pub fn ctr(&self, network: &Network, arguments: &[&str]) -> Command {
        let mut command = network.command(self.place, self.tools.containerd.join("ctr"));
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
        // Where runc knows containers by their ids; without it, one place for all nodes of this machine.
        command.arg("--runc-root").arg(self.root.with_file_name("runc"));
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

/// Starts containerd and waits until it answers.
fn serve(tools: &Tools, network: &Network, place: Place, config: &Path, socket: &Path) -> Result<Daemon> {
    let mut command = network.command(place, tools.containerd.join("containerd"));
    command.arg("--config").arg(config);
    with_path(&mut command, tools);
    let mut daemon = Daemon::start("containerd", &mut command, &config.with_file_name("log"))?;
    let version = || {
        let mut ctr = network.command(place, tools.containerd.join("ctr"));
        ctr.arg("--address").arg(socket).arg("version");
        ctr
    };
    daemon.wait_until("answers", Duration::from_secs(60), || run(&mut version()).is_ok())?;
    Ok(daemon)
}

/// Puts containerd's and runc's folders in front of a program's `PATH`.
pub(crate) fn with_path(command: &mut Command, tools: &Tools) {
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    command.env("PATH", format!("{}:{}:{path}", tools.containerd.display(), tools.runc.display()));
}

/// The main configuration, without anything about Drover: that is the drop-in's part.
fn config_text(release: Release, folder: &Path, socket: &Path, cri: bool) -> String {
    let version = if release.has_version_3() { 3 } else { 2 };
    // Not part of the lab: snapshotters that only probe the disk, and what other programs would plug into.
    let mut disabled = vec![
        "io.containerd.nri.v1.nri",
        "io.containerd.tracing.processor.v1.otlp",
        "io.containerd.internal.v1.tracing",
        "io.containerd.snapshotter.v1.aufs",
        "io.containerd.snapshotter.v1.blockfile",
        "io.containerd.snapshotter.v1.btrfs",
        "io.containerd.snapshotter.v1.devmapper",
        "io.containerd.snapshotter.v1.erofs",
        "io.containerd.snapshotter.v1.zfs",
    ];
    if !cri {
        disabled.extend([
            "io.containerd.cri.v1.images",
            "io.containerd.cri.v1.runtime",
            "io.containerd.grpc.v1.cri",
            "io.containerd.podsandbox.controller.v1.podsandbox",
        ]);
    }
    let disabled: Vec<_> = disabled.iter().map(|plugin| format!("  \"{plugin}\",\n")).collect();
    format!(
        r#"version = {version}
root = "{root}"
state = "{state}"
imports = ["{imports}/*.toml"]
disabled_plugins = [
{disabled}]
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{opt}"
"#,
        root = folder.join("root").display(),
        state = folder.join("state").display(),
        imports = folder.join("conf.d").display(),
        disabled = disabled.concat(),
        socket = socket.display(),
        opt = folder.join("opt").display(),
    )
}

/// The configuration of Kubernetes' interface, as a node's operator has it before Drover comes.
fn cri_text(release: Release, hosts: &Path, networks: &Path, cri: &Cri) -> String {
    let (hosts, networks, pause) = (hosts.display(), networks.display(), &cri.pause_image);
    let plugins = cri.cni_plugins.as_deref().unwrap_or(Path::new("/nonexistent")).display();
    // 2.4 knows a list only.
    let plugins = match release {
        Release::V2_4 => format!("bin_dirs = [\"{plugins}\"]"),
        _ => format!("bin_dir = \"{plugins}\""),
    };
    // Not every machine lets root lower a process's score for the kernel's out-of-memory killer.
    if release.has_version_3() {
        format!(
            r#"[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause}"
[plugins."io.containerd.cri.v1.images".registry]
  config_path = "{hosts}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins."io.containerd.cri.v1.runtime".cni]
  {plugins}
  conf_dir = "{networks}"
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
"#
        )
    } else {
        format!(
            r#"[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "{hosts}"
[plugins."io.containerd.grpc.v1.cri".cni]
  {plugins}
  conf_dir = "{networks}"
"#
        )
    }
}

/// The keys for Kubernetes that a drop-in is shipped with as a comment: lines that begin with `# [` or with `#` and three
/// spaces.
fn kubernetes_keys(drop_in: &str) -> String {
    let keys = drop_in.lines().filter_map(|line| {
        let line = line.strip_prefix("# ")?;
        (line.starts_with('[') || line.starts_with("  ")).then(|| format!("{line}\n"))
    });
    keys.collect()
}
