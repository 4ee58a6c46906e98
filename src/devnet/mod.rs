//! A whole AT Protocol network in one process: PLC directory, PDSes, load, faults and their checker.

pub mod check;
pub mod faults;
pub mod load;
pub mod network;
pub mod pds;
pub mod plc;
pub mod replay;
