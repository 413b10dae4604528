//! What of the node itself, and of other programs on it, is in the way of egress packets: read, not judged.
//!
//! A failure to see it stops nothing, and is told like an obstacle.

mod chains;
mod forward;
mod judge;
mod nat;
mod networkd;
mod sysctl;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::error::chain;
use crate::kernel::error::Error;
use crate::kernel::firewall::Firewall;
use crate::kernel::netlink::NetlinkError;
use crate::kernel::obstacles::chains::Found;
use crate::state::{DroppingFilter, Family, Obstacle, Surroundings};

/// How long what happened once is told.
const RECENT: Duration = Duration::from_secs(60 * 60);

/// What is only seen when it happens.
#[derive(Debug, Default)]
struct Memory {
    rules_removed: BTreeMap<Family, Instant>,
    /// Packets that came with our bits of the mark set.
    foreign_marks: BTreeMap<Family, u64>,
    marked: BTreeMap<Family, Instant>,
}

/// What is in the way on one node.
#[derive(Debug)]
pub(crate) struct Obstacles {
    families: Vec<Family>,
    /// Why nftables would have been used, but is not.
    refusal: Option<String>,
    /// What only a whole look at the kernel shows.
    whole: BTreeMap<Family, Surroundings>,
    memory: Memory,
}

impl Obstacles {
    pub(crate) fn new(families: Vec<Family>, refusal: Option<String>) -> Obstacles {
        Obstacles {
            families,
            refusal,
            whole: BTreeMap::new(),
            memory: Memory::default(),
        }
    }

    /// Notes that others have removed all of our routing rules.
    pub(crate) fn note_rules_removed(&mut self, family: Family) {
        self.memory.rules_removed.insert(family, Instant::now());
    }

    /// Looks at everything; `rules` is what is known of routing rules.
    pub(crate) async fn look(
        &mut self,
        in_use: &Firewall,
        rules: BTreeMap<Family, Surroundings>,
        interfaces: &[String],
    ) -> BTreeMap<Family, Surroundings> {
        self.whole = rules;
        let chains = chains::find();
        // A failure to list chains is told with the filters.
        let nat = nat::find(in_use, chains.as_deref().unwrap_or_default()).await;
        match nat {
            Ok(found) => found.into_iter().for_each(|(f, o)| self.find(f, o)),
            Err(error) => self.find_in_all(&Obstacle::NotSeen(chain(&error))),
        }
        for setting in networkd::find() {
            self.find_in_all(&Obstacle::ForeignRulesManaged(setting));
        }
        if let Some(why) = &self.refusal {
            self.find_in_all(&Obstacle::NoNftables(why.clone()));
        }
        self.complete(in_use, interfaces, chains).await
    }

    /// Looks at what may change without a notice, at little cost: some files, the base chains of nftables, and the rules
    /// of a chain that drops what is forwarded, if there is one.
    pub(crate) async fn look_again(
        &mut self,
        in_use: &Firewall,
        interfaces: &[String],
    ) -> BTreeMap<Family, Surroundings> {
        self.complete(in_use, interfaces, chains::find()).await
    }

    async fn complete(
        &mut self,
        in_use: &Firewall,
        interfaces: &[String],
        chains: Result<Vec<Found>, NetlinkError>,
    ) -> BTreeMap<Family, Surroundings> {
        self.note_foreign_marks(in_use).await;
        let mut all = self.whole.clone();
        for &family in &self.families {
            let found = all.entry(family).or_default();
            sysctl::read_into(family, interfaces, found);
            let is_recent = |times: &BTreeMap<Family, Instant>| {
                times
                    .get(&family)
                    .is_some_and(|then| then.elapsed() < RECENT)
            };
            if is_recent(&self.memory.rules_removed) {
                found.obstacles.insert(Obstacle::RulesRemoved);
            }
            if is_recent(&self.memory.marked) {
                found.obstacles.insert(Obstacle::ForeignMark);
            }
        }
        match filters(&self.families, chains).await {
            Ok(filters) => {
                for (family, filters) in filters {
                    all.entry(family).or_default().filters = filters;
                }
            }
            Err(error) => {
                let obstacle = Obstacle::NotSeen(chain(&error));
                for found in all.values_mut() {
                    found.obstacles.insert(obstacle.clone());
                }
            }
        }
        all
    }

    async fn note_foreign_marks(&mut self, in_use: &Firewall) {
        for (family, packets) in in_use.foreign_marks().await.unwrap_or_default() {
            let before = self.memory.foreign_marks.insert(family, packets);
            // The first count may be older than this agent.
            if before.is_some_and(|before| packets > before) {
                self.memory.marked.insert(family, Instant::now());
            }
        }
    }

    fn find(&mut self, family: Family, obstacle: Obstacle) {
        let found = self.whole.entry(family).or_default();
        found.obstacles.insert(obstacle);
    }

    fn find_in_all(&mut self, obstacle: &Obstacle) {
        for family in self.families.clone() {
            self.find(family, obstacle.clone());
        }
    }
}

async fn filters(
    families: &[Family],
    chains: Result<Vec<Found>, NetlinkError>,
) -> Result<BTreeMap<Family, BTreeSet<DroppingFilter>>, Error> {
    Ok(forward::find(families, &chains?).await?)
}
