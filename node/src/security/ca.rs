//! The cluster's certificate authority: a directory with one key and its certificate, and the certificates that it
//! issues. ECDSA P-256 throughout, for which every TLS library has fast code.
//!
//! An authority is replaced without a pause ([`rotate`], then [`retire`]): the new one's certificate is signed by the old one
//! too, and goes with every certificate that is issued from then on. So machines that know only the old authority believe
//! what the new one issues, and learn the new one when their own certificates are renewed.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use base64::Engine;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::Role;

/// The authority's certificate in its directory; every machine gets a copy. Two while the authority is being replaced.
pub const AUTHORITY_CERTIFICATE: &str = "ca.crt";
/// The authority's private key in its directory; it never leaves it. It says which certificate is the authority's.
pub const AUTHORITY_KEY: &str = "ca.key";
/// The authority's certificate as signed by the one before, while that is being replaced.
const CROSS_CERTIFICATE: &str = "ca.cross.crt";

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How long an authority is valid unless said otherwise: ten years, the life of a cluster.
pub const AUTHORITY_VALIDITY: Duration = DAY.saturating_mul(3650);
/// How long a certificate is valid unless said otherwise: one year. There is no revocation, so where certificates are
/// renewed by a program, weeks are better.
pub const CERTIFICATE_VALIDITY: Duration = DAY.saturating_mul(365);
/// Certificates are valid from two hours ago on, for machines whose clock is behind: an hour, as one that takes its local time for
/// UTC, and what such clocks are off besides.
pub(crate) const CLOCK_SKEW: Duration = Duration::from_secs(2 * 60 * 60);
/// Longest name of a machine: it stands in a file name.
const NAME_LEN_MAX: usize = 200;

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
    /// The directory holds no certificate of the key.
    #[error("{0} holds no certificate of the key beside it")]
    Mismatch(PathBuf),
    /// The authority is being replaced already.
    #[error("{0} holds two authorities: end the last replacement with `drover-seeder ca retire` first")]
    Rotating(PathBuf),
    /// The authority may not sign another.
    #[error("{0} was made by a version whose authorities cannot sign their successor: make a new authority")]
    CannotSucceed(PathBuf),
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

/// An authority that is about to issue certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    cross: Option<CertificateDer<'static>>,
    own: CertificateDer<'static>,
    all: Vec<CertificateDer<'static>>,
}

/// Makes an authority in `directory`, which is created where it is missing.
pub fn init(directory: &Path, options: &AuthorityOptions) -> Result<(), CaError> {
    fs::create_dir_all(directory).map_err(|source| CaError::Io { path: directory.to_owned(), source })?;
    let params = authority_params(&options.name, options.validity);
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    create(&directory.join(AUTHORITY_KEY), &key.serialize_pem(), 0o600)?;
    create(&directory.join(AUTHORITY_CERTIFICATE), &certificate.pem(), 0o644)
}

/// Begins to replace the authority in `directory`: makes a new key, with which everything is issued from now on. The old
/// authority stays believed until [`retire`].
pub fn rotate(directory: &Path, validity: Duration) -> Result<(), CaError> {
    let old = Authority::open(directory)?;
    if old.all.len() > 1 {
        return Err(CaError::Rotating(directory.to_owned()));
    }
    let (_, parsed) = X509Certificate::from_der(&old.own).map_err(|_| CaError::Mismatch(directory.to_owned()))?;
    let depth = parsed.basic_constraints().ok().flatten().and_then(|constraints| constraints.value.path_len_constraint);
    if depth == Some(0) {
        return Err(CaError::CannotSucceed(directory.to_owned()));
    }
    let name =
        parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok()).unwrap_or("Drover cluster");
    let params = authority_params(&successor(name), validity);
    let key = KeyPair::generate()?;
    let own = params.self_signed(&key)?;
    let cross = params.signed_by(&key, &old.issuer)?;
    // The key comes last: until then nothing has changed but that one more authority is believed.
    let both = pem("CERTIFICATE", own.der()) + &pem("CERTIFICATE", &old.own);
    replace(&directory.join(AUTHORITY_CERTIFICATE), &both, 0o644)?;
    replace(&directory.join(CROSS_CERTIFICATE), &cross.pem(), 0o644)?;
    replace(&directory.join(AUTHORITY_KEY), &key.serialize_pem(), 0o600)
}

/// Ends a replacement: the old authority is not believed any more by machines that get `ca.crt` or renew from now on.
pub fn retire(directory: &Path) -> Result<(), CaError> {
    let authority = Authority::open(directory)?;
    replace(&directory.join(AUTHORITY_CERTIFICATE), &pem("CERTIFICATE", &authority.own), 0o644)?;
    let cross = directory.join(CROSS_CERTIFICATE);
    match fs::remove_file(&cross) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(CaError::Io { path: cross, source }),
        _ => Ok(()),
    }
}

/// Issues a certificate of the authority in `directory` as `NAME.crt` and `NAME.key` in `out`. Files that are there are left
/// alone unless `may_replace`.
pub fn issue(directory: &Path, out: &Path, options: &CertificateOptions, may_replace: bool) -> Result<Issued, CaError> {
    let authority = Authority::open(directory)?;
    let key = KeyPair::generate()?;
    let chain = authority.sign(options, &key)?;
    fs::create_dir_all(out).map_err(|source| CaError::Io { path: out.to_owned(), source })?;
    let name = &options.name;
    let issued = Issued { certificate: out.join(format!("{name}.crt")), key: out.join(format!("{name}.key")) };
    let write = if may_replace { replace } else { create };
    write(&issued.key, &key.serialize_pem(), 0o600)?;
    write(&issued.certificate, &pem_chain(&chain), 0o644)?;
    Ok(issued)
}

impl Authority {
    /// Reads the authority in `directory`.
    pub fn open(directory: &Path) -> Result<Self, CaError> {
        let key = KeyPair::from_pem(&read(&directory.join(AUTHORITY_KEY))?)?;
        let path = directory.join(AUTHORITY_CERTIFICATE);
        let all = certificates(&path)?;
        let is_own = |certificate: &CertificateDer<'_>| {
            X509Certificate::from_der(certificate)
                .is_ok_and(|(_, certificate)| certificate.public_key().raw == key.subject_public_key_info())
        };
        let own = all.iter().find(|certificate| is_own(certificate)).cloned();
        let own = own.ok_or(CaError::Mismatch(path))?;
        let cross = directory.join(CROSS_CERTIFICATE);
        // One that was written when a replacement was broken off is not of this key.
        let cross = if cross.exists() { certificates(&cross)?.into_iter().find(is_own) } else { None };
        Ok(Self { issuer: Issuer::from_ca_cert_der(&own, key)?, cross, own, all })
    }

    /// The authorities that machines shall believe.
    pub fn all(&self) -> &[CertificateDer<'static>] {
        &self.all
    }

    /// The authority's own certificate.
    pub const fn certificate(&self) -> &CertificateDer<'static> {
        &self.own
    }

    /// Issues a certificate for who holds `key`: the chain, leaf first.
    pub fn sign(
        &self,
        options: &CertificateOptions,
        key: &impl PublicKeyData,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let name = options.name.as_str();
        if !is_name(name) {
            return Err(CaError::Name(options.name.clone()));
        }
        let mut params = CertificateParams::new(options.addresses.clone())?;
        params.subject_alt_names.push(SanType::URI(format!("drover://{}/{name}", options.role).try_into()?));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Nodes serve each other too, so both roles are servers and clients; the role's URI says the rest.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, options.validity);
        let certificate = params.signed_by(key, &self.issuer)?;
        Ok([certificate.der().clone()].into_iter().chain(self.cross.clone()).collect())
    }

    /// The same for who made the request (PKCS #10) with its key. Of the request only the key counts.
    pub fn sign_request(
        &self,
        options: &CertificateOptions,
        request: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))?;
        self.sign(options, &request.public_key)
    }
}

/// Whether `name` can stand in a certificate and in a file name.
pub(crate) fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    !name.is_empty() && name.len() <= NAME_LEN_MAX && !name.starts_with('.') && name.chars().all(allowed)
}

/// The text of certificates, one behind the other.
pub(crate) fn pem_chain(chain: &[CertificateDer<'_>]) -> String {
    chain.iter().map(|certificate| pem("CERTIFICATE", certificate)).collect()
}

/// Writes `text` in place of what `path` has, or not at all.
pub(crate) fn replace(path: &Path, text: &str, mode: u32) -> Result<(), CaError> {
    let mut new = path.to_owned().into_os_string();
    new.push(".new");
    let new = PathBuf::from(new);
    let _ = fs::remove_file(&new);
    create(&new, text, mode)?;
    fs::rename(&new, path).map_err(|source| CaError::Io { path: path.to_owned(), source })
}

fn authority_params(name: &str, validity: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    // One below: its successor.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, validity);
    params
}

/// `Drover cluster` is followed by `Drover cluster 2`.
fn successor(name: &str) -> String {
    let numbered = name.rsplit_once(' ').and_then(|(name, number)| Some((name, number.parse::<u32>().ok()?)));
    match numbered {
        Some((name, number)) => format!("{name} {}", number.saturating_add(1)),
        None => format!("{name} 2"),
    }
}

fn set_validity(params: &mut CertificateParams, validity: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + validity).into();
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CaError> {
    let found = CertificateDer::pem_slice_iter(read(path)?.as_bytes()).collect::<Result<Vec<_>, _>>();
    found.map_err(|error| CaError::Io { path: path.to_owned(), source: io::Error::other(error.to_string()) })
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
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
        let mode = || fs::metadata(directory.path().join(AUTHORITY_KEY)).unwrap().permissions().mode();
        assert_eq!(mode() & 0o777, 0o600);
        rotate(directory.path(), AUTHORITY_VALIDITY).unwrap();
        assert_eq!(mode() & 0o777, 0o600);
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
                matches!(issue(directory.path(), directory.path(), &options, false), Err(CaError::Name(_))),
                "{name:?} was taken"
            );
        }
    }

    #[test]
    fn one_replacement_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path(), &AuthorityOptions::default()).unwrap();
        let first = Authority::open(directory.path()).unwrap();
        rotate(directory.path(), AUTHORITY_VALIDITY).unwrap();
        let second = Authority::open(directory.path()).unwrap();
        assert_ne!(first.certificate(), second.certificate());
        assert_eq!(second.all().len(), 2);
        assert!(matches!(rotate(directory.path(), AUTHORITY_VALIDITY), Err(CaError::Rotating(_))));
        retire(directory.path()).unwrap();
        assert_eq!(Authority::open(directory.path()).unwrap().all(), [second.certificate().clone()]);
        rotate(directory.path(), AUTHORITY_VALIDITY).unwrap();
        let third = Authority::open(directory.path()).unwrap();
        let (_, parsed) = X509Certificate::from_der(third.certificate()).unwrap();
        assert_eq!(parsed.subject().to_string(), "CN=Drover cluster 3");
    }
}
