//! The time that new transactions get. A clock that is wrong for a second would leave tids in the
//! future for as long as it was ahead: all later ones have to follow them.

use std::time::Duration;

use tracing::{error, info, warn};

use crate::machine::Machine;

/// A clock that is so far ahead is not used.
const TOO_MUCH: Duration = Duration::from_secs(3600);
/// How long it takes, with some to spare, until the other nodes' reports tell whether a clock that
/// has leapt is right now.
const CONFIRMED: Duration = Duration::from_secs(5);
/// A clock that is so far behind the last transaction is spoken of.
const BEHIND: Duration = Duration::from_secs(60);

/// This machine's clock, beside its monotonic time: a leap ahead is not followed at once.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    /// What the clock showed when it was last believed, and when that was.
    believed: Option<(Duration, Duration)>,
    leapt_at: Option<Duration>,
    /// As told by a majority.
    ahead: Duration,
    /// When somebody was told that it is behind.
    told: Option<Duration>,
}

impl Clock {
    /// The time to use at the monotonic time `now`, when the clock shows `wall`.
    fn read(&mut self, now: Duration, wall: Duration) -> Duration {
        if let Some((then, at)) = self.believed {
            let expected = then + now.saturating_sub(at);
            if wall >= expected + TOO_MUCH {
                let leapt_at = *self.leapt_at.get_or_insert(now);
                if now < leapt_at + CONFIRMED {
                    return expected;
                }
            }
        }
        self.leapt_at = None;
        self.believed = Some((wall, now));
        wall.saturating_sub(self.ahead)
    }
}

impl Machine {
    /// The time for a transaction. A node alone has nobody to ask, and believes its clock.
    pub(crate) fn time_of_commits(&mut self) -> Duration {
        let (now, wall) = (self.now, self.facts.wall_clock());
        if self.consensus.membership().voters.len() <= 1 {
            return wall;
        }
        self.clock.read(now, wall)
    }

    /// Asks the reports whether the clock is an hour or more ahead of a majority's.
    pub(crate) fn tick_clock(&mut self) {
        let voters = &self.consensus.membership().voters;
        let ahead = self.facts.ahead_of_majority(voters).unwrap_or_default();
        if (ahead > Duration::ZERO) != (self.clock.ahead > Duration::ZERO) {
            match ahead.as_secs() {
                0 => info!("the clock of this machine is used again"),
                seconds => error!(
                    seconds,
                    "the clock of this machine is ahead of a majority's by so much: commits get \
                    the others' time. Set it right"
                ),
            }
        }
        self.clock.ahead = ahead;
        // Also while nothing is committed: a leap is measured from the last look.
        self.time_of_commits();
    }

    /// Tids count up whatever the clock does; but somebody should set it.
    pub(crate) fn look_at_clock(&mut self, behind: Duration) {
        let now = self.now;
        let told = self.clock.told.is_some_and(|at| now < at + BEHIND);
        if behind > BEHIND && !told {
            self.clock.told = Some(now);
            let seconds = behind.as_secs();
            warn!(seconds, "the clock of this machine is behind the last transaction by so much");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_leap_ahead_is_followed_when_nobody_has_said_that_it_is_wrong() {
        let mut clock = Clock::default();
        assert_eq!(clock.read(s(1), s(1_000_000)), s(1_000_000));
        // Small steps, and steps back, are.
        assert_eq!(clock.read(s(2), s(1_003_000)), s(1_003_000));
        assert_eq!(clock.read(s(3), s(900_000)), s(900_000));
        // For a second it was in another decade.
        assert_eq!(clock.read(s(4), s(400_000_000)), s(900_001));
        assert_eq!(clock.read(s(5), s(900_002)), s(900_002));
        // It stays there, and is believed in the end,
        assert_eq!(clock.read(s(6), s(400_000_000)), s(900_003));
        assert_eq!(clock.read(s(10), s(400_000_004)), s(900_007));
        assert_eq!(clock.read(s(11), s(400_000_005)), s(400_000_005));
        // but for what a majority says by then.
        clock.ahead = s(399_099_997);
        assert_eq!(clock.read(s(12), s(400_000_006)), s(900_009));
    }

    #[test]
    fn a_suspended_machine_wakes_up() {
        // The monotonic time has stood still meanwhile: as a leap, for some seconds.
        let mut clock = Clock::default();
        clock.read(s(1), s(1_000_000));
        assert_eq!(clock.read(s(2), s(1_090_000)), s(1_000_001));
        assert_eq!(clock.read(s(8), s(1_090_006)), s(1_090_006));
    }
}
