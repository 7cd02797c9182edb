use super::super::fake::FakeRegistry;
use super::*;

const BLOB: usize = 1 << 20;

fn bytes() -> Vec<u8> {
    (0..BLOB).map(|at| (at * 7 + at / 251) as u8).collect()
}

fn quick() -> Options {
    Options { connect_timeout: Duration::from_secs(2), stall_timeout: Duration::from_millis(300) }
}

fn client(registry: &FakeRegistry) -> Client {
    Client::new(registry.config(), quick())
}

async fn read(client: &Client, blob: &BlobRef, start: u64, end: Option<u64>) -> Result<Vec<u8>, RegistryError> {
    let mut body = client.blob(blob, start, end).await?;
    let mut read = Vec::new();
    while let Some(bytes) = body.next().await? {
        read.extend_from_slice(&bytes);
    }
    Ok(read)
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
    let mut missing = blob.clone();
    missing.digest = Digest::of(b"other");
    assert!(matches!(read(&client, &missing, 0, None).await, Err(RegistryError::NotFound { .. })));
}

#[tokio::test]
async fn a_registry_without_ranges_serves_only_resumption() {
    let registry = FakeRegistry::start().await;
    registry.set(|behaviour| behaviour.ignore_ranges = true);
    let blob = registry.put_blob(bytes());
    let client = client(&registry);
    assert_eq!(read(&client, &blob, 500_000, None).await.unwrap(), bytes()[500_000..]);
    assert!(matches!(read(&client, &blob, 0, Some(10)).await, Err(RegistryError::Protocol { .. })));
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
}

#[tokio::test]
async fn credentials_come_from_docker_s_configuration() {
    let registry = FakeRegistry::start().await;
    let blob = registry.put_blob(bytes());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    let write = |auth: &str| {
        std::fs::write(&path, serde_json::json!({ "auths": { registry.host(): { "auth": auth } } }).to_string())
            .unwrap();
    };
    for token in [false, true] {
        registry.set(|behaviour| {
            behaviour.credentials = Some(("user".to_owned(), "secret".to_owned()));
            behaviour.token = token;
        });
        let mut config = registry.config();
        config.0.values_mut().for_each(|config| config.docker_config = Some(path.clone()));
        write("dXNlcjp3cm9uZw==");
        let client = Client::new(config, quick());
        assert!(matches!(read(&client, &blob, 0, Some(10)).await, Err(RegistryError::Denied { .. })));
        write("dXNlcjpzZWNyZXQ=");
        assert_eq!(read(&client, &blob, 0, Some(10)).await.unwrap(), bytes()[..10]);
    }
}

#[tokio::test]
async fn missing_credentials_are_named() {
    let registry = FakeRegistry::start().await;
    registry.set(|behaviour| behaviour.credentials = Some(("user".to_owned(), "secret".to_owned())));
    let blob = registry.put_blob(bytes());
    let mut config = registry.config();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("empty.json"), "{}").unwrap();
    config.0.values_mut().for_each(|config| config.docker_config = Some(directory.path().join("empty.json")));
    let error = read(&Client::new(config.clone(), quick()), &blob, 0, None).await.unwrap_err().to_string();
    assert!(error.contains("none are configured"), "{error}");
    config.0.values_mut().for_each(|config| config.docker_config = Some("/nonexistent".into()));
    let error = read(&Client::new(config, quick()), &blob, 0, None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Credentials { .. }), "{error}");
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
        let RegistryError::Busy { retry_after: Some(after), .. } = error else { panic!("{error}") };
        assert!(after <= Duration::from_secs(1));
    }
    assert_eq!(registry.requests().blobs, 1, "it is not asked while it rests");
    tokio::time::timeout(Duration::from_secs(10), async {
        while read(&client, &blob, 0, None).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("it is asked again");
}

#[tokio::test]
async fn broken_and_stalled_bodies_are_errors() {
    let registry = FakeRegistry::start().await;
    let blob = registry.put_blob(bytes());
    let client = client(&registry);
    registry.set(|behaviour| behaviour.break_after = Some((100_000, 1)));
    assert!(matches!(read(&client, &blob, 0, None).await, Err(RegistryError::Unreachable { .. })));
    registry.set(|behaviour| behaviour.stall_after = Some(100_000));
    assert!(matches!(read(&client, &blob, 0, None).await, Err(RegistryError::Stalled { .. })));
}

#[tokio::test]
async fn names_cannot_lead_elsewhere() {
    let registry = FakeRegistry::start().await;
    let client = client(&registry);
    let blob = registry.put_blob(bytes());
    for repository in ["../x", "a//b", "a/../b", "a?b", "A", "a#b", "", "/a"] {
        let mut odd = blob.clone();
        odd.repository = repository.to_owned();
        assert!(
            matches!(read(&client, &odd, 0, None).await, Err(RegistryError::Protocol { .. })),
            "{repository:?} was taken"
        );
    }
    for host in ["", "a/b", "user@host", "a b", "host#x"] {
        let mut odd = blob.clone();
        odd.registry = host.to_owned();
        assert!(
            matches!(read(&client, &odd, 0, None).await, Err(RegistryError::Protocol { .. })),
            "{host:?} was taken"
        );
    }
    assert_eq!(registry.requests().blobs, 0);
}

#[test]
fn content_ranges_are_read_strictly() {
    assert_eq!(parse_content_range("bytes 0-9/10"), Some((0..10, Some(10))));
    assert_eq!(parse_content_range("bytes 5-5/*"), Some((5..6, None)));
    for odd in ["bytes */10", "bytes 9-5/10", "bytes 0-10/10", "0-9/10", "bytes 0-18446744073709551615/*", ""] {
        assert_eq!(parse_content_range(odd), None, "{odd:?}");
    }
}
