//! As much of a service manager as a handover needs: listening sockets by name, a descriptor store, the notifications of
//! the service, and one process after the other that is given all of it, as systemd does (sd_listen_fds(3), sd_notify(3)).

#![allow(unsafe_code, reason = "setting up a child between fork and exec")]

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, Signal, kill_process};

/// First descriptor that is passed (SD_LISTEN_FDS_START).
const FIRST_PASSED: i32 = 3;
/// Where descriptors lie between a fork and their places: behind all that are passed.
const ABOVE_PASSED: i32 = 300;
/// Longest wait for a word of the service.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the manager says to itself, to know that it has heard all that was said before.
const NOTHING_LEFT: &str = "NOTHING_LEFT=1";

/// A running service.
pub struct Manager {
    folder: PathBuf,
    command: Vec<OsString>,
    capacity: usize,
    /// Listening sockets by name.
    sockets: Vec<(String, OwnedFd)>,
    heard: Arc<Heard>,
    child: Option<Child>,
    pub public: SocketAddr,
    pub metrics: SocketAddr,
}

#[derive(Default)]
struct Heard {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    store: Vec<(String, OwnedFd)>,
    /// How often each was said.
    ready: usize,
    nothing_left: usize,
    /// Orders of the descriptor store that were refused for want of room.
    refused: usize,
}

impl Manager {
    /// A service that runs `command`, with sockets for the public, the metrics and the admin listener, and a store for so
    /// many descriptors.
    pub fn new(folder: &Path, command: Vec<OsString>, capacity: usize) -> Manager {
        let heard = Arc::<Heard>::default();
        let notify = UnixDatagram::bind(folder.join("notify")).unwrap();
        let listening = heard.clone();
        thread::spawn(move || listening.listen(&notify, capacity));
        let tcp = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (public, metrics) = (tcp(), tcp());
        let admin = UnixListener::bind(folder.join("admin")).unwrap();
        Manager {
            folder: folder.to_owned(),
            command,
            capacity,
            public: public.local_addr().unwrap(),
            metrics: metrics.local_addr().unwrap(),
            sockets: vec![
                ("public".to_owned(), public.into()),
                ("metrics".to_owned(), metrics.into()),
                ("admin".to_owned(), admin.into()),
            ],
            heard,
            child: None,
        }
    }

    /// The path of the admin listener.
    pub fn admin(&self) -> PathBuf {
        self.folder.join("admin")
    }

    /// Starts a process, and waits until it is ready; how long that took.
    pub fn start(&mut self) -> Duration {
        let begun = Instant::now();
        let ready = self.heard.state.lock().unwrap().ready;
        self.spawn();
        let child = self.child.as_mut().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while !self
            .heard
            .until(Duration::from_millis(20), |state| state.ready > ready)
        {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?}: {}", said(&self.folder));
            assert!(Instant::now() < deadline, "{}", said(&self.folder));
        }
        begun.elapsed()
    }

    /// Starts a process, and waits for nothing.
    pub fn spawn(&mut self) {
        self.drop_what_hung_up();
        let state = self.heard.state.lock().unwrap();
        let passed = self.sockets.iter().chain(&state.store);
        let names: Vec<&str> = passed.clone().map(|(name, _)| name.as_str()).collect();
        let descriptors: Vec<OwnedFd> = passed
            .map(|(_, fd)| rustix::io::fcntl_dupfd_cloexec(fd, ABOVE_PASSED).unwrap())
            .collect();
        let messages = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join("said"))
            .unwrap();
        // The shell knows the process's number, which LISTEN_PID must be.
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""])
            .args(&self.command)
            .env("LISTEN_FDS", names.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"))
            .env("NOTIFY_SOCKET", self.folder.join("notify"))
            .stdin(Stdio::null())
            .stdout(messages.try_clone().unwrap())
            .stderr(messages);
        if self.capacity > 0 {
            command.env("FDSTORE", self.capacity.to_string());
        }
        // SAFETY: nothing but system calls between fork and exec, on descriptors that nobody else has there.
        unsafe {
            command.pre_exec(move || {
                for (at, descriptor) in descriptors.iter().enumerate() {
                    let mut place = OwnedFd::from_raw_fd(FIRST_PASSED + at as i32);
                    let moved = rustix::io::dup2(descriptor, &mut place);
                    std::mem::forget(place);
                    moved?;
                }
                Ok(())
            });
        }
        self.child = Some(command.spawn().unwrap());
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("a process");
        let pid = Pid::from_raw(child.id() as i32).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Waits until the process has ended and all it said was heard; how long that took.
    pub fn ended(&mut self) -> (Duration, ExitStatus) {
        let begun = Instant::now();
        let mut child = self.child.take().expect("a process");
        let status = child.wait().unwrap();
        let took = begun.elapsed();
        let told = self.heard.state.lock().unwrap().nothing_left;
        let own = UnixDatagram::unbound().unwrap();
        own.send_to(NOTHING_LEFT.as_bytes(), self.folder.join("notify"))
            .unwrap();
        assert!(
            self.heard
                .until(PATIENCE, |state| state.nothing_left > told)
        );
        (took, status)
    }

    /// Names in the store, in order.
    pub fn stored(&self) -> Vec<String> {
        let state = self.heard.state.lock().unwrap();
        let mut names: Vec<String> = state.store.iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    /// Waits until the store holds what it should.
    pub fn until_stored(&self, wanted: impl Fn(&[(String, OwnedFd)]) -> bool) {
        let stored = self.heard.until(PATIENCE, |state| wanted(&state.store));
        assert!(stored, "{:?}", self.stored());
    }

    /// Does something to the descriptor with that name.
    pub fn with_stored<T>(&self, name: &str, act: impl FnOnce(&OwnedFd) -> T) -> T {
        let state = self.heard.state.lock().unwrap();
        let mut found = state.store.iter().filter(|(of, _)| of == name);
        act(&found.next().expect("in the store").1)
    }

    /// Replaces the descriptor with that name, or adds one.
    pub fn store(&self, name: &str, descriptor: OwnedFd) {
        let mut state = self.heard.state.lock().unwrap();
        state.store.retain(|(of, _)| of != name);
        state.store.push((name.to_owned(), descriptor));
    }

    /// Forgets the descriptor with that name.
    pub fn forget(&self, name: &str) {
        let mut state = self.heard.state.lock().unwrap();
        state.store.retain(|(of, _)| of != name);
    }

    /// How often the store had no room.
    pub fn refused(&self) -> usize {
        self.heard.state.lock().unwrap().refused
    }

    /// Another socket for the processes to come.
    pub fn listen_also(&mut self, name: &str, socket: OwnedFd) {
        self.sockets.push((name.to_owned(), socket));
    }

    /// The end of what the processes said.
    pub fn said(&self) -> String {
        said(&self.folder)
    }

    /// As systemd does for what it watches (FDPOLL=1).
    fn drop_what_hung_up(&self) {
        let mut state = self.heard.state.lock().unwrap();
        state.store.retain(|(_, descriptor)| {
            let mut watched = [PollFd::new(descriptor, PollFlags::empty())];
            poll(&mut watched, Some(&Timespec::default())).unwrap();
            !watched[0]
                .revents()
                .intersects(PollFlags::HUP | PollFlags::ERR)
        });
    }
}

fn said(folder: &Path) -> String {
    let text = fs::read_to_string(folder.join("said")).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

impl Drop for Manager {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
        if thread::panicking() {
            eprintln!("in the store: {:?}; said: {}", self.stored(), self.said());
        }
    }
}

impl Heard {
    /// Waits until it is so; false where it does not come.
    fn until(&self, patience: Duration, wanted: impl Fn(&State) -> bool) -> bool {
        let state = self.state.lock().unwrap();
        let waited = self
            .changed
            .wait_timeout_while(state, patience, |state| !wanted(state));
        !waited.unwrap().1.timed_out()
    }

    fn listen(&self, notify: &UnixDatagram, capacity: usize) {
        loop {
            let mut text = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let message = {
                let mut parts = [IoSliceMut::new(&mut text)];
                recvmsg(notify, &mut parts, &mut ancillary, flags).unwrap()
            };
            let descriptors: Vec<OwnedFd> = ancillary
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                    _ => None,
                })
                .flatten()
                .collect();
            let text = std::str::from_utf8(&text[..message.bytes]).unwrap();
            let mut state = self.state.lock().unwrap();
            state.hear(text, descriptors, capacity);
            drop(state);
            self.changed.notify_all();
        }
    }
}

impl State {
    fn hear(&mut self, text: &str, descriptors: Vec<OwnedFd>, capacity: usize) {
        let value = |key: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once('='));
            lines.find(|(of, _)| *of == key).map(|(_, value)| value)
        };
        self.ready += usize::from(value("READY").is_some());
        self.nothing_left += usize::from(text == NOTHING_LEFT);
        let name = value("FDNAME").unwrap_or("stored");
        if value("FDSTORE").is_some() {
            for descriptor in descriptors {
                if self.store.len() < capacity {
                    self.store.push((name.to_owned(), descriptor));
                } else {
                    self.refused += 1;
                }
            }
        }
        if value("FDSTOREREMOVE").is_some() {
            self.store.retain(|(of, _)| of != name);
        }
    }
}
