//! A line to a machine that fails in all ways in which lines and machines do.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What happens to everything that goes over the line, on connections that are open as on new ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Nothing.
    None,
    /// Nobody listens, and connections end.
    Refused,
    /// Connections are reset once there is an answer.
    Reset,
    /// Every request is answered with this status.
    Status(u16),
    /// Requests are taken and never answered.
    Stalled,
    /// A few kilobytes a second.
    Slow,
    /// Each connection ends after some of an answer.
    Truncated,
    /// Bits of answers flip.
    WrongBytes,
    /// Answers announce another length than they have.
    WrongLength,
}

impl Fault {
    pub(super) const ALL: [Self; 10] = [
        Self::Refused,
        Self::Reset,
        Self::Status(401),
        Self::Status(429),
        Self::Status(500),
        Self::Stalled,
        Self::Slow,
        Self::Truncated,
        Self::WrongBytes,
        Self::WrongLength,
    ];
}

/// Bytes at a time of [`Fault::Slow`], ten times a second.
const SLOW: usize = 500;

/// Bytes of a connection's answers before [`Fault::Truncated`] ends it.
const TRUNCATED: usize = 20_000;

/// An address of this machine that no other test of this process has: a port that is given up for a moment stays free there.
pub(super) fn own_ip() -> Ipv4Addr {
    static LAST: AtomicU16 = AtomicU16::new(0);
    let [high, low] = LAST.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    // Two processes seldom have the same.
    Ipv4Addr::new(127, (std::process::id() % 200 + 50) as u8, high, low)
}

/// The line; dropping it closes it.
pub(super) struct Line {
    address: SocketAddr,
    fault: watch::Sender<Fault>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Line {
    /// A line that works, to what listens at `target` by the time that it is needed.
    pub(super) async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (fault, faults) = watch::channel(Fault::None);
        let server = tokio::spawn(accept(Some(listener), address, target, faults));
        Self { address, fault, server }
    }

    /// This end of it.
    pub(super) const fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }
}

async fn accept(
    mut listener: Option<TcpListener>,
    address: SocketAddr,
    target: SocketAddr,
    mut faults: watch::Receiver<Fault>,
) {
    loop {
        let is_refused = *faults.borrow_and_update() == Fault::Refused;
        match &listener {
            _ if is_refused => {
                listener = None;
                if faults.changed().await.is_err() {
                    return;
                }
            }
            // Somebody else may have the port for a moment.
            None => match TcpListener::bind(address).await {
                Ok(bound) => listener = Some(bound),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            },
            Some(bound) => tokio::select! {
                accepted = bound.accept() => {
                    if let Ok((stream, _)) = accepted {
                        tokio::spawn(carry(stream, target, faults.clone()));
                    }
                }
                changed = faults.changed() => if changed.is_err() { return },
            },
        }
    }
}

/// Carries one connection.
async fn carry(near: TcpStream, target: SocketAddr, faults: watch::Receiver<Fault>) {
    let Ok(far) = TcpStream::connect(target).await else { return };
    let _ = near.set_nodelay(true);
    let _ = far.set_nodelay(true);
    let (mut near_in, mut near_out) = near.into_split();
    let (mut far_in, mut far_out) = far.into_split();
    let (own, mut ended) = (faults.clone(), faults.clone());
    let (answered, answers) = tokio::sync::mpsc::channel::<String>(16);
    let requests = async move {
        let mut piece = vec![0; 16 << 10];
        loop {
            let length = near_in.read(&mut piece).await.unwrap_or(0);
            if length == 0 {
                return;
            }
            let fault = *own.borrow();
            match fault {
                Fault::Stalled => {}
                Fault::Status(status) => {
                    let more = match status {
                        401 => "WWW-Authenticate: Basic realm=\"nobody\"\r\n",
                        429 => "Retry-After: 1\r\n",
                        _ => "",
                    };
                    let answer = format!("HTTP/1.1 {status} No\r\n{more}Content-Length: 0\r\n\r\n");
                    let _ = answered.send(answer).await;
                }
                _ if far_out.write_all(&piece[..length]).await.is_err() => return,
                _ => {}
            }
        }
    };
    let answers = async move {
        let (mut answers, mut sent) = (answers, 0);
        let mut piece = vec![0; 64 << 10];
        loop {
            let length = tokio::select! {
                length = far_in.read(&mut piece) => length.unwrap_or(0),
                Some(answer) = answers.recv() => {
                    if near_out.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                    continue;
                }
            };
            if length == 0 {
                return;
            }
            let piece = &mut piece[..length];
            let fault = *faults.borrow();
            let passed = match fault {
                Fault::None | Fault::Status(_) => near_out.write_all(piece).await.is_ok(),
                Fault::Refused => false,
                Fault::Reset => {
                    // With bytes that nobody has read, closing resets.
                    let _ = near_out.as_ref().set_zero_linger();
                    false
                }
                Fault::Stalled => true,
                Fault::Slow => {
                    let mut passed = true;
                    for some in piece.chunks(SLOW) {
                        // What was begun slowly goes on at once when the fault is over.
                        if *faults.borrow() == Fault::Slow {
                            tokio::time::sleep(Duration::from_millis(100)).await;
                        }
                        passed = passed && near_out.write_all(some).await.is_ok();
                    }
                    passed
                }
                Fault::Truncated => {
                    let rest = piece.len().min(TRUNCATED.saturating_sub(sent));
                    near_out.write_all(&piece[..rest]).await.is_ok() && rest == piece.len()
                }
                Fault::WrongBytes => {
                    // More often than any chunk is long; heads are shorter.
                    piece.iter_mut().skip(999).step_by(1000).for_each(|byte| *byte ^= 4);
                    near_out.write_all(piece).await.is_ok()
                }
                Fault::WrongLength => {
                    lie_about_length(piece);
                    near_out.write_all(piece).await.is_ok()
                }
            };
            if !passed {
                return;
            }
            sent += length;
        }
    };
    // Whoever ends, the other ends too; and a machine that nobody reaches has no connections.
    tokio::select! {
        () = requests => {}
        () = answers => {}
        _ = ended.wait_for(|fault| *fault == Fault::Refused) => {}
    }
}

/// Changes a digit of the length that the head of an answer announces.
fn lie_about_length(piece: &mut [u8]) {
    let name = b"content-length: ";
    let Some(at) = piece.windows(name.len()).position(|word| word.eq_ignore_ascii_case(name)) else { return };
    if let Some(digit) = piece.get_mut(at + name.len()).filter(|digit| digit.is_ascii_digit()) {
        *digit = if *digit == b'9' { b'1' } else { *digit + 1 };
    }
}
