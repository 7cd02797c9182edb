//! Signed indexes: what a seeder promises about a layer, and how a node checks it.

use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use rustls_pki_types::{CertificateDer, UnixTime};

use super::{Identity, Role};

/// The most certificates that a chain may have, and the most bytes of one: ours have one of less than 1 KiB.
const CHAIN_MAX: usize = 4;
const CERTIFICATE_BYTES_MAX: usize = 16 << 10;
/// A DER-encoded ECDSA P-256 signature has at most 72 bytes.
const SIGNATURE_BYTES_MAX: usize = 128;

/// Version of a stored signature.
const SIGNED_VERSION: u8 = 1;

/// A signature with the certificates of who made it. Empty in a cluster without security.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signed {
    /// ECDSA P-256 with SHA-256 over the index's statement, DER.
    pub signature: Vec<u8>,
    /// The signer's chain in DER, leaf first, without the authority.
    pub certificates: Vec<Vec<u8>>,
}

/// Why a signature cannot be made or is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// The index came unsigned, but this cluster has security.
    #[error("the index is not signed: the seeder has security off, this node has not")]
    Unsigned,
    /// Too many certificates or too large ones.
    #[error("the signature's certificate chain is too large")]
    TooLarge,
    /// The chain does not lead to the cluster's authority, or is not valid now.
    #[error("the signer's certificate is not the cluster's: {0}")]
    Chain(String),
    /// The certificate may not sign indexes.
    #[error("the signer's certificate is not a seeder's: only seeders may sign indexes")]
    Role,
    /// The signature is not of this index.
    #[error("the signature does not fit the index")]
    Signature,
    /// The key cannot sign.
    #[error("the seeder's key cannot sign: {0}")]
    Key(String),
}

/// Signs with a seeder's key of today.
pub struct Signer {
    identity: Arc<Identity>,
    random: SystemRandom,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").finish_non_exhaustive()
    }
}

impl Signer {
    /// A signer with the key of `identity`, which must be a seeder's.
    pub fn new(identity: Arc<Identity>) -> Result<Self, TrustError> {
        if identity.role() != Role::Seeder {
            return Err(TrustError::Role);
        }
        let signer = Self { identity, random: SystemRandom::new() };
        signer.sign(b"")?;
        Ok(signer)
    }

    /// Signs `statement`.
    pub fn sign(&self, statement: &[u8]) -> Result<Signed, TrustError> {
        let credentials = self.identity.credentials().map_err(|error| TrustError::Key(error.to_string()))?;
        let key = credentials.signing.as_ref().ok_or_else(|| TrustError::Key("want ECDSA P-256".to_owned()))?;
        let signature = key.sign(&self.random, statement).map_err(|_| TrustError::Key("signing failed".to_owned()))?;
        let certificates = credentials.chain().iter().map(|certificate| certificate.to_vec()).collect();
        Ok(Signed { signature: signature.as_ref().to_vec(), certificates })
    }

    /// Whether `signed` names the certificate that is used today.
    pub fn made(&self, signed: &Signed) -> bool {
        self.identity.credentials().is_ok_and(|credentials| {
            signed.certificates.iter().map(Vec::as_slice).eq(credentials.chain().iter().map(AsRef::as_ref))
        })
    }
}

impl Signed {
    /// The bytes to store: a version, 1, then signature and each certificate, each after its length as a little-endian u32.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![SIGNED_VERSION];
        for part in std::iter::once(&self.signature).chain(&self.certificates) {
            bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
            bytes.extend_from_slice(part);
        }
        bytes
    }

    /// Reads what [`Signed::encode`] wrote; `None` where it is cut off or of another version.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut bytes = bytes.strip_prefix(&[SIGNED_VERSION])?;
        let mut parts = Vec::new();
        while !bytes.is_empty() {
            let (len, rest) = bytes.split_first_chunk::<4>()?;
            let (part, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
            parts.push(part.to_vec());
            bytes = rest;
        }
        let mut parts = parts.into_iter();
        Some(Self { signature: parts.next().unwrap_or_default(), certificates: parts.collect() })
    }

    /// Whether the first certificate's key signed `statement`, whoever that is. It tells damage from bytes that this
    /// machine wrote itself; whether to believe the signer is [`Verifier::verify`]'s question.
    pub fn fits(&self, statement: &[u8]) -> bool {
        let Some(leaf) = self.certificates.first() else { return false };
        let leaf = CertificateDer::from(leaf.as_slice());
        webpki::EndEntityCert::try_from(&leaf).is_ok_and(|leaf| {
            leaf.verify_signature(webpki::aws_lc_rs::ECDSA_P256_SHA256, statement, &self.signature).is_ok()
        })
    }
}

/// Checks signatures against the cluster's authority.
#[derive(Clone, Debug)]
pub struct Verifier {
    identity: Option<Arc<Identity>>,
}

impl Verifier {
    /// A verifier that believes the signers whom the authorities of `identity` certify as seeders.
    pub const fn new(identity: Arc<Identity>) -> Self {
        Self { identity: Some(identity) }
    }

    /// The verifier of a cluster without security: it believes everyone.
    pub const fn off() -> Self {
        Self { identity: None }
    }

    /// Checks that a seeder of the cluster signed `statement`. The chain must be valid now: this is for signatures
    /// that just arrived, not for those that were checked when they did.
    pub fn verify(&self, statement: &[u8], signed: &Signed) -> Result<(), TrustError> {
        let now = self.identity.as_ref().map_or_else(UnixTime::now, |identity| identity.clock().unix());
        self.verify_at(now, statement, signed)
    }

    fn verify_at(&self, now: UnixTime, statement: &[u8], signed: &Signed) -> Result<(), TrustError> {
        let Some(identity) = &self.identity else { return Ok(()) };
        if signed.signature.is_empty() {
            return Err(TrustError::Unsigned);
        }
        let too_large = signed.certificates.len() > CHAIN_MAX
            || signed.signature.len() > SIGNATURE_BYTES_MAX
            || signed.certificates.iter().any(|certificate| certificate.len() > CERTIFICATE_BYTES_MAX);
        if too_large {
            return Err(TrustError::TooLarge);
        }
        let chain: Vec<CertificateDer<'_>> =
            signed.certificates.iter().map(|certificate| CertificateDer::from(certificate.as_slice())).collect();
        let Some((leaf, intermediates)) = chain.split_first() else { return Err(TrustError::Unsigned) };
        let credentials = identity.credentials().map_err(|error| TrustError::Chain(error.to_string()))?;
        let chain_error = |error: webpki::Error| TrustError::Chain(error.to_string());
        let leaf = webpki::EndEntityCert::try_from(leaf).map_err(chain_error)?;
        leaf.verify_for_usage(
            &[webpki::aws_lc_rs::ECDSA_P256_SHA256],
            &credentials.roots.roots,
            intermediates,
            now,
            webpki::KeyUsage::server_auth(),
            None,
            None,
        )
        .map_err(chain_error)?;
        if Role::of(&leaf) != Some(Role::Seeder) {
            return Err(TrustError::Role);
        }
        leaf.verify_signature(webpki::aws_lc_rs::ECDSA_P256_SHA256, statement, &signed.signature)
            .map_err(|_| TrustError::Signature)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::TestCluster;
    use super::super::{Security, ca};
    use super::*;

    fn identity(security: &Security) -> Arc<Identity> {
        match security {
            Security::Mutual(identity) => Arc::clone(identity),
            Security::Off => panic!("no identity"),
        }
    }

    #[test]
    fn a_seeder_signs_and_a_node_believes() {
        let cluster = TestCluster::new();
        let signed = cluster.security(Role::Seeder, "s1").signer().unwrap().unwrap().sign(b"statement").unwrap();
        let verifier = cluster.security(Role::Node, "n1").verifier();
        assert_eq!(verifier.verify(b"statement", &signed), Ok(()));
        assert_eq!(Signed::parse(&signed.encode()), Some(signed.clone()));
        assert_eq!(Signed::parse(&signed.encode()[..50]), None);
        assert_eq!(verifier.verify(b"statemenT", &signed), Err(TrustError::Signature));
        assert_eq!(verifier.verify(b"statement", &Signed::default()), Err(TrustError::Unsigned));
        let mut wrong = signed.clone();
        wrong.signature[20] ^= 1;
        assert_eq!(verifier.verify(b"statement", &wrong), Err(TrustError::Signature));
        let mut many = signed;
        many.certificates = vec![Vec::new(); 5];
        assert_eq!(verifier.verify(b"statement", &many), Err(TrustError::TooLarge));
    }

    #[test]
    fn a_node_cannot_sign() {
        let cluster = TestCluster::new();
        let node = identity(&cluster.security(Role::Node, "n1"));
        assert_eq!(Signer::new(Arc::clone(&node)).unwrap_err(), TrustError::Role);
        // A node that signs nevertheless, with a program of its own.
        let Signed { signature, certificates } =
            Signer { identity: node, random: SystemRandom::new() }.sign(b"statement").unwrap();
        let verifier = cluster.security(Role::Node, "n2").verifier();
        assert_eq!(verifier.verify(b"statement", &Signed { signature, certificates }), Err(TrustError::Role));
    }

    #[test]
    fn another_cluster_and_another_time_are_not_believed() {
        let (ours, theirs) = (TestCluster::new(), TestCluster::new());
        let signed = theirs.security(Role::Seeder, "s1").signer().unwrap().unwrap().sign(b"statement").unwrap();
        let verifier = ours.security(Role::Node, "n1").verifier();
        assert!(matches!(verifier.verify(b"statement", &signed), Err(TrustError::Chain(_))));

        let verifier = theirs.security(Role::Node, "n1").verifier();
        let later = UnixTime::since_unix_epoch(
            Duration::from_secs(UnixTime::now().as_secs()) + ca::CERTIFICATE_VALIDITY + Duration::from_secs(60),
        );
        assert!(matches!(verifier.verify_at(later, b"statement", &signed), Err(TrustError::Chain(_))));
    }

    #[test]
    fn without_security_everything_is_believed() {
        assert_eq!(Verifier::off().verify(b"statement", &Signed::default()), Ok(()));
        assert!(Security::Off.signer().unwrap().is_none());
    }
}
