//! A zstd blob of any number of frames (RFC 8878), read from the start of one.
//!
//! Nothing stands between or behind frames, as containerd's decoder wants it (klauspost/compress, `frameDec.reset`); skippable
//! frames may stand anywhere and give nothing. A frame's content checksum is checked where it has one, as there.

use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

use super::InflateError;
use super::gzip::{Read, Stop};

/// Largest window of a frame, in bytes: what decoding it costs in memory. Chosen: the Go encoder that image builders use takes
/// 32 MiB at its best level and 8 MiB by default, the zstd program 8 MiB up to level 19; the 128 MiB of `--long` would make
/// the memory of an ingest, and of every node that reads such a blob, a matter of who built the image.
pub const WINDOW_MAX: u64 = 32 << 20;

const FRAME_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Magic, descriptor, window, dictionary's id and content size at their longest (RFC 8878, 3.1.1.1).
const HEADER_MAX: usize = 4 + 1 + 1 + 4 + 8;
/// Magic and size of a skippable frame (RFC 8878, 3.1.2).
const SKIPPABLE_HEADER_LEN: usize = 4 + 4;

/// Reads the frames of a zstd blob one after the other.
pub(crate) struct ZstdReader {
    decoder: DCtx<'static>,
    /// Frames with a larger window are not begun.
    window_allowed: u64,
    state: State,
    /// Bytes of the blob consumed, counted from its start.
    blob_offset: u64,
    /// The last call filled the output, so the decoder may hold more that needs no input.
    may_hold_output: bool,
}

#[derive(Debug)]
enum State {
    /// In a frame's header, of which these are the bytes so far.
    Header { bytes: [u8; HEADER_MAX], len: usize },
    /// Inside a skippable frame.
    Skip { remaining: u32 },
    /// Inside a frame; bytes that it has given and, where the header says so, will have.
    Frame { len: u64, content_size: Option<u64> },
}

const BOUNDARY: State = State::Header { bytes: [0; HEADER_MAX], len: 0 };

/// What the first bytes of a frame say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Header {
    /// So many bytes are needed to say more.
    Needs(usize),
    /// The header is whole; the decoder needs a window of so many bytes.
    Frame { window: u64, content_size: Option<u64> },
    /// So many bytes follow that give nothing.
    Skippable { len: u32 },
}

impl ZstdReader {
    /// Starts at a frame, `blob_offset` bytes into the blob.
    pub(crate) fn at_frame(blob_offset: u64) -> Self {
        Self {
            decoder: new_decoder(),
            window_allowed: WINDOW_MAX,
            state: BOUNDARY,
            blob_offset,
            may_hold_output: false,
        }
    }

    /// Stops in front of frames whose window is larger than `bytes`.
    pub(crate) const fn allow_window(&mut self, bytes: u64) {
        self.window_allowed = bytes;
    }

    /// Bytes of the blob up to where reading is.
    pub(crate) const fn blob_offset(&self) -> u64 {
        self.blob_offset
    }

    /// Whether the blob may end here.
    pub(crate) const fn may_end(&self) -> bool {
        matches!(self.state, State::Header { len: 0, .. })
    }

    /// Reads until the first reason to stop; skippable frames have an end too.
    pub(crate) fn read(&mut self, input: &[u8], output: &mut [u8]) -> Result<Read, InflateError> {
        let (mut consumed, mut produced) = (0, 0);
        let stop = loop {
            let rest = input.get(consumed..).unwrap_or_default();
            let taken = match &mut self.state {
                State::Header { bytes, len } => match parse_header(bytes.get(..*len).unwrap_or_default()) {
                    Err(reason) => return Err(self.broken(reason)),
                    Ok(Header::Needs(_)) if rest.is_empty() => break Stop::Input,
                    Ok(Header::Needs(wanted)) => {
                        let room = bytes.get_mut(*len..wanted).unwrap_or_default();
                        let taken = room.len().min(rest.len());
                        room.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
                        *len += taken;
                        taken
                    }
                    Ok(Header::Frame { window, .. }) if window > WINDOW_MAX => {
                        return Err(InflateError::Window { offset: self.blob_offset, window, max: WINDOW_MAX });
                    }
                    Ok(Header::Frame { window, .. }) if window > self.window_allowed => {
                        // Whoever waits for memory shall hold none, and earlier frames' windows are not needed any more.
                        self.decoder = new_decoder();
                        break Stop::Window { bytes: window };
                    }
                    // The decoder gets the header by itself, so that what it does never depends on how the input is cut.
                    Ok(Header::Frame { content_size, .. }) => {
                        let (bytes, len) = (*bytes, *len);
                        let header = bytes.get(..len).unwrap_or_default();
                        step(&mut self.decoder, header, &mut []).map_err(|reason| self.broken(reason))?;
                        self.state = State::Frame { len: 0, content_size };
                        0
                    }
                    Ok(Header::Skippable { len }) => {
                        self.state = State::Skip { remaining: len };
                        0
                    }
                },
                State::Skip { remaining: 0 } => {
                    self.state = BOUNDARY;
                    break Stop::End;
                }
                State::Skip { .. } if rest.is_empty() => break Stop::Input,
                State::Skip { remaining } => {
                    let skipped = u32::try_from(rest.len()).map_or(*remaining, |len| len.min(*remaining));
                    *remaining -= skipped;
                    skipped as usize
                }
                State::Frame { .. } if rest.is_empty() && !self.may_hold_output => break Stop::Input,
                State::Frame { len, content_size } => {
                    let room = output.get_mut(produced..).unwrap_or_default();
                    let room_len = room.len();
                    let step = step(&mut self.decoder, rest, room);
                    let step = step.map_err(|reason| InflateError::Frame { offset: self.blob_offset, reason })?;
                    *len += step.produced as u64;
                    // The library does not compare them where the last block is empty.
                    let is_wrong = step.is_end && content_size.is_some_and(|size| size != *len);
                    produced += step.produced;
                    consumed += step.consumed;
                    self.blob_offset += step.consumed as u64;
                    if is_wrong {
                        return Err(self.broken("it has another length than its header says"));
                    }
                    self.may_hold_output = step.produced == room_len && !step.is_end;
                    if step.is_end {
                        self.state = BOUNDARY;
                        break Stop::End;
                    }
                    if self.may_hold_output {
                        break Stop::Output;
                    }
                    if step.consumed + step.produced == 0 && !rest.is_empty() {
                        return Err(self.broken("the decoder makes no progress"));
                    }
                    0
                }
            };
            consumed += taken;
            self.blob_offset += taken as u64;
        };
        Ok(Read { consumed, produced, stop })
    }

    const fn broken(&self, reason: &'static str) -> InflateError {
        InflateError::Frame { offset: self.blob_offset, reason }
    }
}

impl std::fmt::Debug for ZstdReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ZstdReader").field("blob_offset", &self.blob_offset).finish_non_exhaustive()
    }
}

fn new_decoder() -> DCtx<'static> {
    let mut decoder = DCtx::create();
    let limited = decoder.set_parameter(DParameter::WindowLogMax(WINDOW_MAX.ilog2()));
    debug_assert!(limited.is_ok());
    decoder
}

/// What one call of the decoder did.
struct Step {
    consumed: usize,
    produced: usize,
    /// The frame is decoded and all its output given.
    is_end: bool,
}

fn step(decoder: &mut DCtx<'_>, input: &[u8], output: &mut [u8]) -> Result<Step, &'static str> {
    let (mut input, mut output) = (InBuffer::around(input), OutBuffer::around(output));
    let hint = decoder.decompress_stream(&mut output, &mut input).map_err(zstd_safe::get_error_name)?;
    Ok(Step { consumed: input.pos(), produced: output.pos(), is_end: hint == 0 })
}

/// RFC 8878, 3.1.1.1 and 3.1.2. Only what decides the header's length and the window; the decoder checks the rest.
fn parse_header(bytes: &[u8]) -> Result<Header, &'static str> {
    let Some((magic, rest)) = bytes.split_first_chunk::<4>() else { return Ok(Header::Needs(4)) };
    match *magic {
        FRAME_MAGIC => {}
        [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
            return Ok(match rest.first_chunk::<4>() {
                None => Header::Needs(SKIPPABLE_HEADER_LEN),
                Some(len) => Header::Skippable { len: u32::from_le_bytes(*len) },
            });
        }
        _ => return Err("no frame begins here"),
    }
    let Some((&descriptor, rest)) = rest.split_first() else { return Ok(Header::Needs(5)) };
    let is_single_segment = descriptor & 1 << 5 != 0;
    let dictionary_len = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let size_len = match descriptor >> 6 {
        0 => usize::from(is_single_segment),
        flag => 1 << flag,
    };
    let wanted = 5 + usize::from(!is_single_segment) + dictionary_len + size_len;
    if bytes.len() < wanted {
        return Ok(Header::Needs(wanted));
    }
    let mut size = [0; 8];
    let fields = rest.iter().skip(wanted - 5 - size_len);
    size.iter_mut().zip(fields).take(size_len).for_each(|(to, from)| *to = *from);
    let content_size = match size_len {
        0 => None,
        2 => Some(u64::from_le_bytes(size) + 256),
        _ => Some(u64::from_le_bytes(size)),
    };
    let window = if is_single_segment {
        content_size.unwrap_or_default()
    } else {
        let window = rest.first().copied().unwrap_or_default();
        let base = 1u64 << (10 + (window >> 3));
        base + base / 8 * u64::from(window & 7)
    };
    Ok(Header::Frame { window, content_size })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame of one raw last block with these fields in its header.
    fn frame(window: Option<u8>, size: Option<(u8, u64)>, content: &[u8]) -> Vec<u8> {
        let (flag, size_len) = match size {
            Some((flag, _)) => (flag, if flag == 0 { 1 } else { 1 << flag }),
            None => (0, 0),
        };
        let mut bytes = FRAME_MAGIC.to_vec();
        bytes.push(flag << 6 | u8::from(window.is_none()) << 5);
        bytes.extend(window);
        if let Some((_, size)) = size {
            bytes.extend_from_slice(&size.to_le_bytes()[..size_len]);
        }
        bytes.extend_from_slice(&(1 | (content.len() as u32) << 3).to_le_bytes()[..3]);
        bytes.extend_from_slice(content);
        bytes
    }

    /// Everything that the blob gives, over pieces and rooms of these lengths, and how many ends there were.
    fn read(blob: &[u8], piece: usize, room: usize) -> Result<(Vec<u8>, usize, bool), InflateError> {
        let (mut reader, mut plain, mut ends) = (ZstdReader::at_frame(0), Vec::new(), 0);
        reader.allow_window(0);
        let mut output = vec![0; room];
        for mut input in blob.chunks(piece) {
            loop {
                let read = reader.read(input, &mut output)?;
                input = &input[read.consumed..];
                plain.extend_from_slice(&output[..read.produced]);
                match read.stop {
                    Stop::Input => break,
                    Stop::End => ends += 1,
                    Stop::Output | Stop::Block { .. } => {}
                    Stop::Window { bytes } => reader.allow_window(bytes),
                }
            }
        }
        assert!(reader.blob_offset() <= blob.len() as u64);
        Ok((plain, ends, reader.may_end()))
    }

    #[test]
    fn frames_and_skippable_frames_over_any_cut() {
        let content: Vec<u8> = (0..9000u32).map(|at| (at / 3) as u8).collect();
        let skippable = |len: u32| [&[0x5a, 0x2a, 0x4d, 0x18][..], &len.to_le_bytes(), &vec![7; len as usize]].concat();
        let mut packed = Vec::with_capacity(20_000);
        zstd_safe::compress(&mut packed, &content, 3).unwrap();
        let blob = [
            skippable(0),
            packed,
            frame(None, Some((0, 0)), b""),
            skippable(300),
            frame(Some(0), None, b"without a size"),
            frame(None, Some((1, 300 - 256)), &content[..300]),
            skippable(5),
        ]
        .concat();
        let want = [&content[..], b"without a size", &content[..300]].concat();
        for (piece, room) in [(1, 1), (1, 9), (7, 5), (100, 64), (usize::MAX, 1 << 17)] {
            let (plain, ends, may_end) = read(&blob, piece, room).unwrap();
            assert!(plain == want, "pieces of {piece}, room for {room}");
            assert_eq!((ends, may_end), (7, true));
        }
        for cut in 1..blob.len() {
            let (_, ends, may_end) = read(&blob[..cut], 13, 1 << 17).unwrap();
            assert!(ends < 7 && (!may_end || ends > 0), "cut at {cut}");
        }
    }

    #[test]
    fn junk_is_refused_everywhere() {
        let good = frame(Some(0), None, b"good");
        for junk in [&b"junk"[..], &[0; 4], &[0x1f, 0x8b, 8, 0]] {
            for blob in [junk.to_vec(), [&good, junk].concat()] {
                let error = read(&blob, 3, 100).unwrap_err();
                assert!(matches!(error, InflateError::Frame { reason: "no frame begins here", .. }), "{error}");
            }
        }
        let mut reserved = good.clone();
        reserved[4] |= 1 << 3;
        assert!(matches!(read(&reserved, 3, 100), Err(InflateError::Frame { .. })));
        assert!(!read(&[&good[..], b"ju"].concat(), 3, 100).unwrap().2, "a magic number that is cut off");
    }

    #[test]
    fn windows_are_bounded() {
        // 2^(10 + 15) bytes, then an eighth more.
        assert!(read(&frame(Some(15 << 3), None, b"32 MiB"), 100, 100).is_ok());
        let error = read(&frame(Some(15 << 3 | 1), None, b"36 MiB"), 100, 100).unwrap_err();
        assert_eq!(error, InflateError::Window { offset: 6, window: 36 << 20, max: 32 << 20 });
        assert!(read(&frame(None, Some((2, 32 << 20)), b""), 100, 100).is_err(), "the size is wrong");
        let error = read(&frame(None, Some((3, u64::MAX)), b""), 100, 100).unwrap_err();
        assert!(matches!(error, InflateError::Window { window: u64::MAX, .. }), "{error}");
    }
}
