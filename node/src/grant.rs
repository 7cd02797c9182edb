//! Grants: tokens with which a machine of the cluster gets a layer (`docs/security.md`, "Grants").
//!
//! - [`issuer`]: a seeder asks the layer's registry with the asker's credentials, and signs.
//! - [`held`]: a node's own grants, got and renewed while it fetches.
//! - [`demand`]: whether who serves layers demands one, and what makes it good.

pub mod demand;
pub mod held;
pub mod issuer;

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderName, HeaderValue};
use layer::Digest;

use crate::security::{Signed, Signer, TrustError, Verifier};

pub use demand::Demand;
pub use held::Held;
pub use issuer::Issuer;

/// A grant in a request; in a refusal, that one is wanted.
pub const HEADER: HeaderName = HeaderName::from_static("drover-grant");
/// For how long a grant is good.
pub const VALIDITY: Duration = Duration::from_secs(60);
/// By how much the clocks of two machines may differ.
pub const CLOCK_SKEW: Duration = Duration::from_secs(30);
/// The most bytes of a token. Ours have about 1 KiB, most of it the seeder's certificate.
pub const TOKEN_BYTES_MAX: usize = 8 << 10;
/// The longest name of a registry or repository.
pub(crate) const NAME_BYTES_MAX: usize = 255;
/// What a grant's statement begins with. No other statement that seeders sign begins so.
const MAGIC: &[u8] = b"drover grant statement v1\n";

/// How far the layer was when the grant was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// It was known, and the registry has the same bytes.
    Whole,
    /// It was being read from the registry that the grant names: good only where that goes on.
    Ingest,
}

/// That the machine with a key may have a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Fingerprint of the holder's public key.
    pub key: Digest,
    /// Digest of the layer's blob.
    pub blob: Digest,
    /// Registry that was asked.
    pub registry: String,
    /// Repository in it that has the blob.
    pub repository: String,
    /// What for.
    pub stage: Stage,
    /// When it was made, in seconds since 1970 as all times of it.
    pub issued: u64,
    /// When it ends.
    pub expires: u64,
    /// When the registry last said that the holder may have it.
    pub confirmed: u64,
}

/// Why a layer is not given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// The request has none.
    #[error("layers are given only to who shows a grant (grants.mode is \"on\" at the seeder)")]
    None,
    /// The request came without a certificate.
    #[error("layers are given only to machines that show a certificate of the cluster and a grant")]
    Stranger,
    /// It is no grant.
    #[error("the grant cannot be read")]
    Unreadable,
    /// It is not signed by a seeder of this cluster.
    #[error("the grant is not signed by a seeder of this cluster ({0})")]
    Forged(String),
    /// It was given to somebody else.
    #[error("the grant was given to another machine")]
    OtherMachine,
    /// It is for something else.
    #[error("the grant is for another layer")]
    OtherLayer,
    /// It was made for the time of an ingest that is over, or that reads another registry.
    #[error("the grant was for the time of the layer's ingest")]
    OtherStage,
    /// It ended.
    #[error("the grant ended {0} s ago; a fresh one that seems to have ended means that clocks differ")]
    Ended(u64),
    /// It is not good yet.
    #[error("the grant begins in {0} s: the clocks of this machine and of the seeder differ")]
    Early(u64),
}

impl Grant {
    /// The grant with its signature.
    pub fn seal(&self, signer: &Signer) -> Result<Vec<u8>, TrustError> {
        let statement = self.statement();
        let signed = signer.sign(&statement)?;
        let mut token = (statement.len() as u32).to_le_bytes().to_vec();
        token.extend_from_slice(&statement);
        token.extend_from_slice(&signed.encode());
        Ok(token)
    }

    /// Reads a token, whose signature must be that of a seeder. Whether the grant is good for something is the caller's question.
    pub fn open(token: &[u8], verifier: &Verifier) -> Result<Self, GrantError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(GrantError::Unreadable);
        }
        let read = || {
            let (len, rest) = token.split_first_chunk::<4>()?;
            let (statement, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
            Some((statement, Self::parse(statement)?, Signed::parse(rest)?))
        };
        let (statement, grant, signed) = read().ok_or(GrantError::Unreadable)?;
        verifier.verify(statement, &signed).map_err(|error| match error {
            TrustError::Signature => GrantError::Forged("its signature is wrong".to_owned()),
            TrustError::Unsigned => GrantError::Forged("it has no signature".to_owned()),
            other => GrantError::Forged(other.to_string()),
        })?;
        Ok(grant)
    }

    /// Whether it is good at `now`.
    pub fn check_time(&self, now: SystemTime) -> Result<(), GrantError> {
        let (now, skew) = (seconds(now), CLOCK_SKEW.as_secs());
        if now >= self.expires.saturating_add(skew) {
            return Err(GrantError::Ended(now - self.expires));
        }
        if now.saturating_add(skew) < self.issued {
            return Err(GrantError::Early(self.issued - now));
        }
        Ok(())
    }

    fn statement(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(self.key.as_bytes());
        bytes.extend_from_slice(self.blob.as_bytes());
        for time in [self.issued, self.expires, self.confirmed] {
            bytes.extend_from_slice(&time.to_le_bytes());
        }
        bytes.push(match self.stage {
            Stage::Whole => 0,
            Stage::Ingest => 1,
        });
        bytes.extend_from_slice(&(self.registry.len() as u16).to_le_bytes());
        bytes.extend_from_slice(self.registry.as_bytes());
        bytes.extend_from_slice(self.repository.as_bytes());
        bytes
    }

    fn parse(statement: &[u8]) -> Option<Self> {
        let (key, rest) = statement.strip_prefix(MAGIC)?.split_first_chunk::<32>()?;
        let (blob, rest) = rest.split_first_chunk::<32>()?;
        let (issued, rest) = rest.split_first_chunk::<8>()?;
        let (expires, rest) = rest.split_first_chunk::<8>()?;
        let (confirmed, rest) = rest.split_first_chunk::<8>()?;
        let (stage, rest) = rest.split_first()?;
        let (registry_len, rest) = rest.split_first_chunk::<2>()?;
        let (registry, repository) = rest.split_at_checked(u16::from_le_bytes(*registry_len).into())?;
        let name = |bytes: &[u8]| {
            let name = std::str::from_utf8(bytes).ok().filter(|name| name.len() <= NAME_BYTES_MAX)?;
            Some(name.to_owned())
        };
        Some(Self {
            key: Digest::from_bytes(*key),
            blob: Digest::from_bytes(*blob),
            registry: name(registry)?,
            repository: name(repository)?,
            stage: match stage {
                0 => Stage::Whole,
                1 => Stage::Ingest,
                _ => return None,
            },
            issued: u64::from_le_bytes(*issued),
            expires: u64::from_le_bytes(*expires),
            confirmed: u64::from_le_bytes(*confirmed),
        })
    }
}

/// A token as it stands in a header.
pub(crate) fn to_header(token: &[u8]) -> Option<HeaderValue> {
    let text = (token.len() <= TOKEN_BYTES_MAX).then(|| URL_SAFE_NO_PAD.encode(token))?;
    let mut value = HeaderValue::from_str(&text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn of_header(value: &HeaderValue) -> Option<Vec<u8>> {
    let text = Some(value.as_bytes()).filter(|text| text.len() <= TOKEN_BYTES_MAX.div_ceil(3) * 4)?;
    URL_SAFE_NO_PAD.decode(text).ok()
}

pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
