//! Executes steps of connections: what connection tracking forgets, what the firewall expects, which pods are challenged.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::kernel::challenge::Unheard;
use crate::kernel::conntrack::{self, Conntrack, ConntrackError, Kept, Selection};
use crate::kernel::error::{Error, StepError, executable};
use crate::kernel::firewall::Firewall;
use crate::state::ConnectionStep;

/// Executes steps with one look at the connections for all of them, and for the pods that are to be challenged in the end:
/// these join `unheard`. Steps that fail join `failed`.
pub(crate) async fn apply(
    steps: &[&ConnectionStep],
    firewall: &mut Firewall,
    conntrack: &mut Conntrack,
    excluded: &BTreeSet<IpNet>,
    unheard: &mut Unheard,
    failed: &mut Vec<StepError>,
) {
    let (mut selection, mut selecting) = (Selection::default(), Vec::new());
    for step in executable(steps, failed) {
        match step {
            ConnectionStep::ElicitAck(pod) => drop(unheard.pods.insert(*pod)),
            ConnectionStep::Forget(_)
            | ConnectionStep::Resume { .. }
            | ConnectionStep::ForgetWrongSource { .. }
            | ConnectionStep::ForgetNewlyExcluded { .. } => {
                selection.add(step);
                selecting.push(step);
            }
        }
    }
    if selecting.is_empty() {
        return;
    }
    match forget(selection, firewall, conntrack, excluded, unheard).await {
        Ok(kept) => failed.extend(of_steps(&selecting, kept)),
        Err(error) => failed.extend(StepError::of_batch(selecting, error)),
    }
}

async fn forget(
    selection: Selection,
    firewall: &mut Firewall,
    conntrack: &mut Conntrack,
    excluded: &BTreeSet<IpNet>,
    unheard: &mut Unheard,
) -> Result<Vec<Kept>, Error> {
    let challenged = unheard.expected.clone();
    let selected = conntrack
        .select(selection, challenged, excluded.clone())
        .await?;
    unheard.flows.get_or_insert_default().extend(selected.flows);
    if !selected.late_replies.is_empty() {
        let replies = &selected.late_replies;
        firewall.expect_late_replies(replies).await?;
    }
    Ok(conntrack::execute(selected.changes).await?)
}

/// Entries that the kernel keeps fail the steps that they were selected by, and no others.
fn of_steps(steps: &[&ConnectionStep], kept: Vec<Kept>) -> Vec<StepError> {
    let mut failed = Vec::new();
    let mut rest = kept;
    for step in steps {
        let (own, others): (Vec<Kept>, Vec<Kept>) = rest
            .into_iter()
            .partition(|kept| concerns(step, kept.about));
        rest = others;
        let others = own.len().saturating_sub(1);
        failed.extend(own.into_iter().next().map(|kept| {
            let Kept { name, error, .. } = kept;
            let error = ConntrackError::Kept {
                flow: name.to_string(),
                others,
                source: error,
            };
            StepError::new(*step, error)
        }));
    }
    failed
}

/// Whether a step forgets or resumes connections of a pod, or to an address.
fn concerns(step: &ConnectionStep, address: IpAddr) -> bool {
    match step {
        ConnectionStep::Forget(pod) | ConnectionStep::Resume { pod, .. } => *pod == address,
        ConnectionStep::ForgetWrongSource {
            sources,
            vips,
            unguarded,
        } => {
            sources.contains_key(&address)
                || vips.contains(&address)
                || unguarded.contains(&address)
        }
        ConnectionStep::ForgetNewlyExcluded { pods, .. } => pods.contains(&address),
        ConnectionStep::ElicitAck(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Step;

    #[test]
    fn an_entry_that_the_kernel_keeps_fails_only_what_it_was_selected_by() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let [pod, other, vip] = ["10.244.1.11", "10.244.1.12", "192.0.2.200"].map(ip);
        let steps = [
            ConnectionStep::Forget(pod),
            ConnectionStep::Forget(other),
            ConnectionStep::ForgetWrongSource {
                sources: [(other, vip)].into(),
                vips: [vip].into(),
                unguarded: BTreeSet::new(),
            },
        ];
        let failed = |about: &[IpAddr]| -> Vec<(Step, String)> {
            let kept = about.iter().map(|about| Kept::busy(*about));
            let steps: Vec<&ConnectionStep> = steps.iter().collect();
            let failed = of_steps(&steps, kept.collect()).into_iter();
            failed
                .map(|failure| (failure.step, failure.source.to_string()))
                .collect()
        };
        let step = |number: usize| Step::from(steps[number].clone());
        let said = |others: usize| {
            let flow = "10.244.1.11:40000 to 198.51.100.10:443 (protocol 6)";
            format!("connection tracking keeps {flow}, and {others} more")
        };
        assert_eq!(failed(&[]), []);
        assert_eq!(failed(&[pod, pod]), [(step(0), said(1))]);
        assert_eq!(
            failed(&[vip, other]),
            [(step(1), said(0)), (step(2), said(0))]
        );
    }
}
