//! What is stored of a snapshot.

use std::collections::BTreeMap;
use std::time::SystemTime;

use layer::{ChainId, Digest};
use node::source::BlobRef;
use serde::{Deserialize, Serialize};

use super::id_maps::IdMaps;

/// Labels of a snapshot, exactly as they arrived.
pub type Labels = BTreeMap<String, String>;

/// A snapshot's kind in containerd's sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only, never committed.
    View,
    /// Writable, may be committed.
    Active,
    /// Read-only, may be a parent.
    Committed,
}

impl Kind {
    /// The kind's word in filters (`kind==active`).
    pub const fn word(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// Disk usage of one snapshot without its parents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes (of a lazy snapshot: bytes of its layer when complete).
    pub size_bytes: u64,
    /// Inodes, hard links counted once.
    pub inodes: u64,
}

/// Where a snapshot's files are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(clippy::large_enum_variant, reason = "most snapshots are lazy, and none is kept in memory for long")]
pub enum Backing {
    /// In its own directory.
    Ordinary,
    /// In a layer of the engine.
    Lazy(LazyBacking),
}

/// The layer behind a lazy snapshot, and all that a restarted daemon needs to find its bytes again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LazyBacking {
    /// The layer's blob in the registry.
    #[serde(with = "text")]
    pub blob: Digest,
    /// Digest of the uncompressed tar.
    #[serde(with = "text")]
    pub diff_id: Digest,
    /// The layer on its parents.
    #[serde(with = "text")]
    pub chain_id: ChainId,
    /// Registry host with port, as in [`BlobRef`].
    pub registry: String,
    /// Repository in that registry, without tag.
    pub repository: String,
    /// Bytes of the blob; 0 where it is not known.
    pub blob_size: u64,
    /// Media type of the blob; empty where it is not known.
    pub media_type: String,
    /// Where else the blob may be had, as in [`BlobRef`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Namespace of containerd's content store that had the blob when the snapshot was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_namespace: Option<String>,
}

impl LazyBacking {
    /// The layer `diff_id`, on its parents `chain_id`, whose blob is `blob`.
    pub fn new(blob: &BlobRef, diff_id: Digest, chain_id: ChainId) -> Self {
        Self {
            blob: blob.digest,
            diff_id,
            chain_id,
            registry: blob.registry.clone(),
            repository: blob.repository.clone(),
            blob_size: blob.size,
            media_type: blob.media_type.clone(),
            urls: blob.urls.clone(),
            content_namespace: None,
        }
    }

    /// Where the blob is.
    pub fn blob_ref(&self) -> BlobRef {
        BlobRef {
            registry: self.registry.clone(),
            repository: self.repository.clone(),
            digest: self.blob,
            size: self.blob_size,
            media_type: self.media_type.clone(),
            urls: self.urls.clone(),
        }
    }
}

/// A snapshot's record; its key or name is the key that it is stored under.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Unique among all snapshots that there ever were; names the directory. A snapshot keeps it when it is committed.
    pub id: u64,
    /// See [`Kind`].
    pub kind: Kind,
    /// Name of the committed snapshot below this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// See [`Labels`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: Labels,
    /// When it was prepared; after a commit, when it was committed. Never before 1970.
    pub created: SystemTime,
    /// When its labels were last written.
    pub updated: SystemTime,
    /// Usage at commit; zero before it.
    #[serde(default)]
    pub usage: Usage,
    /// See [`Backing`].
    pub backing: Backing,
    /// Why the layer was left to containerd, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub declined: Option<String>,
    /// How the ids of its container map to the machine's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id_maps: Option<IdMaps>,
}

/// A record with its key or name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Key of an active snapshot or view, name of a committed one.
    pub name: String,
    /// All the rest.
    pub record: Record,
}

/// Digests as text.
mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    /// The stored form is a format: a change of this text needs a new format version in `records`.
    #[test]
    fn stored_form_is_fixed() {
        let diff_id = Digest::of(b"tar");
        let record = Record {
            id: 7,
            kind: Kind::Committed,
            parent: Some("below".into()),
            labels: Labels::from([("containerd.io/snapshot.ref".into(), "x".into())]),
            created: UNIX_EPOCH + Duration::new(1, 5),
            updated: UNIX_EPOCH + Duration::new(2, 0),
            usage: Usage { size_bytes: 10, inodes: 2 },
            backing: Backing::Lazy(LazyBacking {
                blob: Digest::of(b"blob"),
                diff_id,
                chain_id: ChainId::bottom(diff_id),
                registry: "registry.example:5000".into(),
                repository: "a/b".into(),
                blob_size: 3,
                media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
                urls: Vec::new(),
                content_namespace: None,
            }),
            declined: None,
            id_maps: None,
        };
        let text = serde_json::to_string(&record).expect("serializes");
        let stored = format!(
            concat!(
                r#"{{"id":7,"kind":"committed","parent":"below","labels":{{"containerd.io/snapshot.ref":"x"}},"#,
                r#""created":{{"secs_since_epoch":1,"nanos_since_epoch":5}},"#,
                r#""updated":{{"secs_since_epoch":2,"nanos_since_epoch":0}},"#,
                r#""usage":{{"size_bytes":10,"inodes":2}},"backing":{{"lazy":{{"blob":"{blob}","diff_id":"{diff}","#,
                r#""chain_id":"{diff}","registry":"registry.example:5000","repository":"a/b","blob_size":3,"#,
                r#""media_type":"application/vnd.oci.image.layer.v1.tar+gzip"}}}}}}"#
            ),
            blob = Digest::of(b"blob"),
            diff = diff_id,
        );
        assert_eq!(text, stored);
        assert_eq!(serde_json::from_str::<Record>(&text).expect("parses"), record);
    }
}
