//! How a cluster begins: the first member bootstraps it, once a majority of the listed members has
//! promised itself.
//!
//! ```text
//!  first member, new                     other members
//!    asks each (`Purpose::Bootstrap`)  ────▶  new, lists the same first member, has promised nothing to another
//!                                  ◀────    bootstrap: writes the promise, durably, and says yes
//!    has a majority, and nobody knows       member of a cluster: says so; that cluster takes the
//!    a cluster: writes `founds`,            first member in, as it does any node without a state
//!    begins anew, and bootstraps
//! ```
//!
//! A promise names the first member's identity. Two bootstraps would need two majorities, and a
//! member promises itself to one only. What this cannot see is a first member that lost its disk
//! while all who knew its cluster were away: two clusters are then told apart by the time of their
//! bootstrap, and the younger one stops serving (`Engine::note_other_cluster`).

use std::sync::Arc;
use std::time::Duration;

use standby_config::MemberLine;
use standby_logging::error_text::with_causes;
use standby_primary::Input;
use standby_replica::state_dir::Promise;
use tracing::info;

use crate::cells::shared::Shared;
use crate::platform;
use crate::transport::handshake::{PeerInfo, Purpose, Welcome, connect};

/// Time between two rounds.
const PAUSE: Duration = Duration::from_millis(250);
/// A first member whose clock is further off is refused: the time of a bootstrap counts.
const CLOCK_OFF: u64 = 3600;

/// True if the first line of the configuration names this node, and others are listed.
pub(crate) fn is_first_member(shared: &Shared) -> bool {
    let members = shared.config.standby.as_ref().map_or(&[][..], |standby| &standby.members);
    members.len() > 1 && members[0].name == shared.member.name
}

/// Asks the other members, again and again, until a majority agrees or this node belongs to a
/// cluster.
pub(crate) async fn run(shared: Arc<Shared>) {
    let Some(standby) = &shared.config.standby else { return };
    let mine = Promise { node: shared.member.name.clone(), id: shared.id.to_string() };
    while !shared.belongs() {
        let promised = promise_to(&shared, mine.clone()).await;
        let mut waits: Vec<String> = promised.as_ref().err().into_iter().cloned().collect();
        let mut agreed = usize::from(promised.is_ok());
        let mut exists = false;
        for answer in ask_all(&shared, &standby.members[1..]).await {
            match answer {
                Ok(None) => agreed += 1,
                Ok(Some(node)) => {
                    exists = true;
                    waits.push(format!(
                        "{node} belongs to the cluster already, which takes this node in when it \
                         has a primary (if a majority of it is lost for good: standby \
                         recover-quorum on {node})"
                    ));
                }
                Err(reason) => waits.push(reason),
            }
        }
        if promised.is_ok() && !exists && agreed * 2 > standby.members.len() {
            info!(agreed, of = standby.members.len(), "the listed members agree to a bootstrap");
            shared.report(Input::Bootstraps);
        }
        let waits = waits.join("; ");
        shared.set_bootstrap(Some(match exists {
            true => waits,
            false => format!(
                "it bootstraps the cluster when a majority of the {} listed members agrees; {agreed} \
                do. {waits}",
                standby.members.len(),
            ),
        }));
        tokio::time::sleep(PAUSE).await;
    }
    shared.set_bootstrap(None);
}

/// Of each other member: it agrees, its name if it belongs to a cluster, or why it does not agree.
async fn ask_all(shared: &Shared, others: &[MemberLine]) -> Vec<Result<Option<String>, String>> {
    let introduction = Arc::new(shared.introduction());
    let asking = others.iter().map(|member| {
        let (me, name, address) =
            (introduction.clone(), member.name.clone(), member.address.to_string());
        // It is joined below; a connection attempt has a deadline.
        tokio::spawn(async move {
            let asked = connect(&me, &address, Purpose::Bootstrap).await;
            let known = |info: PeerInfo| (!info.cluster_id.is_empty()).then_some(info.node);
            let answer = asked.map(|(_, info)| known(info));
            answer.map_err(|error| format!("{name} ({address}): {error}"))
        })
    });
    let asking: Vec<_> = asking.collect();
    let mut answers = Vec::new();
    for answer in asking {
        answers.push(answer.await.unwrap_or_else(|error| Err(error.to_string())));
    }
    answers
}

/// Promises this node to a first member that asks for it, durably, or says why not.
pub(crate) async fn promise(shared: &Arc<Shared>, other: &PeerInfo) -> Result<Welcome, String> {
    let name = &shared.member.name;
    let members = shared.config.standby.as_ref().map_or(&[][..], |standby| &standby.members);
    match members.first() {
        Some(first) if first.name == other.node => {}
        Some(first) => {
            return Err(format!(
                "the file of {name} names {} as the first member, that of {} itself: the member \
                 lines must be the same, in the same order, on each node",
                first.name, other.node
            ));
        }
        None => return Err(format!("{name} joins a cluster that is there: it bootstraps none")),
    }
    if shared.belongs() {
        // Its hello has said so.
        return Ok(Welcome::default());
    }
    let here = platform::wall_clock().as_secs();
    if here.abs_diff(other.clock) > CLOCK_OFF {
        return Err(format!(
            "the clocks of {} and {name} are more than an hour apart: set them right",
            other.node
        ));
    }
    let promise = Promise { node: other.node.clone(), id: other.id().to_string() };
    promise_to(shared, promise).await.map(|()| Welcome::default())
}

async fn promise_to(shared: &Arc<Shared>, promise: Promise) -> Result<(), String> {
    // One at a time: what is read must still be so when the promise is written.
    let _turn = shared.promising.lock().await;
    let (state, disk, name) =
        (shared.state.clone(), shared.disk.clone(), shared.member.name.clone());
    let bootstraps = is_first_member(shared);
    let decide = move || -> anyhow::Result<Result<(), String>> {
        Ok(match state.promise(&*disk)? {
            Some(former) if former == promise => Ok(()),
            // Its file named it first then, and does not any more: it will not found anything.
            Some(former) if former.node == name && !bootstraps => {
                state.set_promise(&*disk, &promise)?;
                Ok(())
            }
            Some(former) => Err(format!(
                "{name} has promised itself to a bootstrap by {} with the identity {}, and {} has \
                 {}. If that bootstrap never came about: stop {name}, remove {}, in which nothing \
                 else is yet, and start it again",
                former.node,
                former.id,
                promise.node,
                promise.id,
                state.0.display()
            )),
            None => {
                state.set_promise(&*disk, &promise)?;
                info!(first_member = promise.node, id = promise.id, "promised to a bootstrap");
                Ok(())
            }
        })
    };
    let decided = platform::spawn_blocking(decide).await.map_err(|error| error.to_string())?;
    decided.map_err(|error| format!("cannot promise: {}", with_causes(&error)))?
}
