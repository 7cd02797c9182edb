//! Which bytes of a checkpoint's window the span behind it refers to. The others need not be kept: setting them to zero halves
//! what a packed window costs.
//!
//! Deflate reaches back at most 32 KiB, so only the first 32 KiB of output can refer to the window. They are inflated twice
//! more, with windows whose bytes tell their own position: the low eight bits of it in one, the high seven in the other. The
//! eighth bit of the second is chosen so that the two differ at every position; so bytes of output that are equal are literals,
//! and any others name the byte of the window that they are copies of.

use super::WINDOW_MAX;
use super::sys::{At, RawInflate};

/// Follows the first output behind a checkpoint. Reusable.
pub(crate) struct WindowProbe {
    window: Vec<u8>,
    low: Track,
    high: Track,
}

struct Track {
    raw: RawInflate,
    output: Vec<u8>,
    len: usize,
    /// No more output is wanted or can come.
    done: bool,
}

impl WindowProbe {
    pub(crate) fn new() -> Self {
        Self { window: Vec::with_capacity(WINDOW_MAX), low: Track::new(), high: Track::new() }
    }

    /// Starts at a block whose first `bits` bits are the high ones of the byte `first`, after the output `window`.
    pub(crate) fn start(&mut self, bits: u8, first: u8, window: &[u8]) {
        self.window.clear();
        self.window.extend_from_slice(window.get(window.len().saturating_sub(WINDOW_MAX)..).unwrap_or_default());
        let positions = || 0..self.window.len();
        self.low.start(bits, first, positions().map(low_mark));
        self.high.start(bits, first, positions().map(high_mark));
    }

    /// Takes the compressed bytes behind the ones that [`WindowProbe::start`] was given; ignores what is not needed.
    pub(crate) fn push(&mut self, input: &[u8]) {
        self.low.push(input);
        self.high.push(input);
    }

    /// The window with zeros where the first `len` bytes of output do not refer to it, from the first byte that they refer to.
    pub(crate) fn sparse_window(&self, len: u64) -> Vec<u8> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let mut sparse = vec![0; self.window.len()];
        let mut first_used = sparse.len();
        for (low, high) in self.low.output().iter().zip(self.high.output()).take(len) {
            if low != high {
                let position = usize::from(*low) | usize::from(high & 0x7f) << 8;
                if let (Some(to), Some(from)) = (sparse.get_mut(position), self.window.get(position)) {
                    *to = *from;
                    first_used = first_used.min(position);
                }
            }
        }
        sparse.drain(..first_used);
        sparse
    }
}

const fn low_mark(position: usize) -> u8 {
    position as u8
}

const fn high_mark(position: usize) -> u8 {
    (position >> 8) as u8 & 0x7f | !low_mark(position) & 0x80
}

impl Track {
    fn new() -> Self {
        Self { raw: RawInflate::new(), output: vec![0; WINDOW_MAX], len: 0, done: true }
    }

    fn start(&mut self, bits: u8, first: u8, marks: impl Iterator<Item = u8>) {
        self.raw.reset();
        // The output's room holds the window until the decoder has its copy.
        let mut window_len = 0;
        for (to, mark) in self.output.iter_mut().zip(marks) {
            *to = mark;
            window_len += 1;
        }
        self.raw.set_window(self.output.get(..window_len).unwrap_or_default());
        if bits > 0 {
            self.raw.prime(bits, first >> (8 - bits));
        }
        self.len = 0;
        self.done = false;
    }

    fn push(&mut self, mut input: &[u8]) {
        while !self.done {
            let room = self.output.get_mut(self.len..).unwrap_or_default();
            // Errors end it: the blob's own decoder sees them too.
            let Ok(progress) = self.raw.inflate(input, room, false) else {
                self.done = true;
                return;
            };
            self.len += progress.produced;
            input = input.get(progress.consumed..).unwrap_or_default();
            self.done = progress.at == At::End || self.len == self.output.len();
            if progress.consumed == 0 && progress.produced == 0 {
                return;
            }
        }
    }

    fn output(&self) -> &[u8] {
        self.output.get(..self.len).unwrap_or_default()
    }
}

impl std::fmt::Debug for WindowProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WindowProbe").field("window", &self.window.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_tell_every_position() {
        for position in 0..WINDOW_MAX {
            let (low, high) = (low_mark(position), high_mark(position));
            assert_ne!(low, high);
            assert_eq!(usize::from(low) | usize::from(high & 0x7f) << 8, position);
        }
    }
}
