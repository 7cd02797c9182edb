//! Containers with a user namespace of their own: what they see of an image is what everybody sees.

use anyhow::{Context, Result, ensure};
use lab::client::{Client, Pod, Way};
use lab::drover::ordinary_layers;
use lab::process::run;
use lab::scene::NodeSetup;
use lab::tools::Release;

use crate::matrix::{NO_FILL, Stage};
use crate::shared::clear;

/// Ids of the container, of the machine, and how many.
const MAP: &str = "0:100000:65536";

/// The same for a pod.
const HOST: (u32, u32) = (100_000, 65_536);

/// Owners, modes and bytes of all files, and of a new one.
const LOOK: &str = "cat /proc/self/uid_map; cd /; find bin root srv -exec stat -c '%n %u:%g %a' {} + | sort | sha256sum; \
     find srv -type f | sort | xargs cat | sha256sum; echo new > srv/new; stat -c '%u:%g' srv/new srv/inherits";

/// containerd shifts the ids of directories, and from this release on also of what is mounted in them.
pub(crate) const SHIFTS_MOUNTS: Release = Release::V2_3;

/// All of it, one after the other.
pub(crate) fn all(stage: &mut Stage) -> Result<()> {
    copied(stage).context("without the capability remap-ids")?;
    if stage.scene.tools.release.has_version_3() {
        shifted(stage).context("with the capability remap-ids")?;
    }
    Ok(())
}

/// Where the snapshotter does not shift ids, containerd makes a copy of the image in which every file has another owner.
fn copied(stage: &Stage) -> Result<()> {
    let client = Client::new(Way::Drover, &stage.scene, &stage.node)?;
    client.pull(&stage.other)?;
    let plain = look(&client, &stage.other, "plain", &[])?;
    let own = look(&client, &stage.other, "copied", &["--uidmap", MAP, "--gidmap", MAP])?;
    ensure!(plain == own, "the container sees {own}, others see {plain}");
    clear(&client)?;
    stage.wait_until_empty()
}

fn shifted(stage: &mut Stage) -> Result<()> {
    let setup = NodeSetup { extra: NO_FILL, cri: Some(&stage.cri), remaps_ids: true, ..NodeSetup::default() };
    if let Some(runc) = stage.shifting_runc.clone() {
        stage.scene.tools.runc = runc;
    }
    let node = stage.scene.drover_node_as(&setup)?;
    let client = Client::new(Way::Drover, &stage.scene, &node)?;
    client.pull(&stage.other)?;
    let options = ["--uidmap", MAP, "--gidmap", MAP, "--remap-labels"];
    let own = look(&client, &stage.other, "shifted", &options);
    if stage.scene.tools.release < SHIFTS_MOUNTS {
        let error = own.err().context("a container runs whose layers cannot be shown")?;
        ensure!(format!("{error:#}").contains("need containerd 2.3"), "the reason is not given: {error:#}");
        return Ok(());
    }
    let (own, plain) = (own?, look(&client, &stage.other, "plain", &[])?);
    ensure!(plain == own, "the container sees {own}, others see {plain}");

    let pods = Client::new(Way::Cri, &stage.scene, &node)?;
    pods.pull(&stage.other)?;
    let pod = Pod { own_network: true, ids: Some(HOST), ..Pod::default() };
    let container = pods.start_in(&stage.other, "shifted-pod", pod).context("a pod with ids of its own")?;
    let own = seen(&pods.exec(&container, &["sh", "-c", LOOK])?, true)?;
    ensure!(plain == own, "the pod's container sees {own}, others see {plain}");
    pods.remove(container)?;

    let status = node.snapshotter()?.status()?;
    ensure!(ordinary_layers(&status).is_empty(), "not lazy:\n{}", node.snapshotter()?.status_text()?);
    Ok(())
}

/// What a container that is run with `options` sees, after it was seen that these give it ids of its own.
fn look(client: &Client<'_>, reference: &str, id: &str, options: &[&str]) -> Result<String> {
    let group = client.control_group(id);
    let mut command = client.ctr(&["run", "--rm", "--cgroup", &group, "--snapshotter", "drover"]);
    let printed = run(command.args(options).args([reference, id, "sh", "-c", LOOK]))?;
    seen(&printed, !options.is_empty())
}

/// What [`LOOK`] printed in a container after its ids, which must be its own or not.
fn seen(printed: &str, own_ids: bool) -> Result<String> {
    let (map, seen) = printed.split_once('\n').context("the container printed nothing")?;
    let has_own_ids = map.split_whitespace().eq(MAP.split(':'));
    ensure!(has_own_ids == own_ids, "the container's ids are those of {map:?}");
    Ok(seen.to_owned())
}
