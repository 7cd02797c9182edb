//! A seeder's desk: asks the registry whether the asker may have a layer, and signs a grant.
//!
//! That a registry says yes means nothing by itself, since the asker names the registry. So the asker's credentials have to bring
//! pieces of the blob, and these are compared with the seeder's own: who gets those gets the blob without the cluster too.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::try_join_all;
use layer::Digest;
use parking_lot::Mutex;
use proto::drover::grant::v1 as api;
use proto::drover::grant::v1::grants_server::{Grants, GrantsServer};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use super::{CLOCK_SKEW, Grant, NAME_BYTES_MAX, Stage, TOKEN_BYTES_MAX, VALIDITY, seconds};
use crate::ingest::Ingester;
use crate::ingest::known::Known;
use crate::registry::{self, Credential, Fault, RegistryError, client::CREDENTIALS_MAX};
use crate::security::tls::Caller;
use crate::security::{Security, Signer, TrustError, Verifier};
use crate::source::BlobRef;

/// Path of all of the service's methods, for the router.
const ROUTE: &str = "/drover.grant.v1.Grants/{method}";
/// Largest request: [`CREDENTIALS_MAX`] credentials of ordinary size.
const REQUEST_BYTES_MAX: usize = 64 << 10;
/// The longest secret; tokens of cloud registries have some KiB.
const SECRET_BYTES_MAX: usize = 16 << 10;
/// Pieces of a blob that are compared besides its end, and their length.
const SAMPLES: usize = 3;
const SAMPLE_LEN: u64 = 64;
/// Registries that are asked at the same time.
const CHECKS: usize = 32;
/// How long an asker waits for all that. Less than what nodes take for a dead seeder.
const DEADLINE: Duration = Duration::from_secs(8);
/// For how long a registry's yes counts for others with the same credentials.
const YES_AGE: Duration = Duration::from_secs(30);
/// The same for a no, which an operator may be about to mend, and for a no to everyone.
const NO_AGE: Duration = Duration::from_secs(5);
const NO_TO_ALL_AGE: Duration = Duration::from_secs(60);
/// The same where the registry did not answer.
const DOWN_AGE: Duration = Duration::from_secs(2);
/// Answers that are remembered.
const ANSWERS_MAX: usize = 64 << 10;
/// How often one machine may make this one ask a registry: so many times at once, and so many times a second after that.
const ALLOWANCE: f64 = 512.0;
const ALLOWANCE_PER_SEC: f64 = 8.0;
/// Machines whose allowance is remembered.
const ALLOWANCES_MAX: usize = 16 << 10;

/// How grants are given.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// For how long after a registry's last yes a grant is renewed while that registry cannot be asked; zero: not at all.
    pub registry_down: Duration,
    /// For how long a grant is good.
    pub validity: Duration,
}

impl Default for Options {
    /// An hour, [`VALIDITY`].
    fn default() -> Self {
        Self { registry_down: Duration::from_secs(3600), validity: VALIDITY }
    }
}

/// Gives grants. Cheap to clone.
#[derive(Clone)]
pub struct Issuer {
    shared: Arc<Shared>,
}

struct Shared {
    ingester: Ingester,
    signer: Signer,
    verifier: Verifier,
    options: Options,
    checks: Semaphore,
    answers: Mutex<HashMap<Question, Arc<tokio::sync::Mutex<Option<Answer>>>>>,
    /// By key of the machine.
    allowances: Mutex<HashMap<Digest, Allowance>>,
    /// Clients that act for others, while they do, so that those who ask with the same credentials share tokens.
    acting: Mutex<HashMap<[u8; 32], Weak<registry::Client>>>,
    /// Makes digests of credentials worthless to anyone else.
    secret: [u8; 32],
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Question {
    blob: Digest,
    registry: String,
    repository: String,
    stage: Stage,
    /// Keyed digest of the credentials; `None` where there are none.
    credentials: Option<[u8; 32]>,
}

#[derive(Clone)]
struct Answer {
    verdict: Verdict,
    until: Instant,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Yes {
        confirmed: SystemTime,
    },
    No(String),
    Down(String),
    /// This seeder has too much to do.
    Busy,
}

/// What somebody asks for.
struct Asked {
    blob: BlobRef,
    /// By host.
    credentials: HashMap<String, Credential>,
    /// The last token.
    former: Vec<u8>,
}

/// What of a layer there is to compare.
enum Subject {
    Whole(Arc<Known>),
    Ingest,
}

struct Allowance {
    left: f64,
    at: Instant,
}

/// Adds the service of `issuer` to `router`.
pub fn route(router: axum::Router, issuer: Issuer) -> axum::Router {
    router.route_service(ROUTE, GrantsServer::new(issuer).max_decoding_message_size(REQUEST_BYTES_MAX))
}

impl Issuer {
    /// Gives grants for the layers of `ingester` in the name of a seeder; `None` without security, where there is nobody to give
    /// them to.
    pub fn new(ingester: Ingester, security: &Security, options: Options) -> Result<Option<Self>, TrustError> {
        let Some(signer) = security.signer()? else { return Ok(None) };
        let mut secret = [0; 32];
        aws_lc_rs::rand::fill(&mut secret).map_err(|_| TrustError::Key("there is no randomness".to_owned()))?;
        let shared = Shared {
            ingester,
            signer,
            verifier: security.verifier(),
            options,
            checks: Semaphore::new(CHECKS),
            answers: Mutex::default(),
            allowances: Mutex::default(),
            acting: Mutex::default(),
            secret,
        };
        Ok(Some(Self { shared: Arc::new(shared) }))
    }

    /// Asks registries anew.
    #[cfg(test)]
    pub(super) fn forget_answers(&self) {
        self.shared.answers.lock().clear();
    }

    /// Since when the holder of `token` is confirmed, where that counts at `now` although the registry is down.
    #[cfg(test)]
    pub(super) fn extends(&self, caller: &Caller, blob: &BlobRef, token: &[u8], now: SystemTime) -> Option<u64> {
        self.shared.former(caller, blob, token, now)
    }

    /// Whether the machine with that key may cause one more question to a registry.
    #[cfg(test)]
    pub(super) fn allows(&self, key: Digest) -> bool {
        self.shared.allow(key)
    }

    async fn give(&self, caller: &Caller, request: api::AskRequest) -> Result<api::Grant, Status> {
        let Asked { blob, credentials, former } = read(request)?;
        let shared = &self.shared;
        let subject = match shared.ingester.known(blob.digest).await {
            Some(known) => Subject::Whole(known),
            None => match shared.ingester.flight(blob.digest) {
                Some(flight) if flight.reads_from(&blob.registry) => Subject::Ingest,
                Some(_) => return Err(Status::unavailable("the layer is being read and not known yet: ask again")),
                None => return Err(Status::not_found("this layer is not known here: resolve it first")),
            },
        };
        let stage = match subject {
            Subject::Whole(_) => Stage::Whole,
            Subject::Ingest => Stage::Ingest,
        };
        let is_anonymous = credentials.is_empty();
        let confirmed = match shared.verdict(caller, &blob, credentials, &subject).await {
            Verdict::Yes { confirmed } => seconds(confirmed),
            Verdict::No(reason) if is_anonymous => return Err(Status::unauthenticated(reason)),
            Verdict::No(reason) => {
                tracing::debug!(node = caller.name, %blob, reason, "no grant");
                return Err(Status::permission_denied(reason));
            }
            Verdict::Down(reason) => {
                let former = shared.former(caller, &blob, &former, SystemTime::now());
                former.ok_or_else(|| Status::unavailable(format!("the registry cannot be asked now: {reason}")))?
            }
            Verdict::Busy => return Err(Status::resource_exhausted("too many registries are being asked: come again")),
        };
        let (issued, validity) = (seconds(SystemTime::now()), shared.options.validity);
        let grant = Grant {
            key: caller.key,
            blob: blob.digest,
            registry: blob.registry,
            repository: blob.repository,
            stage,
            issued,
            expires: issued + validity.as_secs(),
            confirmed,
        };
        let token = grant.seal(&shared.signer).map_err(|error| {
            tracing::error!(%error, "grants cannot be signed");
            Status::internal("this seeder cannot sign: its log says why")
        })?;
        Ok(api::Grant { token, valid_ms: u32::try_from(validity.as_millis()).unwrap_or(u32::MAX) })
    }
}

#[tonic::async_trait]
impl Grants for Issuer {
    async fn ask(&self, request: Request<api::AskRequest>) -> Result<Response<api::Grant>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let caller = caller.ok_or_else(|| Status::permission_denied("grants are for machines with a certificate"))?;
        let given = tokio::time::timeout(DEADLINE, self.give(&caller, request.into_inner())).await;
        given.map_err(|_| Status::unavailable("the registry did not answer in time"))?.map(Response::new)
    }
}

impl Shared {
    async fn verdict(
        &self,
        caller: &Caller,
        blob: &BlobRef,
        credentials: HashMap<String, Credential>,
        subject: &Subject,
    ) -> Verdict {
        let id = (!credentials.is_empty()).then(|| self.id(&credentials));
        let question = Question {
            blob: blob.digest,
            registry: blob.registry.clone(),
            repository: blob.repository.clone(),
            stage: if matches!(subject, Subject::Ingest) { Stage::Ingest } else { Stage::Whole },
            credentials: id,
        };
        let slot = self.slot(question);
        // Held while the registry is asked: all who ask the same wait for one answer.
        let mut answer = slot.lock().await;
        if let Some(answer) = answer.as_ref().filter(|answer| Instant::now() < answer.until) {
            return answer.verdict.clone();
        }
        if !self.allow(caller.key) {
            tracing::debug!(node = caller.name, "a node asks for too many grants");
            return Verdict::Busy;
        }
        let Ok(_permit) = self.checks.acquire().await else { return Verdict::Busy };
        let client = self.acting(id.unwrap_or_default(), credentials);
        let checked = tokio::time::timeout(DEADLINE * 3 / 4, check(&client, blob, subject)).await;
        let verdict = match checked {
            Ok(Ok(verdict)) => verdict,
            Ok(Err(error)) => verdict(&error),
            Err(_) => Verdict::Down(format!("registry {} did not answer in time", blob.registry)),
        };
        if let Verdict::Down(reason) = &verdict {
            tracing::warn!(%blob, reason, extended = ?self.options.registry_down, "a registry cannot be asked who may have a layer");
        }
        let age = match &verdict {
            Verdict::Yes { .. } => YES_AGE,
            Verdict::No(_) if id.is_none() => NO_TO_ALL_AGE,
            Verdict::No(_) => NO_AGE,
            Verdict::Down(_) | Verdict::Busy => DOWN_AGE,
        };
        *answer = Some(Answer { verdict: verdict.clone(), until: Instant::now() + age });
        verdict
    }

    /// When the registry last said yes to the holder of `token`, if that still counts for the same machine and the same layer.
    fn former(&self, caller: &Caller, blob: &BlobRef, token: &[u8], now: SystemTime) -> Option<u64> {
        let grant = Grant::open(token, &self.verifier).ok()?;
        let is_same = grant.key == caller.key
            && grant.blob == blob.digest
            && (&grant.registry, &grant.repository) == (&blob.registry, &blob.repository)
            && grant.stage == Stage::Whole;
        let (now, allowed) = (seconds(now), self.options.registry_down.as_secs());
        let is_young = now < grant.confirmed.saturating_add(allowed);
        let is_past = grant.confirmed <= now.saturating_add(CLOCK_SKEW.as_secs());
        (is_same && is_young && is_past).then_some(grant.confirmed)
    }

    fn id(&self, credentials: &HashMap<String, Credential>) -> [u8; 32] {
        let mut hosts: Vec<_> = credentials.iter().collect();
        hosts.sort_by_key(|(host, _)| *host);
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        let mut part = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        for (host, credential) in hosts {
            part(host);
            match credential {
                Credential::Password { user, password } => ["password", user, password].map(&mut part),
                Credential::Identity(token) => ["identity", token, ""].map(&mut part),
                Credential::Token(token) => ["token", token, ""].map(&mut part),
            };
        }
        *hasher.finalize().as_bytes()
    }

    fn slot(&self, question: Question) -> Arc<tokio::sync::Mutex<Option<Answer>>> {
        let mut answers = self.answers.lock();
        if answers.len() >= ANSWERS_MAX && !answers.contains_key(&question) {
            let now = Instant::now();
            let is_of_use = |slot: &Arc<tokio::sync::Mutex<Option<Answer>>>| match slot.try_lock() {
                Ok(answer) => answer.as_ref().is_some_and(|answer| now < answer.until),
                Err(_) => true,
            };
            answers.retain(|_, slot| is_of_use(slot));
            if answers.len() >= ANSWERS_MAX {
                answers.clear();
            }
        }
        Arc::clone(answers.entry(question).or_default())
    }

    /// Whether a registry may be asked for the machine with that key.
    fn allow(&self, key: Digest) -> bool {
        let now = Instant::now();
        let mut allowances = self.allowances.lock();
        if allowances.len() >= ALLOWANCES_MAX && !allowances.contains_key(&key) {
            allowances.retain(|_, allowance| allowance.at(now) < ALLOWANCE);
        }
        let allowance = allowances.entry(key).or_insert(Allowance { left: ALLOWANCE, at: now });
        allowance.left = allowance.at(now);
        allowance.at = now;
        let is_allowed = allowance.left >= 1.0;
        if is_allowed {
            allowance.left -= 1.0;
        }
        is_allowed
    }

    fn acting(&self, id: [u8; 32], credentials: HashMap<String, Credential>) -> Arc<registry::Client> {
        let mut acting = self.acting.lock();
        if let Some(client) = acting.get(&id).and_then(Weak::upgrade) {
            return client;
        }
        acting.retain(|_, client| client.strong_count() > 0);
        let client = Arc::new(self.ingester.registry().acting_for(credentials));
        acting.insert(id, Arc::downgrade(&client));
        client
    }
}

impl Allowance {
    fn at(&self, now: Instant) -> f64 {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        since.mul_add(ALLOWANCE_PER_SEC, self.left).min(ALLOWANCE)
    }
}

/// Asks the registry.
async fn check(client: &registry::Client, blob: &BlobRef, subject: &Subject) -> Result<Verdict, RegistryError> {
    let confirmed = SystemTime::now();
    let samples = match subject {
        // That the registry has the bytes is what the ingest proves, or it fails.
        Subject::Ingest => vec![(0, Vec::new())],
        Subject::Whole(known) => {
            let known = Arc::clone(known);
            let read = tokio::task::spawn_blocking(move || known.samples(SAMPLES, SAMPLE_LEN)).await;
            match read.map_err(std::io::Error::other).flatten() {
                Ok(samples) => samples,
                Err(error) => {
                    tracing::error!(blob = %blob.digest, %error, "a stored blob cannot be read");
                    return Ok(Verdict::Busy);
                }
            }
        }
    };
    let compared = samples.into_iter().map(|(start, wanted)| async move {
        let end = start + (wanted.len() as u64).max(1);
        let (mut body, mut bytes) = (client.blob(blob, start, Some(end)).await?, Vec::new());
        while let Some(more) = body.next().await? {
            bytes.extend_from_slice(&more);
        }
        Ok::<_, RegistryError>(wanted.is_empty() || bytes == wanted)
    });
    let are_right = try_join_all(compared).await?.into_iter().all(|is_right| is_right);
    Ok(match are_right {
        true => Verdict::Yes { confirmed },
        false => Verdict::No(format!("what registry {} has there is not the blob {}", blob.registry, blob.digest)),
    })
}

/// A registry that cannot be asked is told from one that says no, or that only this asker cannot ask.
fn verdict(error: &RegistryError) -> Verdict {
    let text = error.to_string();
    match &error.fault {
        Fault::Name { .. }
        | Fault::Unreachable { .. }
        | Fault::Tls { .. }
        | Fault::Proxy { .. }
        | Fault::Stalled { .. }
        | Fault::Busy { .. } => Verdict::Down(text),
        Fault::Denied { .. }
        | Fault::NotFound { .. }
        | Fault::Credentials { .. }
        | Fault::Protocol { .. }
        | Fault::Configuration { .. } => Verdict::No(text),
    }
}

/// Reads a request within its bounds.
fn read(request: api::AskRequest) -> Result<Asked, Status> {
    use api::credential::Secret;
    let wrong = |text: &str| Status::invalid_argument(text.to_owned());
    let digest = request.blob.parse().map_err(|_| wrong("the request names no digest"))?;
    let api::AskRequest { registry, repository, credentials, former, .. } = request;
    if [&registry, &repository].iter().any(|name| name.is_empty() || name.len() > NAME_BYTES_MAX) {
        return Err(wrong("the request names no registry and repository"));
    }
    if credentials.len() > CREDENTIALS_MAX || former.len() > TOKEN_BYTES_MAX {
        return Err(wrong("the request has too many credentials, or too large a former grant"));
    }
    let mut by_host = HashMap::new();
    for api::Credential { host, secret } in credentials {
        let secret = secret.ok_or_else(|| wrong("a credential is of an unknown kind"))?;
        let len = match &secret {
            Secret::Password(api::Password { user, password }) => user.len() + password.len(),
            Secret::IdentityToken(token) | Secret::RegistryToken(token) => token.len(),
        };
        if len > SECRET_BYTES_MAX || host.len() > NAME_BYTES_MAX {
            return Err(wrong("a credential is too long"));
        }
        let credential = match secret {
            Secret::Password(api::Password { user, password }) => Credential::Password { user, password },
            Secret::IdentityToken(token) => Credential::Identity(token),
            Secret::RegistryToken(token) => Credential::Token(token),
        };
        by_host.insert(host, credential);
    }
    // Its size is not needed, and the asker's `urls` prove nothing.
    let blob = BlobRef { registry, repository, digest, size: 0, media_type: String::new(), urls: Vec::new() };
    Ok(Asked { blob, credentials: by_host, former })
}
