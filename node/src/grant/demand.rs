//! Whether who serves layers demands grants, and what makes a grant good.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode};
use layer::Digest;
use parking_lot::Mutex;

use super::{Grant, GrantError, HEADER, Stage, of_header};
use crate::ingest::Ingester;
use crate::security::clock::since_boot;
use crate::security::tls::Caller;
use crate::security::{Clock, Security, Verifier};

/// Tokens that were verified and are remembered, so that a request costs a hash and not a signature.
const VERIFIED_MAX: usize = 16 << 10;

/// What is demanded of who asks for layers. Cheap to clone.
#[derive(Clone)]
pub struct Demand {
    shared: Arc<Shared>,
}

struct Shared {
    verifier: Verifier,
    is_on: AtomicBool,
    /// What each seeder said; nothing yet where it is empty.
    told: Mutex<BTreeMap<String, bool>>,
    /// What the clock of each seeder showed, and when it was asked, since this machine's boot.
    clocks: Mutex<BTreeMap<String, (SystemTime, Duration)>>,
    own_clock: Clock,
    /// Where what they said is kept.
    file: Option<PathBuf>,
    /// Who ingests here.
    ingester: Option<Ingester>,
    /// By digest of the header.
    verified: Mutex<HashMap<[u8; 32], Arc<Grant>>>,
}

impl Demand {
    /// A seeder's, which demands grants.
    pub fn of_seeder(security: &Security, ingester: Ingester) -> Self {
        Self::with(security, true, None, Some(ingester))
    }

    /// A node's: it does as its seeders tell it, and keeps that in `file`. Until any did, it gives nothing without a grant. Without
    /// security nothing can be demanded. Blocks on the disk for a moment.
    pub fn of_node(security: &Security, file: PathBuf) -> Self {
        let was_told_off = std::fs::read_to_string(&file).is_ok_and(|text| text == text_of(false));
        Self::with(security, security.is_mutual() && !was_told_off, Some(file), None)
    }

    fn with(security: &Security, is_on: bool, file: Option<PathBuf>, ingester: Option<Ingester>) -> Self {
        let shared = Shared {
            verifier: security.verifier(),
            is_on: AtomicBool::new(is_on),
            told: Mutex::default(),
            clocks: Mutex::default(),
            own_clock: security.clock(),
            file: file.filter(|_| security.is_mutual()),
            ingester,
            verified: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Whether grants are demanded now.
    pub fn is_on(&self) -> bool {
        self.shared.is_on.load(Ordering::Acquire)
    }

    /// `seeder` says whether grants are to be demanded. They are as long as one says so.
    pub(crate) async fn tell(&self, seeder: &str, grants: bool) {
        let Some(file) = self.shared.file.clone() else { return };
        let (before, is_on) = {
            let mut told = self.shared.told.lock();
            told.insert(seeder.to_owned(), grants);
            let is_on = told.values().any(|grants| *grants);
            (self.shared.is_on.swap(is_on, Ordering::AcqRel), is_on)
        };
        if before != is_on {
            tracing::info!(seeder, grants = is_on, "what other nodes must show to get layers changes");
        }
        let shared = Arc::clone(&self.shared);
        let written = tokio::task::spawn_blocking(move || {
            // Under the lock: the last word is also the last to be written.
            let told = shared.told.lock();
            write(&file, told.values().any(|grants| *grants))
        });
        let written = written.await.map_err(io::Error::other).flatten();
        if let Err(error) = written {
            tracing::warn!(%error, "cannot keep whether grants are demanded: after a restart they are until a seeder says otherwise");
        }
    }

    /// The clock of `seeder` shows `seconds` since 1970, or did at some moment since `asked` after this machine's boot. Grants are made by its clock and judged
    /// by it from now on, as far as this machine's own runs as fast: nodes whose clocks differ know the same grants to be good. The
    /// later a word comes, the later the seeder's time seems to be, and the sooner grants end.
    pub(crate) fn tell_time(&self, seeder: &str, seconds: u64, asked: Duration) {
        let Some(shown) = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)) else { return };
        self.shared.clocks.lock().insert(seeder.to_owned(), (shown, asked));
    }

    /// The line to `seeder` is lost: its clock may be set anew, and it may be gone for good. The last one that is known is kept.
    pub(crate) fn forget_time(&self, seeder: &str) {
        let mut clocks = self.shared.clocks.lock();
        if clocks.len() > 1 {
            clocks.remove(seeder);
        }
    }

    /// What the clocks show that grants are made by; this machine's own where no seeder has said.
    fn times(&self, own: SystemTime) -> Vec<SystemTime> {
        let (clocks, now) = (self.shared.clocks.lock(), since_boot());
        let times = clocks.values().filter_map(|(shown, asked)| shown.checked_add(now.saturating_sub(*asked)));
        let times: Vec<_> = times.collect();
        if times.is_empty() { vec![own] } else { times }
    }

    /// Lets only who shows a grant reach those routes of `router` that name a blob.
    pub fn guard(&self, router: Router) -> Router {
        router.route_layer(middleware::from_fn_with_state(self.clone(), guarded))
    }

    /// Whether `caller` may have `blob` with the grant in `header`. `now` is what this machine's clock shows.
    pub fn check(
        &self,
        now: SystemTime,
        caller: Option<&Caller>,
        blob: Digest,
        header: Option<&HeaderValue>,
    ) -> Result<(), GrantError> {
        let caller = caller.ok_or(GrantError::Stranger)?;
        let grant = self.verified(header.ok_or(GrantError::None)?)?;
        if grant.key != caller.key {
            return Err(GrantError::OtherMachine);
        }
        if grant.blob != blob {
            return Err(GrantError::OtherLayer);
        }
        check_times(&grant, &self.times(now))?;
        let is_ingested = || {
            let flight = self.shared.ingester.as_ref().and_then(|ingester| ingester.flight(blob));
            flight.is_some_and(|flight| flight.reads_from(&grant.registry))
        };
        if grant.stage == Stage::Ingest && !is_ingested() {
            return Err(GrantError::OtherStage);
        }
        Ok(())
    }

    /// The grant of a header, whose signature is verified once.
    fn verified(&self, header: &HeaderValue) -> Result<Arc<Grant>, GrantError> {
        let id = *blake3::hash(header.as_bytes()).as_bytes();
        if let Some(grant) = self.shared.verified.lock().get(&id) {
            return Ok(Arc::clone(grant));
        }
        let token = of_header(header).ok_or(GrantError::Unreadable)?;
        let grant = Arc::new(Grant::open(&token, &self.shared.verifier)?);
        let mut verified = self.shared.verified.lock();
        if verified.len() >= VERIFIED_MAX {
            let times = self.times(self.shared.own_clock.now());
            verified.retain(|_, grant| check_times(grant, &times).is_ok());
            if verified.len() >= VERIFIED_MAX {
                verified.clear();
            }
        }
        verified.insert(id, Arc::clone(&grant));
        Ok(grant)
    }
}

impl std::fmt::Debug for Demand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Demand").field("is_on", &self.is_on()).finish_non_exhaustive()
    }
}

async fn guarded(
    State(demand): State<Demand>,
    Path(names): Path<HashMap<String, String>>,
    request: Request,
    next: Next,
) -> Response {
    let Some(blob) = names.get("blob").filter(|_| demand.is_on()) else { return next.run(request).await };
    // What is no digest is no layer either, and the route says so.
    if let Ok(blob) = blob.parse() {
        let (caller, header) = (request.extensions().get::<Caller>(), request.headers().get(HEADER));
        if let Err(error) = demand.check(demand.shared.own_clock.now(), caller, blob, header) {
            let wanted = [(HEADER, HeaderValue::from_static("wanted"))];
            return (StatusCode::FORBIDDEN, wanted, error.to_string()).into_response();
        }
    }
    next.run(request).await
}

/// A grant is good by the clock of one of those who make them.
fn check_times(grant: &Grant, times: &[SystemTime]) -> Result<(), GrantError> {
    let mut checked = times.iter().map(|now| grant.check_time(*now));
    let first = checked.next().unwrap_or(Ok(()));
    if first.is_ok() || checked.any(|checked| checked.is_ok()) { Ok(()) } else { first }
}

const fn text_of(grants: bool) -> &'static str {
    if grants { "on\n" } else { "off\n" }
}

fn write(file: &FilePath, grants: bool) -> io::Result<()> {
    if std::fs::read_to_string(file).is_ok_and(|text| text == text_of(grants)) {
        return Ok(());
    }
    let new = file.with_extension("new");
    std::fs::write(&new, text_of(grants))?;
    std::fs::rename(new, file)
}
