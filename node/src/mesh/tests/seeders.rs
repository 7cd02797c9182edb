//! Several seeders share the layers, and take over from each other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use layer::{ChunkIndex, Digest};
use tokio::sync::watch;

use super::cluster::{Cluster, MemberSetup, PATIENCE, Seeder, read_all, until};
use super::line::{Fault, Line};
use crate::config::SeederAddresses;
use crate::ingest::Phase;
use crate::ingest::tests::{Sample, finished};
use crate::resolve::{self, Progress, Resolver};
use crate::security::Security;
use crate::seeder::{self, share};
use crate::source::BlobRef;
use crate::{Node, NodeConfig, registry};

/// The layers that belong to the seeder at `address`, with so many members.
fn shares(blobs: &[BlobRef], seeders: [SocketAddr; 2], address: SocketAddr, members: usize) -> BTreeMap<Digest, usize> {
    let owner = |blob: Digest| seeders.into_iter().max_by_key(|seeder| share(&seeder.to_string(), blob));
    let owned = blobs.iter().filter(|blob| owner(blob.digest) == Some(address));
    owned.map(|blob| (blob.digest, members)).collect()
}

fn members(seeder: &Seeder) -> BTreeMap<Digest, usize> {
    seeder.members().into_iter().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn seeders_share_layers_and_take_over_from_each_other() {
    let cluster = Cluster::new().await;
    let (stays, goes) = (cluster.seeder("stays", 0).await, cluster.seeder("goes", 0).await);
    let (staying, going) = (stays.address, goes.address);
    let both = [staying, going];
    // Until each has its share.
    let (mut samples, mut blobs): (Vec<Sample>, Vec<BlobRef>) = Default::default();
    while both.iter().any(|seeder| shares(&blobs, both, *seeder, 0).is_empty()) || samples.len() < 3 {
        let sample = Sample::new(60 + samples.len() as u32);
        blobs.push(cluster.registry.put_blob(sample.blob.clone()));
        samples.push(sample);
    }
    let nodes = ["a", "b"].map(|name| cluster.member(name, &both));
    let resolved = nodes.iter().map(|node| join_all(blobs.iter().map(|blob| node.resolve(blob))));
    let layers = join_all(resolved).await;
    let whole = blobs.len() as u64;
    assert_eq!(cluster.registry.requests().bodies as u64, whole, "each is ingested once");
    for seeder in [&stays, &goes] {
        let own = shares(&blobs, both, seeder.address, 2);
        until("each seeder has its share", || members(seeder) == own).await;
    }

    // One goes: the other gets what was its, and no read fails.
    drop(goes);
    let readers = join_all(layers[0].iter().zip(&samples).map(|(layer, sample)| read_all(layer, sample)));
    let of_both = blobs.iter().map(|blob| blob.digest).collect::<Vec<_>>();
    let taken_over = async {
        until("what the other knows is joined there", || {
            let own = shares(&blobs, both, staying, 2);
            own.iter().all(|(blob, count)| members(&stays).get(blob) == Some(count))
        })
        .await;
    };
    tokio::join!(readers, taken_over);
    assert!(layers[0].iter().all(|layer| layer.counters().reads_failed == 0));

    // Somebody new wants what only the other one knew: the one that is left ingests it, and those that have it join it there.
    let late = cluster.member("late", &both);
    let others: Vec<_> = join_all(blobs.iter().map(|blob| late.resolve(blob))).await;
    let all: BTreeMap<Digest, usize> = of_both.iter().map(|blob| (*blob, 3)).collect();
    until("all is joined at the one that is left", || members(&stays) == all).await;
    join_all(others.iter().zip(&samples).map(|(layer, sample)| read_all(layer, sample))).await;

    // It comes back with what it had.
    let goes = cluster.seeder("goes", going.port()).await;
    for seeder in [&stays, &goes] {
        let own = shares(&blobs, both, seeder.address, 3);
        until("each seeder has its share again", || members(seeder) == own).await;
    }
    for node in nodes.into_iter().chain([late]) {
        node.node.shutdown().await;
    }
}

/// The seeder whose the layer is gives nothing, or next to nothing, while it seems to live; the other one has the layer too. Nobody
/// else is left to ask.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_seeder_is_done_without_where_another_has_the_layer() {
    for (seed, fault) in [(80, Fault::Stalled), (81, Fault::Slow)] {
        let cluster = Cluster::new().await;
        let seeders = [cluster.seeder("one", 0).await, cluster.seeder("two", 0).await];
        let sample = Sample::new(seed);
        let blob = cluster.registry.put_blob(sample.blob.clone());
        for seeder in &seeders {
            let phase = finished(seeder.ingester.ask(&blob).await.unwrap()).await;
            assert!(matches!(phase, Phase::Ready(_)), "{phase:?}");
        }
        let lines = [Line::to(seeders[0].address).await, Line::to(seeders[1].address).await];
        let registry = Line::to(cluster.registry.address()).await;
        let setup = MemberSetup { registry: Some(registry.address()), ..MemberSetup::default() };
        let member = cluster.member_as("subject", &lines.each_ref().map(Line::address), setup);
        let blob = BlobRef { registry: registry.address().to_string(), ..blob };
        let layer = member.resolve(&blob).await;
        until("both lines stand", || member.mesh.watch().standing().seeders.len() == 2).await;
        registry.set(Fault::Refused);
        let owner = lines.iter().max_by_key(|line| share(&line.address().to_string(), blob.digest)).unwrap();
        owner.set(fault);
        // From the end: nothing is read ahead.
        for (count, chunk) in layer.geometry().chunks().rev().enumerate() {
            let range = layer.geometry().range(ChunkIndex(chunk));
            let bytes = layer.read(range.clone()).await.unwrap_or_else(|error| panic!("{fault:?}: {error}"));
            assert!(bytes == sample.device[range.start as usize..range.end as usize], "{fault:?}: chunk {chunk}");
            // Sooner than anybody takes it for dead.
            let lines = member.mesh.watch().standing().seeders.len();
            assert!(count > 0 || lines == 2, "{fault:?}: {lines} lines");
        }
        assert_eq!(layer.counters().reads_failed, 0);
        member.node.shutdown().await;
    }
}

/// The seeder whose the layer is stands still before it is asked, or while it makes the index; the other one works.
#[tokio::test(flavor = "multi_thread")]
async fn a_seeder_that_stands_still_holds_up_no_pull_where_another_works() {
    for (seed, is_new) in [(82, false), (83, true)] {
        let cluster = Cluster::new().await;
        let seeders = [cluster.seeder("one", 0).await, cluster.seeder("two", 0).await];
        let sample = Sample::new(seed);
        let blob = cluster.registry.put_blob(sample.blob.clone());
        if is_new {
            cluster.registry.set(|behaviour| behaviour.pause = Duration::from_millis(20));
        } else {
            for seeder in &seeders {
                finished(seeder.ingester.ask(&blob).await.unwrap()).await;
            }
        }
        let lines = [Line::to(seeders[0].address).await, Line::to(seeders[1].address).await];
        let owner = lines.iter().max_by_key(|line| share(&line.address().to_string(), blob.digest)).unwrap();
        let node = Node::open(NodeConfig::new(cluster.folder().join("node"))).unwrap();
        let addresses = SeederAddresses::new(lines.iter().map(|line| line.address().to_string())).unwrap();
        // No limit of a single seeder ends what this test waits for.
        let limit = 10 * PATIENCE;
        let seeder = seeder::Options { connect_timeout: limit, stall_timeout: limit };
        let options = resolve::Options { seeder, registry: registry::Options::default() };
        let registries = cluster.registry.config();
        let resolver = Resolver::with_options(node.clone(), &addresses, &Security::Off, &registries, options);
        let (progress, mut seen) = watch::channel(Progress::default());
        let resolved = resolver.resolve(&blob, progress);
        let fault = async {
            if is_new {
                seen.wait_for(|progress| progress.ingested > 0).await.unwrap();
            }
            owner.set(Fault::Stalled);
        };
        let both = async { tokio::join!(fault, resolved).1 };
        let layer = tokio::time::timeout(PATIENCE, both).await.expect("another seeder is asked").unwrap();
        read_all(&layer, &sample).await;
        node.shutdown().await;
    }
}

/// Nodes start before the seeder, and have layers that it does not know.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_join_once_a_seeder_comes() {
    let cluster = Cluster::new().await;
    let sample = Sample::new(70);
    let blob = cluster.registry.put_blob(sample.blob.clone());
    let before = cluster.seeder("before", 0).await;
    let address = before.address;
    let old = cluster.member("old", &[address]);
    old.resolve(&blob).await;
    until("it is joined", || before.members() == [(blob.digest, 1)]).await;
    drop(before);
    // One that never saw a seeder.
    let young = cluster.member("young", &[address]);
    let after = cluster.seeder("after", address.port()).await;
    until("both have lines", || after.tracker.lines() == 2).await;
    assert!(after.members().is_empty(), "it does not know the layer");
    let layer = young.resolve(&blob).await;
    until("both join it", || after.members() == [(blob.digest, 2)]).await;
    read_all(&layer, &sample).await;
    for node in [old, young] {
        node.node.shutdown().await;
    }
}
