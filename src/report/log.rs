//! What the log says of passes: what has changed, each once. What is about a VIP becomes an Event, too.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::net::IpAddr;

use tracing::{info, warn};
use tracing_subscriber::EnvFilter;

use crate::announcers::Source;
use crate::error::chain;
use crate::kernel::StepError;
use crate::lan::Anomaly;
use crate::names::{NodeName, ObjectKey};
use crate::plan::{Desired, Ignored, Subject, Verdict};
use crate::settings::{LogFormat, Settings};
use crate::state::{Family, Obstacle};

/// How many failed steps are named.
const MOST_FAILURES: usize = 10;

/// Starts logging, to standard error.
pub fn start(settings: &Settings) {
    // The client logs every try; the watch that failed logs the same once. First, so that the operator can override it.
    let filter = EnvFilter::new(format!("kube_client=off,{}", settings.log_filter));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match settings.log_format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
}

/// What was logged and is not to be logged again.
#[derive(Debug, Default)]
pub struct Log {
    unseen: BTreeSet<String>,
    anomalies: BTreeSet<Anomaly>,
    disagreements: BTreeSet<IpAddr>,
}

/// Something that an operator should know of a VIP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub vip: IpAddr,
    /// One word.
    pub reason: &'static str,
    /// A sentence.
    pub text: String,
}

impl Log {
    /// Warns of what could not be looked at, when that is new.
    pub fn unseen(&mut self, unseen: &BTreeSet<String>) {
        for sentence in unseen.difference(&self.unseen) {
            warn!("{sentence}");
        }
        self.unseen.clone_from(unseen);
    }

    /// New anomalies of the LAN, and sources that disagree from now on.
    pub fn notices(
        &mut self,
        anomalies: BTreeSet<Anomaly>,
        disagreements: &BTreeMap<IpAddr, [(Source, NodeName); 2]>,
    ) -> Vec<Notice> {
        let mut notices = Vec::new();
        for anomaly in anomalies.difference(&self.anomalies) {
            notices.push(Notice {
                vip: anomaly.vip(),
                reason: match anomaly {
                    Anomaly::UnknownSender(..) => "StrangeClaim",
                    Anomaly::DuplicateAnnouncer(..) => "DuplicateAnnouncer",
                },
                text: anomaly.to_string(),
            });
        }
        self.anomalies.extend(anomalies);
        for (vip, both) in disagreements {
            if !self.disagreements.contains(vip) {
                let [one, other] = both.each_ref().map(|(source, node)| match source {
                    Source::Status => format!("ServiceL2Status says that {node} announces {vip}"),
                    Source::Lan => format!("{node} answers for it"),
                });
                notices.push(Notice {
                    vip: *vip,
                    reason: "Disagreement",
                    text: format!("{one}, but {other}: using the newer claim"),
                });
            }
        }
        self.disagreements = disagreements.keys().copied().collect();
        notices
    }
}

/// Something that became different between two plans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// What becomes of a Service in one family: before, and now.
    Verdict(&'a ObjectKey, Family, Option<&'a Verdict>, &'a Verdict),
    /// A Service that is no egress Service any more.
    Gone(&'a ObjectKey),
    /// Something is ignored.
    Ignored(&'a Subject, &'a Ignored),
    /// Private networks are excluded because of a pod.
    UnknownNetwork(Family, IpAddr),
    /// An obstacle is in the way of the first of some Services, as many as given.
    Found(Family, &'a Obstacle, usize),
    /// An obstacle is in nobody's way any more.
    Mended(Family, &'a Obstacle),
    /// What is in the way of a Service has changed: the first obstacle of its kind, and how many others there are.
    Hindered(&'a ObjectKey, Family, &'a Obstacle, usize),
}

/// What became different between two plans.
#[must_use]
pub fn changes<'a>(before: &'a Desired, now: &'a Desired) -> Vec<Change<'a>> {
    let verdicts = now.services.iter().flat_map(|(service, verdicts)| {
        let old = before.services.get(service);
        let changed = move |(family, verdict): (&Family, &'a Verdict)| {
            let old = old.and_then(|old| old.get(family));
            let change = Change::Verdict(service, *family, old, verdict);
            (old != Some(verdict)).then_some(change)
        };
        verdicts.iter().filter_map(changed)
    });
    let gone = before.services.keys();
    let gone = gone.filter(|service| !now.services.contains_key(*service));
    let ignored = now.ignored.iter();
    let ignored = ignored.filter(|(subject, reason)| before.ignored.get(*subject) != Some(*reason));
    let unknown = now.unknown_networks.iter();
    let unknown = unknown.filter(|(family, _)| !before.unknown_networks.contains_key(*family));
    verdicts
        .chain(gone.map(Change::Gone))
        .chain(ignored.map(|(subject, reason)| Change::Ignored(subject, reason)))
        .chain(unknown.map(|(family, pod)| Change::UnknownNetwork(*family, *pod)))
        .chain(obstacles(before, now))
        .collect()
}

/// What has changed of obstacles: of the node, each once, and of each Service.
fn obstacles<'a>(before: &'a Desired, now: &'a Desired) -> Vec<Change<'a>> {
    let (old, new) = (hindered(before), hindered(now));
    let found = new
        .iter()
        .filter(|(obstacle, _)| !old.contains_key(*obstacle));
    let found = found.map(|((family, obstacle), n)| Change::Found(*family, obstacle, *n));
    let mended = old.keys().filter(|obstacle| !new.contains_key(*obstacle));
    let mended = mended.map(|(family, obstacle)| Change::Mended(*family, obstacle));
    let mut changes: Vec<Change<'_>> = found.chain(mended).collect();
    for (service, families) in &now.obstacles {
        let old = before.obstacles.get(service);
        for (family, obstacles) in families {
            let old = old.and_then(|families| families.get(family));
            let old = by_label(old.into_iter().flatten());
            for (label, of_kind) in by_label(obstacles) {
                if let (Some(first), false) = (of_kind.first(), old.get(label) == Some(&of_kind)) {
                    let others = of_kind.len() - 1;
                    changes.push(Change::Hindered(service, *family, first, others));
                }
            }
        }
    }
    changes
}

/// All obstacles, with the number of Services that they are in the way of.
fn hindered(desired: &Desired) -> BTreeMap<(Family, &Obstacle), usize> {
    let mut all = BTreeMap::new();
    for (family, obstacles) in desired.obstacles.values().flatten() {
        for obstacle in obstacles {
            *all.entry((*family, obstacle)).or_default() += 1;
        }
    }
    all
}

fn by_label<'a>(
    obstacles: impl IntoIterator<Item = &'a Obstacle>,
) -> BTreeMap<&'static str, Vec<&'a Obstacle>> {
    let mut kinds: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for obstacle in obstacles {
        kinds.entry(obstacle.label()).or_default().push(obstacle);
    }
    kinds
}

impl Change<'_> {
    /// Writes it to the log.
    pub fn log(&self) {
        match self {
            Change::Verdict(service, family, _, verdict) => info!(%service, %family, "{verdict}"),
            Change::Gone(service) => info!(%service, "no longer an egress Service"),
            Change::Ignored(subject, reason) => warn!("ignoring {subject}: {reason}"),
            Change::UnknownNetwork(family, pod) => warn!(
                %family, %pod,
                "pod is in no node's podCIDRs: all private networks are excluded from egress, \
                 set FIREWALL_EXCLUDE_DST_CIDRS to the cluster's networks"
            ),
            Change::Found(family, obstacle, services) => {
                warn!(%family, kind = obstacle.label(), services, "{obstacle}");
            }
            Change::Mended(family, obstacle) => {
                info!(%family, kind = obstacle.label(), "not in the way any more: {obstacle}");
            }
            // Its obstacles are logged once for all Services.
            Change::Hindered(..) => {}
        }
    }
}

/// Failed steps on one line.
#[must_use]
pub fn failures(failed: &[StepError]) -> String {
    let named = failed.iter().take(MOST_FAILURES);
    let mut text: Vec<String> = named.map(|error| chain(error)).collect();
    if failed.len() > MOST_FAILURES {
        text.push(format!("and {} more", failed.len() - MOST_FAILURES));
    }
    text.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ethernet::Mac;
    use crate::plan::Blocked;

    fn vip() -> IpAddr {
        IpAddr::from([192, 0, 2, 200])
    }

    fn node(n: u8) -> NodeName {
        NodeName(format!("node{n}"))
    }

    #[test]
    fn anomalies_are_noticed_once_and_disagreements_each_time_they_begin() {
        let mut log = Log::default();
        let stranger = Anomaly::UnknownSender(vip(), Mac([2, 0, 0, 0, 0, 66]));
        let contested = Anomaly::DuplicateAnnouncer(vip(), node(1), node(2));
        let both: BTreeSet<Anomaly> = [stranger.clone(), contested].into();
        let nothing = BTreeMap::new();
        let mut reasons = |anomalies: BTreeSet<Anomaly>, disagreements| -> Vec<_> {
            let notices = log.notices(anomalies, disagreements).into_iter();
            notices.map(|notice| notice.reason).collect()
        };
        assert_eq!(reasons([stranger].into(), &nothing), ["StrangeClaim"]);
        assert_eq!(reasons(both.clone(), &nothing), ["DuplicateAnnouncer"]);
        assert_eq!(reasons(both, &nothing), [""; 0]);
        let two = [(Source::Status, node(1)), (Source::Lan, node(2))];
        let disagreement = [(vip(), two)].into();
        for expected in [&["Disagreement"][..], &[]] {
            assert_eq!(reasons(BTreeSet::new(), &disagreement), expected);
        }
        assert_eq!(reasons(BTreeSet::new(), &nothing), [""; 0]);
        let notices = log.notices(BTreeSet::new(), &disagreement);
        assert_eq!(
            notices[0].text,
            "ServiceL2Status says that node1 announces 192.0.2.200, but node2 answers for it: using the newer claim"
        );
    }

    #[test]
    fn only_what_has_changed_between_two_plans_is_logged() {
        let key = ObjectKey {
            namespace: "shop".to_owned(),
            name: "a".to_owned(),
        };
        let plan = |verdict| Desired {
            services: [(key.clone(), [(Family::V4, verdict)].into())].into(),
            ignored: [(Subject::OnNoGateway(key.clone()), Ignored::NotAnAddress)].into(),
            ..Desired::default()
        };
        let blocked = plan(Verdict::Blocked(Blocked::NoVip));
        let active = plan(Verdict::Active {
            vip: vip(),
            gateway: node(1),
        });
        let nothing = Desired::default();
        let family = Family::V4;
        let verdict = |plan: &Desired| plan.services[&key][&family].clone();
        let (good, bad) = (verdict(&active), verdict(&blocked));
        assert_eq!(changes(&nothing, &blocked).len(), 2);
        let expected = Change::Verdict(&key, family, Some(&bad), &good);
        assert_eq!(changes(&blocked, &active), [expected]);
        assert_eq!(changes(&active, &active), []);
        assert_eq!(changes(&active, &nothing), [Change::Gone(&key)]);
    }

    #[test]
    fn an_obstacle_is_logged_once_for_all_services_and_told_to_each_when_its_kind_changes() {
        let family = Family::V4;
        let [a, b] = ["a", "b"].map(|name| ObjectKey {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
        });
        let rule = |n: u32| Obstacle::RuleAhead(format!("pref {n} lookup 77"));
        let plan = |obstacles: &[Obstacle]| Desired {
            obstacles: [&a, &b]
                .map(|key| {
                    let obstacles = obstacles.iter().cloned().collect();
                    (key.clone(), [(family, obstacles)].into())
                })
                .into(),
            ..Desired::default()
        };
        let nothing = Desired::default();
        let (strict, one, two) = (Obstacle::StrictTracking, rule(1), rule(2));
        let first = plan(&[strict.clone(), one.clone()]);
        assert_eq!(
            changes(&nothing, &first),
            [
                Change::Found(family, &strict, 2),
                Change::Found(family, &one, 2),
                Change::Hindered(&a, family, &one, 0),
                Change::Hindered(&a, family, &strict, 0),
                Change::Hindered(&b, family, &one, 0),
                Change::Hindered(&b, family, &strict, 0),
            ]
        );
        let second = plan(&[one.clone(), two.clone()]);
        assert_eq!(
            changes(&first, &second),
            [
                Change::Found(family, &two, 2),
                Change::Mended(family, &strict),
                Change::Hindered(&a, family, &one, 1),
                Change::Hindered(&b, family, &one, 1),
            ]
        );
        assert_eq!(changes(&second, &second), []);
    }
}
