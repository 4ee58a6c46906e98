//! The other side: clients that cost next to nothing, one that notes latencies, and some that misbehave.

use std::fmt;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use atproto_relay::firehose::SUBSCRIBE_REPOS;
use rustix::event::epoll;
use rustix::net::{RecvFlags, recv};

use crate::servers::{Places, STAMP_BYTES, now_us};

/// Bytes discarded at a time.
const DISCARDED: usize = 1 << 20;
/// Longest wait before a thread looks whether it should end.
const LOOK: Duration = Duration::from_millis(50);
/// How long a client that misbehaves waits between two steps: a slow round trip.
const STEP: Duration = Duration::from_millis(200);
const STEPS: usize = 20;
/// What a client reads that reads 1 KB/s.
const SLOW_BYTES: usize = 1_000 * STEP.as_millis() as usize / 1_000;

/// Something that runs until it is told to stop.
pub trait Stop {
    fn stop(self);
}

/// A thread and its flag.
struct Running {
    ending: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Running {
    fn start(work: impl FnOnce(&AtomicBool) + Send + 'static) -> Running {
        let ending = Arc::new(AtomicBool::new(false));
        let flag = ending.clone();
        let thread = thread::spawn(move || work(&flag));
        Running { ending, thread }
    }

    fn stop(self) {
        self.ending.store(true, Ordering::Release);
        self.thread.join().expect("the clients end well");
    }
}

fn connect(port: u16) -> TcpStream {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("a connection")
}

fn request(cursor: Option<u64>) -> String {
    let query = cursor.map(|cursor| format!("?cursor={cursor}"));
    format!(
        "GET {SUBSCRIBE_REPOS}{} HTTP/1.1\r\nHost: relay\r\nConnection: Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        query.unwrap_or_default()
    )
}

/// A subscription; what follows are frames.
fn subscribe(port: u16, cursor: Option<u64>) -> TcpStream {
    let mut socket = connect(port);
    let request = request(cursor);
    socket.write_all(request.as_bytes()).expect("sends");
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        socket.read_exact(&mut byte).expect("an answer");
        head.push(byte[0]);
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "refused");
    socket
}

/// One thread that reads from many sockets and discards, without copying.
pub struct Drain {
    bytes: Arc<AtomicU64>,
    running: Running,
}

/// A client that is drained: its socket, and how many bytes come before it begins again.
struct Drained {
    socket: TcpStream,
    left: u64,
}

impl Drain {
    /// From a server that just sends.
    pub fn raw(port: u16, clients: usize) -> Drain {
        let drained = (0..clients).map(|_| Drained {
            socket: connect(port),
            left: u64::MAX,
        });
        Drain::start(drained.collect(), || unreachable!("never at an end"))
    }

    /// Of the live stream.
    pub fn live(port: u16, clients: usize) -> Drain {
        let drained = (0..clients).map(|_| Drained {
            socket: subscribe(port, None),
            left: u64::MAX,
        });
        Drain::start(drained.collect(), || unreachable!("never at an end"))
    }

    /// Of a whole log, again and again; from places all over it where `spread`.
    pub fn replaying(port: u16, clients: usize, log: &Places, spread: bool) -> Drain {
        let (events, all) = (log.len() - 1, log.last().copied().expect("a log"));
        let drained = (0..clients).map(|client| {
            let passed = if spread { client * events / clients } else { 0 };
            Drained {
                socket: subscribe(port, Some(passed as u64 + 1)),
                left: all - log[passed],
            }
        });
        let again = move || Drained {
            socket: subscribe(port, Some(1)),
            left: all,
        };
        Drain::start(drained.collect(), again)
    }

    fn start(mut clients: Vec<Drained>, again: impl Fn() -> Drained + Send + 'static) -> Drain {
        let bytes = Arc::new(AtomicU64::new(0));
        let counted = bytes.clone();
        let running = Running::start(move |ending| {
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll");
            let enter = |place: usize, client: &Drained| {
                client.socket.set_nonblocking(true).expect("a socket");
                let data = epoll::EventData::new_u64(place as u64);
                epoll::add(&epoll, &client.socket, data, epoll::EventFlags::IN).expect("an epoll");
            };
            for (place, client) in clients.iter().enumerate() {
                enter(place, client);
            }
            let mut events = Vec::with_capacity(256);
            let mut buffer = vec![0; DISCARDED];
            let look = rustix::time::Timespec {
                tv_sec: 0,
                tv_nsec: LOOK.as_nanos() as i64,
            };
            while !ending.load(Ordering::Acquire) {
                events.clear();
                let room = rustix::buffer::spare_capacity(&mut events);
                epoll::wait(&epoll, room, Some(&look)).expect("events");
                for event in &events {
                    let place = event.data.u64() as usize;
                    let client = &mut clients[place];
                    let Ok((_, count)) = recv(&client.socket, &mut buffer[..], RecvFlags::TRUNC)
                    else {
                        continue;
                    };
                    assert!(count > 0, "cut");
                    counted.fetch_add(count as u64, Ordering::Relaxed);
                    client.left = client.left.saturating_sub(count as u64);
                    if client.left == 0 {
                        *client = again();
                        enter(place, client);
                    }
                }
            }
        });
        Drain { bytes, running }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Stop for Drain {
    fn stop(self) {
        self.running.stop();
    }
}

/// A consumer that notes how old each event is when it comes.
pub struct Probe {
    latencies: Arc<Mutex<Vec<u64>>>,
    bytes: Arc<AtomicU64>,
    running: Running,
}

/// Percentiles of the time from an event's making to its coming.
pub struct Latencies {
    p50: Duration,
    pub p99: Duration,
}

impl fmt::Display for Latencies {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        let (p50, p99) = (milliseconds(self.p50), milliseconds(self.p99));
        write!(out, "p50 {p50:.1} ms, p99 {p99:.1} ms")
    }
}

impl Probe {
    pub fn start(port: u16) -> Probe {
        let latencies: Arc<Mutex<Vec<u64>>> = Arc::default();
        let bytes = Arc::new(AtomicU64::new(0));
        let (noted, counted) = (latencies.clone(), bytes.clone());
        let mut socket = subscribe(port, None);
        let running = Running::start(move |ending| {
            let mut frame = Vec::new();
            while !ending.load(Ordering::Acquire) {
                let mut header = [0; 4];
                socket.read_exact(&mut header[..2]).expect("frames");
                let length = match header[1] {
                    126 => {
                        socket.read_exact(&mut header[2..]).expect("a length");
                        usize::from(u16::from_be_bytes([header[2], header[3]]))
                    }
                    short => usize::from(short),
                };
                frame.resize(length, 0);
                socket.read_exact(&mut frame).expect("a frame");
                counted.fetch_add(length as u64 + 4, Ordering::Relaxed);
                if let Some(stamp) = frame.last_chunk::<STAMP_BYTES>() {
                    let made: u64 = std::str::from_utf8(stamp)
                        .ok()
                        .and_then(|text| text.parse().ok())
                        .expect("a stamp");
                    let age = now_us().saturating_sub(made);
                    noted.lock().expect("no panic").push(age);
                }
            }
        });
        Probe {
            latencies,
            bytes,
            running,
        }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Begins anew.
    pub fn forget(&self) {
        self.latencies.lock().expect("no panic").clear();
    }

    pub fn latencies(&self) -> Latencies {
        let mut all = std::mem::take(&mut *self.latencies.lock().expect("no panic"));
        all.sort_unstable();
        let percentile = |percent: usize| {
            let at = (all.len() * percent / 100).min(all.len().saturating_sub(1));
            Duration::from_micros(all.get(at).copied().expect("events came"))
        };
        Latencies {
            p50: percentile(50),
            p99: percentile(99),
        }
    }
}

impl Stop for Probe {
    fn stop(self) {
        self.running.stop();
    }
}

/// How clients misbehave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    Reconnect,
    NeverRead,
    SendGarbage,
    SendHeadsByteByByte,
    ReadSlowly,
}

impl fmt::Display for Trouble {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Trouble::Reconnect => "reconnect after every round trip",
            Trouble::NeverRead => "want everything and never read",
            Trouble::SendGarbage => "send garbage and come again",
            Trouble::SendHeadsByteByByte => "send their requests byte by byte",
            Trouble::ReadSlowly => "want everything and read 1 KB/s",
        })
    }
}

impl Trouble {
    pub const ALL: [Trouble; 5] = [
        Trouble::Reconnect,
        Trouble::NeverRead,
        Trouble::SendGarbage,
        Trouble::SendHeadsByteByByte,
        Trouble::ReadSlowly,
    ];

    /// Makes it, with so many clients at a time, until it is stopped.
    pub fn make(self, port: u16, clients: usize) -> Bad {
        let mut sockets: Vec<(TcpStream, usize)> =
            (0..clients).map(|_| (self.begin(port), 0)).collect();
        Bad(Running::start(move |ending| {
            let part = clients.div_ceil(STEPS).max(1);
            while !ending.load(Ordering::Acquire) {
                for some in sockets.chunks_mut(part) {
                    for (socket, step) in some {
                        self.go_on(port, socket, step);
                    }
                    thread::sleep(STEP / STEPS as u32);
                }
            }
        }))
    }

    fn begin(self, port: u16) -> TcpStream {
        let mut socket = connect(port);
        // They write little, and whether it arrives does not matter.
        let _ = match self {
            Trouble::Reconnect => socket.write(request(None).as_bytes()),
            Trouble::NeverRead | Trouble::ReadSlowly => socket.write(request(Some(0)).as_bytes()),
            Trouble::SendGarbage => {
                let bytes = [request(None).as_bytes(), &[0xff; 400]].concat();
                socket.write(&bytes)
            }
            Trouble::SendHeadsByteByByte => Ok(0),
        };
        socket.set_nonblocking(true).expect("a socket");
        socket
    }

    fn go_on(self, port: u16, socket: &mut TcpStream, step: &mut usize) {
        match self {
            Trouble::Reconnect | Trouble::SendGarbage => *socket = self.begin(port),
            Trouble::NeverRead => {}
            Trouble::ReadSlowly => {
                let _ = socket.read(&mut [0; SLOW_BYTES]);
            }
            Trouble::SendHeadsByteByByte => {
                let text = request(None);
                let byte = [text.as_bytes()[*step % text.len()]];
                *step += 1;
                if socket.write(&byte).is_err() {
                    (*socket, *step) = (self.begin(port), 0);
                }
            }
        }
    }
}

/// Clients that misbehave.
pub struct Bad(Running);

impl Stop for Bad {
    fn stop(self) {
        self.0.stop();
    }
}
