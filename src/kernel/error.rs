//! What can go wrong with a kernel, and with one step.

use crate::kernel::conntrack::ConntrackError;
use crate::kernel::netfilter::NetlinkError;
use crate::kernel::routes::RouteError;
use crate::kernel::tool::ToolError;
use crate::state::Step;

/// A step that could not be executed; the steps after it were tried all the same, but for those that rely on it.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct StepError {
    /// What was tried.
    pub step: Step,
    /// What went wrong.
    #[source]
    pub source: Error,
}

impl StepError {
    /// The failure of a step.
    pub(crate) fn new(step: &(impl Clone + Into<Step>), source: impl Into<Error>) -> StepError {
        StepError {
            step: step.clone().into(),
            source: source.into(),
        }
    }
}

/// What can go wrong with the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A tool failed on a whole batch, and did not say which line was the reason.
    #[error("{0}")]
    Batch(String),
    /// Rules or routes.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// nftables.
    #[error("nftables: {0}")]
    Netlink(#[from] NetlinkError),
    /// Connection tracking.
    #[error(transparent)]
    Conntrack(#[from] ConntrackError),
    /// What the step relies on failed.
    #[error("not tried, because what it relies on failed: {0}")]
    NotTried(String),
    /// A failure that a test asked for.
    #[cfg(test)]
    #[error("injected failure")]
    Injected,
}

/// The steps that rely on none that failed; the others join these.
pub(crate) fn executable<'a, S: Clone + Into<Step>>(
    steps: &[&'a S],
    failed: &mut Vec<StepError>,
) -> Vec<&'a S> {
    if failed.is_empty() {
        return steps.to_vec();
    }
    let mut rest = Vec::new();
    for step in steps {
        let whole: Step = (*step).clone().into();
        match failed.iter().find(|failure| whole.needs(&failure.step)) {
            Some(failure) => {
                let source = Error::NotTried(failure.step.to_string());
                failed.push(StepError::new(*step, source));
            }
            None => rest.push(*step),
        }
    }
    rest
}
