//! Records and directories together, in crash order: a directory is on disk before its record, and a record is gone before
//! its directory. So a crash leaves at most directories without record, which [`Store::open`] and [`Store::sweep`] remove.
//!
//! All methods but [`Store::hold`] block on the disk; none uses the network.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use layer::Digest;
use parking_lot::Mutex;

use super::directories::{Directories, Owner};
use super::error::{OpenError, StoreError};
use super::id_maps::IdMaps;
use super::mounts::{self, LayerMounts, Mount, OverlayOptions, fits_options};
use super::record::{Backing, Kind, Labels, LazyBacking, Snapshot, Usage};
use super::records::{ANCESTORS_MAX, LazyCommitOutcome, NewSnapshot, Records, ReleasedRecord};
use super::release::{LayerHold, LayersInUse, OrphanRelease, Release};
use super::usage::disk_usage;

/// Label with the chain id under which containerd wants to find a snapshot again.
pub const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";

/// All snapshots below one root.
pub struct Store {
    root: PathBuf,
    records: Records,
    directories: Directories,
    layers: Arc<dyn LayerMounts>,
    overlay: OverlayOptions,
    next_id: AtomicU64,
    /// Ids whose directory exists before their record does.
    being_created: Mutex<HashSet<u64>>,
    layers_in_use: Arc<LayersInUse>,
}

/// An active snapshot or a view to be created.
#[derive(Debug, Clone)]
pub struct Creation<'a> {
    /// [`Kind::Active`] or [`Kind::View`].
    pub kind: Kind,
    /// Its key.
    pub key: &'a str,
    /// Name of the parent.
    pub parent: Option<&'a str>,
    /// All labels that came with the request.
    pub labels: Labels,
    /// Why it is not a lazy layer, where it could have been one.
    pub declined: Option<String>,
    /// How the ids of its container map to the machine's.
    pub id_maps: Option<IdMaps>,
}

impl<'a> Creation<'a> {
    /// Without labels and all that is rare.
    pub fn new(kind: Kind, key: &'a str, parent: Option<&'a str>) -> Self {
        Self { kind, key, parent, labels: Labels::new(), declined: None, id_maps: None }
    }
}

/// A lazy snapshot to be committed.
#[derive(Debug, Clone)]
pub struct LazyCommit<'a> {
    /// Value of the label [`SNAPSHOT_REF`].
    pub target: &'a str,
    /// Name of the parent.
    pub parent: Option<&'a str>,
    /// All labels that came with the request.
    pub labels: Labels,
    /// The layer.
    pub backing: LazyBacking,
    /// What the layer takes when it is complete; containerd reads it once and keeps it.
    pub usage: Usage,
}

impl Store {
    /// Opens or creates `<root>/snapshots.redb` and `<root>/snapshots/`, and removes directories without record.
    pub fn open(root: &Path, layers: Arc<dyn LayerMounts>) -> Result<Self, OpenError> {
        if !fits_options(root) {
            return Err(OpenError::Root { path: root.to_owned() });
        }
        let directories = std::fs::create_dir_all(root)
            .and_then(|()| Directories::open(root))
            .map_err(|source| OpenError::Directory { path: root.to_owned(), source })?;
        let records = Records::open(&root.join("snapshots.redb"))?;
        let next_id = AtomicU64::new(records.next_id().map_err(OpenError::Recover)?);
        let store = Self {
            root: root.to_owned(),
            records,
            directories,
            layers,
            overlay: OverlayOptions::probe(),
            next_id,
            being_created: Mutex::default(),
            layers_in_use: Arc::default(),
        };
        store.sweep().map_err(OpenError::Recover)?;
        Ok(store)
    }

    /// The snapshot `key`.
    pub fn stat(&self, key: &str) -> Result<Snapshot, StoreError> {
        Ok(Snapshot { name: key.to_owned(), record: self.records.get(key)? })
    }

    /// Sets labels of `key`; `paths` is a field mask of `labels` and `labels.KEY`, empty for all labels.
    pub fn update(&self, key: &str, labels: Labels, paths: &[String]) -> Result<Snapshot, StoreError> {
        self.records.update(key, labels, paths)
    }

    /// Disk usage of `key` alone: of an active snapshot counted now, of others as recorded.
    pub fn usage(&self, key: &str) -> Result<Usage, StoreError> {
        let record = self.records.get(key)?;
        match record.kind {
            Kind::Active => self.count(record.id),
            Kind::View | Kind::Committed => Ok(record.usage),
        }
    }

    /// What to mount for the active snapshot or view `key`.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>, StoreError> {
        let chain = self.records.chain(key)?;
        mounts::mounts(key, &chain, &self.directories, &*self.layers, &self.overlay)
    }

    /// Creates an active snapshot or a view, and gives its mounts. Its root belongs to whom the parent's does, or to the
    /// container's root where ids are mapped.
    pub fn create(&self, creation: Creation<'_>) -> Result<Vec<Mount>, StoreError> {
        let Creation { kind, key, parent, labels, declined, id_maps } = creation;
        let is_unpacked_to = labels.contains_key(SNAPSHOT_REF);
        let owner = self.records.parent(parent)?.map(|top| -> Result<_, StoreError> {
            let root = mounts::lower(key, &top, &self.directories, &*self.layers)?;
            Owner::of(&root).map_err(|source| StoreError::Directory { action: "read the owner of", path: root, source })
        });
        let owner = owner.transpose()?;
        let owner = id_maps.as_ref().map(|maps| maps.root).or(owner);
        let new = self.begin();
        self.directories.create(new.id, kind, owner).map_err(|source| StoreError::Directory {
            action: "create",
            path: self.directories.directory(new.id),
            source,
        })?;
        let chain = self.records.create(NewSnapshot { id: new.id, kind, key, parent, labels, declined, id_maps })?;
        let mounts = mounts::check_quarantine(key, &chain.ancestors, &*self.layers, is_unpacked_to)
            .and_then(|()| mounts::mounts(key, &chain, &self.directories, &*self.layers, &self.overlay));
        if mounts.is_err() {
            // A failed Prepare must leave nothing that the next one would find in its way.
            self.records.remove(key)?;
        }
        mounts
    }

    /// Makes the active snapshot `key` the committed snapshot `name`. `labels` replace its own. `parent`, if given, must be
    /// its parent.
    pub fn commit(&self, name: &str, key: &str, parent: Option<&str>, labels: Labels) -> Result<(), StoreError> {
        let record = self.records.get(key)?;
        if record.kind != Kind::Active {
            return Err(StoreError::NotActive { key: key.to_owned() });
        }
        let usage = self.count(record.id)?;
        self.records.commit(name, key, parent, labels, usage)
    }

    /// Removes the snapshot `key`, which must have no children. Its directory goes at the next [`Store::sweep`], its lazy
    /// layer is listed by [`Store::released`].
    pub fn remove(&self, key: &str) -> Result<(), StoreError> {
        self.records.remove(key).map(drop)
    }

    /// All snapshots that `wanted` lets through.
    pub fn list(&self, wanted: impl FnMut(&Snapshot) -> bool) -> Result<Vec<Snapshot>, StoreError> {
        self.records.list(wanted)
    }

    /// The directories that show the layers of `parent` and of those below it, top first; none for no parent. Each is looked up
    /// when it is asked for: an image has up to some hundred, and mostly the first one is enough. Ends after an error.
    pub fn lowers(&self, parent: Option<&str>) -> impl Iterator<Item = Result<PathBuf, StoreError>> + '_ {
        let mut next = parent.map(str::to_owned);
        let lower = move || {
            let name = next.take()?;
            Some(self.records.get(&name).and_then(|record| {
                next.clone_from(&record.parent);
                mounts::lower(&name, &record, &self.directories, &*self.layers)
            }))
        };
        std::iter::from_fn(lower).take(ANCESTORS_MAX)
    }

    /// All committed lazy snapshots, for mounting their layers again after a start.
    pub fn lazy(&self) -> Result<Vec<(Snapshot, LazyBacking)>, StoreError> {
        let all = self.records.list(|snapshot| matches!(snapshot.record.backing, Backing::Lazy(_)))?;
        Ok(all
            .into_iter()
            .filter_map(|snapshot| match &snapshot.record.backing {
                Backing::Lazy(backing) => Some((backing.clone(), snapshot)),
                Backing::Ordinary => None,
            })
            .map(|(backing, snapshot)| (snapshot, backing))
            .collect())
    }

    /// The committed lazy snapshots of the layer with this diffID and of all layers above it, lower ones first.
    pub fn lazy_from(&self, diff_id: Digest) -> Result<Vec<(Snapshot, LazyBacking)>, StoreError> {
        let mut committed = self.records.list(|snapshot| snapshot.record.kind == Kind::Committed)?;
        // A parent was committed before its children were made, so its id is lower.
        committed.sort_by_key(|snapshot| snapshot.record.id);
        let (mut names, mut found) = (HashSet::new(), Vec::new());
        for snapshot in committed {
            let backing = match &snapshot.record.backing {
                Backing::Lazy(backing) => Some(backing.clone()),
                Backing::Ordinary => None,
            };
            let is_it = backing.as_ref().is_some_and(|backing| backing.diff_id == diff_id);
            if is_it || snapshot.record.parent.as_ref().is_some_and(|parent| names.contains(parent)) {
                names.insert(snapshot.name.clone());
                found.extend(backing.map(|backing| (snapshot, backing)));
            }
        }
        Ok(found)
    }

    /// Fails unless `parent` is a committed snapshot or `None`.
    pub fn check_parent(&self, parent: Option<&str>) -> Result<(), StoreError> {
        self.records.parent(parent).map(drop)
    }

    /// The name of the committed lazy snapshot that containerd would take for `target` on `parent`, if there is one and its layer
    /// is not quarantined.
    pub fn lazy_target(&self, target: &str, parent: Option<&str>) -> Result<Option<String>, StoreError> {
        let parent_id = self.records.parent(parent)?.map_or(0, |parent| parent.id);
        for name in [target.to_owned(), second_name(target, parent_id)] {
            match self.records.get(&name) {
                Ok(record)
                    if record.kind == Kind::Committed
                        && record.parent.as_deref() == parent
                        && matches!(&record.backing, Backing::Lazy(backing) if self.layers.quarantine(backing).is_none())
                        && record.labels.get(SNAPSHOT_REF).is_some_and(|label| label == target) =>
                {
                    return Ok(Some(name));
                }
                Ok(_) | Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Keeps the layer with this diffID from being released; waits while a release of it is under way. To be taken before the
    /// engine is asked for the layer, and kept until after [`Store::commit_lazy`].
    pub async fn hold(&self, diff_id: Digest) -> LayerHold {
        self.layers_in_use.hold(diff_id).await
    }

    /// Commits a lazy snapshot and gives its name; if it is there already, nothing happens. The name is the target, or
    /// `TARGET@ID` where the target exists on another parent (containerd finds it by its label, and asks for exactly
    /// its own parent). ID is the parent's id.
    ///
    /// # Panics
    /// In debug builds, if `hold` is of another layer.
    pub fn commit_lazy(&self, hold: &LayerHold, commit: LazyCommit<'_>) -> Result<String, StoreError> {
        let LazyCommit { target, parent, mut labels, backing, usage } = commit;
        debug_assert_eq!(hold.diff_id(), backing.diff_id, "the hold must be of the layer that is committed");
        labels.insert(SNAPSHOT_REF.to_owned(), target.to_owned());
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let commit = |name: &str| self.records.commit_lazy(id, name, parent, &labels, usage, &backing);
        match commit(target)? {
            LazyCommitOutcome::Committed => Ok(target.to_owned()),
            LazyCommitOutcome::Taken { parent_id } => {
                let name = second_name(target, parent_id);
                match commit(&name)? {
                    LazyCommitOutcome::Committed => Ok(name),
                    LazyCommitOutcome::Taken { .. } => Err(StoreError::AlreadyExists { key: name }),
                }
            }
        }
    }

    /// Removes the directories that have no record; gives how many. One that resists is reported after the others were
    /// removed.
    pub fn sweep(&self) -> Result<usize, StoreError> {
        let failed = |action, path, source| StoreError::Directory { action, path, source };
        // The order matters: a directory listed here is either still being created at the second step, or has its record
        // by the third, or belongs to nobody.
        let names = self.directories.names().map_err(|source| failed("list", self.directories.directory(0), source))?;
        let being_created = self.being_created.lock().clone();
        let recorded = self.records.directory_ids()?;
        let mut removed = 0;
        let mut first_error = None;
        for id in names.iter().filter_map(|name| name.parse::<u64>().ok()) {
            if being_created.contains(&id) || recorded.contains(&id) {
                continue;
            }
            match self.directories.remove(id) {
                Ok(()) => removed += 1,
                Err(source) => {
                    first_error.get_or_insert(failed("remove", self.directories.directory(id), source));
                }
            }
        }
        first_error.map_or(Ok(removed), Err)
    }

    /// The layers of removed lazy snapshots that were not let go yet.
    pub fn released(&self) -> Result<Vec<ReleasedRecord>, StoreError> {
        self.records.released()
    }

    /// Starts to let go of a layer; `None` while a snapshot is being made of it. To be ended by [`Store::end_release`];
    /// dropped without it, it comes back in [`Store::released`].
    pub fn begin_release(&self, released: &ReleasedRecord) -> Result<Option<Release>, StoreError> {
        let ReleasedRecord { id, backing } = released;
        let Some(releasing) = self.layers_in_use.release(backing.diff_id) else { return Ok(None) };
        let (mut chain_in_use, mut layer_in_use) = (false, false);
        self.records.list(|snapshot| {
            if let Backing::Lazy(other) = &snapshot.record.backing {
                chain_in_use |= other.chain_id == backing.chain_id;
                layer_in_use |= other.diff_id == backing.diff_id;
            }
            false
        })?;
        Ok(Some(Release::new(*id, backing.clone(), (chain_in_use, layer_in_use), releasing)))
    }

    /// Keeps snapshots from being made of a layer that none names, to free it; `None` where one names it or is being made.
    pub fn begin_orphan(&self, diff_id: Digest) -> Result<Option<OrphanRelease>, StoreError> {
        let Some(releasing) = self.layers_in_use.release(diff_id) else { return Ok(None) };
        let mut is_named = false;
        self.records.list(|snapshot| {
            is_named |= matches!(&snapshot.record.backing, Backing::Lazy(backing) if backing.diff_id == diff_id);
            false
        })?;
        Ok((!is_named).then(|| OrphanRelease::new(releasing)))
    }

    /// Bytes that everything below the root takes on the disk, as `du` counts them. Walks all of it.
    pub fn disk_bytes(&self) -> Result<u64, StoreError> {
        let usage = disk_usage(&self.root);
        let failed = |source| StoreError::Directory { action: "count the usage of", path: self.root.clone(), source };
        Ok(usage.map_err(failed)?.size_bytes)
    }

    /// Notes that the layer was let go.
    pub fn end_release(&self, release: Release) -> Result<(), StoreError> {
        self.records.forget_released(release.id)
    }

    fn begin(&self) -> BeingCreated<'_> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        self.being_created.lock().insert(id);
        BeingCreated { store: self, id }
    }

    fn count(&self, id: u64) -> Result<Usage, StoreError> {
        let path = self.directories.files(id);
        disk_usage(&path).map_err(|source| StoreError::Directory { action: "count the usage of", path, source })
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("directories", &self.directories).finish_non_exhaustive()
    }
}

/// An id whose directory must not be swept although it has no record.
struct BeingCreated<'a> {
    store: &'a Store,
    id: u64,
}

impl Drop for BeingCreated<'_> {
    fn drop(&mut self) {
        self.store.being_created.lock().remove(&self.id);
    }
}

fn second_name(target: &str, parent_id: u64) -> String {
    format!("{target}@{parent_id}")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io;

    use layer::ChainId;
    use node::source::BlobRef;

    use super::*;
    use crate::snapshots::mounts::NoLayerMounts;

    struct Mounted(PathBuf);

    impl LayerMounts for Mounted {
        fn lower(&self, _: u64, _: &LazyBacking) -> io::Result<PathBuf> {
            Ok(self.0.clone())
        }
    }

    fn open() -> (tempfile::TempDir, Store) {
        let root = tempfile::tempdir().expect("temporary directory");
        let mounted = root.path().join("mounted");
        fs::create_dir(&mounted).expect("creates");
        let store = Store::open(root.path(), Arc::new(Mounted(mounted))).expect("opens");
        (root, store)
    }

    fn backing(tar: &[u8]) -> LazyBacking {
        let diff_id = Digest::of(tar);
        let blob = BlobRef {
            registry: "r".into(),
            repository: "a".into(),
            digest: Digest::of(b"blob"),
            size: 1,
            media_type: String::new(),
            urls: Vec::new(),
        };
        LazyBacking::new(&blob, diff_id, ChainId::bottom(diff_id))
    }

    async fn commit_lazy(store: &Store, target: &str, parent: Option<&str>, tar: &[u8]) -> String {
        let backing = backing(tar);
        let hold = store.hold(backing.diff_id).await;
        let usage = Usage { size_bytes: 5, inodes: 2 };
        store.commit_lazy(&hold, LazyCommit { target, parent, labels: Labels::new(), backing, usage }).expect("commits")
    }

    fn directories(root: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(root.join("snapshots"))
            .expect("reads")
            .map(|entry| entry.expect("reads").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn why_a_layer_was_declined_outlives_its_commit_and_the_daemon() {
        let (root, store) = open();
        let declined = Some("no seeder".to_owned());
        store
            .create(Creation { declined: declined.clone(), ..Creation::new(Kind::Active, "a", None) })
            .expect("creates");
        store.commit("name", "a", None, Labels::new()).expect("commits");
        drop(store);
        let store = Store::open(root.path(), Arc::new(NoLayerMounts)).expect("opens");
        assert_eq!(store.stat("name").expect("is there").record.declined, declined);
    }

    #[test]
    fn the_root_of_a_container_with_ids_of_its_own_is_its_root() {
        use std::os::unix::fs::MetadataExt;
        let (root, store) = open();
        let owner = match rustix::process::geteuid().as_raw() {
            0 => Owner { uid: 1234, gid: 5678 },
            uid => Owner { uid, gid: rustix::process::getegid().as_raw() },
        };
        let id_maps = Some(IdMaps { uid: "0:1234:10".into(), gid: "0:5678:10".into(), root: owner });
        let creation = Creation { id_maps, ..Creation::new(Kind::Active, "a", None) };
        let mounts = store.create(creation).expect("creates");
        assert_eq!(mounts[0].options, ["uidmap=0:1234:10", "gidmap=0:5678:10", "rw", "rbind"]);
        let files = fs::metadata(root.path().join("snapshots/1/fs")).expect("is there");
        assert_eq!(Owner { uid: files.uid(), gid: files.gid() }, owner);
    }

    #[test]
    fn usage_is_counted_while_active_and_kept_at_commit() {
        let (root, store) = open();
        store.create(Creation::new(Kind::Active, "a", None)).expect("creates");
        fs::write(root.path().join("snapshots/1/fs/file"), vec![1; 50_000]).expect("writes");
        let active = store.usage("a").expect("counts");
        assert!(active.size_bytes >= 50_000 && active.inodes == 2, "{active:?}");
        store.commit("c", "a", None, Labels::new()).expect("commits");
        fs::remove_file(root.path().join("snapshots/1/fs/file")).expect("removes");
        assert_eq!(store.usage("c").expect("is recorded"), active);
    }

    #[test]
    fn directories_go_after_their_records() {
        let (root, store) = open();
        store.create(Creation::new(Kind::Active, "a", None)).expect("creates");
        store.create(Creation::new(Kind::View, "v", None)).expect("creates");
        assert!(store.create(Creation::new(Kind::View, "v", None)).is_err());
        store.remove("a").expect("removes");
        assert_eq!(directories(root.path()), ["1", "2", "3"]);
        assert_eq!(store.sweep().expect("sweeps"), 2);
        assert_eq!(directories(root.path()), ["2"]);
        fs::create_dir_all(root.path().join("snapshots/77/fs")).expect("creates");
        drop(store);
        let store = Store::open(root.path(), Arc::new(NoLayerMounts)).expect("opens");
        assert_eq!(directories(root.path()), ["2"]);
        assert_eq!(store.stat("v").expect("is there").record.id, 2);
    }

    #[tokio::test]
    async fn a_target_is_found_under_its_parent_only() {
        let (_root, store) = open();
        assert_eq!(store.lazy_target("t", None).expect("looks"), None);
        assert_eq!(commit_lazy(&store, "t", None, b"t").await, "t");
        assert_eq!(commit_lazy(&store, "t", None, b"t").await, "t");
        assert_eq!(store.lazy_target("t", None).expect("looks").as_deref(), Some("t"));
        assert_eq!(store.usage("t").expect("is recorded").size_bytes, 5);

        store.create(Creation::new(Kind::Active, "k", None)).expect("creates");
        store.commit("ordinary", "k", None, Labels::new()).expect("commits");
        assert_eq!(store.lazy_target("t", Some("ordinary")).expect("looks"), None);
        assert_eq!(store.lazy_target("ordinary", None).expect("looks"), None);
        let name = commit_lazy(&store, "t", Some("ordinary"), b"t").await;
        assert_eq!(store.lazy_target("t", Some("ordinary")).expect("looks"), Some(name.clone()));
        assert_eq!(store.stat(&name).expect("is there").record.labels[SNAPSHOT_REF], "t");
        assert!(store.lazy_target("t", Some("nobody")).is_err());
        assert_eq!(store.lazy().expect("lists").len(), 2);
    }

    #[tokio::test]
    async fn what_stands_on_a_layer_is_found_through_ordinary_snapshots() {
        let (_root, store) = open();
        for (target, parent, tar) in
            [("a", None, b"a"), ("b", Some("a"), b"b"), ("c", None, b"c"), ("a2", Some("c"), b"a")]
        {
            commit_lazy(&store, target, parent, tar).await;
        }
        store.create(Creation::new(Kind::Active, "k", Some("b"))).expect("creates");
        store.commit("unpacked", "k", None, Labels::new()).expect("commits");
        commit_lazy(&store, "d", Some("unpacked"), b"d").await;
        let names = |tar: &[u8]| -> Vec<String> {
            let found = store.lazy_from(Digest::of(tar)).expect("lists");
            found.into_iter().map(|(snapshot, _)| snapshot.name).collect()
        };
        assert_eq!(names(b"a"), ["a", "b", "a2", "d"]);
        assert_eq!(names(b"c"), ["c", "a2"]);
        assert_eq!(names(b"d"), ["d"]);
        assert!(names(b"x").is_empty());
    }

    #[tokio::test]
    async fn a_removed_layer_is_released_once_and_never_under_a_hold() {
        let (_root, store) = open();
        commit_lazy(&store, "one", None, b"x").await;
        commit_lazy(&store, "two", Some("one"), b"x").await;
        store.remove("two").expect("removes");
        let released = store.released().expect("lists");
        let hold = store.hold(Digest::of(b"x")).await;
        assert!(store.begin_release(&released[0]).expect("looks").is_none());
        drop(hold);
        let release = store.begin_release(&released[0]).expect("looks").expect("is free");
        assert!(release.chain_in_use && release.layer_in_use);
        store.end_release(release).expect("ends");
        store.remove("one").expect("removes");
        let released = store.released().expect("lists");
        assert_eq!(released.len(), 1);
        let release = store.begin_release(&released[0]).expect("looks").expect("is free");
        assert!(!release.chain_in_use && !release.layer_in_use);
        drop(release);
        assert_eq!(store.released().expect("lists").len(), 1);
    }

    #[tokio::test]
    async fn a_container_on_a_lazy_layer_has_the_owner_of_its_root() {
        let (root, store) = open();
        commit_lazy(&store, "t", None, b"t").await;
        let mounts = store.create(Creation::new(Kind::Active, "c", Some("t"))).expect("creates");
        assert_eq!(mounts[0].kind, "overlay");
        assert!(mounts[0].options.contains(&format!("lowerdir={}", root.path().join("mounted").display())));
        drop(store);
        // The mount is gone: the prepared snapshot says so and leaves nothing behind.
        let store = Store::open(root.path(), Arc::new(NoLayerMounts)).expect("opens");
        assert!(matches!(store.mounts("c"), Err(StoreError::Layer { .. })));
        assert!(matches!(store.create(Creation::new(Kind::Active, "d", Some("t"))), Err(StoreError::Layer { .. })));
        assert!(matches!(store.stat("d"), Err(StoreError::NotFound { .. })));
    }

    #[test]
    fn roots_that_break_mount_options_are_refused() {
        for root in ["relative", "/tmp/a:b", "/tmp/a,b"] {
            let error = Store::open(Path::new(root), Arc::new(NoLayerMounts)).expect_err("is refused");
            assert!(matches!(error, OpenError::Root { .. }), "{error}");
        }
    }
}
