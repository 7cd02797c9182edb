use futures_util::future::join_all;
use layer::Geometry;
use layer::index::{check_section, statement};
use layer::wire::Decoder;

use super::*;
use crate::bulk::Fault;
use crate::config::SeederAddresses;
use crate::ingest::tests::{Sample, TestSeeder, finished, ingester};
use crate::registry::fake::FakeRegistry;
use crate::security::tests::TestCluster;
use crate::seeder::SeederSource;
use crate::source::{ChunkSink, Priority, Source, SourceKind, WrongChunk};
use layer::ChunkIndex;

fn quick() -> Options {
    Options { connect_timeout: Duration::from_secs(2), stall_timeout: Duration::from_secs(5) }
}

fn client(addresses: &[&str], security: &Security) -> Client {
    let addresses = SeederAddresses::new(addresses.iter().map(|address| (*address).to_owned())).unwrap();
    Client::new(&addresses, security.clone(), quick())
}

struct Collected {
    geometry: Geometry,
    device: Vec<u8>,
    wire_bytes: usize,
}

impl ChunkSink for Collected {
    fn chunk(&mut self, chunk: ChunkIndex, plain: &[u8], wire_bytes: usize) -> Result<(), WrongChunk> {
        let range = self.geometry.range(chunk);
        let place = self.device.get_mut(range.start as usize..range.end as usize).ok_or(WrongChunk(chunk))?;
        place.copy_from_slice(plain);
        self.wire_bytes += wire_bytes;
        Ok(())
    }
}

async fn ready(resolution: &mut Resolution) -> (Box<Header>, Signed) {
    loop {
        match resolution.next().await.unwrap().expect("an end") {
            Event::Ready { header, signed } => return (header, signed),
            Event::Progress(_) => {}
            Event::Unsupported(reason) => panic!("{reason}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn resolves_follows_and_fetches_with_and_without_tls() {
    let cluster = TestCluster::new();
    let sample = Sample::new(20);
    for is_mutual in [false, true] {
        let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
        registry.set(|behaviour| behaviour.pause = Duration::from_millis(3));
        let blob = registry.put_blob(sample.blob.clone());
        let of = |role, name| if is_mutual { cluster.security(role, name) } else { Security::Off };
        let side = if is_mutual { "mtls" } else { "off" };
        let (theirs, ours) = (of(Role::Seeder, &format!("s-{side}")), of(Role::Node, &format!("n-{side}")));
        let seeder = TestSeeder::start(ingester(directory.path(), &registry, &theirs), &theirs).await;
        let client = client(&[&seeder.address], &ours);

        let mut resolution = client.resolve(&blob).await.unwrap();
        let Some(Event::Progress(_)) = resolution.next().await.unwrap() else { panic!("it is not new") };
        let started = std::time::Instant::now();
        let mut follow = loop {
            match resolution.feed().follow(0).await {
                Ok((follow, SourceKind::Seeder)) => break follow,
                Err(Fault::Missing(_)) if started.elapsed() < Duration::from_secs(60) => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                other => panic!("{:?}", other.err()),
            }
        };
        let (mut device, mut decoder) = (Vec::new(), Decoder::new());
        while let Some((chunk, frame)) = follow.next().await.unwrap() {
            let len = (sample.device.len() - ((chunk.0 as usize) << 17)).min(1 << 17);
            device.extend_from_slice(decoder.decode(frame, len).unwrap());
        }
        assert_eq!(device, sample.device);
        let (header, signed) = ready(&mut resolution).await;
        ours.verifier().verify(&statement(&header), &signed).unwrap();
        assert_eq!(signed.signature.is_empty(), !is_mutual);
        for section in Section::ALL {
            let bytes = client.section(&header, section).await.unwrap();
            check_section(&header, section, &bytes).unwrap();
        }

        let source = SeederSource::new(client, blob.digest, header.geometry());
        let geometry = header.geometry();
        let mut sink = Collected { geometry, device: vec![0; sample.device.len()], wire_bytes: 0 };
        let half = geometry.chunk_count() / 2;
        source.fetch(half..geometry.chunk_count(), Priority::Demand, &mut sink).await.unwrap();
        source.fetch(0..half, Priority::Demand, &mut sink).await.unwrap();
        assert_eq!(sink.device, sample.device);
        assert!(sink.wire_bytes < sample.device.len());
        let beyond = source.fetch(half..geometry.chunk_count() + 1, Priority::Demand, &mut sink).await.unwrap_err();
        assert!(matches!(beyond, SourceError::Corrupt { .. }), "{beyond}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_nodes_resolve_and_one_get_is_made() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let blob = registry.put_blob(Sample::new(21).blob);
    let seeder = TestSeeder::start(ingester(directory.path(), &registry, &Security::Off), &Security::Off).await;
    // Ten processes of a hundred resolves each: a thousand connections would measure the test's own process.
    let clients: Vec<_> = (0..10).map(|_| client(&[&seeder.address], &Security::Off)).collect();
    let resolves = (0..1000).map(|number: usize| {
        let (client, blob) = (clients[number % clients.len()].clone(), blob.clone());
        tokio::spawn(async move { ready(&mut client.resolve(&blob).await.unwrap()).await.0.digest() })
    });
    let digests = join_all(resolves).await;
    let first = *digests[0].as_ref().unwrap();
    assert!(digests.into_iter().all(|digest| digest.unwrap() == first));
    assert_eq!(registry.requests().bodies, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn security_on_one_end_only_is_refused_and_named() {
    let cluster = TestCluster::new();
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let blob = registry.put_blob(Sample::new(22).blob);
    let (seeder_side, node_side) = (cluster.security(Role::Seeder, "s"), cluster.security(Role::Node, "n"));
    let ingester = ingester(directory.path(), &registry, &seeder_side);
    let with = TestSeeder::start(ingester.clone(), &seeder_side).await;
    let without = TestSeeder::start(ingester, &Security::Off).await;
    let header = match finished(with.ingester.ask(&blob).await.unwrap()).await {
        crate::ingest::Phase::Ready(known) => known.header().clone(),
        other => panic!("{other:?}"),
    };
    for (address, security, named) in
        [(&with.address, &Security::Off, "demands mutual TLS"), (&without.address, &node_side, "does not speak TLS")]
    {
        let client = client(&[address], security);
        let errors = [
            client.resolve(&blob).await.err().expect("refused"),
            client.section(&header, Section::Entries).await.unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, SeederError::Untrusted { .. }), "{error}");
            assert!(error.to_string().contains(named), "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_seeder_of_this_cluster_is_a_seeder() {
    let (ours, theirs) = (TestCluster::new(), TestCluster::new());
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let blob = registry.put_blob(Sample::new(23).blob);
    let ingester = ingester(directory.path(), &registry, &Security::Off);
    let node = ours.security(Role::Node, "n1");
    let refused = async |server: &Security, node: &Security, named: &str| {
        let seeder = TestSeeder::start(ingester.clone(), server).await;
        let error = client(&[&seeder.address], node).resolve(&blob).await.err().expect("refused");
        assert!(matches!(error, SeederError::Untrusted { .. }), "{error}");
        assert!(error.to_string().contains(named), "{error}");
        let client = client(&[&seeder.address], node);
        let header = client.is_there().await.unwrap_err();
        assert!(matches!(header, SeederError::Untrusted { .. }), "{header}");
    };
    // A node that opens a port.
    refused(&ours.security(Role::Node, "n2"), &node, "role node, not seeder").await;
    // Another cluster's seeder, as this cluster's node sees it.
    refused(&theirs.security(Role::Seeder, "s"), &node, "TLS").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_seeder_is_asked_when_one_is_gone() {
    let (registry, directory) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
    let sample = Sample::new(24);
    let blob = registry.put_blob(sample.blob.clone());
    let seeder = TestSeeder::start(ingester(directory.path(), &registry, &Security::Off), &Security::Off).await;
    // One that would be asked first.
    let closed = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let claim = |address: &str| share(address, blob.digest);
    let gone = std::iter::repeat_with(closed).find(|gone| claim(gone) > claim(&seeder.address)).unwrap();
    let client = client(&[&gone, &seeder.address], &Security::Off);
    let (header, _) = ready(&mut client.resolve(&blob).await.unwrap()).await;
    // Each further failure makes the rest longer, so a slow machine sees it too.
    for attempt in 0.. {
        if client.seats_of(blob.digest).await.unwrap()[0].name == seeder.address {
            break;
        }
        assert!(attempt < 10, "who failed is asked last");
        ready(&mut client.resolve(&blob).await.unwrap()).await;
    }
    drop(seeder);
    let geometry = header.geometry();
    let source = SeederSource::new(client, blob.digest, geometry);
    let mut sink = Collected { geometry, device: Vec::new(), wire_bytes: 0 };
    let error = source.fetch(0..1, Priority::Demand, &mut sink).await.unwrap_err();
    assert!(error.blame(), "{error}");
}

#[tokio::test]
async fn without_a_seeder_the_error_says_so() {
    let blob = BlobRef {
        registry: "r".to_owned(),
        repository: "a".to_owned(),
        digest: Digest::of(b""),
        size: 0,
        media_type: String::new(),
        urls: Vec::new(),
    };
    let error = client(&[], &Security::Off).resolve(&blob).await.err().expect("none").to_string();
    assert!(error.contains("none is configured"), "{error}");
}
