//! Layers that the seeder does not know when nodes want them.

use std::time::Duration;

use futures_util::future::join_all;

use super::cluster::{Cluster, read_all, until};
use crate::ingest::tests::Sample;
use crate::source::SourceKind;

/// Nodes that want an unknown layer at once get it from each other while it is read for the first time.
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_layer_passes_through_all_nodes_while_it_is_ingested() {
    const NODES: usize = 5;
    let cluster = Cluster::new().await;
    cluster.registry.set(|behaviour| behaviour.pause = Duration::from_millis(10));
    let sample = Sample::new(50);
    let blob = cluster.registry.put_blob(sample.blob.clone());
    let seeder = cluster.seeder("seeder", 0).await;
    let nodes: Vec<_> = (0..NODES).map(|node| cluster.member(&format!("node-{node}"), &[seeder.address])).collect();
    // They need not wait for their lines: some of them have none yet.
    let layers = join_all(nodes.iter().map(|node| node.resolve(&blob))).await;
    let copy = seeder.ingester.known(blob.digest).await.unwrap().frames().len();
    let sent = seeder.gate.status().layers[0].sent_bytes;
    assert!(sent < copy * 3 / 2, "the seeder sent {sent} bytes, one copy is {copy}");
    let mut first = 0;
    for layer in &layers {
        let came = layer.bytes_here();
        assert!(came > sample.device.len() as u64 / 2, "only {came} bytes came before the index did");
        let counters = layer.counters();
        let (seeder, peer) = (counters.source(SourceKind::Seeder), counters.source(SourceKind::Peer));
        assert!(seeder.plain_bytes + peer.plain_bytes >= came, "{came}: {counters:?}");
        first += usize::from(seeder.wire_bytes > peer.wire_bytes);
    }
    assert_eq!(first, 1, "one follows the seeder");
    for layer in &layers {
        read_all(layer, &sample).await;
    }
    // On more than one connection where that is slow.
    assert_eq!(cluster.registry.requests().bytes, blob.size);
    until("all join", || seeder.members() == [(blob.digest, NODES)]).await;
    for node in nodes {
        node.node.shutdown().await;
    }
}

/// The node that others follow goes while the layer comes: they follow somebody else, from where they were.
#[tokio::test(flavor = "multi_thread")]
async fn the_others_go_on_without_the_first_of_them() {
    let cluster = Cluster::new().await;
    cluster.registry.set(|behaviour| behaviour.pause = Duration::from_millis(40));
    let sample = Sample::new(51);
    let blob = cluster.registry.put_blob(sample.blob.clone());
    let seeder = cluster.seeder("seeder", 0).await;
    let [first, second] = ["first", "second"].map(|name| cluster.member(name, &[seeder.address]));
    until("both have lines", || seeder.tracker.lines() == 2).await;
    let resolving = |member: &super::cluster::Member| {
        let (resolver, blob) = (member.resolver.clone(), blob.clone());
        let (progress, seen) = tokio::sync::watch::channel(crate::resolve::Progress::default());
        (tokio::spawn(async move { resolver.resolve(&blob, progress).await }), seen)
    };
    let (leading, mut led) = resolving(&first);
    led.wait_for(|progress| progress.received > 0).await.unwrap();
    let (following, mut behind) = resolving(&second);
    behind.wait_for(|progress| progress.received > 0).await.unwrap();
    leading.abort();
    drop(first);
    let layer = following.await.unwrap().unwrap();
    assert!(layer.bytes_here() > sample.device.len() as u64 / 2, "only {} bytes came", layer.bytes_here());
    let counters = layer.counters();
    assert!(counters.source(SourceKind::Seeder).wire_bytes > 0 && counters.source(SourceKind::Peer).wire_bytes > 0);
    read_all(&layer, &sample).await;
    second.node.shutdown().await;
}
