//! Paths as byte strings relative to a layer's root.

use std::cmp::Ordering;

/// Longest path in bytes, Linux's PATH_MAX.
pub const PATH_MAX: usize = 4096;

/// Longest component of a path in bytes, Linux's and EROFS's NAME_MAX.
pub const NAME_MAX: usize = 255;

/// Longest target of a symbolic link in bytes: symlink(2) takes PATH_MAX with the terminating NUL.
pub const TARGET_MAX: usize = PATH_MAX - 1;

/// The order of a tree: byte order of components, so that a directory stands right before all that is in it.
pub fn compare(a: &[u8], b: &[u8]) -> Ordering {
    // No component holds a NUL, so a separator that counts as NUL sorts before every byte of a name.
    let key = |byte: &u8| if *byte == b'/' { 0 } else { *byte };
    a.iter().map(key).cmp(b.iter().map(key))
}

/// Whether `path` lies in the directory `directory` at any depth. Everything but the root lies in the root.
pub fn is_inside(path: &[u8], directory: &[u8]) -> bool {
    match path.strip_prefix(directory) {
        Some(rest) if directory.is_empty() => !rest.is_empty(),
        Some(rest) => rest.first() == Some(&b'/'),
        None => false,
    }
}

/// The directory that holds `path`, and the last component. The root has neither.
pub fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => Some((path.get(..at)?, path.get(at + 1..)?)),
        None => Some((b"", path)),
    }
}

/// The last component of `path`; empty for the root.
pub fn name(path: &[u8]) -> &[u8] {
    split(path).map_or(b"", |(_, name)| name)
}

/// Resolves `.`, `..`, empty components and a leading `/` by their text alone; `..` never leaves the root.
pub(crate) fn clean(path: &[u8]) -> Vec<u8> {
    join(b"", path)
}

/// `path` seen from the clean directory `directory`, cleaned as [`clean`] does. An absolute `path` is seen from the root.
pub(crate) fn join(directory: &[u8], path: &[u8]) -> Vec<u8> {
    let mut clean = Vec::with_capacity(directory.len() + path.len() + 1);
    if path.first() != Some(&b'/') {
        clean.extend_from_slice(directory);
    }
    for component in components(path) {
        match component {
            b"." => {}
            b".." => clean.truncate(clean.iter().rposition(|byte| *byte == b'/').unwrap_or(0)),
            _ => {
                if !clean.is_empty() {
                    clean.push(b'/');
                }
                clean.extend_from_slice(component);
            }
        }
    }
    clean
}

/// The non-empty components of `path`.
pub(crate) fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|component| !component.is_empty())
}

/// What a directory has under a name, for [`follow`]; `C` stands for a directory.
pub(crate) enum Found<'a, C> {
    Missing,
    Directory(C),
    Symlink(&'a [u8]),
    Other,
}

/// Why a path cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FollowError {
    NotADirectory(Vec<u8>),
    TooManyLinks,
    TooLong,
}

/// Resolves the symbolic links in a clean path, the last component included, as containerd's `fs.RootPath` does:
/// never out of the root, at most 255 links, and what does not exist stays as it is. `look` gets a directory and the
/// path of something in it.
pub(crate) fn follow<'a, C: Copy>(
    path: &[u8],
    root: C,
    look: impl Fn(C, &[u8]) -> Found<'a, C>,
) -> Result<Vec<u8>, FollowError> {
    let mut path = path.to_vec();
    for _ in 0..=255 {
        match first_link(&path, root, &look)? {
            None => return Ok(path),
            Some(followed) if followed.len() > PATH_MAX => return Err(FollowError::TooLong),
            Some(followed) => path = followed,
        }
    }
    Err(FollowError::TooManyLinks)
}

/// `path` with its first symbolic link replaced; `None` if it has none.
fn first_link<'a, C: Copy>(
    path: &[u8],
    root: C,
    look: &impl Fn(C, &[u8]) -> Found<'a, C>,
) -> Result<Option<Vec<u8>>, FollowError> {
    if path.is_empty() {
        return Ok(None);
    }
    let mut directory = root;
    let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at).chain([path.len()]);
    for end in ends {
        let (head, rest) = path.split_at(end);
        match look(directory, head) {
            Found::Directory(found) => directory = found,
            Found::Missing => return Ok(None),
            Found::Symlink(target) => {
                let mut followed = join(split(head).map_or(b"", |(directory, _)| directory), target);
                let rest = if followed.is_empty() { rest.strip_prefix(b"/").unwrap_or(rest) } else { rest };
                followed.extend_from_slice(rest);
                return Ok(Some(followed));
            }
            Found::Other if rest.is_empty() => {}
            Found::Other => return Err(FollowError::NotADirectory(head.to_vec())),
        }
    }
    Ok(None)
}

/// A path for an error message: at most 200 bytes, anything unprintable escaped.
pub(crate) fn show(path: &[u8]) -> String {
    let head = path.get(..200).unwrap_or(path);
    let ellipsis = if head.len() < path.len() { "..." } else { "" };
    format!("\"{}{ellipsis}\"", head.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_directories_before_their_contents() {
        let mut paths: Vec<&[u8]> = vec![b"a.b", b"a/b", b"a", b"", b"a-", b"a/b/c", b"a/b-c"];
        paths.sort_by(|a, b| compare(a, b));
        assert_eq!(paths, [&b""[..], b"a", b"a/b", b"a/b/c", b"a/b-c", b"a-", b"a.b"]);
    }

    #[test]
    fn cleans_into_the_root() {
        for (path, want) in [
            ("./a", "a"),
            ("/a//b/", "a/b"),
            ("../../x", "x"),
            ("a/../../x/.", "x"),
            (".", ""),
            ("", ""),
            ("a/..", ""),
            ("a/b/../c", "a/c"),
        ] {
            assert_eq!(clean(path.as_bytes()), want.as_bytes(), "{path}");
        }
        assert_eq!(join(b"a/b", b"../c"), b"a/c");
        assert_eq!(join(b"a/b", b"/c"), b"c");
    }

    #[test]
    fn follows_links_inside_the_root() {
        let look = |(), path: &[u8]| match path {
            b"usr" | b"usr/lib" => Found::Directory(()),
            b"lib" => Found::Symlink(b"usr/lib"),
            b"up" => Found::Symlink(b"../../usr"),
            b"abs" => Found::Symlink(b"/lib"),
            b"loop" => Found::Symlink(b"loop"),
            b"root" => Found::Symlink(b"/"),
            b"file" => Found::Other,
            _ => Found::Missing,
        };
        assert_eq!(follow(b"lib/x/y", (), look).unwrap(), b"usr/lib/x/y");
        assert_eq!(follow(b"up/lib", (), look).unwrap(), b"usr/lib");
        assert_eq!(follow(b"abs", (), look).unwrap(), b"usr/lib");
        assert_eq!(follow(b"root/lib", (), look).unwrap(), b"usr/lib");
        assert_eq!(follow(b"root", (), look).unwrap(), b"");
        assert_eq!(follow(b"file", (), look).unwrap(), b"file");
        assert_eq!(follow(b"new/x", (), look).unwrap(), b"new/x");
        assert_eq!(follow(b"loop/x", (), look), Err(FollowError::TooManyLinks));
        assert_eq!(follow(b"file/x", (), look), Err(FollowError::NotADirectory(b"file".to_vec())));
    }
}
