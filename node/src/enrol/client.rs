//! Gets the node its certificate and renews it in time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proto::drover::enrol::v1::Certificate;
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::CertificateDer;

use crate::security::token::{Token, TokenError};
use crate::security::{Identity, Role, ca};
use crate::seeder::{Client, SeederError};

/// Pause after a try that failed; it doubles up to one of those below.
const PAUSE: Duration = Duration::from_secs(1);
/// A node that waits for its first certificate should not wait long once a seeder is there.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// A renewal has a third of the certificate's validity, so a seeder that is away for days is not asked each minute.
const RENEWAL_PAUSE_MAX: Duration = Duration::from_secs(3600);
/// Longest sleep: clocks are set, machines sleep.
const SLEEP_MAX: Duration = Duration::from_secs(6 * 3600);

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The token cannot be had.
    #[error("cannot read a token from {path}: {reason}")]
    Token {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// No seeder gives one.
    #[error("{0}")]
    Seeder(#[from] SeederError),
    /// What came cannot be used.
    #[error("a seeder sent a certificate that cannot be used: {0}")]
    Unusable(&'static str),
    /// A key or a file cannot be made.
    #[error("{0}")]
    Own(#[from] ca::CaError),
}

/// Keeps the certificate of `identity` valid for as long as it is polled. Asks with `seeders`, which must have this identity. The file
/// `token` is read when there is no valid certificate.
pub async fn run(identity: Arc<Identity>, seeders: Client, token: PathBuf) {
    let mut failures = 0;
    loop {
        let now = identity.clock().now();
        let valid = identity.credentials().ok().map(|credentials| credentials.validity.clone());
        let valid = valid.filter(|valid| now < valid.end);
        let due = valid.as_ref().map_or(Duration::ZERO, |valid| due_in(valid.start, valid.end, now));
        if !due.is_zero() {
            failures = 0;
            tokio::time::sleep(due.min(SLEEP_MAX)).await;
            continue;
        }
        let done = match valid {
            Some(_) => renew(&identity, &seeders).await,
            None => enrol(&identity, &seeders, &token).await,
        };
        if let Err(error) = done {
            let pause_max = match valid.and_then(|valid| valid.end.duration_since(now).ok()) {
                Some(left) => {
                    tracing::warn!(%error, ?left, "cannot renew this node's certificate yet");
                    RENEWAL_PAUSE_MAX.min(left / 4).max(PAUSE)
                }
                None => {
                    tracing::error!(%error, "this node is not enrolled: seeders give it nothing");
                    PAUSE_MAX
                }
            };
            let pause = PAUSE.saturating_mul(1 << failures.min(12)).min(pause_max);
            failures += 1;
            tokio::time::sleep(jittered(pause)).await;
        }
    }
}

/// Gets a certificate for the token in the file `path`.
async fn enrol(identity: &Identity, seeders: &Client, path: &Path) -> Result<(), EnrolError> {
    let unreadable = |reason: String| EnrolError::Token { path: path.to_owned(), reason };
    let text = tokio::fs::read_to_string(path).await.map_err(|error| unreadable(error.to_string()))?;
    let token: Token = text.parse().map_err(|error: TokenError| unreadable(error.to_string()))?;
    let key = KeyPair::generate().map_err(ca::CaError::from)?;
    let certificate = seeders.enrol(&token, &request(&key)?, &own_name()).await?;
    take(identity, &key, certificate)?;
    tracing::info!("this node is enrolled");
    Ok(())
}

async fn renew(identity: &Identity, seeders: &Client) -> Result<(), EnrolError> {
    let key = KeyPair::generate().map_err(ca::CaError::from)?;
    let certificate = seeders.renew(&request(&key)?).await?;
    take(identity, &key, certificate)?;
    tracing::info!("this node's certificate is renewed");
    Ok(())
}

fn request(key: &KeyPair) -> Result<Vec<u8>, EnrolError> {
    let request = CertificateParams::default().serialize_request(key).map_err(ca::CaError::from)?;
    Ok(request.der().to_vec())
}

/// Writes what came to the files of `identity`: the authorities first, so that a crash in between leaves a certificate that is
/// believed.
fn take(identity: &Identity, key: &KeyPair, certificate: Certificate) -> Result<(), EnrolError> {
    let chain: Vec<_> = certificate.chain.into_iter().map(CertificateDer::from).collect();
    let authorities: Vec<_> = certificate.authorities.into_iter().map(CertificateDer::from).collect();
    let leaf = chain.first().and_then(|leaf| webpki::EndEntityCert::try_from(leaf).ok());
    if leaf.and_then(|leaf| Role::of(&leaf)) != Some(Role::Node) {
        return Err(EnrolError::Unusable("it is not a node's"));
    }
    if authorities.is_empty() {
        return Err(EnrolError::Unusable("it comes without authorities"));
    }
    let files = identity.files();
    ca::replace(&files.ca, &ca::pem_chain(&authorities), 0o644)?;
    ca::replace(&files.certificate, &(ca::pem_chain(&chain) + &key.serialize_pem()), 0o600)?;
    identity.look_now();
    Ok(())
}

/// Until two thirds of the way from the issue of a certificate that is valid from `start` to `end`.
fn due_in(start: SystemTime, end: SystemTime, now: SystemTime) -> Duration {
    // One from a version that took less care of clocks, for a short time, was issued later than it began, and earlier than this.
    let issued = Some(start + ca::CLOCK_SKEW).filter(|issued| *issued < end).unwrap_or(start);
    let whole = end.duration_since(issued).unwrap_or_default();
    (issued + whole * 2 / 3).duration_since(now).unwrap_or_default()
}

/// The machine's name, with what no certificate takes left out.
fn own_name() -> String {
    let uname = rustix::system::uname();
    let allowed = |c: &char| c.is_ascii_alphanumeric() || ".-_".contains(*c);
    let name: String = uname.nodename().to_string_lossy().chars().filter(allowed).take(100).collect();
    let name = name.trim_start_matches('.');
    if ca::is_name(name) { name.to_owned() } else { "node".to_owned() }
}

/// Between half of `pause` and all of it, so that a thousand nodes do not come at once.
fn jittered(pause: Duration) -> Duration {
    let mut random = [0; 2];
    // Without entropy there is no jitter.
    let _ = aws_lc_rs::rand::fill(&mut random);
    pause / 2 + pause / 2 * u32::from(u16::from_le_bytes(random)) / u32::from(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewals_are_due_after_two_thirds() {
        let issued = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let due = |validity: u64, at: u64| {
            let (start, end) = (issued - ca::CLOCK_SKEW, issued + Duration::from_secs(validity));
            due_in(start, end, issued + Duration::from_secs(at)).as_secs()
        };
        assert_eq!(due(900, 0), 600);
        assert_eq!(due(900, 500), 100);
        assert_eq!(due(900, 700), 0);
        let (start, end) = (issued - Duration::from_secs(3600), issued + Duration::from_secs(900));
        assert_eq!(due_in(start, end, issued + Duration::from_secs(100)), Duration::ZERO);
    }
}
