//! Which endpoints serve a registry's content, and how each is reached: `hosts.toml` of containerd's `certs.d`
//! (containerd, docs/hosts.md and core/remotes/docker/config/hosts.go) and the daemon's own `registry` tables.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use url::Url;

use super::error::Fault;
use super::proxy::proxy_url;
use crate::config::{RegistriesConfig, RegistryConfig};

/// The largest hosts.toml that is read.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// The most hosts of a file, and the most headers of a host.
const ENTRIES_MAX: usize = 64;

/// How one endpoint is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointConfig {
    /// Its URL up to the repositories, ending with a slash: `https://registry-1.docker.io/v2/`.
    pub base: Url,
    /// Whether blobs and manifests may come from it.
    pub pulls: bool,
    /// Whether it is trusted to say which digest a tag stands for.
    pub resolves: bool,
    /// It stands in for the registry: it is told which (`ns=`), and asked before it.
    pub is_mirror: bool,
    /// PEM files with authorities that are trusted besides the system's.
    pub ca: Vec<PathBuf>,
    /// PEM files with the client's certificate and key.
    pub client: Option<ClientFiles>,
    /// Take any certificate.
    pub skip_verify: bool,
    /// Where it does not speak TLS, plain HTTP is meant.
    pub may_be_plain: bool,
    /// Sent with each request.
    pub headers: HeaderMap,
    /// Limit for a connection, in place of the client's.
    pub connect_timeout: Option<Duration>,
    /// Proxy in place of the environment's.
    pub proxy: Option<Url>,
    /// Docker configuration with its credentials, in place of Docker's own.
    pub docker_config: Option<PathBuf>,
}

/// A client certificate's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFiles {
    /// The certificate chain.
    pub certificate: PathBuf,
    /// The key; `None` where it stands in the same file.
    pub key: Option<PathBuf>,
}

/// The endpoints of a registry, in the order in which they are asked, and the files that say so.
#[derive(Clone, Debug)]
pub(super) struct Hosts {
    pub(super) endpoints: Vec<EndpointConfig>,
    pub(super) watched: Watched,
}

/// Files and folders as they were when they were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Watched(Vec<(PathBuf, Option<Stamp>)>);

/// What changes when a file is replaced or written: time of change, length, inode.
type Stamp = (SystemTime, u64, u64);

impl Watched {
    pub(super) fn add(&mut self, path: &Path) {
        self.0.push((path.to_owned(), stamp(path)));
    }

    pub(super) fn is_current(&self) -> bool {
        self.0.iter().all(|(path, before)| stamp(path) == *before)
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
}

/// Reads which endpoints serve `registry`. The name comes from image references.
pub(super) fn load(config: &RegistriesConfig, registry: &str) -> Result<Hosts, Fault> {
    check_name(registry)?;
    let mut watched = Watched::default();
    let mut endpoints = match find_folder(config, registry, &mut watched) {
        Some(folder) => read_folder(&folder, registry, &mut watched)?,
        None => vec![default_endpoint(registry)?],
    };
    let own = config.of(registry);
    for endpoint in &mut endpoints {
        let named = endpoint.base.host_str().map(|host| match endpoint.base.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        });
        let exact = named.and_then(|name| config.hosts.get(&name));
        let settings = if endpoint.is_mirror { exact } else { Some(exact.unwrap_or(&own)) };
        if let Some(settings) = settings {
            apply(settings, endpoint)?;
        }
        let tables = [exact, config.hosts.get(registry), config.hosts.get("*")];
        endpoint.docker_config = tables.into_iter().flatten().find_map(|table| table.docker_config.clone());
        for path in &endpoint.ca {
            watched.add(path);
        }
        if let Some(client) = &endpoint.client {
            watched.add(&client.certificate);
            client.key.iter().for_each(|key| watched.add(key));
        }
    }
    Ok(Hosts { endpoints, watched })
}

/// The daemon's own settings of an endpoint.
fn apply(settings: &RegistryConfig, endpoint: &mut EndpointConfig) -> Result<(), Fault> {
    if settings.plain_http {
        let _ = endpoint.base.set_scheme("http");
        endpoint.may_be_plain = false;
    } else if settings.ca.is_some() || settings.certificate.is_some() {
        // Whoever names an authority means TLS, on this machine too.
        let _ = endpoint.base.set_scheme("https");
        endpoint.may_be_plain = false;
        endpoint.skip_verify = false;
    }
    endpoint.ca.extend(settings.ca.clone());
    match (&settings.certificate, &settings.key) {
        (Some(certificate), key) => {
            endpoint.client = Some(ClientFiles { certificate: certificate.clone(), key: key.clone() });
            Ok(())
        }
        (None, Some(_)) => Err(Fault::Configuration {
            file: format!("the table registry.{:?}", endpoint.base.host_str().unwrap_or_default()),
            reason: "it has `key` but no `certificate`".to_owned(),
        }),
        (None, None) => Ok(()),
    }
}

/// A registry's name becomes part of URLs and of paths, so it must not lead elsewhere.
fn check_name(registry: &str) -> Result<(), Fault> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".-:[]_".contains(c);
    let starts = registry.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[');
    let fits = starts && registry.len() <= 260 && registry.chars().all(allowed);
    match fits && Url::parse(&format!("https://{registry}/")).is_ok() {
        true => Ok(()),
        false => Err(Fault::protocol(format!("{registry:?} is no host name with an optional port"))),
    }
}

/// The folder of `registry` below the configured ones: `HOST_PORT_`, `HOST:PORT`, `_default`.
fn find_folder(config: &RegistriesConfig, registry: &str, watched: &mut Watched) -> Option<PathBuf> {
    let underscored = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    for root in &config.config_path {
        for name in underscored.as_deref().into_iter().chain([registry, "_default"]) {
            let folder = root.join(name);
            // Only that a folder appears or goes matters here; its own times change with what is in it.
            watched.add(&folder);
            if folder.is_dir() {
                return Some(folder);
            }
        }
    }
    None
}

fn read_folder(folder: &Path, registry: &str, watched: &mut Watched) -> Result<Vec<EndpointConfig>, Fault> {
    let path = folder.join("hosts.toml");
    watched.add(&path);
    let wrong = |reason: String| Fault::Configuration { file: path.display().to_string(), reason };
    let mut text = String::new();
    match std::fs::File::open(&path) {
        Ok(file) => {
            file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| wrong(error.to_string()))?;
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(wrong(error.to_string())),
    }
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(wrong(format!("it is larger than {FILE_BYTES_MAX} bytes")));
    }
    if text.is_empty() {
        let mut endpoint = default_endpoint(registry)?;
        certificates(folder, &mut endpoint)
            .map_err(|error| Fault::Configuration { file: folder.display().to_string(), reason: error.to_string() })?;
        return Ok(vec![endpoint]);
    }
    parse(&text, folder, registry).map_err(wrong)
}

/// Docker's layout where there is no hosts.toml: `*.crt` are authorities, `NAME.cert` and `NAME.key` the client's.
fn certificates(folder: &Path, endpoint: &mut EndpointConfig) -> std::io::Result<()> {
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder)?.flatten().map(|entry| entry.path()).collect();
    names.sort();
    for path in names.into_iter().filter(|path| path.is_file()) {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => endpoint.ca.push(path),
            Some("cert") if endpoint.client.is_none() => {
                let key = Some(path.with_extension("key")).filter(|key| key.exists());
                endpoint.client = Some(ClientFiles { certificate: path, key });
            }
            _ => {}
        }
    }
    if !endpoint.ca.is_empty() || endpoint.client.is_some() {
        endpoint.may_be_plain = endpoint.may_be_plain || endpoint.base.scheme() == "http";
    }
    Ok(())
}

/// Where `registry` is when nothing is configured.
fn default_endpoint(registry: &str) -> Result<EndpointConfig, Fault> {
    let server = match registry {
        "docker.io" | "index.docker.io" => "registry-1.docker.io",
        other => other,
    };
    let base = Url::parse(&format!("https://{server}/v2/"))
        .map_err(|error| Fault::protocol(format!("{registry:?} is no host name with an optional port: {error}")))?;
    // A registry on this machine is asked as containerd does: TLS with any certificate, else plain HTTP.
    let is_here = is_local(&base) && base.port().is_some();
    let mut endpoint = EndpointConfig::at(base);
    endpoint.skip_verify = is_here;
    endpoint.may_be_plain = is_here;
    Ok(endpoint)
}

fn is_local(base: &Url) -> bool {
    let host = base.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl EndpointConfig {
    /// An endpoint at `base` with nothing set.
    pub fn at(base: Url) -> Self {
        Self {
            base,
            pulls: true,
            resolves: true,
            is_mirror: false,
            ca: Vec::new(),
            client: None,
            skip_verify: false,
            may_be_plain: false,
            headers: HeaderMap::new(),
            connect_timeout: None,
            proxy: None,
            docker_config: None,
        }
    }

    /// Leaves out all that proves who this machine is.
    pub(super) fn make_anonymous(&mut self) {
        (self.client, self.docker_config) = (None, None);
        self.headers.clear();
        // Fails only for URLs without a host, which have no user either.
        let _ = self.base.set_username("");
        let _ = self.base.set_password(None);
    }
}

/// Reads the text of a hosts.toml that lies in `folder` and belongs to `registry`. The error says what is wrong.
pub fn parse(text: &str, folder: &Path, registry: &str) -> Result<Vec<EndpointConfig>, String> {
    // Keys that are not known are left alone, as containerd does: newer versions have more.
    let wrong = |error: toml::de::Error| printable_toml(&error);
    let root: HostTable = toml::from_str(text).map_err(wrong)?;
    let rest: RootTable = toml::from_str(text).map_err(wrong)?;
    if rest.host.0.len() > ENTRIES_MAX {
        return Err(format!("it has more than {ENTRIES_MAX} hosts"));
    }
    let mut endpoints = Vec::new();
    for (url, table) in &rest.host.0 {
        let named = |reason: String| format!("host.{url:?}: {reason}");
        endpoints.push(endpoint(url, table, folder, registry).map_err(named)?);
    }
    let mut last = match rest.server.as_deref().unwrap_or_default() {
        "" => {
            let mut last = default_endpoint(registry).map_err(|fault| fault.to_string())?;
            fill(&mut last, &root, folder)?;
            // The registry itself can do everything, whatever the file says.
            (last.pulls, last.resolves) = (true, true);
            last
        }
        server => endpoint(server, &root, folder, registry).map_err(|reason| format!("server: {reason}"))?,
    };
    last.is_mirror = stands_in(&last.base, registry);
    endpoints.push(last);
    Ok(endpoints)
}

fn endpoint(url: &str, table: &HostTable, folder: &Path, registry: &str) -> Result<EndpointConfig, String> {
    let full = if url.starts_with("http") { url.to_owned() } else { format!("https://{url}") };
    let mut base = Url::parse(&full).map_err(|error| format!("{url:?} is no URL: {error}"))?;
    if !matches!(base.scheme(), "http" | "https") || !base.has_host() {
        return Err(format!("{url:?} is no URL of http or https"));
    }
    base.set_query(None);
    base.set_fragment(None);
    let _ = (base.set_username(""), base.set_password(None));
    let mut path = base.path().trim_end_matches('/').to_owned();
    if !table.override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    base.set_path(&format!("{path}/"));
    let is_mirror = stands_in(&base, registry);
    let mut endpoint = EndpointConfig { is_mirror, ..EndpointConfig::at(base) };
    fill(&mut endpoint, table, folder)?;
    // With TLS settings for an http URL containerd tries TLS first.
    let has_tls = !endpoint.ca.is_empty() || endpoint.client.is_some() || table.skip_verify.is_some();
    if endpoint.base.scheme() == "http" && has_tls && endpoint.base.port().is_some() {
        let _ = endpoint.base.set_scheme("https");
        endpoint.may_be_plain = true;
    }
    Ok(endpoint)
}

/// Whether `base` is another host than the registry's own.
fn stands_in(base: &Url, registry: &str) -> bool {
    let host = base.host_str().unwrap_or_default();
    let port = base.port_or_known_default().unwrap_or_default();
    let same = registry == host || registry.strip_prefix(host).is_some_and(|rest| rest == format!(":{port}"));
    let is_hub = registry == "docker.io" && host == "registry-1.docker.io";
    !(same || is_hub)
}

fn fill(endpoint: &mut EndpointConfig, table: &HostTable, folder: &Path) -> Result<(), String> {
    if let Some(capabilities) = table.capabilities.as_ref().filter(|capabilities| !capabilities.is_empty()) {
        (endpoint.pulls, endpoint.resolves) = (false, false);
        for capability in capabilities {
            match capability.to_ascii_lowercase().as_str() {
                "pull" => endpoint.pulls = true,
                "resolve" => endpoint.resolves = true,
                "push" | "referrers" => {}
                _ => return Err(format!("unknown capability {capability:?}: want pull, resolve or push")),
            }
        }
    }
    endpoint.ca = table.ca.iter().flat_map(OneOrMany::iter).map(|path| folder.join(path)).collect();
    endpoint.client = match &table.client {
        None => None,
        Some(ClientValue::One(path)) => Some(ClientFiles { certificate: folder.join(path), key: None }),
        Some(ClientValue::Many(pairs)) => {
            if pairs.len() > 1 {
                tracing::debug!("{}: the first client certificate is used", folder.display());
            }
            match pairs.first() {
                None => None,
                Some(OneOrMany::One(path)) => Some(ClientFiles { certificate: folder.join(path), key: None }),
                Some(OneOrMany::Many(pair)) => match pair.as_slice() {
                    [certificate, key] => {
                        let key = Some(key).filter(|key| !key.is_empty()).map(|key| folder.join(key));
                        Some(ClientFiles { certificate: folder.join(certificate), key })
                    }
                    _ => return Err("client: want [\"CERTIFICATE\", \"KEY\"]".to_owned()),
                },
            }
        }
    };
    if let Some(skip) = table.skip_verify {
        endpoint.skip_verify = skip;
    }
    if table.header.len() > ENTRIES_MAX {
        return Err(format!("it has more than {ENTRIES_MAX} headers"));
    }
    for (name, values) in &table.header {
        let header = HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("header {name:?} is no name"))?;
        for value in values.iter().take(ENTRIES_MAX) {
            let mut value = HeaderValue::from_str(value).map_err(|_| format!("header {name:?} has no usable value"))?;
            // Keys of registries are given this way.
            value.set_sensitive(true);
            endpoint.headers.append(&header, value);
        }
    }
    if let Some(text) = table.dial_timeout.as_deref().filter(|text| !text.is_empty()) {
        let timeout = duration(text).filter(|timeout| !timeout.is_zero());
        endpoint.connect_timeout =
            Some(timeout.ok_or_else(|| format!("dial_timeout {text:?} is no duration like \"5s\""))?);
    }
    endpoint.proxy = proxy_url(table.proxy.as_deref().unwrap_or_default())?;
    Ok(())
}

/// A duration as Go writes it: `1m30s`, `1.5s`, `500ms`.
fn duration(text: &str) -> Option<Duration> {
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (value, tail) = rest.split_at(number);
        let unit = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit);
        let factor = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += value.parse::<f64>().ok()? * factor;
        rest = tail;
    }
    (!text.is_empty()).then(|| Duration::try_from_secs_f64(seconds).ok())?
}

fn printable_toml(error: &toml::de::Error) -> String {
    super::error::printable(&error.to_string(), 400)
}

/// The keys of a host, and of the file's root for the registry itself.
#[derive(Debug, Default, Deserialize)]
struct HostTable {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<ClientValue>,
    skip_verify: Option<bool>,
    #[serde(default)]
    header: BTreeMap<String, OneOrMany>,
    #[serde(default)]
    override_path: bool,
    dial_timeout: Option<String>,
    proxy: Option<String>,
}

#[derive(Debug, Deserialize)]
struct RootTable {
    server: Option<String>,
    #[serde(default)]
    host: Ordered,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum ClientValue {
    One(String),
    Many(Vec<OneOrMany>),
}

impl OneOrMany {
    fn iter(&self) -> impl Iterator<Item = &String> {
        match self {
            Self::One(text) => std::slice::from_ref(text).iter(),
            Self::Many(texts) => texts.iter(),
        }
    }
}

/// Hosts in the order of the file, which is the order in which they are asked.
#[derive(Debug, Default)]
struct Ordered(Vec<(String, HostTable)>);

impl<'de> Deserialize<'de> for Ordered {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OrderedVisitor;

        impl<'de> Visitor<'de> for OrderedVisitor {
            type Value = Ordered;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tables host.\"URL\"")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered, A::Error> {
                let mut hosts = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    hosts.push(entry);
                }
                Ok(Ordered(hosts))
            }
        }

        deserializer.deserialize_map(OrderedVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str, registry: &str) -> Vec<EndpointConfig> {
        parse(text, Path::new("/certs"), registry).unwrap()
    }

    fn bases(endpoints: &[EndpointConfig]) -> Vec<&str> {
        endpoints.iter().map(|endpoint| endpoint.base.as_str()).collect()
    }

    #[test]
    fn mirrors_come_in_the_order_of_the_file_and_the_server_last() {
        let endpoints = parsed(
            r#"
            server = "https://registry-1.docker.io"
            unknown = "left alone"
            [host."https://z-first.test"]
              capabilities = ["pull"]
              ca = "z.crt"
              [host."https://z-first.test".header]
                x-key = ["one", "two"]
            [host."https://a-second.test/proxy"]
              ca = ["/abs.pem", "rel.pem"]
              client = [["c.cert", "c.key"]]
              skip_verify = true
              dial_timeout = "1.5s"
              proxy = "http://user:word@proxy.test:3128"
            [host."http://m-third.test/v2/upstream"]
              override_path = true
              client = "both.pem"
            "#,
            "docker.io",
        );
        assert_eq!(
            bases(&endpoints),
            [
                "https://z-first.test/v2/",
                "https://a-second.test/proxy/v2/",
                "http://m-third.test/v2/upstream/",
                "https://registry-1.docker.io/v2/"
            ]
        );
        assert_eq!(endpoints.iter().map(|one| one.is_mirror).collect::<Vec<_>>(), [true, true, true, false]);
        let (first, second, third) = (&endpoints[0], &endpoints[1], &endpoints[2]);
        assert_eq!((first.pulls, first.resolves), (true, false));
        assert_eq!((second.pulls, second.resolves), (true, true));
        assert_eq!(first.ca, [PathBuf::from("/certs/z.crt")]);
        assert_eq!(first.headers.get_all("x-key").iter().count(), 2);
        assert_eq!(second.ca, [PathBuf::from("/abs.pem"), "/certs/rel.pem".into()]);
        let pair = ClientFiles { certificate: "/certs/c.cert".into(), key: Some("/certs/c.key".into()) };
        assert_eq!(second.client, Some(pair));
        assert!(second.skip_verify);
        assert_eq!(second.connect_timeout, Some(Duration::from_millis(1500)));
        assert_eq!(second.proxy.as_ref().and_then(Url::host_str), Some("proxy.test"));
        assert_eq!(third.client, Some(ClientFiles { certificate: "/certs/both.pem".into(), key: None }));
    }

    #[test]
    fn without_a_server_the_registry_itself_is_last() {
        let endpoints = parsed("capabilities = [\"pull\"]\n[host.\"mirror.test\"]", "r.test:5000");
        assert_eq!(bases(&endpoints), ["https://mirror.test/v2/", "https://r.test:5000/v2/"]);
        assert!(endpoints[1].resolves, "the registry itself resolves");
        let only = parsed("server = \"https://mirror.test\"", "r.test");
        assert_eq!(bases(&only), ["https://mirror.test/v2/"]);
        assert!(only[0].is_mirror);
        assert!(!parsed("server = \"https://r.test:443\"", "r.test:443")[0].is_mirror);
    }

    #[test]
    fn an_http_url_with_tls_settings_is_tried_with_tls() {
        let endpoints = parsed("[host.\"http://192.0.2.1:5000\"]\nskip_verify = true", "r.test");
        assert_eq!((endpoints[0].base.scheme(), endpoints[0].may_be_plain), ("https", true));
        let endpoints = parsed("[host.\"http://192.0.2.1:5000\"]", "r.test");
        assert_eq!((endpoints[0].base.scheme(), endpoints[0].may_be_plain), ("http", false));
    }

    #[test]
    fn wrong_files_are_named_with_their_key() {
        let wrong = |text: &str| parse(text, Path::new("/certs"), "r.test").unwrap_err();
        assert!(wrong("[host.\"https://m\"]\ncapabilities = [\"pul\"]").contains("pul"));
        assert!(wrong("[host.\"https://m\"]\nclient = [[\"a\"]]").contains("client"));
        assert!(wrong("[host.\"https://m\"]\nskip_verify = \"yes\"").contains("skip_verify"));
        assert!(wrong("[host.\"https://m\"]\ndial_timeout = \"5\"").contains("dial_timeout"));
        assert!(wrong("[host.\"https://[\"]").contains("https://["));
        assert!(wrong("[host.\"https://m\"]\nproxy = \"ftp://x\"").contains("proxy"));
        assert!(wrong("server = 3").contains("server"));
        assert!(wrong("[host.\"https://m\".header]\n\"a b\" = \"x\"").contains("a b"));
        assert!(wrong("= x").contains("line 1"));
    }

    #[test]
    fn folders_are_found_as_containerd_finds_them() {
        let root = tempfile::tempdir().unwrap();
        let config = RegistriesConfig { config_path: vec![root.path().to_owned()], ..RegistriesConfig::default() };
        let load = |registry: &str| load(&config, registry).unwrap();
        let write = |folder: &str, server: &str| {
            std::fs::create_dir_all(root.path().join(folder)).unwrap();
            std::fs::write(root.path().join(folder).join("hosts.toml"), format!("server = \"{server}\"")).unwrap();
        };
        let before = load("r.test:5000");
        assert_eq!(bases(&before.endpoints), ["https://r.test:5000/v2/"]);
        assert!(before.watched.is_current());
        write("_default", "https://default.test");
        assert!(!before.watched.is_current(), "a new folder is seen");
        assert_eq!(bases(&load("r.test:5000").endpoints), ["https://default.test/v2/"]);
        write("r.test:5000", "https://colon.test");
        assert_eq!(bases(&load("r.test:5000").endpoints), ["https://colon.test/v2/"]);
        write("r.test_5000_", "https://underscore.test");
        let before = load("r.test:5000");
        assert_eq!(bases(&before.endpoints), ["https://underscore.test/v2/"]);
        write("r.test_5000_", "https://underscore-two.test");
        assert!(!before.watched.is_current(), "a changed file is seen");
        std::fs::create_dir_all(root.path().join("certs.test")).unwrap();
        for name in ["a.crt", "b.cert", "b.key"] {
            std::fs::write(root.path().join("certs.test").join(name), "").unwrap();
        }
        let endpoint = &load("certs.test").endpoints[0];
        assert_eq!(endpoint.ca, [root.path().join("certs.test/a.crt")]);
        let (certificate, key) = (root.path().join("certs.test/b.cert"), root.path().join("certs.test/b.key"));
        assert_eq!(endpoint.client, Some(ClientFiles { certificate, key: Some(key) }));
        for odd in ["..", ".", "", "a/b", "user@host", "a b", "-x"] {
            assert!(super::load(&config, odd).is_err(), "{odd:?}");
        }
    }

    #[test]
    fn own_tables_go_to_their_hosts() {
        let table = |plain_http: bool, docker_config: &str| RegistryConfig {
            plain_http,
            docker_config: Some(docker_config.into()),
            ..RegistryConfig::default()
        };
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("r.test")).unwrap();
        let text = "[host.\"https://m.test:5000\"]\n[host.\"https://other.test\"]";
        std::fs::write(root.path().join("r.test/hosts.toml"), text).unwrap();
        let config = RegistriesConfig {
            config_path: vec![root.path().to_owned()],
            hosts: [("r.test".to_owned(), table(true, "own")), ("m.test:5000".to_owned(), table(true, "mirror"))]
                .into(),
        };
        let endpoints = load(&config, "r.test").unwrap().endpoints;
        assert_eq!(bases(&endpoints), ["http://m.test:5000/v2/", "https://other.test/v2/", "http://r.test/v2/"]);
        let configs: Vec<_> = endpoints.iter().map(|one| one.docker_config.clone().unwrap()).collect();
        assert_eq!(configs, [PathBuf::from("mirror"), "own".into(), "own".into()]);
    }

    #[test]
    fn registries_on_this_machine_may_be_plain() {
        let at = |registry: &str| {
            let endpoint = default_endpoint(registry).unwrap();
            (endpoint.base.scheme().to_owned(), endpoint.may_be_plain)
        };
        for local in ["localhost:5000", "127.0.0.1:5000", "[::1]:5000"] {
            assert_eq!(at(local), ("https".to_owned(), true), "{local}");
        }
        assert_eq!(at("localhost"), ("https".to_owned(), false));
        assert_eq!(at("r.test:5000"), ("https".to_owned(), false));
        assert_eq!(default_endpoint("docker.io").unwrap().base.as_str(), "https://registry-1.docker.io/v2/");
    }

    #[test]
    fn durations_are_go_s() {
        assert_eq!(duration("1m30s"), Some(Duration::from_secs(90)));
        assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
        for odd in ["", "5", "s", "1x", "1..2s", "-1s", "99999999999999999999999h"] {
            assert_eq!(duration(odd), None, "{odd:?}");
        }
    }
}
