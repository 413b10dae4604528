//! The static part of the table: chains and rules, and what a packet experiences there.
//!
//! Rules look things up in sets and maps, whose number does not depend on the cluster: the cost of a packet
//! is the same for one Service and for thousands.

use crate::kernel::tag::tag;
use crate::state::{Family, Mark};

/// Name of our table, in the `inet` family.
pub(crate) const TABLE: &str = "metaleg";

/// A rule of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Its comment, by which it is known when it is read back.
    pub(crate) tag: String,
    text: String,
}

/// Where a chain hooks into the way of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hook {
    /// `filter`, `nat` or `route`.
    pub(crate) kind: &'static str,
    /// Name of the hook.
    pub(crate) name: &'static str,
    /// Number of the hook (`NF_INET_…` of netfilter.h).
    pub(crate) number: u32,
    /// Place among the chains of the hook, lowest first.
    pub(crate) priority: i32,
}

/// A chain of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) name: String,
    pub(crate) hook: Option<Hook>,
    pub(crate) rules: Vec<Rule>,
}

/// After DNAT (-100): a destination is looked at as the packet will be routed, not as it was sent.
const MARKING: Hook = Hook {
    kind: "filter",
    name: "prerouting",
    number: 0,
    priority: -95,
};
/// Where packets of this node itself are routed again when their mark changes.
const ERRORS: Hook = Hook {
    kind: "route",
    name: "output",
    number: 3,
    priority: -150,
};
/// Before the filters of others (0), which may accept and so end only their own chain.
const GUARD: Hook = Hook {
    kind: "filter",
    name: "forward",
    number: 2,
    priority: -5,
};
/// Ahead of every masquerade (100): the first chain that decides about a connection wins.
pub(crate) const TRANSLATION_PRIORITY: i32 = 95;
const TRANSLATION: Hook = Hook {
    kind: "nat",
    name: "postrouting",
    number: 4,
    priority: TRANSLATION_PRIORITY,
};
/// After every translation: the source is what will be on the wire.
const LEAK: Hook = Hook {
    kind: "filter",
    name: "postrouting",
    number: 4,
    priority: 105,
};

/// The chain that puts a slot's mark on packets.
pub(crate) fn slot_chain(mark: Mark) -> String {
    format!("slot{}", mark.value >> mark.mask.trailing_zeros())
}

/// The mark that a slot's chain puts on packets.
pub(crate) fn mark_of_chain(name: &str, mask: u32) -> Option<Mark> {
    let number: u32 = name.strip_prefix("slot")?.parse().ok()?;
    let value = number.checked_shl(mask.trailing_zeros())?;
    Some(Mark { value, mask })
}

/// Every chain of the table, for these families and marks.
pub(crate) fn chains(families: &[Family], mask: u32, slots: u32) -> Vec<Chain> {
    let marked = format!("meta mark and {mask:#010x} != 0");
    let mut marking = vec![
        // The answer to an inbound connection goes back the way that it came. Not `ct direction original` where
        // pods are looked up: untracked and INVALID packets have no direction, and must not slip through.
        rule("reply", "ct direction reply return"),
    ];
    let mut errors = Vec::new();
    let mut guard = Vec::new();
    let mut guard_excluded = Vec::new();
    let mut guard_pods = Vec::new();
    let mut translation = Vec::new();
    let mut leak = vec![rule("reply", "ct direction reply return")];
    for family in families {
        let (ip, n, icmp, l4) = match family {
            Family::V4 => ("ip", 4, "icmp", "icmp"),
            Family::V6 => ("ip6", 6, "icmpv6", "ipv6-icmp"),
        };
        let rule = |name: &str, text: String| rule(&format!("{name}-{n}"), &text);
        let excluded = rule("excluded", format!("{ip} daddr @excluded{n} return"));
        marking.extend([
            excluded.clone(),
            rule("mark", format!("{ip} saddr vmap @slot{n}")),
        ]);
        // This node's own word about a connection, such as that a packet is too large for the way to the pod, makes
        // sense to the server only from the VIP: it takes the way of the pod's packets.
        errors.extend([
            excluded.clone(),
            rule(
                "error",
                format!("meta l4proto {l4} ct state related ct original {ip} saddr vmap @slot{n}"),
            ),
        ]);
        guard.extend([
            // The pod's node has just forgotten their connection: as the beginning of one from outside they would
            // make the pod's next packet an answer, which leaves as it is.
            rule(
                "late-reply",
                format!(
                    "ct state new {ip} saddr . meta l4proto . th sport . {ip} daddr . th dport @late_replies{n} counter drop"
                ),
            ),
            // The gateway may know a connection that the pod's node has lost or has seen the end of: the same, for as
            // long as the pod is an egress pod, where the protocol tells a beginning.
            rule(
                "midway",
                format!(
                    "ct state new tcp flags & (fin | syn | rst | ack) != syn \
                     {ip} daddr @egress{n} {ip} saddr != @excluded{n} counter drop"
                ),
            ),
            // A VIP moves before routes and objects do. A packet of an outside server that arrives here before
            // the pod's own next packet would make a connection entry that clashes with the pod's; and an
            // INVALID one would be routed, and answered with an error that the server believes.
            rule(
                "to-vip",
                format!("{ip} daddr @vips{n} ct state new,invalid counter drop"),
            ),
            // Translated by a node that was the gateway and is none any more.
            rule("from-vip", format!("{ip} saddr @vips{n} counter drop")),
        ]);
        guard_excluded.push(excluded.clone());
        guard_pods.extend([
            // A connection that cannot go on ends at once instead of hanging.
            rule(
                "reset",
                format!("{ip} saddr @blocked{n} meta l4proto tcp counter reject with tcp reset"),
            ),
            // Says why, unlike port-unreachable.
            rule(
                "reject",
                format!("{ip} saddr @blocked{n} counter reject with {icmp} type admin-prohibited"),
            ),
            // INVALID packets skip NAT.
            rule(
                "invalid",
                format!("{ip} saddr @egress{n} ct state invalid counter drop"),
            ),
            // Another node takes us for its pod's gateway, and we do not know the pod yet: the masquerade of the
            // CNI plugin would give it this node's address.
            rule(
                "unknown",
                format!("{ip} saddr @remote_pods{n} {ip} saddr != @egress{n} counter drop"),
            ),
            // Dropped, not rejected: it is known in a moment, and until then senders try again.
            rule(
                "unclassified",
                format!(
                    "{ip} saddr @local_pods{n} {ip} saddr != @egress{n} {ip} saddr != @ordinary{n} counter drop"
                ),
            ),
        ]);
        translation.extend([
            rule("other", format!("{ip} saddr != @egress{n} return")),
            excluded.clone(),
            // On its way to the gateway a packet keeps its source. Translating it to itself takes the decision
            // away from the masquerade of the CNI plugin.
            rule("identity", format!("{marked} snat {ip} to {ip} saddr")),
            rule("vip", format!("snat {ip} to {ip} saddr map @vip{n}")),
            // Nor may that have what has no translation.
            rule("none", format!("{ip} saddr @egress{n} counter drop")),
        ]);
        leak.extend([
            excluded,
            rule("translated", format!("{ip} saddr @vips{n} return")),
            rule("marked", format!("{marked} {ip} saddr @egress{n} return")),
            // On its way to the gateway.
            rule(
                "error",
                format!("{ip} saddr != @egress{n} ct state related meta l4proto {l4} return"),
            ),
            // Whoever gave it another source: a masquerade of others, or a connection that is older than what we
            // decided.
            rule(
                "leak",
                format!("ct original {ip} saddr @egress{n} counter drop"),
            ),
            rule(
                "untranslated",
                format!("{ip} saddr @egress{n} counter drop"),
            ),
        ]);
    }
    guard.extend(guard_excluded);
    guard.push(rule("reply", "ct direction reply return"));
    guard.extend(guard_pods);
    let base = |name: &str, hook, rules| Chain {
        name: name.to_owned(),
        hook: Some(hook),
        rules,
    };
    let slot = |number: u32| {
        let value = number << mask.trailing_zeros();
        let keep = !mask;
        Chain {
            name: format!("slot{number}"),
            hook: None,
            // The bits of others stay.
            rules: vec![rule(
                "slot",
                &format!("meta mark set meta mark and {keep:#010x} or {value:#010x}"),
            )],
        }
    };
    // A chain must be there before the rule or the element that goes to it.
    let mut chains: Vec<Chain> = (1..=slots).map(slot).collect();
    chains.extend([
        base("marking", MARKING, marking),
        base("errors", ERRORS, errors),
        base("guard", GUARD, guard),
        base("translation", TRANSLATION, translation),
        base("leak", LEAK, leak),
    ]);
    chains
}

fn rule(name: &str, text: &str) -> Rule {
    Rule {
        tag: tag(name, text),
        text: text.to_owned(),
    }
}

impl Chain {
    /// The chain as `nft` takes it.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("  chain {} {{\n", self.name);
        if let Some(hook) = self.hook {
            text += &format!(
                "    type {} hook {} priority {}; policy accept;\n",
                hook.kind, hook.name, hook.priority
            );
        }
        for rule in &self.rules {
            text += &format!("    {} comment \"{}\"\n", rule.text, rule.tag);
        }
        text + "  }\n"
    }
}
