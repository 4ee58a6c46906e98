//! A relay in a process of its own as systemd starts it, with this test in systemd's place: the notify socket, the
//! watchdog, and whatever else its environment names.

#![allow(unsafe_code, reason = "stopping single threads")]

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Longest wait for anything: a loaded machine, not a slow program.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Longest message of sd_notify that a relay sends.
const MESSAGE_BYTES: usize = 4096;

/// A relay, and the socket on which it tells how it stands. Killed when dropped.
pub struct Service {
    pub child: Child,
    pub folder: PathBuf,
    pub port: u16,
    pub metrics_port: u16,
    socket: UnixDatagram,
}

impl Service {
    /// `serve` in `folder`, not waited for. `change` adds arguments and variables.
    pub fn start(folder: &Path, change: impl FnOnce(&mut Command)) -> Service {
        Service::start_as(folder, &[env!("CARGO_BIN_EXE_atproto-relay")], change)
    }

    /// The same by another program, which is given the arguments of a relay.
    pub fn start_as(folder: &Path, program: &[&str], change: impl FnOnce(&mut Command)) -> Service {
        let path = folder.join("notify");
        let _ = fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).unwrap();
        let [port, metrics_port] = free_ports();
        let said = fs::File::options()
            .create(true)
            .append(true)
            .open(folder.join("said.txt"))
            .unwrap();
        let mut command = Command::new(program[0]);
        command
            .args(&program[1..])
            .env_clear()
            .env("NOTIFY_SOCKET", &path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said)
            .arg("serve")
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .args(["--metrics-listen", &format!("127.0.0.1:{metrics_port}")])
            .args(["--log-segment-bytes=8MiB", "--shards=2"])
            .env("RELAY_DATA_DIR", folder.join("data"));
        change(&mut command);
        Service {
            child: command.spawn().unwrap(),
            folder: folder.to_owned(),
            port,
            metrics_port,
            socket,
        }
    }

    /// The next message, as its lines; `None` where none comes in time.
    pub fn hear(&self, within: Duration) -> Option<Vec<String>> {
        let within = within.max(Duration::from_millis(1));
        self.socket.set_read_timeout(Some(within)).unwrap();
        let mut buffer = [0; MESSAGE_BYTES];
        let length = self.socket.recv(&mut buffer).ok()?;
        let text = String::from_utf8(buffer[..length].to_vec()).unwrap();
        Some(text.lines().map(str::to_owned).collect())
    }

    /// Waits for a message with a line that begins so, and returns it; the messages before it are gone.
    pub fn until(&self, line: &str) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        while let Some(message) = self.hear(deadline.saturating_duration_since(Instant::now())) {
            if message.iter().any(|said| said.starts_with(line)) {
                return message;
            }
        }
        panic!("no {line} in time; it said:\n{}", self.said());
    }

    /// How many messages with such a line come in this time.
    pub fn count(&self, line: &str, within: Duration) -> usize {
        let deadline = Instant::now() + within;
        let mut count = 0;
        while let Some(message) = self.hear(deadline.saturating_duration_since(Instant::now())) {
            count += usize::from(message.iter().any(|said| said.starts_with(line)));
            if Instant::now() >= deadline {
                break;
            }
        }
        count
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn metrics_url(&self) -> String {
        format!("http://127.0.0.1:{}/metrics", self.metrics_port)
    }

    /// Everything it said on stderr.
    pub fn said(&self) -> String {
        fs::read_to_string(self.folder.join("said.txt")).unwrap_or_default()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    /// Ends it; whether its exit code was 0.
    pub fn end(mut self) -> bool {
        self.signal(Signal::TERM);
        self.until("STOPPING=1");
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.success();
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("it does not end; it said:\n{}", self.said());
    }

    /// Its threads whose names begin so.
    pub fn threads(&self, name: &str) -> Vec<i32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        tasks
            .map(|task| task.unwrap().path())
            .filter(|task| {
                fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.starts_with(name))
            })
            .map(|task| task.file_name().unwrap().to_str().unwrap().parse().unwrap())
            .collect()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended already; there is nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_ports() -> [u16; 2] {
    let listeners = [0, 0].map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap());
    [0, 1].map(|index: usize| listeners[index].local_addr().unwrap().port())
}

/// Threads of another process that stand still until this is dropped, while its others go on.
pub struct Frozen {
    thaw: Option<Sender<()>>,
    tracer: Option<JoinHandle<()>>,
}

impl Frozen {
    /// `None`, with a printed line, where this user may not trace processes.
    pub fn freeze(threads: Vec<i32>) -> Option<Frozen> {
        assert!(!threads.is_empty(), "there are such threads");
        let (frozen, done) = mpsc::channel();
        let (thaw, thawed) = mpsc::channel();
        // All requests of ptrace(2) must come from one thread, and end with it.
        let tracer = thread::spawn(move || trace(&threads, &frozen, &thawed));
        if !done.recv().unwrap_or(false) {
            println!("skipped: this user may not stop a thread of another process");
            return None;
        }
        Some(Frozen {
            thaw: Some(thaw),
            tracer: Some(tracer),
        })
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.thaw = None;
        if let Some(tracer) = self.tracer.take() {
            tracer.join().unwrap();
        }
    }
}

fn trace(threads: &[i32], frozen: &Sender<bool>, thawed: &Receiver<()>) {
    let stopped = threads.iter().all(|thread| stop(*thread));
    let _ = frozen.send(stopped);
    // Ends with the one who wants them to stand still.
    let _ = thawed.recv();
    for thread in threads {
        request(libc::PTRACE_DETACH, *thread);
    }
}

/// Stops a thread, and waits until it stands.
fn stop(thread: i32) -> bool {
    if !request(libc::PTRACE_SEIZE, thread) || !request(libc::PTRACE_INTERRUPT, thread) {
        return false;
    }
    let mut status = 0;
    // SAFETY: `status` is ours to be written to for the length of the call.
    let waited = unsafe { libc::waitpid(thread, &mut status, libc::__WALL) };
    waited == thread
}

fn request(request: libc::c_uint, thread: i32) -> bool {
    let nothing = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: these requests take a thread's number and two words that they do not look at; no memory is touched.
    unsafe { libc::ptrace(request, thread, nothing, nothing) == 0 }
}
