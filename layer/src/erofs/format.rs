//! EROFS on disk. Source of all of it: the kernel's fs/erofs/erofs_fs.h, inode.c, data.c and dir.c.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

/// log2 of the block size: the padding of a tar, so that every file starts at a block of the device.
pub(super) const BLOCK_LOG2: u8 = 9;
pub(super) const BLOCK: usize = 1 << BLOCK_LOG2;

/// Where the superblock starts.
pub(super) const SUPER_OFFSET: usize = 1024;

/// Bytes before the first inode: an empty kibibyte, superblock, device slot, and the rest of their block.
pub(super) const HEAD: usize = 1536;

/// An inode's number is its offset in these units.
pub(super) const SLOT: u64 = 32;

/// Bytes of an inode without xattrs, chunk indexes and tail.
pub(super) const INODE: usize = size_of::<Inode>();

/// Bytes of a chunk index.
pub(super) const CHUNK_INDEX: usize = size_of::<ChunkIndex>();

/// Largest log2 of a chunk's blocks (`EROFS_CHUNK_FORMAT_BLKBITS_MASK`).
pub(super) const CHUNK_BLOCKS_LOG2_MAX: u32 = 31;

/// The number of the one extra device.
pub(super) const DEVICE: u16 = 1;

/// `i_u.c.format`: 8-byte chunk indexes follow.
pub(super) const CHUNK_FORMAT_INDEXES: u32 = 0x20;

/// `i_format`: extended inode; the layout stands above it.
pub(super) const EXTENDED: u16 = 1;
pub(super) const LAYOUT_SHIFT: u16 = 1;
pub(super) const FLAT_PLAIN: u16 = 0;
pub(super) const FLAT_INLINE: u16 = 2;
pub(super) const CHUNK_BASED: u16 = 4;

const MAGIC: u32 = 0xE0F5_E1E2;
/// MTIME: an extended inode's time is its mtime. Not SB_CHKSUM: it would cover 512 bytes of an image that this node
/// wrote itself, and fsck.erofs 1.8.6 (Debian 13) crashes on it where blocks are smaller than a kibibyte.
const FEATURE_COMPAT: u32 = 0x2;
/// CHUNKED_FILE and DEVICE_TABLE.
const FEATURE_INCOMPAT: u32 = 0x4 | 0x8;

const _: () = assert!(size_of::<SuperBlock>() == 128);
const _: () = assert!(size_of::<DeviceSlot>() == 128);
const _: () = assert!(size_of::<Inode>() == 64);
const _: () = assert!(size_of::<ChunkIndex>() == 8);
const _: () = assert!(size_of::<Dirent>() == 12);
const _: () = assert!(HEAD - SUPER_OFFSET == BLOCK && (HEAD as u64).is_multiple_of(SLOT));

#[derive(IntoBytes, Immutable, Clone, Copy)]
#[repr(C)]
struct SuperBlock {
    magic: U32,
    checksum: U32,
    feature_compat: U32,
    block_log2: u8,
    extension_slots: u8,
    root_nid: U16,
    inodes: U64,
    build_time: U64,
    build_time_nanos: U32,
    blocks: U32,
    meta_block: U32,
    xattr_block: U32,
    uuid: [u8; 16],
    volume_name: [u8; 16],
    feature_incompat: U32,
    compression: U16,
    extra_devices: U16,
    device_table_slot: U16,
    directory_block_log2: u8,
    xattr_prefix_count: u8,
    xattr_prefix_start: U32,
    packed_nid: U64,
    reserved: [u8; 24],
}

#[derive(IntoBytes, Immutable, Clone, Copy)]
#[repr(C)]
struct DeviceSlot {
    tag: [u8; 64],
    blocks: U32,
    mapped_block: U32,
    reserved: [u8; 56],
}

/// `struct erofs_inode_extended`.
#[derive(IntoBytes, Immutable, Clone, Copy)]
#[repr(C)]
pub(super) struct Inode {
    pub(super) format: U16,
    pub(super) xattr_count: U16,
    pub(super) mode: U16,
    pub(super) reserved: U16,
    pub(super) size: U64,
    /// Block address, device number or chunk format, by the kind of file.
    pub(super) body: U32,
    pub(super) number: U32,
    pub(super) uid: U32,
    pub(super) gid: U32,
    pub(super) mtime: I64,
    pub(super) mtime_nanos: U32,
    pub(super) links: U32,
    pub(super) reserved2: [u8; 16],
}

/// `struct erofs_inode_chunk_index`.
#[derive(IntoBytes, Immutable, Clone, Copy)]
#[repr(C)]
pub(super) struct ChunkIndex {
    pub(super) advise: U16,
    pub(super) device: U16,
    pub(super) block: U32,
}

/// `struct erofs_dirent`.
#[derive(IntoBytes, Immutable, Clone, Copy)]
#[repr(C, packed)]
pub(super) struct Dirent {
    pub(super) nid: U64,
    pub(super) name_offset: U16,
    pub(super) file_type: u8,
    pub(super) reserved: u8,
}

/// The bytes before the first inode, which is the root's.
pub(super) fn head(uuid: [u8; 16], blocks: u32, inodes: u64, device_blocks: u32) -> [u8; HEAD] {
    let zero = U32::ZERO;
    let super_block = SuperBlock {
        magic: MAGIC.into(),
        checksum: zero,
        feature_compat: FEATURE_COMPAT.into(),
        block_log2: BLOCK_LOG2,
        extension_slots: 0,
        root_nid: const { U16::new((HEAD as u64 / SLOT) as u16) },
        inodes: inodes.into(),
        build_time: U64::ZERO,
        build_time_nanos: zero,
        blocks: blocks.into(),
        meta_block: zero,
        xattr_block: zero,
        uuid,
        volume_name: [0; 16],
        feature_incompat: FEATURE_INCOMPAT.into(),
        compression: U16::ZERO,
        extra_devices: DEVICE.into(),
        device_table_slot: const { U16::new(((SUPER_OFFSET + size_of::<SuperBlock>()) / size_of::<DeviceSlot>()) as u16) },
        directory_block_log2: 0,
        xattr_prefix_count: 0,
        xattr_prefix_start: zero,
        packed_nid: U64::ZERO,
        reserved: [0; 24],
    };
    let slot = DeviceSlot { tag: [0; 64], blocks: device_blocks.into(), mapped_block: zero, reserved: [0; 56] };
    let parts = super_block.as_bytes().iter().chain(slot.as_bytes());
    let mut head = [0; HEAD];
    head.iter_mut().skip(SUPER_OFFSET).zip(parts).for_each(|(to, from)| *to = *from);
    head
}

/// The kernel's `new_encode_dev`.
pub(super) const fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_the_kernels() {
        assert_eq!(device_number(0, 0), 0);
        assert_eq!(device_number(8, 1), 0x801);
        assert_eq!(device_number(0xfff, 0xf_ffff), 0xffff_ffff);
        assert_eq!(device_number(1, 0x100), 0x10_0100);
    }
}
