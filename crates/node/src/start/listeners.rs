//! The addresses of a node.

use anyhow::Context;
use standby_config::{Address, Config, ZeoAddress};

use crate::platform::TcpListener;
use crate::transport::stream::{Listener, listen};

/// The sockets at which a node listens, as far as they are configured. They are bound before any
/// file is touched: a second start of the same node fails there.
pub(crate) struct Listeners {
    /// For clients that read and write.
    pub zeo: Vec<(ZeoAddress, Listener)>,
    /// For clients that only read.
    pub read_only: Option<Listener>,
    /// For other nodes.
    pub peer: Option<TcpListener>,
    /// For administration.
    pub admin: Option<TcpListener>,
}

impl Listeners {
    /// Binds all of them, or says which address is taken.
    pub(crate) async fn bind(config: &Config) -> anyhow::Result<Listeners> {
        let mut zeo = Vec::new();
        for address in &config.zeo.addresses {
            zeo.push((address.clone(), Listener::bind(address).await?));
        }
        let standby = config.standby.as_ref();
        let read_only = standby.and_then(|standby| standby.read_only_address.as_ref());
        Ok(Listeners {
            zeo,
            read_only: bind(read_only, "read-only-address").await?.map(Listener::Tcp),
            peer: bind(standby.map(|standby| &standby.peer_address), "peer-address").await?,
            admin: bind(standby.map(|standby| &standby.admin_address), "admin-address").await?,
        })
    }
}

async fn bind(address: Option<&Address>, key: &str) -> anyhow::Result<Option<TcpListener>> {
    let Some(address) = address else { return Ok(None) };
    let listener = listen(address).await;
    listener.map(Some).with_context(|| format!("cannot listen on {key} {address}"))
}
