//! The checksum at the end of a metadata image: EROFS has none, and the kernel would show what a flipped bit makes of names and offsets.
//!
//! Behind the last block of the image, where the kernel does not look: `DROVSEAL` and BLAKE3 of all before.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

const MAGIC: &[u8; 8] = b"DROVSEAL";
const SEAL_LEN: usize = MAGIC.len() + 32;
const READ: usize = 256 << 10;

/// Writes through and computes the checksum of what is written.
pub(super) struct Sealing<W> {
    out: W,
    hash: blake3::Hasher,
}

impl<W: Write> Sealing<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, hash: blake3::Hasher::new() }
    }

    /// Writes the checksum; gives what was written to.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.out.write_all(MAGIC)?;
        self.out.write_all(self.hash.finalize().as_bytes())?;
        Ok(self.out)
    }
}

impl<W: Write> Write for Sealing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hash.update(bytes.get(..written).unwrap_or_default());
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Whether the file is what was sealed.
pub(super) fn is_intact(path: &Path) -> io::Result<bool> {
    let mut file = File::open(path)?;
    let Some(sealed) = file.metadata()?.len().checked_sub(SEAL_LEN as u64) else { return Ok(false) };
    let mut hash = blake3::Hasher::new();
    let (mut rest, mut buffer) = (sealed, vec![0; READ]);
    while rest > 0 {
        let part = buffer.get_mut(..rest.min(READ as u64) as usize).unwrap_or_default();
        file.read_exact(part)?;
        hash.update(part);
        rest -= part.len() as u64;
    }
    let mut seal = [0; SEAL_LEN];
    file.read_exact(&mut seal)?;
    let (magic, sum) = seal.split_at(MAGIC.len());
    Ok(magic == MAGIC && hash.finalize().as_bytes() == sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_change_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let sealed = |len: usize| {
            let mut sealing = Sealing::new(Vec::new());
            sealing.write_all(&vec![7; len]).unwrap();
            sealing.finish().unwrap()
        };
        for len in [0, 1, READ - 1, READ + 1] {
            let bytes = sealed(len);
            std::fs::write(&path, &bytes).unwrap();
            assert!(is_intact(&path).unwrap());
            for at in [0, len / 2, len, len + 9, bytes.len() - 1] {
                let mut wrong = bytes.clone();
                wrong[at] ^= 1;
                std::fs::write(&path, &wrong).unwrap();
                assert!(!is_intact(&path).unwrap(), "{at} of {len}");
            }
            std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
            assert!(!is_intact(&path).unwrap());
        }
        std::fs::write(&path, b"short").unwrap();
        assert!(!is_intact(&path).unwrap());
    }
}
