//! `standby bench`: commits per second of any ZEO server.

use std::time::{Duration, Instant};

use anyhow::bail;
use bytes::Bytes;
use clap::Args;
use serde_json::json;
use standby_types::Tid;

use crate::zeo_client::Client;

#[derive(Args)]
pub struct Options {
    /// The server's address; several for a cluster.
    #[arg(long, value_name = "HOST:PORT", required = true)]
    at: Vec<String>,
    /// Clients that commit at the same time, each to objects of its own.
    #[arg(long, default_value_t = 8)]
    clients: usize,
    /// How long.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Objects in each transaction.
    #[arg(long, default_value_t = 1)]
    objects: usize,
    /// Objects of each client, which its transactions change in turn; without it, as many as are in
    /// one.
    #[arg(long)]
    population: Option<usize>,
    /// Bytes of each object.
    #[arg(long, default_value_t = 500)]
    size: usize,
    /// For programs.
    #[arg(long)]
    json: bool,
}

pub async fn run(options: &Options) -> anyhow::Result<()> {
    if options.clients == 0 || options.objects == 0 || options.objects > 100 {
        bail!("at least one client, and 1 to 100 objects");
    }
    let population = options.population.unwrap_or(options.objects);
    if !(options.objects..=10_000).contains(&population) {
        bail!("--population {population}: from the objects of a transaction to 10000");
    }
    let started = Instant::now();
    let end = started + Duration::from_secs_f64(options.seconds);
    let writers: Vec<_> = (0..options.clients)
        .map(|_| {
            let (at, objects, size) = (options.at.clone(), options.objects, options.size);
            tokio::spawn(commit_until(at, (objects, population), size, end))
        })
        .collect();
    let mut latencies: Vec<Duration> = Vec::new();
    for writer in writers {
        latencies.extend(writer.await??);
    }
    if latencies.is_empty() {
        bail!("not one commit within {} s", options.seconds);
    }
    latencies.sort();
    let rate = latencies.len() as f64 / options.seconds;
    let at = |part: f64| {
        let nth = ((latencies.len() - 1) as f64 * part) as usize;
        latencies[nth].as_micros() as u64
    };
    if options.json {
        let report = json!({
            "workload": "commit", "clients": options.clients,
            "transactions_per_s": rate.round(), "objects_per_s": (rate * options.objects as f64).round(),
            "loads_per_s": 0,
            "latency_us": {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": at(1.0)},
        });
        println!("{report}");
    } else {
        println!(
            "{} clients: {rate:.0} commits/s; latency median {} µs, 95 % {} µs, 99 % {} µs, worst \
            {} µs",
            options.clients,
            at(0.5),
            at(0.95),
            at(0.99),
            at(1.0)
        );
    }
    Ok(())
}

/// Commits new revisions of its own objects; returns how long each commit took.
async fn commit_until(
    addresses: Vec<String>,
    (objects, population): (usize, usize),
    size: usize,
    end: Instant,
) -> anyhow::Result<Vec<Duration>> {
    let mut client = Client::connect(&addresses, Duration::from_secs(10)).await?;
    let oids = client.new_oids(population as i64).await?;
    // A record that Python can read: an instance of persistent.mapping, and its state as bytes.
    let mut record = b"\x80\x03cpersistent.mapping\nPersistentMapping\n.\x80\x03B".to_vec();
    record.extend_from_slice(&(size as u32).to_le_bytes());
    record.extend(vec![b'x'; size]);
    record.push(b'.');
    let data = Bytes::from(record);
    let mut serials = vec![Tid::NONE; population];
    let mut latencies = Vec::new();
    let mut next = 0;
    while Instant::now() < end {
        let turn: Vec<_> = (next..next + objects).map(|nth| nth % population).collect();
        let record = |nth: &usize| (oids[*nth], serials[*nth], data.clone());
        let records: Vec<_> = turn.iter().map(record).collect();
        let began = Instant::now();
        let serial = client.commit(&records).await?;
        latencies.push(began.elapsed());
        turn.into_iter().for_each(|nth| serials[nth] = serial);
        next = (next + objects) % population;
    }
    Ok(latencies)
}
