//! What the relay has to do with systemd, on by itself where systemd's variables are there and off elsewhere.
//!
//! [`notify`] says how the service stands (sd_notify(3)), [`watchdog`] proves that it gets on, [`pressure`] hears when
//! memory is short, [`sockets`] takes what systemd passes at the start (sd_listen_fds(3)), [`store`] leaves descriptors
//! with it for the next start. Nothing here knows the rooms that it speaks of.

pub mod notify;
pub mod pressure;
pub mod sockets;
pub mod store;
pub mod watchdog;
