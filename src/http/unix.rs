//! Unix sockets that listen for the operator. Promises that nobody but their user and group can connect, and that no file
//! is removed but a socket on which no process listens.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, RenameFlags, fchmod, renameat_with};
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{UnixListener, UnixStream};

/// Mode of the socket: its user and group are the operator.
const SOCKET_MODE: u32 = 0o660;
/// Operators that may wait to be answered.
const BACKLOG: i32 = 128;

/// Listens on a path, also on one where a killed process left its socket.
///
/// # Errors
/// The path cannot be bound, or is in use by something else than a dead socket.
pub async fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Before it has a name, so that nobody else can ever connect; what the umask takes off is put back behind.
    fchmod(&socket, Mode::from_raw_mode(SOCKET_MODE))?;
    let address = SockAddr::unix(path)?;
    match socket.bind(&address) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            clear_dead_socket(path).await?;
            socket.bind(&address)?;
        }
        bound => bound?,
    }
    fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE))?;
    socket.set_nonblocking(true)?;
    socket.listen(BACKLOG)?;
    UnixListener::from_std(socket.into())
}

/// Removes a socket that a process left behind; fails where the path is anything else, which stays as it is. It is moved aside
/// first: what is removed is what was looked at, whatever somebody else puts on the path meanwhile.
async fn clear_dead_socket(path: &Path) -> io::Result<()> {
    let dead = dead_socket(path).await?;
    let aside = aside(path);
    let moved = move_file(path, &aside);
    let removing = match moved {
        Ok(()) => aside.as_path(),
        // Some file systems cannot move without the risk of replacing.
        Err(Errno::INVAL | Errno::NOSYS) => path,
        Err(error) => return Err(error.into()),
    };
    if is_same(removing, dead)? {
        return fs::remove_file(removing);
    }
    if moved.is_ok() {
        move_file(&aside, path)?;
    }
    Err(refused_path("another process has just taken the path"))
}

/// What tells a file from another that had its path before: its device, its inode, and when it was made.
type Identity = (u64, u64, i64, i64);

fn is_same(path: &Path, socket: Identity) -> io::Result<bool> {
    let found = fs::symlink_metadata(path)?;
    Ok(found.file_type().is_socket() && identity(&found) == socket)
}

fn identity(file: &fs::Metadata) -> Identity {
    (file.dev(), file.ino(), file.mtime(), file.mtime_nsec())
}

/// A socket that nobody answers on.
async fn dead_socket(path: &Path) -> io::Result<Identity> {
    let found = fs::symlink_metadata(path)?;
    if !found.file_type().is_socket() {
        return Err(refused_path(
            "what is there is no socket, and stays as it is",
        ));
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(identity(&found)),
        Ok(_) => Err(refused_path("another process answers there")),
        Err(error) => Err(refused_path(format!(
            "the socket there may be another process's: {error}"
        ))),
    }
}

fn refused_path(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::AddrInUse, reason.into())
}

/// A name in the same folder that nobody has.
fn aside(path: &Path) -> PathBuf {
    path.with_file_name(format!(".dead-{:016x}", fastrand::u64(..)))
}

/// Gives a file another name; one that is there is not replaced.
fn move_file(from: &Path, to: &Path) -> Result<(), Errno> {
    renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)
}
