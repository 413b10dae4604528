//! What another backend or an earlier release left is taken over.

use std::time::Instant;

use super::*;

async fn another_backend_takes_over_and_leaves_nothing_of_the_other(mode: Mode) {
    for other in Mode::ALL.into_iter().filter(|other| *other != mode) {
        let mut kernel = open(other).await;
        reach(&mut kernel, &example()).await;
        for tool in other.tools() {
            sh(&format!("{tool} -t mangle -X KUBE-IPTABLES-HINT"));
        }
        let mut kernel = open(mode).await;
        let found = kernel.observe().await.unwrap().state;
        let left: BTreeSet<Remnant> = match (other, mode) {
            (Mode::Nftables, _) => [Remnant::Nftables].into(),
            (Mode::IptablesNft, Mode::Nftables) => [Remnant::IptablesNft, Remnant::Ipsets].into(),
            (Mode::IptablesLegacy, Mode::Nftables) => {
                [Remnant::IptablesLegacy, Remnant::Ipsets].into()
            }
            (Mode::IptablesNft, _) => [Remnant::IptablesNft].into(),
            (Mode::IptablesLegacy, _) => [Remnant::IptablesLegacy].into(),
        };
        assert_eq!(found.remnants, left);
        let steps = diff(&found, &example());
        let at = |wanted: fn(&Step) -> bool| steps.iter().position(wanted).unwrap();
        let installed = at(|step| matches!(step, Step::Firewall(FirewallStep::Install(..))));
        let removed = at(|step| matches!(step, Step::RemoveRemnant(_)));
        assert!(installed < removed, "{steps:?}");
        reach(&mut kernel, &example()).await;
        assert_is_only(mode);
        reach(&mut kernel, &nothing()).await;
        for tool in mode.tools() {
            sh(&format!("{tool} -t mangle -X KUBE-IPTABLES-HINT"));
        }
    }
}

each_mode!(another_backend_takes_over_and_leaves_nothing_of_the_other);

/// Nothing of another backend is there.
fn assert_is_only(mode: Mode) {
    let own_table = sh("nft list tables").contains("table inet metaleg\n");
    assert_eq!(own_table, mode == Mode::Nftables);
    for iptables in [Mode::IptablesNft, Mode::IptablesLegacy] {
        let has_chains = iptables.save().contains("METALEG-NAT");
        assert_eq!(has_chains, iptables == mode, "{iptables:?}");
    }
    let has_sets = sh("ipset list -n").contains("METALEG");
    assert_eq!(has_sets, mode != Mode::Nftables);
}

/// The tools of a mode fail.
fn break_tools(variant: &str) {
    sh(&format!(
        "mount --bind /bin/false $(readlink -f $(command -v iptables-{variant}-save))"
    ));
}

#[test]
fn a_tool_that_fails_keeps_nothing_from_being_seen_by_other_means() {
    in_namespace(|| async {
        reach(&mut open(Mode::IptablesNft).await, &example()).await;
        sh("iptables-legacy -t nat -A POSTROUTING -j MASQUERADE");
        break_tools("nft");
        break_tools("legacy");
        let mut kernel = open_backend(FirewallBackend::Nftables).await;
        let observed = kernel.observe().await.unwrap();
        let left = [Remnant::IptablesNft, Remnant::Ipsets].into();
        assert_eq!(observed.state.remnants, left);
        let unseen: Vec<&String> = observed.unseen.iter().collect();
        let [unseen] = unseen[..] else {
            panic!("{unseen:?}");
        };
        let legacy = "cannot look for the chains of the iptables backend in legacy mode";
        assert!(unseen.starts_with(legacy), "{unseen}");
        // It is looked for until it is seen.
        sh("umount $(readlink -f $(command -v iptables-nft-save))
            umount $(readlink -f $(command -v iptables-legacy-save))");
        reach(&mut kernel, &example()).await;
        assert_is_only(Mode::Nftables);
        assert_eq!(kernel.observe().await.unwrap().unseen, BTreeSet::new());
    });
}

/// kube-proxy has ten thousands of rules. Nobody's rules are read but by number.
async fn a_start_beside_many_rules_of_others(mode: Mode) {
    let mut rules = String::from("*nat\n");
    for n in 0..17_500 {
        rules += &format!(":KUBE-SVC-{n} - [0:0]\n");
    }
    for n in 0..17_500 {
        rules += &format!(
            "-A KUBE-SVC-{n} -d 10.96.0.1/32 -p tcp -m comment --comment \"ns/service-{n} cluster IP\" -m tcp --dport 443 -j MARK --set-xmark 0x4000/0x4000\n"
        );
    }
    rules += "COMMIT\n";
    std::fs::write("/run/rules", &rules).unwrap();
    for tool in mode.tools() {
        let rules = match tool.starts_with("ip6") {
            true => rules.replace("10.96.0.1/32", "fd00:10:96::1/128"),
            false => rules.clone(),
        };
        std::fs::write("/run/rules", rules).unwrap();
        sh(&format!("{tool}-restore --noflush /run/rules"));
    }
    let started = Instant::now();
    let mut kernel = open(mode).await;
    let opened = started.elapsed();
    kernel.observe().await.unwrap();
    let first = started.elapsed() - opened;
    let started = Instant::now();
    kernel.observe().await.unwrap();
    println!(
        "{mode:?} beside 35,000 rules of others: opened in {opened:?}, read first in {first:?}, then in {:?}",
        started.elapsed()
    );
}

each_mode!(a_start_beside_many_rules_of_others);

/// What a release before 0.3 makes for one Service with a local pod and a remote gateway.
fn make_earlier(mode: Mode) {
    for (tool, family, set, pod, vip, gateway, ip) in [
        (
            mode.tools()[0].clone(),
            "inet",
            "METALEG-SRC-0a1b2c3d",
            "10.244.1.11",
            "192.0.2.200",
            "192.0.2.12",
            "ip",
        ),
        (
            mode.tools()[1].clone(),
            "inet6",
            "inet6:METALEG-SRC-0a1b2c3d",
            "fd00:10:244:1::11",
            "2001:db8:1::c8",
            "2001:db8:1::12",
            "ip -6",
        ),
    ] {
        let excluded = format!("METALEG-EXCLUDE-DST-{}", if ip == "ip" { 4 } else { 6 });
        let reject = if ip == "ip" {
            "icmp-port-unreachable"
        } else {
            "icmp6-port-unreachable"
        };
        sh(&format!(
            "ipset create {set} hash:ip family {family}; ipset add {set} {pod}
             ipset create {excluded} hash:net family {family}
             {tool} -t mangle -N METALEG-RT-MARK
             {tool} -t mangle -I METALEG-RT-MARK -m set --match-set {excluded} dst -j RETURN
             {tool} -t mangle -A METALEG-RT-MARK -m set --match-set {set} src -j MARK --set-xmark 0x100000/0xf00000
             {tool} -t mangle -A PREROUTING -j METALEG-RT-MARK
             {tool} -N METALEG-REJECT; {tool} -I FORWARD -j METALEG-REJECT
             {tool} -A METALEG-REJECT -m set --match-set {set} src -j REJECT --reject-with {reject}
             {tool} -t nat -N METALEG-SNAT; {tool} -t nat -I POSTROUTING -j METALEG-SNAT
             {tool} -t nat -A METALEG-SNAT -m set --match-set {set} src -j SNAT --to {vip}
             {tool} -t nat -I POSTROUTING -m mark ! --mark 0x0/0xf00000 -j RETURN
             {ip} rule add fwmark 0x100000/0xf00000 lookup 100000 protocol 0
             {ip} route add default via {gateway} table 100000 protocol boot"
        ));
    }
}

fn an_earlier_release_is_taken_over(of: Mode, by: Mode) {
    in_namespace(move || async move {
        make_earlier(of);
        // Not of that release: made by hand, and another pair of mark and table.
        sh(
            "ip rule add fwmark 0x100000/0xf00000 lookup 100009 pref 5000 protocol static
            ip rule add fwmark 0x200000/0xf00000 lookup 100007 pref 5001 protocol 0",
        );
        let mut kernel = open(by).await;
        let observed = kernel.observe().await.unwrap();
        assert_eq!(observed.state.remnants, [Remnant::EarlierRelease].into());
        reach(&mut kernel, &example()).await;
        let left = format!("{}{}", of.save(), sh("ipset list -n; ip rule; ip -6 rule"));
        for trace in [
            "RT-MARK",
            "REJECT",
            "SNAT\n",
            "-SRC-",
            "EXCLUDE-DST",
            "j RETURN\n-A",
        ] {
            assert!(
                !left.contains(&format!("METALEG-{trace}")),
                "{trace} in {left}"
            );
        }
        assert!(
            !left.contains("-m mark ! --mark 0x0/0xf00000 -j RETURN"),
            "{left}"
        );
        // What is left in that table is ours.
        let others = "ip rule | grep 'lookup 100000' | grep -v 'proto 77' || true
            ip route show table 100000 | grep -v 'proto 77' || true
            ip -6 route show table 100000 | grep -v 'proto 77' || true";
        assert_eq!(sh(others), "");
        assert_eq!(sh("ip rule | grep -c -e 100009 -e 100007"), "2\n");
        assert_eq!(
            kernel.observe().await.unwrap().state.remnants,
            BTreeSet::new()
        );
    });
}

#[test]
fn an_earlier_release_is_taken_over_in_every_combination() {
    for of in [Mode::IptablesNft, Mode::IptablesLegacy] {
        for by in [Mode::Nftables, of] {
            an_earlier_release_is_taken_over(of, by);
        }
    }
}
