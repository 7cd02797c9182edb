//! Where the programs come from: nothing is installed on the machine or started by its service manager.

pub mod release;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::process::run;
pub use release::Release;

/// Packages of the distribution that are downloaded and unpacked into a private folder.
const PACKAGES: [&str; 3] = ["runc", "docker-registry", "busybox-static"];

/// Set where both daemons are built already.
pub const BUILT: &str = "DROVER_LAB_BUILT";

/// Paths of all programs.
#[derive(Clone, Debug)]
pub struct Tools {
    /// Folder with `containerd`, `ctr` and `containerd-shim-runc-v2`.
    pub containerd: PathBuf,
    /// Which containerd that is; 2.3 unless [`Tools::with_containerd`] chose another.
    pub release: Release,
    /// Folder with `runc`.
    pub runc: PathBuf,
    /// The image registry.
    pub registry: PathBuf,
    /// A static busybox, for images.
    pub busybox: PathBuf,
    /// Our snapshotter.
    pub snapshotter: PathBuf,
    /// Our seeder.
    pub seeder: PathBuf,
}

impl Tools {
    /// Finds the programs, and fetches or builds those that are missing. Must be called where there is a network, that is,
    /// outside of the lab's hosts. `progress` is told what takes long.
    pub fn prepare(progress: &dyn Fn(&str)) -> Result<Self> {
        static MADE: Mutex<Option<Tools>> = Mutex::new(None);
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tools) = &*made {
            return Ok(tools.clone());
        }
        let (folder, _lock) = lock_folder()?;
        let packages = unpack_packages(&folder, "packages", &PACKAGES, progress)?;
        let tools = Self {
            containerd: build_go(Release::DEFAULT.module(), progress)?,
            release: Release::DEFAULT,
            runc: packages.join("usr/sbin"),
            registry: packages.join("usr/bin/docker-registry"),
            busybox: packages.join("bin/busybox"),
            snapshotter: profile_folder()?.join("drover-snapshotter"),
            seeder: profile_folder()?.join("drover-seeder"),
        };
        build_drover(progress)?;
        // Debian's busybox is in /bin or, since the merge of /usr, in /usr/bin.
        let tools =
            if tools.busybox.exists() { tools } else { Self { busybox: packages.join("usr/bin/busybox"), ..tools } };
        let runc = tools.runc.join("runc");
        for program in [&runc, &tools.registry, &tools.busybox, &tools.snapshotter, &tools.seeder] {
            if !program.exists() {
                bail!("{} is missing", program.display());
            }
        }
        *made = Some(tools.clone());
        Ok(tools)
    }

    /// The same programs with another containerd, which is built or downloaded now if it is not here. `None` where the
    /// distribution, which 1.6 comes from, has another one.
    pub fn with_containerd(&self, release: Release, progress: &dyn Fn(&str)) -> Result<Option<Self>> {
        let containerd = if release == Release::V1_6 {
            let packages = unpack_packages(&target()?.join("tools"), "containerd-1.6", &["containerd"], progress)?;
            packages.join("usr/bin")
        } else {
            build_go(release.module(), progress)?
        };
        let tools = Self { containerd, release, ..self.clone() };
        let version = tools.containerd_version()?;
        Ok(version.starts_with(&format!("{}.", release.name())).then_some(tools))
    }

    /// What containerd says about itself, like `2.3.7`.
    pub fn containerd_version(&self) -> Result<String> {
        // containerd github.com/containerd/containerd/v2 2.3.7+unknown REVISION; Debian's adds `~ds1`.
        let printed = run(Command::new(self.containerd.join("containerd")).arg("--version"))?;
        let version = printed.split_whitespace().nth(2).context("containerd printed no version")?;
        let number: String =
            version.trim_start_matches('v').chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
        Ok(number)
    }
}

/// nerdctl, built now if it is not here.
pub fn nerdctl(progress: &dyn Fn(&str)) -> Result<PathBuf> {
    Ok(build_go("nerdctl", progress)?.join("nerdctl"))
}

/// crictl, built now if it is not here.
pub fn crictl(progress: &dyn Fn(&str)) -> Result<PathBuf> {
    Ok(build_go("crictl", progress)?.join("crictl"))
}

/// Folder with a runc that shifts the ids of a pod's own files, which the distribution's may not, built now if it is not here. It
/// knows no seccomp.
pub fn runc(progress: &dyn Fn(&str)) -> Result<PathBuf> {
    build_go("runc", progress)
}

/// Folder with the distribution's CNI plugins, downloaded now if they are not here.
pub fn cni_plugins(progress: &dyn Fn(&str)) -> Result<PathBuf> {
    let package = "containernetworking-plugins";
    Ok(unpack_packages(&target()?.join("tools"), package, &[package], progress)?.join("usr/lib/cni"))
}

/// Certificates of the authorities that the distribution trusts, one after the other as PEM. Its package is downloaded now if it is
/// not here.
pub fn authorities(progress: &dyn Fn(&str)) -> Result<String> {
    let package = "ca-certificates";
    let folder = unpack_packages(&target()?.join("tools"), package, &[package], progress)?;
    let folder = folder.join("usr/share/ca-certificates/mozilla");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    let texts =
        files.iter().map(|file| fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display())));
    texts.collect()
}

/// What tests of registries need, and no more: neither containerd nor Go.
#[derive(Clone, Debug)]
pub struct RegistryPrograms {
    /// The image registry.
    pub registry: PathBuf,
    /// Our seeder.
    pub seeder: PathBuf,
}

impl RegistryPrograms {
    /// Like [`Tools::prepare`].
    pub fn prepare(progress: &dyn Fn(&str)) -> Result<Self> {
        let (folder, _lock) = lock_folder()?;
        let registry = unpack_packages(&folder, "packages", &PACKAGES, progress)?.join("usr/bin/docker-registry");
        build_drover(progress)?;
        Ok(Self { registry, seeder: profile_folder()?.join("drover-seeder") })
    }
}

/// The folder for programs. Tests of one program run beside each other, and so do programs, so it is theirs alone.
fn lock_folder() -> Result<(PathBuf, File)> {
    let folder = target()?.join("tools");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let lock = folder.join("prepare.lock");
    let lock = File::create(&lock).with_context(|| format!("cannot create {}", lock.display()))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).context("cannot lock the tools")?;
    Ok((folder, lock))
}

/// The root of the source tree.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Cargo's target folder.
pub fn target() -> Result<PathBuf> {
    let profile = profile_folder()?;
    profile.parent().map(Path::to_owned).context("the program is not in a target folder")
}

/// Cargo's folder for the profile this program was built with, like `target/release`.
pub(crate) fn profile_folder() -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot find my own program")?;
    let mut folder = program.parent().context("the program has no folder")?;
    if folder.file_name().is_some_and(|name| name == "deps") {
        folder = folder.parent().context("the test program is not in a target folder")?;
    }
    Ok(folder.to_owned())
}

fn build_drover(progress: &dyn Fn(&str)) -> Result<()> {
    // The makefile's targets have built both. A plain `cargo test` has not, and a stale daemon would be tested silently.
    if std::env::var_os(BUILT).is_some() {
        return Ok(());
    }
    let profile = profile_folder()?;
    let release = profile.file_name().is_some_and(|name| name == "release");
    progress("building the snapshotter and the seeder");
    let mut cargo = Command::new("cargo");
    cargo.current_dir(workspace()).args(["build", "--quiet", "-p", "drover-snapshotter", "-p", "drover-seeder"]);
    cargo.arg("--target-dir").arg(target()?);
    if release {
        cargo.arg("--release");
    }
    run(&mut cargo)?;
    Ok(())
}

/// Builds the Go module `name` of `integration/tools` where it was not built yet, and gives the folder with its programs. Needs a
/// network, as [`Tools::prepare`] does.
pub fn build_go(name: &str, progress: &dyn Fn(&str)) -> Result<PathBuf> {
    if !target()?.join("tools/bin").join(name).exists() {
        progress(&format!("building {name} (once: one to two minutes)"));
    }
    let mut build = Command::new("bash");
    build.arg(workspace().join("integration/tools/build.sh")).arg(name).env("CARGO_TARGET_DIR", target()?);
    let printed = run(&mut build)?;
    Ok(PathBuf::from(printed.trim()))
}

/// Downloads `names` with apt and unpacks them into `name` below `folder`, without installing anything.
fn unpack_packages(folder: &Path, name: &str, names: &[&str], progress: &dyn Fn(&str)) -> Result<PathBuf> {
    let (done, packages) = (folder.join(name), folder.join(format!("{name}.new")));
    let lock = File::create(folder.join(format!("{name}.lock"))).context("cannot create a lock")?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).context("cannot lock the packages")?;
    let stamp = names.join(" ");
    if fs::read_to_string(done.join("stamp")).is_ok_and(|text| text == stamp) {
        return Ok(done);
    }
    progress(&format!("downloading {}", names.join(", ")));
    let _ = fs::remove_dir_all(&packages);
    fs::create_dir_all(&packages)?;
    let download = || run(Command::new("apt-get").current_dir(&packages).args(["download", "-qq"]).args(names));
    if download().is_err() {
        // A fresh machine has no lists of packages yet, or old ones.
        run(Command::new("apt-get").args(["update", "-qq"])).context("cannot fetch the lists of packages")?;
        download().context("cannot download packages")?;
    }
    for entry in fs::read_dir(&packages)?.flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(&packages))?;
        }
    }
    fs::write(packages.join("stamp"), stamp)?;
    let _ = fs::remove_dir_all(&done);
    fs::rename(&packages, &done).context("cannot move the unpacked packages into place")?;
    Ok(done)
}
