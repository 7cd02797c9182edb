//! The clock that validities are compared with.

use std::time::{Duration, SystemTime};

use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;

/// This machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// By how many seconds it is wrong.
    #[cfg(test)]
    ahead: i64,
}

/// How long the machine has been on, also while it slept. Nobody sets this clock; an [`Instant`](std::time::Instant) stands still
/// while the machine sleeps.
pub(crate) fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(time.tv_sec.try_into().unwrap_or_default(), time.tv_nsec.try_into().unwrap_or_default())
}

impl Clock {
    /// A clock that is so many seconds ahead of the machine's, or behind.
    #[cfg(test)]
    pub(crate) const fn ahead_by(ahead: i64) -> Self {
        Self { ahead }
    }

    /// What it shows.
    pub fn now(self) -> SystemTime {
        SystemTime::UNIX_EPOCH + self.since_1970()
    }

    /// The same for certificates.
    pub(super) fn unix(self) -> UnixTime {
        UnixTime::since_unix_epoch(self.since_1970())
    }

    fn since_1970(self) -> Duration {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        #[cfg(test)]
        let now = Duration::new(now.as_secs().saturating_add_signed(self.ahead), now.subsec_nanos());
        now
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.unix())
    }
}
