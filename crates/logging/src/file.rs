//! A log file that is opened anew when somebody has moved it away, and that may move itself away.
//!
//! Source: `RotatingFileHandler` and `TimedRotatingFileHandler` of Python's `logging.handlers`,
//! whose names for old files are kept: `PATH.1` is the newest by size; by time, `PATH.` and the
//! time at which it began.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Datelike, Days, Duration, Local, TimeZone};

/// When a file is moved away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// Before it would have this many bytes.
    Size(u64),
    /// Every so many seconds.
    Seconds(u32),
    /// At midnight; on a day of the week (Monday is 0) if one is given.
    Midnight(Option<u8>),
}

impl Rotation {
    /// Reads `when`: S, M, H, D, W0 to W6, or MIDNIGHT; `interval` is how many of them.
    pub fn at(when: &str, interval: u32) -> Result<Rotation, String> {
        let seconds = |each: u32| {
            let all = each.checked_mul(interval.max(1));
            all.map(Rotation::Seconds).ok_or_else(|| "that is too long".to_owned())
        };
        match when.to_uppercase().as_str() {
            "S" => seconds(1),
            "M" => seconds(60),
            "H" => seconds(3600),
            "D" => seconds(86_400),
            "MIDNIGHT" => Ok(Rotation::Midnight(None)),
            day if day.len() == 2 && day.starts_with('W') => match day.as_bytes()[1] {
                digit @ b'0'..=b'6' => Ok(Rotation::Midnight(Some(digit - b'0'))),
                _ => Err(format!("{when:?}: a day is W0 (Monday) to W6")),
            },
            _ => Err(format!("{when:?} is none of S, M, H, D, W0 to W6, MIDNIGHT")),
        }
    }

    fn after(self, now: DateTime<Local>) -> Option<DateTime<Local>> {
        match self {
            Rotation::Size(_) => None,
            Rotation::Seconds(seconds) => Some(now + Duration::seconds(i64::from(seconds))),
            Rotation::Midnight(day) => {
                let ahead = day.map_or(1, |day| {
                    let today = now.weekday().num_days_from_monday() as u8;
                    u64::from((day + 7 - today) % 7) + 1
                });
                let date = now.date_naive().checked_add_days(Days::new(ahead))?;
                let midnight = date.and_hms_opt(0, 0, 0)?;
                Local.from_local_datetime(&midnight).earliest()
            }
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Rotation::Seconds(seconds) if seconds < 60 => "%Y-%m-%d_%H-%M-%S",
            Rotation::Seconds(seconds) if seconds < 3600 => "%Y-%m-%d_%H-%M",
            Rotation::Seconds(seconds) if seconds < 86_400 => "%Y-%m-%d_%H",
            _ => "%Y-%m-%d",
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: Option<File>,
    /// When it moves away, and how many old ones are kept.
    rotation: Option<(Rotation, usize)>,
    len: u64,
    began: DateTime<Local>,
    ends: Option<DateTime<Local>>,
}

impl LogFile {
    /// Opens the file; with `delay` not before something is written.
    pub fn open(
        path: &Path,
        rotation: Option<(Rotation, usize)>,
        delay: bool,
    ) -> io::Result<LogFile> {
        let began = Local::now();
        let ends = rotation.and_then(|(rotation, _)| rotation.after(began));
        let (path, file, len) = (path.to_owned(), None, 0);
        let mut log = LogFile { path, file, rotation, len, began, ends };
        if !delay {
            log.reopen()?;
        }
        Ok(log)
    }

    /// Opens it again; after an error it is written to as before.
    pub fn reopen(&mut self) -> io::Result<()> {
        let file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        self.len = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a line.
    pub fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.is_due(Local::now(), line.len() as u64) {
            self.rotate()?;
        }
        if self.file.is_none() {
            self.reopen()?;
        }
        if let Some(file) = &mut self.file {
            file.write_all(line)?;
            self.len += line.len() as u64;
        }
        Ok(())
    }

    fn is_due(&self, now: DateTime<Local>, more: u64) -> bool {
        match self.rotation {
            Some((Rotation::Size(most), _)) => self.len > 0 && self.len + more >= most,
            Some(_) => self.ends.is_some_and(|ends| now >= ends),
            None => false,
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        let Some((rotation, keep)) = self.rotation else { return Ok(()) };
        let old = |suffix: &dyn std::fmt::Display| {
            PathBuf::from(format!("{}.{suffix}", self.path.display()))
        };
        match rotation {
            Rotation::Size(_) => {
                for number in (1..keep).rev() {
                    move_if_there(&old(&number), &old(&(number + 1)))?;
                }
                move_if_there(&self.path, &old(&1))?;
            }
            _ => {
                move_if_there(&self.path, &old(&self.began.format(rotation.suffix())))?;
                self.remove_oldest(keep)?;
            }
        }
        self.began = Local::now();
        self.ends = rotation.after(self.began);
        self.reopen()
    }

    /// Of the files that are named after a time.
    fn remove_oldest(&self, keep: usize) -> io::Result<()> {
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned() + ".";
        let mut old: Vec<PathBuf> = fs::read_dir(dir.unwrap_or(Path::new(".")))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let other = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                other.strip_prefix(&name).is_some_and(|suffix| {
                    suffix.len() >= 10
                        && suffix.chars().all(|c| c.is_ascii_digit() || "-_".contains(c))
                })
            })
            .collect();
        old.sort();
        let needless = old.len().saturating_sub(keep);
        old.iter().take(needless).try_for_each(fs::remove_file)
    }
}

fn move_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_size_the_newest_old_file_is_number_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("zeo.log");
        let mut log = LogFile::open(&path, Some((Rotation::Size(10), 2)), false).unwrap();
        for line in ["first\n", "second\n", "third\n", "4th\n"] {
            log.write(line.as_bytes()).unwrap();
        }
        let read = |suffix: &str| fs::read_to_string(format!("{}{suffix}", path.display()));
        assert_eq!(read("").unwrap(), "4th\n");
        assert_eq!(read(".1").unwrap(), "third\n");
        assert_eq!(read(".2").unwrap(), "second\n");
        assert!(read(".3").is_err());
    }

    #[test]
    fn by_time_old_files_are_named_after_their_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("zeo.log");
        let mut log = LogFile::open(&path, Some((Rotation::Seconds(86_400), 2)), false).unwrap();
        for day in 1..=4 {
            log.began = Local.with_ymd_and_hms(2026, 11, day, 0, 0, 0).unwrap();
            log.ends = Some(Local::now());
            log.write(format!("day {day}\n").as_bytes()).unwrap();
        }
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["zeo.log", "zeo.log.2026-11-03", "zeo.log.2026-11-04"]);
    }

    #[test]
    fn a_delayed_file_is_made_by_its_first_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("zeo.log");
        let mut log = LogFile::open(&path, None, true).unwrap();
        assert!(!path.exists());
        log.write(b"line\n").unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        log.reopen().unwrap();
        log.write(b"line\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"line\n");
    }

    #[test]
    fn days_of_the_week_and_midnight() {
        // A Thursday.
        let now = Local.with_ymd_and_hms(2026, 11, 5, 3, 4, 5).unwrap();
        let next = |when| Rotation::at(when, 1).unwrap().after(now).unwrap().date_naive();
        let day = |day| chrono::NaiveDate::from_ymd_opt(2026, 11, day).unwrap();
        assert_eq!(next("midnight"), day(6));
        assert_eq!(next("W3"), day(6), "when Thursday is over");
        assert_eq!(next("W2"), day(12));
        assert_eq!(Rotation::at("H", 2), Ok(Rotation::Seconds(7200)));
        assert!(Rotation::at("W7", 1).is_err() && Rotation::at("often", 1).is_err());
    }
}
