//! Durations and byte sizes as people write them: `72h`, `1h30m`, `200GB`, `64MiB`.
//! A duration always needs a unit; a size without one is in bytes.

use std::time::Duration;

/// Sizes that limits are written with.
pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const TIB: u64 = 1 << 40;
pub const MB: u64 = 1_000_000;

/// Units of time and their milliseconds, largest first.
const TIME_UNITS: [(&str, u64); 6] = [
    ("w", 7 * 86_400_000),
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

/// Units of size and their bytes, largest first; decimal and binary ones are both exact.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("TiB", TIB),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", MIB),
    ("MB", MB),
    ("KiB", KIB),
    ("kB", 1_000),
    ("B", 1),
];

/// Parses a duration: one or more numbers, each with a unit, added up.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const HINT: &str = "is not a duration; write a number with a unit, as in 90s, 30m or 72h";
    let mut rest = text.trim();
    let mut total_ms = 0.0_f64;
    if rest.is_empty() {
        return Err(HINT.into());
    }
    while !rest.is_empty() {
        let (number, after) = leading_number(rest).ok_or(HINT)?;
        let after = after.trim_start();
        let end = after.find(|c: char| !c.is_ascii_alphabetic());
        let (unit, after) = after.split_at(end.unwrap_or(after.len()));
        let (_, ms) = TIME_UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .ok_or_else(|| {
                if unit.is_empty() {
                    "has no unit; write it as in 90s, 30m or 72h".to_owned()
                } else {
                    format!("has an unknown unit `{unit}`; use ms, s, m, h, d or w")
                }
            })?;
        total_ms += number * *ms as f64;
        rest = after.trim_start();
    }
    // 100 years: far over any sensible setting, and safe to add to a clock.
    if total_ms > 100.0 * 365.0 * 86_400_000.0 {
        return Err("is longer than 100 years".into());
    }
    Ok(Duration::from_millis(total_ms.round() as u64))
}

/// Parses a byte size. Units are decimal (`kB`, `MB`, `GB`, `TB`) or binary (`KiB` … `TiB`).
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    const HINT: &str = "is not a size; write bytes or a number with a unit, as in 500MB or 64GiB";
    let (number, unit) = leading_number(text.trim()).ok_or(HINT)?;
    let unit = unit.trim();
    let scale = if unit.is_empty() {
        1
    } else {
        SIZE_UNITS
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(unit))
            .map(|(_, bytes)| *bytes)
            .ok_or_else(|| {
                format!("has an unknown unit `{unit}`; use kB, MB, GB, TB or KiB … TiB")
            })?
    };
    let bytes = number * scale as f64;
    // 2^53: what a double holds exactly, 9 petabytes.
    if bytes > 9_007_199_254_740_992.0 {
        return Err("is larger than 9 PB".into());
    }
    Ok(bytes.round() as u64)
}

/// A non-negative decimal number at the start of the text, and what follows it.
fn leading_number(text: &str) -> Option<(f64, &str)> {
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    if !number.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    Some((number.parse().ok()?, rest))
}

/// Writes a duration in the largest unit up to hours that holds it exactly.
pub fn format_duration(duration: Duration) -> String {
    let ms = duration.as_millis() as u64;
    let (unit, scale) = TIME_UNITS[2..]
        .iter()
        .find(|(_, scale)| ms >= *scale && ms.is_multiple_of(*scale))
        .unwrap_or(&("s", 1_000));
    format!("{}{unit}", ms / scale)
}

/// Writes a size in the largest unit that holds it exactly.
pub fn format_bytes(bytes: u64) -> String {
    let (unit, scale) = SIZE_UNITS
        .iter()
        .find(|(_, scale)| bytes >= *scale && bytes.is_multiple_of(*scale))
        .unwrap_or(&("B", 1));
    format!("{}{unit}", bytes / scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, ms) in [
            ("72h", 72 * 3_600_000),
            ("1h30m", 5_400_000),
            ("1 h 30 m", 5_400_000),
            ("72h0m0s", 72 * 3_600_000),
            ("1.5h", 5_400_000),
            ("250ms", 250),
            ("3d", 3 * 86_400_000),
            ("0s", 0),
        ] {
            let parsed = parse_duration(text).unwrap();
            assert_eq!(parsed, Duration::from_millis(ms), "{text}");
            assert_eq!(
                parse_duration(&format_duration(parsed)),
                Ok(parsed),
                "{text}"
            );
        }
        for (text, problem) in [
            ("", "not a duration"),
            ("72", "no unit"),
            ("h", "not a duration"),
            ("-1h", "not a duration"),
            ("1..5h", "not a duration"),
            ("72 hours", "unknown unit `hours`"),
            ("72 hrs", "unknown unit `hrs`"),
            ("72 ", "no unit"),
            ("3y", "unknown unit `y`"),
            ("99999999w", "100 years"),
        ] {
            let error = parse_duration(text).unwrap_err();
            assert!(error.contains(problem), "{text}: {error}");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("200GB", 200_000_000_000),
            ("64MiB", 64 << 20),
            ("64 mib", 64 << 20),
            ("1.5TB", 1_500_000_000_000),
            ("4096", 4096),
            ("0", 0),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
            assert_eq!(parse_bytes(&format_bytes(bytes)), Ok(bytes), "{text}");
        }
        for text in ["", "GB", "-1GB", "5 furlongs", "1e9", "99999999TB"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
