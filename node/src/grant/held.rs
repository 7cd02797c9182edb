//! The grants that this machine holds: asked for when somebody demands one, renewed while they are used.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use http::HeaderValue;
use layer::Digest;
use parking_lot::Mutex;
use proto::drover::grant::v1 as api;

use super::to_header;
use crate::registry::{self, Credential};
use crate::source::{BlobRef, BoxFuture};

/// Layers whose grants are kept.
const SLOTS_MAX: usize = 8 << 10;
/// Repositories of one blob that are tried, the last named first.
const PLACES_MAX: usize = 4;
/// After a refusal nobody is asked again for so long.
const REFUSED_REST: Duration = Duration::from_secs(10);
/// Where it may go better soon, who needs the grant waits for so long and asks again.
const LATER_REST: Duration = Duration::from_millis(300);
/// A grant that has less left is not sent any more.
const MARGIN: Duration = Duration::from_secs(3);

/// What a seeder says to who asks for a grant.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Here it is.
    Granted(api::Grant),
    /// The registry does not give the layer to everyone: it wants to know who asks.
    NeedsCredentials(String),
    /// The registry does not give it to this machine.
    Denied(String),
    /// Nobody can say now.
    Later(String),
}

/// Who gives grants: the seeders.
pub trait Giver: Send + Sync {
    /// Asks for a grant.
    fn ask(&self, blob: Digest, request: api::AskRequest) -> BoxFuture<'_, Answer>;
}

/// The grants of this machine. Cheap to clone.
#[derive(Clone)]
pub struct Held {
    shared: Arc<Shared>,
}

struct Shared {
    giver: Box<dyn Giver>,
    /// Whose credentials are shown.
    registry: OnceLock<registry::Client>,
    slots: Mutex<HashMap<Digest, Arc<Slot>>>,
}

#[derive(Default)]
struct Slot {
    places: Mutex<Vec<BlobRef>>,
    state: Mutex<State>,
    /// Held while a seeder is asked: however many requests need the grant, one asks.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    token: Option<Token>,
    refused: Option<Refused>,
}

struct Refused {
    at: Instant,
    is_final: bool,
    reason: Arc<str>,
}

#[derive(Clone)]
struct Token {
    header: HeaderValue,
    bytes: Vec<u8>,
    /// Where it was got.
    place: BlobRef,
    got: Instant,
    validity: Duration,
}

impl Held {
    /// None yet; `giver` is asked for them.
    pub fn new(giver: Box<dyn Giver>) -> Self {
        Self { shared: Arc::new(Shared { giver, registry: OnceLock::new(), slots: Mutex::default() }) }
    }

    /// The client whose configuration has this machine's credentials. Without it there are none to show.
    pub(crate) fn show_credentials_of(&self, registry: registry::Client) {
        let _ = self.shared.registry.set(registry);
    }

    /// `blob` is in that repository.
    pub(crate) fn note(&self, blob: &BlobRef) {
        let slot = {
            let mut slots = self.shared.slots.lock();
            if slots.len() >= SLOTS_MAX && !slots.contains_key(&blob.digest) {
                slots.retain(|_, slot| slot.state.lock().token.as_ref().is_some_and(Token::is_good));
                if slots.len() >= SLOTS_MAX {
                    slots.clear();
                }
            }
            Arc::clone(slots.entry(blob.digest).or_default())
        };
        let mut places = slot.places.lock();
        let is_same = |place: &BlobRef| (&place.registry, &place.repository) == (&blob.registry, &blob.repository);
        if places.first().is_some_and(is_same) {
            return;
        }
        places.retain(|place| !is_same(place));
        places.insert(0, blob.clone());
        places.truncate(PLACES_MAX);
        slot.state.lock().refused = None;
    }

    /// The grant for `blob`, where there is one that is good. One that ends soon is renewed in the background.
    pub(crate) fn current(&self, blob: Digest) -> Option<HeaderValue> {
        let slot = self.slot(blob)?;
        let token = slot.state.lock().token.clone().filter(Token::is_good)?;
        if token.got.elapsed() > token.validity * 2 / 3 && slot.asking.try_lock().is_ok() {
            let (held, refused) = (self.clone(), token.header.clone());
            tokio::spawn(async move { held.renew(blob, Some(&refused)).await });
        }
        Some(token.header)
    }

    /// Another grant than `refused` for `blob`; the error says why there is none.
    pub(crate) async fn renew(&self, blob: Digest, refused: Option<&HeaderValue>) -> Result<HeaderValue, Arc<str>> {
        let slot = self.slot(blob).ok_or("this machine does not know in which repository the layer is")?;
        let since = Instant::now();
        let _asking = slot.asking.lock().await;
        let pause = {
            let state = slot.state.lock();
            if let Some(token) = state.token.as_ref().filter(|token| token.is_good() && Some(&token.header) != refused)
            {
                return Ok(token.header.clone());
            }
            match &state.refused {
                // Whoever waited while another asked would only repeat it.
                Some(Refused { at, is_final, reason })
                    if *at >= since || (*is_final && at.elapsed() < REFUSED_REST) =>
                {
                    return Err(Arc::clone(reason));
                }
                Some(refused) => LATER_REST.saturating_sub(refused.at.elapsed()),
                None => Duration::ZERO,
            }
        };
        tokio::time::sleep(pause).await;
        let (places, former) = (slot.places.lock().clone(), slot.state.lock().token.clone());
        let (mut reasons, mut is_final) = (Vec::new(), true);
        for place in places {
            let former = former.as_ref().filter(|former| former.place == place).map(|former| former.bytes.clone());
            match self.ask(&place, former.unwrap_or_default()).await {
                Answer::Granted(grant) => {
                    if let Some(token) = Token::of(grant, place) {
                        let header = token.header.clone();
                        *slot.state.lock() = State { token: Some(token), refused: None };
                        return Ok(header);
                    }
                    reasons.push("a seeder sent a grant that cannot be used".to_owned());
                }
                Answer::Later(reason) => {
                    is_final = false;
                    reasons.push(reason);
                }
                Answer::NeedsCredentials(reason) | Answer::Denied(reason) => reasons.push(reason),
            }
        }
        let reason: Arc<str> = reasons.join("; ").into();
        tracing::debug!(%blob, %reason, "no grant");
        slot.state.lock().refused = Some(Refused { at: Instant::now(), is_final, reason: Arc::clone(&reason) });
        Err(reason)
    }

    /// Asks as nobody in particular first: a credential leaves this machine only where it is needed.
    async fn ask(&self, place: &BlobRef, former: Vec<u8>) -> Answer {
        let request = api::AskRequest {
            blob: place.digest.to_string(),
            registry: place.registry.clone(),
            repository: place.repository.clone(),
            credentials: Vec::new(),
            former,
        };
        let answer = self.shared.giver.ask(place.digest, request.clone()).await;
        let (Answer::NeedsCredentials(reason), Some(registry)) = (&answer, self.shared.registry.get()) else {
            return answer;
        };
        let nothing = |why: String| {
            Answer::Denied(format!(
                "{reason}. This machine has no credentials to show ({why}); it needs them in a Docker configuration \
                 (docker_config), since those of a pull stay with containerd"
            ))
        };
        match registry.credentials(&place.registry).await {
            Ok(found) if found.is_empty() => nothing("none are configured".to_owned()),
            Ok(found) => {
                let credentials = found.into_iter().map(of_credential).collect();
                self.shared.giver.ask(place.digest, api::AskRequest { credentials, ..request }).await
            }
            Err(fault) => nothing(fault.to_string()),
        }
    }

    /// How many layers it knows something of.
    #[cfg(test)]
    pub(super) fn layers(&self) -> usize {
        self.shared.slots.lock().len()
    }

    fn slot(&self, blob: Digest) -> Option<Arc<Slot>> {
        self.shared.slots.lock().get(&blob).cloned()
    }
}

impl Token {
    fn of(grant: api::Grant, place: BlobRef) -> Option<Self> {
        let validity = Duration::from_millis(grant.valid_ms.into());
        let header = to_header(&grant.token)?;
        Some(Self { header, bytes: grant.token, place, got: Instant::now(), validity })
    }

    fn is_good(&self) -> bool {
        self.got.elapsed() + MARGIN.min(self.validity / 10) < self.validity
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").finish_non_exhaustive()
    }
}

fn of_credential((host, credential): (String, Credential)) -> api::Credential {
    use api::credential::Secret;
    let secret = match credential {
        Credential::Password { user, password } => Secret::Password(api::Password { user, password }),
        Credential::Identity(token) => Secret::IdentityToken(token),
        Credential::Token(token) => Secret::RegistryToken(token),
    };
    api::Credential { host, secret: Some(secret) }
}
