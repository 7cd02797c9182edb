//! The seeder: ingests blobs from registries and serves their indexes and chunks to nodes.
//!
//! - [`config`]: the configuration file.
//! - [`serve`]: the daemon.
//! - [`ingest`]: an image made known ahead.
//! - [`authority`]: the cluster's certificates.
//! - [`status`]: what the store holds.

mod authority;
mod config;
mod ingest;
mod serve;
mod status;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::Config;

/// Drover's seeder: ingests container image layers and serves them to nodes.
#[derive(Parser)]
#[command(name = "drover-seeder", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon.
    Serve(ConfigArgs),
    /// Ingest images ahead, through the daemon where one runs on the store.
    Ingest(ingest::IngestArgs),
    /// Make the cluster's certificates.
    #[command(subcommand)]
    Ca(authority::CaCommand),
    /// Show the layers in the store.
    Status(ConfigArgs),
}

#[derive(Args)]
struct ConfigArgs {
    /// The configuration file.
    #[arg(long, default_value = "/etc/drover/seeder.toml")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => load(&args, "info").and_then(serve::run),
        Command::Ingest(args) => load(&args.config, "warn").and_then(|config| ingest::run(config, &args)),
        Command::Ca(command) => authority::run(command),
        Command::Status(args) => load(&args, "warn").and_then(|config| status::run(&config)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("drover-seeder: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Reads the configuration and starts the log: `DROVER_LOG`, else the configuration's level, else `default`.
fn load(args: &ConfigArgs, default: &str) -> anyhow::Result<Config> {
    let config: Config = node::config::load(&args.config)?;
    let filter = match std::env::var("DROVER_LOG") {
        Ok(text) => EnvFilter::try_new(text)?,
        Err(_) => EnvFilter::try_new(config.log.as_deref().unwrap_or(default))?,
    };
    let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(is_terminal).with_writer(std::io::stderr).init();
    Ok(config)
}
