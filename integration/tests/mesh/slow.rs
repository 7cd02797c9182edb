//! Seeders that stand still, or nearly: what others have comes from them meanwhile, and what nobody has from the registry.

use std::process::Child;

use anyhow::{Context, Result, ensure};
use lab::crowd::{Case, Crowd, Flows, Progress};
use lab::network::Place;
use lab::sandbox::run_test;
use layer::Digest;
use node::seeder::share;

use crate::faults::{SLOW, still_reading, wait_until_one_gives};
use crate::{NODES, Stage};

#[test]
fn a_frozen_seeder_is_not_missed_where_a_node_has_all() {
    run_test("slow::a_frozen_seeder_is_not_missed_where_a_node_has_all", |run| {
        let mut stage = Stage::set(run)?;
        let crowd = stage.gather(Case::OneHasIt, NODES - 1)?;
        let (mut readers, before) = begin(&stage, &crowd)?;
        freeze_seeder(&stage, true)?;
        still_reading(&mut readers)?;
        let stalled = stage.end_all(&crowd.nodes, readers)?;
        let registry = stage.copies(crowd.flows(&stage.scene)?.since(&before).registry());
        println!("a node waited at most {stalled:?}; the registry gave {registry:.3} copies");
        ensure!(registry < 1.0, "the registry gave {registry:.3} copies of what a node has");
        stop_seeder(&mut stage)
    });
}

/// No node has all when the seeder stands still, nor do those that come then know anybody.
#[test]
fn a_frozen_seeder_is_done_without() {
    run_test("slow::a_frozen_seeder_is_done_without", |run| {
        let mut stage = Stage::set(run)?;
        let mut crowd = stage.gather(Case::Known, NODES)?;
        let late = crowd.nodes.split_off(NODES - 1);
        let (mut readers, before) = begin(&stage, &crowd)?;
        freeze_seeder(&stage, true)?;
        still_reading(&mut readers)?;
        let stalled = stage.end_all(&crowd.nodes, readers)?;
        let registry = stage.copies(crowd.flows(&stage.scene)?.since(&before).registry());
        println!("a node waited at most {stalled:?}; the registry gave {registry:.3} copies");
        ensure!(registry < NODES as f64, "the registry gave {registry:.3} copies");

        // Without its index no layer can be lazy; the image comes all the same.
        stage.pull(&late)?;
        stage.end_all(&late, stage.read_all(&late)?)?;

        freeze_seeder(&stage, false)?;
        let next = [stage.scene.drover_node("")?];
        stage.pull(&next)?;
        stage.end_all(&next, stage.read_all(&next)?)?;
        let said = Progress::of(&next[0])?;
        ensure!(said.from("peers") + said.from("seeder") > 0, "nothing came from the mesh: {said:?}");
        Ok(())
    });
}

/// Two seeders have the image, and that stands still whose its large layer is.
#[test]
fn a_frozen_seeder_is_not_missed_where_another_has_all() {
    run_test("slow::a_frozen_seeder_is_not_missed_where_another_has_all", |run| {
        let mut stage = Stage::set(run)?;
        stage.scene.start_second_seeder()?;
        let crowd = stage.gather(Case::Known, NODES - 1)?;
        let (mut readers, before) = begin(&stage, &crowd)?;
        let large: Digest = stage.image.layers.last().context("no layers")?.digest.parse()?;
        let scene = &mut stage.scene;
        let seeders = [scene.seeder.as_mut(), scene.second_seeder.as_mut()].into_iter().flatten();
        let owner = seeders.max_by_key(|seeder| share(seeder.address(), large)).context("no seeder")?;
        owner.daemon().freeze(true);
        still_reading(&mut readers)?;
        let stalled = stage.end_all(&crowd.nodes, readers)?;
        let flows = crowd.flows(&stage.scene)?.since(&before);
        let (registry, seeders) = (stage.copies(flows.registry()), stage.copies(flows.seeder));
        println!("a node waited at most {stalled:?}; the registry gave {registry:.3} copies, the seeders {seeders:.3}");
        ensure!(registry < 1.0, "the registry gave {registry:.3} copies of what a seeder has");
        for seeder in [stage.scene.seeder.as_mut(), stage.scene.second_seeder.as_mut()].into_iter().flatten() {
            // Whoever is frozen does not end by itself.
            seeder.daemon_mut().kill();
        }
        Ok(())
    });
}

#[test]
fn a_seeder_that_sends_next_to_nothing_is_done_without() {
    run_test("slow::a_seeder_that_sends_next_to_nothing_is_done_without", |run| {
        let mut stage = Stage::set(run)?;
        let crowd = stage.gather(Case::Known, NODES - 1)?;
        let (mut readers, before) = begin(&stage, &crowd)?;
        stage.scene.network.throttle(Place::Seeder, 100)?;
        still_reading(&mut readers)?;
        let stalled = stage.end_all(&crowd.nodes, readers)?;
        let registry = stage.copies(crowd.flows(&stage.scene)?.since(&before).registry());
        println!("a node waited at most {stalled:?}; the registry gave {registry:.3} copies");
        ensure!(registry < NODES as f64, "the registry gave {registry:.3} copies");
        Ok(())
    });
}

/// A crowd reads what it pulled over slow links, and gives some of it. Gives its readers, and what the links carried until then.
fn begin(stage: &Stage, crowd: &Crowd) -> Result<(Vec<Child>, Flows)> {
    stage.scene.network.set_speed(SLOW)?;
    stage.pull(&crowd.nodes)?;
    let readers = stage.read_all(&crowd.nodes)?;
    wait_until_one_gives(stage, &crowd.nodes)?;
    Ok((readers, crowd.flows(&stage.scene)?))
}

fn freeze_seeder(stage: &Stage, frozen: bool) -> Result<()> {
    stage.scene.seeder.as_ref().context("no seeder")?.daemon().freeze(frozen);
    Ok(())
}

/// Whoever is frozen does not end by itself.
fn stop_seeder(stage: &mut Stage) -> Result<()> {
    stage.scene.seeder.as_mut().context("no seeder")?.daemon_mut().kill();
    Ok(())
}
