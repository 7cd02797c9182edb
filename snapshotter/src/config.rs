//! The snapshotter's configuration file.
//!
//! Every key with its meaning, default and sensible range is in docs/configuration.md, which a test compares with this struct.

use std::io::Read;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use node::config::{CacheConfig, ConfigError, RegistriesConfig, SecurityConfig, SeederAddresses};
use node::mesh::member::is_zone;
use serde::Deserialize;

/// Where the configuration is read from unless the command line says otherwise.
pub const DEFAULT_PATH: &str = "/etc/drover/snapshotter.toml";

/// Shorter deadlines fail reads that a busy source would have answered; at 120 s some hosts reboot.
const DEADLINE_RANGE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(110);

/// The whole file. Unknown keys are refused; every key but `security` has a default.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Everything that must survive a reboot: records, layers, images. On a file system with sparse files and extended attributes.
    #[serde(default = "default_root")]
    pub root: PathBuf,
    /// Everything that need not: locks and the keeper's socket.
    #[serde(default = "default_run")]
    pub run: PathBuf,
    /// Socket that containerd's `proxy_plugins` entry names; `drover.sock` in `run` where it is left out.
    pub socket: Option<PathBuf>,
    /// Where containerd is.
    #[serde(default)]
    pub containerd: ContainerdConfig,
    /// Where seeders are.
    #[serde(default)]
    pub seeder: SeederConfig,
    /// How this node proves itself and whom it trusts.
    pub security: SecurityConfig,
    /// Registries by host, for reads that no seeder answers.
    #[serde(default)]
    pub registry: RegistriesConfig,
    /// How much of the disk the layers may take.
    #[serde(default)]
    pub cache: CacheConfig,
    /// Reads of containers.
    #[serde(default)]
    pub read: ReadConfig,
    /// Pulls.
    #[serde(default)]
    pub prepare: PrepareConfig,
    /// Fetching what nobody reads yet.
    #[serde(default)]
    pub fill: FillConfig,
    /// Nodes that give each other chunks.
    #[serde(default)]
    pub mesh: MeshConfig,
    /// Most bytes per second.
    #[serde(default)]
    pub limits: LimitsConfig,
    /// `error`, `warn`, `info`, `debug`, or a filter as `tracing` takes it.
    #[serde(default = "default_log")]
    pub log: String,
}

impl Config {
    /// Reads `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let config: Self = node::config::load(path)?;
        config.check().map_err(|reason| ConfigError::Parse { path: path.to_owned(), reason })?;
        Ok(config)
    }

    /// Reads the text of such a file. The error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if !DEADLINE_RANGE.contains(&self.read.deadline) {
            return Err("read.deadline must be between 1s and 110s".into());
        }
        if let Err(reason) = self.mesh.zone.parse::<ZoneSource>() {
            return Err(format!("mesh.zone {reason}"));
        }
        let address = &self.mesh.address;
        if !address.is_empty() && address.parse::<SocketAddr>().is_err() {
            return Err(format!("mesh.address must be IP:PORT or empty, not {address:?}"));
        }
        for (key, path) in [("root", &self.root), ("run", &self.run), ("socket", &self.socket())] {
            if !path.is_absolute() {
                return Err(format!("{key} must be an absolute path"));
            }
        }
        Ok(())
    }

    /// The socket that containerd connects to.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| self.run.join("drover.sock"))
    }

    /// How this node takes part in the mesh; `None`: it does not.
    pub fn mesh(&self) -> Option<node::mesh::Options> {
        let MeshConfig { enabled, listen, address, zone, leech } = self.mesh.clone();
        let upload_rate = self.limits.upload.as_u64();
        let takes_part = enabled && !self.seeder.addresses.is_empty();
        takes_part.then(|| {
            // A daemon that is started again while containers run must not fail for this.
            let zone = zone.parse().and_then(|source: ZoneSource| source.name(|name| std::env::var(name).ok()));
            let zone = zone.unwrap_or_else(|reason| {
                tracing::warn!("mesh.zone {reason}: this node counts as one without a zone until it is started again");
                String::new()
            });
            node::mesh::Options { listen, address, zone, leech, upload_rate }
        })
    }

    /// Directory of the FUSE mount whose files are devices.
    pub fn devices(&self) -> PathBuf {
        self.root.join("devices")
    }
}

/// Where containerd is.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ContainerdConfig {
    /// Its gRPC socket. Blobs in its content store are preferred to the network.
    pub socket: PathBuf,
}

/// Where seeders are.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SeederConfig {
    /// `HOST:PORT`; a DNS name may stand for several. Each layer lies with one of them, all nodes agree with which.
    pub addresses: SeederAddresses,
}

/// Reads of containers.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReadConfig {
    /// How long a read may wait for a chunk that no source gives before it fails with EIO. Below 120 s, where some
    /// hosts reboot on hung tasks.
    #[serde(with = "humantime_serde")]
    pub deadline: Duration,
}

/// Pulls.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrepareConfig {
    /// How long a pull waits for a layer that makes no progress before containerd unpacks it.
    #[serde(with = "humantime_serde")]
    pub stall: Duration,
}

/// Fetching what nobody reads yet.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FillConfig {
    /// Whether layers are completed in the background.
    pub enabled: bool,
    /// Bytes a second that this may take; 0 is unlimited. Reads of containers go first in any case.
    pub rate: ByteSize,
}

/// Nodes that give each other chunks.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MeshConfig {
    /// Whether this node takes part. It does only where seeders are configured, since they introduce nodes to each other.
    pub enabled: bool,
    /// `IP:PORT` to listen on for other nodes.
    pub listen: String,
    /// `IP:PORT` that other nodes are told; empty: the address from which this node reaches the seeder, with the port of `listen`.
    pub address: String,
    /// Name of the part of the network within which bytes are cheap: up to 64 letters, digits, `.`, `_` and `-`. `env:NAME`: what
    /// that variable says, `file:/PATH`: the first line of that file.
    pub zone: String,
    /// Take only, give nothing.
    pub leech: bool,
}

/// Where the name of a zone is found.
#[derive(Clone, Debug, PartialEq, Eq)]
enum ZoneSource {
    Name(String),
    Variable(String),
    File(PathBuf),
}

impl FromStr for ZoneSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("env", name)) if !name.is_empty() && !name.contains('=') => Ok(Self::Variable(name.to_owned())),
            Some(("file", path)) if Path::new(path).is_absolute() => Ok(Self::File(path.into())),
            None if is_zone(text) => Ok(Self::Name(text.to_owned())),
            _ => Err(format!(
                "is {text:?}: want a name of up to 64 letters, digits, '.', '_' and '-', or env:NAME or file:/PATH"
            )),
        }
    }
}

impl ZoneSource {
    /// The name. A label of a cloud's metadata may be a path, of which the last part is it (`projects/1/zones/europe-west1-b`).
    fn name(&self, variable: impl Fn(&str) -> Option<String>) -> Result<String, String> {
        let found = match self {
            Self::Name(name) => return Ok(name.clone()),
            Self::Variable(name) => {
                variable(name).ok_or_else(|| format!("wants the variable {name}, which is not set"))?
            }
            Self::File(path) => {
                let mut text = String::new();
                let file =
                    std::fs::File::open(path).and_then(|file| file.take(ZONE_FILE_MAX).read_to_string(&mut text));
                file.map_err(|error| format!("wants the file {}: {error}", path.display()))?;
                text
            }
        };
        let line = found.lines().next().unwrap_or_default().trim();
        let name = line.rsplit('/').next().unwrap_or_default();
        if name.is_empty() || !is_zone(name) {
            return Err(format!("finds {line:?} there, which is no name of a zone"));
        }
        Ok(name.to_owned())
    }
}

/// Most bytes that are read of a file with a zone's name.
const ZONE_FILE_MAX: u64 = 4096;

/// Most bytes per second; 0 is unlimited.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// To other nodes.
    pub upload: ByteSize,
    /// From other nodes and seeders.
    pub download: ByteSize,
    /// From registries.
    pub registry: ByteSize,
}

fn default_root() -> PathBuf {
    "/var/lib/drover".into()
}

fn default_run() -> PathBuf {
    "/run/drover".into()
}

fn default_log() -> String {
    "info".into()
}

impl Default for ContainerdConfig {
    fn default() -> Self {
        Self { socket: "/run/containerd/containerd.sock".into() }
    }
}

impl Default for ReadConfig {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(60) }
    }
}

impl Default for PrepareConfig {
    fn default() -> Self {
        Self { stall: Duration::from_secs(10) }
    }
}

impl Default for MeshConfig {
    fn default() -> Self {
        Self { enabled: true, listen: "0.0.0.0:7071".into(), address: String::new(), zone: String::new(), leech: false }
    }
}

impl Default for FillConfig {
    fn default() -> Self {
        Self { enabled: true, rate: ByteSize::b(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys and defaults of the snapshotter's table in docs/configuration.md, as written there.
    fn documented() -> Vec<(String, String)> {
        let page = include_str!("../../docs/configuration.md");
        let (_, page) = page.split_once("## `drover-snapshotter`").unwrap();
        let page = page.split_once("\n## ").map_or(page, |(page, _)| page);
        page.lines()
            .filter_map(|line| {
                let mut cells = line.strip_prefix("| `")?.split(" | ");
                let key = cells.next()?.trim_end_matches('`').to_owned();
                Some((key, cells.next()?.trim().trim_matches('`').to_owned()))
            })
            .collect()
    }

    #[test]
    fn the_fuzz_corpus_is_read() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/config");
        let mut taken = 0;
        for file in std::fs::read_dir(directory).unwrap() {
            let bytes = std::fs::read(file.unwrap().path()).unwrap();
            let whole = String::from_utf8_lossy(&bytes);
            taken += u32::from(Config::parse(&whole).is_ok());
            for (at, _) in whole.char_indices() {
                let _ = Config::parse(&whole[..at]);
            }
        }
        assert!(taken >= 5, "the seeds are good configurations, but for one");
    }

    #[test]
    fn every_documented_key_is_known_with_its_default() {
        let documented = documented();
        assert!(documented.len() > 10);
        let mut text = String::new();
        for (key, default) in &documented {
            let is_value = default.starts_with(['"', '[']) || ["true", "false"].contains(&default.as_str());
            if is_value && !key.contains("security") {
                text += &format!("{key} = {default}\n");
            }
        }
        let plain: Config = toml::from_str("security = \"off\"").unwrap();
        let spelled: Config = toml::from_str(&format!("security = \"off\"\n{text}")).unwrap();
        let ignoring_registries = |config: &Config| Config { registry: RegistriesConfig::default(), ..config.clone() };
        assert_eq!(format!("{plain:?}"), format!("{:?}", ignoring_registries(&spelled)));
    }

    #[test]
    fn every_key_is_documented() {
        let documented = documented();
        for table in ["", "containerd", "seeder", "read", "prepare", "fill", "mesh", "limits", "cache", "registry.x"] {
            let header = if table.is_empty() { String::new() } else { format!("[{table}]\n") };
            let text = if table.is_empty() {
                "nonsense = 1".into()
            } else {
                format!("security = \"off\"\n{header}nonsense = 1")
            };
            let error = toml::from_str::<Config>(&text).unwrap_err().to_string();
            let (_, known) = error.split_once("expected").unwrap_or_else(|| panic!("{error}"));
            for key in known.split('`').skip(1).step_by(2) {
                let is_documented = documented.iter().any(|(name, _)| match table {
                    "" => name == key || name.starts_with(&format!("{key}.")),
                    "registry.x" => name.starts_with("registry.") && name.ends_with(&format!(".{key}")),
                    table => *name == format!("{table}.{key}"),
                });
                assert!(is_documented, "{table} {key} is not in docs/configuration.md");
            }
        }
    }

    #[test]
    fn a_zone_may_come_from_the_node() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("zone");
        let name = |text: &str| {
            let variable = |name: &str| (name == "ZONE").then(|| "eu-1a".to_owned());
            text.parse::<ZoneSource>().and_then(|source| source.name(variable))
        };
        assert_eq!((name("").as_deref(), name("rack-7").as_deref()), (Ok(""), Ok("rack-7")));
        assert_eq!(name("env:ZONE").as_deref(), Ok("eu-1a"));
        let from_file = format!("file:{}", file.display());
        for (text, want) in [
            ("eu-central-1b\n", Some("eu-central-1b")),
            ("projects/123/zones/europe-west1-b", Some("europe-west1-b")),
            ("", None),
            ("a b\n", None),
        ] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(name(&from_file).ok().as_deref(), want, "{text:?}");
        }
        std::fs::remove_file(&file).unwrap();
        assert!(name(&from_file).unwrap_err().contains(file.to_str().unwrap()));
        assert!(name("env:OTHER").unwrap_err().contains("OTHER"));
        for wrong in ["env:", "file:zone", "http://x", "a b", "a/b"] {
            assert!(wrong.parse::<ZoneSource>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_typo_is_named() {
        let error = toml::from_str::<Config>("security = \"off\"\n[read]\ndeadlin = \"5s\"").unwrap_err();
        assert!(error.to_string().contains("deadlin"), "{error}");
    }
}
