//! Removing all that Drover has on a node.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};

use crate::config::Config;
use crate::mount::erofs::unmount;
use crate::mount::table::mounts_below;
use crate::snapshots::records::Records;
use crate::{fuse, keeper};

/// Everything of ours in the root; see docs/store.md.
const IN_ROOT: [&str; 16] = [
    "snapshots.redb",
    "snapshots",
    "layers",
    "incoming",
    "refused",
    "numbers",
    "numbers.new",
    "running",
    "images",
    "m",
    "mount.lock",
    "grants",
    "grants.new",
    "identity",
    "devices",
    "drained",
];

/// The same in the directory for what need not survive a reboot.
const IN_RUN: [&str; 2] = ["keeper.sock", "lock"];

/// Most snapshots that an error names.
const NAMED_MAX: usize = 20;

/// What an operator has to do himself.
pub const BY_HAND: &str = "\
Now remove from containerd's configuration what contrib/containerd/drover-v3.toml (or -v2) put there, and restart containerd:
  [proxy_plugins.drover] and what is below it
  the unpack_config entry with snapshotter = 'drover'
  snapshotter = 'drover' of the CRI plugin, which then is overlayfs again
Then remove the unit drover-snapshotter.service (systemctl disable drover-snapshotter; systemctl clean --what=fdstore
drover-snapshotter), /etc/drover and this program.
";

/// Removes the mounts and files of the node; refuses where a daemon serves, or containerd has a snapshot left. Gives what else is in
/// the root, which stays.
pub fn uninstall(config: &Config) -> anyhow::Result<Vec<PathBuf>> {
    ensure!(
        keeper::status(&config.run).is_err(),
        "drover-snapshotter serves at {}: stop it first (systemctl stop drover-snapshotter)",
        config.socket().display()
    );
    let records = config.root.join("snapshots.redb");
    // Kept open: a daemon that is started meanwhile is told.
    let records = records.exists().then(|| Records::open(&records)).transpose()?;
    if let Some(records) = &records {
        let snapshots = records.list(|_| true)?;
        if !snapshots.is_empty() {
            let names: Vec<_> = snapshots.iter().take(NAMED_MAX).map(|snapshot| snapshot.name.as_str()).collect();
            bail!(
                "containerd has {} snapshots of Drover: start it again, remove the containers and images that use it \
                 (drover-snapshotter drain names them), and try again. They are {}{}",
                snapshots.len(),
                names.join(", "),
                if names.len() < snapshots.len() { ", ..." } else { "" }
            );
        }
    }
    fuse::mount::unmount(&config.devices()).context("cannot remove the FUSE mount")?;
    for mounted in mounts_below(&config.root)?.into_iter().rev() {
        unmount(&mounted.target).with_context(|| format!("cannot unmount {}", mounted.target.display()))?;
    }
    // What is below would be removed with the rest.
    if let Some(mounted) = mounts_below(&config.root)?.first() {
        bail!("{} is still mounted", mounted.target.display());
    }
    // The lock of the root goes last, like that of the other directory: who is started meanwhile finds them taken.
    for name in IN_ROOT {
        remove(&config.root.join(name))?;
    }
    drop(records);
    remove(&config.root.join("lock"))?;
    remove(&config.socket())?;
    for name in IN_RUN {
        remove(&config.run.join(name))?;
    }
    let mut left = Vec::new();
    for directory in [&config.root, &config.run] {
        match fs::remove_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                let entries =
                    fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
                left.extend(entries.flatten().map(|entry| entry.path()));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", directory.display()));
            }
            _ => {}
        }
    }
    Ok(left)
}

fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::snapshots::mounts::NoLayerMounts;
    use crate::snapshots::{Creation, Kind, Store};

    fn config(folder: &Path) -> Config {
        let path = folder.join("snapshotter.toml");
        let (root, run) = (folder.join("root"), folder.join("run"));
        let text = format!("root = {root:?}\nrun = {run:?}\n[security]\nmode = \"off\"\n");
        fs::write(&path, text).unwrap();
        Config::load(&path).unwrap()
    }

    #[test]
    fn nothing_is_removed_that_is_used_or_somebody_elses() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        assert_eq!(uninstall(&config).unwrap(), Vec::<PathBuf>::new(), "nothing was there");
        let open = || Store::open(&config.root, Arc::new(NoLayerMounts)).unwrap();
        let store = open();
        store.create(Creation::new(Kind::Active, "ns/1/container", None)).unwrap();
        let error = uninstall(&config).unwrap_err();
        assert!(error.to_string().contains("is in use by another process"), "{error}");
        drop(store);
        let error = uninstall(&config).unwrap_err();
        assert!(error.to_string().contains("1 snapshots of Drover") && error.to_string().contains("ns/1/container"));
        assert!(config.root.join("snapshots.redb").exists());

        let store = open();
        store.remove("ns/1/container").unwrap();
        drop(store);
        let foreign = config.root.join("notes");
        fs::write(&foreign, "not ours").unwrap();
        assert_eq!(uninstall(&config).unwrap(), std::slice::from_ref(&foreign));
        fs::remove_file(&foreign).unwrap();
        assert!(uninstall(&config).unwrap().is_empty());
        assert!(!config.root.exists());
    }
}
