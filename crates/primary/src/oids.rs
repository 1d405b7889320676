//! Handing out oids. The primary reserves them in blocks through the log, so that no other primary
//! and no later run of this one gives them out again.

use std::collections::VecDeque;

use standby_types::Oid;
use standby_zeo::ClientError;

/// Oids reserved at a time.
const BLOCK: u64 = 10_000;

/// Who waits for how many oids.
#[derive(Debug)]
pub struct Wanted<T> {
    /// Who asked.
    pub asker: T,
    pub count: usize,
}

/// No oids are left: the highest one is in use.
#[derive(Debug, PartialEq, Eq)]
pub struct Exhausted;

/// What the asker is told.
pub fn exhausted() -> ClientError {
    ClientError::storage(format!(
        "no new oids are left: object {} is there, or one near it",
        Oid(u64::MAX)
    ))
}

/// Invariants: `used <= ceiling <= proposed`; what is handed out is at or below `ceiling`, which is
/// committed.
pub struct Oids<T> {
    /// The highest one that is in use or was handed out.
    used: u64,
    ceiling: u64,
    proposed: u64,
    waiting: VecDeque<Wanted<T>>,
}

impl<T> Oids<T> {
    /// A new primary's: nothing at or below `used` is handed out, and nothing is reserved yet.
    pub fn above(used: Oid) -> Oids<T> {
        Oids { used: used.0, ceiling: used.0, proposed: used.0, waiting: VecDeque::new() }
    }

    /// Somebody wants oids; they come from [`Oids::grant`].
    pub fn want(&mut self, asker: T, count: usize) {
        self.waiting.push_back(Wanted { asker, count });
    }

    /// Oids up to `ceiling` are reserved, or in use.
    pub fn committed(&mut self, ceiling: Oid, used: Oid) {
        self.used = self.used.max(used.0);
        self.ceiling = self.ceiling.max(ceiling.0).max(self.used);
        self.proposed = self.proposed.max(self.ceiling);
        self.invariants();
    }

    /// Fails if an invariant does not hold: an oid would be handed out twice.
    fn invariants(&self) {
        assert!(self.used <= self.ceiling && self.ceiling <= self.proposed, "ceilings of oids");
    }

    /// A ceiling to propose, if it is time to.
    pub fn proposal(&mut self) -> Option<Oid> {
        let counts = self.waiting.iter().map(|wanted| wanted.count as u64);
        let needed = counts.fold(self.used, u64::saturating_add);
        if self.proposed >= needed.saturating_add(BLOCK / 4) {
            return None;
        }
        self.proposed = needed.saturating_add(BLOCK);
        self.invariants();
        Some(Oid(self.proposed))
    }

    /// A proposal was not taken: it will be made again.
    pub fn not_taken(&mut self) {
        self.proposed = self.ceiling;
    }

    /// The next one who can be served, or refused.
    pub fn grant(&mut self) -> Option<(T, Result<Vec<Oid>, Exhausted>)> {
        let last = self.used.checked_add(self.waiting.front()?.count as u64);
        if last.is_some_and(|last| last > self.ceiling) {
            return None;
        }
        let asker = self.waiting.pop_front()?.asker;
        let Some(last) = last else { return Some((asker, Err(Exhausted))) };
        let oids = (self.used..last).map(|before| Oid(before + 1)).collect();
        self.used = last;
        self.invariants();
        Some((asker, Ok(oids)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Row 6 of the end cases: what the dead primary handed out is never handed out again.
    #[test]
    fn row_6_oids_are_handed_out_once_over_changes_of_primary() {
        let mut seen = BTreeSet::new();
        let mut committed = Oid(5);
        for _ in 0..4 {
            let mut oids = Oids::above(committed);
            for asker in 0..300 {
                oids.want(asker, 100);
                if let Some(ceiling) = oids.proposal() {
                    // Half of the proposals are lost with the primary.
                    if asker % 2 == 0 {
                        committed = committed.max(ceiling);
                        oids.committed(ceiling, Oid(0));
                    }
                }
                while let Some((_, granted)) = oids.grant() {
                    for oid in granted.unwrap() {
                        assert!(oid <= committed && oid > Oid(5));
                        assert!(seen.insert(oid), "{oid} twice");
                    }
                }
            }
        }
        assert!(seen.len() > 1000);
    }

    #[test]
    fn oids_that_clients_chose_themselves_are_skipped() {
        let mut oids = Oids::above(Oid(0));
        oids.want((), 1);
        let ceiling = oids.proposal().unwrap();
        oids.committed(ceiling, Oid(70));
        assert_eq!(oids.grant(), Some(((), Ok(vec![Oid(71)]))));
    }

    #[test]
    fn there_is_a_last_oid() {
        let mut oids = Oids::above(Oid(u64::MAX - 3));
        oids.want("some", 2);
        oids.want("more", 2);
        oids.want("one", 1);
        oids.want("too late", 1);
        let ceiling = oids.proposal().unwrap();
        assert_eq!(ceiling, Oid(u64::MAX));
        oids.committed(ceiling, Oid(7));
        assert_eq!(oids.proposal(), None);
        let some = vec![Oid(u64::MAX - 2), Oid(u64::MAX - 1)];
        assert_eq!(oids.grant(), Some(("some", Ok(some))));
        assert_eq!(oids.grant(), Some(("more", Err(Exhausted))));
        assert_eq!(oids.grant(), Some(("one", Ok(vec![Oid(u64::MAX)]))));
        assert_eq!(oids.grant(), Some(("too late", Err(Exhausted))));
        assert_eq!((oids.grant(), oids.proposal()), (None, None));
        // A client has chosen it itself.
        let mut oids = Oids::above(Oid(1));
        oids.committed(Oid(1), Oid(u64::MAX));
        oids.want("late", 1);
        assert_eq!((oids.proposal(), oids.grant()), (None, Some(("late", Err(Exhausted)))));
    }
}
