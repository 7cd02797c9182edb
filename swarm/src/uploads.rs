//! Whether a request of a peer is served now.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::peer::PeerId;
use crate::rate::Rate;
use crate::swarm::Priority;

/// Bounds of what a machine gives to others.
#[derive(Clone, Debug)]
pub struct UploadConfig {
    /// Most requests at once.
    pub slots: usize,
    /// Of these, how many only demand may take: somebody waits for it.
    pub demand_slots: usize,
    /// Most requests of one peer at once.
    pub peer_slots: usize,
    /// Most bytes per second; 0: no limit. Debt from one large answer is waited for before the next.
    pub bytes_per_sec: u64,
    /// Nothing is given.
    pub leech: bool,
}

impl Default for UploadConfig {
    fn default() -> Self {
        Self { slots: 24, demand_slots: 8, peer_slots: 4, bytes_per_sec: 0, leech: false }
    }
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Serve it; [`Uploads::end`] is called when it ended.
    Serve,
    /// Say at once that all slots are taken, when to come again, and who else has it.
    Busy {
        /// When to come again.
        retry_after: Duration,
    },
    /// This peer gets nothing.
    Refused,
}

/// The requests that are being served.
#[derive(Debug)]
pub struct Uploads {
    config: UploadConfig,
    by_peer: BTreeMap<PeerId, usize>,
    served: usize,
    rate: Rate,
}

/// How soon a slot may be free.
const RETRY: Duration = Duration::from_millis(20);

impl Uploads {
    /// Nothing is being served.
    pub fn new(config: UploadConfig) -> Self {
        let rate = Rate::new(config.bytes_per_sec);
        Self { config, by_peer: BTreeMap::new(), served: 0, rate }
    }

    /// A peer asks for `bytes`.
    pub fn request(&mut self, now: Duration, peer: PeerId, priority: Priority, bytes: u64) -> Admission {
        if self.config.leech {
            return Admission::Refused;
        }
        if !self.rate.is_ready(now) {
            return Admission::Busy { retry_after: self.rate.ready_at().saturating_sub(now).max(RETRY) };
        }
        let reserve = if priority == Priority::Demand { 0 } else { self.config.demand_slots };
        let of_peer = self.by_peer.get(&peer).copied().unwrap_or(0);
        if self.served + reserve >= self.config.slots || of_peer >= self.config.peer_slots {
            return Admission::Busy { retry_after: RETRY };
        }
        self.rate.take(now, bytes);
        self.served += 1;
        *self.by_peer.entry(peer).or_default() += 1;
        Admission::Serve
    }

    /// So many bytes more went out than were told to [`Uploads::request`].
    pub fn sent(&mut self, now: Duration, bytes: u64) {
        self.rate.take(now, bytes);
    }

    /// What was being served to a peer ended, however.
    pub fn end(&mut self, peer: PeerId) {
        if let Some(of_peer) = self.by_peer.get_mut(&peer) {
            self.served -= 1;
            *of_peer -= 1;
            if *of_peer == 0 {
                self.by_peer.remove(&peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_slots_for_demand_and_for_others() {
        let config = UploadConfig { slots: 6, demand_slots: 2, peer_slots: 3, ..UploadConfig::default() };
        let mut uploads = Uploads::new(config);
        let mut ask = |peer, priority| uploads.request(Duration::ZERO, PeerId(peer), priority, 1) == Admission::Serve;
        assert!(ask(1, Priority::Background) && ask(1, Priority::Background) && ask(1, Priority::Background));
        assert!(!ask(1, Priority::Demand), "one peer has its share");
        assert!(ask(2, Priority::Readahead));
        assert!(!ask(3, Priority::Background), "the rest is for demand");
        assert!(ask(3, Priority::Demand) && ask(3, Priority::Demand));
        assert!(!ask(4, Priority::Demand));
        uploads.end(PeerId(1));
        assert_eq!(uploads.request(Duration::ZERO, PeerId(4), Priority::Demand, 1), Admission::Serve);
    }

    #[test]
    fn keeps_the_rate_and_gives_nothing_as_a_leech() {
        let mut uploads = Uploads::new(UploadConfig { bytes_per_sec: 1000, ..UploadConfig::default() });
        let mut ask = |now: u64| uploads.request(Duration::from_secs(now), PeerId(1), Priority::Demand, 3000);
        assert_eq!(ask(1), Admission::Serve);
        assert!(matches!(ask(2), Admission::Busy { retry_after } if retry_after > Duration::from_secs(1)));
        assert_eq!(ask(4), Admission::Serve);
        let mut leech = Uploads::new(UploadConfig { leech: true, ..UploadConfig::default() });
        assert_eq!(leech.request(Duration::ZERO, PeerId(1), Priority::Demand, 1), Admission::Refused);
    }
}
