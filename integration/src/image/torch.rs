//! An image of few big files: Python with PyTorch and the CUDA libraries that it links, about 1.9 GB compressed.
//!
//! It needs a machine whose distribution has Python 3.11 (Debian 12): for that the pinned versions have wheels.

use std::path::Path;

use anyhow::{Result, ensure};

use super::rootfs::{self, Say};
use super::{Image, Layer};

/// Changes whenever the steps below do, so that a cached image of older steps is not used.
const RECIPE: u32 = 1;

/// Distribution packages.
const PACKAGES: [&str; 12] = [
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "dash",
    "libc-bin",
    "libgomp1",
    "libstdc++6",
    "mount",
    "python3",
    "tar",
    "util-linux",
];

/// Python packages, layer by layer. pip does not add to a folder that it made before, so all of `nvidia` is one layer.
const WHEELS: [(&str, &str); 3] = [
    ("numpy", "numpy==1.26.4\ntyping-extensions==4.12.2\n"),
    (
        "cuda",
        "nvidia-cuda-nvrtc-cu11==11.7.99\nnvidia-cuda-runtime-cu11==11.7.99\nnvidia-cublas-cu11==11.10.3.66\n\
         nvidia-cudnn-cu11==8.5.0.96\n",
    ),
    ("torch", "torch==1.13.1\n"),
];

/// Loads all of PyTorch's libraries and computes next to nothing.
pub const PROGRAM: [&str; 3] =
    ["python3", "-c", "import torch; print('torch', torch.__version__, torch.ones(2).sum(), flush=True)"];

/// Gives the image from `cache`, built now if it is not there. `say` is told the steps.
pub fn build(cache: &Path, say: Say<'_>) -> Result<Image> {
    let inputs = format!("{PACKAGES:?} {WHEELS:?} {RECIPE}");
    rootfs::cached(cache, "torch", &[&inputs], say, |rootfs, image| -> Result<Vec<Layer>> {
        say("distribution packages");
        rootfs.install_packages(&PACKAGES)?;
        rootfs.write_accounts()?;
        let python = rootfs.python()?;
        ensure!(
            python == "python3.11",
            "the pinned PyTorch has no wheel for this distribution's {python}: Debian 12 is needed"
        );
        rootfs.compile_python(&format!("/usr/lib/{python}"))?;
        let mut steps = vec![("base", rootfs.changed()?)];
        for (name, requirements) in WHEELS {
            say(&format!("Python packages: {name}"));
            rootfs.install_python_packages(requirements)?;
            steps.push((name, rootfs.changed()?));
        }
        rootfs.write_layers(image, &steps)
    })
}
