//! Chains and rules, and what a packet experiences there. Pure.
//!
//! Replies of inbound connections pass (`reply`). `! --ctdir ORIGINAL` would not do: an untracked packet has no
//! direction, and must not slip through.

use std::net::IpAddr;

use crate::kernel::iptables::save::Line;
use crate::kernel::iptables::sets::{StaticSet, vip_set};
use crate::kernel::ours::OwnSet;
use crate::kernel::tag::{Rule, TAG, rules};
use crate::state::{Family, NetSet, PodSet};

/// The chain that has a rule for each VIP.
pub(super) const NAT: &str = "METALEG-NAT";
const BLOCK: &str = "METALEG-BLOCK";
const MARK: &str = "METALEG-MARK";
const GUARD: &str = "METALEG-GUARD";
const LEAK: &str = "METALEG-LEAK";
/// The chain in which releases before 0.3 set marks.
pub(super) const EARLIER_MARK: &str = "METALEG-RT-MARK";
/// The chains of releases before 0.3, each after its table.
pub(super) const EARLIER: [(&str, &str); 3] = [
    ("mangle", EARLIER_MARK),
    ("filter", "METALEG-REJECT"),
    ("nat", "METALEG-SNAT"),
];

impl Rule {
    /// What follows `-A CHAIN`.
    fn arguments(&self) -> String {
        format!("-m comment --comment \"{}\" {}", self.tag, self.text)
    }

    pub(super) fn append(&self, chain: &str) -> String {
        format!("-A {chain} {}", self.arguments())
    }

    pub(super) fn insert(&self, chain: &str) -> String {
        format!("-I {chain} 1 {}", self.arguments())
    }

    pub(super) fn delete(&self, chain: &str) -> String {
        format!("-D {chain} {}", self.arguments())
    }
}

/// A chain of ours and how packets come into it.
pub(super) struct Chain {
    pub(super) table: &'static str,
    pub(super) name: &'static str,
    /// The built-in chain that jumps to it.
    pub(super) base: &'static str,
    pub(super) jump: Rule,
    /// The jump must be the first rule of its chain: what another rule accepts or translates ahead of it would
    /// leak.
    pub(super) first: bool,
    pub(super) rules: Vec<Rule>,
}

/// Traffic inside the cluster is none of a chain's business: the rules `excluded`.
const EXCLUDED: OwnSet = OwnSet::Nets(NetSet::Excluded);
const EGRESS: OwnSet = OwnSet::Pods(PodSet::Egress);
const BLOCKED: OwnSet = OwnSet::Pods(PodSet::Blocked);

fn names<const N: usize>(family: Family, sets: [OwnSet; N]) -> [String; N] {
    sets.map(|set| StaticSet::Set(set).name(family))
}

fn mangle(name: &'static str, base: &'static str, rules: Vec<Rule>) -> Chain {
    Chain {
        table: "mangle",
        name,
        base,
        jump: jump(name, ""),
        first: false,
        rules,
    }
}

/// Every chain of a family, in no order that matters.
pub(super) fn chains(family: Family, mask: u32) -> Vec<Chain> {
    vec![
        nat(family, mask),
        block(family),
        mark(family),
        guard(family, mask),
        leak(family),
    ]
}

/// nat POSTROUTING, for egress pods only: the source that a new connection gets. Then one rule for each VIP, see
/// [`translation`].
fn nat(family: Family, mask: u32) -> Chain {
    let everything = match family {
        Family::V4 => "0.0.0.0/0",
        Family::V6 => "::/0",
    };
    let [excluded, egress] = names(family, [EXCLUDED, EGRESS]);
    Chain {
        table: "nat",
        name: NAT,
        base: "POSTROUTING",
        jump: jump(NAT, &format!("-m set --match-set {egress} src ")),
        first: true,
        rules: rules! {
            "excluded" => "-m set --match-set {excluded} dst -j RETURN",
            // On its way to the gateway a packet keeps its source. Translating it to itself takes the decision away
            // from the masquerade of the CNI plugin.
            "identity" => "-m mark ! --mark 0x0/{mask:#x} -j NETMAP --to {everything}",
        },
    }
}

/// filter FORWARD: rejects what a blocked pod sends to outside. REJECT is possible in this table only.
fn block(family: Family) -> Chain {
    let prohibited = match family {
        Family::V4 => "icmp-admin-prohibited",
        Family::V6 => "icmp6-adm-prohibited",
    };
    let [excluded, blocked] = names(family, [EXCLUDED, BLOCKED]);
    Chain {
        table: "filter",
        name: BLOCK,
        base: "FORWARD",
        jump: jump(BLOCK, ""),
        first: true,
        rules: rules! {
            "excluded" => "-m set --match-set {excluded} dst -j RETURN",
            "reply" => "-m conntrack --ctdir REPLY -j RETURN",
            // A connection that cannot go on ends at once instead of hanging.
            "reset" => "-p tcp -m set --match-set {blocked} src -j REJECT --reject-with tcp-reset",
            // Says why, unlike port-unreachable.
            "reject" => "-m set --match-set {blocked} src -j REJECT --reject-with {prohibited}",
        },
    }
}

/// mangle PREROUTING: egress packets whose gateway is another node get its mark.
fn mark(family: Family) -> Chain {
    let marks = StaticSet::Mark.name(family);
    let rules = rules! {
        // The reply of an inbound connection goes back the way that the connection came.
        "reply" => "-m conntrack --ctdir REPLY -j RETURN",
        // Destinations are not looked at here, before DNAT: the routing rules do it, after DNAT.
        "mark" => "-j SET --map-set {marks} src --map-mark",
    };
    mangle(MARK, "PREROUTING", rules)
}

/// mangle FORWARD: drops what must neither become a connection nor leave.
fn guard(family: Family, mask: u32) -> Chain {
    let [excluded, egress, blocked] = names(family, [EXCLUDED, EGRESS, BLOCKED]);
    let [vips, late_replies] = names(family, [OwnSet::Vips, OwnSet::LateReplies]);
    let [remote_pods, local_pods] = names(
        family,
        [NetSet::RemotePods, NetSet::LocalPods].map(OwnSet::Nets),
    );
    let [ordinary] = names(family, [OwnSet::Pods(PodSet::Ordinary)]);
    let rules = rules! {
        // A reply of a connection that this node has just forgotten. As NEW it would begin a connection from
        // outside; the pod's next packet would count as a reply, skip marking, and leave with the pod's own address.
        "late-reply" => "-m conntrack --ctstate NEW -m set --match-set {late_replies} dst,dst,src -j DROP",
        // The gateway may still hold an entry that the pod's node has lost. A packet other than a bare SYN to an egress
        // pod must not create one here, as above. Only TCP shows where a connection begins.
        "midway" => "-p tcp ! --syn -m conntrack --ctstate NEW -m set --match-set {egress} dst \
                     -m set ! --match-set {excluded} src -j DROP",
        // A VIP moves before routes and objects do. A server's packet that comes here ahead of the pod's own next
        // packet would create an entry that clashes with the pod's; an INVALID one would be routed, and answered
        // with an error that the server believes.
        "to-vip" => "-m conntrack --ctstate NEW,INVALID -m set --match-set {vips} dst -j DROP",
        // Translated by a node that was the gateway and is none any more.
        "from-vip" => "-m set --match-set {vips} src -j DROP",
        "excluded" => "-m set --match-set {excluded} dst -j RETURN",
        "reply" => "-m conntrack --ctdir REPLY -j RETURN",
        // To be rejected in METALEG-BLOCK; what gets past it is dropped in METALEG-LEAK.
        "blocked" => "-m set --match-set {blocked} src -j RETURN",
        // INVALID packets skip NAT.
        "invalid" => "-m set --match-set {egress} src -m conntrack --ctstate INVALID -j DROP",
        // Of a connection that is older than what we decided: neither marked nor translated. Not the first packet,
        // which is translated after this chain; `! --ctstate NEW` would pass all packets of a connection without
        // replies.
        "untranslated" => "-m mark --mark 0x0/{mask:#x} -m set --match-set {egress} src \
                           -m conntrack --ctdir ORIGINAL --ctstatus CONFIRMED ! --ctstate SNAT -j DROP",
        // Another node takes this one for its pod's gateway, and this one does not know the pod yet: the masquerade
        // of the CNI plugin would give it this node's address.
        "unknown" => "-m set --match-set {remote_pods} src -m set ! --match-set {egress} src -j DROP",
        // A pod of this node that is not classified yet. Dropped, not rejected: it is known in a moment, and until
        // then senders try again.
        "unclassified" => "-m set --match-set {local_pods} src -m set ! --match-set {egress} src \
                           -m set ! --match-set {ordinary} src -j DROP",
    };
    mangle(GUARD, "FORWARD", rules)
}

/// mangle POSTROUTING: drops what somebody else accepted in FORWARD ahead of METALEG-BLOCK.
fn leak(family: Family) -> Chain {
    let [excluded, blocked] = names(family, [EXCLUDED, BLOCKED]);
    let rules = rules! {
        "excluded" => "-m set --match-set {excluded} dst -j RETURN",
        "reply" => "-m conntrack --ctdir REPLY -j RETURN",
        "leak" => "-m set --match-set {blocked} src -j DROP",
    };
    mangle(LEAK, "POSTROUTING", rules)
}

/// The way into a chain; `gate` says for which packets.
fn jump(name: &str, gate: &str) -> Rule {
    Rule::new("jump", format!("{gate}-j {name}"))
}

/// The rule that translates the pods of a VIP's set to it.
pub(super) fn translation(vip: IpAddr) -> Rule {
    let text = format!(
        "-m set --match-set {} src -j SNAT --to-source {vip}",
        vip_set(vip)
    );
    Rule::new(&format!("vip={vip}"), text)
}

/// Whether a chain is of this backend.
pub(super) fn is_own_chain(name: &str) -> bool {
    [NAT, BLOCK, MARK, GUARD, LEAK].contains(&name)
}

/// Whether a rule of another chain leads into one of ours.
pub(super) fn jumps_to_us(line: &Line) -> bool {
    line.target().is_some_and(is_own_chain) && !is_own_chain(&line.chain)
}

/// Whether a chain is one that releases before 0.3 made.
pub(super) fn is_earlier_chain(name: &str) -> bool {
    EARLIER.iter().any(|(_, chain)| *chain == name)
}

/// The rule by which releases before 0.3 kept marked packets from being translated.
pub(super) fn is_earlier_rule(line: &Line, mask: u32) -> bool {
    let text = format!("-m mark ! --mark 0x0/{mask:#x} -j RETURN");
    line.table == "nat" && line.chain == "POSTROUTING" && line.rule.as_ref() == Some(&text)
}

/// The VIPs that have a translation rule.
pub(super) fn translated_vips(lines: &[Line]) -> impl Iterator<Item = IpAddr> {
    lines
        .iter()
        .filter(|line| line.table == "nat" && line.chain == NAT)
        .filter_map(|line| vip_of_tag(line.tag()?))
}

fn vip_of_tag(tag: &str) -> Option<IpAddr> {
    let (vip, _) = tag
        .strip_prefix(TAG)?
        .strip_prefix("vip=")?
        .rsplit_once(':')?;
    vip.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use nix::libc::{NF_IP_PRI_FILTER, NF_IP_PRI_MANGLE, NF_IP_PRI_NAT_SRC};

    use super::*;
    use crate::kernel::tests::documented;

    #[test]
    fn the_chains_are_as_documented() {
        let row = |chain: &Chain| {
            let name = |rule: &Rule| {
                let (name, _) = rule.tag[TAG.len()..].split_once(':').unwrap();
                name.to_owned()
            };
            let names: Vec<String> = chain.rules.iter().map(name).collect();
            let priority = match chain.table {
                "mangle" => NF_IP_PRI_MANGLE,
                "filter" => NF_IP_PRI_FILTER,
                _ => NF_IP_PRI_NAT_SRC,
            };
            vec![
                chain.name.to_owned(),
                format!("{} {}", chain.table, chain.base),
                priority.to_string(),
                names.join(" "),
            ]
        };
        let chains: BTreeSet<Vec<String>> =
            chains(Family::V4, 0x00f0_0000).iter().map(row).collect();
        let documented = documented("Backend iptables");
        assert_eq!(chains, documented.into_iter().collect());
    }
}
