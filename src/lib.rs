//! atproto-relay: subscribes to every PDS, verifies every event, and emits one firehose.
//!
//! Data walks through the rooms in one direction; a room uses only rooms below it:
//!
//! host connection ([`upstream`]) → shard by DID ([`verify`], with [`identity`] and account state
//! from [`store`]) → sequencer and log segment ([`eventlog`]) → consumers ([`firehose`]).

pub mod api;
pub mod atproto;
mod bucket;
pub mod client;
pub mod clock;
pub mod config;
#[cfg(feature = "devnet")]
pub mod devnet;
pub mod dial;
pub mod discovery;
pub mod eventlog;
pub mod firehose;
pub mod heartbeat;
pub mod hosts;
pub mod http;
pub mod identity;
pub mod relay;
pub mod store;
pub mod systemd;
pub mod telemetry;
pub mod upstream;
pub mod verify;
pub mod views;
