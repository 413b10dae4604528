//! Executes steps of connections: what connection tracking forgets, what the firewall expects, which pods are challenged.

use std::collections::BTreeSet;

use ipnet::IpNet;

use crate::kernel::challenge::Unheard;
use crate::kernel::conntrack::{self, Selection};
use crate::kernel::error::{Error, StepError, executable};
use crate::kernel::firewall::Firewall;
use crate::state::ConnectionStep;

/// Executes steps with one dump of the connections for all of them. Pods that are to be challenged in the end join
/// `unheard`; steps that fail join `failed`.
pub(crate) async fn apply(
    steps: &[&ConnectionStep],
    firewall: &mut Firewall,
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
    if !selecting.is_empty()
        && let Err(error) = forget(selection, firewall, excluded, unheard).await
    {
        failed.extend(StepError::of_batch(selecting, error));
    }
}

async fn forget(
    selection: Selection,
    firewall: &mut Firewall,
    excluded: &BTreeSet<IpNet>,
    unheard: &mut Unheard,
) -> Result<(), Error> {
    let selected = conntrack::select(selection, excluded.clone()).await?;
    unheard.flows.extend(&selected.established);
    if !selected.late_replies.is_empty() {
        let replies = &selected.late_replies;
        firewall.expect_late_replies(replies).await?;
    }
    Ok(conntrack::execute(selected).await?)
}
