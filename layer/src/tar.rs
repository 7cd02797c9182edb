//! From the bytes of a device to its [`Tree`], in one pass over any split of them.
//!
//! The reference is containerd's unpacker on overlayfs (pkg/archive/tar.go over Go's archive/tar): a tar that it would
//! refuse is an error here, and one that it takes makes the paths that it would make. In particular:
//!
//! - an entry that names the root is ignored, so the root is always 0755, root's, of the epoch;
//! - a time before the epoch or after the year 2262 becomes the epoch;
//! - a hard link's header changes the file it links to, and its owner change drops `security.capability`;
//! - only `SCHILY.xattr.*` records give attributes; `trusted.*` is dropped, and so is `user.overlay.*`, which an overlay
//!   mounted with `userxattr` would obey;
//! - a global PAX header's records are ignored, but its name is unpacked as an entry that leaves nothing behind.

mod header;
mod pax;
mod unpack;

use self::header::{BLOCK, Header};
use self::pax::Records;
use self::unpack::Unpacking;
use crate::tree::{DEVICE_SIZE_MAX, ENTRIES_MAX, Tree};

/// Largest PAX header, GNU long name or GNU long link in bytes; Go's archive/tar and libarchive have the same limit.
const EXTENSION_MAX: u64 = 1 << 20;

/// Bounds of what a [`Scanner`] keeps in memory. A layer beyond them is unsupported.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most paths, implicit directories and paths that were replaced included.
    pub entries: usize,
    /// Most bytes of paths, link targets and extended attributes in all.
    pub metadata_bytes: usize,
}

impl Default for Limits {
    /// 2 Mi entries and 256 MiB of metadata, far above any image seen.
    fn default() -> Self {
        Self { entries: ENTRIES_MAX, metadata_bytes: 256 << 20 }
    }
}

/// Why a device gives no tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    /// The bytes are no tar, or not a whole one: no unpacker takes them.
    #[error("the layer's tar is broken at byte {offset}: {reason}")]
    Broken {
        /// Where in the device the fault was seen.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The tar cannot be shown lazily, or containerd's own unpacker must judge it: unpack it as an ordinary layer.
    #[error("the layer cannot be mounted lazily: {0}")]
    Unsupported(String),
}

/// A push parser of a plain tar. It keeps the entries, one header and at most 1 MiB of an extended header.
#[derive(Debug)]
pub struct Scanner {
    state: State,
    /// Bytes of the device seen.
    offset: u64,
    block: [u8; BLOCK],
    block_len: usize,
    extension: Vec<u8>,
    pending: Pending,
    unpacking: Unpacking,
}

/// What the headers before an entry say about it.
#[derive(Debug, Default)]
struct Pending {
    records: Records,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
}

#[derive(Debug, Clone)]
enum State {
    /// Filling `block` with a header.
    Header,
    /// One zero block was read; filling `block` with the second.
    ZeroBlock,
    /// Collecting the bytes of an extended header.
    Extension { type_flag: u8, header: Box<Header>, remaining: u64 },
    /// Passing over file bytes, then padding.
    Skip { bytes: u64, padding: u64 },
    /// Both zero blocks were read: whatever follows belongs to the device, but not to the tar.
    End,
    /// What push said before.
    Failed(TarError),
}

impl Scanner {
    /// A scanner at the first byte of a device.
    pub fn new(limits: Limits) -> Self {
        Self {
            state: State::Header,
            offset: 0,
            block: [0; BLOCK],
            block_len: 0,
            extension: Vec::new(),
            pending: Pending::default(),
            unpacking: Unpacking::new(limits),
        }
    }

    /// Takes the next bytes of the device, any number. After an error every further call gives the same error.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), TarError> {
        self.advance(bytes).inspect_err(|error| self.state = State::Failed(error.clone()))
    }

    /// The device has ended: gives its tree.
    pub fn finish(self) -> Result<Tree, TarError> {
        match self.state {
            State::Header | State::ZeroBlock if self.block_len != 0 => Err(broken(self.offset, "it ends in a header")),
            State::Extension { .. } => Err(broken(self.offset, "it ends in an extended header")),
            State::Skip { bytes: 1.., .. } => Err(broken(self.offset, "it ends in the bytes of a file")),
            State::Failed(error) => Err(error),
            // As in Go's archive/tar, the zero blocks and the last file's padding may be missing.
            State::Header | State::ZeroBlock | State::Skip { .. } | State::End => self.unpacking.finish(),
        }
    }

    /// Bytes of the device seen so far.
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    fn advance(&mut self, mut bytes: &[u8]) -> Result<(), TarError> {
        while !bytes.is_empty() {
            let take = match &mut self.state {
                State::Header | State::ZeroBlock => self.fill_block(bytes)?,
                State::Extension { remaining, .. } => {
                    let take = clamp(bytes, *remaining);
                    self.extension.extend_from_slice(bytes.get(..take).unwrap_or_default());
                    *remaining -= take as u64;
                    if *remaining == 0 { self.extension_read(take)? } else { take }
                }
                State::Skip { bytes: data, padding } => {
                    let take = clamp(bytes, data.saturating_add(*padding));
                    let of_data = clamp(bytes, *data) as u64;
                    *data -= of_data;
                    *padding -= take as u64 - of_data;
                    if *data == 0 && *padding == 0 {
                        self.state = State::Header;
                    }
                    take
                }
                State::End => bytes.len(),
                State::Failed(error) => return Err(error.clone()),
            };
            self.offset = self.offset.saturating_add(take as u64);
            if self.offset > DEVICE_SIZE_MAX {
                return Err(unsupported("its tar is larger than 2 TiB"));
            }
            bytes = bytes.get(take..).unwrap_or_default();
        }
        Ok(())
    }

    fn fill_block(&mut self, bytes: &[u8]) -> Result<usize, TarError> {
        let take = bytes.len().min(BLOCK - self.block_len);
        let filled = self.block_len + take;
        if let (Some(to), Some(from)) = (self.block.get_mut(self.block_len..filled), bytes.get(..take)) {
            to.copy_from_slice(from);
        }
        self.block_len = filled % BLOCK;
        if filled == BLOCK {
            self.block_read(self.offset + take as u64)?;
        }
        Ok(take)
    }

    /// A whole block is there, which ends at `end` in the device.
    fn block_read(&mut self, end: u64) -> Result<(), TarError> {
        let start = end - BLOCK as u64;
        let is_zero = self.block.iter().all(|byte| *byte == 0);
        match (&self.state, is_zero) {
            (State::ZeroBlock, true) => self.state = State::End,
            (State::ZeroBlock, false) => return Err(broken(start, "a header follows a block of zeros")),
            (_, true) => self.state = State::ZeroBlock,
            (_, false) => {
                let header = header::parse(&self.block).map_err(|reason| broken(start, reason))?;
                self.state = self.header_read(header, start, end)?;
            }
        }
        Ok(())
    }

    fn header_read(&mut self, mut header: Header, start: u64, end: u64) -> Result<State, TarError> {
        size_of(&header, start)?;
        match header.type_flag {
            type_flag @ (b'x' | b'g' | b'L' | b'K') => {
                let remaining = size_of(&header, start)?;
                if remaining > EXTENSION_MAX {
                    return Err(unsupported("an extended header of its tar is larger than 1 MiB"));
                }
                self.extension.clear();
                if remaining > 0 {
                    return Ok(State::Extension { type_flag, header: Box::new(header), remaining });
                }
                self.apply_extension(type_flag, &header, start)?;
                Ok(State::Header)
            }
            type_flag => {
                let pending = std::mem::take(&mut self.pending);
                pending.records.merge(&mut header).map_err(|reason| broken(start, reason))?;
                if !pending.long_name.is_empty() {
                    header.name = pending.long_name;
                }
                if !pending.long_link.is_empty() {
                    header.link_name = pending.long_link;
                }
                if type_flag == b'S' || pending.records.is_sparse() {
                    return Err(unsupported("its tar has GNU sparse files"));
                }
                if type_flag == 0 {
                    header.type_flag = if header.name.ends_with(b"/") { b'5' } else { b'0' };
                }
                let size = size_of(&header, start)?;
                self.unpacking.apply(&header, &pending.records, end, size)?;
                Ok(skip(size))
            }
        }
    }

    /// The last `take` bytes of an extended header were collected.
    fn extension_read(&mut self, take: usize) -> Result<usize, TarError> {
        let State::Extension { type_flag, header, .. } = std::mem::replace(&mut self.state, State::Header) else {
            return Ok(take);
        };
        self.apply_extension(type_flag, &header, self.offset)?;
        let len = self.extension.len() as u64;
        self.extension.clear();
        self.state = skip(len);
        if let State::Skip { bytes, .. } = &mut self.state {
            *bytes = 0;
        }
        if matches!(self.state, State::Skip { bytes: 0, padding: 0 }) {
            self.state = State::Header;
        }
        Ok(take)
    }

    fn apply_extension(&mut self, type_flag: u8, header: &Header, offset: u64) -> Result<(), TarError> {
        match type_flag {
            b'L' => self.pending.long_name = header::text(&self.extension),
            b'K' => self.pending.long_link = header::text(&self.extension),
            _ => {
                let records = Records::parse(&self.extension).map_err(|reason| broken(offset, reason))?;
                if type_flag == b'x' {
                    self.pending.records = records;
                } else {
                    // Go hands a global header out as an entry, and forgets what the headers before it said.
                    self.pending = Pending::default();
                    let mut header = header.clone();
                    records.merge(&mut header).map_err(|reason| broken(offset, reason))?;
                    self.unpacking.apply_global(&header)?;
                }
            }
        }
        Ok(())
    }
}

/// Bytes that follow the header in the device, without padding.
fn size_of(header: &Header, offset: u64) -> Result<u64, TarError> {
    if header.is_bare() {
        return Ok(0);
    }
    u64::try_from(header.size).map_err(|_| broken(offset, "a header's size is negative"))
}

fn skip(size: u64) -> State {
    match (size, size.wrapping_neg() % BLOCK as u64) {
        (0, _) => State::Header,
        (bytes, padding) => State::Skip { bytes, padding },
    }
}

fn clamp(bytes: &[u8], limit: u64) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX).min(bytes.len())
}

fn broken(offset: u64, reason: &'static str) -> TarError {
    TarError::Broken { offset, reason }
}

fn unsupported(reason: impl Into<String>) -> TarError {
    TarError::Unsupported(reason.into())
}

#[cfg(test)]
mod tests;
