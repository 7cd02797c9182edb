//! Writes a planned image from front to back.

use std::io;

use zerocopy::IntoBytes as _;
use zerocopy::little_endian::{U16, U32};

use super::directory;
use super::format::{
    BLOCK, CHUNK_BASED, CHUNK_FORMAT_INDEXES, CHUNK_INDEX, ChunkIndex, DEVICE, EXTENDED, FLAT_INLINE, FLAT_PLAIN,
    Inode, LAYOUT_SHIFT, device_number, head,
};
use super::plan::{Body, Place, Plan};
use crate::entry::{Entry, Kind};
use crate::tree::{DirectoryAttributes, xattr};

pub(super) fn write(plan: &Plan<'_>, out: &mut dyn io::Write) -> io::Result<()> {
    let mut out = Output { out: io::BufWriter::with_capacity(128 << 10, out), position: 0 };
    let device_blocks = plan.options.device_size.div_ceil(BLOCK as u64) as u32;
    out.write(&head(plan.options.uuid, plan.blocks() as u32, plan.inode_count(), device_blocks))?;
    for (index, entry, place) in plan.inodes() {
        out.pad_to(place.offset)?;
        out.write(inode(plan, index, entry, place).as_bytes())?;
        write_xattrs(plan, index, entry, &mut out)?;
        match (&entry.kind, place.body) {
            (Kind::Regular { offset, .. }, Body::Chunks { count, blocks_log2 }) => {
                out.pad_to(out.position.next_multiple_of(CHUNK_INDEX as u64))?;
                for chunk in 0..count {
                    let block = offset / BLOCK as u64 + (chunk << blocks_log2);
                    let index = ChunkIndex { advise: U16::ZERO, device: DEVICE.into(), block: U32::new(block as u32) };
                    out.write(index.as_bytes())?;
                }
            }
            (_, Body::Blocks { size, inline: true, .. }) => {
                let content = content(plan, index, entry);
                let tail = size as usize / BLOCK * BLOCK;
                out.write(content.get(tail..).unwrap_or_default())?;
            }
            _ => {}
        }
    }
    for (index, entry, place) in plan.inodes() {
        let Body::Blocks { block, size, inline } = place.body else { continue };
        let len = if inline { size as usize / BLOCK * BLOCK } else { size as usize };
        if len > 0 {
            out.pad_to(block * BLOCK as u64)?;
            out.write(content(plan, index, entry).get(..len).unwrap_or_default())?;
        }
    }
    out.pad_to(plan.blocks() * BLOCK as u64)?;
    io::Write::flush(&mut out.out)
}

fn inode(plan: &Plan<'_>, index: usize, entry: &Entry, place: Place) -> Inode {
    const REGULAR: u16 = 0o100_000;
    const DIRECTORY: u16 = 0o040_000;
    const SYMLINK: u16 = 0o120_000;
    const CHAR_DEVICE: u16 = 0o020_000;
    const BLOCK_DEVICE: u16 = 0o060_000;
    const FIFO: u16 = 0o010_000;

    let (file_type, device) = match entry.kind {
        Kind::Regular { .. } | Kind::HardLink { .. } => (REGULAR, 0),
        Kind::Directory { .. } | Kind::LateDirectory { .. } | Kind::ImplicitDirectory { .. } => (DIRECTORY, 0),
        Kind::Symlink { .. } => (SYMLINK, 0),
        Kind::CharDevice { major, minor } => (CHAR_DEVICE, device_number(major, minor)),
        Kind::BlockDevice { major, minor } => (BLOCK_DEVICE, device_number(major, minor)),
        Kind::Fifo => (FIFO, 0),
        // overlayfs's whiteout is the character device 0:0.
        Kind::Whiteout => (CHAR_DEVICE, 0),
    };
    let (layout, size, body) = match place.body {
        Body::Empty => (FLAT_PLAIN, 0, device),
        Body::Chunks { blocks_log2, .. } => {
            let size = if let Kind::Regular { size, .. } = entry.kind { size } else { 0 };
            (CHUNK_BASED, size, CHUNK_FORMAT_INDEXES | blocks_log2)
        }
        Body::Blocks { block, size, inline: true } => (FLAT_INLINE, size, block as u32),
        Body::Blocks { block, size, inline: false } => (FLAT_PLAIN, size, block as u32),
    };
    let (mode, uid, gid, mtime) = match plan.taken_over(index) {
        Some(DirectoryAttributes { mode, uid, gid, mtime, .. }) => (*mode, *uid, *gid, *mtime),
        None => (entry.mode, entry.uid, entry.gid, entry.mtime),
    };
    Inode {
        format: U16::new(EXTENDED | layout << LAYOUT_SHIFT),
        xattr_count: U16::new(xattr_count(xattr::ibody_size(plan.xattrs(index, entry)))),
        mode: U16::new(file_type | mode),
        reserved: U16::ZERO,
        size: size.into(),
        body: body.into(),
        number: U32::new(index as u32 + 1),
        uid: uid.into(),
        gid: gid.into(),
        mtime: mtime.secs.into(),
        mtime_nanos: mtime.nanos.into(),
        links: plan.link_count(index).into(),
        reserved2: [0; 16],
    }
}

/// `i_xattr_icount` of an ibody of `size` bytes, which is at most `xattr::IBODY_MAX`.
fn xattr_count(size: usize) -> u16 {
    if size == 0 { 0 } else { ((size - xattr::IBODY_HEADER) / 4 + 1) as u16 }
}

fn write_xattrs(plan: &Plan<'_>, index: usize, entry: &Entry, out: &mut Output<'_>) -> io::Result<()> {
    for (number, (name, value)) in plan.xattrs(index, entry).enumerate() {
        let Some((namespace, suffix)) = xattr::namespace(name) else { continue };
        if number == 0 {
            // No shared attributes, and no name filter as its feature is off.
            out.write(&[0; xattr::IBODY_HEADER])?;
        }
        let [low, high] = (value.len() as u16).to_le_bytes();
        out.write(&[suffix.len() as u8, namespace, low, high])?;
        out.write(suffix)?;
        out.write(value)?;
        out.pad_to(out.position.next_multiple_of(4))?;
    }
    Ok(())
}

fn content(plan: &Plan<'_>, index: usize, entry: &Entry) -> Vec<u8> {
    match &entry.kind {
        Kind::Symlink { target } => target.clone(),
        _ => directory::content(plan.names(index, entry)),
    }
}

/// An output that knows how far it is.
struct Output<'a> {
    out: io::BufWriter<&'a mut dyn io::Write>,
    position: u64,
}

impl Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.position += bytes.len() as u64;
        io::Write::write_all(&mut self.out, bytes)
    }

    fn pad_to(&mut self, position: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK] = [0; BLOCK];
        debug_assert!(position >= self.position);
        while let Some(missing) = position.checked_sub(self.position).filter(|missing| *missing > 0) {
            self.write(ZEROS.get(..missing as usize).unwrap_or(&ZEROS))?;
        }
        Ok(())
    }
}
