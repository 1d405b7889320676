//! The nodes that may have what is damaged here.

use std::sync::{Arc, Mutex};

use standby_types::lock::lock;

use crate::transport::handshake::Introduction;

/// The nodes that may have what is damaged here, and how to introduce this node to them.
#[derive(Default)]
pub(crate) struct RepairSources(Mutex<(Option<Arc<Introduction>>, Vec<String>)>);

impl RepairSources {
    /// Says who they are; the first is asked first.
    pub(crate) fn set(&self, me: Introduction, addresses: Vec<String>) {
        *lock(&self.0) = (Some(Arc::new(me)), addresses);
    }

    /// Where they are.
    pub(crate) fn addresses(&self) -> Vec<String> {
        lock(&self.0).1.clone()
    }

    /// How to introduce this node to them, and where they are.
    pub(crate) fn get(&self) -> (Option<Arc<Introduction>>, Vec<String>) {
        lock(&self.0).clone()
    }
}
