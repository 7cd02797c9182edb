//! What can go wrong with snapshots.

use std::io;
use std::path::PathBuf;

/// Why the store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The root cannot be used in mount options.
    #[error("snapshot root {path:?} must be an absolute UTF-8 path without ':', ',', '\\' or line breaks")]
    Root {
        /// As configured.
        path: PathBuf,
    },
    /// Another process has the records open.
    #[error("{path} is in use by another process: is a second drover-snapshotter running on the same root?")]
    InUse {
        /// The records' file.
        path: PathBuf,
    },
    /// A newer version wrote the records.
    #[error("{path} has format {found}, this version reads up to {supported}: start the newer version again")]
    NewerFormat {
        /// The records' file.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// The newest format that is read.
        supported: u64,
    },
    /// The records cannot be read.
    #[error("cannot open the snapshot records in {path}")]
    Records {
        /// The records' file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<redb::Error>,
    },
    /// A directory cannot be made or read.
    #[error("cannot prepare {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is left of an earlier run cannot be read.
    #[error("cannot bring the snapshots in order")]
    Recover(#[source] StoreError),
}

/// Why an operation on a snapshot failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A key, name or parent that nothing can have.
    #[error("snapshot key {key:?} is invalid: want 1 to {max} bytes without NUL", max = super::records::KEY_BYTES_MAX)]
    InvalidKey {
        /// Its first characters.
        key: String,
    },
    /// No such snapshot.
    #[error("snapshot {key:?} does not exist")]
    NotFound {
        /// Key or name.
        key: String,
    },
    /// The key or name is taken.
    #[error("snapshot {key:?} already exists")]
    AlreadyExists {
        /// Key or name.
        key: String,
    },
    /// The parent does not exist.
    #[error("parent snapshot {parent:?} does not exist")]
    ParentNotFound {
        /// Its name.
        parent: String,
    },
    /// The parent is an active snapshot or a view.
    #[error("parent {parent:?} is not a committed snapshot")]
    ParentNotCommitted {
        /// Its key.
        parent: String,
    },
    /// A snapshot with children cannot be removed.
    #[error("cannot remove snapshot {key:?}: {child:?} is its child")]
    HasChildren {
        /// Its name.
        key: String,
        /// One of the children.
        child: String,
    },
    /// Only active snapshots can be committed.
    #[error("snapshot {key:?} is not active")]
    NotActive {
        /// Its key or name.
        key: String,
    },
    /// Only active snapshots and views have mounts.
    #[error("snapshot {key:?} is not active or a view")]
    NoMounts {
        /// Its name.
        key: String,
    },
    /// A commit named another parent than the snapshot's.
    #[error("cannot change the parent of snapshot {key:?} on commit")]
    ParentChange {
        /// Its key.
        key: String,
    },
    /// A commit named a parent for a snapshot that has none.
    #[error(
        "cannot rebase snapshot {key:?} on commit: remove \"rebase\" from this plugin's capabilities in containerd's config"
    )]
    RebaseUnsupported {
        /// Its key.
        key: String,
    },
    /// Update of what cannot be updated.
    #[error("cannot update {path:?} field on snapshot {key:?}")]
    InvalidField {
        /// The field path.
        path: String,
        /// Key or name.
        key: String,
    },
    /// A lazy layer below the snapshot cannot be shown.
    #[error("layer {layer} below snapshot {key:?} is not available")]
    Layer {
        /// Key of the snapshot that was asked for.
        key: String,
        /// diffID of the layer.
        layer: layer::Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A lazy layer below the snapshot is out of service.
    #[error(
        "layer {layer} below snapshot {key:?} is quarantined: {reason}. It comes back by itself once it is right; until then remove the \
         images that have it (drover-snapshotter status) and pull them again, so that containerd unpacks it"
    )]
    Quarantined {
        /// Key of the snapshot that was asked for.
        key: String,
        /// diffID of the layer.
        layer: layer::Digest,
        /// Why.
        reason: String,
    },
    /// A mount option cannot hold this path.
    #[error("path {path:?} cannot be used in mount options")]
    MountPath {
        /// The path.
        path: PathBuf,
    },
    /// Work on a snapshot's directory failed.
    #[error("cannot {action} {path}")]
    Directory {
        /// What was done.
        action: &'static str,
        /// On which directory.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The records' file failed.
    #[error("snapshot records failed")]
    Records(#[source] Box<redb::Error>),
    /// A record makes no sense.
    #[error("record of snapshot {key:?} is damaged: {reason}")]
    Damaged {
        /// Key or name.
        key: String,
        /// What is wrong.
        reason: String,
    },
}

macro_rules! records_failed {
    ($($error:ty),*) => {$(
        impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                Self::Records(Box::new(error.into()))
            }
        }
    )*};
}
records_failed!(redb::TransactionError, redb::TableError, redb::StorageError, redb::CommitError);
