//! What has changed while a data file was within a hole, and nobody was told.

use std::collections::BTreeSet;

use standby_types::Oid;

/// Objects that are kept at most; whoever reads must begin anew if there are more.
const MANY: usize = 1 << 20;

/// The objects, or that there are too many.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Hidden {
    oids: BTreeSet<Oid>,
    too_many: bool,
}

impl Hidden {
    /// These have changed too.
    pub fn add(&mut self, oids: &[Oid]) {
        self.add_up_to(oids, MANY);
    }

    fn add_up_to(&mut self, oids: &[Oid], most: usize) {
        if !self.too_many {
            self.oids.extend(oids);
            self.too_many = self.oids.len() > most;
        }
        if self.too_many {
            self.oids = BTreeSet::new();
        }
    }

    /// Each of them, once; `None` if they are too many.
    pub fn oids(self) -> Option<BTreeSet<Oid>> {
        (!self.too_many).then_some(self.oids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_object_counts_once_and_many_are_too_many() {
        let add = |hidden: &mut Hidden, oids: &[u64]| {
            let oids: Vec<_> = oids.iter().copied().map(Oid).collect();
            hidden.add_up_to(&oids, 3);
        };
        let mut hidden = Hidden::default();
        add(&mut hidden, &[1, 2, 1]);
        add(&mut hidden, &[2, 3]);
        let known = Hidden { oids: [1, 2, 3].map(Oid).into(), too_many: false };
        assert_eq!(hidden, known);
        add(&mut hidden, &[4]);
        add(&mut hidden, &[5]);
        assert_eq!(hidden.oids(), None);
    }
}
