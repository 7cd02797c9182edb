//! From the bytes of a request to its meaning. Total: any bytes give a request or an error.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

use zerocopy::FromBytes;

use super::abi::{InHeader, InitIn, InterruptIn, OpenIn, ReadIn, init_flag, opcode};

/// A node of the file system. The root is 1; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(u64);

impl NodeId {
    /// The root directory.
    pub const ROOT: NodeId = NodeId(1);

    /// The node of the layer with this number. Numbers are persistent and never used twice, so the node means the same
    /// in every daemon. `None` for numbers so large that the protocol has no node for them.
    pub fn of_layer(number: u64) -> Option<NodeId> {
        // Two more stay free above, for the cookies of READDIR.
        (number < u64::MAX - 8).then(|| NodeId(number + 2))
    }

    /// The number given to [`NodeId::of_layer`], or `None` for the root and for 0.
    pub fn layer(self) -> Option<u64> {
        self.0.checked_sub(2)
    }

    /// As on the wire.
    pub fn get(self) -> u64 {
        self.0
    }
}

/// What every request carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Names the request in its answer; bit 63 is set in requests that are sent again.
    pub unique: u64,
    /// The node that the request is about.
    pub node: NodeId,
    /// Thread id of the caller in the pid namespace of who mounted; 0 when it has none there.
    pub pid: u32,
    /// Operation code, for messages.
    pub opcode: u32,
}

/// A request.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// What every request carries.
    pub header: Header,
    /// What is asked.
    pub operation: Operation<'a>,
}

/// What a request asks.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub enum Operation<'a> {
    /// Agree on the protocol.
    Init(Init),
    /// The connection ends.
    Destroy,
    /// The request `unique` was interrupted by a signal. Never answered, except by "ask again".
    Interrupt { unique: u64 },
    /// FORGET or BATCH_FORGET: the kernel drops nodes. Never answered.
    Forget,
    /// Look a name up in the node.
    Lookup { name: &'a OsStr },
    /// Attributes of the node.
    GetAttributes,
    /// Open the node as a file.
    Open { flags: u32 },
    /// Read the node.
    Read { offset: u64, size: u32 },
    /// Open the node as a directory.
    OpenDirectory,
    /// Names in the node, from the cookie `offset` on.
    ReadDirectory { offset: u64, size: u32 },
    /// Close a directory.
    ReleaseDirectory,
    /// Close a file.
    Release,
    /// A file descriptor was closed.
    Flush,
    /// Size of the file system.
    StatFs,
    /// Any operation that would change something.
    Modify,
    /// An operation that is not served here.
    Other,
}

/// What the kernel offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Init {
    /// Major protocol version.
    pub major: u32,
    /// Minor protocol version.
    pub minor: u32,
    /// Readahead in bytes.
    pub max_readahead: u32,
    /// Flags, those of `flags2` in the upper half.
    pub flags: u64,
}

/// Why bytes are no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than a header: there is nothing to answer to.
    #[error("a request of {0} bytes is shorter than its header")]
    NoHeader(usize),
    /// The length in the header is not the length that was read.
    #[error("request {unique} says that it has {declared} bytes and has {got}")]
    Length {
        /// Names the request.
        unique: u64,
        /// Length in the header.
        declared: u32,
        /// Length read.
        got: usize,
    },
    /// The arguments are too short or a name is not one.
    #[error("request {unique} (operation {opcode}) has malformed arguments")]
    Arguments {
        /// Names the request.
        unique: u64,
        /// Operation code.
        opcode: u32,
    },
}

impl DecodeError {
    /// The request to refuse, if it can be named.
    pub fn unique(&self) -> Option<u64> {
        match self {
            DecodeError::NoHeader(_) => None,
            DecodeError::Length { unique, .. } | DecodeError::Arguments { unique, .. } => Some(*unique),
        }
    }
}

/// Decodes one message read from `/dev/fuse`.
pub fn decode(bytes: &[u8]) -> Result<Request<'_>, DecodeError> {
    let (raw, body) = InHeader::read_from_prefix(bytes).map_err(|_| DecodeError::NoHeader(bytes.len()))?;
    if usize::try_from(raw.len) != Ok(bytes.len()) {
        return Err(DecodeError::Length { unique: raw.unique, declared: raw.len, got: bytes.len() });
    }
    let header = Header { unique: raw.unique, node: NodeId(raw.nodeid), pid: raw.pid, opcode: raw.opcode };
    let operation =
        operation(raw.opcode, body).ok_or(DecodeError::Arguments { unique: raw.unique, opcode: raw.opcode })?;
    Ok(Request { header, operation })
}

fn operation(code: u32, body: &[u8]) -> Option<Operation<'_>> {
    Some(match code {
        opcode::INIT => Operation::Init(init(body)?),
        opcode::DESTROY => Operation::Destroy,
        opcode::INTERRUPT => Operation::Interrupt { unique: argument::<InterruptIn>(body)?.unique },
        opcode::FORGET | opcode::BATCH_FORGET => Operation::Forget,
        opcode::LOOKUP => Operation::Lookup { name: name(body)? },
        opcode::GETATTR => Operation::GetAttributes,
        opcode::OPEN => Operation::Open { flags: argument::<OpenIn>(body)?.flags },
        opcode::READ => {
            let read: ReadIn = argument(body)?;
            Operation::Read { offset: read.offset, size: read.size }
        }
        opcode::OPENDIR => Operation::OpenDirectory,
        opcode::READDIR => {
            let read: ReadIn = argument(body)?;
            Operation::ReadDirectory { offset: read.offset, size: read.size }
        }
        opcode::RELEASEDIR => Operation::ReleaseDirectory,
        opcode::RELEASE => Operation::Release,
        opcode::FLUSH => Operation::Flush,
        opcode::STATFS => Operation::StatFs,
        opcode::SETATTR
        | opcode::SYMLINK
        | opcode::MKNOD
        | opcode::MKDIR
        | opcode::UNLINK
        | opcode::RMDIR
        | opcode::RENAME
        | opcode::RENAME2
        | opcode::LINK
        | opcode::WRITE
        | opcode::SETXATTR
        | opcode::REMOVEXATTR
        | opcode::CREATE
        | opcode::FALLOCATE
        | opcode::COPY_FILE_RANGE
        | opcode::TMPFILE => Operation::Modify,
        _ => Operation::Other,
    })
}

fn init(body: &[u8]) -> Option<Init> {
    let (first, rest) = InitIn::read_from_prefix(body).ok()?;
    let mut flags = u64::from(first.flags);
    if flags & init_flag::INIT_EXT != 0 {
        flags |= u64::from(argument::<u32>(rest)?) << 32;
    }
    Some(Init { major: first.major, minor: first.minor, max_readahead: first.max_readahead, flags })
}

fn argument<T: FromBytes>(body: &[u8]) -> Option<T> {
    T::read_from_prefix(body).ok().map(|(value, _)| value)
}

/// The name at the start of `body`, which ends with a zero byte.
fn name(body: &[u8]) -> Option<&OsStr> {
    let end = body.iter().position(|byte| *byte == 0)?;
    let name = body.get(..end)?;
    (!name.is_empty() && !name.contains(&b'/')).then(|| OsStr::from_bytes(name))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn message(opcode: u32, body: &[u8]) -> Vec<u8> {
        let header = InHeader {
            len: u32::try_from(size_of::<InHeader>() + body.len()).unwrap(),
            opcode,
            unique: 42,
            nodeid: 7,
            uid: 0,
            gid: 0,
            pid: 99,
            total_extlen: 0,
            padding: 0,
        };
        [header.as_bytes(), body].concat()
    }

    #[test]
    fn a_read_is_understood() {
        let body = ReadIn { fh: 0, offset: 1 << 40, size: 131_072, read_flags: 0, lock_owner: 0, flags: 0, padding: 0 };
        let bytes = message(opcode::READ, body.as_bytes());
        let request = decode(&bytes).unwrap();
        assert_eq!(request.header, Header { unique: 42, node: NodeId(7), pid: 99, opcode: opcode::READ });
        assert!(matches!(request.operation, Operation::Read { offset, size: 131_072 } if offset == 1 << 40));
    }

    #[test]
    fn names_end_with_zero_and_have_no_slash() {
        let lookup = |body: &[u8]| match decode(&message(opcode::LOOKUP, body)) {
            Ok(Request { operation: Operation::Lookup { name }, .. }) => Some(name.as_bytes().to_vec()),
            Ok(_) => panic!("not a lookup"),
            Err(error) => {
                assert_eq!(error.unique(), Some(42));
                None
            }
        };
        assert_eq!(lookup(b"7f\0"), Some(b"7f".to_vec()));
        for bad in [&b"7f"[..], b"\0", b"", b"a/b\0"] {
            assert_eq!(lookup(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn lengths_must_agree() {
        let mut bytes = message(opcode::GETATTR, &[0; 16]);
        bytes.push(0);
        assert_eq!(decode(&bytes).unwrap_err(), DecodeError::Length { unique: 42, declared: 56, got: 57 });
        assert_eq!(decode(&bytes[..39]).unwrap_err(), DecodeError::NoHeader(39));
        let short = message(opcode::READ, &[0; 39]);
        assert_eq!(decode(&short).unwrap_err(), DecodeError::Arguments { unique: 42, opcode: opcode::READ });
    }

    #[test]
    fn layer_numbers_are_nodes_and_back() {
        assert_eq!(NodeId::of_layer(0).unwrap().get(), 2);
        assert_eq!(NodeId::of_layer(5).unwrap().layer(), Some(5));
        assert_eq!(NodeId::ROOT.layer(), None);
        assert_eq!(NodeId::of_layer(u64::MAX), None);
    }

    #[test]
    fn the_fuzz_corpus_is_decoded() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/fuse");
        let mut seen = 0;
        for file in std::fs::read_dir(directory).unwrap() {
            let _ = decode(&std::fs::read(file.unwrap().path()).unwrap());
            seen += 1;
        }
        assert!(seen > 0, "no corpus in {directory}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(opcode in 0u32..60, body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&message(opcode, &body));
            let _ = decode(&body);
        }
    }
}
