//! A place where a node begins, for tests.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use standby_config::Config;
use standby_disk::temporary_file;
use standby_types::Disk;

use crate::start::prepared::Repairers;
use crate::start::{Place, Platform};
use crate::state_dir::StateDir;

static DRAWN: AtomicU8 = AtomicU8::new(0);

/// See the module.
pub struct Ground {
    pub config: Config,
    pub disk: Arc<dyn Disk>,
    pub state: StateDir,
    pub repairers: Repairers,
}

impl Ground {
    pub fn new(disk: Arc<dyn Disk>, text: &str) -> Ground {
        let config = Config::parse(Path::new("/zeo.conf"), text).unwrap();
        let state = StateDir(config.state_dir());
        Ground { config, disk, state, repairers: BTreeMap::new() }
    }

    pub fn place(&self) -> Place<'_> {
        let platform = Platform {
            wall_clock: || Duration::from_secs(1_000_000_000),
            // Another name each time is all that is needed.
            fill_random: |bytes| {
                bytes.fill(DRAWN.fetch_add(2, Ordering::Relaxed) | 1);
                Ok(())
            },
            temporary_file,
        };
        let Ground { config, disk, state, repairers } = self;
        Place { config, disk, state, repairers, platform }
    }
}
