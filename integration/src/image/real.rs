//! Images as people have them: a Debian root file system, a static busybox, a static Go program, Node and a JDK. Made of the
//! distribution's packages, and of what the Go compiler makes.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use sha2::{Digest as _, Sha256};

use super::layer::Attributes;
use super::rootfs::{self, Rootfs, Say, TIME};
use super::{Image, Layer, LayerWriter, hex_of};
use crate::process::run;
use crate::tools;

/// Changes whenever the steps below do, so that a cached image of older steps is not used.
const RECIPE: u32 = 1;

/// Debian's essential packages, its package manager, and a program with a capability.
const DEBIAN: [&str; 28] = [
    "apt",
    "base-files",
    "base-passwd",
    "bash",
    "bsdutils",
    "coreutils",
    "dash",
    "debconf",
    "debianutils",
    "diffutils",
    "dpkg",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "init-system-helpers",
    "iputils-ping",
    "libc-bin",
    "login",
    "mount",
    "ncurses-base",
    "ncurses-bin",
    "passwd",
    "perl-base",
    "sed",
    "sysvinit-utils",
    "tar",
    "util-linux",
];

/// What images of one program stand on.
const SLIM: [&str; 6] = ["base-files", "base-passwd", "bash", "coreutils", "dash", "libc-bin"];

/// cap_net_raw=ep, version 2 of the kernel's struct vfs_cap_data: what the maintainer script of ping's package sets.
const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Compiled and run in one go by the JDK.
const JAVA_SOURCE: &[u8] = b"class Answer {
    public static void main(String[] words) {
        System.out.println(\"java \" + Runtime.version() + \" says \" + words.length * 42);
    }
}
";

/// One of the five.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Real {
    /// A root file system in one layer, by GNU tar: names begin with `./`, times have nanoseconds.
    Debian,
    /// Some three hundred names of one static program.
    Busybox,
    /// A program and a file far down, and none of the directories above it.
    Go,
    /// Node.js on a small Debian.
    Node,
    /// A Java compiler and runtime on a small Debian, and a source file.
    Jdk,
}

impl Real {
    /// Those that are made and compared within a minute.
    pub const SMALL: [Self; 3] = [Self::Debian, Self::Busybox, Self::Go];

    /// The others.
    pub const LARGE: [Self; 2] = [Self::Node, Self::Jdk];

    /// Part of its repository's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Debian => "debian",
            Self::Busybox => "busybox",
            Self::Go => "go",
            Self::Node => "node",
            Self::Jdk => "jdk",
        }
    }

    /// What a container of it runs.
    pub const fn program(self) -> &'static [&'static str] {
        match self {
            Self::Debian => &["bash", "-c", "dpkg --version; perl -e 'print 6 * 7, \"\\n\"'"],
            Self::Busybox => &["sh", "-c", "busybox | head -n 1; seq 42 | tail -n 1"],
            Self::Go => &["/hello"],
            Self::Node => &[
                "node",
                "-e",
                "const zlib = require('zlib'); console.log(process.version, zlib.gunzipSync(zlib.gzipSync('42')).toString())",
            ],
            Self::Jdk => &["/usr/lib/jvm/default-java/bin/java", "/app/Answer.java", "one"],
        }
    }

    /// What the program's output holds.
    pub const fn prints(self) -> &'static str {
        match self {
            Self::Go => "hello",
            Self::Debian | Self::Busybox | Self::Node | Self::Jdk => "42",
        }
    }

    /// It has at least so many paths.
    pub const fn paths(self) -> u64 {
        match self {
            Self::Go => 6,
            Self::Busybox => 200,
            Self::Debian | Self::Node | Self::Jdk => 1500,
        }
    }

    /// Gives the image from `cache`, built now if it is not there. `say` is told the steps.
    pub fn build(self, cache: &Path, say: Say<'_>) -> Result<Image> {
        let steps = format!("{DEBIAN:?} {SLIM:?} {NET_RAW:?} {RECIPE}");
        let mut inputs = vec![steps];
        if self == Self::Go {
            inputs.push(hex_of(&Sha256::digest(hello(say)?)));
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        rootfs::cached(cache, self.name(), &inputs, say, |rootfs, image| match self {
            Self::Debian => debian(rootfs, image),
            Self::Busybox => busybox(rootfs, image),
            Self::Go => go(image, say),
            Self::Node => on_slim(rootfs, image, &["nodejs"]),
            Self::Jdk => {
                let mut layers = on_slim(rootfs, image, &["default-jdk-headless"])?;
                let mut source = LayerWriter::create(image, "source")?;
                source.file("app/Answer.java", Attributes { mtime: TIME, ..Attributes::root(0o644) }, JAVA_SOURCE)?;
                layers.push(source.finish()?);
                Ok(layers)
            }
        })
    }
}

fn debian(rootfs: &mut Rootfs<'_>, image: &Path) -> Result<Vec<Layer>> {
    rootfs.install_packages(&DEBIAN)?;
    rootfs.write_accounts()?;
    let ping = rootfs.root.join("usr/bin/ping");
    rustix::fs::setxattr(&ping, "security.capability", &NET_RAW, rustix::fs::XattrFlags::empty())
        .with_context(|| format!("cannot give {} a capability", ping.display()))?;
    let mut layer = LayerWriter::create(image, "debian")?;
    layer.tree(&rootfs.root)?;
    Ok(vec![layer.finish()?])
}

fn busybox(rootfs: &mut Rootfs<'_>, image: &Path) -> Result<Vec<Layer>> {
    rootfs.install_packages(&["busybox-static"])?;
    // Hard links, as the well-known image of this name has them.
    run(Command::new("chroot").arg(&rootfs.root).args(["/bin/busybox", "--install", "/bin"]))?;
    let all = [("busybox", rootfs.changed()?)];
    rootfs.write_layers(image, &all)
}

fn go(image: &Path, say: Say<'_>) -> Result<Vec<Layer>> {
    let attributes = |mode| Attributes { mtime: TIME, ..Attributes::root(mode) };
    let mut certificates = LayerWriter::create(image, "certificates")?;
    let authorities = tools::authorities(say)?;
    certificates.file("etc/ssl/certs/ca-certificates.crt", attributes(0o644), authorities.as_bytes())?;
    let mut program = LayerWriter::create(image, "program")?;
    program.file("hello", attributes(0o755), &hello(say)?)?;
    Ok(vec![certificates.finish()?, program.finish()?])
}

/// The program of the Go image. A build that is up to date is skipped.
fn hello(say: Say<'_>) -> Result<Vec<u8>> {
    let program = tools::build_go("hello", say)?.join("hello");
    fs::read(&program).with_context(|| format!("cannot read {}", program.display()))
}

/// One layer of a small Debian and one of `packages` with all that they need.
fn on_slim(rootfs: &mut Rootfs<'_>, image: &Path, packages: &[&'static str]) -> Result<Vec<Layer>> {
    rootfs.install_packages(&SLIM)?;
    rootfs.write_accounts()?;
    let mut steps = vec![("slim", rootfs.changed()?)];
    rootfs.install_packages(packages)?;
    steps.push(("packages", rootfs.changed()?));
    rootfs.write_layers(image, &steps)
}
