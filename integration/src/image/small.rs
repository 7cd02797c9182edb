//! The test image: made in seconds, offline, with everything odd that a layer may hold.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use tar::EntryType;

use super::{Family, Form, Image, LayerWriter, Packing, layer::Attributes};

/// A file of the image that is large enough to be fetched in parts.
pub const LARGE_FILE: &str = "/srv/large";

/// Bytes of [`LARGE_FILE`].
pub const LARGE_FILE_SIZE: u64 = 24 << 20;

/// Small files below `/srv/many`.
pub const MANY_FILES: usize = 10_000;

/// `PATH` of its containers.
pub const PATH: &str = "/usr/local/bin:/bin";

/// How much of it there is.
#[derive(Clone, Copy, Debug)]
pub struct Amount {
    /// Small files below `/srv/many`, at least 8.
    pub files: usize,
    /// Bytes of [`LARGE_FILE`].
    pub large_file: u64,
}

impl Amount {
    /// The whole.
    pub const FULL: Self = Self { files: MANY_FILES, large_file: LARGE_FILE_SIZE };

    /// For tests that pull it many times.
    pub const LITTLE: Self = Self { files: 500, large_file: 6 << 20 };
}

/// Builds the image into `folder`, or opens it when it is there already.
pub fn build(folder: &Path, busybox: &Path) -> Result<Image> {
    build_amount(folder, busybox, Amount::FULL)
}

/// The same with as much in it as is asked for.
pub fn build_amount(folder: &Path, busybox: &Path, amount: Amount) -> Result<Image> {
    if let Ok(image) = Image::open(folder) {
        return Ok(image);
    }
    let layers = [
        base(folder, busybox)?,
        content(folder, amount, Packing::Gzip)?,
        changes(folder, Packing::Gzip)?,
        odd(folder, Packing::Gzip)?,
    ];
    Image::assemble(folder, &layers, PATH)
}

/// A further image on the same lower layers is not the same image: one more layer with `text` in `/version`.
pub fn build_variant(folder: &Path, busybox: &Path, amount: Amount, text: &str) -> Result<Image> {
    let mut layer = LayerWriter::create(folder, "variant")?;
    layer.file("version", Attributes::root(0o644), text.as_bytes())?;
    let layers = [base(folder, busybox)?, content(folder, amount, Packing::Gzip)?, layer.finish()?];
    Image::assemble(folder, &layers, PATH)
}

/// The image of [`build`] with Docker's media types behind an index of two platforms, each layer packed in another way and an
/// empty one among them.
pub fn build_mixed(folder: &Path, busybox: &Path) -> Result<Image> {
    let layers = [
        base(folder, busybox)?,
        content(folder, Amount::FULL, Packing::Zstd)?,
        LayerWriter::create(folder, "empty")?.finish()?,
        changes(folder, Packing::ZstdFrames)?,
        odd(folder, Packing::Plain)?,
    ];
    let form = Form { family: Family::Docker, path_variable: PATH, command: &["sh"] };
    let elsewhere = Image::assemble_as(folder, &layers[..1], form)?;
    Image::assemble_as(folder, &layers, form)?.behind_index(folder, Family::Docker, &elsewhere)
}

/// An image whose container sleeps: it keeps the namespaces of a pod.
pub fn build_pause(folder: &Path, busybox: &Path) -> Result<Image> {
    let command = &["/bin/sleep", "2147483647"];
    let form = Form { family: Family::Oci, path_variable: PATH, command };
    Image::assemble_as(folder, &[base(folder, busybox)?], form)
}

/// A root file system of busybox alone.
pub fn base(folder: &Path, busybox: &Path) -> Result<super::Layer> {
    let mut layer = LayerWriter::create(folder, "base")?;
    let program = fs::read(busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    for directory in ["bin", "etc", "dev", "proc", "sys", "run", "srv", "var", "var/log", "root"] {
        layer.directory(directory, Attributes::root(if directory == "root" { 0o700 } else { 0o755 }))?;
    }
    layer.directory("tmp", Attributes::root(0o1777))?;
    layer.file("bin/busybox", Attributes::root(0o755), &program)?;
    for applet in [
        "sh",
        "ls",
        "cat",
        "find",
        "stat",
        "sleep",
        "echo",
        "sha256sum",
        "dd",
        "wc",
        "tar",
        "rm",
        "mkdir",
        "true",
        "od",
        "touch",
    ] {
        layer.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    layer.file(
        "etc/passwd",
        Attributes::root(0o644),
        b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n",
    )?;
    layer.file("etc/group", Attributes::root(0o644), b"root:x:0:\nuser:x:1000:\n")?;
    layer.file("etc/removed", Attributes::root(0o644), b"a later layer removes this\n")?;
    layer.file("etc/replaced", Attributes::root(0o644), b"before\n")?;
    // A layer below everything may still carry marks for what is not there.
    layer.whiteout("etc/never-was")?;
    layer.finish()
}

/// Bytes to be lazy about, and many small files.
fn content(folder: &Path, amount: Amount, packing: Packing) -> Result<super::Layer> {
    let mut layer = LayerWriter::create_packed(folder, "content", packing)?;
    layer.directory("srv", Attributes::root(0o755))?;
    layer.file(&LARGE_FILE[1..], Attributes::root(0o644), &noise(1, amount.large_file as usize))?;
    layer.file("srv/zeros", Attributes::root(0o644), &vec![0; 5 << 20])?;
    layer.file("srv/empty", Attributes::root(0o644), &[])?;
    layer.directory("srv/many", Attributes::root(0o755))?;
    for number in 0..amount.files {
        if number % 250 == 0 {
            layer.directory(&format!("srv/many/{:03}", number / 250), Attributes::root(0o755))?;
        }
        let attributes = Attributes { mtime: 1_600_000_000 + number as u64, ..Attributes::root(0o640) };
        let text = noise(number as u64 + 2, 40 + number % 700);
        layer.file(&format!("srv/many/{:03}/{number:05}", number / 250), attributes, &text)?;
    }
    for directory in ["srv/opaque", "srv/opaque/inner", "srv/gone", "srv/becomes-file"] {
        layer.directory(directory, Attributes::root(0o755))?;
        layer.file(&format!("{directory}/below"), Attributes::root(0o644), b"below\n")?;
    }
    layer.file("srv/becomes-directory", Attributes::root(0o644), b"still a file\n")?;
    // Odd attributes that an implicit directory of a later layer must inherit.
    let attributes = Attributes { mode: 0o2750, uid: 1000, gid: 1000, mtime: 1_234_567_890 };
    layer.records(&[("SCHILY.xattr.user.kept", b"yes")])?;
    layer.append(EntryType::Directory, b"srv/inherits", attributes, None, None, &[])?;
    layer.finish()
}

/// What a second build step does to the files below it.
fn changes(folder: &Path, packing: Packing) -> Result<super::Layer> {
    let mut layer = LayerWriter::create_packed(folder, "changes", packing)?;
    layer.whiteout("etc/removed")?;
    layer.file("etc/replaced", Attributes { mtime: 1_700_000_001, ..Attributes::root(0o600) }, b"after\n")?;
    layer.whiteout("srv/gone")?;
    layer.directory("srv/opaque", Attributes::root(0o711))?;
    layer.opaque("srv/opaque")?;
    layer.file("srv/opaque/above", Attributes::root(0o644), b"above\n")?;
    layer.directory("srv/becomes-directory", Attributes::root(0o755))?;
    layer.file("srv/becomes-directory/inside", Attributes::root(0o644), b"inside\n")?;
    layer.file("srv/becomes-file", Attributes::root(0o644), b"a file now\n")?;
    // Directories that this layer does not mention keep what the layers below gave them.
    layer.file("srv/inherits/new", Attributes::root(0o644), b"new\n")?;
    layer.file("tmp/new", Attributes::root(0o644), b"/tmp must stay world-writable and sticky\n")?;
    layer.file("srv/nowhere/before/file", Attributes::root(0o644), b"directories that nobody mentions\n")?;
    layer.whiteout("srv/many/000/00007")?;
    layer.finish()
}

/// Every sort of file, owner, mode, time and name.
fn odd(folder: &Path, packing: Packing) -> Result<super::Layer> {
    let mut layer = LayerWriter::create_packed(folder, "odd", packing)?;
    layer.directory("odd", Attributes { uid: 1234, gid: 65_534, ..Attributes::root(0o1751) })?;
    layer.file("odd/setuid", Attributes::root(0o4755), b"setuid\n")?;
    layer.file("odd/setgid", Attributes { gid: 50, ..Attributes::root(0o2755) }, b"setgid\n")?;
    layer.file("odd/no-rights", Attributes::root(0), b"secret\n")?;
    layer.file(
        "odd/large-owner",
        Attributes { uid: 4_000_000_000, gid: 3_000_000_000, ..Attributes::root(0o644) },
        b"owner\n",
    )?;
    layer.node(EntryType::Char, "odd/null", Attributes::root(0o666), (1, 3))?;
    layer.node(EntryType::Block, "odd/disk", Attributes::root(0o660), (259, 1_000))?;
    layer.node(EntryType::Fifo, "odd/pipe", Attributes::root(0o600), (0, 0))?;
    layer.file("odd/original", Attributes { mtime: 42, ..Attributes::root(0o644) }, b"one file, three names\n")?;
    layer.hard_link("odd/second-name", "odd/original")?;
    layer.directory("odd/elsewhere", Attributes::root(0o755))?;
    layer.hard_link("odd/elsewhere/third-name", "odd/original")?;
    layer.symlink("odd/dangling", "/nowhere/at/all")?;
    layer.symlink("odd/up", "../../etc/passwd")?;
    layer.symlink("odd/long-target", &"x/".repeat(200))?;
    for name in [
        &b"odd/with space"[..],
        b"odd/line\nbreak",
        b"odd/\xff\xfe not UTF-8",
        "odd/\u{e4}\u{f6}\u{fc}".as_bytes(),
        b"odd/trailing.",
    ] {
        layer.append(EntryType::Regular, name, Attributes::root(0o644), None, None, name)?;
    }
    let longest = "n".repeat(255);
    layer.file(&format!("odd/{longest}"), Attributes::root(0o644), b"255\n")?;
    let mut deep = "odd/deep".to_owned();
    layer.directory(&deep, Attributes::root(0o755))?;
    for _ in 0..12 {
        deep = format!("{deep}/{}", "d".repeat(60));
        layer.directory(&deep, Attributes::root(0o755))?;
    }
    layer.file(&format!("{deep}/bottom"), Attributes::root(0o644), b"bottom\n")?;
    layer.records(&[("mtime", b"1600000000.123456789")])?;
    layer.file("odd/nanoseconds", Attributes::root(0o644), b"time\n")?;
    layer.file("odd/epoch", Attributes { mtime: 0, ..Attributes::root(0o644) }, b"1970\n")?;
    layer.file("odd/future", Attributes { mtime: 4_102_444_800, ..Attributes::root(0o644) }, b"2100\n")?;
    layer.records(&[("SCHILY.xattr.user.plain", b"value"), ("SCHILY.xattr.user.binary", &[0, 1, 2, 255, b'\n', 0])])?;
    layer.file("odd/xattrs", Attributes::root(0o644), b"xattrs\n")?;
    // cap_net_raw=ep, version 2 of the kernel's struct vfs_cap_data.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    layer.records(&[("SCHILY.xattr.security.capability", &capability)])?;
    layer.file("odd/capability", Attributes::root(0o755), b"capability\n")?;
    // Sizes around the units of the device.
    for size in [1, 511, 512, 513, 4095, 4096, 4097, 131_071, 131_072, 131_073] {
        layer.file(&format!("odd/size-{size}"), Attributes::root(0o644), &noise(size as u64 + 77, size))?;
    }
    layer.finish()
}

/// Bytes that do not compress, the same for a seed on every machine (SplitMix64).
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(z ^ (z >> 31)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
