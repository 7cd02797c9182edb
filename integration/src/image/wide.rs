//! An image of many layers and many small files, for what a mounted image costs while nothing happens.

use std::path::Path;

use anyhow::Result;

use super::layer::Attributes;
use super::{Image, LayerWriter, small};
use crate::pattern;

/// Layers on top of the one with busybox.
const LAYERS: u64 = 29;

/// Files of each of them.
const FILES: u64 = 2760;

/// Files in one folder.
const FOLDER_FILES: u64 = 60;

/// Builds the image in `folder`: 30 layers, 80 000 files of less than 4 KiB that do not compress.
pub fn build(folder: &Path, busybox: &Path) -> Result<Image> {
    let mut layers = vec![small::base(folder, busybox)?];
    let mut contents = vec![0; 4096];
    for number in 0..LAYERS {
        let mut layer = LayerWriter::create(folder, "wide")?;
        for file in 0..FILES {
            let directory = format!("data/{number:02}/{:02}", file / FOLDER_FILES);
            if file % FOLDER_FILES == 0 {
                layer.directory(&directory, Attributes::root(0o755))?;
            }
            pattern::fill(number, file << 12, &mut contents);
            let length = (file * 7919 % 4096) as usize;
            layer.file(&format!("{directory}/file-{file}.txt"), Attributes::root(0o644), &contents[..length])?;
        }
        layers.push(layer.finish()?);
    }
    Image::assemble(folder, &layers, "/bin")
}
