//! Whether this kernel can do what lazy layers need, found out by doing it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use layer::entry::{Entry, Kind, Mtime};
use layer::erofs::{ImageOptions, Stack, write_image};
use layer::tree::Tree;
use parking_lot::Mutex;

use super::erofs::{ErofsMount, MountError, unmount};

/// Why lazy layers cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The mount was refused; the kernel is too old or lacks EROFS.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// It mounted, but reads do not give what was written.
    #[error("a file-backed EROFS mount on this kernel does not read back what was written")]
    WrongBytes,
    /// The probe's image could not be written.
    #[error("cannot write the probe's image: {0}")]
    Image(String),
}

/// Whether this node can mount lazy layers, as far as it is known.
#[derive(Debug)]
pub struct Ability {
    root: PathBuf,
    refusal: Mutex<Option<ProbeError>>,
}

impl Ability {
    /// Finds it out below `root`. Blocks.
    pub fn probe(root: &Path) -> Self {
        let refusal = file_backed_erofs(root).err();
        if let Some(reason) = &refusal {
            tracing::error!(%reason, "no layer can be lazy on this node: containerd unpacks all of them");
        }
        Self { root: root.to_owned(), refusal: Mutex::new(refusal) }
    }

    /// Why no layer can be lazy here; `None` where they can. What a full disk kept from being found out is tried again. Blocks.
    pub fn refusal(&self) -> Option<String> {
        let mut refusal = self.refusal.lock();
        if refusal.as_ref().is_some_and(ProbeError::is_full_disk) {
            *refusal = file_backed_erofs(&self.root).err();
            if refusal.is_none() {
                tracing::info!("layers can be lazy on this node: its disk has space");
            }
        }
        refusal.as_ref().map(ProbeError::to_string)
    }
}

impl ProbeError {
    /// Whether it says nothing about the kernel.
    fn is_full_disk(&self) -> bool {
        let Self::Mount(MountError::Io { source, .. }) = self else { return false };
        matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// Mounts a tiny image over a device file below `root`, reads from it and unmounts it. Needs no FUSE.
pub fn file_backed_erofs(root: &Path) -> Result<(), ProbeError> {
    let folder = root.join("probe");
    let result = probe(&folder);
    let target = folder.join("mounted");
    let unmounted = unmount(&target).map_err(MountError::io(&target));
    let removed = unmounted.and_then(|_| fs::remove_dir_all(&folder).map_err(MountError::io(&folder)));
    result.and_then(|()| removed.map_err(ProbeError::Mount))
}

fn probe(folder: &Path) -> Result<(), ProbeError> {
    const TEXT: &[u8] = b"drover";
    let mount =
        ErofsMount { image: folder.join("image"), device: folder.join("device"), target: folder.join("mounted") };
    // A crash may have left an earlier probe.
    unmount(&mount.target).map_err(MountError::io(&mount.target))?;
    fs::create_dir_all(&mount.target).map_err(MountError::io(&mount.target))?;
    let mut device = TEXT.to_vec();
    device.resize(512, 0);
    fs::write(&mount.device, &device).map_err(MountError::io(&mount.device))?;
    let entry = |path: &[u8], kind, mode| Entry {
        path: path.to_vec(),
        kind,
        mode,
        uid: 0,
        gid: 0,
        mtime: Mtime::default(),
        xattrs: Vec::new(),
    };
    let entries = vec![
        entry(b"", Kind::Directory { opaque: false }, 0o755),
        entry(b"file", Kind::Regular { offset: 0, size: TEXT.len() as u64 }, 0o644),
    ];
    let failed = |error: &dyn std::fmt::Display| ProbeError::Image(error.to_string());
    let tree = Tree::validate(entries, device.len() as u64).map_err(|error| failed(&error))?;
    let mut image = Vec::new();
    let options = ImageOptions { device_size: device.len() as u64, bottom: true, uuid: [1; 16] };
    write_image(&tree, &options, &Stack::new(&[]), &mut image).map_err(|error| failed(&error))?;
    fs::File::create(&mount.image)
        .and_then(|mut file| file.write_all(&image).and_then(|()| file.sync_all()))
        .map_err(MountError::io(&mount.image))?;
    mount.mount()?;
    let read = fs::read(mount.target.join("file")).map_err(MountError::io(&mount.target))?;
    if read == TEXT { Ok(()) } else { Err(ProbeError::WrongBytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_no_answer() {
        let folder = tempfile::tempdir().unwrap();
        let ability = |refusal| Ability { root: folder.path().to_owned(), refusal: Mutex::new(Some(refusal)) };
        assert!(ability(ProbeError::WrongBytes).refusal().unwrap().contains("does not read back"));
        let full = |kind: io::ErrorKind| ProbeError::Mount(MountError::io(folder.path())(kind.into()));
        let text = full(io::ErrorKind::StorageFull).to_string();
        let again = ability(full(io::ErrorKind::StorageFull)).refusal();
        assert_eq!(again, file_backed_erofs(folder.path()).err().map(|error| error.to_string()));
        assert_ne!(again, Some(text));
        assert!(!full(io::ErrorKind::PermissionDenied).is_full_disk());
    }

    #[test]
    fn leaves_nothing_behind() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: mounting needs root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let answer = file_backed_erofs(folder.path());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(super::super::table::mounts_below(folder.path()).unwrap().is_empty());
        if let Err(error) = answer {
            println!("skipped: this kernel cannot: {error}");
        }
    }
}
