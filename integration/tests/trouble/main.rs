//! What goes wrong in practice: broken images, a registry that lies, damaged files, wrong configurations. Each gives one clear
//! error, nothing else is harmed, and a retry works once the cause is gone. Real programs; needs root.

mod disk;

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::drover::ordinary_layers;
use lab::image::layer::Attributes;
use lab::image::{Image, Layer, LayerWriter, Packing, small};
use lab::process::{run, through, wait_for};
use lab::sandbox::run_test;
use lab::scene::{Node, Scene};
use lab::tools::Tools;
use sha2::{Digest as _, Sha256};

const PATH: &str = "/usr/local/bin:/bin";
/// How soon a program must say that it cannot start.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// A layer that cannot be lazy, and what becomes of a pull.
struct Broken {
    name: &'static str,
    layer: Layer,
    /// What the snapshotter's reason must hold besides the blob's digest.
    says: &'static str,
    /// Whether containerd can unpack it.
    unpacks: bool,
}

#[test]
fn a_broken_image_harms_no_other() {
    run_test("a_broken_image_harms_no_other", |run_of| {
        let tools = Tools::prepare(&|_| {})?;
        let folder = run_of.folder().join("image");
        let healthy = small::build(&folder, &tools.busybox)?;
        let base = small::base(&folder, &tools.busybox)?;
        let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
        let reference = push(&scene, &healthy, "test/healthy")?;
        scene.start_seeder(true)?;
        let node = scene.drover_node("[fill]\nenabled = false\n")?;
        let (network, containerd) = (&scene.network, node.containerd());
        containerd.pull(network, "drover", &reference)?;
        let sums = "find /etc /srv -type f | sort | xargs cat | sha256sum";
        let script = format!("echo ready; while [ ! -e /stop ]; do sleep 0.1; done; {sums}");
        let reader = containerd.container(network, "drover", &reference, "reader", &["sh", "-c", &script]).spawn()?;
        let running = || run(&mut containerd.ctr(network, &["task", "ls"])).is_ok_and(|text| text.contains("RUNNING"));
        wait_for("the container runs", Duration::from_secs(60), running)?;

        for Broken { name, layer, says, unpacks } in broken(&folder)? {
            let case = || format!("case {name}");
            let image = Image::assemble(&folder, &[base.clone(), layer.clone()], PATH)?;
            let reference = push(&scene, &image, &format!("test/{name}"))?;
            let pulled = containerd.pull(network, "drover", &reference);
            ensure!(pulled.is_ok() == unpacks, "{}: the pull gives {pulled:?}", case());
            let reason = declined(&node, &layer.digest).with_context(case)?;
            println!("{name}: {reason}");
            ensure!(reason.contains(says), "{}: wanted {says:?} in: {reason}", case());
            if unpacks {
                let printed = containerd.output_of(network, "drover", &reference, name, &["cat", "/file"])?;
                ensure!(printed == "contents\n", "{}: the container printed {printed:?}", case());
            }
        }

        // The container that was there all along, and a new one on the same image.
        run(&mut containerd.ctr(network, &["task", "exec", "--exec-id", "e1", "reader", "touch", "/stop"]))?;
        let output = reader.wait_with_output()?;
        ensure!(output.status.success(), "the reader failed: {}", String::from_utf8_lossy(&output.stderr));
        let printed = String::from_utf8(output.stdout)?;
        let again = containerd.output_of(network, "drover", &reference, "again", &["sh", "-c", sums])?;
        ensure!(printed == format!("ready\n{again}"), "read {printed:?}, then {again:?}");
        Ok(())
    });
}

/// Every layer but the last one's is broken for containerd too.
fn broken(folder: &Path) -> Result<Vec<Broken>> {
    let sound = |name: &str, packing: Packing| -> Result<(Layer, Vec<u8>)> {
        let mut layer = LayerWriter::create_packed(folder, name, packing)?;
        layer.file("file", Attributes::root(0o644), b"contents\n")?;
        layer.file("noise", Attributes::root(0o644), &fs::read("/proc/self/exe")?[..300_000])?;
        let layer = layer.finish()?;
        let blob = fs::read(&layer.path)?;
        Ok((layer, blob))
    };
    let (layer, blob) = sound("sound", Packing::Gzip)?;
    let tar = through(Command::new("gzip").arg("-dc"), &blob)?;
    let bytes = |blob: &[u8]| Layer::from_bytes(folder, blob, &layer.diff_id);
    let (_, zstd) = sound("sound-zstd", Packing::Zstd)?;
    let zstd_bytes = |blob: &[u8]| Ok::<_, anyhow::Error>(Layer { packing: Packing::Zstd, ..bytes(blob)? });
    let packed = |tar: &[u8]| {
        let diff_id: String = Sha256::digest(tar).iter().map(|byte| format!("{byte:02x}")).collect();
        Layer::from_bytes(folder, &through(Command::new("gzip").arg("-nc"), tar)?, &format!("sha256:{diff_id}"))
    };
    let cut = |blob: &[u8]| blob[..blob.len() / 2].to_vec();
    let changed = |blob: &[u8], at: usize, bits: u8| {
        let mut changed = blob.to_vec();
        changed[at] ^= bits;
        changed
    };
    // The first block is of no type that there is: behind gzip's header of ten bytes, bits 1 and 2.
    let block_type = !blob.get(10).context("the blob is empty")? & 0b110;
    let mut wrong_header = tar.clone();
    // Inside the first header's name: its checksum is wrong then.
    wrong_header[1] ^= 0xff;
    let other = Layer::from_bytes(folder, &blob, &format!("sha256:{}", "0".repeat(64)))?;
    let case = |name, layer, says, unpacks| Broken { name, layer, says, unpacks };
    Ok(vec![
        case("truncated-gzip", bytes(&cut(&blob))?, "cut off", false),
        case("damaged-gzip", bytes(&changed(&blob, 10, block_type))?, "compressed bytes are broken", false),
        case("truncated-zstd", zstd_bytes(&cut(&zstd))?, "cut off", false),
        case("damaged-zstd", zstd_bytes(&changed(&zstd, zstd.len() / 2, 0x40))?, "zstd frame is broken", false),
        case("no-archive", bytes(b"<html>not a layer</html>")?, "tar", false),
        case("damaged-tar", packed(&wrong_header)?, "tar", false),
        case("truncated-tar", packed(&tar[..100_000])?, "tar", false),
        case("other-diff-id", other, "diffID", false),
        case("sparse", packed(&sparse_tar()?)?, "sparse", true),
    ])
}

/// A file with holes as GNU tar writes it with PAX records: the map of its extents stands before its bytes. containerd's Go reader
/// expands it, a device cannot.
fn sparse_tar() -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let header = |size: usize| {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(size as u64);
        header.set_entry_type(tar::EntryType::Regular);
        header
    };
    let contents = b"contents\n";
    tar.append_data(&mut header(contents.len()), "file", &contents[..])?;
    // One extent of 512 bytes at 4096 of a file of 8192.
    let mut body = b"1\n4096\n512\n".to_vec();
    body.resize(512, 0);
    body.resize(1024, 7);
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"holes"),
        ("GNU.sparse.realsize", b"8192"),
    ];
    tar.append_pax_extensions(records)?;
    tar.append_data(&mut header(body.len()), "GNUSparseFile.0/holes", &body[..])?;
    Ok(tar.into_inner()?)
}

/// A registry that hands out other bytes than the digest's, or none: no layer comes of it, the blob is named, and when the
/// registry is well again so is the image.
#[test]
fn a_lying_registry_is_named_and_forgiven() {
    run_test("a_lying_registry_is_named_and_forgiven", |run_of| {
        let tools = Tools::prepare(&|_| {})?;
        let image =
            small::build_variant(&run_of.folder().join("image"), &tools.busybox, small::Amount::FULL, "told\n")?;
        let storage = run_of.folder().join("registry");
        let mut scene = Scene::private(run_of, tools, &storage)?;
        let reference = push(&scene, &image, "test/lies")?;
        scene.start_seeder(true)?;
        let node = scene.drover_node("")?;
        let (network, containerd) = (&scene.network, node.containerd());
        let large = image.layers.iter().max_by_key(|layer| layer.size).context("no layers")?;
        let hex = large.digest.trim_start_matches("sha256:");
        let stored = storage.join(format!("storage/docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]));
        let told = fs::read(&stored)?;
        let mut lie = told.clone();
        // What looks like a broken layer must not be remembered as one.
        *lie.last_mut().context("empty blob")? ^= 1;

        fs::write(&stored, &lie)?;
        ensure!(containerd.pull(network, "drover", &reference).is_err(), "containerd takes a wrong blob");
        println!("{}", declined(&node, &large.digest)?);
        let seeder = scene.seeder.as_ref().context("no seeder")?;
        let log = fs::read_to_string(seeder.daemon().log())?;
        let named = log.lines().any(|line| line.contains("ingest fails") && line.contains(&large.digest));
        ensure!(named, "the seeder's log does not name the blob:\n{log}");

        fs::remove_file(&stored)?;
        ensure!(containerd.pull(network, "drover", &reference).is_err(), "containerd pulls a missing blob");

        fs::write(&stored, &told)?;
        let lazy = || -> Result<bool> {
            // containerd unpacks what is declined while the seeder rests after its failure.
            let _ = run(&mut containerd.ctr(network, &["image", "rm", "--sync", &reference]));
            containerd.pull(network, "drover", &reference)?;
            Ok(ordinary_layers(&node.snapshotter()?.status()?).is_empty())
        };
        let mut last = Ok(false);
        let waited = wait_for("the image is lazy", Duration::from_secs(60), || {
            last = lazy();
            matches!(last, Ok(true))
        });
        waited.with_context(|| {
            format!("{last:?}\n{}", node.snapshotter().and_then(|s| s.status_text()).unwrap_or_default())
        })?;
        let printed = containerd.output_of(network, "drover", &reference, "c1", &["cat", "/version"])?;
        ensure!(printed == "told\n", "the container printed {printed:?}");
        Ok(())
    });
}

/// A gigabyte of nothing in a megabyte: it costs time, not memory, and the image is what it says.
#[test]
fn a_gzip_bomb_costs_no_memory() {
    run_test("a_gzip_bomb_costs_no_memory", |run_of| {
        const ZEROS: u64 = 1 << 30;
        let tools = Tools::prepare(&|_| {})?;
        let folder = run_of.folder().join("image");
        let base = small::base(&folder, &tools.busybox)?;
        let mut bomb = LayerWriter::create(&folder, "bomb")?;
        let zeros = run_of.folder().join("zeros");
        fs::create_dir(&zeros)?;
        fs::File::create(zeros.join("bomb"))?.set_len(ZEROS)?;
        bomb.from_disk(&zeros, Path::new("bomb"), None)?;
        let image = Image::assemble(&folder, &[base, bomb.finish()?], PATH)?;
        let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
        let reference = push(&scene, &image, "test/bomb")?;
        scene.start_seeder(true)?;
        let node = scene.drover_node("[fill]\nenabled = false\n")?;
        let (network, containerd) = (&scene.network, node.containerd());
        containerd.pull(network, "drover", &reference)?;
        let printed = containerd.output_of(
            network,
            "drover",
            &reference,
            "c1",
            &["sh", "-c", "tail -c 5 /bomb | wc -c; wc -c /bomb"],
        )?;
        ensure!(printed == format!("5\n{ZEROS} /bomb\n"), "the container printed {printed:?}");
        let seeder = scene.seeder.as_ref().context("no seeder")?.daemon().usage().peak_memory;
        let snapshotter = node.snapshotter()?.daemon().usage().peak_memory;
        for (name, bytes) in [("seeder", seeder), ("snapshotter", snapshotter)] {
            ensure!(bytes < 256 << 20, "the {name} took {bytes} bytes");
        }
        Ok(())
    });
}

/// Programs that cannot start say why in one line, which names what to change, and leave nothing behind.
#[test]
fn a_program_that_cannot_start_says_why() {
    run_test("a_program_that_cannot_start_says_why", |run_of| {
        let tools = Tools::prepare(&|_| {})?;
        let folder = run_of.folder();
        let (run_folder, root) = (folder.join("run"), folder.join("root"));
        let taken = folder.join("taken.sock");
        let _listening = UnixListener::bind(&taken)?;
        let plain = folder.join("plain-file");
        fs::write(&plain, "precious")?;
        let config = |name: &str, text: &str| -> Result<PathBuf> {
            let path = folder.join(format!("{name}.toml"));
            let both = format!("root = \"{}\"\nrun = \"{}\"\n", root.display(), run_folder.display());
            fs::write(&path, both + text)?;
            Ok(path)
        };
        let off = "security = \"off\"\n";
        let cases = [
            ("typo", "secruity = \"off\"\n".to_owned(), vec!["typo.toml", "secruity"]),
            ("unit", format!("{off}[read]\ndeadline = \"10 parsecs\"\n"), vec!["unit.toml", "deadline"]),
            ("range", format!("{off}[read]\ndeadline = \"10m\"\n"), vec!["range.toml", "deadline"]),
            ("no-security", String::new(), vec!["no-security.toml", "security"]),
            (
                "no-certificate",
                "[security]\nmode = \"mtls\"\nca = \"/nowhere/ca\"\ncertificate = \"/nowhere/c\"\nkey = \"/nowhere/k\"\n".into(),
                vec!["/nowhere/"],
            ),
            ("socket-taken", format!("socket = \"{}\"\n{off}", taken.display()), vec!["taken.sock", "another process"]),
            ("socket-is-file", format!("socket = \"{}\"\n{off}", plain.display()), vec!["plain-file", "no socket"]),
        ];
        for (name, text, says) in cases {
            let mut command = Command::new(&tools.snapshotter);
            command.arg("serve").arg("--config").arg(config(name, &text)?);
            let error = refusal(name, command)?;
            for word in says {
                ensure!(error.contains(word), "{name}: wanted {word:?} in: {error}");
            }
            ensure!(!is_mounted(&root)?, "{name}: a mount is left behind");
        }
        ensure!(UnixStream::connect(&taken).is_ok() && fs::read_to_string(&plain)? == "precious");

        let sound = config("sound", off)?;
        let mut no_fuse = Command::new("unshare");
        no_fuse.args(["--mount", "sh", "-c", "mount -t tmpfs none /dev && exec \"$0\" serve --config \"$1\" 2>&1"]);
        no_fuse.arg(&tools.snapshotter).arg(&sound);
        let error = refusal("no-fuse", no_fuse)?;
        ensure!(error.contains("/dev/fuse"), "no-fuse: {error}");

        let mut seeder_config = config("seeder", "")?;
        fs::write(&seeder_config, format!("root = \"{}\"\nlimits.conections = 3\n{off}", root.display()))?;
        let seeder = |config: &Path| {
            let mut command = Command::new(&tools.seeder);
            command.arg("serve").arg("--config").arg(config);
            command
        };
        let error = refusal("seeder typo", seeder(&seeder_config))?;
        ensure!(error.contains("conections"), "{error}");
        let port = std::net::TcpListener::bind("127.0.0.1:0")?;
        seeder_config = folder.join("port.toml");
        let listen = port.local_addr()?;
        fs::write(&seeder_config, format!("root = \"{}\"\nlisten = \"{listen}\"\n{off}", folder.join("s").display()))?;
        let error = refusal("port", seeder(&seeder_config))?;
        ensure!(error.contains(&listen.to_string()), "{error}");
        Ok(())
    });
}

/// Where EROFS cannot be mounted from a file, the node works as an ordinary one and says so. A root on tmpfs, whose files
/// the kernel does not take for that, stands for a kernel that lacks it.
#[test]
fn a_node_that_cannot_be_lazy_says_why() {
    run_test("a_node_that_cannot_be_lazy_says_why", |run_of| {
        let tools = Tools::prepare(&|_| {})?;
        let folder = run_of.folder();
        let root = folder.join("root");
        fs::create_dir(&root)?;
        run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&root))?;
        let config = folder.join("snapshotter.toml");
        let run_folder = folder.join("run");
        let text = format!("root = \"{}\"\nrun = \"{}\"\nsecurity = \"off\"\n", root.display(), run_folder.display());
        fs::write(&config, text)?;
        let mut command = Command::new(&tools.snapshotter);
        command.arg("serve").arg("--config").arg(&config);
        let mut daemon = lab::process::Daemon::start("snapshotter", &mut command, &folder.join("log"))?;
        let status = || run(Command::new(&tools.snapshotter).arg("status").arg("--config").arg(&config));
        daemon.wait_until("answers", START_DEADLINE, || status().is_ok())?;
        let status = status()?;
        if status.contains("no layer can be lazy") {
            ensure!(status.contains("EROFS") || status.contains("erofs"), "the reason does not say what: {status}");
            ensure!(daemon.log_tail().contains("no layer can be lazy"), "{}", daemon.log_tail());
        } else {
            println!("skipped: this kernel mounts EROFS from a file of tmpfs");
        }
        daemon.stop();
        Ok(())
    });
}

/// A byte of a stored index flips while the seeder is down: the layer is made anew, and no node is told wrong things.
#[test]
fn a_damaged_index_is_made_again() {
    run_test("a_damaged_index_is_made_again", |run_of| {
        let tools = Tools::prepare(&|_| {})?;
        let image =
            small::build_variant(&run_of.folder().join("image"), &tools.busybox, small::Amount::FULL, "index\n")?;
        let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
        let reference = push(&scene, &image, "test/index")?;
        scene.start_seeder(true)?;
        let node = scene.drover_node("")?;
        node.containerd().pull(&scene.network, "drover", &reference)?;
        drop(node);
        scene.stop_seeder();
        let indexes = run_of.folder().join("seeder/store/indexes");
        for entry in fs::read_dir(&indexes)? {
            let path = entry?.path().join("chunk_digests");
            let mut bytes = fs::read(&path)?;
            *bytes.last_mut().context("an empty section")? ^= 1;
            fs::write(&path, bytes)?;
        }
        scene.start_seeder(false)?;
        let node = scene.drover_node("")?;
        node.containerd().pull(&scene.network, "drover", &reference)?;
        let status = node.snapshotter()?.status()?;
        ensure!(ordinary_layers(&status).is_empty(), "not lazy:\n{}", node.snapshotter()?.status_text()?);
        let printed = node.containerd().output_of(&scene.network, "drover", &reference, "c1", &["cat", "/version"])?;
        ensure!(printed == "index\n", "the container printed {printed:?}");
        Ok(())
    });
}

/// A byte of a stored `entries` section flips on a node: what runs goes on, an image that needs the section anew is made without it
/// and says so, and once the layer is gone from the node it comes again whole.
#[test]
fn damaged_entries_of_a_node_are_named() {
    run_test("damaged_entries_of_a_node_are_named", |run_of| {
        let tools = Tools::prepare(&|_| {})?;
        let (one, two) = (run_of.folder().join("one"), run_of.folder().join("two"));
        let image = small::build_variant(&one, &tools.busybox, small::Amount::LITTLE, "entries\n")?;
        // Other chains of the same layers: their metadata images must be made from the entries.
        let [base, middle, top] = &image.link_layers(&two)?[..] else { bail!("the image has three layers") };
        let reordered = Image::assemble(&two, &[base.clone(), top.clone(), middle.clone()], PATH)?;
        let mut scene = Scene::private(run_of, tools, &run_of.folder().join("registry"))?;
        let (first, second) = (push(&scene, &image, "test/first")?, push(&scene, &reordered, "test/second")?);
        scene.start_seeder(true)?;
        scene.ingest(&first)?;
        let node = scene.drover_node("[fill]\nenabled = false\n")?;
        let (network, containerd, snapshotter) = (&scene.network, node.containerd(), node.snapshotter()?);
        containerd.pull(network, "drover", &first)?;
        for entry in fs::read_dir(snapshotter.root().join("layers"))? {
            let path = entry?.path().join("entries");
            let mut bytes = fs::read(&path)?;
            *bytes.last_mut().context("an empty section")? ^= 1;
            fs::write(&path, bytes)?;
        }
        snapshotter.restart_daemon()?;
        let shows = |reference: &str, id: &str| -> Result<()> {
            let printed =
                containerd.output_of(network, "drover", reference, id, &["cat", "/version", "/srv/many/000/00001"]);
            let printed = printed.with_context(|| format!("container {id}"))?;
            ensure!(printed.starts_with("entries\n"), "container {id} printed {printed:?}");
            Ok(())
        };
        shows(&first, "before")?;
        containerd.pull(network, "drover", &second)?;
        shows(&second, "damaged")?;
        let status = snapshotter.status()?;
        let reasons = ordinary_layers(&status);
        println!("{reasons:#?}");
        ensure!(reasons.iter().all(|reason| reason.contains("damaged")), "{}", snapshotter.status_text()?);
        shows(&first, "beside")?;

        for reference in [&first, &second] {
            run(&mut containerd.ctr(network, &["image", "rm", "--sync", reference]))?;
        }
        wait_for("the layers are gone", Duration::from_secs(60), || {
            snapshotter.status().is_ok_and(|status| status.images.is_empty() && status.bytes_here == 0)
        })?;
        containerd.pull(network, "drover", &second)?;
        shows(&second, "again")?;
        ensure!(ordinary_layers(&snapshotter.status()?).is_empty(), "not lazy:\n{}", snapshotter.status_text()?);
        Ok(())
    });
}

/// Runs a program that must refuse to start, and gives what it says.
fn refusal(name: &str, mut command: Command) -> Result<String> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let ended = wait_for("it gives up", START_DEADLINE, || !matches!(child.try_wait(), Ok(None)));
    if ended.is_err() {
        child.kill()?;
    }
    let output = child.wait_with_output()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    ended.with_context(|| format!("{name}: {text}"))?;
    ensure!(!output.status.success(), "{name}: it ended well: {text}");
    Ok(text)
}

fn is_mounted(below: &Path) -> Result<bool> {
    let below = below.to_str().context("a path is not UTF-8")?;
    Ok(fs::read_to_string("/proc/self/mountinfo")?.lines().any(|line| line.contains(below)))
}

/// Why the snapshotter left the layer of `blob` to containerd, by its log: a pull that fails leaves no snapshot to ask for.
fn declined(node: &Node, blob: &str) -> Result<String> {
    let log = fs::read_to_string(node.snapshotter()?.daemon().log())?;
    let lines: Vec<_> = log.lines().filter(|line| line.contains("containerd unpacks")).collect();
    let found = lines.iter().rev().find(|line| line.contains(blob));
    let reason = found.map(|line| line.split_once("reason=").map_or(*line, |(_, reason)| reason).to_owned());
    reason.with_context(|| format!("no reason names {blob}: {lines:#?}"))
}

fn push(scene: &Scene, image: &Image, repository: &str) -> Result<String> {
    let registry = scene.registry.as_ref().context("a private scene has a registry")?;
    registry.push(&scene.network, image, repository, "1")
}
