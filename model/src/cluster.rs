//! What a cluster does, as far as its safety depends on it.
//!
//! A step is atomic: a node grants its Raft vote, takes an entry, or tells the primary what it has,
//! with another node's state before its eyes, where real nodes send messages. Messages that are
//! lost are steps that never happen; those that are late or come twice are steps that happen late
//! or again, for what a request says only grows within its term, and an answer counts from when it
//! was given. What a late message can say that its sender would not say now is a lower commit
//! index, and there is a step for that ([`Action::Append`]).
//!
//! Time is not here: leases, checks of the quorum and pre-votes only forbid steps.

use std::fmt;

/// Nodes, a bit each.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Nodes(pub u8);

impl Nodes {
    /// One node.
    pub fn of(node: usize) -> Nodes {
        Nodes(1 << node)
    }

    /// True if the node is one of them.
    pub fn has(self, node: usize) -> bool {
        self.0 & (1 << node) != 0
    }

    /// With another one.
    pub fn with(self, node: usize) -> Nodes {
        Nodes(self.0 | 1 << node)
    }

    /// True if more than a half of these are among the others.
    fn majority_in(self, others: Nodes) -> bool {
        2 * (self.0 & others.0).count_ones() > self.0.count_ones()
    }
}

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries((0..8).filter(|node| self.has(*node))).finish()
    }
}

/// Who votes; with `joining` a majority of both is needed (joint consensus, Raft paper, section 6).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Members {
    /// Those of before, or all.
    pub voters: Nodes,
    /// Those of afterwards.
    pub joining: Option<Nodes>,
}

impl Members {
    fn is_quorum(self, nodes: Nodes) -> bool {
        self.voters.majority_in(nodes) && self.joining.is_none_or(|new| new.majority_in(nodes))
    }

    fn has(self, node: usize) -> bool {
        self.voters.has(node) || self.joining.is_some_and(|new| new.has(node))
    }
}

/// What an entry of the log means.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum What {
    /// A primary's first.
    Nothing,
    /// A transaction; each has a number of its own.
    Commit(u8),
    /// Others vote.
    Members(Members),
    /// A timeline begins: a forced promotion's empty transaction.
    Fork(Nodes),
}

/// An entry of the log.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Entry {
    /// The term of the primary that proposed it.
    pub term: u8,
    /// The transaction's; 0 without one.
    pub tid: u8,
    /// What its primary knew to be committed when it proposed it.
    pub known: u8,
    /// What it means.
    pub what: What,
}

impl Entry {
    fn transaction(&self) -> Option<(u8, u8)> {
        match self.what {
            What::Commit(number) => Some((self.tid, number)),
            _ => None,
        }
    }
}

/// The beginning of a timeline.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Fork {
    /// Its name.
    pub name: u8,
    /// The last transaction of the former timeline that the promoted node knew to be committed.
    pub certain: u8,
    /// The last one that it had.
    pub after: u8,
    /// Those in between.
    pub tail: Vec<(u8, u8)>,
}

/// What a node is in its term.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    /// It follows.
    Replica,
    /// It stands; these have granted it their Raft votes.
    Candidate(Nodes),
    /// It leads.
    Primary,
}

/// A node.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Node {
    /// Its term; durable.
    pub term: u8,
    /// Whom it has granted its Raft vote in this term; durable.
    pub granted: Option<usize>,
    /// What it is.
    pub role: Role,
    /// Durable.
    pub log: Vec<Entry>,
    /// How many entries it knows to be committed, and has applied.
    pub commit: u8,
    /// The same, as its log says it: written with entries.
    pub durable_commit: u8,
    /// Durable.
    pub lineage: Vec<Fork>,
    /// What it kept in files when it came over to other timelines: numbers of transactions.
    pub lost: Vec<u8>,
    /// It has come over, and has not fetched yet what it lacks.
    pub behind: bool,
    /// What it has is not the beginning of what the others have, so that nobody takes it in.
    pub stranger: bool,
}

impl Node {
    /// Who votes, as far as it has applied the log. A change counts when it is applied, as in
    /// raft-rs.
    pub fn members(&self) -> Members {
        let applied = &self.log[..self.commit as usize];
        let last = applied.iter().rev().find_map(|entry| match entry.what {
            What::Members(members) => Some(members),
            What::Fork(voters) => Some(Members { voters, joining: None }),
            _ => None,
        });
        last.unwrap_or(Members { voters: Nodes(0), joining: None })
    }

    /// Transactions that it shows to readers, (tid, number) each.
    pub fn visible(&self) -> impl Iterator<Item = (u8, u8)> + '_ {
        self.log[..self.commit as usize].iter().filter_map(Entry::transaction)
    }

    /// All transactions that it has, committed or not.
    pub fn transactions(&self) -> impl Iterator<Item = (u8, u8)> + '_ {
        self.log.iter().filter_map(Entry::transaction)
    }

    fn last_tid(&self) -> u8 {
        self.log.iter().map(|entry| entry.tid).max().unwrap_or(0)
    }

    /// How far its log goes, for Raft votes (Raft paper, section 5.4.1).
    fn position(&self) -> (u8, usize) {
        (self.log.last().map_or(0, |entry| entry.term), self.log.len())
    }

    /// The names of the forks behind it.
    pub fn timeline(&self) -> Vec<u8> {
        self.lineage.iter().map(|fork| fork.name).collect()
    }

    /// True if an entry of its own term is committed: only then does it know what is (Raft paper,
    /// section 8).
    fn knows_commits(&self) -> bool {
        self.log[..self.commit as usize].iter().any(|entry| entry.term == self.term)
    }

    fn changes_members(&self) -> bool {
        let open = &self.log[self.commit as usize..];
        open.iter().any(|entry| matches!(entry.what, What::Members(_)))
    }

    fn propose(&mut self, tid: u8, what: What) {
        self.log.push(Entry { term: self.term, tid, known: self.commit, what });
        self.durable_commit = self.commit;
    }

    fn enter(&mut self, term: u8) {
        if term > self.term {
            self.term = term;
            self.granted = None;
            self.role = Role::Replica;
        }
    }

    fn is_older_than(&self, other: &Node) -> bool {
        self.lineage.len() < other.lineage.len() && other.lineage.starts_with(&self.lineage)
    }
}

/// A bug that is built in, to see that it is found.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, clap::ValueEnum)]
pub enum Mutation {
    /// A Raft vote is forgotten when its node is killed.
    ForgetVote,
    /// A Raft vote is granted to whoever has less.
    GrantToAnyone,
    /// A primary counts entries of former terms (Raft paper, figure 8).
    CountFormerTerms,
    /// Members change without a joint majority.
    NoJointMajority,
    /// A primary acknowledges what it has written itself.
    CommitAlone,
    /// A node that is killed forgets what it knew to be committed when it wrote its log.
    ForgetCommit,
    /// A node that comes over keeps all up to the last tid that the promoted one had.
    KeepByTid,
    /// A node that comes over keeps no file of what it gives up.
    LoseTheTail,
}

/// How far a search goes.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// How many nodes.
    pub nodes: usize,
    /// The voters at first.
    pub voters: Nodes,
    /// Those that never stand.
    pub witnesses: Nodes,
    /// Voters to change to, one after the other.
    pub changes: Vec<Nodes>,
    /// Who can be promoted by force.
    pub promoted: Nodes,
    /// No term beyond this.
    pub terms: u8,
    /// So many transactions.
    pub commits: u8,
    /// So many kills.
    pub kills: u8,
    /// So many forced promotions.
    pub promotions: u8,
    /// Clocks differ: a tid may be one more than it need be.
    pub clocks: bool,
    /// What is wrong.
    pub mutation: Option<Mutation>,
}

/// A cluster at a moment.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Cluster {
    /// Its nodes.
    pub nodes: Vec<Node>,
    /// What clients were told: (number, forks behind it, term).
    pub acknowledged: Vec<(u8, Vec<u8>, u8)>,
    /// Who has led: (names of the forks, term, node).
    pub led: Vec<(Vec<u8>, u8, usize)>,
    /// What was committed was overwritten.
    pub overwritten: bool,
    proposed: u8,
    kills: u8,
    changes: u8,
    promotions: u8,
}

/// A step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// A node stands for election: it hears no primary, or is told to (switchover).
    Stand(usize),
    /// The first grants the second its Raft vote.
    Grant(usize, usize),
    /// A primary proposes a transaction whose tid is so much above the last.
    Propose(usize, u8),
    /// A primary proposes other voters.
    Change(usize),
    /// It proposes that the former voters leave.
    Leave(usize),
    /// The second takes what it lacks first from the first, its primary; in a message of now, or of
    /// when the entry was new.
    Append(usize, usize, bool),
    /// A primary finds that a majority has more than it knew.
    Commit(usize),
    /// A process ends, and is started again.
    Kill(usize),
    /// A forced promotion.
    Promote(usize),
    /// The first meets the second, whose timeline goes on where its own was left.
    ComeOver(usize, usize),
    /// The first fetches from the second what it lacks.
    CatchUp(usize, usize),
}

impl Cluster {
    /// The first node leads in term 1, and all voters know it.
    pub fn founded(bounds: &Bounds) -> Cluster {
        let members = Members { voters: bounds.voters, joining: None };
        let found = Entry { term: 1, tid: 0, known: 0, what: What::Members(members) };
        let node = |number: usize| Node {
            term: 1,
            granted: Some(0),
            role: if number == 0 { Role::Primary } else { Role::Replica },
            log: vec![found],
            commit: 1,
            durable_commit: 1,
            lineage: Vec::new(),
            lost: Vec::new(),
            behind: false,
            stranger: false,
        };
        Cluster {
            nodes: (0..bounds.nodes).map(node).collect(),
            acknowledged: Vec::new(),
            led: vec![(Vec::new(), 1, 0)],
            overwritten: false,
            proposed: 0,
            kills: 0,
            changes: 0,
            promotions: 0,
        }
    }

    /// What may happen next; some of it changes nothing.
    pub fn actions(&self, bounds: &Bounds, actions: &mut Vec<Action>) {
        for (i, node) in self.nodes.iter().enumerate() {
            if node.behind {
                for (j, other) in self.nodes.iter().enumerate() {
                    if !other.behind && other.lineage == node.lineage && !node.stranger {
                        actions.push(Action::CatchUp(i, j));
                    }
                }
            } else {
                self.actions_of(bounds, i, actions);
            }
            for (j, other) in self.nodes.iter().enumerate() {
                if node.is_older_than(other) {
                    actions.push(Action::ComeOver(i, j));
                }
            }
        }
    }

    fn actions_of(&self, bounds: &Bounds, i: usize, actions: &mut Vec<Action>) {
        let node = &self.nodes[i];
        let terms = bounds.terms + node.lineage.len() as u8;
        let stands = node.members().has(i) && !bounds.witnesses.has(i);
        if node.role != Role::Primary && stands && node.term < terms {
            actions.push(Action::Stand(i));
        }
        if self.kills < bounds.kills {
            actions.push(Action::Kill(i));
        }
        let may_be_promoted = bounds.promoted.has(i) && node.role != Role::Primary;
        if may_be_promoted && self.promotions < bounds.promotions {
            actions.push(Action::Promote(i));
        }
        for (j, other) in self.nodes.iter().enumerate() {
            let hears = i != j && other.lineage == node.lineage && !other.behind;
            if !hears || other.term > node.term {
                continue;
            }
            match node.role {
                Role::Candidate(granted) if node.members().has(j) && !granted.has(j) => {
                    actions.push(Action::Grant(j, i));
                }
                Role::Primary => {
                    actions.push(Action::Append(i, j, true));
                    actions.push(Action::Append(i, j, false));
                }
                _ => {}
            }
        }
        if node.role == Role::Primary {
            actions.push(Action::Commit(i));
            if self.proposed < bounds.commits {
                actions.push(Action::Propose(i, 1));
                if bounds.clocks {
                    actions.push(Action::Propose(i, 2));
                }
            }
            if node.knows_commits() && !node.changes_members() {
                if node.members().joining.is_some() {
                    actions.push(Action::Leave(i));
                } else if (self.changes as usize) < bounds.changes.len() {
                    actions.push(Action::Change(i));
                }
            }
        }
    }

    /// The cluster after a step; `None` if it is the same.
    pub fn after(&self, bounds: &Bounds, action: Action) -> Option<Cluster> {
        let mut next = self.clone();
        match action {
            Action::Stand(i) => next.stand(i),
            Action::Grant(j, i) => next.grant(bounds, j, i),
            Action::Propose(i, above) => {
                let tid = next.nodes[i].last_tid() + above;
                next.nodes[i].propose(tid, What::Commit(next.proposed));
                next.proposed += 1;
            }
            Action::Change(i) => next.change(bounds, i),
            Action::Leave(i) => {
                let new = next.nodes[i].members().joining?;
                let members = Members { voters: new, joining: None };
                next.nodes[i].propose(0, What::Members(members));
            }
            Action::Append(i, j, late) => next.append(i, j, late),
            Action::Commit(i) => next.commit(bounds, i)?,
            Action::Kill(i) => next.kill(bounds, i),
            Action::Promote(i) => next.promote(i),
            Action::ComeOver(j, i) => next.come_over(bounds, j, i),
            Action::CatchUp(j, i) => next.catch_up(j, i)?,
        }
        (next != *self).then_some(next)
    }

    fn stand(&mut self, i: usize) {
        let node = &mut self.nodes[i];
        node.term += 1;
        node.granted = Some(i);
        node.role = Role::Candidate(Nodes::of(i));
        self.tend_election(i);
    }

    fn grant(&mut self, bounds: &Bounds, j: usize, i: usize) {
        let (term, last) = (self.nodes[i].term, self.nodes[i].position());
        let voter = &mut self.nodes[j];
        voter.enter(term);
        let free = voter.granted.is_none() || voter.granted == Some(i);
        let enough = last >= voter.position() || bounds.mutation == Some(Mutation::GrantToAnyone);
        if !free || !enough {
            return;
        }
        voter.granted = Some(i);
        if let Role::Candidate(granted) = &mut self.nodes[i].role {
            *granted = granted.with(j);
        }
        self.tend_election(i);
    }

    fn tend_election(&mut self, i: usize) {
        let node = &mut self.nodes[i];
        let Role::Candidate(granted) = node.role else { return };
        if node.members().is_quorum(granted) {
            node.role = Role::Primary;
            node.propose(0, What::Nothing);
            let led = (node.timeline(), node.term, i);
            self.led.push(led);
            self.led.sort();
            self.led.dedup();
        }
    }

    fn change(&mut self, bounds: &Bounds, i: usize) {
        let new = bounds.changes[self.changes as usize];
        let old = self.nodes[i].members().voters;
        let members = match bounds.mutation {
            Some(Mutation::NoJointMajority) => Members { voters: new, joining: None },
            _ => Members { voters: old, joining: Some(new) },
        };
        self.nodes[i].propose(0, What::Members(members));
        self.changes += 1;
    }

    fn append(&mut self, i: usize, j: usize, late: bool) {
        let (log, term, commit) =
            (self.nodes[i].log.clone(), self.nodes[i].term, self.nodes[i].commit);
        let node = &mut self.nodes[j];
        node.enter(term);
        // A candidate of the same term follows.
        node.role = Role::Replica;
        let same = node.log.iter().zip(&log).take_while(|(a, b)| a == b).count();
        let known = match log.get(same) {
            None => commit,
            Some(entry) => {
                self.overwritten |= same < node.commit as usize;
                node.log.truncate(same);
                node.log.push(*entry);
                if late { entry.known } else { commit }
            }
        };
        let matched = (same + 1).min(log.len()) as u8;
        node.commit = node.commit.max(known.min(matched)).min(node.log.len() as u8);
        if same < log.len() {
            node.durable_commit = node.commit;
        }
    }

    fn commit(&mut self, bounds: &Bounds, i: usize) -> Option<()> {
        let node = &self.nodes[i];
        let has = |index: usize| {
            let with = (self.nodes.iter().enumerate())
                .filter(|(_, other)| other.lineage == node.lineage && !other.behind)
                // An answer of another term is to another primary.
                .filter(|(_, other)| other.term == node.term)
                .filter(|(_, other)| other.log.get(..=index) == node.log.get(..=index));
            with.fold(Nodes::default(), |nodes, (number, _)| nodes.with(number))
        };
        let counts = |index: &usize| {
            let own = node.log[*index].term == node.term;
            let enough = node.members().is_quorum(has(*index));
            (own || bounds.mutation == Some(Mutation::CountFormerTerms))
                && (enough || bounds.mutation == Some(Mutation::CommitAlone))
        };
        // One after the other: a change of members counts for what follows it.
        let index = (node.commit as usize..node.log.len()).find(counts)?;
        let node = &mut self.nodes[i];
        let new = &node.log[node.commit as usize..=index];
        let (timeline, term) = (node.timeline(), node.term);
        for (_, number) in new.iter().filter_map(Entry::transaction) {
            self.acknowledged.push((number, timeline.clone(), term));
        }
        self.acknowledged.sort();
        self.acknowledged.dedup_by_key(|(number, names, _)| (*number, names.clone()));
        node.commit = index as u8 + 1;
        Some(())
    }

    fn kill(&mut self, bounds: &Bounds, i: usize) {
        let node = &mut self.nodes[i];
        node.role = Role::Replica;
        node.commit = node.durable_commit;
        match bounds.mutation {
            Some(Mutation::ForgetVote) => node.granted = None,
            Some(Mutation::ForgetCommit) => node.commit = 1,
            _ => {}
        }
        self.kills += 1;
    }

    /// All that is in its log counts from now on.
    fn promote(&mut self, i: usize) {
        let node = &mut self.nodes[i];
        let certain = node.visible().last().map_or(0, |(tid, _)| tid);
        let tail = node.transactions().filter(|(tid, _)| *tid > certain).collect();
        let fork = Fork { name: self.promotions, certain, after: node.last_tid(), tail };
        node.role = Role::Replica;
        node.granted = None;
        let first = node.last_tid() + 10;
        node.lineage.push(fork);
        let known = node.log.len() as u8;
        let what = What::Fork(Nodes::of(i));
        node.log.push(Entry { term: node.term, tid: first, known, what });
        node.commit = node.log.len() as u8;
        node.durable_commit = node.commit;
        self.promotions += 1;
    }

    /// It gives up what the other timeline has not, and keeps it in a file.
    fn come_over(&mut self, bounds: &Bounds, j: usize, i: usize) {
        let lineage = self.nodes[i].lineage.clone();
        let node = &mut self.nodes[j];
        let fork = &lineage[node.lineage.len()];
        let in_other = |(tid, number): &(u8, u8)| match bounds.mutation {
            Some(Mutation::KeepByTid) => *tid <= fork.after,
            _ => *tid <= fork.certain || fork.tail.contains(&(*tid, *number)),
        };
        let kept: Vec<Entry> = (node.log[..node.commit as usize].iter())
            .take_while(|entry| entry.transaction().is_none_or(|one| in_other(&one)))
            .filter(|entry| entry.transaction().is_some())
            .copied()
            .collect();
        if bounds.mutation != Some(Mutation::LoseTheTail) {
            let gone = node.transactions().filter(|one| !in_other(one)).map(|(_, number)| number);
            let gone: Vec<u8> = gone.collect();
            node.lost.extend(gone);
            node.lost.sort();
        }
        node.commit = kept.len() as u8;
        node.durable_commit = node.commit;
        node.log = kept;
        node.lineage = lineage;
        node.term = 0;
        node.granted = None;
        node.role = Role::Replica;
        node.behind = true;
    }

    /// What follows its last transaction, from the other's data file; what is before stays its own.
    fn catch_up(&mut self, j: usize, i: usize) -> Option<()> {
        let source = &self.nodes[i];
        let last = self.nodes[j].last_tid();
        let mut log = source.log[..source.commit as usize].to_vec();
        if source.visible().all(|(tid, _)| tid < last) && last > 0 {
            return None;
        }
        let node = &mut self.nodes[j];
        if last > 0 && !log.iter().any(|entry| entry.tid == last) {
            node.stranger = true;
            return Some(());
        }
        let mut own: Vec<(u8, u8)> = node.transactions().collect();
        own.reverse();
        for entry in &mut log {
            if let (What::Commit(number), Some((_, mine))) = (&mut entry.what, own.last().copied())
                && entry.tid <= last
            {
                *number = mine;
                own.pop();
            }
        }
        node.commit = log.len() as u8;
        node.durable_commit = node.commit;
        node.log = log;
        node.behind = false;
        Some(())
    }
}
