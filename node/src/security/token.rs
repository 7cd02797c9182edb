//! Tokens with which machines get their first certificate.
//!
//! A token is a secret of 256 bits, whose digest stands in a file of the authority's directory, with the fingerprint of the
//! authority: who has the token knows by that whom to give it to.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use layer::Digest;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::ca::{self, Authority, CaError};

/// Folder of the authority's directory with a file for each token. Removing a file ends its token.
pub const TOKENS: &str = "tokens";

const PREFIX: &str = "drover";
const ID_LEN: usize = 8;

/// A token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    id: String,
    secret: Digest,
    authority: Digest,
}

/// What the authority keeps of a token.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// SHA-256 of the secret.
    secret: String,
    /// Seconds since 1970.
    until: u64,
    /// Seconds for which certificates are valid.
    validity: u64,
}

/// Why a token gives nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is none.
    #[error("this is no token: make one with `drover-seeder ca token`")]
    Malformed,
    /// There is none with this id and secret; which of both is not said.
    #[error("this token is not known (any more): make one with `drover-seeder ca token`")]
    Unknown,
    /// It was good once.
    #[error("this token is too old: make one with `drover-seeder ca token`")]
    Expired,
}

/// Makes a token of the authority in `directory`, which is good for `lifetime`. Certificates that are given for it are valid for
/// `validity`.
pub fn create(directory: &Path, lifetime: Duration, validity: Duration) -> Result<Token, CaError> {
    let authority = fingerprint(Authority::open(directory)?.certificate());
    let folder = directory.join(TOKENS);
    std::fs::create_dir_all(&folder).map_err(|source| CaError::Io { path: folder.clone(), source })?;
    let mut random = [0; ID_LEN + 32];
    aws_lc_rs::rand::fill(&mut random)
        .map_err(|_| CaError::Io { path: folder.clone(), source: std::io::Error::other("no entropy") })?;
    let (id, secret) = random.split_at(ID_LEN);
    let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    // Not a digest of anything, but 32 bytes all the same.
    let secret = Digest::of(secret);
    let record = Record {
        secret: Digest::of(secret.as_bytes()).hex(),
        until: now().saturating_add(lifetime).as_secs(),
        validity: validity.as_secs(),
    };
    let text = serde_json::to_string_pretty(&record).unwrap_or_default();
    ca::replace(&folder.join(&id), &text, 0o600)?;
    Ok(Token { id, secret, authority })
}

/// How long certificates shall be valid for who shows `token` to the authority in `directory`.
pub fn check(directory: &Path, token: &Token) -> Result<Duration, TokenError> {
    // The id is hexadecimal digits, so this is a file of the folder.
    let bytes = std::fs::read(directory.join(TOKENS).join(&token.id)).map_err(|_| TokenError::Unknown)?;
    let record: Record = serde_json::from_slice(&bytes).map_err(|_| TokenError::Unknown)?;
    let digest = Digest::of(token.secret.as_bytes()).hex();
    aws_lc_rs::constant_time::verify_slices_are_equal(digest.as_bytes(), record.secret.as_bytes())
        .map_err(|_| TokenError::Unknown)?;
    if now().as_secs() >= record.until {
        return Err(TokenError::Expired);
    }
    Ok(Duration::from_secs(record.validity))
}

/// SHA-256 of a certificate.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> Digest {
    Digest::of(certificate)
}

impl Token {
    /// Fingerprint of the authority that made it.
    pub const fn authority(&self) -> Digest {
        self.authority
    }

    /// Its name: the file in [`TOKENS`].
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// The whole token, secret included.
impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}-{}-{}-{}", self.id, self.secret.hex(), self.authority.hex())
    }
}

/// Without the secret.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("id", &self.id).finish_non_exhaustive()
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let mut parts = text.trim().split('-');
        let (Some(PREFIX), Some(id), Some(secret), Some(authority), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError::Malformed);
        };
        let digest = |hex: &str| Digest::from_hex(hex).map_err(|_| TokenError::Malformed);
        if id.len() != 2 * ID_LEN || !id.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
            return Err(TokenError::Malformed);
        }
        Ok(Self { id: id.to_owned(), secret: digest(secret)?, authority: digest(authority)? })
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_token_is_good_while_it_is_known_and_young() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        ca::init(directory, &ca::AuthorityOptions::default()).unwrap();
        let token = create(directory, HOUR, 24 * HOUR).unwrap();
        let read: Token = format!("{token}\n").parse().unwrap();
        assert_eq!(read, token);
        assert_eq!(check(directory, &read), Ok(24 * HOUR));
        assert_eq!(token.authority(), fingerprint(Authority::open(directory).unwrap().certificate()));
        assert!(!format!("{token:?}").contains(&token.secret.hex()));

        let old = create(directory, Duration::ZERO, HOUR).unwrap();
        assert_eq!(check(directory, &old), Err(TokenError::Expired));
        let forged = Token { secret: Digest::of(b"guess"), ..token.clone() };
        assert_eq!(check(directory, &forged), Err(TokenError::Unknown));
        std::fs::remove_file(directory.join(TOKENS).join(token.id())).unwrap();
        assert_eq!(check(directory, &token), Err(TokenError::Unknown));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let zeros = "0".repeat(64);
        for text in [
            String::new(),
            "drover".to_owned(),
            format!("drover-../../etc/x-{zeros}-{zeros}"),
            format!("drover-0123456789abcdef-{zeros}-{zeros}-"),
            format!("drover-0123456789abcdef-{zeros}"),
            format!("Drover-0123456789abcdef-{zeros}-{zeros}"),
        ] {
            assert_eq!(text.parse::<Token>(), Err(TokenError::Malformed), "{text}");
        }
    }
}
