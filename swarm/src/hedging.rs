//! When a neighbour is late, and how many bytes may be spent on asking another one.

use std::time::Duration;

/// Buckets of a quarter of an octave from 0.25 ms on: the last one begins at 14 s.
const BUCKETS: usize = 64;
const FIRST: Duration = Duration::from_micros(250);
/// When so many were seen, all counts are halved: what is learned follows the network.
const SEEN_MAX: u32 = 1024;
/// Fewer teach nothing.
const SEEN_MIN: u32 = 32;

/// What was learned of the neighbours' answers, and the budget.
#[derive(Debug)]
pub(crate) struct Hedging {
    counts: [u32; BUCKETS],
    seen: u32,
    delivered_bytes: u64,
    hedged_bytes: u64,
}

impl Hedging {
    pub(crate) fn new() -> Self {
        Self { counts: [0; BUCKETS], seen: 0, delivered_bytes: 0, hedged_bytes: 0 }
    }

    /// A neighbour gave a chunk `gap` after the fetch's last sign of life.
    pub(crate) fn observe(&mut self, gap: Duration) {
        let ratio = gap.as_nanos().max(1) as f64 / FIRST.as_nanos() as f64;
        let at = (ratio.log2() * 4.0).ceil().clamp(0.0, (BUCKETS - 1) as f64) as usize;
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
            self.seen += 1;
        }
        if self.seen >= SEEN_MAX {
            self.counts.iter_mut().for_each(|count| *count /= 2);
            self.seen = self.counts.iter().sum();
        }
    }

    /// The time within which 98 of 100 signs of life came; `None` while too little was seen.
    pub(crate) fn limit(&self) -> Option<Duration> {
        let mut left = (self.seen >= SEEN_MIN).then(|| self.seen - self.seen.div_ceil(50))?;
        let at = self.counts.iter().position(|count| {
            let is_it = *count >= left;
            left = left.saturating_sub(*count);
            is_it
        })?;
        Some(FIRST.mul_f64((at as f64 / 4.0).exp2()))
    }

    pub(crate) fn delivered(&mut self, bytes: u64) {
        self.delivered_bytes = self.delivered_bytes.saturating_add(bytes);
    }

    /// Spends `bytes` where `percent` of what was delivered and `floor` allow it.
    pub(crate) fn spend(&mut self, bytes: u64, percent: u64, floor: u64) -> bool {
        let limit = (self.delivered_bytes / 100 * percent).saturating_add(floor);
        let is_allowed = self.hedged_bytes.saturating_add(bytes) <= limit;
        if is_allowed {
            self.hedged_bytes += bytes;
        }
        is_allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learns_a_percentile() {
        let mut hedging = Hedging::new();
        assert_eq!(hedging.limit(), None);
        for n in 0..5000u64 {
            hedging.observe(Duration::from_millis(if n % 100 == 0 { 900 } else { 2 + n % 7 }));
        }
        let limit = hedging.limit().unwrap();
        assert!(limit >= Duration::from_millis(8) && limit < Duration::from_millis(12), "{limit:?}");
    }

    #[test]
    fn keeps_the_budget() {
        let mut hedging = Hedging::new();
        assert!(hedging.spend(1000, 3, 1000));
        assert!(!hedging.spend(1, 3, 1000));
        hedging.delivered(100_000);
        assert!(hedging.spend(3000, 3, 1000));
        assert!(!hedging.spend(1, 3, 1000));
    }
}
