//! How a machine of the mesh is named.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

/// Longest name of a zone, in bytes.
pub const ZONE_LEN_MAX: usize = 64;

/// A machine of the mesh, as others are told of it: `ADDRESS` or `ADDRESS;ZONE` (`docs/wire.md`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where it serves chunks, which is also its name.
    pub address: SocketAddr,
    /// Name of its zone; empty where it has none.
    pub zone: String,
}

/// A text that names no member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no member of a mesh: want IP:PORT or IP:PORT;ZONE")]
pub struct ParseMemberError(String);

/// Where this machine serves chunks, as a seeder told it; none while it is in no mesh. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct OwnAddress {
    address: Arc<RwLock<Option<SocketAddr>>>,
    is_awaited: Arc<AtomicBool>,
}

/// Whether a zone may be called so: up to 64 letters, digits, `.`, `_` and `-`; the empty name is that of no zone.
pub fn is_zone(name: &str) -> bool {
    name.len() <= ZONE_LEN_MAX && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.zone.as_str() {
            "" => write!(f, "{}", self.address),
            zone => write!(f, "{};{zone}", self.address),
        }
    }
}

impl FromStr for Member {
    type Err = ParseMemberError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, zone) = text.split_once(';').unwrap_or((text, ""));
        match address.parse() {
            Ok(address) if is_zone(zone) => Ok(Self { address, zone: zone.to_owned() }),
            _ => Err(ParseMemberError(text.chars().take(128).collect())),
        }
    }
}

impl OwnAddress {
    /// The address.
    pub fn get(&self) -> Option<SocketAddr> {
        *self.address.read()
    }

    /// This machine takes part in a mesh: sooner or later there is an address.
    pub fn is_awaited(&self) -> bool {
        self.is_awaited.load(Ordering::Relaxed) || self.get().is_some()
    }

    /// From now on it does.
    pub fn await_it(&self) {
        self.is_awaited.store(true, Ordering::Relaxed);
    }

    /// From now on it is `address`.
    pub fn set(&self, address: Option<SocketAddr>) {
        *self.address.write() = address;
    }
}
