//! The records of all snapshots in one redb file, and containerd's rules on keys, parents and kinds
//! (`core/snapshots/storage/bolt.go` is the reference). Every change is one durable transaction.
//!
//! Tables: `meta` (`format`, `next_id`), `snapshots` (key or name → record as JSON), `children` ((parent's id, id) → key or
//! name), `released` (id → JSON of the lazy layer whose snapshot was removed, until the engine has let go of it).

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::RwLock;
use redb::{Database, ReadableDatabase as _, ReadableTable, TableDefinition, WriteTransaction};

use super::error::{OpenError, StoreError};
use super::id_maps::IdMaps;
use super::record::{Backing, Kind, Labels, LazyBacking, Record, Snapshot, Usage};

/// Longest key or name in bytes. Chosen: containerd's keys are below 200 bytes; its suite uses paths as keys.
pub const KEY_BYTES_MAX: usize = 4096;

/// Format of the file. 1: as this module's documentation says.
const FORMAT: u64 = 1;

/// Page cache of the database. Chosen: some thousand snapshots take below 10 MiB.
const CACHE_BYTES: usize = 8 << 20;

/// Longest chain of parents; bounds the walk if records are damaged. The kernel takes 500 lower directories.
pub(super) const ANCESTORS_MAX: usize = 1000;

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const SNAPSHOTS: TableDefinition<&str, &[u8]> = TableDefinition::new("snapshots");
const CHILDREN: TableDefinition<(u64, u64), &str> = TableDefinition::new("children");
const RELEASED: TableDefinition<u64, &[u8]> = TableDefinition::new("released");

/// The open file.
#[derive(Debug)]
pub struct Records {
    place: Box<dyn Place>,
    /// `None` after a failure of the disk, until the file could be opened again.
    database: RwLock<Option<Database>>,
}

/// Where the records are.
trait Place: std::fmt::Debug + Send + Sync {
    /// For errors.
    fn path(&self) -> &Path;

    /// Opens the database, or makes it where there is none.
    fn open(&self) -> Result<Database, OpenError>;

    /// The database is open, and one of this version's.
    fn settle(&self) {}
}

/// A file.
#[derive(Debug)]
struct OnDisk(PathBuf);

/// A snapshot that is to be created as an active one or a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot<'a> {
    /// From [`Records::next_id`], used once.
    pub id: u64,
    /// [`Kind::Active`] or [`Kind::View`].
    pub kind: Kind,
    /// Its key.
    pub key: &'a str,
    /// Name of its parent.
    pub parent: Option<&'a str>,
    /// Its labels.
    pub labels: Labels,
    /// See [`Record::declined`].
    pub declined: Option<String>,
    /// See [`Record::id_maps`].
    pub id_maps: Option<IdMaps>,
}

/// A snapshot and all snapshots below it, nearest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The snapshot that was asked for.
    pub record: Record,
    /// Parent, its parent, and so on.
    pub ancestors: Vec<Record>,
}

/// A lazy layer whose snapshot was removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleasedRecord {
    /// Id of the removed snapshot.
    pub id: u64,
    /// What it stood on.
    pub backing: LazyBacking,
}

impl Records {
    /// Opens or creates the file at `path`. A file that was not closed is repaired; every page's checksum is verified.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Self::open_at(Box::new(OnDisk(path.to_owned())))
    }

    /// The same wherever they are.
    fn open_at(place: Box<dyn Place>) -> Result<Self, OpenError> {
        let database = open_database(&*place)?;
        Ok(Self { place, database: RwLock::new(Some(database)) })
    }

    /// The smallest id that no record ever had.
    pub fn next_id(&self) -> Result<u64, StoreError> {
        let meta = self.with(|database| Ok(database.begin_read()?.open_table(META)?))?;
        Ok(meta.get(NEXT_ID)?.map_or(1, |next| next.value()))
    }

    /// The record of `key`.
    pub fn get(&self, key: &str) -> Result<Record, StoreError> {
        let table = self.with(|database| Ok(database.begin_read()?.open_table(SNAPSHOTS)?))?;
        find(&table, key)?.ok_or_else(|| StoreError::NotFound { key: key.to_owned() })
    }

    /// The record of `key` and of all below it.
    pub fn chain(&self, key: &str) -> Result<Chain, StoreError> {
        let table = self.with(|database| Ok(database.begin_read()?.open_table(SNAPSHOTS)?))?;
        let record = find(&table, key)?.ok_or_else(|| StoreError::NotFound { key: key.to_owned() })?;
        let ancestors = ancestors(&table, key, record.parent.as_deref())?;
        Ok(Chain { record, ancestors })
    }

    /// The committed snapshot `parent`.
    pub fn parent(&self, parent: Option<&str>) -> Result<Option<Record>, StoreError> {
        let table = self.with(|database| Ok(database.begin_read()?.open_table(SNAPSHOTS)?))?;
        committed_parent(&table, parent)
    }

    /// All snapshots that `wanted` lets through, in the order of their keys.
    pub fn list(&self, mut wanted: impl FnMut(&Snapshot) -> bool) -> Result<Vec<Snapshot>, StoreError> {
        let table = self.with(|database| Ok(database.begin_read()?.open_table(SNAPSHOTS)?))?;
        let mut found = Vec::new();
        for entry in table.iter()? {
            let (name, record) = entry?;
            let name = name.value().to_owned();
            let snapshot = Snapshot { record: decode(&name, record.value())?, name };
            if wanted(&snapshot) {
                found.push(snapshot);
            }
        }
        Ok(found)
    }

    /// The ids of all snapshots with a directory of their own.
    pub fn directory_ids(&self) -> Result<HashSet<u64>, StoreError> {
        let mut ids = HashSet::new();
        self.list(|snapshot| {
            if snapshot.record.backing == Backing::Ordinary {
                ids.insert(snapshot.record.id);
            }
            false
        })?;
        Ok(ids)
    }

    /// Creates the record of an active snapshot or a view, and gives it with its ancestors.
    pub fn create(&self, new: NewSnapshot<'_>) -> Result<Chain, StoreError> {
        check_key(new.key)?;
        self.write(|transaction| {
            let mut table = transaction.open_table(SNAPSHOTS)?;
            let parent = committed_parent(&table, new.parent)?;
            if table.get(new.key)?.is_some() {
                return Err(StoreError::AlreadyExists { key: new.key.to_owned() });
            }
            let now = now();
            let record = Record {
                id: new.id,
                kind: new.kind,
                parent: new.parent.map(str::to_owned),
                labels: new.labels,
                created: now,
                updated: now,
                usage: Usage::default(),
                backing: Backing::Ordinary,
                declined: new.declined,
                id_maps: new.id_maps,
            };
            let ancestors = ancestors(&table, new.key, new.parent)?;
            put(&mut table, new.key, &record)?;
            link(transaction, parent.as_ref(), record.id, new.key)?;
            use_id(transaction, record.id)?;
            Ok(Chain { record, ancestors })
        })
    }

    /// Makes the active snapshot `key` the committed snapshot `name`. It keeps its id; `labels` replace its own.
    /// `parent`, if given, must be the snapshot's own parent.
    pub fn commit(
        &self,
        name: &str,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
        usage: Usage,
    ) -> Result<(), StoreError> {
        check_key(name)?;
        self.write(|transaction| {
            let mut table = transaction.open_table(SNAPSHOTS)?;
            if table.get(name)?.is_some() {
                return Err(StoreError::AlreadyExists { key: name.to_owned() });
            }
            let mut record = find(&table, key)?.ok_or_else(|| StoreError::NotFound { key: key.to_owned() })?;
            if record.kind != Kind::Active {
                return Err(StoreError::NotActive { key: key.to_owned() });
            }
            match (parent, record.parent.as_deref()) {
                (None, _) => {}
                (Some(given), Some(own)) if given == own => {}
                (Some(_), Some(_)) => return Err(StoreError::ParentChange { key: key.to_owned() }),
                (Some(_), None) => return Err(StoreError::RebaseUnsupported { key: key.to_owned() }),
            }
            let parent = committed_parent(&table, record.parent.as_deref())?;
            let now = now();
            record.kind = Kind::Committed;
            record.labels = labels;
            record.usage = usage;
            (record.created, record.updated) = (now, now);
            put(&mut table, name, &record)?;
            table.remove(key)?;
            link(transaction, parent.as_ref(), record.id, name)
        })
    }

    /// Creates a committed lazy snapshot. If `name` is there already with the same parent, nothing but its labels change:
    /// those of `labels` that it lacks are added.
    pub fn commit_lazy(
        &self,
        id: u64,
        name: &str,
        parent: Option<&str>,
        labels: &Labels,
        usage: Usage,
        backing: &LazyBacking,
    ) -> Result<LazyCommitOutcome, StoreError> {
        check_key(name)?;
        self.write(|transaction| {
            let mut table = transaction.open_table(SNAPSHOTS)?;
            let parent_record = committed_parent(&table, parent)?;
            if let Some(mut there) = find(&table, name)? {
                if there.kind != Kind::Committed || there.parent.as_deref() != parent {
                    return Ok(LazyCommitOutcome::Taken { parent_id: parent_record.map_or(0, |parent| parent.id) });
                }
                let before = there.labels.len();
                for (label, value) in labels {
                    there.labels.entry(label.clone()).or_insert_with(|| value.clone());
                }
                if there.labels.len() != before {
                    put(&mut table, name, &there)?;
                }
                return Ok(LazyCommitOutcome::Committed);
            }
            let now = now();
            let record = Record {
                id,
                kind: Kind::Committed,
                parent: parent.map(str::to_owned),
                labels: labels.clone(),
                created: now,
                updated: now,
                usage,
                backing: Backing::Lazy(backing.clone()),
                declined: None,
                id_maps: None,
            };
            put(&mut table, name, &record)?;
            link(transaction, parent_record.as_ref(), id, name)?;
            use_id(transaction, id)?;
            Ok(LazyCommitOutcome::Committed)
        })
    }

    /// Sets labels. `paths` are `labels` or `labels.KEY`; none means all labels. Labels with an empty value are removed, as
    /// containerd does: that is how its clients delete a label.
    pub fn update(&self, key: &str, labels: Labels, paths: &[String]) -> Result<Snapshot, StoreError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(SNAPSHOTS)?;
            let mut record = find(&table, key)?.ok_or_else(|| StoreError::NotFound { key: key.to_owned() })?;
            if paths.is_empty() {
                record.labels.clone_from(&labels);
            }
            for path in paths {
                if path == "labels" {
                    record.labels.clone_from(&labels);
                } else if let Some(label) = path.strip_prefix("labels.") {
                    record.labels.insert(label.to_owned(), labels.get(label).cloned().unwrap_or_default());
                } else {
                    return Err(StoreError::InvalidField { path: path.clone(), key: key.to_owned() });
                }
            }
            record.labels.retain(|_, value| !value.is_empty());
            record.updated = now();
            put(&mut table, key, &record)?;
            Ok(Snapshot { name: key.to_owned(), record })
        })
    }

    /// Removes the record of `key`, which must have no children. The layer of a lazy one is noted as released in the same
    /// transaction.
    pub fn remove(&self, key: &str) -> Result<Record, StoreError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(SNAPSHOTS)?;
            let record = find(&table, key)?.ok_or_else(|| StoreError::NotFound { key: key.to_owned() })?;
            let mut children = transaction.open_table(CHILDREN)?;
            if let Some(child) = children.range((record.id, 0)..=(record.id, u64::MAX))?.next() {
                let (_, child) = child?;
                return Err(StoreError::HasChildren { key: key.to_owned(), child: child.value().to_owned() });
            }
            if let Some(parent) = &record.parent {
                let parent = find(&table, parent)?
                    .ok_or_else(|| damaged(key, format_args!("its parent {parent:?} is missing")))?;
                children.remove((parent.id, record.id))?;
            }
            table.remove(key)?;
            if let Backing::Lazy(backing) = &record.backing {
                transaction.open_table(RELEASED)?.insert(record.id, encode(key, backing)?.as_slice())?;
            }
            Ok(record)
        })
    }

    /// The layers of removed lazy snapshots that were not [forgotten](Self::forget_released) yet.
    pub fn released(&self) -> Result<Vec<ReleasedRecord>, StoreError> {
        let table = self.with(|database| Ok(database.begin_read()?.open_table(RELEASED)?))?;
        let mut released = Vec::new();
        for entry in table.iter()? {
            let (id, backing) = entry?;
            let id = id.value();
            released.push(ReleasedRecord { id, backing: decode(&format!("removed snapshot {id}"), backing.value())? });
        }
        Ok(released)
    }

    /// Ends the note that the layer of removed snapshot `id` is released.
    pub fn forget_released(&self, id: u64) -> Result<(), StoreError> {
        self.write(|transaction| {
            transaction.open_table(RELEASED)?.remove(id)?;
            Ok(())
        })
    }

    fn write<T>(&self, change: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.with(|database| {
            let transaction = database.begin_write()?;
            // A dropped transaction is rolled back.
            let result = change(&transaction)?;
            transaction.commit()?;
            Ok(result)
        })
    }

    /// Runs `work` on the open database. After a failure of the disk redb answers nothing any more until the file is opened again
    /// (`StorageError::PreviousIo`), so that is done: a disk that was full for a moment must not stop the daemon.
    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, StoreError>) -> Result<T, StoreError> {
        if self.database.read().is_none() {
            let mut database = self.database.write();
            if database.is_none() {
                self.reopen(&mut database)?;
            }
        }
        let result = match &*self.database.read() {
            Some(open) => work(open),
            None => Err(redb::StorageError::DatabaseClosed.into()),
        };
        if let Err(StoreError::Records(error)) = &result
            && matches!(**error, redb::Error::Io(_) | redb::Error::PreviousIo)
        {
            tracing::error!(path = %self.place.path().display(), %error, "cannot use the snapshot records: opening them again");
            // If that fails too, the next call tries again; what failed now is the answer in any case.
            let _ = self.reopen(&mut self.database.write());
        }
        result
    }

    fn reopen(&self, database: &mut Option<Database>) -> Result<(), StoreError> {
        *database = None;
        match open_database(&*self.place) {
            Ok(opened) => *database = Some(opened),
            Err(OpenError::Records { source, .. }) => return Err(StoreError::Records(source)),
            // A read that is under way still has the file: the next call tries again.
            Err(_) => return Err(redb::StorageError::DatabaseClosed.into()),
        }
        Ok(())
    }
}

/// What became of a lazy commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LazyCommitOutcome {
    /// The snapshot is there.
    Committed,
    /// The name belongs to another snapshot.
    Taken {
        /// Id of the parent that was asked for; 0 without parent.
        parent_id: u64,
    },
}

const NEXT_ID: &str = "next_id";

fn open_database(place: &dyn Place) -> Result<Database, OpenError> {
    let database = place.open()?;
    let found = initialise(&database).map_err(failed(place.path()))?;
    if found > FORMAT {
        let path = place.path().to_owned();
        return Err(OpenError::NewerFormat { path, found, supported: FORMAT });
    }
    place.settle();
    Ok(database)
}

fn failed(path: &Path) -> impl Fn(redb::Error) -> OpenError + '_ {
    |error| OpenError::Records { path: path.to_owned(), source: Box::new(error) }
}

impl Place for OnDisk {
    fn path(&self) -> &Path {
        &self.0
    }

    fn open(&self) -> Result<Database, OpenError> {
        let Self(path) = self;
        create_database(path).map_err(|error| failed(path)(error.into()))?;
        builder().open(path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => OpenError::InUse { path: path.to_owned() },
            error => failed(path)(error.into()),
        })
    }

    fn settle(&self) {
        // What cannot be had now was not needed yet.
        let _ = fill_holes(&self.0);
    }
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder
}

/// Makes the file where there is none. It gets its name when it is whole and on the disk: redb takes a file whose making was
/// cut off for no database, and would never open it again.
fn create_database(path: &Path) -> Result<(), redb::DatabaseError> {
    use rustix::fs::{AtFlags, CWD, Mode, OFlags};

    if path.exists() {
        return Ok(());
    }
    let directory = path.parent().unwrap_or(Path::new("."));
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::open(directory, flags, Mode::from_raw_mode(0o600)).map_err(io)?);
    let nameless = file.try_clone().map_err(redb::StorageError::Io)?;
    drop(builder().create_with_backend(redb::backends::FileBackend::new(file)?)?);
    let descriptor = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&nameless));
    match rustix::fs::linkat(CWD, descriptor, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        // Another process was as quick; only one of the two will have it open.
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(error) => return Err(io(error)),
    }
    std::fs::File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| redb::StorageError::Io(error).into())
}

fn io(error: rustix::io::Errno) -> redb::DatabaseError {
    redb::StorageError::Io(error.into()).into()
}

/// Writes zeros where the file has no blocks: it is sparse at first. With blocks below all of it a removal needs no new one, so
/// that removing images helps on a full disk; and where they were written to, a commit has to sync pages only and not the file
/// system's own records of them, which takes half as long again and more where others make files meanwhile.
fn fill_holes(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;

    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    let len = file.metadata()?.len();
    let zeros = [0; 64 << 10];
    let mut at = 0;
    while at < len {
        let start = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(at))?.min(len);
        let end = match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(start)) {
            Err(rustix::io::Errno::NXIO) => len,
            end => end?,
        };
        at = start;
        while at < end {
            let part = (end - at).min(zeros.len() as u64);
            file.write_all_at(&zeros[..part as usize], at)?;
            at += part;
        }
    }
    file.sync_data()
}

/// Makes the tables of a new file; gives the file's format.
fn initialise(database: &Database) -> Result<u64, redb::Error> {
    let transaction = database.begin_write()?;
    let found = {
        let mut meta = transaction.open_table(META)?;
        let found = meta.get("format")?.map(|format| format.value());
        match found {
            Some(found) if found > FORMAT => return Ok(found),
            Some(found) => found,
            None => {
                meta.insert("format", FORMAT)?;
                FORMAT
            }
        }
    };
    transaction.open_table(SNAPSHOTS)?;
    transaction.open_table(CHILDREN)?;
    transaction.open_table(RELEASED)?;
    transaction.commit()?;
    Ok(found)
}

type Bytes = &'static [u8];

fn find(table: &impl ReadableTable<&'static str, Bytes>, key: &str) -> Result<Option<Record>, StoreError> {
    table.get(key)?.map(|record| decode(key, record.value())).transpose()
}

fn put(table: &mut redb::Table<'_, &'static str, Bytes>, key: &str, record: &Record) -> Result<(), StoreError> {
    table.insert(key, encode(key, record)?.as_slice())?;
    Ok(())
}

/// The record of `parent`, which must be committed where it is given.
fn committed_parent(
    table: &impl ReadableTable<&'static str, Bytes>,
    parent: Option<&str>,
) -> Result<Option<Record>, StoreError> {
    let Some(parent) = parent else { return Ok(None) };
    let record = find(table, parent)?.ok_or_else(|| StoreError::ParentNotFound { parent: parent.to_owned() })?;
    if record.kind != Kind::Committed {
        return Err(StoreError::ParentNotCommitted { parent: parent.to_owned() });
    }
    Ok(Some(record))
}

fn ancestors(
    table: &impl ReadableTable<&'static str, Bytes>,
    key: &str,
    parent: Option<&str>,
) -> Result<Vec<Record>, StoreError> {
    let mut chain: Vec<Record> = Vec::new();
    let mut next = parent.map(str::to_owned);
    while let Some(name) = next {
        if chain.len() == ANCESTORS_MAX {
            return Err(damaged(key, format_args!("more than {ANCESTORS_MAX} snapshots below it")));
        }
        let record = find(table, &name)?.ok_or_else(|| damaged(key, format_args!("{name:?} below it is missing")))?;
        next = record.parent.clone();
        chain.push(record);
    }
    Ok(chain)
}

fn link(transaction: &WriteTransaction, parent: Option<&Record>, id: u64, key: &str) -> Result<(), StoreError> {
    if let Some(parent) = parent {
        transaction.open_table(CHILDREN)?.insert((parent.id, id), key)?;
    }
    Ok(())
}

fn use_id(transaction: &WriteTransaction, id: u64) -> Result<(), StoreError> {
    let mut meta = transaction.open_table(META)?;
    let next = meta.get(NEXT_ID)?.map_or(1, |next| next.value());
    meta.insert(NEXT_ID, next.max(id + 1))?;
    Ok(())
}

fn check_key(key: &str) -> Result<(), StoreError> {
    if key.is_empty() || key.len() > KEY_BYTES_MAX || key.contains('\0') {
        return Err(StoreError::InvalidKey { key: key.chars().take(100).collect() });
    }
    Ok(())
}

fn encode(key: &str, value: &impl serde::Serialize) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(|error| damaged(key, format_args!("{error}")))
}

fn decode<T: serde::de::DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| damaged(key, format_args!("{error}")))
}

fn damaged(key: &str, reason: std::fmt::Arguments<'_>) -> StoreError {
    StoreError::Damaged { key: key.to_owned(), reason: reason.to_string() }
}

/// The time; not before 1970, which the stored form cannot hold.
fn now() -> SystemTime {
    SystemTime::now().max(UNIX_EPOCH)
}

#[cfg(test)]
mod power;

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> (tempfile::TempDir, Records) {
        let directory = tempfile::tempdir().expect("temporary directory");
        let records = Records::open(&directory.path().join("snapshots.redb")).expect("opens");
        (directory, records)
    }

    fn create(records: &Records, kind: Kind, key: &str, parent: Option<&str>) -> Result<Chain, StoreError> {
        let id = records.next_id()?;
        records.create(NewSnapshot { id, kind, key, parent, labels: Labels::new(), declined: None, id_maps: None })
    }

    fn committed(records: &Records, name: &str, parent: Option<&str>) -> u64 {
        let id = create(records, Kind::Active, &format!("{name}-key"), parent).expect("creates").record.id;
        let usage = Usage { size_bytes: 1, inodes: 1 };
        records.commit(name, &format!("{name}-key"), None, Labels::new(), usage).expect("commits");
        id
    }

    fn backing() -> LazyBacking {
        let diff_id = layer::Digest::of(b"tar");
        LazyBacking {
            blob: layer::Digest::of(b"blob"),
            diff_id,
            chain_id: layer::ChainId::bottom(diff_id),
            registry: "r".into(),
            repository: "a".into(),
            blob_size: 1,
            media_type: String::new(),
            urls: Vec::new(),
            content_namespace: None,
        }
    }

    #[test]
    fn commit_moves_the_record_and_keeps_the_id() {
        let (_directory, records) = open();
        let id = committed(&records, "base", None);
        assert!(matches!(records.get("base-key"), Err(StoreError::NotFound { .. })));
        let base = records.get("base").expect("is there");
        assert_eq!((base.id, base.kind, base.usage.size_bytes), (id, Kind::Committed, 1));
        let chain = create(&records, Kind::View, "view", Some("base")).expect("creates");
        assert_eq!(chain.ancestors, [base]);
        assert_eq!(records.chain("view").expect("is there"), chain);
    }

    #[test]
    fn parents_must_be_committed() {
        let (_directory, records) = open();
        create(&records, Kind::Active, "active", None).expect("creates");
        assert!(matches!(
            create(&records, Kind::Active, "k", Some("active")),
            Err(StoreError::ParentNotCommitted { .. })
        ));
        assert!(matches!(create(&records, Kind::Active, "k", Some("nobody")), Err(StoreError::ParentNotFound { .. })));
        assert!(matches!(records.get("k"), Err(StoreError::NotFound { .. })));
    }

    #[test]
    fn names_and_keys_share_one_space() {
        let (_directory, records) = open();
        committed(&records, "base", None);
        assert!(matches!(create(&records, Kind::View, "base", None), Err(StoreError::AlreadyExists { .. })));
        create(&records, Kind::Active, "key", None).expect("creates");
        let commit = |name| records.commit(name, "key", None, Labels::new(), Usage::default());
        assert!(matches!(commit("base"), Err(StoreError::AlreadyExists { .. })));
        assert!(matches!(commit("key"), Err(StoreError::AlreadyExists { .. })));
        assert!(matches!(commit(""), Err(StoreError::InvalidKey { .. })));
    }

    #[test]
    fn only_active_snapshots_are_committed_and_only_under_their_parent() {
        let (_directory, records) = open();
        committed(&records, "base", None);
        committed(&records, "other", None);
        let commit = |key, parent| records.commit("name", key, parent, Labels::new(), Usage::default());
        create(&records, Kind::View, "view", Some("base")).expect("creates");
        assert!(matches!(commit("view", None), Err(StoreError::NotActive { .. })));
        assert!(matches!(commit("base", None), Err(StoreError::NotActive { .. })));
        assert!(matches!(commit("nobody", None), Err(StoreError::NotFound { .. })));
        create(&records, Kind::Active, "top", Some("base")).expect("creates");
        assert!(matches!(commit("top", Some("other")), Err(StoreError::ParentChange { .. })));
        create(&records, Kind::Active, "bottom", None).expect("creates");
        assert!(matches!(commit("bottom", Some("base")), Err(StoreError::RebaseUnsupported { .. })));
        commit("top", Some("base")).expect("commits");
    }

    #[test]
    fn only_leaves_are_removed_and_ids_never_return() {
        let (_directory, records) = open();
        let base = committed(&records, "base", None);
        let top = committed(&records, "top", Some("base"));
        assert!(matches!(records.remove("base"), Err(StoreError::HasChildren { child, .. }) if child == "top"));
        assert_eq!(records.remove("top").expect("removes").id, top);
        assert_eq!(records.remove("base").expect("removes").id, base);
        assert!(matches!(records.remove("base"), Err(StoreError::NotFound { .. })));
        assert!(records.next_id().expect("reads") > top);
        assert!(records.directory_ids().expect("reads").is_empty());
    }

    #[test]
    fn update_follows_the_mask() {
        let (_directory, records) = open();
        create(&records, Kind::Active, "a", None).expect("creates");
        let labels = |pairs: &[(&str, &str)]| -> Labels {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        let update = |given: &[(&str, &str)], paths: &[&str]| {
            let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
            records.update("a", labels(given), &paths).map(|snapshot| snapshot.record.labels)
        };
        assert_eq!(update(&[("x", "1"), ("y.z", "2")], &[]).expect("updates"), labels(&[("x", "1"), ("y.z", "2")]));
        let partial = update(&[("x", "3"), ("w", "4"), ("ignored", "5")], &["labels.x", "labels.w", "labels.y.z"]);
        assert_eq!(partial.expect("updates"), labels(&[("x", "3"), ("w", "4")]));
        assert!(matches!(update(&[("x", "9")], &["labels", "parent"]), Err(StoreError::InvalidField { .. })));
        assert_eq!(records.get("a").expect("is there").labels, labels(&[("x", "3"), ("w", "4")]));
        assert!(matches!(records.update("b", Labels::new(), &[]), Err(StoreError::NotFound { .. })));
    }

    #[test]
    fn lazy_commit_is_idempotent_and_leaves_a_note_when_removed() {
        let (_directory, records) = open();
        committed(&records, "base", None);
        let labels = Labels::from([("l".to_owned(), "1".to_owned())]);
        let commit = |parent| {
            let id = records.next_id().expect("reads");
            records.commit_lazy(id, "chain", parent, &labels, Usage::default(), &backing()).expect("commits")
        };
        assert_eq!(commit(None), LazyCommitOutcome::Committed);
        let first = records.get("chain").expect("is there");
        records.update("chain", Labels::new(), &[]).expect("updates");
        assert_eq!(commit(None), LazyCommitOutcome::Committed);
        assert_eq!(records.get("chain").expect("is there").labels, labels);
        assert!(matches!(commit(Some("base")), LazyCommitOutcome::Taken { parent_id: 1 }));
        assert!(records.directory_ids().expect("reads").len() == 1);
        records.remove("chain").expect("removes");
        assert_eq!(records.released().expect("reads"), [ReleasedRecord { id: first.id, backing: backing() }]);
        records.forget_released(first.id).expect("forgets");
        assert!(records.released().expect("reads").is_empty());
    }

    #[test]
    fn the_file_has_no_holes_and_keeps_what_is_in_it() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("sparse");
        let file = std::fs::File::create(&path).expect("creates");
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 5000], 300_000).expect("writes");
        file.set_len(1_000_001).expect("sizes");
        fill_holes(&path).expect("fills");
        let mut expected = vec![0; 1_000_001];
        expected[300_000..305_000].fill(7);
        assert!(std::fs::read(&path).expect("reads") == expected);
        let hole = rustix::fs::seek(std::fs::File::open(&path).expect("opens"), rustix::fs::SeekFrom::Hole(0));
        assert_eq!(hole.expect("seeks"), expected.len() as u64);
    }

    #[test]
    fn a_newer_format_is_refused_and_untouched() {
        let (directory, records) = open();
        committed(&records, "base", None);
        records
            .write(|transaction| {
                transaction.open_table(META)?.insert("format", FORMAT + 1)?;
                Ok(())
            })
            .expect("writes");
        drop(records);
        let path = directory.path().join("snapshots.redb");
        let error = Records::open(&path).expect_err("is refused");
        assert!(matches!(error, OpenError::NewerFormat { found: 2, supported: 1, .. }), "{error}");
    }

    #[test]
    fn a_second_opener_is_told() {
        let (directory, _records) = open();
        let error = Records::open(&directory.path().join("snapshots.redb")).expect_err("is refused");
        assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    }
}
