//! How new hosts become known: somebody asks for a crawl, or another relay is asked for its list.
//! Every host is checked before it is added; connecting to it is the upstream room's work.

mod crawl;
mod pull;

pub use crawl::{CrawlError, Crawler, Metrics, Requester, Settings};
pub use pull::{PullError, RemoteHost, pull_hosts};
