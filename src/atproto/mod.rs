//! The ground floor of the AT Protocol: pure, no I/O, no clock.

pub mod at_uri;
pub mod car;
pub mod cbor;
pub mod cid;
pub mod commit;
pub mod datetime;
pub mod did;
pub mod did_doc;
mod fixed;
pub mod frame;
pub mod handle;
pub mod key;
#[cfg(target_arch = "x86_64")]
pub mod lanes;
pub mod mst;
pub mod nsid;
pub mod record_key;
pub mod tid;
