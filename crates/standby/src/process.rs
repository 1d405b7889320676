//! Nodes as child processes, for the demo and the benchmark.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context;

/// A node in a process of its own. It is killed when this is dropped.
pub struct NodeProcess {
    /// Its name.
    pub name: String,
    /// Where clients write.
    pub address: String,
    /// Where clients read.
    pub read_only_address: String,
    /// Where administrators ask.
    pub admin_address: String,
    config: PathBuf,
    log: PathBuf,
    child: Option<Child>,
}

/// Writes the configurations of a cluster of `count` nodes below `dir`, on free ports of 127.0.0.1.
pub fn configure(dir: &Path, count: usize) -> anyhow::Result<Vec<NodeProcess>> {
    let names: Vec<String> = (1..=count).map(|n| format!("n{n}")).collect();
    let ports = free_ports(count * 4)?;
    let port = |node: usize, which: usize| format!("127.0.0.1:{}", ports[node * 4 + which]);
    let members: String = names
        .iter()
        .enumerate()
        .map(|(n, name)| format!("  member {name} {} here\n", port(n, 2)))
        .collect();
    let mut nodes = Vec::new();
    for (n, name) in names.into_iter().enumerate() {
        let home = dir.join(&name);
        fs::create_dir_all(&home)?;
        let (address, read_only_address, admin_address) = (port(n, 0), port(n, 1), port(n, 3));
        let text = format!(
            "<zeo>\n  address {address}\n</zeo>\n\
             <filestorage 1>\n  path {home}/Data.fs\n</filestorage>\n\
             <standby>\n  cluster demo\n  node {name}\n  group here\n  state-dir {home}/state\n  \
             read-only-address {read_only_address}\n  peer-address {peer}\n  \
             admin-address {admin_address}\n{members}</standby>\n",
            home = home.display(),
            peer = port(n, 2),
        );
        let config = home.join("zeo.conf");
        fs::write(&config, text)?;
        nodes.push(NodeProcess {
            name,
            address,
            read_only_address,
            admin_address,
            log: home.join("log.txt"),
            config,
            child: None,
        });
    }
    Ok(nodes)
}

/// Ports that nobody listens on at this moment. They lie below those that the system gives to
/// outgoing connections: one of these could take the port of a node that is down.
fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    const FIRST: u16 = 10_000;
    const PORTS: u16 = 20_000;
    // Two demos at the same time begin at different places.
    let start = (std::process::id() % u32::from(PORTS)) as u16;
    let ports: Vec<u16> = (0..PORTS)
        .map(|n| FIRST + (start + n) % PORTS)
        .filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .take(count)
        .collect();
    anyhow::ensure!(ports.len() == count, "there are not {count} free ports on 127.0.0.1");
    Ok(ports)
}

impl NodeProcess {
    /// Starts it.
    pub fn start(&mut self) -> anyhow::Result<()> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let log = fs::OpenOptions::new().create(true).append(true).open(&self.log)?;
        let child = Command::new(program)
            .arg("serve")
            .arg("-C")
            .arg(&self.config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot start a node")?;
        self.child = Some(child);
        Ok(())
    }

    /// The process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Ends it by SIGKILL, as a power cord would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Ends it by SIGTERM.
    pub fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        if let Some(pid) = rustix::process::Pid::from_raw(child.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = child.wait();
    }

    /// Its last log lines, for an error message.
    pub fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        self.kill();
    }
}
