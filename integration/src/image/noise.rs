//! An image of one large file that nothing makes smaller, for what only moves bytes.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest as _, Sha256};

use super::layer::Attributes;
use super::{Image, LayerWriter, hex_of, small};
use crate::pattern;

/// The file.
pub const FILE: &str = "/srv/noise";

/// Reads the whole file, which costs little more than its bytes do, and says so.
pub const READ: [&str; 4] = ["busybox", "sh", "-c", "busybox cat /srv/noise > /dev/null && echo read"];

/// Reads the whole file and prints what [`line()`] gives.
pub const PROGRAM: [&str; 3] = ["busybox", "sha256sum", FILE];

/// Builds the image into the cache, or opens it when it is there already. Its [`FILE`] has `size` bytes, in a layer of its own.
pub fn build(cache: &Path, busybox: &Path, size: usize) -> Result<Image> {
    let folder = cache.join(format!("noise-{size}"));
    if let Ok(image) = Image::open(&folder) {
        return Ok(image);
    }
    // Of a run that was killed.
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    let contents = contents(size);
    let mut layer = LayerWriter::create(&folder, "noise")?;
    layer.directory("srv", Attributes::root(0o755))?;
    layer.file(&FILE[1..], Attributes::root(0o644), &contents)?;
    Image::assemble(&folder, &[small::base(&folder, busybox)?, layer.finish()?], "/bin")
}

/// What [`PROGRAM`] prints where all bytes are right.
pub fn line(size: usize) -> String {
    format!("{}  {FILE}", hex_of(&Sha256::digest(contents(size))))
}

fn contents(size: usize) -> Vec<u8> {
    let mut contents = vec![0; size];
    pattern::fill(size as u64, 0, &mut contents);
    contents
}
