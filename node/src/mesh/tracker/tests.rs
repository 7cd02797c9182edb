use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use layer::Digest;
use layer::index::{Section, check_section};
use proto::drover::mesh::v1::tracker_client::TrackerClient;
use proto::drover::mesh::v1::{
    Assign, FromSeeder, Haves, Hello, Introduce, Ping, Pong, ToSeeder, from_seeder, to_seeder,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Status, Streaming};

use super::*;
use crate::config::SeederAddresses;
use crate::ingest::tests::{Sample, finished, ingester};
use crate::ingest::{Phase, control};
use crate::mesh::{Asker, Member};
use crate::registry::fake::FakeRegistry;
use crate::security::Security;
use crate::seeder;
use crate::serve::{self, Frames, LayerServer, Limits, Listener, SectionBody, ServeError};
use crate::source::{BlobRef, BoxFuture};

const PATIENCE: Duration = Duration::from_secs(30);

/// A seeder with a tracker in this process.
struct Seeder {
    registry: FakeRegistry,
    ingester: Ingester,
    tracker: Tracker,
    address: SocketAddr,
    _root: tempfile::TempDir,
    _stop: DropGuard,
}

impl Seeder {
    async fn start() -> Self {
        Self::with_upload(0).await
    }

    async fn with_upload(bytes_per_sec: u64) -> Self {
        Self::with(|ingester, tracker| Gate::new(ingester, tracker, bytes_per_sec)).await
    }

    async fn with(gate: impl FnOnce(Ingester, Tracker) -> Gate) -> Self {
        let (registry, root) = (FakeRegistry::start().await, tempfile::tempdir().unwrap());
        let ingester = ingester(root.path(), &registry, &Security::Off);
        let stop = CancellationToken::new();
        let tracker = Tracker::start(ingester.clone(), stop.clone());
        let gate = gate(ingester.clone(), tracker.clone());
        let router = serve::router(Arc::new(gate), 64);
        let router = control::route(router, ingester.clone());
        let router = route(router, tracker.clone());
        let listener = Listener::bind("127.0.0.1:0", &Security::Off, Limits::default()).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(listener.serve(router, stop.clone()));
        Self { registry, ingester, tracker, address, _root: root, _stop: stop.drop_guard() }
    }

    /// A layer that it knows.
    async fn layer(&self, seed: u32) -> (BlobRef, u32) {
        let blob = self.registry.put_blob(Sample::new(seed).blob);
        let Phase::Ready(known) = finished(self.ingester.ask(&blob).await.unwrap()).await else {
            panic!("it is known")
        };
        (blob, known.header().geometry().chunk_count())
    }

    async fn line(&self, port: u16) -> Line {
        let mut line = self.call(Hello { address: format!(":{port}"), ..Hello::default() }).await.unwrap();
        let from_seeder::Message::Welcome(welcome) = line.next().await else { panic!("no welcome") };
        assert_eq!(welcome.address, format!("127.0.0.1:{port}"));
        assert!(welcome.time.abs_diff(crate::grant::seconds(SystemTime::now())) < 60, "it says what its clock shows");
        line
    }

    async fn call(&self, hello: Hello) -> Result<Line, Status> {
        self.call_with(to_seeder::Message::Hello(hello)).await
    }

    async fn call_with(&self, first: to_seeder::Message) -> Result<Line, Status> {
        let mut client = TrackerClient::connect(format!("http://{}", self.address)).await.unwrap();
        let (sender, messages) = mpsc::channel(1024);
        sender.send(ToSeeder { message: Some(first) }).await.unwrap();
        let told = client.join(ReceiverStream::new(messages)).await?.into_inner();
        Ok(Line { sender, told })
    }

    /// Status of a request for chunks, its headers `drover-retry-ms` and `drover-peers`, and the bytes that came.
    async fn get(&self, blob: Digest, what: &str, port: Option<u16>) -> (u16, Option<u64>, String, usize) {
        let mut request = reqwest::Client::new().get(format!("http://{}/v1/layers/{blob}/{what}", self.address));
        if let Some(port) = port {
            request = request.header("drover-peer", format!("127.0.0.1:{port}")).header("drover-priority", "demand");
        }
        let response = request.send().await.unwrap();
        let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let retry = header("drover-retry-ms").map(|text| text.parse().unwrap());
        let (status, peers) = (response.status().as_u16(), header("drover-peers").unwrap_or_default());
        (status, retry, peers, response.bytes().await.unwrap().len())
    }

    async fn until(&self, what: &str, is: impl Fn(&Tracker) -> bool) {
        let waiting = async {
            while !is(&self.tracker) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "{what}");
    }
}

/// A node's end.
struct Line {
    sender: mpsc::Sender<ToSeeder>,
    told: Streaming<FromSeeder>,
}

impl Line {
    async fn say(&self, message: to_seeder::Message) {
        let _ = self.sender.send(ToSeeder { message: Some(message) }).await;
    }

    async fn join(&self, blob: Digest, runs: &[u32]) {
        self.say(to_seeder::Message::Join(haves(blob, runs))).await;
    }

    async fn next(&mut self) -> from_seeder::Message {
        let next = tokio::time::timeout(PATIENCE, self.told.message()).await.expect("something is told");
        next.unwrap().expect("the line goes on").message.unwrap()
    }

    async fn end(mut self) -> Option<Status> {
        loop {
            match tokio::time::timeout(PATIENCE, self.told.message()).await.expect("the line ends") {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status),
            }
        }
    }

    async fn introduced(&mut self) -> Introduce {
        loop {
            if let from_seeder::Message::Introduce(introduce) = self.next().await {
                return introduce;
            }
        }
    }

    async fn assigned(&mut self) -> Assign {
        loop {
            if let from_seeder::Message::Assign(assign) = self.next().await {
                return assign;
            }
        }
    }
}

fn haves(blob: Digest, runs: &[u32]) -> Haves {
    Haves { blob: blob.as_bytes().to_vec(), runs: runs.to_vec(), fills: None }
}

/// Small corrections are no step, wherever they add up to one.
#[test]
fn lines_end_when_the_clock_is_set() {
    let (mut book, now, by) = (Book::new(1), Duration::ZERO, Duration::from_secs);
    let start = SystemTime::UNIX_EPOCH + by(1_000_000_000);
    let enter = |book: &mut Book| {
        let address = SocketAddr::from(([10, 0, 0, 1], 7000));
        let member = Member { address, zone: String::new() };
        book.enter(now, book::Hello { member, from: address.ip(), leech: false }).unwrap()
    };
    book.note_clock(now, start, by(5));
    let mut entered = enter(&mut book);
    for (shown, since_boot) in [(start + by(95), by(100)), (start + by(1001), by(1000)), (start + by(1989), by(2000))] {
        book.note_clock(now, shown, since_boot);
        assert!(book.lines() == 1 && entered.cut.try_recv().is_err());
    }
    book.note_clock(now, start - by(600), by(3000));
    assert_eq!(book.lines(), 0);
    assert_eq!(entered.cut.try_recv().unwrap().code(), Code::Unavailable);
    enter(&mut book);
    book.note_clock(now, start - by(595), by(3001));
    assert_eq!(book.lines(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_introduced_and_first_copies_assigned() {
    let seeder = Seeder::start().await;
    let (blob, count) = seeder.layer(1).await;
    let mut one = seeder.line(4001).await;
    one.join(blob.digest, &[]).await;
    let Assign { blob: of, first, end, from } = one.assigned().await;
    assert_eq!((of.as_slice(), first, from), (blob.digest.as_bytes().as_slice(), 0, None));
    assert!(end > 0 && end <= count);

    let hello = Hello { address: "127.0.0.1:4002".to_owned(), zone: "eu-1".to_owned(), leech: false };
    let mut other = seeder.call(hello).await.unwrap();
    other.join(blob.digest, &[]).await;
    let introduced = one.introduced().await.peer.unwrap();
    assert_eq!((introduced.address.as_str(), introduced.zone.as_str()), ("127.0.0.1:4002", "eu-1"));
    assert_eq!(other.introduced().await.peer.unwrap().address, "127.0.0.1:4001");
    assert_eq!(seeder.tracker.members(), [(blob.digest, 2)]);

    // The end of a line is that of its memberships.
    drop(one);
    seeder.until("the line ends", |tracker| tracker.members() == [(blob.digest, 1)]).await;
    other.say(to_seeder::Message::Leave(blob.digest.as_bytes().to_vec())).await;
    seeder.until("nobody is left", |tracker| tracker.members().is_empty() && tracker.lines() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn first_copies_go_to_who_says_that_it_fills() {
    use to_seeder::Message::{Join, Report};

    let seeder = Seeder::start().await;
    let (blob, _) = seeder.layer(1).await;
    let mut line = seeder.line(4001).await;
    let says = |fills| Haves { fills: Some(fills), ..haves(blob.digest, &[]) };
    line.say(Join(says(false))).await;
    line.say(to_seeder::Message::Ping(Ping {})).await;
    assert_eq!(line.next().await, from_seeder::Message::Pong(Pong {}), "nothing is assigned");
    line.say(Report(says(true))).await;
    assert!(matches!(line.next().await, from_seeder::Message::Assign(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_chunk_is_assigned_and_others_are_pointed_to_who_got_it() {
    let seeder = Seeder::start().await;
    let (blob, count) = seeder.layer(2).await;
    let (mut line, other) = (seeder.line(4001).await, seeder.line(4002).await);
    line.join(blob.digest, &[]).await;
    let mut fetched = BTreeSet::new();
    while (fetched.len() as u32) < count {
        let Assign { first, end, .. } = line.assigned().await;
        let (status, .., bytes) = seeder.get(blob.digest, &format!("chunks/{first}-{end}"), Some(4001)).await;
        assert_eq!(status, 200);
        assert!(bytes > 0);
        fetched.extend(first..end);
    }
    other.join(blob.digest, &[]).await;
    seeder.until("both are members", |tracker| tracker.members() == [(blob.digest, 2)]).await;
    line.say(to_seeder::Message::Report(haves(blob.digest, &[0, count]))).await;
    let named = async {
        loop {
            let (status, retry, peers, _) = seeder.get(blob.digest, "chunks/5-6", Some(4002)).await;
            // Long ago on a slow machine: it is given anew, once.
            if status == 503 {
                assert!(retry.unwrap() > 0);
                break peers;
            }
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, named).await.unwrap(), "127.0.0.1:4001");
    // Who is no member is not sent away.
    for stranger in [None, Some(4003)] {
        assert_eq!(seeder.get(blob.digest, "chunks/5-6", stranger).await.0, 200);
    }
}

/// What the seeder gave out, and whom each node met.
#[derive(Default)]
struct Meeting {
    given: Vec<Range<u32>>,
    met: BTreeMap<u16, BTreeSet<String>>,
}

#[tokio::test(flavor = "multi_thread")]
async fn thirty_nodes_that_join_at_once_share_the_first_copies() {
    const NODES: u16 = 30;
    let seeder = Arc::new(Seeder::start().await);
    let (blob, count) = seeder.layer(10).await;
    let shared = Arc::new(Mutex::new(Meeting::default()));
    let mut nodes = tokio::task::JoinSet::new();
    for port in 5000..5000 + NODES {
        let (seeder, shared) = (Arc::clone(&seeder), Arc::clone(&shared));
        nodes.spawn(async move {
            let mut line = seeder.line(port).await;
            line.join(blob.digest, &[]).await;
            loop {
                match line.next().await {
                    from_seeder::Message::Introduce(introduced) => {
                        let met = introduced.peer.unwrap().address;
                        shared.lock().met.entry(port).or_default().insert(met);
                    }
                    from_seeder::Message::Assign(Assign { first, end, from: None, .. }) => {
                        let what = format!("chunks/{first}-{end}");
                        if seeder.get(blob.digest, &what, Some(port)).await.0 == 200 {
                            shared.lock().given.push(first..end);
                            line.say(to_seeder::Message::Report(haves(blob.digest, &[first, end]))).await;
                        }
                    }
                    _ => {}
                }
            }
        });
    }
    let all_given =
        |shared: &Meeting| shared.given.iter().cloned().flatten().collect::<BTreeSet<u32>>().len() as u32 == count;
    let is_over = |tracker: &Tracker| {
        let shared = shared.lock();
        all_given(&shared)
            && shared.met.len() == usize::from(NODES)
            && tracker.members() == [(blob.digest, usize::from(NODES))]
    };
    seeder.until("all join, everybody meets somebody, and every chunk is given", is_over).await;
    let shared = shared.lock();
    // A chunk that is not reported within seconds is given anew.
    let given: u32 = shared.given.iter().map(|run| run.end - run.start).sum();
    assert!(given <= 2 * count, "{given} chunks of {count}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_has_is_not_assigned() {
    let seeder = Seeder::start().await;
    let (blob, count) = seeder.layer(3).await;
    let mut line = seeder.line(4001).await;
    line.join(blob.digest, &[0, count - 1]).await;
    let Assign { first, end, .. } = line.assigned().await;
    assert_eq!(first..end, count - 1..count);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_not_known_is_said_to_be_so() {
    let seeder = Seeder::start().await;
    let mut line = seeder.line(4001).await;
    let blob = Digest::of(b"nobody knows it");
    line.join(blob, &[]).await;
    assert_eq!(line.next().await, from_seeder::Message::Unknown(blob.as_bytes().to_vec()));
    assert!(seeder.tracker.members().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_lost_is_not_known_to_its_members_any_more() {
    let seeder = Seeder::start().await;
    let (blob, _) = seeder.layer(4).await;
    let mut line = seeder.line(4001).await;
    line.join(blob.digest, &[]).await;
    line.assigned().await;
    seeder.ingester.forget(blob.digest).await;
    assert_eq!(seeder.get(blob.digest, "chunks/0-1", Some(4001)).await.0, 404);
    while line.next().await != from_seeder::Message::Unknown(blob.digest.as_bytes().to_vec()) {}
    assert!(seeder.tracker.members().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_line_replaces_the_first() {
    let seeder = Seeder::start().await;
    let (blob, _) = seeder.layer(5).await;
    let first = seeder.line(4001).await;
    first.join(blob.digest, &[]).await;
    seeder.until("it joins", |tracker| tracker.members() == [(blob.digest, 1)]).await;
    let second = seeder.line(4001).await;
    assert_eq!(first.end().await.unwrap().code(), Code::Aborted);
    assert_eq!((seeder.tracker.lines(), seeder.tracker.members()), (1, Vec::new()));
    second.join(blob.digest, &[]).await;
    seeder.until("it joins", |tracker| tracker.members() == [(blob.digest, 1)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_ends_a_line_and_nothing_else() {
    use to_seeder::Message::{Accuse, Hello as Says, Join, Leave, Report};
    let seeder = Seeder::start().await;
    let (blob, count) = seeder.layer(6).await;
    let witness = seeder.line(4000).await;
    witness.join(blob.digest, &[0, count]).await;
    for (address, zone) in [
        ("", ""),
        (":0", ""),
        ("example.com:7071", ""),
        ("127.0.0.1", ""),
        ("224.0.0.1:7071", ""),
        ("255.255.255.255:7071", ""),
        (":4001", "a zone"),
        (":4001", &"z".repeat(65)),
    ] {
        let hello = Hello { address: address.to_owned(), zone: zone.to_owned(), leech: false };
        let refused = seeder.call(hello).await.err().map(|status| status.code());
        assert_eq!(refused, Some(Code::InvalidArgument), "{address:?} {zone:?}");
    }
    let early = seeder.call_with(Join(haves(blob.digest, &[]))).await.err();
    assert_eq!(early.map(|status| status.code()), Some(Code::InvalidArgument));
    for garbage in [
        Says(Hello { address: ":4001".to_owned(), ..Hello::default() }),
        Join(haves(blob.digest, &[3])),
        Join(haves(blob.digest, &[3, 3])),
        Join(haves(blob.digest, &[0, count + 1])),
        Join(Haves { blob: vec![1; 31], runs: Vec::new(), fills: None }),
        Report(haves(blob.digest, &[5, 6, 0, 1])),
        Leave(vec![0; 33]),
        Accuse("nobody".to_owned()),
    ] {
        let line = seeder.line(4001).await;
        line.say(garbage.clone()).await;
        let end = line.end().await.map(|status| status.code());
        assert_eq!(end, Some(Code::InvalidArgument), "{garbage:?}");
    }
    let line = seeder.line(4001).await;
    line.say(Join(haves(blob.digest, &vec![1 << 30; 1 << 18]))).await;
    assert_eq!(line.end().await.map(|status| status.code()), Some(Code::OutOfRange), "a message of 1.3 MB");
    seeder.until("the others are gone", |tracker| tracker.lines() == 1).await;
    assert_eq!(seeder.tracker.members(), [(blob.digest, 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_of_one_machine_are_bounded() {
    let seeder = Seeder::start().await;
    let mut lines = Vec::new();
    for port in 5000..5064 {
        lines.push(seeder.line(port).await);
    }
    let refused = seeder.call(Hello { address: ":6000".to_owned(), ..Hello::default() }).await.err();
    assert_eq!(refused.map(|status| status.code()), Some(Code::ResourceExhausted));
    drop(lines.pop());
    seeder.until("a line ends", |tracker| tracker.lines() == 63).await;
    seeder.line(6000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_end_when_the_seeder_stops() {
    let seeder = Seeder::start().await;
    let line = seeder.line(4001).await;
    drop(seeder._stop);
    assert_eq!(line.end().await.unwrap().code(), Code::Unavailable);
}

/// The blob comes slowly: one node of the mesh follows its ingest, then another, and whoever is in no mesh.
#[tokio::test(flavor = "multi_thread")]
async fn one_node_at_a_time_follows_an_ingest() {
    let seeder = Seeder::start().await;
    seeder.registry.set(|behaviour| behaviour.pause = Duration::from_millis(100));
    let blob = seeder.registry.put_blob(Sample::new(7).blob);
    let mut phase = seeder.ingester.ask(&blob).await.unwrap();
    let client = reqwest::Client::new();
    let follow = async |port: Option<u16>| {
        let mut request = client.get(format!("http://{}/v1/layers/{}/follow", seeder.address, blob.digest));
        if let Some(port) = port {
            request = request.header("drover-peer", format!("127.0.0.1:{port}"));
        }
        request.send().await.unwrap()
    };
    let first = loop {
        match follow(Some(4001)).await {
            response if response.status() == 404 => {
                assert!(matches!(&*phase.borrow_and_update(), Phase::Running(_)), "the ingest ended");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            response => break response,
        }
    };
    assert_eq!(first.status(), 200);
    let turned = follow(Some(4002)).await;
    assert_eq!(turned.status(), 503);
    assert!(turned.headers().contains_key("drover-retry-ms"));
    assert_eq!(follow(None).await.status(), 200);
    drop(first);
    let next = async {
        while follow(Some(4002)).await.status() != 200 {
            assert!(matches!(&*phase.borrow_and_update(), Phase::Running(_)), "the ingest was too fast");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, next).await.expect("the next may follow");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_is_sent_than_the_limit_allows() {
    let seeder = Seeder::with_upload(2 << 20).await;
    let (blob, count) = seeder.layer(8).await;
    let began = Instant::now();
    let mut sent = 0;
    for first in [0, count / 3, count / 2] {
        let (status, .., bytes) = seeder.get(blob.digest, &format!("chunks/{first}-{}", first + count / 3), None).await;
        match status {
            200 => sent += bytes,
            503 => tokio::time::sleep(Duration::from_secs(1)).await,
            other => panic!("{other}"),
        }
    }
    let allowed = (began.elapsed().as_secs_f64() + 0.2) * f64::from(2 << 20) + f64::from(64 << 10);
    assert!(sent > 0 && (sent as f64) <= allowed, "{sent} of {allowed}");
}

/// A node that gives index sections, or wrong ones.
struct Giver {
    ingester: Ingester,
    lies: bool,
    given: Arc<AtomicUsize>,
}

impl LayerServer for Giver {
    fn header(&self, blob: Digest) -> BoxFuture<'_, Result<Bytes, ServeError>> {
        self.ingester.header(blob)
    }

    fn section(&self, blob: Digest, section: Section, asker: Asker) -> BoxFuture<'_, Result<SectionBody, ServeError>> {
        self.given.fetch_add(1, Ordering::Relaxed);
        let section = if self.lies { Section::Entries } else { section };
        self.ingester.section(blob, section, asker)
    }

    fn chunks(&self, _: Digest, _: Range<u32>, _: Asker) -> BoxFuture<'_, Result<Frames, ServeError>> {
        Box::pin(async { Err(ServeError::Unknown) })
    }

    fn follow(&self, _: Digest, _: u32, _: Asker) -> BoxFuture<'_, Result<Frames, ServeError>> {
        Box::pin(async { Err(ServeError::Unknown) })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn index_sections_come_from_who_has_the_layer() {
    let seeder = Seeder::with(|ingester, tracker| {
        let mut gate = Gate::new(ingester, tracker, 0);
        gate.section_small = 0;
        gate
    })
    .await;
    let (blob, count) = seeder.layer(9).await;
    let header = seeder.ingester.known(blob.digest).await.unwrap().header().clone();
    let client = |port: u16| {
        let addresses = SeederAddresses::new([seeder.address.to_string()]).unwrap();
        let client = seeder::Client::new(&addresses, Security::Off, seeder::Options::default());
        client.own_address().set(Some(SocketAddr::from(([127, 0, 0, 1], port))));
        client
    };
    let _asker = seeder.line(4002).await;
    let fetch = async || {
        let section = Section::ChunkDigests;
        let bytes = client(4002).section(&header, section).await.unwrap();
        check_section(&header, section, &bytes).unwrap();
    };
    // Nobody else has it.
    fetch().await;
    for lies in [false, true] {
        let given = Arc::new(AtomicUsize::new(0));
        let giver = Giver { ingester: seeder.ingester.clone(), lies, given: Arc::clone(&given) };
        let listener = Listener::bind("127.0.0.1:0", &Security::Off, Limits::default()).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = CancellationToken::new();
        let _stop = stop.clone().drop_guard();
        tokio::spawn(listener.serve(serve::router(Arc::new(giver), 8), stop));
        let line = seeder.line(port).await;
        line.join(blob.digest, &[0, count]).await;
        seeder.until("it joins", |tracker| tracker.members() == [(blob.digest, 1)]).await;
        fetch().await;
        assert_eq!(given.load(Ordering::Relaxed), 1, "lies: {lies}");
        // Who is on no line is not sent away.
        client(4003).section(&header, Section::ChunkDigests).await.unwrap();
        assert_eq!(given.load(Ordering::Relaxed), 1);
        line.say(to_seeder::Message::Leave(blob.digest.as_bytes().to_vec())).await;
        seeder.until("it leaves", |tracker| tracker.members().is_empty()).await;
    }
}
