//! Chains and rules, and what a packet experiences there. Pure.
//!
//! Replies of inbound connections pass (`reply`). `! --ctdir ORIGINAL` would not do: an untracked packet has no
//! direction, and must not slip through.

use std::net::IpAddr;

use crate::ethernet::Mac;
use crate::kernel::iptables::save::Line;
use crate::kernel::iptables::sets::{StaticSet, everything, vip_set};
use crate::kernel::ours::{OwnSet, REALM, Ranges};
use crate::kernel::tag::{Rule, TAG, rules};
use crate::state::{Family, NetSet, PodSet};

/// The chain that has a rule for each VIP.
pub(super) const NAT: &str = "METALEG-NAT";
const BLOCK: &str = "METALEG-BLOCK";
const MARK: &str = "METALEG-MARK";
const GUARD: &str = "METALEG-GUARD";
const LEAK: &str = "METALEG-LEAK";
/// The chain that has a rule for each other node.
pub(super) const NODES: &str = "METALEG-NODES";
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
    /// None where only our own rules lead to it.
    pub(super) entry: Option<Entry>,
    pub(super) rules: Vec<Rule>,
}

/// How packets come from a built-in chain.
pub(super) struct Entry {
    pub(super) base: &'static str,
    pub(super) jump: Rule,
    pub(super) place: Place,
}

/// Where a jump has to stand in its built-in chain.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Anywhere,
    /// What another rule accepts or translates ahead of it would leak.
    First,
    /// What another rule marks after it would miss its gateway.
    AfterMarks,
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
        entry: Some(Entry {
            base,
            jump: jump(name, ""),
            place: Place::Anywhere,
        }),
        rules,
    }
}

/// Every chain of a family, in no order that matters.
pub(super) fn chains(family: Family, ranges: Ranges) -> Vec<Chain> {
    vec![
        nat(family),
        block(family, ranges),
        nodes(),
        mark(family, ranges),
        guard(family, ranges),
        leak(family, ranges),
    ]
}

/// nat POSTROUTING, for egress pods only: the source that a new connection gets. Then one rule for each VIP, see
/// [`translation`].
fn nat(family: Family) -> Chain {
    let everything = everything(family);
    let [excluded, egress] = names(family, [EXCLUDED, EGRESS]);
    let marks = StaticSet::Mark.name(family);
    Chain {
        table: "nat",
        name: NAT,
        entry: Some(Entry {
            base: "POSTROUTING",
            jump: jump(NAT, &format!("-m set --match-set {egress} src ")),
            place: Place::First,
        }),
        rules: rules! {
            "excluded" => "-m set --match-set {excluded} dst -j RETURN",
            // On its way to the gateway a packet keeps its source. Translating it to itself takes the decision away
            // from the masquerade of the CNI plugin.
            "identity" => "-m set --match-set {marks} src -j NETMAP --to {everything}",
        },
    }
}

/// filter FORWARD: rejects what a blocked pod sends to outside. REJECT is possible in this table only.
fn block(family: Family, ranges: Ranges) -> Chain {
    let prohibited = match family {
        Family::V4 => "icmp-admin-prohibited",
        Family::V6 => "icmp6-adm-prohibited",
    };
    let [excluded, blocked, egress] = names(family, [EXCLUDED, BLOCKED, EGRESS]);
    let mut rules = rules! {
        "excluded" => "-m set --match-set {excluded} dst -j RETURN",
        "reply" => "-m conntrack --ctdir REPLY -j RETURN",
        // A connection that cannot go on ends at once instead of hanging.
        "reset" => "-p tcp -m set --match-set {blocked} src -j REJECT --reject-with tcp-reset",
        // Says why, unlike port-unreachable.
        "reject" => "-m set --match-set {blocked} src -j REJECT --reject-with {prohibited}",
    };
    if ranges.strict_tcp {
        // The middle of a connection that another node was the gateway of is INVALID, for ever.
        rules.extend(rules! {
            "strict" => "-p tcp -m set --match-set {egress} src -m conntrack --ctstate INVALID \
                         -j REJECT --reject-with tcp-reset",
        });
    }
    Chain {
        table: "filter",
        name: BLOCK,
        entry: Some(Entry {
            base: "FORWARD",
            jump: jump(BLOCK, ""),
            place: Place::First,
        }),
        rules,
    }
}

/// Drops what another node hands over, see METALEG-GUARD. One rule for each node: there is no set of link-layer addresses
/// that every kernel has.
fn nodes() -> Chain {
    Chain {
        table: "mangle",
        name: NODES,
        entry: None,
        rules: Vec::new(),
    }
}

/// mangle PREROUTING: egress packets whose gateway is another node get its mark.
fn mark(family: Family, ranges: Ranges) -> Chain {
    let marks = StaticSet::Mark.name(family);
    let mask = ranges.mask;
    let rules = rules! {
        // Somebody else uses our bits. Counted, so that it can be told.
        "foreign" => "-m mark ! --mark 0x0/{mask:#x}",
        // The reply of an inbound connection goes back the way that the connection came.
        "reply" => "-m conntrack --ctdir REPLY -j RETURN",
        // Destinations are not looked at here, before DNAT: the routing rules do it, after DNAT.
        "mark" => "-j SET --map-set {marks} src --map-mark",
    };
    let mut chain = mangle(MARK, "PREROUTING", rules);
    if let Some(entry) = &mut chain.entry {
        entry.place = Place::AfterMarks;
    }
    chain
}

/// mangle FORWARD: drops what must neither become a connection nor leave.
fn guard(family: Family, ranges: Ranges) -> Chain {
    let mask = ranges.mask;
    let marks = StaticSet::Mark.name(family);
    let lans = StaticSet::Lans.name(family);
    let translated = StaticSet::Translated.name(family);
    let [excluded, egress, blocked] = names(family, [EXCLUDED, EGRESS, BLOCKED]);
    let [vips, late_replies] = names(family, [OwnSet::Vips, OwnSet::LateReplies]);
    let [remote_pods, local_pods] = names(
        family,
        [NetSet::RemotePods, NetSet::LocalPods].map(OwnSet::Nets),
    );
    let [ordinary] = names(family, [OwnSet::Pods(PodSet::Ordinary)]);
    // From outside to an egress pod, and not by way of a Service, whose answers come from the VIP.
    let to_pod = format!(
        "-m conntrack --ctstate NEW -m conntrack ! --ctstate DNAT -m set --match-set {egress} dst \
         -m set ! --match-set {excluded} src"
    );
    // No Service has taken it, and it would leave by the LAN that it came from: it was meant for the announcer of the
    // VIP, and belongs to a pod's connection.
    let to_vip = format!(
        "-m conntrack --ctstate NEW,INVALID -m set --match-set {vips} dst -m set ! --match-set {excluded} src \
         -m set --match-set {lans} src,src -m set --match-set {lans} dst,dst"
    );
    let mut rules = rules! {
        // A reply of a connection that this node has just forgotten. As NEW it would begin a connection from
        // outside; the pod's next packet would count as a reply, skip marking, and leave with the pod's own address.
        "late-reply" => "-m conntrack --ctstate NEW -m set --match-set {late_replies} dst,dst,src -j DROP",
        // The gateway may still hold an entry that the pod's node has lost: what another node hands over must not create
        // one here, as above. But for a bare SYN, which begins a connection and nothing else does.
        "midway" => "-p tcp ! --syn {to_pod} -j {NODES}",
        // Where answers come by a tunnel nobody's link-layer address says so.
        "tunnelled" => "-p tcp ! --syn {to_pod} -m set ! --match-set {lans} src,src -j DROP",
        "astray" => "! -p tcp {to_pod} -j {NODES}",
        // A VIP moves before routes and objects do. A server's packet that comes here ahead of the pod's own next
        // packet would create an entry that clashes with the pod's; an INVALID one would be routed, and answered
        // with an error that the server believes.
        "to-vip" => "-p tcp ! --syn {to_vip} -j DROP",
        "to-vip-other" => "! -p tcp {to_vip} -j DROP",
        "excluded" => "-m set --match-set {excluded} dst -j RETURN",
        "reply" => "-m conntrack --ctdir REPLY -j RETURN",
        // To be rejected in METALEG-BLOCK; what gets past it is dropped in METALEG-LEAK.
        "blocked" => "-m set --match-set {blocked} src -j RETURN",
    };
    if ranges.strict_tcp {
        // To be reset there, too.
        rules.extend(rules! {
            "strict" => "-p tcp -m set --match-set {egress} src -m conntrack --ctstate INVALID -j RETURN",
        });
    }
    rules.extend(rules! {
        // INVALID packets skip NAT.
        "invalid" => "-m set --match-set {egress} src -m conntrack --ctstate INVALID -j DROP",
        // Without a VIP it would fall through METALEG-NAT to the masquerade of the CNI plugin; nat cannot drop.
        "none" => "-m set --match-set {egress} src -m set ! --match-set {marks} src \
                   -m set ! --match-set {translated} src -j DROP",
        // Of a connection that is older than what we decided: neither marked nor translated. Not the first packet,
        // which is translated after this chain; `! --ctstate NEW` would pass all packets of a connection without
        // replies.
        "untranslated" => "-m mark --mark 0x0/{mask:#x} -m set --match-set {egress} src \
                           -m conntrack --ctdir ORIGINAL --ctstatus CONFIRMED ! --ctstate SNAT -j DROP",
        // With a VIP where another node is the gateway: a connection of the time when this one was.
        "moved" => "-m set --match-set {marks} src -m conntrack --ctdir ORIGINAL --ctstate SNAT -j DROP",
        // Somebody has taken the mark away, after us.
        "unrouted" => "-m mark --mark 0x0/{mask:#x} -m set --match-set {marks} src -j DROP",
        // Another node takes this one for its pod's gateway, and this one does not know the pod yet: the masquerade
        // of the CNI plugin would give it this node's address.
        "unknown" => "-m set --match-set {remote_pods} src -m set ! --match-set {egress} src -j DROP",
        // A pod of this node that is not classified yet. Dropped, not rejected: it is known in a moment, and until
        // then senders try again.
        "unclassified" => "-m set --match-set {local_pods} src -m set ! --match-set {egress} src \
                           -m set ! --match-set {ordinary} src -j DROP",
    });
    mangle(GUARD, "FORWARD", rules)
}

/// mangle POSTROUTING: drops what somebody else accepted in FORWARD ahead of METALEG-BLOCK, and what is not on its way to
/// the gateway that its mark stands for.
fn leak(family: Family, ranges: Ranges) -> Chain {
    let [excluded, egress, blocked] = names(family, [EXCLUDED, EGRESS, BLOCKED]);
    let (marks, lans) = (StaticSet::Mark.name(family), StaticSet::Lans.name(family));
    let mask = ranges.mask;
    // iptables does not see the next hop. The routes to gateways have a realm, which packets take from them; IPv6 has none.
    let elsewhere = match family {
        Family::V4 => format!("-m realm ! --realm {REALM}"),
        Family::V6 => format!("-m set ! --match-set {lans} dst,dst"),
    };
    let rules = rules! {
        // A tunnel that it enters next would hand the mark on, and be routed by it (kernels before 6.7).
        "inside" => "-m set --match-set {marks} src -m set --match-set {excluded} dst \
                     -j MARK --set-xmark 0x0/{mask:#x}",
        "excluded" => "-m set --match-set {excluded} dst -j RETURN",
        "reply" => "-m conntrack --ctdir REPLY -j RETURN",
        "leak" => "-m set --match-set {blocked} src -j DROP",
        "invalid" => "-m set --match-set {egress} src -m conntrack --ctstate INVALID -j DROP",
        "way" => "-m set --match-set {marks} src {elsewhere} -j DROP",
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

/// The rule that drops what a node hands over.
pub(super) fn from_node(mac: Mac) -> Rule {
    Rule::new(
        &format!("node={mac}"),
        format!("-m mac --mac-source {mac} -j DROP"),
    )
}

/// The chains of this backend, with their tables.
pub(super) const OWN: [(&str, &str); 6] = [
    ("nat", NAT),
    ("filter", BLOCK),
    ("mangle", NODES),
    ("mangle", MARK),
    ("mangle", GUARD),
    ("mangle", LEAK),
];

/// Whether a chain is of this backend.
pub(super) fn is_own_chain(name: &str) -> bool {
    OWN.iter().any(|(_, own)| *own == name)
}

/// Whether a rule changes marks, so that ours must come after it.
pub(super) fn changes_marks(line: &Line) -> bool {
    let is_foreign = !line.tag().is_some_and(|tag| tag.starts_with(TAG));
    is_foreign && matches!(line.target(), Some("MARK" | "CONNMARK"))
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

/// The nodes that have a rule.
pub(super) fn known_nodes(lines: &[Line]) -> impl Iterator<Item = Mac> {
    let of_chain = lines.iter().filter(|line| line.chain == NODES);
    of_chain.filter_map(|line| {
        let named = line.tag()?.strip_prefix(TAG)?.strip_prefix("node=")?;
        let (mac, _) = named.rsplit_once(':')?;
        mac.parse().ok()
    })
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
            let (base, priority) = match &chain.entry {
                Some(entry) => (entry.base, priority.to_string()),
                None => ("-", "-".to_owned()),
            };
            let names = if names.is_empty() {
                "-".to_owned()
            } else {
                names.join(" ")
            };
            vec![
                chain.name.to_owned(),
                format!("{} {base}", chain.table),
                priority,
                names,
            ]
        };
        let ranges = Ranges {
            strict_tcp: true,
            ..Ranges::DEFAULT
        };
        let chains: BTreeSet<Vec<String>> = chains(Family::V4, ranges).iter().map(row).collect();
        let own = super::chains(Family::V4, Ranges::DEFAULT);
        let own: Vec<_> = own.iter().map(|chain| (chain.table, chain.name)).collect();
        assert_eq!(own, OWN);
        let documented = documented("Backend iptables");
        assert_eq!(chains, documented.into_iter().collect());
    }
}
