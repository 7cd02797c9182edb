//! Replays the fuzz corpus on stable Rust.

use std::fs;
use std::path::{Path, PathBuf};

#[allow(dead_code, unreachable_pub)]
#[path = "../../fuzz/src/answers.rs"]
mod targets;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

#[test]
fn answers_corpus() {
    let mut count = 0;
    for file in fs::read_dir(corpus("answers")).expect("corpus") {
        let path = file.expect("corpus").path();
        eprintln!("{}", path.display());
        let input = fs::read(&path).expect("corpus");
        targets::answers(&input);
        count += 1;
        if !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("seed-")) {
            continue;
        }
        // What is cut off or changed must hold as well.
        for at in 0..input.len().min(400) {
            targets::answers(&input[..at]);
            let mut changed = input.clone();
            changed[at] ^= 1 << (at % 8);
            targets::answers(&changed);
        }
    }
    assert!(count > 0, "no inputs");
}

/// Writes the seeds. Run it after a change of what the inputs mean.
#[test]
#[ignore = "writes into the source tree"]
fn write_seeds() {
    let write = |name: &str, choice: u8, parts: &[&[u8]]| {
        fs::create_dir_all(corpus("answers")).expect("corpus");
        let bytes = [&[choice][..], &parts.concat()].concat();
        fs::write(corpus("answers").join(format!("seed-{name}")), bytes).expect("corpus");
    };
    let bearer =
        br#"Basic realm="a, b", Bearer realm="https://auth.test/token",service="r\"t",scope="repository:a/b:pull""#;
    write("challenge", 0, &[bearer]);
    write("challenge-odd", 0, &[b"Bearer realm=x,,scope=\"\\\", Negotiate abc==, basic"]);
    write("range", 1, &[&[4, 10, 0, 0, 0, 0, 0, 0, 0], b"bytes 10-99/1000"]);
    write("range-part", 1, &[&[5, 20, 0, 0, 0, 0, 0, 0, 0], b"bytes 10-30/*"]);
    write("range-unsatisfied", 1, &[&[7, 10, 0, 0, 0, 0, 0, 0, 0], b"bytes */10"]);
    write("retry-seconds", 2, &[b"120"]);
    write("retry-date", 2, &[b"Sun, 06 Nov 1994 08:49:37 GMT"]);
    write("location", 3, &[b"https://store.test/bucket/x?X-Amz-Signature=abc&X-Amz-Expires=1200"]);
    write("location-relative", 3, &[b"//other.test/../a?b#c"]);
    write("excerpt-json", 4, &[&[2], br#"{"errors":[{"code":"DENIED","message":"no\u0007","detail":{}}]}"#]);
    write("excerpt-xml", 4, &[&[4], b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"]);
    write("excerpt-html", 4, &[&[0], b"<!DOCTYPE html><h1>x</h1>"]);
    write("token", 5, &[br#"{"token":"abc","expires_in":300,"issued_at":"2020-01-01T00:00:00Z"}"#]);
    write("token-oauth", 5, &[br#"{"access_token":"abc","expires_in":1e3,"refresh_token":"r"}"#]);
    let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","size":2,"digest":"{digest}"}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip","size":5,"digest":"{digest}","urls":["https://x.test/y"]}}]}}"#
    );
    write("manifest", 6, &[manifest.as_bytes()]);
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":1,"digest":"{digest}","platform":{{"os":"linux","architecture":"amd64"}}}}]}}"#
    );
    write("index", 7, &[index.as_bytes()]);
    let hosts = "server = \"https://registry.test\"\n[host.\"https://mirror.test/a\"]\ncapabilities = [\"pull\"]\nca = [\"a\", \"b\"]\n\
        client = [[\"c\", \"k\"]]\nskip_verify = true\noverride_path = true\ndial_timeout = \"1m5.5s\"\nproxy = \"http://p:1\"\n\
        [host.\"https://mirror.test/a\".header]\nx = [\"1\", \"2\"]\n";
    write("hosts", 8, &[hosts.as_bytes()]);
    write("proxy", 8, &[b"http://user:word@proxy.test:3128\n.a.test,10.0.0.0/8,[fd00::]:5,fd00::/129,*.x:5,*"]);
    let config = br#"{"auths":{"https://registry.test:5000/v2/":{"auth":"dXNlcjpw"}},"credsStore":"x","credHelpers":{"registry.test:5000":"y"}}"#;
    write("docker", 9, &[config]);
}
