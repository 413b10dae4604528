//! Chains and rules, what a packet experiences there, and the documents that put them in place.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::kernel::iptables::sets::{StaticSet, vip_set};
use crate::kernel::ours::OwnSet;
use crate::kernel::tag::{TAG, tag};
use crate::state::{Family, NetSet, PodSet};

pub(super) const NAT: &str = "METALEG-NAT";

/// A rule without its chain: the text after `-A CHAIN`, comment included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) tag: String,
    pub(super) text: String,
}

impl Rule {
    pub(super) fn new(name: &str, text: &str) -> Rule {
        let tag = tag(name, text);
        let text = format!("-m comment --comment \"{tag}\" {text}");
        Rule { tag, text }
    }

    pub(super) fn append(&self, chain: &str) -> String {
        format!("-A {chain} {}", self.text)
    }

    pub(super) fn delete(&self, chain: &str) -> String {
        format!("-D {chain} {}", self.text)
    }
}

/// A chain of ours and how packets come into it.
pub(super) struct Chain {
    pub(super) table: &'static str,
    pub(super) name: &'static str,
    /// The built-in chain with the jump.
    pub(super) base: &'static str,
    pub(super) jump: Rule,
    /// The jump must be the first rule of its chain: what another rule accepts or translates ahead of it would
    /// leak.
    pub(super) first: bool,
    pub(super) rules: Vec<Rule>,
}

pub(super) fn chains(family: Family, mask: u32) -> Vec<Chain> {
    let set = |set: OwnSet| StaticSet::Set(set).name(family);
    let excluded = set(OwnSet::Nets(NetSet::Excluded));
    let remote_pods = set(OwnSet::Nets(NetSet::RemotePods));
    let local_pods = set(OwnSet::Nets(NetSet::LocalPods));
    let egress = set(OwnSet::Pods(PodSet::Egress));
    let blocked = set(OwnSet::Pods(PodSet::Blocked));
    let ordinary = set(OwnSet::Pods(PodSet::Ordinary));
    let (vips, late_replies) = (set(OwnSet::Vips), set(OwnSet::LateReplies));
    let marks = StaticSet::Mark.name(family);
    let (everything, prohibited) = match family {
        Family::V4 => ("0.0.0.0/0", "icmp-admin-prohibited"),
        Family::V6 => ("::/0", "icmp6-adm-prohibited"),
    };
    let to_excluded = Rule::new(
        "excluded",
        &format!("-m set --match-set {excluded} dst -j RETURN"),
    );
    // `! --ctdir ORIGINAL` would not do: an untracked packet has no direction, and must not slip through.
    let reply = Rule::new("reply", "-m conntrack --ctdir REPLY -j RETURN");
    let jump = |name: &str, gate: &str| Rule::new("jump", &format!("{gate}-j {name}"));
    vec![
        Chain {
            table: "nat",
            name: NAT,
            base: "POSTROUTING",
            jump: jump(NAT, &format!("-m set --match-set {egress} src ")),
            first: true,
            // Then one rule for each VIP, see `translation`.
            rules: vec![
                to_excluded.clone(),
                // On its way to the gateway a packet keeps its source. Translating it to itself takes the
                // decision away from the masquerade of the CNI plugin.
                Rule::new(
                    "identity",
                    &format!("-m mark ! --mark 0x0/{mask:#x} -j NETMAP --to {everything}"),
                ),
            ],
        },
        Chain {
            table: "filter",
            name: "METALEG-BLOCK",
            base: "FORWARD",
            jump: jump("METALEG-BLOCK", ""),
            first: true,
            rules: vec![
                to_excluded.clone(),
                reply.clone(),
                // A connection that cannot go on ends at once instead of hanging.
                Rule::new(
                    "reset",
                    &format!(
                        "-p tcp -m set --match-set {blocked} src -j REJECT --reject-with tcp-reset"
                    ),
                ),
                // Says why, unlike port-unreachable.
                Rule::new(
                    "reject",
                    &format!(
                        "-m set --match-set {blocked} src -j REJECT --reject-with {prohibited}"
                    ),
                ),
            ],
        },
        Chain {
            table: "mangle",
            name: "METALEG-MARK",
            base: "PREROUTING",
            jump: jump("METALEG-MARK", ""),
            first: false,
            rules: vec![
                // The answer to an inbound connection goes back the way that it came.
                reply.clone(),
                // Destinations are not looked at here, before DNAT: the routing rules do it, after DNAT.
                Rule::new("mark", &format!("-j SET --map-set {marks} src --map-mark")),
            ],
        },
        Chain {
            table: "mangle",
            name: "METALEG-GUARD",
            base: "FORWARD",
            jump: jump("METALEG-GUARD", ""),
            first: false,
            rules: vec![
                // The pod's node has just forgotten their connection: as the beginning of one from outside they
                // would make the pod's next packet an answer, which leaves as it is.
                Rule::new(
                    "late-reply",
                    &format!(
                        "-m conntrack --ctstate NEW -m set --match-set {late_replies} dst,dst,src -j DROP"
                    ),
                ),
                // The gateway may know a connection that the pod's node has lost or has seen the end of: the same,
                // for as long as the pod is an egress pod, where the protocol tells a beginning.
                Rule::new(
                    "midway",
                    &format!(
                        "-p tcp ! --syn -m conntrack --ctstate NEW -m set --match-set {egress} dst \
                         -m set ! --match-set {excluded} src -j DROP"
                    ),
                ),
                // A VIP moves before routes and objects do. A packet of an outside server that arrives here
                // before the pod's own next packet would make a connection entry that clashes with the pod's; and
                // an INVALID one would be routed, and answered with an error that the server believes.
                Rule::new(
                    "to-vip",
                    &format!(
                        "-m conntrack --ctstate NEW,INVALID -m set --match-set {vips} dst -j DROP"
                    ),
                ),
                // Translated by a node that was the gateway and is none any more.
                Rule::new(
                    "from-vip",
                    &format!("-m set --match-set {vips} src -j DROP"),
                ),
                to_excluded.clone(),
                reply.clone(),
                // To be rejected in METALEG-BLOCK; what gets past it is dropped in METALEG-LEAK.
                Rule::new(
                    "blocked",
                    &format!("-m set --match-set {blocked} src -j RETURN"),
                ),
                // INVALID packets skip NAT.
                Rule::new(
                    "invalid",
                    &format!(
                        "-m set --match-set {egress} src -m conntrack --ctstate INVALID -j DROP"
                    ),
                ),
                // Of a connection that is older than what we decided: neither routed nor translated. Not the first
                // packet, whose turn is to come; `! --ctstate NEW` would pass all of a sender that nobody answers.
                Rule::new(
                    "untranslated",
                    &format!(
                        "-m mark --mark 0x0/{mask:#x} -m set --match-set {egress} src \
                         -m conntrack --ctdir ORIGINAL --ctstatus CONFIRMED ! --ctstate SNAT -j DROP"
                    ),
                ),
                // Another node takes us for its pod's gateway, and we do not know the pod yet: the masquerade
                // of the CNI plugin would give it this node's address.
                Rule::new(
                    "unknown",
                    &format!(
                        "-m set --match-set {remote_pods} src -m set ! --match-set {egress} src -j DROP"
                    ),
                ),
                // Dropped, not rejected: it is known in a moment, and until then senders try again.
                Rule::new(
                    "unclassified",
                    &format!(
                        "-m set --match-set {local_pods} src -m set ! --match-set {egress} src \
                         -m set ! --match-set {ordinary} src -j DROP"
                    ),
                ),
            ],
        },
        Chain {
            table: "mangle",
            name: "METALEG-LEAK",
            base: "POSTROUTING",
            jump: jump("METALEG-LEAK", ""),
            first: false,
            rules: vec![
                to_excluded,
                reply,
                Rule::new("leak", &format!("-m set --match-set {blocked} src -j DROP")),
            ],
        },
    ]
}

/// The rule that translates the pods of a VIP's set to it.
pub(super) fn translation(vip: IpAddr) -> Rule {
    let text = format!(
        "-m set --match-set {} src -j SNAT --to-source {vip}",
        vip_set(vip)
    );
    Rule::new(&format!("vip={vip}"), &text)
}

pub(super) fn table(name: &str, lines: impl Iterator<Item = String>) -> String {
    let lines: String = lines.map(|line| line + "\n").collect();
    format!("*{name}\n{lines}COMMIT\n")
}

/// The document that puts all chains and jumps in place, whatever was there. Each table is exchanged
/// atomically; NAT comes first and marks last, because a marked packet needs the NAT.
pub(super) fn install_document(
    family: Family,
    mask: u32,
    vips: &BTreeSet<IpAddr>,
    present: &[Line],
) -> String {
    let chains = chains(family, mask);
    let mut document = String::new();
    for name in ["nat", "filter", "mangle"] {
        let own = || chains.iter().filter(|chain| chain.table == name);
        let mut lines: Vec<String> = own().map(|c| format!(":{} - [0:0]", c.name)).collect();
        for chain in own() {
            lines.extend(chain.rules.iter().map(|rule| rule.append(chain.name)));
        }
        if name == "nat" {
            lines.extend(vips.iter().map(|vip| translation(*vip).append(NAT)));
        }
        let jumps = present
            .iter()
            .filter(|line| line.table == name && line.jumps_to_us());
        lines.extend(jumps.map(Line::delete));
        lines.extend(own().map(|chain| {
            // A mark of an earlier release means another gateway: ours comes after it, and replaces it.
            let is_marked = |line: &Line| line.target() == Some("METALEG-RT-MARK");
            if chain.base == "PREROUTING" && present.iter().any(is_marked) {
                format!("-A {} {}", chain.base, chain.jump.text)
            } else {
                format!("-I {} 1 {}", chain.base, chain.jump.text)
            }
        }));
        document += &table(name, lines.into_iter());
    }
    document
}

/// The document that removes the chains that `is_target` names with the jumps to them, and the rules that
/// `is_stray` names; empty when there are none.
pub(super) fn remove_document(
    present: &[Line],
    is_target: impl Fn(&str) -> bool,
    is_stray: impl Fn(&Line) -> bool,
) -> String {
    let mut document = String::new();
    for name in ["mangle", "filter", "nat"] {
        let of_table = || present.iter().filter(|line| line.table == name);
        let goes = |line: &&Line| {
            let in_target = is_target(&line.chain);
            !in_target && (line.target().is_some_and(&is_target) || is_stray(line))
        };
        let mut lines: Vec<String> = of_table().filter(goes).map(Line::delete).collect();
        let targets = || of_table().filter(|line| line.rule.is_none() && is_target(&line.chain));
        lines.extend(targets().map(|line| format!("-F {}", line.chain)));
        lines.extend(targets().map(|line| format!("-X {}", line.chain)));
        if !lines.is_empty() {
            document += &table(name, lines.into_iter());
        }
    }
    document
}

/// Whether a chain is of this backend.
pub(super) fn is_own_chain(name: &str) -> bool {
    let own = [
        "METALEG-BLOCK",
        "METALEG-MARK",
        "METALEG-GUARD",
        "METALEG-LEAK",
    ];
    name == NAT || own.contains(&name)
}

/// Whether a chain is one that releases before 0.3 made.
pub(super) fn is_earlier_chain(name: &str) -> bool {
    ["METALEG-RT-MARK", "METALEG-REJECT", "METALEG-SNAT"].contains(&name)
}

/// The rule by which releases before 0.3 kept marked packets from being translated.
pub(super) fn is_earlier_rule(line: &Line, mask: u32) -> bool {
    let text = format!("-m mark ! --mark 0x0/{mask:#x} -j RETURN");
    line.table == "nat" && line.chain == "POSTROUTING" && line.rule.as_ref() == Some(&text)
}

/// A line of `iptables-save` that is a chain or a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) table: String,
    pub(super) chain: String,
    /// The text after `-A CHAIN`; `None` declares the chain.
    pub(super) rule: Option<String>,
}

impl Line {
    /// What the rule does.
    pub(super) fn target(&self) -> Option<&str> {
        let mut words = self.rule.as_deref()?.split(' ').skip_while(|w| *w != "-j");
        words.nth(1)
    }

    pub(super) fn jumps_to_us(&self) -> bool {
        self.target().is_some_and(is_own_chain) && !is_own_chain(&self.chain)
    }

    pub(super) fn delete(&self) -> String {
        format!(
            "-D {} {}",
            self.chain,
            self.rule.as_deref().unwrap_or_default()
        )
    }

    /// Our tag in the rule's comment.
    pub(super) fn tag(&self) -> Option<&str> {
        let (_, rest) = self.rule.as_ref()?.split_once("--comment ")?;
        let comment = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split('"').next()?,
            None => rest.split(' ').next()?,
        };
        comment.starts_with(TAG).then_some(comment)
    }
}

pub(super) fn parse_save(text: &str) -> Vec<Line> {
    let mut table = String::new();
    let mut lines = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            name.clone_into(&mut table);
        } else if let Some(chain) = line.strip_prefix(':') {
            lines.push(Line {
                table: table.clone(),
                chain: chain.split(' ').next().unwrap_or_default().to_owned(),
                rule: None,
            });
        } else if let Some((chain, rule)) = line
            .strip_prefix("-A ")
            .and_then(|rest| rest.split_once(' '))
        {
            lines.push(Line {
                table: table.clone(),
                chain: chain.to_owned(),
                rule: Some(rule.to_owned()),
            });
        }
    }
    lines
}

/// The VIPs that have a translation rule.
pub(super) fn translated_vips(lines: &[Line]) -> impl Iterator<Item = IpAddr> {
    lines
        .iter()
        .filter(|line| line.table == "nat" && line.chain == NAT)
        .filter_map(|line| vip_of_tag(line.tag()?))
}

pub(super) fn vip_of_tag(tag: &str) -> Option<IpAddr> {
    let (vip, _) = tag
        .strip_prefix(TAG)?
        .strip_prefix("vip=")?
        .rsplit_once(':')?;
    vip.parse().ok()
}
