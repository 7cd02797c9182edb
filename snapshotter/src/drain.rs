//! Taking a node back to containerd's own snapshotters.
//!
//! A drained node makes no layer lazy any more; what it has goes on. Nothing else tells the daemon than a file, so it holds over
//! restarts, and with a daemon that does not answer.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use layer::Digest;
use proto::containerd::services::snapshots::v1::ListSnapshotsRequest;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use proto::drover::node::v1::{CompleteProgress, LayerState};

use crate::status::client;

/// Why a drained node leaves layers to containerd.
pub const REASON: &str = "this node is drained (drover-snapshotter drain)";

/// Whether a node is drained.
#[derive(Clone, Debug)]
pub struct Drain {
    root: PathBuf,
}

/// What still stands on Drover.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    /// Keys of active snapshots and views: containers, and pulls under way.
    pub containers: Vec<String>,
    /// Images whose layers are Drover's snapshots.
    pub images: Vec<String>,
}

impl Drain {
    /// That of the node with this root.
    pub fn of(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Whether no layer is to be made lazy.
    pub fn is_on(&self) -> bool {
        self.mark().exists()
    }

    /// Begins or ends it, durably. Blocks on the disk.
    pub fn set(&self, is_on: bool) -> io::Result<()> {
        match is_on {
            true => File::create(self.mark())?.sync_all()?,
            false => match fs::remove_file(self.mark()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            },
        }
        File::open(&self.root)?.sync_all()
    }

    fn mark(&self) -> PathBuf {
        self.root.join("drained")
    }
}

/// Fetches whole what is here in part, so that no running container needs the network any more. `show` is told how far it is. Gives
/// how many layers lacked something.
pub async fn complete(socket: &Path, show: impl FnMut(&CompleteProgress)) -> anyhow::Result<usize> {
    let status = client::status(socket).await?;
    let layers = || status.images.iter().flat_map(|image| &image.layers);
    let partial = layers().filter(|layer| layer.state() == LayerState::Partial);
    let mut blobs: Vec<Digest> = partial.filter_map(|layer| layer.blob.parse().ok()).collect();
    blobs.sort_by_key(|blob| *blob.as_bytes());
    blobs.dedup();
    if !blobs.is_empty() {
        client::complete(socket, &blobs, show).await?;
    }
    let is_lost = |state| matches!(state, LayerState::Quarantined | LayerState::Broken);
    if let Some(lost) = layers().find(|layer| is_lost(layer.state())) {
        anyhow::bail!(
            "the layer of snapshot {} is quarantined or broken (drover-snapshotter status --layers)",
            lost.snapshot
        );
    }
    Ok(blobs.len())
}

/// Who uses the snapshots of the daemon at `socket`.
pub async fn users(socket: &Path) -> anyhow::Result<Users> {
    let mut client = SnapshotsClient::new(client::connect(socket).await?);
    let filters = vec!["kind==active".to_owned(), "kind==view".to_owned()];
    let listed = client.list(ListSnapshotsRequest { snapshotter: String::new(), filters }).await;
    let mut pages = listed.context("the daemon does not list its snapshots")?.into_inner();
    let mut users = Users::default();
    while let Some(page) = pages.message().await? {
        users.containers.extend(page.info.into_iter().map(|info| info.name));
    }
    users.images = client::status(socket).await?.images.into_iter().map(|image| image.name).collect();
    Ok(users)
}

impl std::fmt::Display for Users {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { containers, images } = self;
        if containers.is_empty() && images.is_empty() {
            return writeln!(f, "nothing uses Drover any more: stop it, then run drover-snapshotter uninstall");
        }
        if containers.is_empty() {
            writeln!(f, "no container uses Drover: it may be stopped")?;
        } else {
            writeln!(f, "do not stop Drover yet, containers use it (or pulls that are under way):")?;
            containers.iter().try_for_each(|key| writeln!(f, "  {key}"))?;
        }
        if !images.is_empty() {
            writeln!(f, "images to be removed and pulled again with another snapshotter, before it is uninstalled:")?;
            images.iter().try_for_each(|name| writeln!(f, "  {name}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_drained_until_it_is_told_otherwise() {
        let root = tempfile::tempdir().unwrap();
        let drain = Drain::of(root.path());
        drain.set(false).unwrap();
        assert!(!drain.is_on());
        drain.set(true).unwrap();
        drain.set(true).unwrap();
        assert!(drain.is_on() && Drain::of(root.path()).is_on());
        drain.set(false).unwrap();
        assert!(!drain.is_on());
    }

    #[test]
    fn says_when_it_is_safe_to_stop() {
        let users = |containers: &[&str], images: &[&str]| {
            let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            Users { containers: own(containers), images: own(images) }.to_string()
        };
        assert!(users(&[], &[]).contains("uninstall"));
        assert!(users(&[], &["r/a:1"]).starts_with("no container uses Drover: it may be stopped\nimages"));
        assert!(
            users(&["k8s.io/3/c1"], &[]).contains("do not stop Drover yet") && users(&["c1"], &[]).contains("  c1")
        );
    }
}
