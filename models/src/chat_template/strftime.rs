//! Python's `datetime.now().strftime(…)`, in UTC: a server has no better idea of its users' clocks.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A moment taken apart.
struct Moment {
    year: u64,
    /// From 0.
    month: usize,
    /// From 1.
    day: u64,
    /// From 1.
    day_of_year: u64,
    /// From Sunday, 0.
    weekday: usize,
    hour: u64,
    minute: u64,
    second: u64,
}

/// `now` by `format`.
pub(super) fn format(now: SystemTime, format: &str) -> Result<String, Error> {
    let moment = Moment::of(now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()));
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let code = match characters.next() {
            // glibc's mark for "no leading zeros".
            Some('-') => characters.next().and_then(|code| moment.code(code)).map(|part| unpadded(&part)),
            Some(code) => moment.code(code),
            None => None,
        };
        let unknown = || Error::new(ErrorKind::InvalidOperation, format!("strftime_now: cannot format {format:?}"));
        text.push_str(&code.ok_or_else(unknown)?);
    }
    Ok(text)
}

fn unpadded(part: &str) -> String {
    let trimmed = part.trim_start_matches(['0', ' ']);
    if trimmed.is_empty() { "0".to_owned() } else { trimmed.to_owned() }
}

impl Moment {
    /// `seconds` after the epoch.
    fn of(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let (mut year, mut day) = (1970, days);
        while day >= days_in(year) {
            day -= days_in(year);
            year += 1;
        }
        let day_of_year = day + 1;
        let mut month = 0;
        while day >= days_in_month(year, month) {
            day -= days_in_month(year, month);
            month += 1;
        }
        Self {
            year,
            month,
            day: day + 1,
            day_of_year,
            // The epoch was a Thursday.
            weekday: ((days + 4) % 7) as usize,
            hour: seconds / 3600 % 24,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }

    fn code(&self, code: char) -> Option<String> {
        let month = MONTHS.get(self.month)?;
        let day = DAYS.get(self.weekday)?;
        let half_hour = if self.hour.is_multiple_of(12) { 12 } else { self.hour % 12 };
        Some(match code {
            'Y' => self.year.to_string(),
            'y' => format!("{:02}", self.year % 100),
            'm' => format!("{:02}", self.month + 1),
            'B' => (*month).to_owned(),
            'b' | 'h' => month[..3].to_owned(),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'j' => format!("{:03}", self.day_of_year),
            'A' => (*day).to_owned(),
            'a' => day[..3].to_owned(),
            'w' => self.weekday.to_string(),
            'u' => (if self.weekday == 0 { 7 } else { self.weekday }).to_string(),
            'H' => format!("{:02}", self.hour),
            'I' => format!("{half_hour:02}"),
            'M' => format!("{:02}", self.minute),
            'S' => format!("{:02}", self.second),
            'p' => (if self.hour < 12 { "AM" } else { "PM" }).to_owned(),
            'F' => format!("{}-{:02}-{:02}", self.year, self.month + 1, self.day),
            'T' => format!("{:02}:{:02}:{:02}", self.hour, self.minute, self.second),
            // A datetime without a zone has neither name nor offset.
            'Z' | 'z' => String::new(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400)
}

fn days_in(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_in_month(year: u64, month: usize) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64, text: &str) -> String {
        format(UNIX_EPOCH + Duration::from_secs(seconds), text).unwrap()
    }

    /// The expectations are Python's.
    #[test]
    fn known_moments() {
        assert_eq!(at(0, "%Y-%m-%d %H:%M:%S %A %j"), "1970-01-01 00:00:00 Thursday 001");
        assert_eq!(at(1_709_210_096, "%d %b %Y, %I:%M %p"), "29 Feb 2024, 12:34 PM");
        assert_eq!(at(1_735_689_599, "%a %e %B %y %j %F %T"), "Tue 31 December 24 366 2024-12-31 23:59:59");
        assert_eq!(at(4_107_542_400, "%F"), "2100-03-01");
        assert_eq!(at(1_714_881_600, "%-d.%-m. %u%w %% é"), "5.5. 70 % é");
    }

    #[test]
    fn unknown_codes_are_refused() {
        for text in ["%Q", "%", "%-"] {
            assert!(format(UNIX_EPOCH, text).is_err(), "{text}");
        }
    }
}
