//! Machines of the mesh that fail while others fetch from them: no read fails, and every byte is right.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::crowd::{Case, Progress};
use lab::network::Link;
use lab::process::wait_for;
use lab::sandbox::run_test;
use lab::scene::Node;

use crate::{NODES, Stage};

/// Speed of all links, in Mbit/s, at which something can fail while the image comes.
pub(crate) const SLOW: u32 = 40;

/// When something has come, but by far not all.
pub(crate) const SOME: u64 = 2 << 20;

/// How long the first bytes may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How a neighbour fails.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Its snapshotter is killed, and all connections break.
    Killed,
    /// Its snapshotter stands still; the kernel still takes what is sent to it.
    Frozen,
    /// Nothing goes from or to the machine any more, and nobody is told.
    CutOff,
}

#[test]
fn a_killed_neighbour_stops_nobody() {
    run_test("faults::a_killed_neighbour_stops_nobody", |run| neighbour_fails(&mut Stage::set(run)?, Fault::Killed));
}

#[test]
fn a_frozen_neighbour_stops_nobody() {
    run_test("faults::a_frozen_neighbour_stops_nobody", |run| neighbour_fails(&mut Stage::set(run)?, Fault::Frozen));
}

#[test]
fn a_neighbour_behind_a_dead_link_stops_nobody() {
    run_test("faults::a_neighbour_behind_a_dead_link_stops_nobody", |run| {
        neighbour_fails(&mut Stage::set(run)?, Fault::CutOff)
    });
}

fn neighbour_fails(stage: &mut Stage, fault: Fault) -> Result<()> {
    stage.scene.network.set_speed(SLOW)?;
    let mut crowd = stage.gather(Case::Known, NODES)?;
    stage.pull(&crowd.nodes)?;
    let mut victim = crowd.nodes.pop().context("no nodes")?;
    let mut readers = stage.read_all(&crowd.nodes)?;
    wait_until_one_gives(stage, std::slice::from_ref(&victim))?;
    match fault {
        Fault::Killed => victim.snapshotter_mut()?.daemon_mut().kill(),
        Fault::Frozen => victim.snapshotter()?.daemon().freeze(true),
        Fault::CutOff => stage.scene.network.isolate(victim.place(), true)?,
    }
    still_reading(&mut readers)?;
    for (node, reader) in crowd.nodes.iter().zip(readers) {
        stage.end(node, reader)?;
    }
    if let Fault::Frozen = fault {
        victim.snapshotter_mut()?.daemon_mut().kill();
    }
    Ok(())
}

/// The seeder is killed while the nodes fetch and comes back: they are introduced again, and the registry gives nothing.
#[test]
fn a_seeder_that_comes_back_goes_on() {
    run_test("faults::a_seeder_that_comes_back_goes_on", |run| {
        let mut stage = Stage::set(run)?;
        stage.scene.network.set_speed(SLOW)?;
        let crowd = stage.gather(Case::Known, NODES)?;
        stage.pull(&crowd.nodes)?;
        let mut readers = stage.read_all(&crowd.nodes)?;
        wait_until_one_gives(&stage, &crowd.nodes)?;
        stage.scene.seeder.as_mut().context("no seeder")?.daemon_mut().kill();
        stage.scene.start_seeder(false)?;
        still_reading(&mut readers)?;
        for (node, reader) in crowd.nodes.iter().zip(readers) {
            stage.end(node, reader)?;
        }
        // One that comes later is introduced to those that are there.
        let late = stage.scene.drover_node("")?;
        stage.pull(std::slice::from_ref(&late))?;
        stage.end(&late, stage.read(&late)?)?;
        let said = Progress::of(&late)?;
        ensure!(said.from("peers") > 0, "the node that came later knows no neighbour: {said:?}");
        Ok(())
    });
}

/// With no seeder left the nodes give each other what they have, and what nobody has comes from the registry about once.
#[test]
fn a_dead_seeder_stops_nobody() {
    run_test("faults::a_dead_seeder_stops_nobody", |run| {
        let mut stage = Stage::set(run)?;
        stage.scene.network.set_speed(SLOW)?;
        let crowd = stage.gather(Case::Known, NODES)?;
        stage.pull(&crowd.nodes)?;
        let mut readers = stage.read_all(&crowd.nodes)?;
        wait_until_one_gives(&stage, &crowd.nodes)?;
        let before = crowd.flows(&stage.scene)?;
        stage.scene.seeder.as_mut().context("no seeder")?.daemon_mut().kill();
        still_reading(&mut readers)?;
        for (node, reader) in crowd.nodes.iter().zip(readers) {
            stage.end(node, reader)?;
        }
        let registry = stage.copies(crowd.flows(&stage.scene)?.since(&before).registry());
        println!("the registry gave {registry:.3} copies");
        ensure!(registry < NODES as f64 / 2.0, "the registry gave {registry:.3} copies");
        Ok(())
    });
}

/// What a node keeps turns to nonsense on its disk: nobody who asks it takes a wrong byte.
#[test]
fn a_node_whose_disk_rots_harms_nobody() {
    run_test("faults::a_node_whose_disk_rots_harms_nobody", |run| {
        let mut stage = Stage::set(run)?;
        let crowd = stage.gather(Case::OneHasIt, 2)?;
        let rotten = crowd.first.as_ref().context("nobody has it")?;
        let layers = rotten.snapshotter()?.root().join("layers");
        let files = [files_named(&layers, "device")?, files_named(&layers, "wire")?].concat();
        ensure!(!files.is_empty(), "there is nothing below {}", layers.display());
        for path in &files {
            rot(path).with_context(|| format!("cannot damage {}", path.display()))?;
        }
        stage.pull(&crowd.nodes)?;
        let readers = stage.read_all(&crowd.nodes)?;
        for (node, reader) in crowd.nodes.iter().zip(readers) {
            stage.end(node, reader)?;
        }
        Ok(())
    });
}

/// Waits until one of `nodes` has given something to others.
pub(crate) fn wait_until_one_gives(stage: &Stage, nodes: &[Node]) -> Result<()> {
    let mut last = Vec::new();
    let gives = wait_for("a node gives to others", PATIENCE, || {
        let counters = nodes.iter().filter_map(|node| stage.scene.network.counter(node.place(), Link::Switch));
        last = counters.map(|counter| counter.traffic().map_or(0, |traffic| traffic.sent)).collect();
        last.iter().any(|sent| *sent > SOME)
    });
    gives.with_context(|| format!("they sent {last:?} bytes"))
}

/// A fault that comes too late shows nothing.
pub(crate) fn still_reading(readers: &mut [std::process::Child]) -> Result<()> {
    for reader in readers {
        ensure!(reader.try_wait()?.is_none(), "a container had read everything before anything failed");
    }
    Ok(())
}

fn files_named(folder: &Path, name: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_named(&path, name)?);
        } else if entry.file_name() == name {
            found.push(path);
        }
    }
    Ok(found)
}

/// Changes one byte of every 4 KiB.
fn rot(path: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    for offset in (0..file.metadata()?.len()).step_by(4096) {
        file.read_exact_at(&mut byte, offset)?;
        file.write_all_at(&[!byte[0]], offset)?;
    }
    Ok(())
}
