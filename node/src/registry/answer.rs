//! Reading what registries answer. Everything here takes any bytes.

use std::ops::Range;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, header};
use serde::Deserialize;
use url::Url;

use super::error::printable;

/// The most bytes of an error's body that are looked at.
pub const BODY_BYTES_MAX: usize = 4 << 10;
/// The most characters of it that are shown.
const SHOWN_MAX: usize = 240;

/// `Retry-After` in seconds or as a date (RFC 9110, 10.2.3), seen at `now`.
pub fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => Some(Duration::MAX),
        Err(_) => {
            let at = httpdate::parse_http_date(text).ok()?;
            Some(at.duration_since(now).unwrap_or_default())
        }
    }
}

/// `bytes FIRST-LAST/TOTAL` (RFC 9110, 14.4) as a half-open range.
pub fn content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (number(first)?, number(last)?);
    let total = match total.trim() {
        "*" => None,
        total => Some(number(total)?),
    };
    let end = last.checked_add(1)?;
    (first < end && total.is_none_or(|total| end <= total)).then_some((first..end, total))
}

/// TOTAL of `bytes */TOTAL`, as 416 answers carry it.
pub fn unsatisfied_total(text: &str) -> Option<u64> {
    number(text.strip_prefix("bytes")?.trim_start().strip_prefix("*/")?)
}

fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Where a redirect leads. Secure connections are not left: `may_be_plain` says that the start was not one.
pub fn location(from: &Url, headers: &HeaderMap, may_be_plain: bool) -> Result<Url, String> {
    let text = headers.get(header::LOCATION).and_then(|value| value.to_str().ok());
    let next = text
        .and_then(|text| from.join(text).ok())
        .ok_or("it redirects without a usable Location; a proxy or a broken registry does that")?;
    if next.as_str().len() > 16 << 10 || !next.has_host() {
        return Err("it redirects to a URL that cannot be used".to_owned());
    }
    match next.scheme() {
        "https" => Ok(next),
        "http" if may_be_plain => Ok(next),
        scheme => Err(format!(
            "it redirects to {scheme}://{}, which is not secure; the registry must redirect to https",
            next.host_str().unwrap_or_default()
        )),
    }
}

/// What the body of an error says, in one printable line; empty where it says nothing. Only the known fields of an answer
/// are repeated, unless `is_registry`: whoever leads a request elsewhere must not read what stands there.
pub fn excerpt(headers: &HeaderMap, body: &[u8], is_registry: bool) -> String {
    let body = body.get(..BODY_BYTES_MAX).unwrap_or(body);
    let text = String::from_utf8_lossy(body);
    let text = text.trim();
    if let Some(message) = json_message(body).or_else(|| xml_message(text)) {
        return printable(&message, SHOWN_MAX);
    }
    if is_html(headers) || text.starts_with("<!DOCTYPE") || text.starts_with("<html") {
        return "a page of HTML".to_owned();
    }
    if is_registry { printable(text, SHOWN_MAX) } else { String::new() }
}

/// Whether the answer is a page for people, as captive portals and log-in pages send.
pub fn is_html(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.trim_start().get(..9).is_some_and(|kind| kind.eq_ignore_ascii_case("text/html"))
}

/// The messages of an error in JSON: a registry's (OCI distribution specification, "Error Codes"), or a token server's.
fn json_message(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(default)]
        errors: Vec<One>,
        details: Option<String>,
        message: Option<String>,
        error_description: Option<String>,
        error: Option<serde_json::Value>,
    }
    #[derive(Deserialize)]
    struct One {
        code: Option<String>,
        message: Option<String>,
    }
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let texts: Vec<String> = answer
        .errors
        .into_iter()
        .take(3)
        .map(|one| [one.code, one.message].into_iter().flatten().collect::<Vec<_>>().join(": "))
        .collect();
    if !texts.is_empty() {
        return Some(texts.join("; "));
    }
    let error = answer.error.and_then(|error| error.as_str().map(str::to_owned));
    answer.error_description.or(answer.message).or(answer.details).or(error)
}

/// Code and message of an object store's error in XML.
fn xml_message(text: &str) -> Option<String> {
    let field = |name: &str| -> Option<&str> {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once("</").map(|(value, _)| value)
    };
    match (field("Code"), field("Message")) {
        (None, None) => None,
        (code, message) => Some([code, message].into_iter().flatten().collect::<Vec<_>>().join(": ")),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        [(name, HeaderValue::from_str(value).unwrap())].into_iter().collect()
    }

    #[test]
    fn waits_are_seconds_or_dates() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let at = |text: &str| retry_after(&headers(header::RETRY_AFTER, text), now);
        assert_eq!(at("120"), Some(Duration::from_secs(120)));
        assert_eq!(at("Sun, 06 Nov 1994 08:50:07 GMT"), Some(Duration::from_secs(30)));
        assert_eq!(at("Sun, 06 Nov 1994 08:49:07 GMT"), Some(Duration::ZERO), "a date that is over");
        assert_eq!(at("99999999999999999999999"), Some(Duration::MAX));
        for odd in ["", "-1", "soon", "1.5"] {
            assert_eq!(at(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn content_ranges_are_read_strictly() {
        assert_eq!(content_range("bytes 0-9/10"), Some((0..10, Some(10))));
        assert_eq!(content_range("bytes 5-5/*"), Some((5..6, None)));
        for odd in [
            "bytes */10",
            "bytes 9-5/10",
            "bytes 0-10/10",
            "0-9/10",
            "bytes 0-18446744073709551615/*",
            "",
            "bytes +0-9/10",
        ] {
            assert_eq!(content_range(odd), None, "{odd:?}");
        }
        assert_eq!(unsatisfied_total("bytes */10"), Some(10));
        assert_eq!(unsatisfied_total("bytes 0-9/10"), None);
    }

    #[test]
    fn redirects_stay_secure() {
        let from = Url::parse("https://r.local/v2/a/blobs/x").unwrap();
        let at = |to: &str, plain| location(&from, &headers(header::LOCATION, to), plain).map(String::from);
        assert_eq!(at("https://s3.local/x?sig=1", false).unwrap(), "https://s3.local/x?sig=1");
        assert_eq!(at("/other", false).unwrap(), "https://r.local/other");
        assert!(at("http://s3.local/x", false).unwrap_err().contains("http://s3.local"));
        assert!(at("http://s3.local/x", true).is_ok());
        for odd in ["file:///etc/passwd", "ftp://x/y", "http://", "data:text/plain,x"] {
            assert!(at(odd, true).is_err(), "{odd:?}");
        }
        assert!(location(&from, &HeaderMap::new(), true).is_err());
    }

    #[test]
    fn bodies_are_cut_down_to_what_they_say() {
        let none = HeaderMap::new();
        let json = br#"{"errors":[{"code":"DENIED","message":"requested access\nis denied","detail":{}}]}"#;
        assert_eq!(excerpt(&none, json, false), "DENIED: requested access is denied");
        assert_eq!(excerpt(&none, br#"{"details":"incorrect username"}"#, false), "incorrect username");
        let xml =
            b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>";
        assert_eq!(excerpt(&none, xml, false), "AccessDenied: Request has expired");
        let html = headers(header::CONTENT_TYPE, "text/html; charset=utf-8");
        assert_eq!(excerpt(&html, b"<h1>Log in</h1>", true), "a page of HTML");
        assert_eq!(excerpt(&none, b"plain\x00words", true), "plain words");
        assert_eq!(excerpt(&none, b"secret", false), "");
        assert!(excerpt(&none, &[b'x'; 100_000], true).len() < 300);
    }
}
