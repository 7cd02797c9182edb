//! Where everything of an image goes, decided before the first byte is written.

use std::collections::BTreeMap;

use super::directory::{self, Name, with_dots};
use super::format::{BLOCK, CHUNK_BLOCKS_LOG2_MAX, CHUNK_INDEX, HEAD, INODE, SLOT};
use super::{DirectoryAttributes, ImageError, ImageOptions, LowerDirectories};
use crate::entry::{Entry, Kind};
use crate::tree::path::{name, show, split};
use crate::tree::{Outline, Tree, attributes_of, xattr};

/// Name and value of overlayfs's mark of a directory that hides what is below it.
const OPAQUE: (&[u8], &[u8]) = (b"trusted.overlay.opaque", b"y");

/// The layout of an image. All that asks for an entry by its number in the tree gets an answer for any number.
pub(super) struct Plan<'a> {
    pub(super) tree: &'a Tree,
    pub(super) options: &'a ImageOptions,
    outline: Outline,
    /// Of the directories that take something over from the layers below.
    attributes: BTreeMap<usize, DirectoryAttributes>,
    /// `None` for what has no inode of its own.
    places: Vec<Option<Place>>,
    inode_count: u64,
    blocks: u64,
}

/// Where an inode and its content are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Offset of the inode in the image.
    pub(super) offset: u64,
    pub(super) body: Body,
}

/// Where an inode's content is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Body {
    /// There is none.
    Empty,
    /// In the device, as so many chunks of `1 << blocks_log2` blocks.
    Chunks { count: u64, blocks_log2: u32 },
    /// Whole blocks of the image from `block`, the last of them padded, or its rest right behind the inode.
    Blocks { block: u64, size: u64, inline: bool },
}

impl<'a> Plan<'a> {
    pub(super) fn new(
        tree: &'a Tree,
        options: &'a ImageOptions,
        lower: &dyn LowerDirectories,
    ) -> Result<Self, ImageError> {
        let entries = tree.entries();
        let attributes = taken_over(tree, lower);
        let mut plan = Self {
            tree,
            options,
            outline: tree.outline(),
            attributes,
            places: Vec::with_capacity(entries.len()),
            inode_count: 0,
            blocks: 0,
        };
        let mut end = HEAD as u64;
        for (index, entry) in entries.iter().enumerate() {
            let place = plan.has_inode(entry).then(|| plan.place(index, entry, &mut end)).transpose()?;
            plan.inode_count += u64::from(place.is_some());
            plan.places.push(place);
        }
        plan.blocks = end.div_ceil(BLOCK as u64);
        for place in plan.places.iter_mut().flatten() {
            if let Body::Blocks { block, size, inline } = &mut place.body {
                *block = plan.blocks;
                plan.blocks += if *inline { *size / BLOCK as u64 } else { size.div_ceil(BLOCK as u64) };
            }
        }
        if u32::try_from(plan.blocks).is_err() {
            return Err(ImageError::Unsupported("its metadata is larger than 2 TiB".into()));
        }
        Ok(plan)
    }

    /// Inodes of the image.
    pub(super) const fn inode_count(&self) -> u64 {
        self.inode_count
    }

    /// Blocks of the image.
    pub(super) const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The entries with inodes, in the order of the inodes in the image.
    pub(super) fn inodes(&self) -> impl Iterator<Item = (usize, &'a Entry, Place)> {
        let entries = self.tree.entries().iter().enumerate();
        entries.zip(&self.places).filter_map(|((index, entry), place)| Some((index, entry, (*place)?)))
    }

    /// Links to the inode of entry `index`.
    pub(super) fn link_count(&self, index: usize) -> u32 {
        self.outline.link_count(index)
    }

    /// What a directory becomes that takes something over from the layers below.
    pub(super) fn taken_over(&self, index: usize) -> Option<&DirectoryAttributes> {
        self.attributes.get(&index)
    }

    /// The extended attributes of entry `index`.
    pub(super) fn xattrs(&self, index: usize, entry: &'a Entry) -> impl Iterator<Item = (&[u8], &[u8])> {
        let xattrs = self.taken_over(index).map_or(&entry.xattrs, |attributes| &attributes.xattrs);
        let opaque = Some(OPAQUE).filter(|_| entry.kind.is_opaque() && !self.options.bottom);
        xattrs.iter().map(|xattr| (&xattr.name[..], &xattr.value[..])).chain(opaque)
    }

    /// The names in the directory `index`, with `.` and `..`.
    pub(super) fn names(&self, index: usize, entry: &'a Entry) -> impl Iterator<Item = Name<'a>> {
        let parent = split(&entry.path).and_then(|(parent, _)| self.tree.find(parent)).unwrap_or(index);
        let dot = |name, target| Name { name, nid: self.nid(target), file_type: 2 };
        let children = self.outline.children(index).filter_map(|child| {
            let entry = self.tree.entries().get(child)?;
            let (target, kind) = match &entry.kind {
                Kind::HardLink { target } => {
                    let target = self.tree.find(target)?;
                    (target, &self.tree.entries().get(target)?.kind)
                }
                kind => (child, kind),
            };
            if matches!(kind, Kind::Whiteout) && self.options.bottom {
                return None;
            }
            Some(Name { name: name(&entry.path), nid: self.nid(target), file_type: file_type(kind) })
        });
        with_dots([dot(b".", index), dot(b"..", parent)], children)
    }

    /// 0 while the layout is being decided, which asks for the names alone.
    fn nid(&self, index: usize) -> u64 {
        self.places.get(index).copied().flatten().map_or(0, |place| place.offset / SLOT)
    }

    fn has_inode(&self, entry: &Entry) -> bool {
        match entry.kind {
            Kind::HardLink { .. } => false,
            Kind::Whiteout => !self.options.bottom,
            _ => true,
        }
    }

    /// Places the inode of an entry at or after `end`, and moves `end` behind it.
    fn place(&self, index: usize, entry: &'a Entry, end: &mut u64) -> Result<Place, ImageError> {
        let xattrs = xattr::ibody_size(self.xattrs(index, entry));
        if xattrs > xattr::IBODY_MAX {
            let path = show(&entry.path);
            return Err(ImageError::Unsupported(format!("{path} has over 256 KiB of extended attributes")));
        }
        let head = (INODE + xattrs) as u64;
        let (len, body) = match &entry.kind {
            Kind::Regular { size: size @ 1.., .. } => {
                let (count, blocks_log2) = chunks(*size);
                let len = head.next_multiple_of(CHUNK_INDEX as u64) + count * CHUNK_INDEX as u64;
                (len, Body::Chunks { count, blocks_log2 })
            }
            Kind::Directory { .. } | Kind::LateDirectory { .. } | Kind::ImplicitDirectory { .. } => {
                let size = directory::size(self.names(index, entry).map(|name| name.name));
                return Ok(place_directory(head, size, end));
            }
            Kind::Symlink { target } => return Ok(place_symlink(head, target.len() as u64, end)),
            _ => (head, Body::Empty),
        };
        let offset = candidates(*end).next().unwrap_or(*end);
        *end = offset + len;
        Ok(Place { offset, body })
    }
}

/// Places a directory's inode of `head` bytes. The last part of its content stands right behind the inode if it fits
/// there without crossing a block, which EROFS does not allow.
fn place_directory(head: u64, size: u64, end: &mut u64) -> Place {
    let block = BLOCK as u64;
    let rest = size % block;
    let fitting = candidates(*end).find(|offset| rest > 0 && (offset + head) % block + rest <= block);
    place_blocks(head, size, fitting, end)
}

/// Places a symbolic link's inode of `head` bytes, with the target right behind it if both fit into one block: kernels
/// before 6.13 refuse a short target that stands in another block than its inode.
fn place_symlink(head: u64, size: u64, end: &mut u64) -> Place {
    let block = BLOCK as u64;
    let fitting = candidates(*end).find(|offset| offset % block + head + size <= block);
    place_blocks(head, size, fitting, end)
}

/// Places an inode at the offset where its content's last part fits behind it, else with all its content elsewhere.
fn place_blocks(head: u64, size: u64, fitting: Option<u64>, end: &mut u64) -> Place {
    let offset = fitting.or_else(|| candidates(*end).next()).unwrap_or(*end);
    let inline = fitting.is_some();
    *end = offset + head + if inline { size % BLOCK as u64 } else { 0 };
    Place { offset, body: Body::Blocks { block: 0, size, inline } }
}

/// The offsets from `end` on, a block's worth, where an inode may start without crossing a block. (It could, but the
/// kernel has to copy such an inode.)
fn candidates(end: u64) -> impl Iterator<Item = u64> {
    let first = end.next_multiple_of(SLOT);
    let count = BLOCK as u64 / SLOT;
    let block = BLOCK as u64;
    (0..count).map(move |slot| first + slot * SLOT).filter(move |offset| offset % block + INODE as u64 <= block)
}

/// How many chunks of how many blocks (log2) hold `size` bytes: one, for what EROFS can say in one.
fn chunks(size: u64) -> (u64, u32) {
    let blocks = size.div_ceil(BLOCK as u64);
    let log2 = blocks.next_power_of_two().trailing_zeros().min(CHUNK_BLOCKS_LOG2_MAX);
    (blocks.div_ceil(1 << log2), log2)
}

/// `FT_*` of the kernel's fs_types.h.
fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::Regular { .. } | Kind::HardLink { .. } => 1,
        Kind::Directory { .. } | Kind::LateDirectory { .. } | Kind::ImplicitDirectory { .. } => 2,
        Kind::CharDevice { .. } | Kind::Whiteout => 3,
        Kind::BlockDevice { .. } => 4,
        Kind::Fifo => 5,
        Kind::Symlink { .. } => 7,
    }
}

/// What the directories become that take something over from the layers below.
fn taken_over(tree: &Tree, lower: &dyn LowerDirectories) -> BTreeMap<usize, DirectoryAttributes> {
    let mut attributes = BTreeMap::new();
    // Setgid directories of the layers below, with their groups: the kernel gives those to what is made in them, here as in
    // `Unpacking::make_directory`.
    let mut groups: BTreeMap<usize, u32> = BTreeMap::new();
    for (index, entry) in tree.entries().iter().enumerate().filter(|(_, entry)| entry.kind.takes_over()) {
        let below = lower_attributes(lower, &entry.path);
        if let Some(below) = below.as_ref().filter(|below| below.mode & 0o2000 != 0) {
            groups.insert(index, below.gid);
        }
        let own = match (&entry.kind, below) {
            (Kind::ImplicitDirectory { .. }, Some(below)) => below,
            (Kind::ImplicitDirectory { .. }, None) => {
                let parent = split(&entry.path).and_then(|(parent, _)| tree.find(parent));
                let group = parent.and_then(|parent| groups.get(&parent)).filter(|_| entry.gid == 0);
                DirectoryAttributes { gid: group.copied().unwrap_or(entry.gid), ..DirectoryAttributes::default() }
            }
            (_, below) => {
                let mut own = attributes_of(entry);
                own.keep(below.map(|below| below.xattrs).unwrap_or_default());
                own
            }
        };
        attributes.insert(index, own);
    }
    attributes
}

/// What the layers below give a directory, without what no layer may set.
fn lower_attributes(lower: &dyn LowerDirectories, path: &[u8]) -> Option<DirectoryAttributes> {
    let mut attributes = lower.attributes(path)?;
    let kind = Kind::ImplicitDirectory { opaque: false };
    attributes.xattrs.retain(|xattr| xattr::allowed(&kind, &xattr.name) && xattr.value.len() <= xattr::VALUE_MAX);
    Some(attributes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_chunk_holds_any_file_up_to_a_tebibyte() {
        assert_eq!(chunks(1), (1, 0));
        assert_eq!(chunks(512), (1, 0));
        assert_eq!(chunks(513), (1, 1));
        assert_eq!(chunks(3 << 30), (1, 23));
        assert_eq!(chunks(1 << 40), (1, 31));
        assert_eq!(chunks((1 << 40) + 1), (2, 31));
    }

    #[test]
    fn tails_stay_in_a_block() {
        for (head, size, start) in [64, 80, 100, 600]
            .into_iter()
            .flat_map(|head| (1..1100).flat_map(move |size| [1536, 1568, 1900].map(|start| (head, size, start))))
        {
            let mut end = start;
            let place = place_directory(head, size, &mut end);
            assert!(place.offset >= start && place.offset.is_multiple_of(32) && place.offset % 512 <= 448);
            let Body::Blocks { inline, .. } = place.body else { panic!() };
            if inline {
                assert_eq!((place.offset + head) / 512, (end - 1) / 512, "{head} {size} {start}");
            } else {
                assert!(size % 512 == 0 || size % 512 > 480, "{head} {size} {start}");
            }
            let mut end = start;
            let place = place_symlink(head, size, &mut end);
            let Body::Blocks { inline, .. } = place.body else { panic!() };
            assert_eq!(inline, head + size <= 512);
            assert!(!inline || place.offset / 512 == (end - 1) / 512, "{head} {size} {start}");
        }
    }
}
