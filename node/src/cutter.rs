//! Cuts device bytes that begin anywhere into whole chunks.

use layer::{ChunkIndex, Geometry};

/// Takes device bytes in order and gives the chunks that are whole in them. Bytes before the first chunk that begins in
/// them, and after the last that ends in them, are dropped.
#[derive(Debug)]
pub(crate) struct Cutter {
    geometry: Geometry,
    /// Device offset of the next byte.
    at: u64,
    /// The bytes of the current chunk so far; empty while skipping to its end.
    chunk: Vec<u8>,
}

impl Cutter {
    /// Starts at the device byte `start`.
    pub(crate) fn new(geometry: Geometry, start: u64) -> Self {
        Self { geometry, at: start, chunk: Vec::new() }
    }

    /// Device offset of the next byte.
    pub(crate) const fn at(&self) -> u64 {
        self.at
    }

    /// Takes the next bytes; those behind the end of the device are ignored.
    pub(crate) fn push(&mut self, mut bytes: &[u8], sink: &mut dyn FnMut(ChunkIndex, &[u8])) {
        while !bytes.is_empty() && self.at < self.geometry.device_size() {
            let chunk = ChunkIndex((self.at >> self.geometry.chunk_log2()) as u32);
            let range = self.geometry.range(chunk);
            let take = bytes.len().min(usize::try_from(range.end - self.at).unwrap_or(usize::MAX));
            let (now, rest) = bytes.split_at(take);
            let begins = self.at == range.start;
            self.at += take as u64;
            bytes = rest;
            if begins && self.at == range.end {
                sink(chunk, now);
            } else if begins || !self.chunk.is_empty() {
                self.chunk.extend_from_slice(now);
                if self.at == range.end {
                    sink(chunk, &self.chunk);
                    self.chunk.clear();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn gives_exactly_the_whole_chunks(
            size in 1u64..50_000,
            start in 0u64..50_000,
            len in 0usize..50_000,
            pieces in prop::collection::vec(1usize..9000, 1..10),
        ) {
            let geometry = Geometry::new(size, 12).unwrap();
            let byte = |at: u64| (at % 251) as u8;
            let bytes: Vec<u8> = (0..len as u64).map(|at| byte(start + at)).collect();
            let mut cutter = Cutter::new(geometry, start);
            let mut got = Vec::new();
            let mut rest = &bytes[..];
            for piece in pieces.iter().cycle() {
                let (now, after) = rest.split_at((*piece).min(rest.len()));
                cutter.push(now, &mut |chunk, plain| got.push((chunk.0, plain.to_vec())));
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            let end = start + len as u64;
            let want: Vec<_> = geometry
                .chunks()
                .filter(|chunk| {
                    let range = geometry.range(ChunkIndex(*chunk));
                    range.start >= start && range.end <= end
                })
                .map(|chunk| (chunk, geometry.range(ChunkIndex(chunk)).map(byte).collect::<Vec<u8>>()))
                .collect();
            prop_assert_eq!(got, want);
        }
    }
}
