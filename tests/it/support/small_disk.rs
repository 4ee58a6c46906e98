//! A file system of its own, to be filled to the last byte.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A small disk of its own. Unmounted when dropped.
pub struct SmallDisk {
    pub folder: PathBuf,
    _parent: tempfile::TempDir,
}

impl SmallDisk {
    /// `None`, with a printed line, where this user may not mount.
    pub fn mount(size: &str) -> Option<SmallDisk> {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("disk");
        fs::create_dir(&folder).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(&folder)
            .stderr(Stdio::null())
            .status();
        if !mounted.is_ok_and(|status| status.success()) {
            println!("skipped: no small disk, this user may not mount a tmpfs");
            return None;
        }
        Some(SmallDisk {
            folder,
            _parent: parent,
        })
    }

    /// Leaves no room.
    pub fn fill(&self) {
        let mut filler = File::create(self.folder.join("filler")).unwrap();
        for bytes in [vec![0; 1 << 20], vec![0; 4096]] {
            while filler.write_all(&bytes).is_ok() {}
        }
    }

    /// Leaves room for so many bytes.
    pub fn fill_but(&self, room: u64) {
        self.fill();
        let filler = File::options().write(true).open(self.folder.join("filler"));
        let filler = filler.unwrap();
        let filled = filler.metadata().unwrap().len();
        filler.set_len(filled - room).unwrap();
    }

    /// Gives all the room back.
    pub fn make_room(&self) {
        fs::remove_file(self.folder.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: files may still be open after a failed assertion.
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}
