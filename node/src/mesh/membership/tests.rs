use layer::ChunkIndex;
use tokio::sync::mpsc::Receiver;

use super::*;
use crate::config::SeederAddresses;
use crate::grant::Demand;
use crate::mesh::OwnAddress;
use crate::mesh::standing::Watch;
use crate::node::{Node, NodeConfig};
use crate::security::Security;
use crate::seeder;
use crate::source::{BoxFuture, ChunkSink, Priority, SourceError};
use crate::store::memory::MemoryDisk;
use crate::store::tests::Subject;

const NOW: Duration = Duration::from_secs(100);
const ME: &str = "127.0.0.1:1";
const OTHER: &str = "127.0.0.1:2";

/// What stands for the seeders in the list of a layer's sources; nobody asks it.
#[derive(Debug)]
struct Seeders;

impl Source for Seeders {
    fn kind(&self) -> SourceKind {
        SourceKind::Seeder
    }

    fn label(&self) -> String {
        "seeder".to_owned()
    }

    fn fetch<'a>(
        &'a self,
        _: Range<u32>,
        _: Priority,
        _: &'a mut dyn ChunkSink,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async { panic!("it is not asked") })
    }
}

/// A membership with one layer, whose time stands still.
struct Scene {
    membership: Membership,
    swarm: Swarm,
    inbox: Inbox,
    layer: Arc<Layer>,
    _node: Arc<Node>,
}

impl Scene {
    fn new() -> Self {
        let config = NodeConfig { share: true, fill: false, ..NodeConfig::new("/store") };
        let node = Node::open_on(Arc::new(MemoryDisk::default()), config, "a").unwrap();
        let subject = Subject::new(100_000, 7);
        let layer = node.insert(&subject.parts()).unwrap();
        layer.add_source(Arc::new(Seeders));
        assert!(layer.add_chunk(ChunkIndex(3), subject.chunk(3)));
        let mut swarm = Swarm::new(swarm::Config::default(), 1);
        swarm.add_layer(layer.key(), layer.geometry());
        for (id, (_, source)) in layer.sources() {
            swarm.add_source(layer.key(), id, source.kind(), Vec::new());
        }
        // Nobody listens where the lines go: their events are made here.
        let (events, _) = mpsc::channel(1);
        let seeders = seeder::Client::new(&SeederAddresses::default(), Security::Off, seeder::Options::default());
        let lines = Lines {
            hello: api::Hello::default(),
            security: Security::Off,
            me: OwnAddress::default(),
            grants: seeders.grants().clone(),
            demand: Demand::of_node(&Security::Off, "/nonexistent/grants".into()),
            events,
        };
        let membership = Membership::new(Zone::named(""), false, lines, Refused::default(), Watch::default());
        // Its first number is that of the seeders, as the node has it.
        let inbox = Inbox::default();
        inbox.source_id(SourceKind::Seeder, "seeder".to_owned());
        Self { membership, swarm, inbox, layer, _node: node }
    }

    fn blob(&self) -> Digest {
        self.layer.header().blob()
    }

    fn event(&mut self, event: Event) -> bool {
        self.membership.on_event(NOW, &mut self.swarm, &self.inbox, event)
    }

    fn seeder_up(&mut self, seeder: &str) -> Receiver<api::ToSeeder> {
        let (outlet, told) = mpsc::channel(16);
        let me = ME.parse().unwrap();
        if self.event(Event::SeederUp { seeder: seeder.to_owned(), me, outlet }) {
            self.membership.look_at(NOW, &mut self.swarm, &self.layer);
        }
        told
    }

    fn seeder_down(&mut self, seeder: &str) {
        self.event(Event::SeederDown { seeder: seeder.to_owned() });
    }

    fn seeder_says(&mut self, seeder: &str, message: from_seeder::Message) {
        self.event(Event::FromSeeder { seeder: seeder.to_owned(), message });
    }

    fn introduce(&mut self, address: &str) {
        let peer = Some(api::Peer { address: address.to_owned(), zone: String::new() });
        let introduce = api::Introduce { blob: self.blob().as_bytes().to_vec(), peer };
        self.seeder_says("a", from_seeder::Message::Introduce(introduce));
    }

    fn line_up(&mut self, address: &str) -> Receiver<api::ToNeighbour> {
        let (outlet, told) = mpsc::channel(16);
        self.event(Event::NeighbourUp { address: address.parse().unwrap(), outlet });
        told
    }

    /// A machine calls; gives whether it is heard.
    fn called(&mut self, address: SocketAddr, call: u64, is_own: bool) -> bool {
        let (taken, mut is_taken) = oneshot::channel();
        let caller = Member { address, zone: String::new() };
        self.event(Event::CallerUp { caller, call, is_own, taken });
        is_taken.try_recv().unwrap_or(false)
    }

    fn neighbours(&self) -> Vec<SocketAddr> {
        self.membership.neighbours.keys().copied().collect()
    }
}

fn joins(told: &mut Receiver<api::ToSeeder>) -> Vec<&'static str> {
    let mut words = Vec::new();
    while let Ok(told) = told.try_recv() {
        words.push(match told.message.unwrap() {
            to_seeder::Message::Join(haves) => {
                assert_eq!(haves.runs, [3, 4], "all that is here is told");
                "join"
            }
            to_seeder::Message::Leave(_) => "leave",
            other => panic!("{other:?}"),
        });
    }
    words
}

/// Of two names, the one whose share the blob is, and the other.
fn by_share(blob: Digest) -> [&'static str; 2] {
    let mut names = ["a", "b"];
    names.sort_by_key(|name| std::cmp::Reverse(crate::seeder::share(name, blob)));
    names
}

#[tokio::test]
async fn a_layer_is_joined_where_it_belongs_and_moves_with_the_seeders() {
    let mut scene = Scene::new();
    let [owner, other] = by_share(scene.blob());
    let mut at_other = scene.seeder_up(other);
    assert_eq!(joins(&mut at_other), ["join"], "it is the only one");
    let mut at_owner = scene.seeder_up(owner);
    assert_eq!((joins(&mut at_other), joins(&mut at_owner)), (vec!["leave"], vec!["join"]));
    scene.seeder_down(owner);
    assert_eq!(joins(&mut at_other), ["join"]);
    let mut at_owner = scene.seeder_up(owner);
    assert_eq!((joins(&mut at_other), joins(&mut at_owner)), (vec!["leave"], vec!["join"]));
    scene.seeder_down(other);
    assert_eq!(joins(&mut at_owner), [""; 0]);
    scene.membership.forget(scene.layer.key());
    assert_eq!(joins(&mut at_owner), ["leave"]);
}

#[tokio::test]
async fn what_one_seeder_does_not_know_is_joined_at_the_next_until_it_does() {
    let mut scene = Scene::new();
    let blob = scene.blob().as_bytes().to_vec();
    let (unknown, known) = (from_seeder::Message::Unknown(blob.clone()), from_seeder::Message::Known(blob));
    let [owner, other] = by_share(scene.blob());
    let (mut at_owner, mut at_other) = (scene.seeder_up(owner), scene.seeder_up(other));
    assert_eq!((joins(&mut at_owner), joins(&mut at_other)), (vec!["join"], vec![]));
    scene.seeder_says(owner, unknown.clone());
    assert_eq!((joins(&mut at_owner), joins(&mut at_other)), (vec![], vec!["join"]));
    assert_eq!(scene.membership.step(NOW, &scene.swarm), None, "somebody knows it");
    scene.seeder_says(owner, known.clone());
    assert_eq!((joins(&mut at_owner), joins(&mut at_other)), (vec!["join"], vec!["leave"]));

    scene.seeder_says(owner, unknown.clone());
    scene.seeder_says(other, unknown);
    assert_eq!((joins(&mut at_owner), joins(&mut at_other)), (vec![], vec!["join"]));
    assert_eq!(scene.membership.step(NOW, &scene.swarm), Some(NOW + UNKNOWN_PAUSE));
    scene.seeder_says(other, known);
    assert_eq!((joins(&mut at_owner), joins(&mut at_other)), (vec![], vec!["join"]));
    assert_eq!(scene.membership.step(NOW + UNKNOWN_PAUSE, &scene.swarm), None);
}

#[tokio::test]
async fn a_seeder_that_is_late_is_asked_whether_it_lives() {
    let mut scene = Scene::new();
    let mut at_a = scene.seeder_up("a");
    let key = scene.layer.key();
    scene.swarm.want(NOW, key, 8..9, Priority::Demand, NOW + Duration::from_secs(20));
    while scene.swarm.poll_action(NOW).is_some() {}
    let later = NOW + Duration::from_millis(150);
    scene.swarm.handle_timeout(later);
    scene.membership.tell(&mut scene.swarm);
    let said = std::iter::from_fn(|| at_a.try_recv().ok()).filter_map(|said| said.message);
    assert_eq!(said.last(), Some(to_seeder::Message::Ping(api::Ping {})));
    // The answer counts: the seeder is not blamed for being late.
    scene.seeder_says("a", from_seeder::Message::Pong(api::Pong {}));
    scene.swarm.handle_timeout(later + Duration::from_millis(400));
    scene.swarm.want(later, key, 9..10, Priority::Demand, NOW + Duration::from_secs(20));
    assert!(matches!(scene.swarm.poll_action(later), Some(swarm::Action::Fetch { .. })));
}

#[tokio::test]
async fn without_a_word_of_any_seeder_it_is_tried_again() {
    let mut scene = Scene::new();
    let mut at_a = scene.seeder_up("a");
    let blob = scene.blob().as_bytes().to_vec();
    scene.seeder_says("a", from_seeder::Message::Unknown(blob));
    assert_eq!(joins(&mut at_a), ["join"]);
    scene.membership.step(NOW + UNKNOWN_PAUSE / 2, &scene.swarm);
    assert_eq!(joins(&mut at_a), [""; 0]);
    scene.membership.step(NOW + UNKNOWN_PAUSE, &scene.swarm);
    assert_eq!(joins(&mut at_a), ["join"]);
}

#[tokio::test]
async fn a_neighbour_is_told_all_first_and_then_what_comes() {
    let mut scene = Scene::new();
    let _at_a = scene.seeder_up("a");
    scene.introduce(OTHER);
    let mut told = scene.line_up(OTHER);
    let mut runs = move || {
        let Ok(api::ToNeighbour { message: Some(to_neighbour::Message::Haves(haves)) }) = told.try_recv() else {
            return None;
        };
        haves.haves.map(|haves| haves.runs)
    };
    assert_eq!(runs(), Some(vec![3, 4]));
    scene.swarm.on_here(scene.layer.key(), 5);
    scene.swarm.handle_timeout(NOW + Duration::from_secs(1));
    assert!(scene.membership.tell(&mut scene.swarm));
    assert_eq!(runs(), Some(vec![5, 6]));
    // The line breaks: all is told anew.
    scene.event(Event::NeighbourDown { address: OTHER.parse().unwrap() });
    let mut told = scene.line_up(OTHER);
    let Some(to_neighbour::Message::Haves(haves)) = told.try_recv().unwrap().message else {
        panic!("haves come first")
    };
    assert_eq!(haves.haves.unwrap().runs, [3, 4, 5, 6]);
}

#[tokio::test]
async fn who_is_expelled_stays_away() {
    let mut scene = Scene::new();
    let _at_a = scene.seeder_up("a");
    scene.introduce(OTHER);
    scene.introduce(ME);
    assert_eq!(scene.neighbours(), [OTHER.parse().unwrap()], "nobody is its own neighbour");
    scene.seeder_says("a", from_seeder::Message::Expel(OTHER.to_owned()));
    scene.introduce(OTHER);
    assert!(!scene.called(OTHER.parse().unwrap(), 1, true));
    assert!(scene.neighbours().is_empty());
}

#[tokio::test]
async fn only_who_calls_from_its_own_host_becomes_a_neighbour_by_calling() {
    let mut scene = Scene::new();
    let _at_a = scene.seeder_up("a");
    let (address, key) = (OTHER.parse().unwrap(), scene.layer.key());
    let haves = api::Haves { blob: scene.blob().as_bytes().to_vec(), runs: vec![0, 2], fills: None };
    let haves = api::LayerHaves { haves: Some(haves), delegates: Vec::new(), ..api::LayerHaves::default() };
    for (is_own, want) in [(false, 0), (true, 1)] {
        assert_eq!(scene.called(address, 7, is_own), is_own, "who is not heard calls again");
        scene.event(Event::Haves { address, haves: haves.clone() });
        assert_eq!(scene.neighbours().len(), want, "is_own: {is_own}");
    }
    let neighbour = &scene.membership.neighbours[&address];
    assert!(neighbour.layers.contains(&key));
    // The end of an earlier line says nothing of this one; that it could not be called back, neither.
    scene.event(Event::CallerDown { address, call: 6 });
    scene.event(Event::NeighbourGone { address });
    assert_eq!(scene.membership.neighbours[&address].call, Some(7));
    scene.event(Event::CallerDown { address, call: 7 });
    scene.event(Event::NeighbourGone { address });
    assert!(scene.neighbours().is_empty());
}

#[tokio::test]
async fn who_calls_from_another_host_is_heard_once_it_is_introduced() {
    let mut scene = Scene::new();
    let _at_a = scene.seeder_up("a");
    let address = OTHER.parse().unwrap();
    assert!(!scene.called(address, 1, false));
    scene.introduce(OTHER);
    assert!(scene.called(address, 2, false));
    assert_eq!(scene.membership.neighbours[&address].call, Some(2));
}

/// Machines with an address each in 10.0.0.0/24, called by their last number.
fn machine(number: u32) -> SocketAddr {
    format!("10.0.0.{number}:7071").parse().unwrap()
}

impl Scene {
    /// A machine in a zone calls and tells that it has chunk 0.
    fn holder(&mut self, number: u32, zone: &str) {
        let (address, (taken, _is_taken)) = (machine(number), oneshot::channel());
        let caller = Member { address, zone: zone.to_owned() };
        self.event(Event::CallerUp { caller, call: 1, is_own: true, taken });
        let haves = api::Haves { blob: self.blob().as_bytes().to_vec(), runs: vec![0, 1], fills: None };
        self.event(Event::Haves { address, haves: api::LayerHaves { haves: Some(haves), ..Default::default() } });
    }

    fn who_else(&mut self, chunk: u32, asker: Option<SocketAddr>) -> Vec<String> {
        let (answer, mut answered) = oneshot::channel();
        let blob = self.blob();
        self.event(Event::WhoElse { blob, chunk, asker, answer });
        answered.try_recv().unwrap().iter().map(Member::to_string).collect()
    }
}

#[tokio::test]
async fn who_is_sent_away_hears_who_else_has_it() {
    let mut scene = Scene::new();
    let _at_a = scene.seeder_up("a");
    assert_eq!(scene.who_else(0, None), [""; 0]);
    for (number, zone) in [(1, "far"), (2, "near"), (3, "near")] {
        scene.holder(number, zone);
    }
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    assert_eq!(sorted(scene.who_else(0, None)), ["10.0.0.1:7071;far", "10.0.0.2:7071;near", "10.0.0.3:7071;near"]);
    assert_eq!(scene.who_else(1, None), [""; 0], "nobody has that");
    // Those of the asker's zone first, and not itself.
    assert_eq!(scene.who_else(0, Some(machine(2))), ["10.0.0.3:7071;near", "10.0.0.1:7071;far"]);
    // Whoever cannot be reached, or lied, is named no more.
    scene.event(Event::CallerDown { address: machine(3), call: 1 });
    scene.seeder_says("a", from_seeder::Message::Expel(machine(2).to_string()));
    assert_eq!(scene.who_else(0, None), ["10.0.0.1:7071;far"]);
    (4..12).for_each(|number| scene.holder(number, ""));
    let mut named = BTreeSet::new();
    for _ in 0..100 {
        let some = scene.who_else(0, None);
        assert_eq!(some.len(), PEERS_MAX);
        named.extend(some);
    }
    assert_eq!(named.len(), 8, "the load is spread: {named:?}");
}

#[tokio::test]
async fn who_is_named_is_asked_and_neighbours_name_only_some() {
    let mut scene = Scene::new();
    let _at_a = scene.seeder_up("a");
    scene.introduce(OTHER);
    let (key, by) = (scene.layer.key(), scene.membership.neighbours[&OTHER.parse().unwrap()].id);
    let named = |scene: &mut Scene, numbers: Range<u32>, by| {
        let members = numbers.map(|number| Member { address: machine(number), zone: String::new() }).collect();
        let named = Named { layer: key, chunk: 0, members };
        scene.membership.on_named(NOW, &mut scene.swarm, &scene.inbox, &named, by);
    };
    named(&mut scene, 1..2, Some(by));
    let id = scene.membership.neighbours[&machine(1)].id;
    assert_eq!(scene.swarm.holders(key, 0, Zone::named(""), None, 9), [id]);
    named(&mut scene, 1..100, Some(by));
    assert_eq!(scene.neighbours().len(), NAMED_MAX);
    // Who parted meanwhile is no seeder either.
    named(&mut scene, 1..100, None);
    assert_eq!(scene.neighbours().len(), NAMED_MAX);
    // A seeder knows whom it introduces.
    let seeder = scene.membership.members[&key].seeder;
    named(&mut scene, 1..100, Some(seeder));
    assert_eq!(scene.neighbours().len(), 100);
}
