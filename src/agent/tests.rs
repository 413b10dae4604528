use std::sync::Mutex;

use tokio::sync::Notify;

use super::*;
use crate::state::{FamilyState, Skeleton};

/// A kernel that remembers what was done to it, and fails where it is told to.
#[derive(Debug, Default)]
struct FakeKernel {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<KernelState>,
    log: Mutex<Vec<&'static str>>,
    /// How many applies fail at their first step.
    failing: Mutex<usize>,
    done: Notify,
    disturbance: Notify,
}

impl Shared {
    fn note(&self, what: &'static str) {
        self.log.lock().unwrap().push(what);
        self.done.notify_one();
    }

    fn log(&self) -> Vec<&'static str> {
        self.log.lock().unwrap().clone()
    }

    /// Waits until as many things were noted; with the clock paused no time is lost on it.
    async fn noted(&self, count: usize) {
        while self.log().len() < count {
            self.done.notified().await;
        }
    }
}

impl Kernel for FakeKernel {
    async fn observe(&mut self) -> Result<kernel::Observed, kernel::Error> {
        self.shared.note("observe");
        let mut state = self.shared.state.lock().unwrap().clone();
        state.families.entry(Family::V4).or_default();
        Ok(kernel::Observed {
            state,
            ..kernel::Observed::default()
        })
    }

    async fn links(&mut self) -> Result<Vec<Interface>, kernel::Error> {
        Ok(Vec::new())
    }

    async fn drifted(&mut self) {
        self.shared.disturbance.notified().await;
    }

    async fn apply(&mut self, steps: &[Step]) -> Vec<StepError> {
        let mut failing = self.shared.failing.lock().unwrap();
        let mut state = self.shared.state.lock().unwrap();
        let mut failed = Vec::new();
        for step in steps {
            if failed.is_empty() && *failing > 0 {
                *failing -= 1;
                failed.push(StepError {
                    step: step.clone(),
                    source: kernel::Error::Injected,
                });
            } else {
                state.apply(step);
            }
        }
        self.shared.note(if failed.is_empty() {
            "applied"
        } else {
            "failed"
        });
        failed
    }
}

struct Running {
    cluster: Arc<Cluster>,
    report: Arc<Report>,
    kernel: Arc<Shared>,
    stop: Arc<Notify>,
    task: tokio::task::JoinHandle<()>,
}

fn start(failing: usize) -> Running {
    let cluster = Arc::new(Cluster::default());
    let report = Arc::new(Report::new(cluster.clone()));
    let mut kernel = FakeKernel::default();
    *kernel.shared.failing.lock().unwrap() = failing;
    let shared = kernel.shared.clone();
    let stop = Arc::new(Notify::new());
    let task = tokio::spawn({
        let (cluster, report, stop) = (cluster.clone(), report.clone(), stop.clone());
        async move {
            run(
                &Settings::default_on("node1"),
                &cluster,
                &report,
                &mut kernel,
                None,
                stop.notified(),
            )
            .await;
        }
    });
    Running {
        cluster,
        report,
        kernel: shared,
        stop,
        task,
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_read_or_changed_before_every_watch_has_its_first_list() {
    let running = start(0);
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(running.kernel.log(), Vec::<&str>::new());
    let reason = running.report.not_ready().unwrap();
    assert!(reason.contains("Services: not listed yet"), "{reason}");
    running.stop.notify_one();
    running.task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_failed_pass_is_repeated_in_full_until_the_kernel_is_right() {
    let running = start(2);
    running.cluster.pretend_synced();
    running.kernel.noted(6).await;
    assert_eq!(
        running.kernel.log(),
        [
            "observe", "failed", "observe", "failed", "observe", "applied"
        ]
    );
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(running.report.not_ready(), None);
    let state = running.kernel.state.lock().unwrap().clone();
    assert_eq!(
        state.families[&Family::V4].firewall.skeleton,
        Skeleton::Intact
    );
}

#[tokio::test(start_paused = true)]
async fn the_kernel_is_read_back_every_interval_and_repaired() {
    let running = start(0);
    running.cluster.pretend_synced();
    running.kernel.noted(2).await;
    let drifted = KernelState {
        families: [(Family::V4, FamilyState::default())].into(),
        ..KernelState::default()
    };
    *running.kernel.state.lock().unwrap() = drifted;
    tokio::time::sleep(Duration::from_secs(299)).await;
    assert_eq!(running.kernel.log(), ["observe", "applied"]);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(
        running.kernel.log(),
        ["observe", "applied", "observe", "applied"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_stop_leaves_the_kernel_as_it_is() {
    let running = start(0);
    running.cluster.pretend_synced();
    running.kernel.noted(2).await;
    let before = running.kernel.state.lock().unwrap().clone();
    running.stop.notify_one();
    running.task.await.unwrap();
    assert_eq!(*running.kernel.state.lock().unwrap(), before);
}
