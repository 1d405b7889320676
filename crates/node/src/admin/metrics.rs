//! `GET /metrics`: what a monitoring system asks every node for, in OpenMetrics' text form.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::cells::shared::Shared;
use crate::cells::status::NodeStatus;
use crate::transport::tls::Tls;

/// Names, each with its value.
pub type Labels = Vec<(&'static str, String)>;
/// Name, help, and the value for a storage.
type OfStorage<'a> = (&'a str, &'a str, &'a dyn Fn(&str) -> f64);

pub(crate) fn page(shared: &Shared) -> String {
    let mut page = Page::new("standby");
    let status = shared.reports.status();
    let own = status.nodes.iter().find(|node| node.node == shared.member.name);
    if let Some(own) = own {
        of_node(&mut page, own, status.term);
    }
    let states = ["up", "catching-up", "cut-off", "damaged", "down"].map(|state| {
        let count = status.nodes.iter().filter(|node| node.state == state).count();
        (vec![("state", state.to_owned())], count as f64)
    });
    page.gauge("nodes", "Nodes of the cluster in each state, as this one sees them", states);
    let primary = status.primary.is_some();
    page.gauge("primary_known", "1 if a primary is known here", [(vec![], of(primary))]);
    let (voters, up, majority) = status.voters();
    let survivable = up as f64 - majority as f64;
    let timeline = [(vec![], status.timeline as f64)];
    page.gauge("timeline", "How often a node was promoted by force, and one", timeline);
    page.gauge("voters", "Nodes that vote", [(vec![], voters as f64)]);
    let help = "Voters that may be lost before writes stop; below 0 they have stopped";
    page.gauge("survivable_failures", help, [(vec![], survivable)]);
    let clients = [(vec![], shared.clients.inside() as f64)];
    page.gauge("client_connections", "Connections of clients, parked ones included", clients);
    let limit = [(vec![], shared.clients.limit() as f64)];
    page.gauge("client_connections_limit", "The one that is too many is refused", limit);
    let refused = [(vec![], shared.clients.refused() as f64)];
    page.counter("client_connections_refused", "Connections that were too many", refused);
    let memory = [(vec![], shared.memory.used() as f64)];
    page.gauge("client_memory_bytes", "Memory that sessions of clients hold", memory);
    let limit = [(vec![], shared.memory.limit() as f64)];
    page.gauge("client_memory_limit_bytes", "Beyond it the session that holds most ends", limit);
    let ends = shared.certificates().flat_map(Tls::ends).map(|(file, subject, left)| {
        (vec![("file", file.display().to_string()), ("subject", subject)], left.as_secs_f64())
    });
    let help = "How long each certificate is still valid; nobody is let in with it then";
    page.gauge("certificate_seconds_left", help, ends);
    of_storages(&mut page, shared);
    page.text()
}

fn of_node(page: &mut Page, own: &NodeStatus, term: u64) {
    let info = vec![
        ("node", own.node.clone()),
        ("group", own.group.clone()),
        ("version", own.version.clone()),
    ];
    page.gauge("node", "This node", [(info, 1.0)]);
    let roles = ["primary", "replica", "witness"];
    let role = |role: &'static str| (vec![("role", role.to_owned())], of(own.role == role));
    page.gauge("role", "1 for the role that this node has", roles.map(role));
    page.gauge("voter", "1 if this node votes", [(vec![], of(own.voter))]);
    page.gauge("term", "Term of consensus", [(vec![], term as f64)]);
    let applied = [(vec![], own.applied_index as f64)];
    page.gauge("applied_index", "Last log entry that is applied here", applied);
    let lag = own.lag_seconds.map(|seconds| (vec![], seconds));
    page.gauge("lag_seconds", "For how long the primary has had more than this node", lag);
    let full = of(own.no_room.is_some());
    page.gauge(
        "disk_nearly_full",
        "1 if this node does not write for want of room",
        [(vec![], full)],
    );
    let slow = of(own.slow_disk);
    page.gauge(
        "disk_slow",
        "1 if writes of the log take longer than a second here",
        [(vec![], slow)],
    );
    let damaged = of(own.damage.is_some());
    page.gauge(
        "damaged",
        "1 if a data file of this node is damaged and no other node can repair it",
        [(vec![], damaged)],
    );
    let future = [(vec![], own.future_seconds.unwrap_or(0) as f64)];
    let help =
        "By how much the last transaction is ahead of this node's clock, if that is over a minute";
    page.gauge("future_seconds", help, future);
    let stopped = of(own.stopped.is_some());
    let help = "1 if this node does not serve because there is an older cluster of the same name";
    page.gauge("second_cluster", help, [(vec![], stopped)]);
    let differs = of(!own.differs.is_empty());
    let help = "1 if a data file differed from the primary's when they were compared";
    page.gauge("differs", help, [(vec![], differs)]);
    let lost: u64 = own.lost.iter().map(|tail| tail.transactions).sum();
    let help = "Transactions that this node has lost by leaving timelines, and keeps in files";
    page.gauge("lost_transactions", help, [(vec![], lost as f64)]);
    let stale = own.stale_seconds.map(|seconds| (vec![], seconds));
    page.gauge("stale_seconds", "How old what readers see here may be", stale);
}

fn of_storages(page: &mut Page, shared: &Shared) {
    let storages: Vec<_> = shared.storages.iter().collect();
    let each = |value: &dyn Fn(&str) -> f64| -> Vec<(Labels, f64)> {
        storages
            .iter()
            .map(|(name, _)| (vec![("storage", name.to_string())], value(name)))
            .collect()
    };
    let storage = |name: &str| &shared.storages[name];
    let gauges: [OfStorage<'_>; 5] = [
        ("objects", "Objects", &|name| storage(name).reader().len() as f64),
        ("data_bytes", "Bytes of the data file", &|name| storage(name).reader().size() as f64),
        ("sessions", "Clients", &|name| shared.sessions.count(name) as f64),
        ("transactions_active", "Transactions between vote and the end", &|name| {
            storage(name).stats.active.load(Ordering::Relaxed) as f64
        }),
        ("transactions_waiting", "Votes that wait for locks", &|name| {
            storage(name).stats.waiting.load(Ordering::Relaxed) as f64
        }),
    ];
    for (name, help, value) in gauges {
        page.gauge(name, help, each(value));
    }
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
    let counters: [OfStorage<'_>; 10] = [
        ("loads", "Reads of objects", &|name| count(&storage(name).stats.loads)),
        ("repaired_blocks", "Damaged blocks that were repaired from another node", &|name| {
            storage(name).reader().damage().repaired as f64
        }),
        ("repaired_blobs", "Damaged blobs that were repaired from another node", &|name| {
            let blobs = storage(name).blobs.as_ref();
            blobs.map_or(0.0, |blobs| blobs.damage().repaired as f64)
        }),
        ("stores", "Objects stored", &|name| count(&storage(name).stats.stores)),
        ("commits", "Transactions applied", &|name| count(&storage(name).stats.commits)),
        ("aborts", "Transactions aborted", &|name| count(&storage(name).stats.aborts)),
        ("conflicts", "Votes that ended in a conflict", &|name| {
            count(&storage(name).stats.conflicts)
        }),
        ("outcomes_committed", "Questions for a transaction that was committed", &|name| {
            count(&storage(name).stats.outcomes_committed)
        }),
        ("outcomes_not_committed", "Questions for a transaction that was not", &|name| {
            count(&storage(name).stats.outcomes_not_committed)
        }),
        ("outcomes_unknown", "Questions for a transaction of which nobody knows", &|name| {
            count(&storage(name).stats.outcomes_unknown)
        }),
    ];
    for (name, help, value) in counters {
        page.counter(name, help, each(value));
    }
}

fn of(holds: bool) -> f64 {
    f64::from(u8::from(holds))
}

/// Metrics, as they are at a moment.
pub struct Page(Registry);

impl Page {
    /// An empty page; all names begin with `prefix`.
    pub fn new(prefix: &str) -> Page {
        Page(Registry::with_prefix(prefix))
    }

    /// Adds values that go up and down, each with its labels.
    pub fn gauge(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels, f64)>,
    ) {
        let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
        for (labels, value) in values {
            family.get_or_create(&labels).set(value);
        }
        self.0.register(name, help, family);
    }

    /// Adds values that only grow, each with its labels.
    pub fn counter(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels, f64)>,
    ) {
        let family = Family::<Labels, Counter<f64, AtomicU64>>::default();
        for (labels, value) in values {
            family.get_or_create(&labels).inc_by(value);
        }
        self.0.register(name, help, family);
    }

    /// The page in OpenMetrics' text form.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.0);
        text
    }
}
