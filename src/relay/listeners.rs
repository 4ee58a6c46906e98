//! The sockets a relay listens on: those that systemd passes, else those that the configuration names.
//! Promises that they are open before anything is written, and that nobody is let in as the operator by mistake.

use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, RenameFlags, fchmod, renameat_with};
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{TcpListener, UnixListener, UnixStream};

use super::StartError;
use crate::api::listener::Door;
use crate::config::{AdminListen, Config};
use crate::systemd::sockets::{Given, Listening};

/// Mode of a Unix socket of ours: its user and group are the operator.
const SOCKET_MODE: u32 = 0o660;
/// Operators that may wait to be answered.
const BACKLOG: i32 = 128;

/// All sockets, by what is served there.
pub(super) struct Listeners {
    pub public: Vec<Door>,
    pub metrics: Vec<Door>,
    pub admin: Vec<Door>,
    pub public_addr: SocketAddr,
    pub metrics_addr: SocketAddr,
}

impl Listeners {
    pub async fn open(config: &Config, given: &mut Given) -> Result<Listeners, StartError> {
        let public = std::mem::take(&mut given.public);
        let public = public.into_iter().map(Listening::Tcp).collect();
        let mut public = taken(public)?;
        if public.is_empty() {
            public.push(listen(config.listen, "the public API", "listen").await?);
        }
        let mut metrics = taken(std::mem::take(&mut given.metrics))?;
        if metrics.is_empty() {
            metrics.push(listen(config.metrics_listen, "metrics", "metrics-listen").await?);
        }
        let mut admin = taken(std::mem::take(&mut given.admin))?;
        if admin.is_empty() {
            admin.extend(admin_door(config).await?);
        }
        Ok(Listeners {
            public_addr: address(&public, config.listen),
            metrics_addr: address(&metrics, config.metrics_listen),
            public,
            metrics,
            admin,
        })
    }
}

fn taken(sockets: Vec<Listening>) -> Result<Vec<Door>, StartError> {
    let doors = sockets.into_iter().map(Door::try_from);
    doors.collect::<io::Result<_>>().map_err(StartError::Given)
}

async fn listen(
    address: SocketAddr,
    what: &'static str,
    flag: &'static str,
) -> Result<Door, StartError> {
    let listener = TcpListener::bind(address).await;
    listener
        .map(Door::Tcp)
        .map_err(refused(address, what, flag))
}

fn refused(
    address: impl ToString,
    what: &'static str,
    flag: &'static str,
) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Listen {
        address: address.to_string(),
        what,
        flag,
        source,
    }
}

async fn admin_door(config: &Config) -> Result<Option<Door>, StartError> {
    let (what, flag) = ("the admin API", "admin-listen");
    match &config.admin_listen {
        None => Ok(None),
        Some(AdminListen::Tcp(address)) => listen(*address, what, flag).await.map(Some),
        Some(AdminListen::Unix(path)) => bind_unix(path)
            .await
            .map(|listener| Some(Door::Unix(listener)))
            .map_err(refused(path.display(), what, flag)),
    }
}

/// Listens on a path, also on one that a relay left behind that was killed.
async fn bind_unix(path: &Path) -> io::Result<UnixListener> {
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

/// The address of the first one that has one.
fn address(doors: &[Door], configured: SocketAddr) -> SocketAddr {
    let addresses = doors.iter().find_map(|door| match door {
        Door::Tcp(listener) => listener.local_addr().ok(),
        Door::Unix(_) => None,
    });
    addresses.unwrap_or(configured)
}
