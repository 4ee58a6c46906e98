//! Sequence numbers: the next one, or one that an upstream relay gave. Promises that they rise and stay countable.

use super::entry::SEQ_LIMIT;

/// Numbers that may be left out before a given one: each takes an index entry of 64 bytes. Twice what a relay leaves out
/// after it lost the end of its log.
pub(super) const MAX_ABSENT: u64 = 1 << 20;

/// Why an event is not appended under the number it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NumberError {
    #[error("seq {given} is not above {head}, the last one")]
    NotAbove { given: u64, head: u64 },
    #[error("seq {0} is not below 2^53")]
    TooHigh(u64),
    #[error("seq {given} leaves out more than {MAX_ABSENT} numbers after {head}")]
    TooFar { given: u64, head: u64 },
}

/// The number of an event: `given`, or `next`.
pub(super) fn number(given: Option<u64>, next: u64) -> Result<u64, NumberError> {
    let head = next.saturating_sub(1);
    match given {
        None => Ok(next),
        Some(given) if given < next => Err(NumberError::NotAbove { given, head }),
        Some(given) if given >= SEQ_LIMIT => Err(NumberError::TooHigh(given)),
        Some(given) if given - next > MAX_ABSENT => Err(NumberError::TooFar { given, head }),
        Some(given) => Ok(given),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_numbers_rise_and_stay_below_the_limit() {
        let not_above = |given, head| Err(NumberError::NotAbove { given, head });
        for (given, next, expected) in [
            (None, 1, Ok(1)),
            (None, 900, Ok(900)),
            (Some(1), 1, Ok(1)),
            (Some(7), 7, Ok(7)),
            (Some(9), 7, Ok(9)),
            (Some(6), 7, not_above(6, 6)),
            (Some(0), 1, not_above(0, 0)),
            (Some(7 + MAX_ABSENT), 7, Ok(7 + MAX_ABSENT)),
            (
                Some(8 + MAX_ABSENT),
                7,
                Err(NumberError::TooFar {
                    given: 8 + MAX_ABSENT,
                    head: 6,
                }),
            ),
            (Some(SEQ_LIMIT - 1), SEQ_LIMIT - 2, Ok(SEQ_LIMIT - 1)),
            (
                Some(SEQ_LIMIT),
                SEQ_LIMIT - 1,
                Err(NumberError::TooHigh(SEQ_LIMIT)),
            ),
        ] {
            assert_eq!(number(given, next), expected, "{given:?} after {next}");
        }
    }
}
