//! INTERRUPT: a caller got a signal while its request was parked.
//!
//! A request that the daemon has read keeps its caller in uninterruptible sleep once the caller is being killed, until it
//! is answered. So a parked request is ended at once when its caller has SIGKILL pending (the kernel turns every fatal
//! signal without a core dump into that, for each thread of the group) or is gone. Any other signal leaves it parked: its
//! bytes will come, and an early answer would be a failed read. The kernel tells of one signal only, so such callers
//! are looked at from then on.

use std::{fs, io, sync::Arc, time::Duration};

use super::{Failure, reply::Connection};

/// How long a caller that got a harmless signal first may be in the way of a later SIGKILL. Chosen: a look costs about
/// 10 µs per watched request.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Longer than a thread takes from reading a request to parking or answering it, unless the disk hangs.
const THREAD_PATIENCE: Duration = Duration::from_millis(100);

const SIGKILL_BIT: u64 = 1 << (9 - 1);

/// Handles the INTERRUPT of the request `unique`, itself named `interrupt`.
pub(super) fn interrupted(connection: &Arc<Connection>, unique: u64, interrupt: u64) {
    let pid = connection.table.lock().parked.get(&unique).map(|parked| parked.pid);
    let Some(pid) = pid else {
        if connection.is_leaving() {
            // Its successor is told again, together with the request.
            return;
        }
        if connection.has_orphans() && is_orphan(connection, unique) {
            connection.send(unique, -Failure::Cancelled.errno(), &[]);
            return;
        }
        // Another thread is between reading the request and parking or answering it. The kernel sends the interrupt
        // again, unless the request is answered by then.
        std::thread::yield_now();
        connection.send(interrupt, -Failure::NotYet.errno(), &[]);
        return;
    };
    if is_dying(pid) {
        connection.cancel(unique);
        return;
    }
    let mut table = connection.table.lock();
    if let Some(parked) = table.parked.get_mut(&unique)
        && !parked.watched
    {
        parked.watched = true;
        table.watched.push(unique);
        connection.changed.notify_all();
    }
}

/// Whether the request is one that an earlier daemon had read: no thread of this one comes to know it. The kernel does not say who
/// waits for it, so any signal ends its wait, which would have no other end.
fn is_orphan(connection: &Connection, unique: u64) -> bool {
    std::thread::sleep(THREAD_PATIENCE);
    !connection.table.lock().parked.contains_key(&unique)
}

/// Looks after callers that got a harmless signal, until the session ends. Sleeps while there are none.
pub(super) fn watch(connection: &Arc<Connection>) {
    loop {
        let mut table = connection.table.lock();
        while table.watched.is_empty() && table.ended.is_none() {
            connection.changed.wait(&mut table);
        }
        if table.ended.is_some() {
            return;
        }
        connection.changed.wait_for(&mut table, LOOK_EVERY);
        let callers = table.watched_callers();
        drop(table);
        for (unique, pid) in callers {
            if is_dying(pid) {
                connection.cancel(unique);
            }
        }
    }
}

/// Whether the thread `pid` is being killed or gone. A caller without a pid in our namespace (0) is not known to be.
fn is_dying(pid: u32) -> bool {
    if pid == 0 {
        return false;
    }
    match fs::read_to_string(format!("/proc/{pid}/status")) {
        Ok(status) => status_says_dying(&status),
        Err(error) => error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ESRCH),
    }
}

fn status_says_dying(status: &str) -> bool {
    status.lines().any(|line| {
        let Some((key, value)) = line.split_once(':') else { return false };
        let value = value.trim();
        match key {
            "State" => value.starts_with('Z') || value.starts_with('X'),
            "SigPnd" | "ShdPnd" => u64::from_str_radix(value, 16).is_ok_and(|set| set & SIGKILL_BIT != 0),
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_living_and_the_dying_are_told_apart() {
        let status = |state: &str, pending: &str, shared: &str| {
            format!("Name:\tcat\nState:\t{state}\nSigPnd:\t{pending}\nShdPnd:\t{shared}\nSigBlk:\t0000000000000100\n")
        };
        let none = "0000000000000000";
        assert!(!status_says_dying(&status("D (disk sleep)", none, none)));
        assert!(!status_says_dying(&status("D (disk sleep)", "0000000000400000", none)));
        assert!(status_says_dying(&status("D (disk sleep)", "0000000000000100", none)));
        assert!(status_says_dying(&status("D (disk sleep)", none, "0000000000000102")));
        assert!(status_says_dying(&status("Z (zombie)", none, none)));
        assert!(!is_dying(std::process::id()));
        assert!(!is_dying(0));
        assert!(is_dying(u32::MAX >> 1));
    }
}
