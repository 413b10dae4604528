//! Removes everything of ours from this node's kernel, whoever made it: either backend, iptables in either mode,
//! earlier releases. Needs no API server.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

use crate::diff::diff;
use crate::error::chain;
use crate::kernel::{self, Kernel, NodeKernel};
use crate::settings::{FirewallBackend, Settings};
use crate::state::{FamilyState, FirewallStep, KernelState, Observed, Step};

/// Removes everything and writes to `out` what it was; returns whether nothing is left.
///
/// # Errors
/// When the kernel cannot be read, or `out` not be written.
pub async fn run(settings: &Settings, out: &mut impl Write) -> Result<bool, Error> {
    let mut is_clean = true;
    // With each backend in turn: only the one that wrote the rules knows which pods' connections to forget.
    for (backend, is_last) in [
        (FirewallBackend::Iptables, false),
        (FirewallBackend::Nftables, true),
    ] {
        let settings = Settings {
            firewall: backend,
            ..settings.clone()
        };
        match NodeKernel::open(&settings).await {
            Ok(mut kernel) => is_clean &= with(&mut kernel, is_last, out).await?,
            Err(error) => {
                is_clean &= !is_last;
                writeln!(out, "not looked for {backend:?} objects: {}", chain(&error))?;
            }
        }
    }
    let outcome = match is_clean {
        true => "nothing of MetalEG is left on this node",
        false => "hint: is an agent still running here? stop it, and try again",
    };
    writeln!(out, "{outcome}")?;
    Ok(is_clean)
}

/// Removes what the kernel's backend made; with the last backend, also remnants of others.
async fn with(
    kernel: &mut impl Kernel,
    is_last: bool,
    out: &mut impl Write,
) -> Result<bool, Error> {
    let observed = kernel.observe().await?.state;
    // In the order of an agent whose plan is empty: no packet leaks on the way.
    let steps = diff(&observed, &nothing(&observed, is_last));
    let failed = kernel.apply(&steps).await;
    let done = |step: &&Step| !failed.iter().any(|failure| failure.step == **step);
    for step in steps.iter().filter(done).filter(|step| is_shown(step)) {
        writeln!(out, "done: {step}")?;
    }
    let pods: BTreeSet<_> = steps.iter().filter_map(Step::pod).collect();
    match pods.len() {
        0 => {}
        n => writeln!(out, "done: let go {n} pods; their connections start anew")?,
    }
    for failure in &failed {
        writeln!(out, "failed: {}", chain(failure))?;
    }
    let Observed {
        state: left,
        unseen,
        ..
    } = kernel.observe().await?;
    let steps = diff(&left, &nothing(&left, is_last));
    let mut left = steps.iter().filter(|step| step.is_change()).peekable();
    let is_clean = left.peek().is_none() && unseen.is_empty();
    for sentence in unseen {
        writeln!(out, "{sentence}")?;
    }
    for step in left {
        writeln!(out, "still to do: {step}")?;
    }
    Ok(is_clean)
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read what is there")]
    Kernel(#[from] kernel::Error),
    #[error("cannot write")]
    Write(#[from] io::Error),
}

/// Nothing of ours; what other backends left stays until `is_last`.
fn nothing(observed: &KernelState, is_last: bool) -> KernelState {
    let families = observed.families.keys();
    let remnants = (!is_last).then(|| observed.remnants.clone());
    KernelState {
        families: families.map(|f| (*f, FamilyState::default())).collect(),
        accepted: BTreeMap::new(),
        remnants: remnants.unwrap_or_default(),
        doubt: false,
    }
}

/// Pods and networks go by the thousand: pods are counted, networks go with the firewall.
fn is_shown(step: &Step) -> bool {
    use Step::{Accept, Firewall, RemoveRemnant, Route};
    matches!(
        step,
        Route(_) | Accept(..) | RemoveRemnant(_) | Firewall(FirewallStep::Remove(_))
    )
}
