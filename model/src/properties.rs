//! What must hold in every state, and what must happen in some, so that the former means something.

use crate::cluster::{Cluster, Node, Role};

/// A property's name, and whether it holds.
pub type Named = (&'static str, fn(&Cluster) -> bool);

/// DESIGN §9, as far as it is about election, commit, membership and forced promotion.
pub const ALWAYS: [Named; 7] = [
    ("at most one node leads in a term of a timeline", one_primary_in_a_term),
    ("what is acknowledged is in every later primary's history, once", acknowledged_is_there),
    ("what a forced promotion loses is kept in a file", lost_is_kept),
    ("what nodes show are beginnings of one history", histories_agree),
    ("tids grow", tids_grow),
    ("what is committed is never overwritten", |cluster| !cluster.overwritten),
    ("who comes over is no stranger", |cluster| cluster.nodes.iter().all(|node| !node.stranger)),
];

fn one_primary_in_a_term(cluster: &Cluster) -> bool {
    let led = &cluster.led;
    led.windows(2).all(|pair| (&pair[0].0, pair[0].1) != (&pair[1].0, pair[1].1))
}

fn primaries(cluster: &Cluster) -> impl Iterator<Item = &Node> {
    cluster.nodes.iter().filter(|node| node.role == Role::Primary)
}

fn acknowledged_is_there(cluster: &Cluster) -> bool {
    primaries(cluster).all(|primary| {
        let same = |forks: &[u8]| primary.timeline() == forks;
        let later = cluster
            .acknowledged
            .iter()
            .filter(|(_, forks, term)| same(forks) && *term <= primary.term);
        later.clone().all(|(number, ..)| {
            primary.transactions().filter(|(_, other)| other == number).count() == 1
        })
    })
}

/// In the history, in a file, or still in the log of a node that has not come over.
fn lost_is_kept(cluster: &Cluster) -> bool {
    let newest = cluster.nodes.iter().map(|node| node.lineage.len()).max().unwrap_or(0);
    let somewhere = |number: u8| {
        cluster.nodes.iter().any(|node| {
            node.lost.contains(&number) || node.transactions().any(|(_, other)| other == number)
        })
    };
    cluster
        .acknowledged
        .iter()
        .filter(|(_, forks, _)| forks.len() < newest)
        .all(|(number, ..)| somewhere(*number))
}

fn histories_agree(cluster: &Cluster) -> bool {
    let nodes = &cluster.nodes;
    nodes.iter().all(|a| {
        let others = nodes.iter().filter(|b| b.lineage == a.lineage && !a.behind && !b.behind);
        others.into_iter().all(|b| a.visible().zip(b.visible()).all(|(one, other)| one == other))
    })
}

fn tids_grow(cluster: &Cluster) -> bool {
    cluster.nodes.iter().all(|node| {
        let tids: Vec<u8> = node.transactions().map(|(tid, _)| tid).collect();
        tids.windows(2).all(|pair| pair[0] < pair[1])
    })
}

/// What shows that a search has been there.
pub const SOMETIMES: [Named; 6] = [
    ("a later primary commits", |cluster| {
        cluster.acknowledged.iter().any(|(_, _, term)| *term > 1)
    }),
    ("two terms of one timeline have acknowledged", |cluster| {
        let one = cluster.acknowledged.first();
        one.is_some_and(|(_, forks, term)| {
            cluster.acknowledged.iter().any(|(_, other, later)| other == forks && later != term)
        })
    }),
    ("other voters commit", |cluster| {
        let first = cluster.nodes[0].log[0].what;
        primaries(cluster).any(|primary| {
            let members = primary.members();
            let founded = crate::cluster::What::Members(members) == first;
            members.joining.is_none() && !founded && primary.log.len() == primary.commit as usize
        })
    }),
    ("a new timeline acknowledges", |cluster| {
        cluster.acknowledged.iter().any(|(_, forks, _)| !forks.is_empty())
    }),
    ("a node that came over has lost something, and follows", |cluster| {
        cluster.nodes.iter().any(|node| !node.lost.is_empty() && !node.behind && node.commit > 1)
    }),
    ("a node has what was never committed, and counts it", |cluster| {
        cluster.nodes.iter().any(|node| node.lineage.iter().any(|fork| !fork.tail.is_empty()))
    }),
];
