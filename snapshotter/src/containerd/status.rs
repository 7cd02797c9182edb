//! The one table from errors to gRPC codes. Containerd maps codes to its error kinds and acts on them: `ALREADY_EXISTS` of a
//! `Prepare` means that a layer need not be fetched, `NOT_FOUND` of a `Remove` that the work is done,
//! `FAILED_PRECONDITION` of a `Remove` that children come first.

use std::error::Error;

use tonic::{Code, Status};

use super::about::Version;
use super::filter::FilterError;
use crate::snapshots::{IdMapsError, StoreError};

/// All that a call of the service can fail with.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// A snapshot's operation failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A filter of `List` is wrong.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The layer need not be unpacked: it is there.
    #[error("target snapshot {target:?} already exists")]
    TargetExists {
        /// Value of the label `containerd.io/snapshot.ref`.
        target: String,
    },
    /// A message lacks a part.
    #[error("the request has no {field}")]
    Missing {
        /// The part.
        field: &'static str,
    },
    /// A label asks for what cannot be.
    #[error(transparent)]
    IdMaps(#[from] IdMapsError),
    /// Containerd cannot shift the ids of our layers.
    #[error(
        "containerd {version} cannot shift the ids of layers that are mounts: containers with a user namespace need containerd 2.3 \
         or newer here, or a proxy_plugins entry without the capability remap-ids (then every file is copied)"
    )]
    RemapVersion {
        /// Its version.
        version: Version,
    },
    /// Containerd does not say how we are configured in it.
    #[error("cannot ask containerd how this snapshotter is configured")]
    Containerd(#[source] Box<Status>),
    /// A bug: the work panicked.
    #[error("the operation panicked")]
    Panicked,
    /// The daemon ends.
    #[error("the snapshotter is shutting down")]
    ShuttingDown,
}

impl ServiceError {
    /// The code that containerd acts on.
    pub fn code(&self) -> Code {
        match self {
            Self::Store(error) => store_code(error),
            Self::Filter(FilterError::Syntax { .. } | FilterError::Regex { .. } | FilterError::TooLarge) => {
                Code::InvalidArgument
            }
            Self::TargetExists { .. } => Code::AlreadyExists,
            Self::Missing { .. } | Self::IdMaps(_) => Code::InvalidArgument,
            Self::RemapVersion { .. } => Code::FailedPrecondition,
            Self::Containerd(_) => Code::Unavailable,
            Self::Panicked => Code::Internal,
            Self::ShuttingDown => Code::Unavailable,
        }
    }

    /// Whether the caller did nothing wrong: worth a line in the log.
    pub fn is_ours(&self) -> bool {
        matches!(self.code(), Code::Internal | Code::DataLoss | Code::Unavailable)
    }
}

impl From<ServiceError> for Status {
    fn from(error: ServiceError) -> Self {
        Self::new(error.code(), chain(&error))
    }
}

fn store_code(error: &StoreError) -> Code {
    match error {
        StoreError::InvalidKey { .. } => Code::InvalidArgument,
        StoreError::NotFound { .. } => Code::NotFound,
        StoreError::AlreadyExists { .. } => Code::AlreadyExists,
        StoreError::ParentNotFound { .. } => Code::NotFound,
        StoreError::ParentNotCommitted { .. } => Code::InvalidArgument,
        StoreError::HasChildren { .. } => Code::FailedPrecondition,
        StoreError::NotActive { .. } => Code::FailedPrecondition,
        StoreError::NoMounts { .. } => Code::FailedPrecondition,
        StoreError::ParentChange { .. } => Code::InvalidArgument,
        StoreError::RebaseUnsupported { .. } => Code::Unimplemented,
        StoreError::InvalidField { .. } => Code::InvalidArgument,
        StoreError::Layer { .. } | StoreError::Quarantined { .. } => Code::Unavailable,
        StoreError::MountPath { .. } => Code::Internal,
        StoreError::Directory { .. } => Code::Internal,
        StoreError::Records(_) => Code::Internal,
        StoreError::Damaged { .. } => Code::DataLoss,
    }
}

/// The error and its causes in one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_status_tells_the_cause() {
        let error = StoreError::Directory {
            action: "create",
            path: "/x/1".into(),
            source: io::Error::new(io::ErrorKind::StorageFull, "no space left"),
        };
        let status = Status::from(ServiceError::Store(error));
        assert_eq!((status.code(), status.message()), (Code::Internal, "cannot create /x/1: no space left"));
    }
}
