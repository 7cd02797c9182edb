//! A small network: registry, seeder and every node are hosts of their own (network namespaces) on one switch.
//!
//! The seeder also has a direct link to the registry, so that what it fetches there can be counted by itself. Every link has
//! a speed, the same in both directions. Nothing reaches any other machine.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::process::run;

/// Where the kernel's names of network namespaces are.
const NAMESPACES: &str = "/run/netns";

/// One of the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// Where the image registry runs.
    Registry,
    /// Where the seeder runs.
    Seeder,
    /// Where the containerd and the snapshotter of the node with this number run, which is below 10 000.
    Node(u16),
}

/// A link of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// To the switch.
    Switch,
    /// Between seeder and registry.
    Direct,
}

impl Place {
    /// Its address on the switch.
    pub const fn address(self) -> Ipv4Addr {
        match self {
            Self::Registry => Ipv4Addr::new(10, 77, 0, 2),
            Self::Seeder => Ipv4Addr::new(10, 77, 0, 3),
            Self::Node(number) => Ipv4Addr::new(10, 77, 1 + (number / 200) as u8, 1 + (number % 200) as u8),
        }
    }

    fn namespace(self) -> String {
        match self {
            Self::Registry => "registry".to_owned(),
            Self::Seeder => "seeder".to_owned(),
            Self::Node(number) => format!("node-{number}"),
        }
    }

    /// The switch's end of its link.
    fn port(self) -> String {
        format!("to-{}", self.namespace())
    }
}

impl Link {
    const fn device(self) -> &'static str {
        match self {
            Self::Switch => "eth0",
            Self::Direct => "eth1",
        }
    }
}

/// Where the programs run: on hosts of the lab, or (to reach registries elsewhere) all on the machine's own network.
#[derive(Debug)]
pub enum Network {
    /// Hosts on a switch; see the module.
    Hosts(Hosts),
    /// The machine's own network: no link speed and no counters.
    Machine,
}

impl Network {
    /// Builds the hosts of registry and seeder. Must be called inside the sandbox, whose end removes them.
    pub fn hosts() -> Result<Self> {
        Hosts::create().map(Self::Hosts)
    }

    /// Adds the host of the node with this number, which no other node has.
    pub fn add_node(&self, number: u16) -> Result<Host> {
        let place = Place::Node(number);
        match self {
            Self::Hosts(hosts) => {
                let host = Host { place, is_own: true };
                hosts.add(place)?;
                Ok(host)
            }
            Self::Machine => Ok(Host { place, is_own: false }),
        }
    }

    /// Address under which `place` is reached.
    pub const fn address(&self, place: Place) -> Ipv4Addr {
        match self {
            Self::Hosts(_) => place.address(),
            Self::Machine => Ipv4Addr::LOCALHOST,
        }
    }

    /// A command that runs `program` at `place`.
    pub fn command(&self, place: Place, program: impl AsRef<std::ffi::OsStr>) -> Command {
        match self {
            Self::Hosts(_) => {
                // Not `ip netns exec`: that makes a mount namespace for each, and mounts must be seen by all.
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={NAMESPACES}/{}", place.namespace())).arg("--").arg(program);
                command
            }
            Self::Machine => Command::new(program),
        }
    }

    /// Counter of the bytes that `place` receives and sends over `link`, headers included; `None` on the machine's own network.
    pub const fn counter(&self, place: Place, link: Link) -> Option<Counter> {
        match self {
            Self::Hosts(_) => Some(Counter { place, link }),
            Self::Machine => None,
        }
    }

    /// Gives every link of the hosts this speed, both ways, those of nodes that are added later too.
    pub fn set_speed(&self, megabits: u32) -> Result<()> {
        match self {
            Self::Hosts(hosts) => hosts.set_speed(megabits),
            Self::Machine => Ok(()),
        }
    }

    /// Gives all links of one host another speed than the others have, until [`Network::set_speed`] is called.
    pub fn set_speed_of(&self, place: Place, megabits: u32) -> Result<()> {
        match self {
            Self::Hosts(_) => shape(&[place], megabits),
            Self::Machine => Ok(()),
        }
    }

    /// Lets `place` send only so many bytes per second to the switch, until [`Network::set_speed`] is called. What it receives
    /// comes as before.
    pub fn throttle(&self, place: Place, bytes_per_second: u32) -> Result<()> {
        match self {
            Self::Hosts(_) => throttle(place, bytes_per_second),
            Self::Machine => Ok(()),
        }
    }

    /// Cuts the network in two, `apart` and all others, without a word to anybody; each part is a network. When `is_split` is
    /// false, `apart` is put together with the others again.
    pub fn split(&self, apart: &[Place], is_split: bool) -> Result<()> {
        let switch = if is_split { "br1" } else { "br0" };
        let mut text = String::from("set -e\n");
        if is_split {
            text.push_str("ip -n switch link add br1 type bridge 2>/dev/null || true\nip -n switch link set br1 up\n");
        }
        for place in apart {
            text.push_str(&format!("ip -n switch link set {} master {switch}\n", place.port()));
        }
        script(&text).with_context(|| format!("cannot put {apart:?} on {switch}"))
    }

    /// Runs `work` on a thread of its own, whose sockets are at `place`.
    pub fn at<T: Send + 'static>(
        &self,
        place: Place,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> JoinHandle<Result<T>> {
        let enters = matches!(self, Self::Hosts(_));
        std::thread::spawn(move || {
            if enters {
                enter(place)?;
            }
            work()
        })
    }

    /// Lets the switch drop everything from and to `place`, without a word to anybody, until `isolated` is false again.
    pub fn isolate(&self, place: Place, isolated: bool) -> Result<()> {
        // States of a bridge's port: disabled, and forwarding.
        let state = if isolated { "0" } else { "3" };
        let mut command = Command::new("bridge");
        command.args(["-n", "switch", "link", "set", "dev", &place.port(), "state", state]);
        run(&mut command).with_context(|| format!("cannot cut {place:?} off or connect it again"))?;
        Ok(())
    }
}

/// The host of a node; its end is that of its link. Without hosts, the machine.
#[derive(Debug)]
pub struct Host {
    place: Place,
    is_own: bool,
}

impl Host {
    /// Which one.
    pub const fn place(&self) -> Place {
        self.place
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The link goes with its other end, also while a process that is about to end still holds the namespace.
        let name = self.place.namespace();
        let (port, forget) = (self.place.port(), format!("ip netns del {name}"));
        if self.is_own {
            let _ = run(Command::new("sh").args(["-c", &format!("ip -n switch link del {port}; {forget}")]));
        }
    }
}

/// The hosts.
#[derive(Debug)]
pub struct Hosts {
    /// Speed of links in Mbit/s; 0 until one was set.
    speed: AtomicU32,
}

impl Hosts {
    fn create() -> Result<Self> {
        fs::create_dir_all(NAMESPACES).with_context(|| format!("cannot create {NAMESPACES}"))?;
        script("set -e\nip netns add switch\nip -n switch link add br0 type bridge\nip -n switch link set br0 up\n")?;
        let this = Self { speed: AtomicU32::new(0) };
        this.add(Place::Registry)?;
        this.add(Place::Seeder)?;
        let (registry, seeder) = (Place::Registry.address(), Place::Seeder.address());
        script(&format!(
            "set -e\n\
             ip -n registry link add eth1 type veth peer name eth1 netns seeder\n\
             ip -n registry link set eth1 up\n\
             ip -n seeder link set eth1 up\n\
             ip -n registry route add {seeder}/32 dev eth1 src {registry}\n\
             ip -n seeder route add {registry}/32 dev eth1 src {seeder}\n"
        ))?;
        Ok(this)
    }

    fn add(&self, place: Place) -> Result<()> {
        let (name, port, address) = (place.namespace(), place.port(), place.address());
        script(&format!(
            "set -e\n\
             ip netns add {name}\n\
             nsenter --net={NAMESPACES}/{name} sh -c 'echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6'\n\
             ip -n switch link add {port} type veth peer name eth0 netns {name}\n\
             ip -n switch link set {port} master br0 up\n\
             ip -n {name} addr add {address}/16 dev eth0\n\
             ip -n {name} link set eth0 up\n\
             ip -n {name} link set lo up\n"
        ))?;
        match self.speed.load(Ordering::Relaxed) {
            0 => Ok(()),
            megabits => shape(&[place], megabits),
        }
    }

    fn set_speed(&self, megabits: u32) -> Result<()> {
        self.speed.store(megabits, Ordering::Relaxed);
        let mut places = vec![Place::Registry, Place::Seeder];
        for entry in fs::read_dir(NAMESPACES).with_context(|| format!("cannot list {NAMESPACES}"))?.flatten() {
            let number = entry.file_name().to_str().and_then(|name| name.strip_prefix("node-")?.parse().ok());
            places.extend(number.map(Place::Node));
        }
        shape(&places, megabits)
    }
}

/// Gives all links of `places` a speed.
fn shape(places: &[Place], megabits: u32) -> Result<()> {
    let mut ends = Vec::new();
    for &place in places {
        ends.push((place.namespace(), Link::Switch.device().to_owned()));
        ends.push(("switch".to_owned(), place.port()));
        if let Place::Registry | Place::Seeder = place {
            ends.push((place.namespace(), Link::Direct.device().to_owned()));
        }
    }
    // A burst of 2 ms lets the timer's granularity not limit the rate; 60 ms of queue is a switch's, not a bloated router's.
    let burst = (u64::from(megabits) * 1_000_000 / 8 / 500).max(128 * 1024);
    let queue = (u64::from(megabits) * 1_000_000 / 8 * 60 / 1000).max(512 * 1024);
    let mut text = String::from("set -e\n");
    for (namespace, device) in ends {
        text.push_str(&format!(
            "tc -n {namespace} qdisc del dev {device} root 2>/dev/null || true\n\
             tc -n {namespace} qdisc add dev {device} root handle 1: htb default 1\n\
             tc -n {namespace} class add dev {device} parent 1: classid 1:1 htb rate {megabits}mbit burst {burst} cburst {burst} quantum 60000\n\
             tc -n {namespace} qdisc add dev {device} parent 1:1 handle 2: bfifo limit {queue}\n"
        ));
    }
    script(&text).context("cannot set the speed of the lab's links")
}

fn throttle(place: Place, bytes_per_second: u32) -> Result<()> {
    let (namespace, device) = (place.namespace(), Link::Switch.device());
    // Room for two packets: what is in the queue would be sent first.
    script(&format!(
        "set -e\n\
         tc -n {namespace} qdisc del dev {device} root 2>/dev/null || true\n\
         tc -n {namespace} qdisc add dev {device} root handle 1: htb default 1\n\
         tc -n {namespace} class add dev {device} parent 1: classid 1:1 htb rate {bytes_per_second}bps burst 1600 cburst 1600 quantum 1600\n\
         tc -n {namespace} qdisc add dev {device} parent 1:1 handle 2: bfifo limit 3200\n"
    ))
    .with_context(|| format!("cannot slow {place:?} down"))
}

/// From here on the sockets of this thread are at `place`, and `/proc/thread-self/net` is of it.
fn enter(place: Place) -> Result<()> {
    let path = Path::new(NAMESPACES).join(place.namespace());
    let namespace = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    setns(namespace, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {}", path.display()))
}

fn script(text: &str) -> Result<()> {
    run(Command::new("sh").args(["-c", text])).context("cannot change the lab's network")?;
    Ok(())
}

/// Bytes that a host received and sent over a link, headers included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// What came.
    pub received: u64,
    /// What went out.
    pub sent: u64,
}

impl Traffic {
    /// What came and went after `before`.
    #[must_use]
    pub const fn since(self, before: Self) -> Self {
        Self { received: self.received.saturating_sub(before.received), sent: self.sent.saturating_sub(before.sent) }
    }
}

/// A link's counter.
#[derive(Clone, Copy, Debug)]
pub struct Counter {
    place: Place,
    link: Link,
}

impl Counter {
    /// Bytes that came since the link was made.
    pub fn read(self) -> Result<u64> {
        self.traffic().map(|traffic| traffic.received)
    }

    /// Bytes that came and went since the link was made.
    pub fn traffic(self) -> Result<Traffic> {
        let place = self.place;
        let read = std::thread::spawn(move || {
            enter(place)?;
            fs::read_to_string("/proc/thread-self/net/dev").context("cannot read interface counters")
        });
        let table = read.join().map_err(|_| anyhow!("the thread that reads counters panicked"))??;
        let device = self.link.device();
        traffic_of(&table, device).with_context(|| format!("{:?} has no link {device}", self.place))
    }
}

/// A device's line of the kernel's table, whose first column behind the name is what came and whose ninth is what went.
fn traffic_of(table: &str, device: &str) -> Option<Traffic> {
    let line = table.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'))?;
    let mut columns = line.split_whitespace();
    let received = columns.next()?.parse().ok()?;
    Some(Traffic { received, sent: columns.nth(7)?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_has_an_address_of_its_own() {
        let places = [Place::Registry, Place::Seeder].into_iter().chain((0..10_000).map(Place::Node));
        let addresses: std::collections::BTreeSet<_> = places.map(Place::address).collect();
        assert_eq!(addresses.len(), 10_002);
        assert!(addresses.iter().all(|address| ![0, 255].contains(&address.octets()[3])));
    }

    #[test]
    fn a_device_is_found_in_the_kernels_table() {
        let table = "Inter-|   Receive                |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes\n    \
                     lo:     120       2    0    0    0     0          0         0      120       2    0    0    0     0       0          0\n  \
                     eth0: 1234567  890    0    0    0     0          0         0  7654321     321    0    0    0     0       0          0\n";
        assert_eq!(traffic_of(table, "eth0"), Some(Traffic { received: 1_234_567, sent: 7_654_321 }));
        assert_eq!(traffic_of(table, "eth1"), None);
    }
}
