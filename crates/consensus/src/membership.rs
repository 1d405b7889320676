//! Who belongs to the cluster.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{BufMut, Bytes, BytesMut};
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, ConfState};
use standby_types::NodeId;

use crate::codec::{Malformed, Reader, put_bytes, put_list};

/// A node, as the others know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its identity.
    pub id: NodeId,
    /// Its name in the configuration.
    pub name: String,
    /// The group (place) it belongs to.
    pub group: String,
    /// Where its peers reach it.
    pub peer_address: String,
    /// It votes, but holds no data and never leads.
    pub witness: bool,
}

/// The members, and which of them vote.
///
/// While `outgoing` is not empty, a change of voters is under way: both majorities must agree
/// (joint consensus).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    /// Nodes whose votes and acknowledgements count.
    pub voters: BTreeSet<NodeId>,
    /// The voters before the change that is under way.
    pub outgoing: BTreeSet<NodeId>,
    /// Nodes that get everything and do not count.
    pub learners: BTreeSet<NodeId>,
    /// Voters of `outgoing` that become learners.
    pub learners_next: BTreeSet<NodeId>,
    /// Raft ends the change by itself.
    pub auto_leave: bool,
    /// What is known of each.
    pub members: BTreeMap<NodeId, Member>,
}

/// A change of the membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The node gets everything from now on.
    AddLearner(Member),
    /// The learner votes from now on.
    Promote(NodeId),
    /// The voter is a learner from now on.
    Demote(NodeId),
    /// The node is gone.
    Remove(NodeId),
}

impl Membership {
    /// Fails if an invariant does not hold: who votes is no learner, and everybody is a member.
    pub fn invariants(&self) {
        assert!(self.voters.is_disjoint(&self.learners), "a voter is a learner");
        assert!(self.learners_next.is_subset(&self.outgoing), "a learner to be is no voter");
        let all = [&self.voters, &self.outgoing, &self.learners];
        let all: BTreeSet<NodeId> = all.into_iter().flatten().copied().collect();
        assert!(all.iter().eq(self.members.keys()), "the members are others");
    }

    /// A cluster of one.
    pub fn founded_by(member: Member) -> Membership {
        Membership {
            voters: BTreeSet::from([member.id]),
            members: BTreeMap::from([(member.id, member)]),
            ..Membership::default()
        }
    }

    /// The same members, of which only this one votes.
    pub fn led_by(&self, id: NodeId) -> Membership {
        Membership {
            voters: BTreeSet::from([id]),
            learners: self.members.keys().copied().filter(|other| *other != id).collect(),
            members: self.members.clone(),
            ..Membership::default()
        }
    }

    /// True if the node is a member in any way.
    pub fn contains(&self, id: NodeId) -> bool {
        self.members.contains_key(&id)
    }

    /// True if the node's vote counts.
    pub fn is_voter(&self, id: NodeId) -> bool {
        self.voters.contains(&id) || self.outgoing.contains(&id)
    }

    /// True if the node is a witness.
    pub fn is_witness(&self, id: NodeId) -> bool {
        self.members.get(&id).is_some_and(|member| member.witness)
    }

    /// The voters that hold data, those of a change that is under way included.
    pub fn data_voters(&self) -> impl Iterator<Item = NodeId> {
        self.voters.union(&self.outgoing).copied().filter(|id| !self.is_witness(*id))
    }

    /// True if `nodes` hold a majority of the voters; during a change, of both sets of them.
    pub fn is_quorum(&self, nodes: &BTreeSet<NodeId>) -> bool {
        [&self.voters, &self.outgoing].into_iter().all(|voters| {
            voters.is_empty() || voters.intersection(nodes).count() * 2 > voters.len()
        })
    }

    /// The changes that give a member another peer address, and leave its vote: a voter becomes a
    /// learner and a voter again in one change. Nothing if it is no member.
    pub fn moved(&self, id: NodeId, peer_address: String) -> Vec<Change> {
        let Some(member) = self.members.get(&id) else { return Vec::new() };
        let at_new_address = Change::AddLearner(Member { peer_address, ..member.clone() });
        let vote = self.voters.contains(&id).then_some(Change::Promote(id));
        [at_new_address].into_iter().chain(vote).collect()
    }

    /// The member with this name.
    pub fn named(&self, name: &str) -> Option<&Member> {
        self.members.values().find(|member| member.name == name)
    }

    pub(crate) fn to_conf_state(&self) -> ConfState {
        let list = |ids: &BTreeSet<NodeId>| ids.iter().map(|id| id.0).collect::<Vec<_>>();
        let mut state = ConfState::default();
        state.set_voters(list(&self.voters));
        state.set_voters_outgoing(list(&self.outgoing));
        state.set_learners(list(&self.learners));
        state.set_learners_next(list(&self.learners_next));
        state.set_auto_leave(self.auto_leave);
        state
    }

    /// What Raft made of a change, together with what the change said of new members.
    pub(crate) fn changed(&self, state: &ConfState, changes: &[Change]) -> Membership {
        let set = |ids: &[u64]| ids.iter().map(|id| NodeId(*id)).collect::<BTreeSet<_>>();
        let mut next = Membership {
            voters: set(state.get_voters()),
            outgoing: set(state.get_voters_outgoing()),
            learners: set(state.get_learners()),
            learners_next: set(state.get_learners_next()),
            auto_leave: state.get_auto_leave(),
            members: self.members.clone(),
        };
        for change in changes {
            if let Change::AddLearner(member) = change {
                next.members.insert(member.id, member.clone());
            }
        }
        let kept: BTreeSet<NodeId> =
            [&next.voters, &next.outgoing, &next.learners, &next.learners_next]
                .into_iter()
                .flatten()
                .copied()
                .collect();
        next.members.retain(|id, _| kept.contains(id));
        next
    }

    /// Appends the membership to `out`.
    ///
    /// ```text
    /// voters, outgoing, learners, next learners: count 4, ids 8 each · flags 1 (1: Raft ends the
    /// change by itself; 2: witnesses follow) · members: count 4; each: id 8, name, group, peer
    /// address · if flag 2: witnesses: count 4, ids 8 each
    /// ```
    pub fn encode(&self, out: &mut BytesMut) {
        for ids in [&self.voters, &self.outgoing, &self.learners, &self.learners_next] {
            put_list(out, ids.iter(), |out, id| out.put_u64(id.0));
        }
        let witnesses: Vec<_> = self.members.values().filter(|member| member.witness).collect();
        let flags = u8::from(self.auto_leave) | u8::from(!witnesses.is_empty()) << 1;
        out.put_u8(flags);
        put_list(out, self.members.values(), put_member);
        if !witnesses.is_empty() {
            put_list(out, witnesses.into_iter(), |out, member| out.put_u64(member.id.0));
        }
    }

    /// Reads what [`Membership::encode`] wrote; also returns the bytes that follow it.
    pub fn decode(bytes: Bytes) -> Result<(Membership, Bytes), Malformed> {
        let mut reader = Reader::new(bytes, "membership");
        let ids = |reader: &mut Reader| reader.list::<_, BTreeSet<_>>(|r| r.u64().map(NodeId));
        let (voters, outgoing) = (ids(&mut reader)?, ids(&mut reader)?);
        let (learners, learners_next) = (ids(&mut reader)?, ids(&mut reader)?);
        let flags = reader.u8()?;
        if flags > 3 {
            return Err(reader.malformed());
        }
        let mut members: BTreeMap<NodeId, Member> =
            reader.list(|r| take_member(r).map(|member| (member.id, member)))?;
        if flags & 2 != 0 {
            for id in ids(&mut reader)? {
                members.get_mut(&id).ok_or(reader.malformed())?.witness = true;
            }
        }
        let auto_leave = flags & 1 != 0;
        let membership =
            Membership { voters, outgoing, learners, learners_next, auto_leave, members };
        Ok((membership, reader.rest()))
    }
}

fn put_member(out: &mut BytesMut, member: &Member) {
    out.put_u64(member.id.0);
    for text in [&member.name, &member.group, &member.peer_address] {
        put_bytes(out, text.as_bytes());
    }
}

fn take_member(reader: &mut Reader) -> Result<Member, Malformed> {
    Ok(Member {
        id: NodeId(reader.u64()?),
        name: reader.string()?,
        group: reader.string()?,
        peer_address: reader.string()?,
        witness: false,
    })
}

/// The form in which changes stand in the log. Raft's own (protobuf) form is not read back.
pub(crate) fn encode_changes(changes: &[Change]) -> Bytes {
    let mut out = BytesMut::new();
    put_list(&mut out, changes.iter(), |out, change| match change {
        Change::AddLearner(member) => {
            out.put_u8(if member.witness { b'w' } else { b'l' });
            put_member(out, member);
        }
        Change::Promote(id) => {
            out.put_u8(b'v');
            out.put_u64(id.0);
        }
        Change::Demote(id) => {
            out.put_u8(b'd');
            out.put_u64(id.0);
        }
        Change::Remove(id) => {
            out.put_u8(b'r');
            out.put_u64(id.0);
        }
    });
    out.freeze()
}

/// Reads what [`encode_changes`] wrote. Raft itself appends an empty entry to leave joint
/// consensus.
pub(crate) fn decode_changes(bytes: Bytes) -> Result<Vec<Change>, Malformed> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let mut reader = Reader::new(bytes, "membership change");
    let changes = reader.list(|r| match r.u8()? {
        b'l' => take_member(r).map(Change::AddLearner),
        b'w' => Ok(Change::AddLearner(Member { witness: true, ..take_member(r)? })),
        b'v' => Ok(Change::Promote(NodeId(r.u64()?))),
        b'd' => Ok(Change::Demote(NodeId(r.u64()?))),
        b'r' => Ok(Change::Remove(NodeId(r.u64()?))),
        _ => Err(r.malformed()),
    })?;
    reader.end()?;
    Ok(changes)
}

pub(crate) fn to_raft(changes: &[Change]) -> ConfChangeV2 {
    let singles = changes.iter().map(|change| {
        let (kind, id) = match change {
            Change::AddLearner(member) => (ConfChangeType::AddLearnerNode, member.id),
            Change::Promote(id) => (ConfChangeType::AddNode, *id),
            Change::Demote(id) => (ConfChangeType::AddLearnerNode, *id),
            Change::Remove(id) => (ConfChangeType::RemoveNode, *id),
        };
        let mut single = ConfChangeSingle::default();
        single.set_change_type(kind);
        single.node_id = id.0;
        single
    });
    let mut raft = ConfChangeV2::default();
    raft.set_changes(singles.collect::<Vec<_>>().into());
    raft
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn member(id: u64) -> Member {
        Member {
            id: NodeId(id),
            name: format!("n{id}"),
            group: "here".into(),
            peer_address: format!("127.0.0.1:{id}"),
            witness: false,
        }
    }

    #[test]
    fn memberships_and_changes_travel() {
        let mut membership = Membership::founded_by(member(1));
        membership.learners.insert(NodeId(2));
        membership.members.insert(NodeId(2), member(2));
        membership.members.insert(NodeId(3), Member { witness: true, ..member(3) });
        let mut out = BytesMut::new();
        membership.encode(&mut out);
        out.put_slice(b"rest");
        let (back, rest) = Membership::decode(out.freeze()).unwrap();
        assert_eq!((back, &rest[..]), (membership, &b"rest"[..]));

        let changes = vec![
            Change::AddLearner(member(3)),
            Change::AddLearner(Member { witness: true, ..member(4) }),
            Change::Promote(NodeId(2)),
            Change::Demote(NodeId(4)),
            Change::Remove(NodeId(1)),
        ];
        assert_eq!(decode_changes(encode_changes(&changes)), Ok(changes));
        assert_eq!(decode_changes(Bytes::new()), Ok(vec![]));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _ = Membership::decode(bytes.clone().into());
            let _ = decode_changes(bytes.into());
        }
    }
}
