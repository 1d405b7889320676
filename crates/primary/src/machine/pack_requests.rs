//! Asking for packs.
//!
//! Every node must pack the same: what is committed after the entry of a pack in the log has a tid
//! above the pack's time. And while a pack is under way, nothing may be undone: an undo could bring
//! back a revision that the pack is about to remove, or references to garbage.

use std::time::Duration;

use standby_consensus::Command;
use standby_types::time::{seconds_of, tid_at, utc};
use standby_zeo::{ClientError, Value, VoteRequest};
use tracing::warn;

use crate::Result;
use crate::action::Action;
use crate::caller::Caller;
use crate::client_errors::undo_disabled;
use crate::input::PackRequest;
use crate::machine::Machine;
use crate::machine::requests::IS_NOT_PRIMARY;

/// A last transaction that is further ahead is no matter of clocks that differ a little.
const IN_THE_FUTURE: Duration = Duration::from_secs(60);

impl Machine {
    pub(crate) fn pack(&mut self, request: PackRequest) -> Result<()> {
        let storage = &request.storage;
        if !self.storages.contains_key(storage) {
            return Ok(());
        }
        let read_only = |name: &String| {
            self.config.storages.iter().any(|section| section.name == *name && section.read_only)
        };
        if !self.serves() || read_only(storage) {
            self.answer_pack(&request, Err(ClientError::ReadOnly));
        } else if self.facts.is_packing(storage) {
            self.answer_pack(&request, Err(ClientError::file_storage("Already packing")));
        } else if self.facts.is_empty(storage) {
            self.answer_pack(&request, Ok(()));
        } else {
            // From here on nothing new is undone; what is being undone is waited for.
            let waits = (request.wait && request.id.is_some()).then_some(request.session);
            self.act(Action::PackBegins(storage.clone(), waits));
            self.packs.push(request);
            self.packs_that_waited()?;
        }
        Ok(())
    }

    /// Proposes packs for which no undo is under way any more.
    pub(crate) fn packs_that_waited(&mut self) -> Result<()> {
        for request in std::mem::take(&mut self.packs) {
            let Some(committing) = self.storages.get(&request.storage) else { continue };
            if committing.transactions.any_undo() {
                self.packs.push(request);
                continue;
            }
            let asked = tid_at(Duration::try_from_secs_f64(request.time).unwrap_or_default());
            let time = asked.min(committing.last_tid);
            let now = self.facts.wall_clock();
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
            let config = &self.config.storages;
            let gc = config.iter().any(|s| s.name == request.storage && s.pack_gc);
            let caller = request.id.as_ref().filter(|_| request.wait);
            let caller = caller.map(|id| Caller { session: request.session, call: id.clone() });
            let command = Command::Pack { storage: request.storage.clone(), time, gc };
            if self.propose(command, caller)?.is_none() {
                self.act(Action::Cut(request.session, IS_NOT_PRIMARY));
            } else if !request.wait {
                self.answer_pack(&request, Ok(()));
            }
        }
        Ok(())
    }

    /// Why a vote that undoes something is refused now.
    pub(crate) fn refuse_undo(&self, storage: &str, request: &VoteRequest) -> Option<ClientError> {
        let undoes = !request.undos.is_empty();
        (undoes && self.facts.is_packing(storage)).then(undo_disabled)
    }

    fn answer_pack(&mut self, request: &PackRequest, result: Result<(), ClientError>) {
        let Some(call) = request.id.clone() else { return };
        let caller = Caller { session: request.session, call };
        self.act(Action::Answer(caller, result.map(|()| Value::None)));
    }
}
