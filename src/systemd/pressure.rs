//! Memory pressure as systemd reports it: `$MEMORY_PRESSURE_WATCH` names a file of the kernel, a FIFO or a socket,
//! `$MEMORY_PRESSURE_WRITE` what to write into it first (<https://systemd.io/MEMORY_PRESSURE>). Reports no more often than
//! every few seconds. Does not know which caches shrink.

#![allow(unsafe_code, reason = "malloc_trim of the C library")]

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;

/// The path to watch.
const WATCH: &str = "MEMORY_PRESSURE_WATCH";
/// The text to write into it first, in base64.
const WRITE: &str = "MEMORY_PRESSURE_WRITE";
/// In place of a file: do not watch.
const OFF: &str = "/dev/null";
/// Minimum interval between two reports: memory that was freed must show before more is freed.
const PAUSE: Duration = Duration::from_secs(5);

/// Why memory pressure is not watched.
#[derive(Debug, thiserror::Error)]
pub enum PressureError {
    /// The file.
    #[error("memory pressure cannot be watched at {} (${WATCH}): {source}", path.display())]
    Watch {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The text to write is not base64.
    #[error("${WRITE} is not base64; memory pressure is not watched")]
    Base64,
}

/// Calls `short` whenever memory is short, from a thread of its own that lives as long as the process. Does nothing where
/// systemd does not ask for it. Returns whether it watches.
///
/// # Errors
/// See [`PressureError`].
pub fn watch(short: impl Fn() + Send + 'static) -> Result<bool, PressureError> {
    let Some(path) = env::var_os(WATCH).filter(|path| !path.is_empty() && path != OFF) else {
        return Ok(false);
    };
    let path = PathBuf::from(path);
    let write = match env::var_os(WRITE) {
        Some(text) => STANDARD
            .decode(text.as_bytes())
            .map_err(|_| PressureError::Base64)?,
        None => Vec::new(),
    };
    let failed = |source| PressureError::Watch {
        path: path.clone(),
        source,
    };
    let source = Source::open(&path, &write).map_err(failed)?;
    thread::Builder::new()
        .name("memory-pressure".into())
        .spawn(move || source.run(PAUSE, short))
        .map_err(failed)?;
    Ok(true)
}

/// What reports pressure.
enum Source {
    /// A file of the kernel: it becomes readable with priority.
    Kernel(File),
    /// A FIFO: bytes arrive.
    Fifo(File),
    /// A socket: bytes arrive.
    Socket(UnixStream),
}

impl Source {
    fn open(path: &Path, write: &[u8]) -> io::Result<Source> {
        let kind = fs::metadata(path)?.file_type();
        if kind.is_socket() {
            let mut socket = UnixStream::connect(path)?;
            socket.write_all(write)?;
            socket.set_nonblocking(true)?;
            return Ok(Source::Socket(socket));
        }
        if !kind.is_fifo() && !kind.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a file, FIFO or socket",
            ));
        }
        // A FIFO is opened for writing as well, so that it does not end when no other process has it open.
        let mut file = OpenOptions::new()
            .read(true)
            .write(kind.is_fifo() || !write.is_empty())
            .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
            .open(path)?;
        if !write.is_empty() {
            // With one write: each write sets another trigger.
            let _written = file.write(write)?;
        }
        Ok(if kind.is_fifo() {
            Source::Fifo(file)
        } else {
            Source::Kernel(file)
        })
    }

    /// Ends when there is nothing to watch any more.
    fn run(mut self, pause: Duration, short: impl Fn()) {
        loop {
            match self.wait() {
                Ok(true) => short(),
                Ok(false) => return tracing::warn!("memory pressure is no longer reported"),
                Err(error) => {
                    return tracing::warn!(%error, "memory pressure is no longer watched");
                }
            }
            thread::sleep(pause);
            self.drain();
        }
    }

    /// Waits for pressure; false where there will be no more reports.
    fn wait(&self) -> io::Result<bool> {
        let wanted = match self {
            Source::Kernel(_) => PollFlags::PRI,
            Source::Fifo(_) | Source::Socket(_) => PollFlags::IN,
        };
        loop {
            let mut fds = [PollFd::from_borrowed_fd(self.fd(), wanted)];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let events = fds[0].revents();
            // A control group that is gone, a socket that was closed.
            return Ok(
                !events.intersects(PollFlags::ERR | PollFlags::HUP) && events.contains(wanted)
            );
        }
    }

    /// Discards reports that arrived meanwhile: they are from before the caches shrank.
    fn drain(&mut self) {
        let mut buffer = [0; 4096];
        let mut read =
            |source: &mut dyn Read| while source.read(&mut buffer).is_ok_and(|n| n > 0) {};
        match self {
            Source::Kernel(_) => {}
            Source::Fifo(file) => read(file),
            Source::Socket(socket) => read(socket),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Source::Kernel(file) | Source::Fifo(file) => file.as_fd(),
            Source::Socket(socket) => socket.as_fd(),
        }
    }
}

/// Returns free memory of the allocator to the system.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> std::ffi::c_int;
        }
        // SAFETY: malloc_trim(3) may be called at any time from any thread, and touches no memory that is in use.
        unsafe { malloc_trim(0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn a_socket_is_told_what_to_say_and_says_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pressure");
        let listener = UnixListener::bind(&path).unwrap();
        let source = Source::open(&path, b"some 200000 2000000").unwrap();
        let (mut systemd, _) = listener.accept().unwrap();
        let mut said = [0; 19];
        systemd.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"some 200000 2000000");
        let (told, heard) = mpsc::channel();
        let thread = thread::spawn(move || {
            source.run(Duration::ZERO, || told.send(()).unwrap_or_default());
        });
        systemd.write_all(b"!").unwrap();
        heard.recv_timeout(PATIENCE).unwrap();
        drop(systemd);
        thread.join().unwrap();
    }

    #[test]
    fn the_kernel_takes_the_trigger() {
        let path = Path::new("/proc/pressure/memory");
        match Source::open(path, b"some 200000 2000000\0") {
            Ok(source) => assert!(matches!(source, Source::Kernel(_))),
            Err(error) => println!("skipped: no memory pressure to be watched here: {error}"),
        }
    }

    #[test]
    fn a_file_that_is_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Source::open(&folder.path().join("absent"), b"").is_err());
        assert!(Source::open(folder.path(), b"").is_err());
    }

    #[test]
    fn memory_is_given_back() {
        drop(vec![1_u8; 64 << 10]);
        give_back();
    }
}
