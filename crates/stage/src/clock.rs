//! Dates as people write them, in UTC: for names of runs, and for what a page says of its making. Nothing that is compared holds one.

use std::time::{SystemTime, UNIX_EPOCH};

const DAY_S: u64 = 24 * 60 * 60;

/// Today, `2026-11-29`.
#[must_use]
pub fn today() -> String {
    date(now_s())
}

/// The minute, `2026-11-29 08:32 UTC`.
#[must_use]
pub fn now() -> String {
    minute(now_s())
}

/// The second, as names of files have it: `20261129_083200`.
#[must_use]
pub fn stamp() -> String {
    stamped(now_s())
}

/// Seconds since 1970.
#[must_use]
pub fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn stamped(seconds: u64) -> String {
    let of_day = seconds % DAY_S;
    let time = format!("{:02}{:02}{:02}", of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{}_{time}", date(seconds).replace('-', ""))
}

fn minute(seconds: u64) -> String {
    let of_day = seconds % DAY_S;
    format!("{} {:02}:{:02} UTC", date(seconds), of_day / 3600, of_day / 60 % 60)
}

/// The date of a second since 1970.
///
/// # Source
///
/// Hinnant, chrono-Compatible Low-Level Date Algorithms, `civil_from_days`: years begin with March, so that a leap day is
/// a year's last.
fn date(seconds: u64) -> String {
    let days = seconds / DAY_S + 719_468; // since 0000-03-01
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153; // 0 = March
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // `date -u -d @N`.
        for (seconds, expected) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (951_868_800, "2000-03-01 00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59 UTC"),
            (1_735_689_599, "2024-12-31 23:59 UTC"),
            (1_795_941_120, "2026-11-29 08:32 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
        ] {
            assert_eq!(minute(seconds), expected);
        }
        assert_eq!(stamped(951_868_799), "20000229_235959");
        assert!(now().starts_with(&today()) && today().as_str() > "2024");
    }
}
