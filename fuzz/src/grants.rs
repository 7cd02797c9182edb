//! What machines show to prove themselves: grants, and tokens of machines that enrol.

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use http::HeaderValue;
use layer::Digest;
use node::grant::{Demand, Grant};
use node::security::tls::Caller;
use node::security::token::Token;
use node::security::{Role, Security, Verifier};

/// Input: one byte that says what the rest is: a grant, a grant in a header, or a token.
pub fn grants(input: &[u8]) {
    let Some((choice, rest)) = input.split_first() else { return };
    match choice % 3 {
        0 => grant(rest),
        1 => header(rest),
        _ => token(rest),
    }
}

/// Whatever its times are, it is good for no longer than they say, but for clocks that differ.
fn grant(input: &[u8]) {
    // The signature's own parser runs in any case; without security none is demanded.
    let Ok(grant) = Grant::open(input, &Verifier::off()) else { return };
    assert!(grant.registry.len() <= 255 && grant.repository.len() <= 255);
    for seconds in [0, grant.issued, grant.expires, grant.confirmed, u64::MAX / 4] {
        let Some(now) = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)) else { continue };
        let is_good = grant.check_time(now).is_ok();
        let is_in_time = seconds < grant.expires.saturating_add(30) && seconds.saturating_add(30) >= grant.issued;
        assert_eq!(is_good, is_in_time);
    }
}

/// Only the machine and the layer that a grant names get anything for it.
fn header(input: &[u8]) {
    static DEMAND: LazyLock<Demand> = LazyLock::new(|| Demand::of_node(&Security::Off, "/nonexistent/grants".into()));
    let Ok(header) = HeaderValue::from_bytes(input) else { return };
    let key = Digest::from_bytes([7; 32]);
    let caller = Caller { role: Role::Node, name: "n".to_owned(), validity: Duration::from_secs(1), key };
    let (right, other) = (Digest::from_bytes([8; 32]), Digest::from_bytes([9; 32]));
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    let check = |caller: &Caller, blob| DEMAND.check(now, Some(caller), blob, Some(&header)).is_ok();
    let is_good = check(&caller, right);
    assert!(!is_good || !check(&caller, other));
    assert!(!is_good || !check(&Caller { key: other, ..caller }, right));
    assert!(DEMAND.check(now, None, right, Some(&header)).is_err());
}

/// Read and written again it is the same, and only writing it shows the secret.
fn token(input: &[u8]) {
    let Some(token) = std::str::from_utf8(input).ok().and_then(|text| text.parse::<Token>().ok()) else { return };
    let again: Token = token.to_string().parse().expect("what was written is read");
    assert_eq!((again.id(), again.authority()), (token.id(), token.authority()));
    assert_eq!(again.to_string(), token.to_string());
}
