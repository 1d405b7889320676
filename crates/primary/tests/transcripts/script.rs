//! The commands of a transcript.
//!
//! ```text
//! nodes n1 n2:g2 n3:witness     nodes, with their groups (g); the first one bootstraps the cluster
//! join n4 [GROUP]               another node, which nobody lists
//! run 2s                        time passes; also 50ms
//! kill n1 · start n1 · start-after-crashes n1 · cut n1 · mute n1 (nobody is told) · heal n1
//! stall n1 · go n1              the disk of the log does not answer, and does again
//! know n1 full n2               what a node knows: full, slow, damaged, flapping (of a node), and
//!                               that it is over: room, sound, steady; lacks-data, long-call,
//!                               no-long-call, clock +2h, said-ahead 2h, more n2, level n2 1
//! ask n1 JSON                   an administrator asks a node
//! a@n1 register [read-only] [STORAGE]
//! a oids 3 · a vote 1=none 2=t3 2?t3 · a vote tid=t9 … · a finish · a abort · a gone · a sync
//!                               = is a store that is based on a serial, ? a check of one
//! a finish-with-blob 7          the transaction has the upload 7
//! a pack · n2 has 7             a node has fetched the upload 7
//! a undo t3                     a vote that undoes a transaction
//! a vote 1=t3 token=1.2 · a finish token=1.2 · b outcome token=1.2 since t1
//! ```

use std::time::Duration;

use bytes::BytesMut;
use standby_filestorage::{Record, RecordData, put_record};
use standby_primary::input::{Finished, Obtained, OutcomeQuestion, PackRequest, Records};
use standby_primary::{Caller, Input, Request};
use standby_types::{Blob, BlobSource, Oid, Tid, TransactionToken, Transfer};
use standby_zeo::{Blobs, Expected, Meta, SessionId, Value, Vote, VoteRequest};

use crate::world::World;

/// Runs the commands of a transcript; returns it with what follows now.
pub fn replay(text: &str) -> String {
    let mut world = World::default();
    let mut replayed = String::new();
    for line in text.lines() {
        let Some(command) = line.strip_prefix("> ") else {
            if line.starts_with('#') {
                replayed.push_str(line);
                replayed.push('\n');
            }
            continue;
        };
        perform(&mut world, command);
        replayed.push_str(&format!("> {command}\n"));
        for said in std::mem::take(&mut world.said) {
            replayed.push_str(&format!("  {said}\n"));
        }
    }
    replayed
}

fn perform(world: &mut World, command: &str) {
    let words: Vec<&str> = command.split_whitespace().collect();
    match words[..] {
        ["nodes", ..] => *world = World::new(&words[1..].iter().map(member).collect::<Vec<_>>()),
        ["join", name] => join(world, name, "g"),
        ["join", name, group] => join(world, name, group),
        ["run", time] => world.run(duration(time)),
        ["kill", name] => world.kill(name),
        ["start", name] => world.restart(name, false),
        ["start-after-crashes", name] => world.restart(name, true),
        ["cut", name] => world.cut(name, true),
        ["mute", name] => world.mute(name),
        ["heal", name] => world.cut(name, false),
        ["stall", name] => world.stall(name, true),
        ["go", name] => world.stall(name, false),
        ["know", node, ..] => know(world, node, &words[2..]),
        ["ask", node, ..] => {
            let json = words[2..].join(" ");
            let asker = world.next_asker();
            let input = Input::Ask(serde_json::from_str(&json).unwrap(), asker);
            world.tell(world.at(node), input);
        }
        [node, "has", upload] => {
            let (transfer, from) = (transfer(upload), world.id("n1"));
            world.stage(world.at(node), transfer);
            let (storage, how) = ("1".to_owned(), Obtained::Here);
            let input = Input::Obtained { from, storage, transfer, how };
            world.tell(world.at(node), input);
        }
        [who, "register", ..] => register(world, who, &words[2..]),
        [who, ..] => client(world, who, &words[1..]),
        [] => {}
    }
}

fn member<'a>(word: &&'a str) -> (&'a str, &'a str, bool) {
    match word.split_once(':') {
        None => (word, "g", false),
        Some((name, "witness")) => (name, "g", true),
        Some((name, group)) => (name, group, false),
    }
}

/// A node that knows where the first one is.
fn join(world: &mut World, name: &str, group: &str) {
    world.add(name, group, false, &[], false);
    world.run(Duration::from_millis(50));
}

fn duration(text: &str) -> Duration {
    let digits: String = text.chars().filter(char::is_ascii_digit).collect();
    let number: u64 = digits.parse().unwrap();
    match text.trim_start_matches(|c: char| !c.is_ascii_alphabetic()) {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "h" => Duration::from_secs(number * 3600),
        unit => panic!("{unit}: ms, s or h"),
    }
}

fn know(world: &mut World, node: &str, what: &[&str]) {
    let at = world.at(node);
    let of = what.get(1).filter(|name| name.starts_with('n')).map(|name| world.id(name));
    let mut known = world.known(at);
    match (what[0], of) {
        ("full", Some(id)) => drop(known.full.insert(id)),
        ("slow", Some(id)) => drop(known.slow.insert(id)),
        ("damaged", Some(id)) => drop(known.damaged.insert(id)),
        ("flapping", Some(id)) => drop(known.flapping.insert(id)),
        ("room", Some(id)) => drop(known.full.remove(&id)),
        ("sound", Some(id)) => drop(known.damaged.remove(&id)),
        ("steady", Some(id)) => drop(known.flapping.remove(&id)),
        ("level", Some(id)) => drop(known.levels.insert(id, what[2].parse().unwrap())),
        ("more", _) => known.more = Some(what[1].to_owned()),
        ("lacks-data", _) => known.lacks_data = true,
        ("long-call", _) => known.long_call = true,
        ("no-long-call", _) => known.long_call = false,
        ("clock", _) => known.ahead = duration(what[1]),
        ("said-ahead", _) => known.said_ahead = Some(duration(what[1])),
        (what, _) => panic!("know {what}"),
    }
}

fn register(world: &mut World, who: &str, options: &[&str]) {
    let (name, node) = who.split_once('@').unwrap();
    let at = world.at(node);
    let read_only = options.contains(&"read-only");
    let storage = options.iter().find(|option| **option != "read-only").unwrap_or(&"1");
    let session = world.connect(name, at, !read_only);
    let request =
        Request::Register { caller: caller(session), storage: (*storage).into(), read_only };
    world.tell(at, Input::Client(request));
}

fn caller(session: SessionId) -> Caller {
    Caller { session, call: Value::Int(1) }
}

fn client(world: &mut World, who: &str, words: &[&str]) {
    let (at, session) = world.session(who);
    let storage = "1".to_owned();
    let request = match *words {
        ["oids", count] => {
            let count = count.parse().unwrap();
            Request::NewOids { caller: caller(session), storage, count }
        }
        ["vote", ..] => {
            let vote = vote(world, at, &words[1..]);
            world.set_busy(who, true, vote.request.tid);
            Request::Vote { session, storage, vote }
        }
        ["undo", tid] => {
            world.set_busy(who, true, None);
            let undos = vec![world.tid_named(tid).unwrap()];
            let writes = vec![(Oid(1), Expected::Any)];
            let request = VoteRequest { writes, undos, ..VoteRequest::default() };
            Request::Vote { session, storage, vote: Vote::from(request) }
        }
        ["finish"] => finish(world, who, None, Blobs::default()),
        ["finish", token] => finish(world, who, Some(token_named(token)), Blobs::default()),
        ["outcome", token, "since", tid] => {
            let since = world.tid_named(tid).unwrap_or(Tid::NONE);
            let (caller, token) = (caller(session), token_named(token));
            Request::Outcome(OutcomeQuestion { caller, storage, token, since })
        }
        ["finish-with-blob", upload] => {
            let upload = world.stage(at, transfer(upload));
            let blob = Blob { oid: Oid(1), source: BlobSource::Upload(upload) };
            let mut blobs = Blobs::default();
            blobs.all.push(blob);
            finish(world, who, None, blobs)
        }
        ["abort"] => {
            world.set_busy(who, false, None);
            Request::Abort { session, storage }
        }
        ["sync"] => Request::Sync { caller: caller(session) },
        ["pack"] => {
            let (id, time, wait) = (Some(Value::Int(1)), 2e9, true);
            Request::Pack(PackRequest { session, storage, id, time, wait })
        }
        ["gone"] => {
            world.close(session);
            return world.run(Duration::ZERO);
        }
        _ => panic!("{words:?}"),
    };
    world.tell(at, Input::Client(request));
}

/// Each word is a change (`OID=SERIAL`), a check (`OID?SERIAL`), the tid, or a token.
fn vote(world: &World, at: usize, words: &[&str]) -> Vote {
    let mut request = VoteRequest::default();
    let tid = |oid: Oid, name: &str| match name {
        "none" => Tid::NONE,
        "now" => world.serial(at, oid),
        name => world.tid_named(name).unwrap_or_else(|| panic!("no transaction {name}")),
    };
    for word in words {
        if let Some(wanted) = word.strip_prefix("tid=") {
            request.tid = Some(Tid(u64::from_str_radix(wanted, 16).unwrap()));
        } else if word.starts_with("token=") {
            request.token = Some(token_named(word));
        } else if let Some((oid, serial)) = word.split_once('?') {
            let oid = Oid(oid.parse().unwrap());
            request.checks.push((oid, tid(oid, serial)));
        } else if let Some((oid, serial)) = word.split_once('=') {
            let oid = Oid(oid.parse().unwrap());
            request.writes.push((oid, Expected::Serial(tid(oid, serial))));
        }
    }
    Vote::from(request)
}

/// `token=CLIENT.NUMBER`
fn token_named(word: &str) -> TransactionToken {
    let (client, number) = word.strip_prefix("token=").unwrap().split_once('.').unwrap();
    let client = [client.parse().unwrap(); 16];
    TransactionToken { client, number: number.parse().unwrap() }
}

fn finish(world: &World, who: &str, token: Option<TransactionToken>, blobs: Blobs) -> Request {
    let (_, session) = world.session(who);
    let meta = Meta { tid: world.wanted_tid(who), token, ..Meta::default() };
    let mut records = BytesMut::new();
    let data = RecordData::Data("data".into());
    put_record(&Record { oid: Oid(1), data }, &mut records);
    let records = Records::Rest(records.freeze());
    let transaction = Finished { meta, blobs, records };
    Request::Finish { caller: caller(session), storage: "1".into(), transaction }
}

fn transfer(name: &str) -> Transfer {
    Transfer::parse(&format!("{:0>32}", name)).unwrap()
}
