//! The demonstration image: a Debian or Ubuntu root file system with a C compiler, Python with numpy, scipy and pandas, and
//! Node.js with a large tree of packages. Several layers, tens of thousands of files, about 280 MB compressed.
//!
//! PyPI and npm versions are pinned in `demo/`; the distribution's packages are what its archive has for the release that
//! this machine runs.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow};

use super::layer::Attributes;
use super::rootfs::{self, Rootfs, Say, TIME};
use super::{Image, Layer, LayerWriter};
use crate::process::run;

/// Changes whenever the steps below do, so that a cached image of older steps is not used.
const RECIPE: u32 = 1;

const REQUIREMENTS: &str = include_str!("demo/requirements.txt");
const PACKAGE: &str = include_str!("demo/package.json");
const PACKAGE_LOCK: &str = include_str!("demo/package-lock.json");

/// Distribution packages, layer by layer; each with all that it needs and the layers before do not have.
const PACKAGES: [(&str, &[&str]); 4] = [
    (
        "base",
        &[
            "base-files",
            "base-passwd",
            "bash",
            "ca-certificates",
            "coreutils",
            "dash",
            "findutils",
            "grep",
            "gzip",
            "libc-bin",
            "less",
            "mount",
            "passwd",
            "perl-base",
            "procps",
            "sed",
            "tar",
            "util-linux",
        ],
    ),
    ("compiler", &["gcc", "libc6-dev", "make"]),
    ("python", &["python3"]),
    ("node", &["nodejs"]),
];

/// The package of [`build_with_compiler`].
const COMPILER: &str = "g++";

/// What the demonstration runs: loads large shared libraries and some hundred Python files, and computes a little.
pub const PROGRAM: [&str; 3] = [
    "python3",
    "-c",
    "import numpy, scipy.linalg, pandas; \
     a = numpy.arange(9.0).reshape(3, 3) + numpy.eye(3); \
     print('numpy', numpy.__version__, 'scipy', scipy.__version__, 'pandas', pandas.__version__, \
     'det', round(float(scipy.linalg.det(a)), 3), 'sum', int(pandas.Series([1, 2, 3]).sum()), flush=True)",
];

/// Gives the image from `cache`, built now if it is not there. `say` is told the steps.
pub fn build(cache: &Path, say: Say<'_>) -> Result<Image> {
    let steps = format!("{PACKAGES:?} {RECIPE}");
    let inputs = [REQUIREMENTS, PACKAGE, PACKAGE_LOCK, &steps];
    rootfs::cached(cache, "demo", &inputs, say, |rootfs, image| layers(rootfs, image, say))
}

/// The same with a C++ compiler in one more layer.
pub fn build_with_compiler(cache: &Path, say: Say<'_>) -> Result<Image> {
    let demo = build(cache, say)?;
    let inputs = [&*demo.manifest.digest, COMPILER];
    rootfs::cached(cache, "demo-compiler", &inputs, say, |rootfs, image| {
        for (_, packages) in PACKAGES {
            rootfs.install_packages(packages)?;
        }
        rootfs.changed()?;
        rootfs.install_packages(&[COMPILER])?;
        let compiler = [("compiler-cxx", rootfs.changed()?)];
        let mut layers = demo.link_layers(image)?;
        layers.extend(rootfs.write_layers(image, &compiler)?);
        Ok(layers)
    })
}

fn layers(rootfs: &mut Rootfs<'_>, image: &Path, say: Say<'_>) -> Result<Vec<Layer>> {
    let npm = rootfs.work.join("npm");
    let (steps, downloads) = std::thread::scope(|scope| -> Result<_> {
        let node = scope.spawn(|| download_node_packages(&npm, say));
        let mut steps = Vec::new();
        for (name, packages) in PACKAGES {
            say(&format!("distribution packages: {name}"));
            rootfs.install_packages(packages)?;
            match name {
                "base" => rootfs.write_accounts()?,
                "python" => rootfs.compile_python(&format!("/usr/lib/{}", rootfs.python()?))?,
                _ => {}
            }
            steps.push((name, rootfs.changed()?));
        }
        say("Python packages");
        rootfs.install_python_packages(REQUIREMENTS)?;
        steps.push(("pypi", rootfs.changed()?));
        let downloaded = node.join().map_err(|_| anyhow!("the npm step panicked"))?;
        fs::rename(npm.join("node_modules"), rootfs.root.join("app/node_modules"))
            .context("cannot move the Node packages into the image")?;
        rootfs::set_times(&rootfs.root.join("app"))?;
        steps.push(("npm", rootfs.changed()?));
        Ok((steps, downloaded))
    })?;
    downloads?;
    let mut layers = rootfs.write_layers(image, &steps)?;
    layers.push(last_layer(image)?);
    Ok(layers)
}

fn download_node_packages(folder: &Path, say: Say<'_>) -> Result<()> {
    say("Node packages");
    fs::create_dir_all(folder)?;
    fs::write(folder.join("package.json"), PACKAGE)?;
    fs::write(folder.join("package-lock.json"), PACKAGE_LOCK)?;
    let mut npm = Command::new("npm");
    npm.current_dir(folder).args(["ci", "--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund"]);
    npm.arg("--loglevel=error").arg("--cache").arg(folder.with_extension("cache"));
    run(&mut npm).context("cannot install the Node packages")?;
    Ok(())
}

/// The user's own program, and a clean-up as build files do it: manual pages removed, documentation replaced.
fn last_layer(image: &Path) -> Result<Layer> {
    let mut layer = LayerWriter::create(image, "app")?;
    layer.file("app/main.py", Attributes { mtime: TIME, ..Attributes::root(0o644) }, PROGRAM[2].as_bytes())?;
    layer.whiteout("usr/share/man")?;
    layer.directory("usr/share/doc", Attributes { mtime: TIME, ..Attributes::root(0o755) })?;
    layer.opaque("usr/share/doc")?;
    let note = b"Documentation was removed to make the image smaller.\n";
    layer.file("usr/share/doc/README", Attributes { mtime: TIME, ..Attributes::root(0o644) }, note)?;
    layer.finish()
}
