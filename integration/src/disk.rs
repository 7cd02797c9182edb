//! A small disk that can be filled: an ext4 file system in a file.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, umount2};

use crate::process::run;

/// What is written at a time to fill it up; the file system's own blocks are not smaller.
const STEP: usize = 4096;

/// How often whoever fills it looks for bytes that somebody gave back.
const PAUSE: Duration = Duration::from_millis(2);

/// A mounted small disk; unmounted when dropped.
#[derive(Debug)]
pub struct Disk {
    mounted: PathBuf,
}

/// Takes every byte that is free on a disk, and those that become free, until it is dropped.
#[derive(Debug)]
pub struct Hog {
    ballast: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Disk {
    /// A disk of `bytes` in `folder`. Fails where the machine has no loop devices.
    pub fn mount(folder: &Path, bytes: u64) -> Result<Self> {
        let (file, mounted) = (folder.join("file"), folder.join("mounted"));
        fs::create_dir_all(&mounted).with_context(|| format!("cannot create {}", mounted.display()))?;
        File::create(&file)?.set_len(bytes).with_context(|| format!("cannot make {}", file.display()))?;
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&file))?;
        // The kernel gives the loop device back with the mount.
        run(Command::new("mount").args(["-t", "ext4", "-o", "loop"]).arg(&file).arg(&mounted))?;
        Ok(Self { mounted })
    }

    /// Its root.
    pub fn path(&self) -> &Path {
        &self.mounted
    }

    /// Bytes that can still be written.
    pub fn free(&self) -> Result<u64> {
        let space = rustix::fs::statvfs(&self.mounted).context("cannot ask for the free space")?;
        Ok(space.f_bavail * space.f_frsize)
    }

    /// Begins to take all of it.
    pub fn fill(&self) -> Result<Hog> {
        let ballast = self.mounted.join("ballast");
        let file = File::create(&ballast).with_context(|| format!("cannot create {}", ballast.display()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || take_all(&file, &stopped).context("cannot fill the disk"));
        Ok(Hog { ballast, stop, thread: Some(thread) })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The sandbox takes it, if anything resists.
        if let Err(error) = umount2(&self.mounted, MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", self.mounted.display());
        }
    }
}

impl Hog {
    /// Gives everything back.
    pub fn end(mut self) -> Result<()> {
        self.stop()
    }

    fn stop(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let taken = thread.join().map_err(|_| anyhow!("who fills the disk panicked"))?;
        fs::remove_file(&self.ballast).with_context(|| format!("cannot remove {}", self.ballast.display()))?;
        taken
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("{error:#}");
        }
    }
}

fn take_all(mut file: &File, stop: &AtomicBool) -> io::Result<()> {
    let bytes = vec![0x55; STEP];
    while !stop.load(Ordering::Relaxed) {
        match file.write_all(&bytes) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::StorageFull => std::thread::sleep(PAUSE),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
