//! HTTP: the listening sockets, and the server behind each of them. Knows no route.

mod idle;
mod listener;
mod server;
mod unix;

pub use listener::Listener;
pub use server::{ServerOptions, serve};
pub use unix::bind_unix;
