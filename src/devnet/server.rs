//! One HTTP server of the devnet, on a free port of loopback or a given address. Answers until it is stopped. Does not know
//! what it serves.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use axum::Router;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Where a server listens, and under which URL others reach it.
#[derive(Clone, Debug)]
pub struct Place {
    /// The address it binds; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Its base URL as others know it; `None`: the address it is bound to.
    pub url: Option<String>,
}

impl Default for Place {
    fn default() -> Self {
        Place {
            listen: (Ipv4Addr::LOCALHOST, 0).into(),
            url: None,
        }
    }
}

/// Where several servers of one process listen.
#[derive(Clone, Debug, Default)]
pub enum Places {
    /// On free ports of loopback.
    #[default]
    Loopback,
    /// On an address of this machine, one port after the other, under a name others know.
    From {
        /// The address they bind.
        address: IpAddr,
        /// The port of the next one.
        port: u16,
        /// The name of this machine in their URLs.
        name: String,
    },
}

impl Places {
    /// The place of the next server.
    pub(crate) fn next(&mut self) -> Place {
        match self {
            Places::Loopback => Place::default(),
            Places::From {
                address,
                port,
                name,
            } => {
                let place = Place {
                    listen: (*address, *port).into(),
                    url: Some(format!("http://{name}:{port}")),
                };
                *port += 1;
                place
            }
        }
    }
}

/// A listening server.
#[derive(Debug)]
pub(crate) struct Server {
    address: SocketAddr,
    url: String,
    stop: CancellationToken,
}

impl Server {
    /// Serves `router` on a free port of 127.0.0.1.
    pub(crate) async fn start(router: Router) -> std::io::Result<Self> {
        Server::start_at(router, Place::default()).await
    }

    /// Serves `router` at a place.
    pub(crate) async fn start_at(router: Router, place: Place) -> std::io::Result<Self> {
        let listener = TcpListener::bind(place.listen).await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        tokio::spawn(async move {
            axum::serve(listener, router)
                .with_graceful_shutdown(stopped)
                .await
        });
        Ok(Server {
            address,
            url: place.url.unwrap_or_else(|| format!("http://{address}")),
            stop,
        })
    }

    /// Accepts no connections any more and ends those that are open after their current request.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its base URL, as others reach it: without a slash at the end.
    pub(crate) fn url(&self) -> String {
        self.url.clone()
    }

    /// Host and port of that URL.
    pub(crate) fn host(&self) -> String {
        self.url
            .split_once("://")
            .map_or(&*self.url, |(_, host)| host)
            .to_owned()
    }
}
