use std::future::Future;
use std::path::{Path, PathBuf};

use super::super::fake::{Behaviour, FakeRegistry, FakeTunnel, Odd};
use super::*;
use crate::security::Role;
use crate::security::ca::{self, AuthorityOptions, CertificateOptions, Issued};

const BLOB: usize = 1 << 20;

fn bytes() -> Vec<u8> {
    (0..BLOB).map(|at| (at * 7 + at / 251) as u8).collect()
}

fn quick() -> Options {
    Options { connect_timeout: Duration::from_secs(2), stall_timeout: Duration::from_secs(1) }
}

fn of(config: RegistriesConfig) -> Client {
    Client::with_environment(config, quick(), Environment::default())
}

fn client(registry: &FakeRegistry) -> Client {
    of(registry.config())
}

async fn read(client: &Client, blob: &BlobRef, start: u64, end: Option<u64>) -> Result<Vec<u8>, RegistryError> {
    let mut body = client.blob(blob, start, end).await?;
    let mut read = Vec::new();
    while let Some(bytes) = body.next().await? {
        read.extend_from_slice(&bytes);
    }
    Ok(read)
}

async fn download(client: &Client, blob: &BlobRef, start: u64) -> Result<Vec<u8>, RegistryError> {
    let mut download = client.download(blob, start);
    let mut read = Vec::new();
    while let Some(bytes) = download.next().await? {
        read.extend_from_slice(&bytes);
    }
    Ok(read)
}

/// Tries until it succeeds.
async fn eventually<T, F: Future<Output = Result<T, RegistryError>>>(mut attempt: impl FnMut() -> F) -> T {
    let tries = async {
        loop {
            match attempt().await {
                Ok(done) => return done,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), tries).await.expect("succeeds in the end")
}

#[tokio::test]
async fn reads_wholes_and_ranges() {
    let registry = FakeRegistry::start().await;
    let blob = registry.put_blob(bytes());
    let client = client(&registry);
    assert_eq!(read(&client, &blob, 0, None).await.unwrap(), bytes());
    assert_eq!(read(&client, &blob, 100, Some(70_000)).await.unwrap(), bytes()[100..70_000]);
    assert_eq!(read(&client, &blob, 500_000, None).await.unwrap(), bytes()[500_000..]);
    assert_eq!(client.blob(&blob, 0, Some(1)).await.unwrap().total(), Some(BLOB as u64));
    assert_eq!(download(&client, &blob, 0).await.unwrap(), bytes());
    assert_eq!(download(&client, &blob, 1000).await.unwrap(), bytes()[1000..]);
    assert_eq!(download(&client, &blob, BLOB as u64).await.unwrap(), [0; 0], "interrupted after its last byte");
}

#[tokio::test]
async fn a_registry_without_ranges_serves_only_resumption() {
    let registry = FakeRegistry::start().await;
    registry.set(|behaviour| behaviour.ignore_ranges = true);
    let blob = registry.put_blob(bytes());
    let client = client(&registry);
    assert_eq!(read(&client, &blob, 500_000, None).await.unwrap(), bytes()[500_000..]);
    let error = read(&client, &blob, 0, Some(10)).await.unwrap_err();
    assert!(error.to_string().contains("does not serve ranges"), "{error}");
}

#[tokio::test]
async fn an_ipv6_address_is_a_host() {
    let Ok(registry) = FakeRegistry::start_on("[::1]:0").await else {
        eprintln!("skipped: this machine has no IPv6");
        return;
    };
    let blob = registry.put_blob(bytes());
    assert!(blob.registry.starts_with("[::1]:"));
    assert_eq!(read(&client(&registry), &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
}

/// What a fault is called, and what its text must have.
struct Case {
    name: &'static str,
    behave: fn(&mut Behaviour),
    class: &'static str,
    text: &'static [&'static str],
}

fn class(fault: &Fault) -> &'static str {
    match fault {
        Fault::Name { .. } => "name",
        Fault::Unreachable { .. } => "unreachable",
        Fault::Tls { .. } => "tls",
        Fault::Proxy { .. } => "proxy",
        Fault::Stalled { .. } => "stalled",
        Fault::Denied { .. } => "denied",
        Fault::Credentials { .. } => "credentials",
        Fault::NotFound { .. } => "not found",
        Fault::Busy { .. } => "busy",
        Fault::Protocol { .. } => "protocol",
        Fault::Configuration { .. } => "configuration",
    }
}

fn status(behaviour: &mut Behaviour, status: u16, kind: &str, body: &str) {
    behaviour.odd = Some((Odd::Status(status, kind.to_owned(), body.to_owned()), None));
}

const CASES: &[Case] = &[
    Case {
        name: "401 without a challenge",
        behave: |b| status(b, 401, "application/json", r#"{"errors":[{"code":"UNAUTHORIZED","message":"who?"}]}"#),
        class: "denied",
        text: &["401 Unauthorized: UNAUTHORIZED: who?", "check the credentials", "team/app"],
    },
    Case {
        name: "401 for basic without credentials",
        behave: |b| b.credentials = Some(("user".to_owned(), "secret".to_owned())),
        class: "denied",
        text: &["none are configured", "docker login 127.0.0.1"],
    },
    Case {
        name: "a token server that refuses",
        behave: |b| (b.token, b.token_odd) = (true, Some((403, r#"{"details":"no such service"}"#.to_owned()))),
        class: "denied",
        text: &[
            "token server 127.0.0.1",
            "403 Forbidden",
            "repository:team/app:pull",
            "no such service",
            "docker login",
        ],
    },
    Case {
        name: "a token server with an answer that is none",
        behave: |b| (b.token, b.token_odd) = (true, Some((200, "<html>".to_owned()))),
        class: "protocol",
        text: &["token server's answer is no token"],
    },
    Case {
        name: "a token server in trouble",
        behave: |b| (b.token, b.token_odd) = (true, Some((502, String::new()))),
        class: "busy",
        text: &["token server", "502"],
    },
    Case {
        name: "403",
        behave: |b| status(b, 403, "application/json", r#"{"errors":[{"code":"DENIED"}]}"#),
        class: "denied",
        text: &["403 Forbidden: DENIED", "the right to pull from team/app"],
    },
    Case {
        name: "404",
        behave: |b| status(b, 404, "text/plain", "404 page not found\r\nnext line"),
        class: "not found",
        text: &["404 Not Found: 404 page not found next line", "check the image's name"],
    },
    Case {
        name: "429",
        behave: |b| b.too_many = (1, Some("1".to_owned())),
        class: "busy",
        text: &["429 Too Many Requests: slow down", "asked again later"],
    },
    Case {
        name: "500",
        behave: |b| status(b, 500, "text/plain", "disk on fire"),
        class: "busy",
        text: &["500 Internal Server Error: disk on fire"],
    },
    Case {
        name: "503",
        behave: |b| status(b, 503, "text/plain", "maintenance"),
        class: "busy",
        text: &["503 Service Unavailable: maintenance"],
    },
    Case {
        name: "418",
        behave: |b| status(b, 418, "text/plain", "teapot"),
        class: "protocol",
        text: &["418", "teapot", "check its URL"],
    },
    Case {
        name: "a page of HTML",
        behave: |b| status(b, 200, "text/html; charset=utf-8", "<h1>Welcome to our WLAN</h1>"),
        class: "protocol",
        text: &["a page of HTML", "log-in page or a proxy"],
    },
    Case {
        name: "an error in HTML",
        behave: |b| status(b, 502, "text/html", "<h1>Bad gateway</h1>"),
        class: "busy",
        text: &["502 Bad Gateway: a page of HTML"],
    },
    Case { name: "a short body", behave: |b| b.odd = Some((Odd::ShortBody, None)), class: "", text: &[] },
    Case {
        name: "a closed connection",
        behave: |b| b.odd = Some((Odd::Close, None)),
        class: "unreachable",
        text: &["the connection broke"],
    },
    Case {
        name: "another range",
        behave: |b| b.odd = Some((Odd::WrongRange, None)),
        class: "protocol",
        text: &["asked for the bytes 10 to 99999", "answered with 7 to 16"],
    },
    Case {
        name: "no range in a partial answer",
        behave: |b| b.odd = Some((Odd::NoRange, None)),
        class: "protocol",
        text: &["206 without a usable Content-Range"],
    },
    Case {
        name: "all in place of a part",
        behave: |b| b.ignore_ranges = true,
        class: "protocol",
        text: &["200 OK to a request for a part", "does not serve ranges"],
    },
    Case {
        name: "a redirect to itself",
        behave: |b| b.odd = Some((Odd::Redirect("{path}".to_owned()), None)),
        class: "protocol",
        text: &["redirects in a circle", "127.0.0.1"],
    },
    Case {
        name: "redirects without an end",
        behave: |b| b.odd = Some((Odd::Redirect("/x{path}".to_owned()), None)),
        class: "protocol",
        text: &["more than 5 times"],
    },
    Case {
        name: "a redirect to nowhere",
        behave: |b| b.odd = Some((Odd::Redirect("http://127.0.0.1:1/x".to_owned()), None)),
        class: "unreachable",
        text: &["127.0.0.1:1, where it redirects", "refused"],
    },
    Case {
        name: "a redirect to a file",
        behave: |b| b.odd = Some((Odd::Redirect("file:///etc/passwd".to_owned()), None)),
        class: "protocol",
        text: &["redirects to"],
    },
    Case {
        name: "a signed URL that is refused",
        behave: |b| b.odd = Some((Odd::Redirect("http://localhost:{port}{path}?signature=9".to_owned()), None)),
        class: "denied",
        text: &["403 Forbidden from localhost"],
    },
    Case { name: "silence", behave: |b| b.stall_after = Some(0), class: "stalled", text: &["sent nothing for 1s"] },
    Case { name: "a body that falls silent", behave: |b| b.stall_after = Some(60_000), class: "", text: &[] },
    Case {
        name: "a body that breaks at once, each time",
        behave: |b| b.break_after = Some((0, 1000)),
        class: "unreachable",
        text: &["the connection broke"],
    },
];

#[tokio::test]
async fn every_fault_has_its_error_and_ends_with_its_cause() {
    for case in CASES {
        let registry = FakeRegistry::start().await;
        let (blob, other) = (registry.put_blob(bytes()), registry.put_blob(vec![7; 5000]));
        let directory = tempfile::tempdir().unwrap();
        let empty = directory.path().join("config.json");
        std::fs::write(&empty, "{}").unwrap();
        let mut config = registry.config();
        config.hosts.values_mut().for_each(|host| host.docker_config = Some(empty.clone()));
        let client = of(config);
        registry.set(case.behave);
        // Only one blob is harmed, as far as the fault can be narrowed down.
        registry.set(|behaviour| {
            if let Some((odd, only)) = &mut behaviour.odd {
                *only = Some(blob.digest);
                if let Odd::Redirect(to) = odd {
                    *to = to.replace("{port}", &registry.address().port().to_string());
                }
            }
        });
        let end = read(&client, &blob, 10, Some(100_000)).await;
        if case.class.is_empty() {
            assert_eq!(end.expect(case.name), bytes()[10..100_000], "{}: is taken up where it broke", case.name);
            continue;
        }
        let error = end.expect_err(case.name);
        let text = error.to_string();
        assert_eq!(class(&error.fault), case.class, "{}: {text}", case.name);
        for part in [registry.host().as_str(), "team/app", &blob.digest.to_string()].iter().chain(case.text) {
            assert!(text.contains(part), "{}: {part:?} is not in: {text}", case.name);
        }
        assert!(text.len() < 900 && !text.contains(['\n', '\r']), "{}: {text}", case.name);
        if registry.seen().iter().all(|seen| !seen.path.contains("/token")) && class(&error.fault) == "protocol" {
            let harmless = read(&client, &other, 0, None).await;
            assert_eq!(harmless.expect(case.name), vec![7; 5000], "{}: others are not harmed", case.name);
        }
        registry.set(|behaviour| *behaviour = Behaviour::default());
        let again = eventually(|| read(&client, &blob, 10, Some(100_000))).await;
        assert_eq!(again, bytes()[10..100_000], "{}: works again", case.name);
    }
}

#[tokio::test]
async fn unreachable_places_are_told_apart() {
    let registry = FakeRegistry::start().await;
    let mut blob = registry.put_blob(bytes());
    // A resolver without a network takes its time.
    let patient = Options { connect_timeout: Duration::from_secs(60), stall_timeout: Duration::from_secs(60) };
    let client = Client::with_environment(registry.config(), patient, Environment::default());
    for (host, wanted, part) in
        [("127.0.0.1:1", "unreachable", "refused"), ("no-such-host.invalid", "name", "this machine's DNS")]
    {
        blob.registry = host.to_owned();
        let error = read(&client, &blob, 0, Some(10)).await.unwrap_err();
        assert_eq!(class(&error.fault), wanted, "{error}");
        assert!(error.to_string().contains(part) && error.is_transient(), "{error}");
    }
}

#[tokio::test]
async fn tokens_are_fetched_once_and_renewed_when_refused() {
    let registry = FakeRegistry::start().await;
    registry.set(|behaviour| behaviour.token = true);
    let blob = registry.put_blob(bytes());
    let client = client(&registry);
    let reads = (0..20).map(|_| read(&client, &blob, 0, Some(10)));
    for result in futures_util::future::join_all(reads).await {
        assert_eq!(result.unwrap(), bytes()[..10]);
    }
    assert_eq!(registry.requests().tokens, 1, "twenty requests share one token");
    registry.set(|behaviour| behaviour.token_epoch += 1);
    assert_eq!(read(&client, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    assert_eq!(registry.requests().tokens, 2);
    let before = registry.requests().blobs;
    assert_eq!(read(&client, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    assert_eq!(registry.requests().blobs, before + 1, "a known token is sent at once");
}

#[tokio::test]
async fn a_token_is_renewed_before_it_expires() {
    let registry = FakeRegistry::start().await;
    registry.set(|behaviour| (behaviour.token, behaviour.token_validity) = (true, Some(0)));
    let blob = registry.put_blob(bytes());
    let client = client(&registry);
    for tokens in 1..4 {
        assert_eq!(read(&client, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
        assert_eq!(registry.requests().tokens, tokens);
    }
    assert_eq!(registry.requests().blobs, 4, "only the first was refused");
}

#[tokio::test]
async fn a_refused_token_is_tried_again_only_once() {
    let registry = FakeRegistry::start().await;
    // Its tokens never fit.
    registry.set(|behaviour| {
        behaviour.token = true;
        behaviour.token_odd = Some((200, r#"{"token":"of another service"}"#.to_owned()));
    });
    let blob = registry.put_blob(bytes());
    let error = read(&client(&registry), &blob, 0, Some(10)).await.unwrap_err();
    assert_eq!(class(&error.fault), "denied", "{error}");
    assert_eq!((registry.requests().blobs, registry.requests().tokens), (2, 1));
}

#[tokio::test]
async fn one_failed_token_request_answers_all_who_wait() {
    let registry = FakeRegistry::start().await;
    registry.set(|behaviour| (behaviour.token, behaviour.token_odd) = (true, Some((401, String::new()))));
    let blob = registry.put_blob(bytes());
    let client = client(&registry);
    let reads = (0..20).map(|_| read(&client, &blob, 0, Some(10)));
    for result in futures_util::future::join_all(reads).await {
        assert_eq!(class(&result.unwrap_err().fault), "denied");
    }
    assert!(registry.requests().tokens < 10, "{:?}", registry.requests());
}

#[tokio::test]
async fn credentials_come_from_docker_s_configuration() {
    let registry = FakeRegistry::start().await;
    let blob = registry.put_blob(bytes());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    let write = |entry: serde_json::Value| {
        std::fs::write(&path, serde_json::json!({ "auths": { registry.host(): entry } }).to_string()).unwrap();
    };
    let mut config = registry.config();
    config.hosts.values_mut().for_each(|config| config.docker_config = Some(path.clone()));
    for token in [false, true] {
        registry.set(|behaviour| {
            behaviour.credentials = Some(("user".to_owned(), "secret".to_owned()));
            behaviour.token = token;
        });
        write(serde_json::json!({ "auth": "dXNlcjp3cm9uZw==" }));
        let client = of(config.clone());
        let error = read(&client, &blob, 0, Some(10)).await.unwrap_err();
        assert_eq!(class(&error.fault), "denied");
        assert!(error.to_string().contains("check the credentials") && !error.to_string().contains("wrong"), "{error}");
        write(serde_json::json!({ "auth": "dXNlcjpzZWNyZXQ=" }));
        assert_eq!(read(&client, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    }
    registry.set(|behaviour| {
        behaviour.credentials = None;
        behaviour.identity = Some("refresh me".to_owned());
    });
    write(serde_json::json!({ "auth": "", "identitytoken": "refresh me" }));
    let client = of(config.clone());
    assert_eq!(read(&client, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    config.hosts.values_mut().for_each(|config| config.docker_config = Some("/nonexistent".into()));
    let error = read(&of(config), &blob, 0, None).await.unwrap_err();
    assert!(class(&error.fault) == "credentials" && error.to_string().contains("/nonexistent"), "{error}");
}

#[tokio::test]
async fn signed_urls_are_used_until_they_fail() {
    let registry = FakeRegistry::start().await;
    registry.set(|behaviour| {
        behaviour.token = true;
        behaviour.redirect_epoch = Some(1);
    });
    let blob = registry.put_blob(bytes());
    let client = client(&registry);
    for _ in 0..3 {
        assert_eq!(read(&client, &blob, 5, Some(10)).await.unwrap(), bytes()[5..10]);
    }
    assert_eq!(registry.requests().blobs, 2, "one refused without a token, one redirected");
    registry.set(|behaviour| behaviour.redirect_epoch = Some(2));
    assert_eq!(read(&client, &blob, 5, Some(10)).await.unwrap(), bytes()[5..10]);
    assert_eq!(registry.requests().blobs, 3);
}

#[tokio::test]
async fn a_busy_registry_rests() {
    let registry = FakeRegistry::start().await;
    registry.set(|behaviour| behaviour.too_many = (1, Some("1".to_owned())));
    let blob = registry.put_blob(bytes());
    let client = client(&registry);
    for _ in 0..3 {
        let error = read(&client, &blob, 0, None).await.unwrap_err();
        assert!(error.retry_after().is_some_and(|after| after <= Duration::from_secs(1)), "{error}");
    }
    assert_eq!(registry.requests().blobs, 1, "it is not asked while it rests");
    eventually(|| read(&client, &blob, 0, None)).await;
    registry.set(|behaviour| behaviour.too_many = (1, Some("Fri, 31 Dec 9999 23:59:59 GMT".to_owned())));
    let error = read(&client, &blob, 0, None).await.unwrap_err();
    assert!(error.retry_after().is_some_and(|after| after <= Duration::from_secs(300)), "{error}");
}

#[tokio::test]
async fn a_download_sits_rests_out_and_goes_on_where_it_broke() {
    let registry = FakeRegistry::start().await;
    let blob = registry.put_blob(bytes());
    let client = client(&registry);
    registry.set(|behaviour| {
        behaviour.too_many = (1, Some("0".to_owned()));
        behaviour.break_after = Some((300_000, 3));
    });
    assert_eq!(download(&client, &blob, 0).await.unwrap(), bytes());
    // What was in the line when it broke comes again, all before that does not.
    assert!(registry.requests().bytes < BLOB as u64 + 3 * 300_000, "{:?}", registry.requests());
    assert_eq!(registry.requests().bodies, 4);
    registry.set(|behaviour| behaviour.stall_after = Some(100_000));
    let mut stalled = client.download(&blob, 0);
    assert!(stalled.next().await.unwrap().is_some());
    registry.set(|behaviour| behaviour.stall_after = None);
    let mut left = 0;
    while let Some(bytes) = stalled.next().await.unwrap() {
        left += bytes.len();
    }
    assert!(left > BLOB / 2, "a stall is cut and the rest comes over another connection");
}

#[tokio::test]
async fn slow_connections_are_joined_by_others_in_order() {
    let registry = FakeRegistry::start().await;
    // 64 KiB every 5 ms: 13 MB/s over each connection, whatever their number.
    registry.set(|behaviour| behaviour.pause = Duration::from_millis(5));
    let whole: Vec<u8> = (0..48usize << 20).map(|at| (at * 7 + at / 251) as u8).collect();
    let blob = registry.put_blob(whole.clone());
    let client = Client::with_environment(registry.config(), Options::default(), Environment::default());
    let (started, mut transfer, mut at, mut widest) = (Instant::now(), client.download(&blob, 0), 0, 1);
    while let Some(bytes) = transfer.next().await.unwrap() {
        assert!(whole[at..at + bytes.len()] == bytes[..], "at {at}");
        at += bytes.len();
        widest = widest.max(transfer.width());
    }
    assert_eq!(at, whole.len());
    assert!(widest > 1, "took {:?}", started.elapsed());
    let extra = registry.requests().bytes - whole.len() as u64;
    assert!(extra < 4 << 20, "{extra} bytes came for nothing");
}

#[tokio::test]
async fn a_shared_line_is_left_at_one_connection() {
    let registry = FakeRegistry::start().await;
    registry.set(|behaviour| behaviour.rate = Some(8 << 20));
    let blob = registry.put_blob(vec![1; 28 << 20]);
    let client = Client::with_environment(registry.config(), Options::default(), Environment::default());
    let mut transfer = client.download(&blob, 0);
    let (mut at, mut widths) = (0, Vec::new());
    while let Some(bytes) = transfer.next().await.unwrap() {
        at += bytes.len();
        widths.push(transfer.width());
    }
    assert_eq!(at, 28 << 20);
    assert!(widths.iter().all(|width| *width <= 2), "one more is tried");
    assert_eq!(widths.last(), Some(&1), "and given up");
}

fn certs_d(root: &Path, registry: &str, text: &str) {
    std::fs::create_dir_all(root.join(registry)).unwrap();
    std::fs::write(root.join(registry).join("hosts.toml"), text).unwrap();
}

#[tokio::test]
async fn mirrors_are_asked_in_order_with_ns_and_headers() {
    let (first, second, upstream) =
        (FakeRegistry::start().await, FakeRegistry::start().await, FakeRegistry::start().await);
    let blob = upstream.put_blob(bytes());
    second.put_blob(bytes());
    let root = tempfile::tempdir().unwrap();
    let name = upstream.host();
    let text = format!(
        "[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n\
         [host.\"http://{}\".header]\nx-key = \"secret\"",
        first.host(),
        second.host(),
        second.host()
    );
    certs_d(root.path(), &name, &text);
    let mut config = upstream.config();
    config.config_path = vec![root.path().to_owned()];
    let client = of(config);
    assert_eq!(read(&client, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    assert_eq!((first.requests().blobs, second.requests().blobs, upstream.requests().blobs), (1, 1, 0));
    let seen = second.seen();
    let ns: String = url::form_urlencoded::byte_serialize(name.as_bytes()).collect();
    assert!(seen[0].path.ends_with(&format!("?ns={ns}")), "{}", seen[0].path);
    assert_eq!(seen[0].headers["x-key"], "secret");

    // A tag is only for who may resolve.
    let manifest = serde_json::json!({ "schemaVersion": 2, "layers": [] });
    upstream.put_manifest("team/app", Some("1"), "application/vnd.oci.image.manifest.v1+json", &manifest);
    client.manifest(&name, "team/app", "1").await.unwrap();
    assert_eq!(second.seen().len(), 1);
    assert_eq!(upstream.seen().len(), 1);
    assert!(!upstream.seen()[0].path.contains("ns="));

    // Keys stay with their host.
    second.set(|behaviour| behaviour.redirect_epoch = Some(1));
    assert_eq!(read(&client, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    let signed = second.seen().into_iter().find(|seen| seen.path.contains("signature=")).expect("was redirected");
    assert!(!signed.headers.contains_key("x-key") && !signed.headers.contains_key("authorization"));

    // All fail: the registry's own error, and the mirrors' beside it.
    let mut missing = blob.clone();
    missing.digest = Digest::of(b"missing");
    let error = read(&client, &missing, 0, None).await.unwrap_err();
    let text = error.to_string();
    assert_eq!(class(&error.fault), "not found", "{text}");
    assert!(text.contains(&format!("mirror {} of {name}", first.host())), "{text}");
}

#[tokio::test]
async fn a_dead_mirror_costs_once() {
    let upstream = FakeRegistry::start().await;
    let blob = upstream.put_blob(bytes());
    // Accepts and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let root = tempfile::tempdir().unwrap();
    let text = format!("[host.\"http://{}\"]", silent.local_addr().unwrap());
    certs_d(root.path(), &upstream.host(), &text);
    let mut config = upstream.config();
    config.config_path = vec![root.path().to_owned()];
    let client = of(config);
    let started = Instant::now();
    for _ in 0..5 {
        assert_eq!(read(&client, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    }
    assert!(started.elapsed() < quick().stall_timeout * 3, "{:?}", started.elapsed());
}

#[tokio::test]
async fn hosts_toml_is_read_again_when_it_changes() {
    let (mirror, upstream) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let blob = upstream.put_blob(bytes());
    mirror.put_blob(bytes());
    let root = tempfile::tempdir().unwrap();
    let mut config = upstream.config();
    config.config_path = vec![root.path().to_owned()];
    let client = of(config);
    assert_eq!(read(&client, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    certs_d(root.path(), &upstream.host(), &format!("server = \"http://{}\"", mirror.host()));
    tokio::time::timeout(Duration::from_secs(10), async {
        while mirror.requests().blobs == 0 {
            assert_eq!(read(&client, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("the mirror is asked");
    certs_d(root.path(), &upstream.host(), "server = [");
    let error = tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            if let Err(error) = read(&client, &blob, 0, Some(10)).await {
                return error;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let error = error.await.expect("the broken file is noticed");
    assert!(class(&error.fault) == "configuration" && error.to_string().contains("hosts.toml"), "{error}");
    std::fs::remove_dir_all(root.path().join(upstream.host())).unwrap();
    assert_eq!(read(&client, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
}

#[tokio::test]
async fn foreign_layers_come_from_their_urls_first() {
    let (registry, elsewhere) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let mut blob = registry.put_blob(bytes());
    elsewhere.put_file("/layers/one", bytes());
    elsewhere.set(|behaviour| behaviour.credentials = Some(("user".to_owned(), "secret".to_owned())));
    let mut config = registry.config();
    config.hosts.extend(elsewhere.config().hosts);
    let client = of(config);
    blob.urls = vec!["ftp://x/y".to_owned(), format!("http://{}/layers/one", elsewhere.host())];
    assert_eq!(read(&client, &blob, 5, Some(10)).await.unwrap(), bytes()[5..10]);
    assert_eq!(registry.requests().blobs, 0);
    assert!(!elsewhere.seen()[0].headers.contains_key("authorization"));
    // Not there: the registry may have a copy.
    blob.urls = vec![format!("http://{}/layers/two", elsewhere.host()), "http://127.0.0.1:1/insecure".to_owned()];
    assert_eq!(read(&client, &blob, 5, Some(10)).await.unwrap(), bytes()[5..10]);
    assert_eq!(registry.requests().blobs, 1);
}

/// An authority and a certificate for 127.0.0.1 and r.test.
fn authority(directory: &Path) -> (PathBuf, Issued) {
    ca::init(directory, &AuthorityOptions::default()).unwrap();
    (directory.join("ca.crt"), issue(directory, "server", &["127.0.0.1", "r.test"]))
}

fn issue(directory: &Path, name: &str, addresses: &[&str]) -> Issued {
    let options = CertificateOptions {
        role: Role::Node,
        name: name.to_owned(),
        addresses: addresses.iter().map(|address| (*address).to_owned()).collect(),
        validity: Duration::from_secs(3600),
    };
    ca::issue(directory, directory, &options, false).unwrap()
}

#[tokio::test]
async fn tls_has_own_authorities_and_client_certificates() {
    let directory = tempfile::tempdir().unwrap();
    let (authority, server) = authority(directory.path());
    let mine = issue(directory.path(), "mine", &[]);
    let registry = FakeRegistry::start_tls(&server.certificate, &server.key, Some(&authority)).await;
    let blob = registry.put_blob(bytes());
    let with = |change: &dyn Fn(&mut crate::config::RegistryConfig)| {
        let mut config = registry.config();
        config.hosts.values_mut().for_each(change);
        of(config)
    };
    let error = read(&with(&|_| {}), &blob, 0, Some(10)).await.unwrap_err();
    assert!(class(&error.fault) == "tls" && error.to_string().contains("client certificate"), "{error}");
    let trusting = with(&|host| host.ca = Some(authority.clone()));
    let error = read(&trusting, &blob, 0, Some(10)).await.unwrap_err();
    assert!(class(&error.fault) == "tls" && error.to_string().contains("client certificate"), "{error}");
    let complete = with(&|host| {
        host.ca = Some(authority.clone());
        host.certificate = Some(mine.certificate.clone());
        host.key = Some(mine.key.clone());
    });
    assert_eq!(read(&complete, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);

    // The same by hosts.toml, and with another authority.
    let root = tempfile::tempdir().unwrap();
    let mut config = registry.config();
    config.config_path = vec![root.path().to_owned()];
    let text = format!(
        "server = \"https://{}\"\nca = {:?}\nclient = [[{:?}, {:?}]]",
        registry.host(),
        authority,
        mine.certificate,
        mine.key
    );
    certs_d(root.path(), &registry.host(), &text);
    assert_eq!(read(&of(config.clone()), &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    let other = tempfile::tempdir().unwrap();
    ca::init(other.path(), &AuthorityOptions::default()).unwrap();
    certs_d(root.path(), &registry.host(), &text.replacen("ca.crt", "missing.crt", 1));
    let error = read(&of(config.clone()), &blob, 0, Some(10)).await.unwrap_err();
    assert!(class(&error.fault) == "configuration" && error.to_string().contains("missing.crt"), "{error}");
    let strange = format!("server = \"https://{}\"\nca = {:?}", registry.host(), other.path().join("ca.crt"));
    certs_d(root.path(), &registry.host(), &strange);
    let error = read(&of(config), &blob, 0, Some(10)).await.unwrap_err();
    assert!(class(&error.fault) == "tls" && error.to_string().contains("name its authority"), "{error}");
}

#[tokio::test]
async fn plain_http_and_tls_are_told_apart() {
    let plain = FakeRegistry::start().await;
    let blob = plain.put_blob(bytes());
    // On this machine containerd takes either.
    let config = RegistriesConfig { config_path: Vec::new(), ..RegistriesConfig::default() };
    assert_eq!(read(&of(config.clone()), &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    let directory = tempfile::tempdir().unwrap();
    let (authority, server) = authority(directory.path());
    let tls = FakeRegistry::start_tls(&server.certificate, &server.key, None).await;
    let secure = tls.put_blob(bytes());
    assert_eq!(read(&of(config), &secure, 0, Some(10)).await.unwrap(), bytes()[..10]);
    // With an authority TLS is meant.
    let mut config = plain.config();
    config.hosts.values_mut().for_each(|host| (host.plain_http, host.ca) = (false, Some(authority.clone())));
    let error = read(&of(config), &blob, 0, Some(10)).await.unwrap_err();
    assert!(class(&error.fault) == "tls" && error.to_string().contains("plain HTTP"), "{error}");
}

#[tokio::test]
async fn proxies_carry_requests_and_have_errors_of_their_own() {
    let behind = FakeRegistry::start().await;
    let mut blob = behind.put_blob(bytes());
    blob.registry = "r.test".to_owned();
    let plain = |proxies: Proxies| {
        let table = crate::config::RegistryConfig { plain_http: true, ..crate::config::RegistryConfig::default() };
        let config = RegistriesConfig { config_path: Vec::new(), hosts: [("r.test".to_owned(), table)].into() };
        Client::with_environment(config, quick(), Environment { proxies, ..Environment::default() })
    };
    // The fake takes the whole URL of a request, as a proxy gets it, and answers for any host.
    let through = plain(Proxies::new(&behind.host(), "", "").unwrap());
    assert_eq!(read(&through, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    let dead = plain(Proxies::new("http://user:word@127.0.0.1:1", "", "").unwrap());
    let error = read(&dead, &blob, 0, Some(10)).await.unwrap_err();
    let text = error.to_string();
    assert!(class(&error.fault) == "proxy" && text.contains("127.0.0.1:1") && !text.contains("word"), "{text}");

    let directory = tempfile::tempdir().unwrap();
    let (authority, server) = authority(directory.path());
    let tls = FakeRegistry::start_tls(&server.certificate, &server.key, None).await;
    let mut blob = tls.put_blob(bytes());
    blob.registry = "r.test".to_owned();
    let secure = |url: &str| {
        let table =
            crate::config::RegistryConfig { ca: Some(authority.clone()), ..crate::config::RegistryConfig::default() };
        let config = RegistriesConfig { config_path: Vec::new(), hosts: [("r.test".to_owned(), table)].into() };
        let proxies = Proxies::new("", url, "").unwrap();
        Client::with_environment(config, quick(), Environment { proxies, ..Environment::default() })
    };
    let tunnel = FakeTunnel::start(Some(tls.address())).await;
    assert_eq!(read(&secure(&tunnel.url()), &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    assert_eq!(tunnel.asked(), ["r.test:443"]);
    let refusing = FakeTunnel::start(None).await;
    let error = read(&secure(&refusing.url()), &blob, 0, Some(10)).await.unwrap_err();
    assert!(class(&error.fault) == "proxy" && error.to_string().contains("HTTPS_PROXY"), "{error}");
}

#[tokio::test]
async fn names_cannot_lead_elsewhere() {
    let registry = FakeRegistry::start().await;
    let client = client(&registry);
    let blob = registry.put_blob(bytes());
    for repository in ["../x", "a//b", "a/../b", "a?b", "A", "a#b", "", "/a"] {
        let mut odd = blob.clone();
        odd.repository = repository.to_owned();
        let error = read(&client, &odd, 0, None).await.unwrap_err();
        assert_eq!(class(&error.fault), "protocol", "{repository:?} was taken");
    }
    for host in ["", "a/b", "user@host", "a b", "host#x", ".."] {
        let mut odd = blob.clone();
        odd.registry = host.to_owned();
        let error = read(&client, &odd, 0, None).await.unwrap_err();
        assert_eq!(class(&error.fault), "protocol", "{host:?} was taken");
    }
    assert_eq!(registry.requests().blobs, 0);
}

#[tokio::test]
async fn manifests_are_checked_and_bounded() {
    let registry = FakeRegistry::start().await;
    let client = Client::with_environment(registry.config(), Options::default(), Environment::default());
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let small = registry.put_manifest("team/app", Some("1"), kind, &serde_json::json!({ "layers": [] }));
    let found = client.manifest(&registry.host(), "team/app", "1").await.unwrap();
    assert_eq!((found.digest, found.media_type.as_str()), (small, kind));
    let large = serde_json::json!({ "layers": "x".repeat(MANIFEST_BYTES_MAX) });
    registry.put_manifest("team/app", Some("large"), kind, &large);
    let error = client.manifest(&registry.host(), "team/app", "large").await.unwrap_err().to_string();
    assert!(error.contains("larger than") && error.contains("team/app:large"), "{error}");
    let lie = Digest::of(b"other").to_string();
    registry.put_manifest("team/app", Some(&lie), kind, &serde_json::json!({}));
    let error = client.manifest(&registry.host(), "team/app", &lie).await.unwrap_err().to_string();
    assert!(error.contains("not the one that was asked for"), "{error}");
    let error = client.manifest(&registry.host(), "team/app", "../x").await.unwrap_err().to_string();
    assert!(error.contains("no tag and no digest"), "{error}");
}
