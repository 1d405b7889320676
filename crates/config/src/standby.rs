//! `<standby>`

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use standby_zeo::Limits;

use crate::address::Address;
use crate::reader::{Checker, SectionReader, byte_size, path, word};
use crate::ssl::SslSection;
use crate::zconfig::{ConfigError, Section};

/// A day: copies bring old tids, and clocks differ.
pub const DEFAULT_FUTURE_TIDS: Duration = Duration::from_secs(86_400);
/// A thousand years.
const MOST_FUTURE_TIDS: Duration = Duration::from_secs(31_557_600_000);

/// `member NAME HOST:PORT GROUP [witness]`
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct MemberLine {
    pub name: String,
    /// Its peer address.
    pub address: Address,
    pub group: String,
    /// It votes, but holds no data.
    pub witness: bool,
}

/// The secrets of a file, with an empty line between two: this node proves that it knows the first,
/// and takes a proof of any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secrets(Vec<Vec<u8>>);

impl Secrets {
    /// Between loopback addresses, and with certificates, none is needed.
    pub fn none() -> Secrets {
        Secrets(vec![Vec::new()])
    }

    /// Reads them, or says what is wrong with the file.
    pub fn read(file: &Path) -> Result<Secrets, String> {
        let bytes = std::fs::read(file)
            .map_err(|error| format!("cannot read {}: {error}", file.display()))?;
        let lines: Vec<&[u8]> = bytes.split(|byte| *byte == b'\n').collect();
        let blocks = lines.split(|line| line.trim_ascii().is_empty());
        let blocks = blocks.map(|block| block.join(&b'\n').trim_ascii().to_vec());
        let secrets: Vec<_> = blocks.filter(|secret| !secret.is_empty()).collect();
        if secrets.is_empty() || secrets.iter().any(|secret| secret.len() < 16) {
            return Err(format!(
                "{} must hold a secret of at least 16 characters, or several with an empty line \
                between two",
                file.display()
            ));
        }
        Ok(Secrets(secrets))
    }

    /// True if there is none.
    pub fn is_none(&self) -> bool {
        self.own().is_empty()
    }

    /// The one that this node proves to know.
    pub fn own(&self) -> &[u8] {
        &self.0[0]
    }

    /// All that count.
    pub fn all(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|secret| &secret[..])
    }
}

/// How patient the nodes are with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Within one place: a dead primary is replaced in about a second.
    Lan,
    /// Between places: five times as patient.
    Wan,
    /// As patient as the network between the nodes needs: within one place as `Lan`.
    Auto,
}

impl Profile {
    /// The length of a tick; a heartbeat is two, an election 16 to 32.
    pub fn tick(self) -> Duration {
        Duration::from_millis(match self {
            Profile::Lan | Profile::Auto => 50,
            Profile::Wan => 250,
        })
    }

    /// For so many ticks nodes wait for each other at most; zero if that does not depend on the
    /// network.
    pub fn most_patience_ticks(self) -> usize {
        match self {
            Profile::Lan | Profile::Wan => 0,
            Profile::Auto => 60,
        }
    }
}

/// `<standby>`
#[derive(Debug, Clone)]
pub struct Standby {
    /// The cluster's name.
    pub cluster: String,
    /// This node's name.
    pub node: String,
    /// The group it belongs to.
    pub group: String,
    /// Log, checkpoints, index, identity.
    pub state_dir: PathBuf,
    /// Where read-only clients connect.
    pub read_only_address: Option<Address>,
    /// Where the other nodes connect.
    pub peer_address: Address,
    /// Where administrators connect.
    pub admin_address: Address,
    /// The first members; the first of them bootstraps the cluster. Empty if the node joins one.
    pub members: Vec<MemberLine>,
    /// Members of the cluster that the node joins.
    pub join: Vec<Address>,
    /// What proves that it may.
    pub join_token: String,
    /// It votes, but holds no data.
    pub witness: bool,
    /// Bytes per second that a catch-up may take; `None` for as many as it can.
    pub catch_up_rate: Option<u64>,
    /// Bytes that are left free on the disks.
    pub reserve: u64,
    /// Bytes per second of the data files that are compared with their checksums; `None` for none.
    pub scrub_rate: Option<u64>,
    /// What a node that was away for long gets.
    pub recovery: Recovery,
    /// What a shell runs when this node becomes primary.
    pub on_primary: Option<String>,
    /// What a shell runs when this node is not primary: at its start, and when it stops serving.
    pub on_replica: Option<String>,
    /// How old a replica's data may be for its readers; `None` if that does not matter.
    pub max_staleness: Option<Duration>,
    /// How far a tid that a client brings may be ahead of the primary's clock.
    pub future_tids: Duration,
    /// Bytes of memory that all sessions of clients may hold together, if not what the machine's
    /// memory says.
    pub client_memory: Option<u64>,
    /// How large a transaction may be.
    pub limits: Limits,
    /// TLS between nodes.
    pub peer_ssl: Option<SslSection>,
    /// What the nodes prove to each other that they know.
    pub secrets: Secrets,
    /// Where they are read from, if they are.
    pub secret_file: Option<PathBuf>,
    /// How patient they are.
    pub profile: Profile,
    /// Bytes of the log that are kept for nodes that are behind; beyond it they catch up from the
    /// data file.
    pub log_tail: u64,
}

impl Standby {
    /// The peer addresses of other nodes, and perhaps this one's, that the configuration names.
    pub fn named_addresses(&self) -> impl Iterator<Item = &Address> {
        self.members.iter().map(|member| &member.address).chain(&self.join)
    }
}

/// A node that joins needs no more than an invitation.
fn check_join(
    reader: &SectionReader,
    members: &[MemberLine],
    join_token: Option<&str>,
) -> Result<(), ConfigError> {
    let message = if !members.is_empty() {
        "\"member\" lines bootstrap a cluster, \"join\" names a member of one that is there: one of \
         the two"
    } else if join_token.is_none() {
        "\"join\" needs a \"join-token\": standby node add NAME on a member prints it"
    } else {
        return Ok(());
    };
    Err(reader.error(reader.section.line, message))
}

/// The node's own line must say what the rest of its file says.
fn check_members(
    reader: &SectionReader,
    members: &[MemberLine],
    me: &MemberLine,
) -> Result<(), ConfigError> {
    let line = reader.section.line;
    let witness = if me.witness { " witness" } else { "" };
    let Some(mine) = members.iter().find(|m| m.name == me.name) else {
        let message = format!(
            "no \"member\" line names this node, {0}: member {0} {1} {2}{witness}",
            me.name, me.address, me.group
        );
        return Err(reader.error(line, message));
    };
    if mine.group != me.group {
        let message =
            format!("this node is of group {}, but its member line says {}", me.group, mine.group);
        return Err(reader.error(line, message));
    }
    if mine.witness != me.witness {
        let message =
            "\"witness on\" and the word \"witness\" in this node's member line belong together";
        return Err(reader.error(line, message));
    }
    if members[0].witness {
        let message =
            "the first member bootstraps the cluster from its data: it cannot be a witness";
        return Err(reader.error(line, message));
    }
    Ok(())
}

/// Bytes that are left free on the disks, unless the configuration says otherwise.
pub const DEFAULT_RESERVE: u64 = 64 << 20;

/// Bytes per second that a scrub reads, unless the configuration says otherwise.
pub const DEFAULT_SCRUB_RATE: u64 = 4 << 20;

/// What a node gets that was away for so long that the log does not reach back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recovery {
    /// Every transaction.
    #[default]
    Normal,
    /// What is current; the history between stays behind until it is filled in.
    Fast,
    /// `Fast` if there is much to get, `Normal` otherwise.
    Auto,
}

fn recovery(text: &str) -> Result<Recovery, String> {
    match text {
        "normal" => Ok(Recovery::Normal),
        "fast" => Ok(Recovery::Fast),
        "auto" => Ok(Recovery::Auto),
        _ => Err(format!("{text:?} is no way of recovery: normal, fast, auto")),
    }
}

fn command(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("no command is given".into()) } else { Ok(text.into()) }
}

fn count(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| *count > 0);
    count.ok_or_else(|| format!("{text:?} is not a number above 0"))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse().ok().and_then(|n| Duration::try_from_secs_f64(n).ok());
    number
        .filter(|time| !time.is_zero())
        .ok_or_else(|| format!("{text:?} is not a number of seconds"))
}

fn profile(text: &str) -> Result<Profile, String> {
    match text {
        "lan" => Ok(Profile::Lan),
        "wan" => Ok(Profile::Wan),
        "auto" => Ok(Profile::Auto),
        _ => Err(format!("{text:?} is not a profile: lan, wan, auto")),
    }
}

/// `NAME HOST:PORT GROUP [witness]`
fn member(text: &str) -> Result<MemberLine, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    match words[..] {
        [name, address, group] | [name, address, group, "witness"] => Ok(MemberLine {
            name: word(name)?,
            address: Address::parse(address)?,
            group: word(group)?,
            witness: words.len() == 4,
        }),
        _ => Err(format!("{text:?} is not of the form NAME HOST:PORT GROUP [witness]")),
    }
}

fn read_members(section: &Section, reader: &SectionReader) -> Result<Vec<MemberLine>, ConfigError> {
    let mut members: Vec<MemberLine> = Vec::new();
    for (_, text, line) in section.keys.iter().filter(|(key, _, _)| key == "member") {
        let member = member(text).map_err(|m| reader.error(*line, format!("member: {m}")))?;
        let is_same =
            |other: &MemberLine| other.name == member.name || other.address == member.address;
        if members.iter().any(is_same) {
            return Err(reader.error(*line, "member: this name or address stands there twice"));
        }
        members.push(member);
    }
    Ok(members)
}

/// What a `<standby>` section may say.
const KEYS: &[&str] = &[
    "cluster",
    "node",
    "group",
    "state-dir",
    "read-only-address",
    "peer-address",
    "admin-address",
    "member",
    "secret-file",
    "profile",
    "log-tail",
    "join",
    "join-token",
    "witness",
    "on-primary",
    "on-replica",
    "max-staleness",
    "future-tids",
    "client-memory",
    "transaction-objects",
    "transaction-size",
    "catch-up-rate",
    "recovery",
    "reserve",
    "scrub-rate",
];

impl Checker {
    pub(super) fn standby(&mut self, section: &Section) -> Result<Standby, ConfigError> {
        let mut reader = self.reader(section, KEYS)?;
        reader.sections(&["peer-ssl"])?;
        let peer_ssl = section.sections.first().map(|inner| self.ssl(inner)).transpose()?;
        let members = read_members(section, &reader)?;
        let node = reader.required("node", word)?;
        let group = reader.required("group", word)?;
        let peer_address = reader.required("peer-address", Address::parse)?;
        let several = |text: &str| text.split_whitespace().map(Address::parse).collect();
        let join: Vec<Address> = reader.get("join", several)?.unwrap_or_default();
        let join_token = reader.get("join-token", word)?;
        let witness = reader.boolean("witness", false)?;
        let me = MemberLine { name: node, address: peer_address, group, witness };
        match join.is_empty() {
            true => check_members(&reader, &members, &me)?,
            false => check_join(&reader, &members, join_token.as_deref())?,
        }
        let secret = |file: &str| Ok((Secrets::read(Path::new(file))?, PathBuf::from(file)));
        let secret = reader.get("secret-file", secret)?;
        let others = members.iter().map(|m| &m.address).chain(&join);
        let all_loopback = others.chain([&me.address]).all(Address::is_loopback);
        if secret.is_none() && peer_ssl.is_none() && !all_loopback {
            let message = "\"secret-file\" is needed, for the nodes are on several machines: the \
                           same file on each, for example from: head -c 32 /dev/urandom | base64 > \
                           secret; or <peer-ssl>";
            return Err(reader.error(section.line, message));
        }
        let default = Limits::default();
        Ok(Standby {
            cluster: reader.required("cluster", word)?,
            state_dir: reader.required("state-dir", path)?,
            read_only_address: reader.get("read-only-address", Address::parse)?,
            admin_address: reader
                .get("admin-address", Address::parse)?
                .unwrap_or(Address { host: "127.0.0.1".into(), port: 8103 }),
            secret_file: secret.as_ref().map(|(_, file)| file.clone()),
            secrets: secret.map_or_else(Secrets::none, |(secrets, _)| secrets),
            peer_ssl,
            profile: reader.get("profile", profile)?.unwrap_or(Profile::Lan),
            log_tail: reader.get("log-tail", byte_size)?.unwrap_or(256 << 20),
            catch_up_rate: reader.get("catch-up-rate", byte_size)?.filter(|rate| *rate > 0),
            reserve: reader.get("reserve", byte_size)?.unwrap_or(DEFAULT_RESERVE),
            scrub_rate: (reader.get("scrub-rate", byte_size)?)
                .map_or(Some(DEFAULT_SCRUB_RATE), |rate| Some(rate).filter(|rate| *rate > 0)),
            recovery: reader.get("recovery", recovery)?.unwrap_or_default(),
            on_primary: reader.get("on-primary", command)?,
            on_replica: reader.get("on-replica", command)?,
            max_staleness: reader.get("max-staleness", seconds)?,
            future_tids: reader
                .get("future-tids", seconds)?
                .unwrap_or(DEFAULT_FUTURE_TIDS)
                .min(MOST_FUTURE_TIDS),
            client_memory: reader.get("client-memory", byte_size)?.filter(|bytes| *bytes > 0),
            limits: Limits {
                objects: reader.get("transaction-objects", count)?.unwrap_or(default.objects),
                bytes: reader.get("transaction-size", byte_size)?.unwrap_or(default.bytes),
            },
            node: me.name,
            group: me.group,
            peer_address: me.address,
            members,
            join,
            join_token: join_token.unwrap_or_default(),
            witness,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Recovery, Secrets};
    use crate::Config;

    fn read(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("zeo.conf"), text).map_err(|error| error.to_string())
    }

    const DATA: &str =
        "<zeo>\naddress localhost:8100\n</zeo>\n<filestorage>\npath /d\n</filestorage>\n";
    const NODE: &str = "cluster c\nnode n2\ngroup g\nstate-dir /s\npeer-address 127.0.0.1:2\n";
    const MEMBERS: &str = "member n1 127.0.0.1:1 g\nmember n2 127.0.0.1:2 g";

    fn standby(lines: &str) -> String {
        format!("<standby>\n{NODE}{lines}\n</standby>\n")
    }

    #[test]
    fn a_node_joins_by_an_address_and_a_token() {
        let joins = |lines: &str| {
            let config = read(&format!("{DATA}{}", standby(lines)));
            config.unwrap().standby.unwrap()
        };
        let standby = joins("join 127.0.0.1:1\njoin-token abc");
        assert!(standby.members.is_empty());
        assert_eq!(standby.join[0].to_string(), "127.0.0.1:1");
        assert_eq!(joins("join 127.0.0.1:1 127.0.0.1:3\njoin-token abc").join.len(), 2);
        assert_eq!(standby.join_token, "abc");
    }

    #[test]
    fn a_file_holds_one_secret_or_several() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        let read = |text: &str| {
            std::fs::write(&file, text).unwrap();
            Secrets::read(&file)
        };
        let secrets = read("the-new-one-of-several\n\n  the-old-one-of-several  \n").unwrap();
        assert_eq!(secrets.own(), b"the-new-one-of-several");
        assert_eq!(secrets.all().count(), 2);
        // As before there could be several: all lines are one.
        let one = read("\na secret of two\nlines\n").unwrap();
        assert_eq!((one.own(), one.all().count()), (&b"a secret of two\nlines"[..], 1));
        for wrong in ["", "\n", "short\n", "the-new-one-of-several\n\nshort"] {
            assert!(read(wrong).unwrap_err().contains("at least 16 characters"));
        }
        assert_eq!(Secrets::none().own(), b"");
    }

    #[test]
    fn a_witness_has_no_storage() {
        let witness =
            standby("witness on\nmember n1 127.0.0.1:1 g\nmember n2 127.0.0.1:2 g witness");
        let config = read(&witness).unwrap();
        assert!(config.storages.is_empty() && config.zeo.addresses.is_empty());
        assert!(config.standby.unwrap().witness);
        let error = read(&format!("{DATA}{witness}")).unwrap_err();
        assert!(error.contains("a witness holds no data"), "{error}");
    }

    #[test]
    fn recovery_is_normal_unless_asked_for() {
        let of = |lines: &str| {
            let config = read(&format!("{DATA}{}", standby(&format!("{MEMBERS}\n{lines}"))));
            config.map(|config| config.standby.unwrap().recovery)
        };
        assert_eq!(of(""), Ok(Recovery::Normal));
        assert_eq!(of("recovery fast"), Ok(Recovery::Fast));
        assert_eq!(of("recovery auto"), Ok(Recovery::Auto));
        let error = of("recovery quick").unwrap_err();
        assert!(error.contains("normal, fast, auto"), "{error}");
    }

    #[test]
    fn what_does_not_fit_together_is_explained() {
        let cases = [
            ("join 127.0.0.1:1", "standby node add NAME"),
            ("join 127.0.0.1:1\njoin-token t\nmember n1 127.0.0.1:1 g", "one of the two"),
            ("witness on\nmember n1 127.0.0.1:1 g\nmember n2 127.0.0.1:2 g", "belong together"),
            ("member n1 127.0.0.1:1 g witness\nmember n2 127.0.0.1:2 g", "cannot be a witness"),
            ("member n1 127.0.0.1:1 g winess", "NAME HOST:PORT GROUP [witness]"),
        ];
        for (lines, expected) in cases {
            let error = read(&standby(lines)).unwrap_err();
            assert!(error.contains(expected), "{lines}: {error}");
        }
        for wrong in ["soon", "0", "-1", "inf"] {
            let lines = format!("{MEMBERS}\nmax-staleness {wrong}");
            let error = read(&format!("{DATA}{}", standby(&lines))).unwrap_err();
            assert!(error.contains("is not a number of seconds"), "{error}");
        }
    }
}
