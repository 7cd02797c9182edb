//! Which node follows whom while a layer is being ingested.
//!
//! They stand in lines: one follows the seeder, the next one that one, so that a node sends about one copy however fast the layer
//! comes. Where a line would become too long, a node gets a second one behind it.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use layer::Digest;
use parking_lot::Mutex;

use crate::mesh::Member;

/// Longest way of a chunk from the seeder: each node on it adds some milliseconds.
const DEPTH_MAX: usize = 24;
/// Most nodes that follow one.
const BEHIND_MAX: usize = 4;
/// Most nodes that are placed; others wait for the end of the ingest.
const PLACED_MAX: usize = 8192;

/// Who follows whom. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Followers {
    blobs: Arc<Mutex<HashMap<Digest, Placed>>>,
}

#[derive(Debug, Default)]
struct Placed {
    /// Who follows the seeder.
    first: Option<SocketAddr>,
    nodes: HashMap<SocketAddr, Node>,
}

#[derive(Debug)]
struct Node {
    behind: Option<SocketAddr>,
    /// Nodes between it and the seeder.
    depth: usize,
    followed_by: usize,
    gives: bool,
}

/// The place right behind the seeder, until it is dropped.
#[derive(Debug)]
pub(super) struct First {
    followers: Followers,
    blob: Digest,
    node: SocketAddr,
}

impl Followers {
    /// The place of `node`: right behind the seeder, or behind the node that is given as the error; behind none as long as nobody
    /// has room. A node that comes again was given nothing where it was. `has_line`: others may be placed behind it, as long as
    /// `giver` knows it. Forgets blobs that are not `running`.
    pub(super) fn place(
        &self,
        blob: Digest,
        node: SocketAddr,
        has_line: bool,
        giver: impl Fn(SocketAddr) -> Option<Member>,
        running: impl Fn(Digest) -> bool,
    ) -> Result<First, Option<Member>> {
        let mut blobs = self.blobs.lock();
        if !blobs.contains_key(&blob) {
            blobs.retain(|blob, _| running(*blob));
        }
        let placed = blobs.entry(blob).or_default();
        if let Some(before) = placed.nodes.get(&node).and_then(|node| node.behind)
            && let Some(before) = placed.nodes.get_mut(&before)
        {
            before.followed_by = before.followed_by.saturating_sub(1);
            before.gives = false;
        }
        let behind = match placed.first {
            None => None,
            Some(_) if placed.nodes.len() >= PLACED_MAX => return Err(None),
            Some(_) => Some(placed.choose(node, &giver).ok_or(None)?),
        };
        let depth = behind.as_ref().and_then(|member| placed.nodes.get_mut(&member.address)).map_or(0, |before| {
            before.followed_by += 1;
            before.depth + 1
        });
        let followed_by = placed.nodes.get(&node).map_or(0, |node| node.followed_by);
        let address = behind.as_ref().map(|member| member.address);
        placed.nodes.insert(node, Node { behind: address, depth, followed_by, gives: has_line });
        match behind {
            Some(behind) => Err(Some(behind)),
            None => {
                placed.first = Some(node);
                Ok(First { followers: self.clone(), blob, node })
            }
        }
    }
}

impl Placed {
    /// Behind whom `node` is to be: a zone-mate if there is one, at the end of a line if none is too long.
    fn choose(&self, node: SocketAddr, giver: impl Fn(SocketAddr) -> Option<Member>) -> Option<Member> {
        let zone = giver(node).map(|member| member.zone);
        let free = self.nodes.iter().filter(|(address, other)| {
            other.gives && other.followed_by < BEHIND_MAX && other.depth < DEPTH_MAX && !self.is_behind(**address, node)
        });
        let known = free.filter_map(|(address, other)| Some((giver(*address)?, other)));
        let chosen = known.min_by_key(|(member, other)| {
            let is_mate = zone.as_ref() == Some(&member.zone);
            (!is_mate, other.followed_by, Reverse(other.depth), member.address)
        });
        chosen.map(|(member, _)| member)
    }

    /// Whether what `node` gets passes `other`.
    fn is_behind(&self, node: SocketAddr, other: SocketAddr) -> bool {
        let mut at = Some(node);
        for _ in 0..=DEPTH_MAX {
            let Some(address) = at else { return false };
            if address == other {
                return true;
            }
            at = self.nodes.get(&address).and_then(|node| node.behind);
        }
        // Depths are those of when they were placed.
        true
    }
}

impl Drop for First {
    fn drop(&mut self) {
        if let Some(placed) = self.followers.blobs.lock().get_mut(&self.blob)
            && placed.first == Some(self.node)
        {
            placed.first = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, number], 7071))
    }

    struct Scene {
        followers: Followers,
        zones: [&'static str; 3],
        leeches: Vec<SocketAddr>,
    }

    impl Scene {
        fn new() -> Self {
            Self { followers: Followers::default(), zones: [""; 3], leeches: Vec::new() }
        }

        fn place(&self, number: u8) -> Result<First, Option<SocketAddr>> {
            let giver = |address: SocketAddr| {
                let SocketAddr::V4(of) = address else { panic!("it is one of these") };
                let zone = self.zones[usize::from(of.ip().octets()[3]) % 3].to_owned();
                (!self.leeches.contains(&address)).then_some(Member { address, zone })
            };
            let placed = self.followers.place(Digest::of(b"blob"), node(number), true, giver, |_| true);
            placed.map_err(|behind| behind.map(|member| member.address))
        }
    }

    #[test]
    fn nodes_stand_in_lines_of_bounded_length() {
        let scene = Scene::new();
        let _first = scene.place(0).unwrap();
        for number in 1..=DEPTH_MAX as u8 {
            assert_eq!(scene.place(number).unwrap_err(), Some(node(number - 1)));
        }
        // The last one is too far from the seeder to be followed; so a second line begins, behind the one before it.
        assert_eq!(scene.place(200).unwrap_err(), Some(node(DEPTH_MAX as u8 - 1)));
        for number in 100..200 {
            assert!(scene.place(number).unwrap_err().is_some());
        }
        let blobs = scene.followers.blobs.lock();
        let placed = &blobs[&Digest::of(b"blob")];
        assert!(placed.nodes.values().all(|node| node.depth <= DEPTH_MAX && node.followed_by <= BEHIND_MAX));
    }

    #[test]
    fn who_comes_again_is_placed_behind_somebody_else_and_never_behind_itself() {
        let scene = Scene::new();
        let first = scene.place(0).unwrap();
        for number in 1..4 {
            assert_eq!(scene.place(number).unwrap_err(), Some(node(number - 1)));
        }
        // 1 gave nothing to 2. 3 follows 2, so 2 must not follow 3.
        assert_eq!(scene.place(2).unwrap_err(), Some(node(0)));
        // The seeder's own follower is gone: the next who asks takes its place, with all that are behind it.
        drop(first);
        let _first = scene.place(2).unwrap();
        assert_eq!(scene.place(9).unwrap_err(), Some(node(3)));
    }

    #[test]
    fn zone_mates_follow_each_other_and_nobody_follows_a_leech() {
        let scene = Scene { zones: ["a", "b", "b"], leeches: vec![node(4)], ..Scene::new() };
        let _first = scene.place(0).unwrap();
        assert_eq!(scene.place(1).unwrap_err(), Some(node(0)));
        assert_eq!(scene.place(3).unwrap_err(), Some(node(0)), "a zone-mate");
        assert_eq!(scene.place(2).unwrap_err(), Some(node(1)), "a zone-mate");
        assert!(scene.place(4).unwrap_err().is_some());
        assert_ne!(scene.place(7).unwrap_err(), Some(node(4)));
    }
}
