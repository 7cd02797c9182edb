//! A machine's certificate and key, and the authorities that it believes, as their files have them now.

use std::fmt;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use layer::Digest;
use parking_lot::Mutex;
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};

use super::{Clock, Role, SecurityError, tls};
use crate::config::MtlsConfig;

/// How often the files are looked at, at most. They are looked at only when somebody connects, so an idle machine does not.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How long the first pulls on a new machine wait for its certificate.
const SETTLE: Duration = Duration::from_secs(5);

/// Who this machine is. Certificates that are replaced on disk are used from the next connection on; connections that exist
/// go on with what they began with.
pub struct Identity {
    role: Role,
    clock: Clock,
    files: MtlsConfig,
    seen: Mutex<Seen>,
    /// There is a certificate.
    enrolled: watch::Sender<bool>,
    /// When nobody waits any more for one.
    settled_at: tokio::time::Instant,
}

struct Seen {
    looked: Instant,
    /// `None` where a file cannot be seen.
    stamps: Option<[Stamp; 3]>,
    /// `None` until the machine is enrolled.
    credentials: Option<Arc<Credentials>>,
}

/// The machine has no certificate yet.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("this machine has no certificate of the cluster yet: it is not enrolled")]
pub struct NotEnrolled;

/// Device, inode, size and time of a file: changes when it is written or replaced.
type Stamp = (u64, u64, u64, i64, i64);

/// What the files held when they were read.
pub(crate) struct Credentials {
    pub(super) roots: Arc<RootCertStore>,
    /// The authorities' certificates.
    pub(super) authorities: Vec<CertificateDer<'static>>,
    /// From when until when the leaf is valid.
    pub(crate) validity: Range<SystemTime>,
    pub(super) certified: Arc<CertifiedKey>,
    /// What signs indexes; `None` where the key is not ECDSA P-256.
    pub(super) signing: Option<EcdsaKeyPair>,
    pub(super) servers: Arc<WebPkiServerVerifier>,
    pub(super) clients: Arc<dyn ClientCertVerifier>,
}

impl Identity {
    /// Reads the files, whose certificate must be for `role`.
    pub(super) fn load(files: &MtlsConfig, role: Role) -> Result<Self, SecurityError> {
        let stamps = stamps(files);
        let credentials = Some(Arc::new(Credentials::load(files, role)?));
        let seen = Seen { looked: Instant::now(), stamps, credentials };
        Ok(Self::with(files.clone(), role, seen, true))
    }

    /// What was enrolled into `files` before, or nothing yet.
    pub(super) fn enrolled(files: MtlsConfig, role: Role) -> Self {
        let seen = Seen { looked: Instant::now(), stamps: None, credentials: None };
        let identity = Self::with(files, role, seen, false);
        identity.look_now();
        identity
    }

    fn with(files: MtlsConfig, role: Role, seen: Seen, enrolled: bool) -> Self {
        let settled_at = tokio::time::Instant::now() + SETTLE;
        Self {
            role,
            clock: Clock::default(),
            files,
            seen: Mutex::new(seen),
            enrolled: watch::Sender::new(enrolled),
            settled_at,
        }
    }

    /// The machine's role.
    pub const fn role(&self) -> Role {
        self.role
    }

    /// The clock that validities are compared with.
    pub const fn clock(&self) -> Clock {
        self.clock
    }

    #[cfg(test)]
    pub(super) const fn set_clock(&mut self, clock: Clock) {
        self.clock = clock;
    }

    /// Waits until there is a certificate, in the first seconds of a machine that enrols.
    pub(crate) async fn settle(&self) {
        let mut enrolled = self.enrolled.subscribe();
        // The sender lives as long as `self`.
        let _ = tokio::time::timeout_at(self.settled_at, enrolled.wait_for(|enrolled| *enrolled)).await;
    }

    /// What the files hold. Files that cannot be used leave things as they are.
    pub(crate) fn credentials(&self) -> Result<Arc<Credentials>, NotEnrolled> {
        let mut seen = self.seen.lock();
        if seen.looked.elapsed() >= LOOK_EVERY {
            self.look(&mut seen);
        }
        seen.credentials.clone().ok_or(NotEnrolled)
    }

    /// The files.
    pub(crate) const fn files(&self) -> &MtlsConfig {
        &self.files
    }

    /// Looks at the files although they were looked at lately.
    pub(crate) fn look_now(&self) {
        self.look(&mut self.seen.lock());
    }

    fn look(&self, seen: &mut Seen) {
        seen.looked = Instant::now();
        // Before the files are read: what changes meanwhile is seen the next time.
        let stamps = stamps(&self.files);
        if stamps == seen.stamps {
            return;
        }
        seen.stamps = stamps;
        match Credentials::load(&self.files, self.role) {
            Ok(credentials) => {
                seen.credentials = Some(Arc::new(credentials));
                self.enrolled.send_replace(true);
                tracing::info!(certificate = %self.files.certificate.display(), "certificates were read");
            }
            // Also while the certificate is replaced and the key not yet.
            Err(error) => {
                tracing::warn!(%error, "the changed certificates cannot be used: the ones before stay in use")
            }
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("role", &self.role).field("files", &self.files).finish_non_exhaustive()
    }
}

impl Credentials {
    fn load(files: &MtlsConfig, want: Role) -> Result<Self, SecurityError> {
        let unusable = |reason: String| SecurityError::Unusable { path: files.certificate.clone(), reason };
        let mut roots = RootCertStore::empty();
        let authorities = certificates("certificates of the authority", &files.ca)?;
        for authority in &authorities {
            roots
                .add(authority.clone())
                .map_err(|error| SecurityError::Unusable { path: files.ca.clone(), reason: error.to_string() })?;
        }
        let chain = certificates("the certificate", &files.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| SecurityError::Read {
            what: "the private key",
            path: files.key.clone(),
            reason: error.to_string(),
        })?;
        let leaf = chain.first().ok_or_else(|| unusable("it is empty".to_owned()))?;
        let have = webpki::EndEntityCert::try_from(leaf)
            .map_err(|error| unusable(error.to_string()))
            .map(|leaf| Role::of(&leaf))?
            .ok_or_else(|| SecurityError::Role(files.certificate.clone()))?;
        if have != want {
            return Err(SecurityError::WrongRole { path: files.certificate.clone(), have, want });
        }
        let signing = EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, key.secret_der()).ok();
        let certified =
            CertifiedKey::from_der(chain, key, &tls::provider()).map_err(|error| unusable(error.to_string()))?;
        let validity = certified.cert.first().and_then(|leaf| validity(leaf));
        let validity = validity.ok_or_else(|| unusable("its validity cannot be read".to_owned()))?;
        let roots = Arc::new(roots);
        let servers = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), tls::provider()).build();
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), tls::provider()).build();
        Ok(Self {
            roots,
            authorities,
            validity,
            certified: Arc::new(certified),
            signing,
            servers: servers.map_err(|error| unusable(error.to_string()))?,
            clients: clients.map_err(|error| unusable(error.to_string()))?,
        })
    }

    /// The certificate chain, leaf first.
    pub(crate) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }
}

/// From when until when `certificate` is valid.
pub(super) fn validity(certificate: &CertificateDer<'_>) -> Option<Range<SystemTime>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let at = |time: ASN1Time| {
        let seconds = u64::try_from(time.timestamp()).ok()?;
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
    };
    Some(at(parsed.validity().not_before)?..at(parsed.validity().not_after)?)
}

/// The digest of the public key of `certificate`, as the certificate has it (SubjectPublicKeyInfo).
pub(super) fn key_fingerprint(certificate: &CertificateDer<'_>) -> Option<Digest> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(Digest::of(parsed.tbs_certificate.subject_pki.raw))
}

fn stamps(files: &MtlsConfig) -> Option<[Stamp; 3]> {
    let stamp = |path: &Path| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec()))
    };
    Some([stamp(&files.ca)?, stamp(&files.certificate)?, stamp(&files.key)?])
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, SecurityError> {
    let read = |reason: String| SecurityError::Read { what, path: path.to_owned(), reason };
    let found = CertificateDer::pem_file_iter(path)
        .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
        .map_err(|error| read(error.to_string()))?;
    if found.is_empty() {
        return Err(read("no PEM certificate in it".to_owned()));
    }
    Ok(found)
}
