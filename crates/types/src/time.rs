//! Tids and the clock.
//!
//! A tid is a `persistent.TimeStamp`: the upper four bytes count minutes in a calendar that starts
//! in 1900 and has months of 31 days, the lower four are the fraction of the minute in units of
//! 60/2³² seconds. Source: `persistent/_timestamp.c`.

use std::time::Duration;

use crate::Tid;

const SECONDS_PER_DAY: u64 = 86_400;
const MINUTE_SCALE: f64 = 60.0 / 4_294_967_296.0;

/// The tid of a moment given as the time since the Unix epoch (UTC).
pub fn tid_at(since_epoch: Duration) -> Tid {
    let seconds = since_epoch.as_secs();
    let (year, month, day) = civil_from_days((seconds / SECONDS_PER_DAY) as i64);
    let minute_of_day = seconds % SECONDS_PER_DAY / 60;
    let months = (year - 1900).max(0) as u64 * 12 + (month - 1);
    let minutes = (months * 31 + day - 1) * 1440 + minute_of_day;
    let second = (seconds % 60) as f64 + f64::from(since_epoch.subsec_nanos()) / 1e9;
    Tid((minutes << 32) | (second / MINUTE_SCALE) as u64 & 0xffff_ffff)
}

/// The moment of a tid as the time since the Unix epoch; zero for tids before 1970.
pub fn time_of(tid: Tid) -> Duration {
    let (minute, second) = minute_and_second(tid);
    Duration::from_secs(minute.max(0) as u64) + Duration::from_secs_f64(second)
}

/// The same number, to the last bit, as `TimeStamp(tid).timeTime()`, which is rounded in that
/// function's own calendar.
pub fn seconds_of(tid: Tid) -> f64 {
    // `gmoff` of `_timestamp.c`.
    const EPOCH: i64 = 25_202 * SECONDS_PER_DAY as i64;
    let (minute, second) = minute_and_second(tid);
    (minute + EPOCH) as f64 + second - EPOCH as f64
}

/// The beginning of the minute in seconds since the Unix epoch, and the seconds in the minute.
fn minute_and_second(tid: Tid) -> (i64, f64) {
    let minutes = tid.0 >> 32;
    let second = (tid.0 & 0xffff_ffff) as f64 * MINUTE_SCALE;
    let (days, minute_of_day) = (minutes / 1440, minutes % 1440);
    let (months, day) = (days / 31, days % 31 + 1);
    let (year, month) = ((months / 12) as i64 + 1900, months % 12 + 1);
    let minute =
        days_from_civil(year, month, day) * SECONDS_PER_DAY as i64 + minute_of_day as i64 * 60;
    (minute, second)
}

/// Year, month (1–12) and day (1–31) of a moment, in UTC.
pub fn date_of(since_epoch: Duration) -> (i64, u64, u64) {
    civil_from_days((since_epoch.as_secs() / SECONDS_PER_DAY) as i64)
}

/// The tid for a new transaction: the clock's, but always above `last`.
pub fn new_tid(since_epoch: Duration, last: Tid) -> Tid {
    tid_at(since_epoch).max(last.next())
}

/// Days since 1970-01-01 to (year, month 1–12, day 1–31), proleptic Gregorian.
fn civil_from_days(days: i64) -> (i64, u64, u64) {
    // Years are counted from March, so that the leap day is the last of its year; 400 years
    // are one era of 146 097 days.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month as u64, day as u64)
}

fn days_from_civil(year: i64, month: u64, day: u64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let shifted_month = (month as i64 + 9) % 12;
    let day_of_year = (153 * shifted_month + 2) / 5 + day as i64 - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// The time of a tid, for people.
pub fn utc(tid: Tid) -> String {
    if tid == Tid::NONE {
        return "the beginning".into();
    }
    let time = time_of(tid);
    let (year, month, day) = date_of(time);
    let seconds = time.as_secs();
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The raw values are what `persistent.TimeStamp.TimeStamp(...).raw()` prints.
    #[test]
    fn agrees_with_persistent_timestamp() {
        for (seconds, raw) in [
            (1_795_489_799.5, 0x040d_38dd_fddd_dddd_u64),
            (1_709_164_800.0, 0x03f6_d9e0_0000_0000),
            (1_709_251_199.999, 0x03f6_df7f_fffe_e861),
            (0.0, 0x023c_2b00_0000_0000),
        ] {
            let tid = tid_at(Duration::from_secs_f64(seconds));
            // The fraction of the minute goes through floating point: a microsecond is exact
            // enough.
            assert!(tid.0.abs_diff(raw) < 72, "{seconds}: {tid} instead of {raw:016x}");
            let back = time_of(tid).as_secs_f64();
            assert!((back - seconds).abs() < 1e-6, "{seconds} -> {tid} -> {back}");
        }
    }

    /// What `persistent.TimeStamp.TimeStamp(raw).timeTime()` gives.
    #[test]
    fn seconds_agree_with_python_to_the_last_bit() {
        for (raw, seconds) in [
            (0x03a6_6363_8b52_9b4a, 1_398_388_052.653_753_8),
            (0x03fe_5b92_9a9a_80fd, 1_738_163_676.235_202_3),
            (0x03b6_1624_3bfd_1d33, 1_458_992_894.059_857_8),
            (0x040f_7d43_7863_3074, 1_804_059_088.215_810_3),
            (0x03ab_d0b9_a286_3a7f, 1_419_382_658.091_64),
            (0x0388_e0a8_bdc2_ae99, 1_284_507_404.475_111_5),
            (0x03ad_ce6f_1064_5d51, 1_426_952_583.841_886_5),
            (0x038f_f438_9752_4d6a, 1_311_728_195.465_975_3_f64),
        ] {
            assert_eq!(seconds_of(Tid(raw)).to_bits(), seconds.to_bits(), "{raw:016x}");
        }
    }

    #[test]
    fn new_tid_never_goes_back() {
        let now = Duration::from_secs(1_700_000_000);
        let first = new_tid(now, Tid::NONE);
        assert_eq!(new_tid(now, first), first.next());
        assert_eq!(new_tid(now - Duration::from_secs(86_400), first), first.next());
        assert!(new_tid(now + Duration::from_secs(1), first) > first.next());
    }
}
