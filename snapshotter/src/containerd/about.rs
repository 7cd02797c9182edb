//! What containerd says of itself: its version, and how our plugin is configured in it.

use std::fmt;

use proto::containerd::services::introspection::v1::introspection_client::IntrospectionClient;
use proto::containerd::services::introspection::v1::{Plugin, PluginsRequest};
use proto::containerd::services::version::v1::version_client::VersionClient;
use tonic::{Request, Status};

use super::connection::{Connection, DEADLINE, within};

/// Capability of a snapshotter that shifts user and group ids itself. Without it containerd changes the owner of every file
/// of a copy.
pub const REMAP_IDS: &str = "remap-ids";

/// Asks containerd about itself.
#[derive(Debug, Clone)]
pub struct About {
    connection: Connection,
}

/// A version of containerd. Ordered by its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
}

/// How a proxy snapshotter is configured in containerd.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PluginConfig {
    /// `exports.enable_remote_snapshot_annotations` is `"true"`.
    pub has_annotations: bool,
    /// `capabilities` has [`REMAP_IDS`].
    pub remaps_ids: bool,
}

impl About {
    /// Asks the containerd behind `connection`.
    pub fn new(connection: &Connection) -> Self {
        Self { connection: connection.clone() }
    }

    /// Its version; `None` where its text is none that we know.
    pub async fn version(&self) -> Result<Option<Version>, Status> {
        let mut client = VersionClient::new(self.connection.channel());
        let mut request = Request::new(());
        request.set_timeout(DEADLINE);
        let answer = within(DEADLINE, client.version(request)).await?.into_inner();
        Ok(Version::parse(&answer.version))
    }

    /// How the snapshotter `name` is configured; `None` where containerd knows none of that name.
    pub async fn snapshotter(&self, name: &str) -> Result<Option<PluginConfig>, Status> {
        let mut client = IntrospectionClient::new(self.connection.channel());
        // Filtered here: a name may hold what the filter language would take for its own.
        let filters = vec!["type==io.containerd.snapshotter.v1".to_owned()];
        let mut request = Request::new(PluginsRequest { filters });
        request.set_timeout(DEADLINE);
        let plugins = within(DEADLINE, client.plugins(request)).await?.into_inner().plugins;
        Ok(plugins.iter().find(|plugin| plugin.id == name).map(PluginConfig::of))
    }
}

impl Version {
    /// Reads texts like `v2.3.1`, `1.6.20~ds1` or `2.0.0-rc.1+unknown`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.trim_start_matches('v').split('.');
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?;
        let digits = minor.find(|c: char| !c.is_ascii_digit()).unwrap_or(minor.len());
        Some(Self { major, minor: minor.get(..digits)?.parse().ok()? })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl PluginConfig {
    fn of(plugin: &Plugin) -> Self {
        let annotations = plugin.exports.get("enable_remote_snapshot_annotations");
        Self {
            has_annotations: annotations.is_some_and(|value| value == "true"),
            remaps_ids: plugin.capabilities.iter().any(|capability| capability == REMAP_IDS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_all_builds_are_read() {
        let version = |major, minor| Some(Version { major, minor });
        assert_eq!(Version::parse("v2.3.7"), version(2, 3));
        assert_eq!(Version::parse("1.6.20~ds1"), version(1, 6));
        assert_eq!(Version::parse("2.0.0-rc.1+unknown"), version(2, 0));
        assert_eq!(Version::parse("2.4-beta"), version(2, 4));
        assert_eq!(Version::parse("2.3.7+unknown"), version(2, 3));
        for odd in ["", "v", "2", "two.one", "2.", "2.x", "99999999999.1"] {
            assert_eq!(Version::parse(odd), None, "{odd}");
        }
    }
}
