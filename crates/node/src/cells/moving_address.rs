//! Whether an address of this machine is about to leave it: see `tasks/role_command.rs`.

use std::time::Duration;

use tokio::sync::watch;

/// Those who listen at such an address, or are connected to it, hold a receiver each.
pub(crate) struct MovingAddress(watch::Sender<bool>);

impl MovingAddress {
    /// At its start a node does not know whether an address is here that must not be.
    pub(crate) fn new(moves: bool) -> MovingAddress {
        MovingAddress(watch::Sender::new(moves))
    }

    /// Who holds the result, or a clone of it, is to drop it when it turns true.
    pub(crate) fn stay(&self) -> watch::Receiver<bool> {
        self.0.subscribe()
    }

    /// Returns when addresses do not move, and with it what `stay` returns.
    pub(crate) async fn stays(&self) -> watch::Receiver<bool> {
        loop {
            let stay = self.stay();
            if !*stay.borrow() {
                return stay;
            }
            drop(stay);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Has all leave; false if some have not after `patience`.
    pub(crate) async fn clear(&self, patience: Duration) -> bool {
        self.0.send_replace(true);
        tokio::time::timeout(patience, self.0.closed()).await.is_ok()
    }

    /// The addresses have moved.
    pub(crate) fn end(&self) {
        self.0.send_replace(false);
    }
}

/// Returns when addresses are about to move.
pub(crate) async fn moves(stay: &mut watch::Receiver<bool>) {
    // Without a sender there is no node any more.
    let _ = stay.wait_for(|moves| *moves).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn all_leave_before_an_address_moves() {
        let address = MovingAddress::new(false);
        let (mut listener, client) = (address.stay(), address.stay());
        let leaves = async {
            moves(&mut listener).await;
            drop((listener, client));
        };
        assert!(tokio::join!(address.clear(SECOND), leaves).0);
        let comes = async { *address.stays().await.borrow() };
        let ends = async {
            tokio::time::sleep(SECOND).await;
            address.end();
        };
        assert!(!tokio::join!(comes, ends).0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_leave_is_waited_for_a_moment() {
        let address = MovingAddress::new(true);
        let stays = address.stay();
        assert!(*stays.borrow() && !address.clear(SECOND).await);
    }
}
