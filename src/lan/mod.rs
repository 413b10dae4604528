//! Who announces the VIPs, as heard on the LAN.
//!
//! A VIP moves on the LAN first; MetalLB's object follows 20 to 30 ms later, or never. A claim counts only when it
//! comes from a node. Nothing here knows of Services.

mod hearing;
mod socket;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tracing::{debug, warn};

use self::hearing::Hearing;
pub use self::hearing::{Anomaly, Heard, Wanted};
use self::socket::LanSocket;
use crate::error::chain;
use crate::kernel::neighbours::neighbour_table;
use crate::tasks::Tasks;

/// Pause before an interface that went away is tried again; also how often it is checked which questions are due.
const PAUSE: Duration = Duration::from_millis(250);

/// What is heard on the LAN.
#[derive(Debug)]
pub struct Lan {
    shared: Arc<Shared>,
    wanted: watch::Sender<Wanted>,
}

#[derive(Debug, Default)]
struct Shared {
    hearing: Mutex<Hearing>,
    changed: Notify,
}

impl Shared {
    fn hearing(&self) -> MutexGuard<'_, Hearing> {
        // Facts are replaced one by one: a panic elsewhere leaves no half of one.
        self.hearing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lan {
    /// Starts to listen as soon as an interface is wanted, in the network namespace of the runtime's threads.
    #[must_use]
    pub fn start(tasks: &mut Tasks) -> Lan {
        let shared = Arc::new(Shared::default());
        let (wanted, changes) = watch::channel(Wanted::default());
        tasks.spawn("LAN listener", listen(shared.clone(), changes));
        Lan { shared, wanted }
    }

    /// Changes what to listen for.
    pub fn want(&self, wanted: Wanted) {
        self.wanted.send_if_modified(|old| {
            let differs = *old != wanted;
            *old = wanted;
            differs
        });
    }

    /// Who announces what, as heard.
    #[must_use]
    pub fn heard(&self) -> BTreeMap<IpAddr, Heard> {
        self.shared.hearing().heard.clone()
    }

    /// Anomalies of wanted VIPs.
    #[must_use]
    pub fn anomalies(&self) -> BTreeSet<Anomaly> {
        self.shared.hearing().anomalies.clone()
    }

    /// How often each kind of anomaly was met.
    #[must_use]
    pub fn anomaly_counts(&self) -> BTreeMap<&'static str, u64> {
        self.shared.hearing().anomaly_counts.clone()
    }

    /// Waits for news: another announcer, or an anomaly. Cancel-safe.
    pub async fn changed(&self) {
        self.shared.changed.notified().await;
    }
}

async fn listen(shared: Arc<Shared>, mut changes: watch::Receiver<Wanted>) {
    let mut logged = None;
    loop {
        let wanted = changes.borrow_and_update().clone();
        let interface = wanted.interface.clone();
        shared.hearing().want(wanted, Instant::now());
        let Some(interface) = interface else {
            if changes.changed().await.is_err() {
                return;
            }
            continue;
        };
        let failure = match LanSocket::open(&interface) {
            Ok(socket) => {
                logged = None;
                hear(&shared, &mut changes, &socket, &interface).await
            }
            Err(error) => Some(error),
        };
        if let Some(error) = failure {
            let text = error.to_string();
            if logged.as_ref() != Some(&text) {
                warn!(
                    interface,
                    "cannot listen for announcements, trying again: {text}"
                );
                logged = Some(text);
            }
            tokio::time::sleep(PAUSE).await;
        }
        if changes.has_changed().is_err() {
            return;
        }
    }
}

/// Listens until another interface is wanted, or this one fails.
async fn hear(
    shared: &Shared,
    changes: &mut watch::Receiver<Wanted>,
    socket: &LanSocket,
    interface: &str,
) -> Option<std::io::Error> {
    let mut tick = tokio::time::interval(PAUSE);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut nodes = changes.borrow().nodes.clone();
    // The neighbour table is read at the start, when nodes change, and while a claim is of an unknown sender.
    let mut is_stale = true;
    loop {
        let now = Instant::now();
        if is_stale || shared.hearing().is_waiting() {
            is_stale = false;
            match neighbour_table().await {
                Ok(table) => {
                    // A node may have several interfaces, each with a link-layer address of its own.
                    let table = table.iter().filter(|n| n.interface == socket.index());
                    let table: Vec<_> = table.map(|n| (n.mac, n.address)).collect();
                    if shared.hearing().neighbours(&table, socket.mac(), now) {
                        shared.changed.notify_one();
                    }
                }
                Err(error) => debug!("cannot read the neighbour table: {}", chain(&error)),
            }
        }
        let questions = shared.hearing().questions(now);
        for address in questions {
            debug!(interface, "who has {address}?");
            if let Err(error) = socket.ask(address).await {
                return Some(error);
            }
        }
        // Claims are taken as they come; questions and the neighbour table at the next tick.
        loop {
            tokio::select! {
                claim = socket.next() => match claim {
                    Ok(claim) => {
                        if shared.hearing().claim(claim, Instant::now()) {
                            debug!(interface, "{} is claimed by {}", claim.address, claim.mac);
                            shared.changed.notify_one();
                        }
                    }
                    Err(error) => return Some(error),
                },
                changed = changes.changed() => {
                    if changed.is_err() {
                        return None;
                    }
                    let wanted = changes.borrow_and_update().clone();
                    let same = wanted.interface.as_deref() == Some(interface);
                    if wanted.nodes != nodes {
                        nodes.clone_from(&wanted.nodes);
                        is_stale = true;
                    }
                    shared.hearing().want(wanted, Instant::now());
                    if !same {
                        return None;
                    }
                    break;
                }
                _ = tick.tick() => break,
            }
        }
    }
}
