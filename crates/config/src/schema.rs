//! What the sections and keys mean. Unknown ones are errors that name the allowed ones.
//!
//! Source: `ZEO/schema.xml`, `ZEO/server.xml` and `ZODB/component.xml`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use standby_logging::file::Rotation;
use standby_logging::format::Format;
use standby_logging::{EventLog, LogFileSection};
use standby_zeo::{Limits, Retention};
use tracing::warn;

use crate::address::{Address, ZeoAddress};
use crate::reader::{Checker, byte_size, level, path};
use crate::ssl::SslSection;
use crate::standby::{DEFAULT_FUTURE_TIDS, Standby};
use crate::zconfig::{ConfigError, Section, parse};

/// `<zeo>`
#[derive(Debug, Clone, Default)]
pub struct ZeoSection {
    /// Where read-write clients connect; none on a witness.
    pub addresses: Vec<ZeoAddress>,
    /// TLS for clients.
    pub ssl: Option<SslSection>,
    /// No client may write.
    pub read_only: bool,
    /// How long a transaction may hold its locks.
    pub transaction_timeout: Option<Duration>,
    /// The file that gets the process id.
    pub pid_file: Option<PathBuf>,
    /// Announce msgpack.
    pub msgpack: bool,
    /// What one node alone remembers for clients that come back: `invalidation-queue-size` and
    /// `invalidation-age`.
    pub retention: Retention,
}

/// `<filestorage NAME>`
#[derive(Debug, Clone)]
pub struct StorageSection {
    /// The storage's name for clients.
    pub name: String,
    /// The data file: what a symbolic link at `named` pointed at when the node started.
    pub path: PathBuf,
    /// The data file as the file names it. Beside it are, as for Python, its lock and, of a node
    /// alone, the state.
    pub named: PathBuf,
    /// The data file must not exist yet.
    pub create: bool,
    /// No client may write to it.
    pub read_only: bool,
    /// Nor does this node.
    pub protected: bool,
    /// Bytes of the data file beyond which nothing is stored.
    pub quota: Option<u64>,
    /// A pack removes what cannot be reached from the root.
    pub pack_gc: bool,
    /// A pack keeps the old file as `PATH.old`.
    pub pack_keep_old: bool,
    /// The directory of the blobs.
    pub blob_dir: Option<PathBuf>,
    /// A pack keeps the blobs of before as `BLOBDIR.old`, as `blob-dir` in a `<filestorage>` asks
    /// for.
    pub blob_keep_old: bool,
}

/// A whole configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file.
    pub file: PathBuf,
    /// `<zeo>`
    pub zeo: ZeoSection,
    /// The storages, one at least.
    pub storages: Vec<StorageSection>,
    /// `<eventlog>`
    pub eventlog: Option<EventLog>,
    /// `<standby>`; without it the node is alone.
    pub standby: Option<Standby>,
    /// Options that have no effect here; logged at start.
    pub notes: Vec<String>,
}

impl Config {
    /// Reads a file.
    pub fn read(file: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(file).map_err(|error| ConfigError {
            file: file.display().to_string(),
            line: 1,
            message: format!("cannot read the configuration: {error}"),
        })?;
        Config::parse(file, &text)
    }

    /// Reads a file's text.
    pub fn parse(file: &Path, text: &str) -> Result<Config, ConfigError> {
        let top = parse(file, text)?;
        let mut checker = Checker { file: file.display().to_string(), notes: Vec::new() };
        let storage_kinds = ["filestorage", "blobstorage", "serverzlibstorage"];
        let allowed = [&["zeo"], &storage_kinds[..], &["eventlog", "standby", "runner"]].concat();
        let mut top_reader = checker.reader(&top, &[])?;
        top_reader.sections(&allowed)?;
        let find = |kind: &str| top.sections.iter().find(|s| s.kind == kind);
        let standby = find("standby").map(|s| checker.standby(s)).transpose()?;
        let witness = standby.as_ref().is_some_and(|s| s.witness);
        let zeo = match find("zeo") {
            Some(section) if witness => return Err(checker.error(section.line, WITNESS_SERVES)),
            Some(section) => Some(checker.zeo(section)?),
            None if witness => None,
            None => return Err(checker.error(1, "there is no <zeo> section with an address")),
        };
        let mut storages: Vec<StorageSection> = Vec::new();
        for section in top.sections.iter().filter(|s| storage_kinds.contains(&s.kind.as_str())) {
            if witness {
                return Err(checker.error(section.line, WITNESS_SERVES));
            }
            let storage = match section.kind.as_str() {
                "blobstorage" => checker.blob_storage(section)?,
                "serverzlibstorage" => checker.zlib_storage(section)?,
                _ => checker.storage(section)?,
            };
            // A member of a cluster takes what the others commit.
            let storage =
                StorageSection { protected: storage.read_only && standby.is_none(), ..storage };
            if storages.iter().any(|other| other.name == storage.name) {
                let message = format!("there are two storages named {:?}", storage.name);
                return Err(checker.error(section.line, message));
            }
            storages.push(storage);
        }
        if storages.is_empty() && !witness {
            return Err(checker.error(1, "there is no <filestorage> section"));
        }
        let eventlog = find("eventlog").map(|s| checker.eventlog(s)).transpose()?;
        let zeo = zeo.unwrap_or_default();
        Ok(Config { file: file.into(), zeo, storages, eventlog, standby, notes: checker.notes })
    }

    /// How far a tid that a client brings may be ahead of the primary's clock.
    pub fn future_tids(&self) -> Duration {
        self.standby.as_ref().map_or(DEFAULT_FUTURE_TIDS, |standby| standby.future_tids)
    }

    /// How large a transaction may be.
    pub fn limits(&self) -> Limits {
        self.standby.as_ref().map_or_else(Limits::default, |standby| standby.limits)
    }

    /// Tells of what every user of this machine can read and should not.
    pub fn warn_of_exposed_files(&self) {
        let standby = self.standby.as_ref();
        let ssl = self.zeo.ssl.iter().chain(standby.and_then(|s| s.peer_ssl.as_ref()));
        let secret = standby.and_then(|s| s.secret_file.clone()).into_iter();
        let secrets = ssl.map(|ssl| ssl.key.clone()).chain(secret);
        let secrets = secrets.map(|path| (path, "it is secret"));
        let state = (self.state_dir(), "it holds what is in the data files");
        for (path, why) in secrets.chain([state]) {
            if fs::metadata(&path).is_ok_and(|found| found.permissions().mode() & 0o007 != 0) {
                let path = path.display();
                warn!("every user of this machine can read {path}, and {why}: chmod o= {path}");
            }
        }
    }

    /// `create true` asks for a new file: one that is there is not taken, whoever made it. To be
    /// asked once for a process, before its node starts.
    pub fn check_create(&self) -> anyhow::Result<()> {
        for section in self.storages.iter().filter(|section| section.create) {
            let path = section.path.display();
            if section.path.try_exists().with_context(|| format!("cannot look for {path}"))? {
                bail!(
                    "{path} exists, but \"create true\" asks for a new file; remove the line or \
                    the file"
                );
            }
        }
        Ok(())
    }

    /// Follows symbolic links to data files, once and for all: a pack puts its file in the place of
    /// what the link points at, not of the link.
    pub fn follow_links(&mut self) -> anyhow::Result<()> {
        for section in &mut self.storages {
            let Ok(target) = fs::read_link(&section.named) else { continue };
            section.path = fs::canonicalize(&section.named).with_context(|| {
                format!(
                    "{} is a symbolic link to {}, which cannot be found (is its disk mounted?)",
                    section.named.display(),
                    target.display()
                )
            })?;
        }
        Ok(())
    }

    /// True if this node writes nothing at all.
    pub fn is_read_only(&self) -> bool {
        self.standby.is_none() && self.storages.iter().all(|storage| storage.protected)
    }

    /// True if this node never writes to a storage.
    pub fn protects(&self, name: &str) -> bool {
        self.storages.iter().any(|storage| storage.name == name && storage.protected)
    }

    /// Log, checkpoints, index, identity.
    pub fn state_dir(&self) -> PathBuf {
        if let Some(standby) = &self.standby {
            return standby.state_dir.clone();
        }
        let written = self.storages.iter().find(|storage| !storage.protected);
        let beside = written.unwrap_or(&self.storages[0]);
        PathBuf::from(format!("{}.standby", beside.named.display()))
    }
}

/// Seconds after which a transaction that has voted and does not finish loses its locks, unless the
/// configuration says otherwise; 0 there means never.
const DEFAULT_TRANSACTION_TIMEOUT: f64 = 300.0;
const WITNESS_SERVES: &str =
    "a witness holds no data and serves no clients: <zeo> and storages do not belong in its file";

impl Checker {
    fn zeo(&mut self, section: &Section) -> Result<ZeoSection, ConfigError> {
        let mut reader = self.reader(
            section,
            &[
                "address",
                "read-only",
                "invalidation-queue-size",
                "invalidation-age",
                "transaction-timeout",
                "pid-filename",
                "client-conflict-resolution",
                "msgpack",
            ],
        )?;
        reader.sections(&["ssl"])?;
        let number = |text: &str| {
            text.parse::<f64>()
                .ok()
                .filter(|n| n.is_finite() && *n >= 0.0)
                .ok_or_else(|| format!("{text:?} is not a number"))
        };
        let address = |text: &str| {
            if text.contains('/') {
                return Ok(ZeoAddress::Unix(text.into()));
            }
            Address::parse(text).map(ZeoAddress::Tcp)
        };
        reader.required("address", address)?;
        let addresses = reader.all("address", address)?;
        let twice = |nth: usize| addresses[..nth].contains(&addresses[nth]);
        if let Some(nth) = (0..addresses.len()).find(|nth| twice(*nth)) {
            let message = format!("address: {} stands there twice", addresses[nth]);
            return Err(reader.error(section.line, message));
        }
        let queue = reader.get("invalidation-queue-size", number)?.map(|n| n as usize);
        let age = reader.get("invalidation-age", number)?.unwrap_or(0.0);
        let age = Duration::try_from_secs_f64(age).unwrap_or(Duration::MAX);
        let asked = queue.is_some() || !age.is_zero();
        let retention = Retention { transactions: asked.then(|| queue.unwrap_or(100)), age };
        reader.boolean("client-conflict-resolution", true)?;
        let timeout = reader.get("transaction-timeout", number)?;
        let timeout = timeout.unwrap_or(DEFAULT_TRANSACTION_TIMEOUT);
        let timeout = Some(timeout).filter(|seconds| *seconds > 0.0);
        let ssl = section.sections.first().map(|inner| self.ssl(inner)).transpose()?;
        let zeo = ZeoSection {
            addresses,
            ssl,
            read_only: reader.boolean("read-only", false)?,
            transaction_timeout: timeout.map(Duration::from_secs_f64),
            pid_file: reader.get("pid-filename", path)?,
            msgpack: reader.boolean("msgpack", false)?,
            retention,
        };
        self.note(section, &["client-conflict-resolution"]);
        Ok(zeo)
    }

    fn storage(&mut self, section: &Section) -> Result<StorageSection, ConfigError> {
        let keys = [
            "path",
            "blob-dir",
            "create",
            "read-only",
            "quota",
            "packer",
            "pack-gc",
            "pack-keep-old",
        ];
        let mut reader = self.reader(section, &keys)?;
        reader.sections(&[])?;
        let (blob_dir, pack_keep_old) =
            (reader.get("blob-dir", path)?, reader.boolean("pack-keep-old", true)?);
        let named = reader.required("path", path)?;
        let storage = StorageSection {
            name: section.name.clone().unwrap_or_else(|| "1".into()),
            path: named.clone(),
            named,
            create: reader.boolean("create", false)?,
            read_only: reader.boolean("read-only", false)?,
            protected: false,
            quota: reader.get("quota", byte_size)?,
            pack_gc: reader.boolean("pack-gc", true)?,
            pack_keep_old,
            blob_keep_old: pack_keep_old,
            blob_dir,
        };
        self.note(section, &["packer"]);
        Ok(storage)
    }

    /// `<blobstorage NAME>`: a directory of blobs around a `<filestorage>`.
    fn blob_storage(&mut self, section: &Section) -> Result<StorageSection, ConfigError> {
        let mut reader = self.reader(section, &["blob-dir"])?;
        reader.sections(&["filestorage"])?;
        let blob_dir = reader.required("blob-dir", path)?;
        let [inner] = &section.sections[..] else {
            return Err(reader.error(section.line, "<blobstorage> needs one <filestorage> in it"));
        };
        let storage = self.storage(inner)?;
        if storage.blob_dir.is_some() {
            let message = "\"blob-dir\" stands in <blobstorage> and in its <filestorage>";
            return Err(self.error(inner.line, message));
        }
        let name = section.name.clone().unwrap_or_else(|| "1".into());
        Ok(StorageSection { name, blob_dir: Some(blob_dir), blob_keep_old: false, ..storage })
    }

    /// `<serverzlibstorage NAME>`: clients write records with `zc.zlibstorage`. A pack reads those
    /// by itself, so this only names the storage.
    fn zlib_storage(&mut self, section: &Section) -> Result<StorageSection, ConfigError> {
        let mut reader = self.reader(section, &["compress"])?;
        reader.sections(&["filestorage", "blobstorage"])?;
        let [inner] = &section.sections[..] else {
            let message = "<serverzlibstorage> needs one <filestorage> or <blobstorage> in it";
            return Err(reader.error(section.line, message));
        };
        let storage = match inner.kind.as_str() {
            "blobstorage" => self.blob_storage(inner)?,
            _ => self.storage(inner)?,
        };
        self.note(section, &["compress"]);
        Ok(StorageSection { name: section.name.clone().unwrap_or_else(|| "1".into()), ..storage })
    }

    fn eventlog(&mut self, section: &Section) -> Result<EventLog, ConfigError> {
        let mut reader = self.reader(section, &["level"])?;
        let others = ["syslog", "win32-eventlog", "http-logger", "email-notifier"];
        reader.sections(&["logfile", others[0], others[1], others[2], others[3]])?;
        let level = reader.get("level", level)?.unwrap_or(tracing::Level::INFO);
        let mut files = Vec::new();
        for inner in &section.sections {
            if inner.kind == "logfile" {
                files.push(self.logfile(inner)?);
            } else {
                self.notes.push(format!(
                    "{}:{}: <{}> is ignored: Standby logs to files, and to its standard output and \
                    error",
                    self.file, inner.line, inner.kind
                ));
            }
        }
        Ok(EventLog { level, files })
    }

    fn logfile(&mut self, section: &Section) -> Result<LogFileSection, ConfigError> {
        let keys = [
            "path",
            "level",
            "format",
            "dateformat",
            "style",
            "max-size",
            "old-files",
            "when",
            "interval",
            "delay",
            "encoding",
            "formatter",
            "arbitrary-fields",
        ];
        let reader = self.reader(section, &keys)?;
        let path = reader.required("path", |text| Ok(text.to_owned()))?;
        let wrong = |message: &str| Err(reader.error(section.line, format!("{path}: {message}")));
        let count = |text: &str| text.parse().map_err(|_| format!("{text:?} is not a number"));
        let size = reader.get("max-size", byte_size)?.filter(|size| *size > 0);
        let old_files = reader.get("old-files", count)?.unwrap_or(0);
        let interval = reader.get("interval", count)?.unwrap_or(0);
        let when = |text: &str| match text {
            "" => Ok(None),
            text => Rotation::at(text, interval).map(Some),
        };
        let when = reader.get("when", when)?.flatten();
        let rotation = match (size, when) {
            (Some(_), Some(_)) => return wrong("\"max-size\" and \"when\" exclude each other"),
            (None, None) if old_files > 0 || interval > 0 => {
                return wrong("\"max-size\" or \"when\" must say when a new file begins");
            }
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) if old_files == 0 => {
                return wrong("\"old-files\" must say how many old files are kept");
            }
            (Some(size), None) => Some((Rotation::Size(size), old_files as usize)),
            (None, Some(when)) => Some((when, old_files as usize)),
        };
        let delay = reader.boolean("delay", false)?;
        if matches!(path.as_str(), "STDOUT" | "STDERR") && (rotation.is_some() || delay) {
            return wrong("only files can be moved away, or be made later");
        }
        let date = reader.text("dateformat").map(|(text, _)| text);
        let read = |text: &str| Format::parse(text, date);
        let least = reader.get("level", level)?;
        let classic = reader.text("style").is_none_or(|(style, _)| style == "classic");
        let format = if classic { reader.get("format", read)? } else { None };
        self.note(section, &["formatter", "arbitrary-fields", "encoding"]);
        if !classic {
            self.note(section, &["style", "format"]);
        }
        // Python's NOTSET lets everything through that the <eventlog> does.
        let level = least.filter(|level| *level != tracing::Level::TRACE);
        Ok(LogFileSection { path, level, format, rotation, delay })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: &str =
        "<zeo>\naddress localhost:8100\n</zeo>\n<filestorage>\npath /srv/Data.fs\n</filestorage>\n";

    fn read(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("zeo.conf"), text).map_err(|e| e.to_string())
    }

    fn cluster(standby: &str) -> String {
        format!("{ALONE}<standby>\n{standby}\n</standby>\n")
    }

    #[test]
    fn a_plain_zeo_conf_is_one_node_alone() {
        let config = read(ALONE).unwrap();
        assert!(config.standby.is_none());
        assert_eq!(config.storages[0].name, "1");
        assert_eq!(config.state_dir(), Path::new("/srv/Data.fs.standby"));
        assert_eq!(config.zeo.addresses[0].to_string(), "localhost:8100");
    }

    #[test]
    fn a_node_listens_at_several_addresses() {
        let config = read(&ALONE.replace("<zeo>", "<zeo>\naddress /run/zeo.sock")).unwrap();
        let addresses: Vec<String> = config.zeo.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["/run/zeo.sock", "localhost:8100"]);
    }

    #[test]
    fn a_cluster() {
        let config = read(&cluster(
            "cluster c\nnode n2\ngroup g\nstate-dir /s\npeer-address 127.0.0.1:2\n\
             member n1 127.0.0.1:1 g\nmember n2 127.0.0.1:2 g",
        ))
        .unwrap();
        let standby = config.standby.unwrap();
        assert_eq!(standby.members.len(), 2);
        assert_eq!(standby.admin_address.to_string(), "127.0.0.1:8103");
    }

    #[test]
    fn mistakes_are_explained() {
        let cases = [
            (
                ALONE.replace("address", "adress"),
                "zeo.conf:2: unknown key \"adress\" in <zeo>; allowed keys are address, ",
            ),
            (
                ALONE.replace("8100", "http"),
                "zeo.conf:2: address: \"localhost:http\" is not an address",
            ),
            (
                ALONE.replace("<zeo>", "<zeo>\naddress localhost:8100"),
                "zeo.conf:1: address: localhost:8100 stands there twice",
            ),
            (
                ALONE.replace("filestorage", "mappingstorage"),
                "zeo.conf:4: <mappingstorage> is not possible here: its data would be gone at a \
                restart",
            ),
            (ALONE.replace("path", "blob-dir"), "zeo.conf:4: <filestorage> has no \"path\""),
            (
                ALONE.replace("filestorage", "blobstorage"),
                "zeo.conf:5: unknown key \"path\" in <blobstorage>",
            ),
            (
                format!("{ALONE}<blobstorage b>\nblob-dir /b\n</blobstorage>"),
                "zeo.conf:7: <blobstorage> needs one <filestorage> in it",
            ),
            (
                ALONE.replace("filestorage", "zlibstorage"),
                "zeo.conf:4: <zlibstorage> is not possible here: clients compress records",
            ),
            (
                format!("{ALONE}<serverzlibstorage z>\n</serverzlibstorage>"),
                "zeo.conf:7: <serverzlibstorage> needs one",
            ),
            (
                format!("{ALONE}path x"),
                "zeo.conf:7: unknown key \"path\" in the top of the file; only sections",
            ),
            (
                ALONE.replace("<zeo>", "<zeo>\nmsgpack maybe"),
                "zeo.conf:2: msgpack: \"maybe\" is neither true nor false",
            ),
            (
                format!("{ALONE}<filestorage 1>\npath x\n</filestorage>"),
                "zeo.conf:7: there are two storages named \"1\"",
            ),
            (
                cluster(
                    "cluster c\nnode n1\ngroup g\nstate-dir /s\npeer-address 10.0.0.1:1\nmember n1 \
                    10.0.0.1:1 g",
                ),
                "zeo.conf:7: \"secret-file\" is needed",
            ),
            (
                cluster("node n1\ngroup g\npeer-address 127.0.0.1:1"),
                "zeo.conf:7: no \"member\" line names this node, n1: member n1 127.0.0.1:1 g",
            ),
        ];
        for (text, expected) in cases {
            let error = read(&text).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn blobs_have_two_ways() {
        let inside = read(&ALONE.replace("path", "blob-dir /srv/blobs\npath")).unwrap();
        let around = ALONE
            .replace("<filestorage>", "<blobstorage main>\nblob-dir /srv/blobs\n<filestorage>")
            .replace("</filestorage>", "</filestorage>\n</blobstorage>");
        let around = read(&around).unwrap();
        for (config, name, keep_old) in [(inside, "1", true), (around, "main", false)] {
            let storage = &config.storages[0];
            assert_eq!(storage.name, name);
            assert_eq!(storage.blob_dir.as_deref(), Some(Path::new("/srv/blobs")));
            assert_eq!(storage.blob_keep_old, keep_old);
        }
    }

    #[test]
    fn records_that_clients_compress() {
        let around = ALONE
            .replace("<filestorage>", "<serverzlibstorage main>\ncompress true\n<filestorage>")
            .replace("</filestorage>", "</filestorage>\n</serverzlibstorage>");
        let config = read(&format!("%import zc.zlibstorage\n{around}")).unwrap();
        assert_eq!(config.storages[0].name, "main");
        assert_eq!(config.storages[0].path, Path::new("/srv/Data.fs"));
    }

    #[test]
    fn options_without_meaning_are_noted() {
        let config =
            read(&ALONE.replace("<zeo>", "<zeo>\nclient-conflict-resolution true")).unwrap();
        assert_eq!(config.notes.len(), 1);
        assert!(config.notes[0].contains("zeo.conf:2: \"client-conflict-resolution\""));
    }
}
