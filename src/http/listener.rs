//! A listening socket, on an address or on a path of this machine.

use std::io;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::client::Peer;
use crate::systemd::sockets::Listening;

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// On an address.
    Tcp(TcpListener),
    /// On a path.
    Unix(UnixListener),
}

/// An accepted connection.
pub(super) enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Listener {
        Listener::Tcp(listener)
    }
}

impl TryFrom<Listening> for Listener {
    type Error = io::Error;

    /// Serves a socket that another process opened. Call it within the runtime.
    fn try_from(socket: Listening) -> io::Result<Listener> {
        match socket {
            Listening::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                Ok(Listener::Tcp(TcpListener::from_std(listener)?))
            }
            Listening::Unix(listener) => {
                listener.set_nonblocking(true)?;
                Ok(Listener::Unix(UnixListener::from_std(listener)?))
            }
        }
    }
}

impl Listener {
    pub(super) async fn accept(&self) -> io::Result<(Accepted, Peer)> {
        match self {
            Listener::Tcp(listener) => {
                let (socket, peer) = listener.accept().await?;
                Ok((Accepted::Tcp(socket), Peer::Tcp(peer)))
            }
            Listener::Unix(listener) => {
                let (socket, _) = listener.accept().await?;
                let owner = socket.peer_cred()?;
                let (uid, pid) = (owner.uid(), owner.pid());
                Ok((Accepted::Unix(socket), Peer::Unix { uid, pid }))
            }
        }
    }
}
