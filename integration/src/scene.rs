//! A registry, a seeder and nodes put together on one network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::containerd::{Containerd, Cri, Setup};
use crate::disk::Disk;
use crate::drover::{Cluster, KEEP_FREE, PORT, Seat, Seeder, Snapshotter};
use crate::network::{Host, Network, Place};
use crate::process::{self, Daemon, wait_for};
use crate::registry::Registry;
use crate::rivals::Rival;
use crate::sandbox::Run;
use crate::tools::{Release, Tools, workspace};

/// The second seeder's port.
const SECOND_PORT: u16 = 7170;

/// The drop-in's line for containers with a user namespace.
const REMAP_IDS_OFF: &str = "# capabilities = ['remap-ids']";

/// Everything but the nodes.
#[derive(Debug)]
pub struct Scene {
    /// Programs.
    pub tools: Tools,
    /// Hosts, or the machine's own network.
    pub network: Network,
    /// The private registry; `None` for images of registries elsewhere.
    pub registry: Option<Registry>,
    /// The seeder, when one runs.
    pub seeder: Option<Seeder>,
    /// Another one on the same host, when one runs.
    pub second_seeder: Option<Seeder>,
    /// Lines for the configuration of seeders that are started from now on.
    pub seeder_config: String,
    /// Where seeders that are started from now on have their store, instead of a folder of the run.
    pub seeder_store: Option<PathBuf>,
    cluster: Option<Cluster>,
    run: Run,
    nodes: u16,
}

impl Scene {
    /// Hosts of their own and a private registry, whose blobs are kept in `storage`.
    pub fn private(run: &Run, tools: Tools, storage: &Path) -> Result<Self> {
        let network = Network::hosts()?;
        let registry = Registry::start(&tools, &network, storage)?;
        Ok(Self {
            tools,
            network,
            registry: Some(registry),
            seeder: None,
            second_seeder: None,
            seeder_config: String::new(),
            seeder_store: None,
            cluster: None,
            run: run.clone(),
            nodes: 0,
        })
    }

    /// The machine's own network, for images of registries elsewhere.
    pub fn outside(run: &Run, tools: Tools) -> Self {
        let network = Network::Machine;
        Self {
            tools,
            network,
            registry: None,
            seeder: None,
            second_seeder: None,
            seeder_config: String::new(),
            seeder_store: None,
            cluster: None,
            run: run.clone(),
            nodes: 0,
        }
    }

    /// Folder for state of this run.
    pub fn folder(&self) -> &Path {
        self.run.folder()
    }

    /// Starts the seeder; with `fresh`, on an empty store.
    pub fn start_seeder(&mut self, fresh: bool) -> Result<()> {
        self.stop_seeder();
        let folder = self.run.folder().join("seeder");
        if fresh && folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        let cluster = self.cluster()?;
        let registry = self.plain_registry();
        let (store, extra) = match &self.seeder_store {
            None => (folder.join("store"), format!("{KEEP_FREE}{}", self.seeder_config)),
            // The test's own disk.
            Some(store) => (store.clone(), self.seeder_config.clone()),
        };
        let (tools, network) = (&self.tools, &self.network);
        let seat = Seat { port: PORT, folder: &folder, store: &store };
        self.seeder = Some(Seeder::start(tools, network, &cluster, seat, registry.as_deref(), &extra)?);
        Ok(())
    }

    /// Starts a second seeder, on an empty store, which nodes that are added from now on know too.
    pub fn start_second_seeder(&mut self) -> Result<()> {
        let (cluster, folder) = (self.cluster()?, self.run.folder().join("seeder-2"));
        let (tools, network, registry) = (&self.tools, &self.network, self.plain_registry());
        let seat = Seat { port: SECOND_PORT, folder: &folder, store: &folder.join("store") };
        self.second_seeder = Some(Seeder::start(tools, network, &cluster, seat, registry.as_deref(), KEEP_FREE)?);
        Ok(())
    }

    /// Stops the seeder, if one runs. Its store stays.
    pub fn stop_seeder(&mut self) {
        self.seeder = None;
    }

    /// A node with nothing on its disk, running containerd only.
    pub fn plain_node(&mut self) -> Result<Node> {
        self.node(Kind::Plain)
    }

    /// A node with nothing on its disk, running containerd and Drover. `extra` is added to the snapshotter's configuration.
    pub fn drover_node(&mut self, extra: &str) -> Result<Node> {
        self.drover_node_as(&NodeSetup { extra, ..NodeSetup::default() })
    }

    /// The same with everything of choice.
    pub fn drover_node_as(&mut self, setup: &NodeSetup<'_>) -> Result<Node> {
        self.node(Kind::Drover(setup))
    }

    /// A node with nothing on its disk, running containerd and another lazy snapshotter.
    pub fn rival_node(&mut self, rival: Rival) -> Result<Node> {
        self.node(Kind::Rival(rival))
    }

    fn node(&mut self, kind: Kind<'_>) -> Result<Node> {
        self.nodes += 1;
        let folder = self.run.folder().join(format!("node-{}", self.nodes));
        let sockets = PathBuf::from(format!("/run/lab-{}", self.nodes));
        for path in [&folder, &sockets] {
            fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let containerd_socket = sockets.join("containerd.sock");
        let plain_registry = self.plain_registry();
        // From here on the guard clears the node when a later step fails.
        let host = self.network.add_node(self.nodes)?;
        let place = host.place();
        let mut node = Node { containerd: None, snapshotter: None, rival: None, folder, containerd_socket, host };
        let (mut drop_in, mut cri) = (None, None);
        if let Kind::Rival(rival) = kind {
            let registry = plain_registry.as_deref().context("other snapshotters need the private registry")?;
            let (root, socket) = (node.folder.join("rival"), sockets.join("rival.sock"));
            let (daemon, text) =
                rival.start(&self.network, place, &root, &socket, registry, &node.containerd_socket)?;
            node.rival = Some(daemon);
            drop_in = Some(text);
        }
        if let Kind::Drover(setup) = kind {
            cri = setup.cri;
            let root = setup.disk.map_or(node.folder.join("drover"), |disk| disk.path().to_owned()).join("store");
            // A small disk is the test's own.
            let extra =
                if setup.disk.is_none() { format!("{KEEP_FREE}{}", setup.extra) } else { setup.extra.to_owned() };
            let cluster = self.cluster()?;
            // A node starts whether there is a seeder or not.
            let mut seeders = vec![format!("{}:{PORT}", self.network.address(Place::Seeder))];
            seeders.extend(self.second_seeder.as_ref().map(|seeder| seeder.address().to_owned()));
            let snapshotter = Snapshotter::start(
                &self.tools,
                &self.network,
                place,
                &cluster,
                &node.folder.join("drover"),
                root,
                &sockets,
                &node.containerd_socket,
                &seeders,
                plain_registry.as_deref(),
                &extra,
            )?;
            drop_in = Some(our_drop_in(self.tools.release, &snapshotter, setup)?);
            node.snapshotter = Some(snapshotter);
        }
        node.containerd = Some(Containerd::start(
            &self.tools,
            &self.network,
            place,
            &node.folder.join("containerd"),
            &node.containerd_socket,
            &Setup {
                drop_in: drop_in.as_deref(),
                plain_registry: plain_registry.as_deref(),
                control_group: &format!("{}/node-{}", self.run.control_group(), self.nodes),
                cri,
            },
        )?);
        Ok(node)
    }

    /// Has the seeders ingest an image, so that its layers are known from now on.
    pub fn ingest(&self, reference: &str) -> Result<()> {
        let first = self.seeder.as_ref().context("no seeder runs")?;
        for seeder in std::iter::once(first).chain(&self.second_seeder) {
            let mut command = self.network.command(Place::Seeder, &self.tools.seeder);
            process::run(command.arg("ingest").arg("--config").arg(seeder.config()).arg(reference))?;
        }
        Ok(())
    }

    fn plain_registry(&self) -> Option<String> {
        self.registry.as_ref().map(Registry::host)
    }

    fn cluster(&mut self) -> Result<Cluster> {
        if let Some(cluster) = &self.cluster {
            return Ok(cluster.clone());
        }
        let cluster = Cluster::create(&self.tools, &self.network, &self.run.folder().join("certificates"))?;
        Ok(self.cluster.insert(cluster).clone())
    }
}

/// How a node with Drover is configured.
#[derive(Clone, Copy, Debug, Default)]
pub struct NodeSetup<'a> {
    /// Lines for the snapshotter's configuration.
    pub extra: &'a str,
    /// Where the snapshotter's store is; must be there longer than the node.
    pub disk: Option<&'a Disk>,
    /// Kubernetes' interface.
    pub cri: Option<&'a Cri>,
    /// Whether containerd leaves the ids of containers with a user namespace to the snapshotter.
    pub remaps_ids: bool,
    /// A key that is left out of containerd's drop-in.
    pub without: Option<&'a str>,
}

/// What runs beside containerd.
#[derive(Clone, Copy)]
enum Kind<'a> {
    Plain,
    Drover(&'a NodeSetup<'a>),
    Rival(Rival),
}

/// A machine with containerd, and with Drover where it was asked for. Dropping it stops everything on it and removes its disk.
#[derive(Debug)]
pub struct Node {
    containerd: Option<Containerd>,
    snapshotter: Option<Snapshotter>,
    rival: Option<Daemon>,
    folder: PathBuf,
    containerd_socket: PathBuf,
    host: Host,
}

impl Node {
    /// Its containerd.
    ///
    /// # Panics
    /// Never: a node without containerd is not given out.
    pub fn containerd(&self) -> &Containerd {
        self.containerd.as_ref().expect("every node has a containerd")
    }

    /// Its containerd, to stop or start it.
    ///
    /// # Panics
    /// Never: a node without containerd is not given out.
    pub fn containerd_mut(&mut self) -> &mut Containerd {
        self.containerd.as_mut().expect("every node has a containerd")
    }

    /// The host that it is.
    pub const fn place(&self) -> Place {
        self.host.place()
    }

    /// Its snapshotter.
    pub fn snapshotter(&self) -> Result<&Snapshotter> {
        self.snapshotter.as_ref().context("this node runs no snapshotter")
    }

    /// Its snapshotter, to stop or start it.
    pub fn snapshotter_mut(&mut self) -> Result<&mut Snapshotter> {
        self.snapshotter.as_mut().context("this node runs no snapshotter")
    }

    /// The daemon that makes its snapshots: a snapshotter, or containerd itself.
    pub fn daemon(&self) -> &Daemon {
        let snapshotter = self.snapshotter.as_ref().map(Snapshotter::daemon);
        self.rival.as_ref().or(snapshotter).unwrap_or_else(|| self.containerd().daemon())
    }

    /// Where its state is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Mounts the file tree of an image's snapshot read-only at `target`.
    pub fn mount_image(&self, network: &Network, snapshotter: &str, reference: &str, target: &Path) -> Result<()> {
        fs::create_dir_all(target)?;
        let mut command = self.containerd().ctr(network, &["image", "mount", "--snapshotter", snapshotter, reference]);
        process::run(command.arg(target))?;
        Ok(())
    }

    /// Unmounts what [`Node::mount_image`] mounted and removes its snapshot.
    pub fn unmount_image(&self, network: &Network, snapshotter: &str, target: &Path) -> Result<()> {
        let mut command = self.containerd().ctr(network, &["image", "unmount", "--rm", "--snapshotter", snapshotter]);
        process::run(command.arg(target))?;
        Ok(())
    }

    /// What a power cut does to it: containers, containerd and snapshotter die at once, and what they had mounted is gone. Then
    /// `meanwhile` is called, and both are started again. What had not reached the disk is not lost.
    pub fn reboot(&mut self, network: &Network, meanwhile: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        if let Some(snapshotter) = &mut self.snapshotter {
            snapshotter.daemon_mut().kill();
        }
        kill_shims(&self.containerd_socket);
        if let Some(containerd) = &mut self.containerd {
            containerd.daemon_mut().kill();
        }
        unmount_below(&self.folder)?;
        if let Some(snapshotter) = &self.snapshotter {
            unmount_below(snapshotter.root())?;
            // By this the next daemon sees that the machine was started since.
            let running = snapshotter.root().join("running");
            fs::write(&running, "another-boot").with_context(|| format!("cannot write {}", running.display()))?;
        }
        meanwhile(self)?;
        if let Some(snapshotter) = &mut self.snapshotter {
            snapshotter.restart(network)?;
        }
        if let Some(containerd) = &mut self.containerd {
            containerd.restart(network)?;
        }
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        kill_shims(&self.containerd_socket);
        self.containerd = None;
        let root = self.snapshotter.take().map(|snapshotter| snapshotter.root().to_owned());
        self.rival = None;
        unmount_below(&self.folder)?;
        if let Some(root) = root {
            unmount_below(&root)?;
        }
        if std::env::var_os("DROVER_LAB_KEEP").is_none() {
            fs::remove_dir_all(&self.folder).with_context(|| format!("cannot remove {}", self.folder.display()))?;
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The sandbox takes the rest, if anything resists.
        if let Err(error) = self.clear() {
            eprintln!("cannot clear a node: {error:#}");
        }
    }
}

/// The drop-in of `contrib/containerd/` with this lab's paths.
fn our_drop_in(release: Release, snapshotter: &Snapshotter, setup: &NodeSetup<'_>) -> Result<String> {
    let name = if release.has_version_3() { "drover-v3.toml" } else { "drover-v2.toml" };
    let path = workspace().join("contrib/containerd").join(name);
    let mut text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    if setup.remaps_ids {
        // A key that it is shipped with as a comment.
        ensure!(text.contains(REMAP_IDS_OFF), "{} has no line {REMAP_IDS_OFF}", path.display());
        text = text.replace(REMAP_IDS_OFF, REMAP_IDS_OFF.trim_start_matches("# "));
    }
    if let Some(key) = setup.without {
        ensure!(text.contains(key), "{} has no key {key}", path.display());
        text = text.lines().filter(|line| !line.contains(key)).map(|line| format!("{line}\n")).collect();
    }
    let (socket, root) = (snapshotter.socket().display().to_string(), snapshotter.root().display().to_string());
    Ok(text.replace("/run/drover/drover.sock", &socket).replace("/var/lib/drover", &root))
}

/// Kills the shims of one containerd and the containers below them.
fn kill_shims(socket: &Path) {
    let socket = socket.display().to_string();
    let shims = || -> Vec<u32> {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let ours = processes.filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let mut arguments = line.split(|byte| *byte == 0);
            let shim = arguments.next()?.ends_with(b"containerd-shim-runc-v2");
            (shim && arguments.any(|argument| argument == socket.as_bytes())).then_some(pid)
        });
        ours.collect()
    };
    for shim in shims() {
        for container in process::children(shim) {
            let _ = kill(Pid::from_raw(container as i32), Signal::SIGKILL);
        }
        let _ = kill(Pid::from_raw(shim as i32), Signal::SIGKILL);
    }
    let _ = wait_for("the end of all shims", Duration::from_secs(10), || shims().is_empty());
}

/// Unmounts everything below `folder`, the latest mount first.
fn unmount_below(folder: &Path) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mount table")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    let mut below: Vec<_> = points.filter(|point| point.starts_with(folder)).collect();
    below.reverse();
    for point in below {
        umount2(&point, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {}", point.display()))?;
    }
    Ok(())
}

/// Octal escapes of the mount table.
fn unescape(text: &str) -> PathBuf {
    let plain = ["\\040", "\\011", "\\012", "\\134"].iter().zip([" ", "\t", "\n", "\\"]);
    plain.fold(text.to_owned(), |text, (escape, plain)| text.replace(escape, plain)).into()
}

/// Makes the next run start as after a boot: nothing of the disk is in memory. Only tried: not every machine allows it.
pub fn drop_caches() {
    let _ = process::run(&mut Command::new("sync"));
    let _ = fs::write("/proc/sys/vm/drop_caches", "3");
}
