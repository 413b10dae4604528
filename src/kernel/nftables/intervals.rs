//! Networks as the kernel keeps them in a set: as the ends of intervals. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};

use crate::state::Family;

/// The networks between the ends of intervals, as the kernel keeps them: `true` marks the first address after
/// an interval.
pub(crate) fn networks(family: Family, mut ends: Vec<(IpAddr, bool)>) -> BTreeSet<IpNet> {
    // Where one interval directly follows another, its start is the other's end, and has to come after it.
    ends.sort_by_key(|(address, is_end)| (*address, !is_end));
    let mut nets = BTreeSet::new();
    let mut start = None;
    for (address, is_end) in ends {
        match (start, is_end) {
            (None, false) => start = Some(address),
            (Some(first), true) => {
                if let Some(last) = before(address) {
                    nets.extend(cover(first, last));
                }
                start = None;
            }
            // An end without a start is how nft marks the beginning of the address space.
            _ => {}
        }
    }
    if let Some(first) = start {
        nets.extend(cover(first, last_of(family)));
    }
    nets
}

/// The first address after a network; `None` at the end of the address space.
pub(crate) fn after(net: &IpNet) -> Option<IpAddr> {
    Some(match net.broadcast() {
        IpAddr::V4(last) => Ipv4Addr::from(u32::from(last).checked_add(1)?).into(),
        IpAddr::V6(last) => Ipv6Addr::from(u128::from(last).checked_add(1)?).into(),
    })
}

fn before(address: IpAddr) -> Option<IpAddr> {
    Some(match address {
        IpAddr::V4(v4) => Ipv4Addr::from(u32::from(v4).checked_sub(1)?).into(),
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6).checked_sub(1)?).into(),
    })
}

fn last_of(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::BROADCAST.into(),
        Family::V6 => Ipv6Addr::from(u128::MAX).into(),
    }
}

/// The networks that make up a range.
fn cover(first: IpAddr, last: IpAddr) -> Vec<IpNet> {
    match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) => {
            Ipv4Subnets::new(first, last, 0).map(IpNet::V4).collect()
        }
        (IpAddr::V6(first), IpAddr::V6(last)) => {
            Ipv6Subnets::new(first, last, 0).map(IpNet::V6).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(nets: &[&str]) -> Vec<(IpAddr, bool)> {
        let mut ends = Vec::new();
        for net in nets {
            let net: IpNet = net.parse().unwrap();
            ends.push((net.network(), false));
            ends.extend(after(&net).map(|next| (next, true)));
        }
        ends
    }

    #[test]
    fn networks_survive_the_way_through_intervals() {
        for (family, nets) in [
            (
                Family::V4,
                &[
                    "10.244.0.0/16",
                    "192.0.2.11/32",
                    "192.0.2.12/31",
                    "255.255.255.255/32",
                ][..],
            ),
            (Family::V4, &["0.0.0.0/0"]),
            (
                Family::V6,
                &[
                    "::1/128",
                    "fd00:10:244::/64",
                    "fd00:10:244:1::/64",
                    "ff00::/8",
                ],
            ),
        ] {
            let expected: BTreeSet<IpNet> = nets.iter().map(|net| net.parse().unwrap()).collect();
            let mut ends = ends(nets);
            assert_eq!(networks(family, ends.clone()), expected);
            ends.reverse();
            ends.push((
                if family == Family::V4 {
                    "0.0.0.0"
                } else {
                    "::"
                }
                .parse()
                .unwrap(),
                true,
            ));
            if nets[0] != "0.0.0.0/0" {
                assert_eq!(networks(family, ends), expected);
            }
        }
    }

    #[test]
    fn a_range_that_is_no_network_becomes_several() {
        let range = vec![
            ("192.0.2.11".parse().unwrap(), false),
            ("192.0.2.14".parse().unwrap(), true),
        ];
        let found: Vec<String> = networks(Family::V4, range)
            .iter()
            .map(IpNet::to_string)
            .collect();
        assert_eq!(found, ["192.0.2.11/32", "192.0.2.12/31"]);
    }
}
