//! Parts of the configuration files that both daemons share.
//!
//! A configuration is TOML. Sizes are texts like `"64MiB"`, durations texts like `"500ms"`; an unknown key is an error
//! that names the key and its line.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{self, DeserializeOwned, MapAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize};

pub use bytesize::ByteSize;

/// The largest configuration file that is read: far more than all keys there are, far less than what would hurt.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, a key is unknown, missing or has a wrong value.
    #[error("the configuration {path} is wrong: {reason}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The place and the key, as the TOML reader shows them.
        reason: String,
    },
}

/// Reads the TOML file `path`.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let read = |path: &Path| -> std::io::Result<String> {
        use std::io::Read;
        let mut text = String::new();
        std::fs::File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(std::io::Error::other(format!("it is larger than {FILE_BYTES_MAX} bytes")));
        }
        Ok(text)
    };
    let text = read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text)
        .map_err(|error| ConfigError::Parse { path: path.to_owned(), reason: error.to_string().trim_end().to_owned() })
}

/// How the machines of a cluster trust each other. Written as the text `"off"` or as a table:
///
/// ```toml
/// [security]
/// mode = "mtls"
/// ca = "/etc/drover/ca.crt"
/// certificate = "/etc/drover/node.crt"
/// key = "/etc/drover/node.key"
/// ```
///
/// There is no default: a cluster without security is the operator's explicit choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecurityConfig {
    /// Plain TCP, no signatures: everyone who reaches the port is trusted.
    Off,
    /// TLS 1.3 with certificates on both ends and signed indexes.
    Mtls(MtlsConfig),
    /// The same with a certificate that the machine gets and renews by itself.
    Enrol(EnrolConfig),
}

/// Settings of [`SecurityConfig::Enrol`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnrolConfig {
    /// File with the token that a seeder gives the first certificate for.
    pub token: PathBuf,
}

/// The files of [`SecurityConfig::Mtls`], all PEM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MtlsConfig {
    /// Certificates of the cluster's authority: one, or two while it is being replaced.
    pub ca: PathBuf,
    /// This machine's certificate chain, leaf first.
    pub certificate: PathBuf,
    /// The private key of the leaf, PKCS #8.
    pub key: PathBuf,
}

impl<'de> Deserialize<'de> for SecurityConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SecurityVisitor;

        impl<'de> Visitor<'de> for SecurityVisitor {
            type Value = SecurityConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"off\", or a table with mode and what it needs")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<SecurityConfig, E> {
                match text {
                    "off" => Ok(SecurityConfig::Off),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<SecurityConfig, A::Error> {
                let table = SecurityTable::deserialize(MapAccessDeserializer::new(map))?;
                let SecurityTable { mode, ca, certificate, key, token } = table;
                let named = |key: &'static str, value: Option<PathBuf>| {
                    value.ok_or_else(|| de::Error::custom(format!("security.{key} is missing (mode is \"{mode}\")")))
                };
                let keys = [("ca", &ca), ("certificate", &certificate), ("key", &key), ("token", &token)];
                let needless = keys.iter().find(|(key, value)| value.is_some() && !mode.keys().contains(key));
                if let Some((key, _)) = needless {
                    return Err(de::Error::custom(format!("security.{key} has no meaning where mode is \"{mode}\"")));
                }
                match mode {
                    SecurityMode::Mtls => Ok(SecurityConfig::Mtls(MtlsConfig {
                        ca: named("ca", ca)?,
                        certificate: named("certificate", certificate)?,
                        key: named("key", key)?,
                    })),
                    SecurityMode::Enrol => Ok(SecurityConfig::Enrol(EnrolConfig { token: named("token", token)? })),
                    SecurityMode::Off => Ok(SecurityConfig::Off),
                }
            }
        }

        deserializer.deserialize_any(SecurityVisitor)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SecurityTable {
    mode: SecurityMode,
    ca: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    token: Option<PathBuf>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SecurityMode {
    Mtls,
    Enrol,
    Off,
}

impl SecurityMode {
    /// The other keys that it needs.
    const fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Mtls => &["ca", "certificate", "key"],
            Self::Enrol => &["token"],
            Self::Off => &[],
        }
    }
}

impl fmt::Display for SecurityMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mtls => "mtls",
            Self::Enrol => "enrol",
            Self::Off => "off",
        })
    }
}

/// Registries: where `hosts.toml` files are looked for, and a table for each that needs more than HTTPS with the system's
/// authorities, by host as image references name it (`registry.local:5000`, `docker.io`). The host `*` stands for all
/// that are not named.
///
/// ```toml
/// [registry]
/// config_path = "/etc/containerd/certs.d"
/// [registry."registry.local:5000"]
/// plain_http = true
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistriesConfig {
    /// Folders like containerd's `certs.d`, looked at in order.
    pub config_path: Vec<PathBuf>,
    /// Tables by host.
    pub hosts: BTreeMap<String, RegistryConfig>,
}

impl Default for RegistriesConfig {
    /// containerd's own folders, no tables.
    fn default() -> Self {
        Self { config_path: folders("/etc/containerd/certs.d:/etc/docker/certs.d"), hosts: BTreeMap::new() }
    }
}

impl RegistriesConfig {
    /// The settings of `host`.
    pub fn of(&self, host: &str) -> RegistryConfig {
        self.hosts.get(host).or_else(|| self.hosts.get("*")).cloned().unwrap_or_default()
    }
}

/// Folders between colons, as containerd's own `config_path` has them.
fn folders(text: &str) -> Vec<PathBuf> {
    text.split(':').filter(|folder| !folder.is_empty()).map(PathBuf::from).collect()
}

impl<'de> Deserialize<'de> for RegistriesConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RegistriesVisitor;

        impl<'de> Visitor<'de> for RegistriesVisitor {
            type Value = RegistriesConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("config_path and tables by host")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RegistriesConfig, A::Error> {
                let mut config = RegistriesConfig::default();
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "config_path" => config.config_path = folders(&map.next_value::<String>()?),
                        _ => {
                            config.hosts.insert(key, map.next_value()?);
                        }
                    }
                }
                Ok(config)
            }
        }

        deserializer.deserialize_map(RegistriesVisitor)
    }
}

/// How to talk to one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistryConfig {
    /// HTTP without TLS. Blobs stay proven by their digests, but credentials would travel readable.
    #[serde(default)]
    pub plain_http: bool,
    /// PEM file with authorities that are trusted besides the system's.
    pub ca: Option<PathBuf>,
    /// PEM file with the certificate chain that this machine shows to the registry.
    pub certificate: Option<PathBuf>,
    /// PEM file with its private key; where it is left out, the key stands in the file of the certificate.
    pub key: Option<PathBuf>,
    /// A Docker `config.json` with credentials or names of credential helpers; where it is left out,
    /// `$DOCKER_CONFIG/config.json` and then `~/.docker/config.json` are looked at.
    pub docker_config: Option<PathBuf>,
}

/// How much of the disk is used for what can be fetched again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// Most that is kept; 0: as much as [`CacheConfig::keep_free`] leaves.
    pub size: DiskShare,
    /// What stays free on the file system, whoever uses the rest.
    pub keep_free: DiskShare,
}

impl CacheConfig {
    /// Everything that the disk has, to the last byte.
    pub const WHOLE_DISK: Self = Self { size: DiskShare::Bytes(0), keep_free: DiskShare::Bytes(0) };
}

impl Default for CacheConfig {
    /// No size; 5 % stay free.
    fn default() -> Self {
        Self { size: DiskShare::Bytes(0), keep_free: DiskShare::Percent(5) }
    }
}

/// Bytes of a file system, written as a size (`"20GiB"`) or as a share of all that it has (`"5%"`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskShare {
    /// Bytes.
    Bytes(u64),
    /// Hundredths, at most 100.
    Percent(u8),
}

impl DiskShare {
    /// Bytes, on a file system of `total` bytes.
    pub fn of(self, total: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => total / 100 * u64::from(percent),
        }
    }
}

impl std::str::FromStr for DiskShare {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is neither a size like \"20GiB\" nor a share like \"5%\"");
        match text.strip_suffix('%') {
            Some(percent) => {
                let percent = percent.trim().parse().ok().filter(|percent| *percent <= 100);
                Ok(Self::Percent(percent.ok_or_else(wrong)?))
            }
            None => Ok(Self::Bytes(text.parse::<ByteSize>().map_err(|_| wrong())?.as_u64())),
        }
    }
}

impl<'de> Deserialize<'de> for DiskShare {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl Serialize for DiskShare {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Bytes(bytes) => serializer.serialize_str(&format!("{bytes}B")),
            Self::Percent(percent) => serializer.serialize_str(&format!("{percent}%")),
        }
    }
}

/// Where the seeders are: each `host:port`, tried in order. A host name may resolve to several seeders.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct SeederAddresses(Vec<String>);

/// A text is not the address of a seeder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no seeder address: want host:port")]
pub struct AddressError(String);

impl SeederAddresses {
    /// Takes `host:port` texts; an IPv6 host stands in brackets.
    pub fn new(addresses: impl IntoIterator<Item = String>) -> Result<Self, AddressError> {
        let addresses: Vec<String> = addresses.into_iter().collect();
        match addresses.iter().find(|address| split_address(address).is_none()) {
            Some(wrong) => Err(AddressError(wrong.clone())),
            None => Ok(Self(addresses)),
        }
    }

    /// Hosts (without brackets) and ports.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u16)> {
        self.0.iter().filter_map(|address| split_address(address))
    }

    /// Whether no seeder is configured.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'de> Deserialize<'de> for SeederAddresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(Vec::<String>::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

fn split_address(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    let port: u16 = port.parse().ok().filter(|port| *port != 0)?;
    (!host.is_empty() && !host.contains(['/', '@', ' '])).then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        security: SecurityConfig,
        #[serde(default)]
        registries: RegistriesConfig,
        #[serde(default)]
        seeders: SeederAddresses,
        limit: Option<ByteSize>,
    }

    fn parse(text: &str) -> Result<Sample, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("drover.toml");
        std::fs::write(&path, text).unwrap();
        load(&path)
    }

    #[test]
    fn security_is_a_text_or_a_table() {
        assert_eq!(parse("security = \"off\"").unwrap().security, SecurityConfig::Off);
        assert_eq!(parse("[security]\nmode = \"off\"").unwrap().security, SecurityConfig::Off);
        let mtls = parse("[security]\nmode = \"mtls\"\nca = \"a\"\ncertificate = \"b\"\nkey = \"c\"").unwrap().security;
        let files = MtlsConfig { ca: "a".into(), certificate: "b".into(), key: "c".into() };
        assert_eq!(mtls, SecurityConfig::Mtls(files));
        let enrol = parse("[security]\nmode = \"enrol\"\ntoken = \"t\"").unwrap().security;
        assert_eq!(enrol, SecurityConfig::Enrol(EnrolConfig { token: "t".into() }));
    }

    #[test]
    fn wrong_keys_are_named() {
        let named = |text: &str, key: &str| {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        };
        named("limit = \"1MiB\"", "security");
        named("security = \"on\"", "on");
        named("[security]\nmode = \"mtls\"\nca = \"a\"\nkey = \"c\"", "security.certificate");
        named("[security]\nmode = \"enrol\"", "security.token");
        named("[security]\nmode = \"enrol\"\ntoken = \"t\"\nkey = \"k\"", "security.key");
        named("security = \"off\"\nlimits = 3", "limits");
        named("security = \"off\"\nseeders = [\"host\"]", "host:port");
        named("security = \"off\"\n[registries.\"r:5000\"]\nplain = true", "plain");
        named("security = \"off\"\n[registries]\nconfig_paths = \"/x\"", "config_paths");
    }

    #[test]
    fn shares_of_a_disk_are_sizes_or_percents() {
        assert_eq!("20GiB".parse(), Ok(DiskShare::Bytes(20 << 30)));
        assert_eq!("0B".parse(), Ok(DiskShare::Bytes(0)));
        assert_eq!("5%".parse(), Ok(DiskShare::Percent(5)));
        assert_eq!(DiskShare::Percent(5).of(1000), 50);
        for wrong in ["101%", "-1%", "%", "much", ""] {
            let error = wrong.parse::<DiskShare>().unwrap_err();
            assert!(error.contains("5%"), "{error}");
        }
    }

    #[test]
    fn registries_fall_back_to_the_star() {
        let sample = parse(
            "security = \"off\"\nseeders = [\"s.local:7070\", \"[::1]:70\"]\nlimit = \"2MiB\"\n\
             [registries.\"*\"]\ndocker_config = \"d\"\n[registries.\"r:5000\"]\nplain_http = true",
        )
        .unwrap();
        assert!(sample.registries.of("r:5000").plain_http);
        assert_eq!(sample.registries.of("other").docker_config, Some("d".into()));
        assert_eq!(sample.registries.config_path, RegistriesConfig::default().config_path);
        assert_eq!(sample.seeders.iter().collect::<Vec<_>>(), [("s.local", 7070), ("::1", 70)]);
        assert_eq!(sample.limit, Some(ByteSize::mib(2)));
        let sample = parse("security = \"off\"\n[registries]\nconfig_path = \"/a:/b\"").unwrap();
        assert_eq!(sample.registries.config_path, [PathBuf::from("/a"), "/b".into()]);
        let sample = parse("security = \"off\"\n[registries]\nconfig_path = \"\"").unwrap();
        assert!(sample.registries.config_path.is_empty());
    }
}
