//! What can go wrong with a kernel, and with one step.

use std::sync::Arc;

use crate::kernel::conntrack::ConntrackError;
use crate::kernel::netfilter::NetlinkError;
use crate::kernel::reach::ReachError;
use crate::kernel::routes::RouteError;
use crate::kernel::tool::ToolError;
use crate::state::Step;

/// A step that could not be executed; the steps after it were tried all the same, but for those that rely on it.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct StepError {
    pub step: Step,
    #[source]
    pub source: Error,
}

impl StepError {
    pub(crate) fn new(step: &(impl Clone + Into<Step>), source: impl Into<Error>) -> StepError {
        StepError {
            step: step.clone().into(),
            source: source.into(),
        }
    }

    /// The failures of steps that failed together: nothing says which of them is the reason.
    pub(crate) fn of_batch<'a, S: Clone + Into<Step> + 'a>(
        steps: impl IntoIterator<Item = &'a S>,
        source: impl Into<Error>,
    ) -> impl Iterator<Item = StepError> {
        let source = Arc::new(source.into());
        let steps = steps.into_iter();
        steps.map(move |step| StepError::new(step, Error::Batch(source.clone())))
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Tool(#[from] ToolError),
    #[error(transparent)]
    Batch(Arc<Error>),
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error(transparent)]
    Reach(#[from] ReachError),
    #[error("nftables")]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Conntrack(#[from] ConntrackError),
    #[error("not tried, because what it relies on failed: {0}")]
    NotTried(Box<Step>),
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
                let source = Error::NotTried(Box::new(failure.step.clone()));
                failed.push(StepError::new(*step, source));
            }
            None => rest.push(*step),
        }
    }
    rest
}
