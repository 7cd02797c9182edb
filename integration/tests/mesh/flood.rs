//! A machine that opens more and more connections takes its share of a daemon's, and leaves the others theirs.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::crowd::Case;
use lab::network::Place;
use lab::process::{Footprint, footprints};
use lab::sandbox::run_test;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{PORT, Stage};

/// Connections that it opens.
const CONNECTIONS: usize = 10_000;

/// Number of the machine's host.
const NUMBER: u16 = 900;

/// What a daemon's processes may have open: a quarter of the connections of a seeder, and what they have anyhow.
const FILES_MAX: usize = 1500;

/// What a daemon may grow by, in bytes.
const GROWTH_MAX: u64 = 128 << 20;

#[test]
fn ten_thousand_connections_keep_nobody_out() {
    run_test("flood::ten_thousand_connections_keep_nobody_out", |run| {
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let enough = Some(maximum.unwrap_or(u64::MAX).max(CONNECTIONS as u64 + 1000));
        setrlimit(Resource::Nofile, Rlimit { current: enough, maximum: enough }).context("too few open files")?;
        let mut stage = Stage::set(run)?;
        let mut crowd = stage.gather(Case::OneHasIt, 2)?;
        let late = crowd.nodes.split_off(1);
        let first = crowd.first.as_ref().context("nobody has it")?;
        let host = stage.scene.network.add_node(NUMBER)?;
        let seeder = stage.scene.seeder.as_ref().context("no seeder")?.daemon();
        for (name, daemon, place, port) in
            [("node", first.snapshotter()?.daemon(), first.place(), PORT), ("seeder", seeder, Place::Seeder, 7070)]
        {
            let address = SocketAddr::new(stage.scene.network.address(place).into(), port);
            let before = footprints(daemon.pid());
            let opening = stage.scene.network.at(host.place(), move || open(address));
            let open = opening.join().expect("opening connections does not panic").with_context(|| name)?;
            let held = footprints(daemon.pid());
            println!("{name}: {} connections; before {}, then {}", open.len(), sum(&before), sum(&held));
            let (files, growth) = (files(&held), resident(&held).saturating_sub(resident(&before)));
            ensure!(files < FILES_MAX, "{name}: {files} open files");
            ensure!(growth < GROWTH_MAX, "{name}: {growth} bytes more");
            // While they stand.
            if name == "seeder" {
                let outcome = crowd.start(&stage.scene, &stage.subject, true)?;
                outcome.starts.iter().try_for_each(|start| stage.check_line(&start.line))?;
            } else {
                stage.pull(&late)?;
                stage.end_all(&late, stage.read_all(&late)?)?;
            }
            drop(open);
        }
        Ok(())
    });
}

/// Opens connections to `address` and says nothing on them.
fn open(address: SocketAddr) -> Result<Vec<TcpStream>> {
    let mut open = Vec::with_capacity(CONNECTIONS);
    for number in 0..CONNECTIONS {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(60));
        open.push(stream.with_context(|| format!("connection {number} to {address}"))?);
    }
    Ok(open)
}

fn files(processes: &[Footprint]) -> usize {
    processes.iter().map(|process| process.files).sum()
}

fn resident(processes: &[Footprint]) -> u64 {
    processes.iter().map(|process| process.resident).sum()
}

fn sum(processes: &[Footprint]) -> String {
    format!("{} open files and {} KiB", files(processes), resident(processes) >> 10)
}
