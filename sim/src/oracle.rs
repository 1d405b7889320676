//! What must hold of everything that clients were told, and of the history that the nodes have in
//! the end. Each property is a function, named as in the design.

use std::collections::{BTreeMap, BTreeSet};

use standby_filestorage::{Reader, RecordData, StorageError};
use standby_types::{Oid, Tid};

use crate::client::{ACCOUNTS, BALANCE, BLOBS, FIRST_FREE, blob_of};
use crate::history::Event;
use crate::record::Content;

/// The description of the transaction that everything begins with.
pub const BASE: &str = "base";

/// A transaction of the final history.
pub struct Transaction {
    tid: Tid,
    description: String,
    records: Vec<(Oid, Option<Content>)>,
}

/// What a file has, in order.
pub fn transactions(reader: &Reader) -> Result<Vec<Transaction>, StorageError> {
    let mut found = Vec::new();
    let mut stored = reader.transactions(Tid::NONE, Tid::MAX)?;
    while let Some(transaction) = stored.advance()? {
        let mut records = Vec::new();
        let mut iterator = reader.records(&transaction);
        while let Some(record) = iterator.advance()? {
            let content = match &record.data {
                RecordData::Data(data) => Content::decode(data),
                _ => None,
            };
            records.push((record.oid, content));
        }
        let description = String::from_utf8_lossy(&transaction.meta.description).into_owned();
        found.push(Transaction { tid: transaction.meta.tid, description, records });
    }
    Ok(found)
}

/// What is wrong with the first history. It may be there `partly` only: packed, or recovered fast;
/// `lost` are the files in which nodes keep what they had to leave.
pub fn judge(
    events: &[Event],
    histories: &[Vec<Transaction>],
    partly: bool,
    lost: Vec<Result<Reader, StorageError>>,
) -> Vec<String> {
    let Some(history) = histories.first() else { return Vec::new() };
    let mut lost_commits = BTreeSet::new();
    for reader in lost {
        match reader.and_then(|reader| transactions(&reader)) {
            Ok(lost) => lost_commits.extend(lost.into_iter().map(|t| (t.tid, t.description))),
            Err(error) => return vec![format!("opens: a file of lost transactions: {error}")],
        }
    }
    let mut wrong = Vec::new();
    wrong.extend(acknowledged_commits_are_there_once(events, history, partly, &lost_commits));
    wrong.extend(nothing_is_there_that_nobody_wrote(events, history));
    // Who recovered fast after a fork lacks its empty transaction.
    let left_out: Vec<_> = histories.iter().flat_map(|history| left_out(history)).collect();
    let revisions = revisions(events, history, partly, &lost_commits, &left_out);
    wrong.extend(no_update_is_lost(history, &revisions, partly));
    wrong.extend(reads_are_of_their_snapshot(events, &revisions, partly, &left_out));
    wrong.extend(sums_are_constant(events));
    wrong.extend(blobs_are_what_was_written(events, partly));
    wrong.extend(invalidations_come_before_replies(events));
    wrong.extend(oids_are_fresh(events));
    if events.iter().any(|event| matches!(event, Event::Promoted)) {
        // For some time there may have been two histories, and clients may have been in either.
        return wrong;
    }
    wrong.extend(outcomes_are_certain(events, histories));
    wrong.extend(one_primary_in_a_term(events));
    wrong.extend(commits_are_in_the_order_of_time(events));
    wrong.extend(clients_go_forward(events));
    wrong.extend(nobody_is_left_waiting(events));
    wrong.extend(syncs_see_what_was_acknowledged(events));
    wrong
}

/// Two seconds each for which a client may be without a server although others are served.
const WAITS: u32 = 10;

/// A stock client that has been disappointed by all living nodes waits for the others for ever.
/// While no process begins or ends, no node may disappoint it.
fn nobody_is_left_waiting(events: &[Event]) -> Option<String> {
    // Of each client that waits: for how long while others were served, and whether one just was.
    let mut waiting: BTreeMap<u32, (u32, bool)> = BTreeMap::new();
    for event in events {
        match event {
            Event::NodesChanged => waiting.clear(),
            Event::Connected { client, .. } => drop(waiting.remove(client)),
            Event::Committed { client, .. } => {
                let others = waiting.iter_mut().filter(|(other, _)| *other != client);
                others.for_each(|(_, (_, served))| *served = true);
            }
            Event::StillWaits { client } => {
                let (windows, served) = waiting.entry(*client).or_default();
                *windows = if std::mem::take(served) { *windows + 1 } else { 0 };
                if *windows >= WAITS {
                    return Some(format!("waits: client {client} is served by nobody, others are"));
                }
            }
            _ => {}
        }
    }
    None
}

/// The moments of timelines that were left: between the last transaction before a fork and the
/// first, empty one after it.
fn left_out(history: &[Transaction]) -> Vec<(Tid, Tid)> {
    let forks = history.windows(2).filter(|pair| pair[1].records.is_empty());
    forks.map(|pair| (pair[0].tid, pair[1].tid)).collect()
}

/// True if a client has asked for a pack. A node that is away meanwhile and catches up from another
/// one's data file keeps what the pack has removed elsewhere.
pub fn is_packed(events: &[Event]) -> bool {
    events.iter().any(|event| matches!(event, Event::Packing))
}

/// All nodes have the same data file.
pub fn files_are_equal(
    files: &[(String, Vec<u8>)],
    histories: &[Vec<Transaction>],
) -> Option<String> {
    let at = files.windows(2).position(|pair| pair[0].1 != pair[1].1)?;
    let ((a, bytes), (b, others)) = (&files[at], &files[at + 1]);
    let same = bytes.iter().zip(others).take_while(|(x, y)| x == y).count();
    let (len, other_len) = (bytes.len(), others.len());
    let tids = |node: usize| -> BTreeSet<Tid> {
        histories.get(node).into_iter().flatten().map(|transaction| transaction.tid).collect()
    };
    let only: Vec<_> = tids(at).symmetric_difference(&tids(at + 1)).copied().collect();
    Some(format!(
        "equal-bytes: {a} has {len}, {b} {other_len}, the first {same} are equal; only one of them \
        has {only:?}"
    ))
}

/// All nodes have the same revision of each object.
pub fn current_revisions_are_equal(histories: &[Vec<Transaction>]) -> Option<String> {
    let mut first = None;
    for history in histories {
        let mut found = BTreeMap::new();
        for Transaction { tid, records, .. } in history {
            found.extend(records.iter().map(|(oid, content)| (*oid, (*tid, content))));
        }
        let first = first.get_or_insert_with(|| found.clone());
        if let Some((oid, there)) = first.iter().find(|(oid, there)| found.get(oid) != Some(there))
        {
            let here = found.get(oid);
            return Some(format!("equal-revisions: of {oid} one node has {there:?}, one {here:?}"));
        }
        if found.len() > first.len() {
            return Some("equal-revisions: a node has objects that another has not".into());
        }
    }
    None
}

/// At most one node serves in a term, and a node's terms only grow.
fn one_primary_in_a_term(events: &[Event]) -> Option<String> {
    let mut primaries: BTreeMap<u64, &str> = BTreeMap::new();
    let mut terms: BTreeMap<&str, u64> = BTreeMap::new();
    for event in events {
        let Event::Serves(node, term) = event else { continue };
        let primary = *primaries.entry(*term).or_insert(node);
        if primary != node {
            return Some(format!("one-primary-in-a-term: {primary} and {node} in term {term}"));
        }
        let before = terms.insert(node, *term).unwrap_or(0);
        if *term < before {
            return Some(format!("one-primary-in-a-term: {node} in {term} after {before}"));
        }
    }
    None
}

/// A commit that begins after another was acknowledged has a later tid: whoever acknowledges has
/// seen everything.
fn commits_are_in_the_order_of_time(events: &[Event]) -> Option<String> {
    let mut acknowledged = Tid::NONE;
    let mut least = BTreeMap::new();
    for event in events {
        match event {
            Event::Finishing { client, number, .. } => {
                least.insert((*client, *number), acknowledged);
            }
            Event::Committed { client, number, tid, .. } => {
                let before = least.get(&(*client, *number)).copied().unwrap_or(Tid::NONE);
                if *tid <= before {
                    return Some(format!(
                        "order: commit {client} {number} is {tid}, but {before} was acknowledged \
                        before it began"
                    ));
                }
                acknowledged = acknowledged.max(*tid);
            }
            _ => {}
        }
    }
    None
}

/// What was acknowledged is in the final history, once, under the tid that the client was told; or
/// a node keeps it in a file of what was lost by a forced promotion.
fn acknowledged_commits_are_there_once(
    events: &[Event],
    history: &[Transaction],
    packed: bool,
    lost: &BTreeSet<(Tid, String)>,
) -> Option<String> {
    let mut found: BTreeMap<&str, Vec<Tid>> = BTreeMap::new();
    for transaction in history {
        found.entry(&transaction.description).or_default().push(transaction.tid);
    }
    if let Some((name, tids)) = found.iter().find(|(name, tids)| !name.is_empty() && tids.len() > 1)
    {
        return Some(format!("durability: commit {name} is there more than once: {tids:?}"));
    }
    for event in events {
        let Event::Committed { client, number, tid, .. } = event else { continue };
        match found.get(format!("{client} {number}").as_str()).map(|tids| &tids[..]) {
            Some([there]) if there == tid => {}
            None if packed || lost.contains(&(*tid, format!("{client} {number}"))) => {}
            other => {
                return Some(format!(
                    "durability: commit {client} {number} was acknowledged as {tid}, there is \
                    {other:?}"
                ));
            }
        }
    }
    None
}

/// A transaction of which its client was told that it is not committed is in no history, and no
/// client is told that nobody knows.
fn outcomes_are_certain(events: &[Event], histories: &[Vec<Transaction>]) -> Option<String> {
    let there: BTreeSet<&str> =
        histories.iter().flatten().map(|transaction| &*transaction.description).collect();
    events.iter().find_map(|event| match event {
        Event::NotCommitted { client, number } => {
            let is_there = there.contains(format!("{client} {number}").as_str());
            is_there.then(|| format!("outcome: {client} {number} was said not to be committed"))
        }
        Event::OutcomeUnknown { client, number } => {
            Some(format!("outcome: nobody knows what became of {client} {number}"))
        }
        _ => None,
    })
}

/// Every transaction is one that a client wanted to commit.
fn nothing_is_there_that_nobody_wrote(events: &[Event], history: &[Transaction]) -> Option<String> {
    let wanted: BTreeSet<String> = (events.iter())
        .filter_map(|event| match event {
            Event::Finishing { client, number, .. } => Some(format!("{client} {number}")),
            _ => None,
        })
        .chain([BASE.to_owned()])
        .collect();
    let phantom = |t: &&Transaction| !t.records.is_empty() && !wanted.contains(&t.description);
    let phantom = history.iter().find(phantom)?;
    Some(format!("phantom: {} {:?} was never wanted", phantom.tid, phantom.description))
}

/// The revisions of each object: those that are there and, if there was a pack, those that were
/// acknowledged; not those of timelines that were left, which a pack may have removed there before
/// they could be kept.
fn revisions(
    events: &[Event],
    history: &[Transaction],
    packed: bool,
    lost: &BTreeSet<(Tid, String)>,
    left_out: &[(Tid, Tid)],
) -> BTreeMap<Oid, BTreeSet<Tid>> {
    let mut revisions: BTreeMap<Oid, BTreeSet<Tid>> = BTreeMap::new();
    for transaction in history {
        for (oid, _) in &transaction.records {
            revisions.entry(*oid).or_default().insert(transaction.tid);
        }
    }
    let mut wanted = BTreeMap::new();
    for event in events.iter().filter(|_| packed) {
        match event {
            Event::Finishing { client, number, writes } => {
                wanted.insert((*client, *number), writes);
            }
            Event::Committed { client, number, tid, .. }
                if !lost.contains(&(*tid, format!("{client} {number}")))
                    && !left_out.iter().any(|(last, first)| last < tid && tid < first) =>
            {
                for (oid, _) in wanted.get(&(*client, *number)).into_iter().copied().flatten() {
                    revisions.entry(*oid).or_default().insert(*tid);
                }
            }
            _ => {}
        }
    }
    revisions
}

/// Each revision is based on the one before it: nobody has written over what he had not read.
fn no_update_is_lost(
    history: &[Transaction],
    revisions: &BTreeMap<Oid, BTreeSet<Tid>>,
    packed: bool,
) -> Option<String> {
    for transaction in history {
        for (oid, content) in &transaction.records {
            let tid = transaction.tid;
            let Some(Content { base, .. }) = content else {
                return Some(format!("no-lost-update: {oid} at {tid} is unreadable"));
            };
            let known = revisions.get(oid);
            let before = known.and_then(|known| known.range(..tid).next_back().copied());
            let before = before.unwrap_or(Tid::NONE);
            // One whose outcome nobody was told may be packed away.
            let unknown = packed
                && before < *base
                && *base < tid
                && known.is_none_or(|known| !known.contains(base));
            if *base != before && !unknown {
                return Some(format!(
                    "no-lost-update: {oid} at {tid} is based on {base}, but {before} came before"
                ));
            }
        }
    }
    None
}

/// What was read at a snapshot is the newest revision up to it.
fn reads_are_of_their_snapshot(
    events: &[Event],
    revisions: &BTreeMap<Oid, BTreeSet<Tid>>,
    packed: bool,
    left_out: &[(Tid, Tid)],
) -> Option<String> {
    for event in events {
        let Event::Read { client, snapshot, oid, serial } = event else { continue };
        if left_out.iter().any(|(last, first)| last < snapshot && snapshot < first) {
            // Of another timeline.
            continue;
        }
        let known = revisions.get(oid);
        let expected = known.and_then(|tids| tids.range(..=*snapshot).next_back().copied());
        let unknown = serial.is_some_and(|tid| known.is_none_or(|tids| !tids.contains(&tid)));
        if *serial != expected && !(packed && unknown) {
            return Some(format!(
                "snapshot: client {client} at {snapshot} read {oid} as of {serial:?}, right is \
                {expected:?}"
            ));
        }
    }
    None
}

/// Whoever reads all accounts at one moment finds all that there is.
fn sums_are_constant(events: &[Event]) -> Option<String> {
    events.iter().find_map(|event| match event {
        Event::Audited { client, snapshot, sum } if *sum != ACCOUNTS as i64 * BALANCE => {
            Some(format!("isolation: client {client} at {snapshot} finds {sum} in all"))
        }
        _ => None,
    })
}

/// A blob reads as it was written. Where history was removed, or left, it may be gone.
fn blobs_are_what_was_written(events: &[Event], partly: bool) -> Option<String> {
    let left = events.iter().any(|event| matches!(event, Event::Promoted));
    events.iter().find_map(|event| match event {
        Event::Blob { client, oid, serial, found: Some(false) } => {
            Some(format!("blobs: client {client} reads a wrong blob of {oid} at {serial}"))
        }
        Event::Blob { client, oid, serial, found: None } if !partly && !left => {
            Some(format!("blobs: client {client} finds no blob of {oid} at {serial}"))
        }
        _ => None,
    })
}

/// A node has the blob of each revision that its data file has.
pub fn blobs_are_there(
    name: &str,
    history: &[Transaction],
    blob: impl Fn(Oid, Tid) -> Option<Vec<u8>>,
) -> Option<String> {
    for Transaction { tid, records, .. } in history {
        for (oid, content) in records {
            let is_blob = BLOBS <= oid.0 && oid.0 < FIRST_FREE - 1;
            let Some(content) = content.as_ref().filter(|_| is_blob) else { continue };
            match blob(*oid, *tid) {
                Some(bytes) if bytes == blob_of(content.amount) => {}
                Some(_) => {
                    return Some(format!("blobs: that of {oid} at {tid} is wrong on {name}"));
                }
                None => return Some(format!("blobs: that of {oid} at {tid} is not on {name}")),
            }
        }
    }
    None
}

/// A client that writes never finds a server that knows less than itself.
fn clients_go_forward(events: &[Event]) -> Option<String> {
    events.iter().find_map(|event| match event {
        Event::Connected { client, writes: true, tid, known } if tid < known => {
            Some(format!("forward: client {client} knows {known}, the primary {tid}"))
        }
        _ => None,
    })
}

/// Invalidations come in the order of tids, and before a reply that depends on them.
fn invalidations_come_before_replies(events: &[Event]) -> Option<String> {
    events.iter().find_map(|event| match event {
        Event::Invalidated { client, tid, before } if tid <= before => {
            Some(format!("invalidations: client {client} hears of {tid} after {before}"))
        }
        Event::Outcome { client, told, tid } if tid > told => Some(format!(
            "invalidations: client {client} is told that its transaction is {tid}, but not of more \
            than {told}"
        )),
        Event::Current { client, told, oid, serial } if serial > told => Some(format!(
            "invalidations: client {client} is told that {oid} is of {serial}, but not of more \
            than {told}"
        )),
        _ => None,
    })
}

/// A ping is answered with all that had been acknowledged when it was sent. A replica that hears of
/// no primary shows what it has: of readers this is asked while nothing is wrong.
fn syncs_see_what_was_acknowledged(events: &[Event]) -> Option<String> {
    let (mut acknowledged, mut calm) = (Tid::NONE, false);
    let mut asked: BTreeMap<u32, Tid> = BTreeMap::new();
    let mut readers = BTreeSet::new();
    for event in events {
        match event {
            Event::Committed { tid, .. } => acknowledged = acknowledged.max(*tid),
            Event::Calm(now) => {
                calm = *now;
                asked.retain(|client, _| !readers.contains(client));
            }
            Event::Asked { client, writes } if *writes || calm => {
                asked.insert(*client, acknowledged);
                if !writes {
                    readers.insert(*client);
                }
            }
            Event::Synced { client, tid } => {
                let least = asked.remove(client).unwrap_or(Tid::NONE);
                if *tid < least {
                    return Some(format!(
                        "linearizable: client {client} asked when {least} was acknowledged, and \
                        sees {tid}"
                    ));
                }
            }
            _ => {}
        }
    }
    None
}

/// No oid is given twice, nor one that is in use.
fn oids_are_fresh(events: &[Event]) -> Option<String> {
    let mut given = BTreeSet::new();
    for event in events {
        match event {
            Event::Oids { client, oids } => {
                for oid in oids {
                    if !given.insert(*oid) {
                        return Some(format!("fresh-oids: {oid} is given again, to {client}"));
                    }
                }
            }
            Event::Finishing { writes, .. } => {
                let known = |oid: &Oid| oid.0 < FIRST_FREE;
                given.extend(writes.iter().map(|(oid, _)| *oid).filter(known));
            }
            _ => {}
        }
    }
    None
}
