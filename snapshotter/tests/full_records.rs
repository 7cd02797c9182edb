//! Snapshot records on a disk that takes nothing more for a while.

use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use snapshotter::snapshots::records::{NewSnapshot, Records};
use snapshotter::snapshots::{Kind, Labels};

/// Set in the process whose files may not grow.
const LIMITED: &str = "DROVER_TEST_LIMITED";

/// A limit on the size of files stands in for a full disk: writes beyond it fail. The signal that comes with it has to be ignored,
/// which a shell does for its children.
#[test]
fn records_outlive_a_disk_that_is_full_for_a_while() {
    if std::env::var_os(LIMITED).is_some() {
        return within_a_limit();
    }
    let status = Command::new("sh")
        .args(["-c", "trap '' XFSZ; exec \"$0\" --exact records_outlive_a_disk_that_is_full_for_a_while --nocapture"])
        .arg(std::env::current_exe().expect("has a path"))
        .env(LIMITED, "1")
        .status()
        .expect("a shell runs");
    assert!(status.success());
}

fn within_a_limit() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("snapshots.redb");
    let records = Records::open(&path).expect("opens");
    let create = |id: u64| {
        let labels = Labels::from([("padding".to_owned(), "x".repeat(3000))]);
        let key = format!("key-{id}");
        let kind = Kind::Active;
        records
            .create(NewSnapshot { id, kind, key: &key, parent: None, labels, declined: None, id_maps: None })
            .map(drop)
    };
    create(1).expect("creates");
    let before = getrlimit(Resource::Fsize);
    let len = std::fs::metadata(&path).expect("is there").len();
    setrlimit(Resource::Fsize, Rlimit { current: Some(len), ..before }).expect("limits");
    let mut next = 2;
    while create(next).is_ok() {
        next += 1;
        assert!(next < 100_000, "the file never has to grow");
    }
    // All that was committed is there, also while nothing can be added; and what is removed is.
    for id in 1..next {
        records.get(&format!("key-{id}")).expect("is kept");
    }
    records.remove("key-1").expect("a removal needs no room");
    assert!(create(next).is_err() || records.get(&format!("key-{next}")).is_ok());
    setrlimit(Resource::Fsize, before).expect("lifts the limit");
    for id in next + 1..next + 50 {
        create(id).expect("there is room again");
    }
    for id in (2..next).chain(next + 1..next + 50) {
        records.get(&format!("key-{id}")).expect("is kept");
    }
    assert!(records.get("key-1").is_err());
    drop(records);
    let records = Records::open(&path).expect("opens again");
    assert_eq!(
        records.list(|snapshot| snapshot.name != format!("key-{next}")).expect("lists").len() as u64,
        next - 2 + 49
    );
}
