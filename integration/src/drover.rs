//! Our own two daemons, configured as a user would do it by hand.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::drover::node::v1::node_client::NodeClient;
use proto::drover::node::v1::{Layer, LayerState, StatusRequest, StatusResponse};
use snapshotter::keeper;
use tonic::transport::Endpoint;

use crate::network::{Network, Place};
use crate::process::{Daemon, run, wait_for};
use crate::tools::Tools;

/// Set to a filter for the snapshotters' logs, as their key `log`.
pub const LOG: &str = "DROVER_LAB_LOG";

/// The seeder's port.
pub(crate) const PORT: u16 = 7070;

/// What both daemons leave free: everything else on this disk is none of the lab's business, and tests must not depend on it.
pub(crate) const KEEP_FREE: &str = "[cache]\nkeep_free = \"256MiB\"\n";

/// How long a daemon may take until it answers.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// How long the snapshotter may take to say its status.
const STATUS_DEADLINE: Duration = Duration::from_secs(30);

/// A cluster's authority. The seeder has a certificate that was issued by hand, the nodes get their own with a token.
#[derive(Clone, Debug)]
pub struct Cluster {
    folder: PathBuf,
}

impl Cluster {
    /// Makes an authority in `folder`, a certificate for the seeder of `network` and a token for its nodes.
    pub fn create(tools: &Tools, network: &Network, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        run(Command::new(&tools.seeder).args(["ca", "init", "--dir"]).arg(folder))?;
        let address = network.address(Place::Seeder).to_string();
        let mut issue = Command::new(&tools.seeder);
        issue.args(["ca", "issue", "--dir"]).arg(folder).args(["--role", "seeder", "--address", &address, "seeder"]);
        run(&mut issue)?;
        let token = run(Command::new(&tools.seeder).args(["ca", "token", "--dir"]).arg(folder))?;
        fs::write(folder.join("token"), token).context("cannot write the token")?;
        Ok(Self { folder: folder.to_owned() })
    }

    fn of_seeder(&self) -> String {
        let file = |name: &str| self.folder.join(name).display().to_string();
        format!(
            "[security]\nmode = \"mtls\"\nca = \"{}\"\ncertificate = \"{}\"\nkey = \"{}\"\n[enrol]\nauthority = \"{}\"\n",
            file("ca.crt"),
            file("seeder.crt"),
            file("seeder.key"),
            self.folder.display()
        )
    }

    fn of_node(&self) -> String {
        format!("[security]\nmode = \"enrol\"\ntoken = \"{}\"\n", self.folder.join("token").display())
    }
}

/// Where a seeder listens on its host, and what it keeps where.
#[derive(Clone, Copy, Debug)]
pub struct Seat<'a> {
    /// Port.
    pub port: u16,
    /// Folder of its configuration and log.
    pub folder: &'a Path,
    /// Folder of its store.
    pub store: &'a Path,
}

/// A running seeder.
#[derive(Debug)]
pub struct Seeder {
    daemon: Daemon,
    address: String,
    config: PathBuf,
}

impl Seeder {
    /// Starts a seeder at `seat`; a store that is there already is used. `extra` is added to its configuration.
    pub fn start(
        tools: &Tools,
        network: &Network,
        cluster: &Cluster,
        seat: Seat<'_>,
        plain_registry: Option<&str>,
        extra: &str,
    ) -> Result<Self> {
        let Seat { port, folder, store } = seat;
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let address = format!("{}:{port}", network.address(Place::Seeder));
        let config = folder.join("seeder.toml");
        let mut text = format!("listen = \"{address}\"\nroot = \"{}\"\n", store.display());
        text.push_str(&cluster.of_seeder());
        text.push_str(&registry_entry(plain_registry));
        text.push_str(extra);
        fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        let mut command = network.command(Place::Seeder, &tools.seeder);
        command.arg("serve").arg("--config").arg(&config);
        let mut daemon = Daemon::start("seeder", &mut command, &folder.join("log"))?;
        daemon.wait_until("listens", START_DEADLINE, || listens(network, Place::Seeder, &address))?;
        Ok(Self { daemon, address, config })
    }

    /// The process.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// The process, to stop it.
    pub fn daemon_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }
}

/// A running snapshotter.
#[derive(Debug)]
pub struct Snapshotter {
    daemon: Daemon,
    place: Place,
    socket: PathBuf,
    config: PathBuf,
    program: PathBuf,
    root: PathBuf,
}

impl Snapshotter {
    /// Starts a snapshotter of the `seeders` at `place` with its configuration and log in `folder`, its store in `root` and its sockets in `sockets`. `extra` is added to its configuration.
    #[expect(clippy::too_many_arguments, reason = "each is one line of the configuration")]
    pub fn start(
        tools: &Tools,
        network: &Network,
        place: Place,
        cluster: &Cluster,
        folder: &Path,
        root: PathBuf,
        sockets: &Path,
        containerd: &Path,
        seeders: &[String],
        plain_registry: Option<&str>,
        extra: &str,
    ) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        fs::create_dir_all(sockets).with_context(|| format!("cannot create {}", sockets.display()))?;
        let config = folder.join("snapshotter.toml");
        let mut text = format!("root = \"{}\"\nrun = \"{}\"\n", root.display(), sockets.display());
        if let Ok(filter) = std::env::var(LOG) {
            text.push_str(&format!("log = \"{filter}\"\n"));
        }
        text.push_str(&format!("[containerd]\nsocket = \"{}\"\n", containerd.display()));
        text.push_str(&format!("[seeder]\naddresses = {seeders:?}\n"));
        text.push_str(&cluster.of_node());
        text.push_str(&registry_entry(plain_registry));
        text.push_str(extra);
        fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        let socket = sockets.join("drover.sock");
        let program = tools.snapshotter.clone();
        let daemon = Self::serve(network, place, &program, &config, folder)?;
        let mut this = Self { daemon, place, socket, config, program, root };
        this.wait_until_ready()?;
        Ok(this)
    }

    /// The process that was started; the keeper is below or beside it.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// The process, to stop it.
    pub fn daemon_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// The socket that containerd is told.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Where it keeps everything.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Bytes that everything it keeps takes on the disk, holes not counted.
    pub fn disk_use(&self) -> Result<u64> {
        disk_use(&self.root)
    }

    /// Starts it again with the same configuration, after it was stopped or killed.
    pub fn restart(&mut self, network: &Network) -> Result<()> {
        let folder = self.config.parent().context("the configuration has no folder")?.to_owned();
        self.daemon = Self::serve(network, self.place, &self.program, &self.config, &folder)?;
        self.wait_until_ready()
    }

    /// Keeper and daemon, when the daemon serves and `accepts` says yes to them. Waits for that a minute at most.
    pub fn pair(&self, mut accepts: impl FnMut(&keeper::Status) -> bool) -> Result<keeper::Status> {
        let runtime = self.socket.parent().context("the socket has no folder")?;
        let mut pair = None;
        wait_for("keeper and daemon are well", START_DEADLINE, || {
            pair = keeper::status(runtime).ok().filter(|status| status.ready && accepts(status));
            pair.is_some()
        })
        .with_context(|| format!("{:?}\n{}", keeper::status(runtime), self.daemon.log_tail()))?;
        pair.context("no pair")
    }

    /// Kills the daemon and waits until its keeper has started another one.
    pub fn restart_daemon(&self) -> Result<()> {
        let before = self.pair(|_| true)?;
        let daemon = before.daemon.context("no daemon")?;
        kill(Pid::from_raw(i32::try_from(daemon)?), Signal::SIGKILL)?;
        self.pair(|now| now.daemon != before.daemon)?;
        Ok(())
    }

    /// Its status, asked as `drover-snapshotter status` does.
    pub fn status(&self) -> Result<StatusResponse> {
        let address = format!("unix:{}", self.socket.display());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let channel = Endpoint::from_shared(address)?.timeout(STATUS_DEADLINE).connect().await;
            let channel = channel.context("cannot connect to the snapshotter")?;
            let answer = NodeClient::new(channel).status(StatusRequest {}).await;
            Ok(answer.context("the snapshotter gave no status")?.into_inner())
        })
    }

    /// What `drover-snapshotter status` prints for people.
    pub fn status_text(&self) -> Result<String> {
        run(Command::new(&self.program).arg("status").arg("--config").arg(&self.config))
    }

    /// `drover-snapshotter pull` at the node; gives what it printed.
    pub fn pull(&self, network: &Network, reference: &str) -> Result<String> {
        run(self.pulling(network).arg(reference))
    }

    /// The same, to be given the reference and started.
    pub fn pulling(&self, network: &Network) -> Command {
        self.command(network, "pull")
    }

    /// A subcommand of `drover-snapshotter` at the node.
    pub fn command(&self, network: &Network, subcommand: &str) -> Command {
        let mut command = network.command(self.place, &self.program);
        command.arg(subcommand).arg("--config").arg(&self.config);
        command
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    fn serve(network: &Network, place: Place, program: &Path, config: &Path, folder: &Path) -> Result<Daemon> {
        let mut command = network.command(place, program);
        command.arg("serve").arg("--config").arg(config);
        Daemon::start("snapshotter", &mut command, &folder.join("log"))
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let socket = self.socket.clone();
        let accepts = || std::os::unix::net::UnixStream::connect(&socket).is_ok();
        self.daemon.wait_until("accepts connections", START_DEADLINE, accepts)
    }
}

fn registry_entry(plain_registry: Option<&str>) -> String {
    plain_registry.map(|host| format!("[registry.\"{host}\"]\nplain_http = true\n")).unwrap_or_default()
}

fn listens(network: &Network, place: Place, address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else { return false };
    // bash can connect by itself; a TLS server needs no more to be told apart from a closed port.
    run(network.command(place, "bash").args(["-c", &format!("exec 3<>/dev/tcp/{host}/{port}")])).is_ok()
}

/// Bytes that a folder takes on the disk. What vanishes meanwhile does not count.
fn disk_use(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries.flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        bytes += if metadata.is_dir() { disk_use(&entry.path()).unwrap_or(0) } else { metadata.blocks() * 512 };
    }
    Ok(bytes)
}

/// Whether a status has lazy layers and every one of them is complete.
pub fn all_complete(status: &StatusResponse) -> bool {
    let mut states = status.images.iter().flat_map(|image| &image.layers).map(Layer::state).peekable();
    states.peek().is_some() && states.all(|state| matches!(state, LayerState::Complete | LayerState::Ordinary))
}

/// Layers that are not lazy, each with the reason.
pub fn ordinary_layers(status: &StatusResponse) -> Vec<String> {
    let layers = status.images.iter().flat_map(|image| &image.layers);
    layers.filter(|layer| layer.state() == LayerState::Ordinary).map(|layer| layer.reason.clone()).collect()
}

/// Bytes that came over the network for all layers, from all kinds of sources.
pub fn bytes_fetched(status: &StatusResponse) -> u64 {
    let layers = status.images.iter().flat_map(|image| &image.layers);
    layers.flat_map(|layer| layer.bytes_by_source.values()).sum()
}
