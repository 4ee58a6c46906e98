//! Flags that say where a server of the devnet listens, and how others reach it.

use std::net::SocketAddr;

use atproto_relay::devnet::server::Place;
use clap::Args;

/// Where a server listens.
#[derive(Debug, Args)]
pub struct PlaceArgs {
    /// Address to listen on; port 0 takes any free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Base URL under which others reach it; without it, the address.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

impl PlaceArgs {
    /// The place they name.
    pub fn place(&self) -> Place {
        let url = self.url.as_deref();
        Place {
            listen: self.listen,
            url: url.map(|url| url.trim_end_matches('/').to_owned()),
        }
    }
}
