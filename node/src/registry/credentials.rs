//! Credentials from Docker's configuration: entries of `auths`, and the helper programs `docker-credential-NAME`.
//!
//! Helpers may hang, so each runs in a process group of its own that is killed at a deadline, and few run at once.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::Semaphore;

use super::error::Fault;

/// How long a credential helper may take.
const HELPER_DEADLINE: Duration = Duration::from_secs(10);
/// The most helpers that run at once.
const HELPERS_MAX: usize = 4;
/// The most bytes of a helper's answer.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// The most bytes of a configuration.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// How long credentials are used before they are looked up again, unless the file changes or they are refused.
const VALIDITY: Duration = Duration::from_secs(60);
/// The most registries whose credentials are kept.
const KEPT_MAX: usize = 256;
/// Docker's own name for its registry in configurations and helpers.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// What proves who asks.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// User name and password.
    Password {
        /// User name.
        user: String,
        /// Password.
        password: String,
    },
    /// An OAuth2 refresh token, to be exchanged at the token server.
    Identity(String),
    /// A bearer token for the registry itself.
    Token(String),
}

impl fmt::Debug for Credential {
    /// Without the secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password",
            Self::Identity(_) => "Identity",
            Self::Token(_) => "Token",
        })
    }
}

/// Looks credentials up and keeps them for a while.
pub(super) struct Credentials {
    /// `PATH` that helpers are looked for in; the process's own where it is `None`.
    path: Option<OsString>,
    deadline: Duration,
    helpers: Arc<Semaphore>,
    /// By configured file and registry.
    kept: Mutex<HashMap<(Option<PathBuf>, String), Slot>>,
    /// By host: these and no others.
    given: Option<HashMap<String, Credential>>,
}

/// What is kept for one registry, locked while it is looked up.
type Slot = Arc<tokio::sync::Mutex<Option<Kept>>>;

struct Kept {
    credential: Option<Credential>,
    until: Instant,
    written: Option<SystemTime>,
}

impl Credentials {
    pub(super) fn new(path: Option<OsString>, helper_deadline: Option<Duration>) -> Self {
        let deadline = helper_deadline.unwrap_or(HELPER_DEADLINE);
        Self { path, deadline, helpers: Arc::new(Semaphore::new(HELPERS_MAX)), kept: Mutex::default(), given: None }
    }

    /// Those of somebody else, by host.
    pub(super) fn given(given: HashMap<String, Credential>) -> Self {
        Self { given: Some(given), ..Self::new(None, None) }
    }

    /// The credentials for `host`, from the file `configured`, which must be there, or else Docker's own, which may not.
    pub(super) async fn of(&self, host: &str, configured: Option<&PathBuf>) -> Result<Option<Credential>, Fault> {
        if let Some(given) = &self.given {
            return Ok(given.get(host).cloned());
        }
        let Some(path) = docker_config(configured) else { return Ok(None) };
        let slot = self.slot(host, configured);
        // Held over the lookup: however many wait, one helper runs for a registry.
        let mut slot = slot.lock().await;
        let written = std::fs::metadata(&path).and_then(|metadata| metadata.modified()).ok();
        if let Some(kept) = slot.as_ref().filter(|kept| Instant::now() < kept.until && kept.written == written) {
            return Ok(kept.credential.clone());
        }
        let credential = self.look_up(host, &path).await.map_err(|reason| Fault::Credentials { reason })?;
        *slot = Some(Kept { credential: credential.clone(), until: Instant::now() + VALIDITY, written });
        Ok(credential)
    }

    /// Looks them up anew the next time: they were refused.
    pub(super) fn forget(&self, host: &str, configured: Option<&PathBuf>) {
        self.kept.lock().remove(&(configured.cloned(), host.to_owned()));
    }

    fn slot(&self, host: &str, configured: Option<&PathBuf>) -> Slot {
        let mut kept = self.kept.lock();
        if kept.len() >= KEPT_MAX {
            kept.clear();
        }
        Arc::clone(kept.entry((configured.cloned(), host.to_owned())).or_default())
    }

    async fn look_up(&self, host: &str, path: &Path) -> Result<Option<Credential>, String> {
        let shown = path.display().to_string();
        let wrong = |reason: String| format!("{shown}: {reason}");
        let (mut text, path) = (Vec::new(), path.to_owned());
        let read = async {
            let file = tokio::fs::File::open(&path).await?;
            file.take(FILE_BYTES_MAX).read_to_end(&mut text).await
        };
        tokio::time::timeout(self.deadline, read)
            .await
            .map_err(|_| wrong("it cannot be read in time".to_owned()))?
            .map_err(|error| wrong(error.to_string()))?;
        match parse(&text, host).map_err(wrong)? {
            Found::None => Ok(None),
            Found::Credential(credential) => Ok(Some(credential)),
            Found::Helper { name, server } => self.ask_helper(&name, &server).await,
        }
    }

    /// Asks `docker-credential-NAME` (docker-credential-helpers, "Development": the server's name on standard input, JSON on
    /// standard output).
    async fn ask_helper(&self, name: &str, server: &str) -> Result<Option<Credential>, String> {
        let program = format!("docker-credential-{name}");
        let late =
            || format!("{program} did not answer within {:?}; run it by hand to see what it waits for", self.deadline);
        let permit = tokio::time::timeout(self.deadline, Arc::clone(&self.helpers).acquire_owned());
        let permit = permit.await.map_err(|_| late())?.map_err(|error| error.to_string())?;
        let mut command = Command::new(&program);
        command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.process_group(0).kill_on_drop(true);
        if let Some(path) = &self.path {
            command.env("PATH", path);
        }
        let child = command.spawn().map_err(|error| format!("cannot start {program}: {error}; is it installed?"))?;
        let (server, deadline) = (server.to_owned(), self.deadline);
        // A task of its own: it ends the helper at its deadline even when nobody waits any more.
        let run = tokio::spawn(async move {
            let _permit = permit;
            talk(child, &server, deadline).await
        });
        let (succeeded, answer) = run
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("{program}: {error}"))?
            .ok_or_else(late)?;
        if !succeeded {
            // A helper's way to say that it has none (docker-credential-helpers, credentials/error.go). Anything else may hold
            // secrets and is not repeated.
            return match String::from_utf8_lossy(&answer).contains("credentials not found") {
                true => Ok(None),
                false => Err(format!("{program} failed; run it by hand to see why")),
            };
        }
        helper_answer(&answer).map(Some).ok_or_else(|| format!("{program} answered something else than credentials"))
    }
}

/// Gives `server` to a helper and takes its answer; `None` if it takes longer than `deadline`. The helper and what it started
/// are gone afterwards.
async fn talk(mut child: Child, server: &str, deadline: Duration) -> std::io::Result<Option<(bool, Vec<u8>)>> {
    let group = child.id().and_then(|id| rustix::process::Pid::from_raw(i32::try_from(id).ok()?));
    let spoken = async {
        let (input, output) = (child.stdin.take(), child.stdout.take());
        if let Some(mut input) = input {
            // A helper that does not read still may answer.
            let _ = input.write_all(format!("{server}\n").as_bytes()).await;
        }
        let mut answer = Vec::new();
        if let Some(output) = output {
            output.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
        }
        Ok::<_, std::io::Error>((child.wait().await?.success(), answer))
    };
    let end = match tokio::time::timeout(deadline, spoken).await {
        Ok(Ok(end)) => return Ok(Some(end)),
        other => other.ok(),
    };
    // It was not waited for, so its number cannot belong to another group.
    if let Some(group) = group {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let _ = child.kill().await;
    end.map_or(Ok(None), |failed| failed.map(Some))
}

/// What a configuration has for a registry.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    None,
    /// The credentials themselves.
    Credential(Credential),
    /// A program that has them.
    Helper {
        /// The last part of the program's name.
        name: String,
        /// What the registry is called there.
        server: String,
    },
}

/// Looks `host` up in the text of a Docker configuration. An error says what is wrong with the text, without repeating any of
/// it.
pub fn parse(text: &[u8], host: &str) -> Result<Found, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Config {
        #[serde(default)]
        auths: HashMap<String, Auth>,
        creds_store: Option<String>,
        #[serde(default)]
        cred_helpers: HashMap<String, String>,
    }
    #[derive(Deserialize)]
    struct Auth {
        auth: Option<String>,
        username: Option<String>,
        password: Option<String>,
        identitytoken: Option<String>,
        registrytoken: Option<String>,
    }
    let config: Config = serde_json::from_slice(text)
        .map_err(|error| format!("it is no Docker configuration (line {}, column {})", error.line(), error.column()))?;
    let server = match host {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => DOCKER_HUB,
        host => host,
    };
    let helper =
        |name: &str| match name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) && !name.is_empty() {
            true => Ok(Found::Helper { name: name.to_owned(), server: server.to_owned() }),
            false => Err("the name of a credential helper has odd characters".to_owned()),
        };
    if let Some(name) = entry(&config.cred_helpers, server) {
        return helper(name);
    }
    if let Some(auth) = entry(&config.auths, server) {
        let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = filled(&auth.identitytoken) {
            return Ok(Found::Credential(Credential::Identity(token)));
        }
        if let Some(token) = filled(&auth.registrytoken) {
            return Ok(Found::Credential(Credential::Token(token)));
        }
        if let Some(encoded) = filled(&auth.auth) {
            let (user, password) = decode(&encoded).ok_or("`auth` of this registry is not base64 of USER:PASSWORD")?;
            return Ok(Found::Credential(Credential::Password { user, password }));
        }
        if let (Some(user), Some(password)) = (filled(&auth.username), filled(&auth.password)) {
            return Ok(Found::Credential(Credential::Password { user, password }));
        }
    }
    config.creds_store.filter(|name| !name.is_empty()).map_or(Ok(Found::None), |name| helper(&name))
}

/// The entry of `server`, by its exact name or by a URL of its host.
fn entry<'a, T>(map: &'a HashMap<String, T>, server: &str) -> Option<&'a T> {
    fn host(name: &str) -> &str {
        let rest = name.strip_prefix("https://").or_else(|| name.strip_prefix("http://")).unwrap_or(name);
        rest.split('/').next().unwrap_or(rest)
    }
    let is_hub = server == DOCKER_HUB;
    map.get(server).or_else(|| {
        let mut fitting: Vec<_> = map
            .iter()
            .filter(|(name, _)| host(name) == host(server) || (is_hub && host(name) == "docker.io"))
            .collect();
        fitting.sort_by_key(|(name, _)| name.as_str());
        fitting.first().map(|(_, value)| *value)
    })
}

fn decode(encoded: &str) -> Option<(String, String)> {
    use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let decoded = GeneralPurpose::new(&base64::alphabet::STANDARD, config).decode(encoded.trim()).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (user, password) = text.split_once(':')?;
    // Docker's own encoder pads with NUL.
    Some((user.to_owned(), password.trim_end_matches('\0').to_owned()))
}

/// What a helper printed.
fn helper_answer(answer: &[u8]) -> Option<Credential> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    let answer: Answer = serde_json::from_slice(answer).ok()?;
    Some(match answer.username.as_str() {
        "<token>" => Credential::Identity(answer.secret),
        _ => Credential::Password { user: answer.username, password: answer.secret },
    })
}

/// The configured file, or Docker's own if there is one.
fn docker_config(configured: Option<&PathBuf>) -> Option<PathBuf> {
    configured.cloned().or_else(|| {
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker"));
        let folder = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from).or_else(home)?;
        Some(folder.join("config.json")).filter(|path| path.exists())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn password(user: &str, password: &str) -> Found {
        Found::Credential(Credential::Password { user: user.to_owned(), password: password.to_owned() })
    }

    #[test]
    fn configurations_have_many_shapes() {
        let at = |json: serde_json::Value, host: &str| parse(json.to_string().as_bytes(), host).unwrap();
        let auth = serde_json::json!({ "auth": "dXNlcjpzZWM6cmV0" });
        for key in ["r.test:5000", "https://r.test:5000", "https://r.test:5000/v2/", "http://r.test:5000/"] {
            let config = serde_json::json!({ "auths": { key: auth } });
            assert_eq!(at(config.clone(), "r.test:5000"), password("user", "sec:ret"), "{key}");
            assert_eq!(at(config, "r.test"), Found::None);
        }
        for key in ["https://index.docker.io/v1/", "docker.io"] {
            let config = serde_json::json!({ "auths": { key: auth } });
            assert_eq!(at(config, "registry-1.docker.io"), password("user", "sec:ret"), "{key}");
        }
        let helper = |name: &str, server: &str| Found::Helper { name: name.to_owned(), server: server.to_owned() };
        let config = serde_json::json!({ "auths": { "a": auth, "empty": {} }, "credsStore": "all", "credHelpers": { "b": "one" } });
        assert_eq!(at(config.clone(), "a"), password("user", "sec:ret"));
        assert_eq!(at(config.clone(), "b"), helper("one", "b"));
        assert_eq!(at(config.clone(), "empty"), helper("all", "empty"), "docker leaves empty entries beside a store");
        assert_eq!(at(config, "docker.io"), helper("all", DOCKER_HUB));
        let config = serde_json::json!({ "auths": { "a": { "identitytoken": "t" }, "b": { "registrytoken": "r" },
            "c": { "username": "u", "password": "p" } } });
        assert_eq!(at(config.clone(), "a"), Found::Credential(Credential::Identity("t".to_owned())));
        assert_eq!(at(config.clone(), "b"), Found::Credential(Credential::Token("r".to_owned())));
        assert_eq!(at(config, "c"), password("u", "p"));
    }

    #[test]
    fn errors_repeat_no_secrets() {
        for odd in [
            "{\"auths\": {\"a\": {\"auth\": secret}}}",
            "{\"auths\":{\"a\":{\"auth\":\"secret\"}}}",
            "{\"credHelpers\":{\"a\":\"../secret\"}}",
        ] {
            let error = parse(odd.as_bytes(), "a").unwrap_err();
            assert!(!error.contains("secret"), "{error}");
        }
        assert_eq!(format!("{:?}", Credential::Identity("secret".to_owned())), "Identity");
    }

    /// A folder with a helper `test` that runs `script`, and a configuration that names it.
    fn helper(script: &str) -> (tempfile::TempDir, PathBuf, OsString) {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("docker-credential-test");
        // Written by another process: while tests beside this one start programs, a descriptor of ours that may write would be
        // theirs too for a moment, and the script could not be started.
        let write = ["-c", "printf '%s' \"$1\" > \"$0\"", program.to_str().unwrap(), &format!("#!/bin/sh\n{script}\n")];
        assert!(std::process::Command::new("sh").args(write).status().unwrap().success());
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let config = folder.path().join("config.json");
        std::fs::write(&config, r#"{"credsStore":"test"}"#).unwrap();
        let mut path = folder.path().as_os_str().to_owned();
        path.push(":/usr/bin:/bin");
        (folder, config, path)
    }

    #[tokio::test]
    async fn helpers_are_asked_once_and_again_when_refused() {
        let script =
            r#"read -r server; echo x >> "$(dirname "$0")/runs"; echo "{\"Username\":\"$server\",\"Secret\":\"s\"}""#;
        let (folder, config, path) = helper(script);
        let credentials = Credentials::new(Some(path), None);
        let asked = (0..10).map(|_| credentials.of("r.test", Some(&config)));
        for found in futures_util::future::join_all(asked).await {
            let wanted = Credential::Password { user: "r.test".to_owned(), password: "s".to_owned() };
            assert_eq!(found.unwrap(), Some(wanted));
        }
        let runs = || std::fs::read_to_string(folder.path().join("runs")).unwrap().lines().count();
        assert_eq!(runs(), 1);
        credentials.forget("r.test", Some(&config));
        credentials.of("r.test", Some(&config)).await.unwrap();
        assert_eq!(runs(), 2);
    }

    #[tokio::test]
    async fn a_helper_s_ways_to_fail() {
        for (script, wanted) in [
            ("echo 'credentials not found in native keychain'; exit 1", None),
            ("echo secret; exit 1", Some("docker-credential-test failed")),
            ("echo secret", Some("something else than credentials")),
        ] {
            let (_folder, config, path) = helper(script);
            let found = Credentials::new(Some(path), None).of("r.test", Some(&config)).await;
            match (found, wanted) {
                (Ok(found), None) => assert_eq!(found, None),
                (Err(error), Some(wanted)) => {
                    let error = error.to_string();
                    assert!(error.contains(wanted) && !error.contains("secret"), "{error}");
                }
                (found, _) => panic!("{script}: {found:?}"),
            }
        }
        let (_folder, config, _) = helper("");
        let found = Credentials::new(Some("/nonexistent".into()), None).of("r.test", Some(&config)).await;
        assert!(found.unwrap_err().to_string().contains("is it installed"));
        let found = Credentials::new(None, None).of("r.test", Some(&PathBuf::from("/nonexistent"))).await;
        assert!(found.unwrap_err().to_string().contains("/nonexistent"));
    }

    #[tokio::test]
    async fn a_hanging_helper_is_killed_with_its_children() {
        let (folder, config, path) = helper(r#"sleep 1000 & echo $! > "$(dirname "$0")/child"; wait"#);
        let credentials = Credentials::new(Some(path), Some(Duration::from_millis(300)));
        let hanging = (0..2 * HELPERS_MAX).map(|number| {
            let (credentials, config) = (&credentials, &config);
            async move { credentials.of(&format!("r{number}.test"), Some(config)).await }
        });
        for found in futures_util::future::join_all(hanging).await {
            let error = found.unwrap_err().to_string();
            assert!(error.contains("did not answer within"), "{error}");
        }
        let child: i32 = std::fs::read_to_string(folder.path().join("child")).unwrap().trim().parse().unwrap();
        let is_alive = || {
            let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            stat.contains("(sleep)") && !stat.contains(") Z ")
        };
        tokio::time::timeout(Duration::from_secs(10), async {
            while is_alive() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .expect("the helper's child is gone");
        let (_folder, config, path) = helper("echo '{\"Username\":\"u\",\"Secret\":\"s\"}'");
        let found = Credentials::new(Some(path), None).of("r.test", Some(&config)).await;
        assert!(found.unwrap().is_some(), "others are not harmed");
    }
}
