//! Handing out oids. The primary reserves them in blocks through the log, so that no other primary
//! and no later run of this one gives them out again.

use std::collections::VecDeque;

use standby_types::Oid;

/// Oids reserved at a time.
const BLOCK: u64 = 10_000;

/// Who waits for how many oids.
#[derive(Debug)]
pub struct Wanted<T> {
    /// Who asked.
    pub asker: T,
    /// How many.
    pub count: usize,
}

/// Invariants: `next - 1 <= ceiling <= proposed`; what is handed out is at or below `ceiling`, which
/// is committed.
pub struct Oids<T> {
    next: u64,
    ceiling: u64,
    proposed: u64,
    waiting: VecDeque<Wanted<T>>,
}

impl<T> Oids<T> {
    /// A new primary's: nothing at or below `used` is handed out, and nothing is reserved yet.
    pub fn above(used: Oid) -> Oids<T> {
        Oids { next: used.0 + 1, ceiling: used.0, proposed: used.0, waiting: VecDeque::new() }
    }

    /// Somebody wants oids; they come from [`Oids::grant`].
    pub fn want(&mut self, asker: T, count: usize) {
        self.waiting.push_back(Wanted { asker, count });
    }

    /// Oids up to `ceiling` are reserved, or in use.
    pub fn committed(&mut self, ceiling: Oid, used: Oid) {
        self.ceiling = self.ceiling.max(ceiling.0);
        self.next = self.next.max(used.0 + 1);
    }

    /// A ceiling to propose, if it is time to.
    pub fn proposal(&mut self) -> Option<Oid> {
        let wanted: u64 = self.waiting.iter().map(|wanted| wanted.count as u64).sum();
        if self.proposed + 1 >= self.next + wanted + BLOCK / 4 {
            return None;
        }
        self.proposed = self.next + wanted + BLOCK;
        Some(Oid(self.proposed))
    }

    /// A proposal was not taken: it will be made again.
    pub fn not_taken(&mut self) {
        self.proposed = self.ceiling;
    }

    /// The next one who can be served.
    pub fn grant(&mut self) -> Option<(T, Vec<Oid>)> {
        let count = self.waiting.front()?.count as u64;
        if self.next + count - 1 > self.ceiling {
            return None;
        }
        let wanted = self.waiting.pop_front()?;
        let oids = (self.next..self.next + count).map(Oid).collect();
        self.next += count;
        Some((wanted.asker, oids))
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
                    for oid in granted {
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
        assert_eq!(oids.grant(), Some(((), vec![Oid(71)])));
    }
}
