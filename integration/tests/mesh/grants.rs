//! Layers only for machines that show a grant.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use lab::crowd::Case;
use lab::network::Place;
use lab::process::run;
use lab::sandbox::run_test;
use lab::scene::Scene;

use crate::strangers::certificate;
use crate::{PORT, Stage};

#[test]
fn nodes_get_layers_with_grants_and_nobody_without() {
    run_test("grants::nodes_get_layers_with_grants_and_nobody_without", |run_of| {
        let mut stage = Stage::set(run_of)?;
        stage.scene.seeder_config = "[grants]\nmode = \"on\"\n".to_owned();
        let crowd = stage.gather(Case::OneHasIt, 3)?;
        let giver = crowd.first.as_ref().context("nobody has it")?.place();
        let digest = &stage.image.layers.iter().max_by_key(|layer| layer.size).context("no layers")?.digest;
        let curious = certificate(&stage.scene.tools, &run_of.folder().join("certificates"), "curious", "1h")?;
        let refused = || -> Result<()> {
            for (place, port) in [(giver, PORT), (Place::Seeder, 7070)] {
                let status = asks(&stage.scene, crowd.nodes[0].place(), place, port, digest, &curious)?;
                ensure!(status == "403", "{place:?} answered {status} to a machine of the cluster without a grant");
            }
            Ok(())
        };
        refused()?;
        let outcome = crowd.start(&stage.scene, &stage.subject, true)?;
        stage.check(&crowd, &outcome)?;
        let (share, registry) = (outcome.flows.share_between_nodes(), stage.copies(outcome.flows.registry()));
        ensure!(share > 0.5, "only {:.0} % came from other nodes", share * 100.0);
        ensure!(registry < 0.1, "{registry:.3} copies came from the registry");
        refused()
    });
}

/// Asks for a layer's first chunk and gives the status of the answer.
fn asks(scene: &Scene, from: Place, to: Place, port: u16, digest: &str, certificate: &Path) -> Result<String> {
    let url = format!("https://{}:{port}/v1/layers/{digest}/chunks/0-1", scene.network.address(to));
    let mut curl = scene.network.command(from, "curl");
    // Machines are known by their certificates' authority and role, not by the name in them.
    curl.args(["-sS", "--http1.1", "--noproxy", "*", "--insecure", "--max-time", "20"]);
    curl.args(["-o", "/dev/null", "-w", "%{http_code}"]);
    curl.arg("--cert").arg(certificate).arg("--key").arg(certificate.with_extension("key"));
    run(curl.arg(&url))
}
