//! The `cursor` parameter (AT Protocol event stream specification, "Sequence Numbers").
//! Promises a decision for every text. Reads no log and sends nothing.

use url::form_urlencoded;

/// The `cursor` parameter of a subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cursor {
    Live,
    From(u64),
    /// Not a number.
    Invalid,
}

/// Where a subscription begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    At(u64),
    /// The cursor is older than the window: an info frame, then the oldest event.
    Outdated(u64),
    /// The cursor is above the head: error frame, close.
    Future,
    /// Error frame, close.
    Invalid,
}

impl Cursor {
    /// Reads the cursor out of a query string; the first one where there are several.
    pub fn from_query(query: Option<&str>) -> Cursor {
        let mut pairs = form_urlencoded::parse(query.unwrap_or_default().as_bytes());
        match pairs.find(|(name, _)| name == "cursor") {
            Some((_, value)) => Cursor::parse(&value),
            None => Cursor::Live,
        }
    }

    fn parse(text: &str) -> Cursor {
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Cursor::Invalid;
        }
        // More digits than fit are still a number, and in the future.
        Cursor::From(text.parse().unwrap_or(u64::MAX))
    }

    /// Decides with the window of now: events `oldest..=head`, empty where `oldest` is head + 1.
    ///
    /// head + 1 is the next event, not the future: a consumer that stores the sequence number it wants next sends that
    /// when it has every event, and the reference relay lets it wait for the next one.
    pub(super) fn start(self, oldest: u64, head: u64) -> Start {
        match self {
            Cursor::Live => Start::At(head + 1),
            Cursor::Invalid => Start::Invalid,
            Cursor::From(0) => Start::At(oldest),
            Cursor::From(cursor) if cursor > head + 1 => Start::Future,
            Cursor::From(cursor) if cursor < oldest => Start::Outdated(oldest),
            Cursor::From(cursor) => Start::At(cursor),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries() {
        let cases = [
            (None, Cursor::Live),
            (Some(""), Cursor::Live),
            (Some("other=5"), Cursor::Live),
            (Some("cursor=0"), Cursor::From(0)),
            (Some("a=b&cursor=12"), Cursor::From(12)),
            (Some("cursor=%31%32"), Cursor::From(12)),
            (Some("cursor=7&cursor=8"), Cursor::From(7)),
            (
                Some("cursor=99999999999999999999999"),
                Cursor::From(u64::MAX),
            ),
            (Some("cursor="), Cursor::Invalid),
            (Some("cursor"), Cursor::Invalid),
            (Some("cursor=-1"), Cursor::Invalid),
            (Some("cursor=+1"), Cursor::Invalid),
            (Some("cursor=1.5"), Cursor::Invalid),
            (Some("cursor=abc"), Cursor::Invalid),
        ];
        for (query, expected) in cases {
            assert_eq!(Cursor::from_query(query), expected, "{query:?}");
        }
    }

    #[test]
    fn starts() {
        let cases = [
            // A window of 5..=9.
            (Cursor::Live, 5, 9, Start::At(10)),
            (Cursor::From(0), 5, 9, Start::At(5)),
            (Cursor::From(1), 5, 9, Start::Outdated(5)),
            (Cursor::From(4), 5, 9, Start::Outdated(5)),
            (Cursor::From(5), 5, 9, Start::At(5)),
            (Cursor::From(9), 5, 9, Start::At(9)),
            (Cursor::From(10), 5, 9, Start::At(10)),
            (Cursor::From(11), 5, 9, Start::Future),
            (Cursor::From(u64::MAX), 5, 9, Start::Future),
            (Cursor::Invalid, 5, 9, Start::Invalid),
            // Before the first event.
            (Cursor::Live, 1, 0, Start::At(1)),
            (Cursor::From(0), 1, 0, Start::At(1)),
            (Cursor::From(1), 1, 0, Start::At(1)),
            (Cursor::From(2), 1, 0, Start::Future),
            // A window emptied by retention.
            (Cursor::From(0), 10, 9, Start::At(10)),
            (Cursor::From(9), 10, 9, Start::Outdated(10)),
            (Cursor::From(10), 10, 9, Start::At(10)),
        ];
        for (cursor, oldest, head, expected) in cases {
            assert_eq!(
                cursor.start(oldest, head),
                expected,
                "{cursor:?} in {oldest}..={head}"
            );
        }
    }
}
