//! `drover-seeder ca`: the cluster's certificates.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use node::security::{Role, ca, token};

/// Nodes renew after two thirds of that; shorter, and a seeder's restart may take too long.
const VALIDITY_MIN: Duration = Duration::from_secs(600);

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
        /// Replace the files of an earlier certificate. Daemons take the new one by themselves.
        #[arg(long)]
        replace: bool,
        /// The machine's name.
        name: String,
    },
    /// Make a token, with which nodes get certificates from a seeder that has this authority (enrol.authority).
    Token {
        /// Directory of the authority.
        #[arg(long)]
        dir: PathBuf,
        /// How long nodes can be enrolled with it, like "1h". Removing its file in the folder "tokens" ends it at once.
        #[arg(long, default_value = "1day", value_parser = humantime)]
        lifetime: Duration,
        /// How long the nodes' certificates are valid; nodes renew them after two thirds of that.
        #[arg(long, default_value = "30days", value_parser = humantime)]
        validity: Duration,
    },
    /// Begin to replace the authority: from now on a new key issues certificates, and both authorities are believed.
    Rotate {
        /// Directory of the authority.
        #[arg(long)]
        dir: PathBuf,
        /// How long the new one is valid.
        #[arg(long, default_value = "10y", value_parser = humantime)]
        validity: Duration,
    },
    /// End the replacement: the old authority is not believed any more, once its machines have renewed.
    Retire {
        /// Directory of the authority.
        #[arg(long)]
        dir: PathBuf,
    },
}

/// Runs one of them.
pub(crate) fn run(command: CaCommand) -> anyhow::Result<()> {
    match command {
        CaCommand::Init { dir, name, validity } => {
            ca::init(&dir, &ca::AuthorityOptions { name, validity })?;
            println!("{}", dir.join(ca::AUTHORITY_CERTIFICATE).display());
        }
        CaCommand::Issue { dir, role, address, validity, out, replace, name } => {
            if role == Role::Seeder && address.is_empty() {
                anyhow::bail!("a seeder's certificate needs at least one --address: what nodes connect to");
            }
            let options = ca::CertificateOptions { role, name, addresses: address, validity };
            let issued = ca::issue(&dir, out.as_deref().unwrap_or(&dir), &options, replace)?;
            println!("{}\n{}", issued.certificate.display(), issued.key.display());
        }
        CaCommand::Token { validity, .. } if validity < VALIDITY_MIN => {
            anyhow::bail!("--validity is at least {} minutes", VALIDITY_MIN.as_secs() / 60);
        }
        CaCommand::Token { dir, lifetime, validity } => println!("{}", token::create(&dir, lifetime, validity)?),
        CaCommand::Rotate { dir, validity } => ca::rotate(&dir, validity)?,
        CaCommand::Retire { dir } => ca::retire(&dir)?,
    }
    Ok(())
}

fn humantime(text: &str) -> Result<Duration, String> {
    humantime_serde::re::humantime::parse_duration(text).map_err(|error| error.to_string())
}
