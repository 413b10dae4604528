//! Pods that say nothing are made to: a gateway that is new learns of their connections.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;

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

/// What the steps say to the pod, and what it has said of itself before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silence {
    /// Its way has changed.
    Rerouted,
    /// It has said all that it has to say, and waits for the answer.
    HalfClosed,
    /// Its connections were forgotten on this node, too, and what it is asked first is lost.
    Forgotten,
}

/// A gateway that is new knows nothing of connections on which only the server has something to say.
async fn a_silent_pod_speaks(mode: Mode, silence: Silence) {
    prepare_gateway(mode);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    let mut kernel = open(mode).await;
    // Known as excluded: what goes there is not looked at.
    observe(&mut kernel).await;
    let talk = Talk::connected(12);
    let accepted = server.accept();
    talk.send_tcp();
    if silence == Silence::HalfClosed {
        for (pod, mut server) in talk.tcp.iter().zip(&accepted) {
            pod.shutdown(Shutdown::Write).unwrap();
            let mut all = Vec::new();
            server.read_to_end(&mut all).unwrap();
        }
        let is_known = |family: &str| sh(&format!("conntrack -L -f {family} -p tcp 2>/dev/null"));
        eventually("acknowledgements of the end", || {
            ["ipv4", "ipv6"]
                .map(is_known)
                .iter()
                .all(|known| known.contains("CLOSE_WAIT"))
        });
    }
    talk.wait_for_acknowledgements();
    on("gateway", || sh("conntrack -F 2>/dev/null"));
    server.seen();
    // Nothing by itself.
    server.sees_nothing();

    let pods = Family::ALL.map(|family| pod(family, 12));
    let mut steps = pods.map(ConnectionStep::ElicitAck).to_vec();
    if silence == Silence::Forgotten {
        let lose_first = |family: &str, server: &str| {
            format!(
                "{family} saddr {server} tcp flags & (syn | ack) == syn \
                 limit rate 1/day burst 1 packets counter drop"
            )
        };
        let [v4, v6] = [("ip", "198.51.100.10"), ("ip6", "2001:db8:2::10")]
            .map(|(family, server)| lose_first(family, server));
        on("pods", || {
            sh(&format!(
                "nft 'table inet lossy {{
                    chain arrivals {{ type filter hook input priority 0
                        {v4}
                        {v6}
                    }}
                }}'"
            ))
        });
        steps.splice(0..0, pods.map(ConnectionStep::Forget));
    }
    let steps: Vec<Step> = steps.into_iter().map(Step::Connection).collect();
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

async fn a_pod_that_waits_for_an_answer_speaks(mode: Mode) {
    connect_hosts(mode);
    a_silent_pod_speaks(mode, Silence::HalfClosed).await;
}

each_mode!(a_pod_that_waits_for_an_answer_speaks);

async fn a_pod_whose_connections_were_forgotten_is_asked_again(mode: Mode) {
    connect_hosts(mode);
    a_silent_pod_speaks(mode, Silence::Forgotten).await;
}

each_mode!(a_pod_whose_connections_were_forgotten_is_asked_again);

/// A pod whose interface has just gone costs no other its acknowledgement.
async fn an_interface_that_is_down_keeps_no_other_pod_silent(mode: Mode) {
    // Of a lower number than that of the other pods: its turn comes first.
    sh("ip link add gone type veth peer name gone-peer");
    let gone = Family::ALL.map(|family| pod(family, 99));
    for (pod, outside) in gone.iter().zip(Family::ALL.map(outside)) {
        sh(&format!(
            "ip neigh add {pod} lladdr 02:00:00:00:00:99 dev gone nud permanent
             conntrack -I -p tcp --state ESTABLISHED -s {pod} -d {outside} --sport 1 --dport 2 -t 600 2>/dev/null"
        ));
    }
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    let mut kernel = open(mode).await;
    let talk = Talk::connected(12);
    talk.send_tcp();
    talk.wait_for_acknowledgements();
    server.seen();
    let pods = Family::ALL.map(|family| pod(family, 12)).into_iter();
    let steps = pods.chain(gone).map(ConnectionStep::ElicitAck);
    let steps: Vec<Step> = steps.map(Step::Connection).collect();
    apply(&mut kernel, &steps).await;
    let expected: Seen = Family::ALL
        .map(|family| (Carried::Tcp, vip(family, 0)))
        .into();
    let mut seen = Seen::new();
    eventually("acknowledgements of the pod", || {
        seen.extend(server.seen());
        seen.is_superset(&expected)
    });
    assert!(kernel.challenges().failures() > 0);
}

each_mode!(an_interface_that_is_down_keeps_no_other_pod_silent: nftables);

async fn a_silent_pod_on_a_link_speaks(mode: Mode) {
    connect_hosts(mode);
    a_silent_pod_speaks(mode, Silence::Rerouted).await;
}

each_mode!(a_silent_pod_on_a_link_speaks);

async fn a_silent_pod_on_a_bridge_speaks(mode: Mode) {
    connect_hosts(mode);
    put_pods_on_a_bridge();
    a_silent_pod_speaks(mode, Silence::Rerouted).await;
}

each_mode!(a_silent_pod_on_a_bridge_speaks);

/// Where no node takes up a connection in its middle, a gateway that is new cannot let it go on: it ends at once, as soon as
/// the pod says something or is made to.
async fn a_pod_is_reset_where_no_connection_is_taken_up(mode: Mode) {
    const STRICT: &str = "sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0";
    connect_hosts(mode);
    sh(STRICT);
    on("gateway", || sh(STRICT));
    prepare_gateway(mode);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    let mut kernel = open(mode).await;
    observe(&mut kernel).await;
    for is_silent in [false, true] {
        let talk = Talk::connected(12);
        let accepted = server.accept();
        talk.send_tcp();
        talk.wait_for_acknowledgements();
        on("gateway", || sh("conntrack -F 2>/dev/null"));
        server.seen();
        if is_silent {
            let pods = Family::ALL.map(|family| pod(family, 12));
            let steps = pods.map(|pod| Step::Connection(ConnectionStep::ElicitAck(pod)));
            apply(&mut kernel, &steps).await;
        } else {
            talk.send_tcp();
        }
        for mut stream in &talk.tcp {
            let mut told = None;
            eventually("an end", || {
                let heard = stream.read(&mut [0; 4]);
                told = heard.err().map(|error| error.kind());
                told != Some(ErrorKind::WouldBlock)
            });
            assert_eq!(told, Some(ErrorKind::ConnectionReset), "{is_silent}");
        }
        server.sees_nothing();
        drop(accepted);
    }
}

each_mode!(a_pod_is_reset_where_no_connection_is_taken_up);
