//! A root file system that is put together from packages, step by step, and written as layers.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow, bail};
use sha2::{Digest as _, Sha256};

use super::{Image, Layer, LayerWriter, hex_of};
use crate::process::run;

/// Modification time of everything that no package gives one to (2025-01-01).
pub(super) const TIME: u64 = 1_735_689_600;

/// Told the steps.
pub(super) type Say<'a> = &'a (dyn Fn(&str) + Sync);

/// Gives the image `name` from `cache`, built now if it is not there. `inputs` name all that it is made of; `layers` writes its
/// layers into the given folder.
pub(super) fn cached(
    cache: &Path,
    name: &str,
    inputs: &[&str],
    say: Say<'_>,
    layers: impl FnOnce(&mut Rootfs<'_>, &Path) -> Result<Vec<Layer>>,
) -> Result<Image> {
    let folder = cache.join(format!("{name}-{}", key(inputs)?));
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    // Whoever wants the same image at the same time waits for it.
    let lock = fs::File::create(cache.join(format!("{name}.lock"))).context("cannot create a lock")?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).context("cannot lock an image")?;
    if let Ok(image) = Image::open(&folder) {
        say("the image was built before");
        return Ok(image);
    }
    let unfinished = cache.join(format!("{name}-unfinished"));
    let _ = fs::remove_dir_all(&unfinished);
    fs::create_dir_all(&unfinished).with_context(|| format!("cannot create {}", unfinished.display()))?;
    let mut rootfs = Rootfs::create(unfinished.join("work"), say)?;
    let layers = layers(&mut rootfs, &unfinished.join("image"))?;
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    Image::assemble(&unfinished.join("image"), &layers, path)?;
    let _ = fs::remove_dir_all(&folder);
    fs::rename(unfinished.join("image"), &folder).context("cannot move the image into place")?;
    fs::remove_dir_all(&unfinished).context("cannot remove the build folder")?;
    Image::open(&folder)
}

/// Names the image's inputs; the distribution's packages are those of the release that this machine runs.
fn key(inputs: &[&str]) -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let mut hash = Sha256::new();
    for part in inputs.iter().copied().chain([release.as_str(), std::env::consts::ARCH]) {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    Ok(hex_of(&hash.finalize())[..16].to_owned())
}

/// The tree, and what of it is in layers already.
pub(super) struct Rootfs<'a> {
    pub(super) work: PathBuf,
    pub(super) root: PathBuf,
    say: Say<'a>,
    wanted: Vec<&'static str>,
    installed: BTreeSet<String>,
    seen: Seen,
}

/// What tells a changed file from one that a lower layer has.
type Seen = HashMap<PathBuf, (u64, i64, i64)>;

/// Paths of a layer that is to be written, with its name.
pub(super) type Step = (&'static str, Vec<PathBuf>);

impl<'a> Rootfs<'a> {
    fn create(work: PathBuf, say: Say<'a>) -> Result<Self> {
        let root = work.join("root");
        // Debian's and Ubuntu's packages expect the merged /usr.
        for folder in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "app", "etc"] {
            fs::create_dir_all(root.join(folder))?;
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name))?;
        }
        Ok(Self { work, root, say, wanted: Vec::new(), installed: BTreeSet::new(), seen: Seen::new() })
    }

    /// Installs `packages` and what they need beyond what is installed, by unpacking the packages: no maintainer scripts.
    pub(super) fn install_packages(&mut self, packages: &[&'static str]) -> Result<()> {
        self.wanted.extend_from_slice(packages);
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
        if run(apt().args(["--download-only", "install"]).args(&self.wanted)).is_err() {
            run(Command::new("apt-get").args(["-qq", "update"])).context("cannot refresh the package lists")?;
            run(apt().args(["--download-only", "install"]).args(&self.wanted)).context("cannot download packages")?;
        }
        let mut packages: Vec<_> = fs::read_dir(&archives)?.flatten().map(|entry| entry.path()).collect();
        packages.sort();
        for package in packages.iter().filter(|path| path.extension().is_some_and(|extension| extension == "deb")) {
            if !self.installed.insert(package.display().to_string()) {
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

    /// The files that maintainer scripts would have made.
    pub(super) fn write_accounts(&self) -> Result<()> {
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
    pub(super) fn python(&self) -> Result<String> {
        let link = fs::read_link(self.root.join("usr/bin/python3")).context("the image has no python3")?;
        let name = link.file_name().and_then(|name| name.to_str()).context("python3 is an odd link")?;
        Ok(name.to_owned())
    }

    /// Installs what `requirements` pins, for the Python of the image.
    pub(super) fn install_python_packages(&self, requirements: &str) -> Result<()> {
        let python = self.python()?;
        let version = python.trim_start_matches("python").to_owned();
        let target = format!("/usr/local/lib/{python}/dist-packages");
        let list = self.work.join("requirements.txt");
        fs::write(&list, requirements)?;
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--only-binary=:all:"]);
        pip.args(["--implementation", "cp", "--python-version", &version, "--platform", "any"]);
        for glibc in ["1", "2014", "_2_17", "_2_27", "_2_28"] {
            pip.arg("--platform").arg(format!("manylinux{glibc}_{}", std::env::consts::ARCH));
        }
        pip.arg("--target").arg(self.root.join(target.trim_start_matches('/'))).arg("--requirement").arg(&list);
        pip.env("PIP_ROOT_USER_ACTION", "ignore").env("PIP_DISABLE_PIP_VERSION_CHECK", "1");
        run(&mut pip).context("cannot install the Python packages")?;
        set_times(&self.root.join("usr/local/lib"))?;
        self.compile_python(&target)
    }

    /// Byte code beside the sources, as package installation leaves it: it names the sources' times.
    pub(super) fn compile_python(&self, folder: &str) -> Result<()> {
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

    /// Paths that are new or changed since the last call, each directory before what is in it, with the directories above.
    pub(super) fn changed(&mut self) -> Result<Vec<PathBuf>> {
        let mut changed = BTreeSet::new();
        for path in find(&self.root)? {
            let metadata = fs::symlink_metadata(&path)?;
            let state = (metadata.ino(), metadata.ctime(), metadata.ctime_nsec());
            let relative = path.strip_prefix(&self.root)?.to_owned();
            if relative.as_os_str().is_empty() || self.seen.insert(relative.clone(), state) == Some(state) {
                continue;
            }
            let above = relative.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty());
            changed.extend(above.map(Path::to_owned));
            changed.insert(relative);
        }
        Ok(changed.into_iter().collect())
    }

    /// Writes a layer for each step, compressing as many at once as there are processors.
    pub(super) fn write_layers(&self, image: &Path, steps: &[Step]) -> Result<Vec<Layer>> {
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
        Ok(done.into_iter().map(|(_, layer)| layer).collect())
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

/// Gives `folder` and everything below it [`TIME`].
pub(super) fn set_times(folder: &Path) -> Result<()> {
    find(folder)?.iter().try_for_each(|path| set_time(path))
}

fn set_time(path: &Path) -> Result<()> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
    let metadata = fs::symlink_metadata(path)?;
    if (metadata.mtime(), metadata.mtime_nsec()) == (TIME as i64, 0) {
        // Set again, it would look changed to the next layer.
        return Ok(());
    }
    let time = Timespec { tv_sec: TIME as i64, tv_nsec: 0 };
    utimensat(CWD, path, &Timestamps { last_access: time, last_modification: time }, AtFlags::SYMLINK_NOFOLLOW)
        .with_context(|| format!("cannot set the time of {}", path.display()))
}
