//! The configuration file of the seeder.

use std::path::{Path, PathBuf};
use std::time::Duration;

use node::config::{ByteSize, CacheConfig, RegistriesConfig, SecurityConfig};
use node::{grant, ingest, registry, serve};
use serde::Deserialize;

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Directory of the store: blobs, indexes and chunks of every layer that was asked for.
    pub(crate) root: PathBuf,
    /// Address and port for nodes.
    #[serde(default = "default_listen")]
    pub(crate) listen: String,
    /// How nodes and seeder trust each other; there is no default.
    pub(crate) security: SecurityConfig,
    /// Certificates for nodes.
    #[serde(default)]
    pub(crate) enrol: EnrolConfig,
    /// What nodes must show to get layers.
    #[serde(default)]
    pub(crate) grants: GrantsConfig,
    /// Registries that need more than HTTPS.
    #[serde(default)]
    pub(crate) registry: RegistriesConfig,
    /// How much of the disk may be taken.
    #[serde(default)]
    pub(crate) cache: CacheConfig,
    /// Bounds.
    #[serde(default)]
    pub(crate) limits: Limits,
    /// Level of the log, or a filter like `info,node::registry=debug`. `DROVER_LOG` overrides it.
    pub(crate) log: Option<String>,
}

/// Certificates for nodes.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct EnrolConfig {
    /// Directory of the cluster's authority. Where it is named, this seeder gives certificates to nodes that show a token, and
    /// renews them.
    pub(crate) authority: Option<PathBuf>,
}

/// What nodes must show to get layers.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct GrantsConfig {
    /// Whether layers are given only to nodes that have a grant.
    pub(crate) mode: GrantsMode,
    /// For how long after a registry's last yes a grant is renewed while that registry cannot be asked; 0: not at all.
    #[serde(with = "humantime_serde")]
    registry_down: Duration,
}

/// Whether layers are given only to nodes that have a grant.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum GrantsMode {
    /// Every machine of the cluster gets every layer.
    Off,
    /// A machine gets a layer that it could get from the registry too.
    On,
}

/// The longest that a registry's yes may count without it.
const REGISTRY_DOWN_MAX: Duration = Duration::from_secs(24 * 3600);

impl Default for GrantsConfig {
    fn default() -> Self {
        Self { mode: GrantsMode::Off, registry_down: grant::issuer::Options::default().registry_down }
    }
}

/// Bounds; the defaults fit a seeder of a thousand nodes.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Limits {
    /// Connections at the same time; more wait. A node holds a few.
    connections: usize,
    /// Transfers of sections and chunks at the same time; a node that comes when all are taken is told to come again.
    transfers: usize,
    /// Bytes of chunks that are sent in a second; 0 is no limit.
    upload: ByteSize,
    /// Blobs that are ingested at the same time. More make each of them slower.
    ingests: usize,
    /// Threads that encode chunks.
    encode_threads: usize,
    /// Largest blob that is taken.
    blob_size: ByteSize,
    /// How long a registry may send nothing before the connection is made again.
    #[serde(with = "humantime_serde")]
    registry_stall: Duration,
    /// How long a node may take no byte of what it asked for before it is cut off.
    #[serde(with = "humantime_serde")]
    client_stall: Duration,
}

fn default_listen() -> String {
    "0.0.0.0:7070".to_owned()
}

impl Default for Limits {
    fn default() -> Self {
        let (listener, ingest) = (serve::Limits::default(), ingest::Options::default());
        Self {
            connections: listener.connections,
            transfers: 256,
            upload: ByteSize::b(0),
            ingests: ingest.concurrent,
            encode_threads: ingest.encode_threads,
            blob_size: ByteSize::b(ingest.blob_size_max),
            registry_stall: registry::Options::default().stall_timeout,
            client_stall: listener.stall_timeout,
        }
    }
}

impl Config {
    /// Where commands on this machine reach the daemon.
    pub(crate) fn socket(&self) -> PathBuf {
        socket(&self.root)
    }

    /// How to ingest.
    pub(crate) fn ingest(&self) -> ingest::Options {
        self.limits.ingest(self.cache)
    }

    /// How grants are given; `None` where none are demanded. The error says what does not fit.
    pub(crate) fn grants(&self) -> Result<Option<grant::issuer::Options>, &'static str> {
        let GrantsConfig { mode, registry_down } = self.grants;
        if mode == GrantsMode::Off {
            return Ok(None);
        }
        if self.security == SecurityConfig::Off {
            return Err("grants.mode = \"on\" needs security: without certificates nobody knows who asks");
        }
        if registry_down > REGISTRY_DOWN_MAX {
            return Err("grants.registry_down may be at most 1day");
        }
        Ok(Some(grant::issuer::Options { registry_down, ..grant::issuer::Options::default() }))
    }

    /// A client of the registries.
    pub(crate) fn registry(&self) -> registry::Client {
        let options = registry::Options { stall_timeout: self.limits.registry_stall, ..registry::Options::default() };
        registry::Client::new(self.registry.clone(), options)
    }
}

impl Limits {
    pub(crate) fn listener(&self) -> serve::Limits {
        serve::Limits { connections: self.connections, stall_timeout: self.client_stall, ..serve::Limits::default() }
    }

    pub(crate) const fn transfers(&self) -> usize {
        self.transfers
    }

    /// Bytes a second; 0 is no limit.
    pub(crate) const fn upload(&self) -> u64 {
        self.upload.as_u64()
    }

    fn ingest(&self, cache: CacheConfig) -> ingest::Options {
        ingest::Options {
            concurrent: self.ingests,
            encode_threads: self.encode_threads,
            blob_size_max: self.blob_size.as_u64(),
            cache,
            ..ingest::Options::default()
        }
    }
}

fn socket(root: &Path) -> PathBuf {
    root.join("control.sock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_file_is_enough_and_a_wrong_key_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("seeder.toml");
        let parse = |text: &str| -> Result<Config, node::config::ConfigError> {
            std::fs::write(&path, text).unwrap();
            node::config::load(&path)
        };
        let config = parse("root = \"/r\"\nsecurity = \"off\"").unwrap();
        assert_eq!(config.listen, "0.0.0.0:7070");
        assert_eq!(config.ingest().concurrent, ingest::Options::default().concurrent);
        let config =
            parse("root = \"/r\"\nsecurity = \"off\"\n[limits]\nclient_stall = \"500ms\"\nblob_size = \"1GiB\"")
                .unwrap();
        assert_eq!(config.limits.listener().stall_timeout, Duration::from_millis(500));
        assert_eq!(config.ingest().blob_size_max, 1 << 30);
        let error = parse("root = \"/r\"\nsecurity = \"off\"\n[limits]\nuploads = 3").unwrap_err().to_string();
        assert!(error.contains("uploads"), "{error}");
        let secure =
            "root = \"/r\"\n[security]\nmode = \"mtls\"\nca = \"a\"\ncertificate = \"b\"\nkey = \"c\"\n[grants]\n";
        let grants =
            |text: &str| parse(&format!("{secure}{text}")).unwrap().grants().map(|on| on.map(|on| on.registry_down));
        assert_eq!(grants(""), Ok(None));
        assert_eq!(grants("mode = \"on\""), Ok(Some(Duration::from_secs(3600))));
        assert_eq!(grants("mode = \"on\"\nregistry_down = \"0s\""), Ok(Some(Duration::ZERO)));
        assert!(grants("mode = \"on\"\nregistry_down = \"2days\"").unwrap_err().contains("registry_down"));
        let config = parse("root = \"/r\"\nsecurity = \"off\"\n[grants]\nmode = \"on\"").unwrap();
        assert!(config.grants().unwrap_err().contains("needs security"));
        let error = parse("root = \"/r\"").unwrap_err().to_string();
        assert!(error.contains("security"), "{error}");
    }
}
