//! Tells in time of certificates that end.

use std::sync::Arc;
use std::time::Duration;

use crate::cells::shared::Shared;
use crate::transport::tls::Tls;

/// How often it is looked whether a certificate ends soon.
const LOOK: Duration = Duration::from_secs(3600);

/// Tells in time of certificates that end, until the process does.
pub(crate) async fn watch(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(LOOK).await;
        shared.certificates().for_each(Tls::warn_of_ends);
    }
}
