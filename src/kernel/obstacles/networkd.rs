//! systemd-networkd, which removes rules and routes of others when it is restarted, unless it is told not to.
//!
//! That it runs is seen by its socket, from 255 on. What it is told is in files of the node, which a container sees
//! only where they are mounted: without them nothing is said.

use std::fs;
use std::path::Path;

/// Sockets of the network namespace, by path.
const SOCKETS: &str = "/proc/thread-self/net/unix";
const SOCKET: &str = "/run/systemd/netif/io.systemd.Network";
/// Where it is configured; the first file of a name counts.
const FOLDERS: [&str; 4] = ["/etc", "/run", "/usr/local/lib", "/usr/lib"];
const SETTINGS: [&str; 2] = ["ManageForeignRoutingPolicyRules", "ManageForeignRoutes"];

/// The settings by which it removes what is ours.
pub(super) fn find() -> Vec<&'static str> {
    let runs = fs::read_to_string(SOCKETS).is_ok_and(|sockets| {
        let mut paths = sockets
            .lines()
            .filter_map(|line| line.split(' ').next_back());
        paths.any(|path| path == SOCKET)
    });
    match runs {
        true => harmful(&files()),
        false => Vec::new(),
    }
}

/// The texts of its files, in the order in which they are read; none where they cannot be seen.
fn files() -> Vec<String> {
    let folders = FOLDERS.map(|folder| format!("{folder}/systemd"));
    let main = folders.iter().find_map(|folder| {
        let path = Path::new(folder).join("networkd.conf");
        fs::read_to_string(path).ok()
    });
    let mut parts = std::collections::BTreeMap::new();
    for folder in folders {
        let entries = fs::read_dir(format!("{folder}/networkd.conf.d"));
        for entry in entries.into_iter().flatten().flatten() {
            let name = entry.file_name();
            let is_part = name.to_string_lossy().ends_with(".conf");
            if let (true, Ok(text)) = (is_part, fs::read_to_string(entry.path())) {
                parts.entry(name).or_insert(text);
            }
        }
    }
    main.into_iter().chain(parts.into_values()).collect()
}

/// Pure: the settings that are not `no` in the end.
fn harmful(files: &[String]) -> Vec<&'static str> {
    if files.is_empty() {
        return Vec::new();
    }
    let is_no = |name: &&'static str| {
        let lines = files.iter().flat_map(|text| text.lines());
        let mut values = lines.filter_map(|line| {
            let (key, value) = line.split_once('=')?;
            (key.trim() == *name).then(|| value.trim().to_lowercase())
        });
        values
            .next_back()
            .is_some_and(|value| ["no", "false", "0", "off"].contains(&value.as_str()))
    };
    SETTINGS.into_iter().filter(|name| !is_no(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_of_the_files_counts_and_without_files_nothing_is_said() {
        let [rules, routes] = SETTINGS;
        let default = format!("[Network]\n#{rules}=yes\n");
        for (files, expected) in [
            (vec![], vec![]),
            (vec![default.clone()], vec![rules, routes]),
            (
                vec![default.clone(), format!("[Network]\n{rules}=no\n")],
                vec![routes],
            ),
            (
                vec![
                    format!("{rules} = no\n{routes}=false"),
                    format!("{rules}=yes"),
                ],
                vec![rules],
            ),
        ] {
            assert_eq!(harmful(&files), expected);
        }
    }
}
