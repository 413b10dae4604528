//! `metaleg-agent`: reads the settings, starts logging, and runs the agent until a signal ends it, or one of the
//! operator's commands.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};

use metaleg::agent;
use metaleg::cli::{self, Action, CliError, PlanFormat};
use metaleg::cluster::client;
use metaleg::cluster::leases::BootId;
use metaleg::cluster::watch::{self, Cluster};
use metaleg::commands;
use metaleg::kernel::{self, NodeKernel};
use metaleg::lan::Lan;
use metaleg::plan::places::{Places, choose};
use metaleg::report::{self, Report};
use metaleg::settings::{AnnouncerSource, Settings};
use metaleg::tasks::Tasks;
use tracing::{info, warn};

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
    report::log::start(&settings);
    // One core is plenty, and each further thread costs memory on every node.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build();
    let runtime = runtime.context("cannot start the async runtime");
    let result = runtime.and_then(|runtime| runtime.block_on(start(action, &settings)));
    result.unwrap_or_else(|error| fail(&error, 1))
}

async fn start(action: Action, settings: &Settings) -> Result<ExitCode> {
    let is_good = match action {
        Action::Run => run(settings).await.map(|()| true)?,
        Action::Plan(format) => show_plan(settings, format).await.map(|()| true)?,
        Action::Cleanup => commands::cleanup::run(settings, &mut std::io::stdout()).await?,
    };
    Ok(ExitCode::from(u8::from(!is_good)))
}

/// The settings with the places that are free on this node; what is not as the settings have it is told.
async fn placed(settings: &Settings) -> Settings {
    match kernel::survey(settings).await {
        Ok(survey) => {
            let Places { settings, notes } = choose(settings, &survey);
            notes.iter().for_each(|note| warn!("{note}"));
            settings
        }
        Err(error) => {
            let error = anyhow::Error::from(error);
            warn!("cannot see what else uses marks and routing rules: {error:#}");
            settings.clone()
        }
    }
}

async fn show_plan(settings: &Settings, format: PlanFormat) -> Result<()> {
    let (client, _) = client::connect().await?;
    let settings = &placed(settings).await;
    let mut kernel = NodeKernel::open(settings).await?;
    let (cluster, mut tasks) = (Arc::new(Cluster::default()), Tasks::default());
    watch::start(client, settings, &cluster, &mut tasks);
    let text = commands::plan::run(settings, &cluster, &mut kernel, format).await?;
    // A reader that goes away early is no failure.
    let _ = write!(std::io::stdout(), "{text}");
    Ok(())
}

async fn run(settings: &Settings) -> Result<()> {
    let (client, server) = client::connect().await?;
    let settings = &placed(settings).await;
    let mut kernel = NodeKernel::open(settings).await?;
    let (cluster, mut tasks) = (Arc::new(Cluster::default()), Tasks::default());
    let is_wanted = settings.sources.contains(&AnnouncerSource::Lan);
    let lan = is_wanted.then(|| Arc::new(Lan::start(&mut tasks)));
    let boot = BootId::of_this_node().context("cannot read which boot of the node this is")?;
    let report = Report::start(
        &cluster,
        lan.clone(),
        kernel.challenges(),
        &client,
        settings,
        boot,
        &mut tasks,
    );
    report::serve(&report, settings, &mut tasks).await?;
    info!(
        version = env!("CARGO_PKG_VERSION"),
        node = %settings.node_name,
        %server,
        kernel = %kernel.describe(),
        "starting"
    );
    watch::start(client, settings, &cluster, &mut tasks);
    let (lan, stop) = (lan.as_deref(), tasks.run());
    let result = agent::run(settings, &cluster, &report, &mut kernel, lan, stop).await;
    info!("stopped: the data plane stays as it is");
    Ok(result?)
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    // Nothing is left to report to when this fails.
    let _ = writeln!(std::io::stderr(), "metaleg-agent: {error:#}");
    ExitCode::from(code)
}
