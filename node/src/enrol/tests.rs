//! A node and a seeder with an authority, over real sockets.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{client, server};
use crate::config::{EnrolConfig, SecurityConfig, SeederAddresses};
use crate::security::ca::{self, AUTHORITY_VALIDITY, Authority};
use crate::security::identity::Identity;
use crate::security::tests::TestCluster;
use crate::security::token::{self, Token};
use crate::security::{Clock, Role, Security};
use crate::seeder::{Client, Options, SeederError};
use crate::serve::{Limits, Listener};

const HOUR: Duration = Duration::from_secs(3600);

struct Seeder {
    address: String,
    _stop: DropGuard,
}

impl Seeder {
    async fn start(security: &Security, authority: &Path) -> Self {
        let router =
            server::route(Router::new().route("/healthz", axum::routing::get(|| async { "ok" })), authority.into());
        let listener = Listener::bind("127.0.0.1:0", security, Limits::default()).await.unwrap();
        let listener = listener.with_enrolment(security, server::route(Router::new(), authority.into())).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        tokio::spawn(listener.serve(router, stop.clone()));
        Self { address, _stop: stop.drop_guard() }
    }

    fn client(&self, security: &Security) -> Client {
        Client::new(&SeederAddresses::new([self.address.clone()]).unwrap(), security.clone(), Options::default())
    }
}

fn node(root: &Path) -> (Security, Arc<Identity>) {
    node_at(root, Clock::default())
}

fn node_at(root: &Path, clock: Clock) -> (Security, Arc<Identity>) {
    let config = SecurityConfig::Enrol(EnrolConfig { token: root.join("token") });
    let security = Security::load(&config, Role::Node, root).unwrap().with_clock(clock);
    match &security {
        Security::Mutual(identity) => (security.clone(), Arc::clone(identity)),
        Security::Off => panic!("no identity"),
    }
}

fn refused(error: SeederError) -> String {
    match error {
        SeederError::Refused { reason, .. } => reason,
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_a_token_becomes_one_of_the_cluster_and_stays_it() {
    let (cluster, root) = (TestCluster::new(), tempfile::tempdir().unwrap());
    let seeder = Seeder::start(&cluster.security(Role::Seeder, "s"), cluster.path()).await;
    let (security, identity) = node(root.path());
    let client = seeder.client(&security);
    let healthy = async || client.is_there().await;
    assert!(healthy().await.is_err(), "it has no certificate");
    let running = tokio::spawn(client::run(Arc::clone(&identity), client.clone(), root.path().join("token")));
    // A file that is not there yet is looked for again.
    let token = token::create(cluster.path(), HOUR, 24 * HOUR).unwrap();
    std::fs::write(root.path().join("token"), format!("{token}\n")).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while identity.credentials().is_err() {
        assert!(Instant::now() < deadline, "it is enrolled in time");
        identity.settle().await;
        tokio::task::yield_now().await;
    }
    healthy().await.unwrap();
    running.abort();

    // After a restart the certificate is there, and nothing is asked.
    std::fs::remove_file(root.path().join("token")).unwrap();
    let (again, same) = node(root.path());
    let leaf = |identity: &Identity| identity.credentials().unwrap().chain()[0].clone();
    assert_eq!(leaf(&same), leaf(&identity));

    // The certificate is enough for the next one, without a token.
    let client = seeder.client(&again);
    let key = rcgen::KeyPair::generate().unwrap();
    let request = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
    let certificate = client.renew(request.der()).await.unwrap();
    assert_ne!(certificate.chain[0], leaf(&same).to_vec());
    let name = |der: &[u8]| {
        let der = rustls_pki_types::CertificateDer::from(der.to_vec());
        Role::and_name(&webpki::EndEntityCert::try_from(&der).unwrap()).unwrap()
    };
    assert_eq!(name(&certificate.chain[0]), name(&leaf(&same)));
}

/// As that of a machine that takes its local time for UTC.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_clock_is_an_hour_off_enrols() {
    let cluster = TestCluster::new();
    let seeder = Seeder::start(&cluster.security(Role::Seeder, "s"), cluster.path()).await;
    for ahead in [-3600, 3600] {
        let root = tempfile::tempdir().unwrap();
        let token = token::create(cluster.path(), HOUR, 24 * HOUR).unwrap();
        std::fs::write(root.path().join("token"), token.to_string()).unwrap();
        let (security, identity) = node_at(root.path(), Clock::ahead_by(ahead));
        let client = seeder.client(&security);
        let running = tokio::spawn(client::run(Arc::clone(&identity), client.clone(), root.path().join("token")));
        let deadline = Instant::now() + Duration::from_secs(60);
        while identity.credentials().is_err() {
            assert!(Instant::now() < deadline, "{ahead} s ahead: it is enrolled in time");
            identity.settle().await;
            tokio::task::yield_now().await;
        }
        client.is_there().await.unwrap();
        running.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_right_token_there_is_nothing() {
    let (ours, theirs, root) = (TestCluster::new(), TestCluster::new(), tempfile::tempdir().unwrap());
    let seeder_security = ours.security(Role::Seeder, "s");
    let seeder = Seeder::start(&seeder_security, ours.path()).await;
    let (security, _) = node(root.path());
    let client = seeder.client(&security);
    let key = rcgen::KeyPair::generate().unwrap();
    let request = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
    let enrol = async |token: &Token, name: &str| client.enrol(token, request.der(), name).await.unwrap_err();

    let old = token::create(ours.path(), Duration::ZERO, HOUR).unwrap();
    assert!(refused(enrol(&old, "n").await).contains("too old"));
    let gone = token::create(ours.path(), HOUR, HOUR).unwrap();
    std::fs::remove_file(ours.path().join(token::TOKENS).join(gone.id())).unwrap();
    assert!(refused(enrol(&gone, "n").await).contains("not known"));
    let good = token::create(ours.path(), HOUR, HOUR).unwrap();
    assert!(refused(enrol(&good, "../n").await).contains("name"));
    let nonsense = client.enrol(&good, b"nonsense", "n").await.unwrap_err();
    assert!(matches!(nonsense, SeederError::Refused { .. }), "{nonsense}");
    // A token of another cluster is not even shown to this one's seeder.
    let other = token::create(theirs.path(), HOUR, HOUR).unwrap();
    assert!(matches!(enrol(&other, "n").await, SeederError::Untrusted { .. }));
    // The door for strangers leads to the enrolment only, and not to a renewal.
    let listener = Listener::bind("127.0.0.1:0", &seeder_security, Limits::default()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    tokio::spawn(listener.serve(Router::new(), stop));
    let closed = Seeder { address, _stop: CancellationToken::new().drop_guard() };
    let error = closed.client(&security).enrol(&good, request.der(), "n").await.unwrap_err().to_string();
    assert!(error.contains("enrol.authority"), "{error}");
    // A seeder's certificate is not renewed this way: its addresses are not the seeder's to choose.
    let error = seeder.client(&seeder_security).renew(request.der()).await.unwrap_err();
    assert!(refused(error).contains("ca issue"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_is_replaced_while_everybody_goes_on() {
    let cluster = TestCluster::new();
    let (seeder_files, node_files) = (cluster.config(Role::Seeder, "s"), cluster.config(Role::Node, "n"));
    // Each machine has a copy of the authority of its own.
    let own_copy = |files: &crate::config::MtlsConfig, name: &str| {
        let ca = cluster.path().join(name);
        std::fs::copy(&files.ca, &ca).unwrap();
        crate::config::MtlsConfig { ca, ..files.clone() }
    };
    let (seeder_files, node_files) = (own_copy(&seeder_files, "s.ca"), own_copy(&node_files, "n.ca"));
    let load = |files: &crate::config::MtlsConfig, role| match Security::load(
        &SecurityConfig::Mtls(files.clone()),
        role,
        cluster.path(),
    )
    .unwrap()
    {
        Security::Mutual(identity) => (Security::Mutual(Arc::clone(&identity)), identity),
        Security::Off => panic!("no identity"),
    };
    let (seeder_security, seeder_identity) = load(&seeder_files, Role::Seeder);
    let (node_security, node_identity) = load(&node_files, Role::Node);
    let seeder = Seeder::start(&seeder_security, cluster.path()).await;
    // A new client each time: connections that exist go on with what they began with.
    let healthy = async || {
        let client = seeder.client(&node_security);
        client.is_there().await
    };
    let (signer, verifier) = (seeder_security.signer().unwrap().unwrap(), node_security.verifier());
    let before = signer.sign(b"statement").unwrap();
    verifier.verify(b"statement", &before).unwrap();
    healthy().await.unwrap();

    ca::rotate(cluster.path(), AUTHORITY_VALIDITY).unwrap();
    // The seeder gets a certificate of the new authority, which the node does not know.
    cluster.config(Role::Seeder, "s");
    seeder_identity.look_now();
    assert!(!signer.made(&before), "the new key signs");
    let after = signer.sign(b"statement").unwrap();
    verifier.verify(b"statement", &after).unwrap();
    verifier.verify(b"statement", &before).unwrap();
    healthy().await.unwrap();
    // The node's certificate is of the old authority until it is renewed; it hears of the new one.
    std::fs::copy(cluster.path().join(ca::AUTHORITY_CERTIFICATE), &seeder_files.ca).unwrap();
    seeder_identity.look_now();
    healthy().await.unwrap();
    cluster.config(Role::Node, "n");
    std::fs::copy(cluster.path().join(ca::AUTHORITY_CERTIFICATE), &node_files.ca).unwrap();
    node_identity.look_now();
    healthy().await.unwrap();

    ca::retire(cluster.path()).unwrap();
    assert_eq!(Authority::open(cluster.path()).unwrap().all().len(), 1);
    for (files, identity) in [(&seeder_files, &seeder_identity), (&node_files, &node_identity)] {
        std::fs::copy(cluster.path().join(ca::AUTHORITY_CERTIFICATE), &files.ca).unwrap();
        identity.look_now();
        healthy().await.unwrap();
    }
    verifier.verify(b"statement", &after).unwrap();
    verifier.verify(b"statement", &before).unwrap_err();

    // Files that make no sense change nothing.
    std::fs::write(&node_files.key, "nonsense").unwrap();
    node_identity.look_now();
    healthy().await.unwrap();
}
