//! The integration tests, one module a subject, linked once.

mod support;

mod api;
mod authority;
mod budgets;
mod cli;
mod config;
mod consume_docs;
mod contrib;
mod crash;
#[cfg(feature = "devnet")]
mod demo;
mod devnet;
mod discovery;
mod docs;
mod eventlog;
mod faults;
mod firehose;
mod given_seqs;
mod ground_floor;
mod handover;
mod identity;
mod lanes;
mod layers;
mod load;
mod log_tools;
mod lookups;
mod losses;
mod mutations;
mod nixos;
mod operator;
mod plc;
mod reads;
mod real_frames;
mod real_pds;
mod relay;
mod replay;
mod repository;
mod rules;
mod service;
mod store;
mod upstream;
mod views;
