//! A gzip file of any number of members, read from its start or from a checkpoint.

use super::InflateError;
use super::member::{MemberHeader, Parsed};
use super::sys::{At, RawInflate};

/// Reads the members of a gzip blob one after the other. The trailers' lengths are checked; their CRC-32 is not. containerd's
/// decoder checks it, and then compares the digest of the device with the image's diffID. Drover compares that digest too (a
/// node takes an index only under a chain id that its diffID belongs to), which proves more, at less cost.
pub(crate) struct GzipReader {
    raw: RawInflate,
    state: State,
    /// Bytes of the blob consumed, counted from its start.
    blob_offset: u64,
    /// The last byte that the decoder consumed.
    last_byte: u8,
    /// Output of the current member; counted from the checkpoint if reading began inside the member.
    member_len: u64,
    /// The current member was read from its start.
    member_whole: bool,
}

enum State {
    Header(MemberHeader),
    /// Waits for the first byte of a block that starts inside it.
    Resume {
        bits: u8,
    },
    Deflate,
    Trailer {
        bytes: [u8; 8],
        len: usize,
    },
    /// Behind the last member: whatever comes is ignored.
    Junk,
}

/// What one call of a reader did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Read {
    pub(crate) consumed: usize,
    pub(crate) produced: usize,
    pub(crate) stop: Stop,
}

/// Why a reader came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// All input is consumed.
    Input,
    /// The output is full.
    Output,
    /// In front of a deflate block that is neither a member's first nor behind its last.
    Block {
        /// Byte of the blob in which it starts.
        blob_offset: u64,
        /// How many high bits of that byte belong to it, 1 to 7; 0: all.
        bits: u8,
        /// That byte, where it was read already: if `bits` is not 0.
        first: u8,
    },
    /// Behind a member's trailer or a zstd frame: another may follow.
    End,
    /// In front of a zstd frame whose window is larger than was allowed so far.
    Window {
        /// Bytes of the window.
        bytes: u64,
    },
}

impl GzipReader {
    /// Starts at a member's header, `blob_offset` bytes into the blob.
    pub(crate) fn at_member(blob_offset: u64) -> Self {
        Self {
            raw: RawInflate::new(),
            state: State::Header(MemberHeader::first()),
            blob_offset,
            last_byte: 0,
            member_len: 0,
            member_whole: true,
        }
    }

    /// Starts at a deflate block in the `bits` high bits of the byte at `blob_offset`, or with that byte if 0.
    pub(crate) fn at_block(blob_offset: u64, bits: u8, window: &[u8]) -> Self {
        let mut raw = RawInflate::new();
        raw.set_window(window);
        let state = if bits == 0 { State::Deflate } else { State::Resume { bits } };
        Self { raw, state, blob_offset, last_byte: 0, member_len: 0, member_whole: false }
    }

    /// Bytes of the blob up to where reading is.
    pub(crate) fn blob_offset(&self) -> u64 {
        self.blob_offset
    }

    /// Output of the current member so far.
    pub(crate) fn member_len(&self) -> u64 {
        self.member_len
    }

    /// Whether the blob may end here.
    pub(crate) fn may_end(&self) -> bool {
        match &self.state {
            State::Header(header) => header.may_end(),
            State::Junk => true,
            State::Resume { .. } | State::Deflate | State::Trailer { .. } => false,
        }
    }

    /// Reads until the first reason to stop; blocks are one if `stop_at_blocks`.
    pub(crate) fn read(&mut self, input: &[u8], output: &mut [u8], stop_at_blocks: bool) -> Result<Read, InflateError> {
        let (mut consumed, mut produced) = (0, 0);
        let stop = loop {
            let rest = input.get(consumed..).unwrap_or_default();
            match &mut self.state {
                State::Deflate => {
                    let room = output.get_mut(produced..).unwrap_or_default();
                    let room_len = room.len();
                    let progress = self
                        .raw
                        .inflate(rest, room, stop_at_blocks)
                        .map_err(|error| InflateError::Deflate { offset: self.blob_offset + error.consumed as u64 })?;
                    consumed += progress.consumed;
                    produced += progress.produced;
                    if let Some(last) = progress.consumed.checked_sub(1).and_then(|last| rest.get(last)) {
                        self.last_byte = *last;
                    }
                    self.blob_offset += progress.consumed as u64;
                    self.member_len += progress.produced as u64;
                    match progress.at {
                        At::End => self.state = State::Trailer { bytes: [0; 8], len: 0 },
                        At::Block { bits_unused } => {
                            let (bits, first) = (bits_unused, self.last_byte);
                            let blob_offset = self.blob_offset - u64::from(bits > 0);
                            break Stop::Block { blob_offset, bits, first };
                        }
                        At::Anywhere if progress.produced == room_len => break Stop::Output,
                        At::Anywhere if progress.consumed == rest.len() => break Stop::Input,
                        // In front of the last block, which is no place to start again.
                        At::Anywhere if progress.consumed + progress.produced > 0 => {}
                        At::Anywhere => return Err(InflateError::Deflate { offset: self.blob_offset }),
                    }
                }
                _ if rest.is_empty() => break Stop::Input,
                State::Header(header) => {
                    let (len, parsed) = header.push(rest).map_err(|(at, reason)| InflateError::Member {
                        offset: self.blob_offset + at as u64,
                        reason,
                    })?;
                    consumed += len;
                    self.blob_offset += len as u64;
                    match parsed {
                        Parsed::Partly => {}
                        Parsed::Whole => {
                            self.raw.reset();
                            self.member_len = 0;
                            self.member_whole = true;
                            self.state = State::Deflate;
                        }
                        Parsed::Junk => self.state = State::Junk,
                    }
                }
                State::Resume { bits } => {
                    let bits = *bits;
                    let byte = rest.first().copied().unwrap_or_default();
                    self.raw.prime(bits, byte >> (8 - bits));
                    consumed += 1;
                    self.blob_offset += 1;
                    self.state = State::Deflate;
                }
                State::Trailer { bytes, len } => {
                    let room = bytes.get_mut(*len..).unwrap_or_default();
                    let take = room.len().min(rest.len());
                    room.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
                    *len += take;
                    consumed += take;
                    self.blob_offset += take as u64;
                    if *len == bytes.len() {
                        let [_, _, _, _, size @ ..] = *bytes;
                        if self.member_whole && u32::from_le_bytes(size) != self.member_len as u32 {
                            return Err(InflateError::Member {
                                offset: self.blob_offset,
                                reason: "the trailer has another length than the member",
                            });
                        }
                        self.state = State::Header(MemberHeader::next());
                        break Stop::End;
                    }
                }
                State::Junk => {
                    consumed += rest.len();
                    self.blob_offset += rest.len() as u64;
                }
            }
        };
        Ok(Read { consumed, produced, stop })
    }
}

impl std::fmt::Debug for GzipReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GzipReader").field("blob_offset", &self.blob_offset).finish_non_exhaustive()
    }
}
