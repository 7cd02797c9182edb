//! The table of `docs/compatibility.md`.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use lab::client::Way;
use lab::tools::{Release, workspace};

/// What becomes of a pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// No layer is in containerd's content store: its bytes come when they are read.
    Lazy,
    /// containerd fetched and unpacked every layer.
    Eager,
    /// This client has no such way.
    Absent,
}

/// What the page says.
#[derive(Debug)]
pub(crate) struct Table {
    /// The exact version behind each release.
    pub(crate) versions: BTreeMap<Release, String>,
    outcomes: BTreeMap<(Release, Way), Outcome>,
}

impl Table {
    /// Reads the table: the one whose first column is headed `containerd`.
    pub(crate) fn read() -> Result<Self> {
        let path = workspace().join("docs/compatibility.md");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{}", path.display()))
    }

    /// What it says of one pair.
    pub(crate) fn outcome(&self, release: Release, way: Way) -> Result<Outcome> {
        let outcome = self.outcomes.get(&(release, way)).copied();
        outcome.with_context(|| format!("the table has no cell for {} and {}", release.name(), way.name()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut rows = text.lines().skip_while(|line| !line.starts_with("| containerd |")).map_while(cells);
        let head = rows.next().context("there is no table with a column `containerd`")?;
        ensure!(head.get(1).is_some_and(|title| title == "tested"), "the second column is not `tested`: {head:?}");
        let way = |title: &String| Way::ALL.into_iter().find(|way| way.name() == title.trim_matches('`'));
        let columns: Vec<_> = head.iter().map(way).collect();
        let (mut versions, mut outcomes) = (BTreeMap::new(), BTreeMap::new());
        for row in rows.skip(1) {
            ensure!(row.len() == head.len(), "a row with {} cells instead of {}: {row:?}", row.len(), head.len());
            let release = Release::ALL.into_iter().find(|release| release.name() == row[0]);
            let release = release.with_context(|| format!("unknown release {}", row[0]))?;
            versions.insert(release, row[1].clone());
            for (way, cell) in columns.iter().zip(&row).filter_map(|(way, cell)| Some((way.as_ref()?, cell))) {
                let outcome = match cell.as_str() {
                    "lazy" => Outcome::Lazy,
                    "eager" => Outcome::Eager,
                    "–" => Outcome::Absent,
                    other => bail!("a cell says {other:?}; want lazy, eager or –"),
                };
                outcomes.insert((release, *way), outcome);
            }
        }
        Ok(Self { versions, outcomes })
    }
}

fn cells(line: &str) -> Option<Vec<String>> {
    let inside = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    Some(inside.split('|').map(|cell| cell.trim().to_owned()).collect())
}

#[test]
fn the_page_has_a_cell_for_every_pair() {
    let table = Table::read().unwrap_or_else(|error| panic!("{error:#}"));
    for release in Release::ALL {
        assert!(table.versions.contains_key(&release), "no row for {}", release.name());
        for way in Way::ALL {
            let outcome = table.outcome(release, way).unwrap_or_else(|error| panic!("{error:#}"));
            assert_eq!(outcome == Outcome::Absent, !way.exists(release), "{} and {}", release.name(), way.name());
        }
    }
}

#[test]
fn a_table_that_says_something_else_is_refused() {
    let table = |cell: &str| format!("| containerd | tested | `CRI` |\n|---|---|---|\n| 2.4 | 2.4.2 | {cell} |\n");
    assert_eq!(Table::parse(&table("lazy")).unwrap().outcome(Release::V2_4, Way::Cri).unwrap(), Outcome::Lazy);
    assert!(Table::parse(&table("lazy")).unwrap().outcome(Release::V2_3, Way::Cri).is_err());
    assert!(Table::parse(&table("mostly")).is_err());
    assert!(Table::parse("no table").is_err());
}
