//! The HTTP interface for administrators, and a client for it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::de::DeserializeOwned;
use serde_json::Value;
use standby_logging::harmless;
use standby_primary::command::{Answer, Ask};
use tokio::net::{TcpListener, TcpStream};

use crate::admin::metrics;
use crate::admin::route::route;
use crate::cells::gate::Gate;
use crate::cells::shared::Shared;
use crate::cells::status::Status;

/// How long a node may take to do what it is asked for.
const ASK_PATIENCE: Duration = Duration::from_secs(130);

/// Bytes of an answer that are read.
const LONGEST_ANSWER: usize = 16 << 20;

/// Connections of administrators at a time.
const CONNECTIONS: usize = 32;
/// How long a request's head may take.
const HEADER: Duration = Duration::from_secs(10);
/// How long a connection may be open, whatever it is used for.
const CONNECTION: Duration = Duration::from_secs(600);

/// What a page of metrics is.
pub const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves `GET /status`, `GET /metrics`, `GET /health`, and `POST /ask`: an [`Ask`] in JSON; the
/// answer is a [`crate::ask::Done`], or with status 409 the reason as text.
pub(crate) async fn listen(shared: Arc<Shared>, listener: TcpListener) {
    let app = Router::new()
        .route(
            "/status",
            get(|State(shared): State<Arc<Shared>>| async move { Json(shared.reports.status()) }),
        )
        .route(
            "/ask",
            post(|State(shared): State<Arc<Shared>>, Json(ask): Json<Ask>| async move {
                match route(&shared, ask).await {
                    Ok(done) => Ok(Json(done)),
                    Err(reason) => Err((StatusCode::CONFLICT, reason)),
                }
            }),
        )
        .route(
            "/metrics",
            get(|State(shared): State<Arc<Shared>>| async move {
                ([("content-type", OPEN_METRICS)], metrics::page(&shared))
            }),
        )
        .route("/health", get(|| async { "ok\n" }))
        .with_state(shared);
    serve(app, listener).await;
}

/// Serves HTTP for administrators and monitoring: few connections, none of them for long.
pub async fn serve(app: Router, listener: TcpListener) {
    let gate = Gate::new("administrators", CONNECTIONS);
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER);
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                gate.failed(&error);
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(pass) = gate.enter(&from.to_string()) else { continue };
        let service = TowerToHyperService::new(app.clone());
        let served = http.serve_connection(TokioIo::new(stream), service);
        // It ends after `CONNECTION`.
        tokio::spawn(async move {
            // How it ends is the other side's business.
            let _ = tokio::time::timeout(CONNECTION, served).await;
            drop(pass);
        });
    }
}

/// Asks a node for the cluster's status.
pub async fn fetch_status(address: &str) -> anyhow::Result<Status> {
    let request = hyper::Request::get("/status");
    let (status, body) = call(address, request, Bytes::new(), Duration::from_secs(5)).await?;
    if !status.is_success() {
        bail!("the node at {address} answers {status}");
    }
    read(&body).with_context(|| format!("{address} gives no status"))
}

/// Asks a node to have something done.
pub async fn ask(address: &str, ask: &Ask) -> anyhow::Result<Answer> {
    let request = hyper::Request::post("/ask").header("content-type", "application/json");
    let (status, body) =
        call(address, request, serde_json::to_vec(ask)?.into(), ASK_PATIENCE).await?;
    match status {
        hyper::StatusCode::CONFLICT => Ok(Err(text(&body))),
        status if status.is_success() => Ok(Ok(read(&body)?)),
        status => bail!("the node at {address} answers {status}: {}", text(&body)),
    }
}

/// What a node says is shown on terminals, and other nodes and clients have a part in it.
fn text(body: &[u8]) -> String {
    harmless(&String::from_utf8_lossy(body))
}

/// The same of all texts in an answer.
fn read<T: DeserializeOwned>(body: &[u8]) -> anyhow::Result<T> {
    fn harmless_texts(value: Value) -> Value {
        match value {
            Value::String(text) => Value::String(harmless(&text)),
            Value::Array(values) => values.into_iter().map(harmless_texts).collect(),
            Value::Object(fields) => {
                let fields = fields.into_iter();
                fields.map(|(name, value)| (harmless(&name), harmless_texts(value))).collect()
            }
            other => other,
        }
    }
    Ok(serde_json::from_value(harmless_texts(serde_json::from_slice(body)?))?)
}

async fn call(
    address: &str,
    request: hyper::http::request::Builder,
    body: Bytes,
    patience: Duration,
) -> anyhow::Result<(hyper::StatusCode, Bytes)> {
    let request = async {
        let stream = TcpStream::connect(address).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // It ends with `sender`.
        tokio::spawn(connection);
        let request = request.header("host", address).body(Full::new(body))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LONGEST_ANSWER).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!("its answer: {error}"))?;
        Ok((status, body.to_bytes()))
    };
    tokio::time::timeout(patience, request)
        .await
        .map_err(|_| anyhow::anyhow!("it does not answer within {} seconds", patience.as_secs()))
        .flatten()
        .with_context(|| format!("cannot ask the node at {address} (its admin-address)"))
}
