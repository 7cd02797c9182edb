//! What machines of the mesh say to each other: messages on lines, requests for chunks, and how they are turned down.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, stream};
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};
use layer::index::Section;
use layer::{Digest, Geometry};
use node::mesh::tracker::offline::Offline;
use node::mesh::{Asker, Turned, runs};
use node::serve::{self, Frames, LayerServer, SectionBody, ServeError};
use node::source::BoxFuture;
use prost::Message as _;
use proto::drover::mesh::v1::{ToNeighbour, ToSeeder, from_seeder, to_neighbour};
use swarm::{
    Action, Config, Delegate, LayerKey, Outcome, PeerId, Priority, SourceId, SourceKind, Swarm, Verdict, Zone,
};
use tower::ServiceExt;

/// Chunks of the layer that all talk about.
const CHUNKS: u32 = 64;
/// Longest part of an input that is one message.
const MESSAGE_LEN_MAX: usize = 255;

/// Input: one byte that says what the rest is: messages to a seeder, messages to a neighbour, a request for chunks, or the head of an
/// answer.
pub fn mesh(input: &[u8]) {
    let Some((choice, rest)) = input.split_first() else { return };
    match choice % 4 {
        0 => to_seeder(rest),
        1 => to_neighbour(rest),
        2 => request(rest),
        _ => answer(rest),
    }
}

/// The digest of the layer's blob.
pub(crate) fn blob() -> Digest {
    Digest::from_bytes([7; 32])
}

/// Messages, each behind a byte that says on which line, and its length.
fn messages(mut rest: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let ([line, len], behind) = rest.split_first_chunk::<2>()?;
        let (message, next) = behind.split_at(usize::from(*len).min(behind.len()).min(MESSAGE_LEN_MAX));
        rest = next;
        Some((*line, message))
    })
}

/// The tracker never gives out what is no part of the layer, and names only machines.
fn to_seeder(input: &[u8]) {
    let geometry = Geometry::new(u64::from(CHUNKS) << 17, 17).expect("a small device");
    let mut tracker = Offline::new([(blob(), geometry)]);
    for (at, (line, message)) in messages(input).enumerate() {
        let now = Duration::from_millis(100) * at as u32;
        let from = IpAddr::V4(Ipv4Addr::new(10, 0, 0, line % 8));
        tracker.pass(now);
        match ToSeeder::decode(message) {
            Ok(message) => drop(tracker.hear(now, line % 8, from, message)),
            Err(_) => {
                let asker =
                    Asker { ip: Some(from), peer: Some(SocketAddr::new(from, 7071)), priority: Priority::Demand };
                tracker.request(now, blob(), u32::from(line) % CHUNKS..CHUNKS, &asker);
            }
        }
        for told in tracker.told() {
            match told.message.expect("a seeder says something") {
                from_seeder::Message::Assign(assign) => {
                    assert!(assign.first < assign.end && assign.end <= CHUNKS);
                    assert_eq!(assign.blob, blob().as_bytes());
                }
                from_seeder::Message::Introduce(introduce) => {
                    let address = introduce.peer.expect("somebody").address;
                    let address: SocketAddr = address.parse().expect("an address");
                    assert!(address.port() != 0 && !address.ip().is_unspecified() && !address.ip().is_multicast());
                }
                _ => {}
            }
        }
    }
}

/// Whatever neighbours say that they have, only what the layer has is asked for, and each chunk comes.
fn to_neighbour(input: &[u8]) {
    const LAYER: LayerKey = LayerKey(1);
    const SEEDER: SourceId = SourceId(1);
    let geometry = Geometry::new(u64::from(CHUNKS) << 17, 17).expect("a small device");
    let mut swarm = Swarm::new(Config::default(), 7);
    swarm.add_layer(LAYER, geometry);
    swarm.open_mesh(Duration::ZERO, LAYER, PeerId(1), Zone(1), 5, []);
    swarm.add_source(LAYER, SEEDER, SourceKind::Seeder, Vec::new());
    swarm.want(Duration::ZERO, LAYER, 0..CHUNKS, Priority::Demand, Duration::from_secs(60));
    let mut missing: BTreeSet<u32> = (0..CHUNKS).collect();
    let mut now = Duration::ZERO;
    let mut act = |swarm: &mut Swarm, now: Duration| {
        swarm.handle_timeout(now);
        while let Some(action) = swarm.poll_action(now) {
            let Action::Fetch { fetch, source, run, .. } = action else { continue };
            assert!(run.start < run.end && run.end <= CHUNKS);
            if source == SEEDER {
                for chunk in run {
                    swarm.on_chunk(now, fetch, chunk, Verdict::Verified);
                    missing.remove(&chunk);
                }
                swarm.on_end(now, fetch, Outcome::Done);
            } else {
                swarm.on_end(now, fetch, Outcome::Missing { reason: "not here".into() });
            }
        }
        while swarm.poll_message().is_some() {}
        missing.is_empty()
    };
    for (line, message) in messages(input) {
        now += Duration::from_millis(20);
        let Ok(ToNeighbour { message: Some(message) }) = ToNeighbour::decode(message) else { continue };
        let id = SourceId(10 + u64::from(line % 4));
        match message {
            to_neighbour::Message::Hello(hello) => {
                swarm.add_peer(now, LAYER, id, PeerId(id.0), Zone::named(&hello.zone))
            }
            to_neighbour::Message::Haves(told) => {
                let delegates = told.delegates.iter();
                let delegates: Vec<Delegate> = delegates
                    .map(|told| Delegate { peer: PeerId(told.id), zone: Zone(told.zone), beat: told.beat })
                    .collect();
                if let Some(runs) = runs::decode(&told.haves.unwrap_or_default().runs) {
                    swarm.on_haves(now, LAYER, id, &runs, &delegates);
                }
            }
        }
        act(&mut swarm, now);
    }
    for _ in 0..600 {
        now += Duration::from_millis(100);
        if act(&mut swarm, now) {
            return;
        }
    }
    panic!("what the seeder has does not come");
}

/// Gives the same bytes for everything.
struct Server;

impl LayerServer for Server {
    fn header(&self, _: Digest) -> BoxFuture<'_, Result<Bytes, ServeError>> {
        Box::pin(async { Ok(Bytes::from_static(b"header")) })
    }

    fn section(&self, _: Digest, _: Section, _: Asker) -> BoxFuture<'_, Result<SectionBody, ServeError>> {
        static FILE: LazyLock<Arc<File>> = LazyLock::new(|| Arc::new(File::open("/dev/zero").expect("a device")));
        Box::pin(async { Ok(SectionBody { file: Arc::clone(&FILE), size: 1000, held: None }) })
    }

    fn chunks(&self, _: Digest, run: Range<u32>, asker: Asker) -> BoxFuture<'_, Result<Frames, ServeError>> {
        assert!(run.start < run.end);
        let turned = Turned { retry_after: Duration::from_millis(20), peers: Vec::new() };
        Box::pin(async move {
            match asker.priority {
                Priority::Readahead => Err(ServeError::Busy(turned)),
                _ if run.end > CHUNKS => Err(ServeError::OutOfRange),
                _ => Ok(Frames { len: Some(3), chunk_log2: Some(17), stream: Box::pin(stream::empty()) }),
            }
        })
    }

    fn follow(&self, _: Digest, _: u32, _: Asker) -> BoxFuture<'_, Result<Frames, ServeError>> {
        Box::pin(async { Err(ServeError::NotYet) })
    }
}

/// A line with a path, then headers, one on each line.
fn request(input: &[u8]) {
    let mut lines = input.split(|byte| *byte == b'\n');
    let Some(Ok(mut request)) = lines.next().map(|path| Request::get(path).body(axum::body::Body::empty())) else {
        return;
    };
    request.headers_mut().extend(lines.filter_map(header));
    let is_of_layer = request.uri().path().starts_with("/v1/layers/");
    let response = serve::router(Arc::new(Server), 8).oneshot(request).now_or_never().expect("nothing is waited for");
    let status = response.expect("routers do not fail").status();
    assert!(!status.is_server_error() || status == StatusCode::SERVICE_UNAVAILABLE, "{status}");
    assert!(is_of_layer || !status.is_success() || status == StatusCode::OK);
}

/// Headers of an answer, one on each line.
fn answer(input: &[u8]) {
    let headers: HeaderMap = input.split(|byte| *byte == b'\n').filter_map(header).collect();
    if let Some(turned) = Turned::read(&headers) {
        assert!(turned.retry_after <= Duration::from_secs(60) && turned.peers.len() <= 4);
        let mut again = HeaderMap::new();
        turned.write(&mut again);
        assert_eq!(Turned::read(&again), Some(turned));
    }
    let asker = Asker::read(None, &headers);
    if let Some(peer) = asker.peer {
        let mut again = HeaderMap::new();
        Asker::write(peer, asker.priority, &mut again);
        assert_eq!(Asker::read(None, &again), asker);
    }
}

fn header(line: &[u8]) -> Option<(HeaderName, HeaderValue)> {
    let at = line.iter().position(|byte| *byte == b':')?;
    let value = line[at + 1..].trim_ascii();
    Some((HeaderName::from_bytes(&line[..at]).ok()?, HeaderValue::from_bytes(value).ok()?))
}
