//! The bodies of the fuzz targets: each takes any bytes and panics where a promise of the relay is
//! broken. The fuzzer runs them with bytes it makes up, `tests/fuzz_seeds.rs` with the seeds.

pub mod allocation;
pub mod car;
pub mod cbor;
pub mod client_frames;
pub mod commit;
pub mod frame;
pub mod identity;
pub mod inversion;
pub mod log;
pub mod tree;

#[global_allocator]
static ALLOCATOR: allocation::Bounded = allocation::Bounded;
