//! The content of a directory: blocks of entries sorted by name, each block its entries first and then their names.

use zerocopy::IntoBytes as _;
use zerocopy::little_endian::{U16, U64};

use super::format::{BLOCK, Dirent};

/// A name in a directory.
pub(super) struct Name<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// `children`, which are sorted, with `.` and `..` in their places between them.
pub(super) fn with_dots<'a>(
    dots: [Name<'a>; 2],
    children: impl Iterator<Item = Name<'a>>,
) -> impl Iterator<Item = Name<'a>> {
    let mut dots = dots.into_iter().peekable();
    let mut children = children.peekable();
    std::iter::from_fn(move || match (dots.peek(), children.peek()) {
        (Some(dot), Some(child)) if dot.name > child.name => children.next(),
        (Some(_), _) => dots.next(),
        (None, _) => children.next(),
    })
}

/// Bytes of a directory with these names.
pub(super) fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let mut full = 0;
    let mut used = 0;
    for name in names {
        let needed = size_of::<Dirent>() + name.len();
        if used + needed > BLOCK {
            full += BLOCK as u64;
            used = 0;
        }
        used += needed;
    }
    full + used as u64
}

/// The bytes of a directory. All blocks are whole but the last, which ends with its last name.
pub(super) fn content<'a>(names: impl Iterator<Item = Name<'a>>) -> Vec<u8> {
    let mut content = Vec::new();
    let mut block: Vec<Name<'a>> = Vec::new();
    let mut used = 0;
    for name in names {
        let needed = size_of::<Dirent>() + name.name.len();
        if used + needed > BLOCK {
            flush(&mut block, &mut content);
            content.resize(content.len().next_multiple_of(BLOCK), 0);
            used = 0;
        }
        used += needed;
        block.push(name);
    }
    flush(&mut block, &mut content);
    content
}

fn flush(block: &mut Vec<Name<'_>>, content: &mut Vec<u8>) {
    let mut name_offset = block.len() * size_of::<Dirent>();
    for name in block.iter() {
        let dirent = Dirent {
            nid: U64::new(name.nid),
            name_offset: U16::new(name_offset as u16),
            file_type: name.file_type,
            reserved: 0,
        };
        content.extend_from_slice(dirent.as_bytes());
        name_offset += name.name.len();
    }
    for name in block.drain(..) {
        content.extend_from_slice(name.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names<'a>(names: &'a [&'a str]) -> impl Iterator<Item = Name<'a>> {
        names.iter().map(|name| Name { name: name.as_bytes(), nid: 1, file_type: 1 })
    }

    fn dots() -> [Name<'static>; 2] {
        [&b"."[..], b".."].map(|name| Name { name, nid: 2, file_type: 2 })
    }

    #[test]
    fn dots_stand_in_byte_order() {
        let sorted = |children: &[&str]| -> Vec<String> {
            with_dots(dots(), names(children)).map(|name| String::from_utf8(name.name.to_vec()).unwrap()).collect()
        };
        assert_eq!(sorted(&["!", "-", ".-", ".a", "a"]), ["!", "-", ".", ".-", "..", ".a", "a"]);
        assert_eq!(sorted(&[]), [".", ".."]);
    }

    #[test]
    fn size_is_that_of_the_content() {
        for count in [0, 1, 5, 20, 300] {
            let owned: Vec<String> = (0..count).map(|n| format!("{n:03}{}", "x".repeat(n * 7 % 250))).collect();
            let children: Vec<&str> = owned.iter().map(String::as_str).collect();
            let content = content(with_dots(dots(), names(&children)));
            assert_eq!(content.len() as u64, size(with_dots(dots(), names(&children)).map(|name| name.name)));
        }
    }
}
