//! Machines that part and come together again while others fetch.

use anyhow::{Context, ensure};
use lab::crowd::{Case, Progress};
use lab::network::Link;
use lab::process::wait_for;
use lab::sandbox::run_test;

use crate::faults::{PATIENCE, SLOW, SOME, still_reading, wait_until_one_gives};
use crate::{NODES, Stage};

/// Speed of all links in Mbit/s at which nothing is over before the test says so. At 4 Mbit/s the queues of a few connections lose so
/// much that whole seconds pass without a sign of life from machines that are well, and what came from whom says nothing.
const CRAWL: u32 = 12;

/// Two nodes are cut off from seeder, registry and the other nodes, and have only what both have. The others go on, and the two do
/// when they are together with the others again.
#[test]
fn a_network_that_was_in_two_parts_is_one_again() {
    run_test("splits::a_network_that_was_in_two_parts_is_one_again", |run| {
        let mut stage = Stage::set(run)?;
        let mut crowd = stage.gather(Case::Known, NODES)?;
        stage.scene.network.set_speed(SLOW)?;
        stage.pull(&crowd.nodes)?;
        let apart = crowd.nodes.split_off(NODES - 2);
        let places: Vec<_> = apart.iter().map(lab::scene::Node::place).collect();
        let (mut readers, mut cut_off) = (stage.read_all(&crowd.nodes)?, stage.read_all(&apart)?);
        wait_until_one_gives(&stage, &crowd.nodes)?;
        stage.scene.network.split(&places, true)?;
        still_reading(&mut readers)?;
        still_reading(&mut cut_off)?;
        let here = stage.end_all(&crowd.nodes, readers)?;
        still_reading(&mut cut_off)?;
        stage.scene.network.split(&places, false)?;
        let there = stage.end_all(&apart, cut_off)?;
        println!("a node waited at most {here:?} on one side, and {there:?} after the network was one again");
        Ok(())
    });
}

/// A node that has everything comes back while the others fetch: they take from it what it has.
#[test]
fn a_node_that_has_all_joins_those_that_fetch() {
    run_test("splits::a_node_that_has_all_joins_those_that_fetch", |run| {
        let mut stage = Stage::set(run)?;
        let mut crowd = stage.gather(Case::OneHasIt, 2)?;
        let mut first = crowd.first.take().context("nobody has it")?;
        first.snapshotter_mut()?.daemon_mut().kill();
        stage.scene.network.set_speed(CRAWL)?;
        stage.pull(&crowd.nodes)?;
        let mut readers = stage.read_all(&crowd.nodes)?;
        let has_some = || Progress::of(&crowd.nodes[0]).is_ok_and(|said| said.here > SOME);
        wait_for("something comes", PATIENCE, has_some)?;
        let counter = stage.scene.network.counter(first.place(), Link::Switch).context("no counters")?;
        let before = counter.traffic()?;
        first.snapshotter_mut()?.restart(&stage.scene.network)?;
        let gave = || counter.traffic().is_ok_and(|traffic| traffic.since(before).sent > SOME);
        wait_for("the node that came back gives to the others", PATIENCE, gave)?;
        still_reading(&mut readers)?;
        stage.scene.network.set_speed(SLOW)?;
        stage.end_all(&crowd.nodes, readers)?;
        for node in &crowd.nodes {
            let said = Progress::of(node)?;
            ensure!(said.from("peers") > 0, "{:?}: {said:?}", node.place());
        }
        Ok(())
    });
}
