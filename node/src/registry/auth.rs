//! Authentication at registries: challenges (RFC 9110, 11.6.1), bearer tokens (distribution's token specification and
//! its OAuth2 variant) and credentials from Docker's configuration.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use base64::Engine as _;
use docker_credential::{CredentialRetrievalError, DockerCredential};
use http::{HeaderMap, HeaderValue, header};
use parking_lot::Mutex;
use reqwest::Url;
use serde::Deserialize;

use super::client::{RegistryError, read_bounded};

/// The most bytes of a token server's answer: tokens of cloud registries have some KiB.
const TOKEN_BYTES_MAX: usize = 256 << 10;
/// What a token without `expires_in` is good for (token specification).
const TOKEN_VALIDITY: Duration = Duration::from_secs(60);
/// How long credentials of Docker's configuration are used before they are looked up again.
const BASIC_VALIDITY: Duration = Duration::from_secs(300);
/// How long a credential helper may take.
const HELPER_DEADLINE: Duration = Duration::from_secs(10);
/// The most repositories of a registry whose tokens are kept.
const SLOTS_MAX: usize = 1024;
/// Client name in OAuth2 requests.
const CLIENT_ID: &str = "drover";

/// Credential helpers are programs that may hang; no more of them than this run at once.
static HELPERS: LazyLock<Arc<tokio::sync::Semaphore>> = LazyLock::new(|| Arc::new(tokio::sync::Semaphore::new(4)));

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

/// The authorizations for one registry, a slot for each repository. A slot's lock is held while its token is fetched,
/// so that however many requests wait, one token is asked for.
#[derive(Default)]
pub(super) struct Authorizations {
    slots: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Slot>>>>,
}

#[derive(Default)]
struct Slot {
    challenge: Option<Challenge>,
    current: Option<(HeaderValue, Instant)>,
}

/// What a token request needs of its registry.
pub(super) struct Registry<'a> {
    pub(super) http: &'a reqwest::Client,
    pub(super) host: &'a str,
    pub(super) plain_http: bool,
    pub(super) docker_config: Option<&'a PathBuf>,
    pub(super) deadline: Duration,
}

impl Authorizations {
    /// The `Authorization` to send for `repository`; `None` while its registry never asked for one.
    pub(super) async fn get(
        &self,
        registry: &Registry<'_>,
        repository: &str,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let slot = self.slot(repository);
        let mut slot = slot.lock().await;
        match (&slot.current, &slot.challenge) {
            (Some((value, until)), _) if Instant::now() < *until => Ok(Some(value.clone())),
            (_, Some(challenge)) => {
                let fresh = authorize(registry, repository, challenge).await?;
                slot.current = fresh.clone();
                Ok(fresh.map(|(value, _)| value))
            }
            _ => Ok(None),
        }
    }

    /// A new authorization after `refused` was answered with `challenge`; `None` where there are no credentials for it.
    pub(super) async fn renew(
        &self,
        registry: &Registry<'_>,
        repository: &str,
        challenge: Challenge,
        refused: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let slot = self.slot(repository);
        let mut slot = slot.lock().await;
        if let Some((value, until)) = &slot.current
            && Some(value) != refused
            && Instant::now() < *until
        {
            return Ok(Some(value.clone()));
        }
        slot.current = None;
        let fresh = authorize(registry, repository, &challenge).await?;
        slot.challenge = Some(challenge);
        slot.current = fresh.clone();
        Ok(fresh.map(|(value, _)| value))
    }

    fn slot(&self, repository: &str) -> Arc<tokio::sync::Mutex<Slot>> {
        let mut slots = self.slots.lock();
        if slots.len() >= SLOTS_MAX && !slots.contains_key(repository) {
            slots.clear();
        }
        Arc::clone(slots.entry(repository.to_owned()).or_default())
    }
}

async fn authorize(
    registry: &Registry<'_>,
    repository: &str,
    challenge: &Challenge,
) -> Result<Option<(HeaderValue, Instant)>, RegistryError> {
    let credential = credential(registry).await?;
    match challenge {
        Challenge::Basic => match credential {
            Some(DockerCredential::UsernamePassword(user, password)) => {
                Ok(Some((basic(registry, &user, &password)?, Instant::now() + BASIC_VALIDITY)))
            }
            Some(DockerCredential::IdentityToken(_)) | None => Ok(None),
        },
        Challenge::Bearer { realm, service, scope } => {
            let scope = scope.clone().unwrap_or_else(|| format!("repository:{repository}:pull"));
            let (token, validity) = token(registry, realm, service.as_deref(), &scope, credential).await?;
            let value = sensitive(registry, &format!("Bearer {token}"))?;
            // A token is renewed when a fifth of its life is left, so that no request goes out with one that expires
            // on its way.
            Ok(Some((value, Instant::now() + validity.mul_f32(0.8))))
        }
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

async fn token(
    registry: &Registry<'_>,
    realm: &str,
    service: Option<&str>,
    scope: &str,
    credential: Option<DockerCredential>,
) -> Result<(String, Duration), RegistryError> {
    let denied = |reason: String| RegistryError::Denied { host: registry.host.to_owned(), reason };
    let mut url =
        Url::parse(realm).map_err(|error| denied(format!("its token server {realm:?} is no URL: {error}")))?;
    if url.scheme() != "https" && !(registry.plain_http && url.scheme() == "http") {
        return Err(denied(format!("its token server {url} is not HTTPS")));
    }
    let request = match credential {
        Some(DockerCredential::IdentityToken(refresh_token)) => {
            let mut form = url::form_urlencoded::Serializer::new(String::new());
            form.append_pair("grant_type", "refresh_token")
                .append_pair("service", service.unwrap_or(registry.host))
                .append_pair("scope", scope)
                .append_pair("client_id", CLIENT_ID)
                .append_pair("refresh_token", &refresh_token);
            let form_type = HeaderValue::from_static("application/x-www-form-urlencoded");
            registry.http.post(url).header(header::CONTENT_TYPE, form_type).body(form.finish())
        }
        other => {
            if let Some(service) = service {
                url.query_pairs_mut().append_pair("service", service);
            }
            url.query_pairs_mut().append_pair("scope", scope);
            let request = registry.http.get(url);
            match other {
                Some(DockerCredential::UsernamePassword(user, password)) => {
                    request.header(header::AUTHORIZATION, basic(registry, &user, &password)?)
                }
                _ => request,
            }
        }
    };
    let unreachable = |reason: String| RegistryError::Unreachable {
        host: registry.host.to_owned(),
        reason: format!("its token server: {reason}"),
    };
    let answer = async {
        let response = request.send().await.map_err(|error| unreachable(error_chain(&error)))?;
        let status = response.status();
        if !status.is_success() {
            return Err(match status.is_server_error() || status == http::StatusCode::TOO_MANY_REQUESTS {
                true => RegistryError::Busy {
                    host: registry.host.to_owned(),
                    reason: format!("its token server answered {status}"),
                    retry_after: super::client::retry_after(response.headers()),
                },
                false => denied(format!("its token server answered {status} for {scope}; are the credentials right?")),
            });
        }
        read_bounded(response, TOKEN_BYTES_MAX, registry.host, "the token").await
    };
    let body = tokio::time::timeout(registry.deadline, answer)
        .await
        .map_err(|_| unreachable(format!("no answer within {:?}", registry.deadline)))??;
    let answer: TokenAnswer = serde_json::from_slice(&body)
        .map_err(|error| denied(format!("its token server's answer is wrong: {error}")))?;
    let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
    let token = token.ok_or_else(|| denied("its token server's answer has no token".to_owned()))?;
    let validity = answer.expires_in.map_or(TOKEN_VALIDITY, |seconds| Duration::from_secs(seconds.min(24 * 3600)));
    Ok((token, validity))
}

fn basic(registry: &Registry<'_>, user: &str, password: &str) -> Result<HeaderValue, RegistryError> {
    let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    sensitive(registry, &format!("Basic {encoded}"))
}

fn sensitive(registry: &Registry<'_>, text: &str) -> Result<HeaderValue, RegistryError> {
    let mut value = HeaderValue::from_str(text).map_err(|_| RegistryError::Denied {
        host: registry.host.to_owned(),
        reason: "the credentials or token cannot stand in a header".to_owned(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// Docker's credentials for the registry. Helpers are programs, so this runs on a blocking thread and has a deadline.
async fn credential(registry: &Registry<'_>) -> Result<Option<DockerCredential>, RegistryError> {
    let wrong = |reason: String| RegistryError::Credentials { host: registry.host.to_owned(), reason };
    let permit = Arc::clone(&HELPERS)
        .try_acquire_owned()
        .map_err(|_| wrong("too many credential helpers hang or run already".to_owned()))?;
    // Docker's own name for its registry in configurations and helpers.
    let server = match registry.host {
        "docker.io" => "https://index.docker.io/v1/".to_owned(),
        host => host.to_owned(),
    };
    let Some(config) = docker_config(registry.docker_config) else { return Ok(None) };
    let shown = config.display().to_string();
    let looked_up = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let file = std::fs::File::open(config).map_err(|_| CredentialRetrievalError::ConfigReadError)?;
        docker_credential::get_credential_from_reader(std::io::BufReader::new(file), &server)
    });
    let result = tokio::time::timeout(HELPER_DEADLINE, looked_up)
        .await
        .map_err(|_| wrong(format!("the credential helper did not answer within {HELPER_DEADLINE:?}")))?
        .map_err(|error| wrong(error.to_string()))?;
    match result {
        Ok(credential) => Ok(Some(credential)),
        Err(CredentialRetrievalError::NoCredentialConfigured | CredentialRetrievalError::ConfigNotFound) => Ok(None),
        // A helper's way to say that it has none (docker-credential-helpers, credentials/error.go).
        Err(CredentialRetrievalError::HelperFailure { stdout, .. }) if stdout.contains("credentials not found") => {
            Ok(None)
        }
        // Output of a helper may hold secrets, so it is not repeated.
        Err(CredentialRetrievalError::HelperFailure { helper, .. }) => Err(wrong(format!("{helper} failed"))),
        Err(error) => Err(wrong(format!("{shown}: {error}"))),
    }
}

/// The configured file, which must be there, or Docker's own, which may not.
fn docker_config(configured: Option<&PathBuf>) -> Option<PathBuf> {
    configured.cloned().or_else(|| {
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker"));
        let directory = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from).or_else(home)?;
        Some(directory.join("config.json")).filter(|path| path.exists())
    })
}

/// All challenges of one header value, as far as it can be read.
fn parse_challenges(text: &str) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
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

/// An error and all its causes in one line; reqwest's own text leaves the causes out.
pub(super) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = fmt::Write::write_fmt(&mut text, format_args!(": {cause}"));
        source = cause.source();
    }
    text
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
    fn odd_challenges_are_no_challenge() {
        for odd in ["", ",,,", "=", "Bearer", "Bearer scope=\"x\"", "Digest realm=\"x\"", "\"", "Bearer =\"", " = = "] {
            assert_eq!(of(&[odd]), None, "{odd:?}");
        }
    }
}
