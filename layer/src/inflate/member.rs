//! The header of a gzip member (RFC 1952, 2.3), byte by byte over any split.

const FLAG_HEADER_CRC: u8 = 1 << 1;
const FLAG_EXTRA: u8 = 1 << 2;
const FLAG_NAME: u8 = 1 << 3;
const FLAG_COMMENT: u8 = 1 << 4;
const FLAGS_RESERVED: u8 = 0xe0;

/// Parses one member's header in constant memory: names and extra fields of any length are passed over.
#[derive(Debug)]
pub(super) struct MemberHeader {
    field: Field,
    flags: u8,
    crc: u32,
    /// The first bytes need not be a member at all: what follows the last member is ignored.
    may_be_junk: bool,
}

#[derive(Clone, Copy, Debug)]
enum Field {
    /// The ten fixed bytes; how many were read.
    Fixed(u8),
    /// The two bytes of the extra field's length.
    ExtraLen {
        low: Option<u8>,
    },
    Extra {
        remaining: u16,
    },
    Name,
    Comment,
    HeaderCrc {
        low: Option<u8>,
    },
    Done,
}

/// How far the header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// All input is consumed, more is needed.
    Partly,
    /// The deflate stream begins after the consumed bytes.
    Whole,
    /// This is no member, and need not be one.
    Junk,
}

impl MemberHeader {
    /// The header of the first member.
    pub(super) fn first() -> Self {
        Self { field: Field::Fixed(0), flags: 0, crc: !0, may_be_junk: false }
    }

    /// The header of another member, if there is one: Go's reader refuses whatever else follows the last member, unpigz (which
    /// containerd prefers where it is installed) and gzip ignore it.
    pub(super) fn next() -> Self {
        Self { may_be_junk: true, ..Self::first() }
    }

    /// Nothing, or nothing that must become a member, was read.
    pub(super) fn may_end(&self) -> bool {
        self.may_be_junk && matches!(self.field, Field::Fixed(0 | 1))
    }

    /// Consumes bytes of the header: how many, and how far it is.
    pub(super) fn push(&mut self, input: &[u8]) -> Result<(usize, Parsed), (usize, &'static str)> {
        for (at, &byte) in input.iter().enumerate() {
            match self.byte(byte).map_err(|reason| (at, reason))? {
                Parsed::Partly => {}
                Parsed::Whole => return Ok((at + 1, Parsed::Whole)),
                Parsed::Junk => return Ok((at, Parsed::Junk)),
            }
        }
        Ok((input.len(), Parsed::Partly))
    }

    fn byte(&mut self, byte: u8) -> Result<Parsed, &'static str> {
        let crc_before = self.crc;
        self.crc = crc32_step(self.crc, byte);
        self.field = match self.field {
            Field::Fixed(at @ (0 | 1)) => {
                if byte != [0x1f, 0x8b][usize::from(at)] {
                    return if self.may_be_junk { Ok(Parsed::Junk) } else { Err("no gzip magic bytes") };
                }
                Field::Fixed(at + 1)
            }
            Field::Fixed(2) if byte != 8 => return Err("unknown compression method"),
            Field::Fixed(3) if byte & FLAGS_RESERVED != 0 => return Err("unknown header flags"),
            Field::Fixed(3) => {
                self.flags = byte;
                Field::Fixed(4)
            }
            Field::Fixed(at) if at < 9 => Field::Fixed(at + 1),
            Field::Fixed(_) => self.after_fixed(),
            Field::ExtraLen { low: None } => Field::ExtraLen { low: Some(byte) },
            Field::ExtraLen { low: Some(low) } => match u16::from_le_bytes([low, byte]) {
                0 => self.after_extra(),
                remaining => Field::Extra { remaining },
            },
            Field::Extra { remaining: 1 } => self.after_extra(),
            Field::Extra { remaining } => Field::Extra { remaining: remaining - 1 },
            Field::Name if byte == 0 => self.after_name(),
            Field::Name => Field::Name,
            Field::Comment if byte == 0 => self.after_comment(),
            Field::Comment => Field::Comment,
            Field::HeaderCrc { low: None } => {
                // The checksum is not part of what it checks.
                self.crc = crc_before;
                Field::HeaderCrc { low: Some(byte) }
            }
            Field::HeaderCrc { low: Some(low) } => {
                if u16::from_le_bytes([low, byte]) != !crc_before as u16 {
                    return Err("wrong header checksum");
                }
                Field::Done
            }
            Field::Done => Field::Done,
        };
        Ok(if matches!(self.field, Field::Done) { Parsed::Whole } else { Parsed::Partly })
    }

    fn after_fixed(&self) -> Field {
        if self.flags & FLAG_EXTRA != 0 { Field::ExtraLen { low: None } } else { self.after_extra() }
    }

    fn after_extra(&self) -> Field {
        if self.flags & FLAG_NAME != 0 { Field::Name } else { self.after_name() }
    }

    fn after_name(&self) -> Field {
        if self.flags & FLAG_COMMENT != 0 { Field::Comment } else { self.after_comment() }
    }

    fn after_comment(&self) -> Field {
        if self.flags & FLAG_HEADER_CRC != 0 { Field::HeaderCrc { low: None } } else { Field::Done }
    }
}

/// One byte of CRC-32 (RFC 1952, 8), without the complements at start and end.
const fn crc32_step(crc: u32, byte: u8) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut value = index as u32;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 != 0 { 0xedb8_8320 ^ (value >> 1) } else { value >> 1 };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    TABLE[((crc ^ byte as u32) & 0xff) as usize] ^ (crc >> 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every combination of the optional fields, with the checksum right.
    fn headers() -> Vec<Vec<u8>> {
        (0..32u8)
            .map(|flags| {
                let mut header = vec![0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 0, 255];
                if flags & FLAG_EXTRA != 0 {
                    header.extend_from_slice(&[5, 0, 1, 0x1f, 0x8b, 0, 9]);
                }
                if flags & FLAG_NAME != 0 {
                    header.extend_from_slice(b"layer.tar\0");
                }
                if flags & FLAG_COMMENT != 0 {
                    header.extend_from_slice(b"\xff\0");
                }
                if flags & FLAG_HEADER_CRC != 0 {
                    let crc = !header.iter().fold(!0, |crc, byte| crc32_step(crc, *byte));
                    header.extend_from_slice(&(crc as u16).to_le_bytes());
                }
                header
            })
            .collect()
    }

    #[test]
    fn crc_of_the_check_string() {
        assert_eq!(!b"123456789".iter().fold(!0, |crc, byte| crc32_step(crc, *byte)), 0xcbf4_3926);
    }

    #[test]
    fn any_fields_over_any_split() {
        for header in headers() {
            let mut input = header.clone();
            input.extend_from_slice(b"deflate");
            for cut in 0..=header.len() {
                let mut parser = MemberHeader::first();
                let (head, tail) = input.split_at(cut);
                let mut consumed = parser.push(head).unwrap();
                if consumed.1 == Parsed::Partly {
                    assert_eq!(consumed.0, cut);
                    let more = parser.push(tail).unwrap();
                    consumed = (cut + more.0, more.1);
                }
                assert_eq!(consumed, (header.len(), Parsed::Whole), "{header:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn empty_extra_field() {
        let header = [0x1f, 0x8b, 8, FLAG_EXTRA, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(MemberHeader::first().push(&header), Ok((12, Parsed::Whole)));
    }

    #[test]
    fn refuses_what_is_no_header() {
        let push = |bytes: &[u8]| MemberHeader::first().push(bytes).map_err(|(at, _)| at);
        assert_eq!(push(b"ustar"), Err(0));
        assert_eq!(push(&[0x1f, 0x8c]), Err(1));
        assert_eq!(push(&[0x1f, 0x8b, 7]), Err(2));
        assert_eq!(push(&[0x1f, 0x8b, 8, 0x20]), Err(3));
        for header in headers().into_iter().filter(|header| header[3] & FLAG_HEADER_CRC != 0) {
            for at in 4..header.len() {
                let mut flipped = header.clone();
                flipped[at] ^= 1;
                // A length that became longer just wants more bytes.
                assert!(!matches!(push(&flipped), Ok((_, Parsed::Whole))), "{header:?} at {at}");
            }
        }
    }

    #[test]
    fn junk_only_after_a_member() {
        assert_eq!(MemberHeader::next().push(&[0, 0]), Ok((0, Parsed::Junk)));
        assert_eq!(MemberHeader::next().push(&[0x1f, 0]), Ok((1, Parsed::Junk)));
        assert!(MemberHeader::next().push(&[0x1f, 0x8b, 0]).is_err());
        assert!(MemberHeader::next().may_end());
        assert!(!MemberHeader::first().may_end());
    }
}
