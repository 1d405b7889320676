//! Reads the keys of a section, each at most once, and says where a mistake stands.

use std::path::PathBuf;

use crate::ssl::SslSection;
use crate::zconfig::{ConfigError, Section};

pub(super) struct Checker {
    pub(super) file: String,
    pub(super) notes: Vec<String>,
}

/// Takes the keys of one section, each at most once.
pub(super) struct SectionReader<'a> {
    pub(super) file: &'a str,
    pub(super) section: &'a Section,
}

impl<'a> SectionReader<'a> {
    pub(super) fn error(&self, line: usize, message: impl Into<String>) -> ConfigError {
        ConfigError { file: self.file.into(), line, message: message.into() }
    }

    pub(super) fn sections(&mut self, allowed: &[&str]) -> Result<(), ConfigError> {
        for inner in &self.section.sections {
            if !allowed.contains(&inner.kind.as_str()) {
                let hint = match inner.kind.as_str() {
                    "mappingstorage" | "demostorage" => {
                        "its data would be gone at a restart; use <filestorage>".into()
                    }
                    "zlibstorage" => {
                        "clients compress records, with <zlibstorage> in their configuration; \
                         here stands <serverzlibstorage>"
                            .into()
                    }
                    _ => allowed_text("sections", allowed),
                };
                return Err(self
                    .error(inner.line, format!("<{}> is not possible here: {hint}", inner.kind)));
            }
        }
        Ok(())
    }

    pub(super) fn text(&self, key: &str) -> Option<(&'a str, usize)> {
        let found = self.section.keys.iter().find(|(k, _, _)| k == key)?;
        Some((found.1.as_str(), found.2))
    }

    pub(super) fn get<T>(
        &self,
        key: &str,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        self.text(key)
            .map(|(text, line)| read(text).map_err(|m| self.error(line, format!("{key}: {m}"))))
            .transpose()
    }

    /// The values of a key that may stand several times.
    pub(super) fn all<T>(
        &self,
        key: &str,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Vec<T>, ConfigError> {
        let lines = self.section.keys.iter().filter(|(k, _, _)| k == key);
        let read = |(_, text, line): &(String, String, usize)| {
            read(text).map_err(|m| self.error(*line, format!("{key}: {m}")))
        };
        lines.map(read).collect()
    }

    pub(super) fn required<T>(
        &self,
        key: &str,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        let missing =
            || self.error(self.section.line, format!("<{}> has no {key:?}", self.section.kind));
        self.get(key, read)?.ok_or_else(missing)
    }

    pub(super) fn boolean(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        let read = |text: &str| match text.to_lowercase().as_str() {
            "true" | "yes" | "on" => Ok(true),
            "false" | "no" | "off" => Ok(false),
            _ => Err(format!("{text:?} is neither true nor false")),
        };
        Ok(self.get(key, read)?.unwrap_or(default))
    }
}

pub(super) fn allowed_text(what: &str, allowed: &[&str]) -> String {
    format!("allowed {what} are {}", allowed.join(", "))
}

pub(super) fn path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("no path is given".into()) } else { Ok(text.into()) }
}

/// A number with KB, MB or GB behind it, or without.
pub(super) fn byte_size(text: &str) -> Result<u64, String> {
    let upper = text.to_uppercase();
    let (digits, unit) = match upper.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => (&upper[..at], upper[at..].trim()),
        None => (upper.as_str(), ""),
    };
    let shift = match unit {
        "" => Some(0),
        "KB" => Some(10),
        "MB" => Some(20),
        "GB" => Some(30),
        _ => None,
    };
    let size = shift.and_then(|shift| digits.parse::<u64>().ok()?.checked_mul(1 << shift));
    size.ok_or_else(|| format!("{text:?} is not a size, such as 256MB"))
}

/// A name: of a node, a group, a cluster.
pub fn word(text: &str) -> Result<String, String> {
    let fine = !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "-_.".contains(c));
    if fine {
        Ok(text.into())
    } else {
        Err(format!("{text:?} is not a name (letters, digits, -_.)"))
    }
}

pub(super) fn level(text: &str) -> Result<tracing::Level, String> {
    match text.to_lowercase().as_str() {
        "critical" | "fatal" | "error" | "50" | "40" => Ok(tracing::Level::ERROR),
        "warn" | "warning" | "30" => Ok(tracing::Level::WARN),
        "info" | "blather" | "20" | "15" => Ok(tracing::Level::INFO),
        "debug" | "10" => Ok(tracing::Level::DEBUG),
        "trace" | "all" | "notset" | "5" | "1" | "0" => Ok(tracing::Level::TRACE),
        _ => Err(format!("{text:?} is not a level: critical, error, warn, info, debug, trace")),
    }
}

impl Checker {
    pub(super) fn error(&self, line: usize, message: impl Into<String>) -> ConfigError {
        ConfigError { file: self.file.clone(), line, message: message.into() }
    }

    pub(super) fn reader<'a>(
        &'a self,
        section: &'a Section,
        allowed: &[&str],
    ) -> Result<SectionReader<'a>, ConfigError> {
        let kind = if section.kind.is_empty() {
            "the top of the file".into()
        } else {
            format!("<{}>", section.kind)
        };
        for (nth, (key, _, line)) in section.keys.iter().enumerate() {
            if !allowed.contains(&key.as_str()) {
                let hint = if allowed.is_empty() {
                    "only sections may stand there".into()
                } else {
                    allowed_text("keys", allowed)
                };
                return Err(self.error(*line, format!("unknown key {key:?} in {kind}; {hint}")));
            }
            let repeated = section.keys[..nth].iter().any(|(other, _, _)| other == key);
            let several = [("standby", "member"), ("zeo", "address")];
            if repeated && !several.contains(&(section.kind.as_str(), key.as_str())) {
                return Err(self.error(*line, format!("{key:?} stands twice in {kind}")));
            }
        }
        Ok(SectionReader { file: &self.file, section })
    }

    pub(super) fn note(&mut self, section: &Section, keys: &[&str]) {
        for (key, _, line) in &section.keys {
            if keys.contains(&key.as_str()) {
                self.notes.push(format!(
                    "{}:{line}: {key:?} has no meaning for Standby and is ignored",
                    self.file
                ));
            }
        }
    }

    pub(super) fn ssl(&self, section: &Section) -> Result<SslSection, ConfigError> {
        let mut reader =
            self.reader(section, &["certificate", "key", "password-function", "authenticate"])?;
        reader.sections(&[])?;
        let function = |text: &str| match text.rsplit_once('.') {
            Some((module, name)) if !module.is_empty() && !name.is_empty() => Ok(text.to_owned()),
            _ => Err(format!("{text:?} is not the dotted name of a Python function")),
        };
        let password_function = reader.get("password-function", function)?;
        let certificate = reader.required("certificate", path)?;
        let authenticate = reader.required("authenticate", |text| match text {
            "DYNAMIC" | "SIGNED" => {
                Err("name a file with the clients' certificates or with those \
                                         of their authority, or a folder of such files"
                    .into())
            }
            text => path(text),
        })?;
        let key = reader.get("key", path)?.unwrap_or_else(|| certificate.clone());
        Ok(SslSection { certificate, key, password_function, authenticate })
    }
}
