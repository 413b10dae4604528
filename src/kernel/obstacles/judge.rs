//! What the rules of a chain of the forward hook accept for certain. Pure.
//!
//! Certain is what a rule accepts by nothing but where packets come from, where they go, and the state of their
//! connection. A rule that asks for anything else may accept, on terms that cannot be judged from here.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::state::{DroppingFilter, Family};

/// How deep chains may call each other; the kernel's limit for nftables.
const DEPTH: usize = 16;

/// What a rule does with packets that it matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    /// Also reject.
    Drop,
    Return,
    Jump(String),
    Goto(String),
    /// Goes on with the next rule.
    Continue,
}

/// When a rule matches a packet that forwards an egress connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Conditions {
    pub(crate) source: Option<IpNet>,
    pub(crate) destination: Option<IpNet>,
    /// The connection was opened from there.
    pub(crate) origin: Option<IpNet>,
    pub(crate) states: Option<States>,
    /// It asks for more than that.
    pub(crate) is_conditional: bool,
    /// No such packet can match.
    pub(crate) is_impossible: bool,
}

/// States of connections, as far as they matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct States {
    pub(crate) new: bool,
    pub(crate) established: bool,
}

impl States {
    /// Of words in any case, such as `RELATED,ESTABLISHED`.
    pub(crate) fn of(words: &str) -> States {
        let words = words.to_lowercase();
        let has = |word| words.split([',', ' ']).any(|w| w.trim() == word);
        States {
            new: has("new"),
            established: has("established"),
        }
    }

    fn and(self, other: States) -> States {
        States {
            new: self.new && other.new,
            established: self.established && other.established,
        }
    }
}

impl Conditions {
    fn are_none(&self) -> bool {
        *self == Conditions::default()
    }

    /// Those of a rule in a chain that packets reach on some conditions.
    fn and(&self, inner: &Conditions) -> Conditions {
        let mut is_impossible = self.is_impossible || inner.is_impossible;
        let mut narrower = |one: Option<IpNet>, other: Option<IpNet>| match (one, other) {
            (Some(one), Some(other)) if one.contains(&other) => Some(other),
            (Some(one), Some(other)) => {
                is_impossible |= !other.contains(&one);
                Some(one)
            }
            (one, other) => one.or(other),
        };
        Conditions {
            source: narrower(self.source, inner.source),
            destination: narrower(self.destination, inner.destination),
            origin: narrower(self.origin, inner.origin),
            states: match (self.states, inner.states) {
                (Some(one), Some(other)) => Some(one.and(other)),
                (one, other) => one.or(other),
            },
            is_conditional: self.is_conditional || inner.is_conditional,
            is_impossible,
        }
    }
}

pub(crate) type Chains = BTreeMap<String, Vec<(Conditions, Verdict)>>;

/// What a chain, with those that it calls, accepts before its policy drops the rest.
pub(crate) fn judge(family: Family, chains: &Chains, base: &str, name: String) -> DroppingFilter {
    let mut judge = Judge {
        everything: match family {
            Family::V4 => Ipv4Net::default().into(),
            Family::V6 => Ipv6Net::default().into(),
        },
        chains,
        found: DroppingFilter {
            chain: name,
            ..DroppingFilter::default()
        },
    };
    judge.walk(base, &Conditions::default(), 0);
    judge.found
}

struct Judge<'a> {
    everything: IpNet,
    chains: &'a Chains,
    found: DroppingFilter,
}

impl Judge<'_> {
    /// Returns whether no packet comes back from the chain.
    fn walk(&mut self, chain: &str, outer: &Conditions, depth: usize) -> bool {
        let chains = self.chains;
        let mut outer = outer.clone();
        for (own, verdict) in chains.get(chain).into_iter().flatten() {
            let conditions = outer.and(own);
            if conditions.is_impossible {
                continue;
            }
            match verdict {
                Verdict::Accept => {
                    self.accept(&conditions);
                    if own.are_none() {
                        return true;
                    }
                }
                Verdict::Drop if own.are_none() => return true,
                Verdict::Return if own.are_none() => return false,
                // Some packets do not come to the rules below.
                Verdict::Return => outer.is_conditional = true,
                Verdict::Jump(target) | Verdict::Goto(target) if depth < DEPTH => {
                    let has_ended = self.walk(target, &conditions, depth + 1);
                    if own.are_none() {
                        match verdict {
                            _ if has_ended => return true,
                            Verdict::Goto(_) => return false,
                            _ => {}
                        }
                    }
                }
                Verdict::Drop | Verdict::Jump(_) | Verdict::Goto(_) | Verdict::Continue => {}
            }
        }
        false
    }

    fn accept(&mut self, conditions: &Conditions) {
        let states = conditions.states.unwrap_or(States {
            new: true,
            established: true,
        });
        if conditions.is_conditional {
            self.found.is_conditional |= states.new;
            return;
        }
        let Conditions {
            source,
            destination,
            origin,
            ..
        } = conditions;
        if states.new && destination.is_none() {
            let from = source.or(*origin).unwrap_or(self.everything);
            self.found.sources.insert(from);
        }
        // An answer comes from outside, and goes to a pod.
        if states.established && source.is_none() {
            let opened_from = origin.or(*destination).unwrap_or(self.everything);
            self.found.answered.insert(opened_from);
        }
    }
}

/// A rule of `iptables-save`, without its chain.
pub(crate) fn iptables_rule(chain: &str, text: &str) -> (Conditions, Verdict) {
    let mut conditions = Conditions::default();
    let mut words = words(text).into_iter().peekable();
    let mut is_negated = false;
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_default();
        let is_not = std::mem::take(&mut is_negated);
        match word.as_str() {
            "!" => is_negated = true,
            "-m" | "--comment" => drop(value()),
            "-s" | "--source" if !is_not => net(&value(), &mut conditions.source),
            "-d" | "--destination" if !is_not => net(&value(), &mut conditions.destination),
            // What is outside is rarely meant by what a rule leaves out.
            "-d" | "--destination" => drop(value()),
            "--ctorigsrc" if !is_not => net(&value(), &mut conditions.origin),
            "--ctstate" | "--state" if !is_not => conditions.states = Some(States::of(&value())),
            // kube-proxy accepts what it has marked itself, which is never egress.
            "--mark" if chain.starts_with("KUBE-") => conditions.is_impossible = true,
            "-j" | "-g" => {
                let target = value();
                let verdict = match target.as_str() {
                    "ACCEPT" => Verdict::Accept,
                    "DROP" | "REJECT" => Verdict::Drop,
                    "RETURN" => Verdict::Return,
                    _ if word == "-g" => Verdict::Goto(target),
                    _ => Verdict::Jump(target),
                };
                return (conditions, verdict);
            }
            option if option.starts_with('-') => conditions.is_conditional = true,
            _ => {}
        }
    }
    (conditions, Verdict::Continue)
}

/// Words, of which those in double quotes may hold spaces.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (number, part) in text.split('"').enumerate() {
        match number % 2 {
            0 => words.extend(part.split_whitespace().map(str::to_owned)),
            _ => words.push(part.to_owned()),
        }
    }
    words
}

fn net(text: &str, place: &mut Option<IpNet>) {
    let parsed = text.parse();
    *place = parsed
        .or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from))
        .ok();
}

/// The rules of a chain as `nft list chain` shows them: one for each network that a rule names.
pub(crate) fn nft_rules(family: Family, text: &str) -> Vec<(Conditions, Verdict)> {
    let lines = text.lines().map(str::trim);
    let lines = lines.filter(|line| {
        let is_frame = ["table ", "chain ", "type ", "}", "#"];
        !line.is_empty() && !is_frame.iter().any(|frame| line.starts_with(frame))
    });
    lines.flat_map(|line| nft_rule(family, line)).collect()
}

fn nft_rule(family: Family, line: &str) -> Vec<(Conditions, Verdict)> {
    let line = line.split(" comment \"").next().unwrap_or(line);
    // The usual first line of a forward chain.
    if let Some(map) = line.strip_prefix("ct state vmap {") {
        let established = map.contains("established : accept");
        let states = Some(States {
            new: map.contains("new : accept"),
            established,
        });
        let conditions = Conditions {
            states,
            ..Conditions::default()
        };
        return vec![(conditions, Verdict::Accept)];
    }
    let (own, other) = match family {
        Family::V4 => ("ip", "ip6"),
        Family::V6 => ("ip6", "ip"),
    };
    let mut conditions = Conditions::default();
    let mut sources: BTreeSet<IpNet> = BTreeSet::new();
    let mut rest = line;
    while let Some((word, after)) = next_word(rest) {
        let two = next_word(after);
        rest = after;
        match (word, two) {
            ("accept", _) => return expand(conditions, &sources, &Verdict::Accept),
            ("drop" | "reject", _) => return expand(conditions, &sources, &Verdict::Drop),
            ("return", _) => return expand(conditions, &sources, &Verdict::Return),
            ("counter", _) => {
                let counted = after.strip_prefix("packets ");
                let words = counted.map(|words| words.splitn(4, ' ').nth(3));
                rest = words.map_or(after, Option::unwrap_or_default);
            }
            (word, Some(("saddr", after))) if word == own => {
                let (values, after) = values(after);
                sources.extend(values);
                conditions.is_conditional |= sources.is_empty();
                rest = after;
            }
            (word, Some(_)) if word == other => {
                conditions.is_impossible = true;
            }
            ("ct", Some(("state", after))) if !after.starts_with('!') => {
                let end = after.find(' ').unwrap_or(after.len());
                let (states, after) = after.split_at(end);
                conditions.states = Some(States::of(states));
                rest = after.trim_start();
            }
            _ => conditions.is_conditional = true,
        }
    }
    // What it calls is not followed: it may accept.
    let verdict = match line.contains("jump ") || line.contains("goto ") || line.contains("vmap ") {
        true => Verdict::Accept,
        false => Verdict::Continue,
    };
    expand(conditions, &sources, &verdict)
}

fn next_word(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    (!word.is_empty()).then_some((word, rest))
}

/// The networks that come next, alone or in braces; none where there is something else.
fn values(text: &str) -> (Vec<IpNet>, &str) {
    let (values, rest) = match text.strip_prefix('{') {
        Some(set) => set.split_once('}').unwrap_or((set, "")),
        None => text.split_once(' ').unwrap_or((text, "")),
    };
    let parse = |value: &str| {
        let mut place = None;
        net(value.trim(), &mut place);
        place
    };
    (
        values.split(',').filter_map(parse).collect(),
        rest.trim_start(),
    )
}

fn expand(
    conditions: Conditions,
    sources: &BTreeSet<IpNet>,
    verdict: &Verdict,
) -> Vec<(Conditions, Verdict)> {
    if sources.is_empty() {
        return vec![(conditions, verdict.clone())];
    }
    let rule = |source: &IpNet| {
        let source = Some(*source);
        let conditions = Conditions {
            source,
            ..conditions.clone()
        };
        (conditions, verdict.clone())
    };
    sources.iter().map(rule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "10.244.2.11";

    /// What `iptables-save` shows of the filter table: whether pods' packets pass for certain, and whether they may.
    fn judged(rules: &str) -> (bool, bool) {
        let mut chains = Chains::new();
        for line in rules.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (chain, rule) = line.split_once(' ').unwrap();
            let rules = chains.entry(chain.to_owned()).or_default();
            rules.push(iptables_rule(chain, rule));
        }
        let found = judge(Family::V4, &chains, "FORWARD", String::new());
        (found.accepts(POD.parse().unwrap()), found.is_conditional)
    }

    #[test]
    fn what_a_forward_chain_of_iptables_accepts() {
        let docker = "
            FORWARD -j DOCKER-USER
            FORWARD -j DOCKER-ISOLATION-STAGE-1
            FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
            FORWARD -i docker0 ! -o docker0 -j ACCEPT
            DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
            DOCKER-ISOLATION-STAGE-1 -j RETURN
            DOCKER-USER -j RETURN
            ";
        let kube_proxy = "
            FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
            KUBE-FORWARD -m conntrack --ctstate INVALID -m nfacct --nfacct-name ct -j DROP
            KUBE-FORWARD -m comment --comment \"a b\" -m mark --mark 0x4000/0x4000 -j ACCEPT
            KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
            ";
        let flannel = "
            FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD
            FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
            FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
            ";
        for (what, rules, expected) in [
            ("nothing", "", (false, false)),
            ("docker", docker, (false, true)),
            ("kube-proxy", kube_proxy, (false, false)),
            ("flannel", flannel, (true, false)),
            (
                "a bridge",
                "FORWARD -i cbr0 -j ACCEPT\nFORWARD -o cbr0 -j ACCEPT",
                (false, true),
            ),
            (
                "pods of another node",
                "FORWARD -s 10.244.1.0/24 -j ACCEPT\nFORWARD -d 10.244.1.0/24 -j ACCEPT",
                (false, false),
            ),
            ("one way", "FORWARD -s 10.244.0.0/16 -j ACCEPT", (false, false)),
            (
                "ours",
                "FORWARD -m comment --comment \"metaleg:jump:1\" -j METALEG-ACCEPT
                 METALEG-ACCEPT -m conntrack --ctstate RELATED,ESTABLISHED --ctorigsrc 10.244.0.0/16 -j ACCEPT
                 METALEG-ACCEPT -s 10.244.0.0/16 -j ACCEPT",
                (true, false),
            ),
            (
                "a drop ahead",
                "FORWARD -j REJECT --reject-with icmp-host-prohibited
                 FORWARD -j ACCEPT",
                (false, false),
            ),
            (
                "a way around",
                "FORWARD -j C\nC -s 10.0.0.0/8 -j RETURN\nC -j ACCEPT",
                (false, true),
            ),
            (
                "narrower and narrower",
                "FORWARD -s 10.0.0.0/8 -j C\nC -s 10.244.0.0/16 -j ACCEPT\nFORWARD -m state --state ESTABLISHED -j ACCEPT",
                (true, false),
            ),
            (
                "a contradiction",
                "FORWARD -s 10.1.0.0/16 -j C\nC -s 10.244.0.0/16 -j ACCEPT\nFORWARD -m state --state ESTABLISHED -j ACCEPT",
                (false, false),
            ),
            ("a loop", "FORWARD -j C\nC -j C", (false, false)),
            ("all", "FORWARD -j ACCEPT", (true, false)),
        ] {
            assert_eq!(judged(rules), expected, "{what}");
        }
    }

    #[test]
    fn what_a_forward_chain_of_nftables_accepts() {
        let judged = |rules: &str| {
            let text = format!(
                "table inet filter {{\n\tchain forward {{\n\t\ttype filter hook forward priority filter; policy drop;\n{rules}\n\t}}\n}}"
            );
            let chains = [("forward".to_owned(), nft_rules(Family::V4, &text))].into();
            let found = judge(Family::V4, &chains, "forward", String::new());
            (found.accepts(POD.parse().unwrap()), found.is_conditional)
        };
        let answers = "ct state established,related accept";
        let map = "ct state vmap { invalid : drop, established : accept, related : accept }";
        for (rules, expected) in [
            (String::new(), (false, false)),
            (answers.to_owned(), (false, false)),
            (
                format!("{answers}\nip saddr 10.244.0.0/16 accept"),
                (true, false),
            ),
            (
                format!(
                    "{map}\nip saddr {{ 10.1.0.0/16, 10.244.0.0/16 }} counter packets 3 bytes 252 accept"
                ),
                (true, false),
            ),
            (format!("{map}\nip6 saddr fd00::/8 accept"), (false, false)),
            (
                format!("{map}\niifname \"cbr0\" accept comment \"pods\""),
                (false, true),
            ),
            (format!("{map}\njump pods"), (false, true)),
            (format!("{map}\nip saddr @pods accept"), (false, true)),
            (format!("drop\n{answers}\naccept"), (false, false)),
            ("counter packets 0 bytes 0 accept".to_owned(), (true, false)),
        ] {
            assert_eq!(judged(&rules), expected, "{rules}");
        }
    }
}
