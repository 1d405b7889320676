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
    /// The node is gone.
    Remove(NodeId),
}

impl Membership {
    /// A cluster of one.
    pub fn founded_by(member: Member) -> Membership {
        Membership {
            voters: BTreeSet::from([member.id]),
            members: BTreeMap::from([(member.id, member)]),
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
    pub fn encode(&self, out: &mut BytesMut) {
        for ids in [&self.voters, &self.outgoing, &self.learners, &self.learners_next] {
            put_list(out, ids.iter(), |out, id| out.put_u64(id.0));
        }
        out.put_u8(u8::from(self.auto_leave));
        put_list(out, self.members.values(), put_member);
    }

    /// Reads what [`Membership::encode`] wrote; also returns the bytes that follow it.
    pub fn decode(bytes: Bytes) -> Result<(Membership, Bytes), Malformed> {
        let mut reader = Reader::new(bytes, "membership");
        let ids = |reader: &mut Reader| reader.list(|r| r.u64().map(NodeId));
        let membership = Membership {
            voters: ids(&mut reader)?,
            outgoing: ids(&mut reader)?,
            learners: ids(&mut reader)?,
            learners_next: ids(&mut reader)?,
            auto_leave: reader.bool()?,
            members: reader.list(|r| take_member(r).map(|member| (member.id, member)))?,
        };
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
    })
}

/// The form in which changes stand in the log. Raft's own (protobuf) form is not read back.
pub(crate) fn encode_changes(changes: &[Change]) -> Bytes {
    let mut out = BytesMut::new();
    put_list(&mut out, changes.iter(), |out, change| match change {
        Change::AddLearner(member) => {
            out.put_u8(b'l');
            put_member(out, member);
        }
        Change::Promote(id) => {
            out.put_u8(b'v');
            out.put_u64(id.0);
        }
        Change::Remove(id) => {
            out.put_u8(b'r');
            out.put_u64(id.0);
        }
    });
    out.freeze()
}

/// Reads what [`encode_changes`] wrote. Raft itself appends an empty entry to leave joint consensus.
pub(crate) fn decode_changes(bytes: Bytes) -> Result<Vec<Change>, Malformed> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let mut reader = Reader::new(bytes, "membership change");
    let changes = reader.list(|r| match r.u8()? {
        b'l' => take_member(r).map(Change::AddLearner),
        b'v' => Ok(Change::Promote(NodeId(r.u64()?))),
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
        }
    }

    #[test]
    fn memberships_and_changes_travel() {
        let mut membership = Membership::founded_by(member(1));
        membership.learners.insert(NodeId(2));
        membership.members.insert(NodeId(2), member(2));
        let mut out = BytesMut::new();
        membership.encode(&mut out);
        out.put_slice(b"rest");
        let (back, rest) = Membership::decode(out.freeze()).unwrap();
        assert_eq!((back, &rest[..]), (membership, &b"rest"[..]));

        let changes = vec![
            Change::AddLearner(member(3)),
            Change::Promote(NodeId(2)),
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
