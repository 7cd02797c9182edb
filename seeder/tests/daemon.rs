//! The program itself: daemon, commands beside it, and its death at a bad moment.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use node::registry::fake::FakeRegistry;
use node::source::BlobRef;

const PATIENCE: Duration = Duration::from_secs(30);

struct Scene {
    folder: tempfile::TempDir,
    config: PathBuf,
    registry: FakeRegistry,
    blob: BlobRef,
}

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Scene {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let registry = FakeRegistry::start().await;
        let blob = registry.put_blob(gzip_of_a_tar());
        let manifest = "application/vnd.oci.image.manifest.v1+json";
        let json = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": manifest,
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "size": 2,
                "digest": layer::Digest::of(b"{}").to_string() },
            "layers": [{ "mediaType": blob.media_type, "size": blob.size, "digest": blob.digest.to_string() }],
        });
        registry.put_manifest("team/app", Some("1"), manifest, &json);
        let config = folder.path().join("seeder.toml");
        let text = format!(
            "root = \"{}\"\nlisten = \"127.0.0.1:0\"\nsecurity = \"off\"\n[registry.\"{}\"]\nplain_http = true\n[cache]\nkeep_free = \"0B\"\n",
            folder.path().join("store").display(),
            registry.host()
        );
        std::fs::write(&config, text).unwrap();
        Self { folder, config, registry, blob }
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    async fn serve(&self) -> Daemon {
        let child = program().args(["serve", "--config"]).arg(&self.config).stderr(Stdio::null()).spawn().unwrap();
        let daemon = Daemon(child);
        let socket = self.store().join("control.sock");
        wait_for("the daemon listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok()).await;
        daemon
    }

    async fn ingest(&self) -> Output {
        let image = format!("{}/team/app:1", self.registry.host());
        let mut command = program();
        command.args(["ingest", "--config"]).arg(&self.config).arg(image);
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    /// The daemon's answer on its local socket, head and body.
    fn get(&self, path: &str) -> Vec<u8> {
        let mut socket = std::os::unix::net::UnixStream::connect(self.store().join("control.sock")).unwrap();
        write!(socket, "GET {path} HTTP/1.1\r\nHost: seeder\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).unwrap();
        answer
    }

    fn status(&self) -> String {
        let output = program().args(["status", "--config"]).arg(&self.config).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }
}

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_drover-seeder"))
}

fn gzip_of_a_tar() -> Vec<u8> {
    let mut state = 1u32;
    let mut file = vec![0u8; 6 << 20];
    file.iter_mut().for_each(|byte| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    });
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(file.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, "file", &file[..]).unwrap();
    let device = builder.into_inner().unwrap();
    let mut child =
        Command::new("gzip").args(["-1", "-n"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&device).unwrap());
    let blob = child.wait_with_output().unwrap().stdout;
    writer.join().unwrap();
    blob
}

async fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn len(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn ingests_through_the_daemon_or_alone_and_stops_in_order() {
    let scene = Scene::new().await;
    let mut daemon = scene.serve().await;
    let output = scene.ingest().await;
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains(&format!("{}  known", scene.blob.digest)), "{}", text(&output));
    let status = scene.status();
    assert!(status.contains(&scene.blob.digest.to_string()) && status.contains("0 nodes in the mesh"), "{status}");
    let sent = scene.get(&format!("/v1/layers/{}/follow", scene.blob.digest));
    assert!(sent.len() > 6 << 20, "{}", sent.len());
    let status = scene.status();
    assert!(status.contains("nodes 0  sent 6.") && status.contains("(1.0"), "{status}");

    let pid = i32::try_from(daemon.0.id()).unwrap();
    assert!(Command::new("kill").args(["-TERM", &pid.to_string()]).status().unwrap().success());
    let mut ended = None;
    wait_for("the daemon ends", || {
        ended = daemon.0.try_wait().unwrap();
        ended.is_some()
    })
    .await;
    assert!(ended.unwrap().success());
    assert!(scene.status().contains("no daemon"), "{}", scene.status());
    let alone = scene.ingest().await;
    assert!(alone.status.success(), "{}", text(&alone));
    assert_eq!(scene.registry.requests().bodies, 1, "a known layer needs no registry");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_goes_on_with_the_blob() {
    let scene = Scene::new().await;
    let half = scene.blob.size / 2;
    scene.registry.set(|behaviour| behaviour.stall_after = Some(half));
    let incoming = scene.store().join("incoming").join(scene.blob.digest.hex()).join("blob");
    {
        let mut daemon = scene.serve().await;
        let waiting = scene.ingest();
        let killing = async {
            wait_for("half of the blob is here", || len(&incoming) >= half).await;
            daemon.0.kill().unwrap();
        };
        let (output, ()) = tokio::join!(waiting, killing);
        assert!(!output.status.success(), "{}", text(&output));
    }
    scene.registry.set(|behaviour| behaviour.stall_after = None);
    let before = scene.registry.requests().bytes;
    let _daemon = scene.serve().await;
    let output = scene.ingest().await;
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(scene.registry.requests().bytes - before, scene.blob.size - half);
    assert!(!incoming.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn says_what_is_wrong() {
    let scene = Scene::new().await;
    std::fs::write(&scene.config, "root = \"/x\"\nsecurity = \"off\"\nlissen = 3\n").unwrap();
    let output = scene.ingest().await;
    assert!(!output.status.success() && text(&output).contains("lissen"), "{}", text(&output));

    let ca = scene.folder.path().join("ca");
    let run = |args: &[&str]| program().arg("ca").args(args).output().unwrap();
    assert!(run(&["init", "--dir", ca.to_str().unwrap()]).status.success());
    let output = run(&["issue", "--dir", ca.to_str().unwrap(), "--role", "seeder", "s"]);
    assert!(!output.status.success() && text(&output).contains("--address"), "{}", text(&output));
    let output = run(&["issue", "--dir", ca.to_str().unwrap(), "--role", "node", "n"]);
    assert!(output.status.success(), "{}", text(&output));
}
