//! Firewall backend on iptables and ipset, in whichever mode the node's other programs use.
//!
//! Chains are static, but for one translation rule for each VIP; which pods they concern is in sets, so that
//! most changes are one `ipset restore`. Every rule of ours carries a comment with a hash of what we sent:
//! what is read back is compared by these, because iptables prints rules in other words than it was given.
//!
//! What a packet experiences is written beside each rule in [`chains`].

mod by_name;
mod chains;
mod detect;
mod documents;
mod mode;
mod read;
pub(crate) mod remnants;
mod save;
mod sets;
mod translations;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use nix::libc::NF_IP_PRI_NAT_SRC;

use self::chains::{
    NAT, NODES, from_node, is_own_chain, known_nodes, translated_vips, translation,
};
use self::detect::detect;
use self::documents::{install_document, remove_document, table};
pub(crate) use self::mode::Variant;
use self::save::{restore, save};
use self::sets::{
    StaticSet, Work, create_vip, destroy, ipset, late_reply_line, read_sets, vip_of_set, vip_set,
    work_of,
};
use self::translations::Translations;
use crate::ethernet::Mac;
use crate::kernel::backend::{Profile, Watched};
use crate::kernel::conntrack::LateReply;
use crate::kernel::error::{Error, StepError, executable};
use crate::kernel::netlink::OwnPorts;
use crate::kernel::ours::{OwnSet, Ranges};
use crate::kernel::tag::Rule;
use crate::kernel::tool::ToolError;
use crate::state::{Family, FirewallState, FirewallStep, Landmark, Remnant};

/// How many bad input lines a batch may have before it is given up.
const MOST_BAD_LINES: usize = 32;

#[derive(Debug)]
pub(crate) struct Iptables {
    variant: Variant,
    why: &'static str,
    ranges: Ranges,
    families: Vec<Family>,
    ports: OwnPorts,
    /// VIPs and nodes that have a rule, as far as we know: keeps a repeated step from doubling it.
    translated: BTreeSet<IpAddr>,
    nodes: BTreeSet<(Family, Mac)>,
    /// The pods' VIPs, as far as we know: one that keeps another is let through.
    translations: Translations,
}

impl Iptables {
    /// Finds out which mode to use. Changes nothing.
    pub(crate) async fn open(
        ranges: Ranges,
        families: Vec<Family>,
        ports: OwnPorts,
    ) -> Result<Iptables, Error> {
        let (variant, why) = detect(&families).await?;
        Ok(Iptables {
            variant,
            why,
            ranges,
            families,
            ports,
            translated: BTreeSet::new(),
            nodes: BTreeSet::new(),
            translations: Translations::default(),
        })
    }

    async fn install(&mut self, family: Family, vips: &BTreeSet<IpAddr>) -> Result<(), ToolError> {
        let mut sets: String = StaticSet::all().map(|set| set.create(family)).collect();
        sets.extend(vips.iter().map(|vip| create_vip(*vip)));
        ipset(sets).await?;
        let sets = read_sets().await?;
        let is_surplus = |vip: &IpAddr| Family::of(*vip) == family && !vips.contains(vip);
        // Before the chain that looks there.
        self.translations = Translations::read(&sets);
        self.translations.retain(|vip| !is_surplus(vip));
        ipset(self.translations.align(family, &sets)).await?;
        let present = save(self.variant, family).await?;
        let nodes = known_nodes(&present).collect();
        let document = install_document(family, self.ranges, vips, &nodes, &present);
        restore(self.variant, family, document, &self.ports).await?;
        self.translated.retain(|vip| Family::of(*vip) != family);
        self.translated.extend(vips);
        self.nodes.retain(|(of, _)| *of != family);
        self.nodes
            .extend(nodes.into_iter().map(|mac| (family, mac)));

        let guarded = StaticSet::Set(OwnSet::Vips).name(family);
        let guards = sets.get(&guarded).into_iter().flatten();
        let guards = guards.filter(|(vip, _)| vip.parse().is_ok_and(|vip| is_surplus(&vip)));
        let unguard = guards.map(|(vip, _)| format!("del {guarded} {vip}\n"));
        ipset(unguard.collect()).await?;
        let is_of_surplus = |name: &String| vip_of_set(name).is_some_and(|vip| is_surplus(&vip));
        destroy(sets.into_keys().filter(is_of_surplus)).await
    }

    async fn remove(&mut self, family: Family) -> Result<(), ToolError> {
        let present = save(self.variant, family).await?;
        let document = remove_document(&present, is_own_chain, |_| false);
        restore(self.variant, family, document, &self.ports).await?;
        self.translated.retain(|vip| Family::of(*vip) != family);
        self.nodes.retain(|(of, _)| *of != family);
        self.translations.retain(|vip| Family::of(*vip) != family);
        let is_ours = |name: &String| {
            StaticSet::all().any(|set| set.name(family) == *name)
                || vip_of_set(name).is_some_and(|vip| Family::of(vip) == family)
        };
        destroy(read_sets().await?.into_keys().filter(is_ours)).await
    }

    /// Sets and guards of new VIPs first: a rule cannot name a set that is not there.
    async fn add_vips(&mut self, vips: &[IpAddr]) -> Result<(), ToolError> {
        ipset(vips.iter().map(|vip| create_vip(*vip)).collect()).await?;
        self.translate(vips, true).await
    }

    async fn remove_vips(&mut self, vips: &[IpAddr]) -> Result<(), ToolError> {
        ipset(self.translations.retain(|vip| !vips.contains(vip))).await?;
        self.translate(vips, false).await?;
        let set = |vip: &IpAddr| StaticSet::Set(OwnSet::Vips).name(Family::of(*vip));
        let unguard = |vip| format!("del {} {vip}\n", set(vip));
        ipset(vips.iter().map(unguard).collect()).await?;
        destroy(vips.iter().map(|vip| vip_set(*vip))).await
    }

    /// Gives VIPs that have no translation rule one, or takes the rule from those that have one.
    async fn translate(&mut self, vips: &[IpAddr], wanted: bool) -> Result<(), ToolError> {
        for family in self.families.clone() {
            let differs = |vip: &IpAddr| self.translated.contains(vip) != wanted;
            let of_family = vips.iter().filter(|vip| Family::of(**vip) == family);
            let vips: Vec<IpAddr> = of_family.copied().filter(differs).collect();
            if vips.is_empty() {
                continue;
            }
            let change = if wanted { Rule::append } else { Rule::delete };
            let rules = vips.iter().map(|vip| change(&translation(*vip), NAT));
            let document = table("nat", rules);
            restore(self.variant, family, document, &self.ports).await?;
            self.translated.retain(|vip| !vips.contains(vip));
            if wanted {
                self.translated.extend(vips);
            }
        }
        Ok(())
    }

    /// Gives nodes that have no rule one, or takes the rule from those that have one.
    async fn know_nodes(&mut self, nodes: &[(Family, Mac)], wanted: bool) -> Result<(), ToolError> {
        let change = if wanted { Rule::append } else { Rule::delete };
        for family in self.families.clone() {
            let differs = |node: &&(Family, Mac)| self.nodes.contains(node) != wanted;
            let of_family = nodes.iter().filter(|(of, _)| *of == family);
            let nodes: Vec<(Family, Mac)> = of_family.filter(differs).copied().collect();
            if nodes.is_empty() {
                continue;
            }
            let rules = nodes.iter().map(|(_, mac)| change(&from_node(*mac), NODES));
            restore(self.variant, family, table("mangle", rules), &self.ports).await?;
            self.nodes.retain(|node| !nodes.contains(node));
            if wanted {
                self.nodes.extend(nodes);
            }
        }
        Ok(())
    }

    /// Executes steps that change more than members of sets: one, or several of a kind that belong together.
    async fn execute(&mut self, steps: &[&FirewallStep]) -> Result<(), ToolError> {
        let vips: Vec<IpAddr> = steps.iter().filter_map(|step| vip_of(step)).collect();
        let nodes: Vec<(Family, Mac)> = steps.iter().filter_map(|step| node_of(step)).collect();
        match steps.first().map(|step| work_of(step)) {
            None | Some(Work::Nothing) => Ok(()),
            Some(Work::AddNode) => self.know_nodes(&nodes, true).await,
            Some(Work::RemoveNode) => self.know_nodes(&nodes, false).await,
            Some(Work::Member(_) | Work::Translate(..) | Work::Untranslate(..)) => {
                let lines = steps
                    .iter()
                    .map(|step| lines_of(step, &mut self.translations));
                ipset(lines.collect()).await
            }
            Some(Work::Install(family, vips)) => self.install(family, vips).await,
            Some(Work::Remove(family)) => self.remove(family).await,
            Some(Work::AddVip) => self.add_vips(&vips).await,
            Some(Work::RemoveVip) => self.remove_vips(&vips).await,
        }
    }

    /// Changes members of sets, all in one process; a bad line costs only its own step and those that rely on
    /// it.
    async fn members(&mut self, mut steps: Vec<&FirewallStep>, failed: &mut Vec<StepError>) {
        let mut bad_lines = 0;
        while !steps.is_empty() {
            let mut translations = self.translations.clone();
            let lines: Vec<String> = steps
                .iter()
                .map(|step| lines_of(step, &mut translations))
                .collect();
            let Err(error) = ipset(lines.concat()).await else {
                self.translations = translations;
                return;
            };
            bad_lines += 1;
            let bad = error.bad_line().and_then(|bad| step_of_line(&lines, bad));
            match bad.filter(|_| bad_lines < MOST_BAD_LINES) {
                Some(bad) => {
                    // All others again: ipset may not have sent the lines before the bad one yet.
                    failed.push(StepError::new(steps.remove(bad), error));
                    let later = steps.split_off(bad);
                    steps.extend(executable(&later, failed));
                }
                None => failed.extend(StepError::of_batch(steps.drain(..), error)),
            }
        }
    }

    pub(crate) fn profile(&self) -> Profile {
        let (nat_table, chains) = match self.variant {
            Variant::Nft => (Some("nat"), Remnant::IptablesNft),
            Variant::Legacy => (None, Remnant::IptablesLegacy),
        };
        Profile {
            name: format!("iptables ({}: {})", self.variant, self.why),
            watched: Watched {
                tables: &["mangle", "filter", "nat"],
                chains: Some(|chain| chain.starts_with("METALEG-")),
                base_chains: &["PREROUTING", "FORWARD", "POSTROUTING"],
            },
            nat_priority: NF_IP_PRI_NAT_SRC,
            nat_table,
            advice: Some("FIREWALL_BACKEND=nftables would be ahead of it"),
            marks_before_dnat: true,
            ways_are_routes: true,
            remnants: vec![chains, Remnant::Ipsets],
        }
    }

    pub(crate) async fn observe(
        &mut self,
        strict_tcp: bool,
    ) -> Result<BTreeMap<Family, FirewallState>, Error> {
        self.ranges.strict_tcp = strict_tcp;
        let sets = read_sets().await?;
        let mut states = BTreeMap::new();
        self.translated.clear();
        self.nodes.clear();
        self.translations = Translations::read(&sets);
        for family in self.families.clone() {
            let lines = save(self.variant, family).await?;
            self.translated.extend(translated_vips(&lines));
            self.nodes
                .extend(known_nodes(&lines).map(|mac| (family, mac)));
            states.insert(family, read::state(family, self.ranges, &lines, &sets));
        }
        Ok(states)
    }

    pub(crate) async fn apply(&mut self, steps: &[&FirewallStep], failed: &mut Vec<StepError>) {
        for batch in steps.chunk_by(|a, b| belong_together(a, b)) {
            let batch = executable(batch, failed);
            let is_member = |step: &&FirewallStep| is_member(&work_of(step));
            if batch.first().is_none_or(is_member) {
                self.members(batch, failed).await;
                continue;
            }
            let Err(error) = self.execute(&batch).await else {
                continue;
            };
            if let [only] = batch.as_slice() {
                failed.push(StepError::new(*only, error));
                continue;
            }
            // Nothing says which VIP failed: one by one, so that a bad one costs no other.
            for step in batch {
                if let Err(error) = self.execute(&[step]).await {
                    failed.push(StepError::new(step, error));
                }
            }
        }
    }

    pub(crate) async fn expect_late_replies(&self, replies: &[LateReply]) -> Result<(), Error> {
        Ok(ipset(replies.iter().map(late_reply_line).collect()).await?)
    }

    pub(crate) async fn foreign_nat(&self) -> Result<BTreeSet<String>, Error> {
        let other = self.variant.other();
        let chains = remnants::translating_chains(other, &self.families).await?;
        let sentence = |chain| format!("chain {chain} of iptables in {other} mode");
        Ok(chains.into_iter().map(sentence).collect())
    }
}

/// Whether two steps are executed in one process.
fn belong_together(a: &FirewallStep, b: &FirewallStep) -> bool {
    let works = (work_of(a), work_of(b));
    (is_member(&works.0) && is_member(&works.1))
        || matches!(
            works,
            (Work::AddVip, Work::AddVip)
                | (Work::RemoveVip, Work::RemoveVip)
                | (Work::AddNode, Work::AddNode)
                | (Work::RemoveNode, Work::RemoveNode)
                | (Work::Nothing, Work::Nothing)
        )
}

/// Whether a step is executed by lines for `ipset restore` alone.
fn is_member(work: &Work<'_>) -> bool {
    matches!(
        work,
        Work::Member(_) | Work::Translate(..) | Work::Untranslate(..)
    )
}

/// The lines of a step that comes after what is known; none of one that takes more than these.
fn lines_of(step: &FirewallStep, known: &mut Translations) -> String {
    match work_of(step) {
        Work::Member(line) => line,
        Work::Translate(pod, vip) => known.translate(pod, vip),
        Work::Untranslate(pod, vip) => known.untranslate(pod, vip),
        Work::Install(..)
        | Work::Remove(_)
        | Work::AddVip
        | Work::RemoveVip
        | Work::AddNode
        | Work::RemoveNode
        | Work::Nothing => String::new(),
    }
}

/// The step that a line is of, by its place among all lines.
fn step_of_line(lines: &[String], line: usize) -> Option<usize> {
    let mut end = 0;
    lines.iter().position(|of_step| {
        end += of_step.lines().count();
        line < end
    })
}

fn vip_of(step: &FirewallStep) -> Option<IpAddr> {
    match step {
        FirewallStep::AddVip(vip) | FirewallStep::RemoveVip(vip) => Some(*vip),
        _ => None,
    }
}

fn node_of(step: &FirewallStep) -> Option<(Family, Mac)> {
    match step {
        FirewallStep::AddLandmark(family, Landmark::Node(mac))
        | FirewallStep::RemoveLandmark(family, Landmark::Node(mac)) => Some((*family, *mac)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_is_of_the_step_that_it_came_from() {
        let lines = ["a\n", "b\nc\n", "", "d\n"].map(str::to_owned);
        let steps: Vec<_> = (0..5).map(|line| step_of_line(&lines, line)).collect();
        assert_eq!(steps, [Some(0), Some(1), Some(1), Some(3), None]);
    }
}
