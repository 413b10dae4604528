//! Settings of the kernel by which forwarded packets or connections are lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};

use crate::state::{Family, Obstacle, ReversePath, Surroundings};

/// Those of the network namespace that the reader is in.
const ROOT: &str = "/proc/sys/net";
/// The main table of IPv4.
const ROUTES: &str = "/proc/thread-self/net/route";
/// Nodes with more routes than this follow a routing daemon; where answers go there is not foreseen.
const MOST_ROUTES: usize = 4096;
/// `RTF_REJECT` of linux/route.h.
const REJECT: u32 = 0x200;
/// Value of rp_filter: what comes in by another interface than its source is reached by is dropped.
const STRICT: u32 = 1;

fn read(name: &str) -> Option<u32> {
    let text = fs::read_to_string(format!("{ROOT}/{name}")).ok()?;
    text.trim().parse().ok()
}

/// Notes what they say of a family, for interfaces that have addresses.
pub(super) fn read_into(family: Family, interfaces: &[String], found: &mut Surroundings) {
    // Absent without connection tracking, where nothing of ours would work.
    if read("netfilter/nf_conntrack_tcp_loose") == Some(0) {
        found.obstacles.insert(Obstacle::StrictTracking);
    }
    let off = match family {
        Family::V4 => read("ipv4/ip_forward") == Some(0),
        Family::V6 => {
            let is_zero = |name| read(&format!("ipv6/conf/all/{name}")).unwrap_or(0) == 0;
            is_zero("forwarding") && is_zero("force_forwarding")
        }
    };
    let name = match family {
        Family::V4 => "net.ipv4.ip_forward",
        Family::V6 => "net.ipv6.conf.all.forwarding",
    };
    if off {
        let obstacle = Obstacle::ForwardingOff(name.to_owned());
        found.obstacles.insert(obstacle);
    }
    if family == Family::V4 {
        let is_off = |name: &&String| read(&format!("ipv4/conf/{name}/forwarding")) == Some(0);
        let not_forwarding = interfaces.iter().filter(|name| !off && is_off(name));
        found.not_forwarding = not_forwarding.cloned().collect();
        found.reverse_path = reverse_path(interfaces);
    }
}

fn reverse_path(interfaces: &[String]) -> ReversePath {
    let filter = |name: &str| read(&format!("ipv4/conf/{name}/rp_filter")).unwrap_or_default();
    let of_all = filter("all");
    let is_strict = |name: &&String| filter(name).max(of_all) == STRICT;
    let strict: BTreeSet<String> = interfaces.iter().filter(is_strict).cloned().collect();
    let routes = match (strict.is_empty(), fs::File::open(ROUTES)) {
        (false, Ok(file)) => {
            let lines = BufReader::new(file).lines().map_while(Result::ok);
            routes(lines.take(MOST_ROUTES + 1))
        }
        _ => BTreeMap::new(),
    };
    ReversePath { strict, routes }
}

/// Destinations and interfaces of `/proc/net/route`; none where there are too many.
fn routes(lines: impl Iterator<Item = String>) -> BTreeMap<IpNet, String> {
    let mut routes: BTreeMap<IpNet, (u32, String)> = BTreeMap::new();
    let mut count = 0;
    for line in lines {
        count += 1;
        let Some((net, metric, interface)) = route(&line) else {
            continue;
        };
        let better = routes.get(&net).is_none_or(|(other, _)| metric < *other);
        if better {
            routes.insert(net, (metric, interface));
        }
    }
    if count > MOST_ROUTES {
        return BTreeMap::new();
    }
    let routes = routes.into_iter();
    routes.map(|(net, (_, name))| (net, name)).collect()
}

fn route(line: &str) -> Option<(IpNet, u32, String)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [interface, destination, _, flags, _, _, metric, mask, ..] = words.as_slice() else {
        return None;
    };
    let number = |text: &str| u32::from_str_radix(text, 16).ok();
    // Printed as the number that the bytes are on this machine.
    let address = |text: &str| Some(Ipv4Addr::from(number(text)?.to_ne_bytes()));
    if number(flags)? & REJECT != 0 {
        return None;
    }
    let net = Ipv4Net::with_netmask(address(destination)?, address(mask)?).ok()?;
    Some((net.into(), metric.parse().ok()?, (*interface).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_main_table_is_read_with_the_better_of_two_routes() {
        let text = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth1\t00000000\tFE0200C0\t0003\t0\t0\t200\t00000000\t0\t0\t0
eth0\t00000000\tFE0200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
flannel.1\t0002F40A\t0002F40A\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0
*\t0003F40A\t00000000\t0200\t0\t0\t0\t00FFFFFF\t0\t0\t0
";
        let found = routes(text.lines().map(str::to_owned));
        let expected = [("0.0.0.0/0", "eth0"), ("10.244.2.0/24", "flannel.1")];
        if cfg!(target_endian = "little") {
            let expected = expected.map(|(net, name)| (net.parse().unwrap(), name.to_owned()));
            assert_eq!(found, expected.into());
        }
        let many = std::iter::repeat_n(text.lines().nth(1).unwrap(), MOST_ROUTES + 1);
        assert_eq!(routes(many.map(str::to_owned)), BTreeMap::new());
    }
}
