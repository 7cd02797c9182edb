//! What only pods have: a network of their own, and images as volumes.

use anyhow::{Context, Result, ensure};
use lab::client::{Client, Pod, Way};
use lab::tools::Release;

use crate::matrix::Stage;
use crate::shared::clear;

/// All of it, one after the other.
pub(crate) fn all(stage: &Stage) -> Result<()> {
    let client = Client::new(Way::Cri, &stage.scene, &stage.node)?;
    client.pull(&stage.reference)?;
    stage.is_lazy()?;
    own_network(stage, &client).context("a pod with a network of its own")?;
    // The first release whose CRI mounts images.
    if stage.scene.tools.release >= Release::V2_1 {
        client.pull(&stage.other)?;
        image_volume(stage, &client).context("an image as a volume")?;
        stage.is_lazy()?;
    }
    clear(&client)?;
    stage.wait_until_empty()
}

fn own_network(stage: &Stage, client: &Client<'_>) -> Result<()> {
    let pod = Pod { own_network: true, ..Pod::default() };
    let container = client.start_in(&stage.reference, "own-network", pod)?;
    let routes = client.exec(&container, &["cat", "/proc/net/route"])?;
    // 10.78.0.0, as the kernel prints it.
    ensure!(routes.contains("eth0\t00004E0A"), "the pod has no network of its own: {routes:?}");
    client.remove(container)
}

fn image_volume(stage: &Stage, client: &Client<'_>) -> Result<()> {
    let pod = Pod { image_volume: Some((&stage.other, "/volume")), ..Pod::default() };
    let container = client.start_in(&stage.reference, "image-volume", pod)?;
    let printed = client.exec(&container, &["cat", "/volume/version", "/volume/etc/replaced", "/etc/replaced"])?;
    ensure!(printed == "two\nbefore\nafter\n", "the volume holds {printed:?}");
    let written = client.exec(&container, &["sh", "-c", "touch /volume/new 2>/dev/null || echo read-only"])?;
    ensure!(written.trim() == "read-only", "the volume can be written");
    client.remove(container)
}
