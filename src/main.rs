//! `metaleg-agent`: reads the settings, starts logging, and runs the agent until a signal ends it, or one of the
//! operator's commands.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};

use metaleg::agent;
use metaleg::cli::{self, Action, CliError, PlanFormat};
use metaleg::cluster::client;
use metaleg::cluster::leases::BootId;
use metaleg::cluster::watch::{self, Cluster};
use metaleg::commands;
use metaleg::kernel::NodeKernel;
use metaleg::lan::Lan;
use metaleg::report::{self, Report, events, health, metrics};
use metaleg::settings::{LogFormat, Settings};
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;
use tracing_subscriber::EnvFilter;

/// Exit code for settings that make no sense: nothing was changed.
const BAD_SETTINGS: u8 = 2;

fn main() -> ExitCode {
    let (action, settings) = match cli::load(std::env::args_os()) {
        Ok(loaded) => loaded,
        Err(CliError::Asked(text)) => {
            // A reader that goes away early is no failure.
            let _ = write!(std::io::stdout(), "{text}");
            return ExitCode::SUCCESS;
        }
        Err(error @ CliError::Bad(_)) => return fail(&error.into(), BAD_SETTINGS),
    };
    start_logging(&settings);
    // One core is plenty, and each further thread costs memory on every node.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = runtime
        .context("cannot start the async runtime")
        .and_then(|runtime| {
            runtime.block_on(async {
                match action {
                    Action::Run => run(&settings).await.map(|()| ExitCode::SUCCESS),
                    Action::Plan(format) => show_plan(&settings, format).await,
                    Action::Cleanup => clean_up(&settings).await,
                }
            })
        });
    result.unwrap_or_else(|error| fail(&error, 1))
}

async fn show_plan(settings: &Settings, format: PlanFormat) -> Result<ExitCode> {
    let (client, _) = client::connect().await?;
    let mut kernel = NodeKernel::open(settings).await?;
    let cluster = Arc::new(Cluster::default());
    let report = Report::new(cluster.clone());
    let _watches = watch::start(
        &client,
        &settings.node_name,
        &settings.metallb_namespace,
        &cluster,
    );
    let text = commands::plan::run(settings, &cluster, &report, &mut kernel, format).await?;
    // A reader that goes away early is no failure.
    let _ = write!(std::io::stdout(), "{text}");
    Ok(ExitCode::SUCCESS)
}

async fn clean_up(settings: &Settings) -> Result<ExitCode> {
    let is_clean = commands::cleanup::run(settings, &mut std::io::stdout()).await?;
    Ok(if is_clean {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn run(settings: &Settings) -> Result<()> {
    let (client, server) = client::connect().await?;
    let mut kernel = NodeKernel::open(settings).await?;
    let cluster = Arc::new(Cluster::default());
    let (events, told) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(events::publish(
        client.clone(),
        settings.node_name.clone(),
        told,
    ));
    let boot = BootId::of_this_node().context("cannot read which boot of the node this is")?;
    let (report, lease) = Report::new(cluster.clone()).with_events(events).with_lease(
        client.clone(),
        &settings.metallb_namespace,
        settings.node_name.clone(),
        boot,
    );
    tokio::spawn(lease);
    let report = Arc::new(report);
    if let Some(address) = settings.health_address {
        let listener = report::listen(address)
            .await
            .with_context(|| format!("HEALTH_PROBE_BIND_ADDRESS: cannot listen on {address}"))?;
        tokio::spawn(report::serve(listener, health::router(report.clone())));
    }
    if let Some(address) = settings.metrics_address {
        let listener = report::listen(address)
            .await
            .with_context(|| format!("METRICS_BIND_ADDRESS: cannot listen on {address}"))?;
        tokio::spawn(report::serve(listener, metrics::router(report.clone())));
    }
    info!(
        version = env!("CARGO_PKG_VERSION"),
        node = %settings.node_name,
        %server,
        kernel = %kernel.describe(),
        "starting"
    );
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let shutdown = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let _watches = watch::start(
        &client,
        &settings.node_name,
        &settings.metallb_namespace,
        &cluster,
    );
    let wire = match settings.wire {
        true => Some(Lan::start().context("cannot listen on the LAN")?),
        false => None,
    };
    agent::run(
        settings,
        &cluster,
        &report,
        &mut kernel,
        wire.as_ref(),
        shutdown,
    )
    .await;
    info!("stopped: the data plane stays as it is");
    Ok(())
}

fn start_logging(settings: &Settings) {
    // Checked when the settings were read. The client's own complaints come first, so that the operator's words
    // override: each of them is told again by the watch that failed, once and not for every try.
    let filter = EnvFilter::new(format!("kube_client=off,{}", settings.log_filter));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match settings.log_format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    // Nobody is left to tell when this fails.
    let _ = writeln!(std::io::stderr(), "metaleg-agent: {error:#}");
    ExitCode::from(code)
}
