//! Machines of the cluster that say that they have all and give nothing right: others do without them.

use anyhow::{Context, Result, ensure};
use lab::crowd::{Case, Progress};
use lab::sandbox::run_test;
use layer::Geometry;

use crate::rogue::{Conduct, Rogue};
use crate::strangers::certificate;
use crate::{NODES, Stage};

/// log2 of the bytes of a chunk.
const CHUNK_LOG2: u8 = 17;

/// Number of the rogue's host.
const NUMBER: u16 = 900;

#[test]
fn a_peer_that_lies_is_cut_off() {
    run_test("rogues::a_peer_that_lies_is_cut_off", |run| {
        let mut stage = Stage::set(run)?;
        among(&mut stage, Conduct::Lies)
    });
}

#[test]
fn a_peer_that_sends_a_byte_a_second_stops_nobody() {
    run_test("rogues::a_peer_that_sends_a_byte_a_second_stops_nobody", |run| {
        let mut stage = Stage::set(run)?;
        among(&mut stage, Conduct::Trickles)
    });
}

#[test]
fn a_peer_that_never_answers_stops_nobody() {
    run_test("rogues::a_peer_that_never_answers_stops_nobody", |run| {
        let mut stage = Stage::set(run)?;
        among(&mut stage, Conduct::IsSilent)
    });
}

/// Nodes start an image of which the rogue says that it has it.
fn among(stage: &mut Stage, conduct: Conduct) -> Result<()> {
    let crowd = stage.gather(Case::OneHasIt, NODES - 2)?;
    let first = crowd.first.as_ref().context("nobody has it")?;
    let largest = stage.image.layers.iter().max_by_key(|layer| layer.size).context("no layers")?;
    let status = first.snapshotter()?.status()?;
    let mut known = status.images.iter().flat_map(|image| &image.layers);
    let known = known.find(|layer| layer.blob == largest.digest).context("the node does not name the layer")?;
    let folder = stage.scene.folder().join("certificates");
    let own = certificate(&stage.scene.tools, &folder, "rogue", "1h")?;
    let layer = (largest.digest.parse()?, Geometry::new(known.device_size, CHUNK_LOG2)?);
    let rogue = Rogue::join(&stage.scene.network, NUMBER, (&folder.join("ca.crt"), &own), layer, conduct)?;

    let before = crowd.flows(&stage.scene)?;
    stage.pull(&crowd.nodes)?;
    let stalled = stage.end_all(&crowd.nodes, stage.read_all(&crowd.nodes)?)?;
    let flows = crowd.flows(&stage.scene)?.since(&before);
    println!(
        "{conduct:?}: asked {} times; a node waited at most {stalled:?}; the registry gave {:.3} copies, the seeder {:.3}",
        rogue.asked(),
        stage.copies(flows.registry()),
        stage.copies(flows.seeder)
    );
    ensure!(rogue.asked() > 0, "nobody asked the rogue");
    for node in &crowd.nodes {
        let said = Progress::of(node)?;
        ensure!(said.from("registry") == 0, "{:?} went to the registry: {said:?}", node.place());
    }
    if conduct == Conduct::Lies {
        let logs = crowd.nodes.iter().map(|node| Ok(std::fs::read_to_string(node.snapshotter()?.daemon().log())?));
        let logs: Vec<String> = logs.collect::<Result<_>>()?;
        let address = rogue.address();
        let names = |line: &str| line.contains(&address) && line.contains("deals with it no more");
        ensure!(logs.iter().any(|log| log.lines().any(names)), "no log names {address} as one who lies");
    }
    Ok(())
}
