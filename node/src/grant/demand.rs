//! Whether who serves layers demands grants, and what makes a grant good.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode};
use layer::Digest;
use parking_lot::Mutex;

use super::{Grant, GrantError, HEADER, Stage, of_header};
use crate::ingest::Ingester;
use crate::security::tls::Caller;
use crate::security::{Security, Verifier};

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

    /// Lets only who shows a grant reach those routes of `router` that name a blob.
    pub fn guard(&self, router: Router) -> Router {
        router.route_layer(middleware::from_fn_with_state(self.clone(), guarded))
    }

    /// Whether `caller` may have `blob` at `now` with the grant in `header`.
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
        grant.check_time(now)?;
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
            let now = SystemTime::now();
            verified.retain(|_, grant| grant.check_time(now).is_ok());
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
        if let Err(error) = demand.check(SystemTime::now(), caller, blob, header) {
            let wanted = [(HEADER, HeaderValue::from_static("wanted"))];
            return (StatusCode::FORBIDDEN, wanted, error.to_string()).into_response();
        }
    }
    next.run(request).await
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
