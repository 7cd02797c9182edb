//! An image on the disk, and mounted.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use layer::erofs::{ImageOptions, ImageSummary, Stack, write_image};
use layer::tar::{Limits, Scanner, TarError};
use layer::tree::Tree;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mount that ends with the test, however that ends.
pub(crate) struct Mounted(pub(crate) PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

/// Says why and is true where the machine cannot run these tests.
pub(crate) fn skipped() -> bool {
    lab::sandbox::machine_can().inspect_err(|reason| println!("skipped: {reason:#}")).is_err()
}

pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {stdout}{}", String::from_utf8_lossy(&output.stderr));
    stdout
}

pub(crate) fn scan(device: &Path) -> Result<Tree, TarError> {
    let bytes = fs::read(device).unwrap();
    let mut scanner = Scanner::new(Limits::default());
    for piece in bytes.chunks(100_000) {
        scanner.push(piece)?;
    }
    let tree = scanner.finish()?;
    Ok(Tree::validate(tree.entries().to_vec(), bytes.len() as u64).unwrap())
}

pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) device: PathBuf,
    pub(crate) summary: ImageSummary,
}

impl Image {
    /// Writes the image of `device` beside it; `lower` are the trees below, the uppermost first, and none is the bottom.
    pub(crate) fn of(device: &Path, lower: &[&Tree]) -> Self {
        Self::of_tree(device, &scan(device).unwrap(), lower, lower.is_empty())
    }

    /// [`Image::of`], with the tree of `device`.
    pub(crate) fn of_tree(device: &Path, tree: &Tree, lower: &[&Tree], bottom: bool) -> Self {
        let path = device.with_extension("erofs");
        let options = ImageOptions {
            device_size: fs::metadata(device).unwrap().len(),
            bottom,
            uuid: *layer::Digest::of(device.as_os_str().as_bytes()).as_bytes().first_chunk().unwrap(),
        };
        let mut file = File::create(&path).unwrap();
        let summary = write_image(tree, &options, &Stack::new(lower), &mut file).unwrap();
        file.flush().unwrap();
        assert_eq!(file.metadata().unwrap().len(), summary.size);
        Self { path, device: device.to_owned(), summary }
    }

    pub(crate) fn mount(&self, at: &Path) -> Mounted {
        fs::create_dir_all(at).unwrap();
        let options = format!("device={}", self.device.display());
        mount(Some(&self.path), at, Some("erofs"), MsFlags::MS_RDONLY, Some(&options[..]))
            .unwrap_or_else(|error| panic!("cannot mount {} on {}: {error}", self.path.display(), at.display()));
        Mounted(at.to_owned())
    }

    /// fsck.erofs finds nothing, where it knows images with 512-byte blocks.
    pub(crate) fn check(&self) {
        let version = run(Command::new("fsck.erofs").arg("-V"));
        let number = version.split_whitespace().find_map(|word| {
            let (major, rest) = word.split_once('.')?;
            let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
            Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
        });
        if number < Some((1, 6)) {
            println!("skipped: {} cannot read images with 512-byte blocks", version.trim());
            return;
        }
        let device = format!("--device={}", self.device.display());
        run(Command::new("fsck.erofs").args([&device, "--extract"]).arg(&self.path));
        run(Command::new("dump.erofs").args([&device, "-s"]).arg(&self.path));
    }
}
