//! The descriptors that systemd passes at the start (sd_listen_fds(3)): listening sockets by name, and the content of the
//! service's descriptor store.
//! Promises that an unknown listening socket is an error: it would accept connections that nobody serves.

#![allow(unsafe_code, reason = "descriptors that systemd passes by number")]

use std::io;
use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use rustix::net::{AddressFamily, sockopt};

/// Names of listening sockets (FileDescriptorName= of the socket units).
const PUBLIC: &str = "public";
const METRICS: &str = "metrics";
const ADMIN: &str = "admin";
/// Name of the table of consumers in the descriptor store.
pub const CONSUMERS: &str = "consumers";
/// Prefix of the names of consumers' sockets in the descriptor store; a number follows.
const CONSUMER: &str = "consumer-";

/// A listening socket.
#[derive(Debug)]
pub enum Listening {
    /// On an address.
    Tcp(TcpListener),
    /// On a path.
    Unix(UnixListener),
}

/// The content of the descriptor store.
#[derive(Debug, Default)]
pub struct Stored {
    /// The table of consumers.
    pub table: Option<OwnedFd>,
    /// Sockets of consumers by their number. A number can occur twice: with an earlier socket, and with the current one.
    pub consumers: Vec<(usize, OwnedFd)>,
    /// Names that this version does not know.
    pub unknown: Vec<String>,
}

/// All descriptors that systemd passed.
#[derive(Debug, Default)]
pub struct Inherited {
    /// For the public listener.
    pub public: Vec<TcpListener>,
    /// For metrics and health.
    pub metrics: Vec<Listening>,
    /// For the operator.
    pub admin: Vec<Listening>,
    /// From the descriptor store.
    pub stored: Stored,
}

/// Why the descriptors cannot be used. One line each for the operator.
#[derive(Debug, thiserror::Error)]
pub enum InheritedError {
    /// The variables are wrong.
    #[error(
        "systemd's variables LISTEN_* cannot be used: {0}; start the service by systemd, or without them"
    )]
    Variables(io::Error),
    /// A listening socket of an unknown name.
    #[error(
        "systemd passes a socket named {0:?}; give it FileDescriptorName=public, metrics or admin in its unit"
    )]
    Unknown(String),
    /// The public listener is not TCP, which the firehose needs.
    #[error(
        "systemd passes a socket named \"public\" that is not TCP; its ListenStream= must be an address and a port"
    )]
    PublicNotTcp,
    /// Not a listening socket.
    #[error(
        "systemd passes {0:?}, which is no listening stream socket; its unit must have ListenStream= and Accept=no"
    )]
    NotListening(String),
}

/// The name of a consumer's socket in the descriptor store.
pub fn consumer_name(number: usize) -> String {
    format!("{CONSUMER}{number}")
}

impl Inherited {
    /// Takes the descriptors that systemd passed to this process. Call it once, before anything else opens files.
    ///
    /// # Errors
    /// See [`InheritedError`].
    pub fn from_environment() -> Result<Inherited, InheritedError> {
        let passed = sd_notify::listen_fds_with_names().map_err(InheritedError::Variables)?;
        let passed = passed.map(|(number, name)| {
            // SAFETY: systemd opened it for this process alone (LISTEN_PID was compared), it was open when its flags were
            // set just now, and this is called once: nothing else closes it.
            (name, unsafe { OwnedFd::from_raw_fd(number) })
        });
        Inherited::sort(passed)
    }

    fn sort(passed: impl Iterator<Item = (String, OwnedFd)>) -> Result<Inherited, InheritedError> {
        let mut given = Inherited::default();
        for (name, descriptor) in passed {
            match name.as_str() {
                PUBLIC => match listening(&name, descriptor)? {
                    Listening::Tcp(listener) => given.public.push(listener),
                    Listening::Unix(_) => return Err(InheritedError::PublicNotTcp),
                },
                METRICS => given.metrics.push(listening(&name, descriptor)?),
                ADMIN => given.admin.push(listening(&name, descriptor)?),
                CONSUMERS => given.stored.table = Some(descriptor),
                _ => given.stored.sort(name, descriptor)?,
            }
        }
        Ok(given)
    }
}

impl Stored {
    fn sort(&mut self, name: String, descriptor: OwnedFd) -> Result<(), InheritedError> {
        let number = name.strip_prefix(CONSUMER).map(str::parse);
        match number {
            Some(Ok(number)) => self.consumers.push((number, descriptor)),
            _ if is_listening(&descriptor) => return Err(InheritedError::Unknown(name)),
            // A later version may have put it there.
            _ => self.unknown.push(name),
        }
        Ok(())
    }
}

fn is_listening(descriptor: &OwnedFd) -> bool {
    sockopt::socket_acceptconn(descriptor).unwrap_or(false)
}

fn listening(name: &str, descriptor: OwnedFd) -> Result<Listening, InheritedError> {
    let refused = || InheritedError::NotListening(name.to_owned());
    if !is_listening(&descriptor) {
        return Err(refused());
    }
    match sockopt::socket_domain(&descriptor) {
        Ok(AddressFamily::INET | AddressFamily::INET6) => {
            Ok(Listening::Tcp(TcpListener::from(descriptor)))
        }
        Ok(AddressFamily::UNIX) => Ok(Listening::Unix(UnixListener::from(descriptor))),
        _ => Err(refused()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn tcp() -> OwnedFd {
        TcpListener::bind("127.0.0.1:0").unwrap().into()
    }

    fn unix() -> OwnedFd {
        let folder = tempfile::tempdir().unwrap();
        UnixListener::bind(folder.path().join("s")).unwrap().into()
    }

    fn plain() -> OwnedFd {
        UnixStream::pair().unwrap().0.into()
    }

    fn sorted(passed: Vec<(&str, OwnedFd)>) -> Result<Inherited, String> {
        let passed = passed.into_iter().map(|(name, fd)| (name.to_owned(), fd));
        Inherited::sort(passed).map_err(|error| error.to_string())
    }

    #[test]
    fn each_goes_where_it_belongs() {
        let given = sorted(vec![
            ("public", tcp()),
            ("public", tcp()),
            ("metrics", tcp()),
            ("admin", unix()),
            ("consumer-12", plain()),
            ("consumers", plain()),
            ("consumer-x", plain()),
            ("stored", plain()),
        ])
        .unwrap();
        assert_eq!((given.public.len(), given.metrics.len()), (2, 1));
        assert!(matches!(given.admin[..], [Listening::Unix(_)]));
        assert!(given.stored.table.is_some());
        assert_eq!(given.stored.consumers[0].0, 12);
        assert_eq!(given.stored.unknown, ["consumer-x", "stored"]);
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let cases = [
            ("atproto-relay.socket", tcp(), "\"atproto-relay.socket\""),
            ("consumer-", tcp(), "\"consumer-\""),
            ("public", unix(), "not TCP"),
            ("metrics", plain(), "\"metrics\""),
            ("admin", plain(), "\"admin\""),
        ];
        for (name, descriptor, said) in cases {
            let error = sorted(vec![(name, descriptor)]).unwrap_err();
            assert!(error.contains(said) && !error.contains('\n'), "{error}");
        }
    }
}
