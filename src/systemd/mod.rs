//! What the relay has to do with systemd, on by itself where systemd's variables are there and off elsewhere.
//!
//! [`notify`] says how the service stands (sd_notify(3)), [`watchdog`] proves that it gets on, [`pressure`] hears when
//! memory is short. Nothing here knows the rooms that it speaks of.

pub mod notify;
pub mod pressure;
pub mod watchdog;
