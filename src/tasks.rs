//! Tasks that must run for as long as the program does: when one ends, the program must not go on without it.

use std::collections::BTreeMap;
use std::future::Future;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{Id, JoinError, JoinSet};

/// The tasks of the program, by name. Dropped, they end.
#[derive(Debug, Default)]
pub struct Tasks {
    running: JoinSet<()>,
    names: BTreeMap<Id, String>,
}

#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    #[error("the task `{0}` has ended")]
    Ended(String),
    #[error("the task `{0}` has failed")]
    Failed(String, #[source] JoinError),
    #[error("cannot wait for SIGTERM and SIGINT")]
    Signal(#[source] std::io::Error),
}

impl Tasks {
    pub fn spawn(
        &mut self,
        name: impl Into<String>,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let id = self.running.spawn(task).id();
        self.names.insert(id, name.into());
    }

    /// Waits until a signal ends the program, or a task that should not has ended.
    ///
    /// # Errors
    /// When a task has ended, or signals cannot be received.
    pub async fn run(&mut self) -> Result<(), TaskError> {
        let mut terminate = signal(SignalKind::terminate()).map_err(TaskError::Signal)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(TaskError::Signal)?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            error = self.ended() => Err(error),
        }
    }

    /// Waits until a task ends, and says which; for ever where there is none. Cancel-safe.
    async fn ended(&mut self) -> TaskError {
        let Some(ended) = self.running.join_next_with_id().await else {
            return std::future::pending().await;
        };
        let mut name = |id| self.names.remove(&id).unwrap_or_default();
        match ended {
            Ok((id, ())) => TaskError::Ended(name(id)),
            Err(error) => TaskError::Failed(name(error.id()), error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::chain;

    #[tokio::test]
    async fn a_task_that_ends_or_panics_is_named_and_the_others_are_waited_for() {
        let mut tasks = Tasks::default();
        tasks.spawn("listener", std::future::pending());
        let none_ends = tokio::time::timeout(std::time::Duration::ZERO, tasks.ended());
        assert!(none_ends.await.is_err());
        tasks.spawn("writer", async {});
        let error = tasks.run().await.unwrap_err();
        assert_eq!(chain(&error), "the task `writer` has ended");
        tasks.spawn("reader", async { panic!("out of luck") });
        let text = chain(&tasks.ended().await);
        assert!(text.starts_with("the task `reader` has failed: "), "{text}");
        assert!(text.contains("out of luck"), "{text}");
    }
}
