//! Authentication at registries: challenges (RFC 9110, 11.6.1) and bearer tokens (distribution's token specification and
//! its OAuth2 variant).

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use http::{HeaderMap, HeaderValue, header};
use parking_lot::Mutex;
use reqwest::Url;
use serde::Deserialize;

use super::answer;
use super::credentials::{Credential, Credentials};
use super::error::Fault;
use super::proxy::{self, Proxies};

/// The most bytes of a token server's answer: tokens of cloud registries have some KiB.
const TOKEN_BYTES_MAX: usize = 256 << 10;
/// What a token without `expires_in` is good for (token specification).
const TOKEN_VALIDITY: Duration = Duration::from_secs(60);
/// The longest that a token is used, whatever its server says.
const TOKEN_VALIDITY_MAX: Duration = Duration::from_secs(24 * 3600);
/// How long credentials are used before they are looked up again.
const BASIC_VALIDITY: Duration = Duration::from_secs(300);
/// The most repositories of a registry whose tokens are kept.
const SLOTS_MAX: usize = 1024;
/// The most challenges of an answer that are read, and the most parameters of one.
const CHALLENGES_MAX: usize = 16;
/// Client name in OAuth2 requests.
const CLIENT_ID: &str = "drover";

/// One challenge of a `WWW-Authenticate` header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// User name and password with each request.
    Basic,
    /// A token from `realm`.
    Bearer {
        /// URL of the token server.
        realm: String,
        /// Service to name there.
        service: Option<String>,
        /// Scope to ask for; the repository's pull scope where the registry names none.
        scope: Option<String>,
    },
}

impl Challenge {
    /// The best challenge of a 401 answer: a token where there is a choice.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let texts = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let mut challenges: Vec<Self> = texts.flat_map(parse_challenges).collect();
        let best = challenges.iter().position(|challenge| matches!(challenge, Self::Bearer { .. })).unwrap_or(0);
        (best < challenges.len()).then(|| challenges.swap_remove(best))
    }
}

/// The authorizations for one endpoint, a slot for each repository. A slot's lock is held while its token is fetched,
/// so that however many requests wait, one token is asked for.
#[derive(Default)]
pub(super) struct Authorizations {
    slots: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Slot>>>>,
}

#[derive(Default)]
struct Slot {
    challenge: Option<Challenge>,
    current: Option<(HeaderValue, Instant)>,
    /// The last failure, for those who waited for the same token.
    failed: Option<(Fault, Instant)>,
}

/// What a token request needs of its endpoint.
pub(super) struct Asker<'a> {
    pub(super) http: &'a reqwest::Client,
    /// The endpoint's host with port.
    pub(super) host: &'a str,
    /// The endpoint is asked without TLS, so its token server may be as well.
    pub(super) may_be_plain: bool,
    pub(super) credentials: &'a Credentials,
    pub(super) docker_config: Option<&'a PathBuf>,
    pub(super) proxies: &'a Proxies,
    pub(super) deadline: Duration,
}

impl Authorizations {
    /// The `Authorization` to send for `repository`; `None` while its registry never asked for one.
    pub(super) async fn get(&self, asker: &Asker<'_>, repository: &str) -> Result<Option<HeaderValue>, Fault> {
        let (slot, since) = (self.slot(repository), Instant::now());
        let mut slot = slot.lock().await;
        match (&slot.current, slot.challenge.clone()) {
            (Some((value, until)), _) if Instant::now() < *until => Ok(Some(value.clone())),
            (_, Some(challenge)) => slot.fetch(asker, repository, &challenge, since).await,
            _ => Ok(None),
        }
    }

    /// A new authorization after `refused` was answered with `challenge`; `None` where there are no credentials for it.
    pub(super) async fn renew(
        &self,
        asker: &Asker<'_>,
        repository: &str,
        challenge: Challenge,
        refused: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, Fault> {
        let (slot, since) = (self.slot(repository), Instant::now());
        let mut slot = slot.lock().await;
        if let Some((value, until)) = &slot.current
            && Some(value) != refused
            && Instant::now() < *until
        {
            return Ok(Some(value.clone()));
        }
        let fresh = slot.fetch(asker, repository, &challenge, since).await?;
        slot.challenge = Some(challenge);
        Ok(fresh)
    }

    fn slot(&self, repository: &str) -> Arc<tokio::sync::Mutex<Slot>> {
        let mut slots = self.slots.lock();
        if slots.len() >= SLOTS_MAX && !slots.contains_key(repository) {
            slots.clear();
        }
        Arc::clone(slots.entry(repository.to_owned()).or_default())
    }
}

impl Slot {
    /// A new authorization; `since` is when its asker came.
    async fn fetch(
        &mut self,
        asker: &Asker<'_>,
        repository: &str,
        challenge: &Challenge,
        since: Instant,
    ) -> Result<Option<HeaderValue>, Fault> {
        // Whoever waited while another's request failed would only repeat it.
        if let Some((fault, at)) = &self.failed
            && *at >= since
        {
            return Err(fault.clone());
        }
        self.current = None;
        match authorize(asker, repository, challenge).await {
            Ok(fresh) => {
                self.failed = None;
                self.current.clone_from(&fresh);
                Ok(fresh.map(|(value, _)| value))
            }
            Err(fault) => {
                self.failed = Some((fault.clone(), Instant::now()));
                Err(fault)
            }
        }
    }
}

async fn authorize(
    asker: &Asker<'_>,
    repository: &str,
    challenge: &Challenge,
) -> Result<Option<(HeaderValue, Instant)>, Fault> {
    let credential = asker.credentials.of(asker.host, asker.docker_config).await?;
    match (challenge, credential) {
        (Challenge::Basic, Some(Credential::Password { user, password })) => {
            Ok(Some((basic(&user, &password)?, Instant::now() + BASIC_VALIDITY)))
        }
        (Challenge::Basic, _) => Ok(None),
        (Challenge::Bearer { .. }, Some(Credential::Token(token))) => {
            Ok(Some((sensitive(&format!("Bearer {token}"))?, Instant::now() + BASIC_VALIDITY)))
        }
        (Challenge::Bearer { realm, service, scope }, credential) => {
            let scope = scope.clone().unwrap_or_else(|| format!("repository:{repository}:pull"));
            let asked = Instant::now();
            let (token, validity) = token(asker, realm, service.as_deref(), &scope, credential).await?;
            let value = sensitive(&format!("Bearer {token}"))?;
            // A token is renewed when a fifth of its life is left, so that no request goes out with one that expires
            // on its way.
            Ok(Some((value, asked + validity.mul_f32(0.8))))
        }
    }
}

/// A token server's answer, and how long its token is good for.
pub fn read_token(body: &[u8]) -> Result<(String, Duration), String> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
        expires_in: Option<f64>,
    }
    let answer: Answer =
        serde_json::from_slice(body).map_err(|error| format!("its token server's answer is no token: {error}"))?;
    let token =
        answer.token.filter(|token| !token.is_empty()).or(answer.access_token).filter(|token| !token.is_empty());
    let token = token.ok_or("its token server's answer has no token")?;
    let validity = match answer.expires_in {
        None => TOKEN_VALIDITY,
        Some(seconds) => Duration::try_from_secs_f64(seconds).unwrap_or_default().min(TOKEN_VALIDITY_MAX),
    };
    Ok((token, validity))
}

async fn token(
    asker: &Asker<'_>,
    realm: &str,
    service: Option<&str>,
    scope: &str,
    credential: Option<Credential>,
) -> Result<(String, Duration), Fault> {
    let mut url = Url::parse(realm).map_err(|error| {
        Fault::protocol(format!("its token server {realm:?} is no URL ({error}); mend its configuration"))
    })?;
    if url.scheme() != "https" && !(asker.may_be_plain && url.scheme() == "http") {
        return Err(Fault::protocol(format!(
            "its token server {} is not HTTPS, so it is not asked; mend the registry's configuration",
            super::endpoint::authority(&url)
        )));
    }
    let server = super::endpoint::authority(&url);
    let has_credentials = credential.is_some();
    let request = match credential {
        Some(Credential::Identity(refresh_token)) => {
            let mut form = url::form_urlencoded::Serializer::new(String::new());
            form.append_pair("grant_type", "refresh_token")
                .append_pair("service", service.unwrap_or(asker.host))
                .append_pair("scope", scope)
                .append_pair("client_id", CLIENT_ID)
                .append_pair("refresh_token", &refresh_token);
            let form_type = HeaderValue::from_static("application/x-www-form-urlencoded");
            asker.http.post(url.clone()).header(header::CONTENT_TYPE, form_type).body(form.finish())
        }
        other => {
            if let Some(service) = service {
                url.query_pairs_mut().append_pair("service", service);
            }
            url.query_pairs_mut().append_pair("scope", scope);
            let request = asker.http.get(url.clone());
            match other {
                Some(Credential::Password { user, password }) => {
                    request.header(header::AUTHORIZATION, basic(&user, &password)?)
                }
                _ => request,
            }
        }
    };
    let transport = |error: &reqwest::Error| {
        let proxy = asker.proxies.of(&url).map(proxy::shown);
        match Fault::of_transport(error, proxy.as_deref()) {
            Fault::Unreachable { reason } => {
                Fault::Unreachable { reason: format!("its token server {server}: {reason}") }
            }
            Fault::Name { reason } => Fault::Name { reason: format!("that of its token server {server}: {reason}") },
            Fault::Tls { reason, advice } => {
                Fault::Tls { reason: format!("its token server {server}: {reason}"), advice }
            }
            other => other,
        }
    };
    let answer = async {
        let mut response = request.send().await.map_err(|error| transport(&error))?;
        let (status, mut body) = (response.status(), Vec::new());
        while let Some(bytes) = response.chunk().await.map_err(|error| transport(&error))? {
            if body.len() + bytes.len() > TOKEN_BYTES_MAX {
                return Err(Fault::protocol(format!(
                    "the answer of its token server {server} is larger than {TOKEN_BYTES_MAX} bytes"
                )));
            }
            body.extend_from_slice(&bytes);
        }
        if status.is_success() {
            return Ok(body);
        }
        let said = answer::excerpt(response.headers(), &body, false);
        let said = if said.is_empty() { said } else { format!(": {said}") };
        let reason = format!("its token server {server} answered {status} for {scope}{said}");
        Err(match status {
            http::StatusCode::TOO_MANY_REQUESTS | http::StatusCode::SERVICE_UNAVAILABLE => {
                Fault::Busy { reason, retry_after: answer::retry_after(response.headers(), SystemTime::now()) }
            }
            _ if status.is_server_error() => Fault::Busy { reason, retry_after: None },
            _ => {
                asker.credentials.forget(asker.host, asker.docker_config);
                let advice = match has_credentials {
                    true => format!("check the credentials for {}, and that they may pull", asker.host),
                    false => format!(
                        "no credentials are configured: `docker login {}`, or name a file in `docker_config` of its registry \
                         table",
                        asker.host
                    ),
                };
                Fault::Denied { reason, advice }
            }
        })
    };
    let body = tokio::time::timeout(asker.deadline, answer).await.map_err(|_| Fault::Unreachable {
        reason: format!("no answer from its token server {server} within {:?}", asker.deadline),
    })??;
    read_token(&body).map_err(Fault::protocol)
}

fn basic(user: &str, password: &str) -> Result<HeaderValue, Fault> {
    let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    sensitive(&format!("Basic {encoded}"))
}

fn sensitive(text: &str) -> Result<HeaderValue, Fault> {
    let mut value = HeaderValue::from_str(text).map_err(|_| Fault::Credentials {
        reason: "they, or the token that they gave, have characters that cannot stand in a header".to_owned(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// All challenges of one header value, as far as it can be read.
fn parse_challenges(text: &str) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() && challenges.len() < CHALLENGES_MAX {
        let end = rest.find([' ', ',']).unwrap_or(rest.len());
        let (scheme, after) = rest.split_at(end);
        let (parameters, next) = parse_parameters(after);
        if scheme.eq_ignore_ascii_case("basic") {
            challenges.push(Challenge::Basic);
        } else if scheme.eq_ignore_ascii_case("bearer") {
            let find = |name: &str| {
                parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.clone())
            };
            if let Some(realm) = find("realm") {
                challenges.push(Challenge::Bearer {
                    realm,
                    service: find("service"),
                    scope: find("scope").filter(|scope| !scope.is_empty()),
                });
            }
        }
        rest = next;
    }
    challenges
}

/// `name=value` pairs up to the next scheme, and the text from that scheme on.
fn parse_parameters(mut rest: &str) -> (Vec<(String, String)>, &str) {
    let mut parameters = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let name_end = rest.find(['=', ' ', ',']).unwrap_or(rest.len());
        let (name, after) = rest.split_at(name_end);
        let Some(after) = after.strip_prefix('=') else { return (parameters, rest) };
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => parse_quoted(quoted),
            None => {
                let end = after.find([',', ' ']).unwrap_or(after.len());
                (after[..end].to_owned(), &after[end..])
            }
        };
        parameters.push((name.to_owned(), value));
        rest = next;
    }
}

/// A quoted string after its opening quote, and the text after its closing one.
fn parse_quoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            _ => value.push(character),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_str(value).unwrap());
        }
        Challenge::of(&headers)
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        })
    }

    #[test]
    fn reads_challenges_in_all_their_shapes() {
        assert_eq!(
            of(&["Bearer realm=\"https://a/token\",service=\"s, t\",scope=\"repository:x:pull,push\""]),
            bearer("https://a/token", Some("s, t"), Some("repository:x:pull,push"))
        );
        assert_eq!(of(&["bearer  realm=https://a , service=\"q\\\"q\""]), bearer("https://a", Some("q\"q"), None));
        assert_eq!(of(&["Basic realm=\"x\", Bearer realm=\"https://b\""]), bearer("https://b", None, None));
        assert_eq!(of(&["Basic realm=\"x\"", "Negotiate"]), Some(Challenge::Basic));
        assert_eq!(of(&["Basic"]), Some(Challenge::Basic));
    }

    #[test]
    fn tokens_have_two_names_and_a_validity() {
        let read = |text: &str| read_token(text.as_bytes());
        assert_eq!(read(r#"{"token":"a"}"#), Ok(("a".to_owned(), TOKEN_VALIDITY)));
        assert_eq!(
            read(r#"{"token":"","access_token":"b","expires_in":300}"#),
            Ok(("b".to_owned(), Duration::from_secs(300)))
        );
        assert_eq!(read(r#"{"token":"a","expires_in":1e300}"#).unwrap().1, Duration::ZERO, "nonsense is not trusted");
        assert_eq!(read(r#"{"token":"a","expires_in":9e9}"#).unwrap().1, TOKEN_VALIDITY_MAX);
        for odd in ["", "{}", "[]", r#"{"token":""}"#, r#"{"token":3}"#, "<html>"] {
            assert!(read(odd).is_err(), "{odd:?}");
        }
    }

    #[test]
    fn odd_challenges_are_no_challenge() {
        for odd in ["", ",,,", "=", "Bearer", "Bearer scope=\"x\"", "Digest realm=\"x\"", "\"", "Bearer =\"", " = = "] {
            assert_eq!(of(&[odd]), None, "{odd:?}");
        }
    }
}
