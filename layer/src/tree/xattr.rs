//! Which extended attributes a layer's tar may give a path, and how large they may be.

use crate::entry::{Kind, Xattr};

/// Longest name with its namespace (Linux's XATTR_NAME_MAX).
pub(crate) const NAME_MAX: usize = 255;

/// Largest value: EROFS counts it in 16 bits, one byte less than Linux's XATTR_SIZE_MAX.
pub(crate) const VALUE_MAX: usize = 65_535;

/// Most bytes of one inode's attributes in EROFS: the ibody's 12-byte header and 4-byte units counted in 16 bits
/// (`erofs_xattr_ibody_size` in the kernel's erofs_fs.h).
pub(crate) const IBODY_MAX: usize = IBODY_HEADER + 4 * (u16::MAX as usize - 1);

/// Bytes of `struct erofs_xattr_ibody_header`.
pub(crate) const IBODY_HEADER: usize = 12;

/// A name's namespace as EROFS numbers it (`EROFS_XATTR_INDEX_*`), and the part of the name that is stored.
pub(crate) fn namespace(name: &[u8]) -> Option<(u8, &[u8])> {
    const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => PREFIXES
            .iter()
            .find_map(|(prefix, index)| Some((*index, name.strip_prefix(*prefix)?)))
            .filter(|(_, suffix)| !suffix.is_empty()),
    }
}

/// Whether a path of this kind may have the attribute `name`: what Linux lets root set on it, without
///
/// - `trusted.*`, which containerd never takes from a tar: `trusted.overlay.*` would forge opaque directories,
///   redirects and metacopies for overlayfs;
/// - `user.overlay.*`, which is the same for an overlay that is mounted with `userxattr`.
pub(crate) fn allowed(kind: &Kind, name: &[u8]) -> bool {
    let Some((index, suffix)) = namespace(name) else { return false };
    match (index, kind) {
        (4, _) | (_, Kind::HardLink { .. } | Kind::Whiteout) => false,
        (1, Kind::Regular { .. }) => !suffix.starts_with(b"overlay."),
        (1, kind) => kind.is_directory() && !suffix.starts_with(b"overlay."),
        (2, kind) => !matches!(kind, Kind::Symlink { .. }),
        (3, kind) => kind.is_directory(),
        _ => true,
    }
}

/// Bytes of an inode's attributes in EROFS; 0 if it has none.
pub(crate) fn ibody_size<'a>(xattrs: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> usize {
    let entries: usize = xattrs.into_iter().map(|(name, value)| entry_size(name, value)).sum();
    if entries == 0 { 0 } else { IBODY_HEADER + entries }
}

/// [`ibody_size`] of an entry's attributes.
pub(crate) fn ibody_size_of(xattrs: &[Xattr]) -> usize {
    ibody_size(xattrs.iter().map(|xattr| (&xattr.name[..], &xattr.value[..])))
}

fn entry_size(name: &[u8], value: &[u8]) -> usize {
    let suffix = namespace(name).map_or(0, |(_, suffix)| suffix.len());
    (4 + suffix + value.len()).next_multiple_of(4)
}
