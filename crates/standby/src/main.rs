//! The command line.

mod administer;
mod bench;
mod demo;
mod process;
mod promote;
mod renumber;
mod router;
mod serve;
mod skip_entry;
mod status;
mod supervise;
mod zeo_client;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A ZEO server with a primary and replicas: when the primary dies, a replica takes over by itself
/// in about a second, no acknowledged commit is lost, and stock ZEO clients go on.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a node.
    ///
    /// FILE is a zeo.conf as runzeo reads it. Without a <standby> section the node serves its data
    /// file alone; with one it is a member of a cluster:
    ///
    ///   <zeo>
    ///     address 10.0.0.1:8100
    ///   </zeo>
    ///   <filestorage 1>
    ///     path /srv/standby/Data.fs
    ///   </filestorage>
    ///   <standby>
    ///     cluster            archive
    ///     node               n1
    ///     group              london
    ///     state-dir          /srv/standby/state
    ///     read-only-address  10.0.0.1:8101
    ///     peer-address       10.0.0.1:8102
    ///     admin-address      127.0.0.1:8103
    ///     member  n1 10.0.0.1:8102 london
    ///     member  n2 10.0.0.2:8102 london
    ///     member  n3 10.0.0.3:8102 london
    ///     secret-file        /srv/standby/secret
    ///   </standby>
    ///
    /// The first member bootstraps the cluster from the Data.fs that it has, as soon as a majority
    /// of the members is up; the others start empty and get everything from it. STANDBY_LOG=debug
    /// shows more.
    ///
    /// SIGTERM and SIGINT end the node in an orderly way, SIGHUP makes it read its certificates
    /// again, SIGUSR2 open its log files again.
    #[command(verbatim_doc_comment)]
    Serve {
        /// The configuration.
        #[arg(short = 'C', long = "config", value_name = "FILE")]
        config: PathBuf,
        /// Only read the configuration, and say what is wrong with it.
        #[arg(long)]
        check: bool,
        /// Runs the node as a child process; kills it when it is frozen, so that its clients go to
        /// another node, and starts it again. A crash is handled alike; an error ends both. Under
        /// systemd, use WatchdogSec instead.
        #[arg(long, conflicts_with = "check")]
        supervise: bool,
        /// Seconds without a sign of life after which the node counts as frozen.
        #[arg(long, value_name = "SECONDS", requires = "supervise", default_value_t = 2.0)]
        frozen_after: f64,
    },
    /// One local address for stock clients: finds the primary, and breaks connections to a host
    /// that vanished or is frozen, which stock clients wait for.
    ///
    /// It runs on the machine of the clients, knows one or more nodes, and learns of the others
    /// from them:
    ///
    ///   standby router --node db1:8100 --node db2:8100 \
    ///       --writes 127.0.0.1:8100 --reads 127.0.0.1:8101
    ///
    /// A client that writes gets the primary, and waits while there is none:
    ///
    ///   <zeoclient>
    ///     server 127.0.0.1:8100
    ///   </zeoclient>
    ///
    /// A client with `read-only true` in its section gets a replica at the other address: of the
    /// nearest group, and of that the one with the fewest clients. TLS passes through as it is.
    /// SIGTERM ends the router: each connection as soon as it is quiet.
    #[command(verbatim_doc_comment)]
    Router(router::Options),
    /// Shows the nodes of a cluster: role, term, last transaction, lag, addresses.
    Status {
        #[command(flatten)]
        at: status::At,
        /// For programs.
        #[arg(long)]
        json: bool,
        /// Again every second, until Ctrl-C.
        #[arg(long, conflicts_with = "json")]
        watch: bool,
    },
    /// Makes another node primary while commits go on: they are held for a moment, and none is
    /// lost.
    Switchover(administer::Switchover),
    /// Adds, replaces and removes nodes while the cluster runs.
    #[command(subcommand)]
    Node(administer::Node),
    /// Says which groups of nodes can have the primary.
    #[command(subcommand)]
    Group(administer::Group),
    /// What the cluster may use, after an upgrade of all nodes.
    #[command(subcommand)]
    FeatureLevel(administer::FeatureLevel),
    /// Makes a group go on when the primary's group is lost; commits that have not reached it may
    /// be lost.
    ///
    /// Shows what is known of that, asks, and begins a new timeline: the best node of the group
    /// becomes primary, and its other nodes vote as soon as they have caught up. Clients that have
    /// seen more drop their caches. When the lost nodes come back they keep what only they have in
    /// files, and follow.
    #[command(verbatim_doc_comment)]
    Promote(promote::Promote),
    /// The same within the group that votes, when a majority of its nodes is lost for good.
    RecoverQuorum(promote::RecoverQuorum),
    /// What was lost by forced promotions, and kept.
    #[command(subcommand)]
    Lost(promote::Lost),
    /// The timelines of the cluster, and what to do if there are two.
    #[command(subcommand)]
    Lineage(promote::LineageOf),
    /// Leaves out an entry of the log that no node can apply: the last resort if all nodes stop at
    /// it, at each start.
    ///
    /// The error names the entry. What it says is lost, for example one transaction, and nothing
    /// else. An entry that can be applied is never left out. To be run for each node of the cluster
    /// while all are stopped.
    #[command(verbatim_doc_comment)]
    SkipEntry(skip_entry::SkipEntry),
    /// Gives new tids to transactions of a data file that was written while a clock was set back.
    ///
    /// The tids of such a file do not grow: Python's FileStorage serves it, but never packs it, and
    /// Standby refuses it. As few transactions as possible get another tid, and every transaction
    /// is kept. DATA_FS is replaced by a copy; the former file stays as DATA_FS.before-renumber.
    /// Nobody may be serving it meanwhile. Afterwards remove the cache files of clients that have
    /// any (client, var in <zeoclient>).
    #[command(verbatim_doc_comment)]
    Renumber(renumber::Renumber),
    /// Starts three nodes on this machine, kills the primary while clients write, and shows that
    /// nothing is lost.
    Demo(demo::Options),
    /// Measures commits per second of any ZEO server. It writes to the server's database: use an
    /// empty one.
    Bench(bench::Options),
}

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("standby: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(async {
        match Arguments::parse().command {
            Command::Serve { config, supervise: true, frozen_after, .. } => {
                supervise::run(&config, frozen_after).await
            }
            Command::Serve { config, check, .. } => serve::run(&config, check).await,
            Command::Router(options) => router::run(options).await,
            Command::Status { at, json, watch } => status::run(&at, json, watch).await,
            Command::Switchover(options) => administer::switchover(options).await,
            Command::Node(command) => administer::node(command).await,
            Command::Group(command) => administer::group(command).await,
            Command::FeatureLevel(command) => administer::feature_level(command).await,
            Command::Promote(options) => promote::promote(options).await,
            Command::RecoverQuorum(options) => promote::recover_quorum(options).await,
            Command::Lost(command) => promote::lost(command).await,
            Command::Lineage(command) => promote::lineage(command).await,
            Command::SkipEntry(options) => skip_entry::run(&options),
            Command::Renumber(options) => renumber::run(&options),
            Command::Demo(options) => demo::run(&options).await,
            Command::Bench(options) => bench::run(&options).await,
        }
    });
    // What still blocks (a read from a slow disk) must not keep the process; and threads that wait
    // for the runtime's clock would not survive the runtime. Both go with the process.
    std::mem::forget(runtime);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("standby: {}", standby_logging::error_text::with_causes(&error));
            ExitCode::FAILURE
        }
    }
}
