//! One place that serves a registry's content, a mirror or the registry itself: its connections, tokens, redirects and
//! rests.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, HeaderValue, StatusCode, header};
use parking_lot::Mutex;
use reqwest::{Response, Url};

use super::answer;
use super::auth::{Asker, Authorizations, Challenge};
use super::client::Options;
use super::credentials::{Credential, Credentials};
use super::error::{Fault, chain, is_no_tls};
use super::hosts::{EndpointConfig, Watched};
use super::proxy::{self, Proxies};

/// The most redirects that one request follows.
const REDIRECTS_MAX: usize = 5;
/// The most signed URLs that are remembered.
const LOCATIONS_MAX: usize = 4096;
/// The first rest of an endpoint that fails, or is busy without saying for how long; it doubles.
const REST: Duration = Duration::from_secs(1);
/// The longest rest that we give it by ourselves.
const REST_OWN_MAX: Duration = Duration::from_secs(30);
/// No wish for rest is followed longer than this before it is asked again.
const REST_MAX: Duration = Duration::from_secs(300);
/// How long the body of an error may take.
const EXCERPT_DEADLINE: Duration = Duration::from_secs(2);

/// An endpoint and what is known of it.
pub(super) struct Endpoint {
    config: EndpointConfig,
    /// For errors: `registry docker.io`, `mirror m.local of docker.io`.
    place: String,
    /// Host with port, for credentials.
    host: String,
    /// The files that `http` was made with.
    files: Watched,
    http: reqwest::Client,
    proxies: Proxies,
    options: Options,
    credentials: Arc<Credentials>,
    authorizations: Authorizations,
    /// Where blobs were last found, by URL: a signed URL is used until it fails.
    locations: Mutex<HashMap<String, Url>>,
    rest: Mutex<Rest>,
    /// It answered plain HTTP where TLS was tried.
    is_plain: AtomicBool,
}

#[derive(Default)]
struct Rest {
    until: Option<Instant>,
    /// The endpoint itself asked for it.
    is_asked: bool,
    failures: u32,
}

impl Endpoint {
    /// An endpoint of `registry`. Reads files, so not for a thread that must not block.
    pub(super) fn new(
        registry: &str,
        config: EndpointConfig,
        options: Options,
        proxies: &Proxies,
        credentials: Arc<Credentials>,
    ) -> Result<Self, Fault> {
        let host = authority(&config.base);
        let place = match config.is_mirror {
            true => format!("mirror {host} of {registry}"),
            false => format!("registry {registry}"),
        };
        let mut files = Watched::default();
        // HTTP/1.1 only: blobs that come in parallel get a connection each, so that one lost packet does not stop all.
        let mut builder = reqwest::Client::builder()
            .http1_only()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(config.connect_timeout.unwrap_or(options.connect_timeout))
            .pool_idle_timeout(Duration::from_secs(30))
            .pool_max_idle_per_host(8)
            .tcp_nodelay(true)
            .no_proxy()
            .tls_danger_accept_invalid_certs(config.skip_verify)
            .user_agent(concat!("drover/", env!("CARGO_PKG_VERSION")));
        let proxies = match &config.proxy {
            Some(proxy) => {
                let wrong = |reason| Fault::Configuration { file: "`proxy` in hosts.toml".to_owned(), reason };
                Proxies::new(proxy.as_str(), proxy.as_str(), "").map_err(wrong)?
            }
            None => proxies.clone(),
        };
        let routes = proxies.clone();
        builder = builder.proxy(reqwest::Proxy::custom(move |url| routes.of(url).cloned()));
        for path in &config.ca {
            files.add(path);
            let pem = read_file(path)?;
            let wrong = |reason: String| Fault::Configuration { file: path.display().to_string(), reason };
            let bundle = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| wrong(chain(&error)))?;
            if bundle.is_empty() {
                return Err(wrong("it has no certificate in PEM".to_owned()));
            }
            builder = builder.tls_certs_merge(bundle);
        }
        if let Some(client) = &config.client {
            files.add(&client.certificate);
            let mut pem = read_file(&client.certificate)?;
            if let Some(key) = &client.key {
                files.add(key);
                pem.push(b'\n');
                pem.extend(read_file(key)?);
            }
            let identity = reqwest::Identity::from_pem(&pem).map_err(|error| Fault::Configuration {
                file: client.certificate.display().to_string(),
                reason: format!("no certificate with its key in PEM: {}", chain(&error)),
            })?;
            builder = builder.identity(identity);
        }
        let http = builder.build().map_err(|error| Fault::Configuration {
            file: format!("the TLS configuration of {place}"),
            reason: chain(&error),
        })?;
        Ok(Self {
            config,
            place,
            host,
            files,
            http,
            proxies,
            options,
            credentials,
            authorizations: Authorizations::default(),
            locations: Mutex::default(),
            rest: Mutex::default(),
            is_plain: AtomicBool::new(false),
        })
    }

    /// What it is called in errors.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// How it is reached.
    pub(super) const fn config(&self) -> &EndpointConfig {
        &self.config
    }

    /// Whether it is what `config` asks for, with the files as they are today.
    pub(super) fn is_still(&self, config: &EndpointConfig) -> bool {
        self.config == *config && self.files.is_current()
    }

    /// The credentials that are configured for it, with its host.
    pub(super) async fn credential(&self) -> Result<Option<(String, Credential)>, Fault> {
        let found = self.credentials.of(&self.host, self.config.docker_config.as_ref()).await?;
        Ok(found.map(|credential| (self.host.clone(), credential)))
    }

    /// GET of `rest` in `repository`. `registry` is whose content it is. Follows redirects and authenticates with one retry.
    /// Where the place that it leads to may be used again, it is remembered. Gives answers with a success status, and 416.
    pub(super) async fn get(
        &self,
        registry: &str,
        repository: &str,
        rest: &str,
        headers: &HeaderMap,
        remember: bool,
    ) -> Result<Response, Fault> {
        let url = self.url(registry, repository, rest)?;
        let remembered = self.locations.lock().get(url.as_str()).cloned();
        if let Some(location) = remembered {
            match self.send(&location, headers.clone()).await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if response.status() == StatusCode::TOO_MANY_REQUESTS => {
                    return Err(self.refusal(response, repository, false).await);
                }
                // Expired, moved or broken: the registry gives another.
                Ok(_) | Err(_) => self.locations.lock().remove(url.as_str()),
            };
        }
        let (mut response, url) = self.authorized(registry, repository, rest, headers).await?;
        let (mut at, mut seen) = (url.clone(), vec![url.clone()]);
        while response.status().is_redirection() {
            let next =
                answer::location(&at, response.headers(), at.scheme() == "http" || self.config.base.scheme() == "http");
            let next = next.map_err(Fault::protocol)?;
            if seen.contains(&next) || seen.len() > REDIRECTS_MAX {
                let hosts: Vec<_> = seen.iter().filter_map(|url| url.host_str()).collect();
                return Err(Fault::protocol(format!(
                    "it redirects in a circle or more than {REDIRECTS_MAX} times ({}); its configuration must be mended",
                    hosts.join(" → ")
                )));
            }
            // Credentials stay with the endpoint: signed URLs carry their own right, and some stores refuse both.
            response = match next.origin() == url.origin() {
                true => {
                    let mut headers = self.own_headers(headers);
                    if let Some(value) = self.authorizations.get(&self.asker(&url), repository).await? {
                        headers.insert(header::AUTHORIZATION, value);
                    }
                    self.send(&next, headers).await?
                }
                false => self.send(&next, headers.clone()).await?,
            };
            seen.push(next.clone());
            at = next;
        }
        let is_here = at.origin() == url.origin();
        let response = self.accept(response, repository, is_here).await?;
        if remember && !is_here {
            let mut locations = self.locations.lock();
            if locations.len() >= LOCATIONS_MAX {
                locations.clear();
            }
            locations.insert(self.url(registry, repository, rest)?.as_str().to_owned(), at);
        }
        Ok(response)
    }

    /// GET of `url`, which is not the registry's: without credentials, but with redirects.
    pub(super) async fn get_foreign(&self, url: &Url, headers: &HeaderMap) -> Result<Response, Fault> {
        let mut at = url.clone();
        let mut response = self.send(&at, headers.clone()).await?;
        for _ in 0..REDIRECTS_MAX {
            if !response.status().is_redirection() {
                break;
            }
            at = answer::location(&at, response.headers(), at.scheme() == "http").map_err(Fault::protocol)?;
            response = self.send(&at, headers.clone()).await?;
        }
        self.accept(response, "", false).await
    }

    /// How long it is not to be asked at all, because it said so.
    pub(super) fn asked_rest(&self) -> Option<Duration> {
        let rest = self.rest.lock();
        rest.left().filter(|_| rest.is_asked)
    }

    /// Whether it failed a moment ago, so that others are asked first.
    pub(super) fn is_tired(&self) -> bool {
        self.rest.lock().left().is_some()
    }

    /// It served.
    pub(super) fn succeeded(&self) {
        *self.rest.lock() = Rest::default();
    }

    /// It failed with `fault`.
    pub(super) fn failed(&self, fault: &Fault) {
        if !fault.is_of_place() {
            return;
        }
        let mut rest = self.rest.lock();
        rest.failures = rest.failures.saturating_add(1);
        let (length, is_asked) = match fault {
            Fault::Busy { retry_after: Some(after), .. } => ((*after).min(REST_MAX), true),
            _ => (back_off(REST, rest.failures, REST_OWN_MAX), false),
        };
        rest.until = Some(Instant::now() + length);
        rest.is_asked = is_asked;
    }

    /// Asks the endpoint itself: with its headers and credentials, and once more with new ones if they are refused.
    async fn authorized(
        &self,
        registry: &str,
        repository: &str,
        rest: &str,
        headers: &HeaderMap,
    ) -> Result<(Response, Url), Fault> {
        let headers = self.own_headers(headers);
        let with = |authorization: Option<&HeaderValue>| {
            let mut headers = headers.clone();
            if let Some(value) = authorization {
                headers.insert(header::AUTHORIZATION, value.clone());
            }
            headers
        };
        let mut url = self.url(registry, repository, rest)?;
        let authorization = self.authorizations.get(&self.asker(&url), repository).await?;
        let mut response = match self.try_send(&url, with(authorization.as_ref())).await? {
            Ok(response) => response,
            Err(error) if self.config.may_be_plain && is_no_tls(&error) => {
                self.is_plain.store(true, Ordering::Relaxed);
                url = self.url(registry, repository, rest)?;
                self.send(&url, with(authorization.as_ref())).await?
            }
            Err(error) => return Err(self.transport(&error, &url)),
        };
        if response.status() == StatusCode::UNAUTHORIZED
            && let Some(challenge) = Challenge::of(response.headers())
        {
            let asker = self.asker(&url);
            let fresh = self.authorizations.renew(&asker, repository, challenge, authorization.as_ref()).await?;
            let Some(fresh) = fresh else {
                return Err(Fault::Denied {
                    reason: "401 Unauthorized: it wants credentials, and none are configured".to_owned(),
                    advice: format!(
                        "`docker login {}`, or name a file in `docker_config` of its registry table",
                        self.host
                    ),
                });
            };
            response = self.send(&url, with(Some(&fresh))).await?;
        }
        Ok((response, url))
    }

    fn asker(&self, url: &Url) -> Asker<'_> {
        Asker {
            http: &self.http,
            host: &self.host,
            may_be_plain: url.scheme() == "http",
            credentials: &self.credentials,
            docker_config: self.config.docker_config.as_ref(),
            proxies: &self.proxies,
            deadline: self.options.connect_timeout + self.options.stall_timeout,
        }
    }

    fn own_headers(&self, headers: &HeaderMap) -> HeaderMap {
        let mut all = headers.clone();
        for (name, value) in &self.config.headers {
            all.append(name, value.clone());
        }
        all
    }

    async fn send(&self, url: &Url, headers: HeaderMap) -> Result<Response, Fault> {
        self.try_send(url, headers).await?.map_err(|error| self.transport(&error, url))
    }

    async fn try_send(&self, url: &Url, headers: HeaderMap) -> Result<Result<Response, reqwest::Error>, Fault> {
        let after = self.options.stall_timeout;
        let sent = tokio::time::timeout(after, self.http.get(url.clone()).headers(headers).send()).await;
        sent.map_err(|_| Fault::Stalled { after })
    }

    /// The fault behind an error on the way to `url`.
    pub(super) fn transport(&self, error: &reqwest::Error, url: &Url) -> Fault {
        let fault = Fault::of_transport(error, self.proxies.of(url).map(proxy::shown).as_deref());
        // Another host than the endpoint's own must be named, or the reader looks in the wrong place.
        let at = authority(url);
        if at == self.host {
            return fault;
        }
        let named = |reason: String| format!("{at}, where it redirects: {reason}");
        match fault {
            Fault::Unreachable { reason } => Fault::Unreachable { reason: named(reason) },
            Fault::Name { reason } => Fault::Name { reason: named(reason) },
            Fault::Tls { reason, advice } => Fault::Tls { reason: named(reason), advice },
            other => other,
        }
    }

    async fn accept(&self, response: Response, repository: &str, is_here: bool) -> Result<Response, Fault> {
        let status = response.status();
        if !status.is_success() && status != StatusCode::RANGE_NOT_SATISFIABLE {
            return Err(self.refusal(response, repository, is_here).await);
        }
        if status.is_success() && answer::is_html(response.headers()) {
            let reason =
                "a page of HTML came in place of it; a log-in page or a proxy stands in between, or the URL is wrong";
            return Err(Fault::protocol(reason));
        }
        Ok(response)
    }

    /// The fault of an answer that is neither success nor redirect.
    async fn refusal(&self, mut response: Response, repository: &str, is_here: bool) -> Fault {
        let status = response.status();
        let mut body = Vec::new();
        let read = async {
            while let Ok(Some(bytes)) = response.chunk().await {
                body.extend_from_slice(&bytes);
                if body.len() >= answer::BODY_BYTES_MAX {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(EXCERPT_DEADLINE.min(self.options.stall_timeout), read).await;
        let said = answer::excerpt(response.headers(), &body, is_here);
        let elsewhere = if is_here { String::new() } else { format!(" from {}", authority(response.url())) };
        let proxy = self.proxies.of(response.url()).filter(|_| response.url().scheme() == "http").map(proxy::shown);
        let on_the_way = proxy.as_ref().map(|proxy| format!(" through the proxy {proxy}")).unwrap_or_default();
        let reason = match said.is_empty() {
            true => format!("{status}{elsewhere}{on_the_way}"),
            false => format!("{status}{elsewhere}{on_the_way}: {said}"),
        };
        match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => Fault::NotFound { reason },
            StatusCode::UNAUTHORIZED => {
                self.credentials.forget(&self.host, self.config.docker_config.as_ref());
                let advice =
                    format!("check the credentials for {}, and that they may pull from {repository}", self.host);
                Fault::Denied { reason, advice }
            }
            StatusCode::FORBIDDEN => {
                let advice = format!("whoever these credentials belong to needs the right to pull from {repository}");
                Fault::Denied { reason, advice }
            }
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
                Fault::Proxy { proxy: proxy.unwrap_or_else(|| "on the way".to_owned()), reason }
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                let failures = self.rest.lock().failures.saturating_add(1);
                let rest = answer::retry_after(response.headers(), SystemTime::now());
                let rest = rest.map_or_else(|| back_off(REST, failures, REST_OWN_MAX), |rest| rest.min(REST_MAX));
                Fault::Busy { reason, retry_after: Some(rest) }
            }
            _ if status.is_server_error() => Fault::Busy { reason, retry_after: None },
            _ => Fault::protocol(format!("it answered {reason}, which no registry answers here; check its URL")),
        }
    }

    /// The URL of `rest` in `repository`. The name comes from image references, so it must not lead elsewhere.
    fn url(&self, registry: &str, repository: &str, rest: &str) -> Result<Url, Fault> {
        let component = |component: &str| {
            let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
            component.starts_with(|c: char| c.is_ascii_alphanumeric()) && component.chars().all(allowed)
        };
        if repository.len() > 255 || !repository.split('/').all(component) {
            return Err(Fault::protocol(format!("{repository:?} is no repository name")));
        }
        let joined = self.config.base.join(&format!("{repository}/{rest}"));
        let mut url = joined.map_err(|error| Fault::protocol(error.to_string()))?;
        if self.config.is_mirror {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        if self.is_plain.load(Ordering::Relaxed) {
            let _ = url.set_scheme("http");
        }
        Ok(url)
    }
}

impl Rest {
    fn left(&self) -> Option<Duration> {
        self.until?.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }
}

/// The pause after the `failures`-th failure in a row: doubling from `first` up to `max`, of which a random half is left out,
/// so that many who failed together do not come back together.
pub(super) fn back_off(first: Duration, failures: u32, max: Duration) -> Duration {
    let whole = first.saturating_mul(1u32.checked_shl(failures.saturating_sub(1).min(16)).unwrap_or(u32::MAX)).min(max);
    let random = std::hash::RandomState::new().build_hasher().finish();
    whole.mul_f64(0.5 + (random >> 11) as f64 / (1u64 << 54) as f64)
}

/// Host and, where it is not the scheme's own, port.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn read_file(path: &Path) -> Result<Vec<u8>, Fault> {
    let wrong = |reason: String| Fault::Configuration { file: path.display().to_string(), reason };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| wrong(error.to_string()))?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, 1 << 20), &mut bytes)
        .map_err(|error| wrong(error.to_string()))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound_and_vary() {
        for (failures, low, high) in
            [(1, 500, 1000), (2, 1000, 2000), (4, 4000, 8000), (10, 15_000, 30_000), (u32::MAX, 15_000, 30_000)]
        {
            let pauses: Vec<_> = (0..20).map(|_| back_off(REST, failures, REST_OWN_MAX)).collect();
            let bounds = Duration::from_millis(low)..=Duration::from_millis(high);
            assert!(pauses.iter().all(|pause| bounds.contains(pause)), "{failures}: {pauses:?}");
            assert!(pauses.iter().any(|pause| *pause != pauses[0]), "{failures}");
        }
    }
}
