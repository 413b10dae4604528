//! What comes to pods from outside, and what passes a node between others: what is no rest of a pod's own connection goes
//! on as without us.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use super::*;
use crate::conntrack::{PORTLESS, raw_socket};
use crate::hosts::{add_gateway, connect_hosts, gateway_of, prepare_gateway, route_first_vip_to};
use crate::namespace::PATIENCE;
use crate::server::{Carried, Seen, Server, all_from};
use crate::states::{NODE_MAC, agent_dies_after, labelled};
use crate::talk::{Talk, datagrams};

fn of(carried: Carried, source: impl Fn(Family) -> IpAddr) -> Seen {
    Family::ALL.map(|family| (carried, source(family))).into()
}

fn first_vip(family: Family) -> IpAddr {
    vip(family, 0)
}

fn the_pod(family: Family) -> IpAddr {
    pod(family, 12)
}

/// How many packets that another node handed over were dropped.
fn dropped_of_nodes(mode: Mode) -> [u64; 2] {
    match mode {
        Mode::Nftables => mode.met("astray"),
        Mode::IptablesNft | Mode::IptablesLegacy => mode.met(&format!("node={NODE_MAC}")),
    }
}

fn are_more(now: [u64; 2], before: [u64; 2]) -> bool {
    now.iter().zip(before).all(|(now, before)| *now > before)
}

/// The pod's node has lost an entry that the gateway has: a protocol in which any packet may be the first.
async fn the_rest_of_a_flow_begins_none(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    let pods = on("pods", || Family::ALL.map(the_pod).map(datagrams));
    let say = |server: &mut Server| {
        let expected = of(Carried::Udp, first_vip);
        let mut seen = Seen::new();
        eventually("packets of the pod", || {
            pods.iter().for_each(|pod| drop(pod.send(b"word")));
            seen.extend(server.seen());
            seen.is_superset(&expected)
        });
        assert_eq!(seen, expected);
    };
    say(&mut server);
    let peers = server.udp.each_ref().map(|server| {
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        server.recv_from(&mut [0; 4]).unwrap().1
    });
    assert_eq!(
        peers.map(|peer| peer.ip()),
        Family::ALL.map(first_vip),
        "what the server hears from"
    );
    let answer = |server: &Server| {
        for (server, peer) in server.udp.iter().zip(peers) {
            server.send_to(b"late", peer).unwrap();
        }
    };

    sh("conntrack -F 2>/dev/null");
    let before = dropped_of_nodes(mode);
    answer(&server);
    eventually("late packets", || are_more(dropped_of_nodes(mode), before));
    server.seen();
    say(&mut server);
    answer(&server);
    for pod in &pods {
        pod.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(pod.recv(&mut [0; 4]).unwrap(), 4);
    }
}

each_mode!(the_rest_of_a_flow_begins_none);

async fn the_rest_of_a_flow_without_ports_begins_none(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    for (protocol, packet) in PORTLESS {
        let sockets = |of: fn(Family) -> IpAddr| Family::ALL.map(|f| raw_socket(protocol, of(f)));
        let pods = on("pods", || sockets(the_pod));
        let servers = on("outside", || sockets(outside));
        let expected = of(Carried::Other(u64::from(protocol)), first_vip);
        let say = |server: &mut Server| {
            let mut seen = Seen::new();
            eventually("packets of the pod", || {
                for (socket, family) in pods.iter().zip(Family::ALL) {
                    let to = SocketAddr::new(outside(family), 0);
                    socket.send_to(&packet, &to.into()).unwrap();
                }
                seen.extend(server.seen());
                seen.is_superset(&expected)
            });
            assert_eq!(seen, expected, "protocol {protocol}");
        };
        say(&mut server);
        sh("conntrack -F 2>/dev/null");
        let before = dropped_of_nodes(mode);
        for (socket, family) in servers.iter().zip(Family::ALL) {
            let to = SocketAddr::new(first_vip(family), 0);
            socket.send_to(&packet, &to.into()).unwrap();
        }
        eventually("late packets", || are_more(dropped_of_nodes(mode), before));
        server.seen();
        say(&mut server);
    }
}

each_mode!(the_rest_of_a_flow_without_ports_begins_none);

/// Straight to the pod's own address, by nobody who is a node.
async fn what_begins_outside_is_answered_as_it_came(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    let pods = on("pods", || {
        Family::ALL.map(|family| UdpSocket::bind((the_pod(family), 9)).unwrap())
    });
    let expected = of(Carried::Udp, the_pod);
    let ask = |server: &mut Server| {
        for (server, pod) in server.udp.iter().zip(&pods) {
            server.send_to(b"word", pod.local_addr().unwrap()).unwrap();
        }
        for pod in &pods {
            pod.set_read_timeout(Some(PATIENCE)).unwrap();
            let (_, peer) = pod.recv_from(&mut [0; 4]).unwrap();
            pod.send_to(b"word", peer).unwrap();
        }
        let mut seen = Seen::new();
        eventually("answers of the pod", || {
            seen.extend(server.seen());
            seen.is_superset(&expected)
        });
        assert_eq!(seen, expected);
    };
    ask(&mut server);
    // A new agent looks at everything, and ends no conversation of others.
    agent_dies_after(async || {
        let mut kernel = open(mode).await;
        let found = kernel.observe().await.unwrap().state;
        assert!(found.doubt);
        apply(&mut kernel, &diff(&found, &labelled(12))).await;
    });
    for (pod, server) in pods.iter().zip(&server.udp) {
        pod.send_to(b"word", server.local_addr().unwrap()).unwrap();
    }
    let mut seen = Seen::new();
    eventually("more of the pod", || {
        seen.extend(server.seen());
        seen.is_superset(&expected)
    });
    assert_eq!(seen, expected);
    // This node has lost the entry, and the client goes on.
    sh("conntrack -F 2>/dev/null");
    ask(&mut server);
}

each_mode!(what_begins_outside_is_answered_as_it_came);

/// A connection from outside, and the pod's end of it.
fn connect(to: SocketAddr, listener: &TcpListener) -> [TcpStream; 2] {
    let client = on("outside", || {
        TcpStream::connect_timeout(&to, PATIENCE).unwrap()
    });
    let (pod, _) = listener.accept().unwrap();
    for stream in [&client, &pod] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    [client, pod]
}

/// This node knows nothing of it any more: the timeout of its entry is shorter than the client's patience.
async fn a_connection_from_outside_goes_on_in_its_middle(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    reach_and_die(mode, &labelled(12));
    for family in Family::ALL {
        let address = SocketAddr::new(the_pod(family), 80);
        let listener = on("pods", || TcpListener::bind(address).unwrap());
        let [mut client, mut pod] = connect(address, &listener);
        sh("conntrack -F 2>/dev/null");
        let mut word = [0; 4];
        client.write_all(b"late").unwrap();
        pod.read_exact(&mut word).unwrap();
        pod.write_all(b"late").unwrap();
        client.read_exact(&mut word).unwrap();
    }
}

each_mode!(a_connection_from_outside_goes_on_in_its_middle);

/// Who announces a VIP has changed, and another backend is chosen: the client is told at once, and connects again. It may
/// come by way of another node.
async fn the_middle_of_a_services_connection_is_reset_by_the_pod(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    reach_and_die(mode, &labelled(13));
    sh("ip -n gateway -6 route add 2001:db8:1:ffff:ffff:ffff:ffff:ffff via 2001:db8:1::11");
    for by_a_node in [false, true] {
        for (tool, family) in mode.tools().iter().zip(Family::ALL) {
            let (vip, backend) = (vip(family, 1), pod(family, 13));
            let hop = match by_a_node {
                false => node(family),
                true => gateway(family),
            };
            sh(&format!("ip -n outside route replace {vip} via {hop}"));
            let serve_by = |port| {
                let backend = SocketAddr::new(backend, port);
                sh(&format!(
                    "{tool} -t nat -F PREROUTING
                     {tool} -t nat -A PREROUTING -d {vip} -p tcp --dport 80 -j DNAT --to-destination {backend}"
                ));
            };
            serve_by(8080);
            let listener = on("pods", || TcpListener::bind((backend, 8080)).unwrap());
            let [mut client, _pod] = connect(SocketAddr::new(vip, 80), &listener);
            serve_by(8081);
            sh("conntrack -F 2>/dev/null");
            client.write_all(b"late").unwrap();
            let told = client.read(&mut [0; 4]).unwrap_err();
            let case = format!("{family}, by a node: {by_a_node}");
            assert_eq!(told.kind(), ErrorKind::ConnectionReset, "{case}");
        }
    }
}

each_mode!(the_middle_of_a_services_connection_is_reset_by_the_pod);

/// The host `gateway`.
fn gateway(family: Family) -> IpAddr {
    ip(match family {
        Family::V4 => "192.0.2.12",
        Family::V6 => "2001:db8:1::12",
    })
}

/// A VPN, or a network behind one node: while that node is nobody's gateway it distrusts no pods of others.
async fn what_pods_of_other_nodes_send_through_this_one_passes(mode: Mode) {
    connect_hosts(mode);
    let mut server = Server::start();
    let mut state = labelled(12);
    for FamilyState { firewall, .. } in state.families.values_mut() {
        firewall.remote_pods.clear();
        firewall.local_pods.clear();
    }
    reach_and_die(mode, &state);
    let others = ["10.244.2.9", "fd00:10:244:2::9"].map(ip);
    let sockets = on("gateway", || {
        // That node leaves it to this one.
        for tool in mode.tools() {
            sh(&format!("{tool} -t nat -F POSTROUTING"));
        }
        sh("ip addr add 10.244.2.9/32 dev lo; ip addr add fd00:10:244:2::9/128 dev lo nodad
            sysctl -qw net.ipv4.conf.all.accept_redirects=0 net.ipv6.conf.eth0.accept_redirects=0
            ip route add 198.51.100.10 via 192.0.2.11; ip route add 2001:db8:2::10 via 2001:db8:1::11");
        others.map(datagrams)
    });
    // As the masquerade of this node has it.
    let expected = of(Carried::Udp, node);
    let mut seen = Seen::new();
    eventually("packets of other pods", || {
        sockets.iter().for_each(|socket| drop(socket.send(b"x")));
        seen.extend(server.seen());
        seen.is_superset(&expected)
    });
    assert_eq!(seen, expected);
}

each_mode!(what_pods_of_other_nodes_send_through_this_one_passes);

/// kube-proxy refuses connections to a Service without endpoints.
fn refuse_port_81_of_first_vips(mode: Mode) {
    for (tool, family) in mode.tools().iter().zip(Family::ALL) {
        for protocol in ["tcp", "udp"] {
            sh(&format!(
                "{tool} -A FORWARD -d {} -p {protocol} --dport 81 -m conntrack --ctstate NEW -j REJECT",
                first_vip(family)
            ));
        }
    }
}

fn connect_to_first_vip(family: Family, from: Option<IpAddr>) -> ErrorKind {
    let domain = match family {
        Family::V4 => socket2::Domain::IPV4,
        Family::V6 => socket2::Domain::IPV6,
    };
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
    if let Some(from) = from {
        socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
    }
    let vip = SocketAddr::new(first_vip(family), 81);
    let result = socket.connect_timeout(&vip.into(), PATIENCE);
    result.unwrap_err().kind()
}

async fn a_refusal_stays_a_refusal(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    route_first_vip_to(12);
    refuse_port_81_of_first_vips(mode);
    on("gateway", || {
        refuse_port_81_of_first_vips(mode);
        // Each would use up what a host may be told.
        sh("sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.eth0.send_redirects=0");
    });
    let mut state = labelled(12);
    // Errors for pods of this node are not egress.
    let v6 = &mut state.families.get_mut(&Family::V6).unwrap().firewall;
    v6.excluded.insert("fd00:10:244:1::/64".parse().unwrap());
    reach_and_die(mode, &state);
    // An egress pod, and an ordinary one.
    for (family, last) in Family::ALL.into_iter().flat_map(|f| [(f, 12), (f, 13)]) {
        let case = format!("pod {last}, {family}");
        let from = pod(family, last);
        let told = on("pods", || connect_to_first_vip(family, Some(from)));
        assert_eq!(told, ErrorKind::ConnectionRefused, "{case}");
        let socket = on("pods", || UdpSocket::bind((from, 0)).unwrap());
        socket.connect((first_vip(family), 81)).unwrap();
        let mut told = None;
        eventually("an error", || {
            let _ = socket.send(b"x");
            told = told.take().or(socket.take_error().unwrap());
            told.is_some()
        });
        assert_eq!(told.unwrap().kind(), ErrorKind::ConnectionRefused, "{case}");
    }
    // A client outside, at the announcer.
    for family in Family::ALL {
        let told = on("outside", || connect_to_first_vip(family, None));
        assert_eq!(told, ErrorKind::ConnectionRefused, "{family}");
    }
}

each_mode!(a_refusal_stays_a_refusal);

/// The server is a virtual machine on the bridge of a node that is nobody's gateway, and bridged packets pass its
/// firewall, as Kubernetes wants it.
async fn a_machine_on_the_bridge_of_a_node_hears_the_vip(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    add_gateway("bystander", 13, mode);
    on("bystander", || {
        sh("ip link set eth0 down; ip link set eth0 name port; ip addr flush dev port
            ip link add eth0 type bridge; ip link set port master eth0; ip link set port up; ip link set eth0 up
            ip addr add 192.0.2.13/24 dev eth0; ip addr add 2001:db8:1::13/64 dev eth0 nodad
            sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1")
    });
    sh("ip -n lan link set outside nomaster netns bystander
        ip -n bystander link set outside master eth0 up");
    let mut of_others = gateway_of(&[12]);
    for family in of_others.families.values_mut() {
        family.firewall.remote_pods.clear();
        for pod in family.firewall.pods.values_mut() {
            pod.gateway_here = false;
        }
    }
    on("bystander", || reach_and_die(mode, &of_others));
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    let talk = Talk::connected(12);
    let accepted = server.accept();
    let expected = all_from(&Family::ALL.map(first_vip).into());
    assert_eq!(talk.arrive(&mut server, &expected), expected);
    let passed = on("bystander", || sh("conntrack -L -p tcp 2>/dev/null"));
    assert!(
        passed.contains("src=192.0.2.200"),
        "does not pass: {passed}"
    );
    for mut stream in &accepted {
        stream.write_all(b"late").unwrap();
    }
    talk.hear(b"late");
}

each_mode!(a_machine_on_the_bridge_of_a_node_hears_the_vip);
