//! Raw inflate on `libz-rs-sys` behind a safe type: the crate's only unsafe code.
//!
//! The C-shaped calls are needed because the safe interface of zlib-rs hides block boundaries (`data_type`) and the bit
//! position (`inflatePrime`).

use std::ptr;

use libz_rs_sys as z;

/// Negative: raw deflate without header and trailer, largest window.
const WINDOW_BITS: i32 = -15;
const Z_OK: i32 = 0;
const Z_STREAM_END: i32 = 1;
const Z_DATA_ERROR: i32 = -3;
const Z_BUF_ERROR: i32 = -5;
const Z_NO_FLUSH: i32 = 0;
const Z_BLOCK: i32 = 5;
/// `data_type` after `inflate`: bits that were read but not used.
const BITS_UNUSED: i32 = 0x3f;
/// `data_type`: the current block is the last of the stream.
const IN_LAST_BLOCK: i32 = 0x40;
/// `data_type`: stopped between two blocks.
const AT_BLOCK: i32 = 0x80;

/// A decoder of one raw deflate stream at a time.
pub(crate) struct RawInflate {
    /// Boxed, so that its address stays the same while the type moves: zlib's state may point back at it.
    stream: Box<z::z_stream>,
}

/// What one call of [`RawInflate::inflate`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) consumed: usize,
    pub(crate) produced: usize,
    pub(crate) at: At,
}

/// Where [`RawInflate::inflate`] stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// Somewhere, for lack of input or room for output.
    Anywhere,
    /// In front of a block that is not the first. The last `bits_unused` bits of what was consumed, at most 7, belong to it.
    Block { bits_unused: u8 },
    /// Behind the last block; the rest of its last byte is consumed.
    End,
}

/// The input is not deflate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DataError {
    /// How much of the input was read when it was seen; depends on how the input was cut.
    pub(crate) consumed: usize,
}

impl RawInflate {
    pub(crate) fn new() -> Self {
        let mut stream = Box::new(z::z_stream::default());
        // SAFETY: the stream is valid for writing, its allocator fields are the defaults that the library replaces by the
        // Rust allocator, and the version is the library's own static string.
        let code =
            unsafe { z::inflateInit2_(&mut *stream, WINDOW_BITS, z::zlibVersion(), size_of::<z::z_stream>() as i32) };
        // Fails only for another library version or without memory, where Rust aborts as well.
        assert_eq!(code, Z_OK, "inflateInit2");
        Self { stream }
    }

    /// Starts with another stream.
    pub(crate) fn reset(&mut self) {
        // SAFETY: `new` initialised the stream.
        let code = unsafe { z::inflateReset(&mut *self.stream) };
        debug_assert_eq!(code, Z_OK);
    }

    /// Gives the `bits` low bits of `value` as input before any byte; right after `new` or `reset`, at most 7 bits.
    pub(crate) fn prime(&mut self, bits: u8, value: u8) {
        debug_assert!(bits < 8);
        // SAFETY: `new` initialised the stream.
        let code = unsafe { z::inflatePrime(&mut *self.stream, i32::from(bits), i32::from(value)) };
        debug_assert_eq!(code, Z_OK);
    }

    /// Gives the output before the stream's first block that it may refer to; at most the last 32 KiB are used.
    pub(crate) fn set_window(&mut self, window: &[u8]) {
        let window = &window[window.len().saturating_sub(super::WINDOW_MAX)..];
        // SAFETY: `new` initialised the stream; pointer and length are those of a slice, which the call only reads.
        let code = unsafe { z::inflateSetDictionary(&mut *self.stream, window.as_ptr(), window.len() as u32) };
        debug_assert_eq!(code, Z_OK);
    }

    /// Inflates from `input` to `output` until one of them is used up, at the end of the stream, or in front of the next
    /// block if `stop_at_blocks`. Each block but the first is reported once.
    pub(crate) fn inflate(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        stop_at_blocks: bool,
    ) -> Result<Progress, DataError> {
        let input_len = u32::try_from(input.len()).unwrap_or(u32::MAX);
        let output_len = u32::try_from(output.len()).unwrap_or(u32::MAX);
        self.stream.next_in = input.as_ptr();
        self.stream.avail_in = input_len;
        self.stream.next_out = output.as_mut_ptr();
        self.stream.avail_out = output_len;
        // SAFETY: `new` initialised the stream; both pointers are valid for their lengths, which are no more than those of
        // the slices, and the borrows outlive the call.
        let code = unsafe { z::inflate(&mut *self.stream, if stop_at_blocks { Z_BLOCK } else { Z_NO_FLUSH }) };
        let consumed = (input_len - self.stream.avail_in) as usize;
        let produced = (output_len - self.stream.avail_out) as usize;
        // Nothing may look at the slices after their borrows end.
        self.stream.next_in = ptr::null();
        self.stream.avail_in = 0;
        self.stream.next_out = ptr::null_mut();
        self.stream.avail_out = 0;
        let data_type = self.stream.data_type;
        let at = match code {
            Z_STREAM_END => At::End,
            Z_OK if stop_at_blocks && data_type & (AT_BLOCK | IN_LAST_BLOCK) == AT_BLOCK => {
                let bits_unused = (data_type & BITS_UNUSED) as u8;
                // The decoder gives whole bytes back (zlib.h, inflate: "data_type is set to the number of unused bits").
                if bits_unused > 7 {
                    return Err(DataError { consumed });
                }
                At::Block { bits_unused }
            }
            // No progress is no fault: the caller sees it in the counts.
            Z_OK | Z_BUF_ERROR => At::Anywhere,
            // Raw deflate never needs a dictionary, and the arguments cannot be wrong.
            code => {
                debug_assert_eq!(code, Z_DATA_ERROR);
                return Err(DataError { consumed });
            }
        };
        Ok(Progress { consumed, produced, at })
    }
}

impl Drop for RawInflate {
    fn drop(&mut self) {
        // SAFETY: `new` initialised the stream, and nothing uses it after this.
        unsafe { z::inflateEnd(&mut *self.stream) };
    }
}

// SAFETY: the stream and the state behind it belong to this value alone; the library has no thread-local or shared state,
// and the default allocator is Rust's global one.
unsafe impl Send for RawInflate {}
// SAFETY: there are no methods on a shared reference.
unsafe impl Sync for RawInflate {}
