//! Many nodes that start one image at the same moment, and what every machine's link carried for that.

use std::collections::BTreeMap;
use std::sync::Barrier;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::measure::{self, Start, Subject, Way, wait_until_complete};
use crate::network::{Link, Place, Traffic};
use crate::scene::{Node, Scene, drop_caches};

/// Where the image is when the nodes start it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Case {
    /// In the registry; the nodes have overlayfs.
    Overlayfs,
    /// In the registry; the seeder never saw it.
    Unknown,
    /// At the seeder.
    Known,
    /// At the seeder, and at one more node.
    OneHasIt,
}

impl Case {
    /// In the order in which they are shown.
    pub const ALL: [Self; 4] = [Self::Overlayfs, Self::Unknown, Self::Known, Self::OneHasIt];

    /// Name in tables.
    pub const fn label(self) -> &'static str {
        match self {
            Self::OneHasIt => "Drover, one more node has the image",
            _ => self.way().label(),
        }
    }

    const fn way(self) -> Way {
        match self {
            Self::Overlayfs => Way::Overlayfs,
            Self::Unknown => Way::DroverNew,
            Self::Known | Self::OneHasIt => Way::DroverKnown,
        }
    }
}

/// Nodes that have nothing yet, and where [`Case::OneHasIt`] one that has everything.
#[derive(Debug)]
pub struct Crowd {
    /// Those that are to start.
    pub nodes: Vec<Node>,
    /// The one that has it.
    pub first: Option<Node>,
    case: Case,
}

impl Crowd {
    /// Puts seeder and nodes in the state of `case`. `extra` is added to the snapshotters' configuration.
    pub fn gather(scene: &mut Scene, case: Case, count: usize, subject: &Subject, extra: &str) -> Result<Self> {
        match case {
            Case::Overlayfs => scene.stop_seeder(),
            Case::Unknown => scene.start_seeder(true)?,
            Case::Known | Case::OneHasIt => {
                scene.start_seeder(false)?;
                scene.ingest(&subject.reference)?;
            }
        }
        let mut first = None;
        if case == Case::OneHasIt {
            let node = scene.drover_node(extra)?;
            node.containerd().pull(&scene.network, case.way().snapshotter(), &subject.reference)?;
            wait_until_complete(&node)?;
            first = Some(node);
        }
        let mut nodes = Vec::new();
        for _ in 0..count {
            nodes.push(if case == Case::Overlayfs { scene.plain_node()? } else { scene.drover_node(extra)? });
        }
        drop_caches();
        Ok(Self { nodes, first, case })
    }

    /// Starts the subject on all nodes at once and waits until each has shown its first line and, with `to_the_end`, has the
    /// whole image.
    pub fn start(&self, scene: &Scene, subject: &Subject, to_the_end: bool) -> Result<Outcome> {
        self.outcome_of(scene, |node| measure::start(scene, node, self.case.way(), subject, to_the_end, &|_| {}))
    }

    /// Pulls the subject's image whole on all nodes at once.
    pub fn pull_whole(&self, scene: &Scene, subject: &Subject) -> Result<Outcome> {
        self.outcome_of(scene, |node| measure::pull_whole(scene, node, self.case.way(), subject))
    }

    fn outcome_of(&self, scene: &Scene, work: impl Fn(&Node) -> Result<Start> + Sync) -> Result<Outcome> {
        let before = self.flows(scene)?;
        let helpers_cpu = || -> Result<Duration> {
            let seeder = scene.seeder.as_ref().map_or(Duration::ZERO, |seeder| seeder.daemon().usage().cpu);
            let first = self.first.as_ref().map(|first| first.snapshotter().map(|has| has.daemon().usage().cpu));
            Ok(seeder + first.transpose()?.unwrap_or_default())
        };
        let cpu_before = helpers_cpu()?;
        let nodes: Vec<_> = self.nodes.iter().collect();
        let starts = on_each(&nodes, work).into_iter().zip(&nodes);
        let named = |node: &Node| format!("{}: {:?}", self.case.label(), node.place());
        let starts = starts.map(|(start, node)| start.with_context(|| named(node))).collect::<Result<_>>()?;
        let helpers_cpu = helpers_cpu()?.saturating_sub(cpu_before);
        let device = match self.case {
            Case::Overlayfs => 0,
            _ => self.nodes.first().map(Progress::of).transpose()?.unwrap_or_default().device,
        };
        Ok(Outcome { case: self.case, starts, flows: self.flows(scene)?.since(&before), helpers_cpu, device })
    }

    /// What `program` prints on each node, one after the other.
    pub fn output_of_each(&self, scene: &Scene, reference: &str, program: &[&str]) -> Result<Vec<String>> {
        let output = |node: &Node| {
            node.containerd().output_of(&scene.network, self.case.way().snapshotter(), reference, "again", program)
        };
        self.nodes.iter().map(output).collect()
    }

    /// What all links have carried so far.
    pub fn flows(&self, scene: &Scene) -> Result<Flows> {
        let traffic = |place: Place, link: Link| {
            let counter = scene.network.counter(place, link).context("the machine's own network has no counters")?;
            counter.traffic()
        };
        let nodes = self.nodes.iter().chain(&self.first);
        Ok(Flows {
            registry_to_nodes: traffic(Place::Registry, Link::Switch)?.sent,
            registry_to_seeder: traffic(Place::Registry, Link::Direct)?.sent,
            seeder: traffic(Place::Seeder, Link::Switch)?.sent,
            nodes: nodes.map(|node| traffic(node.place(), Link::Switch)).collect::<Result<_>>()?,
        })
    }
}

/// Does the same on `nodes` at once; the results are in the order of the nodes.
fn on_each<T: Send>(nodes: &[&Node], work: impl Fn(&Node) -> Result<T> + Sync) -> Vec<Result<T>> {
    let gate = Barrier::new(nodes.len());
    let one = |node: &Node| {
        gate.wait();
        work(node)
    };
    std::thread::scope(|scope| {
        let starts: Vec<_> = nodes.iter().map(|node| scope.spawn(|| one(node))).collect();
        let panicked = |_| Err(anyhow!("the thread of a node panicked"));
        starts.into_iter().map(|start| start.join().unwrap_or_else(panicked)).collect()
    })
}

/// What the start of a crowd took.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Where the image was.
    pub case: Case,
    /// Of each node, in the order of the crowd.
    pub starts: Vec<Start>,
    /// What the links carried.
    pub flows: Flows,
    /// Processor time that the seeder took meanwhile, and the node that has the image.
    pub helpers_cpu: Duration,
    /// Plain bytes of the image on a node; 0 with overlayfs.
    pub device: u64,
}

impl Outcome {
    /// Seconds until each node's first line.
    pub fn first_lines(&self) -> impl Iterator<Item = f64> {
        self.starts.iter().map(|start| start.first_line.as_secs_f64())
    }

    /// Seconds until each node had the whole image, where that was waited for.
    pub fn completes(&self) -> impl Iterator<Item = f64> {
        self.starts.iter().filter_map(|start| Some(start.complete?.as_secs_f64()))
    }

    /// Processor time of all snapshotters and the seeder together.
    pub fn cpu(&self) -> Duration {
        self.helpers_cpu + self.starts.iter().map(|start| start.node_usage.cpu).sum::<Duration>()
    }

    /// Most bytes of memory that a snapshotter had.
    pub fn peak_memory(&self) -> u64 {
        self.starts.iter().map(|start| start.node_usage.peak_memory).max().unwrap_or(0)
    }
}

/// Bytes that the machines of a crowd gave, counted at their links: whatever the daemons say, this is what went.
#[derive(Clone, Debug, Default)]
pub struct Flows {
    /// From the registry to nodes.
    pub registry_to_nodes: u64,
    /// From the registry to the seeder.
    pub registry_to_seeder: u64,
    /// From the seeder to nodes.
    pub seeder: u64,
    /// Of each node, in the order of the crowd; the one that has the image is the last.
    pub nodes: Vec<Traffic>,
}

impl Flows {
    /// What the links carried after `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let nodes = self.nodes.iter().zip(&before.nodes).map(|(now, before)| now.since(*before));
        Self {
            registry_to_nodes: self.registry_to_nodes.saturating_sub(before.registry_to_nodes),
            registry_to_seeder: self.registry_to_seeder.saturating_sub(before.registry_to_seeder),
            seeder: self.seeder.saturating_sub(before.seeder),
            nodes: nodes.collect(),
        }
    }

    /// What the registry gave, to whomever.
    pub const fn registry(&self) -> u64 {
        self.registry_to_nodes + self.registry_to_seeder
    }

    /// What came to nodes.
    pub fn into_nodes(&self) -> u64 {
        self.nodes.iter().map(|node| node.received).sum()
    }

    /// What came to nodes from nodes. A switch loses some of what a crowded link cannot take, so this is what came at least.
    pub fn between_nodes(&self) -> u64 {
        self.into_nodes().saturating_sub(self.seeder + self.registry_to_nodes)
    }

    /// The share of what came to nodes that came from nodes.
    pub fn share_between_nodes(&self) -> f64 {
        self.between_nodes() as f64 / self.into_nodes().max(1) as f64
    }
}

/// What a node's snapshotter says of itself while images come.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Bytes of all devices, and how many of them are here.
    pub device: u64,
    /// See [`Progress::device`].
    pub here: u64,
    /// Bytes that came, by kind of source.
    pub by_source: BTreeMap<String, u64>,
}

impl Progress {
    /// Asks the snapshotter of `node`.
    pub fn of(node: &Node) -> Result<Self> {
        let status = node.snapshotter()?.status()?;
        let mut progress = Self { here: status.bytes_here, ..Self::default() };
        for layer in status.images.iter().flat_map(|image| &image.layers) {
            progress.device += layer.device_size;
            for (source, bytes) in &layer.bytes_by_source {
                *progress.by_source.entry(source.clone()).or_default() += bytes;
            }
        }
        Ok(progress)
    }

    /// Bytes that came from sources of one kind.
    pub fn from(&self, source: &str) -> u64 {
        self.by_source.get(source).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_other_machine_gave_came_from_nodes() {
        let node = |received, sent| Traffic { received, sent };
        let before = Flows { seeder: 5, nodes: vec![node(5, 1), node(0, 0)], ..Flows::default() };
        let after = Flows {
            registry_to_nodes: 10,
            registry_to_seeder: 100,
            seeder: 95,
            nodes: vec![node(105, 101), node(100, 0)],
        };
        let flows = after.since(&before);
        assert_eq!((flows.registry(), flows.into_nodes(), flows.between_nodes()), (110, 200, 100));
        assert!((flows.share_between_nodes() - 0.5).abs() < 1e-9);
        assert_eq!(Flows::default().between_nodes(), 0);
    }
}
