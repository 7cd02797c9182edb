//! `drover-seeder ca`: the cluster's certificates.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use node::security::{Role, ca};

/// Commands on the authority.
#[derive(Subcommand)]
pub(crate) enum CaCommand {
    /// Make the cluster's authority: ca.crt, which every machine gets, and ca.key, which stays where it is.
    Init {
        /// Directory of the authority.
        #[arg(long)]
        dir: PathBuf,
        /// Common name of the authority.
        #[arg(long, default_value = "Drover cluster")]
        name: String,
        /// How long it is valid, like "10y".
        #[arg(long, default_value = "10y", value_parser = humantime)]
        validity: Duration,
    },
    /// Issue a machine's certificate: NAME.crt and NAME.key.
    Issue {
        /// Directory of the authority.
        #[arg(long)]
        dir: PathBuf,
        /// What the machine is: seeder or node.
        #[arg(long)]
        role: Role,
        /// Host name or IP address that others connect to; may be given several times. A seeder needs each that stands in a
        /// node's configuration.
        #[arg(long)]
        address: Vec<String>,
        /// How long it is valid, like "90days".
        #[arg(long, default_value = "1y", value_parser = humantime)]
        validity: Duration,
        /// Directory for the files; the authority's own where it is left out.
        #[arg(long)]
        out: Option<PathBuf>,
        /// The machine's name.
        name: String,
    },
}

/// Runs one of them.
pub(crate) fn run(command: CaCommand) -> anyhow::Result<()> {
    match command {
        CaCommand::Init { dir, name, validity } => {
            ca::init(&dir, &ca::AuthorityOptions { name, validity })?;
            println!("{}", dir.join(ca::AUTHORITY_CERTIFICATE).display());
        }
        CaCommand::Issue { dir, role, address, validity, out, name } => {
            if role == Role::Seeder && address.is_empty() {
                anyhow::bail!("a seeder's certificate needs at least one --address: what nodes connect to");
            }
            let options = ca::CertificateOptions { role, name, addresses: address, validity };
            let issued = ca::issue(&dir, out.as_deref().unwrap_or(&dir), &options)?;
            println!("{}\n{}", issued.certificate.display(), issued.key.display());
        }
    }
    Ok(())
}

fn humantime(text: &str) -> Result<Duration, String> {
    humantime_serde::re::humantime::parse_duration(text).map_err(|error| error.to_string())
}
