//! One path of a layer, as containerd's unpacker would make it from the layer's tar alone.

/// A path of a layer with all that a file system needs to show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the root, cleaned: no leading or trailing `/`, no `.`, `..` or empty component. The root itself is empty.
    pub path: Vec<u8>,
    /// What is there.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky: 0 to 0o7777.
    pub mode: u16,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Mtime,
    /// Extended attributes by full name (`user.x`, `security.capability`), sorted by name, without duplicates.
    pub xattrs: Vec<Xattr>,
}

impl Kind {
    /// Whether the path is a directory, named by the tar or not.
    pub const fn is_directory(&self) -> bool {
        matches!(self, Self::Directory { .. } | Self::LateDirectory { .. } | Self::ImplicitDirectory { .. })
    }

    /// Whether it is a directory that hides what the layers below have in it.
    pub const fn is_opaque(&self) -> bool {
        matches!(
            self,
            Self::Directory { opaque: true }
                | Self::LateDirectory { opaque: true }
                | Self::ImplicitDirectory { opaque: true }
        )
    }

    /// Whether it is a directory that takes attributes over from the layers below.
    pub const fn takes_over(&self) -> bool {
        matches!(self, Self::LateDirectory { .. } | Self::ImplicitDirectory { .. })
    }
}

/// An extended attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// Full name with its namespace, 1 to 255 bytes.
    pub name: Vec<u8>,
    /// Value, at most 65 535 bytes.
    pub value: Vec<u8>,
}

/// Seconds since the epoch, which may be before it, and nanoseconds after that second (0 to 999 999 999).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mtime {
    /// Whole seconds.
    pub secs: i64,
    /// Nanoseconds.
    pub nanos: u32,
}

/// What a path is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory that the tar names.
    Directory {
        /// The layer hides what its parents have in it (`.wh..wh..opq`).
        opaque: bool,
    },
    /// A directory that the tar names after it has made it for a path in it: beside its own xattrs it has those that the
    /// layers below give the directory (containerd's `mkparent`).
    LateDirectory {
        /// The layer hides what its parents have in it (`.wh..wh..opq`).
        opaque: bool,
    },
    /// A directory that the tar leaves out but has paths in. Mode, owner, time and xattrs come from the layers
    /// below (containerd's `mkparent`), else 0755, root and the epoch, which is what the entry itself says; its group may be
    /// another, since the kernel gives what is made in a setgid directory that directory's group.
    ImplicitDirectory {
        /// The layer hides what its parents have in it (`.wh..wh..opq`).
        opaque: bool,
    },
    /// A file whose bytes stand in the device.
    Regular {
        /// First byte in the device, a multiple of 512.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points, as it stands in the tar: any bytes, never resolved.
        target: Vec<u8>,
    },
    /// Another name of a path of this layer that sorts before it and is no directory, whiteout or hard link itself.
    /// Mode, owner, time and xattrs are the target's; in this entry they are zero and empty.
    HardLink {
        /// The cleaned path of the first name.
        target: Vec<u8>,
    },
    /// A character device.
    CharDevice {
        /// Device number.
        major: u32,
        /// Device number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Device number.
        major: u32,
        /// Device number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// The path is removed from the layers below (`.wh.NAME`). Mode, owner and time are zero, there are no xattrs.
    Whiteout,
}
