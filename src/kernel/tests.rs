//! The shape of this folder: who imports whom. And the page of docs that shows what the backends make.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::kernel::ours::OwnSet;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// What is below this folder.
const GROUND: [&str; 4] = ["error", "ethernet", "names", "state"];

/// Production code by module, such as `nftables::read`; the facade's name is empty.
fn modules() -> BTreeMap<String, String> {
    let mut modules = BTreeMap::new();
    collect(&Path::new(ROOT).join("src/kernel"), "", &mut modules);
    modules.remove("tests");
    modules
}

fn collect(folder: &Path, name: &str, modules: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let below = |stem: &str| match name {
            "" => stem.to_owned(),
            name => format!("{name}::{stem}"),
        };
        if path.is_dir() {
            collect(&path, &below(stem), modules);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let ends = ["\nmod tests {", "\npub(super) mod tests {"];
            let end = ends.into_iter().filter_map(|end| text.find(end)).min();
            let production = text[..end.unwrap_or(text.len())].to_owned();
            let module = if stem == "mod" {
                name.to_owned()
            } else {
                below(stem)
            };
            modules.insert(module, production);
        }
    }
}

/// The paths in a text that begin with a prefix, without it: as far as they name modules or the first item.
fn paths<'a>(text: &'a str, prefix: &str) -> Vec<&'a str> {
    let end = |path: &str| {
        let is_part = |c: char| c.is_ascii_lowercase() || c == '_' || c == ':';
        path.find(|c| !is_part(c)).unwrap_or(path.len())
    };
    let paths = text.split(prefix).skip(1);
    paths
        .map(|path| path[..end(path)].trim_end_matches(':'))
        .collect()
}

/// The modules that a module imports: the longest part of each path that names one.
fn imports(name: &str, text: &str, modules: &BTreeMap<String, String>) -> BTreeSet<String> {
    let own = paths(text, "self::")
        .into_iter()
        .filter(|_| !name.is_empty());
    let own = own.map(|path| format!("{name}::{path}"));
    let others = paths(text, "crate::kernel::")
        .into_iter()
        .map(str::to_owned);
    let module = |path: String| {
        let mut path = path.as_str();
        while !modules.contains_key(path) {
            path = path.rsplit_once("::").map_or("", |(module, _)| module);
        }
        path.to_owned()
    };
    own.chain(others).map(module).collect()
}

#[test]
fn only_the_facade_is_imported_from_above_and_only_the_ground_is_below() {
    let modules = modules();
    assert!(modules.len() > 20, "{modules:?}");
    for (name, text) in &modules {
        assert!(!text.contains(" super::"), "{name} imports by place");
        for path in paths(text, "crate::") {
            let room = path.split("::").next().unwrap();
            let is_facade = ["", "firewall"].contains(&name.as_str()) && room == "settings";
            let is_below = room == "kernel" || GROUND.contains(&room);
            assert!(is_below || is_facade, "{name} imports {room}");
        }
        if !name.is_empty() {
            let imports = imports(name, text, &modules);
            assert!(!imports.contains(""), "{name} imports its facade");
        }
    }
}

#[test]
fn no_files_need_each_other() {
    let modules = modules();
    let mut rest: BTreeMap<&str, BTreeSet<String>> = modules
        .iter()
        .map(|(name, text)| (name.as_str(), imports(name, text, &modules)))
        .collect();
    // Those that import nothing of what is left go, over and over.
    loop {
        let names: BTreeSet<String> = rest.keys().map(|name| (*name).to_owned()).collect();
        let before = rest.len();
        rest.retain(|_, imports| !imports.is_disjoint(&names));
        if rest.len() == before {
            break;
        }
    }
    assert!(rest.is_empty(), "circles among {rest:?}");
}

/// The rows of the first table of docs/data-path.md after a text, as cells without backticks.
pub(super) fn documented(heading: &str) -> Vec<Vec<String>> {
    let page = fs::read_to_string(Path::new(ROOT).join("docs/data-path.md")).unwrap();
    let (_, rest) = page.split_once(heading).unwrap();
    let table = rest.lines().skip_while(|line| !line.starts_with('|'));
    let rows = table.take_while(|line| line.starts_with('|')).skip(2);
    let cells = |row: &str| {
        let cells = row.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().replace('`', "")).collect()
    };
    rows.map(cells).collect()
}

/// The names of a set and of what a backend has for it, from the table of sets; not those of sets that it has none for.
pub(super) fn documented_sets(column: usize) -> BTreeMap<String, String> {
    let rows = documented("## Sets and maps");
    rows.into_iter()
        .map(|row| (row[0].clone(), row[column].clone()))
        .filter(|(_, name)| name != "-")
        .collect()
}

/// What the page calls a set.
pub(super) fn page_name(set: OwnSet) -> String {
    set.word().replace('_', "-")
}
