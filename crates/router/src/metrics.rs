//! `GET /metrics` for monitoring; `GET /health` says whether writers are served.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use standby_node::sockets::{self, OPEN_METRICS, Page};
use standby_types::lock::lock;
use tokio::net::TcpListener;

use crate::machine::Known;
use crate::{Purpose, Router};

pub(crate) async fn serve(router: Arc<Router>, listener: TcpListener) {
    let app = axum::Router::new()
        .route(
            "/metrics",
            get(|State(router): State<Arc<Router>>| async move {
                ([("content-type", OPEN_METRICS)], page(&router))
            }),
        )
        .route(
            "/health",
            get(|State(router): State<Arc<Router>>| async move {
                match router.pictures.borrow().writes.is_some() {
                    true => (StatusCode::OK, "ok\n"),
                    false => (StatusCode::SERVICE_UNAVAILABLE, "no primary answers\n"),
                }
            }),
        )
        .with_state(router);
    sockets::serve_http(app, listener).await;
}

fn page(router: &Router) -> String {
    let mut page = Page::new("standby_router");
    let now = router.began.elapsed();
    let known = lock(&router.machine).known(now);
    let of_each = |value: &dyn Fn(&Known) -> Option<f64>| {
        let labels =
            |node: &Known| vec![("node", node.name.clone()), ("group", node.group.clone())];
        let values = known.iter().filter_map(|node| Some((labels(node), value(node)?)));
        values.collect::<Vec<_>>()
    };
    let of = |holds: bool| Some(f64::from(u8::from(holds)));
    let values = of_each(&|node| of(node.answers));
    page.gauge("node_answers", "1 if the node gives signs of life", values);
    page.gauge("node_primary", "1 if the node is primary", of_each(&|node| of(node.primary)));
    let values = of_each(&|node| Some(node.lag.as_secs_f64()));
    page.gauge("node_lag_seconds", "For how long the node has lacked what another has", values);
    let values = of_each(&|node| node.round_trip.map(|time| time.as_secs_f64()));
    page.gauge("node_round_trip_seconds", "How long the node takes to answer a ping", values);
    let values = router.load.all().into_iter();
    let values = values.map(|(address, count)| (vec![("address", address)], count as f64));
    page.gauge("connections", "Connections of clients to each address of a node", values);
    let counts = &router.counts;
    let of_both = |counts: &[AtomicU64; 2]| {
        [Purpose::Writes, Purpose::Reads].map(|purpose| {
            let count = counts[purpose as usize].load(Ordering::Relaxed);
            (vec![("clients", purpose.name().to_owned())], count as f64)
        })
    };
    let held = of_both(&counts.held);
    page.gauge("held", "Clients that wait until there is a node for them", held);
    page.counter("accepted", "Connections of clients so far", of_both(&counts.accepted));
    let names = ["closed", "dead", "moved", "drained"];
    let ended = names.iter().zip(&counts.ended).map(|(name, count)| {
        (vec![("reason", (*name).to_owned())], count.load(Ordering::Relaxed) as f64)
    });
    let help = "Connections that have ended: by either side, for a dead node, for a better node, \
        or because the router ends";
    page.counter("ended", help, ended);
    let refused = [(vec![], router.gate.refused() as f64)];
    page.counter("refused", "Connections of clients that were too many", refused);
    page.text()
}
