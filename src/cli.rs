//! The command line: what the program is to do, and a flag for every setting. Only here is the environment read.

use std::ffi::OsString;

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::error::ErrorKind;
use clap::{Arg, Command};
use strum::{EnumString, VariantNames};

use crate::settings::{BadSetting, DEFINITIONS, Settings};

const PLAN: &str = "plan";
const CLEANUP: &str = "cleanup";
const OUTPUT: &str = "output";

/// How a plan is shown.
#[derive(Clone, Copy, Debug, EnumString, PartialEq, Eq, VariantNames)]
#[strum(serialize_all = "lowercase")]
pub enum PlanFormat {
    Table,
    Json,
    Yaml,
}

/// What the program is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Be the node's agent.
    Run,
    /// Show what the node would be made into.
    Plan(PlanFormat),
    /// Remove everything of ours from the node's kernel.
    Cleanup,
}

/// Why there is nothing to do.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// `--help` or `--version`: the text to print, exit code 0.
    #[error("{0}")]
    Asked(String),
    /// An argument or a setting that makes no sense, as one line.
    #[error("{0}")]
    Bad(String),
}

/// What to do, with settings from the command line and the environment.
///
/// # Errors
/// [`CliError::Bad`] for an unknown argument, and for the first setting that makes no sense.
pub fn load(args: impl IntoIterator<Item = OsString>) -> Result<(Action, Settings), CliError> {
    let matches = command().try_get_matches_from(args).map_err(|error| {
        let text = error.to_string();
        if let ErrorKind::DisplayHelp | ErrorKind::DisplayVersion = error.kind() {
            return CliError::Asked(text);
        }
        let line = text.lines().next().unwrap_or_default();
        let line = line.trim_start_matches("error: ");
        CliError::Bad(format!("{line} (see --help)"))
    })?;
    let (action, matches) = match matches.subcommand() {
        None => (Action::Run, &matches),
        Some((CLEANUP, given)) => (Action::Cleanup, given),
        Some((_, given)) => {
            let format = given.get_one(OUTPUT).copied();
            (Action::Plan(format.unwrap_or(PlanFormat::Table)), given)
        }
    };
    let settings = Settings::parse(|name| {
        let given = matches.get_one::<String>(name).cloned().unwrap_or_default();
        match (name, action, given.trim()) {
            // What is removed is the same on every node.
            ("NODE_NAME", Action::Cleanup, "") => "any".to_owned(),
            _ => given,
        }
    })
    .map_err(|BadSetting(line)| CliError::Bad(line))?;
    Ok((action, settings))
}

fn command() -> Command {
    let args = DEFINITIONS.iter().map(|definition| {
        let help = match definition.default {
            "" => definition.help.to_owned(),
            default => format!("{} [default: {default}]", definition.help),
        };
        Arg::new(definition.name)
            .long(definition.flag())
            .env(definition.name)
            .hide_env_values(true)
            .value_name("VALUE")
            .allow_hyphen_values(true)
            .global(true)
            .help(help)
    });
    let formats = PossibleValuesParser::new(PlanFormat::VARIANTS);
    let output = Arg::new(OUTPUT)
        .short('o')
        .long("output")
        .value_parser(formats.try_map(|format| format.parse::<PlanFormat>()))
        .default_value("table")
        .help("How the plan is shown");
    Command::new("metaleg-agent")
        .version(env!("CARGO_PKG_VERSION"))
        .about(
            "MetalEG's agent for one Kubernetes node: pods of labelled Services leave the cluster with the \
             Service's MetalLB address",
        )
        .after_help(
            "Each setting is an environment variable or the flag of the same name; the flag wins.\n\
             Without a command the program is the node's agent, until a signal ends it.\n\
             Exit codes: 0 done, 1 failed, 2 bad settings (nothing was changed).",
        )
        .args(args)
        .subcommand(
            Command::new(PLAN)
                .about("Show what this node would be made into, and why; changes nothing")
                .arg(output),
        )
        .subcommand(Command::new(CLEANUP).about(
            "Remove everything of MetalEG from this node's kernel, also what another backend or an earlier \
             release left; needs no API server. Stop the agent first",
        ))
        .disable_help_subcommand(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_shows_every_setting_with_its_default() {
        let help = command().render_help().to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for definition in DEFINITIONS {
            assert!(
                help.contains(&format!("--{}", definition.flag())),
                "{}",
                definition.name
            );
            assert!(
                help.contains(&format!("[env: {}]", definition.name)),
                "{}",
                definition.name
            );
            assert!(
                help.contains(&format!("[default: {}]", definition.default))
                    || definition.default.is_empty()
            );
        }
    }
}
