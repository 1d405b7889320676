//! What clients ask about the server: `get_info`, `server_status`, `ruok`.

use std::sync::atomic::Ordering;
use std::time::Duration;

use standby_zeo::Value;
use tokio::sync::oneshot;

use crate::cells::events::Event;
use crate::cells::shared::Shared;
use crate::cells::status::ctime;
use crate::cells::storage::StorageShared;
use crate::cells::topology;

/// How long the counters of a status may wait for the primary's machine.
const SETTLING: Duration = Duration::from_secs(1);

/// What `get_info` says of a storage: what it can do.
fn info(storage: &StorageShared) -> Vec<(Value, Value)> {
    let pair = |module: &str, name: &str| Value::Tuple(vec![Value::str(module), Value::str(name)]);
    // In the order in which Python's server gives them.
    let with_blobs: &[&str] = match storage.blobs {
        Some(_) => &["IBlobStorageRestoreable", "IBlobStorage"],
        None => &[],
    };
    let without = [
        "IStorageRestoreable",
        "IStorageIteration",
        "IStorageUndoable",
        "IStorageCurrentRecordIteration",
        "IExternalGC",
        "IStorage",
    ];
    let names = with_blobs.iter().chain(&without);
    let mut interfaces: Vec<Value> = names.map(|name| pair("ZODB.interfaces", name)).collect();
    interfaces.push(pair("zope.interface", "Interface"));
    vec![
        (Value::str("length"), Value::Int(storage.reader().len() as i64)),
        (Value::str("size"), Value::Int(storage.reader().size() as i64)),
        (Value::str("name"), Value::Str(storage.path.display().to_string())),
        (Value::str("supportsUndo"), Value::Bool(true)),
        (Value::str("supports_record_iternext"), Value::Bool(true)),
        (Value::str("interfaces"), Value::Tuple(interfaces)),
    ]
}

impl Shared {
    /// The answer to `get_info`.
    pub(crate) fn info(&self, storage: &StorageShared) -> Value {
        let mut items = info(storage);
        items.extend(self.topology().map(|topology| (Value::str(topology::KEY), topology)));
        Value::Dict(items)
    }

    fn status_items(&self, storage: &StorageShared, name: &str) -> Vec<(&'static str, i64)> {
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed) as i64;
        let stats = &storage.stats;
        vec![
            ("connections", self.sessions.count(name) as i64),
            ("loads", load(&stats.loads)),
            ("stores", load(&stats.stores)),
            ("commits", load(&stats.commits)),
            ("aborts", load(&stats.aborts)),
            ("active_txns", stats.active.load(Ordering::Relaxed) as i64),
            ("conflicts", load(&stats.conflicts)),
            ("conflicts_resolved", 0),
            ("waiting", stats.waiting.load(Ordering::Relaxed) as i64),
        ]
    }

    fn started_text(&self) -> String {
        ctime(self.started)
    }

    /// Returns when the counters tell of all that any client has been answered; soon in any case.
    pub(crate) async fn settled(&self) {
        let (done, settled) = oneshot::channel();
        let _ = tokio::time::timeout(SETTLING, async {
            self.tell(Event::Settled(done)).await;
            settled.await
        })
        .await;
    }

    /// `server_status`
    pub(crate) fn server_status(&self, storage: &StorageShared, name: Option<&str>) -> Value {
        let mut items: Vec<(Value, Value)> = self
            .status_items(storage, name.unwrap_or_default())
            .into_iter()
            .map(|(key, value)| (Value::str(key), Value::Int(value)))
            .collect();
        items.extend([
            (Value::str("lock_time"), Value::None),
            (Value::str("start"), Value::Str(self.started_text())),
            (Value::str("timeout-thread-is-alive"), Value::Bool(true)),
            (Value::str("last-transaction"), Value::Str(storage.reader().last_tid().to_string())),
        ]);
        Value::Dict(items)
    }

    /// The answer to `ruok`.
    pub(crate) fn ruok(&self) -> serde_json::Value {
        let storages = self.storages.iter().map(|(name, storage)| {
            let mut items: serde_json::Map<String, serde_json::Value> = self
                .status_items(storage, name)
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value.into()))
                .collect();
            items.insert("lock_time".into(), serde_json::Value::Null);
            items.insert("start".into(), self.started_text().into());
            items.insert("timeout-thread-is-alive".into(), true.into());
            items.insert("last-transaction".into(), storage.reader().last_tid().to_string().into());
            (name.clone(), serde_json::Value::Object(items))
        });
        serde_json::Value::Object(storages.collect())
    }
}
