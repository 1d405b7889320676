//! Which transactions with a token were committed: what a client asks for whose connection broke
//! before it was told (Raft thesis §6.3).
//!
//! Of each client its last transaction is kept, for a client begins the next one only when it knows
//! the outcome. A storage keeps at most [`MOST_CLIENTS`] of them. Of more than [`KEPT_ANYWAY`] those
//! go that are older than [`KEPT_FOR`] by the time of the tids, which a clock that leaps can make of
//! all of them. What is dropped moves the horizon: so every answer is certain, or says that it is
//! not.
//!
//! ```text
//! encoded: horizon 8 · for each client: token 24, tid 8
//! ```

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use standby_types::time::time_of;
use standby_types::{Tid, TransactionToken};

/// So many clients' last transactions are kept.
pub const MOST_CLIENTS: usize = 10_000;
/// So many are kept however old they are.
pub const KEPT_ANYWAY: usize = 1_000;
/// The others are kept for so long.
pub const KEPT_FOR: Duration = Duration::from_secs(3600);
/// Bytes of a client.
const ROW: usize = TransactionToken::LEN + 8;

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was committed under this tid.
    Committed(Tid),
    /// It is not in the log.
    NotCommitted,
    /// Nobody knows: what is known of that time is incomplete.
    Forgotten,
    /// Nobody knows: a forced promotion may have lost it.
    TimelineChanged,
}

/// Those of a storage, for those who read them: the replica's machine alone changes them.
pub type SharedOutcomes = Arc<Mutex<Outcomes>>;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcomes {
    /// The last transaction of each client.
    last: BTreeMap<Tid, TransactionToken>,
    /// Where that of a client stands.
    clients: HashMap<[u8; 16], Tid>,
    /// Nothing is known of transactions up to this one, unless it is in `last`.
    horizon: Tid,
}

impl Outcomes {
    /// Nothing is known of what was committed up to `horizon`.
    pub fn unknown_until(horizon: Tid) -> Outcomes {
        Outcomes { horizon, ..Outcomes::default() }
    }

    /// A transaction is committed. Transactions come in the order of their tids, some of them again.
    pub fn committed(&mut self, token: TransactionToken, tid: Tid) {
        match self.clients.get(&token.client) {
            Some(later) if tid <= *later => return,
            Some(before) => drop(self.last.remove(before)),
            None => {}
        }
        self.clients.insert(token.client, tid);
        self.last.insert(tid, token);
        self.forget(tid);
    }

    /// What became of a transaction whose client knew `since` before it finished it.
    pub fn outcome(&self, token: TransactionToken, since: Tid) -> Outcome {
        let last = self.clients.get(&token.client).and_then(|tid| self.last.get_key_value(tid));
        match last {
            Some((tid, last)) if *last == token => Outcome::Committed(*tid),
            // The client has gone on: it is not to ask.
            Some((_, last)) if last.number > token.number => Outcome::Forgotten,
            _ if since < self.horizon => Outcome::Forgotten,
            _ => Outcome::NotCommitted,
        }
    }

    /// How many clients are known.
    pub fn len(&self) -> usize {
        self.clients.len()
    }

    /// True if no client is known.
    pub fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }

    /// As it goes to a file, or to another node.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(8 + ROW * self.len());
        out.put_u64(self.horizon.0);
        for (tid, token) in &self.last {
            out.put_slice(&token.to_bytes());
            out.put_u64(tid.0);
        }
        out.freeze()
    }

    /// Reads what [`Outcomes::encode`] wrote; `None` if it is something else.
    pub fn decode(mut bytes: &[u8]) -> Option<Outcomes> {
        let mut outcomes = Outcomes::unknown_until(Tid(bytes.try_get_u64().ok()?));
        if !bytes.len().is_multiple_of(ROW) || bytes.len() / ROW > MOST_CLIENTS {
            return None;
        }
        while !bytes.is_empty() {
            let mut token = [0; TransactionToken::LEN];
            bytes.try_copy_to_slice(&mut token).ok()?;
            let token = TransactionToken::from_bytes(token);
            let tid = Tid(bytes.try_get_u64().ok()?);
            let is_new = outcomes.clients.insert(token.client, tid).is_none();
            if !is_new || outcomes.last.insert(tid, token).is_some() {
                return None;
            }
        }
        Some(outcomes)
    }

    /// Fails if an invariant does not hold.
    pub(crate) fn invariants(&self) {
        assert_eq!(self.clients.len(), self.last.len(), "each client has one transaction");
        assert!(self.len() <= MOST_CLIENTS, "more clients than are kept");
    }

    /// Forgets what is too much, or too long before `now`.
    fn forget(&mut self, now: Tid) {
        let oldest = time_of(now).saturating_sub(KEPT_FOR);
        while self.clients.len() > KEPT_ANYWAY
            && let Some(first) = self.last.first_entry()
            && (self.clients.len() > MOST_CLIENTS || time_of(*first.key()) < oldest)
        {
            let (tid, token) = first.remove_entry();
            self.clients.remove(&token.client);
            self.horizon = self.horizon.max(tid);
        }
    }
}

#[cfg(test)]
mod tests {
    use standby_types::time::tid_at;

    use super::*;

    fn token(client: u16, number: u64) -> TransactionToken {
        let mut name = [0; 16];
        name[..2].copy_from_slice(&client.to_be_bytes());
        TransactionToken { client: name, number }
    }

    fn at(seconds: u64) -> Tid {
        tid_at(Duration::from_secs(1_800_000_000 + seconds))
    }

    #[test]
    fn the_last_transaction_of_each_client_is_known() {
        let mut outcomes = Outcomes::default();
        outcomes.committed(token(1, 4), at(1));
        outcomes.committed(token(2, 9), at(2));
        assert_eq!(outcomes.outcome(token(1, 4), Tid::NONE), Outcome::Committed(at(1)));
        assert_eq!(outcomes.outcome(token(1, 5), Tid::NONE), Outcome::NotCommitted);
        assert_eq!(outcomes.outcome(token(3, 1), Tid::NONE), Outcome::NotCommitted);
        outcomes.committed(token(1, 5), at(3));
        assert_eq!(outcomes.outcome(token(1, 4), Tid::NONE), Outcome::Forgotten);
        assert_eq!(outcomes.outcome(token(1, 5), Tid::NONE), Outcome::Committed(at(3)));
        assert_eq!(outcomes.len(), 2);
        outcomes.invariants();
    }

    #[test]
    fn what_is_applied_again_changes_nothing() {
        let mut outcomes = Outcomes::default();
        outcomes.committed(token(1, 4), at(1));
        outcomes.committed(token(1, 5), at(2));
        let before = outcomes.clone();
        outcomes.committed(token(1, 4), at(1));
        outcomes.committed(token(1, 5), at(2));
        assert_eq!(outcomes, before);
    }

    #[test]
    fn what_was_forgotten_is_not_said_to_be_lost() {
        let mut outcomes = Outcomes::default();
        outcomes.committed(token(1, 4), at(1));
        for client in 0..KEPT_ANYWAY {
            outcomes.committed(token(2 + client as u16, 1), Tid(at(3700).0 + client as u64));
        }
        assert_eq!(outcomes.len(), KEPT_ANYWAY);
        // The client knew nothing later: the forgotten one may be the one that it asks for.
        assert_eq!(outcomes.outcome(token(1, 4), at(0)), Outcome::Forgotten);
        // What it asks for would be later than all that is forgotten.
        assert_eq!(outcomes.outcome(token(1, 5), at(1)), Outcome::NotCommitted);
        assert_eq!(Outcomes::unknown_until(at(5)).outcome(token(1, 1), at(4)), Outcome::Forgotten);
        assert_eq!(
            Outcomes::unknown_until(at(5)).outcome(token(1, 1), at(5)),
            Outcome::NotCommitted
        );
    }

    /// Found by a simulation: a clock that leaps by a day has made all others a day old.
    #[test]
    fn a_clock_that_leaps_has_few_forgotten() {
        let mut outcomes = Outcomes::default();
        outcomes.committed(token(1, 4), at(1));
        outcomes.committed(token(2, 1), at(90_000));
        assert_eq!(outcomes.outcome(token(1, 4), at(0)), Outcome::Committed(at(1)));
        assert_eq!(outcomes.outcome(token(1, 5), at(0)), Outcome::NotCommitted);
    }

    #[test]
    fn they_are_bounded() {
        let mut outcomes = Outcomes::default();
        for client in 0..MOST_CLIENTS + 5 {
            outcomes.committed(token(client as u16, 1), Tid(at(0).0 + client as u64));
        }
        outcomes.invariants();
        assert_eq!(outcomes.len(), MOST_CLIENTS);
        assert_eq!(outcomes.outcome(token(4, 1), Tid::NONE), Outcome::Forgotten);
        let last = Tid(at(0).0 + 5);
        assert_eq!(outcomes.outcome(token(5, 1), Tid::NONE), Outcome::Committed(last));
        assert_eq!(Outcomes::decode(&outcomes.encode()), Some(outcomes));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            if let Some(outcomes) = Outcomes::decode(&bytes) {
                outcomes.invariants();
                assert_eq!(Outcomes::decode(&outcomes.encode()), Some(outcomes));
            }
        }
    }
}
