//! A containerd whose configuration lacks the key by which pulls say what image they are of: they stay lazy, and the log names the
//! key once.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::client::{Client, Way};
use lab::process::wait_for;
use lab::scene::NodeSetup;
use lab::tools::Release;

use crate::matrix::{NO_FILL, Stage};
use crate::shared::prints;

/// Two images pulled by pods.
pub(crate) fn all(stage: &mut Stage) -> Result<()> {
    let key = match stage.scene.tools.release {
        // 2.0 reads no other one.
        Release::V1_6 | Release::V1_7 | Release::V2_0 => "disable_snapshot_annotations",
        _ => "enable_remote_snapshot_annotations",
    };
    let setup = NodeSetup { extra: NO_FILL, cri: Some(&stage.cri), without: Some(key), ..NodeSetup::default() };
    let node = stage.scene.drover_node_as(&setup)?;
    let client = Client::new(Way::Cri, &stage.scene, &node)?;
    let warnings = || -> Result<Vec<String>> {
        let log = std::fs::read_to_string(node.snapshotter()?.daemon().log())?;
        Ok(log.lines().filter(|line| line.contains("WARN") && line.contains(key)).map(str::to_owned).collect())
    };
    client.pull(&stage.reference)?;
    wait_for("the key is named", Duration::from_secs(60), || warnings().is_ok_and(|lines| !lines.is_empty()))
        .with_context(|| node.snapshotter().map(|snapshotter| snapshotter.daemon().log_tail()).unwrap_or_default())?;
    client.pull(&stage.other)?;
    let container = client.start(&stage.other, "no-key")?;
    prints(&client, &container, "/version", "two\n")?;
    stage.is_lazy_on(&node)?;
    client.remove(container)?;
    let warnings = warnings()?;
    ensure!(warnings.len() == 1, "not one warning: {warnings:#?}");
    println!("{}", warnings[0]);
    Ok(())
}
