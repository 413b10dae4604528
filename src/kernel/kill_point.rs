//! In builds for tests: the agent dies after as many steps as a test says, as SIGKILL ends it.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Names a file with the number of steps to execute before the next one.
const VARIABLE: &str = "METALEG_KILL_POINT";

/// Whether a test waits for the death of this process: then every step is executed by itself.
pub(super) fn is_armed() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|path| fs::exists(path).unwrap_or(false))
}

/// Counts a step that is about to be executed. The file is gone when the process dies.
pub(super) fn before_step() {
    let Some(path) = std::env::var_os(VARIABLE) else {
        return;
    };
    let Ok(text) = fs::read_to_string(&path) else {
        return;
    };
    match text.trim().parse::<usize>() {
        Ok(0) => {
            // A test that finds the file knows that the process did not die.
            let _ = fs::remove_file(&path);
            let _ = kill(Pid::this(), Signal::SIGKILL);
        }
        Ok(steps) => {
            let _ = fs::write(&path, (steps - 1).to_string());
        }
        Err(_) => {}
    }
}
