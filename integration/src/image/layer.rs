//! Writing one layer: a tar through a program that compresses.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, bail};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::{blob_folder, hex_of};
use crate::process::through;

/// How a layer's tar is packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Packing {
    /// One gzip member.
    #[default]
    Gzip,
    /// One zstd frame.
    Zstd,
    /// Many zstd frames, each followed by a skippable one, as zstd:chunked has them.
    ZstdFrames,
    /// Not at all.
    Plain,
}

impl Packing {
    /// How a layer of this media type is packed; the number of frames is not told.
    pub(super) fn of(media_type: &str) -> Self {
        match media_type {
            name if name.ends_with("gzip") => Self::Gzip,
            name if name.ends_with("zstd") => Self::Zstd,
            _ => Self::Plain,
        }
    }

    fn command(self) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(match self {
            Self::Gzip => "exec gzip -6 -n",
            Self::Zstd => "exec zstd -q -3 -c",
            Self::ZstdFrames => {
                r#"exec split -b 300000 --filter='zstd -q -3 -c; printf "\120\052\115\030\004\000\000\000skip"' -"#
            }
            Self::Plain => "exec cat",
        });
        command
    }
}

/// A written layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Digest of the blob.
    pub digest: String,
    /// Digest of the tar.
    pub diff_id: String,
    /// Bytes of the blob.
    pub size: u64,
    /// The blob.
    pub path: PathBuf,
    /// How the tar is packed in it.
    pub packing: Packing,
}

impl Layer {
    /// Whatever `blob` is, as a layer of the image in `folder` whose configuration says `diff_id`: for images that are broken.
    pub fn from_bytes(folder: &Path, blob: &[u8], diff_id: &str) -> Result<Self> {
        let hex = hex_of(&Sha256::digest(blob));
        let path = blob_folder(folder).join(&hex);
        fs::create_dir_all(blob_folder(folder))?;
        fs::write(&path, blob).with_context(|| format!("cannot write {}", path.display()))?;
        let digest = format!("sha256:{hex}");
        Ok(Self { digest, diff_id: diff_id.to_owned(), size: blob.len() as u64, path, packing: Packing::Gzip })
    }

    /// A tar packed with gzip, as a layer of the image in `folder`.
    pub fn from_gzip(folder: &Path, blob: &[u8]) -> Result<Self> {
        let tar = through(Command::new("gzip").arg("-dc"), blob)?;
        Self::from_bytes(folder, blob, &format!("sha256:{}", hex_of(&Sha256::digest(tar))))
    }
}

/// Attributes of an entry that is made up.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Seconds since 1970.
    pub mtime: u64,
}

impl Attributes {
    /// Root's, at a fixed time.
    pub const fn root(mode: u32) -> Self {
        Self { mode, uid: 0, gid: 0, mtime: 1_700_000_000 }
    }
}

/// Appends entries to a layer.
pub struct LayerWriter {
    builder: Builder<HashingWriter<BufWriter<ChildStdin>>>,
    packing: Packing,
    packer: Child,
    folder: PathBuf,
    unfinished: PathBuf,
}

impl LayerWriter {
    /// Starts a layer of the image in `folder`. `name` tells unfinished layers apart that are written at the same time.
    pub fn create(folder: &Path, name: &str) -> Result<Self> {
        Self::create_packed(folder, name, Packing::Gzip)
    }

    /// The same with a packing of choice.
    pub fn create_packed(folder: &Path, name: &str, packing: Packing) -> Result<Self> {
        let blobs = blob_folder(folder);
        fs::create_dir_all(&blobs).with_context(|| format!("cannot create {}", blobs.display()))?;
        let unfinished = blobs.join(format!("{name}.unfinished"));
        let out = File::create(&unfinished).with_context(|| format!("cannot write {}", unfinished.display()))?;
        let mut packer = packing.command();
        let mut packer = packer.stdin(Stdio::piped()).stdout(out).spawn().context("cannot start a shell")?;
        let stdin = packer.stdin.take().context("the packer has no input")?;
        let hashing = HashingWriter { inner: BufWriter::with_capacity(1 << 18, stdin), hash: Sha256::new() };
        Ok(Self { builder: Builder::new(hashing), packing, packer, folder: folder.to_owned(), unfinished })
    }

    /// A directory.
    pub fn directory(&mut self, path: &str, attributes: Attributes) -> Result<()> {
        self.append(EntryType::Directory, path.as_bytes(), attributes, None, None, &[])
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, attributes: Attributes, contents: &[u8]) -> Result<()> {
        self.append(EntryType::Regular, path.as_bytes(), attributes, None, None, contents)
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.append(EntryType::Symlink, path.as_bytes(), Attributes::root(0o777), Some(target.as_bytes()), None, &[])
    }

    /// A hard link to an earlier entry of this layer.
    pub fn hard_link(&mut self, path: &str, target: &str) -> Result<()> {
        self.append(EntryType::Link, path.as_bytes(), Attributes::root(0o644), Some(target.as_bytes()), None, &[])
    }

    /// A device or pipe.
    pub fn node(&mut self, kind: EntryType, path: &str, attributes: Attributes, device: (u32, u32)) -> Result<()> {
        self.append(kind, path.as_bytes(), attributes, None, Some(device), &[])
    }

    /// Marks `path` of the layers below as removed.
    pub fn whiteout(&mut self, path: &str) -> Result<()> {
        let (folder, name) = path.rsplit_once('/').map_or(("", path), |(folder, name)| (folder, name));
        let slash = if folder.is_empty() { "" } else { "/" };
        self.file(&format!("{folder}{slash}.wh.{name}"), Attributes::root(0o600), &[])
    }

    /// Hides what the layers below have in the directory `path`.
    pub fn opaque(&mut self, path: &str) -> Result<()> {
        self.file(&format!("{path}/.wh..wh..opq"), Attributes::root(0o600), &[])
    }

    /// PAX records (such as `SCHILY.xattr.user.name` or `mtime`) for the entry that is appended next.
    pub fn records(&mut self, records: &[(&str, &[u8])]) -> Result<()> {
        self.builder.append_pax_extensions(records.iter().copied()).context("cannot write PAX records")
    }

    /// Any entry; names and link targets may be any bytes.
    pub fn append(
        &mut self,
        kind: EntryType,
        path: &[u8],
        attributes: Attributes,
        link: Option<&[u8]>,
        device: Option<(u32, u32)>,
        contents: &[u8],
    ) -> Result<()> {
        let mut header = header(kind, attributes, contents.len() as u64);
        if let Some((major, minor)) = device {
            header.set_device_major(major)?;
            header.set_device_minor(minor)?;
        }
        self.entry(header, path, link, contents)
    }

    /// Appends `relative` as it is below `root` (not what is inside of a directory). `link` is an earlier path with the same
    /// file, for hard links.
    pub fn from_disk(&mut self, root: &Path, relative: &Path, link: Option<&Path>) -> Result<()> {
        let path = root.join(relative);
        let metadata = fs::symlink_metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let attributes = Attributes {
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid().into(),
            gid: metadata.gid().into(),
            mtime: u64::try_from(metadata.mtime()).unwrap_or(0),
        };
        let name = relative.as_os_str().as_bytes();
        let kind = metadata.file_type();
        if let Some(link) = link {
            return self.append(EntryType::Link, name, attributes, Some(link.as_os_str().as_bytes()), None, &[]);
        }
        if kind.is_symlink() {
            let target = fs::read_link(&path)?;
            return self.append(EntryType::Symlink, name, attributes, Some(target.as_os_str().as_bytes()), None, &[]);
        }
        self.xattrs_of(&path)?;
        if kind.is_dir() {
            self.append(EntryType::Directory, name, attributes, None, None, &[])
        } else if kind.is_file() {
            let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
            let header = header(EntryType::Regular, attributes, metadata.len());
            self.entry(header, name, None, io::BufReader::with_capacity(1 << 17, file))
        } else if kind.is_fifo() {
            self.append(EntryType::Fifo, name, attributes, None, None, &[])
        } else {
            bail!("{} is a file of a sort that is not expected here", path.display())
        }
    }

    /// Everything below `root`, and `root` itself as `./`, as GNU tar writes it: with PAX records for times and attributes.
    pub fn tree(&mut self, root: &Path) -> Result<()> {
        let mut tar = Command::new("tar");
        tar.args(["--create", "--format=pax", "--pax-option=delete=atime,delete=ctime", "--sort=name"]);
        tar.args(["--numeric-owner", "--xattrs", "--xattrs-include=*", "--directory"]).arg(root).arg(".");
        let mut tar = tar.stdout(Stdio::piped()).spawn().context("cannot start tar")?;
        let mut archive = tar.stdout.take().context("tar has no output")?;
        io::copy(&mut archive, self.builder.get_mut()).with_context(|| format!("cannot pack {}", root.display()))?;
        let status = tar.wait().context("cannot wait for tar")?;
        if !status.success() {
            bail!("packing {} failed: {status}", root.display());
        }
        Ok(())
    }

    /// Ends the layer; its blob is now named by its digest.
    pub fn finish(self) -> Result<Layer> {
        let Self { builder, packing, mut packer, folder, unfinished } = self;
        let mut hashing = builder.into_inner().context("cannot end the tar")?;
        hashing.flush().context("cannot end the tar")?;
        let HashingWriter { inner, hash } = hashing;
        drop(inner);
        let status = packer.wait().context("cannot wait for the packer")?;
        if !status.success() {
            bail!("packing a layer ({packing:?}) failed: {status}");
        }
        let mut blob = File::open(&unfinished)?;
        let (mut digest, mut buffer, mut size) = (Sha256::new(), vec![0; 1 << 18], 0);
        loop {
            let read = blob.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            digest.update(&buffer[..read]);
            size += read as u64;
        }
        let hex = hex_of(&digest.finalize());
        let path = blob_folder(&folder).join(&hex);
        fs::rename(&unfinished, &path).with_context(|| format!("cannot name {}", path.display()))?;
        let diff_id = format!("sha256:{}", hex_of(&hash.finalize()));
        Ok(Layer { digest: format!("sha256:{hex}"), diff_id, size, path, packing })
    }

    fn entry(&mut self, mut header: Header, path: &[u8], link: Option<&[u8]>, contents: impl Read) -> Result<()> {
        let path = Path::new(OsStr::from_bytes(path));
        let shown = path.display();
        match link {
            Some(link) => self.builder.append_link(&mut header, path, Path::new(OsStr::from_bytes(link))),
            None => self.builder.append_data(&mut header, path, contents),
        }
        .with_context(|| format!("cannot append {shown}"))
    }

    fn xattrs_of(&mut self, path: &Path) -> Result<()> {
        let mut records = Vec::new();
        for name in crate::compare::xattr_names(path)? {
            let value = crate::compare::xattr(path, &name)?;
            let name = name.to_str().context("an extended attribute's name is not UTF-8")?;
            records.push((format!("SCHILY.xattr.{name}"), value));
        }
        if records.is_empty() {
            return Ok(());
        }
        let records: Vec<_> = records.iter().map(|(name, value)| (name.as_str(), value.as_slice())).collect();
        self.records(&records)
    }
}

fn header(kind: EntryType, attributes: Attributes, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(attributes.mode);
    header.set_uid(attributes.uid);
    header.set_gid(attributes.gid);
    header.set_mtime(attributes.mtime);
    header.set_size(if kind == EntryType::Regular { size } else { 0 });
    header
}

struct HashingWriter<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.hash.update(&buffer[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
