//! From a compressed blob to its device, with a stop wherever inflating can start again.

mod gzip;
mod member;
mod probe;
#[allow(unsafe_code)]
mod sys;
mod zstd;

pub(crate) use gzip::{GzipReader, Stop};
pub(crate) use probe::WindowProbe;
pub use zstd::WINDOW_MAX as ZSTD_WINDOW_MAX;
pub(crate) use zstd::ZstdReader;

pub(crate) use crate::index::WINDOW_MAX;

/// Why a blob, or a part of it, does not inflate. Offsets are bytes of the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InflateError {
    /// A gzip header or trailer is wrong.
    #[error("the gzip member is broken at byte {offset} of the blob: {reason}")]
    Member {
        /// Where it was seen.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The compressed bytes are not deflate.
    #[error("the compressed bytes are broken near byte {offset} of the blob")]
    Deflate {
        /// Where it was seen.
        offset: u64,
    },
    /// A zstd frame is broken, or what stands behind one is none.
    #[error("the zstd frame is broken near byte {offset} of the blob: {reason}")]
    Frame {
        /// Where it was seen.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A zstd frame may be good, but reading it would take too much memory.
    #[error(
        "the zstd frame at byte {offset} of the blob needs a window of {window} bytes; at most {max} are supported"
    )]
    Window {
        /// Where its header ends.
        offset: u64,
        /// Bytes that it needs.
        window: u64,
        /// Bytes that it may need.
        max: u64,
    },
    /// The blob or its part ends too early.
    #[error("the blob is cut off at byte {offset}: {device} bytes of the layer were inflated")]
    CutOff {
        /// Where it ends.
        offset: u64,
        /// Bytes of the device that came of it.
        device: u64,
    },
    /// The window of a checkpoint in the index does not unpack.
    #[error("the checkpoint at byte {offset} of the blob is broken")]
    Checkpoint {
        /// Start of the span.
        offset: u64,
    },
}
