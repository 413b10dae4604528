//! Pauses after failures: each is twice as long as the one before, up to a limit, with jitter.
//!
//! Without jitter the agents of all nodes would come back to a restarted API server in the same moment.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    shortest: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) const fn new(shortest: Duration, longest: Duration) -> Backoff {
        Backoff {
            shortest,
            longest,
            next: shortest,
        }
    }

    pub(crate) fn pause(&mut self) -> Duration {
        // The keys of the standard library's hash maps are random.
        let random = RandomState::new().hash_one(());
        self.pause_with(u32::try_from(random % 1_000).unwrap_or_default())
    }

    /// The same with a given jitter, in thousandths: of a pause half is certain, and this part of the other half.
    fn pause_with(&mut self, jitter: u32) -> Duration {
        let full = self.next;
        self.next = self.longest.min(full * 2);
        full / 2 + full / 2 * jitter / 1_000
    }

    /// Something worked: the next pause is short again.
    pub(crate) fn reset(&mut self) {
        self.next = self.shortest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn pauses_double_up_to_the_longest_and_start_anew_after_a_success() {
        let mut backoff = Backoff::new(200 * MS, 1_000 * MS);
        let pauses = [0; 5].map(|jitter| backoff.pause_with(jitter) / 100);
        assert_eq!(pauses, [1, 2, 4, 5, 5].map(|n| n * MS));
        backoff.reset();
        assert_eq!(backoff.pause_with(0), 100 * MS);
    }

    #[test]
    fn jitter_is_a_part_of_the_second_half() {
        for (jitter, expected) in [(0, 100), (500, 150), (999, 199)] {
            let mut backoff = Backoff::new(200 * MS, 1_000 * MS);
            let pause = backoff.pause_with(jitter);
            assert_eq!(pause.as_millis(), expected);
        }
    }

    #[test]
    fn jitter_differs_from_pause_to_pause() {
        let pauses = [(); 20].map(|()| Backoff::new(1_000 * MS, 1_000 * MS).pause());
        assert!(pauses.iter().all(|p| (500 * MS..1_000 * MS).contains(p)));
        assert!(pauses.iter().any(|pause| *pause != pauses[0]));
    }
}
