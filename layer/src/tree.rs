//! All paths of a layer in order, as [`crate::tar::Scanner`] makes them or as an index from elsewhere names them.

pub mod path;
mod stack;
mod usage;
pub(crate) mod xattr;

use std::collections::BTreeMap;

pub(crate) use self::stack::attributes_of;
pub use self::stack::{DirectoryAttributes, LowerDirectories, Stack};
pub use self::usage::Unpacked;
use crate::entry::{Entry, Kind, Mtime};

/// Most entries of a layer; one with more is declined. The largest images seen have some 300 000.
pub const ENTRIES_MAX: usize = 1 << 21;

/// Largest device in bytes: EROFS numbers its 512-byte blocks with 32 bits, the last number meaning a hole.
pub const DEVICE_SIZE_MAX: u64 = 512 * (u32::MAX as u64 - 1);

/// Largest device numbers that the kernel's 32-bit `new_encode_dev` holds.
pub(crate) const MAJOR_MAX: u32 = 0xfff;
pub(crate) const MINOR_MAX: u32 = 0xf_ffff;

/// The paths of a layer. Invariants, which [`Tree::validate`] checks and every constructor keeps:
///
/// - the root comes first and is a [`Kind::Directory`]; paths rise strictly in the order of [`path::compare`];
/// - every path but the root has its parent directory in the tree;
/// - what [`Entry`] and [`Kind`] say of their fields holds, file bytes lie in the device, and a hard link's target
///   is an earlier entry that is no directory, whiteout or hard link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    entries: Vec<Entry>,
}

/// Why entries are not a [`Tree`]. The path that the message shows is cut and escaped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("entry {index} ({path}) of the layer's index is invalid: {reason}")]
pub struct TreeError {
    /// The number of the first entry at fault; the count of entries if they are too many or too few.
    pub index: usize,
    path: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Tree {
    /// Checks entries from an untrusted index against the invariants of a tree over a device of `device_size` bytes.
    pub fn validate(entries: Vec<Entry>, device_size: u64) -> Result<Self, TreeError> {
        let fail = |index: usize, reason| TreeError {
            index,
            path: path::show(entries.get(index).map_or(b"", |entry| &entry.path)),
            reason,
        };
        if entries.len() > ENTRIES_MAX {
            return Err(fail(entries.len(), "too many entries"));
        }
        if device_size > DEVICE_SIZE_MAX {
            return Err(fail(entries.len(), "the device is too large"));
        }
        match entries.first() {
            Some(Entry { path, kind: Kind::Directory { .. }, .. }) if path.is_empty() => {}
            _ => return Err(fail(0, "the first entry is not the root directory")),
        }
        // Directories that the current entry may lie in, the nearest last.
        let mut open: Vec<&[u8]> = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            if let Some(before) = index.checked_sub(1).and_then(|before| entries.get(before)) {
                if path::compare(&before.path, &entry.path).is_ge() {
                    return Err(fail(index, "not in order"));
                }
                check_path(&entry.path).map_err(|reason| fail(index, reason))?;
                let parent = path::split(&entry.path).map_or(&b""[..], |(parent, _)| parent);
                while open.last().is_some_and(|directory| *directory != parent) {
                    open.pop();
                }
                if open.is_empty() {
                    return Err(fail(index, "its parent is not a directory of the layer"));
                }
            }
            check_attributes(entry).map_err(|reason| fail(index, reason))?;
            check_kind(entry, device_size).map_err(|reason| fail(index, reason))?;
            if let Kind::HardLink { target } = &entry.kind {
                let earlier = entries.get(..index).unwrap_or_default();
                match search(earlier, target).and_then(|at| earlier.get(at)).map(|target| &target.kind) {
                    None => return Err(fail(index, "its link target is no earlier entry")),
                    Some(Kind::HardLink { .. } | Kind::Whiteout) => {
                        return Err(fail(index, "its link target cannot be linked to"));
                    }
                    Some(kind) if kind.is_directory() => return Err(fail(index, "its link target is a directory")),
                    Some(_) => {}
                }
            }
            if entry.kind.is_directory() {
                open.push(&entry.path);
            }
        }
        Ok(Self { entries })
    }

    /// All entries, the root first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// All entries, the root first.
    pub fn into_entries(self) -> Vec<Entry> {
        self.entries
    }

    /// The number of the entry at a clean path.
    pub fn find(&self, path: &[u8]) -> Option<usize> {
        search(&self.entries, path)
    }

    /// The entry at a clean path.
    pub fn get(&self, path: &[u8]) -> Option<&Entry> {
        self.entries.get(self.find(path)?)
    }

    /// The entry whose file `entry` is another name of; `entry` itself if it is no hard link.
    pub fn resolve<'a>(&'a self, entry: &'a Entry) -> &'a Entry {
        match &entry.kind {
            Kind::HardLink { target } => self.get(target).unwrap_or(entry),
            _ => entry,
        }
    }

    /// Whether an image of this layer depends on the layers below: its tar leaves directories out, or
    /// names them late.
    pub fn has_implicit_directories(&self) -> bool {
        self.entries.iter().any(|entry| entry.kind.takes_over())
    }

    /// Whether an image of this layer differs at the bottom, where nothing is below to be hidden.
    pub fn has_whiteouts(&self) -> bool {
        self.entries.iter().any(|entry| entry.kind == Kind::Whiteout || entry.kind.is_opaque())
    }

    /// Where each entry's subtree ends and how many names it has, for walking the tree without searching.
    pub fn outline(&self) -> Outline {
        let count = self.entries.len();
        let mut outline = Outline { subtree_ends: vec![0; count], link_counts: vec![1; count] };
        let mut open: Vec<usize> = Vec::new();
        let close = |outline: &mut Outline, directory: usize, end: usize| {
            if let Some(slot) = outline.subtree_ends.get_mut(directory) {
                *slot = end as u32;
            }
        };
        for (index, entry) in self.entries.iter().enumerate() {
            while let Some(directory) = open.pop_if(|directory| {
                !self.entries.get(*directory).is_some_and(|open| path::is_inside(&entry.path, &open.path))
            }) {
                close(&mut outline, directory, index);
            }
            close(&mut outline, index, index + 1);
            match &entry.kind {
                Kind::Directory { .. } | Kind::LateDirectory { .. } | Kind::ImplicitDirectory { .. } => {
                    outline.add_links(index, 1);
                    if let Some(parent) = open.last() {
                        outline.add_links(*parent, 1);
                    }
                    open.push(index);
                }
                Kind::HardLink { target } => {
                    outline.add_links(index, 0);
                    if let Some(target) = self.find(target) {
                        outline.add_links(target, 1);
                    }
                }
                _ => {}
            }
        }
        while let Some(directory) = open.pop() {
            close(&mut outline, directory, count);
        }
        outline
    }

    /// Entries that the caller has brought into the order and form of a tree.
    pub(crate) fn from_sorted(entries: Vec<Entry>) -> Self {
        debug_assert!(entries.is_sorted_by(|a, b| path::compare(&a.path, &b.path).is_lt()));
        Self { entries }
    }
}

/// What [`Tree::outline`] computes, by the number of the entry.
#[derive(Clone, Debug)]
pub struct Outline {
    subtree_ends: Vec<u32>,
    link_counts: Vec<u32>,
}

impl Outline {
    /// One past the last entry in the directory `index` at any depth; `index + 1` for what is no directory.
    pub fn subtree_end(&self, index: usize) -> usize {
        self.subtree_ends.get(index).map_or(index + 1, |end| *end as usize)
    }

    /// The link count of `index`: names of a file, 2 and one per subdirectory for a directory.
    pub fn link_count(&self, index: usize) -> u32 {
        self.link_counts.get(index).copied().unwrap_or(1)
    }

    /// The numbers of the entries right in the directory `index`, by name.
    pub fn children(&self, index: usize) -> impl Iterator<Item = usize> {
        let end = self.subtree_end(index);
        let first = Some(index + 1).filter(|child| *child < end);
        std::iter::successors(first, move |child| Some(self.subtree_end(*child)).filter(|next| *next < end))
    }

    fn add_links(&mut self, index: usize, links: u32) {
        if let Some(count) = self.link_counts.get_mut(index) {
            *count = count.saturating_add(links);
        }
    }
}

fn search(entries: &[Entry], path: &[u8]) -> Option<usize> {
    entries.binary_search_by(|entry| path::compare(&entry.path, path)).ok()
}

fn check_path(path: &[u8]) -> Result<(), &'static str> {
    if path.len() > path::PATH_MAX {
        return Err("its path is too long");
    }
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." | b".." => return Err("its path is not clean"),
            _ if component.len() > path::NAME_MAX => return Err("a name in its path is too long"),
            _ if component.contains(&0) => return Err("its path has a NUL"),
            _ => {}
        }
    }
    Ok(())
}

fn check_attributes(entry: &Entry) -> Result<(), &'static str> {
    let Entry { mode, uid, gid, mtime, xattrs, .. } = entry;
    let expected_mode = match entry.kind {
        Kind::HardLink { .. } | Kind::Whiteout => Some(0),
        Kind::ImplicitDirectory { .. } => Some(0o755),
        _ => None,
    };
    let is_implicit = matches!(entry.kind, Kind::ImplicitDirectory { .. });
    if let Some(expected) = expected_mode
        && ((*mode, *uid, *mtime) != (expected, 0, Mtime::default())
            || (*gid != 0 && !is_implicit)
            || !xattrs.is_empty())
    {
        return Err("it has attributes that its kind does not have");
    }
    if *mode > 0o7777 {
        return Err("its mode has more than permission bits");
    }
    if mtime.nanos >= 1_000_000_000 {
        return Err("its time has too many nanoseconds");
    }
    if !xattrs.is_sorted_by(|a, b| a.name < b.name) {
        return Err("its xattrs are not in order");
    }
    for attribute in xattrs {
        if attribute.name.len() > xattr::NAME_MAX || attribute.name.contains(&0) {
            return Err("an xattr's name is too long or has a NUL");
        }
        if attribute.value.len() > xattr::VALUE_MAX {
            return Err("an xattr is too large");
        }
        if !xattr::allowed(&entry.kind, &attribute.name) {
            return Err("it has an xattr that a layer cannot set");
        }
    }
    if xattr::ibody_size_of(xattrs) > xattr::IBODY_MAX {
        return Err("its xattrs are too large");
    }
    Ok(())
}

fn check_kind(entry: &Entry, device_size: u64) -> Result<(), &'static str> {
    match &entry.kind {
        Kind::Regular { offset, size } => {
            if offset % 512 != 0 {
                return Err("its bytes do not start at a 512-byte block");
            }
            if offset.checked_add(*size).is_none_or(|end| end > device_size) {
                return Err("its bytes lie outside the device");
            }
        }
        Kind::Symlink { target } => {
            if target.is_empty() || target.len() > path::TARGET_MAX || target.contains(&0) {
                return Err("its link target is empty, too long or has a NUL");
            }
        }
        Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
            if *major > MAJOR_MAX || *minor > MINOR_MAX {
                return Err("its device number is too large");
            }
        }
        Kind::Directory { .. }
        | Kind::LateDirectory { .. }
        | Kind::ImplicitDirectory { .. }
        | Kind::HardLink { .. }
        | Kind::Fifo
        | Kind::Whiteout => {}
    }
    Ok(())
}

/// Attributes by path instead of layers, for tests and tools.
impl LowerDirectories for BTreeMap<Vec<u8>, DirectoryAttributes> {
    fn attributes(&self, path: &[u8]) -> Option<DirectoryAttributes> {
        self.get(path).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Xattr;

    fn entry(path: &str, kind: Kind) -> Entry {
        let mode = match kind {
            Kind::HardLink { .. } | Kind::Whiteout => 0,
            _ => 0o755,
        };
        Entry { path: path.into(), kind, mode, uid: 0, gid: 0, mtime: Mtime::default(), xattrs: Vec::new() }
    }

    fn directory(path: &str) -> Entry {
        entry(path, Kind::Directory { opaque: false })
    }

    fn file(path: &str, offset: u64, size: u64) -> Entry {
        entry(path, Kind::Regular { offset, size })
    }

    fn reason(entries: Vec<Entry>) -> &'static str {
        Tree::validate(entries, 4096).unwrap_err().reason
    }

    #[test]
    fn refuses_what_no_scanner_makes() {
        let root = || directory("");
        let link = |path, target: &str| entry(path, Kind::HardLink { target: target.into() });
        assert!(reason(vec![]).contains("root"));
        assert!(reason(vec![directory("a")]).contains("root"));
        assert!(reason(vec![entry("", Kind::Fifo)]).contains("root"));
        assert!(reason(vec![root(), directory("b"), directory("a")]).contains("order"));
        assert!(reason(vec![root(), directory("a"), directory("a")]).contains("order"));
        assert!(reason(vec![root(), directory("a/b")]).contains("parent"));
        assert!(reason(vec![root(), file("a", 0, 1), file("a/b", 0, 1)]).contains("parent"));
        for path in ["/", "/a", "a/", "a//b", ".", "..", "a/../b", "./a"] {
            assert!(!reason(vec![root(), directory("a"), directory(path)]).is_empty(), "{path}");
        }
        assert!(reason(vec![root(), directory("a\0")]).contains("NUL"));
        assert!(reason(vec![root(), directory(&"a".repeat(256))]).contains("too long"));
        assert!(reason(vec![root(), directory(&"a/".repeat(3000))]).contains("too long"));
        assert!(reason(vec![root(), file("a", 1, 1)]).contains("512"));
        assert!(reason(vec![root(), file("a", 3584, 513)]).contains("outside"));
        assert!(reason(vec![root(), file("a", u64::MAX - 511, 512)]).contains("outside"));
        assert!(reason(vec![root(), entry("a", Kind::Symlink { target: vec![] })]).contains("target"));
        assert!(reason(vec![root(), entry("a", Kind::CharDevice { major: 4096, minor: 0 })]).contains("device number"));
        assert!(reason(vec![root(), link("a", "b"), file("b", 0, 1)]).contains("earlier"));
        assert!(reason(vec![root(), directory("a"), link("b", "a")]).contains("directory"));
        assert!(reason(vec![root(), file("a", 0, 1), link("b", "a"), link("c", "b")]).contains("linked to"));
        assert!(reason(vec![root(), entry("a", Kind::Whiteout), link("b", "a")]).contains("linked to"));
        let with = |name: &str| {
            let mut entry = directory("a");
            entry.xattrs.push(Xattr { name: name.into(), value: vec![b'y'] });
            vec![root(), entry]
        };
        assert!(reason(with("trusted.overlay.opaque")).contains("cannot set"));
        assert!(reason(with("user.overlay.opaque")).contains("cannot set"));
        assert!(reason(with("user.")).contains("cannot set"));
        assert!(Tree::validate(with("user.x"), 0).is_ok());
    }

    #[test]
    fn outlines_links_and_children() {
        let entries = vec![
            directory(""),
            directory("a"),
            directory("a/b"),
            file("a/b/c", 0, 1),
            file("a/d", 0, 1),
            directory("a-"),
            entry("x", Kind::HardLink { target: b"a/d".to_vec() }),
        ];
        let tree = Tree::validate(entries, 512).unwrap();
        let outline = tree.outline();
        assert_eq!(outline.children(0).collect::<Vec<_>>(), [1, 5, 6]);
        assert_eq!(outline.children(1).collect::<Vec<_>>(), [2, 4]);
        assert_eq!(outline.children(5).count(), 0);
        let counts: Vec<u32> = (0..7).map(|index| outline.link_count(index)).collect();
        assert_eq!(counts, [4, 3, 2, 1, 2, 2, 1]);
        assert_eq!(tree.get(b"x").map(|entry| &tree.resolve(entry).path[..]), Some(&b"a/d"[..]));
    }

    #[test]
    fn stack_answers_as_mkparent_does() {
        let with_mode = |mut entry: Entry, mode| {
            entry.mode = mode;
            entry
        };
        let tree = |entries| Tree::validate(entries, 4096).unwrap();
        let bottom = tree(vec![
            directory(""),
            entry("link", Kind::Symlink { target: b"/tmp".to_vec() }),
            with_mode(directory("opt"), 0o700),
            with_mode(directory("opt/x"), 0o711),
            with_mode(directory("tmp"), 0o1777),
        ]);
        let middle = tree(vec![
            directory(""),
            entry("opt", Kind::Whiteout),
            entry("tmp", Kind::ImplicitDirectory { opaque: true }),
        ]);
        let layers = [&middle, &bottom];
        let stack = Stack::new(&layers);
        let mode = |path: &str| stack.attributes(path.as_bytes()).map(|attributes| attributes.mode);
        assert_eq!(mode("tmp"), Some(0o1777));
        assert_eq!(mode("link"), Some(0o1777));
        assert_eq!(mode("opt"), None);
        assert_eq!(mode("opt/x"), None);
        assert_eq!(mode("new"), None);
        let middle_only = [&middle];
        assert_eq!(Stack::new(&middle_only).attributes(b"tmp"), Some(DirectoryAttributes::default()));
    }
}
