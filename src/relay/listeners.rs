//! The sockets a relay listens on: those that systemd passes, else those that the configuration names.
//! Promises that they are open before anything is written, and that nobody is let in as the operator by mistake.

use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::{Mode, fchmod};
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
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && nobody_answers(path).await => {
            fs::remove_file(path)?;
            socket.bind(&address)?;
        }
        bound => bound?,
    }
    fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE))?;
    socket.set_nonblocking(true)?;
    socket.listen(BACKLOG)?;
    UnixListener::from_std(socket.into())
}

async fn nobody_answers(path: &Path) -> bool {
    let refused = UnixStream::connect(path).await.err();
    refused.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// The address of the first one that has one.
fn address(doors: &[Door], configured: SocketAddr) -> SocketAddr {
    let addresses = doors.iter().find_map(|door| match door {
        Door::Tcp(listener) => listener.local_addr().ok(),
        Door::Unix(_) => None,
    });
    addresses.unwrap_or(configured)
}
