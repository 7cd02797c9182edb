use proptest::prelude::*;

use super::*;
use crate::entry::{Entry, Kind, Mtime};

/// A tar made header by header, so that it can be odd.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn header(name: &str, type_flag: u8, size: u64) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        let bytes = header.as_mut_bytes();
        for (to, from) in bytes.iter_mut().zip(name.bytes()).take(100) {
            *to = from;
        }
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(1);
        header.set_gid(2);
        header.set_mtime(3);
        header.as_mut_bytes()[156] = type_flag;
        header
    }

    fn with(mut self, mut header: tar::Header, content: &[u8]) -> Self {
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, content: &[u8]) -> Self {
        self.with(Self::header(name, b'0', content.len() as u64), content)
    }

    fn directory(self, name: &str) -> Self {
        let mut header = Self::header(name, b'5', 0);
        header.set_mode(0o750);
        self.with(header, b"")
    }

    fn link(self, name: &str, type_flag: u8, target: &str) -> Self {
        let mut header = Self::header(name, type_flag, 0);
        for (to, from) in header.as_mut_bytes()[157..257].iter_mut().zip(target.bytes()) {
            *to = from;
        }
        self.with(header, b"")
    }

    fn extension(self, type_flag: u8, content: &[u8]) -> Self {
        self.with(Self::header("ext", type_flag, content.len() as u64), content)
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        self.extension(b'x', &records.iter().flat_map(|(key, value)| record(key, value)).collect::<Vec<_>>())
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }

    fn tree(self) -> Tree {
        scan(&self.end()).unwrap()
    }

    fn decline(self) -> String {
        match scan(&self.end()).unwrap_err() {
            TarError::Unsupported(reason) => reason,
            error => panic!("{error}"),
        }
    }
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
    let mut len = rest.len();
    while len != rest.len() + len.to_string().len() {
        len = rest.len() + len.to_string().len();
    }
    [len.to_string().as_bytes(), &rest].concat()
}

fn scan(bytes: &[u8]) -> Result<Tree, TarError> {
    let mut scanner = Scanner::new(Limits::default());
    scanner.push(bytes)?;
    let tree = scanner.finish()?;
    assert_eq!(Tree::validate(tree.entries().to_vec(), bytes.len() as u64).as_ref(), Ok(&tree));
    Ok(tree)
}

fn paths(tree: &Tree) -> Vec<&str> {
    tree.entries().iter().map(|entry| str::from_utf8(&entry.path).unwrap()).collect()
}

fn get<'a>(tree: &'a Tree, path: &str) -> &'a Entry {
    tree.get(path.as_bytes()).unwrap()
}

fn xattrs(entry: &Entry) -> Vec<(&str, &[u8])> {
    entry.xattrs.iter().map(|xattr| (str::from_utf8(&xattr.name).unwrap(), &xattr.value[..])).collect()
}

#[test]
fn reads_every_type() {
    let mut device = Archive::header("dev", b'3', 0);
    device.set_device_major(4).unwrap();
    device.set_device_minor(65).unwrap();
    let mut block = Archive::header("blk", b'4', 0);
    block.set_device_major(8).unwrap();
    let tree = Archive::default()
        .directory("./")
        .directory("d/")
        .file("./d/f", b"hello")
        .with(Archive::header("old/", 0, 0), b"")
        .with(Archive::header("cont", b'7', 2), b"ab")
        .link("s", b'2', "../../where/ever")
        .link("h", b'1', "/d/../d/f")
        .with(device, b"")
        .with(block, b"")
        .with(Archive::header("p", b'6', 0), b"")
        .tree();
    assert_eq!(paths(&tree), ["", "blk", "cont", "d", "d/f", "dev", "h", "old", "p", "s"]);
    // The entry of the root is ignored, as containerd does.
    assert_eq!((get(&tree, "").mode, get(&tree, "").uid), (0o755, 0));
    let file = get(&tree, "d/f");
    assert_eq!(file.kind, Kind::Regular { offset: 1536, size: 5 });
    assert_eq!((file.mode, file.uid, file.gid, file.mtime), (0o644, 1, 2, Mtime { secs: 3, nanos: 0 }));
    assert_eq!(get(&tree, "d").kind, Kind::Directory { opaque: false });
    assert_eq!(get(&tree, "old").kind, Kind::Directory { opaque: false });
    assert_eq!(get(&tree, "cont").kind, Kind::Regular { offset: 3072, size: 2 });
    assert_eq!(get(&tree, "s").kind, Kind::Symlink { target: b"../../where/ever".to_vec() });
    assert_eq!(get(&tree, "s").mode, 0o777);
    assert_eq!(get(&tree, "h").kind, Kind::HardLink { target: b"d/f".to_vec() });
    assert_eq!(get(&tree, "dev").kind, Kind::CharDevice { major: 4, minor: 65 });
    assert_eq!(get(&tree, "blk").kind, Kind::BlockDevice { major: 8, minor: 0 });
    assert_eq!(get(&tree, "p").kind, Kind::Fifo);
}

#[test]
fn reads_long_names_and_pax_records() {
    let long = "a/".repeat(150) + "file";
    let tree = Archive::default()
        .extension(b'L', format!("{long}\0").as_bytes())
        .file("short", b"")
        .extension(b'K', b"the long target\0")
        .link("link", b'2', "x")
        .pax(&[
            ("path", b"pax"),
            ("uid", b"70000"),
            ("gid", b"4294967294"),
            ("size", b"3"),
            ("mtime", b"1.25"),
            ("SCHILY.xattr.user.a", b"x=\n\0"),
            ("SCHILY.xattr.user.empty", b""),
            ("SCHILY.xattr.security.capability", b"cap"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ("SCHILY.xattr.unknown.x", b"y"),
            ("LIBARCHIVE.xattr.user.b", b"eA=="),
            ("comment", b"nothing"),
        ])
        .with(Archive::header("ustar", b'0', 0), b"abc")
        .extension(b'g', &record("path", b"glob"))
        .file("after", b"")
        .tree();
    assert!(tree.get(long.as_bytes()).is_some());
    assert!(tree.has_implicit_directories());
    assert_eq!(get(&tree, "link").kind, Kind::Symlink { target: b"the long target".to_vec() });
    let pax = get(&tree, "pax");
    assert!(matches!(pax.kind, Kind::Regular { size: 3, .. }));
    assert_eq!((pax.uid, pax.gid, pax.mtime), (70_000, u32::MAX - 1, Mtime { secs: 1, nanos: 250_000_000 }));
    let want: [(&str, &[u8]); 3] = [("security.capability", b"cap"), ("user.a", b"x=\n\0"), ("user.empty", b"")];
    assert_eq!(xattrs(pax), want);
    assert!(tree.get(b"after").is_some() && tree.get(b"glob").is_none());
}

#[test]
fn reads_names_and_numbers_of_every_form() {
    let mut prefixed = Archive::header("name", b'0', 0);
    prefixed.as_mut_bytes()[345..345 + 9].copy_from_slice(b"some/long");
    // Base-256: the top bit, then the number; all ones in front of a negative one.
    let mut binary = Archive::header("binary", b'0', 2);
    let number = |bytes: &mut [u8], value: i64| {
        let (front, back) = bytes.split_at_mut(bytes.len() - 8.min(bytes.len()));
        front.fill(if value < 0 { 0xff } else { 0 });
        back.copy_from_slice(&value.to_be_bytes()[8 - back.len()..]);
        bytes[0] |= 0x80;
    };
    number(&mut binary.as_mut_bytes()[108..116], 3_000_000_000);
    number(&mut binary.as_mut_bytes()[116..124], 70_000);
    number(&mut binary.as_mut_bytes()[124..136], 2);
    number(&mut binary.as_mut_bytes()[136..148], 5_000_000_000);
    let mut negative = Archive::header("negative", b'0', 0);
    number(&mut negative.as_mut_bytes()[136..148], -5);
    let mut modes = Archive::header("modes", b'0', 0);
    modes.set_mode(0o107_755);
    let tree = Archive::default()
        .with(prefixed, b"")
        .with(binary, b"ab")
        .with(negative, b"")
        .with(modes, b"")
        .pax(&[("path", b"pax"), ("linkpath", "t".repeat(300).as_bytes()), ("mtime", b"1700000000.000000001")])
        .link("l", b'2', "short")
        .tree();
    assert!(tree.get(b"some/long/name").is_some());
    let binary = get(&tree, "binary");
    assert_eq!((binary.uid, binary.gid, binary.mtime.secs), (3_000_000_000, 70_000, 5_000_000_000));
    assert!(matches!(binary.kind, Kind::Regular { size: 2, .. }));
    // A time before the epoch becomes the epoch, as in containerd.
    assert_eq!(get(&tree, "negative").mtime, Mtime::default());
    assert_eq!(get(&tree, "modes").mode, 0o7755);
    let pax = get(&tree, "pax");
    assert_eq!(pax.kind, Kind::Symlink { target: "t".repeat(300).into_bytes() });
    assert_eq!(pax.mtime, Mtime { secs: 1_700_000_000, nanos: 1 });
}

#[test]
fn files_may_be_larger_than_octal_numbers_say() {
    const SIZE: u64 = (9 << 30) + 5;
    let mut binary = Archive::header("binary", b'0', 0);
    let field = &mut binary.as_mut_bytes()[124..136];
    field.fill(0);
    field[4..].copy_from_slice(&SIZE.to_be_bytes());
    field[0] = 0x80;
    let pax = Archive::default().pax(&[("size", SIZE.to_string().as_bytes())]).file("pax", b"");
    for (start, name) in [(Archive::default().with(binary, b""), "binary"), (pax, "pax")] {
        let mut scanner = Scanner::new(Limits::default());
        let offset = start.0.len() as u64;
        scanner.push(&start.0).unwrap();
        let zeros = vec![0; 64 << 20];
        let mut left = SIZE.next_multiple_of(512);
        while left > 0 {
            let len = left.min(zeros.len() as u64);
            scanner.push(&zeros[..len as usize]).unwrap();
            left -= len;
        }
        scanner.push(&Archive::default().file("after", b"x").end()).unwrap();
        let tree = scanner.finish().unwrap();
        assert_eq!(get(&tree, name).kind, Kind::Regular { offset, size: SIZE });
        let after = offset + SIZE.next_multiple_of(512) + 512;
        assert_eq!(get(&tree, "after").kind, Kind::Regular { offset: after, size: 1 });
    }
}

#[test]
fn directories_that_come_late_are_marked() {
    let tree = Archive::default()
        .file("late/f", b"")
        .directory("late")
        .directory("early")
        .file("early/f", b"")
        .directory("early")
        .file("hidden/.wh..wh..opq", b"")
        .directory("hidden")
        .tree();
    assert_eq!(get(&tree, "late").kind, Kind::LateDirectory { opaque: false });
    assert_eq!(get(&tree, "late").mode, 0o750);
    assert_eq!(get(&tree, "early").kind, Kind::Directory { opaque: false });
    assert_eq!(get(&tree, "hidden").kind, Kind::LateDirectory { opaque: true });
    assert!(tree.has_implicit_directories() && tree.has_whiteouts());
}

#[test]
fn what_is_made_in_a_setgid_directory_has_its_group() {
    let mut shared = Archive::header("shared", b'5', 0);
    shared.set_mode(0o2775);
    let tree = Archive::default().file("before/x/f", b"").with(shared, b"").file("shared/a/b/f", b"").tree();
    let made = |path: &str| (get(&tree, path).mode, get(&tree, path).gid);
    // containerd's mkdir takes the bit away again, so it goes no further.
    assert_eq!((made("shared"), made("shared/a"), made("shared/a/b")), ((0o2775, 2), (0o755, 2), (0o755, 0)));
    assert_eq!(made("before/x"), (0o755, 0));
}

#[test]
fn bounds_times_as_containerd_does() {
    let tree = Archive::default()
        .pax(&[("mtime", b"-1.5")])
        .file("before", b"")
        .pax(&[("mtime", b"9223372036.854775807")])
        .file("last", b"")
        .pax(&[("mtime", b"9223372036.854775808")])
        .file("late", b"")
        .tree();
    assert_eq!(get(&tree, "before").mtime, Mtime::default());
    assert_eq!(get(&tree, "last").mtime, Mtime { secs: 9_223_372_036, nanos: 854_775_807 });
    assert_eq!(get(&tree, "late").mtime, Mtime::default());
}

#[test]
fn whiteouts_become_kinds() {
    let tree = Archive::default()
        .file("a/.wh.gone", b"")
        .file("b/.wh..wh..opq", b"")
        .directory("c")
        .file("c/.wh..wh..opq", b"")
        .file("c/kept", b"")
        .file(".wh.back", b"")
        .directory("back")
        .file(".wh..wh.plnk", b"")
        .tree();
    assert_eq!(paths(&tree), ["", ".wh.plnk", "a", "a/gone", "b", "back", "c", "c/kept"]);
    assert_eq!(get(&tree, "a/gone").kind, Kind::Whiteout);
    assert_eq!(get(&tree, "a").kind, Kind::ImplicitDirectory { opaque: false });
    assert_eq!(get(&tree, "b").kind, Kind::ImplicitDirectory { opaque: true });
    assert_eq!(get(&tree, "c").kind, Kind::Directory { opaque: true });
    assert_eq!(get(&tree, "back").kind, Kind::Directory { opaque: false });
    assert!(tree.has_whiteouts());
    for (first, second) in [("x", ".wh.x"), (".wh.x", ".wh.x"), ("x/y", ".wh.x")] {
        let reason = Archive::default().file(first, b"").file(second, b"").decline();
        assert!(reason.contains("removes it as well"), "{reason}");
    }
    for name in [".wh.", "a/.wh..", ".wh..."] {
        let reason = Archive::default().file(name, b"").decline();
        assert!(reason.contains("no valid whiteout"), "{reason}");
    }
}

#[test]
fn later_entries_replace_and_merge() {
    let tree = Archive::default()
        .file("f", b"1")
        .file("f", b"22")
        .pax(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.b", b"1")])
        .directory("d")
        .file("d/kept", b"")
        .pax(&[("SCHILY.xattr.user.b", b"2")])
        .directory("d")
        .file("e/child", b"")
        .file("e", b"now a file")
        .tree();
    assert_eq!(paths(&tree), ["", "d", "d/kept", "e", "f"]);
    assert!(matches!(get(&tree, "f").kind, Kind::Regular { size: 2, .. }));
    let want: [(&str, &[u8]); 2] = [("user.a", b"1"), ("user.b", b"2")];
    assert_eq!(xattrs(get(&tree, "d")), want);
    assert!(matches!(get(&tree, "e").kind, Kind::Regular { size: 10, .. }));
    // The removed directory's time is set at the end, on whatever is there.
    let mut late = Archive::header("x", b'5', 0);
    late.set_mtime(99);
    let tree = Archive::default().with(late, b"").file("x", b"").tree();
    assert_eq!(get(&tree, "x").mtime.secs, 99);
    let reason = Archive::default().directory("x").directory("x/y").link("x", b'2', "z").decline();
    assert!(reason.contains("removes it again"), "{reason}");
}

#[test]
fn hard_links_share_what_the_last_header_says() {
    let mut link = Archive::header("b", b'1', 0);
    link.as_mut_bytes()[157] = b'a';
    link.set_mode(0o4711);
    link.set_uid(9);
    let tree = Archive::default()
        .pax(&[("SCHILY.xattr.security.capability", b"cap"), ("SCHILY.xattr.user.x", b"1")])
        .file("a", b"abc")
        .with(link, b"")
        .link("c", b'1', "b")
        .link("0", b'1', "./c")
        .file("a", b"other")
        .tree();
    // The order of names decides which entry is the file; the original name has become another file.
    let file = get(&tree, "0");
    assert!(matches!(file.kind, Kind::Regular { size: 3, .. }));
    assert_eq!((file.mode, file.uid), (0o644, 1));
    assert_eq!(xattrs(file), [("user.x", &b"1"[..])]);
    assert_eq!(get(&tree, "b").kind, Kind::HardLink { target: b"0".to_vec() });
    assert_eq!(get(&tree, "c").kind, Kind::HardLink { target: b"0".to_vec() });
    assert!(matches!(get(&tree, "a").kind, Kind::Regular { size: 5, .. }));
    assert_eq!(tree.outline().link_count(tree.find(b"0").unwrap()), 3);

    let decline = |name: &str, target: &str| Archive::default().directory("d").link(name, b'1', target).decline();
    assert!(decline("x", "lower/file").contains("not in this layer"));
    assert!(decline("x", "x").contains("not in this layer"));
    assert!(decline("x", "d").contains("directory"));
    assert!(decline("x", "d/").contains("directory"));
}

#[test]
fn resolves_parents_inside_the_layer() {
    let tree = Archive::default()
        .directory("usr/lib")
        .link("lib", b'2', "usr/lib")
        .link("up", b'2', "../../../usr")
        .file("lib/a", b"")
        .file("/up/b", b"")
        .file("../../c", b"")
        .file("up/.wh.gone", b"")
        .link("d", b'1', "lib/a")
        .tree();
    assert_eq!(paths(&tree), ["", "c", "d", "lib", "up", "usr", "usr/b", "usr/gone", "usr/lib", "usr/lib/a"]);
    assert_eq!(get(&tree, "usr/lib/a").kind, Kind::HardLink { target: b"d".to_vec() });
    assert!(Archive::default().file("f", b"").file("f/x", b"").decline().contains("no directory"));
    assert!(Archive::default().file("f", b"").file("f/x/y", b"").decline().contains("no directory"));
    assert!(Archive::default().link("l", b'2', "l").file("l/x", b"").decline().contains("loop"));
}

#[test]
fn declines_what_it_cannot_show() {
    let reason = |archive: Archive| archive.decline();
    assert!(reason(Archive::default().pax(&[("GNU.sparse.major", b"1")]).file("a", b"")).contains("sparse"));
    assert!(reason(Archive::default().with(Archive::header("a", b'S', 0), b"")).contains("sparse"));
    assert!(reason(Archive::default().with(Archive::header("a", b'V', 0), b"")).contains("unknown type"));
    let large = vec![b'x'; 65_536];
    assert!(reason(Archive::default().pax(&[("SCHILY.xattr.user.a", &large)]).file("a", b"")).contains("attribute"));
    let values: Vec<(String, &[u8])> = (0..5).map(|n| (format!("SCHILY.xattr.user.{n}"), &large[1..])).collect();
    let values: Vec<(&str, &[u8])> = values.iter().map(|(key, value)| (&key[..], *value)).collect();
    assert!(reason(Archive::default().pax(&values).file("a", b"")).contains("256 KiB"));
    assert!(reason(Archive::default().extension(b'x', &vec![0; (1 << 20) + 1])).contains("1 MiB"));
    assert!(reason(Archive::default().pax(&[("uid", b"4294967295")]).file("a", b"")).contains("owner"));
    assert!(reason(Archive::default().pax(&[("uid", b"-1")]).file("a", b"")).contains("owner"));
    let mut device = Archive::header("a", b'3', 0);
    device.set_device_major(4096).unwrap();
    assert!(reason(Archive::default().with(device, b"")).contains("out of range"));
    assert!(reason(Archive::default().link("a", b'2', "")).contains("target"));
    assert!(reason(Archive::default().pax(&[("path", "n".repeat(256).as_bytes())]).file("a", b"")).contains("long"));
    assert!(reason(Archive::default().pax(&[("path", "n/".repeat(3000).as_bytes())]).file("a", b"")).contains("long"));

    let mut scanner = Scanner::new(Limits { entries: 3, ..Limits::default() });
    let archive = Archive::default().file("a", b"").file("b", b"").file("c", b"").end();
    let error = scanner.push(&archive).unwrap_err();
    assert!(matches!(error, TarError::Unsupported(_)));
    assert_eq!(scanner.push(b"x"), Err(error.clone()));
    assert_eq!(scanner.finish(), Err(error));
    let mut scanner = Scanner::new(Limits { metadata_bytes: 2, ..Limits::default() });
    assert!(scanner.push(&archive).is_err());
}

#[test]
fn refuses_broken_archives() {
    let whole = Archive::default().file("a", &[7; 600]).end();
    let is_broken = |bytes: &[u8]| matches!(scan(bytes), Err(TarError::Broken { .. }));
    for cut in [1, 511, 513, 512 + 599, 512 + 1024 + 1, 512 + 1024 + 512 + 1] {
        assert!(is_broken(&whole[..cut]), "cut at {cut}");
    }
    // Go takes an archive without padding, with one zero block or with none.
    for cut in [0, 512 + 600, 512 + 601, 512 + 1024, 512 + 1024 + 512, whole.len()] {
        assert!(scan(&whole[..cut]).is_ok(), "cut at {cut}");
    }
    let mut flipped = whole.clone();
    flipped[0] ^= 1;
    assert!(is_broken(&flipped));
    let mut header_after_zeros = vec![0; 512];
    header_after_zeros.extend_from_slice(&whole);
    assert!(is_broken(&header_after_zeros));
    let mut garbage_after_end = whole.clone();
    garbage_after_end.extend_from_slice(b"trailing garbage");
    assert_eq!(paths(&scan(&garbage_after_end).unwrap()), ["", "a"]);
    assert!(is_broken(&Archive::default().pax(&[("size", b"-1")]).file("a", b"").end()));
    assert!(is_broken(&Archive::default().pax(&[("size", b"x")]).file("a", b"").end()));
    assert!(is_broken(&Archive::default().extension(b'x', b"nonsense").end()));
    let mut base256 = Archive::header("a", b'0', 0);
    base256.as_mut_bytes()[124..136].copy_from_slice(&[0xff; 12]);
    assert!(is_broken(&Archive::default().with(base256, b"").end()));
}

fn split_scan(bytes: &[u8], cuts: &[usize]) -> Result<Tree, TarError> {
    let mut scanner = Scanner::new(Limits::default());
    let mut rest = bytes;
    for cut in cuts {
        let (head, tail) = rest.split_at((*cut).min(rest.len()));
        scanner.push(head)?;
        rest = tail;
    }
    scanner.push(rest)?;
    scanner.finish()
}

prop_compose! {
    fn any_name()(parts in prop::collection::vec(prop::sample::select(vec!["a", "b", "c", ".", "..", "", ".wh.a", ".wh..wh..opq", "long-name-0123456789"]), 1..5)) -> String {
        parts.join("/")
    }
}

/// Entries as the `tar` crate writes them, with collisions, links, long names and PAX records.
fn any_archive() -> impl Strategy<Value = Vec<u8>> {
    let entry = (any_name(), any_name(), 0..7_u8, 0..1500_usize, any::<bool>());
    prop::collection::vec(entry, 0..12).prop_map(|entries| {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, target, type_number, size, has_pax) in entries {
            let type_flag = b"0125362"[usize::from(type_number)];
            let mut header = Archive::header("", type_flag, if type_flag == b'0' { size as u64 } else { 0 });
            if has_pax {
                let records = [("SCHILY.xattr.user.x", &b"1"[..]), ("mtime", b"5.5"), ("path", name.as_bytes())];
                builder.append_pax_extensions(records).unwrap();
            }
            let prefix = if size % 3 == 0 { "x".repeat(120) + "/" } else { String::new() };
            let bytes = header.as_mut_bytes();
            for (to, from) in bytes[157..257].iter_mut().zip(target.bytes()) {
                *to = from;
            }
            for (to, from) in bytes[..100].iter_mut().zip(name.bytes()) {
                *to = from;
            }
            header.set_cksum();
            if !prefix.is_empty() {
                let long = format!("{prefix}{name}\0");
                builder.append(&long_name_header(long.len()), long.as_bytes()).unwrap();
            }
            let content = vec![size as u8; if type_flag == b'0' { size } else { 0 }];
            builder.append(&header, &content[..]).unwrap();
        }
        builder.into_inner().unwrap()
    })
}

fn long_name_header(len: usize) -> tar::Header {
    let mut header = Archive::header("././@LongLink", b'L', len as u64);
    header.set_cksum();
    header
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_split_gives_the_same_tree(archive in any_archive(), cuts in prop::collection::vec(0..2000_usize, 0..30)) {
        let whole = scan(&archive);
        prop_assert_eq!(&split_scan(&archive, &cuts), &whole);
    }

    #[test]
    fn damage_never_panics(archive in any_archive(), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), fix in any::<bool>()) {
        let mut archive = archive;
        for (at, byte) in flips {
            let at = at.index(archive.len());
            archive[at] = byte;
            let block = at / 512 * 512;
            if let Some(header) = archive.get_mut(block..block + 512).filter(|_| fix) {
                let mut fixed = tar::Header::from_byte_slice(header).clone();
                fixed.set_cksum();
                header.copy_from_slice(fixed.as_bytes());
            }
        }
        let _ = scan(&archive);
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let _ = scan(&bytes);
    }
}
