//! Where tests make the log's file operations fail. A relay without the feature `devnet` has no value of [`Faults`], and
//! so none of this in its writer.

#[cfg(feature = "devnet")]
mod injected;
#[cfg(not(feature = "devnet"))]
mod none;

#[cfg(feature = "devnet")]
pub use injected::Faults;
#[cfg(not(feature = "devnet"))]
pub use none::Faults;
