//! The device mount: one flat, read-only directory whose files are devices.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
};

use zerocopy::IntoBytes;

use super::{
    Failure, NodeId, Operation, Reply, Request,
    abi::{Attr, AttrOut, Dirent, EntryOut, OpenOut, StatfsOut},
    session::Handler,
};

/// What the device mount serves.
pub trait Devices: Send + Sync + 'static {
    /// The device of this name.
    fn lookup(&self, name: &OsStr) -> Option<DeviceAttributes>;

    /// The device of this node.
    fn attributes(&self, node: NodeId) -> Option<DeviceAttributes>;

    /// All devices, in any order.
    fn list(&self) -> Vec<(OsString, NodeId)>;

    /// Bytes that the devices take on the disk, and bytes that they may still take.
    fn disk_use(&self) -> (u64, u64) {
        (0, 0)
    }

    /// Reads `size` bytes (not 0, at most 1 MiB) at `offset`, which the device has. The answer must have exactly that
    /// many. Called on a thread that reads requests: what takes longer than a copy from the page cache is parked
    /// ([`Reply::park`]).
    fn read(&self, node: NodeId, offset: u64, size: u32, reply: Reply);
}

/// A device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceAttributes {
    /// Its node, the same in every daemon; never the root.
    pub node: NodeId,
    /// Size in bytes; never changes.
    pub size: u64,
}

/// Serves [`Devices`] as a file system.
#[derive(Debug)]
pub struct DeviceMount<D>(pub D);

/// Seconds for which the kernel may keep the attributes of a device: about for ever, as they never change.
const ATTRIBUTES_VALID: u64 = u32::MAX as u64;

/// Unit of `statfs`.
const BLOCK: u64 = 4096;

const DIRECTORY_MODE: u32 = nix::libc::S_IFDIR | 0o700;
const FILE_MODE: u32 = nix::libc::S_IFREG | 0o400;
const KIND_DIRECTORY: u32 = nix::libc::DT_DIR as u32;
const KIND_FILE: u32 = nix::libc::DT_REG as u32;

impl<D: Devices> Handler for DeviceMount<D> {
    fn handle(&self, request: &Request<'_>, reply: Reply) {
        let node = request.header.node;
        match request.operation {
            Operation::Lookup { name } => self.lookup(node, name, reply),
            Operation::GetAttributes => self.attributes(node, reply),
            Operation::Read { offset, size } => self.read(node, offset, size, reply),
            // From then on the kernel opens without asking and keeps the pages over opens.
            Operation::Open { .. } => reply.failure(Failure::Unsupported),
            // Refused in the same way, the kernel would keep a listing for ever.
            Operation::OpenDirectory => reply.structure(&OpenOut::default()),
            Operation::ReadDirectory { offset, size } => self.list(node, offset, size, reply),
            Operation::ReleaseDirectory | Operation::Release => reply.bytes(&[]),
            Operation::StatFs => {
                let files = u64::try_from(self.0.list().len()).unwrap_or(u64::MAX);
                let (taken, free) = self.0.disk_use();
                let (taken, free) = (taken.div_ceil(BLOCK), free / BLOCK);
                reply.structure(&StatfsOut {
                    blocks: taken + free,
                    bfree: free,
                    bavail: free,
                    files,
                    bsize: BLOCK as u32,
                    frsize: BLOCK as u32,
                    namelen: 255,
                    ..StatfsOut::default()
                });
            }
            Operation::Modify => reply.failure(Failure::ReadOnly),
            Operation::Flush | Operation::Other => reply.failure(Failure::Unsupported),
            // Never handed on by the session.
            Operation::Init(_) | Operation::Destroy | Operation::Interrupt { .. } | Operation::Forget => {
                reply.failure(Failure::Unsupported);
            }
        }
    }
}

impl<D: Devices> DeviceMount<D> {
    fn lookup(&self, parent: NodeId, name: &OsStr, reply: Reply) {
        if parent != NodeId::ROOT {
            return reply.failure(Failure::NotADirectory);
        }
        match self.0.lookup(name) {
            Some(device) => reply.structure(&EntryOut {
                nodeid: device.node.get(),
                // A name may be gone at the next look.
                entry_valid: 0,
                attr_valid: ATTRIBUTES_VALID,
                attr: device_attr(&device),
                ..EntryOut::default()
            }),
            None => reply.failure(Failure::NoEntry),
        }
    }

    fn attributes(&self, node: NodeId, reply: Reply) {
        let (attr, attr_valid) = if node == NodeId::ROOT {
            (Attr { ino: node.get(), mode: DIRECTORY_MODE, nlink: 2, blksize: 4096, ..Attr::default() }, 0)
        } else {
            match self.0.attributes(node) {
                Some(device) => (device_attr(&device), ATTRIBUTES_VALID),
                None => return reply.failure(Failure::Stale),
            }
        };
        reply.structure(&AttrOut { attr_valid, attr, ..AttrOut::default() });
    }

    fn read(&self, node: NodeId, offset: u64, size: u32, reply: Reply) {
        if node == NodeId::ROOT {
            return reply.failure(Failure::IsADirectory);
        }
        let Some(device) = self.0.attributes(node) else { return reply.failure(Failure::Stale) };
        let rest = device.size.saturating_sub(offset);
        let size = u32::try_from(rest).map_or(size, |rest| size.min(rest));
        if size == 0 {
            return reply.bytes(&[]);
        }
        self.0.read(node, offset, size, reply.exactly(size));
    }

    fn list(&self, node: NodeId, offset: u64, size: u32, reply: Reply) {
        if node != NodeId::ROOT {
            return reply.failure(Failure::NotADirectory);
        }
        let mut devices = self.0.list();
        devices.sort_by_key(|(_, node)| *node);
        // The cookie of an entry is its node + 1, so that a listing goes on at the right place when devices come and go.
        let root = NodeId::ROOT.get();
        let entries = [(OsString::from("."), root, 1, KIND_DIRECTORY), (OsString::from(".."), root, 2, KIND_DIRECTORY)]
            .into_iter()
            .chain(devices.into_iter().map(|(name, node)| (name, node.get(), node.get() + 1, KIND_FILE)))
            .filter(|(_, _, cookie, _)| *cookie > offset);
        let size_max = usize::try_from(size).unwrap_or(usize::MAX);
        let mut out = Vec::new();
        for (name, ino, off, kind) in entries {
            let name = name.as_bytes();
            let Ok(namelen) = u32::try_from(name.len()) else { continue };
            let length = (size_of::<Dirent>() + name.len()).next_multiple_of(8);
            if out.len() + length > size_max {
                break;
            }
            let end = out.len() + length;
            out.extend_from_slice(Dirent { ino, off, namelen, kind }.as_bytes());
            out.extend_from_slice(name);
            out.resize(end, 0);
        }
        reply.at_most(size).bytes(&out);
    }
}

fn device_attr(device: &DeviceAttributes) -> Attr {
    Attr {
        ino: device.node.get(),
        size: device.size,
        blocks: device.size.div_ceil(512),
        mode: FILE_MODE,
        nlink: 1,
        blksize: 4096,
        ..Attr::default()
    }
}
