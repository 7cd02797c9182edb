//! Watches the calls to the kernel with which another process changes a folder (ptrace(2)).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc::{self, c_int, c_uint, c_void};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::store::Backend;
use crate::store::memory::MemoryDisk;

/// One change of a folder; paths begin at its root.
#[derive(Clone)]
pub(super) enum Change {
    Directory(PathBuf),
    Create(PathBuf),
    Write(PathBuf, u64, Vec<u8>),
    Length(PathBuf, u64),
    Punch(PathBuf, std::ops::Range<u64>),
    Sync(PathBuf),
    SyncDirectory(PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    /// Of the other folder: what the process wants to say.
    Mark(PathBuf),
}

impl std::fmt::Debug for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "mkdir {}", path.display()),
            Self::Create(path) => write!(f, "create {}", path.display()),
            Self::Write(path, at, bytes) => write!(f, "write {} bytes at {at} of {}", bytes.len(), path.display()),
            Self::Length(path, length) => write!(f, "set length {length} of {}", path.display()),
            Self::Punch(path, range) => write!(f, "punch {range:?} of {}", path.display()),
            Self::Sync(path) => write!(f, "sync {}", path.display()),
            Self::SyncDirectory(path) => write!(f, "sync names of {}", path.display()),
            Self::Rename(from, to) => write!(f, "rename {} to {}", from.display(), to.display()),
            Self::Remove(path) => write!(f, "remove {}", path.display()),
            Self::Mark(path) => write!(f, "mark {}", path.display()),
        }
    }
}

impl Change {
    /// Does the same on a disk; counts marks.
    pub(super) fn make(&self, disk: &MemoryDisk, marks: &mut usize) {
        let open = |path: &Path| disk.open(path, false).unwrap();
        match self {
            Self::Directory(path) => disk.create_directory(path),
            Self::Create(path) => disk.open(path, true).map(drop),
            Self::Write(path, at, bytes) => open(path).write_at(bytes, *at),
            Self::Length(path, length) => open(path).set_len(*length),
            Self::Punch(path, range) => open(path).punch(range.clone()),
            Self::Sync(path) => open(path).sync(),
            Self::SyncDirectory(path) => disk.sync_directory(path),
            Self::Rename(from, to) => disk.rename(from, to),
            Self::Remove(path) => disk.remove(path),
            Self::Mark(_) => {
                *marks += 1;
                Ok(())
            }
        }
        .unwrap_or_else(|error| panic!("{self:?}: {error}"));
    }
}

/// Watches the process to its end, from when it was told to `begin`. Gives its changes below `root` and `marks`, and whether it ended
/// well. It must be a child of this thread, and have no more than it has now to do with either folder.
pub(super) fn watch(process: u32, root: &Path, marks: &Path, begin: impl FnOnce()) -> nix::Result<(Vec<Change>, bool)> {
    let process = Pid::from_raw(process.cast_signed());
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
    let mut watcher = Watcher { process, root, marks, changes: Vec::new(), entered: BTreeMap::new() };
    for entry in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        let thread = Pid::from_raw(entry.unwrap().file_name().to_str().unwrap().parse().unwrap());
        request(libc::PTRACE_SEIZE, thread, 0, options as usize)?;
        request(libc::PTRACE_INTERRUPT, thread, 0, 0)?;
    }
    begin();
    loop {
        let status = waitpid(None, Some(flags()))?;
        if let WaitStatus::Exited(thread, code) = status
            && thread == process
        {
            return Ok((watcher.changes, code == 0));
        }
        if let WaitStatus::Signaled(thread, ..) = status
            && thread == process
        {
            return Ok((watcher.changes, false));
        }
        if let Some(thread) = status.pid() {
            watcher.step(thread, status);
        }
    }
}

/// Children of other threads, those of other tests, are theirs.
fn flags() -> WaitPidFlag {
    WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD
}

struct Watcher<'a> {
    process: Pid,
    root: &'a Path,
    marks: &'a Path,
    changes: Vec<Change>,
    /// What each thread is about to do where it is in a call.
    entered: BTreeMap<Pid, Vec<Change>>,
}

impl Watcher<'_> {
    fn step(&mut self, thread: Pid, status: WaitStatus) {
        if matches!(status, WaitStatus::PtraceSyscall(_)) && self.call(thread) {
            // Its end is waited for, so that changes have one order.
            let _ = go_on(thread, 0);
            if let Ok(status) = waitpid(thread, Some(flags())) {
                return self.step(thread, status);
            }
        }
        let signal = if let WaitStatus::Stopped(_, signal) = status { signal as usize } else { 0 };
        // It may have died meanwhile.
        let _ = go_on(thread, signal);
    }

    /// A thread entered or left a call; gives whether it is about to change something.
    fn call(&mut self, thread: Pid) -> bool {
        match call_of(thread) {
            Ok(Call::Enters { number, arguments }) => {
                let changes = self.changes_of(number, arguments);
                let is_change = !changes.is_empty();
                self.entered.insert(thread, changes);
                is_change
            }
            Ok(Call::Leaves { result }) => {
                let mut changes = self.entered.remove(&thread).unwrap_or_default();
                if let (Ok(length), Some(Change::Write(_, _, bytes))) = (usize::try_from(result), changes.last_mut()) {
                    bytes.truncate(length);
                }
                if result >= 0 {
                    self.changes.append(&mut changes);
                }
                false
            }
            _ => false,
        }
    }

    /// What a call changes where it succeeds.
    fn changes_of(&self, number: i64, arguments: [u64; 6]) -> Vec<Change> {
        let [first, second, third, fourth, ..] = arguments;
        let here = libc::AT_FDCWD as u64;
        let change = match number {
            libc::SYS_openat => return self.open(first, second, third),
            libc::SYS_mkdirat => self.path(first, second).map(|path| match path {
                Place::Root(path) => Change::Directory(path),
                Place::Marks(path) => Change::Mark(path),
            }),
            libc::SYS_renameat | libc::SYS_renameat2 => self.rename((first, second), (third, fourth)),
            libc::SYS_unlinkat => self.root_path(first, second).map(Change::Remove),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_open => return self.open(here, first, second),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_mkdir => return self.changes_of(libc::SYS_mkdirat, [here, first, 0, 0, 0, 0]),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_rename => self.rename((here, first), (here, second)),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_unlink | libc::SYS_rmdir => self.root_path(here, first).map(Change::Remove),
            libc::SYS_write => self.file(first).map(|path| {
                let at = self.position(first, &path);
                Change::Write(path, at, self.memory(second, third as usize))
            }),
            libc::SYS_pwrite64 => {
                self.file(first).map(|path| Change::Write(path, fourth, self.memory(second, third as usize)))
            }
            libc::SYS_ftruncate => self.file(first).map(|path| Change::Length(path, second)),
            libc::SYS_fallocate => self.file(first).map(|path| {
                assert_ne!(second & libc::FALLOC_FL_PUNCH_HOLE as u64, 0, "only holes are made");
                Change::Punch(path, third..third + fourth)
            }),
            libc::SYS_fsync | libc::SYS_fdatasync => self.file(first).map(|path| {
                let is_directory = self.root.join(path.strip_prefix("/").unwrap()).is_dir();
                if is_directory { Change::SyncDirectory(path) } else { Change::Sync(path) }
            }),
            libc::SYS_writev
            | libc::SYS_pwritev
            | libc::SYS_pwritev2
            | libc::SYS_copy_file_range
            | libc::SYS_sendfile
            | libc::SYS_linkat
            | libc::SYS_symlinkat
            | libc::SYS_truncate => {
                assert!(self.file(first).is_none(), "the store does what is not modelled: call {number}");
                None
            }
            _ => None,
        };
        change.into_iter().collect()
    }

    fn open(&self, directory: u64, path: u64, flags: u64) -> Vec<Change> {
        let flags = flags as c_int;
        if flags & (libc::O_CREAT | libc::O_TRUNC) == 0 {
            return Vec::new();
        }
        let Some(path) = self.root_path(directory, path) else { return Vec::new() };
        let is_there = self.root.join(path.strip_prefix("/").unwrap()).exists();
        match (is_there, flags & libc::O_TRUNC != 0) {
            (false, _) => vec![Change::Create(path)],
            (true, true) => vec![Change::Length(path, 0)],
            (true, false) => Vec::new(),
        }
    }

    fn rename(&self, from: (u64, u64), to: (u64, u64)) -> Option<Change> {
        Some(Change::Rename(self.root_path(from.0, from.1)?, self.root_path(to.0, to.1)?))
    }

    fn root_path(&self, directory: u64, path: u64) -> Option<PathBuf> {
        match self.path(directory, path)? {
            Place::Root(path) => Some(path),
            Place::Marks(_) => None,
        }
    }

    /// The path in the process's memory, where it is below one of the folders.
    fn path(&self, directory: u64, path: u64) -> Option<Place> {
        let mut bytes = self.memory(path, libc::PATH_MAX as usize);
        bytes.truncate(bytes.iter().position(|byte| *byte == 0)?);
        let path = PathBuf::from(OsString::from_vec(bytes));
        let path = if path.is_absolute() { path } else { self.link(directory)?.join(path) };
        let below = |folder: &Path| Some(Path::new("/").join(path.strip_prefix(folder).ok()?));
        below(self.root).map(Place::Root).or_else(|| below(self.marks).map(Place::Marks))
    }

    /// What is open below the root.
    fn file(&self, number: u64) -> Option<PathBuf> {
        Some(Path::new("/").join(self.link(number)?.strip_prefix(self.root).ok()?))
    }

    fn link(&self, number: u64) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/fd/{}", self.process, number as c_int)).ok()
    }

    /// Where the next write goes.
    fn position(&self, number: u64, path: &Path) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/fdinfo/{number}", self.process)).unwrap();
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
        let flags = c_int::from_str_radix(field("flags:"), 8).unwrap();
        if flags & libc::O_APPEND == 0 {
            return field("pos:").parse().unwrap();
        }
        fs::metadata(self.root.join(path.strip_prefix("/").unwrap())).unwrap().len()
    }

    /// What is in its memory; less where that ends.
    fn memory(&self, at: u64, length: usize) -> Vec<u8> {
        let memory = File::open(format!("/proc/{}/mem", self.process)).unwrap();
        let mut bytes = Vec::new();
        while bytes.len() < length {
            // A page at a time: the next one may not be there.
            let next = at + bytes.len() as u64;
            let mut page = vec![0; (4096 - next as usize % 4096).min(length - bytes.len())];
            match memory.read_at(&mut page, next) {
                Ok(read @ 1..) => bytes.extend_from_slice(&page[..read]),
                _ => break,
            }
        }
        bytes
    }
}

enum Place {
    Root(PathBuf),
    Marks(PathBuf),
}

/// At which end of a call a thread is.
enum Call {
    Enters { number: i64, arguments: [u64; 6] },
    Leaves { result: i64 },
    Neither,
}

/// Lets a thread go on to the next end of a call.
fn go_on(thread: Pid, signal: usize) -> nix::Result<()> {
    request(libc::PTRACE_SYSCALL, thread, 0, signal)
}

fn request(request: c_uint, thread: Pid, address: usize, data: usize) -> nix::Result<()> {
    // SAFETY: none of the requests that are made here touches memory of this process.
    #[expect(unsafe_code, reason = "there is no safe ptrace")]
    let result = unsafe { libc::ptrace(request, thread.as_raw(), address as *mut c_void, data as *mut c_void) };
    Errno::result(result).map(drop)
}

fn call_of(thread: Pid) -> nix::Result<Call> {
    #[expect(unsafe_code, reason = "there is no safe ptrace")]
    // SAFETY: the kernel writes at most so many bytes as it is told, any of which are such a structure, and `op` says which member of
    // the union it filled.
    unsafe {
        let mut info: libc::ptrace_syscall_info = std::mem::zeroed();
        let length = size_of_val(&info) as *mut c_void;
        let place = (&raw mut info).cast::<c_void>();
        Errno::result(libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, thread.as_raw(), length, place))?;
        Ok(match info.op {
            libc::PTRACE_SYSCALL_INFO_ENTRY => {
                let entry = info.u.entry;
                Call::Enters { number: entry.nr.cast_signed(), arguments: entry.args }
            }
            libc::PTRACE_SYSCALL_INFO_EXIT => Call::Leaves { result: info.u.exit.sval },
            _ => Call::Neither,
        })
    }
}
