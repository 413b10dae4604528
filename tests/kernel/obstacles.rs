//! What of the node itself, and of others, is in the way: found when it is there, and gone when it is mended.

use super::*;
use crate::hosts::{PODS, connect_hosts, gateway_of, prepare_gateway};
use crate::server::{Server, all_from};
use crate::states::{agent_dies_after, labelled_all};
use crate::talk::Talk;

/// What is found in a family.
async fn surroundings(kernel: &mut NodeKernel, family: Family) -> Surroundings {
    let mut observed = kernel.observe().await.unwrap();
    observed.surroundings.remove(&family).unwrap()
}

/// The same by a look at what changes without a notice; both are to find the same.
async fn found(kernel: &mut NodeKernel, family: Family) -> Surroundings {
    let by_observing = surroundings(kernel, family).await;
    let by_looking = kernel.look_again().await.remove(&family).unwrap();
    assert_eq!(by_observing, by_looking);
    by_looking
}

async fn labels(kernel: &mut NodeKernel, family: Family) -> Vec<&'static str> {
    let found = found(kernel, family).await;
    found.obstacles.iter().map(Obstacle::label).collect()
}

#[test]
fn settings_of_the_kernel_are_found() {
    in_namespace(|| async {
        let set = |name: &str, value: u8| sh(&format!("echo {value} >/proc/sys/net/{name}"));
        set("ipv4/ip_forward", 1);
        set("ipv6/conf/all/forwarding", 1);
        set("ipv4/conf/all/rp_filter", 0);
        set("ipv4/conf/eth0/rp_filter", 0);
        sh("ip route add default via 192.0.2.254; ip route add 10.244.2.0/24 via 192.0.2.12");
        let mut kernel = open(Mode::Nftables).await;
        for family in Family::ALL {
            assert_eq!(labels(&mut kernel, family).await, [""; 0]);
        }
        for (setting, bad, families, label) in [
            ("ipv4/ip_forward", 0, &[Family::V4][..], "ForwardingOff"),
            (
                "ipv6/conf/all/forwarding",
                0,
                &[Family::V6],
                "ForwardingOff",
            ),
            (
                "netfilter/nf_conntrack_tcp_loose",
                0,
                &Family::ALL,
                "StrictTracking",
            ),
        ] {
            set(setting, bad);
            for family in Family::ALL {
                let expected = families.contains(&family).then_some(label);
                let found = labels(&mut kernel, family).await;
                assert_eq!(
                    found,
                    expected.into_iter().collect::<Vec<_>>(),
                    "{setting} {family}"
                );
            }
            set(setting, 1);
        }
        set("ipv4/conf/eth0/forwarding", 0);
        let not_forwarding = found(&mut kernel, Family::V4).await.not_forwarding;
        assert_eq!(not_forwarding, ["eth0".to_owned()].into());
        set("ipv4/conf/eth0/forwarding", 1);
        // The larger value counts.
        for (all, own, is_strict) in [
            (1, 0, true),
            (0, 1, true),
            (1, 2, false),
            (2, 1, false),
            (0, 0, false),
        ] {
            set("ipv4/conf/all/rp_filter", all);
            set("ipv4/conf/eth0/rp_filter", own);
            let found = found(&mut kernel, Family::V4).await;
            assert_eq!(
                found.reverse_path.strict.contains("eth0"),
                is_strict,
                "{all} {own}"
            );
            let routes: Vec<String> = found
                .reverse_path
                .routes
                .keys()
                .map(ToString::to_string)
                .collect();
            let expected = ["0.0.0.0/0", "10.244.2.0/24", "192.0.2.0/24"];
            assert_eq!(
                routes,
                match found.reverse_path.strict.is_empty() {
                    false => &expected[..],
                    true => &[],
                }
            );
        }
        for family in Family::ALL {
            let found = found(&mut kernel, family).await;
            assert_eq!((found.obstacles, found.not_forwarding), Default::default());
        }
    });
}

async fn what_is_invalid_is_reset_while_no_connection_is_taken_up_in_its_middle(mode: Mode) {
    let mut kernel = open(mode).await;
    let loose = |value: u8| {
        sh(&format!(
            "echo {value} >/proc/sys/net/netfilter/nf_conntrack_tcp_loose"
        ))
    };
    let rules = || mode.save().matches("metaleg:strict").count();
    for (value, is_strict) in [(1, false), (0, true), (1, false)] {
        loose(value);
        let found = kernel.look_again().await;
        let is_told = |found: &Surroundings| found.obstacles.contains(&Obstacle::StrictTracking);
        assert!(found.values().all(|found| is_told(found) == is_strict));
        reach(&mut kernel, &example()).await;
        assert_eq!(rules() > 0, is_strict, "{value}");
    }
}

each_mode!(what_is_invalid_is_reset_while_no_connection_is_taken_up_in_its_middle);

#[test]
fn rules_of_others_ahead_of_ours_are_found() {
    in_namespace(|| async {
        let mut kernel = open(Mode::Nftables).await;
        reach(&mut kernel, &example()).await;
        for (ip, family, server) in [
            ("ip", Family::V4, "203.0.113.0/24"),
            ("ip -6", Family::V6, "2001:db8:9::/64"),
        ] {
            assert_eq!(surroundings(&mut kernel, family).await.rules, [].into());
            sh(&format!(
                "{ip} rule add pref 220 lookup 220
                 {ip} rule add pref 105 lookup main suppress_prefixlength 0
                 {ip} rule add pref 300 fwmark 0x200/0xf00 lookup main
                 {ip} rule add pref 400 prohibit
                 {ip} rule add pref 3000 lookup main"
            ));
            let texts = async |kernel: &mut NodeKernel| -> Vec<String> {
                let rules = surroundings(kernel, family).await.rules;
                rules.into_iter().map(|rule| rule.text).collect()
            };
            let netbird = "pref 105 lookup 254 suppress_prefixlength 0";
            let prohibit = "pref 400 prohibit";
            // strongSwan's table is there while there is nothing in it.
            assert_eq!(texts(&mut kernel).await, [netbird, prohibit]);
            sh(&format!("{ip} route add {server} dev eth0 table 220"));
            assert_eq!(
                texts(&mut kernel).await,
                [netbird, "pref 220 lookup 220", prohibit]
            );
            sh(&format!(
                "for n in 105 220 300 400 3000; do {ip} rule del pref $n; done"
            ));
            assert_eq!(texts(&mut kernel).await, [""; 0]);
        }
    });
}

#[test]
fn that_others_remove_all_of_our_rules_is_found() {
    in_namespace(|| async {
        let mut kernel = open(Mode::Nftables).await;
        reach(&mut kernel, &example()).await;
        sh("ip rule del pref 1000");
        reach(&mut kernel, &example()).await;
        let was_removed = async |kernel: &mut NodeKernel, family| {
            let found = surroundings(kernel, family).await;
            found.obstacles.contains(&Obstacle::RulesRemoved)
        };
        assert!(!was_removed(&mut kernel, Family::V4).await);
        // As systemd-networkd does.
        sh(
            "ip rule | sed -n 's/^\\([0-9]*\\):.*proto 77.*/rule del pref \\1/p' | ip -force -batch -",
        );
        assert!(was_removed(&mut kernel, Family::V4).await);
        reach(&mut kernel, &example()).await;
        assert!(was_removed(&mut kernel, Family::V4).await);
        assert!(!was_removed(&mut kernel, Family::V6).await);
        // We may.
        reach(&mut kernel, &nothing()).await;
        assert!(!was_removed(&mut kernel, Family::V6).await);
    });
}

async fn bits_of_ours_that_others_set_are_found(mode: Mode) {
    connect_hosts(mode);
    let mut kernel = open(mode).await;
    reach(&mut kernel, &labelled_all(&PODS)).await;
    let is_found = async |kernel: &mut NodeKernel| {
        let found = kernel.look_again().await;
        found
            .into_iter()
            .any(|(_, found)| found.obstacles.contains(&Obstacle::ForeignMark))
    };
    assert!(!is_found(&mut kernel).await);
    let met = || match mode {
        Mode::Nftables => nft_met_foreign(),
        Mode::IptablesNft | Mode::IptablesLegacy => mode.met("foreign").iter().sum(),
    };
    // What we mark ourselves is not meant, nor are bits that are not ours.
    set_on_arrival(mode, 0x1);
    let mut server = Server::start();
    prepare_gateway(mode);
    let vips = all_from(&Family::ALL.map(|family| vip(family, 0)).into());
    Talk::of(12).arrive(&mut server, &vips);
    assert_eq!(met(), 0);
    assert!(!is_found(&mut kernel).await);
    // A pod that is no egress pod.
    set_on_arrival(mode, 0x20_0000);
    sh(
        "ip -n pods addr add 10.244.1.20/24 dev eth0; ip -n pods addr add fd00:10:244:1::20/64 dev eth0 nodad",
    );
    let talk = Talk::of(20);
    eventually("packets", || {
        talk.send();
        met() > 0
    });
    assert!(is_found(&mut kernel).await);
}

each_mode!(bits_of_ours_that_others_set_are_found);

/// Others set a bit of all packets that come in.
fn set_on_arrival(mode: Mode, bit: u32) {
    match mode {
        Mode::Nftables => sh(&format!(
            "nft 'table inet others {{ chain c {{
                type filter hook prerouting priority -300
                meta mark set meta mark | {bit:#x}
            }}; }}'"
        )),
        Mode::IptablesNft | Mode::IptablesLegacy => {
            let set = |tool| {
                format!("{tool} -t mangle -I PREROUTING -j MARK --set-xmark {bit:#x}/{bit:#x}\n")
            };
            sh(&mode.tools().iter().map(set).collect::<String>())
        }
    };
}

fn nft_met_foreign() -> u64 {
    let chain = sh("nft list chain inet metaleg marking");
    let rule = chain.lines().find(|line| line.contains("metaleg:foreign:"));
    let (_, counter) = rule.unwrap().split_once("packets ").unwrap();
    counter.split(' ').next().unwrap().parse().unwrap()
}

/// Filters of a family.
async fn filters(kernel: &mut NodeKernel, family: Family) -> Vec<DroppingFilter> {
    found(kernel, family).await.filters.into_iter().collect()
}

async fn filters_that_drop_what_is_forwarded_are_found(mode: Mode) {
    let mut kernel = open(mode).await;
    reach(&mut kernel, &example()).await;
    for family in Family::ALL {
        assert_eq!(filters(&mut kernel, family).await, []);
    }
    for (family, tool, pods) in [
        (Family::V4, &mode.tools()[0], "10.244.0.0/16"),
        (Family::V6, &mode.tools()[1], "fd00:10:244::/48"),
    ] {
        let other = Family::ALL
            .into_iter()
            .find(|other| *other != family)
            .unwrap();
        let pod = pod(family, 12);
        sh(&format!("{tool} -P FORWARD DROP"));
        let found = filters(&mut kernel, family).await;
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].chain.starts_with("chain FORWARD of iptables in "),
            "{found:?}"
        );
        assert!(!found[0].accepts(pod) && !found[0].is_conditional);
        assert_eq!(filters(&mut kernel, other).await, []);
        sh(&format!(
            "{tool} -A FORWARD -i cbr0 -j ACCEPT; {tool} -A FORWARD -o cbr0 -j ACCEPT"
        ));
        let found = filters(&mut kernel, family).await;
        assert!(!found[0].accepts(pod) && found[0].is_conditional);
        // As flannel's.
        sh(&format!(
            "{tool} -N F; {tool} -A F -s {pods} -m comment --comment 'a b' -j ACCEPT
             {tool} -A F -d {pods} -j ACCEPT; {tool} -A FORWARD -j F"
        ));
        assert!(filters(&mut kernel, family).await[0].accepts(pod));
        sh(&format!("{tool} -P FORWARD ACCEPT"));
        assert_eq!(filters(&mut kernel, family).await, []);
    }
}

each_mode!(filters_that_drop_what_is_forwarded_are_found);

#[test]
fn filters_of_nftables_are_found() {
    in_namespace(|| async {
        let mut kernel = open(Mode::Nftables).await;
        sh("nft 'table inet firewall { chain forward {
                type filter hook forward priority 0; policy drop
                ct state established,related accept
            }; }'");
        for family in Family::ALL {
            let found = filters(&mut kernel, family).await;
            assert_eq!(
                found[0].chain,
                "chain forward of nftables table inet firewall"
            );
            assert!(!found[0].accepts(pod(family, 12)));
        }
        sh("nft add rule inet firewall forward ip saddr 10.244.0.0/16 accept");
        assert!(filters(&mut kernel, Family::V4).await[0].accepts(pod(Family::V4, 12)));
        assert!(!filters(&mut kernel, Family::V6).await[0].accepts(pod(Family::V6, 12)));
        sh("nft delete table inet firewall");
        for family in Family::ALL {
            assert_eq!(filters(&mut kernel, family).await, []);
        }
    });
}

/// A state in which packets of all pods are accepted.
pub(crate) fn accepting(mut state: KernelState) -> KernelState {
    for (family, pods) in [
        (Family::V4, "10.244.0.0/16"),
        (Family::V6, "fd00:10:244::/48"),
    ] {
        let sources = Accepted::Sources([pods.parse().unwrap()].into());
        state.accepted.insert(family, sources);
    }
    state
}

async fn what_is_accepted_passes_a_policy_of_drop_on_pods_node_and_gateway(mode: Mode) {
    connect_hosts(mode);
    let drop_all = || {
        for tool in mode.tools() {
            sh(&format!("{tool} -P FORWARD DROP"));
        }
    };
    let mut server = Server::start();
    drop_all();
    let mut kernel = open(mode).await;
    reach(&mut kernel, &labelled_all(&PODS)).await;
    on("gateway", || {
        drop_all();
        agent_dies_after(async || reach(&mut open(mode).await, &gateway_of(&[12])).await);
    });
    for last in PODS {
        Talk::of(last).send();
    }
    server.sees_nothing();
    reach(&mut kernel, &accepting(labelled_all(&PODS))).await;
    Talk::of(12).send();
    server.sees_nothing();
    on("gateway", || {
        agent_dies_after(async || {
            reach(&mut open(mode).await, &accepting(gateway_of(&[12]))).await;
        });
    });
    let vips_of = |number| Family::ALL.map(|family| vip(family, number));
    let all = all_from(&[vips_of(0), vips_of(1)].concat().into_iter().collect());
    for (number, last) in PODS.into_iter().enumerate() {
        let vips = all_from(&vips_of(number).into());
        let seen = Talk::of(last).arrive(&mut server, &vips);
        // What one pod had begun may come while another one sends.
        assert!(seen.is_superset(&vips) && seen.is_subset(&all), "{seen:?}");
        // Answers pass.
        Talk::connected(last);
    }
    for family in Family::ALL {
        let found = filters(&mut kernel, family).await;
        assert!(
            found.iter().all(|filter| filter.accepts(pod(family, 12))),
            "{found:?}"
        );
    }
}

each_mode!(what_is_accepted_passes_a_policy_of_drop_on_pods_node_and_gateway);

async fn what_accepts_is_mended_and_goes_with_us(mode: Mode) {
    let [tool, _] = mode.tools();
    let others = format!("{tool} -A FORWARD -s 203.0.113.1 -j DROP");
    sh(&others);
    let before = sh(&format!("{tool}-save -t filter | grep FORWARD"));
    let mut kernel = open(mode).await;
    let wanted = accepting(example());
    reach(&mut kernel, &wanted).await;
    let forward = || sh(&format!("{tool} -S FORWARD"));
    // What others drop stays dropped.
    let place = |text: &str| {
        forward()
            .lines()
            .position(|line| line.contains(text))
            .unwrap()
    };
    assert!(place("203.0.113.1") < place("METALEG-ACCEPT"));
    for damage in [
        "-F FORWARD",
        "-D METALEG-ACCEPT 1",
        "-A FORWARD -j METALEG-ACCEPT",
        "-A METALEG-ACCEPT -j ACCEPT",
        "-F METALEG-ACCEPT",
    ] {
        sh(&format!("{tool} {damage}"));
        let damaged = observe(&mut kernel).await.accepted;
        assert_eq!(damaged[&Family::V4], Accepted::Damaged, "{damage}");
        reach(&mut kernel, &wanted).await;
        let jumps = forward().matches("METALEG-ACCEPT").count();
        assert_eq!(jumps, 1, "{damage}");
    }
    reach(&mut kernel, &nothing()).await;
    sh(&others);
    assert_eq!(sh(&format!("{tool}-save -t filter | grep FORWARD")), before);
}

each_mode!(what_accepts_is_mended_and_goes_with_us);
