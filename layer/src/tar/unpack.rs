//! What containerd's unpacker makes of a tar's entries, one after the other, in memory.

use std::collections::BTreeMap;

use super::header::Header;
use super::pax::Records;
use super::{Limits, TarError, unsupported};
use crate::entry::{Entry, Kind, Mtime, Xattr};
use crate::tree::path::{self, FollowError, Found, show};
use crate::tree::{MAJOR_MAX, MINOR_MAX, Tree, xattr};

/// Number of the root's inode.
const ROOT: usize = 0;

/// Prefix of a name that removes the rest of the name from the layers below, and the name that makes its directory
/// opaque (OCI image specification, layer, "Whiteouts").
const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// The upper directory that the tar's entries so far would have made.
#[derive(Debug)]
pub(super) struct Unpacking {
    limits: Limits,
    metadata_bytes: usize,
    inodes: Vec<Inode>,
    /// What every directory's header calls it, and its time: containerd sets these times at the end, in the order of the
    /// headers, on whatever the name leads to then.
    directory_times: Vec<(Vec<u8>, Mtime)>,
}

#[derive(Debug)]
struct Inode {
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: Mtime,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    body: Body,
}

#[derive(Debug)]
enum Body {
    Directory(Directory),
    /// Anything else, in the form that the tree wants.
    Other(Kind),
}

#[derive(Debug, Default)]
struct Directory {
    children: BTreeMap<Vec<u8>, usize>,
    named: bool,
    /// It was made for a path in it before it was named.
    late: bool,
    opaque: bool,
}

/// Owner, permission and time of a header, in the ranges that the kernel takes.
struct Attributes {
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: Mtime,
}

impl Unpacking {
    pub(super) fn new(limits: Limits) -> Self {
        let mut root = Inode::directory();
        if let Body::Directory(directory) = &mut root.body {
            directory.named = true;
        }
        Self { limits, metadata_bytes: 0, inodes: vec![root], directory_times: Vec::new() }
    }

    /// Applies an entry whose bytes, if it has any, start at `offset` in the device.
    pub(super) fn apply(&mut self, header: &Header, records: &Records, offset: u64, size: u64) -> Result<(), TarError> {
        let Some(place) = self.place(header)? else { return Ok(()) };
        let kind = match header.type_flag {
            b'0' | b'7' => Kind::Regular { offset, size },
            b'1' => return self.apply_link(header, records, &place),
            b'2' => Kind::Symlink { target: link_target(header)? },
            b'3' => device(header).map(|(major, minor)| Kind::CharDevice { major, minor })?,
            b'4' => device(header).map(|(major, minor)| Kind::BlockDevice { major, minor })?,
            b'5' => return self.apply_directory(header, records, &place),
            b'6' => Kind::Fifo,
            other => {
                let name = show(&header.name);
                return Err(unsupported(format!("{name} is of the unknown type {:?}", char::from(other))));
            }
        };
        if let Kind::Symlink { target } = &kind {
            self.charge(target.len())?;
        }
        let inode = self.insert(&place, Body::Other(kind))?;
        self.set_attributes(inode, header, records)
    }

    /// A global PAX header: containerd prepares its path as it does for every entry and then writes nothing.
    pub(super) fn apply_global(&mut self, header: &Header) -> Result<(), TarError> {
        self.place(header).map(drop)
    }

    /// The tree of all that was applied.
    pub(super) fn finish(mut self) -> Result<Tree, TarError> {
        self.set_directory_times()?;
        let mut entries: Vec<Entry> = Vec::new();
        let mut first_names: Vec<Option<usize>> = vec![None; self.inodes.len()];
        let mut open: Vec<(Vec<u8>, usize)> = vec![(Vec::new(), ROOT)];
        let mut total = 0;
        while let Some((path, number)) = open.pop() {
            let Some(inode) = self.inodes.get_mut(number) else { continue };
            let first = first_names.get(number).copied().flatten().and_then(|index| entries.get(index));
            if let Some(first) = first {
                let target = first.path.clone();
                total += path.len() + target.len();
                entries.push(bare(path, Kind::HardLink { target }, 0));
            } else {
                if let Some(name) = first_names.get_mut(number) {
                    *name = Some(entries.len());
                }
                total += path.len();
                if let Body::Directory(directory) = &mut inode.body {
                    // Popped from the end, so the last name is pushed first.
                    let children = std::mem::take(&mut directory.children);
                    open.extend(children.into_iter().rev().map(|(name, child)| (joined(&path, &name), child)));
                }
                entries.push(inode.entry(path));
            }
            if total > self.limits.metadata_bytes {
                return Err(unsupported("its paths are too long in all"));
            }
        }
        Ok(Tree::from_sorted(entries))
    }

    /// Where an entry goes: its parent directory is there, and nothing that the entry replaces. `None` if there is
    /// nothing to write: the root, a whiteout and an opaque mark, which are applied here.
    fn place(&mut self, header: &Header) -> Result<Option<Place>, TarError> {
        let clean = path::clean(&header.name);
        let Some((parent, name)) = path::split(&clean) else { return Ok(None) };
        let parent_path = self.follow(parent, &clean)?;
        let directory = self.make_directories(&parent_path)?;
        let mut place = Place { path: joined(&parent_path, name), directory, name: name.to_vec() };
        place.check()?;
        if name == OPAQUE {
            if let Some(directory) = self.directory_mut(place.directory) {
                directory.opaque = true;
            }
            return Ok(None);
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(unsupported(format!("{} is no valid whiteout", show(&clean))));
            }
            place = Place { path: joined(&parent_path, hidden), name: hidden.to_vec(), ..place };
            if self.lookup(&place).is_some() {
                let path = show(&place.path);
                return Err(unsupported(format!("its tar has {path} and removes it as well")));
            }
            let inode = self.insert(&place, Body::Other(Kind::Whiteout))?;
            if let Some(inode) = self.inodes.get_mut(inode) {
                inode.mode = 0;
            }
            return Ok(None);
        }
        let existing = self.lookup(&place);
        let merges = header.type_flag == b'5' && existing.is_some_and(|inode| self.directory(inode).is_some());
        if existing.is_some() && !merges {
            self.remove(&place);
        }
        Ok(Some(place))
    }

    fn apply_directory(&mut self, header: &Header, records: &Records, place: &Place) -> Result<(), TarError> {
        let existing = self.lookup(place);
        let inode = match existing {
            Some(inode) => inode,
            None => self.insert(place, Body::Directory(Directory::default()))?,
        };
        let is_new = existing.is_none();
        if let Some(directory) = self.directory_mut(inode) {
            directory.late |= !is_new && !directory.named;
            directory.named = true;
        }
        let name = path::clean(&header.name);
        self.charge(name.len())?;
        self.directory_times.push((name, bounded(header.mtime)));
        self.set_attributes(inode, header, records)
    }

    fn apply_link(&mut self, header: &Header, records: &Records, place: &Place) -> Result<(), TarError> {
        let decline = |why: &str| {
            let (path, target) = (show(&place.path), show(&header.link_name));
            unsupported(format!("the hard link {path} to {target} {why}"))
        };
        let last = header.link_name.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        let (parent, name) = header.link_name.split_at(last);
        if matches!(name, b"" | b"." | b"..") {
            return Err(decline("points to a directory"));
        }
        let parent = self.follow(&path::clean(parent), &place.path)?;
        let target = joined(&parent, name);
        let inode = self.find(&target).ok_or_else(|| decline("points to a file that is not in this layer"))?;
        match self.inodes.get(inode).map(|inode| &inode.body) {
            Some(Body::Directory(_)) | None => return Err(decline("points to a directory")),
            Some(Body::Other(Kind::Whiteout)) => return Err(decline("points to a whiteout")),
            Some(Body::Other(_)) => {}
        }
        self.charge_path(place)?;
        // A link is an entry of its own, so it counts as one.
        self.charge(std::mem::size_of::<Entry>())?;
        if let Some(directory) = self.directory_mut(place.directory) {
            directory.children.insert(place.name.clone(), inode);
        }
        self.set_attributes(inode, header, records)
    }

    /// lchown, setxattr, lchmod and utimensat of a header, in containerd's order.
    fn set_attributes(&mut self, number: usize, header: &Header, records: &Records) -> Result<(), TarError> {
        let attributes = attributes(header)?;
        let mut added = 0;
        let Some(inode) = self.inodes.get_mut(number) else { return Ok(()) };
        let kind = match &inode.body {
            Body::Directory(_) => &Kind::Directory { opaque: false },
            Body::Other(kind) => kind,
        };
        if !kind.is_directory() {
            // chown(2) takes a file's capabilities away (ATTR_KILL_PRIV); a hard link's header must give them again.
            inode.xattrs.remove(&b"security.capability"[..]);
        }
        for (name, value) in records.xattrs() {
            if !xattr::allowed(kind, name) {
                continue;
            }
            if name.len() > xattr::NAME_MAX || value.len() > xattr::VALUE_MAX {
                let path = show(&header.name);
                return Err(unsupported(format!("{path} has an extended attribute over {} bytes", xattr::VALUE_MAX)));
            }
            added += name.len() + value.len();
            inode.xattrs.insert(name.to_vec(), value.to_vec());
        }
        let pairs = inode.xattrs.iter().map(|(name, value)| (&name[..], &value[..]));
        if xattr::ibody_size(pairs) > xattr::IBODY_MAX {
            return Err(unsupported(format!("{} has over 256 KiB of extended attributes", show(&header.name))));
        }
        Attributes { mode: inode.mode, uid: inode.uid, gid: inode.gid, mtime: inode.mtime } = attributes;
        if matches!(kind, Kind::Symlink { .. }) {
            // Linux keeps no permissions of a symbolic link.
            inode.mode = 0o777;
        }
        self.charge(added)
    }

    /// Resolves the symbolic links of a clean path inside this layer; `of` is the entry that wants it.
    fn follow(&self, path: &[u8], of: &[u8]) -> Result<Vec<u8>, TarError> {
        path::follow(path, ROOT, |directory, path| self.look(directory, path::name(path))).map_err(|error| {
            let of = show(of);
            unsupported(match error {
                FollowError::NotADirectory(path) => format!("{of} lies in {}, which is no directory", show(&path)),
                FollowError::TooManyLinks => format!("the directory of {of} is a loop of symbolic links"),
                FollowError::TooLong => format!("the path of {of} is too long"),
            })
        })
    }

    fn look(&self, directory: usize, name: &[u8]) -> Found<'_, usize> {
        let inode = self.directory(directory).and_then(|directory| directory.children.get(name).copied());
        match inode.and_then(|inode| Some((inode, &self.inodes.get(inode)?.body))) {
            None => Found::Missing,
            Some((inode, Body::Directory(_))) => Found::Directory(inode),
            Some((_, Body::Other(Kind::Symlink { target }))) => Found::Symlink(target),
            Some((_, Body::Other(_))) => Found::Other,
        }
    }

    fn find(&self, path: &[u8]) -> Option<usize> {
        path::components(path).try_fold(ROOT, |inode, name| self.directory(inode)?.children.get(name).copied())
    }

    fn lookup(&self, place: &Place) -> Option<usize> {
        self.directory(place.directory)?.children.get(&place.name).copied()
    }

    /// The directory at a followed path, made with all that lead to it where they are missing (`mkparent`).
    fn make_directories(&mut self, path: &[u8]) -> Result<usize, TarError> {
        let mut directory = ROOT;
        let mut end = 0;
        for name in path::components(path) {
            end += name.len() + usize::from(end > 0);
            directory = match self.directory(directory).and_then(|directory| directory.children.get(name)) {
                Some(child) if self.directory(*child).is_some() => *child,
                Some(_) => {
                    let path = show(path.get(..end).unwrap_or(path));
                    return Err(unsupported(format!("its tar has entries in {path}, which is no directory")));
                }
                None => {
                    let path = path.get(..end).unwrap_or(path).to_vec();
                    let place = Place { path, directory, name: name.to_vec() };
                    place.check()?;
                    self.make_directory(&place)?
                }
            };
        }
        Ok(directory)
    }

    /// Makes a directory that the tar has not named. The kernel gives it the group of a setgid directory that it is made in;
    /// containerd sets its mode afterwards, without setgid, and nothing else.
    fn make_directory(&mut self, place: &Place) -> Result<usize, TarError> {
        let number = self.insert(place, Body::Directory(Directory::default()))?;
        let gid = self.inodes.get(place.directory).filter(|parent| parent.mode & 0o2000 != 0).map(|parent| parent.gid);
        if let (Some(gid), Some(inode)) = (gid, self.inodes.get_mut(number)) {
            inode.gid = gid;
        }
        Ok(number)
    }

    fn insert(&mut self, place: &Place, body: Body) -> Result<usize, TarError> {
        self.charge_path(place)?;
        let number = self.inodes.len();
        if number >= self.limits.entries {
            return Err(unsupported(format!("its tar has over {} entries", self.limits.entries)));
        }
        self.inodes.push(Inode { body, ..Inode::directory() });
        if let Some(directory) = self.directory_mut(place.directory) {
            directory.children.insert(place.name.clone(), number);
        }
        Ok(number)
    }

    /// Removes what is at `place`. What was in it stays among the inodes, where no name leads to it.
    fn remove(&mut self, place: &Place) {
        if let Some(directory) = self.directory_mut(place.directory) {
            directory.children.remove(&place.name);
        }
    }

    fn set_directory_times(&mut self) -> Result<(), TarError> {
        for (name, mtime) in std::mem::take(&mut self.directory_times) {
            let path = self.follow(&name, &name)?;
            let inode = self.find(&path).and_then(|inode| self.inodes.get_mut(inode)).ok_or_else(|| {
                unsupported(format!("its tar has the directory {} and removes it again", show(&name)))
            })?;
            match &inode.body {
                // No layer says anything of the root, and nobody sees the time of a whiteout; that of an implicit
                // directory comes from the layers below.
                _ if path.is_empty() => {}
                Body::Directory(Directory { named: false, .. }) | Body::Other(Kind::Whiteout) => {}
                _ => inode.mtime = mtime,
            }
        }
        Ok(())
    }

    fn directory(&self, inode: usize) -> Option<&Directory> {
        match &self.inodes.get(inode)?.body {
            Body::Directory(directory) => Some(directory),
            Body::Other(_) => None,
        }
    }

    fn directory_mut(&mut self, inode: usize) -> Option<&mut Directory> {
        match &mut self.inodes.get_mut(inode)?.body {
            Body::Directory(directory) => Some(directory),
            Body::Other(_) => None,
        }
    }

    fn charge_path(&mut self, place: &Place) -> Result<(), TarError> {
        self.charge(place.path.len())
    }

    /// Counts bytes that are kept until the end.
    fn charge(&mut self, bytes: usize) -> Result<(), TarError> {
        self.metadata_bytes = self.metadata_bytes.saturating_add(bytes);
        if self.metadata_bytes > self.limits.metadata_bytes {
            return Err(unsupported(format!("its tar has over {} bytes of metadata", self.limits.metadata_bytes)));
        }
        Ok(())
    }
}

/// A followed path with its directory's inode and its name there.
struct Place {
    path: Vec<u8>,
    directory: usize,
    name: Vec<u8>,
}

impl Place {
    fn check(&self) -> Result<(), TarError> {
        if self.path.len() > path::PATH_MAX || self.name.len() > path::NAME_MAX {
            return Err(unsupported(format!("the path {} is too long", show(&self.path))));
        }
        Ok(())
    }
}

impl Inode {
    /// An implicit directory.
    fn directory() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Mtime::default(),
            xattrs: BTreeMap::new(),
            body: Body::Directory(Directory::default()),
        }
    }

    /// The entry of the inode's first name. Leaves the inode without xattrs and children.
    fn entry(&mut self, path: Vec<u8>) -> Entry {
        let kind = match std::mem::replace(&mut self.body, Body::Other(Kind::Fifo)) {
            Body::Directory(Directory { named: true, late: true, opaque, .. }) => Kind::LateDirectory { opaque },
            Body::Directory(Directory { named: true, opaque, .. }) => Kind::Directory { opaque },
            Body::Directory(Directory { named: false, opaque, .. }) => Kind::ImplicitDirectory { opaque },
            Body::Other(kind) => kind,
        };
        let xattrs = std::mem::take(&mut self.xattrs);
        Entry {
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            xattrs: xattrs.into_iter().map(|(name, value)| Xattr { name, value }).collect(),
            ..bare(path, kind, self.mode)
        }
    }
}

fn bare(path: Vec<u8>, kind: Kind, mode: u16) -> Entry {
    Entry { path, kind, mode, uid: 0, gid: 0, mtime: Mtime::default(), xattrs: Vec::new() }
}

fn attributes(header: &Header) -> Result<Attributes, TarError> {
    let owner = |id: i64| {
        // lchown(2) takes the largest id for "leave it as it is".
        u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or_else(|| {
            let path = show(&header.name);
            unsupported(format!("{path} has an owner out of range ({id})"))
        })
    };
    Ok(Attributes {
        mode: (header.mode & 0o7777) as u16,
        uid: owner(header.uid)?,
        gid: owner(header.gid)?,
        mtime: bounded(header.mtime),
    })
}

/// containerd's `boundTime`: what does not lie between the epoch and 2^63-1 ns after it becomes the epoch.
fn bounded(mtime: Mtime) -> Mtime {
    const MAX: Mtime = Mtime { secs: i64::MAX / 1_000_000_000, nanos: (i64::MAX % 1_000_000_000) as u32 };
    if (Mtime::default()..=MAX).contains(&mtime) { mtime } else { Mtime::default() }
}

fn link_target(header: &Header) -> Result<Vec<u8>, TarError> {
    if header.link_name.is_empty() || header.link_name.len() > path::TARGET_MAX {
        let path = show(&header.name);
        return Err(unsupported(format!("the symbolic link {path} has an empty or too long target")));
    }
    Ok(header.link_name.clone())
}

fn device(header: &Header) -> Result<(u32, u32), TarError> {
    let number = |number: i64, max| u32::try_from(number).ok().filter(|number| *number <= max);
    match (number(header.major, MAJOR_MAX), number(header.minor, MINOR_MAX)) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => {
            let (path, major, minor) = (show(&header.name), header.major, header.minor);
            Err(unsupported(format!("the device {path} has a number out of range ({major}:{minor})")))
        }
    }
}

fn joined(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}
