//! What a layer takes when it is unpacked.

use super::Tree;
use crate::entry::{Entry, Kind};

/// Disk and inodes of an unpacked layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Bytes of allocated blocks.
    pub bytes: u64,
    /// Inodes, that of the root included.
    pub inodes: u64,
}

/// Blocks of ext4 and xfs by default.
const BLOCK: u64 = 4096;

/// A symbolic link that is shorter stands in its inode (ext4 `EXT4_N_BLOCKS`, 60 bytes with the final NUL).
const SYMLINK_INLINE: usize = 60;

/// Extended attributes that together take less stand in the inode: 256 bytes less what every inode has.
const XATTRS_INLINE: usize = 96;

impl Tree {
    /// What `du` would count if the layer were unpacked on ext4: whole blocks of files, directories and long links, each
    /// inode once. Exact but for directories of several blocks.
    pub fn unpacked(&self) -> Unpacked {
        let outline = self.outline();
        let mut unpacked = Unpacked::default();
        for (index, entry) in self.entries().iter().enumerate() {
            let bytes = match &entry.kind {
                Kind::HardLink { .. } => continue,
                Kind::Regular { size, .. } => size.next_multiple_of(BLOCK),
                Kind::Directory { .. } | Kind::ImplicitDirectory { .. } | Kind::LateDirectory { .. } => {
                    let names = outline.children(index).filter_map(|child| self.entries().get(child));
                    // `.`, `..` and the checksum of the block; then 8 bytes and the name for each, in fours.
                    let names: u64 = names.map(|child| (8 + name_len(child)).next_multiple_of(4)).sum();
                    (36 + names).next_multiple_of(BLOCK)
                }
                Kind::Symlink { target } if target.len() >= SYMLINK_INLINE => BLOCK,
                Kind::Symlink { .. }
                | Kind::CharDevice { .. }
                | Kind::BlockDevice { .. }
                | Kind::Fifo
                | Kind::Whiteout => 0,
            };
            let xattrs: usize = entry.xattrs.iter().map(|xattr| 16 + xattr.name.len() + xattr.value.len()).sum();
            unpacked.bytes += bytes + if xattrs > XATTRS_INLINE { BLOCK } else { 0 };
            unpacked.inodes += 1;
        }
        unpacked
    }
}

fn name_len(entry: &Entry) -> u64 {
    entry.path.rsplit(|byte| *byte == b'/').next().map_or(0, |name| name.len() as u64)
}
