//! The kernel's byte counters of a TCP connection: written to it and read from it, by any process.
//! They are exact, also after a process was killed within a system call.

#![allow(unsafe_code, reason = "what the kernel counts of a TCP connection")]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Reads of the counters until two in a row agree. Acknowledgements and data arrive some thousand times a second at most, a
/// read takes a microsecond.
const MAX_READS: usize = 1_000;
/// `TCP_ESTABLISHED` of include/net/tcp_states.h: both sides may send.
const ESTABLISHED: u8 = 1;
/// `struct tcp_info` of include/uapi/linux/tcp.h, as far as it is needed, in 64-bit words: the state is its first byte, followed by
/// 15 words that are not used here.
const INFO_WORDS: usize = 17;
const BYTES_ACKED: usize = 15;
const BYTES_RECEIVED: usize = 16;

/// The bytes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    /// Bytes that were written to the socket.
    pub sent: u64,
    /// Bytes that were read from the socket.
    pub received: u64,
    /// Neither side has ended, and nothing broke.
    pub established: bool,
}

/// The current counts. No other task may write to the socket or read from it meanwhile.
pub(super) fn counts(socket: impl AsFd) -> io::Result<Counts> {
    let socket = socket.as_fd();
    let mut info = tcp_info(socket)?;
    for _ in 0..MAX_READS {
        let waiting = (
            queue(socket, libc::TIOCOUTQ)?,
            queue(socket, libc::FIONREAD)?,
        );
        let again = tcp_info(socket)?;
        let settled = |word: usize| info[word] == again[word];
        if settled(BYTES_ACKED) && settled(BYTES_RECEIVED) {
            return Ok(Counts {
                sent: info[BYTES_ACKED].wrapping_add(waiting.0),
                received: info[BYTES_RECEIVED].wrapping_sub(waiting.1),
                established: again[0].to_ne_bytes()[0] == ESTABLISHED,
            });
        }
        info = again;
    }
    Err(io::Error::other("the connection's counters keep changing"))
}

fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<[u64; INFO_WORDS]> {
    let mut info = [0_u64; INFO_WORDS];
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes no more than `length` bytes to `info`, any bytes are numbers, and it returns how many it wrote.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut length,
        )
    };
    match failed {
        0 if length as usize == size_of_val(&info) => Ok(info),
        0 => Err(io::Error::other("the kernel does not count bytes")),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Bytes that wait in a socket: TIOCOUTQ those that are not acknowledged, FIONREAD those that are not read (tcp(7)).
fn queue(socket: BorrowedFd<'_>, which: libc::Ioctl) -> io::Result<u64> {
    let mut bytes = MaybeUninit::<libc::c_int>::zeroed();
    // SAFETY: both requests write one int.
    let failed = unsafe { libc::ioctl(socket.as_raw_fd(), which, bytes.as_mut_ptr()) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed before, and written since.
    let bytes = unsafe { bytes.assume_init() };
    u64::try_from(bytes).map_err(io::Error::other)
}

const _: () = assert!(size_of::<libc::c_int>() == 4);

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};

    #[test]
    fn bytes_are_counted_wherever_they_are() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let counted = |server: &TcpStream| {
            let counts = counts(server).unwrap();
            (counts.sent, counts.received, counts.established)
        };
        assert_eq!(counted(&server), (0, 0, true));
        server.set_nonblocking(true).unwrap();
        let (mut sent, chunk) = (0, vec![7; 300_000]);
        while let Ok(count) = server.write(&chunk) {
            sent += count as u64;
            assert_eq!(counted(&server), (sent, 0, true));
        }
        client.write_all(&[1; 1000]).unwrap();
        let mut received = [0; 300];
        server.set_nonblocking(false).unwrap();
        server.read_exact(&mut received).unwrap();
        client.read_exact(&mut vec![0; 100_000]).unwrap();
        assert_eq!(counted(&server), (sent, 300, true));
        client.shutdown(Shutdown::Write).unwrap();
        server.read_to_end(&mut Vec::new()).unwrap();
        assert!(!counts(&server).unwrap().established);
    }

    #[test]
    fn what_is_no_tcp_has_no_counts() {
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(counts(&socket).is_err());
    }
}
