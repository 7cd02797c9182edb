//! TLS configurations: version 1.3 only, certificates on both ends, roles checked.

use std::fmt;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{Identity, Role};

/// ALPN name of HTTP/1.1, for bulk bytes.
pub const HTTP1: &[u8] = b"http/1.1";
/// ALPN name of HTTP/2, for gRPC.
pub const HTTP2: &[u8] = b"h2";

/// A client that talks only to machines of `role`, over the protocol `alpn`.
pub fn client(identity: &Identity, role: Role, alpn: &[u8]) -> Result<Arc<ClientConfig>, Error> {
    let chain = WebPkiServerVerifier::builder_with_provider(Arc::clone(&identity.roots), provider())
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerRole { chain, role }))
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(Arc::new(config))
}

/// A server for machines of any role, over HTTP/1.1 and HTTP/2.
pub fn server(identity: &Identity) -> Result<Arc<ServerConfig>, Error> {
    let chain = WebPkiClientVerifier::builder_with_provider(Arc::clone(&identity.roots), provider())
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(ClientRole { chain }))
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    Ok(Arc::new(config))
}

/// Whether configurations can be made of `identity`.
pub(super) fn check(identity: &Identity) -> Result<(), String> {
    client(identity, Role::Seeder, HTTP1).map_err(|error| error.to_string())?;
    server(identity).map_err(|error| error.to_string())?;
    Ok(())
}

/// The one provider of cryptography. Named everywhere, because rustls panics when it has to guess between two.
fn provider() -> Arc<CryptoProvider> {
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

/// Chain and host name as WebPKI has it, then the role.
#[derive(Debug)]
struct ServerRole {
    chain: Arc<WebPkiServerVerifier>,
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
        let verified = self.chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        check_role(end_entity, Some(self.role))?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Chain as WebPKI has it, then that there is a role at all.
#[derive(Debug)]
struct ClientRole {
    chain: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for ClientRole {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        check_role(end_entity, None)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
