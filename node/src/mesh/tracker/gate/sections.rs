//! Which nodes get index sections from the seeder, and got them.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use layer::Digest;
use layer::index::Section;
use parking_lot::Mutex;

/// So many nodes get a section at the same time; those that come meanwhile are sent to them later.
const AT_ONCE: usize = 4;
/// Of so many nodes it is remembered that they got a section.
const REMEMBERED: usize = 16;
/// Sections of which that is remembered.
const SECTIONS_MAX: usize = 4096;

/// Who gets and got which sections. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Sections {
    given: Arc<Mutex<HashMap<(Digest, Section), Given>>>,
}

#[derive(Debug, Default)]
struct Given {
    under_way: usize,
    to: VecDeque<SocketAddr>,
}

/// One of the places of a section's answers under way.
#[derive(Debug)]
pub(super) struct Place {
    sections: Sections,
    key: (Digest, Section),
    to: SocketAddr,
}

impl Sections {
    /// Nodes that got a section lately.
    pub(super) fn with_it(&self, blob: Digest, section: Section) -> Vec<SocketAddr> {
        self.given.lock().get(&(blob, section)).map(|given| given.to.iter().copied().collect()).unwrap_or_default()
    }

    /// A place for `to`; `None` while all are taken.
    pub(super) fn place(&self, blob: Digest, section: Section, to: SocketAddr) -> Option<Place> {
        let mut all = self.given.lock();
        if all.len() >= SECTIONS_MAX {
            all.retain(|_, given| given.under_way > 0);
        }
        let given = all.entry((blob, section)).or_default();
        if given.under_way >= AT_ONCE {
            return None;
        }
        given.under_way += 1;
        Some(Place { sections: self.clone(), key: (blob, section), to })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(given) = self.sections.given.lock().get_mut(&self.key) {
            given.under_way -= 1;
            // Who broke off is named in vain, and asked no second time.
            if !given.to.contains(&self.to) {
                given.to.push_front(self.to);
                given.to.truncate(REMEMBERED);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_get_a_section_at_once_and_are_remembered() {
        let (sections, blob) = (Sections::default(), Digest::of(b"blob"));
        let at = |port: u16| SocketAddr::from(([10, 0, 0, 1], port));
        let mut places: Vec<_> =
            (0..AT_ONCE as u16).map(|port| sections.place(blob, Section::Spans, at(port))).collect();
        assert!(places.iter().all(Option::is_some));
        assert!(sections.place(blob, Section::Spans, at(9)).is_none());
        assert!(sections.place(blob, Section::Entries, at(9)).is_some());
        assert!(sections.with_it(blob, Section::Spans).is_empty());
        drop(places.remove(1));
        assert_eq!(sections.with_it(blob, Section::Spans), [at(1)]);
        for port in 10..50 {
            drop(sections.place(blob, Section::Spans, at(port)).unwrap());
        }
        assert_eq!(sections.with_it(blob, Section::Spans).len(), REMEMBERED);
        assert_eq!(sections.with_it(blob, Section::Spans)[0], at(49));
    }
}
