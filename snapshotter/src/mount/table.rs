//! What is mounted, from `/proc/self/mountinfo`.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount of this mount namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Where it is mounted.
    pub target: PathBuf,
    /// File system type, like `erofs` or `fuse`.
    pub fs_type: String,
    /// Source, as the file system names it.
    pub source: PathBuf,
    /// Options of the superblock.
    pub super_options: String,
}

/// All mounts at or below `directory`, in the order in which they were mounted.
pub fn mounts_below(directory: &Path) -> io::Result<Vec<Mounted>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(parse(&text).into_iter().filter(|mounted| mounted.target.starts_with(directory)).collect())
}

/// Fields by proc(5): id, parent, device, root, target, options, optional fields up to `-`, type, source, super options.
fn parse(text: &[u8]) -> Vec<Mounted> {
    text.split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|byte| *byte == b' ');
            let target = unescape(fields.nth(4)?);
            let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
            let fs_type = String::from_utf8_lossy(rest.next()?).into_owned();
            let source = unescape(rest.next()?);
            let super_options = String::from_utf8_lossy(rest.next().unwrap_or_default()).into_owned();
            Some(Mounted { target, fs_type, source, super_options })
        })
        .collect()
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\').and_then(|digits| {
            digits.iter().try_fold(0_u32, |value, digit| {
                (b'0'..=b'7').contains(digit).then(|| value * 8 + u32::from(digit - b'0'))
            })
        });
        match octal.and_then(|value| u8::try_from(value).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_escapes_and_optional_fields() {
        let text = b"36 35 98:0 /mnt1 /mnt/a\\040b rw,noatime master:1 shared:2 - erofs /d/x\\134y.erofs ro,seclabel\n\
                     37 35 0:50 / /mnt/c rw - fuse drover rw,user_id=0\nrubbish\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].target, Path::new("/mnt/a b"));
        assert_eq!(mounts[0].source, Path::new("/d/x\\y.erofs"));
        assert_eq!(mounts[0].super_options, "ro,seclabel");
        assert_eq!(mounts[1].fs_type, "fuse");
    }

    #[test]
    fn this_machine_has_a_root() {
        assert!(mounts_below(Path::new("/")).unwrap().iter().any(|mounted| mounted.target == Path::new("/")));
    }
}
