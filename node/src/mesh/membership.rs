//! What the driver does in the mesh: opens layers in it, tells seeders and neighbours what the swarm wants told, and tells the swarm
//! what they said.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use layer::Digest;
use proto::drover::mesh::v1 as api;
use proto::drover::mesh::v1::{from_seeder, to_neighbour, to_seeder};
use swarm::{Delegate, LayerKey, Message, PeerId, SourceId, Swarm, Zone};
use tokio::sync::{mpsc, oneshot};

use super::asking::PEERS_MAX;
use super::lines::{Lines, NeighbourLine};
use super::member::{Member, is_zone};
use super::peer::{PeerClient, PeerSource};
use super::standing::{Standing, Watch};
use super::{Refused, runs};
use crate::driver::{Inbox, Named};
use crate::layer::Layer;
use crate::source::{Source, SourceKind};

/// Most machines that this node deals with.
const NEIGHBOURS_MAX: usize = 256;
/// Who deals with so many machines meets no others that only a neighbour named: the rest is for those of whom seeders tell.
const NAMED_MAX: usize = 32;
/// A layer that no seeder knows is joined again after so long, if none says before that it knows it.
const UNKNOWN_PAUSE: Duration = Duration::from_secs(5);

/// What lines tell the driver.
pub(crate) enum Event {
    /// The mesh begins.
    Start(Box<Membership>),
    /// A seeder welcomed this node.
    SeederUp { seeder: String, me: SocketAddr, outlet: mpsc::Sender<api::ToSeeder> },
    /// A seeder said something.
    FromSeeder { seeder: String, message: from_seeder::Message },
    /// The line is lost.
    SeederDown { seeder: String },
    /// The line to a neighbour stands.
    NeighbourUp { address: SocketAddr, outlet: mpsc::Sender<api::ToNeighbour> },
    /// It is lost, and being made again.
    NeighbourDown { address: SocketAddr },
    /// It was tried for long enough.
    NeighbourGone { address: SocketAddr },
    /// A machine made a line to this node. `is_own`: the line comes from the host that it names as its own. `taken` is told whether
    /// this node will hear what it tells.
    CallerUp { caller: Member, call: u64, is_own: bool, taken: oneshot::Sender<bool> },
    /// What it has.
    Haves { address: SocketAddr, haves: api::LayerHaves },
    /// Its line ended.
    CallerDown { address: SocketAddr, call: u64 },
    /// This node sends `asker` away, who wants a chunk: who else has it?
    WhoElse { blob: Digest, chunk: u32, asker: Option<SocketAddr>, answer: oneshot::Sender<Vec<Member>> },
}

/// This node's part in the mesh.
pub(crate) struct Membership {
    zone: Zone,
    leech: bool,
    lines: Lines,
    refused: Refused,
    watch: Watch,
    me: Option<SocketAddr>,
    /// Those that welcomed this node.
    seeders: BTreeMap<String, mpsc::Sender<api::ToSeeder>>,
    members: BTreeMap<LayerKey, Joined>,
    by_blob: HashMap<Digest, LayerKey>,
    neighbours: BTreeMap<SocketAddr, Neighbour>,
    addresses: BTreeMap<SourceId, SocketAddr>,
}

/// A layer in the mesh.
struct Joined {
    blob: Digest,
    seeder: SourceId,
    /// At whom it is joined.
    joined: Option<String>,
    /// Seeders that do not know it.
    unknown: BTreeSet<String>,
    join_at: Option<Duration>,
}

struct Neighbour {
    id: SourceId,
    peer: PeerId,
    zone: Zone,
    /// Name of its zone.
    zone_name: String,
    client: PeerClient,
    /// Layers that both have.
    layers: BTreeSet<LayerKey>,
    outlet: Option<mpsc::Sender<api::ToNeighbour>>,
    /// Number of its line to this node.
    call: Option<u64>,
    _line: NeighbourLine,
}

impl Membership {
    pub(crate) fn new(zone: Zone, leech: bool, lines: Lines, refused: Refused, watch: Watch) -> Self {
        Self {
            zone,
            leech,
            lines,
            refused,
            watch,
            me: None,
            seeders: BTreeMap::new(),
            members: BTreeMap::new(),
            by_blob: HashMap::new(),
            neighbours: BTreeMap::new(),
            addresses: BTreeMap::new(),
        }
    }

    /// A layer may have come, or lost chunks.
    pub(crate) fn look_at(&mut self, now: Duration, swarm: &mut Swarm, layer: &Arc<Layer>) {
        let key = layer.key();
        if self.members.contains_key(&key) {
            if layer.take_lost() {
                let told: Vec<u32> = swarm.have(key).into_iter().flat_map(|have| have.runs()).flatten().collect();
                for chunk in told.into_iter().filter(|chunk| !layer.store().is_here(*chunk)) {
                    swarm.forget_have(key, chunk..chunk + 1);
                }
            }
            return;
        }
        let Some(me) = self.me else { return };
        let sources = layer.sources();
        let of_kind = |kind| sources.iter().find(|(_, (_, source))| source.kind() == kind).map(|(id, _)| *id);
        // What this machine has in another place needs no mesh.
        let (Some(seeder), None) = (of_kind(SourceKind::Seeder), of_kind(SourceKind::Local)) else { return };
        let blob = layer.header().blob();
        layer.take_lost();
        let salt = blob.as_bytes().iter().take(8).fold(0, |salt, byte| salt << 8 | u64::from(*byte));
        swarm.open_mesh(now, key, PeerId::at(me), self.zone, salt, here(layer));
        self.members.insert(key, Joined { blob, seeder, joined: None, unknown: BTreeSet::new(), join_at: None });
        self.by_blob.insert(blob, key);
        self.join(swarm, key);
    }

    /// A layer is gone.
    pub(crate) fn forget(&mut self, key: LayerKey) {
        let Some(member) = self.members.remove(&key) else { return };
        self.by_blob.remove(&member.blob);
        for neighbour in self.neighbours.values_mut() {
            neighbour.layers.remove(&key);
        }
        if let Some(seeder) = member.joined {
            self.tell_seeder(&seeder, to_seeder::Message::Leave(member.blob.as_bytes().to_vec()));
        }
    }

    /// Where `id` is a neighbour: what gives the layer's chunks.
    pub(crate) fn source(&self, layer: &Layer, id: SourceId) -> Option<Arc<dyn Source>> {
        let neighbour = self.neighbours.get(self.addresses.get(&id)?)?;
        Some(Arc::new(PeerSource::new(neighbour.client.clone(), layer.header().blob(), layer.geometry())))
    }

    /// Machines that `by` named to have a chunk.
    pub(crate) fn on_named(
        &mut self,
        now: Duration,
        swarm: &mut Swarm,
        inbox: &Inbox,
        named: &Named,
        by: Option<SourceId>,
    ) {
        let seeder = self.members.get(&named.layer).map(|joined| joined.seeder);
        let is_seeder = by.is_some() && by == seeder;
        let run = named.chunk..named.chunk.saturating_add(1);
        for machine in &named.members {
            let is_stranger = !self.neighbours.contains_key(&machine.address);
            if !is_seeder && is_stranger && self.neighbours.len() >= NAMED_MAX {
                continue;
            }
            if let Some(id) = self.meet(now, swarm, inbox, named.layer, machine) {
                swarm.on_haves(now, named.layer, id, std::slice::from_ref(&run), &[]);
            }
        }
    }

    /// Gives whether layers should be looked at.
    pub(crate) fn on_event(&mut self, now: Duration, swarm: &mut Swarm, inbox: &Inbox, event: Event) -> bool {
        match event {
            Event::Start(_) => {}
            Event::SeederUp { seeder, me, outlet } => {
                self.me.get_or_insert(me);
                self.seeders.insert(seeder.clone(), outlet);
                for member in self.members.values_mut() {
                    swarm.on_alive(now, member.seeder);
                    member.unknown.remove(&seeder);
                    member.join_at = None;
                    if member.joined.as_ref() == Some(&seeder) {
                        member.joined = None;
                    }
                }
                self.join_all(swarm);
                return true;
            }
            Event::SeederDown { seeder } => {
                self.seeders.remove(&seeder);
                for member in self.members.values_mut() {
                    member.unknown.remove(&seeder);
                    if member.joined.as_ref() == Some(&seeder) {
                        member.joined = None;
                    }
                }
                if self.seeders.is_empty() {
                    let sources: BTreeSet<SourceId> = self.members.values().map(|member| member.seeder).collect();
                    sources.into_iter().for_each(|source| swarm.on_source_lost(now, source));
                }
                self.join_all(swarm);
            }
            Event::FromSeeder { seeder, message } => self.hear_seeder(now, swarm, inbox, &seeder, message),
            Event::NeighbourUp { address, outlet } => {
                if let Some(neighbour) = self.neighbours.get_mut(&address) {
                    neighbour.outlet = Some(outlet);
                    neighbour.offer(now, swarm);
                    let layers: Vec<LayerKey> = neighbour.layers.iter().copied().collect();
                    layers.into_iter().for_each(|key| self.tell_all(swarm, key, address));
                }
            }
            Event::NeighbourDown { address } => {
                if let Some(neighbour) = self.neighbours.get_mut(&address) {
                    neighbour.outlet = None;
                    neighbour.withdraw(swarm);
                }
            }
            Event::NeighbourGone { address } => {
                if self.neighbours.get(&address).is_some_and(|neighbour| neighbour.call.is_none()) {
                    self.part(swarm, address);
                }
            }
            Event::CallerUp { caller, call, is_own, taken } => {
                let is_known = self.neighbours.contains_key(&caller.address);
                if (is_known || is_own)
                    && self.acquaint(inbox, &caller).is_some()
                    && let Some(neighbour) = self.neighbours.get_mut(&caller.address)
                    && taken.send(true).is_ok()
                {
                    neighbour.call = Some(call);
                    neighbour.offer(now, swarm);
                }
            }
            Event::Haves { address, haves } => {
                let Some(told) = haves.haves else { return false };
                let Some(key) = self.key(&told.blob) else { return false };
                let Some(neighbour) = self.neighbours.get(&address).filter(|neighbour| neighbour.call.is_some()) else {
                    return false;
                };
                let teller = neighbour.member(address);
                let delegates: Vec<Delegate> = haves.delegates.iter().map(delegate).collect();
                if let (Some(id), Some(runs)) = (self.meet(now, swarm, inbox, key, &teller), runs::decode(&told.runs)) {
                    swarm.on_haves(now, key, id, &runs, &delegates);
                    swarm.on_coming(now, key, id, &runs::decode(&haves.coming).unwrap_or_default());
                }
            }
            Event::CallerDown { address, call } => {
                if let Some(neighbour) =
                    self.neighbours.get_mut(&address).filter(|neighbour| neighbour.call == Some(call))
                {
                    neighbour.call = None;
                    neighbour.withdraw(swarm);
                }
            }
            Event::WhoElse { blob, chunk, asker, answer } => {
                // Whoever waited no longer does.
                let _ = answer.send(self.holders(swarm, blob, chunk, asker));
            }
        }
        false
    }

    /// Who has a chunk besides this node, for a machine that this node sends away.
    fn holders(&self, swarm: &mut Swarm, blob: Digest, chunk: u32, asker: Option<SocketAddr>) -> Vec<Member> {
        let Some(key) = self.by_blob.get(&blob) else { return Vec::new() };
        let asker = asker.and_then(|asker| self.neighbours.get(&asker));
        let (zone, except) = asker.map_or((self.zone, None), |asker| (asker.zone, Some(asker.id)));
        let holders = swarm.holders(*key, chunk, zone, except, PEERS_MAX).into_iter();
        let addresses = holders.filter_map(|id| self.addresses.get(&id));
        addresses.filter_map(|address| Some(self.neighbours.get(address)?.member(*address))).collect()
    }

    /// Says where this node stands.
    pub(crate) fn show(&self) {
        let is_near = |neighbour: &&Neighbour| neighbour.outlet.is_some() || neighbour.call.is_some();
        self.watch.set(Standing {
            address: self.me,
            seeders: self.seeders.keys().cloned().collect(),
            neighbours: self.neighbours.values().filter(is_near).count(),
        });
    }

    /// Sends what the swarm wants told; gives whether there was anything.
    pub(crate) fn tell(&mut self, swarm: &mut Swarm) -> bool {
        let mut told = false;
        while let Some(message) = swarm.poll_message() {
            told = true;
            match message {
                Message::Haves { layer, runs, delegates, coming } => {
                    let Some(member) = self.members.get(&layer) else { continue };
                    let mut message = layer_haves(member.blob, runs, delegates);
                    message.coming = runs::encode(coming);
                    for neighbour in self.neighbours.values_mut().filter(|other| other.layers.contains(&layer)) {
                        neighbour.tell(message.clone());
                    }
                }
                Message::Report { layer, runs, fills } => {
                    let Some(member) = self.members.get(&layer) else { continue };
                    let (blob, joined) = (member.blob, member.joined.clone());
                    if let Some(seeder) = joined {
                        self.tell_seeder(&seeder, to_seeder::Message::Report(haves(blob, runs, Some(fills))));
                    }
                }
                Message::Ask { layer } => {
                    if let Some(seeder) = self.members.get(&layer).and_then(|member| member.joined.clone()) {
                        self.tell_seeder(&seeder, to_seeder::Message::Ping(api::Ping {}));
                    }
                }
                Message::Cut { source } => {
                    let Some(address) = self.addresses.get(&source).copied() else { continue };
                    tracing::warn!(%address, "a neighbour sent a wrong chunk: this node deals with it no more");
                    self.refuse(swarm, address);
                    let seeders: Vec<String> = self.seeders.keys().cloned().collect();
                    for seeder in seeders {
                        self.tell_seeder(&seeder, to_seeder::Message::Accuse(address.to_string()));
                    }
                }
            }
        }
        told
    }

    /// Does what is due; gives when more will be.
    pub(crate) fn step(&mut self, now: Duration, swarm: &Swarm) -> Option<Duration> {
        let due = |member: &Joined| member.join_at.is_some_and(|at| at <= now);
        let due: Vec<LayerKey> = self.members.iter().filter(|(_, member)| due(member)).map(|(key, _)| *key).collect();
        for key in due {
            if let Some(member) = self.members.get_mut(&key) {
                member.join_at = None;
                member.unknown.clear();
            }
            self.join(swarm, key);
        }
        self.members.values().filter_map(|member| member.join_at).min()
    }

    fn hear_seeder(
        &mut self,
        now: Duration,
        swarm: &mut Swarm,
        inbox: &Inbox,
        seeder: &str,
        message: from_seeder::Message,
    ) {
        match message {
            from_seeder::Message::Welcome(_) => {}
            from_seeder::Message::Introduce(introduced) => {
                if let (Some(key), Some(machine)) = (self.key(&introduced.blob), machine(introduced.peer)) {
                    self.meet(now, swarm, inbox, key, &machine);
                }
            }
            from_seeder::Message::Assign(assigned) => {
                let Some(key) = self.key(&assigned.blob) else { return };
                let Some(member) = self.members.get(&key) else { return };
                let run = assigned.first..assigned.end;
                let from_seeder = member.seeder;
                swarm.on_alive(now, from_seeder);
                let from = match assigned.from {
                    None => Some(from_seeder),
                    Some(peer) => machine(Some(peer)).and_then(|machine| {
                        let id = self.meet(now, swarm, inbox, key, &machine)?;
                        swarm.on_haves(now, key, id, std::slice::from_ref(&run), &[]);
                        Some(id)
                    }),
                };
                if let Some(from) = from {
                    swarm.assign(now, key, run, from);
                }
            }
            from_seeder::Message::Expel(address) => {
                if let Ok(address) = address.parse() {
                    tracing::warn!(%address, seeder, "several nodes got wrong chunks from this machine: it is dealt with no more");
                    self.refuse(swarm, address);
                }
            }
            from_seeder::Message::Unknown(blob) => {
                let Some(key) = self.key(&blob) else { return };
                let Some(member) = self.members.get_mut(&key) else { return };
                if member.joined.as_deref() == Some(seeder) {
                    member.joined = None;
                }
                member.unknown.insert(seeder.to_owned());
                if self.seeders.keys().all(|seeder| member.unknown.contains(seeder)) {
                    member.join_at = Some(now + UNKNOWN_PAUSE);
                }
                self.join(swarm, key);
            }
            from_seeder::Message::Known(blob) => {
                let Some(key) = self.key(&blob) else { return };
                let Some(member) = self.members.get_mut(&key) else { return };
                member.unknown.remove(seeder);
                member.join_at = None;
                self.join(swarm, key);
            }
            from_seeder::Message::Pong(_) => {
                let is_joined = |member: &&Joined| member.joined.as_deref() == Some(seeder);
                let sources: BTreeSet<SourceId> =
                    self.members.values().filter(is_joined).map(|member| member.seeder).collect();
                sources.into_iter().for_each(|source| swarm.on_alive(now, source));
            }
        }
    }

    fn key(&self, blob: &[u8]) -> Option<LayerKey> {
        let blob = Digest::from_bytes(blob.try_into().ok()?);
        self.by_blob.get(&blob).copied()
    }

    fn join_all(&mut self, swarm: &Swarm) {
        let keys: Vec<LayerKey> = self.members.keys().copied().collect();
        keys.into_iter().for_each(|key| self.join(swarm, key));
    }

    /// Joins a layer at the seeder whose it is: of those that are there and know it, all nodes choose the same.
    fn join(&mut self, swarm: &Swarm, key: LayerKey) {
        let Some(member) = self.members.get_mut(&key).filter(|member| member.join_at.is_none()) else { return };
        let blob = member.blob;
        let known = self.seeders.keys().filter(|seeder| !member.unknown.contains(*seeder));
        let owner = known.max_by_key(|seeder| crate::seeder::share(seeder, blob)).cloned();
        if member.joined == owner {
            return;
        }
        let former = std::mem::replace(&mut member.joined, owner.clone());
        if let Some(former) = former {
            self.tell_seeder(&former, to_seeder::Message::Leave(blob.as_bytes().to_vec()));
        }
        if let (Some(owner), Some(have)) = (owner, swarm.have(key)) {
            let haves = haves(blob, have.runs(), Some(swarm.fills(key)));
            self.tell_seeder(&owner, to_seeder::Message::Join(haves));
        }
    }

    /// A line that does not take a message is broken off: all is told anew on the next.
    fn tell_seeder(&mut self, seeder: &str, message: to_seeder::Message) {
        let message = api::ToSeeder { message: Some(message) };
        if self.seeders.get(seeder).is_some_and(|outlet| outlet.try_send(message).is_err()) {
            self.seeders.remove(seeder);
        }
    }

    /// Makes a machine a neighbour for a layer.
    fn meet(
        &mut self,
        now: Duration,
        swarm: &mut Swarm,
        inbox: &Inbox,
        key: LayerKey,
        machine: &Member,
    ) -> Option<SourceId> {
        let id = self.acquaint(inbox, machine)?;
        let neighbour = self.neighbours.get_mut(&machine.address)?;
        swarm.add_peer(now, key, id, neighbour.peer, neighbour.zone);
        if neighbour.layers.insert(key) {
            self.tell_all(swarm, key, machine.address);
        }
        Some(id)
    }

    fn acquaint(&mut self, inbox: &Inbox, machine: &Member) -> Option<SourceId> {
        let address = machine.address;
        if self.me == Some(address) || self.refused.contains(address) {
            return None;
        }
        if let Some(neighbour) = self.neighbours.get(&address) {
            return Some(neighbour.id);
        }
        if self.neighbours.len() >= NEIGHBOURS_MAX {
            return None;
        }
        let id = inbox.source_id(SourceKind::Peer, format!("peer {address}"));
        let neighbour = Neighbour {
            id,
            peer: PeerId::at(address),
            zone: Zone::named(&machine.zone),
            zone_name: machine.zone.clone(),
            client: self.lines.client(address)?,
            layers: BTreeSet::new(),
            outlet: None,
            call: None,
            _line: self.lines.call(address)?,
        };
        self.neighbours.insert(address, neighbour);
        self.addresses.insert(id, address);
        Some(id)
    }

    /// Tells a neighbour all that is here of a layer.
    fn tell_all(&mut self, swarm: &Swarm, key: LayerKey, address: SocketAddr) {
        let (Some(member), Some(have)) = (self.members.get(&key), swarm.have(key)) else { return };
        let runs: Vec<Range<u32>> = if self.leech { Vec::new() } else { have.runs().collect() };
        if let Some(neighbour) = self.neighbours.get_mut(&address) {
            neighbour.tell(layer_haves(member.blob, runs, Vec::new()));
        }
    }

    fn refuse(&mut self, swarm: &mut Swarm, address: SocketAddr) {
        self.refused.insert(address);
        self.part(swarm, address);
    }

    fn part(&mut self, swarm: &mut Swarm, address: SocketAddr) {
        if let Some(mut neighbour) = self.neighbours.remove(&address) {
            self.addresses.remove(&neighbour.id);
            (neighbour.outlet, neighbour.call) = (None, None);
            neighbour.withdraw(swarm);
        }
    }
}

impl Neighbour {
    /// What others are told of the one at `address`.
    fn member(&self, address: SocketAddr) -> Member {
        Member { address, zone: self.zone_name.clone() }
    }

    /// It may be asked.
    fn offer(&self, now: Duration, swarm: &mut Swarm) {
        for key in &self.layers {
            swarm.add_peer(now, *key, self.id, self.peer, self.zone);
        }
    }

    /// It cannot be asked once both lines are lost. One line may be lost alone, and then what was told on the other still holds.
    fn withdraw(&self, swarm: &mut Swarm) {
        if self.outlet.is_none() && self.call.is_none() {
            for key in &self.layers {
                swarm.remove_source(*key, self.id);
            }
        }
    }

    fn tell(&mut self, haves: api::LayerHaves) {
        let message = api::ToNeighbour { message: Some(to_neighbour::Message::Haves(haves)) };
        if self.outlet.as_ref().is_some_and(|outlet| outlet.try_send(message).is_err()) {
            self.outlet = None;
        }
    }
}

/// The chunks that are here.
fn here(layer: &Layer) -> Vec<Range<u32>> {
    let (store, count) = (layer.store(), layer.geometry().chunk_count());
    let (mut runs, mut from) = (Vec::new(), 0);
    while from < count {
        let gap = store.next_missing(from).unwrap_or(count..count);
        if gap.start > from {
            runs.push(from..gap.start);
        }
        from = gap.end;
    }
    runs
}

fn haves(blob: Digest, runs: impl IntoIterator<Item = Range<u32>>, fills: Option<bool>) -> api::Haves {
    api::Haves { blob: blob.as_bytes().to_vec(), runs: runs::encode(runs), fills }
}

fn layer_haves(blob: Digest, runs: Vec<Range<u32>>, delegates: Vec<Delegate>) -> api::LayerHaves {
    let delegates = delegates.iter().map(|delegate| api::Delegate {
        id: delegate.peer.0,
        zone: delegate.zone.0,
        beat: delegate.beat,
    });
    api::LayerHaves { haves: Some(haves(blob, runs, None)), delegates: delegates.collect(), coming: Vec::new() }
}

fn delegate(told: &api::Delegate) -> Delegate {
    Delegate { peer: PeerId(told.id), zone: Zone(told.zone), beat: told.beat }
}

fn machine(peer: Option<api::Peer>) -> Option<Member> {
    let api::Peer { address, zone } = peer?;
    let address = address.parse().ok()?;
    is_zone(&zone).then_some(Member { address, zone })
}

#[cfg(test)]
mod tests;
