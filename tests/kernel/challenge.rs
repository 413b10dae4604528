//! Pods that say nothing are made to: a gateway that is new learns of their connections.

use std::io::Write as _;

use super::*;
use crate::hosts::{connect_hosts, prepare_gateway};
use crate::server::{Carried, Seen, Server};
use crate::states::labelled;
use crate::talk::Talk;

/// The pods of this node are on a bridge, as most CNI plugins have them.
fn put_pods_on_a_bridge() {
    sh("ip link set pods down; ip link set pods name pod; ip link add pods type bridge; ip link set pod master pods
        ip addr flush dev pod; ip link set pod up; ip link set pods up
        ip addr add 10.244.1.1/24 dev pods; ip addr add fd00:10:244:1::1/64 dev pods nodad
        sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1 2>/dev/null || true");
}

/// A gateway that is new knows nothing of connections on which only the server has something to say.
async fn a_silent_pod_speaks(mode: Mode) {
    prepare_gateway(mode);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    let mut kernel = open(mode).await;
    let talk = Talk::connected(12);
    let accepted = server.accept();
    talk.send_tcp();
    talk.wait_for_acknowledgements();
    on("gateway", || sh("conntrack -F 2>/dev/null"));
    server.seen();
    // Nothing by itself.
    server.sees_nothing();

    let pods = Family::ALL.map(|family| pod(family, 12));
    let steps = pods.map(|pod| Step::Connection(ConnectionStep::ElicitAck(pod)));
    apply(&mut kernel, &steps).await;
    let expected: Seen = Family::ALL
        .map(|family| (Carried::Tcp, vip(family, 0)))
        .into();
    let mut seen = Seen::new();
    eventually("acknowledgements of the pod", || {
        seen.extend(server.seen());
        seen.is_superset(&expected)
    });
    assert_eq!(seen, expected);
    // So the new gateway knows the way back.
    for mut stream in &accepted {
        stream.write_all(b"late").unwrap();
    }
    talk.hear(b"late");
    // What the pod said was no answer: nothing began at the server.
    for (name, pod) in ["ipv4", "ipv6"].into_iter().zip(pods) {
        let all = sh(&format!("conntrack -L -f {name} -p tcp 2>/dev/null"));
        let opened_by = all
            .split_whitespace()
            .find_map(|word| word.strip_prefix("src="));
        let pod = pod.to_string();
        assert_eq!((all.lines().count(), opened_by), (1, Some(&*pod)), "{all}");
    }
}

async fn a_silent_pod_on_a_link_speaks(mode: Mode) {
    connect_hosts(mode);
    a_silent_pod_speaks(mode).await;
}

each_mode!(a_silent_pod_on_a_link_speaks);

async fn a_silent_pod_on_a_bridge_speaks(mode: Mode) {
    connect_hosts(mode);
    put_pods_on_a_bridge();
    a_silent_pod_speaks(mode).await;
}

each_mode!(a_silent_pod_on_a_bridge_speaks);
