//! Firewall backend on iptables and ipset, in whichever mode the node's other programs use.
//!
//! Chains are static, but for one translation rule for each VIP; which pods they concern is in sets, so that
//! most changes are one `ipset restore`. Every rule of ours carries a comment with a hash of what we sent:
//! what is read back is compared by these, because iptables prints rules in other words than it was given.
//!
//! What a packet experiences is written beside each rule in [`chains`].

mod chains;
mod mode;
mod read;
pub(crate) mod remnants;
mod sets;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use self::chains::{
    Line, NAT, install_document, is_own_chain, parse_save, remove_document, table, translated_vips,
    translation,
};
pub(crate) use self::mode::Variant;
use self::mode::detect;
use self::sets::{
    StaticSet, create_vip, destroy, ipset, late_line, member_line, parse_sets, vip_of_set, vip_set,
};
use crate::kernel::conntrack::LateReply;
use crate::kernel::tool::{ToolError, run};
use crate::kernel::{Error, Firewall, StepError, executable};
use crate::state::{Family, FirewallState, Step};

/// Seconds to wait for the xtables lock, below the deadline for the tool.
const LOCK_SECONDS: &str = "20";
/// How many input lines a batch may lose before it is given up.
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

    /// The mode in use.
    pub(crate) fn variant(&self) -> Variant {
        self.variant
    }

    /// Mode and why, for the log.
    pub(crate) fn describe(&self) -> String {
        format!("iptables ({}: {})", self.variant, self.why)
    }

    async fn save(&self, family: Family) -> Result<Vec<Line>, ToolError> {
        let tool = self.variant.tool(family, "save");
        Ok(parse_save(&run(&tool, &[], String::new()).await?))
    }

    async fn restore(&self, family: Family, document: String) -> Result<(), ToolError> {
        restore(self.variant, family, document).await
    }

    async fn install(&mut self, family: Family, vips: &BTreeSet<IpAddr>) -> Result<(), ToolError> {
        let mut sets = String::new();
        for set in StaticSet::ALL {
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
        let guarded = StaticSet::Vips.name(family);
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
        if !document.is_empty() {
            self.restore(family, document).await?;
        }
        self.translated.retain(|vip| Family::of(*vip) != family);
        let sets = parse_sets(&run("ipset", &["save"], String::new()).await?);
        let is_ours = |name: &&String| {
            StaticSet::ALL.iter().any(|set| set.name(family) == **name)
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
        let unguard =
            |vip: &IpAddr| format!("del {} {vip}\n", StaticSet::Vips.name(Family::of(*vip)));
        ipset(vips.iter().map(unguard).collect()).await?;
        destroy(vips.iter().map(|vip| vip_set(*vip)).collect()).await
    }

    /// Executes steps that all add or all remove a VIP.
    async fn vips(&mut self, steps: &[&Step]) -> Result<(), ToolError> {
        let vips_of = |wanted: Kind| -> Vec<IpAddr> {
            let of_kind = steps.iter().filter(|step| kind(step) == wanted);
            of_kind.filter_map(|step| vip_of(step)).collect()
        };
        self.add_vips(&vips_of(Kind::AddVips)).await?;
        self.remove_vips(&vips_of(Kind::RemoveVips)).await
    }

    async fn one_by_one(&mut self, steps: &[&Step], failed: &mut Vec<StepError>) {
        for step in steps {
            let result = match step {
                Step::InstallFirewall(family, vips) => self.install(*family, vips).await,
                Step::RemoveFirewall(family) => self.remove(*family).await,
                _ => self.vips(&[step]).await,
            };
            if let Err(error) = result {
                failed.push(step_error(step, error));
            }
        }
    }

    /// Changes members of sets, all in one process; a bad line costs only its own step and those that rely on
    /// it.
    async fn members(&self, steps: &[&Step], failed: &mut Vec<StepError>) {
        let mut rest: Vec<(&Step, String)> = steps
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
                    failed.push(step_error(step, error));
                    let (done, later) = rest.split_at(bad);
                    let later: Vec<&Step> = later.iter().map(|(step, _)| *step).collect();
                    let keep = executable(&later, failed);
                    let done = done.iter().map(|(step, _)| *step);
                    rest = done
                        .chain(keep)
                        .filter_map(|step| Some((step, member_line(step)?)))
                        .collect();
                }
                None => {
                    let text = error.to_string();
                    for (step, _) in rest.drain(..) {
                        failed.push(StepError {
                            step: step.clone(),
                            source: Error::Batch(text.clone()),
                        });
                    }
                }
            }
        }
    }
}

/// What is saved in a mode; nothing where nobody uses it, or its tools are not there.
async fn saved(variant: Variant, family: Family) -> Result<Vec<Line>, ToolError> {
    if variant == Variant::Legacy && !mode::has_legacy_tables(family).await {
        return Ok(Vec::new());
    }
    match run(&variant.tool(family, "save"), &[], String::new()).await {
        Ok(text) => Ok(parse_save(&text)),
        Err(ToolError::Start { .. }) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

async fn restore(variant: Variant, family: Family, document: String) -> Result<(), ToolError> {
    if document.is_empty() {
        return Ok(());
    }
    let args = ["--noflush", "--wait", LOCK_SECONDS];
    run(&variant.tool(family, "restore"), &args, document)
        .await
        .map(drop)
}

impl Firewall for Iptables {
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

    async fn apply(&mut self, steps: &[&Step], failed: &mut Vec<StepError>) {
        for batch in steps.chunk_by(|a, b| kind(a) == kind(b)) {
            let batch = executable(batch, failed);
            match batch.first().map(|step| kind(step)) {
                None => {}
                Some(Kind::Members) => self.members(&batch, failed).await,
                Some(Kind::Single) => self.one_by_one(&batch, failed).await,
                Some(Kind::AddVips | Kind::RemoveVips) => {
                    if let Err(error) = self.vips(&batch).await {
                        match batch.as_slice() {
                            [only] => failed.push(step_error(only, error)),
                            // Which one it was cannot be told: one bad VIP must cost no other.
                            _ => self.one_by_one(&batch, failed).await,
                        }
                    }
                }
            }
        }
    }

    async fn expect_late_replies(&mut self, replies: &[LateReply]) -> Result<(), Error> {
        Ok(ipset(replies.iter().map(late_line).collect()).await?)
    }
}

fn step_error(step: &Step, error: ToolError) -> StepError {
    StepError {
        step: step.clone(),
        source: error.into(),
    }
}

/// Which steps can be executed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Members,
    AddVips,
    RemoveVips,
    Single,
}

fn kind(step: &Step) -> Kind {
    match step {
        Step::AddVip(_) => Kind::AddVips,
        Step::RemoveVip(_) => Kind::RemoveVips,
        Step::InstallFirewall(..) | Step::RemoveFirewall(_) => Kind::Single,
        _ => Kind::Members,
    }
}

fn vip_of(step: &Step) -> Option<IpAddr> {
    match step {
        Step::AddVip(vip) | Step::RemoveVip(vip) => Some(*vip),
        _ => None,
    }
}
