use std::collections::BTreeMap;

use super::*;
use crate::entry::{Entry, Kind, Mtime, Xattr};

const OPTIONS: ImageOptions = ImageOptions { device_size: 1 << 20, bottom: false, uuid: [7; 16] };

fn entry(path: &str, kind: Kind) -> Entry {
    let mode = match kind {
        Kind::HardLink { .. } | Kind::Whiteout => 0,
        _ => 0o755,
    };
    Entry { path: path.into(), kind, mode, uid: 0, gid: 0, mtime: Mtime::default(), xattrs: Vec::new() }
}

fn tree(entries: Vec<Entry>) -> Tree {
    let root = entry("", Kind::Directory { opaque: false });
    Tree::validate([vec![root], entries].concat(), OPTIONS.device_size).unwrap()
}

fn image(tree: &Tree, options: &ImageOptions) -> (Vec<u8>, ImageSummary) {
    let mut image = Vec::new();
    let summary = write_image(tree, options, &Stack::new(&[]), &mut image).unwrap();
    assert_eq!(summary.size, image.len() as u64);
    (image, summary)
}

fn le<const N: usize>(image: &[u8], at: usize) -> u64 {
    image[at..at + N].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The inode of a path, found as the kernel finds it but by linear search.
fn inode_of(image: &[u8], path: &str) -> Option<usize> {
    path.split('/').filter(|name| !name.is_empty()).try_fold(HEAD, |directory, name| {
        names(image, directory).into_iter().find(|(found, _)| found == name).map(|(_, inode)| inode)
    })
}

const HEAD: usize = 1536;

fn names(image: &[u8], inode: usize) -> Vec<(String, usize)> {
    let content = content(image, inode);
    let mut names = Vec::new();
    for block in content.chunks(512) {
        let count = le::<2>(block, 8) as usize / 12;
        for number in 0..count {
            let start = le::<2>(block, number * 12 + 8) as usize;
            let end = if number + 1 < count { le::<2>(block, number * 12 + 20) as usize } else { block.len() };
            let name = block[start..end].split(|byte| *byte == 0).next().unwrap();
            names.push((String::from_utf8(name.to_vec()).unwrap(), le::<8>(block, number * 12) as usize * 32));
        }
    }
    names
}

fn xattr_size(image: &[u8], inode: usize) -> usize {
    match le::<2>(image, inode + 2) as usize {
        0 => 0,
        count => 12 + 4 * (count - 1),
    }
}

/// The content of a directory or symbolic link.
fn content(image: &[u8], inode: usize) -> Vec<u8> {
    let size = le::<8>(image, inode + 8) as usize;
    let block = le::<4>(image, inode + 16) as usize * 512;
    let tail = inode + 64 + xattr_size(image, inode);
    match le::<2>(image, inode) {
        0b0001 => image[block..block + size].to_vec(),
        0b0101 => [&image[block..block + size / 512 * 512], &image[tail..tail + size % 512]].concat(),
        other => panic!("layout {other:b}"),
    }
}

#[test]
fn every_path_is_found() {
    let mut entries = vec![entry("!first", Kind::Fifo), entry("d", Kind::Directory { opaque: true })];
    for number in 0..2000 {
        let kind = Kind::Regular { offset: number * 512, size: number };
        entries.push(entry(&format!("d/{number:04}{}", "x".repeat(number as usize % 200)), kind));
    }
    entries.push(entry("h", Kind::HardLink { target: b"d/0000".to_vec() }));
    for len in [1, 100, 448, 449, 511, 512, 513, 960, 4095] {
        entries.push(entry(&format!("l{len:04}"), Kind::Symlink { target: vec![b'x'; len] }));
    }
    let tree = tree(entries);
    let (image, summary) = image(&tree, &OPTIONS);
    assert_eq!(summary.inodes, tree.entries().len() as u64 - 1);
    for entry in tree.entries() {
        let inode = inode_of(&image, str::from_utf8(&entry.path).unwrap()).unwrap();
        match &tree.resolve(entry).kind {
            Kind::Symlink { target } => assert_eq!(&content(&image, inode), target),
            Kind::Regular { size: 0, .. } => assert_eq!(le::<8>(&image, inode + 8), 0),
            Kind::Regular { offset, size } => {
                assert_eq!(le::<8>(&image, inode + 8), *size);
                let chunk_blocks = 1 << (le::<4>(&image, inode + 16) & 0x1f);
                assert!(chunk_blocks * 512 >= *size);
                assert_eq!(le::<2>(&image, inode + 66), 1);
                assert_eq!(le::<4>(&image, inode + 68), offset / 512);
            }
            _ => {}
        }
    }
    let sorted = names(&image, HEAD);
    assert!(sorted.is_sorted_by(|a, b| a.0 < b.0), "{sorted:?}");
    let links = |path| le::<4>(&image, inode_of(&image, path).unwrap() + 44);
    assert_eq!((links(""), links("d"), links("h"), links("!first")), (3, 2, 2, 1));
}

#[test]
fn bottom_leaves_whiteouts_out() {
    let tree = tree(vec![entry("a", Kind::Directory { opaque: true }), entry("b", Kind::Whiteout)]);
    let (upper, _) = image(&tree, &OPTIONS);
    let whiteout = inode_of(&upper, "b").unwrap();
    assert_eq!((le::<2>(&upper, whiteout + 4), le::<4>(&upper, whiteout + 16)), (0o020_000, 0));
    let xattrs = inode_of(&upper, "a").unwrap() + 64;
    assert_eq!(&upper[xattrs + 12..xattrs + 32], b"\x0e\x04\x01\x00overlay.opaquey\0");
    let (bottom, summary) = image(&tree, &ImageOptions { bottom: true, ..OPTIONS });
    assert_eq!(summary.inodes, 2);
    assert_eq!(inode_of(&bottom, "b"), None);
    assert_eq!(xattr_size(&bottom, inode_of(&bottom, "a").unwrap()), 0);
}

#[test]
fn implicit_directories_take_over() {
    let tree = tree(vec![entry("tmp", Kind::ImplicitDirectory { opaque: false }), entry("tmp/x", Kind::Fifo)]);
    let mut lower = BTreeMap::new();
    let xattr = |name: &str| Xattr { name: name.into(), value: b"1".to_vec() };
    lower.insert(
        b"tmp".to_vec(),
        DirectoryAttributes {
            mode: 0o1777,
            uid: 5,
            gid: 6,
            mtime: Mtime { secs: -1, nanos: 9 },
            xattrs: vec![xattr("trusted.overlay.opaque"), xattr("user.a")],
        },
    );
    let mut image = Vec::new();
    write_image(&tree, &OPTIONS, &lower, &mut image).unwrap();
    let inode = inode_of(&image, "tmp").unwrap();
    assert_eq!(le::<2>(&image, inode + 4), 0o041_777);
    assert_eq!((le::<4>(&image, inode + 24), le::<4>(&image, inode + 28)), (5, 6));
    assert_eq!((le::<8>(&image, inode + 32), le::<4>(&image, inode + 40)), (u64::MAX, 9));
    assert_eq!(&image[inode + 76..inode + 82], b"\x01\x01\x01\x00a1");
    assert_eq!(xattr_size(&image, inode), 20);
}

#[test]
fn late_directories_keep_the_attributes_of_the_layers_below() {
    let xattr = |name: &str, value: &str| Xattr { name: name.into(), value: value.into() };
    let named = |kind, xattrs| Entry { mode: 0o700, uid: 1, gid: 2, xattrs, ..entry("d", kind) };
    let below = tree(vec![named(
        Kind::Directory { opaque: false },
        vec![xattr("user.a", "1"), xattr("user.b", "1"), xattr("user.c", "1")],
    )]);
    let late = || Kind::LateDirectory { opaque: false };
    let middle = tree(vec![named(late(), vec![xattr("user.b", "2")])]);
    let implicit = tree(vec![entry("d", Kind::ImplicitDirectory { opaque: false })]);
    let attributes = Stack::new(&[&implicit, &middle, &below]).attributes(b"d").unwrap();
    assert_eq!(attributes.xattrs, [xattr("user.a", "1"), xattr("user.b", "2"), xattr("user.c", "1")]);
    assert_eq!((attributes.mode, attributes.uid, attributes.gid), (0o700, 1, 2));
    assert_eq!(Stack::new(&[&middle]).attributes(b"d").unwrap().xattrs, [xattr("user.b", "2")]);

    let top = tree(vec![Entry { mode: 0o750, ..named(late(), vec![xattr("user.c", "3")]) }]);
    let mut image = Vec::new();
    write_image(&top, &OPTIONS, &Stack::new(&[&middle, &below]), &mut image).unwrap();
    let inode = inode_of(&image, "d").unwrap();
    assert_eq!(le::<2>(&image, inode + 4), 0o040_750);
    // Three of them, 8 bytes each, behind a header of 12.
    assert_eq!(xattr_size(&image, inode), 12 + 3 * 8);
}

/// The kernel gives what is made in a setgid directory that directory's group.
#[test]
fn setgid_directories_below_give_their_group() {
    let implicit = |path: &str| entry(path, Kind::ImplicitDirectory { opaque: false });
    let tree = tree(vec![implicit("d"), implicit("d/e"), implicit("d/e/f"), entry("d/e/f/x", Kind::Fifo)]);
    let below = DirectoryAttributes { mode: 0o2775, gid: 9, ..DirectoryAttributes::default() };
    let lower: BTreeMap<_, _> = [(b"d".to_vec(), below)].into();
    let mut image = Vec::new();
    write_image(&tree, &OPTIONS, &lower, &mut image).unwrap();
    let group = |path: &str| le::<4>(&image, inode_of(&image, path).unwrap() + 28);
    assert_eq!((group("d"), group("d/e"), group("d/e/f")), (9, 9, 0));
}

#[test]
fn images_are_deterministic_and_small() {
    let tree = tree(vec![entry("a", Kind::Regular { offset: 512, size: 5 })]);
    let (first, _) = image(&tree, &OPTIONS);
    assert_eq!(first, image(&tree, &OPTIONS).0);
    assert_ne!(first, image(&tree, &ImageOptions { uuid: [8; 16], ..OPTIONS }).0);
    assert_eq!(first.len(), 2048);
}
