//! The knobs of the swarm, each with the reason of its value.

use std::time::Duration;

use crate::swarm::Priority;

/// How the swarm behaves. The defaults are for one node on a link of 100 Mbit/s to 10 Gbit/s.
#[derive(Clone, Debug)]
pub struct Config {
    /// How long a chunk that failed at its deadline fails at once for everyone who asks again. The kernel retries a failed
    /// read several times (DESIGN, decision 4); shorter than those retries take, each would wait a whole deadline again.
    pub failed_hold: Duration,
    /// The first rest of a source after blame; doubled with each further one.
    pub rest_min: Duration,
    /// The longest rest of a source.
    pub rest_max: Duration,
    /// The longest rest of a source when somebody waits: a source that is back must be noticed well within a deadline. A neighbour, for
    /// whom there are others, rests up to `rest_max`.
    pub demand_rest_max: Duration,
    /// How long a source is not asked again for a chunk that it did not have; doubled each time.
    pub missing_pause_min: Duration,
    /// The longest such pause.
    pub missing_pause_max: Duration,
    /// How long a demand fetch may make no progress before its chunks are asked elsewhere too. What is learned about its
    /// source can only raise this: a hedge at the registry moves a whole span.
    pub hedge_after: Duration,
    /// The learned limit is at most this. It also holds while the source gives others their chunks: then the wait is a
    /// queue on a full link, which more fetches would make longer.
    pub hedge_after_max: Duration,
    /// Most hedging fetches at the same time: where many fetches are late, the network is slow and more load harms.
    pub hedges_max: usize,
    /// Most bytes of one run for demand and readahead. Longer ones save requests, but the next demand shares the link with
    /// what is left of them.
    pub demand_run_bytes: u64,
    /// Most bytes of one run for background. Small, since demand that arrives meanwhile shares the link with it.
    pub background_run_bytes: u64,
    /// The same at a source that moves whole units (spans of a registry's blob): both ends of a run move a unit that is only
    /// used in part, so runs are longer.
    pub background_run_bytes_units: u64,
    /// Most bytes in flight at one source: all, without demand's reserve, and background alone (by `Priority`). A
    /// single fetch that is larger goes alone. Demand that arrives waits behind the two others for at most 3 MiB: 0.13 s at
    /// 200 Mbit/s; and 2 MiB keep a link of 10 Gbit/s full at a round trip of 1 ms.
    pub in_flight_bytes_max: [u64; 3],
    /// Most fetches in flight at one source, in the same way.
    pub in_flight_fetches_max: [usize; 3],
    /// Background starts only when no demand was wanted or delivered for so long: a starting container reads in bursts.
    pub quiet: Duration,
    /// Background leaves a nearer kind of source for a farther one only when the nearer ones failed for so long.
    pub background_fallback_after: Duration,
    /// A unit larger than this is a *stream*: a zstd frame of hundreds of MiB, which can only be read from its start. It is not
    /// waited for while a nearer source may give the chunk, and never begun as a hedge.
    pub stream_bytes_min: u64,
    /// What a stream counts for in the bytes in flight: a share of the link for as long as it takes, not its whole length.
    pub stream_load_bytes: u64,
    /// Demand begins a stream only when the nearer sources failed for so long: a pause of a seeder must not make every node
    /// fetch whole layers.
    pub stream_fallback_after: Duration,
    /// A chunk on a stream that moves is waited for so much longer than its deadline. With the default deadline of 60 s a
    /// reader waits less than the 120 s after which the kernel reports it as hung.
    pub stream_patience: Duration,
    /// A readahead that found no source for so long is forgotten: nobody may need it any more.
    pub readahead_expiry: Duration,
    /// What came is told to neighbours at most so much later, together with what comes meanwhile.
    pub tell_after: Duration,
    /// Most bytes of one run from a neighbour: a run occupies its link, and what others wait for stands behind it.
    pub peer_run_bytes: u64,
    /// Most bytes in flight from neighbours and seeders of layers in a mesh, by `Priority`: enough that every
    /// neighbour's link always has something to send, little enough that who wants something urgent does not wait for it, and that
    /// few are sent away: all nodes together ask for fewer runs in the background than they have slots for ([`UploadConfig`](crate::UploadConfig)).
    pub mesh_in_flight_bytes_max: [u64; 3],
    /// A neighbour is late at the earliest after this, whatever was learned.
    pub peer_hedge_after_min: Duration,
    /// A neighbour is late after this at the latest, and while little was learned.
    pub peer_hedge_after_max: Duration,
    /// A neighbour that gives nothing of a background run for so long loses it, and rests.
    pub peer_stall: Duration,
    /// A neighbour that gives nothing at all for so long does not count as one that will bring what a reader waits for: another one is
    /// asked, whatever was spent on that.
    pub silent_after: Duration,
    /// A neighbour or seeder that gives nothing at all for so long while a reader waits for it loses all that it was asked for,
    /// whatever signs of life it gives.
    pub mute_after: Duration,
    /// A seeder of a mesh, which keeps its line short, is asked for a sign of life when it gave nothing of what is demanded for so
    /// long.
    pub seeder_ask_after: Duration,
    /// It is late with demand after this: what a neighbour has is asked there.
    pub seeder_hedge_after: Duration,
    /// Up to so many demanded chunks are fetched in their order, each as soon as possible. More are many readers at once:
    /// whichever comes will do, and what is asked at once is bounded as for background, so that no line grows long.
    pub ordered_max: u32,
    /// Most fetches from the seeder at once where more than that are demanded: the others ask too.
    pub crowd_fetches_max: usize,
    /// What a neighbour has that says nothing but that it is busy for so long does not count.
    pub busy_patience: Duration,
    /// Bytes that may be asked twice, in percent of those that came.
    pub hedge_percent: u64,
    /// Bytes that may be asked twice before anything came.
    pub hedge_floor_bytes: u64,
    /// Background asks the seeder for chunks that it was not assigned only when no neighbour gave any for so long.
    pub orphan_patience: Duration,
    /// A seeder that only failed for so long, or gave no sign of life since it was asked for one, is gone: demand, then everything
    /// else, turns to the registry, together with all others. What is under way between neighbours arrives meanwhile.
    pub seeder_gone_after: [Duration; 2],
    /// Delegates share a blob in pieces of about so many bytes: so few that of what a node wants at once (64 MiB, `node/src/fill.rs`)
    /// each of them can have one, so many that a blob takes few requests.
    pub delegate_block_bytes: u64,
    /// The delegate of a span has so long before the next in rank fetches it too.
    pub delegate_patience: Duration,
    /// Most bytes per second from peers and seeders, all layers together; 0: no limit.
    pub download_bytes_per_sec: u64,
    /// Most bytes per second from registries, all layers together; 0: no limit.
    pub registry_bytes_per_sec: u64,
    /// Take only: neighbours are not told what is here.
    pub leech: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            failed_hold: Duration::from_secs(5),
            rest_min: Duration::from_millis(250),
            rest_max: Duration::from_secs(30),
            demand_rest_max: Duration::from_secs(2),
            missing_pause_min: Duration::from_millis(50),
            missing_pause_max: Duration::from_secs(1),
            hedge_after: Duration::from_millis(500),
            hedge_after_max: Duration::from_secs(5),
            hedges_max: 4,
            demand_run_bytes: 512 << 10,
            background_run_bytes: 1 << 20,
            background_run_bytes_units: 16 << 20,
            in_flight_bytes_max: [16 << 20, 3 << 20, 2 << 20],
            in_flight_fetches_max: [16, 8, 3],
            quiet: Duration::from_secs(2),
            background_fallback_after: Duration::from_secs(10),
            stream_bytes_min: 32 << 20,
            stream_load_bytes: 4 << 20,
            stream_fallback_after: Duration::from_secs(5),
            stream_patience: Duration::from_secs(45),
            readahead_expiry: Duration::from_secs(10),
            tell_after: Duration::from_millis(50),
            peer_run_bytes: 256 << 10,
            mesh_in_flight_bytes_max: [12 << 20, 8 << 20, 3 << 20],
            peer_hedge_after_min: Duration::from_millis(20),
            peer_hedge_after_max: Duration::from_millis(60),
            peer_stall: Duration::from_secs(1),
            silent_after: Duration::from_millis(100),
            mute_after: Duration::from_millis(750),
            seeder_ask_after: Duration::from_millis(100),
            seeder_hedge_after: Duration::from_millis(250),
            ordered_max: 16,
            crowd_fetches_max: 2,
            busy_patience: Duration::from_secs(5),
            hedge_percent: 3,
            hedge_floor_bytes: 1 << 20,
            orphan_patience: Duration::from_millis(500),
            seeder_gone_after: [Duration::from_millis(300), Duration::from_millis(600)],
            delegate_block_bytes: 8 << 20,
            delegate_patience: Duration::from_secs(1),
            download_bytes_per_sec: 0,
            registry_bytes_per_sec: 0,
            leech: false,
        }
    }
}

impl Config {
    pub(crate) fn in_flight_bytes_max(&self, priority: Priority) -> u64 {
        let [demand, readahead, background] = self.in_flight_bytes_max;
        priority.choose(demand, readahead, background)
    }

    pub(crate) fn in_flight_fetches_max(&self, priority: Priority) -> usize {
        let [demand, readahead, background] = self.in_flight_fetches_max;
        priority.choose(demand, readahead, background)
    }

    pub(crate) fn mesh_in_flight_bytes_max(&self, priority: Priority) -> u64 {
        let [demand, readahead, background] = self.mesh_in_flight_bytes_max;
        priority.choose(demand, readahead, background)
    }

    /// `attempt` counts from 1.
    pub(crate) fn missing_pause(&self, attempt: u32) -> Duration {
        doubled(self.missing_pause_min, attempt).min(self.missing_pause_max)
    }
}

/// `first` doubled `attempt - 1` times.
pub(crate) fn doubled(first: Duration, attempt: u32) -> Duration {
    first.saturating_mul(1 << attempt.saturating_sub(1).min(16))
}
