//! Removes everything of ours from this node's kernel, whoever made it: either backend, iptables in either mode,
//! earlier releases. Needs no API server.

use std::collections::BTreeSet;
use std::io::{self, Write};

use ipnet::IpNet;

use crate::diff::diff;
use crate::error::chain;
use crate::kernel::{self, Kernel};
use crate::state::{Executor, FamilyState, KernelState, Step};

/// Removes everything and tells `out` what it was; returns whether nothing is left.
///
/// # Errors
/// When the kernel cannot be read, or `out` not be written.
pub async fn run(kernel: &mut impl Kernel, out: &mut impl Write) -> Result<bool, Error> {
    let observed = kernel.observe().await?.state;
    let nothing = nothing(&observed);
    let excluded: BTreeSet<IpNet> = observed
        .families
        .values()
        .flat_map(|family| family.firewall.excluded.iter().copied())
        .collect();
    // The same order as that of an agent that has nothing to do any more: no packet leaks on the way.
    let steps = diff(&observed, &nothing);
    let failed = kernel.apply(&steps, &excluded).await;
    let done = |step: &&Step| !failed.iter().any(|failure| failure.step == **step);
    let told = steps
        .iter()
        .filter(done)
        .filter(|step| is_worth_telling(step));
    for step in told {
        writeln!(out, "done: {step}")?;
    }
    let pods: BTreeSet<_> = steps.iter().filter_map(Step::pod).collect();
    if !pods.is_empty() {
        writeln!(
            out,
            "let go {} pods; their connections start anew",
            pods.len()
        )?;
    }
    for failure in &failed {
        writeln!(out, "failed: {}", chain(failure))?;
    }
    let left = kernel.observe().await?.state;
    let steps = diff(&left, &self::nothing(&left));
    let mut left = steps.iter().filter(|step| is_change(step)).peekable();
    if left.peek().is_none() {
        writeln!(out, "nothing of MetalEG is left on this node")?;
        return Ok(true);
    }
    for step in left {
        writeln!(out, "still to do: {step}")?;
    }
    writeln!(
        out,
        "hint: is an agent still running here? stop it, and try again"
    )?;
    Ok(false)
}

/// Why cleaning up did not come to an end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel could not be read.
    #[error("cannot read what is there")]
    Kernel(#[from] kernel::Error),
    /// What was done could not be told.
    #[error("cannot write")]
    Write(#[from] io::Error),
}

fn nothing(observed: &KernelState) -> KernelState {
    let families = observed.families.keys();
    KernelState {
        families: families
            .map(|family| (*family, FamilyState::default()))
            .collect(),
        ..KernelState::default()
    }
}

/// Looking for stray connections is none.
fn is_change(step: &Step) -> bool {
    !matches!(step, Step::ForgetStrays(_))
}

/// Pods and networks go by the thousand: they are counted, or go with the firewall.
fn is_worth_telling(step: &Step) -> bool {
    matches!(step.executor(), Executor::Routes | Executor::Leftovers)
        || matches!(step, Step::RemoveFirewall(_))
}
