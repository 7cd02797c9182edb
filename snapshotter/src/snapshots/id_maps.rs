//! User and group ids of a container with a user namespace of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::directories::Owner;
use super::record::Labels;

const UID_LABEL: &str = "containerd.io/snapshot/uidmapping";
const GID_LABEL: &str = "containerd.io/snapshot/gidmapping";

/// Ranges of one map: the kernel takes 340.
const RANGES_MAX: usize = 340;

/// How the ids of a container map to those of the machine. Containerd shifts the layers by it when it mounts them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMaps {
    /// User ids, as the mount option `uidmap` takes them: `CONTAINER:HOST:SIZE[,…]`.
    pub uid: String,
    /// Group ids.
    pub gid: String,
    /// Whom the container's root is on the machine.
    pub root: Owner,
}

/// A label is no map of ids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("label {label} is no map of ids with the container's root: {value:?}")]
pub struct IdMapsError {
    label: &'static str,
    value: String,
}

impl IdMaps {
    /// The maps that `labels` ask for; `None` where they ask for none.
    pub fn of(labels: &Labels) -> Result<Option<Self>, IdMapsError> {
        let [uid, gid] = [UID_LABEL, GID_LABEL].map(|label| labels.get(label).map(String::as_str));
        if uid.is_none() && gid.is_none() {
            return Ok(None);
        }
        let (uid, uid_root) = parse(UID_LABEL, uid.unwrap_or_default())?;
        let (gid, gid_root) = parse(GID_LABEL, gid.unwrap_or_default())?;
        Ok(Some(Self { uid, gid, root: Owner { uid: uid_root, gid: gid_root } }))
    }
}

/// One range of ids.
struct Range {
    container: u32,
    host: u32,
    size: u32,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.container, self.host, self.size)
    }
}

/// The map in the form of the mount option, and where it maps 0 to.
fn parse(label: &'static str, value: &str) -> Result<(String, u32), IdMapsError> {
    let wrong = || IdMapsError { label, value: value.chars().take(200).collect() };
    let ranges: Vec<Range> = value.split(',').map(range).collect::<Option<_>>().ok_or_else(wrong)?;
    let root = ranges.iter().find(|range| range.container == 0).ok_or_else(wrong)?.host;
    if ranges.len() > RANGES_MAX {
        return Err(wrong());
    }
    Ok((ranges.iter().map(Range::to_string).collect::<Vec<_>>().join(","), root))
}

fn range(text: &str) -> Option<Range> {
    let mut numbers = text.split(':').map(|number| number.parse::<u32>().ok());
    let range = Range { container: numbers.next()??, host: numbers.next()??, size: numbers.next()?? };
    let fits = |start: u32| start.checked_add(range.size).is_some();
    (numbers.next().is_none() && range.size > 0 && fits(range.container) && fits(range.host)).then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(uid: &str, gid: &str) -> Result<Option<IdMaps>, IdMapsError> {
        let labels = [(UID_LABEL, uid), (GID_LABEL, gid)];
        IdMaps::of(&labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn reads_what_containerd_writes() {
        assert_eq!(IdMaps::of(&Labels::new()), Ok(None));
        let read = maps("0:100000:65536", "1:7:1,0:200000:65536").unwrap().unwrap();
        assert_eq!((read.uid.as_str(), read.gid.as_str()), ("0:100000:65536", "1:7:1,0:200000:65536"));
        assert_eq!(read.root, Owner { uid: 100_000, gid: 200_000 });
    }

    #[test]
    fn refuses_what_is_no_map() {
        let good = "0:1:1";
        for bad in [
            "",
            "0",
            "0:1",
            "0:1:0",
            "0:1:1:1",
            "1:1:1",
            "0:-1:1",
            "0:1:x",
            "0:1:1,",
            "0:4294967295:2",
            "0:1:1,upperdir=/",
        ] {
            assert!(maps(bad, good).is_err(), "{bad}");
            assert!(maps(good, bad).is_err(), "{bad}");
        }
        let one: Labels = [(UID_LABEL.to_owned(), good.to_owned())].into();
        assert!(IdMaps::of(&one).unwrap_err().to_string().contains("gidmapping"));
    }
}
