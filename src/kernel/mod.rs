//! Effects: reads what of ours is in the kernel and executes steps, in the order given.
//!
//! Knows nothing of Kubernetes and decides nothing: which steps, and in which order, is `diff`'s matter.

use std::collections::BTreeSet;
use std::future::Future;

use ipnet::IpNet;

use crate::state::{KernelState, Step};
use crate::view::Link;

/// One step that could not be executed; the steps after it were tried all the same, unless said otherwise.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct StepError {
    /// What was tried.
    pub step: Step,
    /// What went wrong.
    #[source]
    pub source: Error,
}

/// What can go wrong with the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A failure that a test asked for.
    #[cfg(test)]
    #[error("injected failure")]
    Injected,
}

/// A node's kernel, as the agent sees it.
pub trait Kernel: Send {
    /// Reads everything of ours.
    ///
    /// # Errors
    /// When any part cannot be read: a partial picture would make the agent repeat or remove the wrong things.
    fn observe(&mut self) -> impl Future<Output = Result<KernelState, Error>> + Send;

    /// Reads the interfaces that are up, with the networks that are directly reachable on them.
    ///
    /// # Errors
    /// When they cannot be read.
    fn links(&mut self) -> impl Future<Output = Result<Vec<Link>, Error>> + Send;

    /// Executes the steps in order; `excluded` are the destinations whose connections are never forgotten.
    /// Returns the steps that failed. A failed step does not keep the following ones from being tried.
    fn apply(
        &mut self,
        steps: &[Step],
        excluded: &BTreeSet<IpNet>,
    ) -> impl Future<Output = Vec<StepError>> + Send;
}
