//! Who is on a line with which layers. What [`swarm::Tracker`] decides goes into the lines' queues.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::{Duration, SystemTime};

use layer::{Digest, Geometry};
use proto::drover::mesh::v1::{Assign, FromSeeder, Introduce, Peer, Pong, Welcome, from_seeder};
use swarm::{Answer, LayerKey, Newcomer, PeerId, TrackerAction, TrackerConfig, Zone};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::mesh::asking::PEERS_MAX;
use crate::mesh::{Asker, Member, Turned};

/// Messages that wait for a node; one that lets more wait is cut off. Enough for all that others' joins bring while it takes
/// nothing for a moment.
pub(super) const QUEUE_MAX: usize = 4096;
/// Most lines from one address of the network: more than one only where nodes share a machine.
const LINES_PER_IP_MAX: usize = 64;
/// Most lines of all.
const LINES_MAX: usize = 8192;
/// Most layers of one node; it gets the others without neighbours.
const LAYERS_PER_LINE_MAX: usize = 4096;

/// What goes to a node, and at last perhaps why no more.
pub(super) type Told = Result<FromSeeder, Status>;

/// Who calls.
#[derive(Clone, Debug)]
pub(super) struct Hello {
    /// As others are to be told of it.
    pub(super) member: Member,
    /// It gives nothing.
    pub(super) leech: bool,
    /// Where its line comes from.
    pub(super) from: IpAddr,
}

/// A line, as long as it is not replaced or cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LineId {
    peer: PeerId,
    number: u64,
}

/// A line that was entered.
#[derive(Debug)]
pub(super) struct Entered {
    pub(super) line: LineId,
    /// What it is told.
    pub(super) told: mpsc::Receiver<Told>,
    /// The same queue's other end.
    pub(super) queue: mpsc::Sender<Told>,
    /// Says that it is cut, and why.
    pub(super) cut: oneshot::Receiver<Status>,
}

/// How far this machine's clock may come to be from what nodes were told. Grants bear three times as much
/// ([`CLOCK_SKEW`](crate::grant::CLOCK_SKEW)).
const CLOCK_STEP: Duration = Duration::from_secs(10);

/// The answer to a request for chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// The asker is no member of the layer.
    Stranger,
    /// Serve it; [`Book::on_end`] is called when that ended.
    Serve(LayerKey, PeerId),
    /// Others have it or are about to.
    Busy(Turned),
    /// Not all of it is here yet.
    Missing,
}

#[derive(Debug)]
pub(super) struct Book {
    tracker: swarm::Tracker,
    lines: BTreeMap<PeerId, Line>,
    keys: HashMap<Digest, LayerKey>,
    layers: BTreeMap<LayerKey, Tracked>,
    expelled: BTreeMap<PeerId, SocketAddr>,
    /// Nodes are to demand grants.
    pub(super) grants: bool,
    /// What the clock that nodes were told of showed when this machine was started, by what it shows since.
    boot: Option<SystemTime>,
    next_key: u64,
    next_line: u64,
    draws: usize,
}

#[derive(Debug)]
struct Line {
    number: u64,
    hello: Hello,
    queue: mpsc::Sender<Told>,
    cut: oneshot::Sender<Status>,
    layers: BTreeSet<LayerKey>,
    /// Blobs that it named and that are not known here.
    unknown: BTreeSet<Digest>,
}

#[derive(Debug)]
struct Tracked {
    blob: Digest,
    chunk_count: u32,
    members: usize,
}

impl Book {
    pub(super) fn new(seed: u64) -> Self {
        // A node lives as long as its line does.
        let config = TrackerConfig { member_expiry: Duration::MAX, ..TrackerConfig::default() };
        Self {
            tracker: swarm::Tracker::new(config, seed),
            lines: BTreeMap::new(),
            keys: HashMap::new(),
            layers: BTreeMap::new(),
            expelled: BTreeMap::new(),
            grants: false,
            boot: None,
            next_key: 0,
            next_line: 0,
            draws: 0,
        }
    }

    /// A node calls. An earlier line of the same address ends: it was lost and the node knows it first.
    pub(super) fn enter(&mut self, now: Duration, hello: Hello) -> Result<Entered, Status> {
        let address = hello.member.address;
        let peer = PeerId::at(address);
        if self.expelled.contains_key(&peer) {
            return Err(expelled(address));
        }
        self.end_line(now, peer, Status::aborted("another line of the same address replaces this one"));
        self.settle(now);
        let of_ip = self.lines.values().filter(|line| line.hello.from == hello.from).count();
        if of_ip >= LINES_PER_IP_MAX || self.lines.len() >= LINES_MAX {
            let text =
                format!("{of_ip} of {} lines here come from {}: no more are taken", self.lines.len(), hello.from);
            return Err(Status::resource_exhausted(text));
        }
        let (queue, told) = mpsc::channel(QUEUE_MAX);
        let (cut, is_cut) = oneshot::channel();
        self.next_line += 1;
        let line = LineId { peer, number: self.next_line };
        let time = crate::grant::seconds(SystemTime::now());
        let welcome = Welcome { address: address.to_string(), grants: self.grants, time };
        let others = self.expelled.values().map(|address| from_seeder::Message::Expel(address.to_string()));
        let first = [from_seeder::Message::Welcome(welcome)].into_iter().chain(others);
        for message in first.take(QUEUE_MAX / 2) {
            let _ = queue.try_send(Ok(FromSeeder { message: Some(message) }));
        }
        let entered = Entered { line, told, queue: queue.clone(), cut: is_cut };
        self.lines.insert(
            peer,
            Line { number: line.number, hello, queue, cut, layers: BTreeSet::new(), unknown: BTreeSet::new() },
        );
        Ok(entered)
    }

    /// The line ended, from whichever side.
    pub(super) fn hang_up(&mut self, now: Duration, line: LineId) {
        if self.line(line).is_some() {
            self.end_line(now, line.peer, Status::cancelled("the line ended"));
            self.settle(now);
        }
    }

    /// The node has `runs` of a layer that is known here, or wants more neighbours. `fills`: it fetches what it is assigned.
    pub(super) fn join(
        &mut self,
        now: Duration,
        line: LineId,
        blob: Digest,
        geometry: Geometry,
        runs: &[Range<u32>],
        fills: bool,
    ) -> Result<(), Status> {
        check(blob, geometry.chunk_count(), runs)?;
        let Some(on_line) = self.lines.get_mut(&line.peer).filter(|held| held.number == line.number) else {
            return Ok(());
        };
        let key = *self.keys.entry(blob).or_insert_with(|| {
            self.next_key += 1;
            LayerKey(self.next_key)
        });
        let is_full = on_line.layers.len() >= LAYERS_PER_LINE_MAX && !on_line.layers.contains(&key);
        if is_full {
            tracing::warn!(
                node = %on_line.hello.member, %blob,
                "a node has more than {LAYERS_PER_LINE_MAX} layers: it gets no neighbours for the others"
            );
            self.forget_unless_tracked(key, blob);
            self.tell(now, line.peer, unknown(blob));
            self.settle(now);
            return Ok(());
        }
        let (zone, leech) = (Zone::named(&on_line.hello.member.zone), on_line.hello.leech);
        let is_new = on_line.layers.insert(key);
        on_line.unknown.remove(&blob);
        let chunk_count = geometry.chunk_count();
        let tracked = self.layers.entry(key).or_insert(Tracked { blob, chunk_count, members: 0 });
        tracked.members += usize::from(is_new);
        let is_first = is_new && tracked.members == 1;
        self.tracker.join(now, key, geometry, Newcomer { peer: line.peer, zone, leech, fills }, runs);
        if is_first {
            self.tracker.ingested(now, key, geometry.chunks());
            self.tell_known(now, blob);
        }
        self.settle(now);
        Ok(())
    }

    /// What came to the node since its last report, and whether it fetches what it is assigned, where it says so.
    pub(super) fn report(
        &mut self,
        now: Duration,
        line: LineId,
        blob: Digest,
        runs: &[Range<u32>],
        fills: Option<bool>,
    ) -> Result<(), Status> {
        if let Some(key) = self.membership(line, blob) {
            check(blob, self.layers.get(&key).map_or(0, |tracked| tracked.chunk_count), runs)?;
            self.tracker.report(now, key, line.peer, runs);
            if let Some(fills) = fills {
                self.tracker.fills(now, key, line.peer, fills);
            }
            self.settle(now);
        }
        Ok(())
    }

    /// The node does not have the layer any more.
    pub(super) fn leave(&mut self, now: Duration, line: LineId, blob: Digest) {
        if let Some(key) = self.membership(line, blob) {
            if let Some(on_line) = self.lines.get_mut(&line.peer) {
                on_line.layers.remove(&key);
            }
            self.leave_layer(now, line.peer, key);
            self.settle(now);
        }
    }

    /// The node got a wrong chunk from the machine at `address`. One that is on no line here is introduced to nobody anyhow.
    /// Accusers count by where their lines come from: one machine may hold several.
    pub(super) fn accuse(&mut self, now: Duration, line: LineId, address: SocketAddr) {
        let peer = PeerId::at(address);
        let Some(accuser) = self.line(line) else { return };
        let Some(accused) = self.lines.get(&peer) else { return };
        tracing::warn!(node = %accused.hello.member, by = %accuser.hello.member, "a node is said to send wrong chunks");
        let by = PeerId::at(SocketAddr::new(accuser.hello.from, 0));
        self.tracker.accuse(now, peer, by);
        self.settle(now);
    }

    /// The node wants to know whether this seeder lives.
    pub(super) fn ping(&mut self, now: Duration, line: LineId) {
        if self.line(line).is_some() {
            self.tell(now, line.peer, from_seeder::Message::Pong(Pong {}));
            self.settle(now);
        }
    }

    /// The layer that the node named is not known here.
    pub(super) fn unknown(&mut self, now: Duration, line: LineId, blob: Digest) {
        if self.line(line).is_some() {
            self.tell_unknown(now, line.peer, blob);
            self.settle(now);
        }
    }

    /// The layer is not known here any more: its members are told.
    pub(super) fn forget(&mut self, now: Duration, blob: Digest) {
        let Some(key) = self.keys.get(&blob).copied() else { return };
        let members: Vec<PeerId> =
            self.lines.iter().filter(|(_, line)| line.layers.contains(&key)).map(|(peer, _)| *peer).collect();
        for peer in members {
            if let Some(line) = self.lines.get_mut(&peer) {
                line.layers.remove(&key);
            }
            self.leave_layer(now, peer, key);
            self.tell_unknown(now, peer, blob);
        }
        self.settle(now);
    }

    /// The address of the node that asks, where it has a line and asks from where that comes from.
    pub(super) fn on_line(&self, asker: &Asker) -> Option<SocketAddr> {
        let line = self.lines.get(&PeerId::at(asker.peer?))?;
        (asker.ip == Some(line.hello.from)).then_some(line.hello.member.address)
    }

    /// The node at `address`, where it has a line and gives to others.
    pub(super) fn giver(&self, address: SocketAddr) -> Option<Member> {
        let line = self.lines.get(&PeerId::at(address))?;
        (!line.hello.leech).then(|| line.hello.member.clone())
    }

    /// Up to four members of a layer, drawn by lot, that give to `asker`; `only`: of those that are at these addresses.
    pub(super) fn holders(&mut self, blob: Digest, has: &[SocketAddr], asker: &SocketAddr, only: bool) -> Vec<Member> {
        let Some(key) = self.keys.get(&blob) else { return Vec::new() };
        let gives = |line: &&Line| {
            let address = line.hello.member.address;
            line.layers.contains(key) && !line.hello.leech && address != *asker && (!only || has.contains(&address))
        };
        let found: Vec<&Line> = self.lines.values().filter(gives).collect();
        self.draws = self.draws.wrapping_add(PEERS_MAX);
        let from = self.draws % found.len().max(1);
        let drawn = found.iter().cycle().skip(from).take(found.len().min(PEERS_MAX));
        drawn.map(|line| line.hello.member.clone()).collect()
    }

    /// Somebody asks for a run. Who says to be a member must come from where that member's line comes from.
    pub(super) fn request(&mut self, now: Duration, blob: Digest, run: Range<u32>, asker: &Asker) -> Decision {
        let Some(peer) = asker.peer.map(PeerId::at) else { return Decision::Stranger };
        let Some(key) = self.keys.get(&blob).copied() else { return Decision::Stranger };
        let is_member = |line: &&Line| line.layers.contains(&key) && asker.ip == Some(line.hello.from);
        if self.lines.get(&peer).filter(is_member).is_none() {
            return Decision::Stranger;
        }
        match self.tracker.request(now, key, peer, run, asker.priority) {
            Answer::Serve => Decision::Serve(key, peer),
            Answer::Missing => Decision::Missing,
            Answer::Busy { retry_after, peers } => {
                let lines = peers.iter().filter_map(|peer| self.lines.get(peer));
                Decision::Busy(Turned { retry_after, peers: lines.map(|line| line.hello.member.clone()).collect() })
            }
        }
    }

    /// What was served ended; `is_whole`: all of the run was sent.
    pub(super) fn on_end(&mut self, now: Duration, key: LayerKey, peer: PeerId, run: Range<u32>, is_whole: bool) {
        self.tracker.on_end(now, key, peer, run, is_whole);
        self.settle(now);
    }

    /// When [`Book::handle_timeout`] has to be called.
    pub(super) fn poll_timeout(&self) -> Option<Duration> {
        self.tracker.poll_timeout()
    }

    pub(super) fn handle_timeout(&mut self, now: Duration) {
        self.tracker.handle_timeout(now);
        self.settle(now);
    }

    /// Ends all lines.
    pub(super) fn close(&mut self, now: Duration) {
        self.end_all(now, &Status::unavailable("this seeder stops"));
    }

    /// This machine's clock shows `shown`, so long `since_boot`. Nodes judge grants by what it showed when they called: where it was set
    /// since, their lines end, so that they call again.
    pub(super) fn note_clock(&mut self, now: Duration, shown: SystemTime, since_boot: Duration) {
        let Some(boot) = shown.checked_sub(since_boot) else { return };
        let told = *self.boot.get_or_insert(boot);
        let step = boot.duration_since(told).unwrap_or_else(|error| error.duration());
        if step >= CLOCK_STEP {
            self.boot = Some(boot);
            tracing::warn!(
                seconds = step.as_secs(),
                lines = self.lines.len(),
                "this machine's clock was set: nodes are to ask for it again"
            );
            self.end_all(now, &Status::unavailable("this seeder's clock was set"));
        }
    }

    fn end_all(&mut self, now: Duration, why: &Status) {
        for peer in self.lines.keys().copied().collect::<Vec<_>>() {
            self.end_line(now, peer, why.clone());
        }
        self.settle(now);
    }

    /// Blob and members of each layer that has any.
    pub(super) fn members(&self) -> impl Iterator<Item = (Digest, usize)> {
        self.layers.values().map(|tracked| (tracked.blob, tracked.members))
    }

    /// How many nodes have a line.
    pub(super) fn lines(&self) -> usize {
        self.lines.len()
    }

    fn line(&self, line: LineId) -> Option<&Line> {
        self.lines.get(&line.peer).filter(|held| held.number == line.number)
    }

    fn membership(&self, line: LineId, blob: Digest) -> Option<LayerKey> {
        let key = *self.keys.get(&blob)?;
        self.line(line)?.layers.contains(&key).then_some(key)
    }

    fn end_line(&mut self, now: Duration, peer: PeerId, why: Status) {
        let Some(line) = self.lines.remove(&peer) else { return };
        for key in line.layers {
            self.leave_layer(now, peer, key);
        }
        let _ = line.cut.send(why);
    }

    fn leave_layer(&mut self, now: Duration, peer: PeerId, key: LayerKey) {
        self.tracker.leave(now, key, peer);
        if let Some(tracked) = self.layers.get_mut(&key) {
            tracked.members -= 1;
            if tracked.members == 0 {
                let blob = tracked.blob;
                self.layers.remove(&key);
                self.keys.remove(&blob);
            }
        }
    }

    fn tell_unknown(&mut self, now: Duration, to: PeerId, blob: Digest) {
        if let Some(line) = self.lines.get_mut(&to)
            && line.unknown.len() < LAYERS_PER_LINE_MAX
        {
            line.unknown.insert(blob);
        }
        self.tell(now, to, unknown(blob));
    }

    /// A layer has its first member: others that have it too, and were told that it is unknown, are to join it as well.
    fn tell_known(&mut self, now: Duration, blob: Digest) {
        let waiting = self.lines.iter_mut().filter_map(|(peer, line)| line.unknown.remove(&blob).then_some(*peer));
        for peer in waiting.collect::<Vec<_>>() {
            self.tell(now, peer, from_seeder::Message::Known(blob.as_bytes().to_vec()));
        }
    }

    fn forget_unless_tracked(&mut self, key: LayerKey, blob: Digest) {
        if !self.layers.contains_key(&key) {
            self.keys.remove(&blob);
        }
    }

    /// Puts what the tracker decided into the queues until nothing is left to tell.
    fn settle(&mut self, now: Duration) {
        while let Some(action) = self.tracker.poll_action() {
            match action {
                TrackerAction::Introduce { layer, to, peer, .. } => {
                    if let (Some(blob), Some(peer)) = (self.blob(layer), self.peer(peer)) {
                        let introduce = Introduce { blob, peer: Some(peer) };
                        self.tell(now, to, from_seeder::Message::Introduce(introduce));
                    }
                }
                TrackerAction::Assign { layer, to, run, from } => {
                    let giver = from.and_then(|from| self.peer(from));
                    // One from a node that is gone is assigned anew in time.
                    if giver.is_some() == from.is_some()
                        && let Some(blob) = self.blob(layer)
                    {
                        let assign = Assign { blob, first: run.start, end: run.end, from: giver };
                        self.tell(now, to, from_seeder::Message::Assign(assign));
                    }
                }
                TrackerAction::Expel { peer } => self.expel(now, peer),
            }
        }
    }

    fn expel(&mut self, now: Duration, peer: PeerId) {
        let Some(line) = self.lines.get(&peer) else { return };
        let address = line.hello.member.address;
        tracing::error!(
            node = %line.hello.member,
            "several nodes got wrong chunks from this node: it is expelled until this seeder starts anew"
        );
        self.expelled.insert(peer, address);
        self.end_line(now, peer, expelled(address));
        for to in self.lines.keys().copied().collect::<Vec<_>>() {
            self.tell(now, to, from_seeder::Message::Expel(address.to_string()));
        }
    }

    /// Puts a message into a node's queue; cuts its line where that is full.
    fn tell(&mut self, now: Duration, to: PeerId, message: from_seeder::Message) {
        let Some(line) = self.lines.get(&to) else { return };
        if let Err(TrySendError::Full(_)) = line.queue.try_send(Ok(FromSeeder { message: Some(message) })) {
            tracing::warn!(node = %line.hello.member, "a node does not take what it is told: its line is cut");
            self.end_line(now, to, Status::resource_exhausted("this node does not take what it is told"));
        }
    }

    fn blob(&self, key: LayerKey) -> Option<Vec<u8>> {
        self.layers.get(&key).map(|tracked| tracked.blob.as_bytes().to_vec())
    }

    fn peer(&self, peer: PeerId) -> Option<Peer> {
        let Member { address, zone } = &self.lines.get(&peer)?.hello.member;
        Some(Peer { address: address.to_string(), zone: zone.clone() })
    }
}

fn unknown(blob: Digest) -> from_seeder::Message {
    from_seeder::Message::Unknown(blob.as_bytes().to_vec())
}

fn expelled(address: SocketAddr) -> Status {
    Status::permission_denied(format!("several nodes got wrong chunks from {address}: look at its disk and memory"))
}

/// Whether ascending `runs` are of the layer.
fn check(blob: Digest, chunk_count: u32, runs: &[Range<u32>]) -> Result<(), Status> {
    match runs.last() {
        Some(last) if last.end > chunk_count => {
            let text = format!("{blob} has {chunk_count} chunks: nobody has {} to {}", last.start, last.end);
            Err(Status::invalid_argument(text))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm::Priority;

    const NOW: Duration = Duration::ZERO;

    fn enter(book: &mut Book, host: u8, port: u16) -> Result<Entered, Status> {
        let from = IpAddr::from([10, 0, 0, host]);
        let member = Member { address: SocketAddr::new(from, port), zone: String::new() };
        book.enter(NOW, Hello { member, leech: false, from })
    }

    fn geometry() -> Geometry {
        Geometry::new(64 << 17, 17).unwrap()
    }

    fn blob(number: u32) -> Digest {
        Digest::of(&number.to_le_bytes())
    }

    fn told(entered: &mut Entered) -> Vec<from_seeder::Message> {
        let mut messages = Vec::new();
        while let Ok(Ok(FromSeeder { message: Some(message) })) = entered.told.try_recv() {
            messages.push(message);
        }
        messages
    }

    #[test]
    fn three_machines_expel_a_node_and_one_with_many_lines_does_not() {
        let mut book = Book::new(1);
        let mut bad = enter(&mut book, 9, 7071).unwrap();
        book.join(NOW, bad.line, blob(1), geometry(), &[], true).unwrap();
        let address = SocketAddr::from(([10, 0, 0, 9], 7071));
        for port in 1..10 {
            let slanderer = enter(&mut book, 1, port).unwrap();
            book.accuse(NOW, slanderer.line, address);
        }
        let mut second = enter(&mut book, 2, 7071).unwrap();
        book.accuse(NOW, second.line, address);
        assert!(bad.cut.try_recv().is_err());
        assert!(told(&mut second).iter().all(|message| !matches!(message, from_seeder::Message::Expel(_))));

        let third = enter(&mut book, 3, 7071).unwrap();
        book.accuse(NOW, third.line, address);
        assert_eq!(bad.cut.try_recv().unwrap().code(), tonic::Code::PermissionDenied);
        let expel = from_seeder::Message::Expel(address.to_string());
        assert!(told(&mut second).contains(&expel));
        assert_eq!(book.members().count(), 0);
        // Neither does it come back, nor do those who come later deal with it.
        assert_eq!(enter(&mut book, 9, 7071).unwrap_err().code(), tonic::Code::PermissionDenied);
        assert!(told(&mut enter(&mut book, 4, 7071).unwrap()).contains(&expel));
    }

    #[test]
    fn who_named_a_layer_before_it_was_known_hears_of_it_once() {
        let mut book = Book::new(1);
        let (mut early, mut late) = (enter(&mut book, 1, 1).unwrap(), enter(&mut book, 2, 1).unwrap());
        book.unknown(NOW, early.line, blob(1));
        assert!(told(&mut early).contains(&unknown(blob(1))));
        book.join(NOW, late.line, blob(2), geometry(), &[], true).unwrap();
        assert_eq!(told(&mut early), []);
        book.join(NOW, late.line, blob(1), geometry(), &[], true).unwrap();
        let known = from_seeder::Message::Known(blob(1).as_bytes().to_vec());
        assert_eq!(told(&mut early), std::slice::from_ref(&known));
        // Evicted, and known again.
        book.forget(NOW, blob(1));
        assert!(told(&mut late).contains(&unknown(blob(1))));
        book.join(NOW, early.line, blob(1), geometry(), &[], true).unwrap();
        assert!(told(&mut late).contains(&known) && !told(&mut early).contains(&known));
    }

    #[test]
    fn who_takes_nothing_is_cut_off_and_the_others_go_on() {
        let mut book = Book::new(1);
        let mut deaf = enter(&mut book, 1, 1).unwrap();
        let mut good = enter(&mut book, 2, 1).unwrap();
        for number in 0..LAYERS_PER_LINE_MAX as u32 {
            for line in [deaf.line, good.line] {
                book.join(NOW, line, blob(number), geometry(), &[], true).unwrap();
            }
            told(&mut good);
        }
        assert_eq!(deaf.cut.try_recv().unwrap().code(), tonic::Code::ResourceExhausted);
        assert!(good.cut.try_recv().is_err());
        assert!(book.members().all(|(_, members)| members == 1));
        // Its own end comes too late to matter.
        book.hang_up(NOW, deaf.line);
        assert_eq!((book.lines(), book.members().count()), (1, LAYERS_PER_LINE_MAX));

        book.join(NOW, good.line, blob(u32::MAX), geometry(), &[], true).unwrap();
        assert_eq!(told(&mut good), [unknown(blob(u32::MAX))], "one layer more than a line may have");
        book.hang_up(NOW, good.line);
        assert!(book.keys.is_empty() && book.layers.is_empty());
    }

    #[test]
    fn a_member_asks_from_where_its_line_comes_from() {
        let mut book = Book::new(1);
        let entered = enter(&mut book, 1, 7071).unwrap();
        book.join(NOW, entered.line, blob(1), geometry(), &[], true).unwrap();
        let asker = |host: u8| Asker {
            ip: Some(IpAddr::from([10, 0, 0, host])),
            peer: Some(SocketAddr::from(([10, 0, 0, 1], 7071))),
            priority: Priority::Demand,
        };
        let mut ask = |blob, run, host| book.request(NOW, blob, run, &asker(host));
        assert!(matches!(ask(blob(1), 0..2, 1), Decision::Serve(..)));
        assert_eq!(ask(blob(1), 0..2, 2), Decision::Stranger);
        assert_eq!(ask(blob(2), 0..2, 1), Decision::Stranger);
        assert_eq!(ask(blob(1), 60..65, 1), Decision::Missing);
        assert_eq!(ask(blob(1), 0..u32::MAX, 1), Decision::Missing);
    }
}
