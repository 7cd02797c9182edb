//! A small network: registry, seeder and node are hosts of their own (network namespaces) on one switch.
//!
//! The seeder also has a direct link to the registry, so that what it fetches there can be counted by itself. Every link has
//! the same speed, in both directions. Nothing reaches any other machine.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::process::run;

/// One of the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Where the image registry runs.
    Registry,
    /// Where the seeder runs.
    Seeder,
    /// Where containerd and the snapshotter run.
    Node,
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
    const ALL: [Self; 3] = [Self::Registry, Self::Seeder, Self::Node];

    /// Its address on the switch.
    pub const fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.number())
    }

    const fn number(self) -> u8 {
        match self {
            Self::Registry => 2,
            Self::Seeder => 3,
            Self::Node => 4,
        }
    }

    const fn namespace(self) -> &'static str {
        match self {
            Self::Registry => "registry",
            Self::Seeder => "seeder",
            Self::Node => "node",
        }
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
    /// Three hosts on a switch; see the module.
    Hosts(Hosts),
    /// The machine's own network: no link speed and no counters.
    Machine,
}

impl Network {
    /// Builds the hosts. Must be called inside the sandbox, whose end removes them.
    pub fn hosts() -> Result<Self> {
        Hosts::create().map(Self::Hosts)
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
                command.arg(format!("--net=/run/netns/{}", place.namespace())).arg("--").arg(program);
                command
            }
            Self::Machine => Command::new(program),
        }
    }

    /// Counter of the bytes that `place` receives over `link`, headers included; `None` on the machine's own network.
    pub const fn counter(&self, place: Place, link: Link) -> Option<Counter> {
        match self {
            Self::Hosts(_) => Some(Counter { place, link }),
            Self::Machine => None,
        }
    }

    /// Gives every link of the hosts this speed, both ways.
    pub fn set_speed(&self, megabits: u32) -> Result<()> {
        match self {
            Self::Hosts(hosts) => hosts.set_speed(megabits),
            Self::Machine => Ok(()),
        }
    }
}

/// The three hosts.
#[derive(Debug)]
pub struct Hosts(());

impl Hosts {
    fn create() -> Result<Self> {
        fs::create_dir_all("/run/netns").context("cannot create /run/netns")?;
        let mut script = String::from(
            "set -e\nip netns add switch\nip -n switch link add br0 type bridge\nip -n switch link set br0 up\n",
        );
        for place in Place::ALL {
            let (name, address) = (place.namespace(), place.address());
            script.push_str(&format!(
                "ip netns add {name}\n\
                 nsenter --net=/run/netns/{name} sh -c 'echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6'\n\
                 ip -n switch link add to-{name} type veth peer name eth0 netns {name}\n\
                 ip -n switch link set to-{name} master br0 up\n\
                 ip -n {name} addr add {address}/24 dev eth0\n\
                 ip -n {name} link set eth0 up\n\
                 ip -n {name} link set lo up\n"
            ));
        }
        let (registry, seeder) = (Place::Registry.address(), Place::Seeder.address());
        script.push_str(&format!(
            "ip -n registry link add eth1 type veth peer name eth1 netns seeder\n\
             ip -n registry link set eth1 up\n\
             ip -n seeder link set eth1 up\n\
             ip -n registry route add {seeder}/32 dev eth1 src {registry}\n\
             ip -n seeder route add {registry}/32 dev eth1 src {seeder}\n"
        ));
        run(Command::new("sh").args(["-c", &script])).context("cannot build the lab's network")?;
        Ok(Self(()))
    }

    fn set_speed(&self, megabits: u32) -> Result<()> {
        let mut script = String::from("set -e\n");
        let mut ends = vec![("registry", "eth1".to_owned()), ("seeder", "eth1".to_owned())];
        for place in Place::ALL {
            ends.push((place.namespace(), "eth0".to_owned()));
            ends.push(("switch", format!("to-{}", place.namespace())));
        }
        // A burst of 2 ms lets the timer's granularity not limit the rate; 60 ms of queue is a switch's, not a bloated router's.
        let burst = (u64::from(megabits) * 1_000_000 / 8 / 500).max(128 * 1024);
        let queue = (u64::from(megabits) * 1_000_000 / 8 * 60 / 1000).max(512 * 1024);
        for (namespace, device) in ends {
            script.push_str(&format!(
                "tc -n {namespace} qdisc del dev {device} root 2>/dev/null || true\n\
                 tc -n {namespace} qdisc add dev {device} root handle 1: htb default 1\n\
                 tc -n {namespace} class add dev {device} parent 1: classid 1:1 htb rate {megabits}mbit burst {burst} cburst {burst} quantum 60000\n\
                 tc -n {namespace} qdisc add dev {device} parent 1:1 handle 2: bfifo limit {queue}\n"
            ));
        }
        run(Command::new("sh").args(["-c", &script])).context("cannot set the speed of the lab's links")?;
        Ok(())
    }
}

/// A link's counter.
#[derive(Clone, Copy, Debug)]
pub struct Counter {
    place: Place,
    link: Link,
}

impl Counter {
    /// Bytes since the link was made.
    pub fn read(self) -> Result<u64> {
        let Self { place, link } = self;
        let path = format!("/run/netns/{}", place.namespace());
        // A thread of its own enters the namespace: /proc/thread-self/net shows its counters.
        let read = std::thread::spawn(move || -> Result<String> {
            let namespace = File::open(&path).with_context(|| format!("cannot open {path}"))?;
            setns(namespace, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {path}"))?;
            fs::read_to_string("/proc/thread-self/net/dev").context("cannot read interface counters")
        });
        let table = read.join().map_err(|_| anyhow!("the thread that reads counters panicked"))??;
        let line = table.lines().find_map(|line| line.trim().strip_prefix(link.device())?.strip_prefix(':'));
        let bytes = line.and_then(|counters| counters.split_whitespace().next()?.parse().ok());
        bytes.with_context(|| format!("{} has no link {}", place.namespace(), link.device()))
    }
}
