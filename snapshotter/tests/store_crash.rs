//! `kill -9` of a process that changes the snapshot store, at random moments: what was acknowledged is there, what was under
//! way happened whole or not at all, and directories fit the records.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use layer::{ChainId, Digest};
use node::source::BlobRef;
use snapshotter::snapshots::mounts::LayerMounts;
use snapshotter::snapshots::{Backing, Creation, Kind, Labels, LazyBacking, LazyCommit, Store, StoreError, Usage};

const ROOT: &str = "STORE_CRASH_ROOT";
const SEED: &str = "STORE_CRASH_SEED";
const ROUNDS: u64 = 25;

/// One change, as text: a verb and its arguments, separated by spaces.
type Operation = Vec<String>;

/// What the model knows of a snapshot: kind, parent, lazy or not, the value of its label `l`.
type Known = (String, Option<String>, bool, String);
type Model = BTreeMap<String, Known>;

#[test]
fn acknowledged_changes_survive_kill_9() {
    let root = tempfile::tempdir().expect("temporary directory");
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mut random = Random(seed);
    let mut model = Model::new();
    let (mut ids, mut acknowledged, mut pending_applied) = (BTreeSet::new(), 0, 0);
    for round in 0..ROUNDS {
        let (done, pending) = run_and_kill(root.path(), seed * 1000 + round, &mut random);
        acknowledged += done.len();
        for (operation, id) in done {
            apply(&mut model, &operation);
            if let Some(id) = id {
                assert!(ids.insert(id), "id {id} was given twice, seed {seed} round {round}");
            }
        }
        let store = open(root.path());
        let found = observe(&store);
        if found != model {
            let pending = pending.unwrap_or_else(|| panic!("seed {seed} round {round}: {found:#?} is not {model:#?}"));
            apply(&mut model, &pending);
            assert_eq!(found, model, "seed {seed} round {round}, pending {pending:?}");
            pending_applied += 1;
        }
        check_directories(root.path(), &store);
        ids.extend(store.list(|_| true).expect("lists").iter().map(|snapshot| snapshot.record.id));
    }
    println!("{acknowledged} acknowledged changes in {ROUNDS} lives, {pending_applied} more were applied but cut off");
    assert!(acknowledged > ROUNDS as usize, "the workload did next to nothing");
}

/// A new store whose making was cut off is made again.
#[test]
fn kill_9_while_a_store_is_made() {
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mut random = Random(seed);
    for round in 0..ROUNDS {
        let root = tempfile::tempdir().expect("temporary directory");
        let mut child = child(root.path(), seed * 1000 + round);
        let mut output = BufReader::new(child.stdout.take().expect("is piped")).lines();
        let begins = output.find(|line| line.as_ref().is_ok_and(|line| line.contains("begins")));
        assert!(begins.is_some(), "the workload ended by itself: {:?}", child.wait());
        pause(random.below(8000));
        child.kill().expect("kills");
        child.wait().expect("is reaped");
        open(root.path());
    }
}

/// The child: changes the store until it is killed. Does nothing in an ordinary run of the tests.
#[test]
fn workload() {
    let (Some(root), Ok(seed)) = (std::env::var_os(ROOT), std::env::var(SEED)) else { return };
    say("begins");
    let store = Arc::new(open(Path::new(&root)));
    // Sweeping must never take a directory that is just being made.
    std::thread::spawn({
        let store = Arc::clone(&store);
        move || {
            loop {
                if let Err(error) = store.sweep() {
                    eprintln!("cannot sweep: {error}");
                    std::process::exit(1);
                }
            }
        }
    });
    let mut random = Random(seed.parse().expect("a number"));
    let mut model = observe(&store);
    // Bounded, in case nobody kills it.
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut number = 0;
    while Instant::now() < deadline {
        number += 1;
        let operation = choose(&model, &mut random, &format!("{seed}-{number}"));
        say(&format!("try {}", operation.join(" ")));
        let id = perform(&store, &operation).unwrap_or_else(|error| panic!("{operation:?}: {error}"));
        apply(&mut model, &operation);
        say(&format!("done {}", id.map(|id| id.to_string()).unwrap_or_default()));
    }
}

/// Lets a child work and kills it; gives what it acknowledged, with the ids of new snapshots, and what it had begun.
fn run_and_kill(root: &Path, seed: u64, random: &mut Random) -> (Vec<(Operation, Option<u64>)>, Option<Operation>) {
    let mut child = child(root, seed);
    let mut lines = BufReader::new(child.stdout.take().expect("is piped")).lines();
    let (mut done, mut pending) = (Vec::new(), None);
    let mut take = |line: &str| {
        if let Some((_, operation)) = line.split_once("try ") {
            pending = Some(operation.split(' ').map(str::to_owned).collect::<Operation>());
        } else if let Some(id) = line.strip_prefix("done ") {
            done.push((pending.take().expect("was begun"), id.parse().ok()));
        }
    };
    for _ in 0..random.below(80) {
        match lines.next() {
            Some(line) => take(&line.expect("is text")),
            None => panic!("the workload ended by itself: {:?}", child.wait()),
        }
    }
    // Some way into the next change.
    pause(random.below(4000));
    child.kill().expect("kills");
    for line in lines.map_while(Result::ok) {
        take(&line);
    }
    child.wait().expect("is reaped");
    (done, pending)
}

fn child(root: &Path, seed: u64) -> std::process::Child {
    Command::new(std::env::current_exe().expect("a test program has a path"))
        .args(["workload", "--exact", "--nocapture", "--test-threads=1"])
        .env(ROOT, root)
        .env(SEED, seed.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts")
}

fn pause(micros: u64) {
    let moment = Instant::now() + Duration::from_micros(micros);
    while Instant::now() < moment {
        std::hint::spin_loop();
    }
}

fn choose(model: &Model, random: &mut Random, unique: &str) -> Operation {
    let word = |text: &str| text.to_owned();
    let names = |wanted: &dyn Fn(&str, &Known) -> bool| -> Vec<String> {
        model.iter().filter(|(name, known)| wanted(name, known)).map(|(name, _)| name.clone()).collect()
    };
    let committed = names(&|_, known| known.0 == "committed");
    let active = names(&|_, known| known.0 == "active");
    let leaves = names(&|name, _| !model.values().any(|known| known.1.as_deref() == Some(name)));
    let parent = random.pick(&committed).filter(|_| random.below(4) > 0).unwrap_or_else(|| word("-"));
    let crowded = model.len() > 40;
    match random.below(6) {
        0 | 1 if !crowded => {
            let kind = if random.below(4) == 0 { "view" } else { "active" };
            vec![word("create"), word(kind), format!("key-{unique}"), parent]
        }
        2 if !crowded => vec![word("lazy"), format!("lazy-{unique}"), parent],
        3 if let Some(key) = random.pick(&active) => vec![word("commit"), format!("name-{unique}"), key],
        4 if let Some(key) = random.pick(&leaves) => vec![word("remove"), key],
        _ => match random.pick(&names(&|_, _| true)) {
            Some(key) => vec![word("label"), key, word(unique)],
            None => vec![word("create"), word("active"), format!("key-{unique}"), parent],
        },
    }
}

fn apply(model: &mut Model, operation: &Operation) {
    let some = |parent: &String| (parent != "-").then(|| parent.clone());
    match &operation.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["create", kind, key, _] => {
            model.insert((*key).into(), ((*kind).into(), some(&operation[3]), false, String::new()));
        }
        ["lazy", name, _] => {
            model.insert((*name).into(), ("committed".into(), some(&operation[2]), true, String::new()));
        }
        ["commit", name, key] => {
            let (_, parent, lazy, _) = model.remove(*key).expect("is known");
            model.insert((*name).into(), ("committed".into(), parent, lazy, String::new()));
        }
        ["remove", key] => drop(model.remove(*key).expect("is known")),
        ["label", key, value] => model.get_mut(*key).expect("is known").3 = (*value).into(),
        other => panic!("unknown change {other:?}"),
    }
}

/// Gives the id of a new snapshot.
fn perform(store: &Store, operation: &Operation) -> Result<Option<u64>, StoreError> {
    let parent = |parent: &'_ str| (parent != "-").then(|| parent.to_owned());
    let id = |key: &str| store.stat(key).map(|snapshot| Some(snapshot.record.id));
    match &operation.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["create", kind, key, below] => {
            let kind = if *kind == "view" { Kind::View } else { Kind::Active };
            store.create(Creation::new(kind, key, parent(below).as_deref()))?;
            id(key)
        }
        ["lazy", name, below] => {
            let backing = backing(name);
            let hold = futures_executor(store.hold(backing.diff_id));
            let parent = parent(below);
            let commit = LazyCommit {
                target: name,
                parent: parent.as_deref(),
                labels: Labels::new(),
                backing,
                usage: Usage::default(),
            };
            assert_eq!(store.commit_lazy(&hold, commit)?, *name);
            id(name)
        }
        ["commit", name, key] => store.commit(name, key, None, Labels::new()).map(|()| None),
        ["remove", key] => store.remove(key).map(|()| None),
        ["label", key, value] => {
            let labels = Labels::from([("l".to_owned(), (*value).to_owned())]);
            store.update(key, labels, &["labels.l".to_owned()]).map(|_| None)
        }
        other => panic!("unknown change {other:?}"),
    }
}

fn observe(store: &Store) -> Model {
    let all = store.list(|_| true).expect("lists");
    for snapshot in &all {
        if let Some(parent) = &snapshot.record.parent {
            assert_eq!(store.stat(parent).expect("a parent exists").record.kind, Kind::Committed);
        }
    }
    all.into_iter()
        .map(|snapshot| {
            let record = snapshot.record;
            let label = record.labels.get("l").cloned().unwrap_or_default();
            (snapshot.name, (record.kind.word().into(), record.parent, record.backing != Backing::Ordinary, label))
        })
        .collect()
}

/// After opening there is a directory for each ordinary snapshot, and no other.
fn check_directories(root: &Path, store: &Store) {
    let expected: BTreeSet<String> = store
        .list(|snapshot| snapshot.record.backing == Backing::Ordinary)
        .expect("lists")
        .iter()
        .map(|snapshot| snapshot.record.id.to_string())
        .collect();
    let directories = root.join("snapshots");
    let found: BTreeSet<String> = directories
        .read_dir()
        .expect("reads")
        .map(|entry| entry.expect("reads").file_name().into_string().expect("UTF-8"))
        .collect();
    assert_eq!(found, expected);
    for id in found {
        assert!(directories.join(id).join("fs").is_dir());
    }
}

struct Anywhere;

impl LayerMounts for Anywhere {
    fn lower(&self, _: u64, _: &LazyBacking) -> io::Result<std::path::PathBuf> {
        Ok("/".into())
    }
}

fn open(root: &Path) -> Store {
    Store::open(root, Arc::new(Anywhere)).expect("opens")
}

fn backing(name: &str) -> LazyBacking {
    let digest = Digest::of(name.as_bytes());
    let blob = BlobRef {
        registry: "r".into(),
        repository: "a".into(),
        digest,
        size: 1,
        media_type: String::new(),
        urls: Vec::new(),
    };
    LazyBacking::new(&blob, digest, ChainId::bottom(digest))
}

fn futures_executor<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("builds").block_on(future)
}

fn say(line: &str) {
    // One write, so that a kill leaves whole lines or none.
    io::stdout().write_all(format!("{line}\n").as_bytes()).expect("writes");
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    fn pick(&mut self, from: &[String]) -> Option<String> {
        let index = self.below(from.len().max(1) as u64);
        from.get(index as usize).cloned()
    }
}
