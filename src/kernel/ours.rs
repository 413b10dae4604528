//! What is ours in a kernel: names and numbers that several files share.

use crate::state::{Family, NetSet, PodSet, Rule, RuleAction, TableId};

/// Protocol number of our rules and routes: in none of the lists of iproute2, FRR or BIRD. Shown by `ip rule`
/// and `ip route` as `proto 77`.
pub(crate) const PROTOCOL_NUMBER: u8 = 77;
/// Realm of the routes to gateways (IPv4 only): by it the iptables backend sees whether a packet takes one.
pub(crate) const REALM: u16 = 77;
/// How many priorities of routing rules are ours.
const PRIORITIES: u32 = 2;

/// The numbers that we use, and others should not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ranges {
    /// Bits of the mark.
    pub(crate) mask: u32,
    pub(crate) slots: u32,
    /// Tables are numbered from here; the first one rejects.
    pub(crate) table_offset: u32,
    /// First of our rules' priorities.
    pub(crate) priority: u32,
    /// The node takes up no connection in its middle (`nf_conntrack_tcp_loose=0`).
    pub(crate) strict_tcp: bool,
}

impl Ranges {
    /// Whether a table has a number of our range.
    pub(crate) fn has_table(&self, table: TableId) -> bool {
        table.0 >= self.table_offset
    }

    /// The first priority after ours.
    pub(crate) fn end(&self) -> u32 {
        self.priority.saturating_add(PRIORITIES)
    }

    /// The marks of egress packets.
    pub(crate) fn marks(&self) -> impl Iterator<Item = u32> {
        (1..=self.slots).map(|slot| slot << self.mask.trailing_zeros())
    }

    /// Whether a rule without a protocol number is one that releases before 0.3 made: the pairs of mark and table are
    /// theirs.
    pub(crate) fn is_earlier(&self, rule: &Rule) -> bool {
        let (Some(mark), RuleAction::Lookup(table)) = (rule.mark, rule.action) else {
            return false;
        };
        let slot = mark.value >> self.mask.trailing_zeros();
        mark.mask == self.mask
            && mark.value & !self.mask == 0
            && table.0.checked_sub(self.table_offset) == slot.checked_sub(1)
            && slot > 0
            && rule.to.is_none()
            && rule.from.is_none()
            && !rule.not
    }
}

/// A set that every firewall backend keeps, one for each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum OwnSet {
    Nets(NetSet),
    Pods(PodSet),
    /// VIPs to guard.
    Vips,
    /// Replies to forgotten connections: the kernel removes them by itself.
    LateReplies,
}

impl OwnSet {
    pub(crate) fn all() -> impl Iterator<Item = OwnSet> {
        let nets = NetSet::ALL.into_iter().map(OwnSet::Nets);
        let pods = PodSet::ALL.into_iter().map(OwnSet::Pods);
        nets.chain(pods).chain([OwnSet::Vips, OwnSet::LateReplies])
    }

    /// What the set is called, as far as backends agree.
    pub(crate) fn word(self) -> &'static str {
        match self {
            OwnSet::Nets(NetSet::Excluded) => "excluded",
            OwnSet::Nets(NetSet::RemotePods) => "remote_pods",
            OwnSet::Nets(NetSet::LocalPods) => "local_pods",
            OwnSet::Pods(PodSet::Egress) => "egress",
            OwnSet::Pods(PodSet::GatewayHere) => "gateway_here",
            OwnSet::Pods(PodSet::Blocked) => "blocked",
            OwnSet::Pods(PodSet::Ordinary) => "ordinary",
            OwnSet::Vips => "vips",
            OwnSet::LateReplies => "late_replies",
        }
    }
}

/// The digit by which names tell families apart.
pub(crate) fn digit(family: Family) -> u8 {
    match family {
        Family::V4 => 4,
        Family::V6 => 6,
    }
}

#[cfg(test)]
impl Ranges {
    /// Those of the default settings.
    pub(crate) const DEFAULT: Ranges = Ranges {
        mask: 0x00f0_0000,
        slots: 15,
        table_offset: 100_000,
        priority: 1000,
        strict_tcp: false,
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Mark;

    /// `pref PRIORITY fwmark VALUE/MASK lookup TABLE`.
    fn rule(priority: u32, mark: (u32, u32), table: u32) -> Rule {
        let (value, mask) = mark;
        Rule {
            priority,
            action: RuleAction::Lookup(TableId(table)),
            mark: Some(Mark { value, mask }),
            not: false,
            from: None,
            to: None,
        }
    }

    #[test]
    fn an_earlier_rule_pairs_a_mark_with_the_table_that_earlier_releases_gave_it() {
        let first = rule(998, (0x0010_0000, Ranges::DEFAULT.mask), 100_000);
        assert!(Ranges::DEFAULT.is_earlier(&first));
        assert!(Ranges::DEFAULT.is_earlier(&rule(
            998,
            (0x0020_0000, Ranges::DEFAULT.mask),
            100_001
        )));
        for other in [
            rule(998, (0x0010_0000, Ranges::DEFAULT.mask), 100_001),
            rule(998, (0, Ranges::DEFAULT.mask), 100_000),
            rule(998, (0x0010_0000, 0x00ff_0000), 100_000),
            Rule { not: true, ..first },
            Rule {
                to: Some("10.0.0.0/8".parse().unwrap()),
                ..first
            },
        ] {
            assert!(!Ranges::DEFAULT.is_earlier(&other), "{other}");
        }
    }
}
