//! Requests to registries (OCI distribution specification): blobs by range, manifests.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use layer::Digest;
use parking_lot::Mutex;
use reqwest::{Response, Url};

use super::auth::{Authorizations, Challenge, Registry, error_chain};
use crate::config::{RegistriesConfig, RegistryConfig};
use crate::source::BlobRef;

/// The most bytes of a manifest: what the specification lets registries refuse beyond.
pub const MANIFEST_BYTES_MAX: usize = 4 << 20;
/// The most redirects that one request follows.
const REDIRECTS_MAX: usize = 5;
/// The most signed URLs that are remembered for one registry.
const LOCATIONS_MAX: usize = 4096;
/// How long a registry rests that says "too many requests" or "unavailable" without saying for how long.
const REST: Duration = Duration::from_secs(1);
/// No registry's wish for rest is followed longer than this before it is asked again.
const REST_MAX: Duration = Duration::from_secs(300);
/// The manifest types that are asked for.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// Time limits of a [`Client`].
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// For a connection with TLS.
    pub connect_timeout: Duration,
    /// For an answer's head, and then for each wait for bytes of its body.
    pub stall_timeout: Duration,
}

impl Default for Options {
    /// 5 s to connect, 10 s without a byte.
    fn default() -> Self {
        Self { connect_timeout: Duration::from_secs(5), stall_timeout: Duration::from_secs(10) }
    }
}

/// Why a registry did not give what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// No connection, or it broke.
    #[error("registry {host}: {reason}")]
    Unreachable {
        /// The registry.
        host: String,
        /// Error text of the transport.
        reason: String,
    },
    /// No byte came for too long.
    #[error("registry {host} sent nothing for {after:?}")]
    Stalled {
        /// The registry.
        host: String,
        /// The limit that expired.
        after: Duration,
    },
    /// 401 or 403, or no token was to be had.
    #[error("registry {host} refuses: {reason}")]
    Denied {
        /// The registry.
        host: String,
        /// What it answered.
        reason: String,
    },
    /// The credentials cannot be looked up.
    #[error("cannot look up the credentials for registry {host}: {reason}")]
    Credentials {
        /// The registry.
        host: String,
        /// Why not.
        reason: String,
    },
    /// 404.
    #[error("registry {host} does not have {what}")]
    NotFound {
        /// The registry.
        host: String,
        /// What was asked.
        what: String,
    },
    /// 429 or 5xx, now or a moment ago.
    #[error("registry {host} is busy: {reason}")]
    Busy {
        /// The registry.
        host: String,
        /// What it answered.
        reason: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// An answer that cannot be right, or a request that cannot be made.
    #[error("registry {host}: {reason}")]
    Protocol {
        /// The registry.
        host: String,
        /// What is wrong.
        reason: String,
    },
}

impl RegistryError {
    /// Whether the same request may succeed soon.
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Stalled { .. } | Self::Busy { .. })
    }
}

/// A client for all registries. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    config: RegistriesConfig,
    options: Options,
    hosts: Mutex<HashMap<String, Arc<Host>>>,
}

/// What is known of one registry.
struct Host {
    name: String,
    base: Url,
    config: RegistryConfig,
    http: reqwest::Client,
    authorizations: Authorizations,
    /// Where blobs were last found, by path: a registry's signed URL is used until it fails.
    locations: Mutex<HashMap<String, Url>>,
    rest_until: Mutex<Option<Instant>>,
}

/// A manifest as it came.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The bytes, which hash to `digest`.
    pub bytes: Bytes,
    /// `Content-Type`, empty where there was none.
    pub media_type: String,
    /// SHA-256 of the bytes.
    pub digest: Digest,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("registry::Client").finish_non_exhaustive()
    }
}

impl Client {
    /// A client; no network is used yet.
    pub fn new(config: RegistriesConfig, options: Options) -> Self {
        Self { shared: Arc::new(Shared { config, options, hosts: Mutex::default() }) }
    }

    /// Opens `blob` at the bytes `range`, or to its end where `range.end` is `None`. The bytes are not verified.
    pub async fn blob(&self, blob: &BlobRef, start: u64, end: Option<u64>) -> Result<BlobBody, RegistryError> {
        let host = self.host(&blob.registry)?;
        let path = path(&host, &blob.repository, &format!("blobs/{}", blob.digest))?;
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if start > 0 || end.is_some() {
            let last = end.map_or(String::new(), |end| end.saturating_sub(1).to_string());
            let range = HeaderValue::from_str(&format!("bytes={start}-{last}"));
            headers.insert(header::RANGE, range.map_err(|error| host.protocol(error.to_string()))?);
        }
        let response = self.get(&host, &blob.repository, &path, headers, &blob.to_string(), true).await?;
        BlobBody::new(host, response, start..end.unwrap_or(u64::MAX), self.shared.options.stall_timeout)
    }

    /// Fetches the manifest that `reference`, a tag or digest, names in `repository`.
    pub async fn manifest(&self, registry: &str, repository: &str, reference: &str) -> Result<Manifest, RegistryError> {
        let host = self.host(registry)?;
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-:".contains(c);
        if reference.is_empty() || reference.len() > 200 || !reference.chars().all(allowed) {
            return Err(host.protocol(format!("{reference:?} is no tag and no digest")));
        }
        let path = path(&host, repository, &format!("manifests/{reference}"))?;
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static(MANIFEST_TYPES));
        let what = format!("{registry}/{repository}:{reference}");
        let response = self.get(&host, repository, &path, headers, &what, false).await?;
        let media_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = media_type.unwrap_or_default().to_owned();
        let stall = self.shared.options.stall_timeout;
        let bytes = tokio::time::timeout(stall, read_bounded(response, MANIFEST_BYTES_MAX, &host.name, "the manifest"))
            .await
            .map_err(|_| RegistryError::Stalled { host: host.name.clone(), after: stall })??;
        let digest = Digest::of(&bytes);
        match reference.parse::<Digest>() {
            Ok(wanted) if wanted != digest => {
                Err(host.protocol(format!("the manifest {wanted} came with the digest {digest}")))
            }
            _ => Ok(Manifest { bytes, media_type, digest }),
        }
    }

    /// A GET that follows redirects, authenticates with one retry, and maps every bad status.
    async fn get(
        &self,
        host: &Arc<Host>,
        repository: &str,
        path: &Url,
        headers: HeaderMap,
        what: &str,
        remember: bool,
    ) -> Result<Response, RegistryError> {
        host.check_rest()?;
        let remembered = host.locations.lock().get(path.as_str()).cloned();
        if let Some(location) = remembered {
            match self.send(host, location, headers.clone(), None).await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if response.status() == StatusCode::TOO_MANY_REQUESTS => {
                    return Err(host.refusal(&response, what));
                }
                // Expired, moved or broken: the registry gives another.
                Ok(_) | Err(_) => host.locations.lock().remove(path.as_str()),
            };
        }
        let registry = host.registry(self.shared.options);
        let mut authorization = host.authorizations.get(&registry, repository).await?;
        let mut response = self.send(host, path.clone(), headers.clone(), authorization.as_ref()).await?;
        if response.status() == StatusCode::UNAUTHORIZED
            && let Some(challenge) = Challenge::of(response.headers())
        {
            authorization = host.authorizations.renew(&registry, repository, challenge, authorization.as_ref()).await?;
            if authorization.is_none() {
                return Err(RegistryError::Denied {
                    host: host.name.clone(),
                    reason: format!("it wants credentials for {what}, and none are configured"),
                });
            }
            response = self.send(host, path.clone(), headers.clone(), authorization.as_ref()).await?;
        }
        let mut url = path.clone();
        for _ in 0..REDIRECTS_MAX {
            if !response.status().is_redirection() {
                break;
            }
            let next = host.location(&url, &response)?;
            // Credentials stay with the registry: signed URLs carry their own right, and some stores refuse both.
            let same = next.origin() == path.origin();
            response = self.send(host, next.clone(), headers.clone(), authorization.as_ref().filter(|_| same)).await?;
            url = next;
        }
        if !response.status().is_success() {
            return Err(host.refusal(&response, what));
        }
        if remember && url.origin() != path.origin() {
            let mut locations = host.locations.lock();
            if locations.len() >= LOCATIONS_MAX {
                locations.clear();
            }
            locations.insert(path.as_str().to_owned(), url);
        }
        Ok(response)
    }

    async fn send(
        &self,
        host: &Host,
        url: Url,
        mut headers: HeaderMap,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, RegistryError> {
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, value.clone());
        }
        let after = self.shared.options.stall_timeout;
        let response = tokio::time::timeout(after, host.http.get(url).headers(headers).send())
            .await
            .map_err(|_| RegistryError::Stalled { host: host.name.clone(), after })?;
        response.map_err(|error| host.unreachable(&error))
    }

    fn host(&self, name: &str) -> Result<Arc<Host>, RegistryError> {
        if let Some(host) = self.shared.hosts.lock().get(name) {
            return Ok(Arc::clone(host));
        }
        let host = Arc::new(Host::new(name, self.shared.config.of(name), self.shared.options)?);
        let mut hosts = self.shared.hosts.lock();
        // Registries are few; a stream of made-up names must not grow without bound.
        if hosts.len() >= 256 {
            hosts.clear();
        }
        Ok(Arc::clone(hosts.entry(name.to_owned()).or_insert(host)))
    }
}

impl Host {
    fn new(name: &str, config: RegistryConfig, options: Options) -> Result<Self, RegistryError> {
        let protocol = |reason: String| RegistryError::Protocol { host: name.to_owned(), reason };
        let server = match name {
            "docker.io" | "index.docker.io" => "registry-1.docker.io",
            name => name,
        };
        let scheme = if config.plain_http { "http" } else { "https" };
        let allowed = |c: char| c.is_ascii_alphanumeric() || ".-:[]_".contains(c);
        let base = Some(server)
            .filter(|server| !server.is_empty() && server.chars().all(allowed))
            .and_then(|server| Url::parse(&format!("{scheme}://{server}/v2/")).ok())
            .ok_or_else(|| protocol("it is no host name with an optional port".to_owned()))?;
        // HTTP/1.1 only: blobs that come in parallel get a connection each, so that one lost packet does not stop all.
        let mut builder = reqwest::Client::builder()
            .http1_only()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(options.connect_timeout)
            .pool_idle_timeout(Duration::from_secs(30))
            .pool_max_idle_per_host(8)
            .tcp_nodelay(true)
            .user_agent(concat!("drover/", env!("CARGO_PKG_VERSION")));
        if let Some(path) = &config.ca {
            let unreadable =
                |reason: String| protocol(format!("cannot read its authority {}: {reason}", path.display()));
            let pem = std::fs::read(path).map_err(|error| unreadable(error.to_string()))?;
            let bundle = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| unreadable(error.to_string()))?;
            builder = builder.tls_certs_merge(bundle);
        }
        let http = builder.build().map_err(|error| protocol(error_chain(&error)))?;
        Ok(Self {
            name: name.to_owned(),
            base,
            config,
            http,
            authorizations: Authorizations::default(),
            locations: Mutex::default(),
            rest_until: Mutex::default(),
        })
    }

    fn registry(&self, options: Options) -> Registry<'_> {
        Registry {
            http: &self.http,
            host: &self.name,
            plain_http: self.config.plain_http,
            docker_config: self.config.docker_config.as_ref(),
            deadline: options.connect_timeout + options.stall_timeout,
        }
    }

    /// While the registry rests, it is not asked at all.
    fn check_rest(&self) -> Result<(), RegistryError> {
        let until = *self.rest_until.lock();
        match until.and_then(|until| until.checked_duration_since(Instant::now())) {
            Some(left) if !left.is_zero() => Err(RegistryError::Busy {
                host: self.name.clone(),
                reason: "it asked for a rest".to_owned(),
                retry_after: Some(left),
            }),
            _ => Ok(()),
        }
    }

    fn location(&self, from: &Url, response: &Response) -> Result<Url, RegistryError> {
        let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
        let next = location
            .and_then(|location| from.join(location).ok())
            .ok_or_else(|| self.protocol(format!("{} without a usable Location", response.status())))?;
        match next.scheme() {
            "https" => Ok(next),
            "http" if self.config.plain_http => Ok(next),
            scheme => Err(self.protocol(format!("it redirects to {scheme}, which is not secure"))),
        }
    }

    /// The error for a status that is neither success nor redirect.
    fn refusal(&self, response: &Response, what: &str) -> RegistryError {
        let (host, status) = (self.name.clone(), response.status());
        match status {
            StatusCode::NOT_FOUND => RegistryError::NotFound { host, what: what.to_owned() },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                RegistryError::Denied { host, reason: format!("{status} for {what}; are the credentials right?") }
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                let rest = retry_after(response.headers()).unwrap_or(REST).min(REST_MAX);
                *self.rest_until.lock() = Some(Instant::now() + rest);
                RegistryError::Busy { host, reason: status.to_string(), retry_after: Some(rest) }
            }
            _ if status.is_server_error() => {
                RegistryError::Busy { host, reason: status.to_string(), retry_after: None }
            }
            _ => RegistryError::Protocol { host, reason: format!("{status} for {what}") },
        }
    }

    fn unreachable(&self, error: &reqwest::Error) -> RegistryError {
        RegistryError::Unreachable { host: self.name.clone(), reason: error_chain(error) }
    }

    fn protocol(&self, reason: String) -> RegistryError {
        RegistryError::Protocol { host: self.name.clone(), reason }
    }
}

/// The bytes of a blob as they come.
pub struct BlobBody {
    host: Arc<Host>,
    response: Response,
    /// Bytes to drop first, where the registry ignored the range.
    skip: u64,
    /// Bytes that must still come; `None` where the registry does not say.
    left: Option<u64>,
    total: Option<u64>,
    stall_timeout: Duration,
}

impl BlobBody {
    fn new(
        host: Arc<Host>,
        response: Response,
        wanted: Range<u64>,
        stall_timeout: Duration,
    ) -> Result<Self, RegistryError> {
        let ranged = wanted != (0..u64::MAX);
        if response.status() == StatusCode::PARTIAL_CONTENT {
            let range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
            let (got, total) = range
                .and_then(parse_content_range)
                .ok_or_else(|| host.protocol("206 without a usable Content-Range".to_owned()))?;
            let end = total.map_or(wanted.end, |total| total.min(wanted.end));
            if !ranged || got.start != wanted.start || (end != u64::MAX && got.end != end) {
                return Err(host.protocol(format!("asked for the bytes {wanted:?}, it answered with {got:?}")));
            }
            return Ok(Self { host, response, skip: 0, left: Some(got.end - got.start), total, stall_timeout });
        }
        // A server may ignore a range. Its whole answer serves a download that goes on near its end, but not one that
        // wants a small part: that would cost the whole blob each time.
        if ranged && wanted.end != u64::MAX {
            return Err(host.protocol("it does not serve ranges of blobs".to_owned()));
        }
        let total = response.content_length();
        Ok(Self { host, response, skip: wanted.start, left: total, total, stall_timeout })
    }

    /// Size of the whole blob, where the registry says it.
    pub const fn total(&self) -> Option<u64> {
        self.total
    }

    /// The next bytes; `None` after the last. A body that ends early is an error.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            let next = tokio::time::timeout(self.stall_timeout, self.response.chunk())
                .await
                .map_err(|_| RegistryError::Stalled { host: self.host.name.clone(), after: self.stall_timeout })?
                .map_err(|error| self.host.unreachable(&error))?;
            let Some(mut bytes) = next else {
                return match self.left {
                    Some(left) if left > 0 => Err(RegistryError::Unreachable {
                        host: self.host.name.clone(),
                        reason: format!("the body ended {left} bytes early"),
                    }),
                    _ => Ok(None),
                };
            };
            if let Some(left) = &mut self.left {
                *left = left.checked_sub(bytes.len() as u64).ok_or_else(|| RegistryError::Protocol {
                    host: self.host.name.clone(),
                    reason: "the body is too long".to_owned(),
                })?;
            }
            let skipped = self.skip.min(bytes.len() as u64);
            self.skip -= skipped;
            let _ = bytes.split_to(skipped as usize);
            if !bytes.is_empty() {
                return Ok(Some(bytes));
            }
        }
    }
}

/// Reads a body of at most `max` bytes.
pub(super) async fn read_bounded(
    mut response: Response,
    max: usize,
    host: &str,
    what: &str,
) -> Result<Bytes, RegistryError> {
    let mut body = Vec::new();
    while let Some(bytes) = response
        .chunk()
        .await
        .map_err(|error| RegistryError::Unreachable { host: host.to_owned(), reason: error_chain(&error) })?
    {
        if body.len() + bytes.len() > max {
            return Err(RegistryError::Protocol {
                host: host.to_owned(),
                reason: format!("{what} is larger than {max} bytes"),
            });
        }
        body.extend_from_slice(&bytes);
    }
    Ok(body.into())
}

/// `Retry-After` in seconds or as a date (RFC 9110, 10.2.3).
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => {
            let at = httpdate::parse_http_date(text).ok()?;
            Some(at.duration_since(SystemTime::now()).unwrap_or_default())
        }
    }
}

/// `bytes FIRST-LAST/TOTAL` (RFC 9110, 14.4) as a half-open range.
fn parse_content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let total: Option<u64> = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    let end = last.checked_add(1)?;
    (first < end && total.is_none_or(|total| end <= total)).then_some((first..end, total))
}

/// The URL of `rest` in `repository`. The name comes from image references, so it must not lead elsewhere.
fn path(host: &Host, repository: &str, rest: &str) -> Result<Url, RegistryError> {
    let component = |component: &str| {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
        component.starts_with(|c: char| c.is_ascii_alphanumeric()) && component.chars().all(allowed)
    };
    if repository.len() > 255 || !repository.split('/').all(component) {
        return Err(host.protocol(format!("{repository:?} is no repository name")));
    }
    host.base.join(&format!("{repository}/{rest}")).map_err(|error| host.protocol(error.to_string()))
}

#[cfg(test)]
mod tests;
