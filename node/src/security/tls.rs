//! TLS configurations: version 1.3 only, certificates on both ends, roles checked.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use layer::Digest;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::identity::NotEnrolled;
use super::{Clock, Identity, Role, token};

/// ALPN name of HTTP/1.1, for bulk bytes.
pub const HTTP1: &[u8] = b"http/1.1";
/// ALPN name of HTTP/2, for gRPC.
pub const HTTP2: &[u8] = b"h2";
/// ALPN name under which machines without a certificate come in: gRPC as well.
pub const ENROLMENT: &[u8] = b"drover-enrol/1";

/// Who made a request: a machine of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Its role.
    pub role: Role,
    /// Its name.
    pub name: String,
    /// For how long its certificate was made.
    pub validity: Duration,
    /// Fingerprint of its public key: what tells machines apart, since names are for people.
    pub key: Digest,
}

/// A client that talks only to machines of `role` whose certificate has the name it asks for, over the protocol `alpn`.
pub fn client(identity: &Arc<Identity>, role: Role, alpn: &[u8]) -> Result<Arc<ClientConfig>, Error> {
    client_of(identity, Arc::new(ServerRole { identity: Arc::clone(identity), role }), alpn)
}

/// A client that talks to any machine of the cluster. Nodes find each other by addresses that their certificates need not
/// have, and check each byte that they get against an index that a seeder has signed.
pub fn peer_client(identity: &Arc<Identity>, alpn: &[u8]) -> Result<Arc<ClientConfig>, Error> {
    client_of(identity, Arc::new(AnyRole { identity: Arc::clone(identity) }), alpn)
}

fn client_of(
    identity: &Arc<Identity>,
    verifier: Arc<dyn ServerCertVerifier>,
    alpn: &[u8],
) -> Result<Arc<ClientConfig>, Error> {
    let mut config = ClientConfig::builder_with_details(provider(), Arc::new(identity.clock()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(OwnKey(Arc::clone(identity))));
    config.alpn_protocols = vec![alpn.to_vec()];
    // A session that is resumed is not asked for certificates, so one that ended since would be good for ever.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// A server for machines of any role, over HTTP/1.1 and HTTP/2.
pub fn server(identity: &Arc<Identity>) -> Result<Arc<ServerConfig>, Error> {
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(identity.clock()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(ClientRole { identity: Arc::clone(identity) }))
        .with_cert_resolver(Arc::new(OwnKey(Arc::clone(identity))));
    config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// A server for machines that have no certificate yet. It gives them nothing but the enrolment.
pub fn enrolment_server(identity: &Arc<Identity>) -> Result<Arc<ServerConfig>, Error> {
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(identity.clock()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(OwnKeyAndAuthorities(Arc::clone(identity))));
    config.alpn_protocols = vec![ENROLMENT.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// A client that has no certificate yet and believes the authority with the fingerprint `authority`.
pub fn enrolment_client(authority: Digest, clock: Clock) -> Result<Arc<ClientConfig>, Error> {
    let mut config = ClientConfig::builder_with_details(provider(), Arc::new(clock))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned(authority)))
        .with_no_client_auth();
    config.alpn_protocols = vec![ENROLMENT.to_vec()];
    Ok(Arc::new(config))
}

/// Who is at the other end, as its certificate says, which must have been verified.
pub fn caller(chain: Option<&[CertificateDer<'_>]>) -> Option<Caller> {
    let leaf = chain?.first()?;
    let (role, name) = Role::and_name(&webpki::EndEntityCert::try_from(leaf).ok()?)?;
    let validity = super::identity::validity(leaf)?;
    let validity = validity.end.duration_since(validity.start).ok()?;
    Some(Caller { role, name, validity, key: super::identity::key_fingerprint(leaf)? })
}

/// The one provider of cryptography. Named everywhere, because rustls panics when it has to guess between two.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The certificate is the cluster's, but of another role.
#[derive(Debug)]
struct RoleError {
    want: Option<Role>,
    have: Option<Role>,
}

impl fmt::Display for RoleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.have {
            Some(have) => write!(f, "the other end has a certificate for the role {have}")?,
            None => f.write_str("the other end's certificate names no role")?,
        }
        match self.want {
            Some(want) => write!(f, ", not {want}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for RoleError {}

fn check_role(leaf: &CertificateDer<'_>, want: Option<Role>) -> Result<(), Error> {
    let have = webpki::EndEntityCert::try_from(leaf).ok().and_then(|leaf| Role::of(&leaf));
    if have.is_some() && (want.is_none() || have == want) {
        return Ok(());
    }
    let error: Arc<dyn std::error::Error + Send + Sync> = Arc::new(RoleError { want, have });
    Err(Error::InvalidCertificate(CertificateError::Other(OtherError(error))))
}

/// What both of rustls' traits for verifiers ask besides the certificate.
macro_rules! handshake_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls12_signature(message, cert, dss, &algorithms())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, cert, dss, &algorithms())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            algorithms().supported_schemes()
        }
    };
}

/// This machine's certificate and key of today.
#[derive(Debug)]
struct OwnKey(Arc<Identity>);

impl ResolvesClientCert for OwnKey {
    fn resolve(&self, _root_hint_subjects: &[&[u8]], _sigschemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.credentials().ok().map(|credentials| Arc::clone(&credentials.certified))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for OwnKey {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.credentials().ok().map(|credentials| Arc::clone(&credentials.certified))
    }
}

/// The same with the authorities behind it, for machines that know only a fingerprint.
#[derive(Debug)]
struct OwnKeyAndAuthorities(Arc<Identity>);

impl ResolvesServerCert for OwnKeyAndAuthorities {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let credentials = self.0.credentials().ok()?;
        let chain = credentials.chain().iter().chain(&credentials.authorities).cloned().collect();
        Some(Arc::new(CertifiedKey::new(chain, Arc::clone(&credentials.certified.key))))
    }
}

/// A seeder of the authority with this fingerprint, whose certificate it has to send.
#[derive(Debug)]
struct Pinned(Digest);

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let authority = intermediates.iter().find(|certificate| token::fingerprint(certificate) == self.0);
        let authority = authority.ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        let verified = chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        check_role(end_entity, Some(Role::Seeder))?;
        Ok(verified)
    }

    handshake_signatures!();
}

/// Chain and host name as WebPKI has it, then the role.
#[derive(Debug)]
struct ServerRole {
    identity: Arc<Identity>,
    role: Role,
}

impl ServerCertVerifier for ServerRole {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = Arc::clone(&self.identity.credentials().map_err(not_enrolled)?.servers);
        let verified = chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        check_role(end_entity, Some(self.role))?;
        Ok(verified)
    }

    handshake_signatures!();
}

/// Chain as WebPKI has it, whatever the name, then that there is a role at all.
#[derive(Debug)]
struct AnyRole {
    identity: Arc<Identity>,
}

impl ServerCertVerifier for AnyRole {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let roots = Arc::clone(&self.identity.credentials().map_err(not_enrolled)?.roots);
        let leaf = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&leaf, &roots, intermediates, now, algorithms().all)?;
        check_role(end_entity, None)?;
        Ok(ServerCertVerified::assertion())
    }

    handshake_signatures!();
}

/// Chain as WebPKI has it, then that there is a role at all.
#[derive(Debug)]
struct ClientRole {
    identity: Arc<Identity>,
}

impl ClientCertVerifier for ClientRole {
    /// None: a machine has one certificate, so there is nothing to choose.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let chain = Arc::clone(&self.identity.credentials().map_err(not_enrolled)?.clients);
        let verified = chain.verify_client_cert(end_entity, intermediates, now)?;
        check_role(end_entity, None)?;
        Ok(verified)
    }

    handshake_signatures!();
}

fn not_enrolled(error: NotEnrolled) -> Error {
    Error::General(error.to_string())
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    provider().signature_verification_algorithms
}
