//! Who may talk to whom, and whose indexes are believed (`docs/security.md`).
//!
//! A cluster has one certificate authority ([`ca`]). Each machine holds a certificate of it ([`identity`]) that names the machine's
//! [`Role`]; connections are TLS 1.3 with certificates on both ends ([`tls`]), and indexes are signed by a seeder's
//! key ([`signature`]). With `security = "off"` there is neither.

pub mod ca;
pub mod clock;
pub mod identity;
pub mod signature;
pub mod tls;
pub mod token;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{MtlsConfig, SecurityConfig};
pub use clock::Clock;
pub use identity::Identity;
pub use signature::{Signed, Signer, TrustError, Verifier};
pub use token::TokenError;

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
        Self::and_name(certificate).map(|(role, _)| role)
    }

    /// The same with the machine's name.
    pub fn and_name(certificate: &webpki::EndEntityCert<'_>) -> Option<(Self, String)> {
        let mut roles = certificate.valid_uri_names().filter_map(|uri| uri.strip_prefix("drover://"));
        let (role, name) = roles.next()?.split_once('/')?;
        if name.is_empty() || roles.next().is_some() {
            return None;
        }
        let role = [Self::Seeder, Self::Node].into_iter().find(|known| known.as_str() == role)?;
        Some((role, name.to_owned()))
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
    /// Only nodes enrol.
    #[error(
        "a {0} does not enrol: issue its certificate with `drover-seeder ca issue` and name it (security.mode = \"mtls\")"
    )]
    CannotEnrol(Role),
    /// The folder for certificates cannot be made.
    #[error("cannot make {path}: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
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

impl Security {
    /// Loads what `config` names for a daemon of `role`. Says it loudly when there is no security. A node that enrols keeps its
    /// certificate in a folder of `root`; it may have none yet.
    pub fn load(config: &SecurityConfig, role: Role, root: &Path) -> Result<Self, SecurityError> {
        match config {
            SecurityConfig::Off => {
                tracing::warn!(
                    "security is OFF: connections are not encrypted, nobody is authenticated and indexes are not \
                     signed; whoever reaches the network can change what containers run"
                );
                Ok(Self::Off)
            }
            SecurityConfig::Mtls(files) => Identity::load(files, role).map(|identity| Self::Mutual(Arc::new(identity))),
            SecurityConfig::Enrol(_) if role != Role::Node => Err(SecurityError::CannotEnrol(role)),
            SecurityConfig::Enrol(_) => {
                let (folder, own) = (root.join("identity"), root.join("identity").join("node.pem"));
                std::fs::create_dir_all(&folder)
                    .map_err(|source| SecurityError::Folder { path: folder.clone(), source })?;
                let files = MtlsConfig { ca: folder.join("ca.pem"), certificate: own.clone(), key: own };
                Ok(Self::Mutual(Arc::new(Identity::enrolled(files, role))))
            }
        }
    }

    /// Whether connections are mutual TLS.
    pub const fn is_mutual(&self) -> bool {
        matches!(self, Self::Mutual(_))
    }

    /// The clock that validities are compared with.
    pub fn clock(&self) -> Clock {
        match self {
            Self::Off => Clock::default(),
            Self::Mutual(identity) => identity.clock(),
        }
    }

    /// The same machine with another clock; nobody may have it yet.
    #[cfg(test)]
    pub(crate) fn with_clock(self, clock: Clock) -> Self {
        let Self::Mutual(identity) = self else { return self };
        let mut identity = Arc::into_inner(identity).expect("it is nobody else's");
        identity.set_clock(clock);
        Self::Mutual(Arc::new(identity))
    }

    /// What to check received indexes with.
    pub fn verifier(&self) -> Verifier {
        match self {
            Self::Off => Verifier::off(),
            Self::Mutual(identity) => Verifier::new(Arc::clone(identity)),
        }
    }

    /// What signs indexes; `None` without security.
    pub fn signer(&self) -> Result<Option<Signer>, TrustError> {
        match self {
            Self::Off => Ok(None),
            Self::Mutual(identity) => Signer::new(Arc::clone(identity)).map(Some),
        }
    }
}

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("Off"),
            Self::Mutual(identity) => write!(f, "Mutual({})", identity.role()),
        }
    }
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

        /// The authority's directory.
        pub(crate) fn path(&self) -> &Path {
            self.directory.path()
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
                true,
            )
            .unwrap();
            MtlsConfig { ca: path.join(ca::AUTHORITY_CERTIFICATE), certificate: issued.certificate, key: issued.key }
        }

        pub(crate) fn security(&self, role: Role, name: &str) -> Security {
            Security::load(&SecurityConfig::Mtls(self.config(role, name)), role, self.directory.path()).unwrap()
        }
    }

    #[test]
    fn a_daemon_refuses_a_certificate_of_another_role() {
        let cluster = TestCluster::new();
        let node = SecurityConfig::Mtls(cluster.config(Role::Node, "n1"));
        assert!(matches!(
            Security::load(&node, Role::Seeder, cluster.directory.path()),
            Err(SecurityError::WrongRole { have: Role::Node, want: Role::Seeder, .. })
        ));
        assert!(Security::load(&node, Role::Node, cluster.directory.path()).unwrap().is_mutual());
    }

    #[test]
    fn certificate_and_key_must_match() {
        let cluster = TestCluster::new();
        let mut config = cluster.config(Role::Node, "n1");
        config.key = cluster.config(Role::Node, "n2").key;
        let error = Security::load(&SecurityConfig::Mtls(config), Role::Node, cluster.directory.path()).unwrap_err();
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
        let loaded = Security::load(&SecurityConfig::Mtls(ca), Role::Node, cluster.directory.path());
        assert!(matches!(loaded, Err(SecurityError::Role(_))));
    }
}
