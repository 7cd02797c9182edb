//! The cluster's certificate authority: a directory with one key and one certificate, and the certificates that it
//! issues. ECDSA P-256 throughout, for which every TLS library has fast code.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};

use super::Role;

/// The authority's certificate in its directory; every machine gets a copy.
pub const AUTHORITY_CERTIFICATE: &str = "ca.crt";
/// The authority's private key in its directory; it never leaves it.
pub const AUTHORITY_KEY: &str = "ca.key";

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How long an authority is valid unless said otherwise: ten years, the life of a cluster.
pub const AUTHORITY_VALIDITY: Duration = DAY.saturating_mul(3650);
/// How long a certificate is valid unless said otherwise: one year. There is no revocation, so where certificates are
/// renewed by a program, weeks are better.
pub const CERTIFICATE_VALIDITY: Duration = DAY.saturating_mul(365);
/// Certificates are valid from an hour ago on, for machines whose clock is behind.
const CLOCK_SKEW: Duration = Duration::from_secs(60 * 60);

/// Why the authority cannot do it.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file is there already; nothing was changed.
    #[error("{0} exists already; it is not overwritten")]
    Exists(PathBuf),
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A name cannot stand in a certificate and in a file name.
    #[error("{0:?} cannot be a name: want letters, digits, '.', '-' and '_', at most 200")]
    Name(String),
    /// The certificate cannot be made.
    #[error("cannot make the certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// How to make an authority.
#[derive(Clone, Debug)]
pub struct AuthorityOptions {
    /// Its common name, for people.
    pub name: String,
    /// How long it is valid.
    pub validity: Duration,
}

impl Default for AuthorityOptions {
    fn default() -> Self {
        Self { name: "Drover cluster".to_owned(), validity: AUTHORITY_VALIDITY }
    }
}

/// How to make a certificate.
#[derive(Clone, Debug)]
pub struct CertificateOptions {
    /// What the machine may do.
    pub role: Role,
    /// The machine's name, in the role's URI and in the file names.
    pub name: String,
    /// Host names and IP addresses that others connect to. A seeder needs those that stand in the nodes'
    /// configurations.
    pub addresses: Vec<String>,
    /// How long it is valid.
    pub validity: Duration,
}

/// Where [`issue`] wrote.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Makes an authority in `directory`, which is created where it is missing.
pub fn init(directory: &Path, options: &AuthorityOptions) -> Result<(), CaError> {
    fs::create_dir_all(directory).map_err(|source| CaError::Io { path: directory.to_owned(), source })?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, options.name.as_str());
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, options.validity);
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    create(&directory.join(AUTHORITY_KEY), &key.serialize_pem(), 0o600)?;
    create(&directory.join(AUTHORITY_CERTIFICATE), &certificate.pem(), 0o644)
}

/// Issues a certificate of the authority in `directory` as `NAME.crt` and `NAME.key` in `out`.
pub fn issue(directory: &Path, out: &Path, options: &CertificateOptions) -> Result<Issued, CaError> {
    let name = options.name.as_str();
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    if name.is_empty() || name.len() > 200 || name.starts_with('.') || !name.chars().all(allowed) {
        return Err(CaError::Name(options.name.clone()));
    }
    let authority_key = KeyPair::from_pem(&read(&directory.join(AUTHORITY_KEY))?)?;
    let issuer = Issuer::from_ca_cert_pem(&read(&directory.join(AUTHORITY_CERTIFICATE))?, authority_key)?;

    let mut params = CertificateParams::new(options.addresses.clone())?;
    params.subject_alt_names.push(SanType::URI(format!("drover://{}/{name}", options.role).try_into()?));
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Nodes serve each other too, so both roles are servers and clients; the role's URI says the rest.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, options.validity);
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;

    fs::create_dir_all(out).map_err(|source| CaError::Io { path: out.to_owned(), source })?;
    let issued = Issued { certificate: out.join(format!("{name}.crt")), key: out.join(format!("{name}.key")) };
    create(&issued.key, &key.serialize_pem(), 0o600)?;
    create(&issued.certificate, &certificate.pem(), 0o644)?;
    Ok(issued)
}

fn set_validity(params: &mut CertificateParams, validity: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + validity).into();
}

fn read(path: &Path) -> Result<String, CaError> {
    fs::read_to_string(path).map_err(|source| CaError::Io { path: path.to_owned(), source })
}

fn create(path: &Path, text: &str, mode: u32) -> Result<(), CaError> {
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => CaError::Exists(path.to_owned()),
        _ => CaError::Io { path: path.to_owned(), source },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_are_private_and_nothing_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path(), &AuthorityOptions::default()).unwrap();
        assert!(matches!(init(directory.path(), &AuthorityOptions::default()), Err(CaError::Exists(_))));
        let mode = fs::metadata(directory.path().join(AUTHORITY_KEY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn names_stay_inside_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path(), &AuthorityOptions::default()).unwrap();
        for name in ["", "../x", "a/b", ".x", "a b", "\u{e9}"] {
            let options = CertificateOptions {
                role: Role::Node,
                name: name.to_owned(),
                addresses: Vec::new(),
                validity: CERTIFICATE_VALIDITY,
            };
            assert!(
                matches!(issue(directory.path(), directory.path(), &options), Err(CaError::Name(_))),
                "{name:?} was taken"
            );
        }
    }
}
