//! A limit of bytes per second.

use std::time::Duration;

/// A bucket that fills with time. What is taken may exceed what is saved: the debt is waited for afterwards, so that a run of
/// any size can go and the mean stays.
#[derive(Clone, Debug)]
pub struct Rate {
    /// 0: no limit.
    bytes_per_sec: u64,
    /// The time at which there is no debt.
    free_at: Duration,
}

/// How much may be saved up while nothing is taken.
const BURST: Duration = Duration::from_millis(100);

impl Rate {
    /// `bytes_per_sec` 0: no limit.
    pub fn new(bytes_per_sec: u64) -> Self {
        Self { bytes_per_sec, free_at: Duration::ZERO }
    }

    /// When something may be taken; at or before `now`: at once.
    pub fn ready_at(&self) -> Duration {
        self.free_at
    }

    /// Whether something may be taken.
    pub fn is_ready(&self, now: Duration) -> bool {
        self.free_at <= now
    }

    /// Takes `bytes`.
    pub fn take(&mut self, now: Duration, bytes: u64) {
        if self.bytes_per_sec > 0 {
            let cost = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_sec);
            let cost = Duration::from_nanos(u64::try_from(cost).unwrap_or(u64::MAX));
            self.free_at = self.free_at.max(now.saturating_sub(BURST)).saturating_add(cost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_mean() {
        let mut rate = Rate::new(1 << 20);
        let (mut now, mut taken) = (Duration::ZERO, 0u64);
        while now < Duration::from_secs(10) {
            now = now.max(rate.ready_at());
            rate.take(now, 300_000);
            taken += 300_000;
        }
        assert!(taken <= (10 << 20) + 2 * 300_000, "{taken}");
        assert!(taken >= 10 << 20, "{taken}");
    }

    #[test]
    fn zero_is_no_limit() {
        let mut rate = Rate::new(0);
        rate.take(Duration::ZERO, u64::MAX);
        assert!(rate.is_ready(Duration::ZERO));
    }
}
