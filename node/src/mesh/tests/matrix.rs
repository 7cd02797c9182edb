//! Every source with every fault at every operation: nothing fails while one of them works, nothing wrong is ever believed, and
//! a pull that fails says why.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use layer::ChunkIndex;
use tokio::sync::watch;

use super::cluster::{Cluster, Member, MemberSetup, PATIENCE, Seeder, read_all, until};
use super::line::{Fault, Line, own_ip};
use crate::ingest::tests::Sample;
use crate::registry::fake::{Behaviour, Odd};
use crate::resolve::{Progress, ResolveError};
use crate::source::{BlobRef, SourceKind};

/// Cases that run at the same time.
const AT_ONCE: usize = 10;

/// What a fetch can come from; one of them works.
const SOURCES: [SourceKind; 3] = [SourceKind::Peer, SourceKind::Seeder, SourceKind::Registry];

/// A registry, a seeder and a node that has the layer, and another node with lines to the three that can fail.
struct Case {
    member: Member,
    peer: Line,
    seeder: Line,
    registry: Line,
    /// As that node reaches it.
    blob: BlobRef,
    sample: Sample,
    // Dropped last.
    first: Member,
    _seeder: Seeder,
    _cluster: Cluster,
}

impl Case {
    async fn new(seed: u32) -> Self {
        let cluster = Cluster::new().await;
        let the_seeder = cluster.seeder("seeder", 0).await;
        let sample = Sample::small(seed);
        let blob = cluster.registry.put_blob(sample.blob.clone());
        let listen = SocketAddr::from((own_ip(), 7071));
        let peer = Line::to(listen).await;
        let setup =
            MemberSetup { listen: listen.to_string(), address: peer.address().to_string(), ..MemberSetup::default() };
        let first = cluster.member_as("first", &[the_seeder.address], setup);
        read_all(&first.resolve(&blob).await, &sample).await;
        until(&format!("case {seed} is joined"), || the_seeder.members() == [(blob.digest, 1)]).await;

        let registry = Line::to(cluster.registry.address()).await;
        let seeder = Line::to(the_seeder.address).await;
        let setup = MemberSetup { registry: Some(registry.address()), ..MemberSetup::default() };
        let member = cluster.member_as("subject", &[seeder.address()], setup);
        let blob = BlobRef { registry: registry.address().to_string(), ..blob };
        Self { member, peer, seeder, registry, blob, sample, first, _seeder: the_seeder, _cluster: cluster }
    }

    /// Sets a fault on all lines but that to `working`.
    fn fail_all_but(&self, working: SourceKind, fault: Fault) {
        let lines = [&self.peer, &self.seeder, &self.registry];
        for (_, line) in SOURCES.iter().zip(lines).filter(|(kind, _)| **kind != working) {
            line.set(fault);
        }
    }

    async fn end(self) {
        self.member.node.shutdown().await;
        self.first.node.shutdown().await;
    }
}

/// Runs `one` for every fault with each source as the one that works.
async fn for_all<F: Future<Output = ()>>(one: impl Fn(u32, SourceKind, Fault) -> F) {
    let all = SOURCES.iter().flat_map(|working| Fault::ALL.map(|fault| (*working, fault)));
    let all: Vec<_> = all.enumerate().map(|(seed, (working, fault))| (seed as u32, working, fault)).collect();
    for some in all.chunks(AT_ONCE) {
        join_all(some.iter().map(|(seed, working, fault)| one(*seed, *working, *fault))).await;
    }
}

/// The layer is known and mounted, nothing of it is here, and all lines fail but one.
async fn with_one_source(seed: u32, working: SourceKind, fault: Fault, is_read: bool) {
    let case = Case::new(300 + seed).await;
    let layer = case.member.resolve(&case.blob).await;
    until(&format!("the neighbour of case {seed} is known"), || case.member.mesh.watch().standing().neighbours > 0)
        .await;
    // Without it nobody can read a registry's blob in parts.
    until(&format!("the spans of case {seed} are here"), || layer.spans().is_ok_and(|spans| spans.is_some())).await;
    case.fail_all_but(working, fault);
    let began = Instant::now();
    if is_read {
        // From the end: nothing is read ahead.
        for chunk in layer.geometry().chunks().rev() {
            let range = layer.geometry().range(ChunkIndex(chunk));
            let bytes = layer.read(range.clone()).await;
            let bytes = bytes.unwrap_or_else(|error| panic!("{working:?} works, all else {fault:?}: {error}"));
            let wanted = &case.sample.device[range.start as usize..range.end as usize];
            assert!(bytes == wanted, "{working:?} works, all else {fault:?}: chunk {chunk} differs");
        }
    } else {
        layer.set_filling(true);
        until(&format!("complete while {working:?} works, all else {fault:?}"), || layer.is_complete()).await;
        read_all(&layer, &case.sample).await;
    }
    println!("{working:?} works, all else {fault:?}: {:?}", began.elapsed());
    assert_eq!(layer.counters().reads_failed, 0);
    case.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_read_fails_while_a_source_works() {
    for_all(|seed, working, fault| with_one_source(seed, working, fault, true)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_background_completes_a_layer_while_a_source_works() {
    for_all(|seed, working, fault| with_one_source(seed, working, fault, false)).await;
}

/// The first pull of a layer that the seeder knows: it ends with a reason, and works when the fault is over.
#[tokio::test(flavor = "multi_thread")]
async fn a_pull_past_a_failing_seeder_ends_and_says_why() {
    let one = async |(seed, fault): (usize, Fault)| {
        let case = Case::new(500 + seed as u32).await;
        case.seeder.set(fault);
        let (progress, _) = watch::channel(Progress::default());
        let resolved = tokio::time::timeout(PATIENCE, case.member.resolver.resolve(&case.blob, progress)).await;
        match resolved {
            Ok(Ok(layer)) => println!("{fault:?}: {layer} all the same"),
            Ok(Err(error)) => {
                println!("{fault:?}: {error}");
                let seeder = case.seeder.address().to_string();
                assert!(error.to_string().contains(&seeder), "{fault:?}: the seeder is not named: {error}");
                let may =
                    matches!(error, ResolveError::NoSeeder(_) | ResolveError::Seeder(_) | ResolveError::Index { .. });
                assert!(may, "{fault:?}: {error:?}");
            }
            // As long as something moves, whoever pulls decides when it is too long.
            Err(_) => assert_eq!(fault, Fault::Slow),
        }
        case.seeder.set(Fault::None);
        let began = Instant::now();
        let layer = loop {
            let (progress, _) = watch::channel(Progress::default());
            match case.member.resolver.resolve(&case.blob, progress).await {
                Ok(layer) => break layer,
                Err(error) => assert!(began.elapsed() < PATIENCE, "{fault:?}: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        read_all(&layer, &case.sample).await;
        case.end().await;
    };
    join_all(Fault::ALL.into_iter().enumerate().map(one)).await;
}

/// The first pull of a layer that nobody knows, from a registry that fails: as above.
#[tokio::test(flavor = "multi_thread")]
async fn a_pull_from_a_failing_registry_ends_and_says_why() {
    let odd = |odd: Odd| move |behaviour: &mut Behaviour| behaviour.odd = Some((odd.clone(), None));
    let status = |status| odd(Odd::Status(status, "text/plain".to_owned(), "no".to_owned()));
    type Set = Box<dyn Fn(&mut Behaviour)>;
    let faults: Vec<(&str, Set)> = vec![
        ("401", Box::new(status(401))),
        ("429", Box::new(|behaviour| behaviour.too_many = (u32::MAX, Some("1".to_owned())))),
        ("500", Box::new(status(500))),
        ("reset", Box::new(odd(Odd::Close))),
        ("stalled", Box::new(|behaviour| behaviour.stall_after = Some(30_000))),
        ("truncated", Box::new(|behaviour| behaviour.break_after = Some((0, u32::MAX)))),
        ("wrong length", Box::new(odd(Odd::ShortBody))),
        ("wrong part", Box::new(odd(Odd::WrongRange))),
    ];
    let one = async |(seed, (name, set)): (usize, (&str, Set))| {
        let cluster = Cluster::new().await;
        let seeder = cluster.seeder("seeder", 0).await;
        let member = cluster.member("subject", &[seeder.address]);
        let sample = Sample::small(600 + seed as u32);
        let blob = cluster.registry.put_blob(sample.blob.clone());
        cluster.registry.set(|behaviour| set(behaviour));
        let (progress, _) = watch::channel(Progress::default());
        match tokio::time::timeout(PATIENCE, member.resolver.resolve(&blob, progress)).await {
            Ok(Ok(_)) => println!("{name}: it came all the same"),
            Ok(Err(error)) => {
                println!("{name}: {error}");
                assert!(error.to_string().contains(&cluster.registry.host()), "{name}: {error}");
            }
            Err(_) => panic!("{name}: it does not end"),
        }
        cluster.registry.set(|behaviour| *behaviour = Behaviour::default());
        let began = Instant::now();
        let layer = loop {
            let (progress, _) = watch::channel(Progress::default());
            match member.resolver.resolve(&blob, progress).await {
                Ok(layer) => break layer,
                Err(error) => assert!(began.elapsed() < PATIENCE, "{name}: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        read_all(&layer, &sample).await;
        member.node.shutdown().await;
    };
    join_all(faults.into_iter().enumerate().map(one)).await;
}
