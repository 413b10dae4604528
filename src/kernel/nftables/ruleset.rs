//! The static part of the table: chains and rules, and what a packet experiences there. Pure.
//!
//! Rules look things up in sets and maps, whose number does not depend on the cluster: the cost of a packet
//! is the same for one Service and for thousands. Traffic inside the cluster is none of a chain's business (`excluded`).

use nix::libc::{
    NF_INET_FORWARD, NF_INET_LOCAL_OUT, NF_INET_POST_ROUTING, NF_INET_PRE_ROUTING, c_int,
};

use crate::kernel::ours::{Ranges, digit};
use crate::kernel::tag::{Rule, rules};
use crate::state::{Family, Mark};

/// Name of our table, in the `inet` family.
pub(crate) const TABLE: &str = "metaleg";

/// Where a base chain is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hook {
    /// `filter`, `nat` or `route`.
    pub(crate) kind: &'static str,
    pub(crate) name: &'static str,
    /// `NF_INET_…`.
    pub(crate) number: c_int,
    /// Place among the chains of the hook, lowest first.
    pub(crate) priority: i32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) name: String,
    pub(crate) hook: Option<Hook>,
    pub(crate) rules: Vec<Rule>,
}

/// Ahead of every masquerade (100): the first NAT chain that decides about a connection wins.
pub(crate) const TRANSLATION_PRIORITY: i32 = 95;

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

/// Every chain of the table, for these families.
pub(crate) fn chains(families: &[Family], ranges: Ranges) -> Vec<Chain> {
    let words: Vec<Words> = families.iter().copied().map(Words::of).collect();
    let mark = format!("meta mark and {:#010x}", ranges.mask);
    // A chain must be there before the rule or the element that goes to it.
    let slots = 1..=ranges.slots;
    let mut chains: Vec<Chain> = slots.map(|number| slot(number, ranges.mask)).collect();
    chains.extend([
        marking(&words, &mark),
        errors(&words),
        guard(&words, ranges.strict_tcp),
        translation(&words),
        leak(&words, &mark),
    ]);
    chains
}

/// What rules of a family are written with.
#[derive(Clone, Copy)]
struct Words {
    ip: &'static str,
    n: u8,
    /// ICMP, as `reject with` takes it.
    icmp: &'static str,
    /// ICMP, as `meta l4proto` takes it.
    l4: &'static str,
}

impl Words {
    fn of(family: Family) -> Words {
        let n = digit(family);
        let (ip, icmp, l4) = match family {
            Family::V4 => ("ip", "icmp", "icmp"),
            Family::V6 => ("ip6", "icmpv6", "ipv6-icmp"),
        };
        Words { ip, n, icmp, l4 }
    }
}

/// A packet of an egress pod gets the mark of its gateway; all other bits stay.
fn slot(number: u32, mask: u32) -> Chain {
    let (value, others) = (number << mask.trailing_zeros(), !mask);
    Chain {
        name: format!("slot{number}"),
        hook: None,
        rules: rules! { "slot" => "meta mark set meta mark and {others:#010x} or {value:#010x}" },
    }
}

/// Egress packets whose gateway is another node go to its slot. After DNAT (-100): the destination is looked at as it will
/// be routed, not as it was sent.
fn marking(families: &[Words], mark: &str) -> Chain {
    // Somebody else uses our bits. Counted, so that it can be told.
    let mut rules = rules! { "foreign" => "{mark} != 0 counter" };
    // The reply of an inbound connection goes back the way that the connection came. Not `ct direction original` where
    // pods are looked up: untracked and INVALID packets have no direction, and must not slip through.
    rules.extend(reply());
    for &Words { ip, n, .. } in families {
        rules.extend(rules! {
            "excluded-{n}" => "{ip} daddr @excluded{n} return",
            "mark-{n}" => "{ip} saddr vmap @slot{n}",
        });
    }
    base("marking", ("filter", PREROUTING, -95), rules)
}

/// ICMP errors that this node sends about an egress connection (such as "fragmentation needed") are marked too and go over
/// the gateway, because the server can match them only if they come from the VIP. A chain of type `route`: after it a
/// node's own packet is routed again when its mark has changed.
fn errors(families: &[Words]) -> Chain {
    let mut rules = Vec::new();
    for &Words { ip, n, l4, .. } in families {
        rules.extend(rules! {
            "excluded-{n}" => "{ip} daddr @excluded{n} return",
            "error-{n}" => "meta l4proto {l4} ct state related ct original {ip} saddr vmap @slot{n}",
        });
    }
    base("errors", ("route", OUTPUT, -150), rules)
}

/// Drops or rejects what must neither become a connection nor leave. Before the filters of others (0): where they accept,
/// that ends only their own chain, while a drop is final.
fn guard(families: &[Words], strict_tcp: bool) -> Chain {
    let mut rules = Vec::new();
    for &Words { ip, n, .. } in families {
        // From outside to an egress pod, and not by way of a Service, whose answers come from the VIP.
        let to_pod = format!(
            "ct state new ct status and dnat == 0 {ip} daddr @egress{n} {ip} saddr != @excluded{n}"
        );
        // No Service has taken it, and it would leave by the interface that it came in by: it was meant for the announcer
        // of the VIP, and belongs to a pod's connection.
        let to_vip = format!(
            "{ip} daddr @vips{n} {ip} saddr != @excluded{n} ct state new,invalid \
             meta iifname . meta oifname @lans{n}"
        );
        let midway = "tcp flags & (fin | syn | rst | ack) != syn";
        rules.extend(rules! {
            // A reply of a connection that this node has just forgotten. As NEW it would begin a connection from
            // outside; the pod's next packet would count as a reply, skip marking, and leave with the pod's own address.
            "late-reply-{n}" => "ct state new {ip} saddr . meta l4proto . th sport . {ip} daddr . th dport \
                                 @late_replies{n} counter drop",
            "late-portless-{n}" => "ct state new {ip} saddr . meta l4proto . {ip} daddr @late_portless{n} counter drop",
            // The gateway may still hold an entry that the pod's node has lost: what another node hands over must not create
            // one here, as above. But for a bare SYN, which begins a connection and nothing else does.
            "midway-{n}" => "{to_pod} {midway} ether saddr @nodes{n} counter drop",
            // Where answers come by a tunnel nobody's link-layer address says so.
            "tunnelled-{n}" => "{to_pod} {midway} meta iifname . meta iifname != @lans{n} counter drop",
            "astray-{n}" => "{to_pod} meta l4proto != tcp ether saddr @nodes{n} counter drop",
            // A VIP moves before routes and objects do. A server's packet that comes here ahead of the pod's own next
            // packet would create an entry that clashes with the pod's; an INVALID one would be routed, and answered
            // with an error that the server believes.
            "to-vip-{n}" => "{to_vip} {midway} counter drop",
            "to-vip-other-{n}" => "{to_vip} meta l4proto != tcp counter drop",
        });
    }
    // From here on only packets to outside are left, and no replies of inbound connections.
    for &Words { ip, n, .. } in families {
        rules.extend(rules! { "excluded-{n}" => "{ip} daddr @excluded{n} return" });
    }
    rules.extend(reply());
    for &Words { ip, n, icmp, .. } in families {
        if strict_tcp {
            // The middle of a connection that another node was the gateway of is INVALID, for ever.
            rules.extend(rules! {
                "strict-{n}" => "{ip} saddr @egress{n} ct state invalid meta l4proto tcp counter \
                                 reject with tcp reset",
            });
        }
        rules.extend(rules! {
            // A connection that cannot go on ends at once instead of hanging.
            "reset-{n}" => "{ip} saddr @blocked{n} meta l4proto tcp counter reject with tcp reset",
            // Says why, unlike port-unreachable.
            "reject-{n}" => "{ip} saddr @blocked{n} counter reject with {icmp} type admin-prohibited",
            // INVALID packets skip NAT.
            "invalid-{n}" => "{ip} saddr @egress{n} ct state invalid counter drop",
            // Another node takes this one for its pod's gateway, and this one does not know the pod yet: the masquerade
            // of the CNI plugin would give it this node's address.
            "unknown-{n}" => "{ip} saddr @remote_pods{n} {ip} saddr != @egress{n} counter drop",
            // A pod of this node that is not classified yet. Dropped, not rejected: it is known in a moment, and until
            // then senders try again.
            "unclassified-{n}" => "{ip} saddr @local_pods{n} {ip} saddr != @egress{n} {ip} saddr != @ordinary{n} \
                                   counter drop",
        });
    }
    base("guard", ("filter", FORWARD, -5), rules)
}

/// The source that a new connection of an egress pod gets.
fn translation(families: &[Words]) -> Chain {
    let mut rules = Vec::new();
    for &Words { ip, n, .. } in families {
        rules.extend(rules! {
            // NAT of pods that are no egress pods is the business of others.
            "other-{n}" => "{ip} saddr != @egress{n} return",
            "excluded-{n}" => "{ip} daddr @excluded{n} return",
            // On its way to the gateway a packet keeps its source. Translating it to itself takes the decision away
            // from the masquerade of the CNI plugin.
            "identity-{n}" => "{ip} saddr @slot{n} snat {ip} to {ip} saddr",
            // This node is the gateway, or the packet passes here by chance: the VIP is right.
            "vip-{n}" => "snat {ip} to {ip} saddr map @vip{n}",
            // A pod without a VIP must not fall to a masquerade either.
            "none-{n}" => "{ip} saddr @egress{n} counter drop",
        });
    }
    base(
        "translation",
        ("nat", POSTROUTING, TRANSLATION_PRIORITY),
        rules,
    )
}

/// Drops what would leave with a wrong source. After every translation: the source is the one that will be on the wire.
fn leak(families: &[Words], mark: &str) -> Chain {
    let mut rules = reply();
    for &Words { ip, n, l4, .. } in families {
        rules.extend(rules! {
            "excluded-{n}" => "{ip} daddr @excluded{n} return",
            // On its way to the gateway, and really so: rules of others may come before ours, and ours may be lost.
            "way-{n}" => "{ip} saddr @egress{n} {mark} . rt {ip} nexthop @ways{n} return",
            // A VIP where another node is the gateway: a connection of the time when this one was.
            "moved-{n}" => "{ip} saddr @vips{n} ct original {ip} saddr @slot{n} counter drop",
            "translated-{n}" => "{ip} saddr @vips{n} return",
            // This node's own ICMP errors, see `errors`.
            "error-{n}" => "{ip} saddr != @egress{n} ct state related meta l4proto {l4} return",
            // Whoever gave it another source: a masquerade of others, or a connection that is older than what we
            // decided.
            "leak-{n}" => "ct original {ip} saddr @egress{n} counter drop",
            // What NAT never saw.
            "untranslated-{n}" => "{ip} saddr @egress{n} counter drop",
        });
    }
    base("leak", ("filter", POSTROUTING, 105), rules)
}

/// Replies of inbound connections pass.
fn reply() -> Vec<Rule> {
    rules! { "reply" => "ct direction reply return" }
}

type HookPoint = (&'static str, c_int);

const PREROUTING: HookPoint = ("prerouting", NF_INET_PRE_ROUTING);
const FORWARD: HookPoint = ("forward", NF_INET_FORWARD);
const OUTPUT: HookPoint = ("output", NF_INET_LOCAL_OUT);
const POSTROUTING: HookPoint = ("postrouting", NF_INET_POST_ROUTING);

fn base(
    name: &str,
    (kind, (hook, number), priority): (&'static str, HookPoint, i32),
    rules: Vec<Rule>,
) -> Chain {
    Chain {
        name: name.to_owned(),
        hook: Some(Hook {
            kind,
            name: hook,
            number,
            priority,
        }),
        rules,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tag::TAG;
    use crate::kernel::tests::documented;

    #[test]
    fn the_chains_are_as_documented() {
        let ranges = Ranges {
            mask: 0x0010_0000,
            slots: 1,
            table_offset: 100_000,
            priority: 1000,
            strict_tcp: true,
        };
        let chains: Vec<Vec<String>> = chains(&[Family::V4], ranges)
            .iter()
            .map(|chain| {
                let names: Vec<&str> = chain
                    .rules
                    .iter()
                    .map(|rule| {
                        let (name, _) = rule.tag[TAG.len()..].split_once(':').unwrap();
                        name.strip_suffix("-4").unwrap_or(name)
                    })
                    .collect();
                let (hook, priority) = match chain.hook {
                    Some(hook) => (hook.name, hook.priority.to_string()),
                    None => ("-", "-".to_owned()),
                };
                let name = chain.name.replace("slot1", "slotN");
                vec![name, hook.to_owned(), priority, names.join(" ")]
            })
            .collect();
        assert_eq!(chains, documented("Backend nftables"));
    }
}
