//! Whole texts to stdout. `print!` would panic where the reader has gone.

use std::io::{self, Write};

/// Writes everything and flushes.
pub fn write_all(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()
}

/// Text of strangers on one line of a terminal: control characters would drive it.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}
