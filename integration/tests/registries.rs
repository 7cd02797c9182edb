//! The client of registries against a real one: plain, with a password, with tokens, with TLS and client certificates. Needs
//! neither root nor containerd.

use std::collections::HashMap;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use lab::process::{Daemon, run};
use lab::tools;
use node::config::{RegistriesConfig, RegistryConfig};
use node::registry::{Client, Credential, Environment, Fault, Options, RegistryError};
use node::security::Role;
use node::security::ca::{self, AuthorityOptions, CertificateOptions, Issued};
use node::source::BlobRef;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// `user:secret` as htpasswd writes it with bcrypt.
const HTPASSWD: &str = "user:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
const REPOSITORY: &str = "team/app";

/// What all tests share: the programs, and a store with one pushed image.
struct Fixture {
    folder: tempfile::TempDir,
    programs: tools::RegistryPrograms,
    /// The layer's bytes and digest.
    layer: Vec<u8>,
    digest: String,
}

impl Fixture {
    fn get() -> &'static Self {
        static FIXTURE: OnceLock<Fixture> = OnceLock::new();
        static MAKING: Mutex<()> = Mutex::new(());
        let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
        FIXTURE.get_or_init(|| Self::make().expect("a registry with an image"))
    }

    fn make() -> Result<Self> {
        let programs = tools::RegistryPrograms::prepare(&|text| eprintln!("{text}"))?;
        let folder = tempfile::tempdir()?;
        let files = folder.path().join("files");
        fs::create_dir_all(&files)?;
        for number in 0..20u32 {
            let bytes: Vec<u8> = (0..100_000u32).map(|at| (at.wrapping_mul(number + 7) >> 5) as u8).collect();
            fs::write(files.join(format!("file-{number}")), bytes)?;
        }
        let packed = folder.path().join("layer.tar.gz");
        run(Command::new("tar").arg("-C").arg(&files).arg("-czf").arg(&packed).arg("."))?;
        let layer = fs::read(&packed)?;
        let digest = digest_of(&layer);
        let fixture = Self { folder, programs, layer, digest };
        fixture.push()?;
        Ok(fixture)
    }

    fn storage(&self) -> PathBuf {
        self.folder.path().join("storage")
    }

    fn push(&self) -> Result<()> {
        let registry = RealRegistry::start(self, "push", "")?;
        let base = format!("http://{}/v2/{REPOSITORY}", registry.address);
        let config = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
        for blob in [&self.layer[..], config] {
            let file = self.folder.path().join("upload");
            fs::write(&file, blob)?;
            let started = curl(&["-X", "POST", "-D", "-", "-o", "/dev/null", &format!("{base}/blobs/uploads/")])?;
            let location = started.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("location").then(|| value.trim().to_owned())
            });
            let location = location.with_context(|| format!("no place to upload to: {started}"))?;
            let join = if location.contains('?') { '&' } else { '?' };
            let target = format!("{location}{join}digest={}", digest_of(blob));
            curl(&["-T", &file.to_string_lossy(), "-H", "Content-Type: application/octet-stream", &target])?;
        }
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": kind,
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "size": config.len(),
                "digest": digest_of(config) },
            "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "size": self.layer.len(),
                "digest": self.digest }],
        });
        let kind = format!("Content-Type: {kind}");
        let url = format!("{base}/manifests/1");
        curl(&["-X", "PUT", "-H", &kind, "--data-binary", &manifest.to_string(), &url]).map(drop)
    }

    /// The layer at `registry`.
    fn blob(&self, registry: &str) -> BlobRef {
        BlobRef {
            registry: registry.to_owned(),
            repository: REPOSITORY.to_owned(),
            digest: self.digest.parse().expect("digest"),
            size: self.layer.len() as u64,
            media_type: String::new(),
            urls: Vec::new(),
        }
    }
}

fn digest_of(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn curl(arguments: &[&str]) -> Result<String> {
    run(Command::new("curl").args(["-sS", "-f", "--noproxy", "*"]).args(arguments))
}

/// A docker-registry on loopback that serves the fixture's store.
struct RealRegistry {
    _daemon: Daemon,
    address: SocketAddr,
}

impl RealRegistry {
    /// `more` is added to its configuration: `auth:` and, indented below `http:`, `tls:`.
    fn start(fixture: &Fixture, name: &str, more: &str) -> Result<Self> {
        let mut last = None;
        // Another program may take the port in between.
        for _ in 0..3 {
            let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
            match Self::start_at(fixture, name, more, address) {
                Ok(registry) => return Ok(registry),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("not tried")?)
    }

    fn start_at(fixture: &Fixture, name: &str, more: &str, address: SocketAddr) -> Result<Self> {
        let config = fixture.folder.path().join(format!("{name}.yml"));
        let text = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: \"{address}\"\n{more}",
            fixture.storage().display()
        );
        fs::write(&config, text)?;
        let mut command = Command::new(&fixture.programs.registry);
        command.arg("serve").arg(&config).env("OTEL_TRACES_EXPORTER", "none");
        let mut daemon = Daemon::start("registry", &mut command, &fixture.folder.path().join(format!("{name}.log")))?;
        daemon.wait_until("listens", Duration::from_secs(60), || std::net::TcpStream::connect(address).is_ok())?;
        Ok(Self { _daemon: daemon, address })
    }

    fn host(&self) -> String {
        self.address.to_string()
    }
}

fn client(registry: &RealRegistry, table: RegistryConfig, environment: Environment) -> Client {
    let config = RegistriesConfig { config_path: Vec::new(), hosts: [(registry.host(), table)].into() };
    Client::with_environment(config, Options::default(), environment)
}

/// Pulls the image and compares everything, by ranges and as a whole.
async fn pull(client: &Client, registry: &RealRegistry, fixture: &Fixture) -> Result<()> {
    let image = client.image(&format!("{}/{REPOSITORY}:1", registry.host()).parse()?, &"amd64".into()).await?;
    ensure!(image.layers.len() == 1 && image.layers[0].digest.to_string() == fixture.digest, "{image:?}");
    let blob = &image.layers[0];
    let mut part = client.blob(blob, 1000, Some(5000)).await?;
    let mut read = Vec::new();
    while let Some(bytes) = part.next().await? {
        read.extend_from_slice(&bytes);
    }
    ensure!(read == fixture.layer[1000..5000], "a part differs");
    let (mut download, mut read) = (client.download(blob, 0), Vec::new());
    while let Some(bytes) = download.next().await? {
        read.extend_from_slice(&bytes);
    }
    ensure!(read == fixture.layer, "the whole differs");
    Ok(())
}

async fn refusal(client: &Client, registry: &RealRegistry, fixture: &Fixture) -> RegistryError {
    client.blob(&fixture.blob(&registry.host()), 0, None).await.map(drop).expect_err("is refused")
}

/// A Docker configuration with these credentials.
fn docker_config(folder: &Path, host: &str, credentials: &str) -> Result<PathBuf> {
    let path = folder.join("config.json");
    fs::write(&path, json!({ "auths": { host: { "auth": STANDARD.encode(credentials) } } }).to_string())?;
    Ok(path)
}

fn plain(docker_config: Option<PathBuf>) -> RegistryConfig {
    RegistryConfig { plain_http: true, docker_config, ..RegistryConfig::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http() -> Result<()> {
    let fixture = Fixture::get();
    let registry = RealRegistry::start(fixture, "plain", "")?;
    let client = client(&registry, plain(None), Environment::default());
    pull(&client, &registry, fixture).await?;
    let mut missing = fixture.blob(&registry.host());
    missing.digest = digest_of(b"missing").parse()?;
    let error = client.blob(&missing, 0, None).await.map(drop).expect_err("is not there");
    ensure!(matches!(error.fault, Fault::NotFound { .. }), "{error}");
    ensure!(error.to_string().contains("BLOB_UNKNOWN"), "{error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn basic_authentication() -> Result<()> {
    let fixture = Fixture::get();
    let folder = tempfile::tempdir()?;
    let passwords = folder.path().join("htpasswd");
    fs::write(&passwords, HTPASSWD)?;
    let auth = format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", passwords.display());
    let registry = RealRegistry::start(fixture, "basic", &auth)?;
    let wrong = docker_config(folder.path(), &registry.host(), "user:wrong")?;
    let client = client(&registry, plain(Some(wrong)), Environment::default());
    let error = refusal(&client, &registry, fixture).await;
    ensure!(matches!(error.fault, Fault::Denied { .. }) && error.to_string().contains("UNAUTHORIZED"), "{error}");
    docker_config(folder.path(), &registry.host(), "user:secret")?;
    pull(&client, &registry, fixture).await?;
    others_act_with_what_they_have(&client, &registry, fixture).await
}

/// `client` may pull; somebody else for whom it asks may only with credentials of their own.
async fn others_act_with_what_they_have(client: &Client, registry: &RealRegistry, fixture: &Fixture) -> Result<()> {
    let with = |password: &str| Credential::Password { user: "user".to_owned(), password: password.to_owned() };
    for given in [HashMap::new(), HashMap::from([(registry.host(), with("wrong"))])] {
        let error = refusal(&client.acting_for(given), registry, fixture).await;
        ensure!(matches!(error.fault, Fault::Denied { .. }), "{error}");
    }
    let right = HashMap::from([(registry.host(), with("secret"))]);
    pull(&client.acting_for(right), registry, fixture).await
}

/// Gives tokens that the registry's certificate bundle proves.
struct TokenServer {
    key: EcdsaKeyPair,
    certificate: CertificateDer<'static>,
    asked: Mutex<u32>,
}

impl TokenServer {
    fn start(issued: &Issued) -> Result<(Arc<Self>, SocketAddr)> {
        let key = PrivateKeyDer::from_pem_file(&issued.key)?;
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_der())?;
        let certificate = CertificateDer::from_pem_file(&issued.certificate)?;
        let server = Arc::new(Self { key, certificate, asked: Mutex::new(0) });
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let router = axum::Router::new().fallback(token).with_state(Arc::clone(&server));
        tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        });
        Ok((server, address))
    }

    /// A token for `access` (distribution's token specification, "Token Authentication Implementation").
    fn sign(&self, service: &str, access: &Value) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let header = json!({ "typ": "JWT", "alg": "ES256", "x5c": [STANDARD.encode(&self.certificate)] });
        let claims = json!({ "iss": "drover-test", "sub": "user", "aud": service, "exp": now + 300, "nbf": now - 60,
            "iat": now - 60, "jti": now.to_string(), "access": access });
        let signed =
            format!("{}.{}", URL_SAFE_NO_PAD.encode(header.to_string()), URL_SAFE_NO_PAD.encode(claims.to_string()));
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes())?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}

/// Whoever has the password may pull; everyone else gets a token that permits nothing, as real servers do.
async fn token(
    State(server): State<Arc<TokenServer>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<String, StatusCode> {
    *server.asked.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    let query: Vec<(String, String)> =
        url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned().collect();
    let of = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let (service, scope) = (of("service").ok_or(StatusCode::BAD_REQUEST)?, of("scope").unwrap_or_default());
    let knows =
        headers.get("authorization").is_some_and(|value| *value == format!("Basic {}", STANDARD.encode("user:secret")));
    let mut parts = scope.split(':');
    let access = match (parts.next(), parts.next(), knows) {
        (Some("repository"), Some(name), true) => json!([{ "type": "repository", "name": name, "actions": ["pull"] }]),
        _ => json!([]),
    };
    let token = server.sign(service, &access).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(json!({ "token": token, "expires_in": 300 }).to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn token_authentication() -> Result<()> {
    let fixture = Fixture::get();
    let certificates = Certificates::make()?;
    let (server, address) = TokenServer::start(&certificates.issue("tokens", &[])?)?;
    let auth = format!(
        "auth: {{token: {{realm: \"http://{address}/token\", service: test-registry, issuer: drover-test, rootcertbundle: {}}}}}\n",
        certificates.authority().display()
    );
    let registry = RealRegistry::start(fixture, "token", &auth)?;
    let nothing = certificates.folder.path().join("empty.json");
    fs::write(&nothing, "{}")?;
    let anonymous = client(&registry, plain(Some(nothing)), Environment::default());
    let error = refusal(&anonymous, &registry, fixture).await;
    ensure!(matches!(error.fault, Fault::Denied { .. }), "{error}");
    let config = docker_config(certificates.folder.path(), &registry.host(), "user:secret")?;
    let before = *server.asked.lock().unwrap_or_else(PoisonError::into_inner);
    pull(&client(&registry, plain(Some(config.clone())), Environment::default()), &registry, fixture).await?;
    let asked = *server.asked.lock().unwrap_or_else(PoisonError::into_inner) - before;
    ensure!(asked == 1, "{asked} tokens for one image");
    let client = client(&registry, plain(Some(config)), Environment::default());
    others_act_with_what_they_have(&client, &registry, fixture).await
}

/// An authority of the test's own.
struct Certificates {
    folder: tempfile::TempDir,
}

impl Certificates {
    fn make() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        ca::init(folder.path(), &AuthorityOptions::default())?;
        Ok(Self { folder })
    }

    fn authority(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    fn issue(&self, name: &str, addresses: &[&str]) -> Result<Issued> {
        let options = CertificateOptions {
            role: Role::Node,
            name: name.to_owned(),
            addresses: addresses.iter().map(|address| (*address).to_owned()).collect(),
            validity: Duration::from_secs(3600),
        };
        Ok(ca::issue(self.folder.path(), self.folder.path(), &options, false)?)
    }

    /// TLS for a registry that wants certificates of this authority.
    fn tls(&self) -> Result<String> {
        let server = self.issue("server", &["127.0.0.1"])?;
        Ok(format!(
            "  tls: {{certificate: {}, key: {}, clientcas: [{}]}}\n",
            server.certificate.display(),
            server.key.display(),
            self.authority().display()
        ))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_with_client_certificates() -> Result<()> {
    let fixture = Fixture::get();
    let certificates = Certificates::make()?;
    let registry = RealRegistry::start(fixture, "tls", &certificates.tls()?)?;
    let mine = certificates.issue("mine", &[])?;
    let table = RegistryConfig {
        ca: Some(certificates.authority()),
        certificate: Some(mine.certificate),
        key: Some(mine.key),
        ..RegistryConfig::default()
    };
    pull(&client(&registry, table.clone(), Environment::default()), &registry, fixture).await?;
    let without = RegistryConfig { certificate: None, key: None, ..table.clone() };
    let error = refusal(&client(&registry, without, Environment::default()), &registry, fixture).await;
    // The reset that follows a refused certificate may overtake its reason.
    ensure!(matches!(error.fault, Fault::Tls { .. } | Fault::Unreachable { .. }), "{error}");
    let stranger = Certificates::make()?;
    let wrong = RegistryConfig { ca: Some(stranger.authority()), ..table };
    let error = refusal(&client(&registry, wrong, Environment::default()), &registry, fixture).await;
    ensure!(error.to_string().contains("name its authority"), "{error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seeder_ingests_with_tls_and_credentials() -> Result<()> {
    let fixture = Fixture::get();
    let certificates = Certificates::make()?;
    let folder = certificates.folder.path();
    fs::write(folder.join("htpasswd"), HTPASSWD)?;
    let auth = format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", folder.join("htpasswd").display());
    let registry = RealRegistry::start(fixture, "seeder", &format!("{}{auth}", certificates.tls()?))?;
    let mine = certificates.issue("mine", &[])?;

    // By containerd's files and a Docker configuration with the password.
    let hosts = folder.join("certs.d").join(registry.host());
    fs::create_dir_all(&hosts)?;
    let text = format!(
        "server = \"https://{}\"\nca = {:?}\nclient = [[{:?}, {:?}]]\n",
        registry.host(),
        certificates.authority(),
        mine.certificate,
        mine.key
    );
    fs::write(hosts.join("hosts.toml"), text)?;
    let docker = docker_config(folder, &registry.host(), "user:secret")?;
    let config = |name: &str, docker: &Path| -> Result<PathBuf> {
        let text = format!(
            "root = {:?}\nsecurity = \"off\"\n[registry]\nconfig_path = {:?}\n[registry.\"*\"]\ndocker_config = {:?}\n",
            folder.join(name),
            folder.join("certs.d"),
            docker
        );
        let path = folder.join(format!("{name}.toml"));
        fs::write(&path, text)?;
        Ok(path)
    };
    let image = format!("{}/{REPOSITORY}:1", registry.host());
    let ingest = |config: &Path, path: &str| {
        run(Command::new(&fixture.programs.seeder)
            .args(["ingest", "--config"])
            .arg(config)
            .arg(&image)
            .env("PATH", path))
    };
    let path = std::env::var("PATH").unwrap_or_default();
    let printed = ingest(&config("docker", &docker)?, &path)?;
    ensure!(printed.contains(&fixture.digest) && printed.contains("known"), "{printed}");

    // With a credential helper.
    let helper = folder.join("docker-credential-test");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = get ] || exit 1\nread -r server\n[ \"$server\" = {} ] || {{ echo 'credentials not found'; exit 1; }}\n\
         echo '{{\"ServerURL\":\"x\",\"Username\":\"user\",\"Secret\":\"secret\"}}'\n",
        registry.host()
    );
    // Written by another process, which nothing inherits a descriptor from that may write: it could not be started else.
    run(Command::new("sh").args(["-c", "printf '%s' \"$1\" > \"$0\""]).arg(&helper).arg(script))?;
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755))?;
    let docker = folder.join("helper.json");
    fs::write(&docker, r#"{"credsStore":"test"}"#)?;
    let with_helper = config("helper", &docker)?;
    let Err(error) = ingest(&with_helper, &path) else { bail!("ingests without the helper") };
    let text = format!("{error:#}");
    ensure!(text.contains("docker-credential-test") && text.contains(&registry.host()), "{text}");
    let printed = ingest(&with_helper, &format!("{}:{path}", folder.display()))?;
    ensure!(printed.contains("known"), "{printed}");
    Ok(())
}
