//! Nodes that give each other chunks: the real programs, each machine with a link of its own whose bytes are counted. Needs root;
//! every test runs in a sandbox of its own (see `lab::sandbox`).

mod faults;
mod flood;
mod grants;
mod rogue;
mod rogues;
mod slow;
mod splits;
mod strangers;

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::crowd::{Case, Crowd, Outcome, Progress};
use lab::drover::ordinary_layers;
use lab::image::{Image, noise};
use lab::measure::{Subject, Way};
use lab::sandbox::{Run, run_test};
use lab::scene::{Node, Scene};
use lab::tools::Tools;

/// Nodes that start at once.
const NODES: usize = 4;

/// Bytes of the image's large file.
const SIZE: usize = 24 << 20;

/// The port of nodes.
pub(crate) const PORT: u16 = 7071;

/// What one copy is counted as at most: headers, TLS, manifests and indexes come on top of a layer.
const ONE: f64 = 1.02;

/// A registry with an image that each node is to read whole.
pub(crate) struct Stage {
    pub(crate) scene: Scene,
    pub(crate) image: Image,
    pub(crate) subject: Subject,
    expected: String,
}

impl Stage {
    pub(crate) fn set(run: &Run) -> Result<Self> {
        let tools = Tools::prepare(&|_| {})?;
        let image = noise::build(&run.folder().join("images"), &tools.busybox, SIZE)?;
        let scene = Scene::private(run, tools, &run.folder().join("registry"))?;
        let registry = scene.registry.as_ref().context("a private scene has a registry")?;
        let reference = registry.push(&scene.network, &image, "test/noise", "1")?;
        let subject = Subject { reference, program: noise::PROGRAM.map(str::to_owned).to_vec() };
        Ok(Self { scene, image, subject, expected: noise::line(SIZE) })
    }

    pub(crate) fn gather(&mut self, case: Case, nodes: usize) -> Result<Crowd> {
        Crowd::gather(&mut self.scene, case, nodes, &self.subject, "")
    }

    pub(crate) fn copies(&self, bytes: u64) -> f64 {
        bytes as f64 / self.image.compressed_size() as f64
    }

    /// All layers are lazy and every container read what the image holds.
    fn check(&self, crowd: &Crowd, outcome: &Outcome) -> Result<()> {
        for (node, start) in crowd.nodes.iter().zip(&outcome.starts) {
            self.check_line(&start.line)?;
            let status = node.snapshotter()?.status()?;
            ensure!(ordinary_layers(&status).is_empty(), "not lazy:\n{}", node.snapshotter()?.status_text()?);
        }
        let said: Vec<_> = crowd.nodes.iter().map(|node| Progress::of(node).map(|said| said.by_source)).collect();
        println!(
            "{}: registry {:.3} copies, seeder {:.3}, {:.0} % from nodes; {said:?}",
            outcome.case.label(),
            self.copies(outcome.flows.registry()),
            self.copies(outcome.flows.seeder),
            outcome.flows.share_between_nodes() * 100.0
        );
        Ok(())
    }

    pub(crate) fn check_line(&self, line: &str) -> Result<()> {
        ensure!(line.trim_end() == self.expected, "the container printed {line:?} instead of {:?}", self.expected);
        Ok(())
    }

    /// Pulls the image on all nodes at once.
    pub(crate) fn pull(&self, nodes: &[Node]) -> Result<()> {
        let pull = |node: &Node| node.containerd().pull(&self.scene.network, "drover", &self.subject.reference);
        std::thread::scope(|scope| {
            let pulls: Vec<_> = nodes.iter().map(|node| scope.spawn(|| pull(node))).collect();
            pulls.into_iter().try_for_each(|pull| pull.join().expect("a thread that pulls does not panic"))
        })
    }

    /// Starts a container that reads everything.
    pub(crate) fn read(&self, node: &Node) -> Result<Child> {
        let program: Vec<&str> = self.subject.program.iter().map(String::as_str).collect();
        let way = Way::DroverKnown.snapshotter();
        let containerd = node.containerd();
        let mut command = containerd.container(&self.scene.network, way, &self.subject.reference, "reader", &program);
        command.spawn().context("cannot start ctr")
    }

    /// Starts such a container on each node.
    pub(crate) fn read_all(&self, nodes: &[Node]) -> Result<Vec<Child>> {
        nodes.iter().map(|node| self.read(node)).collect()
    }

    /// Waits for all of them as [`Stage::end`] does. Gives how long at most nothing came to a node that had not all: what a reader
    /// may have stalled.
    pub(crate) fn end_all(&self, nodes: &[Node], mut readers: Vec<Child>) -> Result<Duration> {
        let mut longest = Duration::ZERO;
        let mut seen = vec![(0, Instant::now()); nodes.len()];
        loop {
            let mut is_over = true;
            for ((node, reader), (here, since)) in nodes.iter().zip(&mut readers).zip(&mut seen) {
                if reader.try_wait().context("cannot wait for ctr")?.is_some() {
                    continue;
                }
                is_over = false;
                let progress = Progress::of(node)?;
                if progress.here != *here {
                    (*here, *since) = (progress.here, Instant::now());
                } else if progress.here < progress.device {
                    longest = longest.max(since.elapsed());
                }
            }
            if is_over {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        for (node, reader) in nodes.iter().zip(readers) {
            self.end(node, reader)?;
        }
        Ok(longest)
    }

    /// Waits for such a container and looks at what it printed.
    pub(crate) fn end(&self, node: &Node, reader: Child) -> Result<()> {
        let output = reader.wait_with_output().context("cannot wait for ctr")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        let tell = || {
            let status = node.snapshotter().and_then(|snapshotter| snapshotter.status_text()).unwrap_or_default();
            let log = node.snapshotter().map(|snapshotter| snapshotter.daemon().log_tail()).unwrap_or_default();
            format!("{:?}: {errors}\n{status}\n{log}", node.place())
        };
        ensure!(output.status.success(), "the container failed: {}", tell());
        self.check_line(&String::from_utf8_lossy(&output.stdout)).with_context(tell)
    }
}

/// What the seeder has goes from it about once, and from there from node to node.
#[test]
fn a_known_image_leaves_the_seeder_about_once() {
    run_test("a_known_image_leaves_the_seeder_about_once", |run| {
        let mut stage = Stage::set(run)?;
        let crowd = stage.gather(Case::Known, NODES)?;
        let outcome = crowd.start(&stage.scene, &stage.subject, true)?;
        stage.check(&crowd, &outcome)?;
        let (flows, copies) = (&outcome.flows, |bytes| stage.copies(bytes));
        ensure!(copies(flows.registry()) < 0.02, "the registry gave {:.3} copies", copies(flows.registry()));
        ensure!(copies(flows.seeder) < NODES as f64 / 2.0, "the seeder gave {:.3} copies", copies(flows.seeder));
        let share = flows.share_between_nodes();
        ensure!(share > 0.5, "only {:.0} % came from nodes", share * 100.0);
        let said = crowd.nodes.iter().map(Progress::of).collect::<Result<Vec<_>>>()?;
        ensure!(said.iter().all(|said| said.from("registry") == 0), "{said:?}");
        // Who reads ahead of all others finds nothing at them.
        let took = said.iter().filter(|said| said.from("peers") > 0).count();
        ensure!(took >= NODES - 1, "only {took} nodes took something from others: {said:?}");
        Ok(())
    });
}

/// Nobody has an index of the image: it is read from the registry once for all, and passes from node to node meanwhile.
#[test]
fn an_unknown_image_leaves_the_registry_once() {
    run_test("an_unknown_image_leaves_the_registry_once", |run| {
        let mut stage = Stage::set(run)?;
        let crowd = stage.gather(Case::Unknown, NODES)?;
        let outcome = crowd.start(&stage.scene, &stage.subject, true)?;
        stage.check(&crowd, &outcome)?;
        let (flows, copies) = (&outcome.flows, |bytes| stage.copies(bytes));
        ensure!(copies(flows.registry()) < ONE, "the registry gave {:.3} copies", copies(flows.registry()));
        ensure!(copies(flows.seeder) < 1.5, "the seeder gave {:.3} copies", copies(flows.seeder));
        for node in &crowd.nodes {
            let said = Progress::of(node)?;
            let came = said.from("seeder") + said.from("peers");
            ensure!(stage.copies(came) > 0.9, "{:?} does not say where its bytes came from: {said:?}", node.place());
        }
        Ok(())
    });
}

/// A node that has an image gives it to those that come later.
#[test]
fn a_node_gives_what_it_has_to_later_ones() {
    run_test("a_node_gives_what_it_has_to_later_ones", |run| {
        let mut stage = Stage::set(run)?;
        let crowd = stage.gather(Case::OneHasIt, 2)?;
        let outcome = crowd.start(&stage.scene, &stage.subject, true)?;
        stage.check(&crowd, &outcome)?;
        let share = outcome.flows.share_between_nodes();
        ensure!(share > 0.5, "only {:.0} % came from nodes", share * 100.0);
        Ok(())
    });
}
