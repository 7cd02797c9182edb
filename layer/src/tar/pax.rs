//! PAX extended headers: `"%d %s=%s\n" % (size, key, value)`, as Go's archive/tar reads them.

use super::header::Header;
use crate::entry::Mtime;

/// The records of one extended header, without those that mean nothing here.
#[derive(Debug, Default)]
pub(super) struct Records {
    records: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The key that an attribute `security.capability` stands under; the only notation that containerd takes.
const XATTR: &[u8] = b"SCHILY.xattr.";

impl Records {
    /// Parses the bytes of an extended header.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        let mut records = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let (key, value, next) = record(rest).ok_or("a PAX record is malformed")?;
            let has_nul = match key {
                b"path" | b"linkpath" | b"uname" | b"gname" => value.contains(&0),
                _ => key.contains(&0),
            };
            if has_nul {
                return Err("a PAX record has a NUL");
            }
            if is_known(key) {
                records.push((key.to_vec(), value.to_vec()));
            }
            rest = next;
        }
        Ok(Self { records })
    }

    /// Overrides the fields of `header`. An empty value keeps the header's.
    pub(super) fn merge(&self, header: &mut Header) -> Result<(), &'static str> {
        for (key, value) in &self.records {
            if value.is_empty() {
                continue;
            }
            match &key[..] {
                b"path" => header.name.clone_from(value),
                b"linkpath" => header.link_name.clone_from(value),
                b"uid" => header.uid = integer(value)?,
                b"gid" => header.gid = integer(value)?,
                b"size" => header.size = integer(value)?,
                b"mtime" => header.mtime = time(value)?,
                b"atime" | b"ctime" => drop(time(value)?),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether the entry is a sparse file of one of GNU tar's PAX formats.
    pub(super) fn is_sparse(&self) -> bool {
        self.records.iter().any(|(key, _)| key.starts_with(b"GNU.sparse."))
    }

    /// The extended attributes, names first. A name may come twice; the later counts.
    pub(super) fn xattrs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.records.iter().filter_map(|(key, value)| Some((key.strip_prefix(XATTR)?, &value[..])))
    }
}

fn is_known(key: &[u8]) -> bool {
    matches!(key, b"path" | b"linkpath" | b"uid" | b"gid" | b"size" | b"mtime" | b"atime" | b"ctime")
        || key.starts_with(XATTR)
        || key.starts_with(b"GNU.sparse.")
}

/// The first record of `bytes` as key, value and what follows it.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().position(|byte| *byte == b' ')?;
    let len = usize::try_from(integer(bytes.get(..space)?).ok()?).ok()?;
    let (record, rest) = bytes.split_at_checked(len)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (record.get(..equals)?, record.get(equals + 1..)?);
    (!key.is_empty()).then_some((key, value, rest))
}

fn integer(text: &[u8]) -> Result<i64, &'static str> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or("a number of a PAX record is no decimal number")
}

/// Seconds with an optional fraction, of which nine digits count; `-0.5` is half a second before the epoch.
fn time(text: &[u8]) -> Result<Mtime, &'static str> {
    const WRONG: &str = "a time of a PAX record is malformed";
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(at) => text.split_at(at),
        None => (text, &b""[..]),
    };
    let secs = integer(whole).map_err(|_| WRONG)?;
    let digits = fraction.strip_prefix(b".").unwrap_or_default();
    if !digits.iter().all(u8::is_ascii_digit) {
        return Err(WRONG);
    }
    let padded = digits.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanos = padded.fold(0, |nanos, digit| nanos * 10 + u32::from(digit - b'0'));
    if whole.first() == Some(&b'-') && nanos > 0 {
        return Ok(Mtime { secs: secs.checked_sub(1).ok_or(WRONG)?, nanos: 1_000_000_000 - nanos });
    }
    Ok(Mtime { secs, nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_times_before_and_after_the_epoch() {
        assert_eq!(time(b"12"), Ok(Mtime { secs: 12, nanos: 0 }));
        assert_eq!(time(b"12.0000000019"), Ok(Mtime { secs: 12, nanos: 1 }));
        assert_eq!(time(b"-0.25"), Ok(Mtime { secs: -1, nanos: 750_000_000 }));
        assert_eq!(time(b"-3"), Ok(Mtime { secs: -3, nanos: 0 }));
        assert!(time(b".5").is_err());
        assert!(time(b"1.x").is_err());
        assert!(time(b"-9223372036854775808.5").is_err());
    }

    #[test]
    fn refuses_malformed_records() {
        for bytes in [&b"x"[..], b"5 a=b", b"6 a=b\n1", b"99 a=b\n", b"6 =bc\n", b"0 a=b\n", b"-6 a=b\n", b"6 abc\n"] {
            assert!(Records::parse(bytes).is_err(), "{}", bytes.escape_ascii());
        }
        assert!(Records::parse(b"11 path=\0x\n").is_err());
        let records = Records::parse(b"6 a=b\n22 SCHILY.xattr.a=x=\n\n").unwrap();
        assert_eq!(records.xattrs().collect::<Vec<_>>(), [(&b"a"[..], &b"x=\n"[..])]);
    }
}
