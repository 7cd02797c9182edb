//! The layers below a layer, as far as its implicit directories ask for them.

use super::Tree;
use super::path::{Found, follow, split};
use crate::entry::{Entry, Kind, Mtime, Xattr};

/// What an implicit directory takes over from the layers below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryAttributes {
    /// Permission bits with setuid, setgid and sticky: 0 to 0o7777.
    pub mode: u16,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Mtime,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<Xattr>,
}

impl Default for DirectoryAttributes {
    /// Those of a directory that no layer names: 0755, root, the epoch.
    fn default() -> Self {
        Self { mode: 0o755, uid: 0, gid: 0, mtime: Mtime::default(), xattrs: Vec::new() }
    }
}

impl DirectoryAttributes {
    /// Adds those of the extended attributes `below` that it does not have itself.
    pub(crate) fn keep(&mut self, below: Vec<Xattr>) {
        for xattr in below {
            if let Err(place) = self.xattrs.binary_search_by(|own| own.name.cmp(&xattr.name)) {
                self.xattrs.insert(place, xattr);
            }
        }
    }
}

/// Gives the directories that a layer leaves out the attributes they have in the layers below.
pub trait LowerDirectories {
    /// The attributes of the directory `path` as the layers below show it; `None` where they have no directory there.
    fn attributes(&self, path: &[u8]) -> Option<DirectoryAttributes>;
}

/// The layers below a layer, the uppermost first; the empty stack is what lies below the bottom.
///
/// It answers as containerd's `mkparent` does (pkg/archive/tar.go): the uppermost layer that has the path decides,
/// symbolic links are followed inside that layer, anything there that is no directory (a whiteout too) ends the search,
/// and an opaque mark further up the path does not: containerd looks through it.
#[derive(Clone, Copy, Debug)]
pub struct Stack<'a> {
    layers: &'a [&'a Tree],
}

impl<'a> Stack<'a> {
    /// A stack of `layers`, the uppermost first.
    pub const fn new(layers: &'a [&'a Tree]) -> Self {
        Self { layers }
    }
}

impl LowerDirectories for Stack<'_> {
    fn attributes(&self, path: &[u8]) -> Option<DirectoryAttributes> {
        let mut path = path.to_vec();
        // What the layers so far make of it, if they have it, and what they add to the attributes from further below.
        let mut made = None;
        let mut late: Vec<&Entry> = Vec::new();
        let mut base = None;
        for layer in self.layers {
            let found = follow(&path, (), |(), path| layer.look(path)).map(|followed| (layer.get(&followed), followed));
            match found {
                // This layer's unpacking asked the layers below it in turn, at the place it created.
                Ok((Some(entry), followed)) if entry.kind.takes_over() => {
                    path = followed;
                    match entry.kind {
                        Kind::LateDirectory { .. } => late.push(entry),
                        _ => made = Some(DirectoryAttributes { gid: entry.gid, ..DirectoryAttributes::default() }),
                    }
                }
                Ok((Some(entry), _)) if entry.kind.is_directory() => {
                    base = Some(attributes_of(entry));
                    break;
                }
                Ok((Some(_), _)) => break,
                Ok((None, followed)) if layer.hides(&followed) => break,
                Ok((None, _)) => {}
                Err(_) => break,
            }
        }
        let base = base.or(made);
        late.into_iter().rev().fold(base, |below, entry| {
            let mut attributes = attributes_of(entry);
            attributes.keep(below.map(|below| below.xattrs).unwrap_or_default());
            Some(attributes)
        })
    }
}

impl Tree {
    fn look(&self, path: &[u8]) -> Found<'_, ()> {
        match self.get(path).map(|entry| &self.resolve(entry).kind) {
            None => Found::Missing,
            Some(Kind::Symlink { target }) => Found::Symlink(target),
            Some(kind) if kind.is_directory() => Found::Directory(()),
            Some(_) => Found::Other,
        }
    }

    /// Whether the nearest ancestor that this layer has is no directory, so that nothing below it can be seen.
    fn hides(&self, path: &[u8]) -> bool {
        let mut path = path;
        while let Some((directory, _)) = split(path) {
            if let Some(entry) = self.get(directory) {
                return !entry.kind.is_directory();
            }
            path = directory;
        }
        false
    }
}

pub(crate) fn attributes_of(entry: &Entry) -> DirectoryAttributes {
    let Entry { mode, uid, gid, mtime, xattrs, .. } = entry;
    DirectoryAttributes { mode: *mode, uid: *uid, gid: *gid, mtime: *mtime, xattrs: xattrs.clone() }
}
