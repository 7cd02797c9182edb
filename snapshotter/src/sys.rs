//! The only room with unsafe code in this crate.

use std::{
    fs, io,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use rustix::mm::{Advice, madvise};

/// Takes a descriptor that this process was started with. It must be asked for once only and be closed by nobody else:
/// the descriptors of `LISTEN_FDS` are ours by protocol.
pub(crate) fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 3 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: borrowed for one call that fails with EBADF if there is no such descriptor; fd is not -1.
    rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) })?;
    // SAFETY: it is open, and the caller says that nothing else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets go of the pages of this process's program and libraries: they stay in the page cache and come back, where they are used,
/// one by one. For a process that used most of them to start, and then waits.
pub(crate) fn release_program() {
    let Ok(table) = fs::read_to_string("/proc/self/maps") else { return };
    for (start, end) in table.lines().filter_map(program_pages) {
        // SAFETY: the mapping is of a file and was never writable, so its pages are the file's and are read again when they are
        // touched; nothing else in this process changes its own program's mappings.
        let _ = unsafe { madvise(std::ptr::with_exposed_provenance_mut(start), end - start, Advice::LinuxDontNeed) };
    }
}

/// The addresses of a line of `/proc/PID/maps` (proc_pid_maps(5)) if it maps a part of a file that is never written: code, and what is
/// in front of it. What is behind it was writable while it was relocated.
fn program_pages(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (permissions, offset, inode) = (fields.next()?, fields.next()?, fields.nth(1)?);
    let is_front = permissions == "r--p" && offset.bytes().all(|digit| digit == b'0');
    let is_program = inode != "0" && (permissions == "r-xp" || is_front);
    is_program.then_some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_never_written_is_let_go() {
        let table = "\
            55d0a0000000-55d0a0400000 r--p 00000000 fe:00 1234    /usr/bin/drover-snapshotter\n\
            55d0a0400000-55d0a1000000 r-xp 00400000 fe:00 1234    /usr/bin/drover-snapshotter\n\
            55d0a1000000-55d0a1090000 r--p 01000000 fe:00 1234    /usr/bin/drover-snapshotter\n\
            55d0a1090000-55d0a1094000 rw-p 01090000 fe:00 1234    /usr/bin/drover-snapshotter\n\
            55d0a2000000-55d0a2021000 rw-p 00000000 00:00 0       [heap]\n\
            7ffc00000000-7ffc00002000 r-xp 00000000 00:00 0       [vdso]\n";
        let pages: Vec<_> = table.lines().filter_map(program_pages).collect();
        assert_eq!(pages, [(0x55d0_a000_0000, 0x55d0_a040_0000), (0x55d0_a040_0000, 0x55d0_a100_0000)]);
        release_program();
        assert_eq!("still here".replace("still", "is"), "is here");
    }
}
