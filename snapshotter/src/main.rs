//! The snapshotter's command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use bytesize::ByteSize;
use clap::{Parser, Subcommand};
use node::registry::image::Platform;
use proto::drover::node::v1::CompleteProgress;
use snapshotter::config::{Config, DEFAULT_PATH};
use snapshotter::daemon::{self, Handed};
use snapshotter::drain::{self, Drain};
use snapshotter::keeper::{self, DaemonSide, KeeperOptions};
use snapshotter::mount::helper;
use snapshotter::pull::progress::Progress;
use snapshotter::pull::{self, Pull};
use snapshotter::status::render::render;
use snapshotter::status::{client, metrics};
use snapshotter::uninstall;
use tokio::signal::unix::{SignalKind, signal};

/// How long an orderly stop waits for the daemon before it is killed; longer than the daemon itself waits.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Drover's containerd snapshotter: containers start before their images have arrived.
#[derive(Parser)]
#[command(name = "drover-snapshotter", version)]
struct Arguments {
    /// Configuration file.
    #[arg(long, global = true, default_value = DEFAULT_PATH, value_name = "FILE")]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve containerd until told to stop. SIGHUP loads a new binary while containers go on.
    Serve,
    /// Say of each image what is here, what is elsewhere, and why a layer is not lazy.
    Status {
        /// A line for each layer.
        #[arg(long)]
        layers: bool,
        /// Figures in Prometheus' text format instead.
        #[arg(long, conflicts_with = "layers")]
        metrics: bool,
    },
    /// Compare all chunks on this node's disk with their digests at once, which the daemon otherwise does slowly, once a day. Damaged
    /// ones are fetched again.
    Scrub,
    /// Pull an image lazily, whatever client and version of containerd runs it later. For `ctr` of containerd 1.6 and 1.7 and for
    /// `ctr image pull --local`, which fetch every layer before they ask for a snapshot.
    Pull {
        /// Image reference, like docker.io/library/debian:13. Credentials and registries are those of the configuration file.
        #[arg(value_name = "REF")]
        reference: String,
        /// Containerd's namespace; Kubernetes uses k8s.io.
        #[arg(long, short, default_value = "default")]
        namespace: String,
        /// Containerd's socket, if not that of the configuration file.
        #[arg(long, short, value_name = "SOCKET")]
        address: Option<PathBuf>,
        /// Name of Drover in containerd's proxy_plugins.
        #[arg(long, default_value = "drover")]
        snapshotter: String,
        /// Which image of an index, like linux/arm64; this machine's by default.
        #[arg(long, value_name = "linux/ARCH[/VARIANT]")]
        platform: Option<Platform>,
        /// Wait until the whole image is on this node, and fetch it without delay: for images that are pulled ahead of their use.
        #[arg(long)]
        complete: bool,
    },
    /// Take the node back to containerd's own snapshotters: from now on containerd unpacks what is pulled, and what is here in part is
    /// fetched whole. Says what still uses Drover, and whether it may be stopped.
    Drain {
        /// Make layers lazy again.
        #[arg(long)]
        undo: bool,
    },
    /// Remove the mounts and files of a daemon that was stopped, if containerd has no snapshot left. Says what to remove by hand.
    Uninstall,
    /// The daemon, started by the keeper.
    #[command(hide = true)]
    Daemon,
    /// A keeper, started by the daemon of one that died.
    #[command(hide = true)]
    Keeper,
    /// The process that mounts on FUSE files.
    #[command(hide = true, name = helper::SUBCOMMAND)]
    MountErofs,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("drover-snapshotter: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command {
        Command::MountErofs => Ok(helper::serve()?),
        command => {
            let config = Config::load(&arguments.config)?;
            let options = keeper_options(&config, &arguments.config);
            match command {
                Command::Serve => {
                    log(&config)?;
                    Ok(keeper::serve(&options)?)
                }
                Command::Keeper => {
                    log(&config)?;
                    Ok(keeper::adopt(&options)?)
                }
                Command::Daemon => run_daemon(&config, &options),
                Command::Status { layers, metrics } => run_status(&config, layers, metrics),
                Command::Scrub => run_scrub(&config),
                Command::Drain { undo } => run_drain(&config, undo),
                Command::Uninstall => run_uninstall(&config),
                Command::Pull { reference, namespace, address, snapshotter, platform, complete } => {
                    let socket = address.unwrap_or_else(|| config.containerd.socket.clone());
                    let pull = Pull { reference, namespace, socket, snapshotter, platform };
                    run_pull(&config, &pull, complete)
                }
                Command::MountErofs => Ok(()),
            }
        }
    }
}

fn keeper_options(config: &Config, path: &std::path::Path) -> KeeperOptions {
    let again = |command: &str| vec![OsString::from("--config"), path.into(), OsString::from(command)];
    KeeperOptions {
        runtime_directory: config.run.clone(),
        mount_point: config.devices(),
        socket: config.socket(),
        keeper_arguments: again("keeper"),
        daemon_arguments: again("daemon"),
        stop_timeout: STOP_TIMEOUT,
    }
}

fn log(config: &Config) -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_new(&config.log).context("key log of the configuration")?)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    Ok(())
}

fn run_daemon(config: &Config, options: &KeeperOptions) -> anyhow::Result<()> {
    let side = DaemonSide::receive(options)?;
    log(config)?;
    let handed = Handed {
        fuse: side.fuse()?,
        listener: side.listener()?,
        adopted: side.adopted(),
        // Not its path: an upgrade may have put another binary there.
        program: "/proc/self/exe".into(),
    };
    let runtime = daemon::runtime()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let stop = async move {
            terminate.recv().await;
        };
        let ready = || {
            side.ready();
            Ok(())
        };
        daemon::serve(config, handed, ready, stop).await
    })?;
    // Blocking work of a cancelled call must not hold the stop up.
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(())
}

fn run_pull(config: &Config, pull: &Pull, complete: bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let progress = Progress::new();
    let pulled = runtime.block_on(pull::pull(pull, &config.registry, &progress))?;
    if complete && !pulled.lazy.is_empty() {
        let (socket, shown) = (config.socket(), progress.whole());
        let show = |at: &CompleteProgress| shown.here(at.bytes_here, at.device_size);
        let completed = runtime.block_on(client::complete(&socket, &pulled.lazy, show));
        completed.with_context(|| format!("{} was pulled, but is not here whole", pulled.name))?;
        shown.done("all here");
    }
    println!("{}: {} of {} layers lazy", pulled.name, pulled.lazy.len(), pulled.layers);
    Ok(())
}

fn run_drain(config: &Config, undo: bool) -> anyhow::Result<()> {
    let mark = || format!("cannot note in {} whether the node is drained", config.root.display());
    Drain::of(&config.root).set(!undo).with_context(mark)?;
    if undo {
        println!("layers are lazy again");
        return Ok(());
    }
    println!("drained: containerd unpacks what is pulled from now on");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (socket, shown) = (config.socket(), Progress::new().whole());
    let show = |at: &CompleteProgress| shown.here(at.bytes_here, at.device_size);
    let completed = runtime.block_on(drain::complete(&socket, show));
    // Whether or not all is here, who uses what is worth knowing.
    let users = runtime.block_on(drain::users(&socket))?;
    if completed.as_ref().is_ok_and(|layers| *layers > 0) {
        shown.done("all here");
    }
    print!("{users}");
    completed.context("not all layers are here whole: containers that read the rest need the network")?;
    Ok(())
}

fn run_uninstall(config: &Config) -> anyhow::Result<()> {
    let left = uninstall::uninstall(config)?;
    println!("removed {} and {}", config.root.display(), config.run.display());
    for path in left {
        println!("{} is not Drover's and stays", path.display());
    }
    print!("{}", uninstall::BY_HAND);
    Ok(())
}

fn run_scrub(config: &Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let scrubbed = runtime.block_on(client::scrub(&config.socket()))?;
    println!("{} are as they were fetched", ByteSize::b(scrubbed.bytes).display().iec());
    if scrubbed.rotten_chunks > 0 {
        println!("{} chunks were damaged and are fetched again; look after the disk", scrubbed.rotten_chunks);
    }
    Ok(())
}

fn run_status(config: &Config, layers: bool, metrics: bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let status = runtime.block_on(client::status(&config.socket()))?;
    if metrics {
        print!("{}", metrics::metrics(&status));
        return Ok(());
    }
    print!("{}", render(&status, layers));
    if Drain::of(&config.root).is_on() {
        println!("\n{}: drover-snapshotter drain --undo ends that", drain::REASON);
    }
    Ok(())
}
