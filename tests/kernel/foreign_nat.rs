//! NAT chains of others that may come before ours.

use super::*;
use crate::hosts::{PODS, connect_hosts, prepare_gateway};
use crate::server::{Server, all_from};
use crate::states::labelled_all;
use crate::talk::Talk;

async fn nat_of_others_that_may_come_first_is_told(mode: Mode) {
    let told: &[&str] = match mode {
        Mode::Nftables => &["chain early of nftables table ip others"],
        Mode::IptablesNft => &[
            "chain POSTROUTING of iptables in legacy mode",
            "chain early of nftables table ip others",
            "chain late of nftables table inet cni",
        ],
        Mode::IptablesLegacy => &[
            "chain CNI-1 of iptables in nf_tables mode",
            "chain early of nftables table ip others",
            "chain late of nftables table inet cni",
        ],
    };
    let mut kernel = open(mode).await;
    sh("nft 'table ip others { chain early { type nat hook postrouting priority 50; masquerade; }; }'
        nft 'table inet cni { chain late { type nat hook postrouting priority 100; masquerade; }; }'
        nft 'table ip kube-proxy { chain p { type nat hook postrouting priority 100; masquerade; }; }'");
    if mode != Mode::IptablesLegacy {
        sh("iptables-legacy -t nat -A POSTROUTING -j MASQUERADE");
    }
    sh("iptables-nft -t nat -N CNI-1; iptables-nft -t nat -A CNI-1 -j MASQUERADE
        iptables-nft -t nat -N KUBE-POSTROUTING; iptables-nft -t nat -A KUBE-POSTROUTING -j MASQUERADE");
    reach(&mut kernel, &example()).await;
    let observed = kernel.observe().await.unwrap();
    for (family, found) in &observed.surroundings {
        let rivals = found
            .obstacles
            .iter()
            .filter_map(|obstacle| match obstacle {
                Obstacle::ForeignNat(chain, _) => Some(chain.as_str()),
                _ => None,
            });
        // That table is of IPv4 alone.
        let told = told.iter().copied();
        let told = told.filter(|chain| *family == Family::V4 || !chain.contains(" ip "));
        assert!(rivals.eq(told), "{family}: {found:?}");
    }
}

each_mode!(nat_of_others_that_may_come_first_is_told);

/// A connection has the translation of the chain that comes first: with nftables what is not ours does not leave.
#[test]
fn what_others_translate_does_not_leave() {
    in_namespace(|| async {
        connect_hosts(Mode::Nftables);
        prepare_gateway(Mode::Nftables);
        let mut server = Server::start();
        let mut kernel = open(Mode::Nftables).await;
        reach(&mut kernel, &labelled_all(&PODS)).await;
        for (priority, last) in [50, 94]
            .into_iter()
            .flat_map(|p| PODS.map(|last| (p, last)))
        {
            sh(&format!(
                "nft 'table inet others {{ chain c {{
                    type nat hook postrouting priority {priority}
                    ip saddr 10.244.0.0/16 masquerade
                    ip6 saddr fd00:10:244::/48 masquerade
                }}; }}'"
            ));
            let before = Mode::Nftables.met("leak");
            let talk = Talk::of(last);
            eventually("packets", || {
                talk.send();
                let met = Mode::Nftables.met("leak");
                met.iter()
                    .zip(before)
                    .all(|(now, before)| *now >= before + 3)
            });
            server.sees_nothing();
            sh("nft delete table inet others; conntrack -F 2>/dev/null");
            let number = PODS.iter().position(|pod| *pod == last).unwrap();
            let vips = all_from(&Family::ALL.map(|family| vip(family, number)).into());
            assert_eq!(Talk::of(last).arrive(&mut server, &vips), vips);
        }
    });
}
