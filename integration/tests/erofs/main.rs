//! EROFS images against the kernel: mounted file-backed over their tar, and compared with what other programs unpack
//! from the same tar.

mod image;
mod unpack;

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, lchown, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use lab::compare::{compare, xattr, xattr_names};
use layer::erofs::{ImageOptions, ImageSummary, Stack, write_image};
use layer::tree::Tree;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags, lsetxattr, utimensat};
use tempfile::TempDir;

use self::image::{Image, Mounted, run, scan, skipped};

fn set_time(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds as _ };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    lsetxattr(path, name, value, XattrFlags::empty()).unwrap_or_else(|error| panic!("{name} of {path:?}: {error}"));
}

/// A `security.capability` value: revision 2, CAP_NET_BIND_SERVICE permitted and effective.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A folder with every kind of file and attribute that a tar can carry.
fn build(root: &Path) {
    let file = |name: &str, contents: &[u8]| fs::write(root.join(name), contents).unwrap();
    let directory = |name: &str| fs::create_dir_all(root.join(name)).unwrap();
    let pattern = |len: usize| (0..len).map(|at| (at * 31 + at / 251) as u8).collect::<Vec<_>>();
    for size in [0, 1, 511, 512, 513, 4095, 4096, 4097, 70_000, 5_000_001] {
        file(&format!("size-{size}"), &pattern(size));
    }
    directory("many");
    for number in 0..10_000 {
        fs::write(root.join(format!("many/{number}-{}", "n".repeat(number % 40))), []).unwrap();
    }
    directory("long");
    for number in 0..40 {
        file(&format!("long/{number:03}{}", "l".repeat(252)), &pattern(number));
    }
    let deep = "deep/".to_owned() + &"component-of-thirty-two-bytes--./".repeat(20);
    directory(&deep);
    file(&(deep + "bottom"), b"bottom");
    directory("odd-names");
    for name in ["!", "-", ".-", "..a", ".hidden", "with space", "tab\tand\nline", "\u{e4}\u{20ac}", "~"] {
        file(&format!("odd-names/{name}"), name.as_bytes());
    }
    directory("empty");
    directory("links");
    file("links/a", b"linked");
    for name in ["links/b", "c-link", "a-link"] {
        fs::hard_link(root.join("links/a"), root.join(name)).unwrap();
    }
    for len in [1, 60, 255, 384, 385, 447, 448, 449, 511, 512, 513, 1024, 4000, 4095] {
        symlink(&"x/".repeat(len)[..len], root.join(format!("links/to-{len}"))).unwrap();
    }
    directory("special");
    let node = |name: &str, kind, major, minor| {
        let mode = Mode::from_bits_truncate(0o640);
        mknod(&root.join("special").join(name), kind, mode, makedev(major, minor)).unwrap();
    };
    node("null", SFlag::S_IFCHR, 1, 3);
    node("large", SFlag::S_IFCHR, 4095, 1_048_575);
    node("disk", SFlag::S_IFBLK, 259, 70_000);
    node("pipe", SFlag::S_IFIFO, 0, 0);

    for (name, uid, gid, mode) in [
        ("size-1", 1000, 1000, 0o600),
        ("size-511", 70_000, 4_000_000_000, 0o4755),
        ("size-512", 0, 5, 0o2711),
        ("empty", 7, 8, 0o1777),
    ] {
        lchown(root.join(name), Some(uid), Some(gid)).unwrap();
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    lchown(root.join("links/to-60"), Some(12), Some(13)).unwrap();

    set_xattr(&root.join("size-0"), "user.empty", b"");
    set_xattr(&root.join("size-513"), "user.large", &pattern(3000));
    set_xattr(&root.join("size-513"), "user.second", b"=value\n\0with everything");
    set_xattr(&root.join("size-4096"), "security.capability", &CAPABILITY);
    set_xattr(&root.join("empty"), "user.of-a-directory", b"1");
    set_xattr(&root.join("many"), "user.of-a-large-directory", &pattern(700));
    set_xattr(&root.join("links/to-4000"), "security.of-a-link", b"2");
    for number in 0..30 {
        set_xattr(&root.join("size-4097"), &format!("user.number-{number}"), &pattern(number));
    }

    for (name, seconds, nanoseconds) in [
        ("size-1", 0, 0),
        ("size-511", 1, 999_999_999),
        ("links/to-60", 1_234_567_890, 123_456_789),
        ("special/null", 4_102_444_800, 1),
        ("special", 981_173_106, 500_000_000),
        ("many", 981_173_106, 7),
    ] {
        set_time(&root.join(name), seconds, nanoseconds);
    }
    // The root's attributes come from the layer's place in the file system, not from its tar.
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
    set_time(root, 0, 0);
}

fn gnu_tar(root: &Path, archive: &Path, options: &[&str]) {
    let mut command = Command::new("tar");
    command.args(["--format=pax", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--sort=name"]).args(options);
    run(command.arg("-cf").arg(archive).arg("-C").arg(root).arg("."));
}

fn gnu_extract(archive: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let mut command = Command::new("tar");
    command.args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner", "-p"]);
    run(command.arg("-xf").arg(archive).arg("-C").arg(to));
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).unwrap();
    lchown(to, Some(0), Some(0)).unwrap();
    set_time(to, 0, 0);
}

/// Mounts the image of `archive` and compares it with what GNU tar extracts.
fn assert_same(folder: &Path, archive: &Path) -> ImageSummary {
    let extracted = folder.join("extracted");
    gnu_extract(archive, &extracted);
    let image = Image::of(archive, &[]);
    image.check();
    let mounted = image.mount(&folder.join("mounted"));
    let result = compare(&extracted, &mounted.0).unwrap();
    assert!(result.differences.is_empty(), "{} paths\n{}", result.paths, result.differences.join("\n"));
    assert_directory_links(&extracted, &mounted.0);
    println!("{} paths, {} bytes, image {} bytes", result.paths, result.bytes, image.summary.size);
    image.summary
}

/// Link counts of directories, where the file system of `left` counts them.
fn assert_directory_links(left: &Path, right: &Path) {
    for entry in fs::read_dir(left).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            let other = right.join(entry.file_name());
            let (a, b) = (entry.metadata().unwrap().nlink(), fs::metadata(&other).unwrap().nlink());
            assert!(a == b || a == 1, "{}: {a} and {b}", other.display());
            assert_directory_links(&entry.path(), &other);
        }
    }
}

#[test]
fn every_kind_of_file_is_as_gnu_tar_extracts_it() {
    if skipped() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let root = folder.path().join("root");
    fs::create_dir(&root).unwrap();
    build(&root);
    let archive = folder.path().join("layer.tar");
    gnu_tar(&root, &archive, &[]);
    let summary = assert_same(folder.path(), &archive);
    assert!(summary.inodes > 10_000);
}

#[test]
fn a_distribution_folder_is_as_gnu_tar_extracts_it() {
    if skipped() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let source = ["/usr/share/perl", "/usr/lib/python3", "/usr/include", "/etc"];
    let source = source.map(Path::new).into_iter().find(|path| path.is_dir()).unwrap();
    for (number, format) in ["--format=gnu", "--format=pax", "--format=ustar"].into_iter().enumerate() {
        let inside = folder.path().join(number.to_string());
        fs::create_dir(&inside).unwrap();
        let archive = inside.join("layer.tar");
        let mut command = Command::new("tar");
        command.arg(format).arg("-cf").arg(&archive).arg("-C").arg(source).arg(".");
        run(&mut command);
        assert_same(&inside, &archive);
    }
}

/// Path, type, contents or link target, PAX records.
type HandMade<'a> = (&'a str, tar::EntryType, &'a [u8], &'a [(&'a str, &'a [u8])]);

/// Entries that no program makes from a folder, in the order given.
fn hand_made(archive: &Path, entries: &[HandMade<'_>]) {
    let mut builder = tar::Builder::new(File::create(archive).unwrap());
    for (path, kind, contents, records) in entries {
        if !records.is_empty() {
            builder.append_pax_extensions(records.iter().copied()).unwrap();
        }
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(*kind);
        header.set_mode(if kind.is_dir() { 0o750 } else { 0o640 });
        header.set_mtime(1_000_000_000);
        header.set_path(path).unwrap();
        if kind.is_symlink() || kind.is_hard_link() {
            header.set_link_name(std::str::from_utf8(contents).unwrap()).unwrap();
            header.set_cksum();
            builder.append(&header, &[][..]).unwrap();
        } else {
            header.set_size(contents.len() as u64);
            header.set_cksum();
            builder.append(&header, *contents).unwrap();
        }
    }
    builder.into_inner().unwrap().sync_all().unwrap();
}

/// A POSIX ACL with one named user, as `system.posix_acl_access` holds it.
fn acl() -> Vec<u8> {
    let entry = |tag: u16, permission: u16, id: u32| {
        [&tag.to_le_bytes()[..], &permission.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let none = u32::MAX;
    [
        2_u32.to_le_bytes().to_vec(),
        entry(1, 6, none),
        entry(2, 7, 1234),
        entry(4, 4, none),
        entry(16, 4, none),
        entry(32, 0, none),
    ]
    .concat()
}

#[test]
fn layers_stack_under_overlayfs() {
    use tar::EntryType as T;
    if skipped() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let acl = acl();
    hand_made(
        &at("bottom.tar"),
        &[
            ("tmp/", T::Directory, b"", &[("SCHILY.xattr.user.kept", b"yes")]),
            ("gone", T::Regular, b"gone", &[]),
            ("gone-dir/file", T::Regular, b"gone", &[]),
            ("opaque/below", T::Regular, b"hidden", &[]),
            ("merged/below", T::Regular, b"below", &[]),
            (".wh.nothing", T::Regular, b"", &[]),
            ("opaque/.wh..wh..opq", T::Regular, b"", &[]),
        ],
    );
    hand_made(
        &at("upper.tar"),
        &[
            ("tmp/new", T::Regular, b"new", &[("SCHILY.xattr.system.posix_acl_access", &acl)]),
            (".wh.gone", T::Regular, b"", &[]),
            (".wh.gone-dir", T::Regular, b"", &[]),
            ("opaque/", T::Directory, b"", &[("SCHILY.xattr.trusted.overlay.redirect", b"/tmp")]),
            ("opaque/.wh..wh..opq", T::Regular, b"", &[]),
            ("opaque/above", T::Regular, b"above", &[]),
            ("merged/above", T::Regular, b"above", &[("SCHILY.xattr.trusted.overlay.metacopy", b"")]),
        ],
    );
    let lower_tree = scan(&at("bottom.tar")).unwrap();
    let bottom = Image::of(&at("bottom.tar"), &[]);
    let upper = Image::of(&at("upper.tar"), &[&lower_tree]);
    bottom.check();
    upper.check();
    let lower_mount = bottom.mount(&at("lower"));
    let upper_mount = upper.mount(&at("upper"));

    assert!(!lower_mount.0.join("nothing").exists());
    let whiteout = fs::symlink_metadata(upper_mount.0.join("gone")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    let overlay_mark = |mount: &Mounted, path: &str| {
        let mut value = [0; 16];
        let path = CString::new(mount.0.join(path).as_os_str().as_bytes()).unwrap();
        let result = rustix::fs::lgetxattr(path.as_c_str(), "trusted.overlay.opaque", &mut value[..]);
        result.ok().map(|len| value[..len].to_vec())
    };
    assert_eq!(overlay_mark(&upper_mount, "opaque"), Some(b"y".to_vec()));
    assert_eq!(overlay_mark(&upper_mount, "merged"), None);
    assert_eq!(overlay_mark(&lower_mount, "opaque"), None);
    // The tar's own trusted attributes are not taken.
    let mut list = [0; 4096];
    let len = rustix::fs::llistxattr(upper_mount.0.join("opaque"), &mut list[..]).unwrap();
    assert_eq!(&list[..len], b"trusted.overlay.opaque\0");

    let merged = at("merged-view");
    for name in ["merged-view", "rw", "work"] {
        fs::create_dir(at(name)).unwrap();
    }
    let options = format!(
        "lowerdir={}:{},upperdir={},workdir={}",
        upper_mount.0.display(),
        lower_mount.0.display(),
        at("rw").display(),
        at("work").display()
    );
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(&options[..])).unwrap();
    let overlay = Mounted(merged);
    let read = |path: &str| fs::read_to_string(overlay.0.join(path)).ok();
    assert_eq!(read("gone"), None);
    assert!(!overlay.0.join("gone-dir").exists());
    assert_eq!(read("opaque/below"), None);
    assert_eq!(read("opaque/above").as_deref(), Some("above"));
    assert_eq!(read("merged/below").as_deref(), Some("below"));
    assert_eq!(read("merged/above").as_deref(), Some("above"));
    // The directory that the upper tar left out looks as the lower layer has it.
    let tmp = fs::metadata(overlay.0.join("tmp")).unwrap();
    assert_eq!((tmp.mode() & 0o7777, tmp.mtime()), (0o750, 1_000_000_000));
    assert_eq!(xattr_names(&overlay.0.join("tmp")).unwrap(), ["user.kept"]);
    let new = overlay.0.join("tmp/new");
    assert_eq!(xattr(&new, "system.posix_acl_access".as_ref()).unwrap(), acl);
    // Copying up from the image works.
    OpenOptions::new().append(true).open(&new).unwrap().write_all(b"er").unwrap();
    assert_eq!(read("tmp/new").as_deref(), Some("newer"));
    drop(overlay);
    drop(upper_mount);
    drop(lower_mount);
}

#[test]
fn extremes_mount() {
    if skipped() {
        return;
    }
    let folder = TempDir::new().unwrap();
    // The empty layer: two blocks of zeros, or nothing at all.
    for (name, bytes) in [("zeros.tar", &[0; 1024][..]), ("nothing.tar", &[][..])] {
        let archive = folder.path().join(name);
        fs::write(&archive, bytes).unwrap();
        let image = Image::of(&archive, &[]);
        image.check();
        let mounted = image.mount(&folder.path().join("empty"));
        assert_eq!(fs::read_dir(&mounted.0).unwrap().count(), 0);
    }
    // A time before the epoch, which a tree may have although the scanner makes none, and attributes of 256 KiB.
    let archive = folder.path().join("file.tar");
    let large = vec![b'v'; 65_535];
    let records: Vec<(String, &[u8])> = (0..3).map(|n| (format!("SCHILY.xattr.user.{n}"), &large[..])).collect();
    let records: Vec<(&str, &[u8])> = records.iter().map(|(name, value)| (&name[..], *value)).collect();
    hand_made(&archive, &[("file", tar::EntryType::Regular, b"contents", &records)]);
    let mut entries = scan(&archive).unwrap().into_entries();
    let mtime = layer::entry::Mtime { secs: -86_400, nanos: 250_000_000 };
    entries.iter_mut().for_each(|entry| entry.mtime = mtime);
    let device_size = fs::metadata(&archive).unwrap().len();
    let tree = Tree::validate(entries, device_size).unwrap();
    let options = ImageOptions { device_size, bottom: true, uuid: [1; 16] };
    let path = archive.with_extension("erofs");
    let summary = write_image(&tree, &options, &Stack::new(&[]), &mut File::create(&path).unwrap()).unwrap();
    let image = Image { path, device: archive, summary };
    image.check();
    let mounted = image.mount(&folder.path().join("extreme"));
    let file = mounted.0.join("file");
    let modified = fs::metadata(&file).unwrap().modified().unwrap();
    assert_eq!(modified, UNIX_EPOCH - Duration::from_millis(86_399_750));
    assert_eq!(fs::read(&file).unwrap(), b"contents");
    assert_eq!(xattr(&file, "user.2".as_ref()).unwrap(), large);
}
