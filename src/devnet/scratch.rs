//! A folder for one run, removed with everything in it at the end.

use std::io;
use std::path::{Path, PathBuf};

/// A folder that lives as long as this value. A process that is killed leaves it behind.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new, empty folder in the system's folder for temporary files, readable by its owner alone.
    pub fn new(name: &str) -> io::Result<Scratch> {
        Scratch::new_in(&std::env::temp_dir(), name)
    }

    /// A new, empty folder in another one, readable by its owner alone.
    pub fn new_in(folder: &Path, name: &str) -> io::Result<Scratch> {
        loop {
            let path = folder.join(format!(
                "{name}-{}-{:08x}",
                std::process::id(),
                fastrand::u32(..)
            ));
            match create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                created => return created.map(|()| Scratch(path)),
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "the temporary folder stays behind");
        }
    }
}

#[cfg(unix)]
fn create(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().mode(0o700).create(path)
}

#[cfg(not(unix))]
fn create(path: &Path) -> io::Result<()> {
    std::fs::create_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_removed_with_what_is_in_it() {
        let scratch = Scratch::new("atproto-scratch-test").unwrap();
        let path = scratch.path().to_owned();
        std::fs::write(path.join("file"), "text").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }
}
