//! Who asks the registry when no seeder does: agreed without a leader.
//!
//! Every member of a layer has a rank that all compute alike. With what they have, neighbours tell each other the members of
//! best rank that they heard of, so that within a few rounds all know the same few *delegates*. A span of the blob belongs to
//! one of them by rendezvous hashing, spans that follow each other to different ones. A delegate counts up a beat while it
//! lives; one whose beat stands still is forgotten, and the next in rank takes its place.

use std::time::Duration;

use crate::peer::{PeerId, Zone, mix, weight};

/// How many share the registry's blob: enough to keep its link busy, few enough to be told in each message.
pub(crate) const DELEGATES: usize = 8;

/// How often a delegate's beat goes up.
pub(crate) const BEAT: Duration = Duration::from_millis(500);

/// A delegate that was not heard of for so long is dead: four beats and the rounds that news take.
const EXPIRY: Duration = Duration::from_millis(2500);

/// A member of good rank, as neighbours tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delegate {
    /// Who.
    pub peer: PeerId,
    /// Where.
    pub zone: Zone,
    /// Goes up while it lives.
    pub beat: u32,
}

#[derive(Debug)]
pub(crate) struct Delegates {
    me: PeerId,
    zone: Zone,
    salt: u64,
    beat: u32,
    /// Best rank first; oneself only where the rank is good enough.
    known: Vec<(Delegate, Duration)>,
    /// The dead, so that an old beat that still goes round does not raise them.
    dead: Vec<Delegate>,
}

impl Delegates {
    pub(crate) fn new(me: PeerId, zone: Zone, salt: u64) -> Self {
        Self { me, zone, salt, beat: 0, known: Vec::new(), dead: Vec::new() }
    }

    /// What a neighbour told. Only as many as there can be are looked at.
    pub(crate) fn hear(&mut self, now: Duration, delegates: &[Delegate]) {
        for told in delegates.iter().take(2 * DELEGATES).filter(|told| told.peer != self.me) {
            if self.dead.iter().any(|dead| dead.peer == told.peer && dead.beat >= told.beat) {
                continue;
            }
            match self.known.iter_mut().find(|(known, _)| known.peer == told.peer) {
                Some((known, heard)) if known.beat < told.beat => (known.beat, *heard) = (told.beat, now),
                Some(_) => {}
                None => self.known.push((*told, now)),
            }
        }
        self.keep_best();
    }

    /// One's own beat goes up, and who is silent is forgotten.
    pub(crate) fn beat(&mut self, now: Duration) {
        self.beat += 1;
        let own = Delegate { peer: self.me, zone: self.zone, beat: self.beat };
        self.known.retain(|(known, heard)| {
            let lives = known.peer != self.me && *heard + EXPIRY > now;
            if !lives && known.peer != self.me {
                self.dead.retain(|dead| dead.peer != known.peer);
                self.dead.push(*known);
            }
            lives
        });
        let surplus = self.dead.len().saturating_sub(4 * DELEGATES);
        self.dead.drain(..surplus);
        self.known.push((own, now));
        self.keep_best();
    }

    /// What to tell neighbours.
    pub(crate) fn told(&self) -> Vec<Delegate> {
        self.known.iter().map(|(delegate, _)| *delegate).collect()
    }

    /// Whether this node is one of the first `ranks` to fetch `span`. `zone`: among the delegates of its own zone.
    pub(crate) fn is_mine(&self, span: u32, ranks: usize, within_zone: bool) -> bool {
        let members = self.known.iter().filter(|(known, _)| !within_zone || known.zone == self.zone);
        let members: Vec<PeerId> = members.take(DELEGATES).map(|(known, _)| known.peer).collect();
        if members.is_empty() || ranks > DELEGATES {
            return true;
        }
        let first = self.first(&members, span);
        let weight = |peer: PeerId| (Some(peer) == first, weight(peer, span, self.salt));
        let mine = weight(self.me);
        let better = members.iter().filter(|peer| weight(**peer) > mine).count();
        members.contains(&self.me) && better < ranks
    }

    /// Who fetches `span` first: of as many spans that follow each other as there are delegates each has one. Else some would have
    /// several of those that are wanted next, one after the other, and others none.
    fn first(&self, members: &[PeerId], span: u32) -> Option<PeerId> {
        let mut left = Vec::new();
        let mut first = None;
        for span in span - span % DELEGATES as u32..=span {
            if left.is_empty() {
                left = members.to_vec();
            }
            first = left.iter().copied().max_by_key(|peer| weight(*peer, span, self.salt));
            left.retain(|peer| Some(*peer) != first);
        }
        first
    }

    /// Best rank first: the best of all, and the best of the own zone.
    fn keep_best(&mut self) {
        let salt = self.salt;
        self.known.sort_by_key(|(known, _)| (mix(known.peer.0 ^ salt), known.peer));
        let (mut all, mut mates) = (0, 0);
        let zone = self.zone;
        self.known.retain(|(known, _)| {
            all += 1;
            mates += usize::from(known.zone == zone);
            all <= DELEGATES || (known.zone == zone && mates <= DELEGATES)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(now: Duration, nodes: &mut [Delegates], is_dead: impl Fn(usize) -> bool) {
        let told: Vec<_> = nodes.iter().map(Delegates::told).collect();
        let len = nodes.len();
        for (at, node) in nodes.iter_mut().enumerate().filter(|(at, _)| !is_dead(*at)) {
            node.beat(now);
            for step in [1, 7, 31] {
                let other = (at + step) % len;
                if !is_dead(other) {
                    node.hear(now, &told[other]);
                }
            }
        }
    }

    fn owners(nodes: &[Delegates], span: u32, is_dead: impl Fn(usize) -> bool) -> usize {
        nodes.iter().enumerate().filter(|(at, node)| !is_dead(*at) && node.is_mine(span, 1, false)).count()
    }

    #[test]
    fn all_agree_on_one_and_replace_the_dead() {
        let mut nodes: Vec<_> = (0..200).map(|n| Delegates::new(PeerId(mix(n)), Zone(0), 5)).collect();
        for n in 0..30 {
            round(BEAT * n, &mut nodes, |_| false);
        }
        assert!((0..100).all(|span| owners(&nodes, span, |_| false) == 1));
        let dead: Vec<bool> = nodes.iter().map(|node| (0..100).any(|span| node.is_mine(span, 1, false))).collect();
        assert!(dead.iter().filter(|dead| **dead).count() <= DELEGATES);
        for n in 30..80 {
            round(BEAT * n, &mut nodes, |at| dead[at]);
        }
        assert!((0..100).all(|span| owners(&nodes, span, |at| dead[at]) == 1));
    }

    #[test]
    fn spans_that_follow_each_other_belong_to_different_ones() {
        for count in [3, DELEGATES as u64, 40] {
            let mut nodes: Vec<_> = (0..count).map(|n| Delegates::new(PeerId(mix(n)), Zone(0), 5)).collect();
            for n in 0..30 {
                round(BEAT * n, &mut nodes, |_| false);
            }
            let turn = DELEGATES.min(nodes.len());
            for first in (0..10).map(|group| group * DELEGATES as u32) {
                let spans = first..first + turn as u32;
                let with_one =
                    nodes.iter().filter(|node| spans.clone().filter(|span| node.is_mine(*span, 1, false)).count() == 1);
                assert_eq!(with_one.count(), turn, "{count} nodes, {spans:?}");
            }
        }
    }

    /// A death moves few spans but its own.
    #[test]
    fn most_spans_stay_where_they_are_when_a_delegate_dies() {
        let all: Vec<_> =
            (0..DELEGATES as u64).map(|n| Delegate { peer: PeerId(mix(n)), zone: Zone(0), beat: 1 }).collect();
        let owner = |members: &[Delegate], span: u32| {
            let mut node = Delegates::new(PeerId(1), Zone(0), 5);
            node.hear(Duration::ZERO, members);
            let members: Vec<PeerId> = node.known.iter().map(|(known, _)| known.peer).collect();
            node.first(&members, span)
        };
        let moved = (0..800).filter(|span| {
            let before = owner(&all, *span);
            before != Some(all[3].peer) && before != owner(&[&all[..3], &all[4..]].concat(), *span)
        });
        assert!(moved.count() < 700 / 3);
    }

    #[test]
    fn alone_it_asks_itself() {
        let mut node = Delegates::new(PeerId(3), Zone(0), 5);
        assert!(node.is_mine(0, 1, false));
        node.beat(Duration::ZERO);
        assert!(node.is_mine(0, 1, true));
    }
}
