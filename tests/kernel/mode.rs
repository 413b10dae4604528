//! What the agent is to use, and tests for each of these.

use metaleg::kernel::NodeKernel;
use metaleg::settings::{FirewallBackend, Settings};

use crate::namespace::sh;
use crate::states::MASK;

/// One test for each mode, in a namespace of its own: `each_mode!(what)` makes `what::nftables`,
/// `what::iptables_nft` and `what::iptables_legacy` of `async fn what(mode: Mode)`.
macro_rules! each_mode {
    ($test:ident) => {
        each_mode!($test: nftables, iptables_nft, iptables_legacy);
    };
    ($test:ident: $($mode:ident),+) => {
        mod $test {
            $(
                #[test]
                fn $mode() {
                    $crate::in_namespace(|| super::$test(each_mode!(@ $mode)));
                }
            )+
        }
    };
    (@ nftables) => { $crate::Mode::Nftables };
    (@ iptables_nft) => { $crate::Mode::IptablesNft };
    (@ iptables_legacy) => { $crate::Mode::IptablesLegacy };
}

/// What the agent is to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// A table of its own.
    Nftables,
    /// iptables on nf_tables.
    IptablesNft,
    /// iptables on ip_tables.
    IptablesLegacy,
}

impl Mode {
    pub(crate) const ALL: [Mode; 3] = [Mode::Nftables, Mode::IptablesNft, Mode::IptablesLegacy];

    pub(crate) fn backend(self) -> FirewallBackend {
        match self {
            Mode::Nftables => FirewallBackend::Nftables,
            Mode::IptablesNft | Mode::IptablesLegacy => FirewallBackend::Iptables,
        }
    }

    /// `iptables-nft` or `iptables-legacy`, and the same for IPv6. Where the agent uses nftables, others use the first.
    pub(crate) fn tools(self) -> [String; 2] {
        let variant = match self {
            Mode::Nftables | Mode::IptablesNft => "nft",
            Mode::IptablesLegacy => "legacy",
        };
        ["iptables", "ip6tables"].map(|tool| format!("{tool}-{variant}"))
    }

    /// Everything that the tools show in both families.
    pub(crate) fn save(self) -> String {
        match self {
            Mode::Nftables => sh("nft list ruleset"),
            Mode::IptablesNft | Mode::IptablesLegacy => self
                .tools()
                .map(|tool| sh(&format!("{tool}-save")))
                .concat(),
        }
    }

    /// How many packets have met a rule of ours so far, in both families.
    pub(crate) fn met(self, rule: &str) -> [u64; 2] {
        // The text of a rule, the name in its comment, and what its counter stands behind.
        let listed = match self {
            Mode::Nftables => {
                let table = sh("nft list table inet metaleg");
                [4, 6].map(|family| {
                    (
                        table.clone(),
                        format!("metaleg:{rule}-{family}:"),
                        "packets ",
                    )
                })
            }
            Mode::IptablesNft | Mode::IptablesLegacy => self.tools().map(|tool| {
                (
                    sh(&format!("{tool}-save -c")),
                    format!("metaleg:{rule}:"),
                    "[",
                )
            }),
        };
        listed.map(|(text, name, before)| {
            let line = text.lines().find(|line| line.contains(&name));
            let counter = line.and_then(|line| line.split_once(before));
            let (_, counter) = counter.unwrap_or_else(|| panic!("no rule {name} in {text}"));
            let is_digit = |c: char| c.is_ascii_digit();
            let end = counter.find(|c| !is_digit(c)).unwrap_or(counter.len());
            counter[..end].parse().unwrap()
        })
    }
}

/// The mode of iptables is said the way a kubelet does.
pub(crate) async fn open(mode: Mode) -> NodeKernel {
    open_with(mode, &[]).await
}

/// With settings beside the backend.
pub(crate) async fn open_with(mode: Mode, settings: &[&str]) -> NodeKernel {
    for tool in mode.tools() {
        sh(&format!(
            "{tool} -t mangle -N KUBE-IPTABLES-HINT 2>/dev/null || true"
        ));
    }
    open_kernel(mode.backend(), settings).await
}

pub(crate) async fn open_backend(backend: FirewallBackend) -> NodeKernel {
    open_kernel(backend, &[]).await
}

async fn open_kernel(backend: FirewallBackend, flags: &[&str]) -> NodeKernel {
    let name = match backend {
        FirewallBackend::Auto => "auto",
        FirewallBackend::Nftables => "nftables",
        FirewallBackend::Iptables => "iptables",
    };
    let backend = format!("--firewall-backend={name}");
    let flags = [backend.as_str()].into_iter().chain(flags.iter().copied());
    let settings = settings(&flags.collect::<Vec<_>>());
    assert_eq!(settings.mask.bits(), MASK);
    NodeKernel::open(&settings).await.unwrap()
}

/// The settings of an agent that is started with these flags.
pub(crate) fn settings(flags: &[&str]) -> Settings {
    let args = ["agent", "--node-name=node1"].iter().chain(flags);
    let (_, settings) = metaleg::cli::load(args.map(Into::into)).unwrap();
    settings
}
