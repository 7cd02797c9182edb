//! Who is who in the mesh.

use std::net::{IpAddr, SocketAddr};

/// A machine, by a number that every node computes alike (from its certificate or address).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u64);

impl PeerId {
    /// Of the machine that serves at `address`.
    pub fn at(address: SocketAddr) -> Self {
        let ip = match address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        Self(fold(&[&ip.octets()[..], &address.port().to_be_bytes()].concat()))
    }
}

/// A part of the network within which bytes are cheap, as the owner numbers them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Zone(pub u32);

impl Zone {
    /// Of that name; 0 for the empty one.
    pub fn named(name: &str) -> Self {
        Self(if name.is_empty() { 0 } else { (fold(name.as_bytes()) >> 32) as u32 })
    }
}

fn fold(bytes: &[u8]) -> u64 {
    bytes.iter().fold(bytes.len() as u64, |sum, byte| mix(sum ^ u64::from(*byte)))
}

/// By rendezvous hashing, who has the greatest weight is the first whose turn a piece of a layer is.
pub(crate) const fn weight(peer: PeerId, piece: u32, salt: u64) -> u64 {
    mix(peer.0 ^ mix(piece as u64 ^ salt))
}

/// Spreads the bits of a number (the output function of SplitMix64: Steele, Lea, Flood: Fast splittable pseudorandom number
/// generators).
pub(crate) const fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
