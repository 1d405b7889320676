//! Asking for packs.
//!
//! Every node must pack the same: what is committed after the entry of a pack in the log has a tid
//! above the pack's time. And while a pack is under way, nothing may be undone: an undo could bring
//! back a revision that the pack is about to remove, or references to garbage.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use standby_consensus::Command;
use standby_types::time::{seconds_of, tid_at, utc};
use standby_zeo::{ClientError, Value, VoteRequest};
use tracing::warn;

use crate::cells::apply_task::Origin;
use crate::cells::client_errors::undo_disabled;
use crate::cells::sessions::SessionHandle;
use crate::primary::engine::Engine;

/// A last transaction that is further ahead is no matter of clocks that differ a little.
const IN_THE_FUTURE: Duration = Duration::from_secs(60);

/// A client's request.
pub(super) struct PackRequest {
    pub session: Arc<SessionHandle>,
    pub storage: String,
    /// `None` if no answer is wanted.
    pub id: Option<Value>,
    /// In seconds since 1970.
    pub time: f64,
    /// The answer is to come when this node has packed.
    pub wait: bool,
}

impl Engine {
    pub(super) fn pack(&mut self, request: PackRequest) -> anyhow::Result<()> {
        let Some(shared) = self.shared.storages.get(&request.storage) else { return Ok(()) };
        if !self.serves() || self.shared.read_only_storages.contains(&request.storage) {
            answer(&request, Err(ClientError::ReadOnly));
        } else if shared.packing.percent().is_some() {
            answer(&request, Err(ClientError::file_storage("Already packing")));
        } else if shared.reader().is_empty() {
            answer(&request, Ok(()));
        } else {
            // From here on nothing new is undone; what is being undone is waited for.
            shared.packing.set(Some(0));
            request.session.packs.store(request.wait && request.id.is_some(), Ordering::Release);
            self.packs.push(request);
            self.packs_that_waited()?;
        }
        Ok(())
    }

    /// Proposes packs for which no undo is under way any more.
    pub(super) fn packs_that_waited(&mut self) -> anyhow::Result<()> {
        for request in std::mem::take(&mut self.packs) {
            let Some(committing) = self.storages.get(&request.storage) else { continue };
            if committing.transactions.any_undo() {
                self.packs.push(request);
                continue;
            }
            let asked = tid_at(Duration::try_from_secs_f64(request.time).unwrap_or_default());
            let time = asked.min(committing.last_tid);
            let now = self.shared.wall_clock();
            if asked < committing.last_tid && committing.last_tid > tid_at(now + IN_THE_FUTURE) {
                warn!(
                    storage = request.storage,
                    "the last transaction is in the future ({}), from a clock that was wrong: what \
                     was committed since is younger than this pack's time, and stays. A pack to a \
                     time after that removes it, for example of a client's storage.pack({:.0})",
                    utc(committing.last_tid),
                    seconds_of(committing.last_tid) + 1.0
                );
            }
            let config = &self.shared.config.storages;
            let gc = config.iter().any(|s| s.name == request.storage && s.pack_gc);
            let origin = match &request.id {
                Some(id) if request.wait => {
                    Some(Origin { session: request.session.clone(), id: id.clone() })
                }
                _ => None,
            };
            let command = Command::Pack { storage: request.storage.clone(), time, gc };
            if self.propose(command, origin)?.is_none() {
                request.session.cut("this node is not primary");
            } else if !request.wait {
                answer(&request, Ok(()));
            }
        }
        Ok(())
    }

    /// Why a vote that undoes something is refused now.
    pub(super) fn refuse_undo(&self, storage: &str, request: &VoteRequest) -> Option<ClientError> {
        let packing = self.shared.storages.get(storage)?.packing.percent().is_some();
        (packing && !request.undos.is_empty()).then(undo_disabled)
    }
}

fn answer(request: &PackRequest, result: Result<(), ClientError>) {
    let Some(id) = &request.id else { return };
    let encoding = request.session.encoding();
    request.session.answer(match result {
        Ok(()) => encoding.reply(id, Value::None),
        Err(error) => encoding.error(id, &error),
    });
}
