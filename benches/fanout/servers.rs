//! What is measured, in processes of their own: a log with its firehose, and the raw TCP copy beside it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use atproto_relay::eventlog::{Durability, EventLog, LogOptions, sequencer, wire};
use atproto_relay::firehose::{self, Firehose, FirehoseOptions};
use atproto_relay::http::ServerOptions;
use rustix::event::epoll;
use rustix::param::{clock_ticks_per_second, page_size};
use tokio_util::sync::CancellationToken;

use crate::event::Event;

/// Fillers of the events: about the sizes of the network's commits.
const FILLERS: [usize; 8] = [700, 1_400, 2_300, 3_000, 4_000, 6_300, 8_800, 13_800];
/// The end of a filler: microseconds since 1970.
pub const STAMP_BYTES: usize = 20;
/// Events handed over at a time while a log is filled.
const FILL_BATCH: usize = 256;
/// How often events of a live stream are handed over.
const LIVE_TICK: Duration = Duration::from_micros(500);
/// The raw copy's buffer, and its writes.
const COPY_BUFFER: usize = 4 << 20;
const COPY_WRITE: usize = 256 << 10;

const MARK: &str = "--serve";

/// What a child process is.
pub enum Role {
    /// A log and its firehose; appends `rate` events a second.
    Relay { folder: PathBuf, rate: u64 },
    /// One thread that writes to this many sockets from a buffer.
    Copy { clients: usize },
}

impl Role {
    pub fn from_arguments(arguments: &[String]) -> Option<Role> {
        let [mark, kind, rest @ ..] = arguments else {
            return None;
        };
        match (mark == MARK, kind.as_str(), rest) {
            (true, "relay", [folder, rate]) => Some(Role::Relay {
                folder: folder.into(),
                rate: rate.parse().expect("a rate"),
            }),
            (true, "copy", [clients]) => Some(Role::Copy {
                clients: clients.parse().expect("a number"),
            }),
            _ => None,
        }
    }

    fn arguments(&self) -> Vec<String> {
        let mark = MARK.to_owned();
        match self {
            Role::Relay { folder, rate } => vec![
                mark,
                "relay".to_owned(),
                folder.display().to_string(),
                rate.to_string(),
            ],
            Role::Copy { clients } => vec![mark, "copy".to_owned(), clients.to_string()],
        }
    }

    /// Serves until standard input ends.
    pub fn serve(self) {
        match self {
            Role::Relay { folder, rate } => relay(&folder, rate),
            Role::Copy { clients } => copy(clients),
        }
    }
}

/// A running child.
pub struct Child {
    process: std::process::Child,
    pub port: u16,
}

impl Child {
    pub fn start(role: &Role) -> Child {
        let mut process = Command::new(std::env::current_exe().expect("this program"))
            .args(role.arguments())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the child starts");
        let mut line = String::new();
        let stdout = process.stdout.take().expect("the child's output");
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("the child's port");
        Child {
            port: line.trim().parse().expect("a port"),
            process,
        }
    }

    /// User and system time so far.
    pub fn processor_time(&self) -> Duration {
        let path = format!("/proc/{}/stat", self.process.id());
        let stat = fs::read_to_string(path).expect("the child runs");
        // The name, in parentheses, may hold anything.
        let (_, fields) = stat.rsplit_once(')').expect("a name");
        let ticks: u64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|field| field.parse::<u64>().expect("ticks"))
            .sum();
        Duration::from_secs_f64(ticks as f64 / clock_ticks_per_second() as f64)
    }

    pub fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/statm", self.process.id());
        let statm = fs::read_to_string(path).expect("the child runs");
        let pages = statm.split_whitespace().nth(1).expect("resident pages");
        pages.parse::<u64>().expect("a number") * page_size() as u64
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        // Whether it ends well does not matter to the figures.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn say_port(port: u16) {
    println!("{port}");
    std::io::stdout().flush().expect("the parent listens");
}

fn await_end() {
    let mut ignored = Vec::new();
    let _ = std::io::stdin().read_to_end(&mut ignored);
}

/// Event number `n`, stamped now.
fn event(n: u64) -> Event {
    let mut event = Event::identity(n % 1_000, FILLERS[n as usize % FILLERS.len()], n as i64);
    let stamp = format!("{:0width$}", now_us(), width = STAMP_BYTES);
    event.filler.push_str(&stamp);
    event
}

pub fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("a clock that is set")
        .as_micros() as u64
}

/// Bytes of a log in front of each of its events, and of all.
pub type Places = Vec<u64>;

/// Fills a log.
pub fn fill(folder: &Path, bytes: u64) -> Places {
    let options = LogOptions {
        durability: Durability::None,
        ..LogOptions::new(folder)
    };
    let log = EventLog::open(options).expect("the log opens");
    let (sender, events) = sync_channel(8);
    let sequencer = sequencer::spawn(log, events, |_: Vec<(u64, ())>| {}).expect("a sequencer");
    let mut places = vec![0];
    let mut end = 0;
    let mut n = 0;
    while end < bytes {
        let batch: Vec<_> = (0..FILL_BATCH)
            .map(|_| {
                n += 1;
                let event = event(n);
                let (frame, _) = event.frame(n);
                end += (wire::header_len(frame.len()) + frame.len()) as u64;
                places.push(end);
                event.append(())
            })
            .collect();
        sender.send(batch).expect("the sequencer runs");
    }
    drop(sender);
    sequencer.join();
    places
}

fn relay(folder: &Path, rate: u64) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let log = EventLog::open(LogOptions::new(folder)).expect("the log opens");
    let stream = log.clone();
    thread::spawn(move || append(stream, rate));
    runtime.block_on(async {
        let options = FirehoseOptions {
            max_consumers: 10_000,
            max_consumers_per_ip: 10_000,
            ..FirehoseOptions::default()
        };
        let firehose = Firehose::new(log, options);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("a port");
        say_port(listener.local_addr().expect("an address").port());
        tokio::spawn(atproto_relay::http::serve(
            listener,
            firehose::router(firehose),
            ServerOptions::default(),
            CancellationToken::new(),
        ));
    });
    await_end();
}

fn append(log: EventLog, rate: u64) {
    if rate == 0 {
        return;
    }
    let mut n = log.head();
    let (sender, events) = sync_channel(64);
    let _sequencer = sequencer::spawn(log, events, |_: Vec<(u64, ())>| {}).expect("a sequencer");
    let (began, first) = (Instant::now(), n);
    loop {
        let due = first + (began.elapsed().as_secs_f64() * rate as f64) as u64;
        let batch: Vec<_> = (n..due).map(|n| event(n + 1).append(())).collect();
        n = due;
        if !batch.is_empty() && sender.send(batch).is_err() {
            return;
        }
        thread::sleep(LIVE_TICK);
    }
}

fn copy(clients: usize) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    say_port(listener.local_addr().expect("an address").port());
    thread::spawn(move || {
        let sockets: Vec<TcpStream> = (0..clients)
            .map(|_| listener.accept().expect("a client").0)
            .collect();
        copy_to(&sockets);
    });
    await_end();
}

fn copy_to(sockets: &[TcpStream]) {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll");
    for (place, mut socket) in sockets.iter().enumerate() {
        socket.set_nonblocking(true).expect("a socket");
        let _ = socket.flush();
        let data = epoll::EventData::new_u64(place as u64);
        let flags = epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&epoll, socket, data, flags).expect("an epoll");
    }
    let buffer: Vec<u8> = (0..COPY_BUFFER).map(|n| (n * 31) as u8).collect();
    let mut at = vec![0; sockets.len()];
    let mut ready: Vec<usize> = Vec::new();
    let mut events = Vec::with_capacity(1024);
    loop {
        let poll = rustix::time::Timespec::default();
        let timeout = (!ready.is_empty()).then_some(&poll);
        events.clear();
        let room = rustix::buffer::spare_capacity(&mut events);
        epoll::wait(&epoll, room, timeout).expect("events");
        for event in &events {
            let place = event.data.u64() as usize;
            if !ready.contains(&place) {
                ready.push(place);
            }
        }
        ready.retain(|place| {
            let from: usize = at[*place];
            let to = (from + COPY_WRITE).min(COPY_BUFFER);
            match (&sockets[*place]).write(&buffer[from..to]) {
                Ok(written) => {
                    at[*place] = (from + written) % COPY_BUFFER;
                    true
                }
                Err(_) => false,
            }
        });
    }
}
