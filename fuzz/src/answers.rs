//! What registries, token servers and credential helpers say, and files that an operator wrote.

use std::path::Path;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use layer::Digest;
use node::registry::answer;
use node::registry::auth::{Challenge, read_token};
use node::registry::client::{Manifest, read_head};
use node::registry::credentials::{self, Found};
use node::registry::hosts;
use node::registry::image::{self, ImageRef, Step};
use node::registry::proxy::Proxies;
use url::Url;

/// The most characters of an error's text.
const TEXT_MAX: usize = 4096;

/// Input: one byte that says what the rest is, then what a registry, a token server, a helper or a file says.
pub fn answers(input: &[u8]) {
    let Some((choice, rest)) = input.split_first() else { return };
    match choice % 10 {
        0 => challenge(rest),
        1 => content_range(rest),
        2 => retry_after(rest),
        3 => location(rest),
        4 => excerpt(rest),
        5 => token(rest),
        6 => manifest(rest, ""),
        7 => manifest(rest, "application/vnd.oci.image.index.v1+json"),
        8 => hosts_toml(rest),
        _ => docker_config(rest),
    }
}

fn headers(name: HeaderName, value: &[u8]) -> Option<HeaderMap> {
    Some([(name, HeaderValue::from_bytes(value).ok()?)].into_iter().collect())
}

fn challenge(value: &[u8]) {
    let Some(headers) = headers(header::WWW_AUTHENTICATE, value) else { return };
    if let Some(Challenge::Bearer { realm, service, scope }) = Challenge::of(&headers) {
        for text in [Some(realm), service, scope].into_iter().flatten() {
            assert!(text.len() <= value.len());
        }
    }
}

fn content_range(input: &[u8]) {
    let Some((numbers, value)) = input.split_first_chunk::<9>() else { return };
    let [kind, numbers @ ..] = numbers;
    let number = u64::from_le_bytes(*numbers);
    let wanted = match kind % 3 {
        0 => 0..u64::MAX,
        1 => number..u64::MAX,
        _ => number / 2..(number / 2).saturating_add(1 + number % 1000),
    };
    let status =
        [StatusCode::OK, StatusCode::PARTIAL_CONTENT, StatusCode::RANGE_NOT_SATISFIABLE][usize::from(kind / 3) % 3];
    let headers = headers(header::CONTENT_RANGE, value).unwrap_or_default();
    let length = (kind % 2 == 0).then_some(number % 5000);
    match read_head(status, &headers, length, &wanted) {
        Ok(head) => {
            assert!(head.skip == 0 || head.skip == wanted.start);
            if let (StatusCode::PARTIAL_CONTENT, Some(len)) = (status, head.len) {
                assert!(len <= wanted.end - wanted.start, "no more than was asked for");
            }
        }
        Err(text) => assert!(text.len() < TEXT_MAX),
    }
    if let Ok(text) = std::str::from_utf8(value) {
        if let Some((range, total)) = answer::content_range(text) {
            assert!(range.start < range.end && total.is_none_or(|total| range.end <= total));
        }
        answer::unsatisfied_total(text);
    }
}

fn retry_after(value: &[u8]) {
    let Some(headers) = headers(header::RETRY_AFTER, value) else { return };
    answer::retry_after(&headers, SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
}

fn location(value: &[u8]) {
    let Some(headers) = headers(header::LOCATION, value) else { return };
    let from = Url::parse("https://registry.test:5000/v2/a/blobs/x?ns=b").expect("URL");
    for may_be_plain in [false, true] {
        match answer::location(&from, &headers, may_be_plain) {
            Ok(url) => assert!(url.has_host() && (url.scheme() == "https" || (may_be_plain && url.scheme() == "http"))),
            Err(text) => assert!(text.len() < TEXT_MAX + value.len()),
        }
    }
}

fn excerpt(input: &[u8]) {
    let Some((flags, body)) = input.split_first() else { return };
    let kind: &[u8] = [&b"text/html"[..], b"application/json", b"application/xml", b""][usize::from(flags / 2) % 4];
    let headers = headers(header::CONTENT_TYPE, kind).unwrap_or_default();
    let text = answer::excerpt(&headers, body, flags % 2 == 0);
    assert!(text.chars().count() <= 300 && !text.chars().any(char::is_control), "{text:?}");
}

fn token(body: &[u8]) {
    match read_token(body) {
        Ok((token, validity)) => assert!(!token.is_empty() && validity <= Duration::from_secs(24 * 3600)),
        Err(text) => assert!(text.len() < TEXT_MAX),
    }
}

fn manifest(bytes: &[u8], media_type: &str) {
    let image: ImageRef = "registry.test/team/app:1".parse().expect("reference");
    let mut found =
        Manifest { bytes: bytes.to_vec().into(), media_type: media_type.to_owned(), digest: Digest::of(bytes) };
    if let Ok(Step::Image(image)) = image::read(&image, &mut found, &"amd64".into()) {
        assert!(image.layers.len() <= bytes.len());
    }
}

fn hosts_toml(text: &[u8]) {
    let Ok(text) = std::str::from_utf8(text) else { return };
    match hosts::parse(text, Path::new("/certs.d/registry.test"), "registry.test:5000") {
        Ok(endpoints) => {
            assert!(!endpoints.is_empty());
            for endpoint in endpoints {
                assert!(matches!(endpoint.base.scheme(), "http" | "https") && endpoint.base.has_host());
                assert!(endpoint.base.path().ends_with('/') && endpoint.base.query().is_none());
            }
        }
        Err(error) => assert!(error.len() < TEXT_MAX + 4 * text.len()),
    }
    let (proxy, direct) = text.split_once('\n').unwrap_or((text, ""));
    if let Ok(proxies) = Proxies::new(proxy, proxy, direct) {
        for url in ["https://registry.test:5000/", "http://10.0.0.1/", "http://[fd00::1]:80/"] {
            proxies.of(&Url::parse(url).expect("URL"));
        }
    }
}

fn docker_config(text: &[u8]) {
    if let Ok(Found::Helper { name, .. }) = credentials::parse(text, "registry.test:5000") {
        assert!(!name.contains('/'), "a helper is found in PATH");
    }
}
