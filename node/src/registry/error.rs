//! What goes wrong at registries, in words for the operator: what was asked for, of whom, what happened, what to do.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::source::BlobRef;

/// Why a registry did not give what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot get {what} from {place}: {fault}")]
pub struct RegistryError {
    /// What was asked for, like `blob sha256:… of docker.io/library/debian`.
    pub what: String,
    /// Who was asked, like `registry docker.io` or `mirror mirror.local:5000 of docker.io`.
    pub place: String,
    /// What happened.
    pub fault: Fault,
}

/// What happened at one registry or mirror.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// DNS does not know it.
    #[error("its name cannot be resolved ({reason}); check the name and this machine's DNS")]
    Name {
        /// Error text of the resolver.
        reason: String,
    },
    /// No connection, or it broke.
    #[error("{reason}; check its address and port, that it runs, and the network on the way")]
    Unreachable {
        /// Error text of the transport.
        reason: String,
    },
    /// The ends do not agree on TLS.
    #[error("TLS fails ({reason}); {advice}")]
    Tls {
        /// Error text of TLS.
        reason: String,
        /// What to do.
        advice: &'static str,
    },
    /// The HTTP proxy on the way fails or refuses.
    #[error("the proxy {proxy} fails ({reason}); check HTTP_PROXY, HTTPS_PROXY, NO_PROXY and `proxy` in hosts.toml")]
    Proxy {
        /// The proxy, without credentials.
        proxy: String,
        /// What it did.
        reason: String,
    },
    /// No byte came for too long.
    #[error("it sent nothing for {after:?}; check its load and the network on the way")]
    Stalled {
        /// The limit that expired.
        after: Duration,
    },
    /// 401 or 403, or no token was to be had.
    #[error("{reason}; {advice}")]
    Denied {
        /// What it answered.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// The credentials cannot be looked up.
    #[error("the credentials for it cannot be looked up: {reason}")]
    Credentials {
        /// Why not, and in which file or program.
        reason: String,
    },
    /// 404.
    #[error("it does not have it ({reason}); check the image's name, and whether it was deleted there")]
    NotFound {
        /// What it answered.
        reason: String,
    },
    /// 429 or 5xx, now or a moment ago.
    #[error("it cannot serve now ({reason}); it is asked again later")]
    Busy {
        /// What it answered.
        reason: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// An answer that cannot be right, or a request that cannot be made.
    #[error("{reason}")]
    Protocol {
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A file of the configuration cannot be used.
    #[error("{file} is wrong: {reason}")]
    Configuration {
        /// The file.
        file: String,
        /// What is wrong in it.
        reason: String,
    },
}

impl RegistryError {
    /// `fault`, which came up with `blob`.
    pub fn of_blob(blob: &BlobRef, fault: Fault) -> Self {
        Self { what: what(blob), place: format!("registry {}", blob.registry), fault }
    }

    /// Whether the same request may succeed soon.
    pub const fn is_transient(&self) -> bool {
        self.fault.is_transient()
    }

    /// When it wants to be asked again.
    pub const fn retry_after(&self) -> Option<Duration> {
        match &self.fault {
            Fault::Busy { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// How `blob` is called in errors.
pub(super) fn what(blob: &BlobRef) -> String {
    format!("blob {} of {}/{}", blob.digest, blob.registry, blob.repository)
}

impl Fault {
    /// Whether the same request may succeed soon.
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Stalled { .. } | Self::Busy { .. } | Self::Proxy { .. } => true,
            // A name server that fails for a moment looks the same as a wrong name.
            Self::Name { .. } => true,
            Self::Tls { .. }
            | Self::Denied { .. }
            | Self::Credentials { .. }
            | Self::NotFound { .. }
            | Self::Protocol { .. }
            | Self::Configuration { .. } => false,
        }
    }

    /// Whether the place itself cannot be used at the moment, so that others are asked first.
    pub(super) const fn is_of_place(&self) -> bool {
        matches!(
            self,
            Self::Name { .. }
                | Self::Unreachable { .. }
                | Self::Tls { .. }
                | Self::Proxy { .. }
                | Self::Stalled { .. }
                | Self::Busy { .. }
        )
    }

    pub(super) fn protocol(reason: impl Into<String>) -> Self {
        Self::Protocol { reason: reason.into() }
    }

    /// The fault behind an error of the HTTP client. `proxy` is the one on the way, if any.
    pub(super) fn of_transport(error: &reqwest::Error, proxy: Option<&str>) -> Self {
        if let Some(tls) = find::<rustls::Error>(error) {
            return Self::Tls { reason: tls.to_string(), advice: tls_advice(tls) };
        }
        let reason = chain(error);
        match proxy {
            Some(proxy) if error.is_connect() => Self::Proxy { proxy: proxy.to_owned(), reason },
            _ if error.is_dns() || reason.contains("dns error") => Self::Name { reason },
            _ if error.is_connect() => Self::Unreachable { reason: format!("no connection ({reason})") },
            _ => Self::Unreachable { reason: format!("the connection broke ({reason})") },
        }
    }
}

fn tls_advice(error: &rustls::Error) -> &'static str {
    use rustls::{AlertDescription, CertificateError, Error};
    match error {
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "renew its certificate, and check this machine's clock"
        }
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "its certificate is for another name: use that name, or give it a certificate for this one",
        Error::InvalidCertificate(_) => {
            "if it is the right one, name its authority: `ca` of its registry table or of hosts.toml"
        }
        Error::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::HandshakeFailure
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired,
        ) => {
            "it wants a client certificate that it trusts: `certificate` and `key` of its registry table, or `client` \
             of hosts.toml"
        }
        Error::InvalidMessage(_) => {
            "it seems to speak plain HTTP: if that is meant, set `plain_http` of its registry table, or write http:// \
             in hosts.toml"
        }
        _ => "check the TLS settings of both ends",
    }
}

/// Whether the other end answered something that is not TLS.
pub(super) fn is_no_tls(error: &reqwest::Error) -> bool {
    matches!(find::<rustls::Error>(error), Some(rustls::Error::InvalidMessage(_)))
}

/// The first error of type `E` among an error and its causes.
fn find<'a, E: std::error::Error + 'static>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    // Errors wrap each other a few times; a cycle must not hang us.
    for _ in 0..32 {
        let error = next?;
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        // The source of an I/O error leaves out the very error that it wraps.
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// An error and all its causes in one line; reqwest's own text leaves the causes out. URLs may carry signatures, so
/// reqwest's part, which names them, is left out.
pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next = if error.is::<reqwest::Error>() && error.source().is_some() { error.source() } else { Some(error) };
    while let Some(error) = next {
        let text = error.to_string();
        if texts.len() < 8 && !texts.iter().any(|before| before.contains(&text)) {
            texts.push(text);
        }
        next = error.source();
    }
    printable(&texts.join(": "), 400)
}

/// At most `max` characters of `text`, none of them a control character.
pub(super) fn printable(text: &str, max: usize) -> String {
    let mut shown = String::new();
    let mut characters = text.trim().chars();
    for character in characters.by_ref().take(max) {
        let character = if character.is_control() || is_invisible(character) { ' ' } else { character };
        if !(character == ' ' && shown.ends_with(' ')) {
            shown.push(character);
        }
    }
    if characters.next().is_some() {
        shown.push('…');
    }
    shown
}

/// Characters that move the writing direction or hide: they would let an answer forge a log line.
const fn is_invisible(character: char) -> bool {
    matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// What failed at the places that were asked.
#[derive(Debug, Default)]
pub(super) struct Failures(Vec<(usize, String, Fault)>);

impl Failures {
    /// `rank` is the place's number in the configuration.
    pub(super) fn add(&mut self, rank: usize, place: impl fmt::Display, fault: Fault) {
        self.0.push((rank, place.to_string(), fault));
    }

    /// The fault of the last place of the configuration, which is the registry itself, with those of its mirrors in the text.
    pub(super) fn into_error(mut self, what: String, registry: &str) -> RegistryError {
        self.0.sort_by_key(|(rank, ..)| *rank);
        let Some((_, mut place, fault)) = self.0.pop() else {
            let reason = "no place is configured that may serve it: look at hosts.toml of this registry";
            return RegistryError { what, place: format!("registry {registry}"), fault: Fault::protocol(reason) };
        };
        for (_, before, fault) in self.0.iter().take(4) {
            place = format!("{place} (before it {before}: {})", printable(&fault.to_string(), 200));
        }
        RegistryError { what, place, fault }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_printable_and_bounded() {
        assert_eq!(printable(" a\r\nb\u{1b}[31m\u{202e}c ", 100), "a b [31m c");
        assert_eq!(printable(&"x".repeat(50), 10), format!("{}…", "x".repeat(10)));
    }

    #[test]
    fn wrapped_errors_are_found() {
        let inner = io::Error::other(rustls::Error::DecryptError);
        let outer = io::Error::other(inner);
        assert_eq!(find::<rustls::Error>(&outer), Some(&rustls::Error::DecryptError));
        assert_eq!(find::<rustls::Error>(&io::Error::other("x")), None);
    }
}
