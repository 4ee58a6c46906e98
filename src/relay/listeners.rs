//! The listening sockets of a relay: those that systemd passes, else those that the configuration names.
//! Promises that they are open before anything is written.

use std::io;
use std::net::SocketAddr;

use tokio::net::TcpListener;

use super::StartError;
use crate::config::{AdminListen, Config};
use crate::http::{Listener, bind_unix};
use crate::systemd::sockets::{Inherited, Listening};

/// All sockets, by what is served there.
pub(super) struct Listeners {
    pub public: Vec<Listener>,
    pub metrics: Vec<Listener>,
    pub admin: Vec<Listener>,
    pub public_addr: SocketAddr,
    pub metrics_addr: SocketAddr,
}

impl Listeners {
    pub async fn open(config: &Config, given: &mut Inherited) -> Result<Listeners, StartError> {
        let public = std::mem::take(&mut given.public);
        let public = public.into_iter().map(Listening::Tcp).collect();
        let mut public = adopt(public)?;
        if public.is_empty() {
            public.push(listen(config.listen, "the public API", "listen").await?);
        }
        let mut metrics = adopt(std::mem::take(&mut given.metrics))?;
        if metrics.is_empty() {
            metrics.push(listen(config.metrics_listen, "metrics", "metrics-listen").await?);
        }
        let mut admin = adopt(std::mem::take(&mut given.admin))?;
        if admin.is_empty() {
            admin.extend(admin_listener(config).await?);
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

fn adopt(sockets: Vec<Listening>) -> Result<Vec<Listener>, StartError> {
    let listeners = sockets.into_iter().map(Listener::try_from);
    listeners
        .collect::<io::Result<_>>()
        .map_err(StartError::Given)
}

async fn listen(
    address: SocketAddr,
    what: &'static str,
    flag: &'static str,
) -> Result<Listener, StartError> {
    let listener = TcpListener::bind(address).await;
    listener
        .map(Listener::Tcp)
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

async fn admin_listener(config: &Config) -> Result<Option<Listener>, StartError> {
    let (what, flag) = ("the admin API", "admin-listen");
    match &config.admin_listen {
        None => Ok(None),
        Some(AdminListen::Tcp(address)) => listen(*address, what, flag).await.map(Some),
        Some(AdminListen::Unix(path)) => bind_unix(path)
            .await
            .map(|listener| Some(Listener::Unix(listener)))
            .map_err(refused(path.display(), what, flag)),
    }
}

/// The address of the first one that has one.
fn address(listeners: &[Listener], configured: SocketAddr) -> SocketAddr {
    let addresses = listeners.iter().find_map(|listener| match listener {
        Listener::Tcp(listener) => listener.local_addr().ok(),
        Listener::Unix(_) => None,
    });
    addresses.unwrap_or(configured)
}
