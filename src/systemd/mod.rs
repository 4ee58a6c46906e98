//! Integration with systemd: on where systemd's variables are set, off elsewhere.
//!
//! [`notify`] reports the state of the service (sd_notify(3)), [`watchdog`] pings while every part makes progress,
//! [`pressure`] reports memory pressure, [`sockets`] takes the descriptors that systemd passes at the start
//! (sd_listen_fds(3)), [`store`] stores descriptors for the next start. Nothing here knows other rooms.

pub mod notify;
pub mod pressure;
pub mod sockets;
pub mod store;
pub mod watchdog;
