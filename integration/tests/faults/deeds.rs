//! Every process is killed at random moments of everything that a node does with an image: a client may have to repeat its call, but
//! then all is as if nothing had happened, and when all is removed nothing is left.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use lab::client::wait_until_empty;
use lab::compare::compare_unpacked;
use lab::drover::ordinary_layers;
use lab::image::{Image, noise};
use lab::process::{footprints, run, wait_for};
use lab::sandbox::{Run, run_test};
use lab::scene::{Node, Scene};
use lab::tools::Tools;

use crate::{Chance, kill_9, push, times};

/// Lives of an image in CI, with a kill in each.
const LIVES: u64 = 18;

/// Images that are there at the same time; together they do not fit [`CACHE`], so that chunks are evicted and fetched again.
const IMAGES: u64 = 2;

/// Bytes of each image's own file.
const SIZE: usize = 6 << 20;

/// The lab writes `[cache]` right before.
const CACHE: &str = "size = \"10MiB\"\n";

/// How long a client's call may take, and all of its repetitions.
const PATIENCE: Duration = Duration::from_secs(120);

/// So long a daemon that ends waits for calls that are under way (`snapshotter/src/daemon.rs`).
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// What may be left on the disk: the records, and folders.
const LEFT: u64 = 4 << 20;

/// Files that a process may have open more than when it had nothing to do for the first time: connections that are not closed yet.
const FILES_MORE: usize = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Daemon,
    Keeper,
    Seeder,
    Containerd,
    /// Nobody: another binary is put in place of the snapshotter's and loaded, in turns a newer and an older one. No call may fail but
    /// those that go on for longer than the daemon waits for them.
    Reload,
}

/// Something that a client asks for. The background completes images meanwhile, and makes room for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Deed {
    /// A pull of what the seeder does not know: it is ingested.
    PullNew,
    /// A pull of what it knows.
    Pull,
    /// A container that reads everything.
    Read,
    /// The same with an image whose chunks had to go.
    ReadOld,
    /// A build step on the image.
    Commit,
    /// The removal of an older image and its build step.
    Remove,
}

const VICTIMS: [Victim; 5] = [Victim::Daemon, Victim::Keeper, Victim::Seeder, Victim::Containerd, Victim::Reload];
const DEEDS: [Deed; 6] = [Deed::PullNew, Deed::Pull, Deed::Read, Deed::ReadOld, Deed::Commit, Deed::Remove];

#[test]
fn whoever_is_killed_at_whatever_moment_nothing_is_lost_or_left() {
    run_test("deeds::whoever_is_killed_at_whatever_moment_nothing_is_lost_or_left", |run| {
        let mut chance = Chance::new();
        let mut stage = Stage::set(run)?;
        // Undisturbed, for how long everything takes, and what is open when all is done.
        stage.live_first(0)?;
        for number in 1..=IMAGES {
            stage.live(number, None)?;
        }
        stage.remove_all(IMAGES)?;
        let open = stage.open_files()?;
        let mut killed = BTreeMap::new();
        // An older image is there again.
        stage.live_first(IMAGES + 1)?;
        let first = IMAGES + 2;
        let mut next = VICTIMS.iter().flat_map(|victim| DEEDS.map(|deed| (*victim, deed))).collect::<Vec<_>>();
        for at in (1..next.len()).rev() {
            next.swap(at, chance.below(at as u64 + 1) as usize);
        }
        let last = first + times(LIVES) - 1;
        for number in first..=last {
            let (victim, deed) = next[(number - first) as usize % next.len()];
            *killed.entry(victim).or_insert(0) += 1;
            let kill = Kill { victim, deed, share: chance.below(1000) };
            let clock = Instant::now();
            stage.live(number, Some(kill)).with_context(|| format!("image {number}, {kill:?}"))?;
            println!("image {number}: {kill:?}, {:?}", clock.elapsed());
        }
        stage.remove_all(last)?;
        let left = stage.open_files()?;
        for (name, files) in left {
            let before = open.get(&name).copied().unwrap_or(0);
            ensure!(files <= before + FILES_MORE, "{name} has {files} open files; it had {before}");
        }
        println!("{killed:?} killed; calls that were repeated: {:?}", stage.repeated);
        Ok(())
    });
}

/// A kill in one image's life.
#[derive(Clone, Copy, Debug)]
struct Kill {
    victim: Victim,
    deed: Deed,
    /// When: thousandths of what the deed took last.
    share: u64,
}

struct Stage {
    scene: Scene,
    node: Node,
    folder: PathBuf,
    /// Two binaries of the snapshotter, and whether the first of them is in place.
    versions: [PathBuf; 2],
    is_newer: bool,
    /// When the binary was loaded last.
    reloaded: Option<Instant>,
    /// What each deed took when nobody was killed.
    took: BTreeMap<Deed, Duration>,
    repeated: BTreeMap<Deed, u32>,
    calls: u32,
}

impl Stage {
    fn set(run: &Run) -> Result<Self> {
        let mut tools = Tools::prepare(&|_| {})?;
        let programs = run.folder().join("programs");
        fs::create_dir_all(&programs)?;
        let versions = ["newer", "older"].map(|name| programs.join(name));
        for version in &versions {
            lab::process::run(Command::new("install").args(["-m", "755"]).args([&tools.snapshotter, version]))?;
        }
        tools.snapshotter = programs.join("drover-snapshotter");
        fs::hard_link(&versions[1], &tools.snapshotter)?;
        let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
        scene.start_seeder(true)?;
        let node = scene.drover_node(CACHE)?;
        let folder = run.folder().join("images");
        Ok(Self {
            scene,
            node,
            folder,
            versions,
            is_newer: false,
            reloaded: None,
            took: BTreeMap::new(),
            repeated: BTreeMap::new(),
            calls: 0,
        })
    }

    /// Image `number` comes and stays, where no older one is there.
    fn live_first(&mut self, number: u64) -> Result<()> {
        let image = self.image(number)?;
        let reference = push(&self.scene, &image, &format!("test/image-{number}"))?;
        self.act(Deed::PullNew, None, |stage| stage.pulling(&reference), |_| Ok(true))?;
        self.commit(None, number, &image)
    }

    /// Image `number` comes, is read and built on, and the one that is too old is removed.
    fn live(&mut self, number: u64, kill: Option<Kill>) -> Result<()> {
        let image = self.image(number)?;
        let reference = push(&self.scene, &image, &format!("test/image-{number}"))?;
        // Every second image is known before, or whenever the kill wants it so.
        let pull = match kill.map(|kill| kill.deed) {
            Some(deed @ (Deed::PullNew | Deed::Pull)) => deed,
            _ if number.is_multiple_of(2) => Deed::PullNew,
            _ => Deed::Pull,
        };
        if pull == Deed::Pull {
            self.scene.ingest(&reference)?;
        }
        let old = number - (IMAGES - 1);
        for deed in [pull, Deed::Read, Deed::Commit, Deed::ReadOld, Deed::Remove] {
            let kill = kill.filter(|kill| kill.deed == deed);
            match deed {
                Deed::PullNew | Deed::Pull => self.act(deed, kill, |stage| stage.pulling(&reference), |_| Ok(true))?,
                Deed::Read => self.read(deed, kill, number)?,
                Deed::ReadOld => self.read(deed, kill, old)?,
                Deed::Commit => self.commit(kill, number, &image)?,
                Deed::Remove => match number.checked_sub(IMAGES) {
                    Some(old) => self.remove(kill, old)?,
                    None => continue,
                },
            }
        }
        self.check(number)
    }

    fn image(&self, number: u64) -> Result<Image> {
        noise::build(&self.folder, &self.scene.tools.busybox, size(number))
    }

    fn reference(&self, number: u64) -> Result<String> {
        let registry = self.scene.registry.as_ref().context("a private scene has a registry")?;
        Ok(format!("{}/test/image-{number}:1", registry.host()))
    }

    /// Has a client do something, and kills somebody meanwhile. The call may fail then, but not for long. `is_done` looks whether it
    /// is done, whatever the client was told.
    fn act(
        &mut self,
        deed: Deed,
        mut kill: Option<Kill>,
        call: impl Fn(&Self) -> Result<Command>,
        is_done: impl Fn(&Self) -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut command = call(self)?;
            let clock = Instant::now();
            let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
            let (disturbed, reloaded) = (kill.is_some(), kill.is_some_and(|kill| kill.victim == Victim::Reload));
            if let Some(kill) = kill.take() {
                self.kill(kill)?;
            }
            let ended = end(&mut child);
            let output = child.wait_with_output()?;
            ended.with_context(|| format!("{command:?} {}", String::from_utf8_lossy(&output.stderr)))?;
            if output.status.success() && is_done(self)? {
                if !disturbed {
                    self.took.insert(deed, clock.elapsed());
                }
                return Ok(());
            }
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(
                !reloaded || self.reload_took_long(),
                "{command:?} failed because the binary was loaded again: {why}\n{}",
                self.log()
            );
            if Instant::now() > deadline {
                bail!("{command:?} fails again and again: {why}\n{}", self.node.snapshotter()?.daemon().log_tail());
            }
            *self.repeated.entry(deed).or_default() += 1;
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Kills as `kill` says and sees to it that the victim runs again.
    fn kill(&mut self, kill: Kill) -> Result<()> {
        let took = self.took.get(&kill.deed).copied().unwrap_or(Duration::from_millis(300));
        std::thread::sleep(took * u32::try_from(kill.share)? / 1000);
        match kill.victim {
            Victim::Daemon | Victim::Keeper => {
                let pair = self.node.snapshotter()?.pair(|_| true)?;
                let daemon = pair.daemon.context("no daemon")?;
                kill_9(if kill.victim == Victim::Daemon { daemon } else { pair.keeper })?;
                self.node.snapshotter()?.pair(|now| now.keeper != pair.keeper || now.daemon != pair.daemon)?;
            }
            Victim::Reload => {
                let pair = self.node.snapshotter()?.pair(|_| true)?;
                self.swap_program()?;
                let keeper = nix::unistd::Pid::from_raw(i32::try_from(pair.keeper)?);
                nix::sys::signal::kill(keeper, nix::sys::signal::Signal::SIGHUP)?;
                self.reloaded = Some(Instant::now());
                self.node.snapshotter()?.pair(|now| now.daemon != pair.daemon)?;
            }
            Victim::Seeder => {
                kill_9(self.scene.seeder.as_ref().context("no seeder")?.daemon().pid())?;
                self.scene.start_seeder(false)?;
            }
            Victim::Containerd => {
                kill_9(self.node.containerd().daemon().pid())?;
                self.node.containerd_mut().restart(&self.scene.network)?;
            }
        }
        Ok(())
    }

    /// Whether a call that fails now may have outlasted the daemon that was told to end.
    fn reload_took_long(&self) -> bool {
        self.reloaded.is_some_and(|reloaded| reloaded.elapsed() >= STOP_PATIENCE)
    }

    /// Puts the other of two binaries in the place from which the snapshotter was started.
    fn swap_program(&mut self) -> Result<()> {
        let new = self.scene.tools.snapshotter.with_extension("new");
        let version = &self.versions[usize::from(self.is_newer)];
        fs::hard_link(version, &new).with_context(|| format!("cannot link {}", version.display()))?;
        fs::rename(&new, &self.scene.tools.snapshotter)?;
        self.is_newer = !self.is_newer;
        Ok(())
    }

    fn ctr(&self, arguments: &[&str]) -> Command {
        self.node.containerd().ctr(&self.scene.network, arguments)
    }

    fn pulling(&self, reference: &str) -> Result<Command> {
        let hosts = self.node.containerd().hosts().display().to_string();
        Ok(self.ctr(&["image", "pull", "--snapshotter", "drover", "--hosts-dir", &hosts, reference]))
    }

    /// A container reads all of an image. Once it has begun only containerd's death may keep it from its end.
    fn read(&mut self, deed: Deed, mut kill: Option<Kill>, number: u64) -> Result<()> {
        let (reference, deadline) = (self.reference(number)?, Instant::now() + PATIENCE);
        let script = format!("echo begun; {}", noise::PROGRAM.join(" "));
        let wanted = format!("begun\n{}", noise::line(size(number)));
        loop {
            self.calls += 1;
            let id = format!("reader-{}", self.calls);
            let program = ["sh", "-c", &script];
            let mut command =
                self.node.containerd().container(&self.scene.network, "drover", &reference, &id, &program);
            let clock = Instant::now();
            let mut child = command.spawn().context("cannot start ctr")?;
            let victim = kill.map(|kill| kill.victim);
            if let Some(kill) = kill.take() {
                self.kill(kill)?;
            }
            let ended = end(&mut child);
            let output = child.wait_with_output()?;
            ended?;
            let (printed, why) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            if printed.trim_end() == wanted {
                if victim.is_none() {
                    self.took.insert(deed, clock.elapsed());
                }
                // Whoever died meanwhile may have been asked to remove it.
                if !output.status.success() {
                    self.forget(&id);
                }
                return Ok(());
            }
            self.forget(&id);
            let may_fail = match victim {
                Some(Victim::Containerd) => true,
                Some(Victim::Reload) => !printed.starts_with("begun") && self.reload_took_long(),
                _ => !printed.starts_with("begun"),
            };
            ensure!(may_fail, "a container read {printed:?} instead of {wanted:?}: {why}\n{}", self.log());
            ensure!(Instant::now() < deadline, "no container of {reference} begins: {why}\n{}", self.log());
            *self.repeated.entry(deed).or_default() += 1;
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Removes what a client that failed has left of its container.
    fn forget(&self, id: &str) {
        for arguments in [
            &["task", "rm", "--force", id][..],
            &["container", "rm", id],
            &["snapshot", "--snapshotter", "drover", "rm", id],
        ] {
            let _ = run(&mut self.ctr(arguments));
        }
    }

    /// A build step: a writable snapshot of the image is changed and committed.
    fn commit(&mut self, kill: Option<Kill>, number: u64, image: &Image) -> Result<()> {
        let (parent, name) = (image.chain_id()?, step(number));
        let target = self.folder.join("step");
        fs::create_dir_all(&target)?;
        self.calls += 1;
        let key = format!("key-{}", self.calls);
        let there = |stage: &Self, name: &str| {
            Ok(run(&mut stage.ctr(&["snapshot", "--snapshotter", "drover", "info", name])).is_ok())
        };
        // The kill comes in one of the two calls; that of containerd in the first. It has a snapshotter commit before its own transaction
        // ends: killed between the two, it names a key for good that no snapshotter has any more.
        let (early, late) = match kill {
            Some(kill) if kill.share.is_multiple_of(2) || kill.victim == Victim::Containerd => (Some(kill), None),
            kill => (None, kill),
        };
        // A call whose answer was lost is found done by its repetition, which fails.
        let prepare = |stage: &Self| {
            let snapshot = "ctr snapshot --snapshotter drover";
            stage.shell(&format!("{snapshot} info {key} >/dev/null 2>&1 || {snapshot} prepare {key} {parent}"))
        };
        self.act(Deed::Commit, early, prepare, |stage| there(stage, &key))?;
        let mounts = run(&mut self.ctr(&["snapshot", "--snapshotter", "drover", "mounts", text(&target)?, &key]))?;
        run(Command::new("sh").args(["-c", &mounts]))?;
        let written = fs::write(target.join("built"), &name);
        run(Command::new("umount").arg(&target))?;
        written?;
        let commit = |stage: &Self| {
            let snapshot = "ctr snapshot --snapshotter drover";
            stage.shell(&format!("{snapshot} info {name} >/dev/null 2>&1 || {snapshot} commit {name} {key}"))
        };
        self.act(Deed::Commit, late, commit, |stage| there(stage, &name))
    }

    /// A line for the shell in which `ctr` is this containerd's.
    fn shell(&self, line: &str) -> Result<Command> {
        let ctr = self.ctr(&[]);
        let mut words = vec![text(Path::new(ctr.get_program()))?.to_owned()];
        for word in ctr.get_args() {
            words.push(text(Path::new(word))?.to_owned());
        }
        let mut command = Command::new("sh");
        let ctr_envs: Vec<_> = ctr.get_envs().filter_map(|(key, value)| Some((key, value?))).collect();
        command.envs(ctr_envs).args(["-c", &line.replace("ctr ", &format!("{} ", words.join(" ")))]);
        Ok(command)
    }

    fn remove(&mut self, kill: Option<Kill>, number: u64) -> Result<()> {
        let (name, reference) = (step(number), self.reference(number)?);
        let (early, late) = match kill {
            Some(kill) if kill.share.is_multiple_of(2) => (Some(kill), None),
            kill => (None, kill),
        };
        // A call whose answer was lost is found done by its repetition, which fails.
        let snapshot = "ctr snapshot --snapshotter drover";
        let removal =
            |stage: &Self| stage.shell(&format!("! {snapshot} info {name} >/dev/null || {snapshot} rm {name}"));
        let is_gone = |stage: &Self| {
            let list = run(&mut stage.ctr(&["snapshot", "--snapshotter", "drover", "ls"]))?;
            Ok(list.lines().all(|line| line.split_whitespace().next() != Some(&name)))
        };
        self.act(Deed::Remove, early, removal, is_gone)?;
        self.act(Deed::Remove, late, |stage| Ok(stage.ctr(&["image", "rm", "--sync", &reference])), |_| Ok(true))
    }

    /// Everything that is committed is what the image holds, all names and attributes included: the host looks at every image that is
    /// there, with the build step on it.
    fn check(&self, newest: u64) -> Result<()> {
        let target = self.folder.join("seen");
        fs::create_dir_all(&target)?;
        for number in (newest + 1).saturating_sub(IMAGES)..=newest {
            let name = step(number);
            let snapshot = |arguments: &[&str]| run(self.ctr(&["snapshot", "--snapshotter", "drover"]).args(arguments));
            let mounts = snapshot(&["prepare", "--target", text(&target)?, "look", &name])?;
            run(Command::new("sh").args(["-c", &mounts]))?;
            let seen = self.unpack(number).and_then(|(unpacked, began)| compare_unpacked(&unpacked, &target, began));
            let built = fs::read_to_string(target.join("built"));
            run(Command::new("umount").arg(&target))?;
            snapshot(&["rm", "look"])?;
            ensure!(built? == name, "the build step of image {number} is not what was committed");
            let mut differences = seen?.differences;
            // The build step's own, and its folder's time.
            differences.retain(|difference| !difference.starts_with("/built:") && !difference.starts_with("/: mtime"));
            ensure!(differences.is_empty(), "image {number} is not what was pushed: {differences:#?}\n{}", self.log());
        }
        Ok(())
    }

    /// What image `number` holds, unpacked without Drover or containerd, and when that began.
    fn unpack(&self, number: u64) -> Result<(PathBuf, SystemTime)> {
        let (folder, began) = (self.folder.join(format!("unpacked-{number}")), SystemTime::now());
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        for layer in &self.image(number)?.layers {
            let mut tar = Command::new("tar");
            tar.args(["--extract", "--same-permissions", "--same-owner", "--numeric-owner", "--exclude=.wh.*"]);
            run(tar.arg("--directory").arg(&folder).arg("--file").arg(&layer.path))?;
        }
        Ok((folder, began))
    }

    /// Removes the images that are there, and looks that nothing is left of them at the node.
    fn remove_all(&mut self, newest: u64) -> Result<()> {
        for number in (newest + 1).saturating_sub(IMAGES)..=newest {
            self.remove(None, number)?;
        }
        // A call that died with containerd keeps what it had for a day, by its lease.
        let leases = run(&mut self.ctr(&["leases", "ls", "-q"]))?;
        let leases: Vec<_> = leases.split_whitespace().collect();
        if !leases.is_empty() {
            run(self.ctr(&["leases", "rm", "--sync"]).args(leases))?;
        }
        let snapshots = || run(&mut self.ctr(&["snapshot", "--snapshotter", "drover", "ls"])).unwrap_or_default();
        wait_for("containerd has no snapshots", PATIENCE, || snapshots().lines().count() <= 1)
            .with_context(snapshots)?;
        wait_until_empty(&self.node, LEFT)?;
        let root = self.node.snapshotter()?.root();
        for folder in ["m", "images", "layers", "incoming", "snapshots"] {
            let folder = root.join(folder);
            let names = || -> Vec<_> {
                fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect()
            };
            wait_for("nothing is left", PATIENCE, || names().is_empty())
                .with_context(|| format!("{}: {:?}\n{}", folder.display(), names(), self.log()))?;
        }
        let mounts = || {
            let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            let below = format!("{}/", root.display());
            table.lines().filter(|line| line.contains(&below)).map(str::to_owned).collect::<Vec<_>>()
        };
        // The connection itself stays.
        wait_for("no mount is left", PATIENCE, || mounts().len() == 1).with_context(|| format!("{:#?}", mounts()))?;
        Ok(())
    }

    /// How many files each process of ours has open, when the processes that mount are gone.
    fn open_files(&self) -> Result<BTreeMap<String, usize>> {
        let pair = self.node.snapshotter()?.pair(|_| true)?;
        let ours = || processes_of(&self.scene.tools.snapshotter);
        wait_for("only keeper and daemon are there", PATIENCE, || ours().len() == 2)
            .with_context(|| format!("{pair:?}: {:?}", ours()))?;
        let mut open = BTreeMap::new();
        let seeder = self.scene.seeder.as_ref().context("no seeder")?.daemon().pid();
        for (name, pid) in [("keeper", pair.keeper), ("daemon", pair.daemon.context("no daemon")?), ("seeder", seeder)]
        {
            open.insert(name.to_owned(), own_files(pid));
        }
        println!("open files: {open:?}");
        Ok(open)
    }

    fn log(&self) -> String {
        self.node
            .snapshotter()
            .map(|snapshotter| {
                let lazy = snapshotter.status().map(|status| ordinary_layers(&status));
                format!("{lazy:?}\n{}", snapshotter.daemon().log_tail())
            })
            .unwrap_or_default()
    }
}

/// Open files of this process alone; the daemon may be below the keeper, or the other way round.
fn own_files(pid: u32) -> usize {
    footprints(pid).first().map_or(0, |footprint| footprint.files)
}

/// Processes that run this program.
fn processes_of(program: &Path) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program)).collect()
}

/// Waits for a client's end, and kills it when it does not come.
fn end(client: &mut Child) -> Result<()> {
    let ended = wait_for("the client's call ends", PATIENCE, || !matches!(client.try_wait(), Ok(None)));
    if ended.is_err() {
        client.kill()?;
    }
    ended
}

/// Each image has its own, so that no two share their large layer.
fn size(number: u64) -> usize {
    SIZE + 4096 * number as usize
}

fn step(number: u64) -> String {
    format!("step-{number}")
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path is not UTF-8")
}
