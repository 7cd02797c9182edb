//! Nodes that give each other a layer: whole meshes with faults, on a modelled network.

mod simulator;

use std::collections::BTreeSet;
use std::time::Duration;

use layer::Geometry;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use simulator::{LAYER, Reading, Report, Scenario, simulate};
use swarm::{
    Action, Config, Delegate, FetchId, Message, Outcome, PeerId, Priority, SourceId, SourceKind, Swarm, UploadConfig,
    Verdict, Zone,
};

const SEEDER: SourceId = SourceId(1);
const REGISTRY: SourceId = SourceId(2);
const CHUNKS: u32 = 64;

fn core(config: Config) -> Swarm {
    core_of(1, config)
}

fn core_of(me: u64, config: Config) -> Swarm {
    let mut swarm = Swarm::new(config, 7);
    swarm.add_layer(LAYER, Geometry::new(u64::from(CHUNKS) << 17, 17).unwrap());
    swarm.open_mesh(ms(0), LAYER, PeerId(me), Zone(1), 5, []);
    swarm.add_source(LAYER, SEEDER, SourceKind::Seeder, Vec::new());
    swarm.add_source(LAYER, REGISTRY, SourceKind::Registry, Vec::new());
    swarm
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn neighbour(swarm: &mut Swarm, id: u64, zone: u32, has: std::ops::Range<u32>) -> SourceId {
    swarm.add_peer(ms(0), LAYER, SourceId(id), PeerId(id), Zone(zone));
    swarm.on_haves(ms(0), LAYER, SourceId(id), &[has], &[]);
    SourceId(id)
}

fn fetches(swarm: &mut Swarm, now: Duration) -> Vec<(FetchId, SourceId, std::ops::Range<u32>)> {
    std::iter::from_fn(|| swarm.poll_action(now))
        .filter_map(|action| match action {
            Action::Fetch { fetch, source, run, .. } => Some((fetch, source, run)),
            Action::Cancel { .. } | Action::Fail { .. } => None,
        })
        .collect()
}

#[test]
fn background_leaves_the_seeder_to_those_who_are_assigned() {
    let mut swarm = core(Config::default());
    swarm.want(ms(0), LAYER, 0..CHUNKS, Priority::Background, Duration::MAX);
    assert!(fetches(&mut swarm, ms(0)).is_empty());
    swarm.assign(ms(1), LAYER, 8..10, SEEDER);
    let asked: Vec<_> = fetches(&mut swarm, ms(1)).into_iter().map(|(_, source, run)| (source, run)).collect();
    assert_eq!(asked, [(SEEDER, 8..10)]);
    // Nobody gives anything: it may ask for more, and only the seeder.
    swarm.handle_timeout(ms(1000));
    let asked = fetches(&mut swarm, ms(1000));
    assert!(!asked.is_empty() && asked.iter().all(|(_, source, _)| *source == SEEDER), "{asked:?}");
}

#[test]
fn what_is_assigned_is_fetched_by_who_wants_it() {
    let mut swarm = core(Config::default());
    swarm.assign(ms(0), LAYER, 8..10, SEEDER);
    assert!(fetches(&mut swarm, ms(0)).is_empty(), "nobody wants anything");
    // A container reads: the rest waits until it has done so.
    swarm.want(ms(0), LAYER, 0..1, Priority::Demand, ms(20_000));
    let (fetch, ..) = fetches(&mut swarm, ms(0)).remove(0);
    swarm.on_chunk(ms(1), fetch, 0, Verdict::Verified);
    swarm.on_end(ms(1), fetch, Outcome::Done);
    swarm.want(ms(1), LAYER, 8..12, Priority::Background, Duration::MAX);
    swarm.assign(ms(2), LAYER, 8..10, SEEDER);
    assert!(fetches(&mut swarm, ms(2)).is_empty(), "a container reads");
    swarm.handle_timeout(ms(2_100));
    let asked = fetches(&mut swarm, ms(2_100));
    assert!(asked.iter().any(|(_, source, run)| *source == SEEDER && *run == (8..10)), "{asked:?}");
}

/// The seeder may be ahead of what a node wants next: whoever waited for that would keep the chunk from all.
#[test]
fn who_fills_takes_what_it_would_want_only_later() {
    let mut swarm = core(Config::default());
    swarm.want(ms(0), LAYER, 0..16, Priority::Background, Duration::MAX);
    assert!(swarm.fills(LAYER) && fetches(&mut swarm, ms(0)).is_empty());
    swarm.assign(ms(0), LAYER, 40..42, SEEDER);
    let asked: Vec<_> = fetches(&mut swarm, ms(0)).into_iter().map(|(_, source, run)| (source, run)).collect();
    assert_eq!(asked, [(SEEDER, 40..42)]);
    // Many readers at once take what they wait for, and nothing else.
    let mut swarm = core(Config::default());
    swarm.want(ms(0), LAYER, 0..32, Priority::Demand, ms(20_000));
    assert!(swarm.fills(LAYER));
    fetches(&mut swarm, ms(0));
    swarm.assign(ms(0), LAYER, 40..42, SEEDER);
    assert!(fetches(&mut swarm, ms(0)).iter().all(|(.., run)| run.end <= 32));
}

#[test]
fn demand_asks_the_near_then_the_far_then_the_seeder() {
    let mut swarm = core(Config::default());
    let far = neighbour(&mut swarm, 10, 2, 0..3);
    let near = neighbour(&mut swarm, 11, 1, 0..1);
    for (chunk, source) in [(0, near), (1, far), (20, SEEDER)] {
        swarm.want(ms(0), LAYER, chunk..chunk + 1, Priority::Demand, ms(20_000));
        let asked = fetches(&mut swarm, ms(0));
        assert!(asked.iter().any(|(_, from, run)| *from == source && run.contains(&chunk)), "{chunk}: {asked:?}");
    }
}

#[test]
fn background_stays_in_its_zone() {
    let mut swarm = core(Config::default());
    let far = neighbour(&mut swarm, 10, 2, 0..CHUNKS);
    swarm.want(ms(0), LAYER, 0..CHUNKS, Priority::Background, Duration::MAX);
    assert!(fetches(&mut swarm, ms(0)).is_empty());
    swarm.assign(ms(0), LAYER, 3..4, far);
    let asked: Vec<_> = fetches(&mut swarm, ms(0)).into_iter().map(|(_, source, run)| (source, run)).collect();
    assert_eq!(asked, [(far, 3..4)]);
}

#[test]
fn neighbours_hear_within_the_delay_what_came() {
    let mut swarm = core(Config::default());
    neighbour(&mut swarm, 11, 1, 0..4);
    swarm.want(ms(0), LAYER, 0..4, Priority::Demand, ms(20_000));
    let (fetch, _, run) = fetches(&mut swarm, ms(0)).remove(0);
    assert_eq!(run, 0..2, "a run is at most what others may have to wait for");
    for chunk in run {
        swarm.on_chunk(ms(5 + u64::from(chunk)), fetch, chunk, Verdict::Verified);
    }
    assert_eq!(swarm.poll_message(), None);
    swarm.handle_timeout(ms(55));
    let told = Message::Haves { layer: LAYER, runs: vec![0..2; 1], delegates: Vec::new(), coming: Vec::new() };
    assert_eq!(swarm.poll_message(), Some(told));
}

#[test]
fn a_liar_is_cut_off_at_once_and_everywhere() {
    let mut swarm = core(Config::default());
    let liar = neighbour(&mut swarm, 11, 1, 0..CHUNKS);
    swarm.want(ms(0), LAYER, 0..8, Priority::Demand, ms(20_000));
    let asked = fetches(&mut swarm, ms(0));
    assert!(asked.iter().all(|(_, source, _)| *source == liar));
    swarm.on_chunk(ms(3), asked[0].0, asked[0].2.start, Verdict::Wrong);
    assert_eq!(swarm.poll_message(), Some(Message::Cut { source: liar }));
    let asked = fetches(&mut swarm, ms(3));
    assert!(!asked.is_empty() && asked.iter().all(|(_, source, _)| *source == SEEDER), "{asked:?}");
    swarm.on_haves(ms(4), LAYER, liar, std::slice::from_ref(&(0..CHUNKS)), &[]);
    swarm.want(ms(4), LAYER, 20..21, Priority::Demand, ms(20_000));
    assert!(fetches(&mut swarm, ms(4)).iter().all(|(_, source, _)| *source != liar));
}

#[test]
fn a_silent_neighbour_is_hedged_before_a_reader_notices() {
    let mut swarm = core(Config::default());
    neighbour(&mut swarm, 11, 1, 0..4);
    let other = neighbour(&mut swarm, 12, 1, 0..4);
    swarm.want(ms(0), LAYER, 0..1, Priority::Demand, ms(20_000));
    let first = fetches(&mut swarm, ms(0));
    let at = swarm.poll_timeout().unwrap();
    assert!(at <= ms(100), "{at:?}");
    swarm.handle_timeout(ms(60));
    let second = fetches(&mut swarm, ms(60));
    assert_eq!(second.len(), 1);
    assert_ne!(first[0].1, second[0].1);
    assert!([SourceId(11), other].contains(&second[0].1));
}

/// It was asked for more than may be asked twice, and a second one that is asked in its place is silent as well.
#[test]
fn nobody_waits_long_for_silent_neighbours() {
    let mut swarm = core(Config::default());
    let silent = [neighbour(&mut swarm, 11, 1, 0..CHUNKS), neighbour(&mut swarm, 12, 1, 0..CHUNKS)];
    swarm.want(ms(0), LAYER, 0..CHUNKS, Priority::Demand, ms(20_000));
    let mut missing: BTreeSet<u32> = (0..CHUNKS).collect();
    let is_over = |now: &Duration| {
        swarm.handle_timeout(*now);
        if *now == ms(500) {
            neighbour(&mut swarm, 13, 1, 0..CHUNKS);
        }
        for (fetch, source, run) in fetches(&mut swarm, *now) {
            if source == SourceId(13) {
                for chunk in run {
                    swarm.on_chunk(*now, fetch, chunk, Verdict::Verified);
                    missing.remove(&chunk);
                }
                swarm.on_end(*now, fetch, Outcome::Done);
            }
            assert!(silent.contains(&source) || [SourceId(13), SEEDER].contains(&source), "{source:?}");
        }
        missing.is_empty()
    };
    let at = (0..20_000).step_by(10).map(ms).find(is_over);
    assert!(at.is_some_and(|at| at <= ms(2500)), "{at:?}");
}

#[test]
fn a_late_neighbour_is_no_reason_to_ask_the_registry() {
    let mut swarm = core(Config::default());
    let late = neighbour(&mut swarm, 11, 1, 0..4);
    swarm.want(ms(0), LAYER, 0..1, Priority::Demand, ms(20_000));
    let mut asked = BTreeSet::new();
    for now in (0..1000).step_by(10).map(ms) {
        swarm.handle_timeout(now);
        swarm.on_alive(now, SEEDER);
        asked.extend(fetches(&mut swarm, now).into_iter().map(|(_, source, _)| source));
    }
    assert_eq!(asked, BTreeSet::from([late, SEEDER]));
}

/// A reader waits for one chunk that only the seeder has, which gives a chunk after each `pace`, and signs of life where it `answers`
/// or `moves` bytes. Gives when the registry was asked, if it was.
fn registry_asked_beside(pace: Option<u64>, answers: bool, moves: bool) -> Option<Duration> {
    let mut swarm = core(Config::default());
    let mut pending: Option<(FetchId, u32, Duration)> = None;
    let mut next = 0;
    for now in (0..20_000).step_by(10).map(ms) {
        if pending.is_none() {
            swarm.want(now, LAYER, next..next + 1, Priority::Demand, now + ms(20_000));
        }
        if let Some((fetch, chunk, since)) = pending {
            if moves && now.as_millis() % 100 == 0 {
                swarm.on_moved(now, fetch);
            }
            if pace.is_some_and(|pace| since + ms(pace) <= now) {
                swarm.on_chunk(now, fetch, chunk, Verdict::Verified);
                swarm.on_end(now, fetch, Outcome::Done);
                (pending, next) = (None, (next + 1) % CHUNKS);
            }
        }
        swarm.handle_timeout(now);
        for (fetch, source, run) in fetches(&mut swarm, now) {
            if source == REGISTRY {
                return Some(now);
            }
            pending = Some((fetch, run.start, now));
        }
        while let Some(message) = swarm.poll_message() {
            if answers && matches!(message, Message::Ask { .. }) {
                swarm.on_alive(now, SEEDER);
            }
        }
    }
    None
}

#[test]
fn a_seeder_without_a_sign_of_life_is_given_up_soon() {
    for pace in [None, Some(700)] {
        let at = registry_asked_beside(pace, false, false);
        assert!(at.is_some_and(|at| at >= ms(350) && at <= ms(500)), "{at:?}");
    }
}

#[test]
fn a_slow_seeder_that_lives_is_not_gone() {
    assert_eq!(registry_asked_beside(Some(600), true, false), None);
    assert_eq!(registry_asked_beside(Some(3_000), true, true), None);
    // One of an earlier version answers nothing.
    assert_eq!(registry_asked_beside(Some(3_000), false, true), None);
}

/// It says that it lives, but gives nothing, or a byte now and then.
#[test]
fn a_seeder_that_only_talks_keeps_no_reader_waiting() {
    for pace in [None, Some(3_000)] {
        let at = registry_asked_beside(pace, true, false);
        assert!(at.is_some_and(|at| at > ms(700) && at < ms(1_000)), "{at:?}");
    }
}

/// A reader waits for `chunk` from `begin` on, while the seeder answers and does not have it; gives how long. Notes who was asked.
fn read_past_seeder(swarm: &mut Swarm, begin: u64, chunk: u32, asked: &mut Vec<SourceId>) -> Duration {
    swarm.want(ms(begin), LAYER, chunk..chunk + 1, Priority::Demand, ms(begin + 20_000));
    for now in (begin..begin + 20_000).step_by(10).map(ms) {
        swarm.handle_timeout(now);
        swarm.on_alive(now, SEEDER);
        for (fetch, source, run) in fetches(swarm, now) {
            asked.push(source);
            if source == SEEDER {
                swarm.on_end(now, fetch, Outcome::Missing { reason: "it is not known here".into() });
            } else {
                run.for_each(|chunk| swarm.on_chunk(now, fetch, chunk, Verdict::Verified));
                swarm.on_end(now, fetch, Outcome::Done);
                return now - ms(begin);
            }
        }
    }
    panic!("nobody gave it");
}

/// Its disk was full, and it gave up the layer: it is well, and answers.
#[test]
fn what_a_seeder_has_no_more_comes_from_the_registry() {
    let (mut swarm, mut asked) = (core(Config::default()), Vec::new());
    let first = read_past_seeder(&mut swarm, 1_000, 0, &mut asked);
    assert!(first <= ms(1_000), "{first:?}");
    let next = read_past_seeder(&mut swarm, 3_000, 40, &mut asked);
    assert!(next <= ms(600), "{next:?}");
    // It may have the layer again.
    asked.clear();
    read_past_seeder(&mut swarm, 30_000, 50, &mut asked);
    assert_eq!(asked.first(), Some(&SEEDER));
}

/// It makes its chunks from the beginning on, and has not come that far.
#[test]
fn what_only_comes_whole_from_the_registry_is_waited_for_at_the_seeder() {
    let config = Config { stream_bytes_min: 1 << 20, ..Config::default() };
    let (mut swarm, mut asked) = (core(config), Vec::new());
    let whole = 0..u64::from(CHUNKS) << 17;
    swarm.add_source(LAYER, REGISTRY, SourceKind::Registry, vec![whole]);
    let waited = read_past_seeder(&mut swarm, 1_000, 40, &mut asked);
    assert!(waited >= ms(5_000) && waited < ms(7_000), "{waited:?}");
}

#[test]
fn a_seeder_that_is_back_is_asked_again() {
    let mut swarm = core(Config::default());
    swarm.want(ms(0), LAYER, 0..1, Priority::Demand, ms(20_000));
    for now in (0..1_000).step_by(10).map(ms) {
        swarm.handle_timeout(now);
        fetches(&mut swarm, now);
    }
    swarm.on_alive(ms(1_000), SEEDER);
    swarm.want(ms(1_000), LAYER, 40..41, Priority::Demand, ms(20_000));
    let asked: Vec<_> = fetches(&mut swarm, ms(1_000)).into_iter().map(|(_, source, run)| (source, run)).collect();
    assert_eq!(asked, [(SEEDER, 40..41)]);
}

/// What the seeders were told last.
fn told_to_fill(swarm: &mut Swarm, now: Duration) -> Option<bool> {
    swarm.handle_timeout(now);
    fetches(swarm, now);
    let told = std::iter::from_fn(|| swarm.poll_message()).filter_map(|message| match message {
        Message::Report { fills, .. } => Some(fills),
        _ => None,
    });
    told.last()
}

#[test]
fn seeders_hear_whether_assignments_are_fetched() {
    let mut swarm = core(Config::default());
    assert!(!swarm.fills(LAYER));
    swarm.want(ms(0), LAYER, 0..1, Priority::Demand, ms(20_000));
    assert_eq!(told_to_fill(&mut swarm, ms(0)), None, "it only reads");
    swarm.on_here(LAYER, 0);
    swarm.want(ms(10), LAYER, 1..CHUNKS, Priority::Background, Duration::MAX);
    assert_eq!(told_to_fill(&mut swarm, ms(10)), None, "its container may read on");
    // It is quiet: within a beat.
    let told: Vec<bool> = (20..2_700).step_by(10).filter_map(|now| told_to_fill(&mut swarm, ms(now))).collect();
    assert_eq!(told.last(), Some(&true), "{told:?}");
    assert!(swarm.fills(LAYER));
    // Nothing is wanted any more: some beats later.
    swarm.cancel_want(LAYER, 0..CHUNKS, Priority::Background);
    let told: Vec<bool> = (2_700..5_000).step_by(10).filter_map(|now| told_to_fill(&mut swarm, ms(now))).collect();
    assert_eq!(told, [false]);
    swarm.want(ms(5_000), LAYER, 1..CHUNKS, Priority::Background, Duration::MAX);
    assert_eq!(told_to_fill(&mut swarm, ms(5_000)), Some(true), "at once");
}

#[test]
fn a_neighbour_that_only_refuses_is_not_counted_on() {
    for outcome in
        [Outcome::Failed { reason: "refused".into(), retry_after: None }, Outcome::Busy { retry_after: ms(20) }]
    {
        let mut swarm = core(Config::default());
        let only = neighbour(&mut swarm, 11, 1, 0..CHUNKS);
        swarm.want(ms(0), LAYER, 0..CHUNKS, Priority::Background, Duration::MAX);
        let asks_the_seeder = |now: &Duration| {
            swarm.handle_timeout(*now);
            let asked = fetches(&mut swarm, *now);
            for (fetch, ..) in asked.iter().filter(|(_, source, _)| *source == only) {
                swarm.on_end(*now, *fetch, outcome.clone());
            }
            asked.iter().any(|(_, source, _)| *source == SEEDER)
        };
        let at = (0..20_000).step_by(10).map(ms).find(asks_the_seeder);
        assert!(at.is_some(), "{outcome:?}");
    }
}

#[test]
fn many_demanded_chunks_are_left_to_many_nodes() {
    let asked = |neighbours: u64, now: Duration| -> usize {
        let mut swarm = core(Config::default());
        for id in 0..neighbours {
            neighbour(&mut swarm, 11 + id, 1, 0..0);
        }
        swarm.want(now, LAYER, 0..CHUNKS, Priority::Demand, ms(20_000));
        fetches(&mut swarm, now).iter().map(|(.., run)| run.len() << 17).sum()
    };
    assert!(asked(1, ms(500)) <= 512 << 10, "{}", asked(1, ms(500)));
    // To whom would a node without neighbours leave anything, once they would have been introduced?
    assert!(asked(0, ms(500)) >= 4 << 20, "{}", asked(0, ms(500)));
    assert!(asked(0, ms(10)) <= 512 << 10, "{}", asked(0, ms(10)));
}

#[test]
fn the_rarer_chunk_is_fetched_first() {
    let mut swarm = core(Config { mesh_in_flight_bytes_max: [1 << 20; 3], ..Config::default() });
    for id in 11..15 {
        neighbour(&mut swarm, id, 1, 0..16);
    }
    neighbour(&mut swarm, 20, 1, 0..CHUNKS);
    swarm.want(ms(0), LAYER, 0..CHUNKS, Priority::Background, Duration::MAX);
    let from_rich: Vec<_> = fetches(&mut swarm, ms(0)).into_iter().filter(|(_, id, _)| *id == SourceId(20)).collect();
    assert!(!from_rich.is_empty() && from_rich.iter().all(|(.., run)| run.start >= 16), "{from_rich:?}");
}

#[test]
fn a_busy_neighbour_is_left_without_blame() {
    let mut swarm = core(Config::default());
    let only = neighbour(&mut swarm, 11, 1, 0..4);
    swarm.want(ms(0), LAYER, 0..2, Priority::Background, Duration::MAX);
    let (fetch, ..) = fetches(&mut swarm, ms(0)).remove(0);
    swarm.on_end(ms(1), fetch, Outcome::Busy { retry_after: ms(20) });
    assert!(fetches(&mut swarm, ms(10)).is_empty());
    assert!(fetches(&mut swarm, ms(21)).iter().all(|(_, source, _)| *source == only));
}

/// Once all seeders are gone.
fn asked_of_the_registry(swarm: &mut Swarm, now: Duration) -> Vec<std::ops::Range<u32>> {
    swarm.handle_timeout(now);
    fetches(swarm, now).into_iter().filter(|(_, source, _)| *source == REGISTRY).map(|(.., run)| run).collect()
}

#[test]
fn what_a_neighbour_fetches_from_the_registry_is_waited_for() {
    let mut swarm = core(Config::default());
    swarm.remove_source(LAYER, SEEDER);
    let other = neighbour(&mut swarm, 11, 1, 0..0);
    swarm.on_coming(ms(0), LAYER, other, std::slice::from_ref(&(0..CHUNKS)));
    swarm.want(ms(0), LAYER, 3..4, Priority::Demand, ms(20_000));
    assert_eq!(asked_of_the_registry(&mut swarm, ms(1_000)), []);
    // As long as it says so, whatever the patience.
    swarm.on_coming(ms(1_400), LAYER, other, std::slice::from_ref(&(0..CHUNKS)));
    assert_eq!(asked_of_the_registry(&mut swarm, ms(2_800)), []);
    assert_eq!(asked_of_the_registry(&mut swarm, ms(3_100)), std::slice::from_ref(&(3..4)));
}

/// None of the delegates wants the chunk: each node fetches it for itself, but not all at once.
#[test]
fn what_no_delegate_wants_is_fetched_by_who_waits_for_it() {
    let mut asked = Vec::new();
    for me in 1000..1020 {
        let mut swarm = core_of(me, Config::default());
        swarm.remove_source(LAYER, SEEDER);
        neighbour(&mut swarm, 11, 1, 0..0);
        for first in (0..320).step_by(16) {
            let delegates: Vec<_> =
                (first..first + 16).map(|peer| Delegate { peer: PeerId(peer), zone: Zone(1), beat: 1 }).collect();
            swarm.on_haves(ms(990), LAYER, SourceId(11), &[], &delegates);
        }
        swarm.want(ms(1_000), LAYER, 3..4, Priority::Demand, ms(20_000));
        let asks = |now: &u64| !asked_of_the_registry(&mut swarm, ms(*now)).is_empty();
        asked.push((1_000..4_000).step_by(10).find(asks).unwrap_or(u64::MAX));
    }
    asked.sort_unstable();
    assert!(asked[2] >= 1_500 && asked[19] <= 1_800 && asked[19] - asked[2] >= 100, "{asked:?}");
}

#[test]
fn neighbours_hear_at_once_what_comes_from_the_registry() {
    let mut swarm = core(Config::default());
    swarm.remove_source(LAYER, SEEDER);
    neighbour(&mut swarm, 11, 1, 0..0);
    swarm.want(ms(0), LAYER, 3..4, Priority::Demand, ms(20_000));
    let mut told = Vec::new();
    while !told.contains(&vec![3..4; 1]) {
        let now = swarm.poll_timeout().unwrap();
        assert!(now < ms(3_000), "{told:?}");
        swarm.handle_timeout(now);
        fetches(&mut swarm, now);
        while let Some(message) = swarm.poll_message() {
            if let Message::Haves { coming, .. } = message {
                told.push(coming);
            }
        }
    }
    assert!(told.iter().rev().skip(1).all(Vec::is_empty), "{told:?}");
}

#[test]
fn the_registry_is_asked_when_all_seeders_are_gone() {
    let mut swarm = core(Config::default());
    swarm.want(ms(0), LAYER, 0..4, Priority::Demand, ms(20_000));
    let (fetch, source, _) = fetches(&mut swarm, ms(0)).remove(0);
    assert_eq!(source, SEEDER);
    swarm.on_source_lost(ms(1), SEEDER);
    swarm.on_end(ms(1), fetch, Outcome::Failed { reason: "gone".into(), retry_after: None });
    assert!(fetches(&mut swarm, ms(100)).iter().all(|(_, source, _)| *source != REGISTRY));
    swarm.handle_timeout(ms(700));
    let asked = fetches(&mut swarm, ms(700));
    assert!(asked.iter().any(|(_, source, _)| *source == REGISTRY), "{asked:?}");
}

#[test]
fn a_rate_holds_the_next_fetch_back() {
    let mut swarm = core(Config { download_bytes_per_sec: 1 << 20, ..Config::default() });
    neighbour(&mut swarm, 11, 1, 0..CHUNKS);
    swarm.want(ms(1000), LAYER, 0..CHUNKS, Priority::Background, Duration::MAX);
    let mut bytes = 0;
    for now in (1000..4000).step_by(10).map(ms) {
        swarm.handle_timeout(now);
        for (fetch, _, run) in fetches(&mut swarm, now) {
            bytes += run.len() << 17;
            run.for_each(|chunk| swarm.on_chunk(now, fetch, chunk, Verdict::Verified));
            swarm.on_end(now, fetch, Outcome::Done);
        }
    }
    assert!((2 << 20..=(3 << 20) + (512 << 10)).contains(&bytes), "{bytes}");
}

#[test]
fn a_removed_mesh_leaves_nothing_behind() {
    let mut swarm = core(Config::default());
    neighbour(&mut swarm, 11, 1, 0..CHUNKS);
    swarm.want(ms(0), LAYER, 0..CHUNKS, Priority::Background, Duration::MAX);
    fetches(&mut swarm, ms(0));
    swarm.remove_layer(LAYER);
    assert_eq!(swarm.poll_timeout(), None);
}

/// 40 nodes, 64 MiB.
fn forty(seed: u64) -> Scenario {
    Scenario { end: Duration::from_secs(60), ..Scenario::new(seed, 40, 64 << 20) }
}

#[test]
fn the_seeder_and_the_registry_send_the_layer_about_once() {
    let report = simulate(forty(3));
    assert_eq!(report.complete, report.nodes);
    assert!(report.seeder_copies <= 1.3 && report.registry_copies <= 1.02, "{report:?}");
}

#[test]
fn each_zone_is_entered_about_once() {
    let report = simulate(Scenario { zones: 3, ..forty(4) });
    assert_eq!(report.complete, report.nodes);
    assert!(report.zone_entries <= 1.2 && report.seeder_copies <= 1.3, "{report:?}");
}

#[test]
fn without_a_seeder_the_nodes_share_the_registry() {
    let report = simulate(Scenario { seeder_dies_at: Some(30), ..forty(5) });
    assert_eq!(report.complete, report.nodes);
    assert!(report.registry_copies <= 1.5, "{report:?}");
}

#[test]
fn many_readers_at_once_wait_little_and_leave_the_registry_alone() {
    let cold = Scenario { demand: Some(20 << 20), ingest: false, ..Scenario::new(6, 60, 256 << 20) };
    let report = simulate(cold);
    assert_eq!(report.complete, report.nodes);
    assert!(report.p99 <= ms(618) && report.registry_copies == 0.0, "{report:?}");
}

/// What is fetched at `now`, each time with an answer at once, and from whom.
fn fetched(swarm: &mut Swarm, now: Duration) -> Vec<(SourceId, u32)> {
    let mut fetched = Vec::new();
    swarm.handle_timeout(now);
    loop {
        let asked = fetches(swarm, now);
        if asked.is_empty() {
            return fetched;
        }
        for (fetch, source, run) in asked {
            for chunk in run {
                swarm.on_chunk(now, fetch, chunk, Verdict::Verified);
                fetched.push((source, chunk));
            }
            swarm.on_end(now, fetch, Outcome::Done);
        }
    }
}

/// Of 2..34 one part each, of what follows too, and nobody what another one takes.
#[test]
fn what_is_read_ahead_is_shared_by_who_reads_the_same() {
    let members = [10, 11, 12];
    let mut parts = Vec::new();
    for me in members {
        let mut swarm = core_of(me, Config::default());
        for other in members.iter().filter(|other| **other != me) {
            neighbour(&mut swarm, *other, 1, 0..2);
        }
        swarm.want(ms(0), LAYER, 2..34, Priority::Readahead, Duration::MAX);
        swarm.read_on(ms(0), LAYER, 2..34, 34..CHUNKS);
        let mine = fetched(&mut swarm, ms(0));
        assert!(mine.iter().all(|(source, _)| *source == SEEDER));
        assert!((8..40).contains(&mine.len()), "{mine:?}");
        let is_mine = |chunk: u32| mine.iter().any(|(_, mine)| *mine == chunk);
        // What a reader waits for is fetched whoever's turn it is.
        let waited_for = (2..34).find(|chunk| !is_mine(*chunk)).unwrap();
        swarm.want(ms(1), LAYER, waited_for..waited_for + 1, Priority::Demand, ms(20_000));
        assert_eq!(fetched(&mut swarm, ms(1)), [(SEEDER, waited_for)]);
        // Who takes its turn after long is not waited for, where it is needed soon.
        let late: BTreeSet<u32> = fetched(&mut swarm, ms(160)).into_iter().map(|(_, chunk)| chunk).collect();
        assert!((2..34).all(|chunk| is_mine(chunk) || late.contains(&chunk) || chunk == waited_for), "{late:?}");
        parts.extend(mine.into_iter().map(|(_, chunk)| chunk));
    }
    parts.sort_unstable();
    assert_eq!(parts, (2..CHUNKS).collect::<Vec<_>>());
}

/// What is fetched around the place of a random read waits for nobody, whoever else reads there.
#[test]
fn only_what_is_read_in_order_is_shared() {
    let mut swarm = core_of(10, Config::default());
    for other in [11, 12] {
        neighbour(&mut swarm, other, 1, 0..2);
    }
    swarm.read_on(ms(0), LAYER, 100..110, 110..110);
    swarm.want(ms(0), LAYER, 2..6, Priority::Readahead, Duration::MAX);
    let chunks: Vec<u32> = fetched(&mut swarm, ms(0)).into_iter().map(|(_, chunk)| chunk).collect();
    assert_eq!(chunks, (2..6).collect::<Vec<_>>());
}

/// The node that has it gives it to one of them, and not to all.
#[test]
fn who_is_ahead_gives_to_one_of_those_behind() {
    let members = [10, 11, 12];
    let mut fetching = Vec::new();
    for me in members {
        let mut swarm = core_of(me, Config::default());
        for other in members.iter().filter(|other| **other != me) {
            neighbour(&mut swarm, *other, 1, 0..2);
        }
        let ahead = neighbour(&mut swarm, 20, 1, 0..CHUNKS);
        swarm.want(ms(0), LAYER, 2..34, Priority::Readahead, Duration::MAX);
        swarm.read_on(ms(0), LAYER, 2..34, 34..34);
        let mine = fetched(&mut swarm, ms(0));
        assert!(mine.iter().all(|(source, _)| *source == ahead), "{mine:?}");
        fetching.extend(mine.into_iter().map(|(_, chunk)| chunk));
    }
    fetching.sort_unstable();
    assert_eq!(fetching, (2..34).collect::<Vec<_>>());
}

/// Who has most is ahead of the others, who would all ask it.
#[test]
fn a_reader_is_served_by_who_is_not_ahead() {
    for me in 20..40 {
        let mut swarm = core_of(me, Config::default());
        neighbour(&mut swarm, 10, 1, 0..CHUNKS);
        let behind = neighbour(&mut swarm, 11, 1, 0..4);
        neighbour(&mut swarm, 12, 1, 0..CHUNKS);
        swarm.want(ms(0), LAYER, 0..1, Priority::Demand, ms(20_000));
        assert_eq!(fetched(&mut swarm, ms(0)), [(behind, 0)]);
    }
}

/// A seeder that leaves one chunk to others is still asked for the next.
#[test]
fn what_others_have_of_a_seeder_keeps_no_reader_from_the_next() {
    let mut swarm = core(Config::default());
    neighbour(&mut swarm, 11, 1, 0..1);
    swarm.want(ms(0), LAYER, 4..5, Priority::Demand, ms(20_000));
    let (fetch, ..) = fetches(&mut swarm, ms(0)).remove(0);
    swarm.on_end(ms(1), fetch, Outcome::Busy { retry_after: ms(250) });
    swarm.want(ms(2), LAYER, 9..10, Priority::Demand, ms(20_000));
    let asked: Vec<_> = fetches(&mut swarm, ms(2)).into_iter().map(|(_, source, run)| (source, run)).collect();
    assert_eq!(asked, [(SEEDER, 9..10)]);
    swarm.handle_timeout(ms(252));
    let asked: Vec<_> = fetches(&mut swarm, ms(252)).into_iter().map(|(_, source, run)| (source, run)).collect();
    assert_eq!(asked, [(SEEDER, 4..5)]);
}

/// Containers on `nodes` nodes read the same 300 MB from the beginning, a chunk in up to `pause`. Gives what came of it, and a line for the eye.
fn in_step(seed: u64, nodes: usize, pause: Duration, spread: Duration) -> Report {
    let reads = Some(Reading { pause, spread });
    let report = simulate(Scenario { ingest: false, reads, end: ms(60_000), ..Scenario::new(seed, nodes, 300 << 20) });
    println!(
        "{nodes} readers, {pause:?} a chunk, {spread:?} apart: last {:?}, seeder {:.3}, most sent by a node {:.2}, waits {:?}, {:?}",
        report.last, report.seeder_copies, report.node_copies, report.p99, report.longest,
    );
    assert_eq!(report.complete, report.nodes);
    report
}

/// Who is ahead does not give everything to all others.
#[test]
fn readers_in_step_share_what_they_fetch() {
    for (seed, nodes, pause, spread) in
        [(1, 8, 800, 100), (2, 8, 800, 20), (3, 20, 800, 100), (4, 8, 10_000, 100), (5, 20, 10_000, 100)]
    {
        let report = in_step(seed, nodes, Duration::from_micros(pause), ms(spread));
        assert!(report.seeder_copies <= 1.25 && report.p99 <= ms(25) && report.longest <= ms(200), "{report:?}");
        // Whoever is ahead of many feeds them all at first.
        let most = if nodes == 20 { 1.35 } else { 1.3 };
        assert!(report.node_copies <= most, "{report:?}");
        // A link carries the layer in 2.5 s, and a container uses it in half the longest time for each chunk.
        let bound = Duration::from_micros(2400 * pause / 2).max(ms(2516));
        assert!(report.last <= bound * 9 / 5, "{report:?}");
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = || simulate(Scenario { liars: 40, dying: 40, late: 40, ..forty(9) });
    assert_eq!(format!("{:?}", run()), format!("{:?}", run()));
}

fn config() -> ProptestConfig {
    let config = ProptestConfig::default();
    let is_chosen = |name| std::env::var_os(name).is_some();
    let rng_seed = if is_chosen("PROPTEST_RNG_SEED") { config.rng_seed } else { RngSeed::Fixed(1) };
    let cases = if is_chosen("PROPTEST_CASES") { config.cases } else { 48 };
    ProptestConfig { cases, rng_seed, ..config }
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let chances = (0..80usize, 0..60usize, 0..80usize, 0..80usize, 0..60usize);
    let faults = (chances, prop_oneof![Just(None), (0..90u64).prop_map(Some)], any::<bool>());
    (any::<u64>(), 1..24usize, 1..160u64, 1..4usize, faults).prop_map(
        |(seed, nodes, eighths, zones, ((liars, slow, dying, late, leeches), seeder_dies_at, small))| {
            let mut scenario = Scenario::new(seed, nodes, eighths << 17);
            let uploads = if small {
                UploadConfig { slots: 3, demand_slots: 1, peer_slots: 1, ..UploadConfig::default() }
            } else {
                UploadConfig::default()
            };
            scenario.end = Duration::from_secs(120);
            Scenario { zones, liars, slow, dying, late, leeches, seeder_dies_at, uploads, ..scenario }
        },
    )
}

proptest! {
    // The same cases each time; PROPTEST_RNG_SEED=... and PROPTEST_CASES=... for others.
    #![proptest_config(config())]

    /// Whatever else happens, the registry works: everybody gets everything, and nobody anything wrong.
    #[test]
    fn everybody_gets_everything(scenario in scenario()) {
        let report = simulate(scenario);
        prop_assert_eq!(report.complete, report.nodes, "seed {}: {:?}", report.seed, report);
        prop_assert_eq!(report.wrong_passed_on, 0);
        prop_assert_eq!(report.failed, 0);
    }
}
