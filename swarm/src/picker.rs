//! Policy: which source to ask for which run, and whether now. Looks at the books and changes nothing.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use crate::book::Book;
use crate::config::Config;
use crate::source::Source;
use crate::swarm::{Priority, SourceId};

/// What to do about a queued chunk.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Ask this source for this run.
    Fetch {
        /// Whom.
        source: SourceId,
        /// What; holds the chunk.
        run: Range<u32>,
    },
    /// The sources that it would come from have enough to do.
    Busy,
    /// No source can be asked before this time; `None`: none at all.
    Park(Option<Duration>),
}

/// Chooses for `chunk`, which is queued with `priority`. Sources in `except` are not asked.
pub(crate) fn choose(
    config: &Config,
    sources: &BTreeMap<SourceId, Source>,
    book: &Book,
    now: Duration,
    chunk: u32,
    priority: Priority,
    except: Option<SourceId>,
) -> Choice {
    let mut usable: Vec<(SourceId, &Source)> = Vec::new();
    let mut resting: Vec<(Duration, &Source)> = Vec::new();
    for id in book.sources.keys().filter(|id| Some(**id) != except) {
        let Some(source) = sources.get(id) else { continue };
        let avoided = book.want(chunk).and_then(|want| want.avoid.get(id)).map_or(Duration::ZERO, |avoid| avoid.until);
        let from = source.rests_until(priority).max(avoided);
        if from > now {
            resting.push((from, source));
        } else {
            usable.push((*id, source));
        }
    }
    // Nearest kind first. A nearest one that is busy is waited for: what lies behind it serves the whole cluster.
    let Some(kind) = usable.iter().map(|(_, source)| source.kind).min() else {
        return Choice::Park(resting.iter().map(|(from, _)| *from).min());
    };
    if priority == Priority::Background {
        // Nobody waits for it, so it leaves a nearer source for a farther one only when that one seems gone for good.
        let nearer = resting.iter().filter(|(_, source)| source.kind < kind);
        let until = nearer.filter_map(|(from, source)| {
            let gone_at = source.fails_for_at(config.background_fallback_after).unwrap_or(*from);
            (gone_at > now).then_some(gone_at.min(*from))
        });
        if let Some(until) = until.min() {
            return Choice::Park(Some(until));
        }
    }
    let nearest = usable.iter().filter(|(_, source)| source.kind == kind);
    let Some((id, source)) = nearest.min_by_key(|(id, source)| (source.in_flight_bytes(), *id)) else {
        return Choice::Park(None);
    };
    let run = run(config, book, *id, chunk, priority);
    if source.has_room(config, priority, book.bytes(&book.cover(*id, &run))) {
        Choice::Fetch { source: *id, run }
    } else {
        Choice::Busy
    }
}

/// The longest run from `chunk` on whose chunks all wait for a fetch, with any priority: the bytes of a readahead behind
/// a demanded chunk come after it and save a request.
fn run(config: &Config, book: &Book, source: SourceId, chunk: u32, priority: Priority) -> Range<u32> {
    let has_units = book.sources.get(&source).is_some_and(|units| !units.is_empty());
    let bytes_max = match priority {
        Priority::Demand | Priority::Readahead => config.demand_run_bytes,
        Priority::Background if has_units => config.background_run_bytes_units,
        Priority::Background => config.background_run_bytes,
    };
    let chunks_max = u32::try_from(bytes_max >> book.geometry.chunk_log2()).unwrap_or(u32::MAX).max(1);
    let mut end = chunk.saturating_add(1);
    while end - chunk < chunks_max && book.is_queued(end) && may_join(book, chunk, end, priority) {
        end += 1;
    }
    chunk..end
}

/// Background does not ride on demand: it would keep the link from the next demand.
fn may_join(book: &Book, first: u32, chunk: u32, priority: Priority) -> bool {
    let wanted = |chunk| book.want(chunk).and_then(|want| want.priority());
    let avoids_the_same = match (book.want(first), book.want(chunk)) {
        (Some(first), Some(want)) => first.avoid.keys().eq(want.avoid.keys()),
        _ => false,
    };
    avoids_the_same && (priority == Priority::Background || wanted(chunk) != Some(Priority::Background))
}
