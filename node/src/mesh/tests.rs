//! Chunks on their way through several nodes.

mod cluster;
mod damage;
mod line;
mod matrix;
mod seeders;
mod unknown;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use layer::ChunkIndex;
use layer::wire::{Encoder, Frame};
use swarm::UploadConfig;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::peer::{PeerClient, PeerSource};
use super::{Holders, OwnAddress, Refused, Sharing};
use crate::bulk::Options;
use crate::layer::Layer;
use crate::node::{Node, NodeConfig};
use crate::security::Security;
use crate::serve::{self, Limits, Listener};
use crate::store::memory::MemoryDisk;
use crate::store::tests::Subject;

/// A node with one layer, which it serves.
struct Member {
    node: Arc<Node>,
    layer: Arc<Layer>,
    address: SocketAddr,
    _stop: DropGuard,
}

/// Of those who have a chunk nobody is known.
pub(super) fn nobody() -> Holders {
    Box::new(|_, _, _| Box::pin(async { Vec::new() }))
}

impl Member {
    async fn new(subject: &Subject) -> Self {
        let config = NodeConfig { share: true, fill: false, ..NodeConfig::new("/store") };
        let node = Node::open_on(Arc::new(MemoryDisk::default()), config, "a").unwrap();
        let layer = node.insert(&subject.parts()).unwrap();
        let sharing = Sharing::new(node.clone(), UploadConfig::default(), Refused::default(), nobody());
        let listener = Listener::bind("127.0.0.1:0", &Security::Off, Limits::default()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        tokio::spawn(listener.serve(serve::router(Arc::new(sharing), 64), stop.clone()));
        Self { node, layer, address, _stop: stop.drop_guard() }
    }

    /// Lets it fetch from `other`.
    fn meets(&self, other: &Self) {
        let options = Options::default();
        let client = PeerClient::new(other.address, &Security::Off, OwnAddress::default(), None, options).unwrap();
        let source = PeerSource::new(client, self.layer.header().blob(), self.layer.geometry());
        self.layer.add_source(Arc::new(source));
    }

    fn frame(&self, chunk: u32) -> Option<Vec<u8>> {
        let mut frame = Vec::new();
        self.layer.store().read_frame(ChunkIndex(chunk), &mut frame).then_some(frame)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_travels_unchanged_from_node_to_node() {
    let subject = Subject::new(300_000, 7);
    let members = [Member::new(&subject).await, Member::new(&subject).await, Member::new(&subject).await];
    let mut encoder = Encoder::new();
    let count = members[0].layer.geometry().chunk_count();
    let mut frames = Vec::new();
    for chunk in 0..count {
        let mut frame = Vec::new();
        encoder.encode(subject.chunk(chunk), &mut frame);
        assert!(members[0].layer.add_chunk(ChunkIndex(chunk), subject.chunk(chunk)));
        // Every third comes from somebody who keeps no frames.
        if !chunk.is_multiple_of(3) {
            members[0].layer.store().keep(ChunkIndex(chunk), Frame::split(&frame).unwrap().0);
        }
        frames.push(frame);
    }
    let size = subject.device().len() as u64;
    let deadline = Instant::now() + Duration::from_secs(30);
    for pair in members.windows(2) {
        pair[1].meets(&pair[0]);
        assert!(pair[1].layer.read(0..size).await.unwrap() == subject.device());
        // Readers are answered before the frame is kept.
        for chunk in 0..count {
            let want = (!chunk.is_multiple_of(3)).then(|| frames[chunk as usize].clone());
            while pair[1].frame(chunk) != want {
                assert!(Instant::now() < deadline, "chunk {chunk}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
    let came = members[2].node.counters().peer;
    assert_eq!((came.chunks, came.plain_bytes), (u64::from(count), size));
    assert!(came.wire_bytes < size / 2, "{} of {size}", came.wire_bytes);
    let given = members[1].node.counters();
    assert!(given.given_chunks >= u64::from(count) && given.given_bytes >= came.wire_bytes, "{given:?}");
}
