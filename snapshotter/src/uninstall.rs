//! Removing all that Drover has on a node.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};

use crate::config::Config;
use crate::mount::erofs::unmount;
use crate::mount::table::{Mounted, mounts_below};
use crate::snapshots::records::Records;
use crate::{fuse, keeper};

/// Everything of ours in the root; see docs/store.md.
const IN_ROOT: [&str; 16] = [
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
    // Last: without it nothing says that containerd has no snapshot.
    "snapshots.redb",
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
    // Held to the end: a daemon that is started meanwhile is told.
    let _locks = [hold(&config.run.join("lock"))?, hold(&config.root.join("lock"))?];
    let records = config.root.join("snapshots.redb");
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
    // As the kernel names it.
    let root = fs::canonicalize(&config.root).unwrap_or_else(|_| config.root.clone());
    for mounted in mounts_in(&root)?.into_iter().rev() {
        let is_ours = mounted.fs_type == "erofs" && mounted.target.parent() == Some(&root.join("m"));
        ensure!(is_ours, "{} is mounted there and not Drover's: unmount it first", mounted.target.display());
        unmount(&mounted.target).with_context(|| format!("cannot unmount {}", mounted.target.display()))?;
    }
    // What is below would be removed with the rest.
    if let Some(mounted) = mounts_in(&root)?.first() {
        bail!("{} is still mounted", mounted.target.display());
    }
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
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
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

/// What is mounted below `root`, which may be a disk of its own.
fn mounts_in(root: &Path) -> anyhow::Result<Vec<Mounted>> {
    let mut mounts = mounts_below(root).context("cannot read what is mounted")?;
    mounts.retain(|mounted| mounted.target != root);
    Ok(mounts)
}

/// The lock of a daemon, where there ever was one.
fn hold(lock: &Path) -> anyhow::Result<Option<File>> {
    let file = match File::open(lock) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot open {}", lock.display())),
    };
    let locked = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    locked.with_context(|| format!("{} is in use: stop drover-snapshotter first", lock.display()))?;
    Ok(Some(file))
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
