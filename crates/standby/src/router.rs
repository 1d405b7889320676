//! `standby router`

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use standby_config::{Address, SslSection, ZeoAddress};
use standby_logging as logging;
use standby_router::Config;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Args)]
pub struct Options {
    /// The address for clients of a node of the cluster; several, in case one is down.
    #[arg(long = "node", value_name = "HOST:PORT", required = true)]
    nodes: Vec<String>,
    /// Where clients that write connect: HOST:PORT, or the path of a Unix socket.
    #[arg(long, value_name = "ADDRESS", required_unless_present = "reads")]
    writes: Option<String>,
    /// Where clients that only read connect.
    #[arg(long, value_name = "ADDRESS")]
    reads: Option<String>,
    /// A storage that the nodes serve.
    #[arg(long, default_value = "1")]
    storage: String,
    /// The cluster's name. Without it, the first cluster that is found; nodes of others are left
    /// out.
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    /// A group whose replicas readers get; several, best first. Without it, the nearest.
    #[arg(long = "group", value_name = "NAME")]
    groups: Vec<String>,
    /// Readers leave a replica that lacks for so many seconds what another node has.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    max_lag: f64,
    /// A node that gives no sign of life for so many seconds after it was asked is dead: the
    /// connections to it are broken.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.5)]
    dead_after: f64,
    /// Seconds within which connections end after SIGTERM.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    drain: f64,
    /// Serves /metrics, and /health, which is 200 while there is a primary for writers.
    #[arg(long, value_name = "HOST:PORT")]
    metrics: Option<String>,
    /// If clients use TLS: a certificate for the router itself, which asks the nodes for signs of
    /// life. What clients say passes through encrypted.
    #[arg(long, value_name = "FILE", requires = "tls_authenticate")]
    tls_certificate: Option<PathBuf>,
    /// Its private key; without it, in the same file.
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
    /// The certificates of the nodes, or of who issued them: a file, or a folder of files.
    #[arg(long, value_name = "PATH", requires = "tls_certificate")]
    tls_authenticate: Option<PathBuf>,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    let config = options.config()?;
    let log_files = logging::start(None)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let ended = standby_router::run(config, stop).await;
    drop(log_files);
    ended
}

impl Options {
    fn config(self) -> anyhow::Result<Config> {
        let nodes = self.nodes.iter().map(|node| node_address(node));
        let tls = self.tls_certificate.zip(self.tls_authenticate);
        Ok(Config {
            nodes: nodes.collect::<anyhow::Result<_>>()?,
            storage: self.storage,
            writes: self.writes.as_deref().map(|at| own_address("--writes", at)).transpose()?,
            reads: self.reads.as_deref().map(|at| own_address("--reads", at)).transpose()?,
            cluster: self.cluster,
            groups: self.groups,
            max_lag: seconds("--max-lag", self.max_lag, 0.1)?,
            dead_after: seconds("--dead-after", self.dead_after, 0.2)?,
            drain: seconds("--drain", self.drain, 0.0)?,
            metrics: self.metrics.as_deref().map(|at| tcp_address("--metrics", at)).transpose()?,
            tls: tls.map(|(certificate, authenticate)| SslSection {
                key: self.tls_key.unwrap_or_else(|| certificate.clone()),
                certificate,
                password_function: None,
                authenticate,
            }),
        })
    }
}

/// A node's address needs a host: this machine may have none.
fn node_address(text: &str) -> anyhow::Result<String> {
    let address = tcp_address("--node", text)?;
    if address.host.is_empty() {
        bail!("--node {text}: a host is missing; HOST:PORT");
    }
    Ok(address.to_string())
}

fn tcp_address(option: &str, text: &str) -> anyhow::Result<Address> {
    Address::parse(text).map_err(|why| anyhow::anyhow!("{option}: {why}"))
}

fn own_address(option: &str, text: &str) -> anyhow::Result<ZeoAddress> {
    if text.contains('/') {
        return Ok(ZeoAddress::Unix(text.into()));
    }
    tcp_address(option, text).map(ZeoAddress::Tcp)
}

fn seconds(option: &str, value: f64, least: f64) -> anyhow::Result<Duration> {
    if !(least..=3600.0).contains(&value) {
        bail!("{option} {value}: {least} to 3600 seconds are possible");
    }
    Ok(Duration::from_secs_f64(value))
}
