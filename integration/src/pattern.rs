//! Device content that can be computed at any offset, so that every byte read can be checked without keeping any.

/// Fills `out` with what device `number` has at `offset`.
pub fn fill(number: u64, offset: u64, out: &mut [u8]) {
    let mut position = offset;
    let mut rest = out;
    while !rest.is_empty() {
        let word = word(number, position / 8).to_le_bytes();
        let skip = (position % 8) as usize;
        let length = rest.len().min(8 - skip);
        let (head, tail) = rest.split_at_mut(length);
        head.copy_from_slice(&word[skip..skip + length]);
        rest = tail;
        position += length as u64;
    }
}

/// Offset of the first byte in `bytes`, read at `offset`, that device `number` does not have.
pub fn first_difference(number: u64, offset: u64, bytes: &[u8]) -> Option<u64> {
    let mut wanted = vec![0; bytes.len()];
    fill(number, offset, &mut wanted);
    bytes.iter().zip(&wanted).position(|(got, wanted)| got != wanted).map(|at| offset + at as u64)
}

/// splitmix64 of the device's number and the word's index.
pub fn word(number: u64, index: u64) -> u64 {
    let mut z = (number << 48 ^ index).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_whole() {
        let mut whole = [0; 100];
        fill(3, 1000, &mut whole);
        for start in 0..100 {
            for end in start..100 {
                let mut piece = vec![0; end - start];
                fill(3, 1000 + start as u64, &mut piece);
                assert_eq!(piece, whole[start..end]);
            }
        }
        whole[17] ^= 1;
        assert_eq!(first_difference(3, 1000, &whole), Some(1017));
    }
}
