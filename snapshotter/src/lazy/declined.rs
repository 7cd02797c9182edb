//! Why layers were left to containerd, for `status`.

use std::collections::VecDeque;

use parking_lot::Mutex;

/// Reasons that are remembered: those of the latest few hundred images. They are gone with the daemon.
const REMEMBERED: usize = 10_000;

/// Chain ids and reasons, oldest first.
#[derive(Debug, Default)]
pub struct Declined(Mutex<VecDeque<(String, String)>>);

impl Declined {
    /// Remembers why `target` is not lazy.
    pub fn note(&self, target: &str, reason: &str) {
        let mut notes = self.0.lock();
        notes.retain(|(noted, _)| noted != target);
        if notes.len() == REMEMBERED {
            notes.pop_front();
        }
        notes.push_back((target.to_owned(), reason.to_owned()));
    }

    /// Why `target` is not lazy, as far as this daemon knows.
    pub fn reason(&self, target: &str) -> Option<String> {
        self.0.lock().iter().find(|(noted, _)| noted == target).map(|(_, reason)| reason.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_latest_reason() {
        let declined = Declined::default();
        declined.note("a", "no seeder");
        declined.note("a", "stalled");
        assert_eq!(declined.reason("a").as_deref(), Some("stalled"));
        assert_eq!(declined.reason("b"), None);
        for number in 0..REMEMBERED {
            declined.note(&number.to_string(), "x");
        }
        assert_eq!(declined.reason("a"), None);
    }
}
