//! Who may talk to whom, and whose indexes are believed (`docs/security.md`).
//!
//! A cluster has one certificate authority ([`ca`]). Each machine holds a certificate of it that names the machine's
//! [`Role`]; connections are TLS 1.3 with certificates on both ends ([`tls`]), and indexes are signed by a seeder's
//! key ([`signature`]). With `security = "off"` there is neither.

pub mod ca;
pub mod signature;
pub mod tls;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::{MtlsConfig, SecurityConfig};
pub use signature::{Signed, Signer, TrustError, Verifier};

/// What a machine is to the cluster. A certificate names exactly one role, as the URI `drover://ROLE/NAME` among its
/// subject alternative names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// May serve as seeder and sign indexes.
    Seeder,
    /// May ask seeders and other nodes, and serve chunks to nodes.
    Node,
}

impl Role {
    /// The role's name in certificates and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Seeder => "seeder",
            Self::Node => "node",
        }
    }

    /// The role that a certificate names; `None` where it names none or more than one.
    pub fn of(certificate: &webpki::EndEntityCert<'_>) -> Option<Self> {
        let mut roles = certificate.valid_uri_names().filter_map(|uri| uri.strip_prefix("drover://"));
        let (role, name) = roles.next()?.split_once('/')?;
        if name.is_empty() || roles.next().is_some() {
            return None;
        }
        [Self::Seeder, Self::Node].into_iter().find(|known| known.as_str() == role)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Seeder, Self::Node]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| format!("{text:?} is no role: want seeder or node"))
    }
}

/// Why the configured certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecurityError {
    /// A file cannot be read or holds no PEM of the wanted kind.
    #[error("cannot read {what} from {path}: {reason}")]
    Read {
        /// What the file should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The certificate does not name a role of Drover's.
    #[error("the certificate {0} names no role: issue it with `drover-seeder ca issue`")]
    Role(PathBuf),
    /// The certificate is for another role than the daemon that was given it.
    #[error("the certificate {path} is for the role {have}, this daemon needs {want}")]
    WrongRole {
        /// The certificate.
        path: PathBuf,
        /// Its role.
        have: Role,
        /// The role that the daemon needs.
        want: Role,
    },
    /// The TLS library refuses them (key and certificate do not match, unusable authority).
    #[error("cannot use the certificate {path}: {reason}")]
    Unusable {
        /// The certificate.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// A machine's part in the cluster's security, loaded.
#[derive(Clone)]
pub enum Security {
    /// `security = "off"`.
    Off,
    /// Mutual TLS and signatures.
    Mutual(Arc<Identity>),
}

/// A machine's certificate and key, and the authorities that it believes.
pub struct Identity {
    role: Role,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Security {
    /// Loads what `config` names for a daemon of `role`. Says it loudly when there is no security.
    pub fn load(config: &SecurityConfig, role: Role) -> Result<Self, SecurityError> {
        match config {
            SecurityConfig::Off => {
                tracing::warn!(
                    "security is OFF: connections are not encrypted, nobody is authenticated and indexes are not \
                     signed; whoever reaches the network can change what containers run"
                );
                Ok(Self::Off)
            }
            SecurityConfig::Mtls(files) => Identity::load(files, role).map(|identity| Self::Mutual(Arc::new(identity))),
        }
    }

    /// Whether connections are mutual TLS.
    pub const fn is_mutual(&self) -> bool {
        matches!(self, Self::Mutual(_))
    }

    /// What to check received indexes with.
    pub fn verifier(&self) -> Verifier {
        match self {
            Self::Off => Verifier::off(),
            Self::Mutual(identity) => Verifier::new(Arc::clone(&identity.roots)),
        }
    }

    /// What signs indexes; `None` without security.
    pub fn signer(&self) -> Result<Option<Signer>, TrustError> {
        match self {
            Self::Off => Ok(None),
            Self::Mutual(identity) => Signer::new(identity).map(Some),
        }
    }
}

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("Off"),
            Self::Mutual(identity) => write!(f, "Mutual({})", identity.role),
        }
    }
}

impl Identity {
    fn load(files: &MtlsConfig, want: Role) -> Result<Self, SecurityError> {
        let unusable = |reason: String| SecurityError::Unusable { path: files.certificate.clone(), reason };
        let mut roots = RootCertStore::empty();
        for authority in certificates("certificates of the authority", &files.ca)? {
            roots
                .add(authority)
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
        let identity = Self { role: have, roots: Arc::new(roots), chain, key };
        tls::check(&identity).map_err(unusable)?;
        Ok(identity)
    }
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A cluster's certificates in a temporary directory.
    pub(crate) struct TestCluster {
        directory: tempfile::TempDir,
    }

    impl TestCluster {
        pub(crate) fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            ca::init(directory.path(), &ca::AuthorityOptions::default()).unwrap();
            Self { directory }
        }

        pub(crate) fn config(&self, role: Role, name: &str) -> MtlsConfig {
            let path = self.directory.path();
            let issued = ca::issue(
                path,
                path,
                &ca::CertificateOptions {
                    role,
                    name: name.to_owned(),
                    addresses: vec!["127.0.0.1".to_owned(), "localhost".to_owned()],
                    validity: ca::CERTIFICATE_VALIDITY,
                },
            )
            .unwrap();
            MtlsConfig { ca: path.join(ca::AUTHORITY_CERTIFICATE), certificate: issued.certificate, key: issued.key }
        }

        pub(crate) fn security(&self, role: Role, name: &str) -> Security {
            Security::load(&SecurityConfig::Mtls(self.config(role, name)), role).unwrap()
        }
    }

    #[test]
    fn a_daemon_refuses_a_certificate_of_another_role() {
        let cluster = TestCluster::new();
        let node = SecurityConfig::Mtls(cluster.config(Role::Node, "n1"));
        assert!(matches!(
            Security::load(&node, Role::Seeder),
            Err(SecurityError::WrongRole { have: Role::Node, want: Role::Seeder, .. })
        ));
        assert!(Security::load(&node, Role::Node).unwrap().is_mutual());
    }

    #[test]
    fn certificate_and_key_must_match() {
        let cluster = TestCluster::new();
        let mut config = cluster.config(Role::Node, "n1");
        config.key = cluster.config(Role::Node, "n2").key;
        let error = Security::load(&SecurityConfig::Mtls(config), Role::Node).unwrap_err();
        assert!(matches!(error, SecurityError::Unusable { .. }), "{error}");
    }

    #[test]
    fn a_certificate_without_role_is_refused() {
        let cluster = TestCluster::new();
        let config = cluster.config(Role::Node, "n1");
        let ca = MtlsConfig {
            certificate: config.ca.clone(),
            key: cluster.directory.path().join(ca::AUTHORITY_KEY),
            ca: config.ca,
        };
        assert!(matches!(Security::load(&SecurityConfig::Mtls(ca), Role::Node), Err(SecurityError::Role(_))));
    }
}
