//! The links to the other nodes, and what is known of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use standby_types::lock::lock;
use standby_types::{NodeId, Transfer};
use tokio::sync::mpsc;

use crate::cells::wire::{Frame, LinkFrame};
use crate::platform::{self, Instant};

/// Time between two log lines about the same trouble with the same node.
const QUIET: Duration = Duration::from_secs(60);
/// Troubles that are remembered, so that the log speaks of each only now and then.
const TROUBLES: usize = 256;

/// The nodes that this one can send to.
#[derive(Default)]
pub(crate) struct Peers {
    links: Mutex<BTreeMap<NodeId, mpsc::Sender<Bytes>>>,
    dialled: Mutex<BTreeSet<String>>,
    /// The members' addresses as far as they were learned from other nodes and from the log.
    learned: Mutex<BTreeSet<String>>,
    /// Held by who writes them down: one at a time.
    remembering: Mutex<()>,
    /// Why there is no link to a node, by its address, or why the node does not let this one in.
    troubles: Mutex<BTreeMap<String, String>>,
    /// The names of the nodes that this one, being primary, does not let in, and why.
    refusals: Mutex<BTreeMap<NodeId, (String, String)>>,
    /// What the log has spoken of, and when.
    told: Mutex<BTreeMap<String, Instant>>,
    /// How many links from each node there are: more than one if it dials two addresses, or comes
    /// again before this side has found out that it was gone.
    from: Mutex<BTreeMap<NodeId, usize>>,
    /// How often this node has begun a timeline: links of before do not count.
    epoch: AtomicU64,
}

impl Peers {
    /// Counts the timelines that this node has begun.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// This node has begun a timeline: all links end, and the handshakes for new ones tell which
    /// nodes have rejoined on it.
    pub(crate) fn end_links(&self) {
        let mut links = lock(&self.links);
        self.epoch.fetch_add(1, Ordering::AcqRel);
        links.clear();
    }

    /// Lets messages go over a link that was made in this epoch; false if it is over, or if there
    /// is a link to the node already, over another address.
    pub(crate) fn add(&self, id: NodeId, link: mpsc::Sender<Bytes>, epoch: u64) -> bool {
        let mut links = lock(&self.links);
        let current = self.epoch() == epoch && !links.contains_key(&id);
        if current {
            links.insert(id, link);
        }
        current
    }

    /// A link has ended.
    pub(crate) fn remove(&self, id: NodeId, link: &mpsc::WeakSender<Bytes>) {
        let mut links = lock(&self.links);
        let link = link.upgrade();
        if links
            .get(&id)
            .is_some_and(|current| link.is_some_and(|link| current.same_channel(&link)))
        {
            links.remove(&id);
        }
    }

    /// Sends a message of consensus; it may be lost.
    pub(crate) fn send(&self, to: NodeId, message: Bytes) {
        if let Some(link) = lock(&self.links).get(&to)
            && let Ok(frame) = LinkFrame::Raft(message).encode()
        {
            platform::deliver(link, frame);
        }
    }

    /// Says something to all; it may be lost.
    pub(crate) fn tell_all(&self, what: &LinkFrame) {
        let Ok(frame) = what.encode() else { return };
        for link in lock(&self.links).values() {
            let _ = link.try_send(frame.clone());
        }
    }

    /// Says to the node that announced an upload that it is durable here too.
    pub(crate) fn arrived(&self, to: NodeId, transfer: Transfer) {
        if let Some(link) = lock(&self.links).get(&to)
            && let Ok(frame) = LinkFrame::Arrived(transfer).encode()
        {
            let _ = link.try_send(frame);
        }
    }

    /// A link from that node begins.
    pub(crate) fn link_begins(&self, from: NodeId) {
        *lock(&self.from).entry(from).or_default() += 1;
    }

    /// True if it was the last one from that node.
    pub(crate) fn link_ends(&self, from: NodeId) -> bool {
        let mut links = lock(&self.from);
        let left = links.get_mut(&from).map_or(0, |count| {
            *count -= 1;
            *count
        });
        if left == 0 {
            links.remove(&from);
        }
        left == 0
    }

    /// Says to a node, from now on, why it is not let in.
    pub(crate) fn refuse(&self, id: NodeId, name: String, reason: String) {
        lock(&self.refusals).insert(id, (name, reason));
    }

    /// A node is not refused any more, or is gone.
    pub(crate) fn let_in(&self, id: NodeId) {
        lock(&self.refusals).remove(&id);
    }

    /// The nodes that are not let in, and why.
    pub(crate) fn refusals(&self) -> BTreeMap<String, String> {
        lock(&self.refusals).values().cloned().collect()
    }

    /// What stands between this node and the others: why they cannot be reached, or do not let it
    /// in.
    pub(crate) fn troubles(&self) -> BTreeMap<String, String> {
        lock(&self.troubles).clone()
    }

    /// True if the log has not spoken of this for a while; from now on it has.
    pub(crate) fn may_tell(&self, what: String) -> bool {
        let mut told = lock(&self.told);
        told.retain(|_, at| at.elapsed() < QUIET);
        if told.contains_key(&what) || told.len() >= TROUBLES {
            return false;
        }
        told.insert(what, Instant::now());
        true
    }

    /// A node cannot be reached at this address for a reason, or can. True if that is news.
    pub(crate) fn set_trouble(&self, address: &str, trouble: Option<String>) -> bool {
        let mut troubles = lock(&self.troubles);
        let before = match &trouble {
            Some(trouble) => troubles.insert(address.to_owned(), trouble.clone()),
            None => troubles.remove(address),
        };
        before != trouble
    }

    /// Why a node is not let in, if it is not.
    pub(crate) fn refusal(&self, id: NodeId) -> Option<String> {
        lock(&self.refusals).get(&id).map(|(_, reason)| reason.clone())
    }

    /// The members' addresses, as far as they were learned.
    pub(crate) fn learned(&self) -> BTreeSet<String> {
        lock(&self.learned).clone()
    }

    /// Takes the members' addresses; with what is known already unless they are `all`. `None` if
    /// that is nothing new.
    pub(crate) fn set_learned(
        &self,
        mut found: BTreeSet<String>,
        all: bool,
    ) -> Option<BTreeSet<String>> {
        let mut learned = lock(&self.learned);
        if !all {
            found.extend(learned.iter().cloned());
        }
        if *learned == found {
            return None;
        }
        learned.clone_from(&found);
        Some(found)
    }

    /// Writes down what was learned; one at a time, so that what is written last is what is known.
    pub(crate) fn remember<T>(&self, write: impl FnOnce(&BTreeSet<String>) -> T) -> T {
        let _turn = lock(&self.remembering);
        write(&self.learned())
    }

    /// Somebody dials this address from now on; false if somebody does already.
    pub(crate) fn begin_dialling(&self, address: &str) -> bool {
        lock(&self.dialled).insert(address.to_owned())
    }

    /// Nobody dials this address any more.
    pub(crate) fn end_dialling(&self, address: &str) {
        lock(&self.dialled).remove(address);
    }
}
