//! The programs with which people pull and run images, each behind the same few operations.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::containerd::with_path;
use crate::image::{Image, small};
use crate::process::{run, run_for_bytes, wait_for};
use crate::scene::{Node, Scene};
use crate::tools::{self, Release};

/// What a container of these clients runs: nothing, until it is removed.
const SLEEP: [&str; 2] = ["/bin/sleep", "2147483647"];

/// A way to pull an image and to run containers from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// `ctr image pull` as it is.
    Ctr,
    /// `ctr image pull --local`: the client fetches and unpacks.
    CtrLocal,
    /// `nerdctl run`, which pulls.
    Nerdctl,
    /// Kubernetes' interface, by `crictl`.
    Cri,
    /// `drover-snapshotter pull`, and then `ctr`.
    Drover,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Ctr, Self::CtrLocal, Self::Nerdctl, Self::Cri, Self::Drover];

    /// What people type, or the interface's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ctr => "ctr image pull",
            Self::CtrLocal => "ctr image pull --local",
            Self::Nerdctl => "nerdctl run",
            Self::Cri => "CRI",
            Self::Drover => "drover-snapshotter pull",
        }
    }

    /// Whether this client of `release` has it.
    pub fn exists(self, release: Release) -> bool {
        // 1.6 has no other way than the local one, and no word for it.
        self != Self::CtrLocal || release > Release::V1_6
    }

    /// containerd's namespace of its images and containers.
    pub const fn namespace(self) -> &'static str {
        match self {
            Self::Ctr | Self::CtrLocal | Self::Nerdctl | Self::Drover => "default",
            Self::Cri => "k8s.io",
        }
    }
}

/// One client at one node.
#[derive(Debug)]
pub struct Client<'a> {
    way: Way,
    namespace: String,
    scene: &'a Scene,
    node: &'a Node,
    program: PathBuf,
    folder: PathBuf,
}

/// A container that sleeps. It is there until it is removed.
#[derive(Debug)]
pub struct Container {
    /// What the client calls it.
    pub id: String,
    /// The pod that it is in, of CRI's containers.
    pod: Option<String>,
}

/// What a pod is to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pod<'a> {
    /// A network of its own from the CNI plugins, instead of the node's.
    pub own_network: bool,
    /// An image that is mounted at a path in its container.
    pub image_volume: Option<(&'a str, &'a str)>,
    /// A user namespace of its own: which id of the machine is its 0, and how many follow. For users as for groups.
    pub ids: Option<(u32, u32)>,
}

impl<'a> Client<'a> {
    /// A client in the namespace that is usual for it. Programs that are missing are built now.
    pub fn new(way: Way, scene: &'a Scene, node: &'a Node) -> Result<Self> {
        Self::in_namespace(way, way.namespace(), scene, node)
    }

    /// A client in `namespace`; CRI has but one.
    pub fn in_namespace(way: Way, namespace: &str, scene: &'a Scene, node: &'a Node) -> Result<Self> {
        let program = match way {
            Way::Ctr | Way::CtrLocal | Way::Drover => scene.tools.containerd.join("ctr"),
            Way::Nerdctl => tools::nerdctl(&|_| {})?,
            Way::Cri => tools::crictl(&|_| {})?,
        };
        let folder = node.folder().join(format!("{way:?}-{namespace}"));
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { way, namespace: namespace.to_owned(), scene, node, program, folder })
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Control group of the container `name`.
    pub fn control_group(&self, name: &str) -> String {
        format!("{}/{name}", self.node.containerd().control_group())
    }

    /// `ctr` in this client's namespace, whatever the client is.
    pub fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = self.node.containerd().ctr(&self.scene.network, &["--namespace", &self.namespace]);
        command.args(arguments);
        command
    }

    /// The client's own program with what every call needs, and `arguments`.
    fn program(&self, arguments: &[&str]) -> Command {
        let containerd = self.node.containerd();
        let mut command = self.scene.network.command(containerd.place(), &self.program);
        match self.way {
            Way::Ctr | Way::CtrLocal | Way::Drover => return self.ctr(arguments),
            Way::Nerdctl => {
                command.arg("--address").arg(containerd.socket()).args(["--namespace", &self.namespace]);
                command.args(["--snapshotter", "drover", "--cgroup-manager", "cgroupfs"]);
                command.arg("--hosts-dir").arg(containerd.hosts());
                for (option, folder) in [("--data-root", "data"), ("--cni-path", "cni"), ("--cni-netconfpath", "net")] {
                    command.arg(option).arg(self.folder.join(folder));
                }
            }
            Way::Cri => {
                let socket = format!("unix://{}", containerd.socket().display());
                command.args(["--runtime-endpoint", &socket, "--image-endpoint", &socket, "--timeout", "120s"]);
            }
        }
        command.args(arguments);
        with_path(&mut command, &self.scene.tools);
        command
    }

    /// The command that pulls; not started yet.
    pub fn pulling(&self, reference: &str) -> Result<Command> {
        let hosts = self.node.containerd().hosts().display().to_string();
        let ctr = ["image", "pull", "--snapshotter", "drover", "--hosts-dir", &hosts];
        let mut command = match self.way {
            Way::Ctr => self.ctr(&ctr),
            Way::CtrLocal => self.ctr(&[&ctr[..], &["--local"]].concat()),
            // Not `nerdctl pull`: what people type is to be seen.
            Way::Nerdctl => self.program(&["run", "--rm", "--net", "host", "--entrypoint", "/bin/true"]),
            Way::Cri => self.program(&["pull"]),
            Way::Drover => {
                let mut command = self.node.snapshotter()?.pulling(&self.scene.network);
                command.args(["--namespace", &self.namespace]);
                command
            }
        };
        command.arg(reference);
        Ok(command)
    }

    /// Pulls an image, with what this client needs to have it (nerdctl: runs it once).
    pub fn pull(&self, reference: &str) -> Result<()> {
        run(&mut self.pulling(reference)?).with_context(|| format!("{}: cannot pull {reference}", self.way.name()))?;
        Ok(())
    }

    /// Starts a container from an image; it sleeps.
    pub fn start(&self, reference: &str, name: &str) -> Result<Container> {
        self.start_in(reference, name, Pod::default())
    }

    /// Starts a container in a pod of choice, which only CRI has.
    pub fn start_in(&self, reference: &str, name: &str, pod: Pod<'_>) -> Result<Container> {
        let group = self.control_group(name);
        let id = match self.way {
            Way::Ctr | Way::CtrLocal | Way::Drover => {
                let options = ["run", "--detach", "--net-host", "--cgroup", &group, "--snapshotter", "drover"];
                run(self.ctr(&options).args([reference, name]).args(SLEEP))?;
                name.to_owned()
            }
            Way::Nerdctl => {
                let parent = self.node.containerd().control_group();
                let options = ["run", "--detach", "--net", "host", "--cgroup-parent", parent, "--name", name];
                run(self.program(&options).arg(reference).args(SLEEP))?;
                name.to_owned()
            }
            Way::Cri => return self.start_pod(reference, name, pod),
        };
        Ok(Container { id, pod: None })
    }

    fn start_pod(&self, reference: &str, name: &str, pod: Pod<'_>) -> Result<Container> {
        // The kubelet's NamespaceMode: POD is 0, CONTAINER 1, NODE 2.
        let network = if pod.own_network { 0 } else { 2 };
        // A container says the same as its pod.
        let mut namespaces = json!({ "network": network, "pid": 1 });
        if let Some((host, length)) = pod.ids {
            let map = json!([{ "host_id": host, "container_id": 0, "length": length }]);
            namespaces["userns_options"] = json!({ "mode": 0, "uids": map, "gids": map });
        }
        let sandbox = json!({
            "metadata": { "name": name, "uid": name, "namespace": "test", "attempt": 0 },
            "log_directory": self.folder,
            "linux": {
                "cgroup_parent": self.node.containerd().control_group(),
                "security_context": { "namespace_options": namespaces },
            },
        });
        let mut container = json!({
            "metadata": { "name": name, "attempt": 0 },
            "image": { "image": reference },
            "command": SLEEP,
            "log_path": format!("{name}.log"),
            "linux": { "security_context": { "namespace_options": namespaces } },
        });
        if let Some((image, target)) = pod.image_volume {
            container["mounts"] = json!([{ "container_path": target, "image": { "image": image }, "readonly": true }]);
        }
        let sandbox = self.write(&format!("{name}-pod.json"), &sandbox)?;
        let container = self.write(&format!("{name}.json"), &container)?;
        let pod = run(&mut self.program(&["runp", &sandbox]))?.trim().to_owned();
        let id = run(&mut self.program(&["create", &pod, &container, &sandbox]))?.trim().to_owned();
        run(&mut self.program(&["start", &id]))?;
        Ok(Container { id, pod: Some(pod) })
    }

    fn write(&self, name: &str, value: &Value) -> Result<String> {
        let path = self.folder.join(name);
        fs::write(&path, value.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path.display().to_string())
    }

    /// Runs a program in a container and gives what it printed.
    pub fn exec(&self, container: &Container, arguments: &[&str]) -> Result<String> {
        let id = container.id.as_str();
        let mut command = match self.way {
            Way::Ctr | Way::CtrLocal | Way::Drover => self.ctr(&["task", "exec", "--exec-id", "exec", id]),
            Way::Nerdctl => self.program(&["exec", id]),
            Way::Cri => self.program(&["exec", "--sync", id]),
        };
        let printed = run(command.args(arguments))?;
        // crictl ends what it shows of standard output, and then of standard error, with a line end of its own.
        let own = if self.way == Way::Cri { "\n\n" } else { "" };
        Ok(printed.strip_suffix(own).unwrap_or(&printed).to_owned())
    }

    /// Makes an image of a container as it is, and gives its reference; `image` is what the container was started from. Only
    /// nerdctl has a word for that. For the others containerd makes a layer of the container's snapshot, and the image with
    /// that layer is pushed and pulled.
    pub fn commit(&self, container: &Container, image: &Image) -> Result<String> {
        if self.way == Way::Nerdctl {
            let reference = "committed.test/image:1";
            run(&mut self.program(&["commit", &container.id, reference]))?;
            return Ok(reference.to_owned());
        }
        let gzip = "application/vnd.oci.image.layer.v1.tar+gzip";
        let mut difference = self.ctr(&["snapshot", "--snapshotter", "drover", "diff", "--media-type", gzip]);
        let layer = run_for_bytes(difference.arg(&container.id)).context("cannot make a layer of a container")?;
        let committed = image.with_layer(&self.folder.join("committed"), &layer, small::PATH)?;
        let registry = self.scene.registry.as_ref().context("nowhere to push a committed image to")?;
        let repository = format!("test/committed-{}", format!("{:?}", self.way).to_lowercase());
        let reference = registry.push(&self.scene.network, &committed, &repository, "1")?;
        self.pull(&reference)?;
        Ok(reference)
    }

    /// Ends and removes a container.
    pub fn remove(&self, container: Container) -> Result<()> {
        let Container { id, pod } = container;
        match self.way {
            Way::Ctr | Way::CtrLocal | Way::Drover => {
                run(&mut self.ctr(&["task", "rm", "--force", &id]))?;
                run(&mut self.ctr(&["container", "rm", &id]))?;
            }
            Way::Nerdctl => {
                run(&mut self.program(&["rm", "--force", &id]))?;
            }
            Way::Cri => {
                let pod = pod.context("a container of CRI is in a pod")?;
                run(&mut self.program(&["stopp", &pod]))?;
                run(&mut self.program(&["rmp", &pod]))?;
            }
        }
        Ok(())
    }

    /// Removes an image; what no other image needs is gone afterwards, or soon.
    pub fn remove_image(&self, reference: &str) -> Result<()> {
        match self.way {
            Way::Ctr | Way::CtrLocal | Way::Drover => run(&mut self.ctr(&["image", "rm", "--sync", reference]))?,
            Way::Nerdctl => run(&mut self.program(&["rmi", "--force", reference]))?,
            Way::Cri => run(&mut self.program(&["rmi", reference]))?,
        };
        Ok(())
    }

    /// Mounts the file tree of an image, which is `reference` here, at `target`, calls `look` and unmounts it.
    pub fn with_tree<T>(
        &self,
        reference: &str,
        image: &Image,
        target: &Path,
        look: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<T> {
        fs::create_dir_all(target)?;
        let snapshot = |arguments: &[&str]| self.ctr(&[&["snapshot", "--snapshotter", "drover"], arguments].concat());
        // `ctr image mount` of 1.6 mounts what overlayfs has, whatever it is told.
        let by_hand = self.scene.tools.release == Release::V1_6;
        if by_hand {
            let prepare = ["prepare", "--target", &target.display().to_string(), "tree", &image.chain_id()?];
            let mount = run(&mut snapshot(&prepare))?;
            run(Command::new("sh").args(["-c", &mount]))?;
        } else {
            let mount = ["image", "mount", "--snapshotter", "drover", reference];
            run(self.ctr(&mount).arg(target)).with_context(|| format!("cannot mount {reference}"))?;
        }
        let seen = look(target);
        let unmounted = if by_hand {
            run(Command::new("umount").arg(target)).and_then(|_| run(&mut snapshot(&["rm", "tree"])))
        } else {
            run(self.ctr(&["image", "unmount", "--rm", "--snapshotter", "drover"]).arg(target))
        };
        let seen = seen?;
        unmounted.with_context(|| format!("cannot unmount {reference}"))?;
        Ok(seen)
    }
}

/// Waits until the snapshotter of `node` keeps nothing of any image, and has given back the disk but for `allowed` bytes.
pub fn wait_until_empty(node: &Node, allowed: u64) -> Result<()> {
    let snapshotter = node.snapshotter()?;
    let mut last = String::new();
    let waited = wait_for("the disk is given back", Duration::from_secs(60), || {
        let status = snapshotter.status();
        let used = snapshotter.disk_use().unwrap_or(u64::MAX);
        let empty = status.as_ref().is_ok_and(|status| status.images.is_empty() && status.bytes_here == 0);
        last = format!("{used} bytes in use, {allowed} allowed; {status:?}");
        empty && used <= allowed
    });
    if waited.is_err() {
        bail!("the disk is not given back: {last}");
    }
    Ok(())
}
