//! Other lazy snapshotters, measured beside Drover by `bench --rivals`, with their default settings.
//!
//! Both read from the registry over the node's own link, from an image that was made for them before.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::image::Image;
use crate::network::{Network, Place};
use crate::process::{Daemon, run};
use crate::tools::build_go;

/// A snapshotter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rival {
    /// stargz-snapshotter, on the image converted to eStargz.
    Stargz,
    /// soci-snapshotter, on the image with an index of version 2.
    Soci,
}

impl Rival {
    /// All, in the order in which they are shown.
    pub const ALL: [Self; 2] = [Self::Stargz, Self::Soci];

    /// Name in tables.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Stargz => "stargz 0.18.2, converted image",
            Self::Soci => "SOCI 0.15.0, indexed image",
        }
    }

    /// containerd's name of it, and that of the Go module in `integration/tools`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stargz => "stargz",
            Self::Soci => "soci",
        }
    }

    /// The image that it needs, made of `image` and kept beside it in its cache.
    pub fn image(self, image: &Image, progress: &dyn Fn(&str)) -> Result<Image> {
        let layout = image.manifest.path.ancestors().nth(3).context("the image has no folder")?;
        let converted = layout.with_extension(self.name());
        if let Ok(image) = Image::open(&converted) {
            return Ok(image);
        }
        let unfinished = layout.with_extension(format!("{}-unfinished", self.name()));
        let _ = fs::remove_dir_all(&unfinished);
        progress(&format!("making the image for {}", self.name()));
        run(Command::new(self.program("convert", progress)?).arg(layout).arg(&unfinished))?;
        fs::rename(&unfinished, &converted).with_context(|| format!("cannot name {}", converted.display()))?;
        Image::open(&converted)
    }

    /// Starts it at `place`, with state in `root`, for the containerd at `containerd`. Gives it with containerd's drop-in.
    pub fn start(
        self,
        network: &Network,
        place: Place,
        root: &Path,
        socket: &Path,
        registry: &str,
        containerd: &Path,
    ) -> Result<(Daemon, String)> {
        fs::create_dir_all(root).with_context(|| format!("cannot create {}", root.display()))?;
        let mut command = network.command(place, self.program("serve", &|_| {})?);
        command.arg(root.join("store")).arg(socket).arg(registry);
        if self == Self::Soci {
            command.arg(containerd);
        }
        let mut daemon = Daemon::start(self.name(), &mut command, &root.join("log"))?;
        let accepts = || std::os::unix::net::UnixStream::connect(socket).is_ok();
        daemon.wait_until("accepts connections", Duration::from_secs(20), accepts)?;
        let (name, socket, root) = (self.name(), socket.display(), root.display());
        let drop_in = format!(
            "version = 3\n\
             [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\nsnapshotter = '{name}'\n\
             [proxy_plugins.{name}]\ntype = 'snapshot'\naddress = '{socket}'\n\
             [proxy_plugins.{name}.exports]\nroot = '{root}'\nenable_remote_snapshot_annotations = 'true'\n"
        );
        Ok((daemon, drop_in))
    }

    fn program(self, what: &str, progress: &dyn Fn(&str)) -> Result<PathBuf> {
        Ok(build_go(self.name(), progress)?.join(format!("{}-{what}", self.name())))
    }
}
