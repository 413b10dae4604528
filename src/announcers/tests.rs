use super::*;
use crate::cluster::leases::BootId;
use crate::fixtures::{key, service};
use crate::state::Family;

const GRACE: Duration = Duration::from_secs(30);

/// A Service with one VIP, and what speaks for its announcer.
struct Case {
    announcers: Announcers,
    start: Instant,
    services: BTreeMap<ObjectKey, Service>,
    statuses: BTreeMap<ObjectKey, L2Status>,
    heard: BTreeMap<IpAddr, Heard>,
    nodes: BTreeMap<NodeName, Node>,
    away: bool,
}

fn vip() -> IpAddr {
    IpAddr::from([192, 0, 2, 200])
}

fn node(n: u8) -> NodeName {
    NodeName(format!("node{n}"))
}

fn case() -> Case {
    let service = service("a").families(&[Family::V4]).vip("192.0.2.200");
    let facts = Node {
        ready: true,
        programmed: Some(BootId("first".to_owned())),
        ..Node::default()
    };
    Case {
        announcers: Announcers::new(node(9), GRACE),
        start: Instant::now(),
        services: [(service.key, service.facts)].into(),
        statuses: BTreeMap::new(),
        heard: BTreeMap::new(),
        nodes: (1..=3).map(|n| (node(n), facts.clone())).collect(),
        away: false,
    }
}

impl Case {
    fn status(&mut self, name: &str, of: u8, version: u64) {
        let status = L2Status {
            service: key("a"),
            node: node(of),
            version,
        };
        self.statuses.insert(key(name), status);
    }

    fn hear(&mut self, from: u8, seconds: u64) {
        let at = self.start + Duration::from_secs(seconds);
        self.heard.insert(vip(), Heard::new(node(from), at));
    }

    /// The announcer, and whether the LAN is to be asked.
    fn at(&mut self, seconds: u64) -> (Option<NodeName>, bool) {
        let resolved = self.resolve(seconds);
        let announcer = resolved.announcers.get(&vip()).cloned();
        (announcer, resolved.unsettled.contains(&vip()))
    }

    fn resolve(&mut self, seconds: u64) -> Resolved {
        let sources = Sources {
            services: &self.services,
            statuses: &self.statuses,
            heard: &self.heard,
            nodes: &self.nodes,
            away: self.away,
        };
        let now = self.start + Duration::from_secs(seconds);
        self.announcers.resolve(sources, now)
    }
}

#[test]
fn an_object_that_nothing_contradicts_is_settled() {
    let mut case = case();
    case.status("s", 1, 5);
    assert_eq!(case.at(0), (Some(node(1)), false));
    case.hear(1, 1);
    assert_eq!(case.at(1), (Some(node(1)), false));
}

#[test]
fn at_a_move_the_lan_comes_first_and_the_object_follows() {
    let mut case = case();
    case.status("s", 1, 5);
    case.at(0);
    case.hear(2, 10);
    assert_eq!(case.at(10), (Some(node(2)), true));
    case.status("s", 2, 6);
    assert_eq!(case.at(11), (Some(node(2)), false));
}

#[test]
fn an_object_that_is_newer_than_the_last_claim_on_the_lan_wins_and_the_lan_is_asked() {
    let mut case = case();
    case.status("s", 1, 5);
    case.hear(1, 0);
    case.at(0);
    case.status("s", 2, 6);
    assert_eq!(case.at(10), (Some(node(2)), true));
    // The answer says that the object is wrong.
    case.hear(1, 11);
    assert_eq!(case.at(11), (Some(node(1)), true));
}

#[test]
fn an_object_is_as_old_as_its_first_word_for_the_node() {
    let mut case = case();
    case.status("s", 1, 5);
    case.at(0);
    case.hear(2, 10);
    // Written again, and seen again, it says nothing new.
    case.status("s", 1, 6);
    assert_eq!(case.at(12), (Some(node(2)), true));
}

#[test]
fn without_an_object_the_lan_serves_for_as_long_as_it_answers() {
    let mut case = case();
    case.status("s", 1, 5);
    case.at(0);
    case.statuses.clear();
    assert_eq!(case.at(1), (Some(node(1)), true));
    for seconds in [2, 20, 40, 60] {
        case.hear(1, seconds);
        assert_eq!(case.at(seconds), (Some(node(1)), true));
    }
    // Then nobody answers for the grace period.
    assert_eq!(case.at(89), (Some(node(1)), true));
    assert_eq!(case.at(90), (None, true));
    case.hear(3, 100);
    assert_eq!(case.at(100), (Some(node(3)), true));
}

#[test]
fn the_last_announcer_is_kept_for_the_grace_period_and_not_longer() {
    let mut case = case();
    case.status("s", 1, 5);
    case.at(0);
    case.statuses.clear();
    for (seconds, expected) in [
        (10, Some(node(1))),
        (39, Some(node(1))),
        (40, None),
        (41, None),
    ] {
        let resolved = case.resolve(seconds);
        assert_eq!(
            resolved.announcers.get(&vip()),
            expected.as_ref(),
            "at {seconds} s"
        );
        let end = expected.map(|_| case.start + Duration::from_secs(40));
        assert_eq!(resolved.ends, end);
    }
    case.status("s", 2, 9);
    assert_eq!(case.at(50), (Some(node(2)), false));
}

#[test]
fn the_newest_of_two_objects_wins_and_the_lan_is_asked() {
    for (first, second) in [((1, 5), (2, 6)), ((2, 6), (1, 5))] {
        let mut case = case();
        case.status("x", first.0, first.1);
        case.status("y", second.0, second.1);
        assert_eq!(case.at(0), (Some(node(2)), true));
    }
}

#[test]
fn a_node_that_is_gone_or_not_ready_and_a_silent_api_server_put_it_in_doubt() {
    let mut case = case();
    case.status("s", 1, 5);
    assert_eq!(case.at(0), (Some(node(1)), false));
    case.away = true;
    assert_eq!(case.at(1), (Some(node(1)), true));
    case.away = false;
    case.nodes.entry(node(1)).or_default().ready = false;
    assert_eq!(case.at(2), (Some(node(1)), true));
    case.nodes.remove(&node(1));
    assert_eq!(case.at(3), (Some(node(1)), true));
    case.hear(2, 4);
    assert_eq!(case.at(4), (Some(node(2)), true));
}

#[test]
fn a_disagreement_that_lasts_is_reported() {
    let mut case = case();
    case.status("s", 1, 5);
    case.at(0);
    case.hear(2, 10);
    let resolved = case.resolve(10);
    assert!(resolved.disagreements.is_empty());
    assert_eq!(resolved.ends, Some(case.start + Duration::from_secs(15)));
    let both = [(Source::Status, node(1)), (Source::Lan, node(2))];
    assert_eq!(case.resolve(15).disagreements, [(vip(), both)].into());
    case.status("s", 2, 6);
    assert!(case.resolve(16).disagreements.is_empty());
}

#[test]
fn an_adopted_announcer_serves_until_something_names_one() {
    let mut case = case();
    case.announcers.adopt(vip(), node(3), case.start);
    assert_eq!(case.at(0), (Some(node(3)), true));
    assert_eq!(case.at(29), (Some(node(3)), true));
    case.status("s", 1, 1);
    assert_eq!(case.at(30), (Some(node(1)), false));
}

#[test]
fn an_object_that_contradicts_an_adopted_announcer_is_checked_on_the_lan() {
    let mut case = case();
    case.status("s", 1, 5);
    case.at(0);
    case.announcers.adopt(vip(), node(3), case.start);
    assert_eq!(case.at(1), (Some(node(1)), true));
    case.hear(3, 2);
    assert_eq!(case.at(2).0, Some(node(3)));
    case.status("s", 3, 6);
    assert_eq!(case.at(3), (Some(node(3)), false));
}

#[test]
fn a_lease_that_is_lost_costs_nothing_within_the_grace_period() {
    let boot = |id: &str| Some(BootId(id.to_owned()));
    let mut case = case();
    case.nodes.entry(node(1)).or_default().boot = boot("first");
    case.status("s", 1, 5);
    assert!(case.resolve(0).still_programmed.is_empty());
    case.nodes.entry(node(1)).or_default().programmed = None;
    for (seconds, still) in [(10, true), (39, true), (40, false)] {
        let resolved = case.resolve(seconds);
        assert_eq!(resolved.announcers.get(&vip()), Some(&node(1)));
        assert_eq!(
            resolved.still_programmed.contains(&node(1)),
            still,
            "at {seconds} s"
        );
    }
    // Rebooted, it is not what it was.
    case.nodes.entry(node(1)).or_default().programmed = boot("first");
    case.resolve(50);
    case.nodes.entry(node(1)).or_default().boot = boot("second");
    assert!(case.resolve(51).still_programmed.is_empty());
}

#[test]
fn a_claim_of_another_node_interrupts_even_when_it_is_not_believed() {
    let mut case = case();
    case.status("s", 1, 5);
    case.hear(1, 0);
    assert!(case.resolve(0).interrupted.is_empty());
    case.heard.get_mut(&vip()).unwrap().others = 1;
    let resolved = case.resolve(1);
    assert_eq!(resolved.announcers.get(&vip()), Some(&node(1)));
    assert_eq!(resolved.interrupted, [vip()].into());
    assert!(case.resolve(2).interrupted.is_empty());
}

#[test]
fn the_gateway_before_serves_while_the_announcer_is_not_programmed() {
    let boot = |id: &str| Some(BootId(id.to_owned()));
    let mut case = case();
    case.status("s", 1, 5);
    assert_eq!(case.at(0).0, Some(node(1)));
    // Rebooted: its Lease names the boot before.
    case.nodes.entry(node(2)).or_default().boot = boot("second");
    case.status("s", 2, 6);
    let end = Some(case.start + Duration::from_secs(40));
    for seconds in [10, 39] {
        let resolved = case.resolve(seconds);
        assert_eq!(resolved.announcers.get(&vip()), Some(&node(1)));
        assert_eq!(resolved.ends, end);
    }
    case.nodes.entry(node(2)).or_default().programmed = boot("second");
    assert_eq!(case.at(39).0, Some(node(2)));
    // The plan says why nothing is routed there when it takes too long, or nobody was there before.
    case.nodes.entry(node(3)).or_default().programmed = None;
    case.status("s", 3, 7);
    assert_eq!(case.at(50).0, Some(node(2)));
    assert_eq!(case.at(80).0, Some(node(3)));
    // The node that asks programs itself.
    case.status("s", 9, 8);
    assert_eq!(case.at(90).0, Some(node(9)));
}

#[test]
fn a_gateway_that_was_rebooted_itself_is_not_held() {
    let boot = |id: &str| Some(BootId(id.to_owned()));
    let mut case = case();
    case.status("s", 1, 5);
    case.at(0);
    for rebooted in [1, 2] {
        case.nodes.entry(node(rebooted)).or_default().boot = boot("second");
    }
    case.status("s", 2, 6);
    let resolved = case.resolve(10);
    assert_eq!(resolved.announcers.get(&vip()), Some(&node(2)));
    assert!(resolved.still_programmed.is_empty());
}

#[test]
fn vips_of_services_without_the_label_are_forgotten() {
    let mut case = case();
    case.status("s", 1, 5);
    case.at(0);
    case.services.clear();
    assert_eq!(case.resolve(1), Resolved::default());
}
