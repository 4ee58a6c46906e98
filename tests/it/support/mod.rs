//! What several integration tests share: where the public fixture sets lie.

pub mod event;
pub mod kills;
pub mod manager;
pub mod postgres;
pub mod process;
pub mod relay;
pub mod service;
pub mod small_disk;

use std::path::PathBuf;

/// The folder of a fixture set: `$ATPROTO_FIXTURES/<set>`, else `../shared/fixtures/<set>`.
/// `None`, with a printed line, where the set is not on this machine: the test then passes as skipped.
pub fn fixtures(set: &str) -> Option<PathBuf> {
    let root = std::env::var_os("ATPROTO_FIXTURES")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures"));
    let folder = root.join(set);
    if folder.is_dir() {
        return Some(folder);
    }
    println!("skipped: fixture set {set} is not at {}", folder.display());
    None
}
