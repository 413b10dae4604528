//! What a server outside sees while agents die and others go on.

use super::*;
use crate::hosts::{connect_hosts, prepare_gateway};
use crate::server::{Server, all_from};
use crate::states::{agent_dies_after, labelled, ordinary};
use crate::talk::Talk;

async fn no_packet_leaves_with_another_source(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    let mut deaths = 0;
    for (last, number) in [(12, 0), (13, 1)] {
        let of_node: BTreeSet<IpAddr> = Family::ALL.map(node).into();
        let of_service: BTreeSet<IpAddr> = Family::ALL.map(|f| vip(f, number)).into();
        let unlabelled = (ordinary(), of_node);
        let labelled = (labelled(last), of_service);
        for ((from, source_before), (to, source_after)) in
            [(&unlabelled, &labelled), (&labelled, &unlabelled)]
        {
            let (before, after) = (all_from(source_before), all_from(source_after));
            let right = &before | &after;
            let steps = diff(from, to);
            for length in 0..=steps.len() {
                let done = &steps[..length];
                let said = format!("dead after {:?}", done.last());
                server.hang_up();
                reach_and_die(mode, from);
                sh("conntrack -F 2>/dev/null; ip netns exec gateway conntrack -F 2>/dev/null");
                server.seen_in_between();
                let talk = Talk::connected(last);
                assert_eq!(talk.arrive(&mut server, &before), before, "{said}");

                agent_dies_after(async || apply(&mut start(mode).await.0, done).await);
                talk.send();
                let seen = server.seen_in_between();
                assert!(seen.is_subset(&right), "{seen:?}, {said}");
                agent_dies_after(async || {
                    let (mut next, found) = start(mode).await;
                    talk.send();
                    apply(&mut next, &diff(&found, to)).await;
                });
                let seen = server.seen_in_between();
                assert!(
                    seen.is_subset(&right),
                    "{seen:?}, while the next one starts, {said}"
                );
                assert_eq!(talk.arrive(&mut server, &after), after, "{said}");
                deaths += 1;
            }
        }
    }
    println!("{deaths} deaths");
}

each_mode!(no_packet_leaves_with_another_source);
