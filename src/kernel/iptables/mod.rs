//! Firewall backend on iptables and ipset, in whichever mode the node's other programs use.
//!
//! Chains are static, but for one translation rule for each VIP; which pods they concern is in sets, so that
//! most changes are one `ipset restore`. Every rule of ours carries a comment with a hash of what we sent:
//! what is read back is compared by these, because iptables prints rules in other words than it was given.
//!
//! What a packet experiences is written beside each rule in [`chains`].

mod chains;
mod documents;
mod mode;
mod read;
pub(crate) mod remnants;
mod save;
mod sets;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use nix::libc::NF_IP_PRI_NAT_SRC;

use self::chains::{NAT, is_own_chain, translated_vips, translation};
use self::documents::{install_document, remove_document, table};
pub(crate) use self::mode::Variant;
use self::mode::detect;
use self::save::{Line, restore, save};
use self::sets::{
    StaticSet, create_vip, destroy, ipset, late_reply_line, member_line, parse_sets, vip_of_set,
    vip_set,
};
use crate::kernel::backend::{Backend, NatPlace, Profile, Watched};
use crate::kernel::conntrack::LateReply;
use crate::kernel::error::{Error, StepError, executable};
use crate::kernel::ours::OwnSet;
use crate::kernel::tool::{ToolError, run};
use crate::state::{Family, FirewallState, FirewallStep, Remnant};

/// How many bad input lines a batch may have before it is given up.
const MOST_BAD_LINES: usize = 32;

/// The iptables backend of one node.
#[derive(Debug)]
pub(crate) struct Iptables {
    variant: Variant,
    why: &'static str,
    mask: u32,
    families: Vec<Family>,
    /// VIPs that have a translation rule, as far as we know: keeps a repeated `AddVip` from doubling it.
    translated: BTreeSet<IpAddr>,
}

impl Iptables {
    /// Finds out which mode to use. Changes nothing.
    pub(crate) async fn open(mask: u32, families: Vec<Family>) -> Result<Iptables, Error> {
        let (variant, why) = detect(&families).await?;
        Ok(Iptables {
            variant,
            why,
            mask,
            families,
            translated: BTreeSet::new(),
        })
    }

    async fn save(&self, family: Family) -> Result<Vec<Line>, ToolError> {
        save(self.variant, family).await
    }

    async fn restore(&self, family: Family, document: String) -> Result<(), ToolError> {
        restore(self.variant, family, document).await
    }

    async fn install(&mut self, family: Family, vips: &BTreeSet<IpAddr>) -> Result<(), ToolError> {
        let mut sets = String::new();
        for set in StaticSet::all() {
            // Writing into a String cannot fail.
            let _ = writeln!(sets, "{}", set.create(family));
        }
        for vip in vips {
            sets.push_str(&create_vip(*vip));
        }
        ipset(sets).await?;
        let present = self.save(family).await?;
        let document = install_document(family, self.mask, vips, &present);
        self.restore(family, document).await?;
        self.translated.retain(|vip| Family::of(*vip) != family);
        self.translated.extend(vips);

        let sets = parse_sets(&run("ipset", &["save"], String::new()).await?);
        let guarded = StaticSet::Set(OwnSet::Vips).name(family);
        let surplus = sets
            .get(&guarded)
            .into_iter()
            .flatten()
            .filter(|(vip, _)| vip.parse().is_ok_and(|vip| !vips.contains(&vip)));
        let lines = surplus.fold(String::new(), |lines, (vip, _)| {
            lines + &format!("del {guarded} {vip}\n")
        });
        ipset(lines).await?;
        let is_surplus = |name: &&String| {
            let vip = vip_of_set(name).filter(|vip| Family::of(*vip) == family);
            vip.is_some_and(|vip| !vips.contains(&vip))
        };
        destroy(sets.keys().filter(is_surplus).cloned().collect()).await
    }

    async fn remove(&mut self, family: Family) -> Result<(), ToolError> {
        let present = self.save(family).await?;
        let document = remove_document(&present, is_own_chain, |_| false);
        self.restore(family, document).await?;
        self.translated.retain(|vip| Family::of(*vip) != family);
        let sets = parse_sets(&run("ipset", &["save"], String::new()).await?);
        let is_ours = |name: &&String| {
            StaticSet::all().any(|set| set.name(family) == **name)
                || vip_of_set(name).is_some_and(|vip| Family::of(vip) == family)
        };
        destroy(sets.keys().filter(is_ours).cloned().collect()).await
    }

    /// Sets and guards of new VIPs first: a rule cannot name a set that is not there.
    async fn add_vips(&mut self, vips: &[IpAddr]) -> Result<(), ToolError> {
        ipset(vips.iter().map(|vip| create_vip(*vip)).collect()).await?;
        for family in self.families.clone() {
            let new =
                |vip: &&IpAddr| Family::of(**vip) == family && !self.translated.contains(*vip);
            let new: Vec<IpAddr> = vips.iter().filter(new).copied().collect();
            if !new.is_empty() {
                let rules = new.iter().map(|vip| translation(*vip).append(NAT));
                self.restore(family, table("nat", rules)).await?;
                self.translated.extend(new);
            }
        }
        Ok(())
    }

    async fn remove_vips(&mut self, vips: &[IpAddr]) -> Result<(), ToolError> {
        for family in self.families.clone() {
            let old = |vip: &&IpAddr| Family::of(**vip) == family && self.translated.contains(*vip);
            let old: Vec<IpAddr> = vips.iter().filter(old).copied().collect();
            if !old.is_empty() {
                let rules = old.iter().map(|vip| translation(*vip).delete(NAT));
                self.restore(family, table("nat", rules)).await?;
                self.translated.retain(|vip| !old.contains(vip));
            }
        }
        let unguard = |vip: &IpAddr| {
            format!(
                "del {} {vip}\n",
                StaticSet::Set(OwnSet::Vips).name(Family::of(*vip))
            )
        };
        ipset(vips.iter().map(unguard).collect()).await?;
        destroy(vips.iter().map(|vip| vip_set(*vip)).collect()).await
    }

    /// Executes steps, none of which changes a member of a set, one after the other.
    async fn one_by_one(&mut self, steps: &[&FirewallStep], failed: &mut Vec<StepError>) {
        for step in steps {
            let result = match step {
                FirewallStep::Install(family, vips) => self.install(*family, vips).await,
                FirewallStep::Remove(family) => self.remove(*family).await,
                FirewallStep::AddVip(vip) => self.add_vips(&[*vip]).await,
                FirewallStep::RemoveVip(vip) => self.remove_vips(&[*vip]).await,
                FirewallStep::AddNet(..)
                | FirewallStep::RemoveNet(..)
                | FirewallStep::AddPod(..)
                | FirewallStep::RemovePod(..)
                | FirewallStep::Translate { .. }
                | FirewallStep::Untranslate { .. }
                | FirewallStep::Mark { .. }
                | FirewallStep::Unmark(_) => {
                    self.members(&[step], failed).await;
                    continue;
                }
            };
            if let Err(error) = result {
                failed.push(StepError::new(*step, error));
            }
        }
    }

    /// Changes members of sets, all in one process; a bad line costs only its own step and those that rely on
    /// it.
    async fn members(&self, steps: &[&FirewallStep], failed: &mut Vec<StepError>) {
        let mut rest: Vec<(&FirewallStep, String)> = steps
            .iter()
            .filter_map(|step| Some((*step, member_line(step)?)))
            .collect();
        let mut bad_lines = 0;
        while !rest.is_empty() {
            let document = rest.iter().map(|(_, line)| format!("{line}\n")).collect();
            let Err(error) = ipset(document).await else {
                return;
            };
            bad_lines += 1;
            let bad = error.line().and_then(|line| line.checked_sub(1));
            match bad.filter(|bad| *bad < rest.len() && bad_lines < MOST_BAD_LINES) {
                Some(bad) => {
                    // All others again: ipset may not have sent the lines before the bad one yet.
                    let (step, _) = rest.remove(bad);
                    failed.push(StepError::new(step, error));
                    let (done, later) = rest.split_at(bad);
                    let later: Vec<&FirewallStep> = later.iter().map(|(step, _)| *step).collect();
                    let keep = executable(&later, failed);
                    let done = done.iter().map(|(step, _)| *step);
                    rest = done
                        .chain(keep)
                        .filter_map(|step| Some((step, member_line(step)?)))
                        .collect();
                }
                None => {
                    let steps = rest.drain(..).map(|(step, _)| step);
                    failed.extend(StepError::of_batch(steps, error));
                }
            }
        }
    }
}

impl Backend for Iptables {
    fn profile(&self) -> Profile {
        let (table, chains) = match self.variant {
            Variant::Nft => (Some("nat"), Remnant::IptablesNft),
            Variant::Legacy => (None, Remnant::IptablesLegacy),
        };
        Profile {
            name: format!("iptables ({}: {})", self.variant, self.why),
            port: None,
            // Built-in chains, too, because the jumps to ours are there.
            watched: Watched {
                tables: &["mangle", "filter", "nat"],
                chains: Some(|chain| {
                    chain.starts_with("METALEG-")
                        || ["PREROUTING", "FORWARD", "POSTROUTING"].contains(&chain)
                }),
            },
            nat: NatPlace {
                priority: NF_IP_PRI_NAT_SRC,
                table,
                advice: Some("FIREWALL_BACKEND=nftables would be ahead of it"),
            },
            remnants: vec![chains, Remnant::Ipsets],
        }
    }

    async fn observe(&mut self) -> Result<BTreeMap<Family, FirewallState>, Error> {
        let sets = parse_sets(&run("ipset", &["save"], String::new()).await?);
        let mut states = BTreeMap::new();
        self.translated.clear();
        for family in self.families.clone() {
            let lines = self.save(family).await?;
            self.translated.extend(translated_vips(&lines));
            states.insert(family, read::state(family, self.mask, &lines, &sets));
        }
        Ok(states)
    }

    async fn apply(&mut self, steps: &[&FirewallStep], failed: &mut Vec<StepError>) {
        for batch in steps.chunk_by(|a, b| together(a).is_some() && together(a) == together(b)) {
            let batch = executable(batch, failed);
            let vips: Vec<IpAddr> = batch.iter().filter_map(|step| vip_of(step)).collect();
            let result = match batch.first().and_then(|step| together(step)) {
                None => Err(None),
                Some(Together::Members) => {
                    self.members(&batch, failed).await;
                    Ok(())
                }
                Some(Together::AddVips) => self.add_vips(&vips).await.map_err(Some),
                Some(Together::RemoveVips) => self.remove_vips(&vips).await.map_err(Some),
            };
            match (result, batch.as_slice()) {
                (Ok(()), _) => {}
                (Err(Some(error)), [only]) => failed.push(StepError::new(*only, error)),
                // Nothing says which VIP failed: one by one, so that a bad one costs no other.
                (Err(_), _) => self.one_by_one(&batch, failed).await,
            }
        }
    }

    async fn expect_late_replies(&mut self, replies: &[LateReply]) -> Result<(), Error> {
        Ok(ipset(replies.iter().map(late_reply_line).collect()).await?)
    }

    async fn foreign_nat(&self) -> Result<BTreeSet<String>, Error> {
        let other = self.variant.other();
        let chains = remnants::translating_chains(other, &self.families).await?;
        let sentence = |chain| format!("chain {chain} of iptables in {other} mode");
        Ok(chains.into_iter().map(sentence).collect())
    }
}

/// Steps that are executed in one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Together {
    Members,
    AddVips,
    RemoveVips,
}

/// Which steps a step is executed together with; `None`: with none.
fn together(step: &FirewallStep) -> Option<Together> {
    match step {
        FirewallStep::Install(..) | FirewallStep::Remove(_) => None,
        FirewallStep::AddVip(_) => Some(Together::AddVips),
        FirewallStep::RemoveVip(_) => Some(Together::RemoveVips),
        FirewallStep::AddNet(..)
        | FirewallStep::RemoveNet(..)
        | FirewallStep::AddPod(..)
        | FirewallStep::RemovePod(..)
        | FirewallStep::Translate { .. }
        | FirewallStep::Untranslate { .. }
        | FirewallStep::Mark { .. }
        | FirewallStep::Unmark(_) => Some(Together::Members),
    }
}

fn vip_of(step: &FirewallStep) -> Option<IpAddr> {
    match step {
        FirewallStep::AddVip(vip) | FirewallStep::RemoveVip(vip) => Some(*vip),
        _ => None,
    }
}
