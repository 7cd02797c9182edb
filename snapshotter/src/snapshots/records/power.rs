//! The records on a disk that loses power: what was not synced is there, is not, or is torn with a wrong bit in it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use layer::{ChainId, Digest};
use parking_lot::Mutex;
use proptest::prelude::*;
use redb::{Database, StorageBackend};

use super::{Backing, Kind, Labels, LazyBacking, NewSnapshot, OpenError, Place, Records, StoreError, Usage, builder};

/// What may be left of the unsynced writes at one moment, so many of the possibilities.
const SEEDS: u64 = 2;

/// The beginning of the file, whose bytes are old or new. What redb counts on (its docs/design.md, "Assumptions about underlying
/// media") is that a byte is written whole or not at all, which matters where one byte says which commit is the last, and that
/// what is written over by the same bytes stays.
const WHOLE: usize = 64;

/// One change of the records. Numbers choose among the snapshots that there are, the oldest first.
#[derive(Clone, Debug)]
enum Change {
    Create { kind: Kind, parent: Option<usize> },
    Commit { active: usize },
    Lazy { parent: Option<usize> },
    Label { which: usize, value: u32 },
    Remove { which: usize },
    Forget { which: usize },
}

/// What is known of a snapshot: its kind, its parent, its label, whether it is lazy.
type Known = (Kind, Option<String>, String, bool);

/// What there must be: snapshots by key or name, and the ids of released layers.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    snapshots: BTreeMap<String, (u64, Known)>,
    released: Vec<u64>,
    /// Ids that were given.
    ids: u64,
}

#[derive(Clone, Debug, Default)]
struct LosingDisk(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    now: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Write>,
    /// Changes and syncs until the power is cut.
    power: Option<u64>,
}

#[derive(Clone, Debug)]
enum Write {
    At(usize, Vec<u8>),
    Len(usize),
}

/// The power is cut before every single write and sync of a life of some snapshots.
#[test]
fn every_state_of_a_life_opens_after_a_power_cut() {
    let changes = [
        Change::Lazy { parent: None },
        Change::Lazy { parent: Some(0) },
        Change::Create { kind: Kind::Active, parent: Some(1) },
        Change::Label { which: 0, value: 7 },
        Change::Commit { active: 0 },
        Change::Create { kind: Kind::View, parent: Some(2) },
        Change::Remove { which: 0 },
        Change::Remove { which: 0 },
        Change::Remove { which: 0 },
        Change::Forget { which: 0 },
        Change::Lazy { parent: None },
    ];
    let mut cuts = 0;
    loop {
        let disk = LosingDisk::made();
        disk.set_power(Some(cuts));
        let (model, pending) = live(&disk, Model::default(), &changes);
        if pending.is_none() && !disk.is_dark() {
            break;
        }
        for seed in 1..=SEEDS {
            let disk = disk.crash(seed << 20 | cuts);
            let what = || format!("cut {cuts}, seed {seed}");
            let found = settle(&disk, &model, pending.as_ref()).unwrap_or_else(|wrong| panic!("{}: {wrong}", what()));
            // And it can be worked with.
            let (model, pending) = live(&disk, found, &changes);
            assert!(pending.is_none(), "{}", what());
            assert_eq!(settle(&disk, &model, None), Ok(model.clone()), "{}", what());
        }
        cuts += 1;
    }
    println!("the power was cut at {cuts} moments, with {SEEDS} outcomes each");
    assert!(cuts > 50, "a life writes {cuts} times");
}

fn change() -> impl Strategy<Value = Change> {
    let parent = || prop::option::weighted(0.8, 0..6usize);
    prop_oneof![
        3 => (any::<bool>(), parent()).prop_map(|(view, parent)| {
            Change::Create { kind: if view { Kind::View } else { Kind::Active }, parent }
        }),
        3 => (0..6usize).prop_map(|active| Change::Commit { active }),
        3 => parent().prop_map(|parent| Change::Lazy { parent }),
        1 => (0..6usize, any::<u32>()).prop_map(|(which, value)| Change::Label { which, value }),
        3 => (0..6usize).prop_map(|which| Change::Remove { which }),
        1 => (0..3usize).prop_map(|which| Change::Forget { which }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 25, ..ProptestConfig::default() })]

    /// Any changes, with power cuts in between and in the middle of them: nothing committed is lost, nothing is invented.
    #[test]
    fn records_survive_power_cuts(
        lives in prop::collection::vec((prop::collection::vec(change(), 1..12), 0..160u64, any::<u64>()), 1..6)
    ) {
        let mut disk = LosingDisk::made();
        let mut model = Model::default();
        for (changes, power, seed) in lives {
            disk.set_power(Some(power));
            let (reached, pending) = live(&disk, model, &changes);
            disk = disk.crash(seed);
            model = settle(&disk, &reached, pending.as_ref()).map_err(TestCaseError::fail)?;
        }
    }
}

/// Makes changes until one fails because the power is gone: gives what was acknowledged, and with the one under way done.
fn live(disk: &LosingDisk, mut model: Model, changes: &[Change]) -> (Model, Option<Model>) {
    let records = match Records::open_at(Box::new(disk.clone())) {
        Ok(records) => records,
        Err(error) => {
            assert!(disk.is_dark(), "{error:?}");
            return (model, None);
        }
    };
    for change in changes {
        let mut after = model.clone();
        match after.make(&records, change) {
            Ok(()) => model = after,
            Err(error) => {
                assert!(disk.is_dark(), "{change:?}: {error:?}");
                return (model, Some(after));
            }
        }
    }
    (model, None)
}

/// What is there when the power is back: what was acknowledged, with or without the change that was under way.
fn settle(disk: &LosingDisk, acknowledged: &Model, pending: Option<&Model>) -> Result<Model, String> {
    let records = Records::open_at(Box::new(disk.clone())).map_err(|error| format!("does not open: {error:?}"))?;
    let found = Model::of(&records).map_err(|error| format!("cannot be read: {error:?}"))?;
    match [Some(acknowledged), pending].into_iter().flatten().find(|model| model.is(&found)) {
        Some(model) => Ok(Model { ids: found.ids, ..model.clone() }),
        None => Err(format!("{found:#?} is not {acknowledged:#?}, nor {pending:#?}")),
    }
}

impl Model {
    fn of(records: &Records) -> Result<Self, StoreError> {
        let mut snapshots = BTreeMap::new();
        for snapshot in records.list(|_| true)? {
            let record = records.get(&snapshot.name)?;
            assert_eq!(record, snapshot.record);
            let label = record.labels.get("label").cloned().unwrap_or_default();
            let lazy = matches!(record.backing, Backing::Lazy(_));
            snapshots.insert(snapshot.name, (record.id, (record.kind, record.parent, label, lazy)));
        }
        let released = records.released()?.into_iter().map(|released| released.id).collect();
        Ok(Self { snapshots, released, ids: records.next_id()? - 1 })
    }

    fn is(&self, found: &Self) -> bool {
        self.snapshots == found.snapshots && self.released == found.released && self.ids <= found.ids
    }

    /// Does `change` to the records and notes what must have become of it, also where that fails. Nothing where there is nothing
    /// to change.
    fn make(&mut self, records: &Records, change: &Change) -> Result<(), StoreError> {
        match change {
            Change::Create { kind, parent } => {
                let parent = parent.and_then(|n| self.pick(n, |known| known.0 == Kind::Committed));
                let id = self.id();
                let key = format!("key-{id}");
                self.snapshots.insert(key.clone(), (id, (*kind, parent.clone(), String::new(), false)));
                let (labels, parent) = (Labels::new(), parent.as_deref());
                let new = NewSnapshot { id, kind: *kind, key: &key, parent, labels, declined: None, id_maps: None };
                records.create(new).map(drop)
            }
            Change::Commit { active } => {
                let Some(key) = self.pick(*active, |known| known.0 == Kind::Active) else { return Ok(()) };
                let (id, known) = self.snapshots.remove(&key).expect("was picked");
                let name = format!("name-{id}");
                self.snapshots.insert(name.clone(), (id, (Kind::Committed, known.1, String::new(), false)));
                records.commit(&name, &key, None, Labels::new(), Usage { size_bytes: id, inodes: 1 })
            }
            Change::Lazy { parent } => {
                let parent = parent.and_then(|n| self.pick(n, |known| known.0 == Kind::Committed));
                let id = self.id();
                let name = format!("lazy-{id}");
                self.snapshots.insert(name.clone(), (id, (Kind::Committed, parent.clone(), String::new(), true)));
                let (labels, usage) = (Labels::new(), Usage::default());
                records.commit_lazy(id, &name, parent.as_deref(), &labels, usage, &backing(id)).map(drop)
            }
            Change::Label { which, value } => {
                let Some(key) = self.pick(*which, |_| true) else { return Ok(()) };
                let labels = Labels::from([("label".to_owned(), value.to_string())]);
                self.snapshots.get_mut(&key).expect("was picked").1.2 = value.to_string();
                records.update(&key, labels, &[]).map(drop)
            }
            Change::Remove { which } => {
                let parents: Vec<_> = self.snapshots.values().filter_map(|(_, known)| known.1.clone()).collect();
                let leaves: Vec<_> = self.snapshots.keys().filter(|key| !parents.contains(key)).cloned().collect();
                let Some(key) = leaves.get(which % leaves.len().max(1)) else { return Ok(()) };
                let (id, known) = self.snapshots.remove(key).expect("is there");
                if known.3 {
                    self.released.push(id);
                    self.released.sort_unstable();
                }
                records.remove(key).map(drop)
            }
            Change::Forget { which } => {
                if self.released.is_empty() {
                    return Ok(());
                }
                let id = self.released.remove(which % self.released.len());
                records.forget_released(id)
            }
        }
    }

    fn id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    fn pick(&self, n: usize, wanted: impl Fn(&Known) -> bool) -> Option<String> {
        let mut names: Vec<_> = self.snapshots.iter().filter(|(_, (_, known))| wanted(known)).collect();
        names.sort_by_key(|(_, (id, _))| *id);
        names.get(n % names.len().max(1)).map(|(name, _)| (*name).clone())
    }
}

fn backing(id: u64) -> LazyBacking {
    let diff_id = Digest::of(&id.to_le_bytes());
    LazyBacking {
        blob: diff_id,
        diff_id,
        chain_id: ChainId::bottom(diff_id),
        registry: "r".into(),
        repository: "a".into(),
        blob_size: id,
        media_type: String::new(),
        urls: Vec::new(),
        content_namespace: None,
    }
}

impl LosingDisk {
    /// With the records of a new node, which get their name on the disk when they are synced.
    fn made() -> Self {
        let disk = Self::default();
        drop(builder().create_with_backend(disk.clone()).expect("creates"));
        {
            let mut state = disk.0.lock();
            state.durable = state.now.clone();
            state.unsynced.clear();
        }
        disk
    }

    fn set_power(&self, changes: Option<u64>) {
        self.0.lock().power = changes;
    }

    fn is_dark(&self) -> bool {
        self.0.lock().power == Some(0)
    }

    /// What is on the disk when the power is back.
    fn crash(&self, seed: u64) -> Self {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut random = move |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 11) as usize % below.max(1)
        };
        let state = self.0.lock();
        let mut image = state.durable.clone();
        for write in &state.unsynced {
            let mut write = write.clone();
            match (random(3), &mut write) {
                (0, _) => continue,
                (1, Write::At(offset, bytes)) => {
                    bytes.truncate(1 + random(bytes.len()));
                    let is_new = |at: usize| image.get(*offset + at) != bytes.get(at) && *offset + at >= WHOLE;
                    let new: Vec<usize> = (0..bytes.len()).filter(|at| is_new(*at)).collect();
                    if let Some(byte) = new.get(random(new.len())).and_then(|at| bytes.get_mut(*at)) {
                        *byte ^= 1 << random(8);
                    }
                }
                _ => {}
            }
            write.apply(&mut image);
        }
        Self(Arc::new(Mutex::new(State { durable: image.clone(), now: image, ..State::default() })))
    }

    fn change(&self, write: Write) -> io::Result<()> {
        let mut state = self.0.lock();
        state.draw()?;
        write.apply(&mut state.now);
        state.unsynced.push(write);
        Ok(())
    }
}

impl State {
    /// Before every change and sync.
    fn draw(&mut self) -> io::Result<()> {
        if let Some(power) = &mut self.power {
            *power = power.checked_sub(1).ok_or_else(|| io::Error::other("the power is cut"))?;
        }
        Ok(())
    }
}

impl Write {
    fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Self::At(offset, bytes) => {
                let end = offset + bytes.len();
                image.resize(image.len().max(end), 0);
                image[*offset..end].copy_from_slice(bytes);
            }
            Self::Len(len) => image.resize(*len, 0),
        }
    }
}

impl StorageBackend for LosingDisk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.0.lock();
        let range = offset as usize..offset as usize + out.len();
        out.copy_from_slice(state.now.get(range).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Write::Len(len as usize))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        state.draw()?;
        state.durable = state.now.clone();
        state.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Write::At(offset as usize, data.to_vec()))
    }
}

impl Place for LosingDisk {
    fn path(&self) -> &Path {
        Path::new("/losing/snapshots.redb")
    }

    fn open(&self) -> Result<Database, OpenError> {
        let failed = |error: redb::DatabaseError| {
            let path = Place::path(self).to_owned();
            OpenError::Records { path, source: Box::new(error.into()) }
        };
        builder().create_with_backend(self.clone()).map_err(failed)
    }
}
