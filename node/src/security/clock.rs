//! The clock that validities are compared with.

use std::time::SystemTime;

use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;

/// This machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// By how many seconds it is wrong.
    ahead: i64,
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

    fn since_1970(self) -> std::time::Duration {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let seconds = now.as_secs().saturating_add_signed(self.ahead);
        std::time::Duration::new(seconds, now.subsec_nanos())
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.unix())
    }
}
