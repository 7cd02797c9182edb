//! The mounts of lazy layers: one directory a chain id, on which the layer's EROFS image is mounted.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use layer::erofs::{ImageOptions, write_image};
use layer::{ChainId, Digest};
use node::Node;
use node::layer::Layer;
use parking_lot::Mutex;

use super::erofs::{ErofsMount, MountError, Unmounted, unmount};
use super::helper::{self, Helper};
use super::lower::LowerRoots;
use super::seal::{Sealing, is_intact};
use super::table::{Mounted, mounts_below};
use crate::snapshots::{LazyBacking, Quarantine, StoreError};

/// Why a layer could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The layer's entries could not be read.
    #[error("the index of {layer} is damaged: {reason}")]
    Index {
        /// diffID.
        layer: Digest,
        /// What is wrong.
        reason: String,
    },
    /// The metadata image could not be written.
    #[error("cannot write the metadata image {path}: {reason}")]
    Image {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The kernel did not mount it.
    #[error(transparent)]
    Mount(#[from] MountError),
}

/// Builds, mounts and finds the mounts of lazy layers below one root:
/// `images/CHAIN.erofs` (metadata image), `m/KEY` (mounted over FUSE), `m/KEY~` (mounted over the complete device).
///
/// A key has 22 characters: the paths of 128 lower directories must fit one page of mount options, and 128 bits of a
/// SHA-256 cannot be made to collide.
#[derive(Debug)]
pub struct LayerMounts {
    node: Arc<Node>,
    images: PathBuf,
    mounts: PathBuf,
    devices: PathBuf,
    helper: Helper,
    /// What is mounted, by directory name. Held while mounting, so that a chain is mounted once.
    mounted: Arc<Mutex<Shown>>,
    /// Images that are not on disk for certain.
    unsynced: mpsc::Sender<ChainId>,
}

/// Ends the names of images that a crash of the machine may have cut short: those would mount and lie. They are used
/// as they are, are renamed once they are on disk, and are made again after a reboot. So no pull waits for the disk.
const UNSYNCED: &str = "unsynced";
const SYNCED: &str = "erofs";

/// Images are brought to the disk when none was made for so long.
const SYNC_PAUSE: Duration = Duration::from_secs(2);

/// Layers with more paths give their memory back to the machine at once; that takes a millisecond.
const TRIM_ENTRIES: u32 = 10_000;

/// Ends the names of mounts over devices on disk. In the alphabet of no key.
const DISK_SUFFIX: char = '~';

/// Directories on which something is mounted, with the number of the layer that it shows; `None`: as an earlier daemon left it.
type Shown = HashMap<String, Option<u64>>;

/// Which device a mount reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Fuse,
    Disk,
}

impl LayerMounts {
    /// Takes over what an earlier daemon left mounted below `root`; `adopted` says that the FUSE connection is that daemon's too. Else
    /// its mounts over FUSE have lost their connection for good and are made anew. `devices` is where the FUSE mount is, which must be
    /// served by now; `program` is the snapshotter's binary.
    pub fn open(
        node: Arc<Node>,
        root: &Path,
        devices: PathBuf,
        program: PathBuf,
        adopted: bool,
    ) -> Result<Self, MountError> {
        let (images, mounts) = (root.join("images"), root.join("m"));
        for directory in [&images, &mounts] {
            fs::create_dir_all(directory).map_err(MountError::io(directory))?;
        }
        let lock = root.join("mount.lock");
        helper::settle(&lock)?;
        let (mounted, leftover) = sort_out(mounts_below(&mounts).map_err(MountError::io(&mounts))?, &mounts, adopted);
        for target in &leftover {
            unmount(target).map_err(MountError::io(target))?;
        }
        if !adopted {
            // The machine may have crashed.
            for image in list(&images)? {
                if image.extension().is_some_and(|extension| extension == UNSYNCED) {
                    fs::remove_file(&image).map_err(MountError::io(&image))?;
                }
            }
        }
        let mounted: Shown = mounted.into_iter().map(|name| (name, None)).collect();
        let mounted = Arc::new(Mutex::new(mounted));
        let (unsynced, chains) = mpsc::channel();
        let syncer = Syncer { images: images.clone(), mounted: mounted.clone() };
        std::thread::Builder::new()
            .name("image sync".to_owned())
            .spawn(move || syncer.run(&chains))
            .map_err(MountError::io(&images))?;
        Ok(Self { node, images, mounts, devices, helper: Helper::new(program, lock), mounted, unsynced })
    }

    /// Mounts `layer` as `chain` unless it is mounted already, building its metadata image first where there is none.
    /// `lowers` gives the roots of the layers below, top first; empty for the bottom layer. Blocks for the time of an image
    /// build (about 0.1 s for 50 000 entries).
    pub fn attach(
        &self,
        chain: ChainId,
        layer: &Arc<Layer>,
        lowers: impl Iterator<Item = Result<PathBuf, StoreError>>,
    ) -> Result<(), AttachError> {
        let name = name(chain, Over::Fuse);
        layer.set_mounted(true);
        self.keep_pinned(chain, layer);
        if self.shows(chain, layer)? {
            layer.set_filling(true);
            return Ok(());
        }
        if !self.has_intact_image(chain) {
            let built = self.build(chain, layer, lowers);
            // The tree of a layer takes some hundred bytes a path, and no other allocation will need as much.
            if layer.header().entry_count() > TRIM_ENTRIES {
                node::trim_malloc();
            }
            built?;
            // The thread lives as long as this sender.
            let _ = self.unsynced.send(chain);
        }
        let mut mounted = self.mounted.lock();
        if mounted.contains_key(&name) {
            return Ok(());
        }
        let mount = ErofsMount {
            image: self.image(chain).ok_or_else(|| MountError::Helper("the image was removed".to_owned()))?,
            device: self.devices.join(layer.header().diff_id().hex()),
            target: self.mounts.join(&name),
        };
        fs::create_dir_all(&mount.target).map_err(MountError::io(&mount.target))?;
        self.helper.mount(std::slice::from_ref(&mount))?;
        mounted.insert(name, Some(layer.number()));
        drop(mounted);
        layer.set_filling(true);
        Ok(())
    }

    /// Whether `chain` is mounted and shows this very layer. A mount of one that was removed since is detached, and its image, which
    /// was made of another index, deleted.
    fn shows(&self, chain: ChainId, layer: &Layer) -> Result<bool, MountError> {
        let shown = {
            let mut mounted = self.mounted.lock();
            let Some(shown) = mounted.get_mut(&name(chain, Over::Fuse)) else { return Ok(false) };
            *shown.get_or_insert(layer.number())
        };
        if shown != layer.number() {
            self.detach(chain)?;
        }
        Ok(shown == layer.number())
    }

    /// The mount over the complete device, made now if it is not there.
    fn over_disk(&self, chain: ChainId, layer: &Arc<Layer>) -> Option<PathBuf> {
        let name = name(chain, Over::Disk);
        let target = self.mounts.join(&name);
        // It may have been mounted over FUSE long ago.
        if !self.mounted.lock().contains_key(&name) && !self.has_intact_image(chain) {
            return None;
        }
        let mut mounted = self.mounted.lock();
        if mounted.contains_key(&name) {
            return Some(target);
        }
        let image = self.image(chain)?;
        // Before the mount: a hole that is made in a mounted device is read as zeros.
        match layer.pin(&name) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(error) => {
                tracing::warn!(%chain, %error, "a complete layer stays on FUSE");
                return None;
            }
        }
        let mount = ErofsMount { image, device: layer.device_path(), target: target.clone() };
        let done = fs::create_dir_all(&target).map_err(MountError::io(&target)).and_then(|()| mount.mount());
        match done {
            Ok(()) => {
                mounted.insert(name, Some(layer.number()));
                Some(target)
            }
            Err(error) => {
                self.unpin(&name);
                tracing::warn!(%chain, %error, "a complete layer stays on FUSE");
                None
            }
        }
    }

    /// A daemon before this one may have mounted the device without a mark on it.
    fn keep_pinned(&self, chain: ChainId, layer: &Layer) {
        let name = name(chain, Over::Disk);
        if self.mounted.lock().contains_key(&name)
            && let Err(error) = layer.pin_anyway(&name)
        {
            tracing::warn!(%chain, %error, "cannot note that a device is read from disk");
        }
    }

    /// The mount over a device on disk is gone, so that parts of the device may be evicted.
    fn unpin(&self, name: &str) {
        for layer in self.node.layers() {
            if let Err(error) = layer.unpin(name) {
                tracing::warn!(%layer, %error, "cannot note that a device is not read from disk any more");
            }
        }
    }

    /// Unmounts `name`, and lets its device go unless somebody still has the mount.
    fn unmount(&self, name: &str, target: &Path) -> Result<(), MountError> {
        let unmounted = unmount(target).map_err(MountError::io(target))?;
        if unmounted == Unmounted::Gone && name.ends_with(DISK_SUFFIX) {
            self.unpin(name);
        }
        Ok(())
    }

    /// Whether `chain` is mounted.
    pub fn is_attached(&self, chain: ChainId) -> bool {
        self.mounted.lock().contains_key(&name(chain, Over::Fuse))
    }

    /// Unmounts `chain` and deletes its image. A mount that is still in use is detached.
    pub fn detach(&self, chain: ChainId) -> Result<(), MountError> {
        let mut mounted = self.mounted.lock();
        for name in [name(chain, Over::Fuse), name(chain, Over::Disk)] {
            let target = self.mounts.join(&name);
            if !target.exists() {
                continue;
            }
            self.unmount(&name, &target)?;
            mounted.remove(&name);
            fs::remove_dir(&target).map_err(MountError::io(&target))?;
        }
        for ending in [UNSYNCED, SYNCED] {
            let image = image_path(&self.images, chain, ending);
            match fs::remove_file(&image) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(MountError::io(&image)(error)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Detaches every chain that is none of `kept`. For the start, before any layer is attached.
    pub fn retain(&self, kept: &HashSet<ChainId>) -> Result<(), MountError> {
        let names: HashSet<String> =
            kept.iter().flat_map(|chain| [name(*chain, Over::Fuse), name(*chain, Over::Disk)]).collect();
        let images: HashSet<PathBuf> = kept
            .iter()
            .flat_map(|chain| [UNSYNCED, SYNCED].map(|ending| image_path(&self.images, *chain, ending)))
            .collect();
        let mut mounted = self.mounted.lock();
        for target in list(&self.mounts)? {
            let name = target.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !names.contains(name) {
                self.unmount(name, &target)?;
                mounted.remove(name);
                fs::remove_dir(&target).map_err(MountError::io(&target))?;
            }
        }
        for image in list(&self.images)? {
            if !images.contains(&image) {
                fs::remove_file(&image).map_err(MountError::io(&image))?;
            }
        }
        Ok(())
    }

    /// The image of `chain`, if there is one. Its name may change unless [`Self::mounted`] is held.
    fn image(&self, chain: ChainId) -> Option<PathBuf> {
        [SYNCED, UNSYNCED].map(|ending| image_path(&self.images, chain, ending)).into_iter().find(|path| path.exists())
    }

    /// Whether there is an image of `chain` that is as it was made. One that is not is left to be replaced.
    fn has_intact_image(&self, chain: ChainId) -> bool {
        let Some(image) = self.image(chain) else { return false };
        match is_intact(&image) {
            Ok(true) => return true,
            Ok(false) => tracing::warn!(image = %image.display(), "a metadata image is damaged: making it again"),
            // It was renamed, as it is on disk for certain.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.image(chain).is_some(),
            Err(error) => {
                tracing::warn!(image = %image.display(), %error, "cannot read a metadata image: making it again");
            }
        }
        // What is made gets the other name.
        let _ = fs::remove_file(&image);
        false
    }

    fn build(
        &self,
        chain: ChainId,
        layer: &Arc<Layer>,
        lowers: impl Iterator<Item = Result<PathBuf, StoreError>>,
    ) -> Result<(), AttachError> {
        let mut lowers = lowers.peekable();
        let image = image_path(&self.images, chain, UNSYNCED);
        let tree = layer
            .tree()
            .map_err(|error| AttachError::Index { layer: layer.header().diff_id(), reason: error.to_string() })?;
        let options = ImageOptions {
            device_size: layer.header().device_size(),
            bottom: lowers.peek().is_none(),
            uuid: first_16(chain),
        };
        // The name is unique to this call: two prepares of one chain may build at once, and either image will do.
        let failed = |reason: String| AttachError::Image { path: image.clone(), reason };
        let partial = tempfile_in(&self.images).map_err(|error| failed(error.to_string()))?;
        let result = (|| {
            let mut out = Sealing::new(BufWriter::with_capacity(1 << 20, &partial.1));
            let lowers = LowerRoots::new(lowers);
            write_image(&tree, &options, &lowers, &mut out).map_err(|error| error.to_string())?;
            lowers.finish().map_err(|error| format!("a layer below cannot be shown: {error}"))?;
            out.finish().and_then(|mut out| out.flush()).map_err(|error| error.to_string())?;
            fs::rename(&partial.0, &image).map_err(|error| error.to_string())
        })();
        if result.is_err() {
            let _ = fs::remove_file(&partial.0);
        }
        result.map_err(failed)
    }
}

impl crate::snapshots::LayerMounts for LayerMounts {
    /// Over the device on disk where the layer is complete and proven, else over FUSE. Only local work: milliseconds.
    fn lower(&self, _: u64, backing: &LazyBacking) -> io::Result<PathBuf> {
        let over_fuse = name(backing.chain_id, Over::Fuse);
        if !self.mounted.lock().contains_key(&over_fuse) {
            let reason = match crate::snapshots::LayerMounts::quarantine(self, backing) {
                Some(Quarantine { reason, .. }) => format!("the layer is quarantined: {reason}"),
                None => "the layer is not mounted: the log of the daemon's start says why".to_owned(),
            };
            return Err(io::Error::new(io::ErrorKind::NotFound, reason));
        }
        let layer = self.node.layer(backing.diff_id).filter(|layer| layer.is_proven());
        let over_disk = layer.and_then(|layer| self.over_disk(backing.chain_id, &layer));
        Ok(over_disk.unwrap_or_else(|| self.mounts.join(over_fuse)))
    }

    fn quarantine(&self, backing: &LazyBacking) -> Option<Quarantine> {
        let layer = self.node.layer(backing.diff_id)?;
        layer.quarantine().map(|reason| Quarantine { reason, is_wrong: layer.has_wrong_index() })
    }
}

/// Brings images to the disk in the background.
struct Syncer {
    images: PathBuf,
    mounted: Arc<Mutex<Shown>>,
}

impl Syncer {
    /// Until nobody can send any more.
    fn run(&self, chains: &mpsc::Receiver<ChainId>) {
        while let Ok(first) = chains.recv() {
            let mut waiting = vec![first];
            // A pull that is under way needs the disk for its snapshots.
            while let Ok(chain) = chains.recv_timeout(SYNC_PAUSE) {
                waiting.push(chain);
            }
            waiting.into_iter().for_each(|chain| self.sync(chain));
        }
    }

    fn sync(&self, chain: ChainId) {
        let (unsynced, synced) = (image_path(&self.images, chain, UNSYNCED), image_path(&self.images, chain, SYNCED));
        let on_disk = File::open(&unsynced).and_then(|file| file.sync_all());
        let renamed = on_disk.and_then(|()| {
            // Nobody mounts it by its old name meanwhile.
            let _mounted = self.mounted.lock();
            fs::rename(&unsynced, &synced)
        });
        match renamed {
            // The layer was removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(image = %unsynced.display(), %error, "an image is not on disk for certain: it is made again after a reboot");
            }
            Ok(()) => {}
        }
    }
}

/// What is mounted below `mounts`, by name, and what of it to unmount, each time it is named once.
fn sort_out(found: Vec<Mounted>, mounts: &Path, adopted: bool) -> (HashSet<String>, Vec<PathBuf>) {
    let (mut mounted, mut leftover) = (HashSet::new(), Vec::new());
    for Mounted { target, .. } in found {
        let name = target.strip_prefix(mounts).ok().and_then(|name| name.to_str()).unwrap_or_default();
        if name.is_empty() {
            continue;
        }
        let dead = !adopted && !name.ends_with(DISK_SUFFIX);
        // Mounted twice on one directory by a crash between two daemons: one is enough.
        if dead || !mounted.insert(name.to_owned()) {
            leftover.push(target);
        }
    }
    (mounted, leftover)
}

fn image_path(images: &Path, chain: ChainId, ending: &str) -> PathBuf {
    images.join(format!("{}.{ending}", chain.digest().hex()))
}

fn list(directory: &Path) -> Result<Vec<PathBuf>, MountError> {
    fs::read_dir(directory)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .map_err(MountError::io(directory))
}

fn name(chain: ChainId, over: Over) -> String {
    let key = URL_SAFE_NO_PAD.encode(first_16(chain));
    match over {
        Over::Fuse => key,
        Over::Disk => format!("{key}{DISK_SUFFIX}"),
    }
}

fn first_16(chain: ChainId) -> [u8; 16] {
    let [first @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] = *chain.digest().as_bytes();
    first
}

fn tempfile_in(directory: &Path) -> io::Result<(PathBuf, File)> {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = directory.join(format!(".{}-{number}.partial", std::process::id()));
    Ok((path.clone(), File::options().create_new(true).write(true).open(path)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_an_earlier_daemon_are_adopted_once_and_dead_ones_left() {
        let found = |names: &[&str]| -> Vec<Mounted> {
            let mounted = |name: &&str| Mounted {
                target: Path::new("/root/m").join(name),
                fs_type: "erofs".to_owned(),
                source: PathBuf::new(),
                super_options: String::new(),
            };
            names.iter().map(mounted).collect()
        };
        let sorted = |names: &[&str], adopted| {
            let (mounted, leftover) = sort_out(found(names), Path::new("/root/m"), adopted);
            let mut mounted: Vec<_> = mounted.into_iter().collect();
            mounted.sort();
            let leftover: Vec<_> =
                leftover.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
            (mounted, leftover)
        };
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(sorted(&["", "a", "a~", "b"], true), (names(&["a", "a~", "b"]), names(&[])));
        // A crash between the mount and its record, and the next daemon mounted again.
        assert_eq!(sorted(&["a", "b~", "a", "b~", "a"], true), (names(&["a", "b~"]), names(&["a", "b~", "a"])));
        // The FUSE connection is another one: mounts over it are lost, those over the disk are not.
        assert_eq!(sorted(&["a", "b~", "a", "b"], false), (names(&["b~"]), names(&["a", "a", "b"])));
    }
}
