use std::collections::BTreeMap;
use std::sync::Mutex;

use tokio::sync::{Notify, watch};

use super::*;
use crate::cluster::Node;
use crate::cluster::leases::BootId;
use crate::kernel;
use crate::names::NodeName;
use crate::report::Wanted;
use crate::state::{
    Accepted, Asked, ConnectionStep, Family, FamilyState, FirewallStep, KernelState, Obstacle,
    PodSet, Rule, RuleAction, Skeleton, Surroundings, TableId,
};

/// A kernel that remembers what was done to it, and fails where a test wants it.
#[derive(Debug, Default)]
struct FakeKernel {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<KernelState>,
    surroundings: Mutex<BTreeMap<Family, Surroundings>>,
    log: Mutex<Vec<&'static str>>,
    /// How many applies fail, and at which steps.
    failing: Mutex<Failing>,
    done: Notify,
    drift: Notify,
    suspicion: Notify,
    /// Whether the kernel cannot be read.
    unreadable: Mutex<bool>,
}

#[derive(Clone, Copy, Debug)]
struct Failing {
    applies: usize,
    at: fn(&Step) -> bool,
}

impl Default for Failing {
    fn default() -> Self {
        let at = |_: &Step| true;
        Failing { applies: 0, at }
    }
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
    async fn observe(&mut self) -> Result<Observed, kernel::Error> {
        self.shared.note("observe");
        if *self.shared.unreadable.lock().unwrap() {
            return Err(kernel::Error::Injected);
        }
        let mut state = self.shared.state.lock().unwrap().clone();
        state.families.entry(Family::V4).or_default();
        state.doubt = true;
        Ok(Observed {
            state,
            surroundings: self.shared.surroundings.lock().unwrap().clone(),
            ..Observed::default()
        })
    }

    async fn look_up(&mut self, _: &Asked, _: &mut Observed) -> Result<(), kernel::Error> {
        Ok(())
    }

    async fn look_again(&mut self) -> BTreeMap<Family, Surroundings> {
        self.shared.surroundings.lock().unwrap().clone()
    }

    async fn drifted(&mut self) -> Drift {
        tokio::select! {
            () = self.shared.drift.notified() => Drift::Certain,
            () = self.shared.suspicion.notified() => Drift::Possible,
        }
    }

    async fn apply(&mut self, steps: &[Step]) -> Vec<StepError> {
        let mut failing = self.shared.failing.lock().unwrap();
        let mut state = self.shared.state.lock().unwrap();
        let mut failed = Vec::new();
        for step in steps {
            if failed.is_empty() && failing.applies > 0 && (failing.at)(step) {
                failing.applies -= 1;
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
    /// What the Lease is to say.
    lease: watch::Receiver<Option<Wanted>>,
    stop: Arc<Notify>,
    task: tokio::task::JoinHandle<()>,
}

fn node1() -> NodeName {
    NodeName("node1".to_owned())
}

fn start(failing: Failing) -> Running {
    let cluster = Arc::new(Cluster::default());
    let boot = BootId("first".to_owned());
    let (report, lease) = Report::recorded(cluster.clone(), node1(), boot);
    let report = Arc::new(report);
    let mut kernel = FakeKernel::default();
    *kernel.shared.failing.lock().unwrap() = failing;
    let shared = kernel.shared.clone();
    let stop = Arc::new(Notify::new());
    let task = tokio::spawn({
        let (cluster, report, stop) = (cluster.clone(), report.clone(), stop.clone());
        async move {
            // Without a labelled Service, a strict start is what gives the agent something to do.
            let settings = Settings {
                strict_start: true,
                ..Settings::default_on("node1")
            };
            let stop = stop.notified();
            run(&settings, &cluster, &report, &mut kernel, None, stop).await;
        }
    });
    Running {
        cluster,
        report,
        kernel: shared,
        lease,
        stop,
        task,
    }
}

fn never() -> Failing {
    Failing::default()
}

fn pretend_synced(cluster: &Cluster) {
    // Its Lease says that it is programmed, so that the agent becomes ready.
    let facts = Node {
        programmed: Some(BootId("first".to_owned())),
        guards: Some(false),
        ..Node::default()
    };
    cluster.pretend_synced(&[(node1(), facts)]);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_read_or_changed_before_every_watch_has_its_first_list() {
    let running = start(never());
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(running.kernel.log(), Vec::<&str>::new());
    let reason = running.report.not_ready().unwrap();
    assert!(reason.contains("Services: not listed yet"), "{reason}");
    running.stop.notify_one();
    running.task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_failed_pass_is_repeated_in_full_until_the_kernel_is_right() {
    let running = start(Failing {
        applies: 2,
        ..never()
    });
    // The agent waits for the watches, so that nothing but the failure begins the second pass.
    tokio::task::yield_now().await;
    pretend_synced(&running.cluster);
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
    let running = start(never());
    pretend_synced(&running.cluster);
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
async fn what_surrounds_the_node_is_looked_at_every_minute_and_the_rest_when_it_has_changed() {
    let running = start(never());
    pretend_synced(&running.cluster);
    running.kernel.noted(2).await;
    let passes = || {
        let results = ["changed", "unchanged", "failed"].map(|result| vec![("result", result)]);
        let passes = &running.report.counters.passes;
        results
            .iter()
            .map(|labels| passes.get_or_create(labels).get())
            .sum::<u64>()
    };
    tokio::time::sleep(Duration::from_secs(130)).await;
    let before = passes();
    assert_eq!(running.kernel.log(), ["observe", "applied"]);
    let surroundings = Surroundings {
        obstacles: [Obstacle::StrictTracking].into(),
        ..Surroundings::default()
    };
    *running.kernel.surroundings.lock().unwrap() = [(Family::V4, surroundings)].into();
    tokio::time::sleep(Duration::from_secs(130)).await;
    assert_eq!(passes(), before + 1);
    // No connection is in doubt because of it.
    assert_eq!(running.kernel.log(), ["observe", "applied", "observe"]);
}

#[tokio::test(start_paused = true)]
async fn a_stop_leaves_the_kernel_as_it_is() {
    let running = start(never());
    pretend_synced(&running.cluster);
    running.kernel.noted(2).await;
    let before = running.kernel.state.lock().unwrap().clone();
    running.stop.notify_one();
    running.task.await.unwrap();
    assert_eq!(*running.kernel.state.lock().unwrap(), before);
}

#[tokio::test(start_paused = true)]
async fn a_node_is_programmed_for_others_when_all_is_that_a_gateway_needs() {
    type IsFailing = fn(&Step) -> bool;
    let cases: [(IsFailing, bool); 3] = [
        (
            |step| matches!(step, Step::Firewall(FirewallStep::Install(..))),
            false,
        ),
        (|step| matches!(step, Step::Route(_)), true),
        (|step| matches!(step, Step::Accept(..)), true),
    ];
    for (at, is_published) in cases {
        let running = start(Failing { applies: 1, at });
        let surplus = Rule {
            priority: 1000,
            action: RuleAction::Lookup(TableId(100_001)),
            mark: None,
            not: false,
            from: None,
            to: None,
        };
        let mut state = FamilyState::default();
        state.routes.rules.insert(surplus);
        *running.kernel.state.lock().unwrap() = KernelState {
            families: [(Family::V4, state)].into(),
            accepted: [(Family::V4, Accepted::Damaged)].into(),
            ..KernelState::default()
        };
        let node = Node {
            uid: "uid".to_owned(),
            ..Node::default()
        };
        // The agent waits for the watches, so that nothing but the failure begins the second pass.
        tokio::task::yield_now().await;
        running.cluster.pretend_synced(&[(node1(), node)]);
        running.kernel.noted(2).await;
        assert_eq!(running.kernel.log(), ["observe", "failed"]);
        let lease = running.lease.borrow().clone();
        assert_eq!(lease.is_some(), is_published);
        running.kernel.noted(4).await;
        let wanted = Wanted {
            owner: "uid".to_owned(),
            programmed: true,
            guards: false,
        };
        assert_eq!(*running.lease.borrow(), Some(wanted));
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_new_gateway_needs_and_could_not_do_opens_nothing_after_it_has_told() {
    let pod = "10.244.1.11".parse().unwrap();
    let steps: [Step; 3] = [
        FirewallStep::Install(Family::V4, [].into()).into(),
        ConnectionStep::Forget(pod).into(),
        FirewallStep::RemovePod(PodSet::Blocked, pod).into(),
    ];
    for (applies, expected) in [(1, &["failed"][..]), (0, &["applied", "applied"])] {
        let settings = Settings::default_on("node1");
        let cluster = Arc::new(Cluster::default());
        let boot = BootId("first".to_owned());
        let (report, lease) = Report::recorded(cluster.clone(), node1(), boot);
        let mut kernel = FakeKernel::default();
        let shared = kernel.shared.clone();
        let at = |step: &Step| matches!(step, Step::Firewall(FirewallStep::Install(..)));
        *shared.failing.lock().unwrap() = Failing { applies, at };
        let mut agent = Agent {
            settings: &settings,
            cluster: &cluster,
            report: &report,
            kernel: &mut kernel,
            lan: None,
            memory: Memory::new(&settings),
            log: Log::default(),
            known: Known::Nothing,
        };
        let mut observed = Observed::default();
        let facts = agent.cluster.facts();
        let now = Instant::now().into_std();
        let mut pass = agent
            .memory
            .plan(facts, &BTreeMap::new(), &mut observed, &settings, now);
        pass.is_gateway = true;
        let family = pass.desired.kernel.families.entry(Family::V4);
        family.or_default().firewall.skeleton = Skeleton::Intact;
        pass.view.nodes.insert(node1(), Node::default());
        let failed = agent.apply(&steps, &pass).await;
        assert_eq!(shared.log(), expected);
        assert_eq!(failed.len(), 3 * applies, "{failed:?}");
        assert_eq!(lease.borrow().is_some(), applies == 0);
    }
}

/// How often the kernel was read, and how often steps were done, in order.
fn reads_and_applies(running: &Running) -> (usize, usize) {
    let log = running.kernel.log();
    let reads = log.iter().filter(|what| **what == "observe").count();
    (reads, log.len() - reads)
}

#[tokio::test(start_paused = true)]
async fn connections_are_looked_at_only_when_something_of_ours_was_changed() {
    let running = start(never());
    pretend_synced(&running.cluster);
    running.kernel.noted(2).await;
    let look = async |what: &Notify| {
        what.notify_one();
        tokio::time::sleep(Duration::from_secs(1)).await;
        reads_and_applies(&running)
    };
    // The first look is in doubt, and so are those after which nobody knows.
    assert_eq!(look(&running.kernel.suspicion).await, (2, 1));
    assert_eq!(look(&running.kernel.drift).await, (3, 2));
    assert_eq!(look(&running.kernel.suspicion).await, (4, 2));
    let damage = Skeleton::Damaged("by others".to_owned());
    let damaged = |state: &mut KernelState| {
        let family = state.families.get_mut(&Family::V4).unwrap();
        family.firewall.skeleton = damage.clone();
    };
    damaged(&mut running.kernel.state.lock().unwrap());
    assert_eq!(look(&running.kernel.suspicion).await, (5, 3));
    assert_eq!(look(&running.kernel.suspicion).await, (6, 3));
}

#[tokio::test(start_paused = true)]
async fn events_while_steps_fail_do_not_read_the_kernel_each_time() {
    let running = start(Failing {
        applies: usize::MAX,
        at: |step| matches!(step, Step::Firewall(FirewallStep::Install(..))),
    });
    tokio::task::yield_now().await;
    pretend_synced(&running.cluster);
    running.kernel.noted(2).await;
    let events = async |count: usize| {
        for _ in 0..count {
            running.cluster.pretend_synced(&[]);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        reads_and_applies(&running)
    };
    // Each event is worked on at once; the kernel is read back when the pause is over.
    assert_eq!(events(100).await, (1, 101));
    tokio::time::sleep(Duration::from_secs(600)).await;
    let (reads, applies) = reads_and_applies(&running);
    assert_eq!(reads, applies - 100);
    assert!((20..50).contains(&reads), "{reads}");
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_cannot_be_read_is_read_at_growing_intervals_whatever_happens() {
    let running = start(never());
    *running.kernel.unreadable.lock().unwrap() = true;
    pretend_synced(&running.cluster);
    running.kernel.noted(1).await;
    for _ in 0..10_000 {
        running.cluster.pretend_synced(&[]);
        running.kernel.drift.notify_one();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (reads, _) = reads_and_applies(&running);
    assert!((7..12).contains(&reads), "{reads}");
    *running.kernel.unreadable.lock().unwrap() = false;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_ne!(reads_and_applies(&running).1, 0);
}
