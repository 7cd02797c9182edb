//! What containerd must mount to see a snapshot: the same bind and overlay mounts as its own overlayfs snapshotter gives.

use std::io;
use std::path::{Path, PathBuf};

use super::directories::Directories;
use super::error::StoreError;
use super::record::{Backing, Kind, LazyBacking, Record};
use super::records::Chain;

/// Where lazy layers are mounted. Called from blocking threads by `Prepare`, `View` and `Mounts`; must not use the network.
pub trait LayerMounts: Send + Sync {
    /// The directory that shows the layer of committed lazy snapshot `id` (mounted now, if it was not yet). The path must
    /// be short and near the snapshots' own (containerd abbreviates a common beginning of all lower directories; all
    /// mount options together must fit into a page of 4096 bytes) and free of `:`, `,` and `\`.
    fn lower(&self, id: u64, backing: &LazyBacking) -> io::Result<PathBuf>;

    /// Why no new container should stand on the layer, if so; those that there are go on.
    fn quarantine(&self, _backing: &LazyBacking) -> Option<Quarantine> {
        None
    }
}

/// Why a layer is out of service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantine {
    /// In words.
    pub reason: String,
    /// Nothing of it can be believed, not even its names and attributes. Else only some of its bytes cannot be had.
    pub is_wrong: bool,
}

/// For a store without lazy layers.
#[derive(Debug, Clone, Copy)]
pub struct NoLayerMounts;

impl LayerMounts for NoLayerMounts {
    fn lower(&self, _id: u64, _backing: &LazyBacking) -> io::Result<PathBuf> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this server shows ordinary snapshots only"))
    }
}

/// One mount in containerd's terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `bind` or `overlay`.
    pub kind: &'static str,
    /// Directory to bind; `overlay` for overlays.
    pub source: String,
    /// Mount options.
    pub options: Vec<String>,
}

/// Options that every overlay mount on this machine needs.
#[derive(Debug, Clone, Default)]
pub struct OverlayOptions(Vec<&'static str>);

impl OverlayOptions {
    /// Finds out what the running kernel needs.
    pub fn probe() -> Self {
        let mut options = Vec::new();
        // In a user namespace overlayfs may not write trusted.* attributes.
        if !in_initial_user_namespace() {
            options.push("userxattr");
        }
        // With an index a lower directory could not be shared by overlays of different uppers.
        if Path::new("/sys/module/overlay/parameters/index").exists() {
            options.push("index=off");
        }
        Self(options)
    }
}

/// The directory that shows `record`'s own files, as a lower directory of the snapshot `key`.
pub(super) fn lower(
    key: &str,
    record: &Record,
    directories: &Directories,
    layers: &dyn LayerMounts,
) -> Result<PathBuf, StoreError> {
    match &record.backing {
        Backing::Ordinary => Ok(directories.files(record.id)),
        Backing::Lazy(backing) => layers.lower(record.id, backing).map_err(|source| StoreError::Layer {
            key: key.to_owned(),
            layer: backing.diff_id,
            source,
        }),
    }
}

/// Fails where a layer below `key`, which is about to be made, is quarantined. `is_unpacked_to`: it is for a layer of an image. To unpack
/// it containerd looks at the directories below, at their attributes and not at what files have.
pub(super) fn check_quarantine(
    key: &str,
    ancestors: &[Record],
    layers: &dyn LayerMounts,
    is_unpacked_to: bool,
) -> Result<(), StoreError> {
    ancestors.iter().try_for_each(|ancestor| {
        let Backing::Lazy(backing) = &ancestor.backing else { return Ok(()) };
        match layers.quarantine(backing) {
            Some(Quarantine { reason, is_wrong }) if is_wrong || !is_unpacked_to => {
                Err(StoreError::Quarantined { key: key.to_owned(), layer: backing.diff_id, reason })
            }
            _ => Ok(()),
        }
    })
}

/// The mounts of the active snapshot or view `key`.
pub(super) fn mounts(
    key: &str,
    chain: &Chain,
    directories: &Directories,
    layers: &dyn LayerMounts,
    overlay: &OverlayOptions,
) -> Result<Vec<Mount>, StoreError> {
    let Chain { record, ancestors } = chain;
    let writable = match record.kind {
        Kind::Active => true,
        Kind::View => false,
        Kind::Committed => return Err(StoreError::NoMounts { key: key.to_owned() }),
    };
    let lower = ancestors
        .iter()
        .map(|ancestor| option_text(lower(key, ancestor, directories, layers)?))
        .collect::<Result<Vec<_>, _>>()?;
    // Containerd's mount package shifts the ids of a bind mount, and of an overlay's lower directories, itself.
    let maps = record.id_maps.iter().flat_map(|maps| [format!("uidmap={}", maps.uid), format!("gidmap={}", maps.gid)]);
    let mut options: Vec<String> = maps.collect();
    let mount = match (&lower[..], writable) {
        ([], _) => bind(option_text(directories.files(record.id))?, writable, options),
        ([only], false) => bind(only.clone(), false, options),
        _ => {
            if writable {
                options.push(format!("workdir={}", option_text(directories.work(record.id))?));
                options.push(format!("upperdir={}", option_text(directories.files(record.id))?));
            }
            options.push(format!("lowerdir={}", lower.join(":")));
            options.extend(overlay.0.iter().map(|&option| option.to_owned()));
            Mount { kind: "overlay", source: "overlay".to_owned(), options }
        }
    };
    Ok(vec![mount])
}

/// Whether `path` can stand in overlayfs's options as it is: they are split at `,` and `:`, and `\` escapes.
pub(super) fn fits_options(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.starts_with('/') && !path.contains([':', ',', '\\', '\n']))
}

fn option_text(path: PathBuf) -> Result<String, StoreError> {
    if !fits_options(&path) {
        return Err(StoreError::MountPath { path });
    }
    path.into_os_string().into_string().map_err(|path| StoreError::MountPath { path: path.into() })
}

fn bind(source: String, writable: bool, mut options: Vec<String>) -> Mount {
    options.extend([if writable { "rw" } else { "ro" }.to_owned(), "rbind".to_owned()]);
    Mount { kind: "bind", source, options }
}

/// The initial user namespace is the only one whose map is the whole identity (user_namespaces(7)).
fn in_initial_user_namespace() -> bool {
    std::fs::read_to_string("/proc/self/uid_map")
        .map_or(true, |map| map.split_whitespace().eq(["0", "0", "4294967295"]))
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use layer::{ChainId, Digest};

    use super::*;
    use crate::snapshots::record::{Labels, Usage};

    struct Mounted;

    impl LayerMounts for Mounted {
        fn lower(&self, id: u64, _: &LazyBacking) -> io::Result<PathBuf> {
            match id {
                99 => Err(io::Error::other("not mounted")),
                98 => Ok(PathBuf::from("/a:b")),
                id => Ok(PathBuf::from(format!("/m/{id}"))),
            }
        }
    }

    fn record(id: u64, kind: Kind, backing: Backing) -> Record {
        let (created, updated) = (UNIX_EPOCH, UNIX_EPOCH);
        Record {
            id,
            kind,
            parent: None,
            labels: Labels::new(),
            created,
            updated,
            usage: Usage::default(),
            backing,
            declined: None,
            id_maps: None,
        }
    }

    fn lazy(id: u64) -> Record {
        let diff_id = Digest::of(b"x");
        let backing = LazyBacking {
            blob: diff_id,
            diff_id,
            chain_id: ChainId::bottom(diff_id),
            registry: String::new(),
            repository: String::new(),
            blob_size: 0,
            media_type: String::new(),
            urls: Vec::new(),
            content_namespace: None,
        };
        record(id, Kind::Committed, Backing::Lazy(backing))
    }

    fn ordinary(id: u64) -> Record {
        record(id, Kind::Committed, Backing::Ordinary)
    }

    /// Kind, source and options of the one mount, with `ROOT` for the root.
    fn shown(kind: Kind, ancestors: &[Record]) -> Result<String, StoreError> {
        shown_with(record(9, kind, Backing::Ordinary), ancestors)
    }

    fn shown_with(record: Record, ancestors: &[Record]) -> Result<String, StoreError> {
        let root = tempfile::tempdir().expect("temporary directory");
        let directories = Directories::open(root.path()).expect("opens");
        let chain = Chain { record, ancestors: ancestors.to_vec() };
        let mounts = mounts("key", &chain, &directories, &Mounted, &OverlayOptions(vec!["index=off"]))?;
        let [mount] = &mounts[..] else { panic!("want one mount") };
        let text = format!("{} {} {}", mount.kind, mount.source, mount.options.join(","));
        Ok(text.replace(root.path().to_str().expect("UTF-8"), "ROOT"))
    }

    #[test]
    fn are_those_of_containerds_overlayfs() {
        let shown = |kind, ancestors: &[Record]| shown(kind, ancestors).expect("has mounts");
        assert_eq!(shown(Kind::Active, &[]), "bind ROOT/snapshots/9/fs rw,rbind");
        assert_eq!(shown(Kind::View, &[]), "bind ROOT/snapshots/9/fs ro,rbind");
        assert_eq!(shown(Kind::View, &[ordinary(2)]), "bind ROOT/snapshots/2/fs ro,rbind");
        assert_eq!(shown(Kind::View, &[lazy(2)]), "bind /m/2 ro,rbind");
        assert_eq!(
            shown(Kind::View, &[ordinary(3), lazy(2)]),
            "overlay overlay lowerdir=ROOT/snapshots/3/fs:/m/2,index=off"
        );
        assert_eq!(
            shown(Kind::Active, &[lazy(3), ordinary(2)]),
            "overlay overlay workdir=ROOT/snapshots/9/work,upperdir=ROOT/snapshots/9/fs,\
             lowerdir=/m/3:ROOT/snapshots/2/fs,index=off"
        );
    }

    #[test]
    fn of_containers_with_ids_of_their_own_say_how_to_shift() {
        use crate::snapshots::directories::Owner;
        use crate::snapshots::id_maps::IdMaps;
        let (uid, gid) = ("0:1000:10,10:1:1".to_owned(), "0:2000:10".to_owned());
        let maps = Some(IdMaps { uid, gid, root: Owner { uid: 1000, gid: 2000 } });
        let shown = |kind, ancestors: &[Record]| {
            let record = Record { id_maps: maps.clone(), ..record(9, kind, Backing::Ordinary) };
            shown_with(record, ancestors).expect("has mounts")
        };
        let options = "uidmap=0:1000:10,10:1:1,gidmap=0:2000:10";
        assert_eq!(shown(Kind::Active, &[]), format!("bind ROOT/snapshots/9/fs {options},rw,rbind"));
        assert_eq!(shown(Kind::View, &[lazy(2)]), format!("bind /m/2 {options},ro,rbind"));
        assert_eq!(
            shown(Kind::Active, &[lazy(3)]),
            format!(
                "overlay overlay {options},workdir=ROOT/snapshots/9/work,upperdir=ROOT/snapshots/9/fs,lowerdir=/m/3,index=off"
            )
        );
    }

    #[test]
    fn of_missing_layers_and_unusable_paths_are_errors() {
        assert!(matches!(shown(Kind::Active, &[lazy(99)]), Err(StoreError::Layer { .. })));
        assert!(matches!(shown(Kind::Active, &[lazy(98)]), Err(StoreError::MountPath { .. })));
        assert!(matches!(shown(Kind::Committed, &[]), Err(StoreError::NoMounts { .. })));
    }
}
