//! Times of the devnet: milliseconds since 1970 in UTC, read and written the way PDSes and the
//! PLC directory write them (`2026-11-21T02:17:30.023Z`). No other zones, no leap seconds,
//! no time before 1970.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::atproto::datetime;

/// A moment in milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

/// The text is not a date-time of the form `YYYY-MM-DDTHH:MM:SS[.fff]Z`.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a UTC date-time like 2026-11-21T02:17:30.023Z")]
pub struct TimestampError(String);

impl Timestamp {
    /// The moment `millis` milliseconds after 1970-01-01T00:00:00Z.
    pub fn from_millis(millis: i64) -> Self {
        Timestamp(millis)
    }

    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub fn millis(self) -> i64 {
        self.0
    }

    /// The clock of this machine.
    pub fn now() -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Timestamp(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    }
}

/// The day number of a date, counted from 1970-01-01 (proleptic Gregorian calendar).
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let shifted_month = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * shifted_month + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = u64::try_from(self.0).unwrap_or(0) * 1_000;
        f.write_str(&datetime::format_utc(micros))
    }
}

impl FromStr for Timestamp {
    type Err = TimestampError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| TimestampError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Timestamp> {
    let text = text.strip_suffix('Z')?;
    let (date, time) = text.split_once('T')?;
    let (clock, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let [year, month, day] = numbers(date, '-')?;
    let [hour, minute, second] = numbers(clock, ':')?;
    let fits = (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60;
    if !fits || fraction.is_empty() || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let millis: i64 = format!("{fraction:0<3}").get(..3)?.parse().ok()?;
    let seconds = days_from_civil(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second;
    (seconds >= 0).then_some(Timestamp(seconds * 1_000 + millis))
}

fn numbers(text: &str, separator: char) -> Option<[i64; 3]> {
    let mut parts = text.split(separator).map(|part| {
        let digits = (2..=4).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| part.parse::<i64>().ok()).flatten()
    });
    let three = [parts.next()??, parts.next()??, parts.next()??];
    parts.next().is_none().then_some(three)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_what_directories_write() {
        for (text, millis) in [
            ("1970-01-01T00:00:00.000Z", 0),
            ("1970-01-01T00:00:01.000Z", 1_000),
            ("2000-02-29T23:59:59.999Z", 951_868_799_999),
            ("2026-11-21T02:17:30.023Z", 1_795_227_450_023),
        ] {
            assert_eq!(
                text.parse::<Timestamp>().unwrap().millis(),
                millis,
                "{text}"
            );
            assert_eq!(Timestamp::from_millis(millis).to_string(), text);
        }
        assert_eq!(
            "2026-11-21T02:17:30Z"
                .parse::<Timestamp>()
                .unwrap()
                .millis(),
            1_795_227_450_000
        );
    }

    #[test]
    fn refuses_what_is_not_a_utc_date_time() {
        for text in [
            "",
            "2026-11-21",
            "1969-12-31T23:59:59.999Z",
            "2026-11-21T02:17:30.023",
            "2026-13-21T02:17:30Z",
            "2026-11-21T24:00:00Z",
            "x",
        ] {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
    }
}
