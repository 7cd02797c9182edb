//! The demonstration image: a Debian or Ubuntu root file system with a C compiler, Python with numpy, scipy and pandas, and
//! Node.js with a large tree of packages. Several layers, tens of thousands of files, about 280 MB compressed.
//!
//! PyPI and npm versions are pinned in `demo/`; the distribution's packages are what its archive has for the release that
//! this machine runs.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow, bail};
use sha2::{Digest as _, Sha256};

use super::{Image, Layer, LayerWriter, hex_of, layer::Attributes};
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

/// What the demonstration runs: loads large shared libraries and some hundred Python files, and computes a little.
pub const PROGRAM: [&str; 3] = [
    "python3",
    "-c",
    "import numpy, scipy.linalg, pandas; \
     a = numpy.arange(9.0).reshape(3, 3) + numpy.eye(3); \
     print('numpy', numpy.__version__, 'scipy', scipy.__version__, 'pandas', pandas.__version__, \
     'det', round(float(scipy.linalg.det(a)), 3), 'sum', int(pandas.Series([1, 2, 3]).sum()), flush=True)",
];

/// Modification time of everything that no package gives one to (2025-01-01).
const TIME: u64 = 1_735_689_600;

/// Gives the image from `cache`, built now if it is not there. `say` is told the steps.
pub fn build(cache: &Path, say: &(dyn Fn(&str) + Sync)) -> Result<Image> {
    let folder = cache.join(format!("demo-{}", key()?));
    if let Ok(image) = Image::open(&folder) {
        say("the image was built before");
        return Ok(image);
    }
    let unfinished = cache.join("unfinished");
    let _ = fs::remove_dir_all(&unfinished);
    fs::create_dir_all(&unfinished).with_context(|| format!("cannot create {}", unfinished.display()))?;
    let recipe = Recipe { work: unfinished.join("work"), root: unfinished.join("work/root"), say };
    let layers = recipe.layers(&unfinished.join("image"))?;
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    Image::assemble(&unfinished.join("image"), &layers, path)?;
    let _ = fs::remove_dir_all(&folder);
    fs::rename(unfinished.join("image"), &folder).context("cannot move the image into place")?;
    fs::remove_dir_all(&unfinished).context("cannot remove the build folder")?;
    Image::open(&folder)
}

/// Names the image's inputs.
fn key() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let mut hash = Sha256::new();
    for part in
        [REQUIREMENTS, PACKAGE, PACKAGE_LOCK, &release, std::env::consts::ARCH, &format!("{PACKAGES:?} {RECIPE}")]
    {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    Ok(hex_of(&hash.finalize())[..16].to_owned())
}

struct Recipe<'a> {
    work: PathBuf,
    root: PathBuf,
    say: &'a (dyn Fn(&str) + Sync),
}

/// What tells a changed file from one that a lower layer has.
type Seen = HashMap<PathBuf, (u64, i64, i64)>;

impl Recipe<'_> {
    fn layers(&self, image: &Path) -> Result<Vec<Layer>> {
        // Debian's and Ubuntu's packages expect the merged /usr.
        for folder in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "app", "etc"] {
            fs::create_dir_all(self.root.join(folder))?;
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            std::os::unix::fs::symlink(format!("usr/{name}"), self.root.join(name))?;
        }
        let (steps, downloads) = std::thread::scope(|scope| -> Result<_> {
            let node = scope.spawn(|| self.download_node_packages());
            let mut steps = Vec::new();
            let mut seen = Seen::new();
            let mut installed = BTreeSet::new();
            let mut wanted = Vec::new();
            for (name, packages) in PACKAGES {
                (self.say)(&format!("distribution packages: {name}"));
                wanted.extend_from_slice(packages);
                self.install_packages(&wanted, &mut installed)?;
                match name {
                    "base" => self.write_accounts()?,
                    "python" => self.compile_python(&format!("/usr/lib/{}", self.python()?))?,
                    _ => {}
                }
                steps.push((name, self.changed(&mut seen)?));
            }
            (self.say)("Python packages");
            self.install_python_packages()?;
            steps.push(("pypi", self.changed(&mut seen)?));
            let downloaded = node.join().map_err(|_| anyhow!("the npm step panicked"))?;
            fs::rename(self.work.join("npm/node_modules"), self.root.join("app/node_modules"))
                .context("cannot move the Node packages into the image")?;
            set_times(&self.root.join("app"))?;
            steps.push(("npm", self.changed(&mut seen)?));
            Ok((steps, downloaded))
        })?;
        downloads?;

        (self.say)("compressing the layers");
        let queue = Mutex::new(steps.iter().enumerate().rev().collect::<Vec<_>>());
        let done = Mutex::new(Vec::new());
        let workers = std::thread::available_parallelism().map_or(2, usize::from).min(steps.len());
        std::thread::scope(|scope| {
            let work = || -> Result<()> {
                loop {
                    let Some((number, (name, paths))) = queue.lock().map_err(|_| anyhow!("a writer panicked"))?.pop()
                    else {
                        return Ok(());
                    };
                    let layer = self.write_layer(image, name, paths).with_context(|| format!("layer {name}"))?;
                    done.lock().map_err(|_| anyhow!("a writer panicked"))?.push((number, layer));
                }
            };
            let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| anyhow!("a writer panicked"))?)
        })?;
        let mut done = done.into_inner().map_err(|_| anyhow!("a writer panicked"))?;
        done.sort_by_key(|(number, _)| *number);
        let mut layers: Vec<_> = done.into_iter().map(|(_, layer)| layer).collect();
        layers.push(self.last_layer(image)?);
        Ok(layers)
    }

    /// Installs `wanted` and what it needs, except for `installed`, by unpacking the packages: no maintainer scripts.
    fn install_packages(&self, wanted: &[&str], installed: &mut BTreeSet<String>) -> Result<()> {
        let archives = self.work.join("archives");
        fs::create_dir_all(archives.join("partial"))?;
        // An empty status makes apt resolve everything that is needed, as for a machine with nothing installed.
        let status = self.work.join("status");
        fs::write(&status, "")?;
        let apt = || {
            let mut apt = Command::new("apt-get");
            apt.args([
                "-y",
                "-qq",
                "--no-install-recommends",
                "-o",
                "APT::Sandbox::User=root",
                "-o",
                "Debug::NoLocking=1",
            ]);
            apt.arg("-o").arg(format!("Dir::State::status={}", status.display()));
            apt.arg("-o").arg(format!("Dir::Cache::archives={}/", archives.display()));
            apt
        };
        if run(apt().args(["--download-only", "install"]).args(wanted)).is_err() {
            run(Command::new("apt-get").args(["-qq", "update"])).context("cannot refresh the package lists")?;
            run(apt().args(["--download-only", "install"]).args(wanted)).context("cannot download packages")?;
        }
        let mut packages: Vec<_> = fs::read_dir(&archives)?.flatten().map(|entry| entry.path()).collect();
        packages.sort();
        for package in packages.iter().filter(|path| path.extension().is_some_and(|extension| extension == "deb")) {
            if !installed.insert(package.display().to_string()) {
                continue;
            }
            // Not `dpkg-deb -x`, which replaces the links of the merged /usr by directories.
            let mut unpack =
                Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package).stdout(Stdio::piped()).spawn()?;
            let tar = unpack.stdout.take().context("dpkg-deb has no output")?;
            let output = Command::new("tar")
                .args(["-x", "-p", "--numeric-owner", "--keep-directory-symlink", "-C"])
                .arg(&self.root)
                .stdin(tar)
                .output()
                .context("cannot start tar")?;
            if !output.status.success() || !unpack.wait()?.success() {
                bail!("cannot unpack {}: {}", package.display(), String::from_utf8_lossy(&output.stderr));
            }
        }
        Ok(())
    }

    fn write_accounts(&self) -> Result<()> {
        for (path, text) in [
            (
                "etc/passwd",
                "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
            ),
            ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
            ("etc/hostname", "demo\n"),
        ] {
            fs::write(self.root.join(path), text)?;
            set_time(&self.root.join(path))?;
        }
        Ok(())
    }

    /// Like `python3.13`.
    fn python(&self) -> Result<String> {
        let link = fs::read_link(self.root.join("usr/bin/python3")).context("the image has no python3")?;
        let name = link.file_name().and_then(|name| name.to_str()).context("python3 is an odd link")?;
        Ok(name.to_owned())
    }

    fn install_python_packages(&self) -> Result<()> {
        let python = self.python()?;
        let version = python.trim_start_matches("python").to_owned();
        let target = format!("/usr/local/lib/{python}/dist-packages");
        let requirements = self.work.join("requirements.txt");
        fs::write(&requirements, REQUIREMENTS)?;
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--only-binary=:all:"]);
        pip.args(["--implementation", "cp", "--python-version", &version, "--platform", "any"]);
        for glibc in ["2014", "_2_17", "_2_27", "_2_28"] {
            pip.arg("--platform").arg(format!("manylinux{glibc}_{}", std::env::consts::ARCH));
        }
        pip.arg("--target").arg(self.root.join(target.trim_start_matches('/'))).arg("--requirement").arg(&requirements);
        pip.env("PIP_ROOT_USER_ACTION", "ignore").env("PIP_DISABLE_PIP_VERSION_CHECK", "1");
        run(&mut pip).context("cannot install the Python packages")?;
        set_times(&self.root.join("usr/local/lib"))?;
        self.compile_python(&target)
    }

    /// Byte code beside the sources, as package installation leaves it: it names the sources' times.
    fn compile_python(&self, folder: &str) -> Result<()> {
        let mut chroot = Command::new("chroot");
        chroot.arg(&self.root).args(["/usr/bin/python3", "-m", "compileall", "-q", "-j", "1", folder]);
        // Some packages hold test files that are wrong on purpose; that is reported by the exit code.
        chroot.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("PYTHONHASHSEED", "0").stdin(Stdio::null());
        let output = chroot.output().context("cannot start chroot")?;
        let caches = find(&self.root.join(folder.trim_start_matches('/')))?;
        let mut compiled = 0;
        for path in &caches {
            if path.extension().is_some_and(|extension| extension == "pyc") || path.ends_with("__pycache__") {
                set_time(path)?;
                compiled += 1;
            }
        }
        if compiled == 0 {
            bail!("nothing in {folder} was compiled: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    fn download_node_packages(&self) -> Result<()> {
        (self.say)("Node packages");
        let folder = self.work.join("npm");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("package.json"), PACKAGE)?;
        fs::write(folder.join("package-lock.json"), PACKAGE_LOCK)?;
        let mut npm = Command::new("npm");
        npm.current_dir(&folder).args(["ci", "--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund"]);
        npm.arg("--loglevel=error").arg("--cache").arg(self.work.join("npm-cache"));
        run(&mut npm).context("cannot install the Node packages")?;
        Ok(())
    }

    /// Paths that are new or changed since the last call, each directory before what is in it, with the directories above.
    fn changed(&self, seen: &mut Seen) -> Result<Vec<PathBuf>> {
        let mut changed = BTreeSet::new();
        for path in find(&self.root)? {
            let metadata = fs::symlink_metadata(&path)?;
            let state = (metadata.ino(), metadata.ctime(), metadata.ctime_nsec());
            let relative = path.strip_prefix(&self.root)?.to_owned();
            if relative.as_os_str().is_empty() || seen.insert(relative.clone(), state) == Some(state) {
                continue;
            }
            let above = relative.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty());
            changed.extend(above.map(Path::to_owned));
            changed.insert(relative);
        }
        Ok(changed.into_iter().collect())
    }

    fn write_layer(&self, image: &Path, name: &str, paths: &[PathBuf]) -> Result<Layer> {
        let mut layer = LayerWriter::create(image, name)?;
        let mut names: HashMap<u64, &Path> = HashMap::new();
        for path in paths {
            let metadata = fs::symlink_metadata(self.root.join(path))?;
            let several = metadata.nlink() > 1 && !metadata.is_dir();
            let link = several.then(|| *names.entry(metadata.ino()).or_insert(path)).filter(|first| *first != path);
            layer.from_disk(&self.root, path, link)?;
        }
        layer.finish()
    }

    /// The user's own program, and a clean-up as build files do it: manual pages removed, documentation replaced.
    fn last_layer(&self, image: &Path) -> Result<Layer> {
        let mut layer = LayerWriter::create(image, "app")?;
        layer.file("app/main.py", Attributes { mtime: TIME, ..Attributes::root(0o644) }, PROGRAM[2].as_bytes())?;
        layer.whiteout("usr/share/man")?;
        layer.directory("usr/share/doc", Attributes { mtime: TIME, ..Attributes::root(0o755) })?;
        layer.opaque("usr/share/doc")?;
        let note = b"Documentation was removed to make the image smaller.\n";
        layer.file("usr/share/doc/README", Attributes { mtime: TIME, ..Attributes::root(0o644) }, note)?;
        layer.finish()
    }
}

/// A folder and everything below it, links not followed.
fn find(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![folder.to_owned()];
    let mut next = 0;
    while let Some(path) = found.get(next) {
        if fs::symlink_metadata(path)?.is_dir() {
            let entries = fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
            let inside = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()?;
            found.extend(inside);
        }
        next += 1;
    }
    Ok(found)
}

fn set_times(folder: &Path) -> Result<()> {
    find(folder)?.iter().try_for_each(|path| set_time(path))
}

fn set_time(path: &Path) -> Result<()> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
    let time = Timespec { tv_sec: TIME as i64, tv_nsec: 0 };
    utimensat(CWD, path, &Timestamps { last_access: time, last_modification: time }, AtFlags::SYMLINK_NOFOLLOW)
        .with_context(|| format!("cannot set the time of {}", path.display()))
}
