//! Policy: which source to ask for which run, and whether now. Looks at the books and changes nothing.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use crate::book::{Book, Offer};
use crate::config::Config;
use crate::source::Source;
use crate::swarm::{Priority, SourceId, SourceKind};

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

/// What a chunk may hope for that a stream will bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nearer {
    /// A source nearer than the stream's can be asked.
    Usable,
    /// There is one, and it rests.
    Rests {
        /// When it can be asked again.
        until: Duration,
    },
    /// There is none.
    None,
}

/// Whether a source of a nearer kind than `kind` may give `chunk`.
pub(crate) fn nearer(
    sources: &BTreeMap<SourceId, Source>,
    book: &Book,
    now: Duration,
    chunk: u32,
    priority: Priority,
    kind: SourceKind,
) -> Nearer {
    // No neighbour is nearer than a neighbour. There are many, and what one has is looked up farther away than that it is one.
    let may_be = |offer: &Offer| (kind > SourceKind::Peer || offer.has.is_none()) && offer.has(chunk);
    let having = book.sources.iter().filter(|(_, offer)| may_be(offer));
    let nearer = having.filter_map(|(id, _)| Some((*id, sources.get(id)?))).filter(|(_, source)| source.kind < kind);
    match nearer.map(|(id, source)| from(source, book, id, chunk, priority)).min() {
        None => Nearer::None,
        Some(until) if until > now => Nearer::Rests { until },
        Some(_) => Nearer::Usable,
    }
}

/// From when `source` may be asked for `chunk`.
pub(crate) fn from(source: &Source, book: &Book, id: SourceId, chunk: u32, priority: Priority) -> Duration {
    let avoided = book.want(chunk).and_then(|want| want.avoid.get(&id)).map_or(Duration::ZERO, |avoid| avoid.until);
    source.rests_until(priority).max(avoided)
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
    for (id, _) in book.sources.iter().filter(|(id, offer)| Some(**id) != except && offer.has(chunk)) {
        let Some(source) = sources.get(id) else { continue };
        let from = from(source, book, *id, chunk, priority);
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
    let nearest = usable.iter().filter(|(_, source)| source.kind == kind);
    let Some((id, source)) = nearest.min_by_key(|(id, source)| (source.in_flight_bytes(), *id)) else {
        return Choice::Park(None);
    };
    let run = run(config, book, *id, chunk, priority);
    let bytes = book.bytes(&book.cover(*id, &run));
    let patience = match priority {
        Priority::Background => Some(config.background_fallback_after),
        Priority::Demand | Priority::Readahead if bytes > config.stream_bytes_min => Some(config.stream_fallback_after),
        Priority::Demand | Priority::Readahead => None,
    };
    if let Some(patience) = patience {
        // Nobody waits for it, or it costs the whole cluster much: a nearer source is left for a farther one only when that
        // one seems gone for good.
        let nearer = resting.iter().filter(|(_, source)| source.kind < kind);
        let until = nearer.filter_map(|(from, source)| {
            let gone_at = source.fails_for_at(patience).unwrap_or(*from);
            (gone_at > now).then_some(gone_at.min(*from))
        });
        if let Some(until) = until.min() {
            return Choice::Park(Some(until));
        }
    }
    if source.has_room(config, priority, load(config, bytes)) {
        Choice::Fetch { source: *id, run }
    } else {
        Choice::Busy
    }
}

/// What a fetch of `bytes` counts for at its source.
pub(crate) fn load(config: &Config, bytes: u64) -> u64 {
    if bytes > config.stream_bytes_min { config.stream_load_bytes } else { bytes }
}

/// The longest run from `chunk` on whose chunks all wait for a fetch, with any priority: the bytes of a readahead behind
/// a demanded chunk come after it and save a request.
fn run(config: &Config, book: &Book, source: SourceId, chunk: u32, priority: Priority) -> Range<u32> {
    let has_units = book.sources.get(&source).is_some_and(|offer| !offer.units.is_empty());
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
