//! Timestamp identifiers: 53 bits of microseconds since 1970 and 10 bits of clock id, written in 13 characters
//! that sort as the numbers do. Pure: making one needs the time from the caller.

use std::fmt;
use std::str::FromStr;

/// Characters in a written TID.
pub const TID_CHARACTERS: usize = 13;

/// base32-sortable: the alphabet whose byte order is its numeric order (<https://atproto.com/specs/tid>).
const ALPHABET: &[u8; 32] = b"234567abcdefghijklmnopqrstuvwxyz";
const CLOCK_ID_BITS: u32 = 10;
const CLOCK_ID_MASK: u64 = (1 << CLOCK_ID_BITS) - 1;
const MICROS_MASK: u64 = (1 << 53) - 1;
const NOT_A_DIGIT: u8 = 0xff;
const DIGITS: [u8; 256] = digits();

/// Why a text is not a TID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TidError {
    #[error("a TID has {TID_CHARACTERS} characters, this one has {length}")]
    Length { length: usize },
    #[error("the character at byte {at} is not allowed there in a TID")]
    Character { at: usize },
}

/// A TID as its 64-bit number. Order of the numbers is order of the texts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tid(u64);

impl Tid {
    /// Reads the 13-character form.
    ///
    /// # Errors
    /// Another length, or a character outside the alphabet; the first must be one of `234567abcdefghij`.
    pub fn parse(text: &str) -> Result<Self, TidError> {
        let bytes: &[u8; TID_CHARACTERS] = text
            .as_bytes()
            .try_into()
            .map_err(|_| TidError::Length { length: text.len() })?;
        let mut number = 0;
        for (at, &byte) in bytes.iter().enumerate() {
            let digit = DIGITS[usize::from(byte)];
            // Thirteen digits are 65 bits: the first may only use four.
            if digit == NOT_A_DIGIT || (at == 0 && digit > 15) {
                return Err(TidError::Character { at });
            }
            number = number << 5 | u64::from(digit);
        }
        Ok(Self(number))
    }

    /// A TID of this time (microseconds since 1970, 53 bits are kept) and clock id (10 bits are kept).
    #[must_use]
    pub const fn from_micros(micros: u64, clock_id: u16) -> Self {
        Self((micros & MICROS_MASK) << CLOCK_ID_BITS | clock_id as u64 & CLOCK_ID_MASK)
    }

    /// Microseconds since 1970.
    #[must_use]
    pub const fn micros(self) -> u64 {
        self.0 >> CLOCK_ID_BITS
    }

    #[must_use]
    pub const fn clock_id(self) -> u16 {
        (self.0 & CLOCK_ID_MASK) as u16
    }

    #[must_use]
    pub const fn to_u64(self) -> u64 {
        self.0
    }

    /// The inverse of [`Tid::to_u64`]; every number is some TID.
    #[must_use]
    pub const fn from_u64(number: u64) -> Self {
        Self(number)
    }
}

const fn digits() -> [u8; 256] {
    let mut table = [NOT_A_DIGIT; 256];
    let mut value = 0;
    while value < ALPHABET.len() {
        table[ALPHABET[value] as usize] = value as u8;
        value += 1;
    }
    table
}

impl fmt::Display for Tid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = ['2'; TID_CHARACTERS];
        let mut rest = self.0;
        for place in text.iter_mut().rev() {
            *place = char::from(ALPHABET[(rest & 31) as usize]);
            rest >>= 5;
        }
        text.iter()
            .try_for_each(|&character| fmt::Write::write_char(f, character))
    }
}

impl fmt::Debug for Tid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tid({self})")
    }
}

impl FromStr for Tid {
    type Err = TidError;

    fn from_str(text: &str) -> Result<Self, TidError> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_the_published_examples() {
        for text in [
            "3jzfcijpj2z2a",
            "7777777777777",
            "3zzzzzzzzzzzz",
            "2222222222222",
        ] {
            assert_eq!(Tid::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Tid::parse("2222222222222").unwrap().to_u64(), 0);
        assert_eq!(Tid::parse("jzzzzzzzzzzzz").unwrap().to_u64(), u64::MAX);
    }

    #[test]
    fn refuses_with_the_reason() {
        for (text, error) in [
            ("", TidError::Length { length: 0 }),
            ("3jzfcijpj2z2", TidError::Length { length: 12 }),
            ("3jzfcijpj2z2aa", TidError::Length { length: 14 }),
            ("kjzfcijpj2z2a", TidError::Character { at: 0 }),
            ("3jzfcijpj2z21", TidError::Character { at: 12 }),
            ("3JZFCIJPJ2Z2A", TidError::Character { at: 1 }),
            ("3jzf-cijpj2z2", TidError::Character { at: 4 }),
        ] {
            assert_eq!(Tid::parse(text), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_number_survives_writing(number: u64) {
            let tid = Tid::from_u64(number);
            prop_assert_eq!(Tid::parse(&tid.to_string()), Ok(tid));
        }

        #[test]
        fn texts_sort_as_numbers(a: u64, b: u64) {
            let (left, right) = (Tid::from_u64(a), Tid::from_u64(b));
            prop_assert_eq!(left.to_string().cmp(&right.to_string()), left.cmp(&right));
        }

        #[test]
        fn time_and_clock_come_back(micros in 0..1_u64 << 53, clock in 0..1024_u16) {
            let tid = Tid::from_micros(micros, clock);
            prop_assert_eq!((tid.micros(), tid.clock_id()), (micros, clock));
        }

        #[test]
        fn any_text_is_read_or_refused(text: String) {
            if let Ok(tid) = Tid::parse(&text) {
                prop_assert_eq!(tid.to_string(), text);
            }
        }
    }
}
