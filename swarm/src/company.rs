//! Readers in step: containers on many nodes that read the same stretch at the same time.
//!
//! What one of them reads ahead the others will read, too. If each fetched all of it, whoever is a little ahead would fetch everything
//! first and give it to all others. So the *company*, the neighbours that are at the same place, share the stretch: by rendezvous
//! hashing each piece has an order of its own in which they fetch it. Only the first takes it from the seeder; each copy that
//! is told of lets more of them have their turn. What a reader waits for is nobody's turn: it is fetched at once. Nor is what is
//! fetched around the place of a random read: who else reads there is not known.

use std::ops::Range;
use std::time::Duration;

use crate::book::{Book, Offer};
use crate::chunk_set::ChunkSet;
use crate::mesh::Mesh;
use crate::peer::{PeerId, weight};
use crate::swarm::{LayerKey, Priority, Swarm};

/// A neighbour that told nothing for so long does not read.
const HEARD: Duration = Duration::from_secs(1);
/// How far behind somebody may be who is in company: so much is read within a few tells. Who is farther behind would be waited for in vain.
const BEHIND: u64 = 16 << 20;
/// Who has not fetched a piece after so long is not waited for: it takes two tells until all know that somebody has it.
const PATIENCE: Duration = Duration::from_millis(150);
/// Most chunks that are looked at.
const LOOKED_AT: usize = 512;

/// Who reads the same as this node, or nearly.
struct Company<'a> {
    me: PeerId,
    salt: u64,
    piece: u32,
    others: Vec<&'a Offer>,
}

impl Company<'_> {
    /// How many of the others fetch `chunk` before this node, of those that do not have it.
    fn before(&self, chunk: u32) -> usize {
        let weight = |peer: PeerId| weight(peer, chunk / self.piece, self.salt);
        let mine = weight(self.me);
        self.others.iter().filter(|offer| !offer.has(chunk) && weight(offer.peer) > mine).count()
    }
}

impl Swarm {
    /// A reader goes through a layer in order: `window` is read ahead for it, and it will probably read `stretch` after that. Where
    /// others do the same, this node fetches for all what is its turn of both; of the stretch nothing that all others have.
    pub fn read_on(&mut self, now: Duration, layer: LayerKey, window: Range<u32>, stretch: Range<u32>) {
        self.now = self.now.max(now);
        let Some(book) = self.books.get_mut(&layer) else { return };
        let Some(mesh) = &mut book.mesh else { return };
        let count = book.geometry.chunk_count();
        mesh.in_order.insert_run(window.start..window.end.min(count));
        let Some(book) = self.books.get(&layer) else { return };
        let Some(mesh) = &book.mesh else { return };
        let stretch = stretch.start..stretch.end.min(count);
        let Some(company) = self.company(book, mesh, &stretch) else { return };
        let is_urgent = |chunk| book.want(chunk).is_some_and(|want| want.priority() < Some(Priority::Background));
        let is_wanted = |chunk: u32| !mesh.has(chunk) && company.others.iter().any(|offer| !offer.has(chunk));
        let is_mine = |chunk: &u32| is_wanted(*chunk) && !is_urgent(*chunk) && company.before(*chunk) == 0;
        let mine: Vec<u32> = stretch.take(LOOKED_AT).filter(is_mine).collect();
        for chunk in mine {
            self.want(now, layer, chunk..chunk + 1, Priority::Readahead, Duration::MAX);
        }
    }

    /// Of what is queued to be read ahead, what need not wait for another's turn. `None`: all of it, since nobody reads the same.
    pub(crate) fn turns(&self, book: &Book, mesh: &Mesh) -> Option<ChunkSet> {
        let queued = book.queued_set(Priority::Readahead);
        let first = queued.next_in_both(&mesh.in_order, 0, u32::MAX)?;
        let last = queued.last_in_both(&mesh.in_order, u32::MAX)?;
        let company = self.company(book, mesh, &(first..last.saturating_add(1)))?;
        let mut turns = queued.clone();
        for chunk in queued.runs().flatten().filter(|chunk| mesh.in_order.contains(*chunk)).take(LOOKED_AT) {
            let turns_now = usize::from(mesh.copies(chunk)).max(1);
            let wanted_at = book.want(chunk).and_then(|want| want.expire_at);
            let waited =
                wanted_at.map_or(Duration::MAX, |at| (self.now + self.config.readahead_expiry).saturating_sub(at));
            if waited < PATIENCE && company.before(chunk) >= turns_now {
                turns.remove(chunk);
            }
        }
        Some(turns)
    }

    fn company<'a>(&self, book: &'a Book, mesh: &Mesh, stretch: &Range<u32>) -> Option<Company<'a>> {
        let chunks = |bytes: u64| u32::try_from(bytes >> book.geometry.chunk_log2()).unwrap_or(u32::MAX);
        let stretch = stretch.start.saturating_sub(chunks(BEHIND))..stretch.end;
        let reads = |has: &ChunkSet| !has.is_full() && has.next_in_both(has, stretch.start, stretch.end).is_some();
        let is_company = |offer: &&Offer| {
            offer.far.is_none() && offer.heard + HEARD > self.now && offer.has.as_ref().is_some_and(reads)
        };
        let others: Vec<&Offer> = book.sources.values().filter(is_company).collect();
        let piece = chunks(self.config.peer_run_bytes).max(1);
        (!others.is_empty()).then_some(Company { me: mesh.me, salt: mesh.salt, piece, others })
    }
}
