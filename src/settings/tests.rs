use super::*;

fn parse(given: &[(&str, &str)]) -> Result<Settings, String> {
    let mut values = vec![("NODE_NAME", "node1")];
    values.extend_from_slice(given);
    Settings::parse(|name| {
        let found = values.iter().rev().find(|(n, _)| *n == name);
        found.map(|(_, v)| (*v).to_owned()).unwrap_or_default()
    })
    .map_err(|error| error.to_string())
}

#[test]
fn defaults_are_those_of_the_definitions() {
    let settings = parse(&[]).unwrap();
    assert_eq!(settings.metallb_namespace, "metallb-system");
    assert_eq!(settings.mask.bits(), 0x00f0_0000);
    assert_eq!(settings.mask.slots(), 15);
    assert_eq!(settings.table_offset, 100_000);
    assert_eq!(settings.reconciliation_interval, Duration::from_secs(300));
    assert_eq!(
        settings.metrics_address,
        Some("[::]:21793".parse().unwrap())
    );
    assert!(settings.filter_endpoints_for_node && settings.excluded.auto);
}

#[test]
fn bad_values_are_one_line_that_names_the_setting_and_the_value() {
    for (name, value, line) in [
        (
            "NODE_NAME",
            " ",
            "NODE_NAME is not set: must be the name of this Kubernetes node (in a pod: fieldRef spec.nodeName)",
        ),
        (
            "FIREWALL_MASK",
            "15728640",
            "FIREWALL_MASK=15728640: must be a hexadecimal number such as 0x00F00000",
        ),
        (
            "FIREWALL_MASK",
            "0x0F0F0000",
            "FIREWALL_MASK=0x0F0F0000: is not contiguous, must be one block of bits such as 0x00F00000",
        ),
        (
            "FIREWALL_MASK",
            "0x0",
            "FIREWALL_MASK=0x0: has no bit, must be one block of bits such as 0x00F00000",
        ),
        (
            "FIREWALL_BACKEND",
            "ebpf",
            "FIREWALL_BACKEND=ebpf: unknown, must be auto or nftables or iptables",
        ),
        (
            "ROUTE_BACKEND",
            "bgp",
            "ROUTE_BACKEND=bgp: unknown, must be netlink",
        ),
        (
            "FIREWALL_EXCLUDE_DST_CIDRS",
            "auto,10.0.0.0/33",
            "FIREWALL_EXCLUDE_DST_CIDRS=auto,10.0.0.0/33: `10.0.0.0/33` is neither `auto` nor a CIDR such as 10.0.0.0/8",
        ),
        (
            "ROUTE_TABLE_ID_OFFSET",
            "4294967290",
            "ROUTE_TABLE_ID_OFFSET=4294967290: too large: the table numbers do not fit into 32 bits",
        ),
        (
            "ROUTE_RULE_PRIORITY",
            "32700",
            "ROUTE_RULE_PRIORITY=32700: must be from 1 to 32666: ahead of the rule for the main table",
        ),
        (
            "RECONCILIATION_INTERVAL",
            "5 minuts",
            "RECONCILIATION_INTERVAL=5 minuts: must be a duration such as 30s, 5m or 1h 30m",
        ),
        (
            "RECONCILIATION_INTERVAL",
            "0s",
            "RECONCILIATION_INTERVAL=0s: must be at least 1s",
        ),
        (
            "FILTER_ENDPOINTS_FOR_NODE",
            "yes",
            "FILTER_ENDPOINTS_FOR_NODE=yes: must be true or false",
        ),
        (
            "METRICS_BIND_ADDRESS",
            "localhost",
            "METRICS_BIND_ADDRESS=localhost: must be an address such as :21793 or 127.0.0.1:21793, or 0 for none",
        ),
        (
            "ANNOUNCER_SOURCES",
            "wire",
            "ANNOUNCER_SOURCES=wire: unknown, must be status,wire or status",
        ),
        (
            "LOG_FORMAT",
            "xml",
            "LOG_FORMAT=xml: unknown, must be text or json",
        ),
    ] {
        assert_eq!(parse(&[(name, value)]).unwrap_err(), line);
    }
}

#[test]
fn excluded_destinations_are_found_out_listed_or_both() {
    let excluded = |text| {
        parse(&[("FIREWALL_EXCLUDE_DST_CIDRS", text)])
            .unwrap()
            .excluded
    };
    let listed: BTreeSet<IpNet> = [
        "10.0.0.0/8".parse().unwrap(),
        "fd00::1/128".parse().unwrap(),
    ]
    .into();
    assert_eq!(
        excluded("10.1.2.3/8, fd00::1"),
        ExcludedDestinations {
            auto: false,
            listed: listed.clone()
        }
    );
    assert_eq!(
        excluded("auto,10.0.0.0/8,fd00::1,10.0.0.0/8"),
        ExcludedDestinations { auto: true, listed }
    );
}

#[test]
fn announcer_sources_are_a_set_that_holds_the_objects() {
    use AnnouncerSource::{Lan, Status};
    for (text, expected) in [
        ("status", vec![Status]),
        ("status,wire", vec![Status, Lan]),
        ("wire, status", vec![Status, Lan]),
    ] {
        let settings = parse(&[("ANNOUNCER_SOURCES", text)]).unwrap();
        assert!(settings.sources.into_iter().eq(expected), "{text}");
    }
}

#[test]
fn an_empty_value_is_the_default() {
    assert_eq!(parse(&[("FIREWALL_MASK", "")]), parse(&[]));
}

#[test]
fn the_readme_has_a_row_for_every_setting() {
    let readme = include_str!("../../README.md");
    for definition in DEFINITIONS {
        let default = match definition.default {
            "" => String::new(),
            default => format!("`{default}`"),
        };
        let row = format!(
            "| `{}` | {default} | {} |",
            definition.name, definition.help
        );
        assert!(readme.contains(&row), "missing in README.md: {row}");
    }
}
