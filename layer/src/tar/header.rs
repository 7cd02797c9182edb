//! One 512-byte header of a tar, read as Go's archive/tar reads it, which is what containerd unpacks with.

use crate::entry::Mtime;

/// Bytes of a header, and what file bytes are padded to.
pub(super) const BLOCK: usize = 512;

/// A header's fields, before PAX records and GNU long names override some.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) name: Vec<u8>,
    pub(super) link_name: Vec<u8>,
    pub(super) type_flag: u8,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) size: i64,
    pub(super) mtime: Mtime,
    pub(super) major: i64,
    pub(super) minor: i64,
}

impl Header {
    /// Whether the type has no bytes after its header whatever its size field says.
    pub(super) fn is_bare(&self) -> bool {
        matches!(self.type_flag, b'1'..=b'6')
    }
}

/// Parses a header whose checksum must be right.
pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Header, &'static str> {
    let checksum = octal(field(block, 148, 8)).map_err(|_| "a header's checksum is no octal number")?;
    if !checksums(block).contains(&checksum) {
        return Err("a header's checksum is wrong");
    }
    let mut header = Header {
        name: text(field(block, 0, 100)),
        link_name: text(field(block, 157, 100)),
        type_flag: field(block, 156, 1).first().copied().unwrap_or(0),
        mode: number(field(block, 100, 8))?,
        uid: number(field(block, 108, 8))?,
        gid: number(field(block, 116, 8))?,
        size: number(field(block, 124, 12))?,
        mtime: Mtime { secs: number(field(block, 136, 12))?, nanos: 0 },
        major: 0,
        minor: 0,
    };
    let format = Format::of(block);
    if format == Format::V7 {
        return Ok(header);
    }
    header.major = number(field(block, 329, 8))?;
    header.minor = number(field(block, 337, 8))?;
    let prefix = match format {
        Format::Ustar => text(field(block, 345, 155)),
        Format::Star => text(field(block, 345, 131)),
        Format::Gnu => gnu_prefix(block),
        Format::V7 => Vec::new(),
    };
    if !prefix.is_empty() {
        header.name = [&prefix[..], b"/", &header.name].concat();
    }
    Ok(header)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl Format {
    fn of(block: &[u8; BLOCK]) -> Self {
        match (field(block, 257, 6), field(block, 263, 2), field(block, 508, 4)) {
            (b"ustar\0", _, b"tar\0") => Self::Star,
            (b"ustar\0", _, _) => Self::Ustar,
            (b"ustar ", b" \0", _) => Self::Gnu,
            _ => Self::V7,
        }
    }
}

/// The GNU format has times where ustar has its prefix; Go before 1.8 wrote a prefix there all the same
/// (golang.org/issue/12594), and Go still reads it where it cannot be times.
fn gnu_prefix(block: &[u8; BLOCK]) -> Vec<u8> {
    let is_time = |field: &[u8]| field.first() == Some(&0) || number(field).is_ok();
    if is_time(field(block, 345, 12)) && is_time(field(block, 357, 12)) {
        return Vec::new();
    }
    Some(text(field(block, 345, 155))).filter(|prefix| prefix.is_ascii()).unwrap_or_default()
}

fn field(block: &[u8; BLOCK], at: usize, len: usize) -> &[u8] {
    block.get(at..at + len).unwrap_or_default()
}

/// The sums of all bytes, the checksum's own counted as spaces: unsigned as POSIX says, signed as Sun's tar did.
fn checksums(block: &[u8; BLOCK]) -> [i64; 2] {
    let (mut unsigned, mut signed) = (0, 0);
    for (at, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { *byte };
        unsigned += i64::from(byte);
        signed += i64::from(byte as i8);
    }
    [unsigned, signed]
}

/// A field's bytes up to its first NUL.
pub(super) fn text(field: &[u8]) -> Vec<u8> {
    field.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

/// A number in octal, or in base 256 (two's complement, big-endian) if the first bit is set.
fn number(field: &[u8]) -> Result<i64, &'static str> {
    let Some(first) = field.first().filter(|first| **first & 0x80 != 0) else { return octal(field) };
    let negative = first & 0x40 != 0;
    let mut value: u64 = 0;
    for (at, byte) in field.iter().enumerate() {
        let byte = if negative { !*byte } else { *byte };
        let byte = if at == 0 { byte & 0x7f } else { byte };
        if value >> 56 != 0 {
            return Err("a header's base-256 number is too large");
        }
        value = value << 8 | u64::from(byte);
    }
    let value = i64::try_from(value).map_err(|_| "a header's base-256 number is too large")?;
    Ok(if negative { !value } else { value })
}

fn octal(field: &[u8]) -> Result<i64, &'static str> {
    const WRONG: &str = "a header's number is not octal";
    let is_blank = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(start) = field.iter().position(|byte| !is_blank(byte)) else { return Ok(0) };
    let end = field.iter().rposition(|byte| !is_blank(byte)).map_or(start, |last| last + 1);
    let digits = text(field.get(start..end).unwrap_or_default());
    let mut value: i64 = 0;
    for digit in digits {
        if !(b'0'..=b'7').contains(&digit) {
            return Err(WRONG);
        }
        value = value.checked_mul(8).and_then(|value| value.checked_add(i64::from(digit - b'0'))).ok_or(WRONG)?;
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_numbers_of_both_bases() {
        assert_eq!(number(b"0000644\0"), Ok(0o644));
        assert_eq!(number(b" 644 \0  "), Ok(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Ok(0));
        assert_eq!(number(b"0000649\0"), Err("a header's number is not octal"));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]), Ok(256));
        assert_eq!(number(&[0xff; 12]), Ok(-1));
        assert_eq!(number(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]), Ok(-256));
        assert!(number(&[0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
    }
}
