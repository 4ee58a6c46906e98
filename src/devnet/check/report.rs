//! What a checker found, in numbers and with the first differences in words.

use std::fmt;

/// Differences kept in words; the rest is only counted.
pub(super) const DIFFERENCES_KEPT: usize = 20;

/// What a checker found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Events that had to come out.
    pub expected: usize,
    /// Events received, repetitions after a reconnect not counted.
    pub received: usize,
    /// Had to come out and did not.
    pub missing: usize,
    /// Came out more than once.
    pub doubled: usize,
    /// Came out after a later event of the same account.
    pub out_of_order: usize,
    /// Came out though they had to be refused.
    pub refused: usize,
    /// Came out though nobody sent them.
    pub forged: usize,
    /// Came out of a group beyond its quota, or the group's quota was not filled.
    pub quota: usize,
    /// Sequence numbers skipped, repeated or lower than one before.
    pub sequence: usize,
    /// Messages that are no event stream frames, and error frames.
    pub malformed: usize,
    /// `#info` messages.
    pub infos: usize,
    /// Reconnects of the consumer.
    pub reconnects: usize,
    /// The first differences, in words.
    pub differences: Vec<String>,
}

impl Report {
    /// Whether exactly what had to come out did.
    pub fn is_clean(&self) -> bool {
        let Report {
            missing,
            doubled,
            out_of_order,
            refused,
            forged,
            quota,
            sequence,
            malformed,
            ..
        } = self;
        missing + doubled + out_of_order + refused + forged + quota + sequence + malformed == 0
    }

    pub(super) fn note(&mut self, difference: impl FnOnce() -> String) {
        if self.differences.len() < DIFFERENCES_KEPT {
            self.differences.push(difference());
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} events came out: ",
            self.received, self.expected
        )?;
        write!(
            f,
            "{} missing, {} doubled, {} out of order, ",
            self.missing, self.doubled, self.out_of_order
        )?;
        write!(
            f,
            "{} refused ones let through, {} forged, ",
            self.refused, self.forged
        )?;
        write!(
            f,
            "{} against a quota, {} errors in seq, ",
            self.quota, self.sequence
        )?;
        write!(
            f,
            "{} malformed, {} reconnects",
            self.malformed, self.reconnects
        )?;
        for difference in &self.differences {
            write!(f, "\n  {difference}")?;
        }
        Ok(())
    }
}
