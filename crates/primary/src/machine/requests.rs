//! What clients ask for: each request on its way to the part that decides.

use standby_consensus::Command;
use standby_types::Oid;
use standby_zeo::Value;

use crate::Result;
use crate::action::{Action, Reading};
use crate::caller::Caller;
use crate::client_errors::unknown_storage;
use crate::input::Request;
use crate::machine::Machine;
use crate::oids::{Exhausted, exhausted};

/// Why a client that wants to write is sent to another node.
pub(crate) const IS_NOT_PRIMARY: &str = "this node is not primary";

impl Machine {
    pub(crate) fn request(&mut self, request: Request) -> Result<()> {
        let now = self.now;
        match request {
            Request::Register { caller, storage, read_only } => {
                return self.register(caller, storage, read_only);
            }
            Request::Invalidations { caller, storage, since } => {
                self.act(Action::Read(Reading::Invalidations { storage, caller, since }));
            }
            Request::Sync { caller } => return self.when_level(Reading::Sync(caller)),
            Request::NewOids { caller, storage, count } => {
                match self.storages.get_mut(&storage).and_then(|s| s.oids.as_mut()) {
                    Some(oids) => oids.want(caller, count),
                    None => self.act(Action::Cut(caller.session, IS_NOT_PRIMARY)),
                }
                return self.give_oids();
            }
            Request::Vote { session, storage, vote } => self.vote(session, &storage, vote),
            Request::Finish { caller, storage, transaction } => {
                self.finish(caller, storage, transaction);
            }
            Request::Outcome(question) => self.outcome(question),
            Request::Pack(request) => return self.pack(request),
            Request::Abort { session, storage } => {
                self.unlocked(&storage, |t| t.abort(now, session));
            }
            Request::Closed { session, storage } => {
                self.act(Action::Forget(session));
                if let Some(storage) = storage {
                    self.unlocked(&storage, |t| t.abort(now, session));
                }
            }
        }
        Ok(())
    }

    fn register(&mut self, caller: Caller, storage: String, read_only: bool) -> Result<()> {
        if !self.storages.contains_key(&storage) {
            self.act(Action::RefuseStorage(caller, unknown_storage(&storage)));
            return Ok(());
        }
        if !read_only && !self.serves() {
            self.act(Action::SendOneAway(caller.session, IS_NOT_PRIMARY));
            return Ok(());
        }
        self.when_level(Reading::Register { storage, caller })
    }

    /// Hands out the oids that are wanted, as far as they are reserved, and reserves more.
    pub(crate) fn give_oids(&mut self) -> Result<()> {
        for name in &*self.names.clone() {
            let committed = self.ceilings.get(name).copied().unwrap_or(Oid(0));
            let used = self.facts.highest_oid(name);
            let Some(oids) = self.storages.get_mut(name).and_then(|s| s.oids.as_mut()) else {
                continue;
            };
            oids.committed(committed, used);
            let granted: Vec<_> = std::iter::from_fn(|| oids.grant()).collect();
            let proposal = oids.proposal();
            for (caller, granted) in granted {
                let answer = match granted {
                    Ok(oids) => {
                        let list = oids.iter().map(|oid| oid.to_bytes().into()).collect();
                        Ok(Value::List(list))
                    }
                    Err(Exhausted) => Err(exhausted()),
                };
                self.act(Action::Answer(caller, answer));
            }
            if let Some(ceiling) = proposal {
                let command = Command::OidCeiling { storage: name.clone(), ceiling };
                if self.propose(command, None)?.is_none()
                    && let Some(oids) = self.storages.get_mut(name).and_then(|s| s.oids.as_mut())
                {
                    oids.not_taken();
                }
            }
        }
        Ok(())
    }
}
