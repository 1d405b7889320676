//! The HTTP interface for administrators, and a client for it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tracing::error;

use crate::node::Shared;
use crate::status::Status;

/// Serves `GET /status` and `GET /health`.
pub async fn listen(shared: Arc<Shared>, listener: TcpListener) {
    let app = Router::new()
        .route(
            "/status",
            get(|State(shared): State<Arc<Shared>>| async move { Json(shared.reports.status()) }),
        )
        .route("/health", get(|| async { "ok\n" }))
        .with_state(shared);
    if let Err(error) = axum::serve(listener, app).await {
        error!(%error, "the admin address is not served any more");
    }
}

/// Asks a node for the cluster's status.
pub async fn fetch_status(address: &str) -> anyhow::Result<Status> {
    let request = async {
        let stream = TcpStream::connect(address).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = hyper::Request::get("/status")
            .header("host", address)
            .body(Empty::<bytes::Bytes>::new())?;
        let response = sender.send_request(request).await?;
        if !response.status().is_success() {
            bail!("it answers {}", response.status());
        }
        let body = response.into_body().collect().await?.to_bytes();
        Ok(serde_json::from_slice(&body)?)
    };
    tokio::time::timeout(Duration::from_secs(5), request)
        .await
        .map_err(|_| anyhow::anyhow!("it does not answer within 5 seconds"))
        .flatten()
        .with_context(|| format!("cannot ask the node at {address} (its admin-address)"))
}
