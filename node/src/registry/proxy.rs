//! HTTP proxies from the environment, with the meaning that they have for containerd (Go's `net/http`).

use std::net::IpAddr;

use url::Url;

/// Which proxy is on the way to which host.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    http: Option<Url>,
    https: Option<Url>,
    direct: Vec<Direct>,
}

/// Hosts that are reached without a proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Direct {
    All,
    Address(IpAddr, Option<u16>),
    Network(IpAddr, u32),
    /// A domain and, unless it began with a dot, the host of that name.
    Domain {
        name: String,
        itself: bool,
        port: Option<u16>,
    },
}

impl Proxies {
    /// From `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, or the same in lower case.
    pub fn of_process() -> Self {
        let variable = |name: &str| {
            let lower = name.to_ascii_lowercase();
            [name, lower.as_str()]
                .into_iter()
                .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
        };
        let all = variable("ALL_PROXY");
        let of = |name: &str| variable(name).or_else(|| all.clone()).unwrap_or_default();
        let made = Self::new(&of("HTTP_PROXY"), &of("HTTPS_PROXY"), &variable("NO_PROXY").unwrap_or_default());
        made.unwrap_or_else(|wrong| {
            tracing::warn!("{wrong}; it is ignored");
            Self::default()
        })
    }

    /// `http` and `https` are the proxies for URLs of these schemes (empty: none), `direct` a list as in `NO_PROXY`.
    /// The error names the text that is no proxy.
    pub fn new(http: &str, https: &str, direct: &str) -> Result<Self, String> {
        let direct = direct.split(',').map(str::trim).filter(|entry| !entry.is_empty()).map(Direct::parse).collect();
        Ok(Self { http: proxy_url(http)?, https: proxy_url(https)?, direct })
    }

    /// The proxy on the way to `url`.
    pub fn of(&self, url: &Url) -> Option<&Url> {
        let proxy = match url.scheme() {
            "http" => self.http.as_ref(),
            _ => self.https.as_ref(),
        }?;
        let host = url.host_str()?.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        let port = url.port_or_known_default();
        let address: Option<IpAddr> = host.parse().ok();
        // Go never sends requests to this machine through a proxy.
        let is_here = host == "localhost" || address.is_some_and(|address| address.is_loopback());
        (!is_here && !self.direct.iter().any(|direct| direct.covers(&host, address, port))).then_some(proxy)
    }
}

/// A proxy's URL; `host:port` stands for http. `None` for an empty text.
pub(super) fn proxy_url(text: &str) -> Result<Option<Url>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    // The text may hold a password, so the error does not repeat it.
    let url = Url::parse(&full).map_err(|error| format!("the proxy's URL cannot be read ({error})"))?;
    match (url.scheme(), url.has_host()) {
        ("http" | "https" | "socks5" | "socks5h", true) => Ok(Some(url)),
        (scheme, _) => Err(format!("{scheme} is no kind of proxy: want http, https, socks5 or socks5h with a host")),
    }
}

/// A proxy without its credentials, for errors.
pub(super) fn shown(proxy: &Url) -> String {
    let port = proxy.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{}{port}", proxy.scheme(), proxy.host_str().unwrap_or_default())
}

impl Direct {
    fn parse(entry: &str) -> Self {
        let entry = entry.to_ascii_lowercase();
        if entry == "*" {
            return Self::All;
        }
        if let Some((address, bits)) = entry.split_once('/')
            && let (Ok(address), Ok(bits)) = (address.parse::<IpAddr>(), bits.parse::<u32>())
            && bits <= if address.is_ipv4() { 32 } else { 128 }
        {
            return Self::Network(address, bits);
        }
        if let Ok(address) = entry.trim_start_matches('[').trim_end_matches(']').parse() {
            return Self::Address(address, None);
        }
        let (host, port) = match entry.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?))) {
            Some((host, port)) => (host, Some(port)),
            None => (entry.as_str(), None),
        };
        if let Ok(address) = host.trim_start_matches('[').trim_end_matches(']').parse() {
            return Self::Address(address, port);
        }
        let host = host.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(host);
        match host.strip_prefix('.') {
            Some(name) => Self::Domain { name: name.to_owned(), itself: false, port },
            None => Self::Domain { name: host.to_owned(), itself: true, port },
        }
    }

    fn covers(&self, host: &str, address: Option<IpAddr>, port: Option<u16>) -> bool {
        let at_port = |wanted: &Option<u16>| wanted.is_none() || *wanted == port;
        match self {
            Self::All => true,
            Self::Address(direct, wanted) => address == Some(*direct) && at_port(wanted),
            Self::Network(network, bits) => address.is_some_and(|address| is_in(address, *network, *bits)),
            Self::Domain { name, itself, port: wanted } => {
                let below = host.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'));
                at_port(wanted) && ((*itself && host == name) || below)
            }
        }
    }
}

/// Whether the first `bits` of both addresses are equal.
fn is_in(address: IpAddr, network: IpAddr, bits: u32) -> bool {
    let equal = |difference: u128, width: u32| bits == 0 || difference.checked_shr(width - bits).unwrap_or(0) == 0;
    match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => equal(u128::from(address.to_bits() ^ network.to_bits()), 32),
        (IpAddr::V6(address), IpAddr::V6(network)) => equal(address.to_bits() ^ network.to_bits(), 128),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_proxy_has_hosts_domains_networks_and_ports() {
        let direct =
            "local.test, .below.test,*.star.test,10.0.0.0/8, 192.0.2.7,fd00::/8,ported.test:5000,[2001:db8::1]:443";
        let proxies = Proxies::new("proxy.test:3128", "http://user:word@secure.test", direct).unwrap();
        let via = |url: &str| proxies.of(&Url::parse(url).unwrap()).map(shown);
        assert_eq!(via("http://r.test/v2/").unwrap(), "http://proxy.test:3128");
        assert_eq!(via("https://r.test/v2/").unwrap(), "http://secure.test", "without the password");
        for direct in [
            "https://local.test/",
            "https://a.local.test:5000/",
            "https://a.below.test/",
            "https://b.a.star.test/",
            "https://10.1.2.3/",
            "http://192.0.2.7:5000/",
            "https://[fd00::5]:5000/",
            "http://ported.test:5000/",
            "https://[2001:db8::1]/",
            "http://localhost:5000/",
            "http://127.0.0.1:5000/",
            "http://[::1]:5000/",
            "https://LOCAL.test/",
        ] {
            assert_eq!(via(direct), None, "{direct}");
        }
        for proxied in [
            "https://notlocal.test/",
            "https://below.test/",
            "https://11.1.2.3/",
            "https://[fe00::5]/",
            "http://ported.test/",
            "https://[2001:db8::1]:5000/",
        ] {
            assert!(via(proxied).is_some(), "{proxied}");
        }
        assert!(Proxies::new("p", "p", "*").unwrap().of(&Url::parse("https://r.test").unwrap()).is_none());
        assert!(Proxies::default().of(&Url::parse("https://r.test").unwrap()).is_none());
        assert!(Proxies::new("ftp://x", "", "").is_err());
        let wrong = Proxies::new("http://user:password@[", "", "").unwrap_err();
        assert!(!wrong.contains("password"), "{wrong}");
    }
}
