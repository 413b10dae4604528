//! `metaleg-lab`: builds the lab's programs, starts a lab, or shows MetalEG at work in one.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Arg, ArgAction, ArgMatches, Command};
use metaleg_lab::binaries::Binaries;
use metaleg_lab::probe::Protocol;
use metaleg_lab::{
    Family, KubeProxy, Lab, Masquerade, Options, Outside, SOON, ServiceSpec, eventually, say,
};

fn main() -> ExitCode {
    match run(&command().get_matches()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say!("failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command() -> Command {
    let choice = |name: &'static str, values: &'static [&'static str]| {
        Arg::new(name)
            .long(name)
            .value_parser(values.to_vec())
            .default_value(values[0])
    };
    let agent = Arg::new("agent")
        .long("agent")
        .value_parser(clap::value_parser!(PathBuf))
        .help("The agent to run [default: metaleg-agent beside this program]");
    let with_options = |command: Command| {
        command
            .arg(agent.clone())
            .arg(choice("kube-proxy", &["iptables", "nftables"]))
            .arg(choice(
                "masquerade",
                &["iptables-nft", "iptables-legacy", "nft-table"],
            ))
    };
    let keep = Arg::new("keep")
        .long("keep")
        .action(ArgAction::SetTrue)
        .help("Leave the lab running until Ctrl-C");
    Command::new("metaleg-lab")
        .about("A real Kubernetes with MetalLB in network namespaces of this machine")
        .subcommand_required(true)
        .subcommand(
            Command::new("build")
                .about("Build Kubernetes, etcd and MetalLB, or find them in the cache"),
        )
        .subcommand(with_options(
            Command::new("up").about("Start a lab with MetalEG and leave it running"),
        ))
        .subcommand(with_options(
            Command::new("demo").about("Show MetalEG at work").arg(keep),
        ))
}

fn run(matches: &ArgMatches) -> Result<()> {
    match matches.subcommand() {
        Some(("build", _)) => Binaries::build().map(drop),
        Some(("up", matches)) => {
            let mut lab = start(matches)?;
            lab.install_metaleg()?;
            stay(&lab)
        }
        Some(("demo", matches)) => demo(matches),
        _ => bail!("no such command"),
    }
}

fn start(matches: &ArgMatches) -> Result<Lab> {
    let option = |name: &str| {
        matches
            .get_one::<String>(name)
            .map(String::as_str)
            .unwrap_or_default()
    };
    let options = Options {
        nodes: 3,
        kube_proxy: match option("kube-proxy") {
            "nftables" => KubeProxy::Nftables,
            _ => KubeProxy::Iptables,
        },
        masquerade: match option("masquerade") {
            "iptables-legacy" => Masquerade::IptablesLegacy,
            "nft-table" => Masquerade::NftTable,
            _ => Masquerade::IptablesNft,
        },
        agent: agent(matches)?,
        settings: Vec::new(),
    };
    let started = Instant::now();
    say!(
        "starting etcd, Kubernetes and MetalLB on {} nodes in network namespaces",
        options.nodes
    );
    let lab = Lab::start(options)?;
    say!("  up in {:.1} s", started.elapsed().as_secs_f64());
    Ok(lab)
}

/// The agent that was named, or the one that was built beside this program.
fn agent(matches: &ArgMatches) -> Result<PathBuf> {
    if let Some(path) = matches.get_one::<PathBuf>("agent") {
        return Ok(path.clone());
    }
    let path = std::env::current_exe()?.with_file_name("metaleg-agent");
    if !path.exists() {
        bail!("{} is missing: run cargo build --workspace", path.display());
    }
    Ok(path)
}

fn stay(lab: &Lab) -> Result<()> {
    say!("\nThe lab is running until Ctrl-C.\n");
    say!(
        "  kubeconfig        {}/admin.kubeconfig (its API server is reached from inside the lab)",
        lab.directory().display()
    );
    say!("  kubectl           {} get nodes", lab.kubectl_command());
    for number in lab.node_numbers() {
        let host = lab.node(number);
        say!(
            "  enter {}       nsenter -t {} -n -m",
            host.name,
            host.pid()
        );
    }
    say!("  there, look at    ip rule; ip route show table 100001; nft list table inet metaleg");
    say!("  logs              {}/logs", lab.directory().display());
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

const PODS: [&str; 3] = ["shop-1", "shop-2", "shop-3"];

fn demo(matches: &ArgMatches) -> Result<()> {
    let mut lab = start(matches)?;
    say!("installing MetalEG: kubectl apply -k k8s");
    let started = Instant::now();
    lab.install_metaleg()?;
    say!(
        "  ready on every node in {:.1} s",
        started.elapsed().as_secs_f64()
    );

    say!("creating Service `shop` (LoadBalancer, dual-stack) with a pod on each node");
    for (number, pod) in (1..).zip(PODS) {
        lab.create_pod(pod, number, "shop")?;
    }
    let vips = lab.create_service(&ServiceSpec::new("shop"))?;
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    let shown: Vec<String> = vips.iter().map(ToString::to_string).collect();
    say!(
        "  MetalLB gives it {} and announces them from node{gateway}\n",
        shown.join(" and ")
    );

    say!("Before: what an outside server sees when each pod connects to it");
    show(&lab)?;

    say!("\n$ kubectl label service shop metaleg.de/rewriteSrcIP=true\n");
    lab.label_service("shop", true)?;
    wait_until_vips_are_seen(&lab, &vips)?;
    say!("After: the Service's own address, from every node, through node{gateway}");
    show(&lab)?;

    let streams = PODS.map(|pod| lab.open_stream(pod, Outside::Far, Family::V4));
    let next = lab
        .node_numbers()
        .find(|number| *number != gateway)
        .context("only one node")?;
    say!(
        "\nMoving the announcement from node{gateway} to node{next}, with a connection of each pod left open\n"
    );
    lab.move_announcement(&vips, next)?;
    wait_until_vips_are_seen(&lab, &vips)?;
    say!("Moved: the gateway is node{next} now, the address is the same");
    show(&lab)?;
    for (pod, stream) in PODS.iter().zip(streams) {
        let seen = stream.and_then(|mut stream| stream.ask(SOON));
        match seen {
            Ok(seen) => {
                let address = seen.address();
                let shown = address.map_or(seen.to_string(), |address| address.to_string());
                say!(
                    "  the connection that {pod} opened before the move goes on, still as {shown}"
                );
            }

            Err(error) => {
                say!("  the connection that {pod} opened before the move is broken: {error:#}")
            }
        }
    }
    if matches.get_flag("keep") {
        return stay(&lab);
    }
    say!("\nDone. `make demo KEEP=1` leaves the lab running to look around.");
    Ok(())
}

fn show(lab: &Lab) -> Result<()> {
    say!("  {:<8} {:<7} {:<28} {:<28}", "pod", "node", "IPv4", "IPv6");
    for (number, pod) in (1..).zip(PODS) {
        let mut cells = Vec::new();
        for family in Family::BOTH {
            let seen = lab.source_seen(pod, Outside::Far, family, Protocol::Tcp)?;
            cells.push(
                seen.address()
                    .map_or(seen.to_string(), |address| address.to_string()),
            );
        }
        say!(
            "  {pod:<8} {:<7} {:<28} {:<28}",
            format!("node{number}"),
            cells[0],
            cells[1]
        );
    }
    Ok(())
}

fn wait_until_vips_are_seen(lab: &Lab, vips: &[std::net::IpAddr]) -> Result<()> {
    for pod in PODS {
        for (family, vip) in Family::BOTH.into_iter().zip(vips) {
            eventually(SOON, &format!("{pod} leaves as {vip}"), || {
                let seen = lab.source_seen(pod, Outside::Far, family, Protocol::Tcp)?;
                Ok((seen.address() == Some(*vip)).then_some(()))
            })?;
        }
    }
    Ok(())
}
