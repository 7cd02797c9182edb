//! The headers with which members ask each other and seeders for chunks, and are turned down (`docs/wire.md`, "Bulk").

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderName, HeaderValue};
use swarm::Priority;

use super::member::Member;

/// The asker's address in the mesh.
const PEER: HeaderName = HeaderName::from_static("drover-peer");
/// Why it asks.
const PRIORITY: HeaderName = HeaderName::from_static("drover-priority");
/// After how many milliseconds it may come again.
const RETRY_MS: HeaderName = HeaderName::from_static("drover-retry-ms");
/// Who else has the first chunk.
const PEERS: HeaderName = HeaderName::from_static("drover-peers");
/// Most members that a refusal names, and that are taken from one.
pub const PEERS_MAX: usize = 4;
/// Nobody is sent away for longer.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// Who asks for chunks, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// Where the connection comes from; none on a socket file.
    pub ip: Option<IpAddr>,
    /// Its address in the mesh, as it says; none where it does not say that it is in one.
    pub peer: Option<SocketAddr>,
    /// What for.
    pub priority: Priority,
}

/// The answer to a member that is to come again later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turned {
    /// When.
    pub retry_after: Duration,
    /// Who has the first chunk of the run, or is about to; at most [`PEERS_MAX`].
    pub peers: Vec<Member>,
}

impl Asker {
    /// Somebody of whom nothing is known.
    pub const UNKNOWN: Self = Self { ip: None, peer: None, priority: Priority::Background };

    /// Whose connection comes from `ip` and whose request has `headers`. Headers that say nothing sensible count as absent.
    pub fn read(ip: Option<IpAddr>, headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let priority = match text(PRIORITY) {
            Some("demand") => Priority::Demand,
            Some("readahead") => Priority::Readahead,
            _ => Priority::Background,
        };
        Self { ip: ip.map(|ip| ip.to_canonical()), peer: text(PEER).and_then(|peer| peer.parse().ok()), priority }
    }

    /// The headers of a request of the member at `peer`.
    pub fn write(peer: SocketAddr, priority: Priority, headers: &mut HeaderMap) {
        set(headers, PEER, &peer.to_string());
        let priority = match priority {
            Priority::Demand => "demand",
            Priority::Readahead => "readahead",
            Priority::Background => "background",
        };
        headers.insert(PRIORITY, HeaderValue::from_static(priority));
    }
}

impl Turned {
    /// What an answer with status 503 says; `None`: the machine is overloaded, whoever asks.
    pub fn read(headers: &HeaderMap) -> Option<Self> {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let retry_after = Duration::from_millis(text(RETRY_MS)?.parse().ok()?).min(RETRY_MAX);
        let named = text(PEERS).unwrap_or_default().split(',').take(PEERS_MAX);
        Some(Self { retry_after, peers: named.filter_map(|peer| peer.trim().parse().ok()).collect() })
    }

    /// The headers of such an answer.
    pub fn write(&self, headers: &mut HeaderMap) {
        let retry_after = self.retry_after.min(RETRY_MAX);
        // Rounded up: who comes too early is turned down again.
        headers.insert(RETRY_MS, HeaderValue::from(retry_after.as_micros().div_ceil(1000) as u64));
        headers.insert(RETRY_AFTER, HeaderValue::from(retry_after.as_millis().div_ceil(1000) as u64));
        if !self.peers.is_empty() {
            let peers: Vec<_> = self.peers.iter().take(PEERS_MAX).map(Member::to_string).collect();
            set(headers, PEERS, &peers.join(","));
        }
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    if let Ok(value) = HeaderValue::from_str(text) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(text: &str) -> Member {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        for priority in [Priority::Demand, Priority::Readahead, Priority::Background] {
            let (peer, mut headers) = ("[fd00::7]:7071".parse().unwrap(), HeaderMap::new());
            Asker::write(peer, priority, &mut headers);
            let ip = Some("::ffff:10.0.0.7".parse().unwrap());
            let read = Asker::read(ip, &headers);
            assert_eq!(read, Asker { ip: Some("10.0.0.7".parse().unwrap()), peer: Some(peer), priority });
        }
        let turned = Turned {
            retry_after: Duration::from_millis(1250),
            peers: vec![member("10.0.0.1:7071;eu-1.a"), member("[fd00::1]:7071")],
        };
        let mut headers = HeaderMap::new();
        turned.write(&mut headers);
        assert_eq!(headers[RETRY_AFTER], "2");
        assert_eq!(Turned::read(&headers), Some(turned));
    }

    /// Machines of other versions read and write exactly these.
    #[test]
    fn the_headers_of_version_1_stay() {
        let text = |headers: &HeaderMap| {
            let mut lines: Vec<_> =
                headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
            lines.sort();
            lines
        };
        for (priority, word) in
            [(Priority::Demand, "demand"), (Priority::Readahead, "readahead"), (Priority::Background, "background")]
        {
            let mut headers = HeaderMap::new();
            Asker::write("10.0.0.7:7071".parse().unwrap(), priority, &mut headers);
            assert_eq!(text(&headers), ["drover-peer: 10.0.0.7:7071".to_owned(), format!("drover-priority: {word}")]);
        }
        let peers = vec![member("10.0.0.1:7071;eu-1.a"), member("[fd00::1]:7071")];
        let turned = Turned { retry_after: Duration::from_millis(1250), peers };
        let mut headers = HeaderMap::new();
        turned.write(&mut headers);
        let told = ["drover-peers: 10.0.0.1:7071;eu-1.a,[fd00::1]:7071", "drover-retry-ms: 1250", "retry-after: 2"];
        assert_eq!(text(&headers), told);
        // What a later version says besides is overlooked.
        set(&mut headers, HeaderName::from_static("drover-later"), "1");
        assert_eq!(Turned::read(&headers), Some(turned));
    }

    #[test]
    fn nonsense_counts_as_absent_and_nothing_is_unbounded() {
        let mut headers = HeaderMap::new();
        set(&mut headers, PEER, "example.com:7071");
        set(&mut headers, PRIORITY, "at once");
        assert_eq!(Asker::read(None, &headers), Asker { ip: None, peer: None, priority: Priority::Background });
        assert_eq!(Turned::read(&headers), None);
        set(&mut headers, RETRY_MS, "18446744073709551615");
        set(&mut headers, PEERS, "x,10.0.0.1:1;\"quoted\",10.0.0.2:2, 10.0.0.3:3,10.0.0.4:4");
        let turned = Turned::read(&headers).unwrap();
        assert_eq!(turned, Turned { retry_after: RETRY_MAX, peers: vec![member("10.0.0.2:2"), member("10.0.0.3:3")] });
        set(&mut headers, RETRY_MS, "soon");
        assert_eq!(Turned::read(&headers), None);
    }
}
