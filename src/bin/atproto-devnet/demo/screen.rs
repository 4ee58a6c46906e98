//! The terminal of the demo: a header and a footer that stay, and the newest lines between them. Restores the terminal
//! when it is dropped. Paints only rows that changed; reads the size at each paint, so that no resize is missed.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};

use rustix::process::getpgrp;
use rustix::termios::{
    LocalModes, OptionalActions, Termios, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr,
};

/// Alternate screen, no cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[2J";
const LEAVE: &str = "\x1b[0m\x1b[?25h\x1b[?1049l";
const PLAIN: &str = "\x1b[0m";
/// Rows and columns where the terminal does not say.
const USUAL_SIZE: (usize, usize) = (24, 80);
/// Lines between header and footer that a header must leave.
const LEAST_BODY: usize = 8;
/// Lines kept for a terminal that grows.
const KEPT_LINES: usize = 500;

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Good,
    Warning,
    Bad,
    Dim,
    Bold,
    Normal,
}

impl Style {
    const fn escape(self) -> &'static str {
        match self {
            Style::Good => "\x1b[32m",
            Style::Warning => "\x1b[33m",
            Style::Bad => "\x1b[31m",
            Style::Dim => "\x1b[2m",
            Style::Bold => "\x1b[1m",
            Style::Normal => "",
        }
    }
}

/// A line of one style.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub style: Style,
    pub text: String,
}

impl Line {
    pub fn new(style: Style, text: impl Into<String>) -> Line {
        Line {
            style,
            text: text.into(),
        }
    }

    /// At most `columns` characters, none of which can drive the terminal.
    fn painted(&self, columns: usize) -> String {
        let text = self.text.chars().take(columns);
        let text = text.map(|c| if c.is_control() { '?' } else { c });
        let text: String = text.collect();
        format!("{}{text}{PLAIN}", self.style.escape())
    }
}

/// Makes the lines of a header for so many columns.
pub type Header = Box<dyn Fn(usize) -> Vec<Line> + Send>;

/// Whether this process may use the keyboard: a background process that reads from the terminal is stopped.
pub fn has_keyboard() -> bool {
    let stdin = io::stdin();
    stdin.is_terminal() && tcgetpgrp(&stdin).is_ok_and(|group| group == getpgrp())
}

/// The terminal in use. Lines are seen after [`Screen::paint`].
pub struct Screen {
    /// As the terminal was before; `None` without a keyboard.
    before: Option<Termios>,
    is_open: bool,
    full: Header,
    short: Header,
    body: VecDeque<Line>,
    footer: Vec<Line>,
    size: (usize, usize),
    painted: Vec<String>,
}

impl Screen {
    /// Takes the terminal over. Of the two headers, the short one is for terminals with few rows.
    pub fn open(full: Header, short: Header) -> io::Result<Screen> {
        let mut screen = Screen {
            before: has_keyboard().then(|| tcgetattr(io::stdin())).transpose()?,
            is_open: false,
            full,
            short,
            body: VecDeque::new(),
            footer: Vec::new(),
            size: USUAL_SIZE,
            painted: Vec::new(),
        };
        screen.enter()?;
        Ok(screen)
    }

    /// Whether the output is a terminal that this process may take over, and nobody wants plain lines.
    pub fn is_wanted() -> bool {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let stdout = io::stdout();
        stdout.is_terminal()
            && !is_set("NO_COLOR")
            && !is_dumb
            && tcgetpgrp(&stdout).is_ok_and(|group| group == getpgrp())
    }

    /// Takes the terminal over again, after [`Screen::leave`].
    pub fn enter(&mut self) -> io::Result<()> {
        if let Some(before) = &self.before {
            let mut keys = before.clone();
            // Signals stay on: Ctrl-C and Ctrl-Z do what they always do.
            keys.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
            tcsetattr(io::stdin(), OptionalActions::Now, &keys)?;
        }
        self.is_open = true;
        self.painted.clear();
        write(ENTER)
    }

    /// Gives the terminal back as it was.
    pub fn leave(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.is_open) {
            return Ok(());
        }
        let written = write(LEAVE);
        if let Some(before) = &self.before {
            tcsetattr(io::stdin(), OptionalActions::Now, before)?;
        }
        written
    }

    /// Adds a line below the others.
    pub fn add(&mut self, line: Line) {
        self.body.push_back(line);
        if self.body.len() > KEPT_LINES {
            self.body.pop_front();
        }
    }

    /// Sets the lines at the bottom.
    pub fn set_footer(&mut self, footer: Vec<Line>) {
        self.footer = footer;
    }

    /// Shows what changed.
    pub fn paint(&mut self) -> io::Result<()> {
        let (rows, columns) = size();
        let mut out = String::new();
        if (rows, columns) != self.size {
            self.size = (rows, columns);
            self.painted.clear();
            out.push_str("\x1b[2J");
        }
        let wanted = self.rows(rows, columns);
        for (row, text) in wanted.iter().enumerate() {
            if self.painted.get(row) != Some(text) {
                out.push_str(&format!("\x1b[{};1H{text}\x1b[K", row + 1));
            }
        }
        self.painted = wanted;
        if out.is_empty() { Ok(()) } else { write(&out) }
    }

    /// The whole screen from top to bottom.
    fn rows(&self, rows: usize, columns: usize) -> Vec<String> {
        let fits = |header: &Vec<Line>| header.len() + self.footer.len() + LEAST_BODY <= rows;
        let headers = [&self.full, &self.short].map(|header| header(columns));
        let header = headers.into_iter().find(fits).unwrap_or_default();
        let room = rows.saturating_sub(header.len() + self.footer.len());
        let shown = self.body.len().min(room);
        let empty = Line::new(Style::Normal, "");
        header
            .iter()
            .chain(self.body.range(self.body.len() - shown..))
            .chain(std::iter::repeat_n(&empty, room - shown))
            .chain(&self.footer)
            .take(rows)
            .map(|line| line.painted(columns))
            .collect()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // The terminal may be gone, and there is nobody else to tell.
        let _ = self.leave();
    }
}

fn size() -> (usize, usize) {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row.into(), size.ws_col.into()),
        _ => USUAL_SIZE,
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen(lines: usize) -> Screen {
        let header = |name: &'static str, rows| {
            let make = move |_| vec![Line::new(Style::Normal, name); rows];
            Box::new(make) as Header
        };
        let mut screen = Screen {
            before: None,
            is_open: false,
            full: header("full", 10),
            short: header("short", 2),
            body: VecDeque::new(),
            footer: vec![Line::new(Style::Normal, "footer")],
            size: USUAL_SIZE,
            painted: Vec::new(),
        };
        (0..lines).for_each(|n| screen.add(Line::new(Style::Normal, format!("line {n}"))));
        screen
    }

    #[test]
    fn header_and_footer_stay_and_the_newest_lines_are_between_them() {
        for (rows, header, lines) in [(24, "full", 13), (12, "short", 9), (8, "line 93", 7)] {
            let painted = screen(100).rows(rows, 80);
            assert_eq!(painted.len(), rows);
            assert!(painted[0].contains(header), "{painted:?}");
            assert!(painted[rows - 1].contains("footer"), "{painted:?}");
            assert!(painted[rows - 2].contains("line 99"), "{painted:?}");
            let body = painted.iter().filter(|row| row.contains("line "));
            assert_eq!(body.count(), lines);
        }
        assert_eq!(screen(1).rows(0, 0).len(), 0);
        assert_eq!(screen(3).rows(24, 80).len(), 24);
    }

    #[test]
    fn no_line_is_wider_than_the_terminal_or_drives_it() {
        let line = Line::new(Style::Bad, "a\x1b[2J\u{9b}✓ and more");
        assert_eq!(line.painted(8), format!("\x1b[31ma?[2J?✓ {PLAIN}"));
    }
}
