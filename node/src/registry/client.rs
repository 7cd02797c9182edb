//! Requests to registries (OCI distribution specification): blobs by range, manifests. Which endpoints are asked, in which
//! order, and what is said when all of them fail.

use std::collections::HashMap;
use std::ffi::OsString;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use layer::Digest;
use parking_lot::Mutex;
use reqwest::{Response, Url};
use tokio::sync::Semaphore;

use super::answer;
use super::blob::{BlobBody, Patience, Stream};
use super::credentials::{Credential, Credentials};
use super::download::{AHEAD_MAX, Download};
use super::endpoint::{Endpoint, authority};
use super::error::{Failures, Fault, RegistryError, what};
use super::hosts::{self, EndpointConfig, Watched};
use super::proxy::Proxies;
use crate::config::RegistriesConfig;
use crate::source::BlobRef;

/// The most bytes of a manifest: what the specification lets registries refuse beyond.
pub const MANIFEST_BYTES_MAX: usize = 4 << 20;
/// The most registries that are remembered: a stream of made-up names must not grow without bound.
const REGISTRIES_MAX: usize = 256;
/// How often files of the configuration are looked at.
const RECHECK: Duration = Duration::from_secs(1);
/// The most `urls` of a foreign layer that are tried.
const URLS_MAX: usize = 8;
/// The most hosts of a registry whose credentials are told.
pub const CREDENTIALS_MAX: usize = 8;
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

/// What a [`Client`] takes from the process around it.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// Proxies on the way.
    pub proxies: Proxies,
    /// `PATH` that credential helpers are looked for in; the process's own where it is `None`.
    pub path: Option<OsString>,
    /// How long a credential helper may take; 10 s where it is `None`.
    pub helper_deadline: Option<Duration>,
}

/// A client for all registries. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    config: RegistriesConfig,
    options: Options,
    proxies: Proxies,
    credentials: Arc<Credentials>,
    /// It acts for somebody else.
    is_acting: bool,
    registries: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Registry>>>>,
    /// Permits for ranges that are fetched ahead of where a download stands.
    ahead: Arc<Semaphore>,
}

/// The endpoints of a registry.
#[derive(Default)]
struct Registry {
    endpoints: Vec<Arc<Endpoint>>,
    watched: Watched,
    checked: Option<Instant>,
}

/// Endpoints, and the files that say how they are reached.
type Loaded = (Vec<Arc<Endpoint>>, Watched);

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
    /// A client with the proxies of this process's environment; no network is used yet.
    pub fn new(config: RegistriesConfig, options: Options) -> Self {
        let environment = Environment { proxies: Proxies::of_process(), ..Environment::default() };
        Self::with_environment(config, options, environment)
    }

    /// The same in another environment.
    pub fn with_environment(config: RegistriesConfig, options: Options, environment: Environment) -> Self {
        let Environment { proxies, path, helper_deadline } = environment;
        Self {
            shared: Arc::new(Shared {
                config,
                options,
                proxies,
                credentials: Arc::new(Credentials::new(path, helper_deadline)),
                is_acting: false,
                registries: Mutex::default(),
                ahead: Arc::new(Semaphore::new(AHEAD_MAX)),
            }),
        }
    }

    /// A client that reaches the same registries and mirrors with nothing but `given`, by host, to prove who asks: neither this
    /// machine's credentials and certificates nor the headers of its configuration.
    pub fn acting_for(&self, given: HashMap<String, Credential>) -> Self {
        let shared = &self.shared;
        Self {
            shared: Arc::new(Shared {
                config: shared.config.clone(),
                options: shared.options,
                proxies: shared.proxies.clone(),
                credentials: Arc::new(Credentials::given(given)),
                is_acting: true,
                registries: Mutex::default(),
                ahead: Arc::clone(&shared.ahead),
            }),
        }
    }

    /// What this machine has for the hosts that blobs of `registry` come from, at most [`CREDENTIALS_MAX`].
    pub async fn credentials(&self, registry: &str) -> Result<Vec<(String, Credential)>, Fault> {
        let mut found = Vec::new();
        for endpoint in self.endpoints(registry).await?.iter().filter(|endpoint| endpoint.config().pulls) {
            found.extend(endpoint.credential().await?);
        }
        found.truncate(CREDENTIALS_MAX);
        Ok(found)
    }

    /// Opens `blob` at the bytes `range`, or to its end where `range.end` is `None`. The bytes are not verified. A
    /// connection that breaks is made again where it broke, a few times; everything else is the caller's to try again.
    pub async fn blob(&self, blob: &BlobRef, start: u64, end: Option<u64>) -> Result<BlobBody, RegistryError> {
        let stream = self.open(blob, start, end).await?;
        Ok(BlobBody::new(self.clone(), blob.clone(), start..end.unwrap_or(u64::MAX), Some(stream), Patience::Read))
    }

    /// The bytes of `blob` from `start` to its end, however often connections break or registries want a rest. They come in
    /// order; where one connection is slow, several bring them. The bytes are not verified.
    pub fn download(&self, blob: &BlobRef, start: u64) -> Download {
        Download::new(self.clone(), blob.clone(), start, Arc::clone(&self.shared.ahead))
    }

    /// Fetches the manifest that `reference`, a tag or digest, names in `repository`.
    pub async fn manifest(&self, registry: &str, repository: &str, reference: &str) -> Result<Manifest, RegistryError> {
        let wanted: Option<Digest> = reference.parse().ok();
        let separator = if wanted.is_some() { '@' } else { ':' };
        let what = || format!("manifest {registry}/{repository}{separator}{reference}");
        let mut failures = Failures::default();
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-:".contains(c);
        if reference.is_empty() || reference.len() > 200 || !reference.chars().all(allowed) {
            failures.add(
                0,
                format!("registry {registry}"),
                Fault::protocol(format!("{reference:?} is no tag and no digest")),
            );
            return Err(failures.into_error("a manifest".to_owned(), registry));
        }
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static(MANIFEST_TYPES));
        // What a tag stands for is not proven by anything, so only who is trusted with it is asked.
        let may = |config: &EndpointConfig| if wanted.is_some() { config.pulls } else { config.resolves };
        for (rank, endpoint) in self.candidates(registry, may, &mut failures).await {
            let path = format!("manifests/{reference}");
            let got = async {
                let response = endpoint.get(registry, repository, &path, &headers, false).await?;
                self.read_manifest(&endpoint, response, wanted).await
            };
            match got.await {
                Ok(manifest) => {
                    endpoint.succeeded();
                    return Ok(manifest);
                }
                Err(fault) => {
                    endpoint.failed(&fault);
                    failures.add(rank, endpoint.place(), fault);
                }
            }
        }
        Err(failures.into_error(what(), registry))
    }

    async fn read_manifest(
        &self,
        endpoint: &Endpoint,
        mut response: Response,
        wanted: Option<Digest>,
    ) -> Result<Manifest, Fault> {
        let media_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = media_type.unwrap_or_default().to_owned();
        let (after, url) = (self.shared.options.stall_timeout, response.url().clone());
        let mut bytes = Vec::new();
        let read = async {
            while let Some(piece) = response.chunk().await.map_err(|error| endpoint.transport(&error, &url))? {
                if bytes.len() + piece.len() > MANIFEST_BYTES_MAX {
                    return Err(Fault::protocol(format!(
                        "it is larger than {MANIFEST_BYTES_MAX} bytes, the most that a manifest may have"
                    )));
                }
                bytes.extend_from_slice(&piece);
            }
            Ok(())
        };
        tokio::time::timeout(after, read).await.map_err(|_| Fault::Stalled { after })??;
        let digest = Digest::of(&bytes);
        match wanted {
            Some(wanted) if wanted != digest => Err(Fault::protocol(format!(
                "what came has the digest {digest}, not the one that was asked for; it, or a proxy on the way, is broken"
            ))),
            _ => Ok(Manifest { bytes: bytes.into(), media_type, digest }),
        }
    }

    /// One answer with the bytes of `blob` from `start` on, from the first place that gives them.
    pub(super) async fn open(&self, blob: &BlobRef, start: u64, end: Option<u64>) -> Result<Stream, RegistryError> {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let last = end.map_or(String::new(), |end| end.saturating_sub(1).to_string());
        if start > 0 || end.is_some() {
            let range = HeaderValue::try_from(format!("bytes={start}-{last}"));
            headers.insert(header::RANGE, range.unwrap_or_else(|_| HeaderValue::from_static("bytes=0-")));
        }
        let wanted = start..end.unwrap_or(u64::MAX);
        let mut failures = Failures::default();
        for url in blob.urls.iter().take(URLS_MAX) {
            let got = async {
                let (endpoint, url) = self.foreign(url).await?;
                let response = endpoint.get_foreign(&url, &headers).await?;
                Stream::new(endpoint, response, wanted.clone(), self.shared.options.stall_timeout)
            };
            match got.await {
                Ok(stream) => return Ok(stream),
                Err(fault) => {
                    failures.add(0, super::error::printable(url.split('?').next().unwrap_or(url), 200), fault)
                }
            }
        }
        let path = format!("blobs/{}", blob.digest);
        let may = |config: &EndpointConfig| config.pulls;
        for (rank, endpoint) in self.candidates(&blob.registry, may, &mut failures).await {
            let got = endpoint.get(&blob.registry, &blob.repository, &path, &headers, true).await;
            let stall = self.shared.options.stall_timeout;
            match got.and_then(|response| Stream::new(Arc::clone(&endpoint), response, wanted.clone(), stall)) {
                Ok(stream) => {
                    endpoint.succeeded();
                    return Ok(stream);
                }
                Err(fault) => {
                    endpoint.failed(&fault);
                    failures.add(rank, endpoint.place(), fault);
                }
            }
        }
        Err(failures.into_error(what(blob), &blob.registry))
    }

    /// The endpoints of `registry` that `may` serve, with their rank in the configuration: those that failed a moment ago come
    /// last, and those that asked for a rest not at all.
    async fn candidates(
        &self,
        registry: &str,
        may: impl Fn(&EndpointConfig) -> bool,
        failures: &mut Failures,
    ) -> Vec<(usize, Arc<Endpoint>)> {
        let endpoints = match self.endpoints(registry).await {
            Ok(endpoints) => endpoints,
            Err(fault) => {
                failures.add(usize::MAX, format!("registry {registry}"), fault);
                return Vec::new();
            }
        };
        let mut fit = Vec::new();
        for (rank, endpoint) in (1..).zip(endpoints).filter(|(_, endpoint)| may(endpoint.config())) {
            match endpoint.asked_rest() {
                Some(left) => {
                    let fault = Fault::Busy { reason: "it asked for a rest".to_owned(), retry_after: Some(left) };
                    failures.add(rank, endpoint.place(), fault);
                }
                None => fit.push((rank, endpoint)),
            }
        }
        fit.sort_by_key(|(_, endpoint)| endpoint.is_tired());
        fit
    }

    /// The endpoints of `registry` as the files of the configuration are today.
    async fn endpoints(&self, registry: &str) -> Result<Vec<Arc<Endpoint>>, Fault> {
        let slot = self.slot(registry);
        let mut slot = slot.lock().await;
        if slot.checked.is_some_and(|at| at.elapsed() < RECHECK) {
            return Ok(slot.endpoints.clone());
        }
        let (shared, name, known, watched) =
            (Arc::clone(&self.shared), registry.to_owned(), slot.endpoints.clone(), slot.watched.clone());
        let is_first = slot.checked.is_none();
        let read = move || -> Result<Option<Loaded>, Fault> {
            if !is_first && watched.is_current() {
                return Ok(None);
            }
            let mut loaded = hosts::load(&shared.config, &name)?;
            if shared.is_acting {
                loaded.endpoints.iter_mut().for_each(EndpointConfig::make_anonymous);
            }
            let endpoint = |config: EndpointConfig| match known.iter().find(|endpoint| endpoint.is_still(&config)) {
                Some(known) => Ok(Arc::clone(known)),
                None => shared.endpoint(&name, config),
            };
            let endpoints = loaded.endpoints.into_iter().map(endpoint).collect::<Result<_, _>>()?;
            Ok(Some((endpoints, loaded.watched)))
        };
        let read = tokio::task::spawn_blocking(read).await.map_err(|error| Fault::protocol(error.to_string()))?;
        match read {
            Ok(changed) => {
                if let Some((endpoints, watched)) = changed {
                    (slot.endpoints, slot.watched) = (endpoints, watched);
                }
                slot.checked = Some(Instant::now());
                Ok(slot.endpoints.clone())
            }
            Err(fault) => {
                // Read anew the next time, however the files look then.
                slot.checked = None;
                Err(fault)
            }
        }
    }

    /// The host of a foreign layer's URL. It is named by the image, so it gets no credentials and must be secure.
    async fn foreign(&self, text: &str) -> Result<(Arc<Endpoint>, Url), Fault> {
        let wrong = || Fault::protocol("this URL of the layer cannot be used: want https://HOST/PATH");
        let url = Url::parse(text).map_err(|_| wrong())?;
        let host = authority(&url);
        let own = self.shared.config.hosts.get(&host).cloned().unwrap_or_default();
        if !(url.scheme() == "https" || (url.scheme() == "http" && own.plain_http))
            || host.is_empty()
            || text.len() > 4096
        {
            return Err(wrong());
        }
        let slot = self.slot(&format!("{}://{host}", url.scheme()));
        let mut slot = slot.lock().await;
        if let Some(endpoint) = slot.endpoints.first().filter(|endpoint| endpoint.is_still(endpoint.config())) {
            return Ok((Arc::clone(endpoint), url));
        }
        let mut config = EndpointConfig::at(url.join("/").map_err(|_| wrong())?);
        config.ca.extend(own.ca);
        let shared = Arc::clone(&self.shared);
        let made = tokio::task::spawn_blocking(move || shared.endpoint(&host, config)).await;
        let endpoint = made.map_err(|error| Fault::protocol(error.to_string()))??;
        slot.endpoints = vec![Arc::clone(&endpoint)];
        Ok((endpoint, url))
    }

    fn slot(&self, name: &str) -> Arc<tokio::sync::Mutex<Registry>> {
        let mut registries = self.shared.registries.lock();
        if registries.len() >= REGISTRIES_MAX && !registries.contains_key(name) {
            registries.clear();
        }
        Arc::clone(registries.entry(name.to_owned()).or_default())
    }
}

impl Shared {
    fn endpoint(&self, registry: &str, config: EndpointConfig) -> Result<Arc<Endpoint>, Fault> {
        Endpoint::new(registry, config, self.options, &self.proxies, Arc::clone(&self.credentials)).map(Arc::new)
    }
}

/// What an answer's head says of the bytes behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes to drop first, where the range was ignored.
    pub skip: u64,
    /// Bytes that come, as far as it is said.
    pub len: Option<u64>,
    /// Size of the whole, as far as it is said.
    pub total: Option<u64>,
}

/// Reads an answer's head. `wanted` is what was asked for (`0..u64::MAX`: all, without a range); the error says what does not fit.
pub fn read_head(
    status: StatusCode,
    headers: &HeaderMap,
    content_length: Option<u64>,
    wanted: &Range<u64>,
) -> Result<Head, String> {
    let is_ranged = *wanted != (0..u64::MAX);
    let range = headers.get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    match status {
        StatusCode::PARTIAL_CONTENT => {
            let (got, total) = range
                .and_then(answer::content_range)
                .ok_or("it answered 206 without a usable Content-Range; it is broken")?;
            let end = total.map_or(wanted.end, |total| total.min(wanted.end));
            if !is_ranged || got.start != wanted.start || (end != u64::MAX && got.end != end) {
                let (asked, came) = (shown(wanted), shown(&got));
                return Err(format!(
                    "it was asked for the bytes {asked} and answered with {came}; it, or a proxy on the way, is broken"
                ));
            }
            let len = got.end - got.start;
            if content_length.is_some_and(|length| length != len) {
                return Err(
                    "its Content-Length and Content-Range disagree; it, or a proxy on the way, is broken".to_owned()
                );
            }
            Ok(Head { skip: 0, len: Some(len), total })
        }
        StatusCode::RANGE_NOT_SATISFIABLE => match range.and_then(answer::unsatisfied_total) {
            // A download that was interrupted after its last byte.
            Some(total) if total == wanted.start && wanted.end == u64::MAX => {
                Ok(Head { skip: 0, len: Some(0), total: Some(total) })
            }
            total => Err(format!(
                "it has only {} bytes where {} were asked for; the blob there is damaged or another",
                total.map_or_else(|| "fewer".to_owned(), |total| total.to_string()),
                shown(wanted)
            )),
        },
        // A server may ignore a range. Its whole answer serves a download that goes on near its end, but not one that
        // wants a small part: that would cost the whole blob each time.
        _ if is_ranged && wanted.end != u64::MAX => Err(format!(
            "it answered {status} to a request for a part of the blob; it, or a proxy on the way, does not serve ranges, which \
             lazy reading needs"
        )),
        _ if content_length.is_some_and(|length| length < wanted.start) => {
            Err("the blob there is shorter than what was read of it before; it is damaged or another".to_owned())
        }
        _ => Ok(Head { skip: wanted.start, len: content_length, total: content_length }),
    }
}

fn shown(range: &Range<u64>) -> String {
    match range.end {
        u64::MAX => format!("from {} on", range.start),
        end => format!("{} to {}", range.start, end.saturating_sub(1)),
    }
}

#[cfg(test)]
mod tests;
