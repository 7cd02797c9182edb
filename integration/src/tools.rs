//! Where the programs come from: nothing is installed on the machine or started by its service manager.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::process::run;

/// Packages of the distribution that are downloaded and unpacked into a private folder.
const PACKAGES: [&str; 3] = ["runc", "docker-registry", "busybox-static"];

/// Set where both daemons are built already.
pub const BUILT: &str = "DROVER_LAB_BUILT";

/// Paths of all programs.
#[derive(Clone, Debug)]
pub struct Tools {
    /// Folder with containerd 2.3's `containerd`, `ctr` and `containerd-shim-runc-v2`.
    pub containerd: PathBuf,
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
        let folder = target()?.join("tools");
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        // Tests of one program run beside each other, and so do programs.
        let lock = folder.join("prepare.lock");
        let lock = File::create(&lock).with_context(|| format!("cannot create {}", lock.display()))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).context("cannot lock the tools")?;
        let packages = unpack_packages(&folder, progress)?;
        let tools = Self {
            containerd: build_go("containerd-2.3", progress)?,
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
fn profile_folder() -> Result<PathBuf> {
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

/// Downloads [`PACKAGES`] with apt and unpacks them below `folder`, without installing anything.
fn unpack_packages(folder: &Path, progress: &dyn Fn(&str)) -> Result<PathBuf> {
    let (done, packages) = (folder.join("packages"), folder.join("packages.new"));
    let stamp = PACKAGES.join(" ");
    if fs::read_to_string(done.join("stamp")).is_ok_and(|text| text == stamp) {
        return Ok(done);
    }
    progress("downloading runc, docker-registry and busybox");
    let _ = fs::remove_dir_all(&packages);
    fs::create_dir_all(&packages)?;
    let download = || run(Command::new("apt-get").current_dir(&packages).args(["download", "-qq"]).args(PACKAGES));
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
