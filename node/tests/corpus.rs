//! Replays the fuzz corpus on stable Rust.

use std::fs;
use std::path::{Path, PathBuf};

#[allow(dead_code, unreachable_pub)]
#[path = "../../fuzz/src/answers.rs"]
mod answers;
#[allow(dead_code, unreachable_pub)]
#[path = "../../fuzz/src/grants.rs"]
mod grants;
#[allow(dead_code, unreachable_pub)]
#[path = "../../fuzz/src/mesh.rs"]
mod mesh;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use node::security::Signed;
use prost::Message as _;
use proto::drover::mesh::v1::{Delegate, Haves, Hello, LayerHaves, ToNeighbour, ToSeeder, to_neighbour, to_seeder};

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

#[test]
fn answers_corpus() {
    replay("answers", answers::answers);
}

#[test]
fn mesh_corpus() {
    replay("mesh", mesh::mesh);
}

#[test]
fn grants_corpus() {
    replay("grants", grants::grants);
}

fn replay(target: &str, run: fn(&[u8])) {
    let mut count = 0;
    for file in fs::read_dir(corpus(target)).expect("corpus") {
        let path = file.expect("corpus").path();
        eprintln!("{}", path.display());
        let input = fs::read(&path).expect("corpus");
        run(&input);
        count += 1;
        if !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("seed-")) {
            continue;
        }
        // What is cut off or changed must hold as well.
        for at in 0..input.len().min(400) {
            run(&input[..at]);
            let mut changed = input.clone();
            changed[at] ^= 1 << (at % 8);
            run(&changed);
        }
    }
    assert!(count > 0, "no inputs for {target}");
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

/// The same for what machines show. Nobody signed it: the targets run without security.
#[test]
#[ignore = "writes into the source tree"]
fn write_grant_seeds() {
    let write = |name: &str, choice: u8, bytes: &[u8]| {
        fs::create_dir_all(corpus("grants")).expect("corpus");
        fs::write(corpus("grants").join(format!("seed-{name}")), [&[choice], bytes].concat()).expect("corpus");
    };
    let grant = |stage: u8| {
        let mut statement = b"drover grant statement v1\n".to_vec();
        statement.extend([7; 32]);
        statement.extend([8; 32]);
        for time in [990_u64, 1050, 980] {
            statement.extend(time.to_le_bytes());
        }
        statement.push(stage);
        let registry = b"registry.test:5000";
        statement.extend((registry.len() as u16).to_le_bytes());
        statement.extend(registry);
        statement.extend(b"team/app");
        let signed = Signed { signature: vec![1; 70], certificates: vec![vec![2; 300], vec![3; 10]] };
        [&(statement.len() as u32).to_le_bytes()[..], &statement, &signed.encode()].concat()
    };
    let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes).into_bytes();
    write("grant", 0, &grant(0));
    write("grant-ingest", 0, &grant(1));
    write("header", 1, &text(&grant(0)));
    write("header-ingest", 1, &text(&grant(1)));
    let hex = |byte: &str| byte.repeat(32);
    write("token", 2, format!("drover-0123456789abcdef-{}-{}", hex("ab"), hex("cd")).as_bytes());
}

/// The same for what machines of the mesh say.
#[test]
#[ignore = "writes into the source tree"]
fn write_mesh_seeds() {
    let write = |name: &str, choice: u8, parts: &[&[u8]]| {
        fs::create_dir_all(corpus("mesh")).expect("corpus");
        fs::write(corpus("mesh").join(format!("seed-{name}")), [&[choice][..], &parts.concat()].concat())
            .expect("corpus");
    };
    let on = |line: u8, message: &[u8]| [&[line, u8::try_from(message.len()).expect("short")], message].concat();
    let blob = mesh::blob().as_bytes().to_vec();
    let haves = |runs: &[u32]| Haves { blob: blob.clone(), runs: runs.to_vec(), fills: None };
    let hello = |address: &str| Hello { address: address.to_owned(), zone: "eu-1".to_owned(), leech: false };

    let says = |line: u8, message: to_seeder::Message| on(line, &ToSeeder { message: Some(message) }.encode_to_vec());
    use to_seeder::Message::{Accuse, Hello as Calls, Join, Leave, Report};
    let two = [
        says(0, Calls(hello(":7071"))),
        says(1, Calls(hello("10.0.0.1:7071"))),
        says(0, Join(haves(&[]))),
        says(1, Join(haves(&[0, 3, 5, 64]))),
        // No message: the node of that line asks for chunks.
        on(0, &[0xff]),
        says(0, Report(haves(&[3, 5]))),
        says(1, Accuse("10.0.0.0:7071".to_owned())),
        says(0, Leave(blob.clone())),
        says(1, Calls(hello(":7071"))),
    ];
    write("seeder", 0, &[&two.concat()]);
    let slander: Vec<u8> = (0..5)
        .flat_map(|line| [says(line, Calls(hello(":7071"))), says(line, Join(haves(&[0, 64])))].concat())
        .chain((1..5).flat_map(|line| says(line, Accuse("10.0.0.0:7071".to_owned()))))
        .collect();
    write("seeder-slander", 0, &[&slander]);

    let tells =
        |line: u8, message: to_neighbour::Message| on(line, &ToNeighbour { message: Some(message) }.encode_to_vec());
    use to_neighbour::Message::{Haves as Has, Hello as Greets};
    let delegates = vec![Delegate { id: 9, zone: 3, beat: 17 }, Delegate { id: u64::MAX, zone: 0, beat: u32::MAX }];
    let two = [
        tells(0, Greets(hello("10.0.0.1:7071"))),
        tells(0, Has(LayerHaves { haves: Some(haves(&[0, 64])), delegates, coming: Vec::new() })),
        tells(
            1,
            Has(LayerHaves {
                haves: Some(haves(&[60, 70, 4_000_000_000, u32::MAX])),
                delegates: Vec::new(),
                coming: Vec::new(),
            }),
        ),
    ];
    write("neighbour", 1, &[&two.concat()]);

    let layer = format!("/v1/layers/{}", mesh::blob());
    let asks =
        |name: &str, path: &str, headers: &str| write(name, 2, &[format!("{layer}{path}\n{headers}").as_bytes()]);
    asks("chunks", "/chunks/3-9", "drover-peer: 10.0.0.1:7071\ndrover-priority: demand");
    asks("chunks-busy", "/chunks/0-64", "drover-peer: [fd00::1]:7071\ndrover-priority: readahead");
    asks("chunks-outside", "/chunks/63-4294967295", "");
    asks("section", "/index/entries", "range: bytes=10-19");
    asks("section-end", "/index/spans", "range: bytes=-5");
    asks("header", "/index/header", "");
    asks("follow", "/follow", "drover-peer: x");
    write(
        "turned",
        3,
        &[b"drover-retry-ms: 1250\ndrover-peers: 10.0.0.1:7071;eu-1.a, [fd00::1]:7071,x\ndrover-peer: 10.0.0.2:1"],
    );
}
