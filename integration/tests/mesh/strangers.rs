//! Who is no machine of the cluster gets nothing from a node, and disturbs nobody.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::crowd::Case;
use lab::network::Place;
use lab::process::run;
use lab::sandbox::run_test;
use lab::scene::Scene;
use lab::tools::Tools;

use crate::{PORT, Stage};

/// Connections that somebody opens and says nothing on.
const SILENT: usize = 64;

#[test]
fn strangers_get_nothing_and_disturb_nobody() {
    run_test("strangers::strangers_get_nothing_and_disturb_nobody", |run_of| {
        let mut stage = Stage::set(run_of)?;
        let crowd = stage.gather(Case::OneHasIt, 2)?;
        let giver = crowd.first.as_ref().context("nobody has it")?.place();
        let asker = crowd.nodes[0].place();
        let digest = &stage.image.layers.iter().max_by_key(|layer| layer.size).context("no layers")?.digest;
        let folder = run_of.folder();
        let ours = certificate(&stage.scene.tools, &folder.join("certificates"), "tester", "1h")?;
        let ended = certificate(&stage.scene.tools, &folder.join("certificates"), "late", "1s")?;
        run(Command::new(&stage.scene.tools.seeder).args(["ca", "init", "--dir"]).arg(folder.join("others")))?;
        let theirs = certificate(&stage.scene.tools, &folder.join("others"), "tester", "1h")?;
        let asks = |certificate: Option<&Path>| asks(&stage.scene, asker, giver, digest, certificate);

        let taken = asks(Some(&ours)).context("a machine of the cluster gets nothing")?;
        ensure!(taken > 64 << 10, "a machine of the cluster got {taken} bytes for a chunk");
        ensure!(asks(Some(&theirs)).is_err(), "another cluster's machine got something");
        ensure!(asks(None).is_err(), "somebody without a certificate got something");

        // Only its time is wrong.
        let expires = || asks(Some(&ended)).is_err();
        lab::process::wait_for("a certificate that has ended gets nothing", Duration::from_secs(60), expires)?;

        let (address, seeder) = (stage.scene.network.address(giver), stage.scene.network.address(Place::Seeder));
        let garbage = format!(
            "exec 3<>/dev/tcp/{address}/{PORT}; head -c 1000000 /dev/urandom >&3; exec 3>&-\n\
             exec 3<>/dev/tcp/{seeder}/7070; head -c 1000000 /dev/urandom >&3; exec 3>&-\n\
             exec 3<>/dev/tcp/{address}/{PORT}; printf 'GET /v1/layers/{digest}/chunks/0-1 HTTP/1.1\\r\\n\\r\\n' >&3; cat <&3; exec 3>&-\n\
             for n in {{1..{SILENT}}}; do exec {{fd}}<>/dev/tcp/{address}/{PORT}; done; printf connected; exec sleep 600"
        );
        let mut bash = stage.scene.network.command(asker, "bash");
        let mut rude = bash.args(["-c", &garbage]).stdout(fs::File::create(folder.join("rude"))?).spawn()?;
        // The silent connections are open while the others are served.
        let open = || fs::read_to_string(folder.join("rude")).is_ok_and(|text| text.ends_with("connected"));
        let opened = lab::process::wait_for("the connections are open", Duration::from_secs(60), open);
        let outcome = opened.and_then(|()| crowd.start(&stage.scene, &stage.subject, true));
        rude.kill()?;
        rude.wait()?;
        for start in &outcome?.starts {
            stage.check_line(&start.line)?;
        }
        asks(Some(&ours)).context("a machine of the cluster gets nothing any more")?;
        Ok(())
    });
}

/// A node's certificate from the authority in `folder`.
pub(crate) fn certificate(tools: &Tools, folder: &Path, name: &str, validity: &str) -> Result<PathBuf> {
    let mut issue = Command::new(&tools.seeder);
    run(issue.args(["ca", "issue", "--dir"]).arg(folder).args(["--role", "node", "--validity", validity, name]))?;
    Ok(folder.join(format!("{name}.crt")))
}

/// Asks a node for a layer's first chunk and gives how many bytes came.
fn asks(scene: &Scene, from: Place, to: Place, digest: &str, certificate: Option<&Path>) -> Result<usize> {
    let out = format!("/run/asked-{}", scene.network.address(from));
    let url = format!("https://{}:{PORT}/v1/layers/{digest}/chunks/0-1", scene.network.address(to));
    let mut curl = scene.network.command(from, "curl");
    // Machines are known by their certificates' authority and role, not by the name in them.
    curl.args(["-sS", "-f", "--http1.1", "--noproxy", "*", "--insecure", "--max-time", "20", "-o", &out]);
    if let Some(certificate) = certificate {
        curl.arg("--cert").arg(certificate).arg("--key").arg(certificate.with_extension("key"));
    }
    run(curl.arg(&url))?;
    Ok(fs::read(&out)?.len())
}
