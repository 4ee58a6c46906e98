//! A whole AT Protocol network in one process: PLC directory, PDSes, load, faults and their checker.
//!
//! A test network: keys, passwords and tokens are in memory in the clear, sessions are plain random bearer tokens that never
//! expire, and the `/devnet/…` routes require no password. Nothing survives the process. It listens on 127.0.0.1, unless
//! another address is given, as in a network of virtual machines.

pub mod check;
pub mod dag;
pub mod directory;
pub mod faults;
pub mod feed;
pub mod follower;
pub mod keys;
pub mod load;
pub mod network;
pub mod pds;
pub mod plc;
pub mod replay;
pub mod scrape;
pub mod scratch;
pub mod server;
pub mod timestamp;
